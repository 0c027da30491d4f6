"""Codebooks: golden vectors, brute force, properties, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq import kmeans
from fxq.errors import FxqError
from fxq.histogram import points_of
from fxq.kmeans import assign, boundaries, cluster, codebook

STARTS = ("linear", "quantile", "density")


def error(values: Tensor, codes: Tensor, book: Tensor) -> float:
    return float(((values.double() - book.double()[codes.long() - 1]) ** 2).sum())


def inertia(values: Tensor, book: Tensor) -> float:
    return error(values, assign(values, book), book)


def brute(values: Tensor, k: int) -> float:
    """Least squared error over all splits of the sorted values into ``k`` intervals."""
    x, best = np.sort(values.double().numpy()), math.inf
    for cut in itertools.combinations(range(1, len(x)), min(k, len(x)) - 1):
        best = min(best, sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(x, cut)))
    return best


def test_golden() -> None:
    """algorithms.md, section 8: the example of the reference, with nearest entries and their codes."""
    x = torch.tensor([0, 0.1, 0.9, 1, 5])
    codes, book = cluster(x, 3)
    assert torch.allclose(book, torch.tensor([0.05, 0.95, 5.0]), atol=1e-7) and book.dtype == torch.float32
    assert codes.tolist() == [1, 1, 2, 2, 3] and codes.dtype == torch.uint8


def test_half_way_goes_to_the_lower_entry() -> None:
    book = torch.tensor([-1.0, 0.0, 2.0])
    x = torch.tensor([-2, -0.5, -0.49999997, 1.0, 1.0000001, 9.0])
    assert assign(x, book).tolist() == [1, 1, 2, 2, 3, 3]
    assert boundaries(book).tolist() == [-0.5, 1.0]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_best_one_of_small_problems(k: int) -> None:
    rng = torch.Generator().manual_seed(k)
    for size in range(1, 11):
        x = torch.randn(size, generator=rng) * 10 ** float(torch.rand(1, generator=rng) * 6 - 3)
        x = torch.cat([x, x[: size // 3]])  # some twice
        best, got = brute(x, k), inertia(x, codebook(x, k))
        assert got <= best * (1 + 1e-5) + 1e-12 * float((x**2).sum())


finite = st.floats(-1e4, 1e4, width=32).filter(lambda v: v != 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(finite, min_size=1, max_size=60), st.integers(1, 9))
def test_properties(values: list[float], k: int) -> None:
    x = torch.tensor(values)
    codes, book = cluster(x, k)
    assert len(book) <= k and bool((book[1:] > book[:-1]).all())
    assert sorted(set(codes.tolist())) == list(range(1, len(book) + 1))
    assert torch.equal(codes, assign(x, book)) and torch.equal(book, codebook(x, k))
    distance = (x.double()[:, None] - book.double()).abs()
    assert torch.equal(codes.long() - 1, distance.argmin(1))
    again_codes, again = cluster(book[codes.long() - 1], k)
    assert torch.equal(again, book) and torch.equal(again_codes, codes)
    for init in STARTS:
        other = codebook(x, k, init=init)
        assert inertia(x, book) <= inertia(x, other) * (1 + 1e-5) + 1e-7 * float((x.double() ** 2).mean())


@pytest.mark.parametrize("size", [50_000, 1_500_000])
@pytest.mark.parametrize("shape", ["gauss", "two lobes", "heavy tails"])
def test_no_start_is_better(size: int, shape: str) -> None:
    """Sorted points and cells alike; the first are below :data:`fxq.histogram.SORTED`, the others above."""
    rng = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=rng) * 0.02
    x = {"gauss": x, "two lobes": x[x.abs() > 0.03], "heavy tails": x * torch.exp(torch.randn(size, generator=rng))}[shape]
    for k in (2, 5, 32):
        best = inertia(x, codebook(x, k))
        for init in STARTS:
            assert best <= inertia(x, codebook(x, k, init=init)) * (1 + 1e-4), (k, init)


def test_near_the_optimum_of_a_gaussian() -> None:
    """Max (1960), "Quantizing for minimum distortion": 4 entries 0.1175, 8 entries 0.03454, 16 entries 0.009497 of the variance."""
    x = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    for k, published in ((4, 0.1175), (8, 0.03454), (16, 0.009497)):
        assert inertia(x, codebook(x, k)) / float((x.double() ** 2).sum()) == pytest.approx(published, rel=0.004)


@pytest.mark.parametrize("size", [100, 70_000, 1_200_000])
def test_few_different_values_are_the_codebook(size: int) -> None:
    known = torch.tensor([-3.5e-8, -1e-20, 2e-42, 0.1, 0.10000001, 7.0, 3e30])
    at = torch.randint(len(known), (size,), generator=torch.Generator().manual_seed(1))
    at[:7] = torch.arange(7)
    if size > 10:
        at[at == 6] = 5
        at[-2] = 6  # once: no sample is likely to hold it
    for k in (7, 8, 300):
        codes, book = cluster(known[at], k)
        assert torch.equal(book, known) and torch.equal(codes.long(), at + 1)
    assert len(codebook(known[at], 6)) <= 6


def test_codes_are_exact_in_cells() -> None:
    """A large tensor goes through a table of cells: every code is that of a search, at and beside the ends too."""
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(2))
    book = codebook(x, 256)
    ends = boundaries(book)
    beside = torch.cat([torch.nextafter(ends, torch.tensor(v)) for v in (-math.inf, math.inf)] + [ends])
    x = torch.cat([x, beside, torch.tensor([0.0, -0.0, 3e38, -3e38, 1e-45])])
    codes = assign(x, book)
    assert codes.dtype == torch.int16 and torch.equal(codes.long() - 1, torch.bucketize(x, ends))


def test_an_outlier_does_not_take_the_bins() -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(3)) * 0.02
    alone = inertia(x, codebook(x, 15))
    for far in (1e3, -1e9, 1e30):
        y = torch.cat([x, torch.tensor([far])])
        assert inertia(x, codebook(y, 16)) <= alone * 1.02, far


def test_narrow_clusters_far_from_each_other() -> None:
    """1.2 million values in two bands of a relative width of 1e-3: wider cells would not tell them apart."""
    x = torch.rand(1_200_000, generator=torch.Generator().manual_seed(4)) * 1e-3 + 1
    x[::2] += 1
    uniform = (1e-3 / 8) ** 2 / 12 * len(x)
    assert inertia(x, codebook(x, 16)) == pytest.approx(uniform, rel=0.02)


def test_starts_are_what_they_say() -> None:
    x = torch.tensor([1.0, 2, 3, 4, 100])
    points = points_of(x.numpy())
    assert kmeans._start(points, 3, "linear").tolist() == [1, 50.5, 100]
    assert kmeans._start(points, 3, "density").tolist() == [1, 3, 100]
    assert kmeans._start(points, 2, "quantile").tolist() == torch.quantile(x, torch.tensor([0.25, 0.75])).tolist()
    hundred = points_of(torch.arange(1.0, 101).numpy())
    assert kmeans._start(hundred, 5, "density").tolist() == [1, 25, 50, 75, 100]
    y = torch.tensor([5.0, 5, 5, -1, -1, 2])
    got = kmeans._start(points_of(y.numpy()), 5, "quantile")
    assert got.tolist() == pytest.approx(torch.quantile(y, (torch.arange(5) + 0.5) / 5).unique().tolist())


def cost(x: Tensor, codes: Tensor, book: Tensor, rate: float) -> float:
    share = torch.bincount(codes.reshape(-1).long())[1:].double() / x.numel()
    bits = -float((share * share.log2()).sum())
    return error(x, codes, book) / x.numel() / float(x.double().var(unbiased=False)) + rate * bits


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 0.02, 0.5])
def test_a_rate_lowers_its_cost(rate: float) -> None:
    x = torch.randn(200, 500, generator=torch.Generator().manual_seed(5))
    plain, plain_book = cluster(x, 32)
    codes, book = cluster(x, 32, rate=rate)
    assert cost(x, codes, book, rate) < cost(x, plain, plain_book, rate)
    assert codes.shape == x.shape and len(book) <= 32 and set(codes.unique().tolist()) == set(range(1, len(book) + 1))
    flat, order = codes.reshape(-1), x.reshape(-1).argsort()
    assert bool((flat[order].diff() >= 0).all()), "clusters are intervals"
    share = torch.bincount(flat.long())[1:].double() / x.numel()
    price = rate * float(x.double().var(unbiased=False))
    costs = (x.reshape(-1, 1).double() - book.double()) ** 2 - price * share.log2()
    mine = costs.gather(1, flat.long()[:, None] - 1)[:, 0]
    assert float((mine - costs.min(1).values).max()) < 1e-4 * price + 1e-6
    if rate == 0.5:
        assert len(book) < 8


def test_entries_that_never_pay_have_empty_intervals() -> None:
    book, bits = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 9.0, 1.0])
    ends = boundaries(book, bits, 1.0)
    assert ends.tolist() == [0.0, 0.0]
    x = torch.tensor([-2.0, -0.1, 0.1, 3.0])
    assert assign(x, book, ends).tolist() == [1, 1, 3, 3]
    assert boundaries(book, torch.tensor([1.0, 1.5, 1.0]), 0.5).tolist() == [-0.375, 0.375]
    assert assign(x, book, boundaries(book, torch.tensor([99.0, 1.0, 99.0]), 1.0)).tolist() == [2, 2, 2, 2]


def test_shapes_and_nothing_at_all() -> None:
    codes, book = cluster(torch.zeros(0, 3), 4)
    assert codes.shape == (0, 3) and book.shape == (0,)
    codes, book = cluster(torch.randn(4, 5, 2).half().transpose(0, 2), 300)
    assert codes.shape == (2, 5, 4) and codes.dtype == torch.uint8 and len(book) <= 40
    values = torch.arange(1.0, 301)
    assert cluster(values, 256)[0].dtype == torch.int16 and cluster(values, 255)[0].dtype == torch.uint8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(bad: float) -> None:
    x = torch.randn(3, 4)
    x[1, 2] = bad
    with pytest.raises(FxqError, match=r"conv1\.weight: the weight holds .*\(flat index 6\)"):
        cluster(x, 4, name="conv1.weight")


@pytest.mark.parametrize("bad", [{"k": 0}, {"k": 5000}, {"init": "random"}, {"rate": -1.0}, {"rate": math.nan}, {"rate": 0.1, "init": "linear"}, {"bins": 2}])
def test_arguments_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(FxqError, match="fc: "):
        codebook(torch.randn(50), **{"k": 4, "name": "fc"} | bad)  # type: ignore[arg-type]


def test_subnormal_numbers_that_the_processor_takes_for_zero() -> None:
    x = torch.tensor([1e-40, 2e-40, -1e-41, 1, 2]).repeat(20_000)
    if not torch.set_flush_denormal(True):
        return
    try:
        codes, book = cluster(x, 8)
    finally:
        torch.set_flush_denormal(False)
    assert abs(float(book[0])) < 1e-38 and book[1:].tolist() == [1, 2] and codes[:5].tolist() == [1, 1, 1, 2, 3]
