"""Writes small Q/DQ models node by node: the grammar of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F32, F16, BF16, I8, U8, I4, U4, FP8, E5M2, FP4, I32, I64, BOOL = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4,
    TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT4E2M1, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL,
)  # fmt: skip
RANGES = {I8: (-127, 127), U8: (0, 255), I4: (-7, 7), U4: (0, 15), TensorProto.INT2: (-2, 1), TensorProto.UINT2: (0, 3), TensorProto.INT16: (-32767, 32767)}
RAW = {FP8: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
NUMPY = {I8: np.int8, U8: np.uint8, I32: np.int32, F16: np.float16, TensorProto.INT16: np.int16}
IR = {10: 5, 13: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 23: 11, 24: 11, 25: 12}

Act = Callable[["Net", str], str]
Weight = Callable[["Net"], str]
Make = Callable[[], onnx.ModelProto]


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        make: builds it.
        codes: the lint's findings for it, by code.
        target: what ``codes`` hold for. Every case is also built for sm86.
    """

    make: Make
    codes: frozenset[str]
    target: str = "sm86"


def case(make: Make, codes: str = "", target: str = "sm86") -> Case:
    return Case(make, frozenset(codes.split()), target)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


class Net:
    """A graph; every constant is an initializer of its own."""

    def __init__(self, opset: int = 19) -> None:
        self.opset, self.count, self.random = opset, 0, np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def name(self, base: str) -> str:
        self.count += 1
        return f"{base}{self.count}"

    def input(self, *shape: int | str, dtype: int = F32, name: str = "x") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, value: Any, dtype: int | None = None, name: str = "") -> str:
        name, array = name or self.name("c"), np.asarray(value)
        if dtype in NUMPY:
            array, dtype = array.astype(NUMPY[dtype]), None
        if dtype is None:
            tensor = numpy_helper.from_array(array, name)
        elif dtype in RAW:
            tensor = TensorProto(name=name, data_type=dtype, dims=array.shape, raw_data=array.astype(RAW[dtype]).tobytes())
        else:
            tensor = helper.make_tensor(name, dtype, array.shape, array.flatten().tolist())
        self.constants.append(tensor)
        return name

    def op(self, kind: str, *inputs: str, n: int = 1, name: str = "", **attrs: Any) -> Any:
        outputs = [self.name(kind.lower()) for _ in range(n)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=name or self.name(kind), **attrs))
        return outputs[0] if n == 1 else outputs

    def grid(self, scale: Any, dtype: int, zero: Any, kind: int | None = None) -> list[str]:
        """Scale and zero point; ``zero`` None leaves the zero point out."""
        names = [self.const(scale, kind) if kind else self.const(f32(scale))]
        return names if zero is None else [*names, self.const(np.broadcast_to(zero, np.shape(scale)), dtype)]

    def q(self, x: str, scale: Any = 0.02, dtype: int = I8, zero: Any = 0, kind: int | None = None, **attrs: Any) -> str:
        return str(self.op("QuantizeLinear", x, *self.grid(scale, dtype, zero, kind), **attrs))

    def dq(self, x: str, scale: Any = 0.02, dtype: int = I8, zero: Any = 0, kind: int | None = None, **attrs: Any) -> str:
        return str(self.op("DequantizeLinear", x, *self.grid(scale, dtype, zero, kind), **attrs))

    def qdq(self, x: str, scale: Any = 0.02, dtype: int = I8, zero: Any = 0, kind: int | None = None, **attrs: Any) -> str:
        return self.dq(self.q(x, scale, dtype, zero, kind, **attrs), scale, dtype, zero, kind, **attrs)

    def codes(self, shape: Sequence[int], dtype: int = I8, name: str = "") -> str:
        if dtype in RAW:
            return self.const(self.random.normal(0, 10, shape), dtype, name)
        if dtype == FP4:
            return self.const(self.random.choice([0, 0.5, 1, 1.5, 2, 3, 4, 6], shape), dtype, name)
        low, high = RANGES[dtype]
        return self.const(self.random.integers(low, high + 1, shape), dtype, name)

    def floats(self, *shape: int, low: float = -0.3, high: float = 0.3, dtype: Any = np.float32) -> str:
        return self.const(self.random.uniform(low, high, shape).astype(dtype))

    def model(self, *outputs: str, dtype: int = F32, functions: Sequence[onnx.FunctionProto] = (), domains: Sequence[str] = ()) -> onnx.ModelProto:
        outs = [helper.make_tensor_value_info(o, dtype, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "zoo", self.inputs, outs, self.constants)
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)]
        return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=IR.get(self.opset, 10))


# ---- operands ------------------------------------------------------------------------------------------------------------------


def act(scale: Any = 0.02, dtype: int = I8, zero: Any = 0, then: Act | None = None, kind: int | None = None, **attrs: Any) -> Act:
    """A quantized activation; ``then`` stands between its DequantizeLinear and the reader."""

    def build(g: Net, x: str) -> str:
        y = g.qdq(x, scale, dtype, zero, kind, **attrs)
        return y if then is None else then(g, y)

    return build


def plain(g: Net, x: str) -> str:
    """A float activation."""
    return x


def moved(op: str, *consts: Any, n: int = 1, pick: int = 0, first: str = "", **attrs: Any) -> Act:
    """The value through an operator with constant further inputs."""

    def build(g: Net, x: str) -> str:
        y = g.op(op, x, *("" if c is None else g.const(c) for c in consts), n=n, name=first, **attrs)
        return str(y if n == 1 else y[pick])

    return build


def scales(shape: Sequence[int], axis: int | None, block: int = 0) -> Any:
    """Different scales along an axis, or blocks along it."""
    if axis is None:
        return np.float32(0.01)
    size = [n // block if i == axis and block else n for i, n in enumerate(shape)] if block else [shape[axis]]
    return np.linspace(0.01, 0.02, int(np.prod(size)), dtype=np.float32).reshape(size)


def weight(
    *shape: int, axis: int | None = 0, dtype: int = I8, block: int = 0, zero: Any = 0, then: Act | None = None, before: Act | None = None,
    scale: Any = None, written: bool = True, kind: int | None = None, **attrs: Any,
) -> Weight:  # fmt: skip
    """Constant codes and their DequantizeLinear; ``before`` stands between the two, ``then`` behind."""

    def build(g: Net) -> str:
        codes = g.codes(shape, dtype)
        extra = {"axis": axis} if axis is not None and written else {}
        extra |= {"block_size": block} if block else {}
        w = g.dq(codes if before is None else before(g, codes), scales(shape, axis, block) if scale is None else scale, dtype, zero, kind, **extra, **attrs)
        return w if then is None else then(g, w)

    return build


def fake(*shape: int, axis: int | None = 0, scale: Any = None, then: Act | None = None, dtype: int = I8, zero: Any = 0) -> Weight:
    """Float weights with a Q/DQ pair."""

    def build(g: Net) -> str:
        extra = {"axis": axis} if axis is not None else {}
        w = g.qdq(g.floats(*shape), scales(shape, axis) if scale is None else scale, dtype, zero, **extra)
        return w if then is None else then(g, w)

    return build


def floating(*shape: int) -> Weight:
    """Float weights."""
    return lambda g: g.floats(*shape)


CONV = (16, 16, 3, 3)
WIDE = (64, 32)


def conv(
    a: Act | None = None, w: Weight | None = None, x: Sequence[int | str] = (1, 16, 8, 8), opset: int = 19, op: str = "Conv", bias: Weight | None = None,
    after: Act | None = None, dtype: int = F32, **attrs: Any,
) -> Make:  # fmt: skip
    """One convolution of a quantized activation and quantized weights."""

    def make() -> onnx.ModelProto:
        g = Net(opset)
        y = (a or act())(g, g.input(*x, dtype=dtype))
        inputs = [y, (w or weight(*CONV))(g), *([bias(g)] if bias else [])]
        y = g.op(op, *inputs, name="conv", **(attrs or {"pads": [1] * 4 if len(x) == 4 else [1] * 2 * (len(x) - 2)}))
        return g.model(after(g, y) if after else y, dtype=dtype)

    return make


def product(
    a: Act | None = None, w: Weight | None = None, x: Sequence[int | str] = (4, 64), opset: int = 19, op: str = "MatMul", bias: Weight | None = None,
    after: Act | None = None, dtype: int = F32, **attrs: Any,
) -> Make:  # fmt: skip
    """One matrix product of a quantized activation and quantized weights."""

    def make() -> onnx.ModelProto:
        g = Net(opset)
        inputs = [(a or act())(g, g.input(*x, dtype=dtype)), (w or weight(*WIDE, axis=1))(g), *([bias(g)] if bias else [])]
        y = g.op(op, *inputs, name="mm", **attrs)
        return g.model(after(g, y) if after else y, dtype=dtype)

    return make


def single(*nodes: Act, x: Sequence[int] = (1, 3, 8, 8), opset: int = 19, dtype: int = F32, out: int = F32) -> Make:
    """Nodes in a row."""

    def make() -> onnx.ModelProto:
        g = Net(opset)
        y = g.input(*x, dtype=dtype)
        for node in nodes:
            y = node(g, y)
        return g.model(y, dtype=out)

    return make
