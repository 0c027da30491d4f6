"""When a Relu or Clip vanishes into the grid of the QuantizeLinear behind it."""

from __future__ import annotations

import numpy as np
import onnx

from fxq.lint_graph import Net, Op, has
from fxq.spec import QuantSpec

CODES: dict[int, QuantSpec] = {
    onnx.TensorProto.UINT8: QuantSpec.parse("u8/pt"), onnx.TensorProto.INT8: QuantSpec.parse("s8/pt"),
    onnx.TensorProto.UINT16: QuantSpec.parse("u16/pt"), onnx.TensorProto.INT16: QuantSpec.parse("s16/pt"),
}  # fmt: skip
EPSILON, BIG = np.finfo(np.float32).eps, 1e30


def zero_point(net: Net, op: Op) -> float | None:
    """Zero point of a Q or DQ node: 0 when not given, None when it is no constant scalar."""
    return net.scalar(op.inputs[2]) if has(op, 2) else 0.0


def clip_range(net: Net, op: Op) -> tuple[float | None, float | None]:
    """Constant bounds of Relu or Clip; None where they are not known."""
    if op.op == "Relu":
        return 0.0, float("inf")
    bounds = []
    for slot, attr, default in ((1, "min", float("-inf")), (2, "max", float("inf"))):
        bounds.append(net.scalar(op.inputs[slot]) if has(op, slot) else float(op.attrs.get(attr, default)))
    return bounds[0], bounds[1]


def absorb_clips(net: Net) -> bool:
    """Relu and Clip vanish into the Q behind them when its grid starts (and ends) where they clip."""
    changed = False
    for op in net:
        q = net.only_reader(op) if op.op in ("Relu", "Clip") else None
        if q is None or not q.is_q or not has(q, 2) or clip_stays(net, op, q, exact=True):
            continue
        q.origins += op.origins
        net.remove(op)
        net.rewire(q, 0, op.inputs[0])
        changed = True
    return changed


def clip_stays(net: Net, clip: Op, q: Op, exact: bool = False) -> str:
    """Why ``clip`` does not vanish into ``q``; empty when it does. A fusion compares bounds rounded to codes, a lone Q compares them exactly."""
    kind, scale, zero = net.codes(q), net.scalar(q.inputs[1]), zero_point(net, q)
    if net.types.get(q.inputs[1], onnx.TensorProto.FLOAT) != onnx.TensorProto.FLOAT:
        return f"the {clip.op} behind it stays: the scale of its QuantizeLinear is not float32"
    if kind not in CODES or scale is None or zero is None:
        return f"the {clip.op} behind it stays: the grid of its QuantizeLinear is not a constant scalar of 8 or 16 bits"
    spec = CODES[kind]
    if clip.op == "Relu":
        ours, least = zero - q.shifted, spec.qmin - q.shifted
        return "" if ours == least else f"the Relu behind it stays: the zero point {ours:g} of its grid is not {least}"
    low, high = clip_range(net, clip)
    if low is None or high is None:
        return "the Clip behind it stays: its bounds are not constant"
    begin, end = np.float32(scale) * np.float32(spec.qmin - zero), np.float32(scale) * np.float32(spec.qmax - zero)
    if exact:
        fits = bool(np.float32(low) - begin <= EPSILON and end - np.float32(high) <= EPSILON)
    else:
        fits = round(max(low, -BIG) / scale) + zero <= spec.qmin and round(min(high, BIG) / scale) + zero >= spec.qmax
    return "" if fits else f"the Clip behind it stays: its grid [{begin:.4g}, {end:.4g}] goes beyond [{low:g}, {high:g}]"
