"""Small Q/DQ graphs, each with one thing that decides whether ONNX Runtime fuses it; none comes from fxq's own writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx

from tests.lint_graphs import GRIDS, Case, Graph, ints
from tests.lint_layers import biases, conv, convs, dynamic, gemm, gemm_readers, gemms, matmul, matmuls, packed, special_weights
from tests.lint_values import MOVERS, binaries, binary, joins, lone_clips, movers, pointwise, readers, unary

__all__ = ["GRIDS", "GROUPS", "MOVERS", "Case", "Graph", "binary", "conv", "gemm", "ints", "matmul", "unary"]


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
