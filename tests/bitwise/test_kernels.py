"""The kernels of every engine against sums by definition, bit for bit."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.bitwise import layout
from fxq.bitwise.engine import NUMPY, Engine, engine
from fxq.errors import FxqError
from tests.bitwise.kernel_cases import Case, cases, direct, epilogues, fixed_case, pack_codes

ENGINES = [NUMPY, engine()]
engines = pytest.mark.parametrize("engine", ENGINES, ids=[e.name for e in ENGINES])


def same(got: Any, want: Any) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def check_conv(engine: Engine, case: Case, threads: int = 1) -> None:
    for kind, (epilogue, want) in epilogues(case).items():
        got = engine.conv(case.packed, case.layer, epilogue, threads)
        if epilogue.planes:
            assert same(got, pack_codes(want, epilogue.planes)), kind
        else:
            assert same(got, want), kind


@engines
@settings(derandomize=True, max_examples=120, deadline=None)
@given(case=cases())
def test_conv_equals_the_sum_by_definition(engine: Engine, case: Case) -> None:
    check_conv(engine, case)


@engines
@pytest.mark.parametrize("ternary_w", [False, True])
@pytest.mark.parametrize("ternary_a", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"n": 64, "c": 64, "kernel": 3, "size": 14, "padding": 1},
        {"n": 40, "c": 192, "kernel": 3, "size": 9, "padding": 1, "stride": 2, "batch": 2},
        {"n": 104, "c": 256, "kernel": 1, "size": 7},
        {"n": 96, "c": 96, "kernel": 3, "size": 8, "groups": 3, "padding": 2, "dilation": 2},
        {"n": 70, "c": 70, "kernel": 3, "size": 6, "groups": 70, "padding": 1},
        {"n": 128, "c": 64, "kernel": 3, "size": 8, "groups": 4, "padding": 1, "batch": 2},
        {"n": 64, "c": 96, "kernel": 3, "size": 9, "groups": 8, "padding": 1, "stride": 2},
        {"n": 24, "c": 24, "kernel": 1, "size": 5, "groups": 3},
        {"n": 256, "c": 128, "kernel": 5, "size": 6, "groups": 2, "padding": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_conv_of_usual_layers(engine: Engine, shape: dict[str, int], ternary_w: bool, ternary_a: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if threads > 1 and engine is not NUMPY:  # deal small work out as well, in units of a few rows
        numba_plan = importlib.import_module("fxq.bitwise.numba_plan")
        monkeypatch.setattr(numba_plan, "VECTORS", 1)
        monkeypatch.setattr(numba_plan, "PIXELS", 5)
        monkeypatch.setattr(numba_plan, "CACHE_BYTES", 2048)
    check_conv(engine, fixed_case(1, ternary_w=ternary_w, ternary_a=ternary_a, **shape), threads)


@engines
def test_linear_of_one_and_of_many_rows(engine: Engine) -> None:
    rng = np.random.default_rng(3)
    for rows in (1, 2, 7, 29):
        w, x = rng.choice([-1, 1], (100, 300)).astype(np.int8), rng.choice([-1, 1], (1, 1, rows, 300)).astype(np.int8)
        layer = layout.pack_layer(w)
        got = engine.conv(pack_codes(x, 1), layer, layout.int32_epilogue(layer))
        assert (got[0, 0] == x[0, 0].astype(int) @ w.T.astype(int)).all()


@engines
def test_no_images(engine: Engine) -> None:
    case = fixed_case(2, 16, 64, 3, 6, padding=1)
    for e in (layout.sign_epilogue(case.layer, 0), layout.int32_epilogue(case.layer)):
        assert same(engine.conv(case.packed[:, :0], case.layer, e), engine.conv(case.packed, case.layer, e)[..., :0, :, :, :].copy())
    rows = layout.pack_layer(np.ones((8, 64), np.int8))
    assert engine.conv(np.zeros((1, 1, 1, 0, 1), np.uint64), rows, layout.int32_epilogue(rows)).shape == (1, 1, 0, 8)
    for last in (False, True):
        assert engine.pack(np.zeros((0, 3, 4), np.float32), 0, 0, 2, last).shape[:2] == (2, 0)
        assert engine.quantize(np.zeros((0, 3, 4), np.float32), 1, 0, 0, 255, last).shape[0] == 0
    assert engine.unpack(case.packed[:, :0], 64).shape == (0, 6, 6, 64)
    assert engine.max_pool(case.packed[:, :0], 64, (2, 2), (2, 2), (0, 0)).shape == (1, 0, 3, 3, 1)
    codes = np.zeros((0, 6, 6, 5), np.uint8)
    assert engine.code_pool(codes, (2, 2), (2, 2), (0, 0)).shape == (0, 3, 3, 5)
    assert engine.add(codes, codes, layout.AddConstants(1, 1, 0)).shape == engine.table(codes, np.zeros(256, np.uint8)).shape == codes.shape


@engines
def test_a_view_of_packed_values_is_read_rightly(engine: Engine) -> None:
    case = fixed_case(5, 16, 64, 3, 12, padding=1, batch=4)
    epilogue = layout.int32_epilogue(case.layer)
    view = case.packed[:, ::2, 1:]
    assert (engine.conv(view, case.layer, epilogue) == direct(case.codes[::2, 1:], case.weights, case.layer)).all()


@engines
@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([1, 3, 8, 31, 64, 70, 130, 200]), st.sampled_from([1, 5, 8, 31, 33, 64, 100]), st.booleans(),
    st.sampled_from(["float32", "uint8", "int8"]), st.booleans(),
)  # fmt: skip
def test_pack_and_unpack(engine: Engine, seed: int, batch: int, channels: int, places: int, channels_last: bool, dtype: str, ternary: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (batch, places, channels) if channels_last else (batch, channels, places)
    if dtype == "float32":
        x = rng.standard_normal(shape).astype(np.float32)
        x.reshape(-1)[rng.integers(0, x.size, 4)] = [0.0, -0.0, np.nan, np.inf]
        lo, hi = [(-0.5, 0.25), (0.0, 0.0), (-np.inf, np.inf), (np.inf, -np.inf)][seed % 4]
    else:
        x = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, shape).astype(dtype)
        lo, hi = [(20, 100), (-1000, 1000), (-3, 3), (300, -300), (-128, 127), (0, 255)][seed % 6]
    got = engine.pack(x, lo, hi, 1 + ternary, channels_last)
    values = x if channels_last else x.transpose(0, 2, 1)
    plus = values.astype(np.float64) >= hi
    codes = np.where(plus, 1, np.where(values.astype(np.float64) <= lo, -1, 0)) if ternary else np.where(plus, 1, -1)
    assert same(got, pack_codes(codes, 1 + ternary))
    assert same(engine.unpack(got[:, :, None], channels), codes[:, None].astype(np.int8))


@engines
@pytest.mark.parametrize("threads", [1, 2])
def test_pack_of_whole_tensors(engine: Engine, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine is not NUMPY:
        monkeypatch.setattr(engine.kernels, "WORK", 1)
    rng = np.random.default_rng(0)
    for channels, places, last in [(64, 196, False), (200, 49, False), (256, 64, True), (72, 130, True), (10, 1, False)]:
        x = rng.standard_normal((3, places, channels) if last else (3, channels, places)).astype(np.float32)
        want = np.where((x if last else x.transpose(0, 2, 1)) >= 0.1, 1, -1)
        assert same(engine.pack(x, 0.0, np.float32(0.1), 1, last, threads), pack_codes(want, 1))


@engines
@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), channels=st.sampled_from([3, 64, 70, 130]), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), dilation=st.integers(1, 2), ceil_mode=st.booleans(), ternary=st.booleans(), batch=st.integers(1, 2),
)  # fmt: skip
def test_max_pool_equals_torch(engine: Engine, seed: int, channels: int, kernel, stride, dilation: int, ceil_mode: bool, ternary: bool, batch: int) -> None:
    rng = np.random.default_rng(seed)
    padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
    size = tuple(int(dilation * (k - 1) + 1 + rng.integers(0, 6)) for k in kernel)
    shape = (batch, *size, channels)
    x = (rng.integers(-1, 2, shape) if ternary else rng.choice([-1, 1], shape)).astype(np.int8)
    want = torch.nn.functional.max_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2).float(), kernel, stride, padding, dilation, ceil_mode)
    got = engine.max_pool(pack_codes(x, 1 + ternary), channels, kernel, stride, padding, (dilation, dilation), ceil_mode)
    assert same(got, pack_codes(want.permute(0, 2, 3, 1).numpy(), 1 + ternary))


@engines
@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), channels=st.sampled_from([1, 3, 16, 24, 64, 70]), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), dilation=st.integers(1, 2), ceil_mode=st.booleans(), batch=st.integers(1, 2), wide=st.booleans(),
)  # fmt: skip
def test_pool_of_codes_equals_torch(engine, seed, channels, kernel, stride, dilation, ceil_mode, batch, wide) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
    h, w = (int(dilation * (k - 1) + 1 + rng.integers(0, 40 if wide else 6)) for k in kernel)
    for dtype in ("uint8", "int8"):
        x = (rng.standard_normal((batch, h, w, channels)) * 50).astype(dtype)
        want = torch.nn.functional.max_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2).float(), kernel, stride, padding, dilation, ceil_mode)
        got = engine.code_pool(x, kernel, stride, padding, (dilation, dilation), ceil_mode, 2)
        assert same(got, want.permute(0, 2, 3, 1).numpy().astype(dtype))


@engines
@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([1, 3, 16, 70]), st.sampled_from([1, 5, 16, 33, 100]), st.booleans(), st.booleans())
def test_quantize_equals_numerics(engine: Engine, seed: int, batch: int, channels: int, places: int, channels_last: bool, signed: bool) -> None:
    from fxq import numerics
    from fxq.spec import QParams, QuantSpec

    rng = np.random.default_rng(seed)
    shape = (batch, places, channels) if channels_last else (batch, channels, places)
    scale = np.float32(rng.uniform(0.001, 0.1))
    x = (rng.integers(-400, 400, shape) * (scale / 2)).astype(np.float32)  # half of them ties
    x.reshape(-1)[0] = [np.inf, -np.inf, 3e38, -0.0][seed % 4]
    spec = QuantSpec(8, signed, False, False)
    zero = int(rng.integers(spec.qmin, spec.qmax + 1))
    want = numerics.quantize(torch.from_numpy(x), QParams(spec, torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))).numpy()
    got = engine.quantize(x, scale, zero, spec.qmin, spec.qmax, channels_last, 2)
    assert same(got, np.ascontiguousarray(want if channels_last else want.transpose(0, 2, 1)))


@engines
def test_add_equals_the_reference_kernel_on_all_codes(engine: Engine) -> None:
    from fxq import kernels
    from fxq.spec import QParams, QuantSpec

    rng = np.random.default_rng(7)
    spec = QuantSpec(8, False, False, False)
    a, b = np.divmod(np.arange(65536), 256)
    a, b = a.astype(np.uint8).reshape(256, 256), b.astype(np.uint8).reshape(256, 256)
    for _ in range(6):
        qa, qb, qc = (QParams(spec, torch.tensor(float(rng.uniform(0.001, 0.2))), torch.tensor(int(rng.integers(0, 256)), dtype=torch.int32)) for _ in range(3))
        want = kernels.add(torch.nn.Identity(), [kernels.Codes(torch.from_numpy(a), qa), kernels.Codes(torch.from_numpy(b), qb)], qc).numpy()
        sc = np.float32(qc.scale)
        ra, rb = np.float32(qa.scale) / sc, np.float32(qb.scale) / sc
        fixed = np.float32(int(qc.zero_point)) - kernels._fma(ra, np.float32(int(qa.zero_point)), rb * np.float32(int(qb.zero_point)))
        assert same(engine.add(a, b, layout.AddConstants(ra, rb, fixed)), want)
        assert engine.add(a, b, layout.AddConstants(ra, rb, fixed, 3, 100)).max() <= 100


@engines
def test_table(engine: Engine) -> None:
    rng = np.random.default_rng(8)
    values = rng.integers(0, 256, 256).astype(np.uint8)
    for size in [(), (1,), (63,), (2, 1000), (5, 7, 9)]:
        x = rng.integers(0, 256, size).astype(np.uint8)
        assert same(engine.table(x, values), values[x].reshape(size))


@engines
def test_codes_in_several_threads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results however the work is dealt out."""
    if engine is not NUMPY:
        monkeypatch.setattr(engine.kernels, "WORK", 1)
    rng = np.random.default_rng(9)
    a, b, values = (rng.integers(0, 256, size).astype(np.uint8) for size in ((2, 9, 7, 70), (2, 9, 7, 70), 256))
    x, constants = rng.standard_normal((2, 70, 63)).astype(np.float32), layout.AddConstants(0.4, 0.7, 3.25)
    packed = engine.pack(x, -0.3, 0.3, 2, False).reshape(2, 2, 9, 7, 2)
    window: Any = ((3, 2), (2, 1), (1, 1))
    calls = {
        "add": lambda e, n: e.add(a, b, constants, n), "table": lambda e, n: e.table(a, values, n), "unpack": lambda e, n: e.unpack(packed, 70, n),
        "quantize": lambda e, n: e.quantize(x, 0.02, 100, 0, 255, False, n), "rows": lambda e, n: e.quantize(x, 0.02, 0, -128, 127, True, n),
        "max_pool": lambda e, n: e.max_pool(packed, 70, *window, threads=n), "code_pool": lambda e, n: e.code_pool(a, *window, threads=n),
    }  # fmt: skip
    for name, call in calls.items():
        want = call(NUMPY, 1)
        assert all(same(call(engine, n), want) for n in (1, 2, 5)), name


@engines
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, c: e.conv(c.packed[..., :0], c.layer, layout.int32_epilogue(c.layer)), "0 words do not hold 64 channels"),
        (lambda e, c: e.conv(c.packed.view(np.int64), c.layer, layout.int32_epilogue(c.layer)), "int64 .* is not packed"),
        (lambda e, c: e.conv(c.packed[:, :, :1], c.layer, layout.int32_epilogue(c.layer)), "does not fit into an input of 1x5"),
        (lambda e, c: e.conv(c.packed, c.layer, layout.int32_epilogue(layout.pack_layer(np.ones((9, 64), np.int8)))), "not one of this layer"),
        (lambda e, c: e.pack(np.zeros((1, 2, 3)), 0, 0, 1, False), "float64 .* cannot be packed"),
        (lambda e, c: e.pack(np.zeros((2, 3), np.float32), 0, 0, 1, False), "cannot be packed"),
        (lambda e, c: e.pack(np.zeros((1, 2, 3), np.float32), 0, 0, 3, False), "in 3 planes"),
        (lambda e, c: e.unpack(c.packed, 65), "1 words do not hold 65 channels"),
        (lambda e, c: e.max_pool(c.packed, 64, (2, 2), (0, 1), (0, 0)), "do not make a window"),
        (lambda e, c: e.code_pool(np.zeros((1, 4, 4, 3), np.float32), (2, 2), (2, 2), (0, 0)), "float32 .* cannot be pooled"),
        (lambda e, c: e.add(np.zeros(3, np.uint8), np.zeros(4, np.uint8), layout.AddConstants(1, 1, 0)), "no codes of one shape"),
        (lambda e, c: e.table(np.zeros(3, np.int8), np.zeros(256, np.uint8)), "no table for codes of int8"),
        (lambda e, c: e.table(np.zeros(3, np.uint8), np.zeros(255, np.uint8)), r"uint8 \[255\] is no table"),
        (lambda e, c: e.quantize(np.zeros((1, 2, 3)), 1, 0, 0, 255, True), "float64 .* cannot be quantized"),
        (lambda e, c: e.max_pool(c.packed, 64, (9, 9), (1, 1), (0, 0)), "window of 9x9 does not fit"),
        (lambda e, c: e.max_pool(c.packed, 64, (2, 2), (1, 1), (2, 2)), "window of 2x2 does not fit"),
    ],
)
def test_bad_arguments_have_clear_errors(engine: Engine, call: Any, message: str) -> None:
    case = fixed_case(0, 8, 64, 3, 5)
    with pytest.raises(FxqError, match=message):
        call(engine, case)
