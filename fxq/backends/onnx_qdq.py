"""onnx-qdq: the converted graph as ONNX with Q/DQ pairs and integer weights, written directly (no exporter)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar

import torch
from onnx import helper
from torch.fx import GraphModule, Node

from fxq.backends import onnx_float, onnx_ops
from fxq.backends.onnx_codes import fake_quantize
from fxq.backends.onnx_half import LEAST, TOP, to_half
from fxq.backends.onnx_island import Island, find, schedule, splice
from fxq.backends.onnx_limits import refusal
from fxq.backends.onnx_packed import Stored
from fxq.backends.onnx_weighted import NIBBLE, low_bit_forms, shared_forms
from fxq.backends.onnx_wide import Wide
from fxq.backends.onnx_writer import TYPES, Writer, constant, quantizer
from fxq.errors import LoweringError, TargetError
from fxq.graph import input_names, kind, module_of
from fxq.kernels import can_vanish, gives_sign
from fxq.lowering import Artifact, Issue, Lowering
from fxq.modules import Quantized
from fxq.schemes import Scheme
from fxq.shared import SharedWeight
from fxq.targets import Target

EMITTERS = {**onnx_ops.EMITTERS, **onnx_float.EMITTERS}
INT4_OPSET, INT4_IR = 21, 10
MAX_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; the rest is for the graph


class OnnxQdq(Lowering):
    """Writes opset and IR version of the target, a dynamic batch, and names that follow the module path.

    Operations that fxq has no emitter for become float islands: torch's exporter writes them and they are spliced in.

    Args:
        float_dtype: type of the tensors between the Q/DQ nodes, ``fp32`` or ``fp16`` (for targets that place Q/DQ at the inputs of layers:
            TensorRT); inputs and outputs of the file stay float32.
    """

    name: ClassVar[str] = "onnx-qdq"

    def __init__(self, float_dtype: str = "fp32") -> None:
        if float_dtype not in ("fp32", "fp16"):
            raise TargetError(f"unknown float type {float_dtype!r}", way_out="Use fp32 or fp16")
        self.half = float_dtype == "fp16"
        self._found: tuple[GraphModule, list[Island]] | None = None
        self._forms: tuple[GraphModule, dict[str, Stored]] | None = None
        self._shared: dict[str, Stored | Wide | str] = {}

    def _islands(self, gm: GraphModule, target: Target) -> list[Island]:
        """Float islands of ``gm``, exported once for ``check`` and ``emit``."""
        if self._found is None or self._found[0] is not gm:
            self._found = gm, find(gm, lambda n: _foreign(gm, n), target.opset)
        return self._found[1]

    def _written(self, gm: GraphModule, scheme: Scheme, target: Target) -> tuple[Target, dict[str, Stored]]:
        """The target with the opset that the file's types need, and the low-bit forms of weights by module path."""
        if self._forms is None or self._forms[0] is not gm:
            self._forms = gm, low_bit_forms(gm, target)
            self._shared = shared_forms(gm, target)
        forms = self._forms[1]
        int4 = scheme.weight is not None and scheme.weight.bits <= NIBBLE and scheme.weight.signed
        older = (int4 or bool(forms) or bool(self._shared)) and target.opset < INT4_OPSET
        return replace(target, opset=INT4_OPSET, ir_version=INT4_IR) if older else target, forms

    def check(self, gm: GraphModule, scheme: Scheme, target: Target) -> list[Issue]:
        """Everything that cannot be written: operations neither fxq nor torch's exporter can write, foreign outputs, files over 2 GiB."""
        self._found = self._forms = None
        target, forms = self._written(gm, scheme, target)
        issues = [i.fault for i in self._islands(gm, target) if i.fault is not None]
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                issues.extend(_input_faults(gm, node))
            if node.op == "output":
                issues.extend(_output_faults(node.args[0]))
            if node.op == "call_module" and isinstance(module_of(gm, node), Quantized) and refusal(gm, node) is not None:
                issues.append(Issue(node.name, str(refusal(gm, node)), "Leave the layer float with skip="))
            if target.fused and gives_sign(gm, node) and can_vanish(module_of(gm, node), quantizer(gm, node.all_input_nodes[0]).qparams):  # type: ignore[arg-type]
                fact = "its integer sum can be 0, whose sign is +, but a rounding onto a binary grid needs a sum of 1 or -1 at least"
                issues.append(Issue(_path(node), fact, "Give it an int32 bias that is no multiple of its weights' codes, or read it on an 8-bit grid first"))
        issues.extend(self._half_faults(gm, target))
        widths = {id(q.op.weight): q.weight_grid.spec.bits / 8 for q in gm.modules() if isinstance(q, Quantized)}
        widths |= {id(gm.get_submodule(name).op.weight): s.width for name, s in forms.items()}  # type: ignore[union-attr]
        size = sum(p.numel() * widths.get(id(p), p.element_size()) for p in gm.parameters()) + self._shared_bytes(gm, forms)
        if size > MAX_BYTES:
            issues.append(Issue("file", f"the weights take {size / 2**30:.1f} GiB, an ONNX file holds 2", "Quantize more layers, or split the model"))
        return issues

    def _shared_bytes(self, gm: GraphModule, forms: dict[str, Stored]) -> float:
        """Bytes of the weights that are not parameters."""
        size = 0.0
        for path in {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}:
            module: Any = gm.get_submodule(path)
            op = module.op if isinstance(module, Quantized) else module
            if isinstance(op, SharedWeight):
                form: Any = self._shared.get(path) if op is module else forms.get(path)
                plain = 4 if op is module else module.weight_grid.spec.bits / 8
                size += op.codes.numel() * (1 if form == "bytes" else plain if form is None else form.width)
        return size

    def _half_faults(self, gm: GraphModule, target: Target) -> list[Issue]:
        if not self.half:
            return []
        if target.placement != "inputs":
            return [Issue("file", f"target {target.name!r} computes float16 slower than float32 or not at all", "Leave the float type at float32")]
        grids = [(str(n.target), module_of(gm, n)) for n in gm.graph.nodes if kind(gm, n) == "fake_quantize"]
        return [
            Issue(path, f"its scale {float(fq.scale):.3g} is not one that float16 can divide by", "Keep the file in float32 (--float-dtype fp32)")  # type: ignore[arg-type]
            for path, fq in grids
            if not LEAST <= float(fq.scale) <= TOP  # type: ignore[arg-type]
        ]

    def emit(self, gm: GraphModule, scheme: Scheme, target: Target) -> Artifact:
        """Bytes of the ModelProto. ``info``: bytes of weights and file, nodes by type, float operations with reasons, islands.

        Raises:
            LoweringError: when the file would be larger than 2 GiB.
        """
        from fxq import __version__

        target, forms = self._written(gm, scheme, target)
        islands = self._islands(gm, target)
        results = [r for n in gm.graph.nodes if n.op == "output" for r in named_results(n.args[0])]
        w = Writer(gm, target, input_names(gm) + [name for name, _ in results], self.half)
        w.stored = {f"{w.out(n)}/weight": forms[str(n.target)] for n in gm.graph.nodes if n.op == "call_module" and str(n.target) in forms}
        w.shared = {f"{w.out(n)}/weight": self._shared[str(n.target)] for n in gm.graph.nodes if n.op == "call_module" and str(n.target) in self._shared}
        inputs: list[Any] = []
        for unit in schedule(gm, islands):
            if isinstance(unit, Island):
                splice(w, unit)
            elif unit.op == "placeholder":
                w.names[unit] = str(unit.target)
                inputs.extend(_inputs(unit))
            elif unit.op != "output":
                _emit(w, unit)
        outputs = [_output(w, name, n) for name, n in results]
        weights = sum(t.ByteSize() for t in w.initializers.values())
        if weights > MAX_BYTES:
            raise LoweringError(f"the weights take {weights / 2**30:.1f} GiB, an ONNX file holds 2", way_out="Quantize more layers, or split the model")
        graph = helper.make_graph(w.nodes, type(gm).__name__, inputs, outputs, _used(w))
        opset = [helper.make_opsetid("", target.opset)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=target.ir_version, producer_name="fxq", producer_version=__version__)
        props = {"fxq.scheme": scheme.name, "fxq.target": target.name, "fxq.version": __version__}
        helper.set_model_props(model, {**props, "fxq.float": "float16"} if self.half else props)
        model = to_half(model) if self.half else model
        data = model.SerializeToString()
        return Artifact(self.name, data, {"bytes": {"total": len(data), "weights": weights}, **_facts(gm, w, islands)})


def _facts(gm: GraphModule, w: Writer, islands: list[Island]) -> dict[str, Any]:
    floats = [
        {"node": _path(n), "kind": kind(gm, n), "why": n.meta["float_why"]}
        for n in gm.graph.nodes
        if n.meta.get("float_why") and n.op not in ("output", "placeholder", "get_attr")
    ]
    return {"ops": dict(Counter(n.op_type for n in w.nodes)), "float_ops": floats, "islands": [[_path(n) for n in i.nodes] for i in islands]}


def _path(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _used(w: Writer) -> list[Any]:
    read = {i for n in w.nodes for i in n.input} | {i for n in w.nodes for a in n.attribute for s in a.g.node for i in s.input}
    return [t for name, t in w.initializers.items() if name in read]


def _foreign(gm: GraphModule, node: Node) -> bool:
    """Must torch's exporter write this node?"""
    k = kind(gm, node)
    if k in ("input", "output", "attr", "fake_quantize"):
        return False
    if k == "getitem":
        source: Any = node.args[0]
        return not (source.op == "placeholder" or _parted(gm, source))
    if k == "split" and not _parted(gm, node):
        return True
    if node.op == "call_module" and isinstance(module_of(gm, node), Quantized):
        return False
    return k not in EMITTERS or refusal(gm, node) is not None


def _parted(gm: GraphModule, node: Node) -> bool:
    """Is it a split whose readers each take one part?"""
    return kind(gm, node) == "split" and all(kind(gm, u) == "getitem" and isinstance(u.args[1], int) for u in node.users)


def _emit(w: Writer, node: Node) -> None:
    gm, k = w.gm, kind(w.gm, node)
    if k == "attr":
        w.later(node, lambda: w.const(w.out(node), constant(gm, node)))
    elif k == "fake_quantize":
        fake_quantize(w, node)
    elif k == "getitem":
        source = node.all_input_nodes[0]
        index = int(node.args[1]) % len(source.meta["shape"])  # type: ignore[arg-type]
        w.names[node] = f"{source.target}_{index}" if source.op == "placeholder" else f"{w.name(source)}/{index}"
    else:
        w.names[node] = EMITTERS[k](w, node, module_of(gm, node))


def named_results(value: Any, name: str = "") -> list[tuple[str, Node]]:
    """``(output name, node)`` of a nested output: ``output``; dict keys; ``output_0``, ...; deeper levels joined by ``_``."""
    if isinstance(value, Node):
        return [(name or "output", value)]
    if isinstance(value, dict):
        return [r for k, v in value.items() for r in named_results(v, f"{name}_{k}" if name else str(k))]
    if isinstance(value, (tuple, list)):
        return [r for i, v in enumerate(value) for r in named_results(v, f"{name or 'output'}_{i}")]
    return []


def _output_faults(value: Any) -> list[Issue]:
    faults = [
        Issue(name, "this output is not a tensor with an ONNX type", "Return its tensors one by one")
        for name, n in named_results(value)
        if not isinstance(n.meta.get("shape"), tuple) or n.meta.get("dtype") not in TYPES
    ]
    names = Counter(name for name, _ in named_results(value))
    faults += [Issue(n, "two outputs have this name", "Give the model's outputs different keys") for n, count in names.items() if count > 1]
    return faults


def _input_faults(gm: GraphModule, node: Node) -> list[Issue]:
    """An input is a tensor, or a list of tensors that the graph takes apart."""
    dtype = node.meta.get("dtype")
    many = isinstance(dtype, list)
    parts = [u for u in node.users if kind(gm, u) == "getitem" and isinstance(u.args[1], int)]
    if many and len(parts) != len(node.users):
        return [Issue(node.name, "an input that is a list of tensors is read as a whole", "Pass its tensors one by one")]
    return [
        Issue(node.name, f"an input of type {t} has no ONNX form", "Pass tensors only")
        for t in (dtype if many else [dtype])  # type: ignore[union-attr]
        if not isinstance(t, torch.dtype) or t not in TYPES
    ]


def _inputs(node: Node) -> list[Any]:
    sizes, dynamic, dtype = (node.meta[k] for k in ("shape", "dynamic", "dtype"))
    if not isinstance(sizes, list):
        return [_info(str(node.target), node)]
    return [_typed(f"{node.target}_{i}", *of) for i, of in enumerate(zip(sizes, dynamic, dtype, strict=True))]


def _info(name: str, node: Node) -> Any:
    return _typed(name, node.meta["shape"], node.meta["dynamic"], node.meta["dtype"])


def _typed(name: str, shape: Any, dynamic: Any, dtype: Any) -> Any:
    sizes = ["batch" if d else s for s, d in zip(shape, dynamic, strict=True)]
    return helper.make_tensor_value_info(name, TYPES[dtype], sizes)


def _output(w: Writer, name: str, node: Node) -> Any:
    """A graph output with its own name (the runtime removes the Identity)."""
    w.op("Identity", [w.name(node)], name)
    return _info(name, node)
