"""Writes small Q/DQ graphs node by node, for the zoo of the lint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

GRIDS = {  # name -> code type, zero point
    "u8": (np.uint8, 100), "u8z": (np.uint8, 0), "u8c": (np.uint8, 128), "s8": (np.int8, 0), "s8z": (np.int8, -128), "s8a": (np.int8, 5),
}  # fmt: skip
OPSETS = range(13, 27)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


class Graph:
    """Writes a graph node by node; every constant is an initializer of its own."""

    def __init__(self, opset: int = 17) -> None:
        self.opset, self.count = opset, 0
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []

    def name(self, base: str) -> str:
        self.count += 1
        return f"{base}{self.count}"

    def const(self, value: Any) -> str:
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value), self.name("c"))
        self.constants.append(tensor)
        return str(tensor.name)

    def nibbles(self, kind: int, *shape: int) -> str:
        return self.const(helper.make_tensor(self.name("w"), kind, shape, np.ones(int(np.prod(shape)), np.int8)))

    def input(self, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(self.name("x"), TensorProto.FLOAT, shape))
        return str(self.inputs[-1].name)

    def op(self, kind: str, *inputs: str, n: int = 1, **attrs: Any) -> Any:
        outputs = [self.name(kind.lower()) for _ in range(n)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=self.name("n"), **attrs))
        return outputs[0] if n == 1 else outputs

    def grid(self, grid: str, scale: float, zero: bool) -> list[str]:
        dtype, point = GRIDS[grid]
        return [self.const(np.float32(scale)), *([self.const(np.asarray(point, dtype))] if zero else [])]

    def q(self, x: str, grid: str = "u8", scale: float = 0.1, zero: bool = True) -> str:
        return str(self.op("QuantizeLinear", x, *self.grid(grid, scale, zero)))

    def dq(self, x: str, grid: str = "u8", scale: float = 0.1, zero: bool = True) -> str:
        return str(self.op("DequantizeLinear", x, *self.grid(grid, scale, zero)))

    def qdq(self, x: str, grid: str = "u8", scale: float = 0.1, zero: bool = True) -> str:
        return self.dq(self.q(x, grid, scale, zero), grid, scale, zero)

    def weight(self, *shape: int, axis: int = 0, channels: bool = True, dtype: Any = np.int8, zero: bool = True, seed: int = 0) -> str:
        info = np.iinfo(dtype)
        codes = self.const(np.random.default_rng(seed).integers(info.min, info.max, shape).astype(dtype))
        size = (shape[axis],) if channels else ()
        point = [self.const(np.zeros(size, dtype))] if zero else []
        return str(self.op("DequantizeLinear", codes, self.const(np.full(size, 0.01, np.float32)), *point, **({"axis": axis} if channels else {})))

    def bias(self, n: int, scale: float = 0.001, channels: bool = True, zero: int | None = None) -> str:
        size = (n,) if channels else ()
        point = [] if zero is None else [self.const(np.full(size, zero, np.int32))]
        codes = self.const(np.arange(n, dtype=np.int32))
        return str(self.op("DequantizeLinear", codes, self.const(np.full(size, scale, np.float32)), *point, **({"axis": 0} if channels else {})))

    def model(self, *outputs: str, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
        outs = [helper.make_tensor_value_info(o, kind, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "zoo", self.inputs, outs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10 if self.opset < 23 else 11)


Case = tuple[str, Callable[[], onnx.ModelProto]]
