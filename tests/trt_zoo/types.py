"""Code types and the compute capabilities that have them: INT4, FP8, FP4, mixtures, and types that TensorRT has not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from tests.trt_zoo.net import (
    E5M2,
    F16,
    FP4,
    FP8,
    I4,
    RANGES,
    U4,
    WIDE,
    Act,
    Case,
    Net,
    Weight,
    act,
    case,
    conv,
    fake,
    floating,
    moved,
    plain,
    product,
    single,
    weight,
)

INT16, INT2, UINT2 = TensorProto.INT16, TensorProto.INT2, TensorProto.UINT2


def int4(*shape: int, axis: int | None = 0, block: int = 32, **attrs: Any) -> Weight:
    return weight(*shape, axis=axis, dtype=I4, block=block, **attrs)


def only(w: Weight, x: tuple[int, ...] = (4, 128), opset: int = 21, **attrs: Any) -> Any:
    """Weights only."""
    return product(plain, w, x=x, opset=opset, **attrs)


def both(a: Act, w: Weight, opset: int = 21, **attrs: Any) -> Any:
    return product(a, w, opset=opset, **attrs)


def per_input_channel(block: int, *shape: int) -> Weight:
    """Blocks along the input channels of a convolution."""
    return weight(*shape, axis=1, dtype=I4, block=block)


def nvfp4(g: Net) -> str:
    """FP4 codes with FP8 scales per block, which have a scale of their own."""
    s = g.dq(g.const(g.random.uniform(0.5, 2, (4, 32)), FP8), np.float32(0.02), zero=None)
    return str(g.op("DequantizeLinear", g.codes(WIDE, FP4), s, axis=0, block_size=16))


def constant(kind: int, used: bool) -> Any:
    """An initializer of a type, read by a Cast or by nobody."""

    def make() -> onnx.ModelProto:
        g = Net(21)
        x, c = g.input(2, 4), g.const(np.zeros((2, 4)), kind)
        return g.model(g.op("Add", x, g.op("Cast", c, to=TensorProto.FLOAT)) if used else g.op("Relu", x))

    return make


def mixed_net() -> onnx.ModelProto:
    """INT8, then FP8."""
    g = Net()
    y = g.op("MatMul", g.qdq(g.input(16, 64)), weight(64, 64, axis=1)(g), name="mm_int8")
    return g.model(g.op("MatMul", g.qdq(y, 0.05, FP8), weight(*WIDE, axis=None, dtype=FP8)(g), name="mm_fp8"))


BIG = (128, 64)
SMALL_BLOCKS = "int4-block-size"
A8, A4 = act(0.05, FP8), act(0.2, I4)
W8, W8C = weight(*WIDE, axis=None, dtype=FP8), weight(*WIDE, axis=1, dtype=FP8)
W4, W4C = weight(*WIDE, axis=None, dtype=I4), weight(*WIDE, axis=1, dtype=I4)
KERNEL8 = weight(16, 16, 3, 3, axis=None, dtype=FP8)

CASES: dict[str, Case] = {
    # INT4 weights
    "int4 blocks of 64": case(only(int4(*BIG, block=64))), "int4 one block": case(only(int4(*BIG, block=128)), "int4-float"),
    **{f"int4 blocks of {n}": case(only(int4(*BIG, block=n)), SMALL_BLOCKS) for n in (8, 16, 32)},
    "int4 fp16": case(only(int4(*BIG, block=64, kind=F16), dtype=F16)), "int4 blocks of columns": case(only(int4(*BIG, axis=1)), SMALL_BLOCKS),
    "int4 no zero point": case(only(int4(*BIG, block=64, zero=None))), "int4 per channel": case(only(int4(*BIG, axis=1, block=0)), "int4-float"),
    "int4 per tensor": case(only(int4(*BIG, axis=None, block=0)), "int4-float"), "int4 zero point 2": case(only(int4(*BIG, block=64, zero=2)), "zero-point"),
    "int4 gemm transB": case(only(int4(64, 128, axis=1, block=64), op="Gemm", transB=1)),
    "int4 turned": case(only(int4(64, 128, axis=1, block=64, then=moved("Transpose", perm=[1, 0])))),
    "int4 one row": case(only(int4(*BIG, block=64), x=(1, 128))), "int4 3d": case(only(int4(2, 128, 64, axis=1, block=64), x=(2, 4, 128))),
    "int4 blocks over batch": case(only(int4(4, 128, 64, block=2), x=(4, 4, 128)), "block"), "int4 blocks do not divide": case(
        only(int4(*BIG, scale=np.full((5, 64), 0.02), block=26)), "block"),
    "int4 conv blocks of inputs": case(conv(plain, per_input_channel(8, 16, 16, 3, 3), opset=21), "block int4-float"),
    "int4 conv blocks of rows": case(conv(plain, int4(16, 16, 4, 4, axis=2, block=2), opset=21), f"int4-float {SMALL_BLOCKS}"),
    "int4 conv": case(conv(plain, int4(16, 16, 3, 3, block=0), opset=21), "int4-float"),
    "int4 odd": case(only(int4(33, 7, axis=1, block=0), x=(4, 33)), "odd-4bit int4-float"),
    "int4 float weights with Q/DQ": case(only(lambda g: g.qdq(g.floats(*BIG), np.full((2, 64), 0.02), I4, axis=0, block_size=64))),
    "int4 opset 19": case(only(int4(*BIG, block=64), opset=19), "opset"),
    # INT4 and INT8 together
    "w4a8 per channel": case(both(act(), W4C)), "w4a8 one block": case(both(act(), int4(*WIDE, block=64))), "w4a8 blocks": case(
        both(act(), int4(*WIDE)), f"blocked-product {SMALL_BLOCKS}"),
    "w4a8 per tensor": case(both(act(), W4), "mixed-types"), "w4a8 scales over K": case(both(act(), int4(*WIDE, block=0)), "weight-axis"),
    "w4a8 conv": case(conv(act(), int4(16, 16, 3, 3, block=0), opset=21), "mixed-types"),
    "w8a8 blocks": case(both(act(), weight(*WIDE, block=32)), "blocked-product"),
    "w8a8 blocks of columns": case(both(act(), weight(*WIDE, axis=1, block=16)), "blocked-product"),
    "w8a8 one block of columns": case(both(act(), weight(*WIDE, axis=1, block=32)), "blocked-product"),
    "w8a8 one block": case(both(act(), weight(*WIDE, block=64))), "w8a8 gemm transB blocks": case(
        both(act(), weight(32, 64, axis=1, block=16), op="Gemm", transB=1), "blocked-product"),
    "w8 blocks": case(both(plain, weight(*WIDE, block=32)), "blocked-weights"), "w8a8 conv blocks": case(
        conv(act(), weight(16, 16, 4, 4, axis=2, block=2), opset=21), "blocked-weights"),
    "w4a4": case(both(A4, W4), "int4-activation"), "w4a4 per channel": case(both(A4, W4C), "int4-activation"), "w4a4 conv": case(
        conv(A4, weight(16, 16, 3, 3, axis=None, dtype=I4), opset=21), "mixed-types"),
    "w8a4": case(both(A4, weight(*WIDE, axis=1)), "int4-activation"), "w8a4 per tensor": case(both(A4, weight(*WIDE, axis=None)), "mixed-types"),
    "a4 only": case(both(A4, floating(*WIDE)), "activation-only"),
    # FP8
    "fp8": case(product(A8, W8), "", "sm89"), "fp8 per channel": case(product(A8, W8C), "", "sm89"), "fp8 fp16": case(
        product(act(0.05, FP8, kind=F16), weight(*WIDE, axis=None, dtype=FP8, kind=F16), dtype=F16), "", "sm89"),
    "fp8 scales over K": case(product(A8, weight(*WIDE, dtype=FP8)), "weight-axis", "sm89"),
    "fp8 weights only": case(product(plain, W8), "weight-only", "sm89"),
    "fp8 activations only": case(product(A8, floating(*WIDE)), "activation-only", "sm89"), "fp8 blocks": case(
        both(A8, weight(*WIDE, dtype=FP8, block=16)), "blocked-product", "sm89"),
    "fp8 weight blocks": case(both(plain, weight(*WIDE, dtype=FP8, block=16)), "blocked-weights", "sm89"), "fp8 conv": case(conv(A8, KERNEL8), "", "sm89"),
    "fp8 conv per channel": case(conv(A8, weight(16, 16, 3, 3, dtype=FP8)), "", "sm120"), "fp8 conv axis 1": case(
        conv(A8, weight(16, 16, 3, 3, axis=1, dtype=FP8)), "weight-axis", "sm89"),
    "fp8 conv scale [1]": case(conv(act([0.05], FP8), KERNEL8), "scale-rank", "sm89"), "fp8 transposed conv": case(
        conv(A8, weight(16, 8, 2, 2, axis=None, dtype=FP8), op="ConvTranspose", strides=[2, 2]), "conv-transpose", "sm89"),
    "fp8 output_dtype": case(both(lambda g, x: g.dq(g.q(x, 0.05, zero=None, output_dtype=FP8), 0.05, zero=None), W8), "", "sm89"),
    "fp8 opset 17": case(product(A8, W8, opset=17), "opset", "sm89"), "int8, then fp8": case(mixed_net, "", "sm89"),
    "int8 by fp8": case(product(act(), W8), "mixed-types", "sm89"), "fp8 by int8": case(product(A8, weight(*WIDE, axis=1)), "mixed-types", "sm89"),
    "fp8 by int8, scales over K": case(product(A8, weight(*WIDE)), "weight-axis", "sm89"), "fp8 by int4": case(both(A8, W4C), "mixed-types", "sm89"),
    "fp8 conv by int8": case(conv(A8), "mixed-types", "sm89"),
    # FP4
    "nvfp4": case(both(plain, nvfp4, opset=23), "fp4-float", "sm120"), "fp4 blocks": case(
        both(plain, weight(*WIDE, dtype=FP4, block=16), opset=23), "fp4-float", "sm120"),
    "fp4 per tensor": case(both(plain, weight(*WIDE, axis=None, dtype=FP4), opset=23), "fp4-float", "sm120"),
    "fp4 activations": case(both(act(0.5, FP4), weight(*WIDE, axis=None, dtype=FP4), opset=23), "fp4-activation fp4-float", "sm120"),
    "fp4 by fp8": case(both(A8, weight(*WIDE, axis=None, dtype=FP4), opset=23), "mixed-types", "sm120"),
    # types that TensorRT has not
    "int16 activations": case(single(act(0.001, INT16), opset=21), "code-type type"),
    "uint4": case(only(weight(*BIG, dtype=U4, block=32, zero=8)), "code-type type zero-point"),
    "int2": case(only(weight(*BIG, dtype=INT2, block=32), opset=25), "code-type type"), "uint2": case(
        only(weight(*BIG, dtype=UINT2, block=32, zero=2), opset=25), "code-type type zero-point"),
    "fp8 e5m2": case(product(act(0.05, E5M2), weight(*WIDE, axis=None, dtype=E5M2)), "code-type type"),
    "int16 constant that nobody reads": case(constant(INT16, False), "type"), "uint32 constant": case(constant(TensorProto.UINT32, True), "type"),
    "int8 constant read by Cast": case(constant(TensorProto.INT8, True), "constant"),
    "int8 constant that nobody reads": case(constant(TensorProto.INT8, False)),
    "int16 float weights with Q/DQ": case(conv(w=fake(16, 16, 3, 3, dtype=INT16), opset=21), "code-type type"),
}  # fmt: skip
assert set(RANGES) >= {INT16, INT2, UINT2}
