"""Which units stay: golden vectors, invariants on random pools, refusals."""

import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.errors import PassError
from fxq.selection import Pool, select, within


def pool(scores: Any, cells: int = 1, name: str = "p", **options: Any) -> Pool:
    s = np.asarray(scores, np.float64)
    return Pool(name, s, np.repeat(np.arange(cells), len(s) // cells), **options)


def units(kept: list[np.ndarray]) -> list[list[int]]:
    return [np.flatnonzero(k).tolist() for k in kept]


def test_best_units_of_all_pools_stay_and_none_becomes_empty() -> None:
    assert units(select([pool([0.9, 0.1, 0.5, 0.3]), pool([0.2, 0.05])], 0.5)) == [[0, 2], [0]]


def test_ties_spread_evenly() -> None:
    assert units(select([pool([1.0] * 4), pool([1.0] * 2)], 0.5)) == [[0, 1], [0]]


def test_ties_spread_by_the_place_in_the_pool_not_by_the_index() -> None:
    assert units(select([pool([1.0] * 2), pool([1.0] * 8)], 0.5)) == [[0], [0, 1, 2, 3]]


def test_ties_go_by_place_then_pool() -> None:
    assert units(select([pool([1.0] * 8), pool([1.0] * 8)], 7 / 16)) == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize(("count", "kept"), [(1, 8), (3, 8), (11, 8), (12, 16), (13, 16), (19, 16), (20, 16)])
def test_nearest_multiple(count: int, kept: int) -> None:
    p = pool(np.arange(20.0), multiple=8)
    assert p.rounded(count) == kept
    assert [k.sum() for k in select([p], 1 - count / 20)] == [kept]


def test_fewer_units_than_the_multiple_stay_whole() -> None:
    assert [int(k.sum()) for k in select([pool(np.arange(6.0), multiple=8), pool(np.arange(16.0), multiple=8)], 0.5)] == [6, 8]


def test_cells_keep_as_many_each() -> None:
    assert units(select([pool([9, 8, 7, 1, 2, 3, 4, 5], cells=2)], 0.5)) == [[0, 1, 6, 7]]


def test_cells_that_are_not_contiguous() -> None:
    p = Pool("shuffled", np.array([9.0, 1, 8, 2]), np.array([0, 1, 0, 1]))
    assert units(select([p], 0.5)) == [[0, 3]]


def test_reserved_units_stay_and_lift_the_count_of_every_cell() -> None:
    reserved = np.array([False, False, True, True, False, False, False, False])
    p = pool([9, 8, 1, 2, 5, 4, 3, 7], cells=2, reserved=reserved)
    assert units(select([p], 0.75)) == [[2, 3, 4, 7]]


def test_reserved_units_come_first_in_the_global_ranking() -> None:
    p = pool([1.0, 9, 8, 7], reserved=np.array([True, False, False, False]))
    assert units(select([p, pool([6.0, 5, 4, 3])], 0.5)) == [[0, 1, 2], [0]]


def test_reserved_units_count_in_the_global_number() -> None:
    p = pool([0.0, 0.1, 0.2, 0.3], reserved=np.array([True, True, False, False]))
    assert units(select([p, pool([6.0, 5, 4, 3])], 0.5)) == [[0, 1], [0, 1]]


def test_floor_and_cap_round_inward() -> None:
    assert [int(k.sum()) for k in select([pool(np.arange(64.0), multiple=8, least=17)], 0.9)] == [24]
    assert [int(k.sum()) for k in select([pool(np.arange(64.0), multiple=8, most=31)], 0.1)] == [24]
    assert [int(k.sum()) for k in select([pool(np.arange(20.0), multiple=8, least=17)], 0.5)] == [20]


def test_a_floor_above_the_width_keeps_the_pool_whole() -> None:
    assert [int(k.sum()) for k in select([pool(np.arange(4.0), least=16), pool(np.arange(32.0), least=16)], 0.5)] == [4, 16]


def test_a_ratio_of_its_own() -> None:
    kept = select([pool([0.0] * 8, ratio=0.25), pool(np.arange(4.0)), pool(np.arange(4.0))], 0.5)
    assert [int(k.sum()) for k in kept] == [6, 2, 2]
    assert [int(k.sum()) for k in select([pool([0.0] * 8, ratio=0.25), pool(np.arange(4.0))], 0.5, "layer")] == [6, 2]


def test_scope_layer_cuts_the_same_share_of_each() -> None:
    kept = select([pool([9.0, 8, 7, 6]), pool([0.1, 0.2, 0.3, 0.4, 0.5])], 0.5, "layer")
    assert units(kept) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(("ratio", "n", "left"), [(0.3, 10, 7), (0.7, 10, 3), (0.29, 100, 71), (0.1, 3, 3), (0.0, 5, 5), (0.6, 5, 2), (1 / 3, 9, 6)])
def test_the_share_is_exact(ratio: float, n: int, left: int) -> None:
    for scope in ("global", "layer"):
        assert int(select([pool(np.arange(float(n)))], ratio, scope)[0].sum()) == left


def test_no_pools() -> None:
    assert select([], 0.5) == []
    assert within([], lambda kept: 0.0, 1.0) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: select([pool([1.0, 2])], 1.0), r"prune-channels: ratio 1 would empty every layer. Choose a ratio from 0"),
        (lambda: select([pool([1.0, 2])], -0.1), r"ratio -0.1 is not a share"),
        (lambda: select([pool([1.0, 2])], math.nan), r"ratio nan is not a share"),
        (lambda: select([pool([1.0, 2])] * 3, 0.7), r"ratio 0.7 leaves 2 of 6 units for 3 layers and would empty a layer. Choose a ratio of at most 0.5$"),
        (lambda: select([pool([1.0] * 6, name="a", multiple=8), pool([1.0] * 7, name="b", multiple=8)], 0.5), r"multiple of 8 is larger.*'b', has 7 units"),
        (lambda: select([pool([1.0] * 12, cells=3, multiple=8)], 0.5), r"multiple of 24 \(8, equal in 3 cells\) is larger than every layer"),
        (lambda: select([pool([1.0])], 0.5, "net"), r"unknown scope 'net'. Choose 'global' or 'layer'"),
        (lambda: pool([1.0, math.nan], name="conv1"), r"prune-channels / conv1: the score of unit 1 is not a number"),
        (lambda: pool([1.0] * 8, least=5, most=4), r"the floor 5 is larger than the cap 4"),
        (lambda: pool([1.0] * 8, most=1, reserved=np.arange(8) < 2), r"2 units must stay, more than the cap 1"),
        (lambda: pool([1.0] * 32, multiple=8, least=9, most=15), r"no multiple of 8 lies between the floor 9 and the cap 15"),
        (lambda: pool([1.0] * 32, multiple=8, most=7), r"no multiple of 8 lies between the floor 1 and the cap 7"),
        (lambda: pool([1.0] * 8, ratio=1.5), r"p: ratio 1.5 would empty"),
        (lambda: pool([1.0] * 8, multiple=0), r"must be at least 1"),
        (lambda: Pool("p", np.ones(3), np.array([0, 0, 1])), r"cells of a pool must be of equal size"),
        (lambda: Pool("p", np.ones(3), np.zeros(2, np.int64)), r"must be of one length"),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(PassError, match=words):
        make()


def test_one_unit_each_is_still_possible() -> None:
    assert units(select([pool([1.0, 2]), pool([3.0, 4]), pool([5.0, 6])], 0.6)) == [[1], [1], [1]]


def widths(kept: list[np.ndarray]) -> float:
    """MACs of a chain of linear layers between the pools."""
    n = [8, *(int(k.sum()) for k in kept), 10]
    return float(sum(a * b for a, b in pairwise(n)))


def test_a_budget_is_used_up_to_the_next_unit() -> None:
    rng = np.random.default_rng(0)
    pools = [pool(rng.random(n)) for n in (64, 48, 96)]
    limit = widths([np.ones(p.size, bool) for p in pools]) / 2
    for scope in ("global", "layer"):
        kept = within(pools, widths, limit, scope)
        assert 0.93 * limit < widths(kept) <= limit
    best = max((widths(select(pools, k / 208)), k) for k in range(206) if widths(select(pools, k / 208)) <= limit)
    assert widths(within(pools, widths, limit)) == best[0]


def test_a_budget_that_everything_meets_cuts_nothing() -> None:
    pools = [pool(np.arange(8.0)), pool(np.arange(4.0))]
    for scope in ("global", "layer"):
        assert all(k.all() for k in within(pools, widths, 1e9, scope))


def test_a_budget_that_nothing_meets() -> None:
    pools = [pool(np.arange(8.0), least=2), pool(np.arange(4.0))]
    with pytest.raises(PassError, match=r"the smallest net that the floors allow costs 28, more than the budget of 27. Raise"):
        within(pools, widths, 27)
    assert widths(within(pools, widths, 28)) == 28
    with pytest.raises(PassError, match="the smallest net"):
        within(pools, widths, 27, "layer")


@st.composite
def random_pools(draw: st.DrawFn) -> list[Pool]:
    pools = []
    for i in range(draw(st.integers(1, 4))):
        cells, size = draw(st.integers(1, 3)), draw(st.integers(1, 8))
        n = cells * size
        scores = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
        multiple = draw(st.sampled_from([1, 2, 4]))
        least = draw(st.integers(1, 4))
        reserved = np.array(draw(st.lists(st.sampled_from([False, False, False, True]), min_size=n, max_size=n)))
        cells_of = np.array(draw(st.permutations(np.repeat(np.arange(cells), size).tolist())))
        own = draw(st.sampled_from([None, None, None, 0.5]))
        pools.append(Pool(str(i), np.array(scores, np.float64), cells_of, multiple, least, None, reserved, own))
    return pools


@settings(max_examples=150, deadline=None)
@given(random_pools(), st.sampled_from(["global", "layer"]))
def test_every_selection_is_legal_and_nested(pools: list[Pool], scope: str) -> None:
    if all(p.size < p.step for p in pools):
        return
    total = sum(p.size for p in pools if p.ratio is None)
    before: list[np.ndarray] | None = None
    for cut in range(total):
        try:
            kept = select(pools, cut / total, scope)
        except PassError as e:
            assert scope == "global" and "would empty a layer" in str(e) and total - cut < sum(p.ratio is None for p in pools)
            break
        for p, k in zip(pools, kept, strict=True):
            r = int(k.sum())
            assert p.reserved is not None and k[p.reserved].all()
            assert len(set(np.bincount(p.cells[k], minlength=p.number_of_cells).tolist())) == 1
            assert r == p.size or r % p.step == 0 and r >= min(p.least, p.size)
            free = ~k & ~p.reserved
            for c in range(p.number_of_cells):
                stays, goes = p.scores[k & ~p.reserved & (p.cells == c)], p.scores[free & (p.cells == c)]
                assert not len(stays) or not len(goes) or stays.min() >= goes.max()
        if before is not None:
            assert all((b | ~k).all() for b, k in zip(before, kept, strict=True))
        before = kept


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5), st.data())
def test_the_global_count_is_exact_and_the_best_stay(scores: list[list[int]], data: st.DataObject) -> None:
    total = sum(map(len, scores))
    number = data.draw(st.integers(len(scores), total))
    pools = [pool(s) for s in scores]
    kept = select(pools, (total - number) / total)
    assert sum(int(k.sum()) for k in kept) == number
    gone = [p.scores[~k].max(initial=-1) for p, k in zip(pools, kept, strict=True)]
    for p, k in zip(pools, kept, strict=True):
        if k.sum() > 1:  # beyond what is reserved, no unit stays that is worse than one that goes
            assert p.scores[k].min() >= max(gone)


@settings(max_examples=60, deadline=None)
@given(random_pools(), st.floats(0.05, 1.0), st.sampled_from(["global", "layer"]))
def test_a_budget_holds_and_the_next_step_does_not_fit(pools: list[Pool], share: float, scope: str) -> None:
    if all(p.size < p.step for p in pools):
        return
    total = sum(p.size for p in pools)
    limit = share * widths([np.ones(p.size, bool) for p in pools])
    try:
        kept = within(pools, widths, limit, scope)
    except PassError as e:
        assert "the smallest net" in str(e)
        return
    assert widths(kept) <= limit
    ranked = sum(p.ratio is None for p in pools)
    fitting = []
    for cut in range(total):
        for part in (total, *(p.size for p in pools)) if scope == "layer" else (sum(p.size for p in pools if p.ratio is None),):
            if cut < part and (scope == "layer" or part - cut >= ranked):
                cost = widths(select(pools, cut / part, scope))
                fitting += [cost] if cost <= limit else []
    if fitting:
        assert widths(kept) >= max(fitting)


def test_a_hundred_thousand_units_are_fast() -> None:
    rng = np.random.default_rng(0)
    pools = [pool(rng.random(1000), cells=4, multiple=8) for _ in range(100)]
    times = []
    for _ in range(5):
        start = time.process_time()
        select(pools, 0.5)
        times.append(time.process_time() - start)
    assert min(times) < 0.05
