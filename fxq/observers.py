"""Observers: a stream of tensors to a range ``(lo, hi)``.

All state lives in buffers, so that saving, loading and going on equals an uninterrupted run bit for bit; nothing takes gradients.

The extremes are always exact (one ``torch.aminmax`` a tensor, which shows NaN and infinity as well). The histogram observers
count at most :data:`SAMPLE` elements of a tensor, evenly strided by a step that shares no factor with its sizes (so no column,
channel or image is favoured); a counted element stands for ``numel / counted`` ones. A quantile ``p`` estimated from ``n``
counted elements has the rank ``p`` with a standard error of ``sqrt(p(1-p)/n)``: 3e-5 for p = 0.9999 and one full sample.
``sample=None`` counts every element.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxq import distributed, numerics
from fxq.errors import CalibrationError, SchemeError, nearest
from fxq.spec import QuantSpec

SAMPLE = 1 << 17
BINS = 2048
_FLOAT32_SAFE = 1e37


def _finite(own_lo: Tensor, own_hi: Tensor, lo: Tensor, hi: Tensor, where: str) -> tuple[Tensor, Tensor]:
    low, high = float(lo), float(hi)
    if not math.isfinite(high - low):
        place = " in another process" if math.isfinite(float(own_hi) - float(own_lo)) else ""
        raise CalibrationError(f"the value holds NaN or infinity{place}", where=where or None, way_out="Look at the inputs and at the layer before it")
    return lo.clone(), hi.clone()


_SCHEMA = "(Tensor own_lo, Tensor own_hi, Tensor lo, Tensor hi, str where) -> (Tensor, Tensor)"
_FINITE = torch.library.custom_op("fxq::finite", _finite, mutates_args=(), schema=_SCHEMA)
"""The check as one operation of a compiled graph, which so raises what an uncompiled one does."""
_FINITE.register_fake(lambda own_lo, own_hi, lo, hi, where: (torch.empty_like(lo), torch.empty_like(hi)))


class Observer(nn.Module):
    """Running extremes of all tensors (the ``minmax`` observer, and the base of the others).

    Attributes:
        lo, hi: exact extremes so far, float32, rank 0.
        has_data: bool, rank 0.
        frozen: when True, :meth:`observe` changes nothing.
        where: what it observes, for errors.
        together: each tensor counts as one with those that the other processes observe in this call (see :mod:`fxq.distributed`).

    Raises:
        SchemeError: for a per-channel grid; :func:`weight_range` serves those.
    """

    lo: Tensor
    hi: Tensor
    has_data: Tensor
    where: str = ""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        if spec.axis is not None:
            raise SchemeError(f"an observer finds one range, the grid {spec} has one for each channel", way_out="Use a /pt grid")
        self.spec, self.frozen, self.together = spec, False, False
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))
        self.register_buffer("has_data", torch.zeros((), dtype=torch.bool))

    def observe(self, x: Tensor, part: bool = False) -> None:
        """Take in one tensor of any shape and float type; an empty one counts for nothing.

        Args:
            x: the values.
            part: it belongs to the same batch as the tensor before it (values that share one grid).

        Raises:
            CalibrationError: when it holds NaN or infinity, in all processes that observe together; the state is then unchanged.
        """
        if self.frozen or (x.numel() == 0 and not (self.together and distributed.world() > 1)):
            return
        x = _in_memory_order(x.detach().to(torch.float32))
        lo, hi = torch.aminmax(x) if x.numel() else (x.new_full((), math.inf), x.new_full((), -math.inf))
        least, greatest = distributed.extremes(lo, hi) if self.together else (lo, hi)
        if not x.numel() and not torch.compiler.is_compiling() and bool(least > greatest):
            return  # no process has a value
        check = _FINITE if torch.compiler.is_compiling() else _finite
        lo, hi = check(lo, hi, least, greatest, self.where)
        self._take(x, lo, hi, part)
        self.has_data.fill_(True)

    def _take(self, x: Tensor, lo: Tensor, hi: Tensor, part: bool) -> None:
        self._widen(lo, hi)

    def _widen(self, lo: Tensor, hi: Tensor) -> None:
        seen = bool(self.has_data)
        self.lo.copy_(torch.minimum(self.lo, lo) if seen else lo)
        self.hi.copy_(torch.maximum(self.hi, hi) if seen else hi)

    def range(self) -> tuple[Tensor, Tensor]:
        """``(lo, hi)``, float32 rank 0; it need not hold 0."""
        return self.lo.clone(), self.hi.clone()

    def merge(self, other: Observer) -> None:
        """Join what ``other``, an observer of the same class, has seen (another process, another part of the data)."""
        assert type(other) is type(self), f"{type(other).__name__} cannot be merged into {type(self).__name__}"
        if bool(other.has_data):
            self._join(other)
            self.has_data.fill_(True)

    def _join(self, other: Observer) -> None:
        self._widen(other.lo, other.hi)


MinMax = Observer


def _in_memory_order(x: Tensor) -> Tensor:
    """The same values with the dimensions in the order of memory: reductions over channels-last tensors are several times slower."""
    if x.ndim < 4 or x.is_contiguous():
        return x
    return x.permute(0, *range(2, x.ndim), 1)


def share(batches: Tensor, momentum: float) -> Tensor:
    """Share of the running batch in a moving average, float64, rank 0: all of it in the first one."""
    now = torch.full((), momentum, dtype=torch.float64, device=batches.device)
    return torch.where(batches == 1, torch.ones_like(now), now)


class MovingAverage(Observer):
    """Moving average of each batch's extremes: ``r <- (1-m) r + m batch``; the first batch sets it.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.1.
    """

    batch: Tensor
    before: Tensor
    batches: Tensor

    def __init__(self, spec: QuantSpec, momentum: float = 0.1) -> None:
        super().__init__(spec)
        self.momentum = momentum
        self.register_buffer("batch", torch.zeros(2))
        self.register_buffer("before", torch.zeros(2))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def _take(self, x: Tensor, lo: Tensor, hi: Tensor, part: bool) -> None:
        ends = torch.stack([lo, hi])
        if part and (torch.compiler.is_compiling() or bool(self.has_data)):
            ends = torch.stack([torch.minimum(lo, self.batch[0]), torch.maximum(hi, self.batch[1])])
        else:
            self.before.copy_(torch.stack([self.lo, self.hi]))
            self.batches += 1
        self.batch.copy_(ends)
        now = share(self.batches, self.momentum)
        average = (1 - now) * self.before.double() + now * self.batch.double()
        self.lo.copy_(average[0])
        self.hi.copy_(average[1])

    def _join(self, other: Observer) -> None:
        """Mean of both ranges, weighted by the number of batches."""
        assert isinstance(other, MovingAverage)
        total = self.batches + other.batches
        share = float(other.batches) / float(total)
        self.lo.copy_((1 - share) * self.lo + share * other.lo)
        self.hi.copy_((1 - share) * self.hi + share * other.hi)
        self.batches.copy_(total)


class Histogram(Observer):
    """Streaming histogram: ``bins`` equal bins over the first range; a tensor beyond it doubles the bin width on that side.

    Doubling merges pairs of bins, so no count is ever split. A symmetric grid counts ``|x|`` from 0 on, others ``x``. While every
    value is the same the histogram is that one point.

    Attributes:
        hist: float64 ``[bins]``, counts (weighted when only a sample is counted).
        edges: float64 ``[2]``, the first and the last edge.
        sample: count at most so many elements of a tensor; ``None`` for all.
    """

    hist: Tensor
    edges: Tensor

    def __init__(self, spec: QuantSpec, *, bins: int = BINS, sample: int | None = SAMPLE) -> None:
        super().__init__(spec)
        assert bins % 2 == 0, "pairs of bins are merged"
        self.bins, self.sample = bins, sample
        self.register_buffer("hist", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("edges", torch.zeros(2, dtype=torch.float64))

    @property
    def absolute(self) -> bool:
        """Counts ``|x|`` instead of ``x``."""
        return self.spec.symmetric

    @property
    def width(self) -> float:
        """Width of a bin."""
        return (float(self.edges[1]) - float(self.edges[0])) / self.bins

    def centres(self) -> Tensor:
        """Middle of each bin, float64 ``[bins]``."""
        return self.edges[0] + (torch.arange(self.bins, dtype=torch.float64, device=self.hist.device) + 0.5) * self.width

    def _take(self, x: Tensor, lo: Tensor, hi: Tensor, part: bool) -> None:
        low, high = float(lo), float(hi)
        if self.absolute:
            low, high = 0.0, max(abs(low), abs(high))
        self._cover(low, high)
        self._widen(lo, hi)
        flat = x.reshape(-1)
        flat = flat[:: stride(x.shape, self.sample)] if self.sample is not None else flat
        self._count(flat.abs() if self.absolute else flat, x.numel() / flat.numel())

    def _count(self, x: Tensor, weight: float) -> None:
        low, high = (float(e) for e in self.edges)
        if low == high:
            self.hist[0] += weight * x.numel()
            return
        if max(abs(low), abs(high)) > _FLOAT32_SAFE:
            x = x.to(torch.float64)
        # The edges are float64: a float32 value at the rim may lie a rounding error outside, and belongs to the last bin.
        bound = torch.finfo(x.dtype).max
        counts = torch.histc(x.clamp(max(low, -bound), min(high, bound)), self.bins, low, high).to(torch.float64)
        counts[-1] += x.numel() - counts.sum()
        self.hist.add_(counts, alpha=weight)

    def _cover(self, lo: float, hi: float) -> None:
        """Make the bins reach from ``lo`` to ``hi``."""
        low, high = (float(e) for e in self.edges)
        if not bool(self.has_data):
            low, high = lo, hi
        elif low == high and (lo < low or hi > high):
            self._spread(low, min(lo, low), max(hi, high))
            return
        if low == high:
            self.edges.fill_(low)
            return
        hist, half = self.hist, self.hist.new_zeros(self.bins // 2)
        while lo < low or hi > high:
            merged = hist.reshape(-1, 2).sum(1)
            if hi > high:
                hist, high = torch.cat([merged, half]), high + (high - low)
            else:
                hist, low = torch.cat([half, merged]), low - (high - low)
        self.hist.copy_(hist)
        self.edges.copy_(torch.tensor([low, high], dtype=torch.float64))

    def _spread(self, point: float, low: float, high: float) -> None:
        """The first range wider than the one point that was seen."""
        total = float(self.hist.sum())
        self.hist.zero_()
        self.edges.copy_(torch.tensor([low, high], dtype=torch.float64))
        self.hist[min(self.bins - 1, int((point - low) / (high - low) * self.bins))] = total

    def _join(self, other: Observer) -> None:
        """The other's bins go whole into the bin that holds their middle: off by at most half of the wider bin."""
        assert isinstance(other, Histogram) and other.bins == self.bins
        self._cover(float(other.edges[0]), float(other.edges[1]))
        self._widen(other.lo, other.hi)
        if self.width == 0:
            self.hist[0] += other.hist.sum()
            return
        index = ((other.centres() - self.edges[0]) / self.width).long().clamp(0, self.bins - 1)
        self.hist.scatter_add_(0, index, other.hist)

    def _clip(self, lo: float, hi: float) -> tuple[Tensor, Tensor]:
        """Inside the exact extremes, and around 0."""
        lo, hi = min(max(lo, float(self.lo)), 0.0), max(min(hi, float(self.hi)), 0.0)
        return torch.tensor(lo, device=self.lo.device), torch.tensor(hi, device=self.lo.device)


class Percentile(Histogram):
    """Asymmetric: the fraction ``p`` of the values is at or below ``hi``, and at or above ``lo``. Symmetric: of ``|x|``.

    A side without values stays 0.
    """

    def __init__(self, spec: QuantSpec, *, p: float = 0.9999, bins: int = BINS, sample: int | None = SAMPLE) -> None:
        super().__init__(spec, bins=bins, sample=sample)
        self.p = p

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = (float(e) for e in self.edges)
        need = self.hist.new_tensor(math.ceil(self.p * float(self.hist.sum()) * (1 - 1e-12)))
        up = int(torch.searchsorted(self.hist.cumsum(0), need).clamp(max=self.bins - 1))
        hi = low + (up + 1) * self.width
        if self.absolute:
            return self._clip(-hi, hi)
        down = int(torch.searchsorted(self.hist.flip(0).cumsum(0), need).clamp(max=self.bins - 1))
        return self._clip(high - (down + 1) * self.width, hi)


class MSE(Histogram):
    """The clip ``i/100`` of the extremes, i = 1..100 (both ends alike), with the least squared rounding error; on a tie the larger one."""

    def range(self) -> tuple[Tensor, Tensor]:
        x, steps = self.centres().to(torch.float32), torch.arange(100, 0, -1, device=self.hist.device) / 100
        if self.width == 0:
            return self.lo.clone(), self.hi.clone()
        lo, hi = self.lo.clamp(max=0.0) * steps, self.hi.clamp(min=0.0) * steps
        qp = numerics.choose_qparams(lo, hi, replace(self.spec, axis=0))
        rows = x.expand(100, -1)
        error = (numerics.fake_quantize(rows, qp) - rows).to(torch.float64).square() @ self.hist
        best = int(error.argmin())
        return lo[best].clone(), hi[best].clone()


class Entropy(Histogram):
    """The clip of ``|x|`` that loses the least information (Kullback-Leibler divergence; Migacz 2017, "8-bit inference with TensorRT").

    Exact zeros are not counted: every grid holds 0, and the spike that a ReLU leaves there would draw the clip down to as many bins as
    there are levels (ResNet-20: 75.8 % top-1 with the zeros counted, 91.7 % without). L = 2^(b-1) levels lie on each side of 0; a
    one-sided range on an asymmetric grid has all 2^b on its side.
    """

    @property
    def absolute(self) -> bool:
        return True

    def _count(self, x: Tensor, weight: float) -> None:
        super()._count(x[x != 0], weight)

    def range(self) -> tuple[Tensor, Tensor]:
        if self.width == 0:
            return self.lo.clone(), self.hi.clone()
        one_sided = not self.spec.symmetric and (float(self.lo) >= 0 or float(self.hi) <= 0)
        t = entropy_clip(self.hist, 1 << (self.spec.bits - (not one_sided))) * self.width
        return self._clip(-t, t)


def stride(shape: torch.Size, sample: int) -> int:
    """Least step that leaves at most ``sample`` elements of a tensor and shares no factor with its sizes (1 for a small tensor)."""
    step, sizes = -(-shape.numel() // sample), math.prod(shape)
    while step > 1 and math.gcd(step, sizes) > 1:
        step += 1
    return step


def entropy_clip(hist: Tensor, levels: int) -> int:
    """Number of bins of the histogram of ``|x|`` to keep: least KL(P||Q) over i = levels..bins; on a tie the larger i.

    P is the first i bins with the rest added to the last one; Q has ``levels`` groups of bins, each group's own count
    spread evenly over its bins with P > 0. An i where Q = 0 < P is passed over.

    Args:
        hist: counts, float64 ``[bins]``.
        levels: L; with fewer bins than that nothing is clipped.
    """
    bins = hist.numel()
    if bins < levels:
        return bins
    first = hist.new_zeros(1)
    i = torch.arange(levels, bins + 1, device=hist.device)
    counts = torch.cat([first, hist.cumsum(0)])
    filled = torch.cat([first, (hist > 0).to(torch.float64).cumsum(0)])
    plogp = torch.cat([first, torch.special.xlogy(hist, hist).cumsum(0)])
    edge = torch.arange(levels + 1, device=hist.device) * i[:, None] // levels
    own = counts[edge].diff(dim=1)
    taken = filled[edge].diff(dim=1)
    rest = counts[-1] - counts[i]
    last = hist[i - 1]
    # The rest joins the last bin of P; a bin that was empty then counts as filled.
    taken[:, -1] += ((last == 0) & (rest > 0)).to(torch.float64)
    mass = own.clone()
    mass[:, -1] += rest
    total_p, total_q = counts[-1], own.sum(1)
    p_log_p = plogp[i] - torch.special.xlogy(last, last) + torch.special.xlogy(last + rest, last + rest)
    p_log_q = torch.where(mass > 0, mass * (own / taken.clamp(min=1)).log(), torch.zeros_like(mass)).sum(1)
    divergence = (p_log_p - p_log_q) / total_p + (total_q / total_p).log()
    divergence = torch.where(torch.isfinite(divergence), divergence, torch.full_like(divergence, float("inf")))
    best = divergence.min()
    return int(i[divergence <= best + 1e-12].max())


CLASSES: dict[str, type[Observer]] = {"minmax": MinMax, "ema": MovingAverage, "percentile": Percentile, "mse": MSE, "entropy": Entropy}


def make(name: str, spec: QuantSpec) -> Observer:
    """Observer by name: ``minmax``, ``ema``, ``percentile``, ``mse`` or ``entropy``.

    Raises:
        SchemeError: for an unknown name or a per-channel grid.
    """
    if name not in CLASSES:
        raise SchemeError(f"unknown observer {name!r}", way_out=nearest(name, CLASSES))
    return CLASSES[name](spec)
