"""Small Q/DQ models for TensorRT, as ONNX bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

Size = int | str


class Graph:
    """Collects nodes, inputs and constants; the same calls give the same bytes."""

    def __init__(self, opset: int = 19) -> None:
        self.opset, self.nodes, self.constants = opset, [], []  # type: ignore[var-annotated]
        self.inputs: list[Any] = []
        self.rng = np.random.default_rng(0)

    def input(self, name: str, *sizes: Size, dtype: int = T.FLOAT) -> str:
        self.inputs.append(h.make_tensor_value_info(name, dtype, sizes))
        return name

    def constant(self, value: Any, dtype: int | None = None) -> str:
        name, array = f"c{len(self.constants)}", np.asarray(value)
        tensor = nh.from_array(array, name) if dtype is None else h.make_tensor(name, dtype, array.shape, array.flatten().tolist())
        self.constants.append(tensor)
        return name

    def node(self, op: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        out = f"t{len(self.nodes)}"
        self.nodes.append(h.make_node(op, inputs, [out], name=name or f"{op}_{len(self.nodes)}", **attributes))
        return out

    def qdq(self, x: str, scale: float, dtype: int = T.INT8, zero: int = 0, name: str = "") -> str:
        s, z = self.constant(np.float32(scale)), self.constant(zero, dtype)
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, s, z], name and name + "/q"), s, z], name and name + "/dq")

    def weight(self, *sizes: int, axis: int = 0, name: str = "", zero: int = 0) -> str:
        w = self.rng.integers(-127, 128, sizes).astype(np.int8)
        s, z = np.full(sizes[axis], 0.01, np.float32), np.full(sizes[axis], zero, np.int8)
        return self.node("DequantizeLinear", [self.constant(w), self.constant(s), self.constant(z)], name, axis=axis)

    def bytes(self, *outputs: str, rename: Sequence[str] = ()) -> bytes:
        for node, name in zip(self.nodes, rename, strict=False):
            node.name = name
        outs = [h.make_tensor_value_info(o, T.FLOAT, None) for o in outputs]
        graph = h.make_graph(self.nodes, "g", self.inputs, outs, self.constants)
        return h.make_model(graph, opset_imports=[h.make_opsetid("", self.opset)], ir_version=10).SerializeToString()  # type: ignore[no-any-return]


def conv_relu(batch: Size = "N", rename: Sequence[str] = (), x: str = "x", zero: int = 0) -> bytes:
    """int8 convolution with per-channel weights, then ReLU; nodes ``x/q``, ``x/dq``, ``w``, ``conv``, ``relu``."""
    g = Graph()
    a = g.qdq(g.input(x, batch, 16, 8, 8), 0.02, zero=zero, name="x")
    c = g.node("Conv", [a, g.weight(16, 16, 3, 3, name="w"), g.constant(np.zeros(16, np.float32))], "conv", pads=[1] * 4)
    return g.bytes(g.node("Relu", [c], "relu"), rename=rename)


def squeeze(blocks: int) -> bytes:
    """Blocks of convolution, hard-swish and squeeze-excitation: the builder compiles their parts in several threads."""
    g = Graph()
    x = g.input("x", "N", 16, 8, 8)
    for _ in range(blocks):
        y = g.node("HardSwish", [g.node("Conv", [g.qdq(x, 0.02), g.weight(16, 16, 3, 3)], pads=[1] * 4)])
        s = g.qdq(g.node("GlobalAveragePool", [y]), 0.02)
        s = g.qdq(g.node("Relu", [g.node("Conv", [s, g.weight(16, 16, 1, 1)])]), 0.02)
        s = g.node("HardSigmoid", [g.node("Conv", [s, g.weight(16, 16, 1, 1)])])
        x = g.node("Add", [x, g.node("Mul", [y, s])])
    return g.bytes(x)


def two_inputs(other: Size = "N") -> bytes:
    """Product of two quantized inputs, ``(N, 16, 32)`` and ``(N, 32, 16)``."""
    g = Graph()
    a, b = g.input("a", "N", 16, 32), g.input("b", other, 32, 16)
    return g.bytes(g.node("MatMul", [g.qdq(a, 0.03), g.qdq(b, 0.03)], "product"))


def fp8_matmul() -> bytes:
    """FP8 product with FP8 weights."""
    g = Graph()
    one, zero = g.constant(np.float32(0.05)), g.constant(0, T.FLOAT8E4M3FN)
    a = g.node("DequantizeLinear", [g.node("QuantizeLinear", [g.input("x", 4, 64), one, zero]), one, zero])
    w = g.node("DequantizeLinear", [g.constant(g.rng.normal(0, 1, (64, 32)), T.FLOAT8E4M3FN), one, zero])
    return g.bytes(g.node("MatMul", [a, w], "product"))


def int4_matmul(block: int = 64, rows: int = 128, columns: int = 64) -> bytes:
    """Float product with 4-bit weights in blocks."""
    g = Graph(21)
    w = g.constant(g.rng.integers(-8, 8, (rows, columns)), T.INT4)
    s = g.constant(np.full((rows // block, columns), 0.1, np.float32))
    d = g.node("DequantizeLinear", [w, s], "w", axis=0, block_size=block)
    return g.bytes(g.node("MatMul", [g.input("x", "N", rows), d], "product"))


def float_linear() -> bytes:
    """A float product, then an addition."""
    g = Graph()
    y = g.node("MatMul", [g.input("x", 4, 64), g.constant(g.rng.normal(size=(64, 32)).astype(np.float32))], "encoder.layers.0.mlp/matmul")
    return g.bytes(g.node("Add", [y, g.constant(np.ones(32, np.float32))], "encoder.layers.0.mlp/add"))


def attention() -> bytes:
    """Softmax attention whose two products read int8 and whose result is quantized."""
    g = Graph()
    q, k, v = (g.qdq(g.input(n, 2, 4, 16, 32), 0.03) for n in "qkv")
    s = g.node("MatMul", [q, g.node("Transpose", [k], perm=[0, 1, 3, 2])], "qk")
    p = g.qdq(g.node("Softmax", [s], "softmax", axis=-1), 1 / 127)
    return g.bytes(g.qdq(g.node("MatMul", [p, v], "pv"), 0.02))


def unsupported() -> bytes:
    """An operator that TensorRT has not."""
    g = Graph()
    return g.bytes(g.node("NonMaxFrobenius", [g.input("x", 2, 3)], "odd"))


def matmul_integer() -> bytes:
    """An operator that TensorRT's parser refuses without a reason."""
    g = Graph()
    a, b = g.input("x", 2, 3, dtype=T.INT8), g.constant(np.ones((3, 4), np.int8))
    return g.bytes(g.node("Cast", [g.node("MatMulInteger", [a, b], "integers")], to=T.FLOAT))


def odd_int4() -> bytes:
    """An odd number of 4-bit weights: parsed, and refused by the builder."""
    g = Graph(21)
    d = g.node("DequantizeLinear", [g.constant(g.rng.integers(-8, 8, (5, 3)), T.INT4), g.constant(np.float32(0.1))], "odd/w")
    return g.bytes(g.node("MatMul", [g.input("x", 2, 5), d], "product"))


def int16_input() -> bytes:
    """16-bit quantization, which TensorRT has not: its zero-point is the first thing refused."""
    g = Graph(21)
    return g.bytes(g.qdq(g.input("x", 2, 3), 0.1, T.INT16))


def loaded(data: bytes) -> onnx.ModelProto:
    """The model of such bytes, to change it."""
    return onnx.load_model_from_string(data)
