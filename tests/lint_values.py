"""Of the zoo of the lint: pointwise operations, what moves values, sums, joins, lone clips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from tests.lint_graphs import GRIDS, OPSETS, Case, Graph, ints


def unary(
    kind: str, grid: str = "u8", out: str = "", *, opset: int = 17, scales: tuple[float, float] = (0.1, 0.2), consts: tuple[Any, ...] = (), after: str = "",
    q: bool = True, zero: bool = True, before: bool = True, **attrs: Any,
) -> onnx.ModelProto:  # fmt: skip
    g = Graph(opset)
    x = g.input(1, 4, 6, 6)
    y = g.op(kind, g.qdq(x, grid, scales[0], zero) if before else x, *[g.const(c) for c in consts], **attrs)
    y = g.op(after, y) if after else y
    return g.model(g.qdq(y, out or grid, scales[1], zero) if q else y)


POINTWISE: dict[str, dict[str, Any]] = {
    "Sigmoid": {}, "LeakyRelu": {"alpha": 0.1}, "Softmax": {"axis": -1}, "GlobalAveragePool": {}, "AveragePool": {"kernel_shape": [2, 2]},
    "Relu": {}, "Tanh": {}, "HardSigmoid": {}, "HardSwish": {}, "Abs": {}, "ReduceMean": {}, "DepthToSpace": {"blocksize": 2},
}  # fmt: skip
MOVERS: dict[str, dict[str, Any]] = {
    "MaxPool": {"kernel_shape": [2, 2]}, "Reshape": {"consts": (ints(1, -1),)}, "Flatten": {}, "Transpose": {"perm": [0, 2, 3, 1]},
    "Slice": {"consts": (ints(0), ints(2), ints(1))}, "Gather": {"consts": (ints(0, 2),), "axis": 1}, "Squeeze": {"consts": (ints(0),)},
    "Unsqueeze": {"consts": (ints(0),)}, "Expand": {"consts": (ints(2, 4, 6, 6),)}, "Tile": {"consts": (ints(1, 2, 1, 1),)},
    "Resize": {"consts": (np.array([], np.float32), np.array([1, 1, 2, 2], np.float32)), "mode": "nearest"},
    "Pad": {"consts": (ints(0, 0, 1, 1, 0, 0, 1, 1),)}, "GatherElements": {"consts": (np.zeros((1, 4, 6, 6), np.int64),)},
}  # fmt: skip


def pointwise() -> Iterator[Case]:
    for kind, attrs in POINTWISE.items():
        for grid in GRIDS:
            yield f"{kind} {grid}", lambda kind=kind, attrs=attrs, grid=grid: unary(kind, grid, **attrs)
        for option in ({"q": False}, {"out": "s8"}, {"out": "u8z", "after": "Relu"}, {"grid": "u8z", "zero": False}):
            yield f"{kind} {option}", lambda kind=kind, attrs=attrs, option=option: unary(kind, **option, **attrs)


def movers() -> Iterator[Case]:
    same = {"scales": (0.1, 0.1)}
    for kind, attrs in MOVERS.items():
        for grid in GRIDS:
            yield f"{kind} {grid}", lambda kind=kind, attrs=attrs, grid=grid: unary(kind, grid, **same, **attrs)
        for option in (
            {}, {"q": False}, {"grid": "u8z", "zero": False, **same}, {"grid": "u8z", "after": "Relu", **same}, {"after": "Tanh", **same}, {"before": False},
            *({"opset": opset, **same} for opset in OPSETS),
        ):  # fmt: skip
            yield f"{kind} {option}", lambda kind=kind, attrs=attrs, option=option: unary(kind, **option, **attrs)


def readers() -> Iterator[Case]:
    """A mover with several readers: q and d quantize (same and other grid), t computes in float, u moves on, o is an output."""
    for kind, attrs in MOVERS.items():
        for who in ("t", "q", "o", "tt", "tq", "td", "qd", "qtd", "to", "tu", "u", "uu", "uq", "qq") if kind == "Squeeze" else ("qtd", "tt"):

            def one(kind: str = kind, attrs: dict[str, Any] = attrs, who: str = who) -> onnx.ModelProto:
                g = Graph()
                y = g.op(kind, g.qdq(g.input(1, 4, 6, 6)), *[g.const(c) for c in attrs.get("consts", ())], **{k: v for k, v in attrs.items() if k != "consts"})
                made = {
                    "q": lambda: g.qdq(y), "d": lambda: g.qdq(y, "u8", 0.3), "t": lambda: g.op("Tanh", y), "o": lambda: y,
                    "u": lambda: g.op("Unsqueeze", y, g.const(ints(0))),
                }  # fmt: skip
                return g.model(*[made[w]() for w in who])

            yield f"{kind} {who}", one


def binary(
    kind: str, a: str = "u8", b: str = "u8", out: str = "u8", *, const: str = "", after: bool = False, q: bool = True, same: bool = False
) -> onnx.ModelProto:
    g = Graph()
    x = g.qdq(g.input(1, 4, 6, 6), a)
    if const == "float":
        y = g.const(np.float32(2))
    elif const:
        y = g.dq(g.const(np.array([1, 100, 3, 127], GRIDS[const][0]).reshape(1, 4, 1, 1)), const)
    else:
        y = x if same else g.qdq(g.input(1, 4, 6, 6), b, 0.2)
    z = g.op(kind, x, y)
    z = g.op("Relu", z) if after else z
    return g.model(g.qdq(z, out, 0.3) if q else z)


def binaries() -> Iterator[Case]:
    for kind in ("Add", "Mul", "Sub", "Div", "Max"):
        for grid in GRIDS:
            yield f"{kind} {grid}", lambda kind=kind, grid=grid: binary(kind, grid, grid, grid)
        for const in ("float", "u8", "s8"):
            yield f"{kind} u8 and constant {const}", lambda kind=kind, const=const: binary(kind, const=const)
            yield f"{kind} s8 and constant {const}", lambda kind=kind, const=const: binary(kind, "s8", "s8", "s8", const=const)
        for option in (
            {"b": "s8"}, {"out": "u8z", "after": True}, {"after": True}, {"q": False}, {"same": True}, {"a": "s8", "out": "s8", "same": True},
        ):  # fmt: skip
            yield f"{kind} {option}", lambda kind=kind, option=option: binary(kind, **option)


def joins() -> Iterator[Case]:
    def cat(grids: tuple[str, ...], scales: tuple[float, ...], out: str = "u8", plain: bool = False, after: bool = False) -> onnx.ModelProto:
        g = Graph()
        parts = [g.qdq(g.input(1, 4, 6, 6), a, s) for a, s in zip(grids, scales, strict=True)]
        y = g.op("Concat", *parts, *([g.input(1, 4, 6, 6)] if plain else []), axis=1)
        return g.model(g.qdq(g.op("Relu", y) if after else y, out))

    yield "concat equal", lambda: cat(("u8", "u8"), (0.1, 0.1))
    yield "concat different", lambda: cat(("u8", "u8", "u8"), (0.1, 0.2, 0.3))
    yield "concat s8", lambda: cat(("s8", "s8"), (0.1, 0.1), "s8")
    yield "concat types", lambda: cat(("u8", "s8"), (0.1, 0.1))
    yield "concat float", lambda: cat(("u8", "u8"), (0.1, 0.1), plain=True)
    yield "concat relu", lambda: cat(("u8", "u8"), (0.1, 0.1), "u8z", after=True)

    def split(grid: str = "u8", scales: tuple[float, float] = (0.1, 0.1), both: bool = True, opset: int = 17) -> onnx.ModelProto:
        g = Graph(opset)
        a, b = g.op("Split", g.qdq(g.input(1, 4, 6, 6), grid), n=2, axis=1, **({"num_outputs": 2} if opset >= 18 else {}))
        return g.model(g.qdq(a, grid, scales[0]), g.qdq(b, grid, scales[1]) if both else b)

    for grid in GRIDS:
        yield f"split {grid}", lambda grid=grid: split(grid)
    for opset in OPSETS:
        yield f"split opset {opset}", lambda opset=opset: split(opset=opset)
    yield "split different", lambda: split(scales=(0.1, 0.2))
    yield "split half", lambda: split(both=False)


def lone_clips() -> Iterator[Case]:
    for opset in (13, 17, 19, 21, 23):
        for high, scale in ((None, 0.1), (6, 6 / 255), (1000, 0.1)):

            def one(opset: int = opset, high: int | None = high, scale: float = scale) -> onnx.ModelProto:
                g = Graph(opset)
                y = g.op("Tanh", g.input(1, 4))
                y = g.op("Relu", y) if high is None else g.op("Clip", y, g.const(np.float32(0)), g.const(np.float32(high)))
                return g.model(g.qdq(y, "u8z", scale))

            yield f"opset {opset} {high}", one
