"""A small mutable view of an ONNX graph: what the optimizer steps of :mod:`fxq.lint_rules` work on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

Q, DQ = "QuantizeLinear", "DequantizeLinear"
DOMAINS = ("", "ai.onnx", "com.microsoft")
BODIES = ("If", "Loop", "Scan")
INSIDE = "the operations inside of it are not looked at; the runtime may run some in integers"
SMALL = 64
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
SHARED = (*FLOATS, onnx.TensorProto.INT32, onnx.TensorProto.INT64)
BYTES = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)


@dataclass(eq=False)
class Op:
    """One node. ``origins`` are the positions in the file of the nodes whose work it does."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    domain: str = ""
    since: int = 0
    origins: list[int] = field(default_factory=list)
    kernel: str = ""
    why: str = ""
    alive: bool = True
    shifted: int = 0  # what the optimizer added to the file's codes of a Q

    @property
    def is_q(self) -> bool:
        return self.op == Q and self.domain in DOMAINS

    @property
    def is_dq(self) -> bool:
        return self.op == DQ and self.domain in DOMAINS


class Net:
    """Nodes with producers and readers; element types, shapes and small constants by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        graph = model.graph
        self.const: dict[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        self.const_names = set(self.const)
        self.outputs = {o.name for o in graph.output}
        self.types, self.shapes = _types(model)
        self.ops: list[Op] = []
        self.maker: dict[str, Op] = {}
        self.users: dict[str, list[tuple[Op, int]]] = {}
        self.captured: set[str] = set()
        self.made_scales: set[str] = set()  # scales that the optimizer computes itself; they fit by construction
        for index, node in enumerate(graph.node):
            self._read(index, node)
        self._fresh = 0

    def _read(self, index: int, node: onnx.NodeProto) -> None:
        if node.op_type == "Constant" and node.domain in DOMAINS:
            tensor = _constant(node)
            if tensor is not None:
                self.const[node.output[0]] = tensor
                self.types[node.output[0]] = tensor.data_type
                self.shapes[node.output[0]] = tuple(tensor.dims)
            self.const_names.add(node.output[0])
            return
        attrs: dict[str, Any] = {}
        for a in node.attribute:
            attrs[a.name] = onnx.helper.get_attribute_value(a)
            for sub in (a.g, *a.graphs):
                self.captured |= {name for inner in sub.node for name in inner.input}
        self.add(Op(node.op_type, list(node.input), list(node.output), attrs, node.name, node.domain, _since(node, self.opset), [index]))

    def add(self, op: Op, at: Op | None = None, after: bool = False) -> Op:
        """Put ``op`` at the end, or before (behind) ``at``."""
        if at is None:
            self.ops.append(op)
        else:
            self.ops.insert(self.ops.index(at) + after, op)
        for slot, name in enumerate(op.inputs):
            if name:
                self.users.setdefault(name, []).append((op, slot))
        for name in op.outputs:
            self.maker[name] = op
        return op

    def remove(self, op: Op) -> None:
        """Take ``op`` out; its readers keep the names of its outputs."""
        op.alive = False
        for slot, name in enumerate(op.inputs):
            if name:
                self.users[name].remove((op, slot))
        for name in op.outputs:
            if self.maker.get(name) is op:
                del self.maker[name]

    def rewire(self, user: Op, slot: int, name: str) -> None:
        """Let input ``slot`` of ``user`` read tensor ``name``."""
        self.users[user.inputs[slot]].remove((user, slot))
        user.inputs[slot] = name
        self.users.setdefault(name, []).append((user, slot))

    def set_outputs(self, op: Op, names: list[str]) -> None:
        """Let ``op`` produce tensors ``names``."""
        for name in op.outputs:
            if self.maker.get(name) is op:
                del self.maker[name]
        op.outputs = names
        for name in names:
            self.maker[name] = op

    def fresh(self, base: str) -> str:
        """A tensor name not used yet, of the type and shape of ``base``."""
        self._fresh += 1
        name = f"{base}//{self._fresh}"
        for table in (self.types, self.shapes):
            if base in table:
                table[name] = table[base]  # type: ignore[assignment]
        return name

    def __iter__(self) -> Iterator[Op]:
        """Nodes in order; removed ones are skipped, ones added meanwhile are not visited."""
        return (op for op in list(self.ops) if op.alive)

    def readers(self, name: str) -> list[tuple[Op, int]]:
        return self.users.get(name, [])

    def edges(self, op: Op) -> list[tuple[Op, int]]:
        """All readers of all outputs."""
        return [u for name in op.outputs for u in self.readers(name)]

    def is_output(self, op: Op) -> bool:
        """Some output leaves the graph (or enters a subgraph)."""
        return any(name in self.outputs or name in self.captured for name in op.outputs)

    def only_reader(self, op: Op) -> Op | None:
        """The one node that reads ``op``; None when there are several or it is a graph output."""
        edges = self.edges(op)
        return edges[0][0] if len(edges) == 1 and not self.is_output(op) else None

    def value(self, name: str) -> np.ndarray[Any, Any] | None:
        """Array of a small constant, None when it is no constant or large."""
        tensor = self.const.get(name)
        if tensor is None or int(np.prod(tensor.dims)) > SMALL:
            return None
        return numpy_helper.to_array(tensor)

    def key(self, name: str) -> object:
        """Equal for tensors that the runtime shares: constants of up to 8 numbers (not codes) by value, everything else by name."""
        tensor = self.const.get(name)
        if tensor is None or tensor.data_type not in SHARED or int(np.prod(tensor.dims)) > 8:
            return name
        return (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())

    def array(self, name: str) -> np.ndarray[Any, Any] | None:
        """Array of a constant of any size."""
        tensor = self.const.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def scalar(self, name: str) -> float | None:
        """Value of a constant of one element (rank 0 or 1)."""
        value = self.value(name)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 and value.ndim < 2 else None

    def codes(self, op: Op) -> int:
        """Element type of the codes that a Q writes or a DQ reads (0 when unknown)."""
        if op.is_dq:
            return self.types.get(op.inputs[0], 0) or (self.types.get(op.inputs[2], 0) if has(op, 2) else 0)
        if has(op, 2):
            return self.types.get(op.inputs[2], 0)
        return int(op.attrs.get("output_dtype", 0)) or onnx.TensorProto.UINT8

    def until_stable(self, steps: Iterable[Callable[[Net], bool]], limit: int = 10) -> None:
        """Run the steps in order until none of them changes anything, as the runtime does within a level."""
        chosen = tuple(steps)
        for _ in range(limit):
            if not any([step(self) for step in chosen]):
                return


def has(op: Op, slot: int) -> bool:
    """Input ``slot`` is given."""
    return len(op.inputs) > slot and bool(op.inputs[slot])


def _since(node: onnx.NodeProto, opset: int) -> int:
    if node.domain not in ("", "ai.onnx"):
        return 1
    try:
        return int(onnx.defs.get_schema(node.op_type, opset, "").since_version)
    except onnx.defs.SchemaError:
        return 0


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    for a in node.attribute:
        if a.name == "value":
            tensor: onnx.TensorProto = a.t
            return tensor
        if a.name in ("value_float", "value_floats", "value_int", "value_ints"):
            kind = np.float32 if "float" in a.name else np.int64
            return numpy_helper.from_array(np.asarray(onnx.helper.get_attribute_value(a), dtype=kind), node.output[0])
    return None


def _types(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, tuple[int | None, ...]]]:
    """Element types and shapes by inference; large initializers are stood for by inputs, so that no weight is copied."""
    lean = onnx.ModelProto()
    lean.CopyFrom(_without_weights(model))
    known = {i.name for i in lean.graph.input}
    for t in model.graph.initializer:
        if int(np.prod(t.dims)) <= SMALL:
            lean.graph.initializer.append(t)
        elif t.name not in known:
            lean.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
    try:
        lean = shape_inference.infer_shapes(lean, data_prop=True)
    except shape_inference.InferenceError:
        lean = shape_inference.infer_shapes(lean)
    types: dict[str, int] = {t.name: t.data_type for t in model.graph.initializer}
    shapes: dict[str, tuple[int | None, ...]] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for v in (*lean.graph.input, *lean.graph.value_info, *lean.graph.output):
        tensor = v.type.tensor_type
        types.setdefault(v.name, tensor.elem_type)
        if tensor.HasField("shape"):
            shapes.setdefault(v.name, tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim))
    return types, shapes


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    lean = onnx.ModelProto(ir_version=model.ir_version)
    lean.opset_import.extend(model.opset_import)
    lean.functions.extend(model.functions)
    lean.graph.name = model.graph.name
    lean.graph.node.extend(model.graph.node)
    lean.graph.input.extend(model.graph.input)
    lean.graph.output.extend(model.graph.output)
    lean.graph.value_info.extend(model.graph.value_info)
    return lean
