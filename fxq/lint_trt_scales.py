"""Repairs of scales and zero points, each leaving every real number as it is: rank, axis, one scale for many equal ones, constants for expressions."""

from __future__ import annotations

import numpy as np

from fxq.lint_trt_edit import Editor, grid, np_kind
from fxq.lint_trt_flow import code_type, operand
from fxq.lint_trt_fold import MOVES
from fxq.lint_trt_graph import FLOATS, Array, Graph, Node, numbers
from fxq.lint_trt_ops import INT4, INT8, SINCE, UINT8, WEIGHTED, verdict
from fxq.lint_trt_rules import crash

EXACT = (*MOVES, "Constant", "ConstantOfShape", "Cast", "Mul", "Div", "Add", "Sub", "Neg", "Abs", "Max", "Min", "Sqrt", "ReduceMax", "ReduceMin")
"""Operators whose float results are the same everywhere."""
ONE_SCALE = ("weight-axis", "activation-channels", "blocked-weights", "blocked-product")
"""Findings that are gone when all scales are one."""


def scalars(edit: Editor, graph: Graph) -> None:
    """The scale of an activation with the shape [1] becomes a scalar, and so does its zero point."""
    for node in graph:
        if not (node.is_q or node.is_dq) or graph.constant(node.input(0)) or node.attrs.get("block_size"):
            continue
        found = grid(graph, node)
        if found is not None and found[0].shape == (1,) and code_type(graph, node) in (UINT8, *SINCE):
            one_scale(edit, graph, node, found[0])
            edit.done.append(f"{node.name}: scale of shape [1] written as a scalar")


def one_scale(edit: Editor, graph: Graph, node: Node, scale: Array) -> None:
    """Give a node one scale, of rank 0, instead of several equal ones."""
    kind, zero = graph.dtype(node.input(1)) or None, graph.value(node.input(2)) if node.input(2) else None
    edit.read_from(node, 1, edit.constant(graph, scale.reshape(-1)[:1].reshape(()), f"{node.name}_scale", kind))
    if zero is not None:
        edit.read_from(node, 2, edit.constant(graph, zero.reshape(-1)[:1].reshape(()), f"{node.name}_zero", graph.dtype(node.input(2)) or None))
    for name in ("axis", "block_size"):
        edit.write_attribute(node, name, None)


def written_axes(edit: Editor, graph: Graph) -> None:
    """The axis of a vector of scales, written out: ONNX's default 1, or where that is not possible the only one that is."""
    for node in graph:
        scale = graph.value(node.input(1)) if node.is_q or node.is_dq else None
        shape = graph.shape(node.input(0))
        if scale is None or scale.ndim != 1 or scale.size == 1 or "axis" in node.attrs or graph.opset < 13 or shape is None or node.attrs.get("block_size"):
            continue
        fitting = [i for i, n in enumerate(shape) if n == scale.size]
        if len(shape) > 1 and shape[1] in (None, scale.size):
            edit.write_attribute(node, "axis", 1)
            edit.done.append(f"{node.name}: axis 1 written, ONNX's default")
        elif len(fitting) == 1 and None not in shape and _agreeable(graph, node, fitting[0]):
            edit.write_attribute(node, "axis", fitting[0])
            edit.done.append(f"{node.name}: axis {fitting[0]} written, the only one with {scale.size} channels; the file was not legal without")
        else:
            edit.left.append(f"{node.name}: {scale.size} scales fit none of its axes, several, or not the output channels")


def _agreeable(graph: Graph, node: Node, axis: int) -> bool:
    """The axis is that of the output channels wherever the scales are used."""
    node.attrs["axis"] = axis
    graph.memo.clear()
    readers = [op for op in graph if op.op in WEIGHTED and len(op.inputs) > 1 and any(operand(graph, op.input(slot)).dq is node for slot in (0, 1))]
    fine = all(verdict(graph, op, None).code not in ONE_SCALE for op in readers)
    del node.attrs["axis"]
    graph.memo.clear()
    return fine


def equal_scales(edit: Editor, graph: Graph) -> None:
    """Scales that are all equal become one where their axis or their blocks keep an operation out of integers."""
    seen: set[int] = set()
    for node in graph:
        if node.op not in WEIGHTED or len(node.inputs) < 2 or verdict(graph, node, None).code not in ONE_SCALE:
            continue
        for slot in (0, 1):
            dq = operand(graph, node.input(slot)).dq
            q = graph.maker.get(dq.input(0)) if dq is not None else None
            for one in (dq, q if q is not None and q.is_q else None):
                if one is not None and id(one) not in seen:
                    seen.add(id(one))
                    _equal(edit, graph, one)


def _equal(edit: Editor, graph: Graph, node: Node) -> None:
    found = grid(graph, node)
    if found is None or not found[0].ndim or found[0].size < 1 or code_type(graph, node) == INT4:
        return
    if np.all(found[0] == found[0].reshape(-1)[0]) and np.all(found[1] == found[1].reshape(-1)[0]):
        one_scale(edit, graph, node, found[0])
        edit.done.append(f"{node.name}: {found[0].size} equal scales written as one")


def constants(edit: Editor, graph: Graph) -> None:
    """Computed zero points, and scales that the parser crashes on, become initializers."""
    for node in graph:
        if not (node.is_q or node.is_dq):
            continue
        zero, scale = node.input(2), node.input(1)
        maker = graph.maker.get(zero)
        value = graph.value(zero) if maker is not None and maker.op not in ("Constant", "Identity", "Cast") else None
        if maker is not None and value is not None and np_kind(value) == code_type(graph, node):
            edit.read_from(node, 2, edit.constant(graph, value, f"{node.name}_zero", graph.dtype(zero) or None))
            edit.done.append(f"{node.name}: zero point computed by {maker.op} written as an initializer")
        if graph.constant(scale) and crash(graph, scale) is not None:
            value = graph.value(scale) if exact(graph, scale) else None
            if value is None or np_kind(value) not in FLOATS:
                edit.left.append(f"{node.name}: its scale is computed with rounding that differs between runtimes")
            else:
                edit.read_from(node, 1, edit.constant(graph, value, f"{node.name}_scale", graph.dtype(scale) or None))
                edit.done.append(f"{node.name}: computed scale written as an initializer")


def exact(graph: Graph, name: str, depth: int = 16) -> bool:
    """A constant expression that has the same value everywhere."""
    node = graph.maker.get(name)
    return node is None or depth > 0 and node.op in EXACT and all(exact(graph, i, depth - 1) for i in node.inputs if i)


def counted_zeros(edit: Editor, graph: Graph) -> None:
    """As many zero points as scales, where all are 0."""
    for node in graph:
        if not (node.is_q or node.is_dq) or not node.input(2):
            continue
        scale, zero, kind = graph.value(node.input(1)), graph.value(node.input(2)), graph.dtype(node.input(2))
        if scale is None or zero is None or zero.size == scale.size or kind not in (UINT8, *SINCE) or np.any(numbers(zero) != 0):
            continue
        edit.read_from(node, 2, edit.constant(graph, np.zeros(scale.shape, np.int8), f"{node.name}_zero", None if kind == INT8 else kind))
        edit.done.append(f"{node.name}: {zero.size} zero points written as {scale.size}, one per scale")
