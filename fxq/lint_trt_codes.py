"""Repairs of codes, each leaving every real number as it is: constants folded, biases made float, unsigned codes made signed, dead channels, round trips."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from fxq.lint_trt_edit import Editor, along, grid, initializer, stays, used
from fxq.lint_trt_flow import code_type, root_type, written_axis
from fxq.lint_trt_fold import MOVES, fold
from fxq.lint_trt_graph import ONNX_DOMAINS, Array, Graph, Node, array, numbers
from fxq.lint_trt_ops import INT4, INT8, SINCE, UINT8, WEIGHTED

INT32 = int(TensorProto.INT32)
SHAPES = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
"""They may stand between a QuantizeLinear and its DequantizeLinear when the codes change their type."""
CODES = (INT8, UINT8, INT32, *SINCE)
UNIT = ("Sigmoid", "Softmax", "HardSigmoid")
SLACK = 1e-6
"""By how much a softmax may exceed 1 through rounding."""


def fold_constants(edit: Editor, graph: Graph) -> None:
    """What moves the elements of quantized constants, done to the constants."""
    for node in graph:
        first = graph.maker.get(node.input(0))
        if not node.is_dq or first is None or first.op not in MOVES or not graph.constant(node.input(0)):
            continue
        kind, codes = root_type(graph, node.input(0)), folded(graph, node.input(0))
        if codes is None or kind not in CODES:
            edit.left.append(f"{node.name}: {first.op} {first.name} before it is not folded: its inputs cannot be read")
            continue
        edit.read_from(node, 0, edit.constant(graph, codes, f"{node.input(0)}_folded", kind))
        edit.done.append(f"{node.name}: {first.op} {first.name} before it folded into the constant")


def folded(graph: Graph, name: str, depth: int = 16) -> Array | None:
    """Value of a constant of any size behind nodes that only move its elements."""
    tensor = graph.tensor(name)
    if tensor is not None:
        return array(tensor)
    node = graph.maker.get(name)
    if node is None or node.op not in MOVES or node.domain not in ONNX_DOMAINS or not depth:
        return None
    given = [folded(graph, i, depth - 1) if i else None for i in node.inputs]
    return None if any(i and v is None for i, v in zip(node.inputs, given, strict=True)) else fold(node.op, given, node.attrs)


def float_biases(edit: Editor, graph: Graph) -> None:
    """A DequantizeLinear of constant int32 codes becomes a float constant: ``(codes - zero point) * scale`` in float32, as ONNX Runtime computes it."""
    for node in graph:
        if not node.is_dq or code_type(graph, node) != INT32:
            continue
        found = grid(graph, node)
        codes = graph.value(node.input(0))
        weights = any(op.op in WEIGHTED and slot < 2 for op, slot in graph.users.get(node.output, ()))
        if found is None or codes is None or weights or node.output in graph.outputs:
            edit.left.append(f"{node.name}: int32 codes that are not constant, no bias, or an output of the graph")
            continue
        parts = [along(part, codes.shape, written_axis(graph, node)) for part in found]
        if parts[0] is None or parts[1] is None:
            edit.left.append(f"{node.name}: its scales do not fit its int32 codes")
            continue
        reals = (codes - parts[1]).astype(np.int32).astype(np.float32) * parts[0].astype(np.float32)
        edit.remove(graph, node)
        graph.proto.initializer.append(initializer(reals.astype(found[0].dtype), node.output))
        edit.done.append(f"{node.name}: int32 bias written in float")


def signed_constants(edit: Editor, graph: Graph) -> None:
    """Constant 8-bit codes without their zero point, as int8 with zero point 0, where they fit."""
    for node in graph:
        kind = code_type(graph, node) if node.is_dq else 0
        codes = graph.value(node.input(0)) if kind in (INT8, UINT8) else None
        found = grid(graph, node) if codes is not None else None
        if codes is None or found is None or kind == INT8 and not np.any(found[1]):
            continue
        zero = along(found[1], codes.shape, written_axis(graph, node))
        if zero is None:
            edit.left.append(f"{node.name}: its zero points do not lie along an axis of its codes")
            continue
        moved = codes.astype(np.int64) - zero
        if moved.size and (moved.min() < -128 or moved.max() > 127):
            edit.left.append(f"{node.name}: its codes less the zero point do not fit int8")
            continue
        edit.read_from(node, 0, edit.constant(graph, moved.astype(np.int8), f"{node.input(0)}_int8"))
        edit.read_from(node, 2, edit.constant(graph, np.zeros(found[0].shape, np.int8), f"{node.name}_zero"))
        edit.done.append(f"{node.name}: constant codes written as int8 with zero point 0")


def signed_activations(edit: Editor, graph: Graph) -> None:
    """uint8 codes with the zero point 128 become int8 with 0, the same reals; so do those with 0 that never exceed 127."""
    for node in graph:
        if not node.is_q or code_type(graph, node) != UINT8:
            continue
        why = _unsigned_why(graph, node)
        readers = _dequantizers(graph, node.output)
        if why is None and readers is None:
            why = "its codes are read by others than DequantizeLinear, or leave the graph"
        if why is not None or readers is None:
            edit.left.append(f"{node.name}: uint8 codes stay: {why}")
            continue
        edit.write_attribute(node, "output_dtype", None)
        for one in (node, *(r for r in readers if r.input(2))):
            given = grid(graph, one)
            shape = given[0].shape if given is not None else ()
            edit.read_from(one, 2, edit.constant(graph, np.zeros(shape, np.int8), f"{one.name}_zero"))
        edit.forget(graph, _between(graph, node.output))
        edit.done.append(f"{node.name}: uint8 codes written as int8 with zero point 0")


def _unsigned_why(graph: Graph, node: Node) -> str | None:
    """Why unsigned codes cannot be written as signed ones; ``None`` when they can."""
    found = grid(graph, node)
    if found is None:
        return "scale or zero point are not constant"
    scale, zero = found
    if np.all(zero == 128):
        return None
    if np.any(zero):
        return f"a zero point of {int(zero.reshape(-1)[0])} has no symmetric form"
    reach = bounds(graph, node.input(0))
    smallest = float(numbers(scale).min()) if scale.size else 0.0
    if reach is None or reach[0] < 0 or not smallest > 0 or np.rint(reach[1] / smallest) > 127:
        return "values above 127 steps cannot be excluded"
    return None


def bounds(graph: Graph, name: str, depth: int = 16) -> tuple[float, float] | None:
    """Least and greatest value that a tensor can have, where the graph proves it."""
    value = graph.value(name)
    if value is not None:
        reals = numbers(value)
        return (float(reals.min()), float(reals.max())) if reals.size and np.all(np.isfinite(reals)) else None
    node = graph.maker.get(name)
    if node is None or not depth or node.domain not in ONNX_DOMAINS:
        return None
    if node.op in UNIT:
        return 0.0, 1.0 + SLACK
    if node.op == "Clip":
        low, high = (graph.value(node.input(i)) if node.input(i) else node.attrs.get(key) for i, key in ((1, "min"), (2, "max")))
        return None if low is None or high is None else (float(numbers(low).reshape(-1)[0]), float(numbers(high).reshape(-1)[0]))
    if node.op in ("Relu", *SHAPES, "MaxPool", "GlobalMaxPool", "Dropout"):
        given = bounds(graph, node.input(0), depth - 1)
        return given if given is None or node.op != "Relu" else (max(given[0], 0.0), max(given[1], 0.0))
    return None


def _dequantizers(graph: Graph, name: str, depth: int = 8) -> list[Node] | None:
    """The DequantizeLinear nodes that read codes, also through reshapes; ``None`` when something else reads them."""
    if stays(graph, name) or not depth:
        return None
    found: list[Node] = []
    for node, slot in graph.users.get(name, ()):
        if node.is_dq and slot == 0 and _same_zero(graph, node, name):
            found.append(node)
        elif node.op in SHAPES and slot == 0 and (behind := _dequantizers(graph, node.output, depth - 1)) is not None:
            found += behind
        else:
            return None
    return found


def _same_zero(graph: Graph, node: Node, name: str) -> bool:
    """A DequantizeLinear has the zero point of the QuantizeLinear before it."""
    maker = graph.maker.get(name)
    while maker is not None and not maker.is_q:
        maker = graph.maker.get(maker.input(0))
    mine, other = grid(graph, node), grid(graph, maker) if maker is not None else None
    return mine is not None and other is not None and {*mine[1].reshape(-1).tolist()} == {*other[1].reshape(-1).tolist()}


def _between(graph: Graph, name: str) -> list[str]:
    """The tensors from a QuantizeLinear's codes to its DequantizeLinear."""
    found = [name]
    for node in graph.readers(name):
        if node.op in SHAPES:
            found += _between(graph, node.output)
    return found


def dead_channels(edit: Editor, graph: Graph) -> None:
    """A scale of 0 becomes 1 where all its codes are 0."""
    for node in graph:
        codes = graph.value(node.input(0)) if node.is_dq else None
        found = grid(graph, node) if codes is not None else None
        if codes is None or found is None or not np.any(found[0] == 0) or np.any(found[1]):
            continue
        zero = along(found[0] == 0, codes.shape, written_axis(graph, node))
        if zero is None or np.any(numbers(codes)[np.broadcast_to(zero, codes.shape)] != 0):
            edit.left.append(f"{node.name}: its scale is 0 in a channel whose codes are not")
            continue
        scale = found[0].copy()
        scale[scale == 0] = 1
        edit.read_from(node, 1, edit.constant(graph, scale, f"{node.name}_scale", graph.dtype(node.input(1)) or None))
        edit.done.append(f"{node.name}: scale of {int((found[0] == 0).sum())} dead channels set to 1, their codes are 0")


def round_trips(edit: Editor, graph: Graph) -> None:
    """A QuantizeLinear behind a DequantizeLinear of the same grid gives the same codes again."""
    for node in graph:
        dq = graph.maker.get(node.input(0)) if node.is_q else None
        if dq is None or not dq.is_dq or stays(graph, node.output) or not _exact(graph, dq, node):
            continue
        for reader, slot in graph.users.get(node.output, ()):
            edit.read_from(reader, slot, dq.proto.input[0])
        edit.remove(graph, node)
        edit.done.append(f"{node.name}: dropped, the DequantizeLinear {dq.name} before it has the same grid")


def _exact(graph: Graph, dq: Node, q: Node) -> bool:
    """Quantizing what was dequantized gives the codes back: their product with the scale neither overflows nor is denormal."""
    a, b = grid(graph, dq), grid(graph, q)
    kind = code_type(graph, q)
    if a is None or b is None or kind != code_type(graph, dq) or kind not in (INT8, UINT8, INT4):
        return False
    same = a[0].dtype == b[0].dtype and a[0].shape == b[0].shape and np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    one_axis = a[0].size == 1 or written_axis(graph, dq) == written_axis(graph, q) and not dq.attrs.get("block_size") and not q.attrs.get("block_size")
    limits = {np.dtype(np.float32): (1.2e-38, 1e36), np.dtype(np.float16): (6.2e-5, 200.0)}.get(a[0].dtype)
    return same and one_axis and limits is not None and bool(np.all((a[0] >= limits[0]) & (a[0] <= limits[1]))) and used(graph, q.output)
