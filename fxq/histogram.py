"""Numbers on a line, for codebooks: sorted points with prefix sums, and cells of a fine grid that values are counted in and looked up by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SORTED = 1 << 20
"""Number of values up to which each one is a point."""
CHUNK = 1 << 22
SHIFT = 12  # a cell: sign, exponent and 11 bits of the mantissa of the float32 distance from the centre
CELLS = 1 << (32 - SHIFT)
WIDTH = 2.0**-11  # of a cell, at most this part of its distance
UNSURE = np.iinfo(np.int16).max


@dataclass(frozen=True)
class Points:
    """Sorted points with weights, and their prefix sums ``[P + 1]``.

    The sums are 0 at the median and values are distances from it: far outliers do not take the digits of the others.

    Attributes:
        x: float64, ascending. shift: their median.
        n, s, q: sums of weights, of distances and of their squares before each point.
        blur: greatest squared error that points hide which stand for more than one value.
    """

    x: Array
    shift: float
    n: Array
    s: Array
    q: Array
    blur: float = 0.0

    @staticmethod
    def of(x: Array, count: Array, width: float = 0.0) -> Points:
        """``width``: of the cell that a point stands for, as a part of its distance from the median."""
        middle = int(np.searchsorted(np.cumsum(count), count.sum() / 2))
        d, sums = x - x[middle], []
        for a in (count, count * d, count * d * d):
            left, right = a[:middle][::-1].cumsum()[::-1], a[middle:].cumsum()
            sums.append(np.concatenate([-left, [0.0], right]))
        blur = float((count * d * d)[count > 1].sum()) * width * width / 12
        return Points(x, float(x[middle]), sums[0], sums[1], sums[2], blur)

    @property
    def total(self) -> float:
        """Number of the values."""
        return float(self.n[-1] - self.n[0])

    @property
    def variance(self) -> float:
        """Of the values."""
        s, q = (float(a[-1] - a[0]) / self.total for a in (self.s, self.q))
        return max(q - s * s, 0.0)

    def groups(self, bins: int) -> Array:
        """Edges (indices of points, ``[B + 1]``) of at most ``bins`` groups.

        Half of them follow the density to the power 1/3, as the entries of a good codebook do; the other half the values' number, whatever outliers do.
        """
        if len(self.x) <= bins:
            return np.arange(len(self.x) + 1)
        count, gap = np.diff(self.n), np.diff(self.x, append=self.x[-1])
        gap[1:] = (gap[1:] + gap[:-1]) / 2
        wanted = np.cbrt(count * gap * gap)
        where = np.cumsum(wanted / wanted.sum() + count / count.sum()) / 2
        at = np.minimum((where * bins).astype(np.int64), bins - 1)
        return np.concatenate([[0], np.flatnonzero(np.diff(at)) + 1, [len(self.x)]])

    def means(self, edges: Array) -> tuple[Array, Array]:
        """Mean (NaN for none) and number of the values in each interval of points."""
        n = np.diff(self.n[edges])
        return np.divide(np.diff(self.s[edges]), n, out=np.full(len(n), np.nan), where=n > 0) + self.shift, n

    def inertia(self, edges: Array) -> float:
        """Sum of the squared distances from the means of the intervals, without :attr:`blur`."""
        n, s, q = (np.diff(a[edges]) for a in (self.n, self.s, self.q))
        return float(np.maximum(q - s * s / np.where(n > 0, n, 1.0), 0.0).sum())

    def edges(self, ends: Array) -> Array:
        """Indices of points for boundaries of values."""
        return np.concatenate([[0], np.searchsorted(self.x, ends, side="right"), [len(self.x)]])


def sample_of(flat: Array) -> Array:
    """:data:`SORTED` values drawn with a fixed seed (equal steps could follow a pattern of the weights), the least and the greatest one among them."""
    some = flat[np.random.default_rng(0).integers(flat.size, size=SORTED - 2)]
    return np.append(some, [flat.min(), flat.max()])


def points_of(flat: Array) -> Points:
    """Each different value with its number, or the occupied cells with their means and numbers.

    Args:
        flat: float32, finite, not empty.
    """
    if flat.size <= SORTED:
        x, n = np.unique(flat, return_counts=True)
        return Points.of(x.astype(np.float64), n.astype(np.float64))
    centre = np.median(flat[:: flat.size >> 16])
    count, total = np.zeros(CELLS), np.zeros(CELLS)
    for i in range(0, flat.size, CHUNK):
        part = flat[i : i + CHUNK]
        cell = keys(part, centre)
        count += np.bincount(cell, minlength=CELLS)
        total += np.bincount(cell, part, CELLS)
    half = CELLS // 2
    order = np.concatenate([np.arange(CELLS - 1, half - 1, -1), np.arange(half)])  # cells of negative distances come first, the farthest before
    order = order[count[order] > 0]
    return Points.of(total[order] / count[order], count[order], WIDTH)


def keys(x: Array, centre: Any) -> Array:
    """Cell of each value (float32), int64: a monotone step function of it, apart from the order of negative cells."""
    with np.errstate(over="ignore"):
        d = (x - np.float32(centre)).view(np.uint32)
    d >>= SHIFT
    return d.astype(np.int64)


def float32_below(x: Array) -> Array:
    """The greatest float32 that is not above each number."""
    with np.errstate(over="ignore"):
        y = x.astype(np.float32)
        below: Array = np.where(y > x, np.nextafter(y, np.float32(-np.inf)), y) + np.float32(0)  # no -0.0: cells tell it from 0.0
    return below


class Cells:
    """Index of the interval of each value: a table over cells, and a search for the values in cells that hold an end.

    Args:
        ends: float32, ascending, of at most 32,766 intervals; a value up to ``ends[i]`` is in interval ``i`` or one before.
    """

    def __init__(self, ends: Array) -> None:
        finite = ends[np.isfinite(ends)]
        self.ends, self.centre = ends, np.float32(np.median(finite)) if len(finite) else np.float32(0)
        half = CELLS // 2
        rank = np.concatenate([np.arange(half, CELLS), np.arange(half - 1, -1, -1)])  # of each cell along the line; its own inverse below
        key = rank[keys(ends, self.centre)]
        line = np.searchsorted(key, np.arange(CELLS), side="left")
        line[key] = UNSURE  # an end is in the cell
        self.table = line[rank].astype(np.int16)

    def index(self, x: Array) -> Array:
        """0 for the first interval, int16."""
        found: Array = self.table[keys(x, self.centre)]
        unsure = np.flatnonzero(found == UNSURE)
        found[unsure] = np.searchsorted(self.ends, x[unsure], side="left")
        return found
