"""Whole layers and small nets as quantizers write them: convolutions, linear layers, a CNN, a residual block, attention, pools."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.trt_zoo.net import (
    BF16,
    CONV,
    F16,
    F32,
    I8,
    I32,
    I64,
    U8,
    WIDE,
    Act,
    Case,
    Make,
    Net,
    act,
    case,
    conv,
    f32,
    fake,
    floating,
    ints,
    moved,
    plain,
    product,
    scales,
    weight,
)  # fmt: skip


def cnn(opset: int = 19, channels: bool = True, a: Any = None, w: Any = None, bias: Any = None, batch: int | str = 1, out: Act | None = None) -> Make:
    """Conv, Relu, global pool, Gemm."""

    def make() -> onnx.ModelProto:
        g = Net(opset)
        quantize = a or act(0.03)
        kernel = w or weight(16, 3, 3, 3, axis=0 if channels else None)
        y = g.op("Conv", quantize(g, g.input(batch, 3, 32, 32)), kernel(g), (bias or floating(16))(g), pads=[1] * 4, name="conv1")
        y = g.op("GlobalAveragePool", quantize(g, g.op("Relu", y)))
        y = g.qdq(g.op("Flatten", y), 0.01)
        y = g.op("Gemm", y, weight(10, 16, axis=0 if channels else None)(g), g.floats(10), transB=1, name="fc")
        return g.model(out(g, y) if out else y)

    return make


def residual(both: bool) -> Make:
    def make() -> onnx.ModelProto:
        g = Net()

        def layer(x: str, name: str) -> str:
            return str(g.op("Conv", x, weight(*CONV)(g), g.floats(16), pads=[1] * 4, name=name))

        a = g.qdq(g.input(1, 16, 16, 16))
        y = layer(g.qdq(g.op("Relu", layer(a, "conv1")), 0.03), "conv2")
        z = g.op("Relu", g.op("Add", g.qdq(y, 0.05) if both else y, a))
        return g.model(layer(g.qdq(z, 0.05), "conv3"))

    return make


def packed_attention(axis: int | None, parts: int = 3) -> Make:
    """Scores of queries and keys (and values, which nothing reads on) from one product."""

    def make() -> onnx.ModelProto:
        g = Net()
        y = g.op("Add", g.op("MatMul", g.qdq(g.input(2, 16, 64)), weight(64, 64 * parts, axis=axis)(g), name="in"), g.floats(64 * parts))
        heads = []
        for i in range(parts):
            part = g.op("Slice", y, g.const(ints(64 * i)), g.const(ints(64 * i + 64)), g.const(ints(2)))
            part = g.op("Reshape", part, g.const(ints(2, 16, 4, 16)))
            heads.append(g.qdq(g.op("Transpose", part, perm=[0, 2, 3, 1] if i == 1 else [0, 2, 1, 3]), 0.03))
        s = g.op("Softmax", g.op("MatMul", heads[0], heads[1], name="qk"), axis=-1)
        return g.model(g.op("MatMul", g.qdq(s, 1 / 127), heads[2], name="pv") if parts > 2 else s)

    return make


def attention() -> onnx.ModelProto:
    g = Net()
    x = g.input(2, 16, 64)
    a, heads = g.qdq(x), []
    for name in "qkv":
        y = g.op("Add", g.op("MatMul", a, weight(64, 64, axis=1)(g), name=f"{name}_mm"), g.floats(64))
        y = g.op("Reshape", y, g.const(ints(2, 16, 4, 16)))
        heads.append(g.op("Transpose", y, perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]))
    s = g.op("Mul", g.op("MatMul", g.qdq(heads[0], 0.03), g.qdq(heads[1], 0.03), name="qk"), g.const(f32(0.25)))
    y = g.op("MatMul", g.qdq(g.op("Softmax", s, axis=-1), 1 / 127), g.qdq(heads[2], 0.03), name="pv")
    y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.const(ints(2, 16, 64)))
    y = g.op("Add", g.op("MatMul", g.qdq(y), weight(64, 64, axis=1)(g), name="proj"), x)
    return g.model(g.op("LayerNormalization", y, g.const(np.ones(64, np.float32)), g.const(np.zeros(64, np.float32))))


def concat_pool() -> onnx.ModelProto:
    g = Net()
    a = g.qdq(g.input(1, 16, 16, 16))
    parts = [g.qdq(g.op("Relu", g.op("Conv", a, weight(*CONV)(g), pads=[1] * 4, name=f"c{i}")), 0.03 + 0.02 * i) for i in range(2)]
    y = g.op("MaxPool", g.op("Concat", *parts, axis=1), kernel_shape=[2, 2], strides=[2, 2])
    y = g.qdq(g.op("Resize", y, "", g.const(f32([1, 1, 2, 2])), mode="nearest"), 0.04)
    return g.model(g.op("Conv", y, weight(8, 32, 1, 1)(g), name="c3"))


def normed(early: bool) -> Make:
    def norm(g: Net, y: str) -> str:
        y = g.qdq(y, 0.05) if early else y
        y = g.op("BatchNormalization", y, *(g.floats(16, low=0.5, high=1) for _ in range(4)))
        return g.qdq(g.op("Relu", y), 0.05)

    return conv(after=norm)


def shared(dqs: int) -> Make:
    """One QuantizeLinear, one or two DequantizeLinear, two convolutions."""

    def make() -> onnx.ModelProto:
        g = Net()
        q = g.q(g.input(1, 16, 8, 8))
        a = [g.dq(q) for _ in range(dqs)]
        parts = [g.op("Conv", a[i % dqs], weight(*CONV)(g), pads=[1] * 4, name=f"conv{i}") for i in range(2)]
        return g.model(g.op("Add", *parts))

    return make


def shared_weight() -> onnx.ModelProto:
    g = Net()
    x = g.input(1, 16, 8, 8)
    w = weight(*CONV)(g)
    y = g.op("Conv", g.qdq(x), w, pads=[1] * 4, name="conv0")
    return g.model(g.op("Conv", g.qdq(y), w, pads=[1] * 4, name="conv1"))


def pooled(op: str, **attrs: Any) -> Make:
    return conv(act(then=lambda g, y: g.qdq(g.op(op, y, name="pool", **attrs))), weight(16, 16, 1, 1), pads=[0] * 4)


def recurrent(op: str, quantized: str) -> Make:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op] * 16

    def make() -> onnx.ModelProto:
        g = Net()
        x = g.input(5, 2, 16)
        w, r = (weight(1, gates, 16, axis=None)(g) if name in quantized else g.floats(1, gates, 16) for name in "wr")
        return g.model(g.op(op, g.qdq(x) if "x" in quantized else x, w, r, n=2, hidden_size=16, name="rnn")[0])

    return make


def embedding(axis: int | None) -> Make:
    def make() -> onnx.ModelProto:
        g = Net()
        return g.model(g.op("Gather", weight(100, 64, axis=axis)(g), g.input(4, dtype=I64)))

    return make


def tied() -> onnx.ModelProto:
    """One table for the embedding and the last layer."""
    g = Net()
    w = weight(100, 64)(g)
    e = g.qdq(g.op("Gather", w, g.input(4, dtype=I64)))
    return g.model(g.op("MatMul", e, g.op("Transpose", w, perm=[1, 0]), name="mm"))


def two_inputs(a: Act, b: Act, transpose: bool = False, shape: tuple[int, ...] = (2, 4, 16, 16)) -> Make:
    """A product of two activations."""

    def make() -> onnx.ModelProto:
        g = Net()
        left, right = a(g, g.input(*shape)), b(g, g.input(*shape, name="k"))
        if transpose:
            right = g.op("Transpose", right, perm=[0, 1, 3, 2])
        return g.model(g.op("MatMul", left, right, name="mm"))

    return make


def constant_left(axis: int | None) -> Make:
    def make() -> onnx.ModelProto:
        g = Net()
        return g.model(g.op("MatMul", weight(32, 64, axis=axis)(g), g.qdq(g.input(64, 8)), name="mm"))

    return make


def codes_in_and_out() -> onnx.ModelProto:
    g = Net()
    y = g.op("Conv", g.dq(g.input(1, 16, 8, 8, dtype=I8)), weight(*CONV)(g), pads=[1] * 4, name="conv")
    return g.model(g.q(y, 0.05), dtype=I8)


def run_time_weights(scale: Any) -> Make:
    def make() -> onnx.ModelProto:
        g = Net()
        a = g.qdq(g.input(1, 16, 8, 8))
        return g.model(g.op("Conv", a, g.qdq(g.input(*CONV, name="w"), scale, axis=0), pads=[1] * 4, name="conv"))

    return make


def int32_bias(g: Net) -> str:
    return g.dq(g.const(np.arange(16, dtype=np.int32)), f32(np.full(16, 0.001)), I32, axis=0)


def cast_bias(g: Net) -> str:
    return str(g.op("Mul", g.op("Cast", g.const(np.arange(16, dtype=np.int32)), to=F32), g.const(f32(np.full(16, 0.001)))))


def silu(g: Net, y: str) -> str:
    return g.qdq(g.op("Mul", y, g.op("Sigmoid", y)), 0.05)


def then(op: str, *consts: Any, **attrs: Any) -> Act:
    return lambda g, y: g.qdq(moved(op, *consts, **attrs)(g, y), 0.05)


def cast(to: int) -> Act:
    return moved("Cast", to=to)


def sandwich(g: Net, y: str) -> str:
    return g.qdq(g.op("Relu", g.qdq(y, 0.05)), 0.05)


ROWS = weight(32, 64)
TURN = moved("Transpose", perm=[1, 0])

CASES: dict[str, Case] = {
    **{f"cnn opset {n}": case(cnn(n)) for n in (13, 17, 19, 21, 23, 24, 25)},
    "cnn per tensor": case(cnn(channels=False)), "cnn float weights with Q/DQ": case(cnn(w=fake(16, 3, 3, 3))), "cnn dynamic batch": case(cnn(batch="N")),
    "cnn output Q/DQ": case(cnn(out=act())), "cnn int32 bias": case(cnn(bias=int32_bias), "int32-bias"),
    "cnn zero point 5": case(cnn(a=act(0.03, zero=5)), "zero-point"), "cnn uint8, 128": case(cnn(a=act(0.03, U8, 128)), "uint8"),
    "cnn uint8, 0": case(cnn(a=act(0.03, U8)), "uint8"), "cnn weight zero point 3": case(cnn(w=weight(16, 3, 3, 3, zero=3)), "zero-point"),
    "residual, both quantized": case(residual(True), "round-trip"), "residual, skip quantized": case(residual(False)),
    "packed attention": case(packed_attention(1), "packed"), "packed attention, one scale": case(packed_attention(None)),
    "packed queries and keys": case(packed_attention(1, 2)),
    "attention": case(attention), "concat, pool, resize": case(concat_pool),
    "batch norm behind": case(normed(False)), "Q before batch norm": case(normed(True), "round-trip"),
    "Q before relu": case(conv(after=sandwich), "round-trip"),
    "one DQ, two readers": case(shared(1)), "one Q, two DQ": case(shared(2)), "one weight DQ, two readers": case(shared_weight),
    "max pool": case(pooled("MaxPool", kernel_shape=[2, 2])), "average pool": case(pooled("AveragePool", kernel_shape=[2, 2]), "average-pool"),
    "global average pool": case(pooled("GlobalAveragePool")),
    "lstm": case(recurrent("LSTM", "xwr"), "recurrent"), "gru": case(recurrent("GRU", "xwr"), "recurrent"), "lstm input only": case(recurrent("LSTM", "xw")),
    "embedding": case(embedding(None)), "embedding per row": case(embedding(0)), "tied embedding": case(tied),
    "codes as input and output": case(codes_in_and_out),
    # convolutions
    "conv 1d": case(conv(w=weight(16, 16, 3), x=(1, 16, 32))), "conv 3d": case(conv(w=weight(16, 16, 3, 3, 3), x=(1, 16, 8, 8, 8))),
    "conv groups": case(conv(w=weight(64, 16, 3, 3), x=(1, 64, 8, 8), group=4)), "conv dilated": case(conv(dilations=[2, 2], x=(1, 16, 16, 16))),
    "conv 3 channels": case(conv(w=weight(16, 3, 7, 7), x=(1, 3, 32, 32), strides=[2, 2])),
    "conv odd channels": case(conv(w=weight(7, 5, 3, 3), x=(1, 5, 8, 8))),
    "conv depthwise": case(conv(w=weight(16, 1, 3, 3), group=16, after=then("Clip", f32(0), f32(6)))),
    "conv auto_pad": case(conv(auto_pad="SAME_UPPER", strides=[2, 2])), "conv dynamic sizes": case(conv(x=("N", 16, "H", "W"))),
    "conv silu": case(conv(after=silu)), "conv hard swish": case(conv(after=then("HardSwish"))), "conv gelu": case(conv(after=then("Gelu"), opset=20)),
    "conv prelu": case(conv(after=then("PRelu", np.full((16, 1, 1), 0.25, np.float32)))),
    "conv int8 bias": case(conv(bias=lambda g: g.qdq(g.floats(16), 0.01))), "conv cast bias": case(conv(bias=cast_bias)),
    "conv fp16": case(conv(act(kind=F16), weight(*CONV, kind=F16), dtype=F16)),
    "conv fp16, fp32 scales": case(conv(lambda g, x: g.dq(g.q(x), output_dtype=F16), weight(*CONV, output_dtype=F16), opset=23, dtype=F16)),
    "conv fp16 by Cast": case(conv(lambda g, x: cast(F16)(g, g.qdq(cast(F32)(g, x))), weight(*CONV, then=cast(F16)), dtype=F16)),
    "conv run-time weights": case(run_time_weights(0.02)), "conv run-time weights per channel": case(run_time_weights(scales(CONV, 0))),
    "conv ±1": case(conv(lambda g, x: g.qdq(g.op("Sign", x), 1.0))),
    "conv weights only": case(conv(plain), "weight-only"), "conv activations only": case(conv(w=floating(*CONV)), "activation-only"),
    "conv float": case(conv(plain, floating(*CONV))),
    "transposed conv": case(conv(op="ConvTranspose", w=weight(16, 8, 2, 2, axis=1), strides=[2, 2]), "conv-transpose"),
    "transposed conv per tensor": case(conv(op="ConvTranspose", w=weight(16, 8, 2, 2, axis=None), strides=[2, 2]), "conv-transpose"),
    "transposed conv groups": case(conv(op="ConvTranspose", w=weight(16, 8, 2, 2, axis=1), group=2, strides=[2, 2]), "conv-transpose"),
    # products
    "matmul": case(product()), "matmul dynamic": case(product(x=("N", 64))), "matmul weights only": case(product(plain), "weight-only"),
    "matmul activations only": case(product(w=floating(*WIDE)), "activation-only"), "matmul scales over K": case(product(w=weight(*WIDE)), "weight-axis"),
    "matmul axis -1": case(product(w=weight(*WIDE, axis=-1))),
    "matmul bias": case(product(after=then("Add", f32(np.full(32, 0.1))))), "matmul 3d": case(product(x=(2, 8, 64))),
    "matmul 3d weights": case(product(w=weight(2, 64, 32, axis=2), x=(2, 4, 64))),
    "matmul scales over batch": case(product(w=weight(2, 64, 32), x=(2, 4, 64)), "weight-axis"),
    "matmul float weights with Q/DQ": case(product(w=fake(*WIDE, axis=1))), "matmul turned": case(product(w=weight(32, 64, then=TURN))),
    "matmul turned float weights": case(product(w=fake(32, 64, then=TURN))),
    "matmul bf16": case(product(act(kind=BF16), weight(*WIDE, axis=1, kind=BF16), opset=21, dtype=BF16)),
    "matmul fp16": case(product(act(kind=F16), weight(*WIDE, axis=1, kind=F16), dtype=F16)),
    "gemm transB": case(product(op="Gemm", w=ROWS, transB=1, bias=floating(32))), "gemm": case(product(op="Gemm")),
    "gemm transB scales over K": case(product(op="Gemm", w=weight(32, 64, axis=1), transB=1), "weight-axis"), "gemm alpha": case(product(op="Gemm", alpha=0.5)),
    "gemm transA": case(product(op="Gemm", x=(64, 4), transA=1)), "gemm one column": case(product(op="Gemm", w=weight(64, 1, axis=1))),
    "two activations": case(two_inputs(act(), act(0.03), transpose=True)), "two activations, one quantized": case(two_inputs(act(), plain), "activation-only"),
    "two activations, scales [1]": case(two_inputs(act([0.02]), act([0.03]))),
    "constant on the left": case(constant_left(0)), "constant on the left, scales over K": case(constant_left(1), "activation-channels"),
}  # fmt: skip
