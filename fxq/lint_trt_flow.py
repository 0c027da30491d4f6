"""From a weighted operation back to the DequantizeLinear nodes that feed it: what TensorRT moves them through, and what becomes of their scales on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from onnx import TensorProto

from fxq.lint_trt_fold import MOVES
from fxq.lint_trt_graph import FLOATS, ONNX_DOMAINS, Graph, Node, Shape, elements, numbers

DEPTH = 64
"""Nodes looked through at most."""

SAME = ("Identity", "Dropout", "CastLike")
PER_TENSOR = (
    "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth", "MaxPool", "GlobalMaxPool", "Neg", "Abs", "ReduceMax", "ReduceMin", "TopK", "Gather",
)  # fmt: skip
JOINS = {"Concat": 0, "Max": 0, "Min": 0, "Where": 1, "Sum": 0}
"""Operators that put several values together -> the first input that is one of them. They pass when all have one scale."""


@dataclass(frozen=True)
class Operand:
    """What stands behind one input of an operation.

    Attributes:
        dq: the DequantizeLinear; ``None`` when there is none, or something stands between.
        why: for no ``dq``, the reason.
        between: the node that stands between the operation and a DequantizeLinear.
        codes: element type of the codes.
        axis: along which dimension of the operand the scales lie; ``None`` for one scale.
        one: the scale has the shape [1].
        blocks: number of blocks along ``axis``; 0 for no blocks.
        constant: the codes are known when the engine is built.
        factor: what the scale was multiplied by on the way.
        halved: a Cast to 16 bits was passed.
        joined: a Concat of several constants was passed.
    """

    dq: Node | None = None
    why: str = ""
    between: Node | None = None
    codes: int = 0
    axis: int | None = None
    one: bool = False
    blocks: int = 0
    constant: bool = False
    factor: float = 1.0
    halved: bool = False
    joined: Node | None = None


def code_type(graph: Graph, node: Node) -> int:
    """Element type of the codes of a QuantizeLinear or DequantizeLinear: by its zero point, by ``output_dtype``, otherwise ONNX's default uint8. 0: unknown."""
    if node.is_dq:
        return graph.dtype(node.input(0)) or _made_type(graph, node.input(0)) or root_type(graph, node.input(0)) or graph.dtype(node.input(2))
    if node.input(2):
        return graph.dtype(node.input(2))
    return int(node.attrs.get("output_dtype") or 0) or TensorProto.UINT8


def root_type(graph: Graph, name: str) -> int:
    """Element type of the constant that nodes move the elements of; 0 when there is none."""
    for _ in range(16):
        tensor = graph.tensor(name)
        if tensor is not None:
            return tensor.data_type
        node = graph.maker.get(name)
        if node is None or node.op not in MOVES:
            break
        name = node.input(0)
    return 0


def _made_type(graph: Graph, name: str) -> int:
    node = graph.maker.get(name)
    return code_type(graph, node) if node is not None and node.is_q else 0


def written_axis(graph: Graph, node: Node) -> int:
    """The axis of a vector of scales as the parser understands it: unwritten it is 1, and 0 before opset 13, where ONNX has none."""
    axis = node.attrs.get("axis")
    return int(axis) if axis is not None else 1 if graph.opset >= 13 else 0


def scale_axis(graph: Graph, node: Node) -> int | None:
    """Dimension of the input along which a vector of scales lies, counted from 0; ``None`` when it is unknown or outside."""
    axis = written_axis(graph, node)
    shape = graph.shape(node.input(0)) or graph.shape(node.output)
    if shape is None:
        return axis if axis >= 0 else None
    return axis % len(shape) if shape and -len(shape) <= axis < len(shape) else None


def operand(graph: Graph, name: str, depth: int = DEPTH) -> Operand:
    """The DequantizeLinear behind tensor ``name``, as seen where the tensor is used."""
    if name not in graph.memo:
        graph.memo[name] = _operand(graph, name, depth)
    found: Operand = graph.memo[name]
    return found


def _operand(graph: Graph, name: str, depth: int) -> Operand:
    node = graph.maker.get(name)
    if node is None:
        outside = graph.outer is not None and not graph.has(name) and graph.outer.maker.get(name) is not None
        return Operand(why="comes from outside the subgraph" if outside else "is float")
    if node.is_dq:
        return _start(graph, node)
    if not depth or node.domain not in ONNX_DOMAINS:
        return Operand(why="is float")
    if node.op in JOINS:
        return _join(graph, node, depth)
    if node.op in ("Mul", "Div"):
        return _scaled(graph, node, depth)
    step = STEPS.get(node.op)
    if step is None or node.output != name and node.op != "Split":
        return _stop(graph, node)
    given = operand(graph, node.input(0), depth - 1) if node.input(0) else Operand(why="is float")
    return given if given.dq is None else step(graph, node, given) or Operand(why="is float", between=node)


def _stop(graph: Graph, node: Node) -> Operand:
    """The end of the way at a node that TensorRT moves no DequantizeLinear through."""
    return Operand(why="is float", between=node if any(_dequantized(graph, name) for name in node.inputs) else None)


def _dequantized(graph: Graph, name: str) -> bool:
    """A DequantizeLinear stands a few steps before a tensor."""
    for _ in range(4):
        node = graph.maker.get(name)
        if node is None or node.is_dq or node.op not in STEPS:
            break
        name = node.input(0)
    return node is not None and node.is_dq


def _start(graph: Graph, node: Node) -> Operand:
    codes, constant = code_type(graph, node), graph.constant(node.input(0))
    if not graph.constant(node.input(1)):
        return Operand(why=f"is dequantized by {node.name} with a scale that is computed at run time")
    scale, shape = graph.shape(node.input(1)), graph.shape(node.input(0)) or ()
    if scale is None:
        value = graph.value(node.input(1))
        scale = value.shape if value is not None else ()
    if len(scale) > 1:
        axis = next((i for i, (n, s) in enumerate(zip(shape, scale, strict=False)) if n != s), written_axis(graph, node))
        blocks = int(scale[axis] or 0) if axis < len(scale) else 0
        return Operand(node, codes=codes, axis=axis, blocks=blocks or 1, constant=constant)
    one = len(scale) == 1 and scale[0] == 1
    return Operand(node, codes=codes, axis=scale_axis(graph, node) if scale and not one else None, one=one, constant=constant)


# ---- what a DequantizeLinear moves through: the operand behind the node, or None ------------------------------------------------


def _same(graph: Graph, node: Node, given: Operand) -> Operand | None:
    return given


def _per_tensor(graph: Graph, node: Node, given: Operand) -> Operand | None:
    return given if given.axis is None else None


def _cast(graph: Graph, node: Node, given: Operand) -> Operand | None:
    to = int(node.attrs.get("to", 0))
    if to not in FLOATS:
        return None
    narrow = to in (TensorProto.FLOAT16, TensorProto.BFLOAT16) and graph.dtype(node.input(0)) not in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return None if given.halved and not narrow else replace(given, halved=given.halved or narrow)


def _transpose(graph: Graph, node: Node, given: Operand) -> Operand | None:
    if given.axis is None:
        return given
    shape = graph.shape(node.input(0))
    perm = node.attrs.get("perm") or (list(range(len(shape)))[::-1] if shape is not None else [])
    return replace(given, axis=list(perm).index(given.axis)) if given.axis in perm else None


def _reshape(graph: Graph, node: Node, given: Operand) -> Operand | None:
    if given.axis is None:
        return given
    before, after = graph.shape(node.input(0)), graph.shape(node.output)
    axis = kept(before, after, given.axis)
    return None if axis is None else replace(given, axis=axis)


def kept(before: Shape | None, after: Shape | None, axis: int) -> int | None:
    """Where a dimension stands after a reshape that leaves it whole; ``None`` when it is cut or merged, or sizes are unknown."""
    if before is None or after is None or axis >= len(before):
        return None
    if before == after:
        return axis
    left = known(before[:axis])
    for i, size in enumerate(after):
        if size == before[axis] and size is not None and left is not None and known(after[:i]) == left and size != 1:
            return i
    return None


def known(sizes: Shape) -> int | None:
    """Product of sizes; ``None`` when one is unknown."""
    return None if None in sizes else elements(n for n in sizes if n is not None)


def _einsum(graph: Graph, node: Node, given: Operand) -> Operand | None:
    """Of one operand and no sum: a transpose."""
    equation = node.attrs.get("equation") or b""
    before, arrow, after = equation.decode(errors="replace").replace(" ", "").partition("->")
    if not arrow or not before.isalpha() or len(set(before)) != len(before) or sorted(before) != sorted(after):
        return None
    return given if given.axis is None else replace(given, axis=after.index(before[given.axis])) if given.axis < len(before) else None


def _slice(graph: Graph, node: Node, given: Operand) -> Operand | None:
    return None if given.blocks else given


def _widen(graph: Graph, node: Node, given: Operand) -> Operand | None:
    """Tile and Expand: not along the scales."""
    if given.axis is None:
        return given
    before, after = graph.shape(node.input(0)), graph.shape(node.output)
    if given.blocks or before is None or after is None:
        return None
    axis = given.axis + len(after) - len(before)
    return replace(given, axis=axis) if 0 <= axis < len(after) and before[given.axis] == after[axis] else None


def _pad(graph: Graph, node: Node, given: Operand) -> Operand | None:
    if given.axis is not None:
        before, after = graph.shape(node.input(0)), graph.shape(node.output)
        return given if before is not None and None not in before and before == after else None
    if node.attrs.get("mode") not in (None, b"constant"):
        return given
    if not node.input(2):
        return given if not node.attrs.get("value") else None
    value = graph.value(node.input(2))
    return given if value is not None and value.size == 1 and not numbers(value).reshape(-1)[0] else None


STEPS: dict[str, Callable[[Graph, Node, Operand], Operand | None]] = {
    **dict.fromkeys(SAME, _same), **dict.fromkeys(PER_TENSOR, _per_tensor), "Cast": _cast, "Transpose": _transpose, "Slice": _slice, "Split": _slice,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape), "Tile": _widen, "Expand": _widen, "Pad": _pad,
    "Einsum": _einsum,
}  # fmt: skip


def _scaled(graph: Graph, node: Node, depth: int) -> Operand:
    """A product with a constant goes into the scale: one number always, a vector when it lies along the scales of a constant."""
    slots = (0, 1) if node.op == "Mul" else (0,)
    for slot in slots:
        given = operand(graph, node.input(slot), depth - 1) if node.input(slot) else Operand()
        if given.dq is None:
            continue
        factor = graph.shape(node.input(1 - slot)) if graph.constant(node.input(1 - slot)) else None
        shape = graph.shape(node.input(slot))
        if factor is not None and known(factor) == 1:
            value = graph.value(node.input(1 - slot))
            number = float(numbers(value).reshape(-1)[0]) if value is not None else float("nan")
            return replace(given, factor=given.factor * (number if node.op == "Mul" else 1 / number if number else 0.0))
        if factor is not None and shape is not None and given.constant and not given.blocks:
            long = [i + len(shape) - len(factor) for i, n in enumerate(factor) if n != 1]
            if len(long) == 1 and given.axis in (None, long[0]) and long[0] >= 0:
                return replace(given, axis=long[0], one=False)
        return Operand(why="is float", between=node)
    return _stop(graph, node)


def _join(graph: Graph, node: Node, depth: int) -> Operand:
    """Values that are put together keep their DequantizeLinear when all have the same one scale."""
    names = [name for name in node.inputs[JOINS[node.op] :] if name]
    parts = {name: operand(graph, name, depth - 1) for name in names}
    found = [p for p in parts.values() if p.dq is not None]
    if not found:
        return Operand(why="is float")
    if len(names) == 1:
        return found[0]
    first = found[0]
    if all(p.constant for p in parts.values()) and len(found) == len(parts) and node.op == "Concat":
        return replace(first, joined=node)
    alike = len(found) == len(parts) and all(p.axis is None and p.one == first.one and p.codes == first.codes for p in found)
    if alike and node.op != "Sum" and len({_number(graph, p) for p in found}) == 1:
        return replace(first, constant=all(p.constant for p in found))
    return Operand(why="is float", between=node)


def _number(graph: Graph, given: Operand) -> object:
    """The scale as a number, or, when it cannot be read, the name of its tensor."""
    name = given.dq.input(1) if given.dq is not None else ""
    value = graph.value(name)
    return float(numbers(value).reshape(-1)[0]) * given.factor if value is not None and value.size == 1 else (name, given.factor)
