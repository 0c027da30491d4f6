"""What the TensorRT lint reads: an ONNX graph of any make, with its producers, readers, types, shapes and constants.

Nothing here raises on what it does not understand.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper, shape_inference

from fxq.lint_trt_fold import FOLDS, fold

Q, DQ = "QuantizeLinear", "DequantizeLinear"
ONNX_DOMAINS = ("", "ai.onnx")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
SMALL = 1 << 12
"""Elements of a constant that inference and folding look at; scales and shapes are smaller, weights larger."""
READABLE = 1 << 28
"""Elements of a constant that is read at all."""
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")

Shape = tuple[int | None, ...]
Array = np.ndarray[Any, Any]


@dataclass(eq=False)
class Node:
    """One node. ``name`` is its own, or its first output's when it has none; ``bodies`` are its subgraphs."""

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str
    attrs: dict[str, Any]
    proto: onnx.NodeProto
    bodies: list[Graph] = field(default_factory=list)

    def input(self, slot: int) -> str:
        """Name of an input, "" when it is not given."""
        return self.inputs[slot] if slot < len(self.inputs) else ""

    @property
    def output(self) -> str:
        """Name of the first output, "" when there is none."""
        return self.outputs[0] if self.outputs else ""

    @property
    def is_q(self) -> bool:
        return self.op == Q

    @property
    def is_dq(self) -> bool:
        return self.op == DQ


class Graph:
    """Look-ups over a graph and, through ``outer``, over the graphs around it.

    Args:
        graph: its nodes and constants.
        inferred: the same graph after shape inference.
        opset: of ONNX's own domain.
        outer: the graph around a subgraph.
        scope: name of the node that holds the subgraph.
    """

    def __init__(self, graph: onnx.GraphProto, inferred: onnx.GraphProto, opset: int, outer: Graph | None = None, scope: str = "") -> None:
        self.proto, self.opset, self.outer, self.scope = graph, opset, outer, scope
        self.tensors: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        self.sparse = {t.values.name for t in graph.sparse_initializer}
        self.inputs = [v for v in graph.input if v.name not in self.tensors]
        self.outputs = {v.name for v in graph.output}
        self.types: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            self._see(value)
        self.nodes: list[Node] = []
        self.maker: dict[str, Node] = {}
        self.users: dict[str, list[tuple[Node, int]]] = {}
        self.captured: set[str] = set()
        self.constants = {*self.tensors, *self.sparse}
        self._own = {*self.constants, *(v.name for v in graph.input)}
        self.memo: dict[str, Any] = {}
        self._values: dict[str, Array | None] = {}
        twins = inferred.node if len(inferred.node) == len(graph.node) else graph.node
        for node, twin in zip(graph.node, twins, strict=True):
            self._read(node, twin)

    def _see(self, value: onnx.ValueInfoProto) -> None:
        tensor = value.type.tensor_type
        if tensor.elem_type:
            self.types.setdefault(value.name, tensor.elem_type)
        if tensor.HasField("shape"):
            self.shapes.setdefault(value.name, tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim))

    def _read(self, proto: onnx.NodeProto, twin: onnx.NodeProto) -> None:
        attrs: dict[str, Any] = {}
        bodies: list[tuple[onnx.GraphProto, onnx.GraphProto]] = []
        for a in proto.attribute:
            if a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                other = next((b for b in twin.attribute if b.name == a.name), a)
                bodies += zip([a.g] if a.HasField("g") else a.graphs, [other.g] if other.HasField("g") else other.graphs, strict=False)
            elif (value := attribute(a)) is not None:
                attrs[a.name] = value
        node = Node(
            proto.op_type, proto.domain, tuple(proto.input), tuple(proto.output), proto.name or next(iter(proto.output), proto.op_type), attrs, proto,
        )  # fmt: skip
        self.nodes.append(node)
        for slot, name in enumerate(node.inputs):
            if name:
                self.users.setdefault(name, []).append((node, slot))
        for name in filter(None, node.outputs):
            self.maker[name] = node
        tensor = constant_tensor(node)
        if tensor is not None:
            self.tensors[node.output] = tensor
        given = [name for name in node.inputs if name]
        if node.op == "Constant" or given and not bodies and node.op not in RANDOM and all(map(self.constant, given)):
            self.constants.update(node.outputs)
        for body, inferred in bodies:
            node.bodies.append(Graph(body, inferred, self.opset, self, node.name))
            self.captured |= captured(body)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def all(self) -> Iterator[Graph]:
        """This graph and its subgraphs."""
        yield self
        for node in self.nodes:
            for body in node.bodies:
                yield from body.all()

    def readers(self, name: str) -> list[Node]:
        """Nodes of this graph that read a tensor."""
        return [node for node, _ in self.users.get(name, ())]

    def has(self, name: str) -> bool:
        """A tensor of this graph, not of one around it."""
        return name in self.maker or name in self._own

    def tensor(self, name: str) -> TensorProto | None:
        """The constant called ``name``: an initializer or a Constant node's value."""
        found = self.tensors.get(name)
        return self.outer.tensor(name) if found is None and self.outer is not None and not self.has(name) else found

    def dtype(self, name: str) -> int:
        """Element type, 0 when unknown."""
        tensor = self.tensors.get(name)
        if tensor is not None:
            return tensor.data_type
        if name in self.types:
            return self.types[name]
        return self.outer.dtype(name) if self.outer is not None and not self.has(name) else 0

    def shape(self, name: str) -> Shape | None:
        """Sizes, ``None`` for unknown ones; ``None`` when the rank is unknown."""
        tensor = self.tensors.get(name)
        if tensor is not None:
            return tuple(tensor.dims)
        if name in self.shapes:
            return self.shapes[name]
        return self.outer.shape(name) if self.outer is not None and not self.has(name) else None

    def constant(self, name: str) -> bool:
        """Known when the engine is built: it depends on constants only."""
        return name in self.constants or self.outer is not None and not self.has(name) and self.outer.constant(name)

    def value(self, name: str, limit: int = READABLE, depth: int = 16) -> Array | None:
        """Value of a constant, folded where it is computed from small ones; ``None`` when it is no constant, too large or not here."""
        if name not in self._values or self._values[name] is None:
            self._values[name] = self._value(name, limit, depth)
        return self._values[name]

    def _value(self, name: str, limit: int, depth: int) -> Array | None:
        tensor = self.tensor(name)
        if tensor is not None:
            return array(tensor) if elements(tensor.dims) <= limit else None
        node = self.maker.get(name)
        if node is None or node.op not in FOLDS or node.domain not in ONNX_DOMAINS or not depth or not self.constant(name) or node.output != name:
            return None
        given = [self.value(i, SMALL, depth - 1) if i else None for i in node.inputs]
        if any(i and v is None for i, v in zip(node.inputs, given, strict=True)):
            return None
        return fold(node.op, given, node.attrs)

    def unread(self, name: str) -> bool:
        """A constant whose bytes are in an external file that was not read."""
        tensor = self.tensor(name)
        return tensor is not None and external_data_helper.uses_external_data(tensor)


KINDS: dict[str, type] = {
    **dict.fromkeys(("axis", "to", "output_dtype", "block_size", "transA", "transB", "keepdims", "allowzero"), int), "equation": bytes, "mode": bytes,
    **dict.fromkeys(("perm", "axes", "dilations", "starts", "ends"), list),
}  # fmt: skip
"""Attributes that are looked at, and what they must be; others are as the file has them."""


def attribute(a: onnx.AttributeProto) -> Any:
    """Value of an attribute; ``None`` for one that cannot be read or is of another kind than its name says."""
    try:
        value = onnx.helper.get_attribute_value(a)
    except (ValueError, TypeError):
        return None
    kind = KINDS.get(a.name)
    if kind is None:
        return value
    if kind is list:
        return list(value) if a.type == onnx.AttributeProto.INTS else None
    return value if isinstance(value, kind) else None


def constant_tensor(node: Node) -> TensorProto | None:
    """The tensor of a Constant node."""
    if node.op != "Constant" or node.domain not in ONNX_DOMAINS or not node.outputs:
        return None
    for name, value in node.attrs.items():
        if name == "value" and isinstance(value, TensorProto):
            return value
        if name in ("value_float", "value_floats", "value_int", "value_ints") and value is not None:
            return numpy_helper.from_array(np.asarray(value, np.float32 if "float" in name else np.int64), node.output)
    return None


def captured(graph: onnx.GraphProto) -> set[str]:
    """Names that a subgraph, or one inside it, reads or returns."""
    names = {v.name for v in graph.output}
    for node in graph.node:
        names.update(node.input)
        for a in node.attribute:
            for body in (a.g, *a.graphs):
                names |= captured(body)
    return names


def elements(dims: Iterable[int]) -> int:
    """Number of elements."""
    return int(np.prod([int(d) for d in dims], dtype=object))


def array(tensor: TensorProto) -> Array | None:
    """Array of a tensor; ``None`` when its bytes are not here or do not fit."""
    if external_data_helper.uses_external_data(tensor) or any(d < 0 for d in tensor.dims):
        return None
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError):
        return None


def numbers(values: Any) -> Array:
    """As float64; also 4- and 8-bit codes, whose types numpy does not know. Complex values become NaN."""
    given = np.asarray(values)
    if given.dtype.kind not in "fiubV":
        return np.full(given.shape, np.nan)
    with np.errstate(all="ignore"):
        return given.astype(np.float64)


def read_external(model: onnx.ModelProto, folder: str | os.PathLike[str]) -> onnx.ModelProto:
    """A copy in which small constants that are stored beside the file are read; what is not there stays unread."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if external_data_helper.uses_external_data(tensor) and elements(tensor.dims) <= SMALL:
            try:
                external_data_helper.load_external_data_for_tensor(tensor, os.fspath(folder))
            except (OSError, ValueError, onnx.checker.ValidationError):
                continue
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return copy


def read(model: onnx.ModelProto) -> Graph:
    """The main graph of a model; local functions must be inlined before (:func:`inlined`)."""
    opset = max((o.version for o in model.opset_import if o.domain in ONNX_DOMAINS), default=1)
    return Graph(model.graph, _inferred(model).graph, opset)


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its local functions put in place of their calls; the model itself when it has none, or when they cannot be inlined."""
    if not model.functions:
        return model
    from onnx import inliner

    try:
        result: onnx.ModelProto = inliner.inline_local_functions(model)
    except Exception:  # whatever the C++ code raises on functions that do not fit
        return model
    return result


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model after shape inference, its large constants stood for by inputs; without any inference where ONNX refuses it."""
    lean = onnx.ModelProto(ir_version=model.ir_version)
    lean.opset_import.extend(model.opset_import)
    lean.functions.extend(model.functions)
    for part in ("node", "input", "output", "value_info"):
        getattr(lean.graph, part).extend(getattr(model.graph, part))
    lean.graph.name = model.graph.name
    known = {v.name for v in lean.graph.input}
    for tensor in model.graph.initializer:
        if elements(tensor.dims) <= SMALL and not external_data_helper.uses_external_data(tensor):
            lean.graph.initializer.append(tensor)
        elif tensor.name not in known:
            lean.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    for prop in (True, False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return shape_inference.infer_shapes(lean, data_prop=prop)
        except Exception:  # several types of onnx's own, and protobuf's for models that do not serialize
            continue
    return lean
