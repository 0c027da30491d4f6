"""What TensorRT does not take of single QuantizeLinear and DequantizeLinear nodes.

Facts: NVIDIA's operator documentation, and builds with TensorRT-RTX 1.7.1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from fxq.lint_trt_flow import code_type, written_axis
from fxq.lint_trt_graph import FLOATS, Array, Graph, Node, Shape, elements, numbers
from fxq.lint_trt_ops import FP4, FP8, INT4, INT8, SINCE, UINT8, type_name
from fxq.lint_trt_report import ERROR, WARNING, Finding

SYMMETRIC = "Calibrate symmetrically: INT8 codes with zero point 0"
OPSETS = {FP8: 19, INT4: 21, FP4: 23}
FULL_BLOCKS = (64, 128)
"""Block sizes of INT4 weights that full TensorRT takes; TensorRT-RTX builds 2 and more."""


def quantizers(graph: Graph, capability: int | None) -> Iterator[Finding]:
    """Findings about every QuantizeLinear and DequantizeLinear of a graph.

    Args:
        graph: subgraphs are not entered.
        capability: of the target, times 10; ``None`` for any.
    """
    for node in graph:
        if (node.is_q or node.is_dq) and len(node.inputs) > 1:
            yield from code_types(graph, node, capability)
            yield from zero_points(graph, node)
            yield from scale_values(graph, node)
            yield from scale_shape(graph, node)
            yield from four_bits(graph, node)
            yield from opsets(graph, node)


def _error(code: str, node: Node, fact: str, way_out: str) -> Finding:
    return Finding(ERROR, code, node.name, fact, way_out)


def follows_q(graph: Graph, node: Node) -> bool:
    """A DequantizeLinear of what a QuantizeLinear made: faults of their type stand at the QuantizeLinear."""
    maker = graph.maker.get(node.input(0))
    return node.is_dq and maker is not None and maker.is_q


def said_before(graph: Graph, node: Node, slot: int) -> bool:
    """The scale or zero point of a DequantizeLinear is that of the QuantizeLinear before it, where its faults are said."""
    if not follows_q(graph, node):
        return False
    mine, other = node.input(slot), graph.maker[node.input(0)].input(slot)
    a, b = (graph.value(name) if name else None for name in (mine, other))
    return mine == other or a is not None and b is not None and set(map(repr, numbers(a).reshape(-1))) == set(map(repr, numbers(b).reshape(-1)))


def code_types(graph: Graph, node: Node, capability: int | None) -> Iterator[Finding]:
    """Code types that TensorRT has not, or takes for another."""
    codes, implicit = code_type(graph, node), not node.input(2) and not node.attrs.get("output_dtype")
    value, given = graph.dtype(node.input(0)), graph.dtype(node.input(2))
    if node.is_q and value and value not in FLOATS:
        yield _error("input-type", node, f"quantizes {type_name(value)} values", "Cast them to float first")
    if node.is_dq and value in FLOATS:
        yield _error("input-type", node, "dequantizes float values", "Remove it, or quantize its input")
    elif node.is_dq and follows_q(graph, node):
        if given and given != codes:
            yield _error("zero-point", node, f"its zero point is {type_name(given)}, its input {type_name(codes)}", "Write both with one type")
    elif node.is_q and implicit:
        fact = "has no zero point: ONNX says that its codes are uint8, TensorRT takes them as int8 and says nothing"
        yield _error("missing-zero-point", node, fact, "Write an int8 zero point of 0 if int8 is meant (--fix does where the numbers stay)")
    elif codes == UINT8:
        yield _error("uint8", node, f"its codes are uint8: TensorRT takes them as int8 or rejects them{_at(graph, node)}", SYMMETRIC + " (--fix does for 128)")
    elif codes == TensorProto.INT32:
        yield _error("int32-bias", node, "dequantizes int32 codes", "Write the bias in float (--fix does)")
    elif codes and codes not in SINCE and codes not in FLOATS:
        yield _error("code-type", node, f"its codes are {type_name(codes)}, which TensorRT has not", "Use INT8, FP8 E4M3, INT4 or FP4")
    if capability is not None and capability < SINCE.get(INT8 if codes == UINT8 else codes, 0) and not follows_q(graph, node):
        yield _error("capability", node, f"{type_name(codes)} needs compute capability {SINCE.get(codes, 80) / 10}, the target has {capability / 10}",
                     "Choose another target or another type")  # fmt: skip


def _at(graph: Graph, node: Node) -> str:
    zero = graph.value(node.input(2)) if node.input(2) else None
    if zero is None or not zero.size:
        return ""
    points = numbers(zero)
    return f" (zero point {points.min():g})" if points.min() == points.max() else f" (zero points {points.min():g} to {points.max():g})"


def zero_points(graph: Graph, node: Node) -> Iterator[Finding]:
    """The zero point must be 0, written as an initializer, and as many as the scales."""
    name = node.input(2)
    if not name or code_type(graph, node) in (UINT8, TensorProto.INT32):
        return
    if said_before(graph, node, 2):
        return
    zero, shape, scale = graph.value(name), graph.shape(name), graph.shape(node.input(1))
    maker = graph.maker.get(name)
    if not graph.constant(name):
        yield _error("zero-point", node, "its zero point is computed at run time", SYMMETRIC)
    elif graph.unread(name):
        yield not_checked(node, "zero point")
    elif zero is not None and np.any(numbers(zero) != 0):
        point = next(z for z in numbers(zero).reshape(-1) if z != 0)
        yield _error("zero-point", node, f"its zero point is {point:g}: TensorRT is symmetric only", SYMMETRIC)
    elif maker is not None and maker.op not in ("Constant", "Identity", "Cast") and graph.maker.get(name) is not None:
        yield _error("zero-point", node, f"its zero point is computed by {maker.op}", "Write it as an initializer (--fix does)")
    elif shape is not None and scale is not None and None not in shape and None not in scale and _count(shape) != _count(scale):
        yield _error("zero-point", node, f"it has {_count(shape)} zero points and {_count(scale)} scales", "Write one zero point per scale (--fix does)")


def _count(shape: Shape) -> int:
    return elements(n for n in shape if n is not None)


def not_checked(node: Node, what: str) -> Finding:
    """A constant that is stored elsewhere."""
    return Finding(WARNING, "not-checked", node.name, f"its {what} is in an external file that is not here", "Put the file beside the model")


def scale_values(graph: Graph, node: Node) -> Iterator[Finding]:
    """Scales are constant, finite, above 0 and no denormal numbers, of the type of the data."""
    name = node.input(1)
    kind, data = graph.dtype(name), graph.dtype(node.input(0) if node.is_q else node.output)
    if kind and kind not in FLOATS and kind != TensorProto.FLOAT8E8M0:
        yield _error("scale-type", node, f"its scale is {type_name(kind)}", "Write the scale in the type of the data")
    elif node.is_q and graph.opset < 23 and kind and data in FLOATS and kind != data:
        fact = f"its scale is {type_name(kind)}, its input {type_name(data)}"
        yield _error("scale-type", node, fact, "Write the scale in the type of the data; types of its own need opset 23 and output_dtype")
    if not graph.constant(name):
        fact = "its scale is computed at run time: what reads it runs in float"
        yield Finding(WARNING, "run-time-scale", node.name, fact, "Calibrate: write a constant scale")
        return
    if graph.unread(name):
        yield not_checked(node, "scale")
        return
    culprit = crash(graph, name)
    if culprit is not None and not follows_q(graph, node):
        fact = f"its scale is computed by {culprit.op} {culprit.name} from constants: the parser crashes on it"
        yield _error("scale-expression", node, fact, "Write the scale as an initializer (--fix does where it is exact)")
    value = graph.value(name)
    if value is None or not value.size or kind not in (0, *FLOATS) or said_before(graph, node, 1):
        return
    scales = numbers(value)
    if not np.all(np.isfinite(scales)):
        bad = next(s for s in scales.reshape(-1) if not np.isfinite(s))
        yield _error("scale-value", node, f"its scale is {bad}{_which(scales, ~np.isfinite(scales))}", "Calibrate with finite data")
    elif not np.all(scales > 0):
        dead = " (dead channels: --fix gives them a legal one)" if scales.ndim else ""
        yield _error("scale-value", node, f"its scale is {scales.min():g}{_which(scales, scales <= 0)}, and must be above 0", f"Use any positive scale{dead}")
    elif np.any(scales < np.finfo(np.float32).tiny):
        fact = f"its scale {scales.min():g}{_which(scales, scales < np.finfo(np.float32).tiny)} is a denormal number: its reciprocal overflows"
        yield _error("scale-value", node, fact, "Use a scale of at least 1.2e-38")


def crash(graph: Graph, name: str, depth: int = 8) -> Node | None:
    """A node of a constant expression that the parser of TensorRT-RTX 1.7.1 crashes on."""
    node = graph.maker.get(name)
    if node is None or not depth or node.is_q or node.is_dq:
        return None
    if node.op.startswith("Reduce") or node.op == "Pow":
        return node
    return next((found for i in node.inputs if i and (found := crash(graph, i, depth - 1)) is not None), None)


def _which(scales: Array, bad: Array) -> str:
    return "" if scales.size == 1 else f" in {int(bad.sum())} of {scales.size} channels"


def scale_shape(graph: Graph, node: Node) -> Iterator[Finding]:
    """As many scales as the axis or the blocks ask for."""
    name = node.input(1)
    value = graph.value(name) if graph.shape(name) is None else None
    scale = value.shape if value is not None else graph.shape(name)
    data = graph.shape(node.input(0)) or graph.shape(node.output)
    if scale is None or None in scale:
        return
    sizes = tuple(n for n in scale if n is not None)
    if not elements(sizes):
        yield _error("scale-count", node, "its scale is empty", "Write one scale, or one per channel")
    elif len(sizes) == 1 and sizes[0] > 1:
        yield from _per_channel(graph, node, sizes[0], data)
    elif len(sizes) > 1:
        yield from _blocks(graph, node, sizes, data)


def _per_channel(graph: Graph, node: Node, count: int, data: Shape | None) -> Iterator[Finding]:
    if data is None:
        return
    axis = written_axis(graph, node)
    if not -len(data) <= axis < len(data):
        yield _error("scale-count", node, f"its axis {axis} is outside of its {len(data)} dimensions", "Write the axis of the output channels")
    elif data[axis] not in (None, count):
        hint = "" if "axis" in node.attrs or graph.opset < 13 else " (the axis is not written: ONNX takes 1)"
        fact = f"it has {count} scales for the {data[axis]} channels of axis {axis}{hint}"
        yield _error("scale-count", node, fact, "Write one scale per channel and their axis")


def _blocks(graph: Graph, node: Node, sizes: tuple[int, ...], data: Shape | None) -> Iterator[Finding]:
    way_out = "Put the blocks along one of the last two dimensions, and let them divide it"
    if not node.attrs.get("block_size"):
        yield _error("block", node, f"its scale has {len(sizes)} dimensions and it has no block_size", "Write one scale, one per channel along axis, or blocks")
    if data is None or not node.attrs.get("block_size"):
        return
    if len(data) != len(sizes):
        yield _error("block", node, f"its scale has {len(sizes)} dimensions, its input {len(data)}", way_out)
        return
    differ = [i for i, (n, s) in enumerate(zip(data, sizes, strict=True)) if n is not None and n != s]
    if len(differ) > 1 or differ and differ[0] < len(data) - 2:
        yield _error("block", node, f"its blocks lie along dimension {', '.join(map(str, differ))} of {len(data)}", way_out)
        return
    for axis in differ:
        length = data[axis] or 0
        if length % sizes[axis]:
            yield _error("block", node, f"{sizes[axis]} blocks do not divide the {length} elements of axis {axis}", way_out)
        elif code_type(graph, node) == INT4 and sizes[axis] > 1 and length // sizes[axis] not in FULL_BLOCKS:
            fact = f"its blocks hold {length // sizes[axis]} elements: TensorRT-RTX builds that, full TensorRT takes 64 and 128 only"
            yield Finding(WARNING, "int4-block-size", node.name, fact, "Use blocks of 64 or 128")


def four_bits(graph: Graph, node: Node) -> Iterator[Finding]:
    """4-bit codes come in pairs, and FP4 activations in blocks."""
    codes = code_type(graph, node)
    shape = graph.shape(node.input(0)) or graph.shape(node.output)
    if codes in (INT4, FP4) and shape is not None and None not in shape and _count(shape) % 2 and not follows_q(graph, node):
        yield _error("odd-4bit", node, f"its {type_name(codes)} tensor has an odd number of elements ({_count(shape)})", "Pad it, or use INT8")
    if node.is_q and codes == FP4 and not graph.constant(node.input(0)) and not node.attrs.get("block_size"):
        yield _error("fp4-activation", node, "quantizes activations to FP4 with one scale: the builder crashes", "Quantize activations to FP8")


def opsets(graph: Graph, node: Node) -> Iterator[Finding]:
    """What ONNX itself allows from some opset on; TensorRT-RTX's parser does not mind."""
    scale, codes = graph.shape(node.input(1)) or (), code_type(graph, node)
    need, what = OPSETS.get(codes, 10), type_name(codes)
    if len(scale) == 1 and scale[0] != 1 and need < 13:
        need, what = 13, "one scale per channel"
    if node.attrs.get("block_size") and need < 21:
        need, what = 21, "block scales"
    if graph.opset < need and not follows_q(graph, node):
        yield Finding(WARNING, "opset", node.name, f"{what} needs opset {need}, the file has {graph.opset}", "Write the file with a later opset")
