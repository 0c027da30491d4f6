"""Which operations ONNX Runtime's CPU provider fuses with their Q/DQ nodes into an integer kernel, as data, and the check of one node against it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from fxq.lint_clips import clip_stays
from fxq.lint_graph import BODIES, BYTES, FLOATS, INSIDE, Net, Op, has
from fxq.lint_steps import same_grid

NIBBLES = tuple(getattr(onnx.TensorProto, n) for n in ("INT4", "UINT4", "INT2", "UINT2") if hasattr(onnx.TensorProto, n))
WIDE = (onnx.TensorProto.INT16, onnx.TensorProto.UINT16)
FLOOR, TOLERANCE = 1e-6, 0.01  # of a bias scale, absolute and relative


@dataclass(frozen=True)
class Rule:
    """What a fusion asks for.

    Attributes:
        kernel: operator that replaces the node; empty when the node itself runs on the codes.
        inputs: which inputs must come from a DQ: ``all``, ``first`` or ``tail`` (all but the first).
        q: its output ``must`` or ``may`` lead to a Q, or does not have one (``none``).
        clip: a Relu or Clip between the node and its Q is allowed when it vanishes into the grid.
        same: all grids are equal (the node moves codes).
        types: ``equal`` (inputs and outputs have one element type), ``weighted`` (the weight's may differ, the input is unsigned; int32 bias),
            ``first`` (output as input; signed needs signed weight).
        wide: 16-bit codes too.
        zero: slots whose DQ needs an explicit zero point.
        since: versions of the operator that the runtime's rule knows; empty for any.
    """

    kernel: str
    inputs: str = "all"
    q: str = "must"
    clip: bool = True
    same: bool = False
    types: str = "equal"
    wide: bool = False
    zero: tuple[int, ...] = ()
    since: tuple[int, ...] = ()


_MOVER = Rule("", inputs="first", clip=False, same=True, wide=True)
RULES: dict[str, Rule] = {
    "Conv": Rule("QLinearConv", types="weighted"),
    "Gemm": Rule("QGemm", q="may", types="first", zero=(1,)),
    "MatMul": Rule("QLinearMatMul", q="may", types="weighted"),  # MatMulIntegerToFloat without Q
    "Add": Rule("QLinearAdd"),
    "Mul": Rule("QLinearMul"),
    "Sigmoid": Rule("QLinearSigmoid"),
    "LeakyRelu": Rule("QLinearLeakyRelu"),
    "Softmax": Rule("QLinearSoftmax"),
    "GlobalAveragePool": Rule("QLinearGlobalAveragePool"),
    "AveragePool": Rule("QLinearAveragePool"),
    "Concat": Rule("QLinearConcat"),
    "Where": Rule("QLinearWhere", inputs="tail"),
    "MaxPool": Rule("", inputs="first", clip=False, same=True, since=(12, 22)),
    "ReduceMax": Rule("", inputs="first", clip=False, same=True),
    "ReduceMin": Rule("", inputs="first", clip=False, same=True),
    "Resize": Rule("", inputs="first", clip=False, same=True),
    "Split": Rule("", inputs="first", clip=False, same=True, wide=True),
    "Expand": _MOVER,
    "Flatten": _MOVER,
    "Gather": _MOVER,
    "GatherElements": _MOVER,
    "Reshape": _MOVER,
    "Slice": _MOVER,
    "Squeeze": _MOVER,
    "Tile": _MOVER,
    "Transpose": _MOVER,
    "Unsqueeze": _MOVER,
    "ArgMax": Rule("", inputs="first", q="none", clip=False),
}
HALF = frozenset({"Expand", "Flatten", "Gather", "GatherElements", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
"""Operations that the CPU provider has in float16; around others it puts Casts, which stand between them and their Q/DQ nodes."""
FLOAT_OUT = {"MatMul": "MatMulIntegerToFloat", "Gemm": "QGemm"}  # kernel when no Q follows
WEIGHT_ONLY = ("MatMul", "Gemm")
ON_CODES = frozenset(op for op, r in RULES.items() if not r.kernel and r.q != "none") | {"Identity"}
KERNELS = frozenset({r.kernel for r in RULES.values() if r.kernel} | set(FLOAT_OUT.values())) | {
    "DynamicQuantizeMatMul", "MatMulNBits", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear",
}  # fmt: skip


@dataclass(frozen=True)
class Match:
    """Nodes that a fusion takes: DQ by input slot, Q behind the outputs, a clip that vanishes."""

    dqs: dict[int, Op]
    qs: tuple[Op, ...]
    clip: Op | None
    kernel: str


class Blocked(Exception):
    """The rule that keeps a node in float."""


def match(net: Net, op: Op) -> Match:
    """The fusion of one node.

    Raises:
        Blocked: with the reason when it stays float.
    """
    rule = RULES.get(op.op) if op.domain in ("", "ai.onnx") else None
    dqs = {slot: maker for slot, name in enumerate(op.inputs) if (maker := net.maker.get(name)) is not None and maker.is_dq}
    if op.op in WEIGHT_ONLY and 0 not in dqs and 1 in dqs:
        return _weight_only(net, op, dqs[1])
    if rule is None:
        raise Blocked(INSIDE if op.op in BODIES else "the operation has no integer kernel")
    if rule.since and op.since not in rule.since:
        raise Blocked(f"version {op.since} of the operation has no integer kernel")
    if op.op not in HALF and (wide := _scale_type(net, op, dqs)) != onnx.TensorProto.FLOAT:
        if op.op == "Concat":
            raise Blocked(f"the scales around it are {_name(wide)}: ONNX Runtime may refuse the file, since it makes a QLinearConcat without such a kernel")
        raise Blocked(f"the scales around it are {_name(wide)}: the runtime computes it in float32, with Casts between it and its Q/DQ nodes")
    clip, qs = _outputs(net, op, rule)
    _check_inputs(net, op, rule, dqs)
    _check_types(net, op, rule, dqs, qs)
    if rule.same and qs:
        for q in qs:
            if not same_grid(net, q, next(iter(dqs.values()))):
                raise Blocked("the grids in front of it and behind it differ, or are not given as constant scale and zero point")
    if op.op == "Conv" and 2 in dqs:
        _check_bias_scale(net, dqs)
    if op.op == "Gemm" and 2 in dqs and (op.attrs.get("alpha", 1.0) != 1.0 or op.attrs.get("beta", 1.0) != 1.0):
        raise Blocked("alpha and beta must be 1 when there is a bias")
    for slot in rule.zero:
        if not has(dqs[slot], 2):
            raise Blocked(f"the DequantizeLinear of input {slot} has no explicit zero point")
    return Match(dqs, qs, clip, (rule.kernel if qs or rule.q == "none" else FLOAT_OUT.get(op.op, rule.kernel)) or op.op)


def _scale_type(net: Net, op: Op, dqs: dict[int, Op]) -> int:
    """Element type of the scales in front of it; float32 where there are none, or they are not known."""
    found = {net.types.get(dq.inputs[1], 0) for dq in dqs.values()} - {0, onnx.TensorProto.FLOAT}
    return min(found, default=int(onnx.TensorProto.FLOAT))


def _outputs(net: Net, op: Op, rule: Rule) -> tuple[Op | None, tuple[Op, ...]]:
    """The clip (if any) and the Q nodes behind ``op``."""
    if rule.q == "none":
        return None, ()
    edges = net.edges(op)
    last, clip = op, None
    reader = edges[0][0] if len(edges) == 1 else None
    if reader is not None and reader.op in ("Relu", "Clip") and len(net.edges(reader)) == 1 and not net.is_output(reader):
        last, clip = reader, reader
    qs = tuple(u for u, _ in net.edges(last) if u.is_q)
    if clip is not None:
        if len(qs) != 1:
            raise Blocked(f"the {clip.op} behind it is not followed by a QuantizeLinear")
        if why := clip_stays(net, clip, qs[0]):
            raise Blocked(why)
        if not rule.clip:
            raise Blocked(f"the {clip.op} behind it stands between it and its QuantizeLinear")
    direct = [u for u, _ in net.edges(last) if not u.is_q]
    if not qs and rule.q == "may":
        return clip, ()
    if net.is_output(op) or net.is_output(last):
        raise Blocked("its output is a graph output" if not qs else "its output is read by QuantizeLinear and is a graph output")
    if not qs:
        raise Blocked("its output has no QuantizeLinear" + (f", {direct[0].op} reads it" if direct else ""))
    if direct:
        raise Blocked(f"its output is read by QuantizeLinear and by {direct[0].op}")
    if len(qs) != sum(1 for name in op.outputs if name):
        raise Blocked(f"its outputs are read by {len(qs)} QuantizeLinear instead of one each")
    return clip, qs


def _check_inputs(net: Net, op: Op, rule: Rule, dqs: dict[int, Op]) -> None:
    given = [slot for slot, name in enumerate(op.inputs) if name]
    wanted = {"all": given, "first": given[:1], "tail": given[1:]}[rule.inputs]
    for slot in wanted:
        if slot not in dqs:
            raise Blocked(f"input {slot} does not come from a DequantizeLinear")
    for slot in dqs:
        if slot not in wanted:
            raise Blocked(f"input {slot} comes from a DequantizeLinear; the kernel takes it plain")
    for slot, dq in dqs.items():
        if len(net.edges(dq)) != 1 or net.is_output(dq):
            raise Blocked(f"the DequantizeLinear of input {slot} has other readers")


def _check_types(net: Net, op: Op, rule: Rule, dqs: dict[int, Op], qs: tuple[Op, ...]) -> None:
    kinds = {slot: net.codes(dq) for slot, dq in dqs.items()}
    first = kinds[min(kinds)]
    if first == onnx.TensorProto.INT8 and rule.types == "weighted":
        raise Blocked("its input is int8 and stays so: the runtime makes codes unsigned only if one node reads them")
    for q in qs:
        if net.codes(q) != first:
            raise Blocked(f"codes are {_name(first)} in front of it and {_name(net.codes(q))} behind it")
    narrow = {slot: kind for slot, kind in kinds.items() if rule.types == "equal" or slot < 2}
    for slot, kind in narrow.items():
        if kind in NIBBLES:
            raise Blocked(f"input {slot} is {_name(kind)}; only codes of 8 bits fuse (cast to int8 in front of the DequantizeLinear)")
        if kind not in BYTES and not (rule.wide and kind in WIDE):
            raise Blocked(f"input {slot} is {_name(kind)}; the kernel takes 8 bits")
    if rule.types == "equal":
        if len(set(kinds.values())) > 1:
            raise Blocked("its inputs have codes of " + " and ".join(sorted({_name(k) for k in kinds.values()})))
        return
    if first == onnx.TensorProto.INT8 and kinds[1] != first:
        raise Blocked("its input is int8 and its weight uint8")
    if op.op != "MatMul" and 2 in kinds and kinds[2] != onnx.TensorProto.INT32:
        raise Blocked(f"its bias is {_name(kinds[2])} instead of int32")


def _check_bias_scale(net: Net, dqs: dict[int, Op]) -> None:
    """The kernel adds the bias's codes as they are: they must count in steps of input scale times weight scale."""
    if dqs[2].inputs[1] in net.made_scales:
        return
    scales = [net.array(dqs[slot].inputs[1]) for slot in range(3)]
    if any(s is None for s in scales):
        raise Blocked("the scales of its input, weight and bias must be constants")
    x, w, b = (np.asarray(s, dtype=np.float64).reshape(-1) for s in scales)
    if b.size not in (1, w.size) and w.size != 1:
        raise Blocked(f"its bias has {b.size} scales and its weight {w.size}")
    if has(dqs[2], 2) and (zero := net.array(dqs[2].inputs[2])) is not None and np.any(zero):
        raise Blocked("its bias has a zero point")
    if np.any(np.abs(b - x * w) > FLOOR + TOLERANCE * np.abs(x * w)):
        raise Blocked("the scale of its bias is not input scale times weight scale")


def _weight_only(net: Net, op: Op, dq: Op) -> Match:
    """Float activations, weight of 2, 4 or 8 bits: MatMulNBits."""
    if any(u.is_q for u, _ in net.edges(op)):
        raise Blocked("only its weight comes from a DequantizeLinear, and its output has a QuantizeLinear")
    if len(net.edges(dq)) != 1 or net.is_output(dq):
        raise Blocked("the DequantizeLinear of its weight has other readers")
    shape, scale = net.shapes.get(dq.inputs[0]), net.shapes.get(dq.inputs[1])
    if dq.inputs[0] not in net.const_names or shape is None or len(shape) != 2:
        raise Blocked("only input 1 comes from a DequantizeLinear, and it is no constant matrix")
    if op.op == "Gemm" and (op.attrs.get("transB") or op.attrs.get("transA") or op.attrs.get("alpha", 1.0) != 1.0):
        raise Blocked("weight-only Gemm fuses without transA, transB and alpha only")
    if net.codes(dq) not in (*BYTES, *NIBBLES) or net.types.get(dq.inputs[1], onnx.TensorProto.FLOAT) not in FLOATS:
        raise Blocked(f"its weight is {_name(net.codes(dq))}")
    block, axis = int(dq.attrs.get("block_size", 0)), int(dq.attrs.get("axis", 1))
    if block:
        if axis != 0 or block < 16 or block & (block - 1):
            raise Blocked(f"its weight has blocks of {block} along axis {axis}; the kernel takes powers of two from 16 along axis 0")
    elif scale not in ((), (shape[1],)) or (scale and axis != 1):
        raise Blocked("the scale of its weight is neither one number nor one per column")
    return Match({1: dq}, (), None, "MatMulNBits")


def fuse(net: Net, op: Op, m: Match) -> None:
    """Replace the matched nodes by the kernel."""
    for slot, dq in m.dqs.items():
        net.remove(dq)
        net.rewire(op, slot, dq.inputs[0])
    if m.clip is not None:
        op.origins += m.clip.origins
        net.remove(m.clip)
    if m.qs:
        outs = []
        for name in (m.qs[0].inputs[0],) if m.clip else op.outputs:
            q = next(q for q in m.qs if q.inputs[0] == name)
            op.origins += q.origins
            outs.append(q.outputs[0])
        for q in m.qs:
            net.remove(q)
        net.set_outputs(op, outs)
    op.kernel = m.kernel


def fuse_dynamic(net: Net) -> None:
    """Products of codes whose scales are multiplied afterwards become one kernel, with the dynamic quantization in front when nothing else reads it."""
    for op in net:
        if op.op == "MatMulInteger":
            _scaled_product(net, op)
        first = net.maker.get(op.inputs[0]) if op.kernel == "MatMulIntegerToFloat" else None
        if first is None or first.op != "DynamicQuantizeLinear" or op.inputs[1] not in net.const_names:
            continue
        if all(user is op for user, _ in net.edges(first)) and not net.is_output(first):
            op.kernel = "DynamicQuantizeMatMul"
            op.origins += first.origins
            net.remove(first)


def _scaled_product(net: Net, op: Op) -> None:
    cast = net.only_reader(op)
    mul = net.only_reader(cast) if cast is not None and cast.op == "Cast" else None
    if cast is None or mul is None or mul.op != "Mul":
        return
    scales = net.maker.get(next((name for name in mul.inputs if name != cast.outputs[0]), ""))
    if scales is None or scales.op != "Mul" or net.only_reader(scales) is not mul:
        return
    for gone in (cast, mul, scales):
        op.origins += gone.origins
        net.remove(gone)
    net.set_outputs(op, list(mul.outputs))
    op.kernel = "MatMulIntegerToFloat"


def _name(kind: int) -> str:
    return str(onnx.TensorProto.DataType.Name(kind)).lower() if kind else "of unknown type"
