"""Of the zoo of the lint: convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from tests.lint_graphs import GRIDS, OPSETS, Case, Graph


def conv(
    gin: str = "u8", gout: str = "u8", *, after: str = "", also: str = "", opset: int = 17, dims: int = 2, depthwise: bool = False,
    bias: str = "int32", zero: bool = True, **weight: Any,
) -> onnx.ModelProto:  # fmt: skip
    """Q-DQ-Conv-(Relu, Clip)-Q-DQ; ``also`` names who else reads the conv."""
    g = Graph(opset)
    x = g.qdq(g.input(1, 4, *(6,) * dims), gin, zero=zero)
    n = 4 if depthwise else 8
    biases = {"int32": lambda: [g.bias(n, channels=weight.get("channels", True))], "float": lambda: [g.const(np.ones(n, np.float32))], "": list}
    y = first = g.op("Conv", x, g.weight(n, 1 if depthwise else 4, *(3,) * dims, **weight), *biases[bias](), group=4 if depthwise else 1)
    for kind in after.split():
        y = g.op("Relu", y) if kind == "relu" else g.op("Clip", y, g.const(np.float32(0)), g.const(np.float32(float(kind))))
    others = {"output": lambda: [first], "last": lambda: [y], "grid": lambda: [g.qdq(first, gout, 0.3)], "tanh": lambda: [g.op("Tanh", first)]}
    more = [o for word in also.split() if word != "only" for o in others[word]()]
    return g.model(*more, *([] if "only" in also.split() else [g.qdq(y, gout, 6 / 255 if after.endswith("6") else 0.1, zero)]))


def convs() -> Iterator[Case]:
    for grid in GRIDS:
        yield f"grid {grid}", lambda grid=grid: conv(grid, grid)
    for after in ("relu", "6", "1000", "relu 6"):
        for grid in ("u8", "u8z", "u8c", "s8", "s8z"):
            yield f"{after} {grid}", lambda after=after, grid=grid: conv("u8" if grid[0] == "u" else "s8", grid, after=after)
    for also in ("output", "grid", "tanh", "output only", "tanh only"):
        yield f"also {also}", lambda also=also: conv(also=also)
    for also in ("last", "last only", "tanh"):
        yield f"relu, also {also}", lambda also=also: conv("u8", "u8z", after="relu", also=also)
    for dims in (1, 2, 3):
        yield f"{dims}d", lambda dims=dims: conv(dims=dims)
    for opset in OPSETS:
        yield f"opset {opset}", lambda opset=opset: conv("u8", "u8z", after="relu", opset=opset)
    options: dict[str, dict[str, Any]] = {
        "depthwise": {"depthwise": True}, "per tensor": {"channels": False}, "u8 weight": {"dtype": np.uint8}, "no bias": {"bias": ""},
        "float bias": {"bias": "float"}, "float bias, no Q": {"bias": "float", "also": "output only"}, "types differ": {"gout": "s8"},
        "weight without zero point": {"zero": True, "dtype": np.int8},
    }  # fmt: skip
    for name, option in options.items():
        yield name, lambda option=option: conv(**option)
    yield "no zero point", lambda: conv("u8z", "u8z", zero=False)
    yield "no zero point, relu", lambda: conv("u8z", "u8z", zero=False, after="relu")


def biases() -> Iterator[Case]:
    """Bias scales on both sides of the runtime's bound 1e-6 + 1 % of input scale times weight scale."""

    def one(scale: float, factor: float, channels: bool = True, zero: int | None = None) -> onnx.ModelProto:
        g = Graph()
        x = g.qdq(g.input(1, 4, 6, 6), scale=scale)
        y = g.op("Conv", x, g.weight(8, 4, 3, 3, channels=channels), g.bias(8, scale * 0.01 * factor, channels, zero))
        return g.model(g.qdq(y))

    for scale in (10.0, 0.1, 1e-3, 1e-5, 1e-9):
        for factor in (0.98, 0.995, 1.005, 1.02, 2.0, 100.0):
            yield f"{scale} x {factor}", lambda scale=scale, factor=factor: one(scale, factor)
    yield "per tensor off", lambda: one(0.1, 2.0, channels=False)
    yield "zero point 0", lambda: one(0.1, 1.0, zero=0)
    yield "zero point 3", lambda: one(0.1, 1.0, zero=3)


def special_weights() -> Iterator[Case]:
    def one(weight: Callable[[Graph], str], opset: int = 21) -> onnx.ModelProto:
        g = Graph(opset)
        return g.model(g.qdq(g.op("Conv", g.qdq(g.input(1, 4, 6, 6)), weight(g))))

    yield "float", lambda: one(lambda g: g.const(np.ones((8, 4, 3, 3), np.float32)))
    yield "float through Q", lambda: one(lambda g: g.qdq(g.const(np.ones((8, 4, 3, 3), np.float32)), "s8", 0.02))
    yield "int4", lambda: one(lambda g: g.op("DequantizeLinear", g.nibbles(TensorProto.INT4, 8, 4, 3, 3), g.const(np.float32(0.1))))
    yield (
        "int4 through Cast",
        lambda: one(lambda g: g.dq(g.op("Cast", g.nibbles(TensorProto.INT4, 8, 4, 3, 3), to=TensorProto.INT8), "s8")),
    )

    def plain() -> onnx.ModelProto:
        g = Graph()
        return g.model(g.op("Conv", g.input(1, 4, 6, 6), g.weight(8, 4, 3, 3)))

    yield "weight only", plain


def gemm(
    grid: str = "u8", *, trans: int = 1, bias: str = "int32", q: bool = True, after: bool = False, weight_only: bool = False, out: str = "", **more: Any
) -> onnx.ModelProto:
    g = Graph()
    x = g.input(2, 8) if weight_only else g.qdq(g.input(2, 8), grid)
    attrs = {k: more.pop(k) for k in ("alpha", "beta") if k in more}
    weight = g.weight(*((5, 8) if trans else (8, 5)), axis=1 - trans, **more)
    biases = {"int32": lambda: [g.bias(5, channels=more.get("channels", True))], "float": lambda: [g.const(np.ones(5, np.float32))], "": list}
    y = g.op("Gemm", x, weight, *biases[bias](), transB=trans, **attrs)
    y = g.op("Relu", y) if after else y
    return g.model(g.qdq(y, out or grid) if q else y)


def gemms() -> Iterator[Case]:
    for q in (True, False):
        for grid in GRIDS:
            yield f"{grid} q={q}", lambda grid=grid, q=q: gemm(grid, q=q)
        for trans in (0, 1):
            for bias in ("int32", "float", ""):
                for zero in (True, False):
                    option = {"trans": trans, "bias": bias, "zero": zero, "q": q}
                    yield f"{option}", lambda option=option: gemm(**option)
    for option in (
        {"channels": False, "zero": False}, {"dtype": np.uint8}, {"grid": "s8", "dtype": np.uint8}, {"alpha": 2.0}, {"beta": 2.0},
        {"alpha": 2.0, "bias": ""}, {"after": True, "out": "u8z"}, {"after": True, "q": False}, {"after": True}, {"out": "s8"},
        *({"weight_only": True, "q": False, "trans": t, "bias": b} for t in (0, 1) for b in ("", "float")),
    ):  # fmt: skip
        yield f"{option}", lambda option=option: gemm(**option)


def gemm_readers() -> Iterator[Case]:
    for readers in ("qt", "qo", "to", "qd"):

        def one(readers: str = readers) -> onnx.ModelProto:
            g = Graph()
            y = g.op("Gemm", g.qdq(g.input(2, 8)), g.weight(8, 5, axis=1))
            made = {"q": lambda: g.qdq(y), "t": lambda: g.op("Tanh", y), "o": lambda: y, "d": lambda: g.qdq(y, "u8", 0.2)}
            return g.model(*[made[r]() for r in readers])

        yield readers, one


def matmul(
    shape: tuple[Any, ...] = (2, 8), grid: str = "u8", *, q: bool = True, add: str = "", middle: bool = False, act: bool = False,
    weight_only: bool = False, **weight: Any,
) -> onnx.ModelProto:  # fmt: skip
    g = Graph()
    x = g.input(*shape) if weight_only else g.qdq(g.input(*shape), grid)
    y = g.op("MatMul", x, g.qdq(g.input(8, 5), grid) if act else g.weight(8, 5, axis=1, **weight))
    y = g.qdq(y, grid) if middle else y
    if add:
        y = g.op("Add", y, g.const(np.ones(5, np.float32)) if add == "float" else g.dq(g.const(np.ones(5, GRIDS[grid][0])), grid))
    return g.model(g.qdq(y, grid) if q else y)


def matmuls() -> Iterator[Case]:
    for q in (True, False):
        for shape in ((2, 8), (2, 3, 8), (1, 2, 3, 8), ("N", 8), ("N", 3, 8)):
            for grid in ("u8", "s8", "u8c"):
                yield f"{shape} {grid} q={q}", lambda shape=shape, grid=grid, q=q: matmul(shape, grid, q=q)
            for option in ({"add": a, "middle": m, "q": q} for a in ("float", "codes") for m in (True, False)):
                yield f"{shape} {option}", lambda shape=shape, option=option: matmul(shape, **option)
        weights = [{"weight_only": True, "add": a, "channels": c, "zero": z} for a in ("", "float") for c in (True, False) for z in (True, False)]
        for option in ({"act": True}, {"zero": False}, *weights):
            yield f"{option} q={q}", lambda option=option, q=q: matmul(q=q, **option)


def packed() -> Iterator[Case]:
    for kind in (TensorProto.INT4, TensorProto.UINT4):
        for block in (8, 16, 32):

            def blocks(kind: int = kind, block: int = block) -> onnx.ModelProto:
                g = Graph(21)
                scale = g.const(np.ones((64 // block, 8), np.float32))
                return g.model(g.op("MatMul", g.input(2, 64), g.op("DequantizeLinear", g.nibbles(kind, 64, 8), scale, axis=0, block_size=block)))

            yield f"{kind} blocks of {block}", blocks
    for kind in ("MatMul", "Gemm"):
        for q in (True, False):
            for act in (True, False):
                for channels in (True, False):

                    def turned(kind: str = kind, q: bool = q, act: bool = act, channels: bool = channels) -> onnx.ModelProto:
                        g = Graph()
                        x = g.qdq(g.input(2, 8)) if act else g.input(2, 8)
                        y = g.op(kind, x, g.op("Transpose", g.weight(5, 8, channels=channels), perm=[1, 0]))
                        return g.model(g.qdq(y) if q else y)

                    yield f"{kind} transposed q={q} act={act} channels={channels}", turned


def dynamic() -> Iterator[Case]:
    def integer() -> onnx.ModelProto:
        g = Graph()
        a, s, z = g.op("DynamicQuantizeLinear", g.input(2, 8), n=3)
        product = g.op("MatMulInteger", a, g.const(np.ones((8, 5), np.int8)), z, g.const(np.int8(0)))
        return g.model(g.op("Mul", g.op("Cast", product, to=TensorProto.FLOAT), g.op("Mul", s, g.const(np.float32(0.01)))))

    def pair() -> onnx.ModelProto:
        g = Graph()
        codes = g.op("DynamicQuantizeLinear", g.input(2, 8), n=3)
        return g.model(g.op("MatMul", g.op("DequantizeLinear", *codes), g.weight(8, 5, axis=1)))

    yield "MatMulInteger", integer
    yield "DQ", pair
