"""The affine grid: golden vectors, properties, and codes against ONNX Runtime's QuantizeLinear."""

import functools

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from fxq import numerics
from fxq.errors import CalibrationError
from fxq.spec import QParams, QuantSpec

U8, S8, S8N = (QuantSpec.parse(t) for t in ("u8/pt", "s8/pt", "s8n/pt"))
SPECS = [QuantSpec.parse(t) for t in ("u8/pt", "u8y/pt", "s8/pt", "s8n/pt", "s8a/pt", "s4n/pt", "s4/pt", "u4/pt", "u2/pt", "s16/pt")]
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
quick = settings(max_examples=200, deadline=None, derandomize=True)


def grid(spec: QuantSpec, s: float, z: int = 0) -> QParams:
    return QParams(spec, torch.tensor(s, dtype=torch.float32), torch.tensor(z, dtype=torch.int32))


def f32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def choose(lo: float, hi: float, spec: QuantSpec) -> QParams:
    return numerics.choose_qparams(torch.tensor(lo, dtype=torch.float32), torch.tensor(hi, dtype=torch.float32), spec)


# ---------------------------------------------------------------- golden vectors


@pytest.mark.parametrize(("lo", "hi", "x", "codes", "zero"), [
    (-1, 4, [-1, 0, 1, 4], [0, 51, 102, 255], 51), (2, 4, [0, 2, 4], [0, 127, 255], 0), (-4, -2, [-4, -2, 0], [0, 128, 255], 255),
])  # fmt: skip
def test_unsigned_vectors(lo: float, hi: float, x: list[float], codes: list[int], zero: int) -> None:
    qp = choose(lo, hi, U8)
    assert numerics.quantize(f32(*x), qp).tolist() == codes and int(qp.zero_point) == zero
    assert float(qp.scale) == np.float32(max(hi, 0) - min(lo, 0)) / np.float32(255)


def test_an_activation_range_of_the_call() -> None:
    for x, codes, zero in (([-1, 0, 1, 4], [0, 51, 102, 255], 51), ([2, 4], [127, 255], 0), ([0, 0], [0, 0], 0)):
        t = f32(*x)
        qp = numerics.choose_qparams(t.amin(), t.amax(), U8)
        assert numerics.quantize(t, qp).tolist() == codes and int(qp.zero_point) == zero
    assert float(qp.scale) == 1.0


def test_a_range_from_zero_keeps_all_bits_of_an_unsigned_symmetric_grid() -> None:
    qp = choose(0, 6, QuantSpec.parse("u8y/pt"))
    assert float(qp.scale) == np.float32(6) / np.float32(255) and int(qp.zero_point) == 0
    assert numerics.quantize(f32(0, 3, 6), qp).tolist() == [0, 128, 255]


def test_round_half_to_even_then_zero_point() -> None:
    assert numerics.quantize(f32(0.5, 1.5, 2.5), grid(U8, 1.0, 1)).tolist() == [1, 3, 3]
    assert numerics.quantize(f32(-127, 62.5, 63.5, -0.5, 0.49999997), grid(S8N, 1.0)).tolist() == [-127, 62, 64, 0, 0]


def test_narrow_per_channel() -> None:
    w = torch.tensor([[1, -2], [0.5, 0.25]])
    qp = numerics.choose_qparams(w.amin(1), w.amax(1), QuantSpec.parse("s8n/pc0"))
    assert numerics.quantize(w, qp).tolist() == [[64, -127], [127, 64]]
    assert torch.equal(qp.scale, f32(2, 0.5) / 127)


def test_four_bits_in_blocks() -> None:
    w = f32(7, -3.5, 1, 0, 14, 2, -14, 1).reshape(2, 4)
    qp = numerics.choose_qparams(w.amin(1), w.amax(1), QuantSpec.parse("s4n/pc0"))
    assert qp.scale.tolist() == [1, 2] and numerics.quantize(w, qp).tolist() == [[7, -4, 1, 0], [7, 1, -7, 0]]


def test_gradient_mask_includes_the_bounds() -> None:
    x = torch.tensor([-4.5, -4.25, -4, 0.25, 0.75, 3.5, 3.7, 3.75], requires_grad=True)
    y = numerics.fake_quantize(x, grid(QuantSpec.parse("s4/pt"), 0.5))
    y.sum().backward()
    assert (y / 0.5).tolist() == [-8, -8, -8, 0, 2, 7, 7, 7]
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_gradient_carries_the_upstream_one_and_none_to_scale_and_zero_point() -> None:
    x, g = f32(-1, 0.3, 9).requires_grad_(), f32(2, -3, 5)
    scale = torch.tensor(0.1, requires_grad=True)
    y = numerics._FakeQuantize.apply(x, scale, torch.tensor(20, dtype=torch.int32), 0, 255)
    y.backward(g)  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.tolist() == [2, -3, 5] and scale.grad is None


def test_gradient_keeps_the_dtype_of_half_precision() -> None:
    x = torch.tensor([0.3, 90.0], dtype=torch.bfloat16, requires_grad=True)
    y = numerics.fake_quantize(x, grid(U8, 0.1))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.tolist() == [1, 0]


# ---------------------------------------------------------------- grids


def test_a_constant_zero_and_a_dead_channel() -> None:
    assert float(choose(0, 0, U8).scale) == 1.0
    w = f32(0, 2, 1)
    assert torch.equal(numerics.choose_qparams(-w, w, QuantSpec.parse("s8n/pc0")).scale, f32(2, 2, 1) / 127)
    assert torch.equal(numerics.choose_qparams(f32(0, 0), f32(0, 0), QuantSpec.parse("s8n/pc0")).scale, f32(1, 1))
    assert float(choose(-1e-42, 1e-42, S8).scale) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    for lo, hi in ((bad, 1.0), (0.0, bad)):
        with pytest.raises(CalibrationError, match="NaN or infinity"):
            choose(lo, hi, U8)


def test_a_range_wider_than_float32_can_subtract() -> None:
    top = torch.finfo(torch.float32).max
    qp = choose(-top, top, U8)
    assert float(qp.scale) == pytest.approx(2 * top / 255) and int(qp.zero_point) == 128
    lo, hi = f32(-top, -1), f32(top, 4)
    both = numerics.choose_qparams(lo, hi, QuantSpec.parse("s8a/pc0"))
    assert float(both.scale[1]) == float(choose(-1, 4, QuantSpec.parse("s8a/pt")).scale)  # the other channel is not touched


@given(st.sampled_from(SPECS), finite, finite)
@quick
def test_every_range_gives_a_legal_grid_with_zero_on_it(spec: QuantSpec, a: float, b: float) -> None:
    qp = choose(min(a, b), max(a, b), spec)  # QParams refuses a scale that is denormal, and a zero point outside the codes
    assert int(numerics.quantize(torch.tensor(0.0), qp)) == int(qp.zero_point)
    assert float(numerics.fake_quantize(torch.tensor(0.0), qp)) == 0.0


@given(st.sampled_from(SPECS), st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32), st.floats(0, 1))
@quick
def test_error_inside_the_range_is_at_most_one_step(spec: QuantSpec, a: float, b: float, t: float) -> None:
    lo, hi = min(a, b, 0.0), max(a, b, 0.0)
    qp = choose(lo, hi, spec)
    lo = 0.0 if spec.symmetric and spec.qmin == 0 else lo
    x = torch.tensor(lo + t * (hi - lo), dtype=torch.float32)
    # Rounding the zero point moves the grid by up to half a step, so that an end may be cut by as much.
    assert abs(float(numerics.fake_quantize(x, qp)) - float(x)) <= 1.001 * float(qp.scale)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=5))
@quick
def test_channels_are_independent_unless_dead(ranges: list[tuple[float, float]]) -> None:
    lo, hi = (f32(*v) for v in zip(*[(min(r), max(r)) for r in ranges], strict=True))
    qp = numerics.choose_qparams(lo, hi, QuantSpec.parse("s8n/pc0"))
    for i, (a, b) in enumerate(zip(lo, hi, strict=True)):
        if max(-float(a), float(b)) / 127 >= torch.finfo(torch.float32).tiny:
            assert float(qp.scale[i]) == float(numerics.choose_qparams(a, b, S8N).scale)


@given(st.sampled_from(SPECS), st.floats(2**-20, 2**10, width=32), st.data())
@quick
def test_codes_survive_the_way_to_reals_and_back(spec: QuantSpec, scale: float, data: st.DataObject) -> None:
    zero = 0 if spec.symmetric else data.draw(st.integers(spec.qmin, spec.qmax))
    qp = grid(spec, scale, zero)
    codes = torch.arange(spec.qmin, spec.qmax + 1).to(spec.dtype)
    assert torch.equal(numerics.quantize(numerics.dequantize(codes, qp), qp), codes)
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 100 * scale
    assert torch.equal(numerics.fake_quantize(x, qp), numerics.dequantize(numerics.quantize(x, qp), qp))


# ---------------------------------------------------------------- bias


def test_bias_grid_and_codes() -> None:
    a, w = grid(U8, 0.5, 3), QParams(QuantSpec.parse("s8n/pc0"), f32(0.25, 0.125), torch.zeros(2, dtype=torch.int32))
    qp = numerics.bias_qparams(a, w)
    assert str(qp.spec) == "s32n/pc0" and qp.scale.tolist() == [0.125, 0.0625] and qp.zero_point.tolist() == [0, 0]
    codes = numerics.quantize_bias(f32(0.1875, -1), qp)
    assert codes.dtype == torch.int32 and codes.tolist() == [2, -16]  # 1.5 rounds to even
    assert str(numerics.bias_qparams(a, grid(S8N, 0.25)).spec) == "s32n/pt"


def test_bias_codes_are_rounded_in_double_precision_and_saturate() -> None:
    qp = grid(QuantSpec(32, True, True, True), 1.0)
    assert numerics.quantize_bias(f32(2**25 + 4, 2**33, -(2.0**33)), qp).tolist() == [2**25 + 4, numerics.INT32_MAX, -numerics.INT32_MAX]
    third = grid(QuantSpec(32, True, True, True), 1 / 3)
    assert numerics.quantize_bias(f32(1e8), third).tolist() == [round(1e8 / float(third.scale))]


def test_weight_scales_grow_where_the_bias_would_overflow() -> None:
    a, w = grid(U8, 1e-6), QParams(QuantSpec.parse("s8n/pc0"), f32(1e-6, 1e-6), torch.zeros(2, dtype=torch.int32))
    wide = numerics.widen_for_bias(w, f32(1e-3, 10.0), a)
    assert float(wide.scale[0]) == float(w.scale[0]) and float(wide.scale[1]) > 1e-3
    codes = numerics.quantize_bias(f32(1e-3, 10.0), numerics.bias_qparams(a, wide))
    assert 0 < int(codes[1]) <= 2**30 + 200 and int(codes[1]) > 2**29
    assert numerics.widen_for_bias(w, f32(1e-3, 1e-3), a) is w
    assert float(numerics.widen_for_bias(grid(S8N, 1e-6), f32(1e-3, 10.0), a).scale) > 1e-3


def test_requantize_clips_before_rounding_and_adds_the_zero_point_last() -> None:
    real = np.array([-300, -2.5, -0.5, 0.5, 1.5, 300], np.float32)
    assert numerics.requantize(real, U8, 3).tolist() == [0, 1, 3, 3, 5, 255]
    assert numerics.requantize(real, S8, -3).tolist() == [-128, -5, -3, -3, -1, 127]
    assert numerics.requantize(real, S8N, 0).tolist()[0] == -127


# ---------------------------------------------------------------- against the runtime


@functools.cache
def _runtime(kind: int) -> ort.InferenceSession:
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])],
        "g",
        [helper.make_tensor_value_info(n, t, d) for n, t, d in (("x", TensorProto.FLOAT, ["n"]), ("s", TensorProto.FLOAT, []), ("z", kind, []))],
        [helper.make_tensor_value_info("y", kind, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def runtime_codes(x: Tensor, qp: QParams) -> Tensor:
    kind = TensorProto.INT8 if qp.spec.signed else TensorProto.UINT8
    feed = {"x": x.numpy(), "s": qp.scale.numpy(), "z": qp.zero_point.to(qp.spec.dtype).numpy()}
    codes: Tensor = torch.from_numpy(_runtime(kind).run(None, feed)[0])
    return codes


@given(
    st.sampled_from([U8, S8]), st.floats(2**-100, 2**60, width=32), st.integers(0, 255),
    st.lists(st.integers(-300, 300), max_size=20), st.lists(finite, max_size=20),
)  # fmt: skip
@settings(max_examples=300, deadline=None, derandomize=True)
def test_codes_equal_quantize_linear(spec: QuantSpec, scale: float, z: int, halves: list[int], values: list[float]) -> None:
    qp = grid(spec, scale, z + spec.qmin)
    ties = (torch.tensor(halves, dtype=torch.float32) + 0.5) * scale
    x = torch.cat([ties, torch.nextafter(ties, ties + 1), f32(*values), f32(0.0, -0.0)])
    assert torch.equal(numerics.quantize(x, qp), runtime_codes(x, qp))


def test_a_million_codes_with_planted_ties() -> None:
    rng = np.random.default_rng(0)
    by_division = by_reciprocal = 0
    for _ in range(10):
        qp = grid(U8, 10 ** rng.uniform(-4, 1), int(rng.integers(256)))
        s = float(qp.scale)
        x = torch.from_numpy(np.concatenate([rng.normal(0, 100 * s, 100_000), (rng.integers(-200, 200, 4000) + 0.5) * s]).astype(np.float32))
        want = runtime_codes(x, qp)
        by_division += int((numerics.quantize(x, qp) != want).sum())
        reciprocal = (torch.round(x * (1 / qp.scale)) + qp.zero_point).clamp(0, 255).to(torch.uint8)
        by_reciprocal += int((reciprocal != want).sum())
    assert by_division == 0 and by_reciprocal > 0  # the data can tell the two apart


# ---------------------------------------------------------------- every form that the runtime takes

KINDS = {"u8": TensorProto.UINT8, "s8": TensorProto.INT8, "s4": TensorProto.INT4, "u4": TensorProto.UINT4, "s16": TensorProto.INT16}


@functools.cache
def _both_ways(text: str, axis: int | None, rank: int) -> ort.InferenceSession:
    """QuantizeLinear (given back as int32 codes) and DequantizeLinear behind it, with the optimizer off."""
    kind, vector = KINDS[text], [] if axis is None else ["c"]
    sizes = [f"d{i}" for i in range(rank)]
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("Cast", ["zero"], ["z"], to=kind), helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("Cast", ["q"], ["codes"], to=TensorProto.INT32), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]  # fmt: skip
    inputs = [("x", TensorProto.FLOAT, sizes), ("s", TensorProto.FLOAT, vector), ("zero", TensorProto.INT32, vector)]
    outputs = [("codes", TensorProto.INT32, sizes), ("y", TensorProto.FLOAT, sizes)]
    graph = helper.make_graph(nodes, "g", *[[helper.make_tensor_value_info(*v) for v in values] for values in (inputs, outputs)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def agrees(x: Tensor, qp: QParams) -> None:
    """Codes and the values behind them equal the runtime's."""
    session = _both_ways(str(qp.spec).split("/")[0].strip("nay"), qp.spec.axis, x.ndim)
    codes, real = session.run(None, {"x": x.numpy(), "s": qp.scale.numpy(), "zero": qp.zero_point.numpy()})
    ours = numerics.quantize(x, qp)
    assert ours.shape == x.shape and torch.equal(ours.to(torch.int32), torch.from_numpy(codes))
    assert torch.equal(numerics.dequantize(ours, qp), torch.from_numpy(real))
    assert torch.equal(numerics.fake_quantize(x, qp), torch.from_numpy(real))


@given(st.sampled_from(["u8", "s8", "s4", "u4", "s16"]), st.floats(2**-126, 2**100, width=32), st.data())
@quick
def test_every_integer_type_equals_the_runtime(text: str, scale: float, data: st.DataObject) -> None:
    spec = QuantSpec.parse(f"{text}{'a' if text[0] == 's' else ''}/pt")
    qp = grid(spec, scale, data.draw(st.integers(spec.qmin, spec.qmax)))
    steps = data.draw(st.lists(st.integers(2 * spec.qmin - 3, 2 * spec.qmax + 3), max_size=12))
    ties = (torch.tensor(steps, dtype=torch.float32) + 0.5) * qp.scale
    near = torch.cat([torch.nextafter(ties, torch.full_like(ties, side)) for side in (-torch.inf, torch.inf)])
    values = f32(*data.draw(st.lists(finite, max_size=8)))
    x = torch.cat([ties, near, values])
    if spec.bits == 4:  # the runtime's 4-bit kernel wraps around beyond int32, where ours saturates
        x = x[(x / qp.scale).abs() < 2**30]
    agrees(x[torch.isfinite(x)], qp)


@given(st.sampled_from(["u8", "s8", "s4"]), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2), st.integers(0, 10**6))
@quick
def test_channels_equal_the_runtime(text: str, channels: int, other: int, axis: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    spec = QuantSpec.parse(f"{text}{'a' if text[0] == 's' else ''}/pc{axis}")
    sizes = [2, other, 3]
    sizes[axis] = channels
    scale = torch.pow(2.0, torch.randint(-20, 20, (channels,), generator=g).float()) * (1 + torch.rand(channels, generator=g))
    zero = torch.randint(spec.qmin, spec.qmax + 1, (channels,), generator=g, dtype=torch.int32)
    steps = torch.randint(-300, 300, sizes, generator=g) + 0.5 * torch.randint(0, 2, sizes, generator=g)
    agrees(steps * numerics.along(scale, axis, 3), QParams(spec, scale, zero))  # other = 0: a tensor without elements


def test_the_ends_of_float32() -> None:
    top, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    x = f32(0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4, 1.0, -1.0, top, -top)
    for scale in (tiny, 2 * tiny, 1.0, top / 256, top / 2):
        agrees(x[(x / scale).isfinite()], grid(U8, scale, 7))
        agrees(x[(x / scale).isfinite()], grid(S8, scale))


@pytest.mark.parametrize("spec", [QuantSpec.parse(t) for t in ("u8/pt", "s8/pt", "s8n/pt", "s4n/pt", "s8a/pt")])
@pytest.mark.parametrize("sizes", [(0,), (0, 3), (2, 0, 3), ()])
def test_tensors_without_elements_and_single_numbers(spec: QuantSpec, sizes: tuple[int, ...]) -> None:
    qp, x = grid(spec, 0.5), torch.full(sizes, 1.25)
    codes = numerics.quantize(x, qp)
    assert codes.shape == x.shape and codes.dtype == spec.dtype and numerics.fake_quantize(x, qp).shape == x.shape
    assert codes.numel() == 0 or int(codes) == 2


# ---------------------------------------------------------------- the IAO formulas of the reference page

GOLDEN = [
    ("u8/pt", (-1, 4), [-1, 0, 1, 4], [0, 51, 102, 255], 5 / 255, 51),
    ("u8/pt", (2, 4), [0, 2, 4], [0, 127, 255], 4 / 255, 0),
    ("u8/pt", (-4, -2), [-4, -2, 0], [0, 128, 255], 4 / 255, 255),
    ("u8y/pt", (0, 6), [0, 3, 6], [0, 128, 255], 6 / 255, 0),
    ("s8n/pt", (-127, 127), [-127, 62.5, 63.5, -0.5, 0.49999997], [-127, 62, 64, 0, 0], 1.0, 0),
    ("s8n/pt", (-2, 1), [1, -2], [64, -127], 2 / 127, 0),
    ("s8n/pt", (0.25, 0.5), [0.5, 0.25], [127, 64], 0.5 / 127, 0),
    ("s8/pt", (-2, 1), [1, -2], [64, -127], 2 / 127, 0),
    ("s4n/pt", (-3.5, 7), [7, -3.5, 1, 0], [7, -4, 1, 0], 1.0, 0),
    ("u8/pt", (0, 0), [0, 0], [0, 0], 1.0, 0),
]


@pytest.mark.parametrize(("spec", "range_", "x", "codes", "scale", "zero"), GOLDEN)
def test_golden_vectors(spec: str, range_: tuple[float, float], x: list[float], codes: list[int], scale: float, zero: int) -> None:
    qp = choose(*range_, QuantSpec.parse(spec))
    assert float(qp.scale) == float(np.float32(scale)) and int(qp.zero_point) == zero
    assert numerics.quantize(f32(*x), qp).tolist() == codes
    agrees(f32(*x), qp)


def test_golden_gradient_and_union() -> None:
    x = f32(-4.5, -4.25, -4, 0.25, 0.75, 3.5, 3.7, 3.75).requires_grad_()
    qp = grid(QuantSpec.parse("s4/pt"), 0.5)
    numerics.fake_quantize(x, qp).sum().backward()  # type: ignore[no-untyped-call]
    assert numerics.quantize(x.detach(), qp).tolist() == [-8, -8, -8, 0, 2, 7, 7, 7]
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    a, b = (-1.0, 2.0), (0.0, 6.0)  # the one grid of an addition's operands covers both
    union = choose(min(a[0], b[0]), max(a[1], b[1]), U8)
    assert float(union.scale) == float(np.float32(7) / np.float32(255)) and int(union.zero_point) == 36
