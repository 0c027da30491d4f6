"""Small Q/DQ graphs, each with one thing that decides whether ONNX Runtime fuses it; none comes from fxq's own writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def chains() -> Iterator[Case]:
    """Several nodes: who reads whom."""
    cases: dict[str, Callable[[Graph, str], tuple[str, ...]]] = {}

    def one(g: Graph, x: str, grid: str = "u8", seed: int = 0) -> str:
        return str(g.op("Conv", x, g.weight(4, 4, 1, 1, seed=seed)))

    for grid in ("u8", "s8"):

        def fork(g: Graph, x: str, grid: str = grid) -> tuple[str, ...]:
            x = g.qdq(x, grid)
            return (g.qdq(g.op("Add", g.qdq(one(g, x), grid), g.qdq(one(g, x, seed=1), grid)), grid),)

        cases[f"fork {grid}"] = fork

    def tanh_and_conv(g: Graph, x: str) -> tuple[str, ...]:
        x = g.qdq(x)
        return g.op("Tanh", x), g.qdq(one(g, x))

    def pair_is_output(g: Graph, x: str) -> tuple[str, ...]:
        y = g.qdq(one(g, g.qdq(x)))
        return y, g.qdq(one(g, y))

    def two_pairs(g: Graph, x: str) -> tuple[str, ...]:
        return g.qdq(one(g, g.qdq(x))), g.qdq(one(g, g.qdq(x), seed=1))

    def twin_pairs(g: Graph, x: str) -> tuple[str, ...]:
        grid = g.grid("u8", 0.1, True)
        a, b = (g.op("DequantizeLinear", g.op("QuantizeLinear", x, *grid), *grid) for _ in range(2))
        return g.qdq(one(g, a)), g.qdq(one(g, b, seed=1))

    def pairs_in_a_row(g: Graph, x: str) -> tuple[str, ...]:
        return (g.qdq(one(g, g.qdq(g.qdq(x), "u8", 0.2))),)

    def requantized_branch(g: Graph, x: str) -> tuple[str, ...]:
        y = g.qdq(one(g, g.qdq(x)))
        return g.qdq(one(g, y)), g.qdq(one(g, g.qdq(y, "u8", 0.3)))

    def flatten_gemm(g: Graph, x: str, kind: str = "Flatten", q: bool = True) -> tuple[str, ...]:
        y = g.qdq(g.op("GlobalAveragePool", g.qdq(x)))
        y = g.op("Flatten", y) if kind == "Flatten" else g.op("Reshape", y, g.const(ints(1, 4)))
        return (g.op("Gemm", g.qdq(y) if q else y, g.weight(5, 4), g.bias(5), transB=1),)

    def shared_bias(g: Graph, x: str) -> tuple[str, ...]:
        bias = g.bias(4)
        y = g.qdq(g.op("Conv", g.qdq(x), g.weight(4, 4, 1, 1), bias))
        return (g.qdq(g.op("Conv", y, g.weight(4, 4, 1, 1, seed=1), bias)),)

    def batch_norm(g: Graph, x: str) -> tuple[str, ...]:
        return (g.qdq(g.op("BatchNormalization", g.qdq(x), *[g.const(np.full(4, v, np.float32)) for v in (1.0, 0.5, 0.2, 0.7)])),)

    def moves_in_a_row(g: Graph, x: str) -> tuple[str, ...]:
        y = g.op("Reshape", g.op("Transpose", g.qdq(x), perm=[0, 2, 3, 1]), g.const(ints(1, 36, 4)))
        return (g.qdq(g.op("MatMul", g.qdq(g.op("Transpose", y, perm=[0, 2, 1])), g.weight(36, 3, axis=1))),)

    def moved_weight(g: Graph, x: str, channels: bool = True) -> tuple[str, ...]:
        weight = g.op("Squeeze", g.weight(1, 6, 5, axis=2, channels=channels), g.const(ints(0)))
        return (g.qdq(g.op("MatMul", g.qdq(x), weight)),)

    def where(g: Graph, x: str) -> tuple[str, ...]:
        return (g.qdq(g.op("Where", g.const(np.array([True] * 6)), g.qdq(x), g.qdq(g.input(1, 4, 6, 6)))),)

    def q_behind_input(g: Graph, x: str) -> tuple[str, ...]:
        return g.qdq(g.op("Squeeze", x, g.const(ints(0)))), g.op("Tanh", x)

    def plain(g: Graph, x: str) -> tuple[str, ...]:
        y = g.op("Relu", g.op("Conv", x, g.const(np.ones((8, 4, 3, 3), np.float32))))
        return (g.op("Gemm", g.op("Flatten", g.op("GlobalAveragePool", y)), g.const(np.ones((8, 3), np.float32))),)

    for f in (
        tanh_and_conv, pair_is_output, two_pairs, twin_pairs, pairs_in_a_row, requantized_branch, flatten_gemm, shared_bias, batch_norm, moves_in_a_row,
        moved_weight,
        where, q_behind_input, plain,
    ):  # fmt: skip
        cases[f.__name__] = f
    cases["flatten without Q"] = lambda g, x: flatten_gemm(g, x, q=False)
    cases["reshape without Q"] = lambda g, x: flatten_gemm(g, x, "Reshape", q=False)
    cases["moved weight per tensor"] = lambda g, x: moved_weight(g, x, False)
    for name, build in cases.items():

        def model(build: Callable[[Graph, str], tuple[str, ...]] = build) -> onnx.ModelProto:
            g = Graph()
            return g.model(*build(g, g.input(1, 4, 6, 6)))

        yield name, model


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    f.__name__: f
    for f in (
        convs, biases, special_weights, gemms, gemm_readers, matmuls, packed, dynamic, pointwise, movers, readers, binaries, joins, lone_clips, chains,
    )
}  # fmt: skip
