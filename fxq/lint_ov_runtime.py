"""What OpenVINO's CPU plugin made of a Q/DQ file, read from the model that it executes: the truth that :mod:`fxq.lint_ov` is compared with."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import onnx

from fxq.errors import ArtifactError, InputError
from fxq.lint_graph import Net, Op
from fxq.lint_ov import float_reader
from fxq.lint_ov_rules import AFFINE, BITS, FUSED, KERNEL, LAYERS, POINTWISE, SAME, VIEWS, WEIGHTS_ONLY, codes_of, source_grid
from fxq.lint_report import CLIPS, GONE, LintReport, OpReport, compute_nodes, label
from fxq.lint_trt_graph import inlined

NAMES = {"HardSwish": "HSwish", "Clip": "Clamp", "Mul": "Multiply", "Sub": "Subtract", "Div": "Divide"}
MARK = re.compile(r"fxq(\d+)_")


@dataclass(frozen=True)
class Layer:
    """One layer that is executed.

    Attributes:
        kind: OpenVINO's layer type, e.g. ``Convolution``.
        precision: runtime precision, e.g. ``u8``.
        reads: precision of what its first input gives.
        primitive: implementation, e.g. ``brgconv_avx512_I8``.
        origins: positions in the file of the nodes whose work it does.
        others: names of what is not of the file; OpenVINO gives new ones to what it moves.
    """

    kind: str
    precision: str
    reads: str
    primitive: str
    origins: tuple[int, ...]
    others: tuple[str, ...] = ()

    @property
    def integer(self) -> bool:
        """It multiplies or moves codes. Pointwise layers convert codes to floats, compute and round in one pass."""
        return self.precision in BITS and (self.kind not in POINTWISE)

    @property
    def dequantizes(self) -> bool:
        """It holds what a dequantization was made into; its name is then that of the Q."""
        return any(name.startswith("Convert_") for name in self.others)

    @property
    def kernel(self) -> str:
        """Its kind; weights alone in codes are told apart."""
        return WEIGHTS_ONLY if self.kind == "FullyConnected" and self.reads not in BITS else self.kind


def execution(model: onnx.ModelProto, precision: str = "f32", **options: Any) -> list[Layer]:
    """Layers that OpenVINO's CPU plugin executes, in order.

    Args:
        model: Q/DQ model; its weights inside.
        precision: of what is not in integers; ``bf16`` and ``f16`` on CPUs that have them, ``""`` for the plugin's own choice.
        options: further properties of the plugin.

    Raises:
        InputError: when openvino is not installed.
        ArtifactError: when it refuses the file.
    """
    try:
        import openvino
    except ImportError as e:
        raise InputError("openvino is not installed", way_out='pip install "fxq[bench]"') from e
    hint = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    core = openvino.Core()
    try:
        executed = core.compile_model(core.read_model(marked(model).SerializeToString()), "CPU", hint | options).get_runtime_model()
    except Exception as e:  # the package's own error types
        raise ArtifactError(f"OpenVINO refuses it: {' '.join(str(e).split())[:300]}", way_out="See fxq lint FILE.onnx --target openvino") from e
    return list(_layers(executed))


def _layers(executed: Any) -> Iterator[Layer]:
    for op in executed.get_ordered_ops():
        facts = {key: str(getattr(value, "value", value)) for key, value in op.get_rt_info().items()}
        if facts["layerType"] in ("Input", "Output", "Const"):
            continue
        reads = ""
        if op.get_input_size():
            info = op.input_value(0).get_node().get_rt_info()["outputPrecisions"]
            reads = str(getattr(info, "value", info)).split(",")[0]
        origins = tuple(dict.fromkeys(int(hit) for hit in MARK.findall(facts["originalLayersNames"])))
        others = tuple(name for name in facts["originalLayersNames"].split(",") if not MARK.match(name))
        yield Layer(facts["layerType"], facts["runtimePrecision"], reads, facts["primitiveType"], origins, others)


def marked(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every node and what it gives is called by the node's position: OpenVINO names a layer after either."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = {name: f"fxq{i}_{k}" for i, node in enumerate(copy.graph.node) for k, name in enumerate(node.output) if name}
    for i, node in enumerate(copy.graph.node):
        node.name = f"fxq{i}_"
        for field in (node.input, node.output):
            for k, name in enumerate(field):
                field[k] = names.get(name, name)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _rename_captured(graph, names)
    for out in copy.graph.output:
        out.name = names.get(out.name, out.name)
    del copy.graph.value_info[:]
    return copy


def _rename_captured(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    made = {name for node in graph.node for name in node.output} | {t.name for t in (*graph.initializer, *graph.input)}
    for node in graph.node:
        for k, name in enumerate(node.input):
            if name not in made:
                node.input[k] = names.get(name, name)


def report(model: onnx.ModelProto, precision: str = "f32", **options: Any) -> LintReport:
    """What OpenVINO's CPU plugin makes of a file, node by node; arguments and errors as in :func:`execution`."""
    whole = inlined(model)
    return Truth(whole, execution(whole, precision, **options)).report()


class Truth:
    """Nodes of a file beside the layers that execute them."""

    def __init__(self, model: onnx.ModelProto, layers: list[Layer]) -> None:
        self.net = Net(model)
        self.ops = {op.origins[0]: op for op in self.net.ops}
        self.by_node: dict[int, list[Layer]] = {}
        for layer in layers:
            for index in layer.origins:
                self.by_node.setdefault(index, []).append(layer)
                while self.ops[index].op in SAME and (maker := self.net.maker.get(self.ops[index].inputs[0])) is not None:
                    index = maker.origins[0]
                    self.by_node.setdefault(index, []).append(layer)

    def report(self) -> LintReport:
        """Nodes by how they ran, Q and DQ that ran beside the integer layers."""
        nodes = compute_nodes(self.net)
        ops = tuple(self._row(index, node) for index, node in nodes.items())
        sure = {*KERNEL, *FUSED, *AFFINE}  # what was removed and is none of these was taken apart, in float
        runs = {i: replace(row, runs="float") if row.runs == GONE and row.op not in sure else row for i, row in zip(nodes, ops, strict=True)}
        left_q = [op for op in self.net if op.is_q and op.inputs[0] not in self.net.const_names and self._beside(op.origins[0])]
        left_dq = [op for op in self.net if op.is_dq and op.inputs[0] not in self.net.const_names and float_reader(self.net, op, runs)]
        return LintReport(ops, len(left_q), len(left_dq), tuple((label(op), "") for op in (*left_q, *left_dq)))

    def _row(self, index: int, node: OpReport) -> OpReport:
        layer = self.layer(index)
        if layer is None:
            return OpReport(node.node, node.op, GONE, "")
        return OpReport(node.node, node.op, "int8" if layer.integer or self._inside_attention(node.op, layer) else "float", layer.kernel)

    @staticmethod
    def _inside_attention(op: str, layer: Layer) -> bool:
        """Products of a whole attention that runs as one Subgraph."""
        return op == "MatMul" and layer.kind == "Subgraph" and layer.precision in BITS

    def layer(self, index: int) -> Layer | None:
        """The layer that does a node's work; layers that its other parts left behind (a dequantization, a transposed weight) do not count."""
        op = self.ops[index]
        found = self.by_node.get(index, [])
        if op.op in LAYERS:
            near = [index, *(u.origins[0] for u, _ in self.net.edges(op)), *(m.origins[0] for n in op.inputs if (m := self.net.maker.get(n)))]
            for place in near if not found else [index]:
                for layer in self.by_node.get(place, []):
                    if layer.kind in LAYERS[op.op]:
                        return layer
        firm = [layer for layer in found if layer.kind not in POINTWISE]
        if op.op in KERNEL:  # what moves codes has a layer of its own, or was merged with its neighbours
            return firm[0] if firm else None
        if firm and (op.op in FUSED or op.op in AFFINE or len(firm) == len(found)):
            return firm[0]
        if found:
            return next(layer for layer in found if layer.kind in POINTWISE)
        return self._absorbed(index) if op.op in FUSED or op.op in AFFINE else None

    def _absorbed(self, index: int) -> Layer | None:
        """Of a node that was removed: the weighted layer in front of it when what follows is in that layer as well, else the layer behind it that took it."""
        op = self.ops[index]
        moved = self._moved_up(op, NAMES.get(op.op, op.op))
        if moved is not None:
            return moved
        hosts = [layer for layer in self._made_by(op, CLIPS) if layer.kind not in POINTWISE]
        behind = [u for u, _ in self.net.edges(op)]
        for _ in range(3):
            for layer in (layer for u in behind for layer in self.by_node.get(u.origins[0], [])):
                if layer in hosts or (layer.kind in POINTWISE and op.op in AFFINE):
                    return layer
            behind = [v for u in behind for v, _ in self.net.edges(u) if not self.by_node.get(u.origins[0])]
        return None

    def _made_by(self, op: Op, through: Collection[str]) -> list[Layer]:
        """Layers of what gives a node's first input, past nodes of some types that were removed."""
        maker = self.net.maker.get(op.inputs[0])
        while maker is not None and maker.op in through and (maker.op in VIEWS or not self.by_node.get(maker.origins[0])):
            maker = self.net.maker.get(maker.inputs[0])
        return self.by_node.get(maker.origins[0], []) if maker else []

    def _moved_up(self, op: Op, name: str) -> Layer | None:
        """The layer in front of the views in front of a node, when something of the node's kind, with a new name, is in it."""
        if self.net.maker.get(op.inputs[0]) is None or self.net.maker[op.inputs[0]].op not in VIEWS:
            return None
        return next((layer for layer in self._made_by(op, (*VIEWS, *CLIPS)) if any(o.startswith(f"{name}_") for o in layer.others)), None)

    def _beside(self, index: int) -> bool:
        """A Q that no integer layer took: it, or the DQ that it was merged with, is in another one."""
        op = self.ops[index]
        own = self.by_node.get(index)
        if own:
            taken = any(layer.integer for layer in own)
            return any(not layer.integer and not (taken and layer.dequantizes) for layer in own)
        moved = self._moved_up(op, "FakeQuantize")
        if moved is not None:
            return not moved.integer
        codes = codes_of(self.net, op)
        if codes is None or (codes.zero == 0 and source_grid(self.net, op.inputs[0]) == codes.grid):
            return False
        first = self.net.maker.get(op.inputs[0])
        while first is not None and first.op in VIEWS:
            first = self.net.maker.get(first.inputs[0])
        if first is not None and first.op == "Concat":
            return True
        behind = [layer for user, _ in self.net.edges(op) for layer in self.by_node.get(user.origins[0], [])]
        return bool(behind) and all(not layer.integer for layer in behind)
