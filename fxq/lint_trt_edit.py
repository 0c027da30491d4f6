"""Edits an ONNX graph for the TensorRT repairs, and keeps account of what was done and what was not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from fxq.lint_trt_graph import FLOATS, Array, Graph, Node, captured, numbers, read


class Editor:
    """A model under repair.

    Attributes:
        model: changed in place.
        done: what was repaired, one line each.
        left: what was not, and why.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.done: list[str] = []
        self.left: list[str] = []
        self.replaced: set[str] = set()
        self.names = names(model.graph)

    def scopes(self) -> list[Graph]:
        """The graphs of the model as they are now."""
        return list(read(self.model).all())

    def fresh(self, base: str) -> str:
        """A name that nothing in the model has."""
        name, n = base, 0
        while name in self.names:
            n += 1
            name = f"{base}_{n}"
        self.names.add(name)
        return name

    def constant(self, graph: Graph, array: Array, base: str, kind: int | None = None) -> str:
        """A new initializer; its name.

        Args:
            graph: that holds it.
            array: its value.
            base: its name if that is free.
            kind: its element type; ``None`` for the array's own.
        """
        name = self.fresh(base)
        graph.proto.initializer.append(initializer(array, name, kind))
        return name

    def read_from(self, node: Node, slot: int, name: str) -> None:
        """Let an input of a node read another tensor."""
        while len(node.proto.input) <= slot:
            node.proto.input.append("")
        if node.proto.input[slot]:
            self.replaced.add(node.proto.input[slot])
        node.proto.input[slot] = name

    def write_attribute(self, node: Node, name: str, value: Any) -> None:
        """Set an attribute, or take it away with ``None``."""
        kept = [a for a in node.proto.attribute if a.name != name]
        del node.proto.attribute[:]
        node.proto.attribute.extend(kept)
        if value is not None:
            node.proto.attribute.append(onnx.helper.make_attribute(name, value))

    def remove(self, graph: Graph, node: Node) -> None:
        """Take a node out of its graph."""
        self.replaced.update(filter(None, node.proto.input))
        graph.proto.node.remove(node.proto)

    def forget(self, graph: Graph, tensors: Iterable[str]) -> None:
        """Drop the written types of tensors that have another type now."""
        gone = set(tensors)
        kept = [v for v in graph.proto.value_info if v.name not in gone]
        del graph.proto.value_info[:]
        graph.proto.value_info.extend(kept)

    def sweep(self) -> None:
        """Remove the constants and constant expressions that the repairs left without a reader."""
        while self.replaced:
            gone, self.replaced = self.replaced, set()
            for graph in self.scopes():
                dead = {name for name in gone if not used(graph, name)}
                kept = [t for t in graph.proto.initializer if t.name not in dead]
                if len(kept) < len(graph.proto.initializer):
                    del graph.proto.initializer[:]
                    graph.proto.initializer.extend(kept)
                for node in [graph.maker[name] for name in sorted(dead) if name in graph.maker and graph.constant(name)]:
                    if node.proto in graph.proto.node and not any(used(graph, out) for out in node.outputs):
                        self.remove(graph, node)


def used(graph: Graph, name: str) -> bool:
    """Somebody reads a tensor, or it leaves the graph."""
    return bool(graph.users.get(name)) or name in graph.outputs or name in graph.captured


def stays(graph: Graph, name: str) -> bool:
    """A tensor that is seen from outside of the graph, so that its type must stay."""
    return name in graph.outputs or name in graph.captured


def names(graph: onnx.GraphProto) -> set[str]:
    """All names of nodes and tensors in a graph and its subgraphs."""
    found = {v.name for part in (graph.input, graph.output, graph.value_info, graph.initializer) for v in part} | captured(graph)
    for node in graph.node:
        found |= {node.name, *node.output}
        for a in node.attribute:
            for body in (a.g, *a.graphs):
                found |= names(body)
    return found


def initializer(array: Array, name: str, kind: int | None = None) -> TensorProto:
    """An initializer of an array; ``kind`` when numpy does not know the element type."""
    if kind is None or kind == np_kind(array):
        return numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
    return onnx.helper.make_tensor(name, kind, array.shape, numbers(array).reshape(-1).tolist())


def np_kind(array: Array) -> int:
    """ONNX's element type of an array, 0 when there is none."""
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
    except (KeyError, ValueError, TypeError):
        return 0


def grid(graph: Graph, node: Node) -> tuple[Array, Array] | None:
    """Scale and zero point of a Q or DQ as arrays of one shape, the scale in its own type, the zero point as int64; ``None`` when they are not constant, do
    not fit each other, or the scale is no float. A zero point that is not given is 0."""
    scale = graph.value(node.input(1))
    if scale is None or np_kind(scale) not in FLOATS:
        return None
    if not node.input(2):
        return scale, np.zeros(scale.shape, np.int64)
    zero = graph.value(node.input(2))
    if zero is None or zero.size not in (1, scale.size):
        return None
    points = numbers(zero)
    if not np.all(np.isfinite(points)):
        return None
    points = points.astype(np.int64)
    return scale, np.full(scale.shape, points.reshape(-1)[0]) if zero.size == 1 else points.reshape(scale.shape)


def along(values: Array, shape: tuple[int, ...], axis: int) -> Array | None:
    """Values per tensor or per channel in a form that broadcasts against codes; ``None`` for blocks and for values that do not fit."""
    if values.size == 1:
        return values.reshape(())
    if values.ndim != 1 or not -len(shape) <= axis < len(shape) or values.size != shape[axis]:
        return None
    return values.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
