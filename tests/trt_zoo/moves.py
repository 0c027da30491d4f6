"""One operator between a DequantizeLinear and the convolution or product that reads it, on the side of the activations and of the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.trt_zoo.net import CONV, F16, F32, FP8, I4, I64, WIDE, Act, Case, Net, Weight, act, case, conv, f32, ints, moved, plain, product, weight


def between(then: Act, **attrs: Any) -> Any:
    return conv(act(then=then), **attrs)


def behind(then: Act, *shape: int, axis: int | None = 0) -> Any:
    return conv(w=weight(*(shape or CONV), axis=axis, then=then))


def chain(*steps: Act) -> Act:
    def build(g: Net, y: str) -> str:
        for step in steps:
            y = step(g, y)
        return y

    return build


def join(op: str, other: Act, **attrs: Any) -> Act:
    """The value and another one of the same size together."""
    return lambda g, y: str(g.op(op, y, other(g, "x"), **attrs))


def where(scale: float) -> Act:
    return lambda g, y: str(g.op("Where", g.op("Greater", "x", g.const(f32(0))), y, g.qdq(g.op("Relu", "x"), scale)))


def split(g: Net, y: str) -> str:
    return str(g.op("Concat", *g.op("Split", y, n=2, axis=2, num_outputs=2), axis=3))


def concat_weights(axis: int | None, along: int) -> Weight:
    half = (8, 16, 3, 3) if along == 0 else (16, 8, 3, 3)
    return lambda g: str(g.op("Concat", *(weight(*half, axis=axis)(g) for _ in range(2)), axis=along))


def before(op: str, *consts: Any, dtype: int = I4, shape: tuple[int, ...] = WIDE, **attrs: Any) -> Any:
    """An operator between quantized weights and their DequantizeLinear."""
    return product(plain, opset=21, w=weight(*shape, axis=None, dtype=dtype, before=moved(op, *consts, **attrs)))


def zeros(dtype: Any = np.float32) -> np.ndarray:
    return np.zeros((1, 16, 2, 8), dtype)


RELU = moved("Relu")
POOL = moved("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
TURN = moved("Transpose", perm=[0, 1, 3, 2])
SHUFFLE = chain(moved("Reshape", ints(1, 4, 4, 8, 8)), moved("Transpose", perm=[0, 2, 1, 3, 4]), moved("Reshape", ints(1, 16, 8, 8)))
SIDES = ints(0, 0, 1, 1, 0, 0, 1, 1)

PASS: dict[str, Act] = {
    "Identity": moved("Identity"), "Dropout": moved("Dropout"), "MaxPool": POOL, "GlobalMaxPool": moved("GlobalMaxPool"), "Transpose": TURN, "shuffle": SHUFFLE,
    "Reshape": moved("Reshape", ints(1, 16, -1, 16)), "Slice": moved("Slice", ints(0), ints(8), ints(2), ints(2)), "Split": split,
    "Pad with 0": moved("Pad", SIDES, f32(0)), "Pad with nothing": moved("Pad", SIDES), "Pad reflecting": moved("Pad", SIDES, mode="reflect"),
    "Gather": moved("Gather", ints(*range(15, -1, -1)), axis=1), "Expand": moved("Expand", ints(2, 16, 8, 8)), "Tile": moved("Tile", ints(1, 1, 2, 1)),
    "GatherElements": moved("GatherElements", np.zeros((1, 16, 8, 8), np.int64), axis=3), "Einsum transpose": moved("Einsum", equation="abcd->abdc"),
    "DepthToSpace": chain(moved("DepthToSpace", blocksize=2), moved("SpaceToDepth", blocksize=2)), "TopK": moved("TopK", ints(4), n=2, axis=2),
    "Squeeze and Unsqueeze": chain(moved("Squeeze", ints(0)), moved("Unsqueeze", ints(0))),
    "Flatten": chain(moved("Flatten"), moved("Reshape", ints(1, 16, 8, 8))),
    "Cast to float": moved("Cast", to=F32), "Mul by a number": moved("Mul", f32(2)), "Div by a number": moved("Div", f32([2])), "Neg": moved("Neg"),
    "Abs": moved("Abs"), "ReduceMax": moved("ReduceMax", ints(2), keepdims=1), "Concat of one scale": join("Concat", act(), axis=2),
    "Concat with constant codes": lambda g, y: str(g.op("Concat", y, g.dq(g.const(zeros(np.int8))), axis=2)), "Max of one scale": join("Max", act()),
    "Where of one scale": where(0.02), "pool and transpose": chain(POOL, TURN), "Q/DQ of another scale": act(0.03),
    "Resize in Q/DQ": lambda g, y: g.qdq(g.op("Resize", y, "", g.const(f32([1, 1, 2, 2])), mode="nearest")),
}  # fmt: skip
"""TensorRT moves a DequantizeLinear through these."""

STOP: dict[str, Act] = {
    "Relu": RELU, "Clip": moved("Clip", f32(0), f32(6)), "Relu and MaxPool": chain(RELU, POOL), "MaxPool and Relu": chain(POOL, RELU),
    "LeakyRelu": moved("LeakyRelu"),
    "AveragePool": moved("AveragePool", kernel_shape=[2, 2]), "GlobalAveragePool": moved("GlobalAveragePool"),
    "Resize": moved("Resize", None, f32([1, 1, 2, 2]), mode="nearest"), "Pad with 1": moved("Pad", SIDES, f32(1)), "Add": join("Add", act()),
    "Mul per channel": moved("Mul", np.full((1, 16, 1, 1), 2, np.float32)),
    "Mul at run time": lambda g, y: str(g.op("Mul", y, g.op("ReduceMax", "x", keepdims=0))),
    "Concat of two scales": join("Concat", act(0.03), axis=2), "Concat with float": join("Concat", RELU, axis=2), "Max of two scales": join("Max", act(0.03)),
    "Where of two scales": where(0.03), "Cast to half and back": chain(moved("Cast", to=F16), moved("Cast", to=F32)),
    "Cast to integer": chain(moved("Cast", to=I64), moved("Cast", to=F32)), "ReduceMean": moved("ReduceMean", ints(2), keepdims=1),
    "CumSum": moved("CumSum", np.array(2)),
    "Sub": moved("Sub", f32(1)),
}  # fmt: skip
"""It does not move one through these: the convolution behind them runs in float."""
POOLS = {"AveragePool": "between average-pool"}

TO_CONV = moved("Reshape", ints(*CONV))
NEGATED, LARGER = moved("Neg"), np.random.default_rng(1).uniform(0.5, 1, (16, 1, 1, 1)).astype(np.float32)

CASES: dict[str, Case] = {
    **{f"through {name}": case(between(step, pads=[1] * 4)) for name, step in PASS.items()},
    **{f"stopped by {name}": case(between(step), POOLS.get(name, "between")) for name, step in STOP.items()},
    # behind the DequantizeLinear of weights
    "weights, Reshape": case(behind(TO_CONV, 16, 144)), "weights, Reshape keeps the axis": case(behind(TO_CONV, 1, 16, 144, axis=1)),
    "weights, Reshape cuts the axis": case(behind(TO_CONV, 256, 9), "between"), "weights, Reshape per tensor": case(behind(TO_CONV, 256, 9, axis=None)),
    "weights, Transpose": case(behind(moved("Transpose", perm=[1, 0, 2, 3]), axis=1)),
    "weights, Transpose away": case(behind(moved("Transpose", perm=[1, 0, 2, 3])), "weight-axis"),
    "weights, Unsqueeze": case(conv(w=weight(16, 16, then=moved("Unsqueeze", ints(2, 3))), pads=[0] * 4)), "weights, Cast": case(behind(moved("Cast", to=F32))),
    "weights, Mul by a number": case(behind(moved("Mul", f32(1.1)))), "weights, Mul per channel": case(behind(moved("Mul", LARGER))),
    "weights, Mul per input": case(behind(moved("Mul", LARGER.reshape(1, 16, 1, 1))), "between"), "weights, Add": case(behind(moved("Add", LARGER)), "between"),
    "weights, Neg per channel": case(behind(NEGATED), "between"), "weights, Neg": case(behind(NEGATED, axis=None)),
    "weights, Gather per channel": case(behind(moved("Gather", ints(*range(16)), axis=0)), "between"),
    "weights, Slice": case(behind(moved("Slice", ints(0), ints(16), ints(0)), 32, 16, 3, 3)),
    "weights, Tile": case(behind(moved("Tile", ints(1, 2, 1, 1)), 16, 8, 3, 3)),
    "weights, Pad": case(behind(moved("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1)), 16, 16, 1, 1), "between"),
    "weights, empty Pad": case(behind(moved("Pad", ints(*[0] * 8)))),
    "weights, Concat": case(conv(w=concat_weights(0, 0)), "joined-weights"),
    "weights, Concat per tensor": case(conv(w=concat_weights(None, 0)), "joined-weights"),
    "weights, Concat of inputs": case(conv(w=concat_weights(0, 1)), "joined-weights"),
    "weights, matmul Reshape cuts the axis": case(product(w=weight(64, 2, 16, axis=1, then=moved("Reshape", ints(64, 32)))), "between"),
    # before it
    **{f"codes, {op}": case(conv(w=weight(*CONV, before=moved(op, *more, **attrs))), "constant")
       for op, more, attrs in (("Identity", (), {}), ("Reshape", (ints(*CONV),), {}), ("Transpose", (), {"perm": [0, 1, 3, 2]}))},
    "INT4 codes, Transpose": case(before("Transpose", perm=[1, 0], shape=(32, 64)), "constant int4-float"),
    "FP8 codes, Concat": case(before("Concat", dtype=FP8, axis=0), "constant weight-only", "sm89"),
}  # fmt: skip
