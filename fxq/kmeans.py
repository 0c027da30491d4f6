"""Codebooks of weights: one-dimensional k-means on a histogram, exact by dynamic programming.

Clusters of numbers on a line are intervals, so the best ``k`` of them are found exactly in ``O(k B log B)`` on ``B`` sorted points (Wang and Song 2011,
"Ckmeans.1d.dp"; the divide and conquer of the best split). Up to 2^20 values are sorted; more are counted in cells whose width grows with the distance from
the median (a relative width of 1/2048), or sampled where cells are too wide. The dynamic program runs on at most ``bins`` groups of these points, and
Lloyd's steps on the points themselves finish the work; when there are at most ``bins`` different values the codebook is the best one there is.

Lloyd's algorithm from the starts of Han et al. (2016, arXiv 1510.00149, section 3.2) is there for comparison, entropy-constrained codebooks after Chou,
Lookabaugh and Gray (1989, "Entropy-constrained vector quantization").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxq.errors import FxqError
from fxq.histogram import CHUNK, Array, Cells, Points, float32_below, points_of, sample_of

INITS = ("optimal", "linear", "quantile", "density")
MOST = 4096
"""Greatest number of entries that can be asked for."""
SAMPLE = 1 << 16
BLUR = 0.02  # part of the error that cells may hide; above it a sample of the values is sorted instead
STEPS = 2000


def codebook(values: Tensor, k: int, *, init: str = "optimal", rate: float = 0.0, bins: int | None = None, name: str | None = None) -> Tensor:
    """The entries that stand for the values.

    Args:
        values: weights other than 0, any shape, finite; read as float32.
        k: how many entries at most, 1 to :data:`MOST`. When there are no more different values than that, they are the entries.
        init: ``"optimal"``; or Lloyd's algorithm to convergence from ``"linear"`` (``k`` numbers equally spaced from the least to the greatest value),
            ``"density"`` (the weights at which the cumulative distribution reaches ``i / (k - 1)``) or ``"quantile"`` (``torch.quantile`` at
            ``(i + 0.5) / k``, the middles of ``k`` equally large groups).
        rate: 0 minimises the squared error. Above 0 it is the price of a bit: the sum of ``mean((w - c)^2) / var(w) + rate * entropy`` is minimised, the
            entropy in bits a weight, from the optimal start; fewer entries may be left.
        bins: points for the dynamic program; ``None``: 16 for each entry, at least 2048.
        name: of the weight, for errors.

    Returns:
        float32 ``[K]`` on the CPU, ``K <= k``, ascending, each one different; empty without values. Entries that no value chooses are dropped.

    Raises:
        FxqError: for NaN or infinity, ``k``, ``bins`` or ``rate`` out of range, an unknown ``init``, or a rate with another ``init`` than ``"optimal"``.
    """
    return torch.from_numpy(_book(_flat(values), k, init, rate, bins, name)[0])


def cluster(
    values: Tensor, k: int, *, init: str = "optimal", rate: float = 0.0, bins: int | None = None, name: str | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The codebook and the entry of each value; arguments and errors as of :func:`codebook`.

    Returns:
        Codes, uint8 (int16 from 256 entries on), shape of ``values``, on its device: 1 stands for the first entry, 0 is never used.
        The codebook as :func:`codebook` gives it; every entry is used.
    """
    flat = _flat(values)
    book, ends = _book(flat, k, init, rate, bins, name)
    codes, used = _assign(flat, ends)
    if flat.size and not used.all():
        codes = np.concatenate([[0], np.cumsum(used)]).astype(_dtype(int(used.sum())))[codes]
        book = book[used]
    return torch.from_numpy(codes).reshape(values.shape).to(values.device), torch.from_numpy(book)


def assign(values: Tensor, book: Tensor, ends: Tensor | None = None) -> Tensor:
    """The nearest entry of each value; half-way between two the lower one.

    Args:
        values: any shape, read as float32. book: ``[K]``, ascending. ends: of :func:`boundaries`; ``None``: those of ``book`` without a rate.

    Returns:
        Codes as of :func:`cluster`: 1 for ``book[0]``.
    """
    codes, _ = _assign(_flat(values), (boundaries(book) if ends is None else ends).to("cpu", torch.float32).numpy())
    return torch.from_numpy(codes).reshape(values.shape).to(values.device)


def boundaries(book: Tensor, bits: Tensor | None = None, price: float = 0.0) -> Tensor:
    """Where intervals end: a value up to ``ends[i]`` belongs to entry ``i`` or one before.

    Args:
        book: ``[K]``, ascending. bits: what each entry costs, ``[K]``. price: of a bit, in units of the squared error.

    Returns:
        float32 ``[K - 1]``, ascending. With a price entry ``i`` minimises ``(w - book[i])^2 + price * bits[i]``; one that is never the best has an empty
        interval (two equal ends).
    """
    c = book.detach().to("cpu", torch.float64).numpy()
    return torch.from_numpy(float32_below(_ends(c, None if bits is None else price * bits.to("cpu", torch.float64).numpy())))


# ---- arguments -------------------------------------------------------------------------------------------------------


def _flat(values: Tensor) -> Array:
    flat: Array = values.detach().reshape(-1).to("cpu", torch.float32).numpy()
    return flat


def _check(flat: Array, k: int, init: str, rate: float, bins: int | None, name: str | None) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST:
        raise FxqError(f"a codebook of {k!r} entries", where=name, way_out=f"Ask for 1 to {MOST}")
    if init not in INITS:
        raise FxqError(f"no start {init!r} of a codebook", where=name, way_out="Known: " + ", ".join(INITS))
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < np.inf or (rate and init != "optimal"):
        raise FxqError(f"rate {rate!r} with the start {init!r}", where=name, way_out='A rate is a number from 0 on, above 0 with init="optimal" only')
    if bins is not None and not (isinstance(bins, int) and k <= bins <= 1 << 16):
        raise FxqError(f"{bins!r} bins for {k} entries", where=name, way_out=f"Ask for {k} to {1 << 16}, or leave bins out")
    for i in range(0, flat.size, CHUNK):
        fine = np.isfinite(flat[i : i + CHUNK])
        if not fine.all():
            at = i + int(np.argmin(fine))
            raise FxqError(f"the weight holds {flat[at]} (flat index {at})", where=name, way_out="Weights that are shared must be finite")


def _few(flat: Array, k: int) -> Array | None:
    """The different values, ascending, when there are at most ``k``."""
    found, i = np.unique(flat[:: -(-flat.size // SAMPLE)]), 0
    while len(found) <= k:
        cells = Cells(_nearest(found))
        while i < flat.size:
            part = flat[i : i + CHUNK]
            other = part[found[cells.index(part)] != part]
            if other.size:
                before, found = len(found), np.union1d(found, other[:SAMPLE])
                if len(found) == before:  # subnormal numbers where the processor takes them for 0
                    return None
                break
            i += CHUNK
        else:
            return found
    return None


# ---- codebooks -------------------------------------------------------------------------------------------------------


def _book(flat: Array, k: int, init: str, rate: float, bins: int | None, name: str | None) -> tuple[Array, Array]:
    """Entries and the ends of their intervals, float32."""
    _check(flat, k, init, rate, bins, name)
    if not flat.size:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    few = _few(flat, k)
    if few is not None and not rate:
        return few, _nearest(few)
    points = points_of(flat)
    c = _converged(points, k, init, bins)
    if points.blur > BLUR * points.inertia(points.edges(_ends(c, None))):  # narrow clusters far from the median
        points = points_of(sample_of(flat))
        c = _converged(points, k, init, bins)
    if rate:
        return _rated(points, c, rate * points.variance)
    book = np.unique(c.astype(np.float32))
    return book, _nearest(book)


def _converged(p: Points, k: int, init: str, bins: int | None) -> Array:
    return _lloyd(p, _optimal(p, k, bins or max(2048, 16 * k)) if init == "optimal" else _start(p, k, init))


def _optimal(p: Points, k: int, bins: int) -> Array:
    """Means of the best ``k`` intervals of groups of points.

    ``best[j]``: least cost of the first ``j`` groups in ``m`` intervals. The last split of column ``j`` is monotone in ``j`` (the cost obeys the quadrangle
    inequality), so columns are solved with halving strides, each between the splits of its neighbours. The smallest of equal splits is taken.
    """
    edges = p.groups(bins)
    n, s, q = p.n[edges], p.s[edges], p.q[edges]
    size = len(edges) - 1
    k = min(k, size)

    def cost(i: Array, j: Array) -> Array:
        w, t = n[j] - n[i], s[j] - s[i]
        found: Array = np.maximum(q[j] - q[i] - t * t / np.where(w > 0, w, 1.0), 0.0)
        return found

    best = cost(np.zeros(size + 1, np.int64), np.arange(size + 1))
    split = np.zeros((k, size + 1), np.int32)
    for m in range(1, k):
        row, now = np.zeros(2 * size + 2, np.int64), np.zeros(size + 1)
        row[size + 1 :] = size
        stride = 1 << size.bit_length() - 1
        while stride:
            col = np.arange(stride, size + 1, 2 * stride)
            low = row[col - stride]
            width = np.minimum(row[np.minimum(col + stride, size + 1)], col) - low + 1
            begin = np.cumsum(width) - width
            tried = np.arange(int(width.sum())) + np.repeat(low - begin, width)
            value = best[tried] + cost(tried, np.repeat(col, width))
            least = np.minimum.reduceat(value, begin)
            hits = np.flatnonzero(value == np.repeat(least, width))
            row[col], now[col] = tried[hits[np.searchsorted(hits, begin)]], least
            stride //= 2
        best, split[m] = now, row[: size + 1]
    cuts = [size]
    for m in range(k - 1, 0, -1):
        cuts.append(int(split[m, cuts[-1]]))
    means, _ = p.means(edges[np.array([0, *cuts[::-1]])])
    return means[~np.isnan(means)]


def _start(p: Points, k: int, init: str) -> Array:
    if init == "linear":
        return np.linspace(p.x[0], p.x[-1], k)
    reached = p.n[1:] - p.n[0]
    last = len(p.x) - 1
    if init == "density":
        return np.unique(p.x[np.minimum(np.searchsorted(reached, np.linspace(0, 1, k) * p.total), last)])
    at = (np.arange(k) + 0.5) / k * (p.total - 1)
    below, above = (p.x[np.minimum(np.searchsorted(reached, f(at), side="right"), last)] for f in (np.floor, np.ceil))
    return np.unique(below + (at - np.floor(at)) * (above - below))


def _lloyd(p: Points, c: Array) -> Array:
    """Means of the nearest points, again and again until none moves; an entry without points stays until the end, then it is dropped."""
    before = None
    for _ in range(STEPS):
        edges = p.edges(_ends(c, None))
        if before is not None and (edges == before).all():
            break
        means, n = p.means(edges)
        c, before = np.sort(np.where(n > 0, means, c)), edges
    return c[np.diff(p.n[p.edges(_ends(c, None))]) > 0]


def _rated(p: Points, c: Array, price: float) -> tuple[Array, Array]:
    """Entries and ends with a price on bits: ends, means and frequencies in turn until no point moves."""
    before: Array = np.zeros(0)
    count = np.diff(p.n[p.edges(_ends(c, None))])
    for _ in range(STEPS):
        edges = p.edges(_ends(c, -price * np.log2(count / p.total)))
        c, count = p.means(edges)
        c, count = c[count > 0], count[count > 0]
        if len(edges) == len(before) and (edges == before).all():
            break
        before = edges
    book, owner = np.unique(c.astype(np.float32), return_inverse=True)
    merged = np.bincount(owner, count)
    return book, float32_below(_ends(book.astype(np.float64), -price * np.log2(merged / p.total)))


def _nearest(book: Array) -> Array:
    """Ends of the intervals of the nearest entry, float32."""
    return float32_below(_ends(book.astype(np.float64), None))


def _ends(c: Array, fee: Array | None) -> Array:
    """Greatest value of each interval but the last, float64: half-way between neighbours, moved by the difference of their fees.

    Entry ``i`` is the best where the line ``2 c x - c^2 - fee`` is the highest: one that is below the others' everywhere gets an empty interval.
    """
    if fee is None:
        return (c[1:] + c[:-1]) / 2
    kept: list[int] = []
    froms: list[float] = []
    for i in range(len(c)):
        while kept:
            j = kept[-1]
            x = float((c[i] + c[j]) / 2 + (fee[i] - fee[j]) / (2 * (c[i] - c[j])))
            if x > froms[-1]:
                break
            kept.pop()
            froms.pop()
        froms.append(x if kept else -np.inf)
        kept.append(i)
    starts = np.full(len(c), np.inf)
    starts[kept] = froms
    return np.minimum.accumulate(starts[::-1])[::-1][1:]


# ---- codes -----------------------------------------------------------------------------------------------------------


def _dtype(entries: int) -> Any:
    return np.uint8 if entries < 256 else np.int16


def _assign(flat: Array, ends: Array) -> tuple[Array, Array]:
    """Codes (1 for the first interval), and which intervals hold a value."""
    codes, used = np.empty(flat.size, _dtype(len(ends) + 1)), np.zeros(len(ends) + 1, bool)
    cells = Cells(ends) if flat.size > SAMPLE else None
    for i in range(0, flat.size, CHUNK):
        part = flat[i : i + CHUNK]
        index = np.searchsorted(ends, part, side="left") if cells is None else cells.index(part)
        used |= np.bincount(index, minlength=len(used)) > 0
        codes[i : i + CHUNK] = index + 1
    return codes, used
