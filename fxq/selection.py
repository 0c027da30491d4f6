"""Which units (channels, attention heads) stay: exact top-k over all layers or in each one, with floors, caps, multiples and equal cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxq.errors import PassError

_WHERE = "prune-channels"
_EPSILON = 1e-9
"""Added before a floor: 0.3 * 10 is 3 units although the product of the doubles may be a hair less."""

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False)
class Pool:
    """Units of which some are cut, with one count: the channels of one coupled group, or its attention heads.

    Args:
        name: for errors.
        scores: float64 ``[n]``, larger is more important, no NaN.
        cells: int64 ``[n]``, the cell of each unit, ``0..m-1``. All cells have the same size and keep the same number of units (grouped convolutions).
        columns: int64 ``[n]``: cells of a second partition that crosses the first one evenly (a grouped convolution before and one behind a channel
            shuffle); both keep the same number in each of their cells. None: there is one partition.
        multiple: the kept count is a multiple of it and of the number of cells.
        least: floor of the kept count; the whole pool where it is larger.
        most: cap of the kept count; None for no cap.
        reserved: bool ``[n]``, units that always stay.
        ratio: share to cut of this pool alone; then it takes no part in the global ranking.

    Raises:
        PassError: lengths differ, NaN, unequal cells, ``ratio`` outside [0, 1), or no count that all the limits allow.
    """

    name: str
    scores: Floats
    cells: Ints
    multiple: int = 1
    least: int = 1
    most: int | None = None
    reserved: Bools | None = None
    ratio: float | None = None
    columns: Ints | None = None

    def __post_init__(self) -> None:
        n, where = len(self.scores), f"{_WHERE} / {self.name}"
        if not n or self.cells.shape != (n,) or self.reserved is not None and self.reserved.shape != (n,):
            raise PassError("scores, cells and reserved units must be of one length, at least 1", where=where)
        if np.isnan(self.scores).any():
            first = int(np.flatnonzero(np.isnan(self.scores))[0])
            raise PassError(f"the score of unit {first} is not a number", where=where, way_out="Look for NaN in the weights, the batch norms or the gradients")
        if self.cells.min() < 0 or len(set(np.bincount(self.cells).tolist())) != 1:
            raise PassError("the cells of a pool must be of equal size", where=where)
        if self.columns is not None and (self.columns.shape != (n,) or len(set(np.bincount(self._crossed, minlength=self._crossings).tolist())) != 1):
            raise PassError("the two partitions of a pool must cross evenly", where=where)
        if self.ratio is not None:
            _check_ratio(self.ratio, where)
        if self.multiple < 1 or self.least < 1:
            raise PassError(f"multiple {self.multiple} and floor {self.least} must be at least 1", where=where)
        if self.most is not None:
            self._check_cap(self.most, where)

    def _check_cap(self, most: int, where: str) -> None:
        if self.least > most:
            raise PassError(f"the floor {self.least} is larger than the cap {most}", where=where, way_out="Lower the floor or raise the cap")
        if self.needed > most:
            raise PassError(f"{self.needed} units must stay, more than the cap {most}", where=where, way_out="Raise the cap or keep this layer")
        low, high = self._bounds
        if low > high and high < self.size // self.step * self.step:
            raise PassError(
                f"no multiple of {self.step} lies between the floor {max(self.least, self.needed)} and the cap {most}",
                where=where,
                way_out="Change the multiple, the floor or the cap",
            )

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.scores)

    @property
    def number_of_cells(self) -> int:
        """Number of cells, at least 1."""
        return int(self.cells.max()) + 1

    @property
    def number_of_columns(self) -> int:
        """Number of cells of the second partition, at least 1."""
        return 1 if self.columns is None else int(self.columns.max()) + 1

    @property
    def _crossings(self) -> int:
        return self.number_of_cells * self.number_of_columns

    @property
    def _crossed(self) -> Ints:
        """Cell of both partitions together."""
        return self.cells if self.columns is None else self.cells * self.number_of_columns + self.columns

    @property
    def step(self) -> int:
        """What the kept count is a multiple of: the least common multiple of ``multiple`` and the numbers of cells of both partitions."""
        return math.lcm(self.multiple, self.number_of_cells, self.number_of_columns)

    @property
    def needed(self) -> int:
        """The least count that keeps all reserved units, with as many in each cell."""
        if self.reserved is None or not self.reserved.any():
            return 0
        return self._crossings * int(np.bincount(self._crossed[self.reserved]).max())

    @property
    def _bounds(self) -> tuple[int, int]:
        floor = max(min(self.least, self.size), self.needed)
        high = self.size if self.most is None else min(self.size, self.most)
        return max(self.step, -(-floor // self.step) * self.step), high // self.step * self.step

    def rounded(self, count: int) -> int:
        """The legal count next to ``count``: the nearest multiple of ``step``, ties up, inside floor and cap.

        A pool with fewer units than ``step``, or without a multiple of it between its floor and its width, stays whole.
        """
        low, high = self._bounds
        if self.size < self.step or low > high:
            return self.size
        return min(max((2 * count + self.step) // (2 * self.step) * self.step, low), high)

    def order_in_cells(self) -> Ints:
        """int64 ``[n]``: the place of each unit in its cell (of both partitions), reserved units first, then by score, ties by index."""
        free = np.zeros(self.size, np.bool_) if self.reserved is None else ~self.reserved
        place = np.empty(self.size, np.int64)
        place[np.lexsort((-self.scores, free, self._crossed))] = np.arange(self.size) % (self.size // self._crossings)
        return place

    def kept(self, count: int, place: Ints) -> Bools:
        """bool ``[n]``: the best units, as many in each cell.

        Args:
            count: a legal count. place: of ``order_in_cells``.
        """
        if self.columns is None or count == self.size:
            return place < count // self.number_of_cells
        rows, columns = self.number_of_cells, self.number_of_columns
        level, rest = divmod(count, rows * columns)
        gains = np.full((rows, columns), -np.inf)
        at = place == level
        gains[self.cells[at], self.columns[at]] = self.scores[at]
        more = _even(gains, rest // rows)
        return place < level + more[self.cells, self.columns]


def _even(gains: Floats, each: int) -> Ints:
    """A matrix of zeros and ones with ``each`` ones in every row and as many in every column as in any other; one of great total gain.

    It begins with the even diagonal pattern; then pairs of rows trade columns as long as that gains.
    """
    rows, columns = gains.shape
    taken = np.zeros((rows, columns), np.int64)
    for i in range(rows * each):
        taken[i // each, i % columns] = 1
    for _ in range(rows):
        traded = False
        for a in range(rows):
            for b in range(a + 1, rows):
                swap = gains[b] - gains[a]  # what moving a one from row a to row b gains, by column
                down = np.flatnonzero((taken[a] == 1) & (taken[b] == 0))
                up = np.flatnonzero((taken[a] == 0) & (taken[b] == 1))
                if not len(down):
                    continue
                down, up = down[np.argsort(-swap[down], kind="stable")], up[np.argsort(swap[up], kind="stable")]
                pays = swap[down] - swap[up] > 0
                taken[a, down[pays]] = taken[b, up[pays]] = 0
                taken[b, down[pays]] = taken[a, up[pays]] = 1
                traded |= bool(pays.any())
        if not traded:
            break
    return taken


class _Ranking:
    """The counts and kept units of pools for every size of the cut; sorting is done once."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = pools
        self.places = [p.order_in_cells() for p in pools]
        self.ranked = [i for i, p in enumerate(pools) if p.ratio is None]
        self.total = sum(pools[i].size for i in self.ranked)
        self.floors = np.zeros(len(pools), np.int64)
        self.owners = np.zeros(0, np.int64)
        if self.ranked:
            self._rank()

    def _rank(self) -> None:
        scores, positions, owners, free = [], [], [], []
        for i in self.ranked:
            p = self.pools[i]
            always = np.ones(p.size, np.bool_) if p.reserved is None else ~p.reserved
            self.floors[i] = min(p.size, max(p.least, p.size - int(always.sum())))
            rest = np.ones(p.size, np.bool_)
            rest[np.lexsort((-p.scores, always))[: self.floors[i]]] = False
            scores.append(p.scores)
            positions.append((np.arange(p.size) + 0.5) / p.size)
            owners.append(np.full(p.size, i))
            free.append(rest)
        order = np.lexsort((np.concatenate(positions), -np.concatenate(scores)))
        self.owners = np.concatenate(owners)[order][np.concatenate(free)[order]]

    def of_number(self, number: int) -> list[int]:
        """Counts before rounding when ``number`` units of all ranked pools stay; not below their floors."""
        taken = np.bincount(self.owners[: max(0, number - int(self.floors.sum()))], minlength=len(self.pools))
        return [int(f + t) if p.ratio is None else _remaining(p.size, p.ratio) for p, f, t in zip(self.pools, self.floors, taken, strict=True)]

    def of_ratio(self, ratio: float) -> list[int]:
        """Counts before rounding when ``ratio`` of each pool goes."""
        return [_remaining(p.size, ratio if p.ratio is None else p.ratio) for p in self.pools]

    def kept(self, counts: Sequence[int]) -> list[Bools]:
        return [p.kept(p.rounded(c), place) for p, place, c in zip(self.pools, self.places, counts, strict=True)]


def select(pools: Sequence[Pool], ratio: float, scope: str = "global") -> list[Bools]:
    """The units that stay.

    ``global``: of all units together ``total - floor(ratio * total)`` stay, first the best ``least`` of each pool, then by score; equal scores by the place
    in the pool ``(i + 1/2) / n``, so that ties spread evenly over the pools, then by the order of the pools. ``layer``: the same share of each pool.
    Then each count is rounded (``Pool.rounded``) and each cell keeps its best units.

    Args:
        pools: in the order of the graph.
        ratio: share of the units to cut, in [0, 1).
        scope: ``"global"`` or ``"layer"``.

    Returns:
        bool ``[n]`` for each pool, True for units that stay. A larger ``ratio`` keeps a subset of what a smaller one keeps.

    Raises:
        PassError: a ratio that would empty a pool, or a multiple larger than every pool.
    """
    _check(pools, scope)
    _check_ratio(ratio, _WHERE)
    ranking = _Ranking(pools)
    if scope == "layer":
        return ranking.kept(ranking.of_ratio(ratio))
    number = _remaining(ranking.total, ratio)
    if number < len(ranking.ranked):
        highest = math.floor(1000 * (1 - len(ranking.ranked) / ranking.total)) / 1000
        raise PassError(
            f"ratio {ratio:g} leaves {number} of {ranking.total} units for {len(ranking.ranked)} layers and would empty a layer",
            where=_WHERE,
            way_out=f"Choose a ratio of at most {highest:g}",
        )
    return ranking.kept(ranking.of_number(number))


def within(pools: Sequence[Pool], cost: Callable[[list[Bools]], float], limit: float, scope: str = "global") -> list[Bools]:
    """The largest selection whose cost is within a budget (MACs, parameters, bytes).

    What stays at a higher number of units contains what stays at a lower one, so a cost that grows with the units is a step function of their number and
    bisection finds its last step below the limit; what is left of the limit then goes to single pools. What is returned always fits.

    Args:
        pools: in the order of the graph.
        cost: of what stays; must not fall when more units stay. Called about ``log2`` of the number of units times.
        limit: the highest allowed cost, in the unit of ``cost``.
        scope: ``"global"`` searches over the number of units, ``"layer"`` over the ratio of each pool.

    Returns:
        bool ``[n]`` for each pool.

    Raises:
        PassError: the least selection costs more than ``limit``, or as in ``select``.
    """
    _check(pools, scope)
    ranking = _Ranking(pools)
    if scope == "layer":
        sizes = {pools[i].size for i in ranking.ranked}
        ratios = sorted({k / n for n in sizes for k in range(n)} or {0.0}, reverse=True)
        low, high = 0, len(ratios) - 1
    else:
        ratios = []
        low, high = int(ranking.floors.sum()), ranking.total

    def at(step: int) -> list[Bools]:
        if scope == "layer":
            return ranking.kept(ranking.of_ratio(ratios[step]))
        return ranking.kept(ranking.of_number(step))

    best = at(low)
    if (reached := cost(best)) > limit:
        raise PassError(
            f"the smallest net that the floors allow costs {reached:.6g}, more than the budget of {limit:.6g}",
            where=_WHERE,
            way_out="Raise the budget, lower floors and multiples, or let more layers be pruned",
        )
    if cost(whole := at(high)) <= limit:
        return whole
    while high - low > 1:  # at low it fits, at high it does not
        middle = (low + high) // 2
        found = at(middle)
        if cost(found) <= limit:
            low, best = middle, found
        else:
            high = middle
    return best if scope == "layer" else _filled(ranking, best, cost, limit)


def _filled(ranking: _Ranking, best: list[Bools], cost: Callable[[list[Bools]], float], limit: float) -> list[Bools]:
    """What is left of a budget, spent: pools grow by their steps, the one whose next unit scores most first, as long as that fits."""
    pools, found, open_ = ranking.pools, list(best), set(ranking.ranked)
    while open_:
        gains = {i: float(pools[i].scores[~found[i]].max()) for i in open_ if not found[i].all()}
        if not gains:
            break
        i = max(gains, key=lambda j: (gains[j], -j))
        count = pools[i].rounded(int(found[i].sum()) + pools[i].step)
        trial = [pools[i].kept(count, ranking.places[i]) if j == i else f for j, f in enumerate(found)]
        if count > int(found[i].sum()) and cost(trial) <= limit:
            found = trial
        else:
            open_.discard(i)
    return found


def _remaining(n: int, ratio: float) -> int:
    return n - math.floor(ratio * n + _EPSILON)


def _check_ratio(ratio: float, where: str) -> None:
    if not 0 <= ratio < 1:
        fact = f"ratio {ratio:g} would empty every layer" if ratio >= 1 else f"ratio {ratio:g} is not a share"
        raise PassError(fact, where=where, way_out="Choose a ratio from 0 (nothing is cut) to below 1")


def _check(pools: Sequence[Pool], scope: str) -> None:
    if scope not in ("global", "layer"):
        raise PassError(f"unknown scope {scope!r}", where=_WHERE, way_out="Choose 'global' or 'layer'")
    if pools and all(p.size < p.step for p in pools):
        widest = max(pools, key=lambda p: p.size)
        step = f"{widest.step}" if widest.step == widest.multiple else f"{widest.step} ({widest.multiple}, equal in {widest.number_of_cells} cells)"
        raise PassError(
            f"a multiple of {step} is larger than every layer; the widest, {widest.name!r}, has {widest.size} units",
            where=_WHERE,
            way_out=f"Choose a multiple of at most {widest.size}",
        )
