"""The linter on low-bit graphs, written by hand: codes that end before 255, signs, weights that constants expand to."""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fxq.lint import agrees, lint, runtime_report
from tests.lint_zoo import Graph, ints

Build = Callable[[Graph, str], tuple[str, ...]]


def ended(g: Graph, x: str, top: int = 115, least: int | None = None, grid: str = "u8", scale: float = 0.1) -> str:
    """Q, Clip of the codes, DQ."""
    kind = np.uint8 if grid[0] == "u" else np.int8
    ends = ["" if least is None else g.const(np.asarray(least, kind)), g.const(np.asarray(top, kind))]
    return g.dq(g.op("Clip", g.q(x, grid, scale), *ends), grid, scale)


def conv(g: Graph, x: str, seed: int = 0, scale: float = 0.1) -> str:
    """``scale``: of its input."""
    return str(g.op("Conv", x, g.weight(4, 4, 3, 3, seed=seed), g.bias(4, scale / 100), pads=[1, 1, 1, 1]))


def sign(g: Graph, x: str) -> str:
    """GreaterOrEqual -> Where -> DQ."""
    two, none = g.const(np.asarray(2, np.uint8)), g.const(np.asarray(0, np.uint8))
    return codes_of_sign(g, str(g.op("Where", g.op("GreaterOrEqual", x, g.const(np.float32(0))), two, none)))


def codes_of_sign(g: Graph, codes: str) -> str:
    return str(g.op("DequantizeLinear", codes, g.const(np.float32(1)), g.const(np.asarray(1, np.uint8))))


def chain(grid: str) -> Build:
    return lambda g, x: (ended(g, conv(g, ended(g, conv(g, g.qdq(x, grid)), grid=grid)), grid=grid),)


def both_ends(g: Graph, x: str) -> tuple[str, ...]:
    return (g.qdq(conv(g, ended(g, conv(g, g.qdq(x)), least=90))),)


def two_readers(g: Graph, x: str) -> tuple[str, ...]:
    y = ended(g, conv(g, g.qdq(x)))
    return g.qdq(conv(g, y, 1)), g.qdq(conv(g, y, 2)), g.op("Tanh", y)


def residual(g: Graph, x: str) -> tuple[str, ...]:
    """An 8-bit stream, which convs read on a narrow grid."""
    y = g.qdq(conv(g, g.qdq(x)))
    for seed in (1, 2):
        y = g.qdq(g.op("Add", g.qdq(conv(g, ended(g, y, scale=0.3), seed, 0.3)), y))
    return (y,)


def twin_grids(g: Graph, x: str) -> tuple[str, ...]:
    y = g.qdq(conv(g, g.qdq(x)))
    return g.qdq(conv(g, ended(g, y, scale=0.3), 1, 0.3)), g.qdq(conv(g, ended(g, y, scale=0.3), 2, 0.3))


def moved(g: Graph, x: str) -> tuple[str, ...]:
    y = g.qdq(g.op("MaxPool", ended(g, conv(g, g.qdq(x))), kernel_shape=[2, 2]))
    return (g.qdq(conv(g, g.qdq(g.op("Transpose", y, perm=[0, 1, 3, 2])))),)


def unclipped_pool(g: Graph, x: str) -> tuple[str, ...]:
    return (ended(g, g.op("MaxPool", ended(g, conv(g, g.qdq(x))), kernel_shape=[2, 2])),)


def onto_another_scale(g: Graph, x: str) -> tuple[str, ...]:
    """Rounded with one scale, read with another."""
    codes = g.op("Clip", g.q(conv(g, g.qdq(x)), scale=0.3), "", g.const(np.asarray(102, np.uint8)))
    return (g.qdq(conv(g, g.dq(codes, scale=1.0), scale=1.0)),)


def codes_are_output(g: Graph, x: str) -> tuple[str, ...]:
    codes = g.op("Clip", g.q(conv(g, g.qdq(x))), "", g.const(np.asarray(102, np.uint8)))
    return g.op("Cast", codes, to=TensorProto.FLOAT), g.qdq(conv(g, g.dq(codes)))


def relu_with_two_grids(g: Graph, x: str) -> tuple[str, ...]:
    y = g.op("Relu", g.op("Conv", x, g.const(np.ones((4, 4, 1, 1), np.float32))))
    return g.qdq(conv(g, ended(g, y, grid="u8z"))), g.qdq(conv(g, g.qdq(y, "u8z")))


def float_signs(g: Graph, x: str) -> tuple[str, ...]:
    return (g.qdq(conv(g, sign(g, conv(g, sign(g, x))), scale=1.0)),)


def sign_pooled(g: Graph, x: str) -> tuple[str, ...]:
    grid = g.const(np.float32(1)), g.const(np.asarray(1, np.uint8))
    pool = g.op("MaxPool", sign(g, x), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return (g.qdq(conv(g, codes_of_sign(g, g.op("QuantizeLinear", pool, *grid)), scale=1.0)),)


def sign_of_codes(g: Graph, x: str) -> tuple[str, ...]:
    """2 (c - z) + 1, saturated; twice, with the constant in a node of its own and shared."""
    codes = g.q(conv(g, g.qdq(x)))
    one = [g.const(np.ones((1, 1, 1, 1), np.uint8)), g.const(np.float32(1)), g.const(np.asarray(0, np.uint8))]
    outs = []
    for seed in (1, 2):
        odd = g.op("Add", g.op("DequantizeLinear", codes, g.const(np.float32(2)), g.const(np.asarray(100, np.uint8))), g.op("DequantizeLinear", *one))
        bits = g.op("QuantizeLinear", odd, g.const(np.float32(1)), g.const(np.asarray(1, np.uint8)))
        outs.append(g.qdq(conv(g, codes_of_sign(g, g.op("Clip", bits, "", g.const(np.asarray(2, np.uint8)))), seed, 1.0)))
    return (*outs, g.qdq(g.op("Add", g.dq(codes), g.qdq(conv(g, g.dq(codes), 3)))))


def sign_of_sum(g: Graph, x: str) -> tuple[str, ...]:
    """Weights of scale 1, a grid of the input's scale."""
    def layer(y: str, scale: float, seed: int) -> str:
        weight = g.const((np.random.default_rng(seed).integers(0, 2, (4, 4, 3, 3)) * 128 - 64).astype(np.int8))
        dq = g.op("DequantizeLinear", weight, g.const(np.float32(1)), g.const(np.asarray(0, np.int8)))
        bias = g.op("DequantizeLinear", g.const(np.arange(1, 9, 2, dtype=np.int32)), g.const(np.float32(scale)))
        bits = g.op("QuantizeLinear", g.op("Conv", y, dq, bias, pads=[1] * 4), g.const(np.float32(scale)), g.const(np.asarray(1, np.uint8)))
        return codes_of_sign(g, g.op("Clip", bits, "", g.const(np.asarray(2, np.uint8))))

    return (g.qdq(conv(g, layer(layer(g.qdq(x), 0.1, 0), 1.0, 1), scale=1.0)),)


def expanded(g: Graph, kind: int, digits: int, n: int, cut: bool = False) -> str:
    """int8 codes [n] by a table; of the last ``cut`` element not all digits."""
    count = -(-n // digits)
    raw = np.random.default_rng(0).integers(0, 16, count).astype(np.uint8)
    packed = helper.make_tensor(g.name("w"), kind, [count], raw.tolist())
    rows = 256 if kind == TensorProto.UINT8 else 16
    table = g.const(np.random.default_rng(1).integers(-127, 128, (rows, digits)).astype(np.int8))
    codes = g.op("Gather", table, g.op("Cast", g.const(packed), to=TensorProto.INT32))
    return str(g.op("Slice", g.op("Reshape", codes, g.const(ints(-1))), g.const(ints(0)), g.const(ints(n))) if cut else codes)


def table_weights(kind: int, digits: int, op: str, cut: bool = False) -> Build:
    def build(g: Graph, x: str) -> tuple[str, ...]:
        shape = (4, 4, 3, 3) if op == "Conv" else (5, 144)
        codes = g.op("Reshape", expanded(g, kind, digits, int(np.prod(shape)), cut), g.const(ints(*shape)))
        weight = g.op("DequantizeLinear", codes, g.const(np.full(shape[0], 0.01, np.float32)), g.const(np.zeros(shape[0], np.int8)), axis=0)
        y = g.qdq(x)
        if op == "Conv":
            return (ended(g, g.op("Conv", y, weight, g.bias(4))),)
        return (g.op("Gemm", g.qdq(g.op("Reshape", y, g.const(ints(1, 144)))), weight, g.bias(5), transB=1),)

    return build


def table_float_weights(op: str) -> Build:
    def build(g: Graph, x: str) -> tuple[str, ...]:
        shape, along = ((4, 4, 3, 3), (4, 1, 1, 1)) if op == "Conv" else ((5, 144), (5, 1))
        codes = g.op("Reshape", expanded(g, TensorProto.UINT8, 8, int(np.prod(shape))), g.const(ints(*shape)))
        weight = g.op("Mul", g.op("Cast", codes, to=TensorProto.FLOAT), g.const(np.full(along, 0.01, np.float32)))
        if op == "Conv":
            return (g.op("Relu", g.op("Conv", x, weight)),)
        return (g.op("Gemm", g.op("Reshape", x, g.const(ints(1, 144))), weight, transB=1),)

    return build


U8, U4 = TensorProto.UINT8, TensorProto.UINT4
CASES: dict[str, Build] = {
    **{f"chain {grid}": chain(grid) for grid in ("u8", "u8z", "s8")},
    **{f.__name__: f for f in (
        both_ends, two_readers, residual, twin_grids, moved, unclipped_pool, onto_another_scale, codes_are_output, relu_with_two_grids, float_signs,
        sign_pooled, sign_of_codes, sign_of_sum,
    )},
    **{f"table {op} {digits}{' cut' if cut else ''}": table_weights(kind, digits, op, cut)
       for op in ("Conv", "Gemm") for kind, digits, cut in ((U8, 8, False), (U8, 5, True), (U4, 4, False), (U8, 2, False), (U4, 1, False))},
    **{f"float table {op}": table_float_weights(op) for op in ("Conv", "Gemm")},
}  # fmt: skip


def models(build: Build) -> Iterator[onnx.ModelProto]:
    for opset in (21, 23):
        g = Graph(opset)
        yield g.model(*build(g, g.input(1, 4, 6, 6)))


@pytest.mark.parametrize("name", CASES)
def test_prediction_agrees_with_the_runtime(name: str) -> None:
    for model in models(CASES[name]):
        assert agrees(lint(model), runtime_report(model)) == []


@pytest.mark.parametrize(("name", "floats"), [
    ("chain u8", {}), ("residual", {}), ("sign_of_codes", {}), ("sign_of_sum", {}), ("moved", {}), ("onto_another_scale", {}),
    ("float_signs", {"GreaterOrEqual": 2, "Where": 2, "Conv": 1}), ("two_readers", {"Tanh": 1}), ("table Conv 5 cut", {}),
    ("float table Conv", {"Conv": 1, "Relu": 1}),
])  # fmt: skip
def test_what_runs_in_float(name: str, floats: dict[str, int]) -> None:
    report = lint(next(models(CASES[name])))
    assert {op: n for op, (_, n) in report.counts().items() if n} == floats
    assert all(o.why for o in report.ops if o.runs == "float")
