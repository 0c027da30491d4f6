"""How TensorRT runs each convolution and matrix product of a Q/DQ file, and for float the reason. Measured with TensorRT-RTX 1.7.1 (tests/trt_zoo)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import TensorProto

from fxq.lint_trt_flow import Operand, operand
from fxq.lint_trt_graph import ONNX_DOMAINS, Graph, Node
from fxq.lint_trt_packed import packed
from fxq.lint_trt_report import ERROR, WARNING, Finding, TrtOp

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
INT8, UINT8, INT4, FP8, FP4 = (
    int(t) for t in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1)
)
SINCE = {INT8: 80, INT4: 80, FP8: 89, FP4: 120}
"""Code type -> the least compute capability, times 10."""

WAYS = {
    "between": "Put QuantizeLinear and DequantizeLinear behind that node, directly in front of this one",
    "run-time-scale": "Calibrate: TensorRT takes constant scales only",
    "weight-only": "Quantize its input too, or leave the weights in float",
    "activation-only": "Quantize the other operand too, or leave this one in float",
    "conv-transpose": "Leave it in float: TensorRT has no int8 transposed convolution",
    "scale-rank": "Write the scale as a scalar of rank 0 (--fix does)",
    "activation-channels": "Give activations one scale per tensor",
    "weight-axis": "Give the weights one scale per output channel and write that axis, or one scale in all",
    "blocked-weights": "Give the weights one scale per output channel",
    "blocked-product": "Give the weights one scale per output channel, or do not quantize the activations",
    "joined-weights": "Join the codes into one constant",
    "int4-float": "Give INT4 weights of a MatMul or Gemm blocks of 64 or 128 along the last two dimensions, at least two of them",
    "fp4-float": "Use FP8 or INT8, or accept that the weights are only smaller",
    "mixed-types": "Quantize both operands to one type",
    "int4-activation": "Quantize activations to INT8 or FP8",
    "capability": "Choose another target or another type",
    "packed": "Write one product for each projection (fxq does), or give the weights one scale in all",
    "outside": "Put QuantizeLinear and DequantizeLinear into the subgraph",
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """How an operation runs, and the rule that says so. An empty code: nothing to report."""

    runs: str
    why: str = ""
    code: str = ""
    level: str = WARNING


def operations(graph: Graph, capability: int | None) -> Iterator[tuple[TrtOp, Finding | None]]:
    """Every weighted operation of a graph, with the finding about it.

    Args:
        graph: subgraphs are not entered.
        capability: of the target, times 10; ``None`` for any.
    """
    for node in graph:
        if node.op in WEIGHTED and node.domain in ONNX_DOMAINS and len(node.inputs) > 1:
            v = verdict(graph, node, capability)
            op = TrtOp(node.name, node.op, v.runs, v.why)
            yield op, Finding(v.level, v.code, node.name, f"{node.op} {_sentence(v)}", WAYS[v.code]) if v.code else None


def _sentence(v: Verdict) -> str:
    return v.why if v.level == ERROR else f"runs in {'INT4' if v.runs == 'int4-weights' else v.runs}: {v.why}"


def verdict(graph: Graph, node: Node, capability: int | None) -> Verdict:
    """How one weighted operation runs."""
    a, b = (operand(graph, node.input(i)) for i in (0, 1))
    if a.dq is None and b.dq is None:
        return _unquantized(a, b)
    for slot, one in ((0, a), (1, b)):
        if one.dq is not None and one.codes not in (0, UINT8, *SINCE):
            return Verdict("float", f"TensorRT has no {type_name(one.codes)} (input {slot})")
        if one.dq is not None and capability is not None and capability < SINCE.get(one.codes, 0):
            return Verdict("float", f"compute capability {capability / 10} has no {type_name(one.codes)} (input {slot})")
    if a.dq is None or b.dq is None:
        return _half(node, a, b)
    if node.op == "ConvTranspose":
        return Verdict("float", "transposed convolutions have no integer kernel", "conv-transpose")
    if a.joined or b.joined:
        return Verdict("float", "reads constants that are joined behind their DequantizeLinear: the builder fails on it", "joined-weights", ERROR)
    placed = _conv_scales(node, a, b) if node.op == "Conv" else _product_scales(graph, node, a, b)
    if placed is None and b.constant and b.axis is not None and node.op in ("Gemm", "MatMul") and packed(graph, node):
        return Verdict("float", "computes several projections of an attention layer at once: the builder takes it apart and unpacks the weights", "packed")
    return placed or _types(node, a, b)


def type_name(codes: int) -> str:
    """``INT8``, ``FP8`` (E4M3), ... as users say it."""
    names = {FP8: "FP8", FP4: "FP4", int(TensorProto.FLOAT8E5M2): "FP8 E5M2"}
    return names.get(codes) or (TensorProto.DataType.Name(codes) if codes in TensorProto.DataType.values() else f"type {codes}")


def _unquantized(a: Operand, b: Operand) -> Verdict:
    for slot, one in ((0, a), (1, b)):
        reason = _reason(slot, one)
        if reason is not None:
            return reason
    return Verdict("float", "neither input is quantized")


def _reason(slot: int, one: Operand) -> Verdict | None:
    """Why an operand that looks quantized is not."""
    if one.between is not None:
        return Verdict("float", f"{one.between.op} {one.between.name} stands between input {slot} and its DequantizeLinear", "between")
    if "run time" in one.why:
        return Verdict("float", f"input {slot} {one.why}", "run-time-scale")
    if "subgraph" in one.why:
        return Verdict("float", f"input {slot} {one.why}, where a DequantizeLinear does not reach it", "outside")
    return None


def _half(node: Node, a: Operand, b: Operand) -> Verdict:
    """One operand is quantized, the other is not."""
    slot, other = (1, a) if a.dq is None else (0, b)
    one = b if slot else a
    product = node.op in ("MatMul", "Gemm")
    if one.constant and one.codes == INT4:
        if product and one.blocks > 1:
            return Verdict("int4-weights")
        form = "in one block" if one.blocks == 1 else "without blocks" if not one.blocks else "of a convolution"
        return Verdict("float", f"INT4 weights {form} are unpacked before it", "int4-float")
    reason = _reason(1 - slot, other)
    if reason is not None:
        return reason
    if one.constant and one.codes == FP4:
        return Verdict("float", "FP4 weights are unpacked before it", "fp4-float")
    if one.constant and one.blocks and one.codes != INT4:
        return Verdict("float", f"{type_name(one.codes)} weights with block scales are unpacked before it", "blocked-weights")
    if one.constant:
        kept = ": they stay small in memory, the product is float" if product else ""
        return Verdict("float", f"only its weights are quantized, input {1 - slot} is float{kept}", "weight-only")
    return Verdict("float", f"input {slot} is quantized, input {1 - slot} is float", "activation-only")


def _conv_scales(node: Node, a: Operand, b: Operand) -> Verdict | None:
    """Scales that a convolution does not take."""
    assert a.dq is not None and b.dq is not None
    if a.one:
        return Verdict("float", f"the scale of {a.dq.name} has the shape [1]", "scale-rank")
    if a.axis is not None:
        return Verdict("float", f"the activations have one scale per channel or block ({a.dq.name})", "activation-channels")
    if b.blocks:
        return Verdict("float", f"the weights have block scales ({b.dq.name})", "blocked-weights")
    if b.axis is not None and b.axis != 0:
        return _wrong_axis(b, 0)
    return None


def _product_scales(graph: Graph, node: Node, a: Operand, b: Operand) -> Verdict | None:
    """Scales that a matrix product does not take: only rows of the left and columns of the right operand can have their own."""
    assert a.dq is not None and b.dq is not None
    left, right = (graph.shape(node.input(i)) for i in (0, 1))
    if a.blocks or b.blocks:
        one = b if b.blocks else a
        if FP4 in (a.codes, b.codes) and a.codes == b.codes:
            return Verdict("float", "FP4 codes are unpacked before it", "fp4-float")
        columns = None if right is None else _columns(node, len(right))
        if a.blocks or b.blocks > 1 or columns is None or right is None or b.axis != len(right) * 2 - 3 - columns:
            fact = f"has block scales ({one.dq.name if one.dq else ''}) on quantized operands: the builder rejects it or applies them as if each column had one"
            return Verdict("int8" if INT8 in (a.codes, b.codes) else "fp8", fact, "blocked-product", ERROR)
        return None
    if a.axis is not None:
        rows = None if left is None or len(left) < 2 else 1 if node.op == "Gemm" and node.attrs.get("transA") else len(left) - 2
        batched = left is not None and len(left) > 2 and (right is None or len(right) < 3)
        if rows is None or a.axis != rows or batched:
            return Verdict("float", f"the activations have one scale per channel ({a.dq.name})", "activation-channels")
    if b.axis is not None:
        columns = None if right is None else _columns(node, len(right))
        if columns is None or b.axis != columns:
            return _wrong_axis(b, columns)
    return None


def _columns(node: Node, rank: int) -> int | None:
    """Dimension of the right operand that holds the output channels."""
    return 0 if node.op == "Gemm" and node.attrs.get("transB") else rank - 1 if rank > 1 else None


def _wrong_axis(b: Operand, want: int | None) -> Verdict:
    assert b.dq is not None
    hint = " (its axis is not written: ONNX takes 1)" if "axis" not in b.dq.attrs else ""
    right = f", the output channels along axis {want}" if want is not None else ", which holds no output channels"
    return Verdict("float", f"the scales of {b.dq.name} lie along axis {b.axis}{right}{hint}", "weight-axis")


def _types(node: Node, a: Operand, b: Operand) -> Verdict:
    """Both operands are quantized with scales that fit: their types decide."""
    codes = [INT8 if one.codes in (UINT8, 0) else one.codes for one in (a, b)]  # uint8 is taken as int8; that is a finding of its own
    kinds = set(codes)
    if kinds == {INT8}:
        return Verdict("int8")
    if kinds == {FP8}:
        return Verdict("fp8")
    if kinds == {FP4}:
        return Verdict("float", "FP4 codes are unpacked before it", "fp4-float")
    if kinds == {INT4} and node.op != "Conv":
        return Verdict("int4-weights", "only TensorRT-RTX takes INT4 activations", "int4-activation")
    narrow = next((one for one, kind in zip((a, b), codes, strict=True) if kind == INT4), a)
    if kinds == {INT8, INT4} and node.op != "Conv" and (a.axis, b.axis) != (None, None):
        if narrow.constant:
            return Verdict("int8")
        return Verdict("int8", "only TensorRT-RTX takes INT4 activations", "int4-activation")
    both = f"{type_name(codes[0])} activations and {type_name(codes[1])} weights" if len(kinds) > 1 else "INT4 on both operands of a convolution"
    return Verdict("float", f"multiplies {both}, which has no kernel", "mixed-types", ERROR)
