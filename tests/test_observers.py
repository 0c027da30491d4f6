"""Observers: golden vectors of the algorithms page, numpy as the third opinion, and what they refuse."""

import io
import math

import numpy as np
import pytest
import torch

from fxq import numerics, observers, weight_ranges
from fxq.errors import CalibrationError, SchemeError
from fxq.observers import MSE, Entropy, Histogram, MinMax, MovingAverage, Percentile, entropy_clip, make, stride
from fxq.spec import QuantSpec
from fxq.weight_ranges import weight_range

U8, S8, S2N = QuantSpec.parse("u8/pt"), QuantSpec.parse("s8/pt"), QuantSpec.parse("s2n/pt")
NAMES = ["minmax", "ema", "percentile", "mse", "entropy"]


def floats(bounds: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    lo, hi = bounds
    assert lo.dtype == hi.dtype == torch.float32 and lo.ndim == hi.ndim == 0
    return float(lo), float(hi)


def stream(seed: int, batches: int = 6, size: int = 4000) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g) * (1 + 0.7 * i) + 0.3 * i for i in range(batches)]


def seen(o: observers.Observer, xs: list[torch.Tensor]) -> observers.Observer:
    for x in xs:
        o.observe(x)
    return o


def test_minmax_keeps_the_extremes() -> None:
    assert floats(seen(MinMax(U8), [torch.tensor([1.0, 2.0]), torch.tensor([[-3.0], [0.5]])]).range()) == (-3.0, 2.0)


def test_moving_average_golden_vector() -> None:
    o = seen(MovingAverage(U8), [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 6.0])])
    assert floats(o.range()) == pytest.approx((-1.2, 2.4))


def test_moving_average_takes_the_parts_of_a_batch_as_one() -> None:
    o = seen(MovingAverage(U8), [torch.tensor([-1.0, 2.0])])
    o.observe(torch.tensor([-3.0, 1.0]))
    o.observe(torch.tensor([0.0, 6.0]), part=True)
    assert floats(o.range()) == pytest.approx((-1.2, 2.4)) and int(o.batches) == 2


def test_percentile_golden_vectors() -> None:
    x = torch.arange(1.0, 101.0)
    width = 99 / 2048
    assert floats(seen(Percentile(U8), [x]).range()) == (0.0, 100.0)
    lo, hi = floats(seen(Percentile(U8, p=0.99), [x]).range())
    assert lo == 0.0 and 99 <= hi <= 99 + width


@pytest.mark.parametrize("spec", [U8, S8], ids=str)
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_percentile_equals_numpy_on_the_joined_data_within_a_bin(spec: QuantSpec, p: float) -> None:
    xs = stream(3)
    o = Percentile(spec, p=p, sample=None)
    lo, hi = floats(seen(o, xs).range())
    joined = torch.cat(xs).double().numpy()
    if spec.symmetric:
        want = np.quantile(np.abs(joined), p, method="inverted_cdf")
        assert -lo == hi and want <= hi <= want + o.width + 1e-6
    else:
        up, down = np.quantile(joined, p, method="inverted_cdf"), -np.quantile(-joined, p, method="inverted_cdf")
        assert up <= hi + 1e-6 and hi <= up + o.width + 1e-6
        assert down >= lo - 1e-6 and lo >= down - o.width - 1e-6


def test_percentile_leaves_an_empty_side_at_zero() -> None:
    assert floats(seen(Percentile(U8), [torch.linspace(-4, -2, 50)]).range()) == (-4.0, 0.0)


@pytest.mark.parametrize("spec", [U8, S8], ids=str)
def test_histogram_splits_no_count_and_covers_the_data(spec: QuantSpec) -> None:
    o = Histogram(spec, sample=None)
    for i, x in enumerate(stream(5)):
        o.observe(x)
        assert float(o.hist.sum()) == (i + 1) * 4000 and bool((o.hist == o.hist.round()).all())
        low = 0.0 if spec.symmetric else float(o.lo)
        assert float(o.edges[0]) <= low and float(o.edges[1]) >= float(o.hi)


def test_histogram_equals_numpy_after_doubling() -> None:
    xs = stream(9)
    o = seen(Histogram(U8, sample=None), xs)
    x = torch.cat(xs).double().numpy()
    want, _ = np.histogram(x, o.bins, (float(o.edges[0]), float(o.edges[1])))
    gap = np.abs(np.cumsum(want) - o.hist.cumsum(0).numpy())
    assert gap.max() <= 3, "only values on an edge may change sides"


def test_mse_golden_vector() -> None:
    lo, hi = floats(seen(MSE(S2N), [torch.tensor([1.0] * 100 + [3.0])]).range())
    assert hi == pytest.approx(1.02) and lo == 0.0
    x = torch.tensor([1.0] * 100 + [3.0])
    error = (numerics.fake_quantize(x, numerics.choose_qparams(torch.tensor(lo), torch.tensor(hi), S2N)) - x).square().sum()
    assert float(error) == pytest.approx(3.9604, abs=1e-4)


@pytest.mark.parametrize("text", ["u8/pt", "s8/pt", "u4/pt", "s4n/pt"])
def test_mse_finds_the_clip_of_a_search_over_the_values(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = torch.randn(20000, generator=torch.Generator().manual_seed(2)) ** 3
    lo, hi = floats(seen(MSE(spec, sample=None), [x]).range())

    def error(a: float, b: float) -> float:
        q = numerics.choose_qparams(torch.tensor(a), torch.tensor(b), spec)
        return float((numerics.fake_quantize(x, q) - x).square().sum())

    steps = [i / 100 for i in range(1, 101)]
    least = min(error(float(x.min()) * s, float(x.max()) * s) for s in steps)
    assert error(lo, hi) <= least * 1.01


def test_entropy_golden_vector() -> None:
    assert entropy_clip(torch.tensor([4, 4, 2, 2, 1, 1, 0, 1], dtype=torch.float64), 2) == 5


def slow_divergence(h: np.ndarray, i: int, levels: int) -> float:
    p = h[:i].astype(float)
    p[-1] += h[i:].sum()
    q = np.zeros(i)
    for j in range(levels):
        part = slice(j * i // levels, (j + 1) * i // levels)
        on = p[part] > 0
        if on.any():
            q[part] = np.where(on, h[part].sum() / on.sum(), 0)
    if ((q == 0) & (p > 0)).any():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize("seed", range(6))
def test_entropy_equals_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    h = np.maximum(rng.poisson(40 * np.exp(-np.arange(96) / 14.0)) - (seed % 3), 0)
    levels = (4, 8, 16)[seed % 3]
    want = [slow_divergence(h, i, levels) for i in range(levels, 97)]
    best = max(i for i, d in zip(range(levels, 97), want, strict=True) if d <= min(want) + 1e-12)
    assert entropy_clip(torch.from_numpy(h).double(), levels) == best


def test_entropy_golden_divergences() -> None:
    h = np.array([4, 4, 2, 2, 1, 1, 0, 1])
    got = [round(slow_divergence(h, i, 2), 4) for i in range(2, 9)]
    assert got == [0.1132, 0.0667, 0.0823, 0.0231, 0.0491, 0.0526, 0.0453]


def test_entropy_does_not_count_the_spike_of_a_relu() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(1)).relu()
    with_zeros, without = seen(Entropy(U8), [x]), seen(Entropy(U8), [x[x > 0]])
    assert floats(with_zeros.range()) == floats(without.range()) and float(with_zeros.range()[1]) > 2.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x", [0.0, 3.0, -2.0])
def test_a_constant_has_a_range_that_rounds_to_itself(name: str, x: float) -> None:
    o = seen(make(name, U8), [torch.full((7,), x)] * 2)
    q = numerics.choose_qparams(*o.range(), U8)
    assert float(numerics.fake_quantize(torch.tensor(x), q)) == pytest.approx(x, rel=1e-6)


@pytest.mark.parametrize("name", NAMES[2:])
def test_zeros_first_do_not_spoil_the_bins(name: str) -> None:
    x = torch.rand(5000, generator=torch.Generator().manual_seed(3)) * 1e-3
    late, now = seen(make(name, U8), [torch.zeros(10), x]), seen(make(name, U8), [x])
    assert float(late.range()[1]) == pytest.approx(float(now.range()[1]), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_and_change_nothing(name: str, bad: float) -> None:
    o = seen(make(name, U8), [torch.tensor([1.0, 2.0])])
    before = {k: v.clone() for k, v in o.state_dict().items()}
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        o.observe(torch.tensor([0.0, bad]))
    assert all(torch.equal(v, before[k]) for k, v in o.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_save_load_continue_equals_an_uninterrupted_run(name: str) -> None:
    xs = stream(7)
    whole, first = seen(make(name, S8), xs), seen(make(name, S8), xs[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(name, S8)
    second.load_state_dict(torch.load(file, weights_only=True))
    seen(second, xs[3:])
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in whole.state_dict().items())
    assert floats(second.range()) == floats(whole.range())


@pytest.mark.parametrize("name", NAMES)
def test_merge_joins_two_halves(name: str) -> None:
    xs = stream(11, batches=4)
    whole, a, b = seen(make(name, U8), xs), seen(make(name, U8), xs[:2]), seen(make(name, U8), xs[2:])
    a.merge(b)
    a.merge(make(name, U8))
    if name == "ema":
        ends = [seen(make(name, U8), part).range() for part in (xs[:2], xs[2:])]
        assert floats(a.range()) == pytest.approx([float(ends[0][i] + ends[1][i]) / 2 for i in (0, 1)])
    else:
        flat = 0.2 if name == "entropy" else 0.03  # the divergence has a flat minimum
        assert floats(a.range()) == pytest.approx(floats(whole.range()), rel=flat, abs=0.02)
        assert float(a.lo) == float(whole.lo) and float(a.hi) == float(whole.hi)


def test_a_frozen_observer_and_an_empty_tensor_change_nothing() -> None:
    o = seen(MinMax(U8), [torch.empty(0, 3)])
    assert not bool(o.has_data)
    o.observe(torch.ones(2))
    o.frozen = True
    o.observe(torch.full((2,), 5.0))
    assert floats(o.range()) == (1.0, 1.0)


@pytest.mark.parametrize("shape", [(64, 16, 32, 32), (7, 3, 224, 224), (8, 960, 7, 7), (5, 1001), (10,)])
def test_the_sample_is_bounded_and_favours_no_dimension(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape)
    step = stride(size, 1000)
    counted = -(-size.numel() // step)
    assert counted <= 1001 and counted >= min(size.numel(), 500)
    assert step == 1 or all(math.gcd(step, n) == 1 for n in shape)


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_the_sampled_percentile_keeps_its_stated_bound(p: float) -> None:
    x = torch.randn(16, 8, 40, 40, generator=torch.Generator().manual_seed(4))
    o = Percentile(S8, p=p, sample=1 << 14)
    hi = floats(seen(o, [x]).range())[1]
    counted = -(-x.numel() // stride(x.shape, 1 << 14))
    rank = float((x.abs() <= hi).double().mean())
    bins = float(((x.abs() - hi).abs() <= o.width).double().mean())
    assert counted < x.numel() / 10 and abs(rank - p) <= 4 * math.sqrt(p * (1 - p) / counted) + bins


def test_the_extremes_are_exact_although_only_a_sample_is_counted() -> None:
    x = torch.zeros(100003)
    x[12345] = 9.0
    o = seen(Histogram(U8, sample=64), [x])
    assert float(o.hi) == 9.0 and float(o.hist.sum()) == pytest.approx(x.numel())


@pytest.mark.parametrize("x", [[-3e38, 3e38], [1e-40, 2e-40], [1.0, 1.0 + 2e-7]])
def test_extreme_ranges_count_every_value(x: list[float]) -> None:
    o = seen(MSE(U8), [torch.tensor(x), torch.tensor(x) * 0.5])
    assert float(o.hist.sum()) == 4 and all(math.isfinite(v) for v in floats(o.range()))


def test_unknown_names_and_per_channel_grids_are_refused() -> None:
    with pytest.raises(SchemeError, match="did you mean 'minmax'"):
        make("minmx", U8)
    with pytest.raises(SchemeError, match="unknown observer"):
        weight_range(torch.ones(2, 2), S8, "best")
    with pytest.raises(SchemeError, match="one for each channel"):
        make("mse", QuantSpec.parse("s8n/pc0"))


def test_weight_range_per_tensor_and_along_both_axes() -> None:
    w = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    assert floats(weight_range(w, QuantSpec.parse("s8n/pt"))) == (-2.0, 1.0)
    lo, hi = weight_range(w, QuantSpec.parse("s8n/pc0"))
    assert lo.tolist() == [-2.0, 0.25] and hi.tolist() == [1.0, 0.5]
    lo, hi = weight_range(w, QuantSpec.parse("s8n/pc1"))
    assert lo.tolist() == [0.5, -2.0] and hi.tolist() == [1.0, 0.25]
    assert weight_range(w * 0.1, QuantSpec.parse("s8n/pt"))[0] == pytest.approx(-0.2)


@pytest.mark.parametrize("text", ["s4n/pc0", "s8a/pc1", "s4n/pt"])
def test_mse_weight_range_is_the_best_of_all_clips(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_ranges, "_BLOCK", 50)
    spec = QuantSpec.parse(text)
    w = torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(8)) ** 3

    def errors(lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        e = (numerics.fake_quantize(w, numerics.choose_qparams(lo, hi, spec)) - w).square()
        return e.sum() if spec.axis is None else e.movedim(spec.axis, 0).flatten(1).sum(1)

    lo, hi = weight_range(w, spec)
    every = torch.stack([errors(lo * i / 100, hi * i / 100) for i in range(1, 101)])
    assert torch.allclose(errors(*weight_range(w, spec, "mse")), every.amin(0), rtol=1e-4)


@pytest.mark.parametrize("observer", ["percentile", "entropy"])
def test_histogram_observers_serve_weights_channel_by_channel(observer: str) -> None:
    w = torch.randn(3, 4000, generator=torch.Generator().manual_seed(6)) * torch.tensor([[1.0], [10.0], [0.0]])
    lo, hi = weight_range(w, QuantSpec.parse("s4n/pc0"), observer)
    assert hi.shape == lo.shape == (3,) and float(hi[2]) == 0.0
    assert float(hi[1]) == pytest.approx(10 * float(hi[0]), rel=0.25) and bool((hi <= w.amax(1)).all())
