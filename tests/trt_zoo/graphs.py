"""Operators, domains, local functions, subgraphs, names, and what reads quantized constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.trt_zoo.net import BOOL, CONV, F16, F32, I8, Act, Case, Make, Net, act, case, conv, f32, moved, plain, single, weight


def qlinear(op: str) -> Make:
    def make() -> onnx.ModelProto:
        g = Net()
        x, w = g.q(g.input(1, 3, 16, 16)), g.codes((8, 3, 3, 3))
        if op == "ConvInteger":
            return g.model(g.op("Cast", g.op(op, x, w), to=F32))
        s, z = g.const(f32(0.02)), g.const(np.int8(0))
        return g.model(g.dq(g.op(op, x, s, z, w, g.const(f32(np.full(8, 0.01))), g.const(np.zeros(8, np.int8)), s, z)))

    return make


def dynamic() -> onnx.ModelProto:
    g = Net()
    q, _, z = g.op("DynamicQuantizeLinear", g.input(4, 64), n=3)
    return g.model(g.op("Cast", g.op("MatMulInteger", q, g.codes((64, 32)), z), to=F32))


def foreign(op: str, domain: str, *consts: Any, opset: int = 19, dtype: int = F32, **attrs: Any) -> Make:
    """An operator of another domain."""

    def make() -> onnx.ModelProto:
        g = Net(opset)
        y = g.op(op, g.input(4, 128, dtype=dtype), *(g.const(c) for c in consts), name="foreign", domain=domain, **attrs)
        return g.model(y, dtype=dtype, domains=[domain])

    return make


def fused_conv() -> onnx.ModelProto:
    """As ONNX Runtime's optimizer writes it."""
    g = Net()
    y = g.op("FusedConv", g.input(1, 16, 8, 8), g.floats(*CONV), domain="com.microsoft", activation="Relu", pads=[1] * 4)
    return g.model(y, domains=["com.microsoft"])


def contrib_pair() -> onnx.ModelProto:
    """QuantizeLinear and DequantizeLinear of ONNX Runtime's domain."""
    g = Net()
    s, z = g.const(f32(0.02)), g.const(np.int8(0))
    q = g.op("QuantizeLinear", g.input(1, 16, 8, 8), s, z, domain="com.microsoft")
    a = g.op("DequantizeLinear", q, s, z, domain="com.microsoft")
    return g.model(g.op("Conv", a, weight(*CONV)(g), pads=[1] * 4, name="conv"), domains=["com.microsoft"])


PAIR = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq")]


def function(*nodes: onnx.NodeProto, calls: int = 1) -> Make:
    """A local function with a Q/DQ pair, called before one or two convolutions."""
    body = helper.make_function("fxq", "FakeQuant", ["x", "s", "z"], ["y"], list(nodes), [helper.make_opsetid("", 19)])

    def make() -> onnx.ModelProto:
        g = Net()
        y = g.input(1, 16, 8, 8)
        for i in range(calls):
            a = g.op("FakeQuant", y, g.const(f32(0.02)), g.const(np.int8(0)), domain="fxq", name=f"call{i}")
            y = g.op("Conv", a, weight(*CONV)(g), pads=[1] * 4, name=f"conv{i}")
        return g.model(y, functions=[body], domains=["fxq"])

    return make


def branches(inside: bool, same_names: bool = False) -> Make:
    """An If with a convolution in each branch; its Q/DQ pairs are inside or outside."""

    def make() -> onnx.ModelProto:
        g = Net()
        x, condition, bodies = g.input(1, 16, 8, 8), g.input(dtype=BOOL, name="c"), []
        outside = [] if inside else [g.qdq(x), weight(*CONV)(g)]
        for name in ("then", "else"):
            b = Net()
            b.count = len(bodies) * 100 + 100
            y = b.op("Conv", *(outside or [b.qdq(x), weight(*CONV)(b)]), pads=[1] * 4, name=f"conv_{name}")
            if same_names:
                for i, node in enumerate(b.nodes):
                    node.name = f"same{i}"
            bodies.append(helper.make_graph(b.nodes, name, [], [helper.make_tensor_value_info(y, F32, [1, 16, 8, 8])], b.constants))
        return g.model(g.op("If", condition, then_branch=bodies[0], else_branch=bodies[1], name="if"))

    return make


def renamed(make: Make, name: str) -> Make:
    """All nodes with one name, or none."""

    def build() -> onnx.ModelProto:
        model = make()
        for node in model.graph.node:
            node.name = name
        return model

    return build


def also(reader: Act | None) -> Make:
    """The weight codes have another reader, or are an output."""

    def make() -> onnx.ModelProto:
        g = Net()
        codes = g.codes(CONV)
        y = g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), g.dq(codes, np.full(16, 0.01), axis=0), pads=[1] * 4, name="conv")
        model = g.model(y, reader(g, codes) if reader else codes)
        if not reader:
            model.graph.output[1].type.tensor_type.elem_type = I8
        return model

    return make


def leaves(what: str) -> Make:
    """Codes, or the dequantized value, are an output beside the convolution's."""

    def make() -> onnx.ModelProto:
        g = Net()
        q = g.q(g.input(1, 16, 8, 8))
        a = g.dq(q)
        model = g.model(g.op("Conv", a, weight(*CONV)(g), pads=[1] * 4, name="conv"), q if what == "codes" else a)
        model.graph.output[1].type.tensor_type.elem_type = I8 if what == "codes" else F32
        return model

    return make


def over(op: str, **attrs: Any) -> Act:
    """An operator on the codes of an activation."""
    return lambda g, x: g.dq(g.op(op, g.q(x), **attrs))


def embedded_constant() -> onnx.ModelProto:
    """A quantized constant that is added to a value."""
    g = Net()
    y = g.op("Add", g.input(4, 64), weight(4, 64, axis=1)(g))
    return g.model(g.op("MatMul", g.qdq(y), weight(64, 32, axis=1)(g), name="mm"))


INT16 = numpy_helper.from_array(np.ones(8, np.int16))
NIBBLES, SIZES = np.zeros((64, 4, 16), np.uint8), {"K": 128, "N": 64, "bits": 4, "block_size": 32}
ONES = np.ones(8, np.float32)

CASES: dict[str, Case] = {
    "QLinearConv": case(qlinear("QLinearConv"), "integer-op"), "ConvInteger": case(qlinear("ConvInteger"), "integer-op"),
    "DynamicQuantizeLinear": case(dynamic, "integer-op"), "custom operator": case(foreign("BinaryMatMul", "fxq", np.ones((128, 32), np.float32)), "domain"),
    "ONNX's name in another domain": case(foreign("Relu", "fxq"), "domain"), "FusedConv": case(fused_conv, "optimized"),
    "QuickGelu": case(foreign("QuickGelu", "com.microsoft"), "optimized"), "Q/DQ of com.microsoft": case(contrib_pair),
    "MatMulNBits": case(foreign("MatMulNBits", "com.microsoft", NIBBLES, np.full(256, 0.02, np.float32), opset=21, **SIZES), "operator"),
    "SimplifiedLayerNormalization": case(foreign("SimplifiedLayerNormalization", "com.microsoft", np.ones(128, np.float16), dtype=F16), "operator"),
    "BitwiseNot": case(single(lambda g, x: g.op("BitwiseNot", g.op("Cast", x, to=6)), out=6), "operator"),
    "MaxPool with dilations": case(single(moved("MaxPool", kernel_shape=[2, 2], dilations=[2, 2])), "operator"),
    "group norm": case(single(moved("GroupNormalization", ONES, ONES, num_groups=2), x=(1, 8, 8, 8), opset=21)),
    "function": case(function(*PAIR)), "function called twice": case(function(*PAIR, calls=2), "duplicate-name"),
    "if": case(branches(True)), "if around": case(branches(False), "outside"), "if of one name": case(branches(True, True), "duplicate-name"),
    "all of one name": case(renamed(conv(), "same"), "duplicate-name"), "no names": case(renamed(conv(), "")),
    "weights read by Cast": case(also(moved("Cast", to=F32)), "constant"), "weights are an output": case(also(None), "constant"),
    "codes are an output": case(leaves("codes")), "dequantized value is an output": case(leaves("value")), "added constant": case(embedded_constant),
    "Transpose of codes": case(conv(over("Transpose", perm=[0, 1, 3, 2]))), "MaxPool of codes": case(conv(over("MaxPool", kernel_shape=[2, 2]))),
    "Relu of codes": case(conv(over("Relu"))), "Q only": case(single(lambda g, x: g.q(x), out=I8)),
    "no quantization": case(conv(plain, lambda g: g.floats(*CONV))),
    "Constant node of int16": case(single(lambda g, x: g.op("Add", x, g.op("Cast", g.op("Constant", value=INT16), to=F32))), "type"),
    "two pairs of one grid": case(conv(act(then=act()))),
}  # fmt: skip
