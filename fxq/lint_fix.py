"""Repairs an ONNX file for ONNX Runtime where nodes stay float without need, and says of each repair whether it is exact or by how much it moves numbers.

What the runtime repairs itself while it loads a file (a DequantizeLinear with several readers, signed codes that one node reads, float biases in front of a
QuantizeLinear) is left to it. See :mod:`fxq.lint_rules` for the rules that keep nodes in float.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto

from fxq import lint_fix_layers
from fxq.lint_trt_edit import Editor, grid, stays
from fxq.lint_trt_flow import code_type
from fxq.lint_trt_graph import Array, Graph, Node, inlined
from fxq.lint_whole import require_whole
from fxq.spec import QuantSpec

INT8, UINT8 = int(TensorProto.INT8), int(TensorProto.UINT8)
SPECS = {INT8: QuantSpec.parse("s8/pt"), UINT8: QuantSpec.parse("u8/pt")}
SHIFT = -SPECS[INT8].qmin
JOINS = ("Add", "Mul", "Concat")
"""Operations whose inputs must all have one type of codes."""
EXACT = "exact"


def explicit_zero_points(edit: Editor, graph: Graph) -> None:
    """Zero points that are left out, written: Gemm fuses only with one, and grids are compared only where they are given."""
    for node in graph:
        kind = code_type(graph, node) if node.is_q or node.is_dq else 0
        shape = graph.shape(node.input(1))
        if kind not in SPECS or node.input(2) or shape is None or len(shape) > 1 or None in shape:
            continue
        zeros = np.zeros(tuple(n or 0 for n in shape), np.int8 if kind == INT8 else np.uint8)
        edit.read_from(node, 2, edit.constant(graph, zeros, f"{node.name}_zero"))
        edit.write_attribute(node, "output_dtype", None)
        edit.done.append(f"{node.op} {node.name}: zero point 0 written ({EXACT})")


def unsigned_activations(edit: Editor, graph: Graph) -> None:
    """Signed codes that several nodes read become unsigned, their zero point 128 higher: the same reals. The runtime does it where one node reads them."""
    for node in graph:
        if not node.is_q or code_type(graph, node) != INT8:
            continue
        readers = [user for user, _ in graph.users.get(node.output, ())]
        if stays(graph, node.output) or not readers or not all(r.is_dq for r in readers):
            edit.left.append(f"{node.op} {node.name}: its int8 codes are read by others than DequantizeLinear, or leave the graph")
            continue
        found = [grid(graph, n) for n in (node, *readers)]
        if any(f is None or f[0].size != 1 for f in found):
            edit.left.append(f"{node.op} {node.name}: its int8 grid is not one constant scale and zero point")
            continue
        for n, f in zip((node, *readers), found, strict=True):
            assert f is not None
            _shift_zero(edit, graph, n, f[1])
        edit.write_attribute(node, "output_dtype", None)
        edit.forget(graph, [node.output])
        edit.done.append(f"{node.op} {node.name}: int8 codes written as uint8, the zero point {SHIFT} higher ({EXACT})")


def unsigned_constants(edit: Editor, graph: Graph) -> None:
    """Constant int8 codes that are joined with uint8 ones become uint8: the same reals."""
    for node in graph:
        if node.op not in JOINS:
            continue
        sources = [graph.maker.get(name) for name in node.inputs]
        kinds = [code_type(graph, dq) if dq is not None and dq.is_dq else 0 for dq in sources]
        if UINT8 not in kinds:
            continue
        for dq, kind in zip(sources, kinds, strict=True):
            codes = graph.value(dq.input(0)) if dq is not None and kind == INT8 else None
            found = grid(graph, dq) if dq is not None and codes is not None else None
            if dq is None or codes is None or found is None or len(graph.users.get(dq.output, ())) != 1:
                continue
            moved = (codes.astype(np.int32) + SHIFT).astype(np.uint8)
            edit.read_from(dq, 0, edit.constant(graph, moved, f"{dq.input(0)}_uint8"))
            _shift_zero(edit, graph, dq, found[1])
            edit.done.append(f"{dq.op} {dq.name}: constant int8 codes written as uint8 ({EXACT})")


def _shift_zero(edit: Editor, graph: Graph, node: Node, zero: Array) -> None:
    edit.read_from(node, 2, edit.constant(graph, (zero + SHIFT).astype(np.uint8), f"{node.name}_zero"))


def idle_clips(edit: Editor, graph: Graph) -> None:
    """Relu and Clip behind a DequantizeLinear whose grid lies inside of their bounds do nothing: they go, and with them a float operation."""
    for node in graph:
        ends = _ends(graph, node)
        dq = graph.maker.get(node.input(0)) if ends is not None else None
        found = grid(graph, dq) if dq is not None and dq.is_dq else None
        kind = code_type(graph, dq) if dq is not None and found is not None else 0
        if ends is None or dq is None or found is None or kind not in SPECS or found[0].size != 1 or stays(graph, node.output):
            continue
        scale, zero = np.float32(found[0].reshape(-1)[0]), int(found[1].reshape(-1)[0])
        low, high = (np.float32(code - zero) * scale for code in (SPECS[kind].qmin, SPECS[kind].qmax))
        if low < ends[0] or high > ends[1]:
            continue
        for user, slot in graph.users.get(node.output, ()):
            edit.read_from(user, slot, node.input(0))
        edit.remove(graph, node)
        edit.done.append(f"{node.op} {node.name}: removed, the grid in front of it lies inside of its bounds ({EXACT})")
        return idle_clips(edit, edit.scopes()[0])


def _ends(graph: Graph, node: Node) -> tuple[float, float] | None:
    """Constant bounds of a Relu or Clip."""
    if node.op == "Relu":
        return 0.0, float("inf")
    if node.op != "Clip":
        return None
    low, high = -float("inf"), float("inf")
    if "min" in node.attrs or "max" in node.attrs:
        return float(node.attrs.get("min", low)), float(node.attrs.get("max", high))
    ends = []
    for slot, default in ((1, low), (2, high)):
        value = graph.value(node.input(slot)) if node.input(slot) else np.asarray(default)
        if value is None or value.size != 1:
            return None
        ends.append(float(value.reshape(-1)[0]))
    return ends[0], ends[1]


def relu_between_grids(edit: Editor, graph: Graph) -> None:
    """Relu between a DequantizeLinear and a QuantizeLinear becomes LeakyRelu of slope 0, which the runtime has as a table of codes."""
    for node in graph:
        dq = graph.maker.get(node.input(0)) if node.op == "Relu" else None
        readers = graph.readers(node.output)
        if dq is None or not dq.is_dq or len(readers) != 1 or not readers[0].is_q or stays(graph, node.output):
            continue
        if code_type(graph, dq) != code_type(graph, readers[0]) or code_type(graph, dq) not in SPECS:
            edit.left.append(f"Relu {node.name}: the codes in front of it and behind it are of two types")
            continue
        node.proto.op_type = "LeakyRelu"
        edit.write_attribute(node, "alpha", 0.0)
        edit.done.append(f"Relu {node.name}: written as LeakyRelu of slope 0, which runs on codes ({EXACT})")


STEPS: tuple[Callable[[Editor, Graph], None], ...] = (
    unsigned_activations, unsigned_constants, explicit_zero_points, idle_clips, relu_between_grids, lint_fix_layers.means, lint_fix_layers.batch_norms,
    lint_fix_layers.biases,
)  # fmt: skip
"""In order: each sees what the ones before it wrote."""


def fix(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Repair what keeps nodes in float in ONNX Runtime and can be repaired without changing what the file means.

    Done: zero points written; int8 activations that several nodes read as uint8; idle clips removed; Relu between grids as a table; ReduceMean over all
    positions as GlobalAveragePool; batch norms between grids as depthwise convolutions and float biases of matrix products as int32 (both move numbers,
    by at most half a step of the bias's grid).

    Args:
        model: of any tool; it is not changed.

    Returns:
        The repaired model, and what was done, line by line, each ``exact`` or with its bound; lines that begin with ``not repaired`` say what was left and
        why. The model itself, when there is nothing to do.

    Raises:
        ArtifactError: when its nodes are no graph.
    """
    require_whole(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(inlined(model))
    edit = Editor(copy)
    for step in STEPS:
        step(edit, edit.scopes()[0])
    edit.sweep()
    left = [f"not repaired: {line}" for line in dict.fromkeys(edit.left)]
    return (copy, [*edit.done, *left]) if edit.done else (model, left)
