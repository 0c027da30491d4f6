"""Forms and values of scales and zero points."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tests.trt_zoo.net import CONV, F16, F32, I8, I32, U8, WIDE, Act, Case, Make, Net, act, case, conv, f32, fake, ints, product, single, weight

ZERO = ("const", np.int8(0))


def pair(q: Any, dq: Any = None, zero: Any = ZERO, dq_zero: Any = "same") -> Act:
    """A Q/DQ pair whose scales and zero points are made by functions, or given as values; ``None`` leaves a zero point out."""

    def made(g: Net, what: Any) -> list[str]:
        if what is None:
            return []
        if callable(what):
            return [str(what(g))]
        return [g.const(what[1] if isinstance(what, tuple) else f32(what))]

    def build(g: Net, x: str) -> str:
        s = made(g, q)
        z = made(g, zero)
        y = g.op("QuantizeLinear", x, *s, *z)
        return str(g.op("DequantizeLinear", y, *(s if dq is None else made(g, dq)), *(z if isinstance(dq_zero, str) else made(g, dq_zero))))

    return build


def int8(values: Any) -> tuple[str, np.ndarray]:
    return ("const", np.asarray(values, np.int8))


def uint8(values: Any) -> tuple[str, np.ndarray]:
    return ("const", np.asarray(values, np.uint8))


def node(op: str, *consts: Any, **attrs: Any) -> Any:
    """A constant expression."""
    return lambda g: g.op(op, *(g.const(c) for c in consts), **attrs)


def peak(g: Net, x: str) -> str:
    """Dynamic quantization: the scale is computed from the value."""
    s = g.op("Mul", g.op("ReduceMax", g.op("Abs", x), g.const(ints(0, 1)), keepdims=0), g.const(f32(1 / 127)))
    z = g.const(np.int8(0))
    return str(g.op("DequantizeLinear", g.op("QuantizeLinear", x, s, z), s, z))


def scale_as_input() -> onnx.ModelProto:
    g = Net()
    x, s, z = g.input(4, 64), g.input(name="s"), g.const(np.int8(0))
    a = g.op("DequantizeLinear", g.op("QuantizeLinear", x, s, z), s, z)
    return g.model(g.op("MatMul", a, weight(*WIDE, axis=1)(g), name="mm"))


def constant_nodes() -> onnx.ModelProto:
    g = Net()
    x = g.input(1, 16, 8, 8)

    def node(value: Any) -> str:
        return str(g.op("Constant", value=numpy_helper.from_array(np.asarray(value))))

    s, z = node(np.float32(0.02)), node(np.int8(0))
    a = g.op("DequantizeLinear", g.op("QuantizeLinear", x, s, z), s, z)
    codes = node(np.ones(CONV, np.int8))
    w = g.op("DequantizeLinear", codes, node(np.full(16, 0.01, np.float32)), node(np.zeros(16, np.int8)), axis=0)
    return g.model(g.op("Conv", a, w, pads=[1] * 4, name="conv"))


def uint8_input() -> onnx.ModelProto:
    g = Net()
    return g.model(g.op("Conv", g.dq(g.input(1, 16, 8, 8, dtype=U8), dtype=U8), weight(*CONV)(g), name="conv"))


def value(scale: float, codes: str = "scale-value") -> Case:
    return case(single(act(scale)), codes)


def channel(scale: float) -> Case:
    """One weight channel of this scale."""
    values = np.full(16, 0.01, np.float32)
    values[2] = scale
    return case(conv(w=weight(*CONV, scale=values)), "scale-value")


def per_channel(n: int, axis: int, codes: str, make: Any = conv, **more: Any) -> Case:
    return case(make(act(np.linspace(0.01, 0.02, n), axis=axis), **more), codes)


def legacy(opset: int, codes: str, *shape: int, count: int) -> Case:
    """Scales of a vector and no axis."""
    make: Make = conv(w=weight(*shape, scale=np.linspace(0.01, 0.02, count), written=False), opset=opset, x=(1, shape[1], 8, 8))
    return case(make, codes)


def codes_leave() -> onnx.ModelProto:
    """Codes cast back to float by hand."""
    g = Net()
    return g.model(g.op("Cast", g.q(g.input(4)), to=F32))


NOTHING = numpy_helper.from_array(np.zeros(1, np.int8))
CHANNELS = np.linspace(0.01, 0.02, 16)

CASES: dict[str, Case] = {
    # the shape of the scale
    "scale [1]": case(conv(act([0.02])), "scale-rank"), "scale [1], zero point of rank 0": case(conv(pair([0.02])), "scale-rank"),
    "scale [1] for one channel": case(conv(act([0.02]), weight(16, 1, 3, 3), x=(1, 1, 8, 8)), "scale-rank"),
    "zero point [1]": case(conv(pair(0.02, zero=int8([0])))), "scale [1] of Q only": case(conv(pair([0.02], 0.02))),
    "scale [1] of DQ only": case(conv(pair(0.02, [0.02])), "scale-rank"), "scale [1] of a product": case(product(act([0.02]))),
    "scale [1] of weights": case(conv(w=weight(*CONV, scale=f32([0.01])))), "scale of rank 2": case(conv(act([[0.02]])), "block activation-channels"),
    "scale of rank 3": case(conv(act(np.full((16, 1, 1), 0.02))), "block activation-channels"),
    "no scale": case(conv(act(np.zeros(0))), "scale-count activation-channels"),
    "per channel activations": per_channel(16, 1, "activation-channels"), "per channel, all alike": case(conv(act(np.full(16, 0.02))), "activation-channels"),
    "per channel Q only": case(conv(pair(CHANNELS, 0.02, int8([0] * 16), int8(0)))), "per row activations": per_channel(4, 0, "", product),
    "per column activations": per_channel(64, 1, "activation-channels", product),
    "per row activations 3d": per_channel(4, 1, "activation-channels", product, x=(2, 4, 64)),
    "per row activations, batch of weights": per_channel(4, 1, "", product, x=(2, 4, 64), w=weight(2, 64, 32, axis=2)),
    # weight scales and their axis
    "weights per tensor": case(conv(w=weight(*CONV, axis=None))), "weights axis -4": case(conv(w=weight(*CONV, axis=-4))),
    "weights axis 1": case(conv(w=weight(8, 16, 3, 3, axis=1)), "weight-axis"),
    "weights all alike on axis 1": case(conv(w=weight(*CONV, axis=1, scale=[0.01] * 16)), "weight-axis"),
    "weights axis not written": legacy(19, "weight-axis", *CONV, count=16),
    "weights axis not written, 8 of 16": legacy(19, "scale-count weight-axis", 8, 16, 3, 3, count=8),
    "weights opset 10, no axis": legacy(10, "opset", 8, 16, 3, 3, count=8), "weights opset 12, no axis": legacy(12, "opset scale-count", 8, 16, 3, 3, count=16),
    "opset 10": case(conv(w=weight(*CONV, axis=None), opset=10)), "one scale too few": case(conv(w=weight(*CONV, scale=CHANNELS[:15])), "scale-count"),
    "axis 7": case(conv(w=weight(*CONV, axis=7, scale=CHANNELS)), "scale-count"), "DQ scale of another value": case(conv(pair(0.02, 0.03))),
    "weights Q per channel, DQ not": case(conv(w=lambda g: g.dq(g.q(g.floats(*CONV), CHANNELS, axis=0), 0.01))),
    # values
    "scale 0": value(0), "scale negative": value(-0.1), "scale NaN": value(np.nan), "scale infinite": value(np.inf), "scale denormal": value(1e-42),
    "weight scale 0": channel(0), "weight scale denormal": channel(1e-40), "weight scale NaN": channel(np.nan),
    "scale of a rank-0 value": case(single(act(0.1), x=())), "two pairs": case(single(act(0.02), act(0.03))),
    # where the scale comes from
    "Constant nodes": case(constant_nodes),
    "scale by Mul": case(conv(pair(node("Mul", f32(0.02), f32(1))))), "scale by Identity": case(conv(pair(node("Identity", f32(0.02))))),
    "scale by Cast": case(conv(pair(node("Cast", np.float16(0.02), to=F32)))),
    "scale by Squeeze": case(conv(pair(node("Squeeze", f32([0.02]))))),
    "scale by Div": case(conv(pair(node("Div", f32(2.54), f32(127))))),
    "scale by Gather": case(conv(pair(node("Gather", f32([0.01, 0.02]), np.array(1))))),
    "scale by Exp": case(conv(pair(node("Exp", f32(-4))))),
    "scale by ReduceMax": case(conv(pair(node("ReduceMax", f32([0.01, 0.02]), keepdims=0))), "scale-expression"),
    "scale by Pow": case(conv(pair(node("Pow", f32(2), f32(-6)))), "scale-expression"),
    "scale by Mul is 0": case(conv(pair(node("Mul", f32(0), f32(1)))), "scale-value"), "scale is an input": case(scale_as_input, "run-time-scale"),
    "scale from the value": case(product(peak), "run-time-scale"), "scale fp16 on fp32": case(conv(act(kind=F16)), "scale-type"),
    "scale fp64": case(conv(pair(("const", np.float64(0.02)))), "scale-type"), "int32 values": case(conv(act(), dtype=I32), "input-type"),
    "DQ of floats": case(single(lambda g, x: g.dq(g.dq(g.q(x)))), "input-type"),
    # zero points
    "no zero point": case(single(pair(0.02, zero=None)), "missing-zero-point"), "no zero point, conv": case(conv(pair(0.02, zero=None)), "missing-zero-point"),
    "no zero point of DQ": case(conv(pair(0.02, dq_zero=None))),
    "output_dtype": case(conv(lambda g, x: g.dq(g.q(x, zero=None, output_dtype=I8), zero=None), weight(*CONV, zero=None), opset=21)),
    "zero point by Cast": case(conv(pair(0.02, zero=node("Cast", f32(0), to=I8)))),
    "zero point by Identity": case(conv(pair(0.02, zero=node("Identity", np.int8(0))))),
    "zero point by ConstantOfShape": case(conv(pair(0.02, zero=node("ConstantOfShape", ints(), value=NOTHING))), "zero-point"),
    "too many zero points": case(conv(pair(0.02, zero=int8([0] * 16))), "zero-point"), "too few zero points": case(conv(w=lambda g: g.op(
        "DequantizeLinear", g.codes(CONV), g.const(f32(CHANNELS)), g.const(np.int8(0)), axis=0)), "zero-point"),
    "zero point of DQ is 5": case(conv(pair(0.02, dq_zero=int8(5))), "zero-point"),
    "zero point of DQ is uint8": case(conv(pair(0.02, dq_zero=uint8(0))), "zero-point"),
    "uint8 weights, 0": case(conv(w=weight(*CONV, axis=None, dtype=U8)), "uint8"),
    "uint8 weights, 128": case(conv(w=weight(*CONV, axis=None, dtype=U8, zero=128)), "uint8"),
    "uint8 weights, no zero point": case(conv(w=weight(*CONV, axis=None, dtype=U8, zero=None)), "uint8"), "uint8 input": case(uint8_input, "uint8"),
    "float weights, no zero point": case(conv(w=fake(*CONV, axis=None, zero=None)), "missing-zero-point"),
    "codes leave by Cast": case(codes_leave),
}  # fmt: skip
