"""Repairs for TensorRT: the outputs stay equal bit for bit in ONNX Runtime without optimizations, and the lint is content afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from fxq.backends.onnxruntime import run, session
from fxq.errors import ArtifactError, TargetError
from fxq.lint_trt import check
from fxq.lint_trt_edit import initializer
from fxq.lint_trt_fix import fix
from tests.trt_zoo.net import CONV, F16, I8, I32, U8, WIDE, Net, act, conv, f32, fake, moved, plain, product, single, weight
from tests.trt_zoo.zoo import ALL

KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64,
         "tensor(int32)": np.int32, "tensor(bool)": np.bool_}  # fmt: skip


def outputs(model: onnx.ModelProto) -> list[np.ndarray[Any, Any]] | None:
    """What ONNX Runtime computes on fixed inputs; ``None`` when it refuses the model."""
    random = np.random.default_rng(0)
    feed = {}
    try:
        opened = session(model.SerializeToString(), "off")
        for value in opened.get_inputs():
            kind, sizes = KINDS[value.type], [n if isinstance(n, int) else 4 for n in value.shape]
            reals = random.normal(0, 1.5, sizes) if np.issubdtype(kind, np.floating) else random.integers(0, 4, sizes)
            feed[value.name] = np.asarray(reals).astype(kind)
        return run(opened, feed)
    except ArtifactError:
        return None


def same(a: onnx.ModelProto, b: onnx.ModelProto) -> bool:
    """Equal outputs, bit for bit; also when ONNX Runtime refused the first model and takes the second."""
    first, second = outputs(a), outputs(b)
    return first is None or second is not None and all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(first, second, strict=True))


def codes(model: onnx.ModelProto) -> set[str]:
    return {f.code for f in check(model, "sm86").findings}


def dead_channels() -> onnx.ModelProto:
    g = Net()
    w, s = np.ones(CONV, np.int8), np.full(16, 0.01, np.float32)
    w[[2, 7]], s[[2, 7]] = 0, 0
    a = g.qdq(g.input(1, 16, 8, 8))
    return g.model(g.op("Conv", a, g.dq(g.const(w), s, axis=0), pads=[1] * 4, name="conv"))


def dead_tensor() -> onnx.ModelProto:
    g = Net()
    return g.model(g.op("MatMul", g.qdq(g.input(4, 64)), g.dq(g.const(np.zeros(WIDE, np.int8)), 0.0), name="mm"))


def small_codes(zero: Any, low: int, high: int, dtype: int = U8) -> Any:
    """Weights whose codes lie in a range."""

    def make() -> onnx.ModelProto:
        g = Net()
        kind = {U8: np.uint8, I8: np.int8}[dtype]
        w = g.const(g.random.integers(low, high + 1, CONV).astype(kind))
        scale = f32(np.linspace(0.01, 0.02, 16)) if np.ndim(zero) else f32(0.01)
        w = g.op("DequantizeLinear", w, g.const(scale), *([] if zero is None else [g.const(np.asarray(zero, kind))]), **({"axis": 0} if np.ndim(zero) else {}))
        return g.model(g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), w, pads=[1] * 4, name="conv"))

    return make


def bounded(first: str, *consts: Any, zero: int | None = 0, scale: float = 1 / 127, **attrs: Any) -> Any:
    """uint8 codes of a value that an operator keeps in a range."""
    return single(moved(first, *consts, **attrs), act(scale, U8, zero), x=(4, 64))


def unsigned_codes_through(op: str, *consts: Any, **attrs: Any) -> Any:
    """uint8 codes with the zero point 128 that an operator moves."""
    step = moved(op, *consts, **attrs)
    return conv(lambda g, x: g.dq(step(g, g.q(x, 0.02, U8, 128)), 0.02, U8, 128))


def unsigned_leaves() -> onnx.ModelProto:
    g = Net()
    q = g.q(g.input(1, 16, 8, 8), 0.02, U8, 128)
    model = g.model(g.op("Conv", g.dq(q, 0.02, U8, 128), weight(*CONV)(g), pads=[1] * 4, name="conv"), q)
    model.graph.output[1].type.tensor_type.elem_type = U8
    return model


def biased(dtype: Any, zero: bool) -> Any:
    def bias(g: Net) -> str:
        inputs = [np.arange(-8, 8, dtype=np.int32) * 100003, np.full(16, 0.00123, dtype), *([np.zeros(16, np.int32)] if zero else [])]
        return str(g.op("DequantizeLinear", *map(g.const, inputs), axis=0))

    return conv(bias=bias) if dtype == np.float32 else conv(act(kind=F16), weight(*CONV, kind=F16), bias=bias, dtype=F16)


def value_info_of_codes() -> onnx.ModelProto:
    """The file says that the codes are uint8."""
    return onnx.shape_inference.infer_shapes(ALL["cnn uint8, 128"].make())


REPAIRED: dict[str, Any] = {
    **{name: ALL[name].make for name in (
        "cnn int32 bias", "cnn uint8, 128", "codes, Identity", "codes, Reshape", "codes, Transpose", "scale [1]", "scale [1], zero point of rank 0",
        "scale [1] of DQ only", "scale [1] for one channel", "per channel, all alike", "weights all alike on axis 1", "uint8 weights, 128",
        "scale by ReduceMax", "zero point by ConstantOfShape", "function called twice", "if of one name",
        # ONNX Runtime refuses these, so that only the lint can say
        "too many zero points", "too few zero points", "all of one name", "weights axis not written, 8 of 16",
    )},
    "dead channels": dead_channels, "dead tensor": dead_tensor, "uint8 weights without zero point, small": small_codes(None, 0, 127),
    "uint8 weights, small": small_codes(0, 0, 127), "uint8 weights, zero point 100": small_codes(100, 0, 227),
    "int8 weights, zero point 5": small_codes(5, -100, 100, I8), "uint8 weights, zero points per channel": small_codes(range(120, 136), 20, 230),
    "sigmoid": bounded("Sigmoid"), "softmax": bounded("Softmax", axis=-1), "sigmoid, no zero point": bounded("Sigmoid", zero=None),
    "clip": bounded("Clip", f32(0), f32(6), scale=6 / 127), "codes through Reshape": unsigned_codes_through("Reshape", np.array([1, 16, 4, 16])),
    "codes through Transpose": unsigned_codes_through("Transpose", perm=[0, 1, 3, 2]), "value_info of codes": value_info_of_codes,
    "bias without zero point": biased(np.float32, False), "bias fp16": biased(np.float16, True),
    "float weights per channel, all alike": conv(w=fake(*CONV, axis=1, scale=np.full(16, 0.003))),
    "blocks all alike": product(opset=21, w=weight(*WIDE, block=32, scale=np.full((2, 32), 0.02))),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRED)
def test_repaired_and_equal(name: str) -> None:
    model = REPAIRED[name]()
    before = model.SerializeToString()
    fixed, notes = fix(model, "sm86")
    assert codes(model) and codes(fixed) == set()
    assert notes and not any(n.startswith("not repaired") for n in notes)
    assert same(model, fixed)
    assert model.SerializeToString() == before
    assert outputs(fixed) is not None


@pytest.mark.parametrize("name", ["two pairs of one grid", "scale [1] of a product", "per channel Q only"])
def test_repairs_of_what_the_lint_lets_through(name: str) -> None:
    model = ALL[name].make()
    fixed, notes = fix(model)
    assert notes and same(model, fixed) and len(fixed.graph.node) <= len(model.graph.node)
    assert name != "two pairs of one grid" or len(fixed.graph.node) == len(model.graph.node) - 1


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (ALL["cnn uint8, 0"].make, "values above 127 steps cannot be excluded"),
        (ALL["no zero point"].make, "values above 127 steps cannot be excluded"),
        (bounded("Sigmoid", scale=1 / 255), "values above 127 steps cannot be excluded"),
        (bounded("Clip", f32(-1), f32(1)), "values above 127 steps cannot be excluded"),
        (single(act(0.03, U8, 100)), "a zero point of 100 has no symmetric form"),
        (unsigned_leaves, "its codes are read by others than DequantizeLinear, or leave the graph"),
        (unsigned_codes_through("MaxPool", kernel_shape=[1, 1]), "its codes are read by others than DequantizeLinear"),
        (ALL["cnn weight zero point 3"].make, "its codes less the zero point do not fit int8"),
        (ALL["uint8 weights, 0"].make, "its codes less the zero point do not fit int8"),
        (ALL["weight scale 0"].make, "its scale is 0 in a channel whose codes are not"),
        (ALL["scale by Pow"].make, "its scale is computed with rounding that differs between runtimes"),
        (conv(w=weight(16, 16, 3, 3, dtype=I8, scale=np.linspace(0.01, 0.02, 5), written=False)), "5 scales fit none of its axes"),
        (conv(plain, w=lambda g: g.dq(g.const(np.ones(CONV, np.int32)), 0.02, I32)), "int32 codes that are not constant, no bias"),
    ],
)  # fmt: skip
def test_left_with_a_reason(make: Any, why: str) -> None:
    model = make()
    fixed, notes = fix(model)
    assert fixed is model
    assert [n for n in notes if n.startswith("not repaired: ") and why in n]
    assert codes(model)


@pytest.mark.parametrize("group", range(4))
def test_the_whole_zoo_stays_equal_and_gets_no_worse(group: int) -> None:
    for name in [*ALL][group::4]:
        model = ALL[name].make()
        fixed, notes = fix(model, ALL[name].target)
        assert (fixed is model) == (not [n for n in notes if not n.startswith("not repaired")]), name
        assert len(check(fixed, ALL[name].target).findings) <= len(check(model, ALL[name].target).findings), name
        assert fixed is model or same(model, fixed), name
        again, more = fix(fixed, ALL[name].target)
        assert again is fixed and all(n.startswith("not repaired") for n in more), name


def test_round_trips_that_are_not_exact_stay() -> None:
    for scale, kind in ((0.02, TensorProto.BFLOAT16), (1e-6, F16), (3e-38, None), (1e37, None)):
        model = single(act(scale, kind=kind), act(scale, kind=kind), dtype=kind or 1, opset=21)()
        dropped = any("has the same grid" in n for n in fix(model)[1])
        assert dropped == (scale == 3e-38), (scale, kind)
    assert fix(single(act(0.02), act(0.03))())[1] == []


def test_constants_without_readers_go_and_others_stay() -> None:
    model = ALL["scale by ReduceMax"].make()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "nobody"))
    fixed, _ = fix(model)
    assert "ReduceMax" not in {n.op_type for n in fixed.graph.node}
    names = [t.name for t in fixed.graph.initializer]
    assert "nobody" in names and len(names) == len(set(names))
    read = {i for n in fixed.graph.node for i in n.input}
    assert set(names) - read == {"nobody"}


def test_a_subgraph_keeps_what_it_reads_from_outside() -> None:
    model = ALL["if around"].make()
    model.graph.node[-1].attribute[0].g.node[0].input[0] = "x"
    fixed, notes = fix(model)
    assert fixed is model and notes == []


def test_notes_say_what_was_done() -> None:
    assert fix(ALL["cnn int32 bias"].make())[1] == ["DequantizeLinear18: int32 bias written in float"]
    assert fix(ALL["codes, Transpose"].make())[1] == ["DequantizeLinear15: Transpose Transpose11 before it folded into the constant"]
    assert fix(ALL["function called twice"].make())[1] == ["local functions put in place of their calls"]
    assert "axis 0 written, the only one with 8 channels; the file was not legal without" in fix(ALL["weights axis not written, 8 of 16"].make())[1][0]


def test_unknown_target() -> None:
    with pytest.raises(TargetError, match="did you mean 'tensorrt'"):
        fix(ALL["matmul"].make(), "tensort")


def test_initializers_of_types_that_numpy_lacks() -> None:
    tensor = initializer(np.array([[1, -2], [3, 4]]), "w", TensorProto.INT4)
    assert tensor.data_type == TensorProto.INT4
    assert numpy_helper.to_array(tensor).astype(np.int64).tolist() == [[1, -2], [3, 4]]


def test_an_unwritten_axis_is_guessed_only_where_it_is_the_channels() -> None:
    """64 scales of 64 x 32 weights fit axis 0 only, which is not that of the output channels of a MatMul."""
    model = product(w=weight(*WIDE, scale=np.linspace(0.01, 0.02, 64), written=False))()
    fixed, notes = fix(model)
    assert fixed is model and "or not the output channels" in notes[0]


def test_types_that_tensorrt_lacks_are_not_written_again() -> None:
    for make in (conv(act([0.02], TensorProto.INT16)), single(lambda g, x: g.dq(g.op("Squeeze", g.const(np.ones((1, 4), np.int16))), 0.02, TensorProto.INT16))):
        model = make()
        assert len(check(fix(model)[0]).findings) <= len(check(model).findings)


def test_gather_of_indices_stays() -> None:
    """An int64 constant is no code."""
    g = Net()
    y = g.op("Gather", g.input(4, 64), g.const(np.array([0, 1], np.int64)))
    assert fix(g.model(y))[1] == []
