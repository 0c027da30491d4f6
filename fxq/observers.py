"""Observers: a stream of tensors to a range (lo, hi). State lives in buffers; none takes gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxq.errors import CalibrationError
from fxq.spec import QuantSpec


class MinMax(nn.Module):
    """Running extremes of all batches. Buffers ``lo``, ``hi`` (float32, rank 0) and ``has_data``."""

    lo: Tensor
    hi: Tensor
    has_data: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lo", torch.tensor(0.0))
        self.register_buffer("hi", torch.tensor(0.0))
        self.register_buffer("has_data", torch.tensor(False))

    def observe(self, x: Tensor) -> None:
        """Take in one batch.

        Raises:
            CalibrationError: when it holds NaN or infinity.
        """
        lo, hi = torch.aminmax(x.detach().to(torch.float32))
        if not bool(torch.isfinite(lo) & torch.isfinite(hi)):
            raise CalibrationError("the activation holds NaN or infinity", way_out="Look at the inputs and at the layer before it")
        self._join(lo, hi)
        self.has_data.fill_(True)

    def _join(self, lo: Tensor, hi: Tensor) -> None:
        self.lo.copy_(torch.minimum(self.lo, lo) if bool(self.has_data) else lo)
        self.hi.copy_(torch.maximum(self.hi, hi) if bool(self.has_data) else hi)

    def range(self) -> tuple[Tensor, Tensor]:
        """``(lo, hi)``, float32 rank 0."""
        return self.lo.clone(), self.hi.clone()


class MovingAverage(MinMax):
    """Exponential moving average of each batch's extremes, ``r <- (1-m) r + m batch``; the first batch sets it (m = 0.1)."""

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum

    def _join(self, lo: Tensor, hi: Tensor) -> None:
        m = self.momentum if bool(self.has_data) else 1.0
        self.lo.mul_(1 - m).add_(lo, alpha=m)
        self.hi.mul_(1 - m).add_(hi, alpha=m)


class Histogram(MinMax):
    """Streaming histogram of ``bins`` equal bins; a batch beyond its range doubles the bin width, merging pairs of bins.

    At most ``sample`` evenly strided elements of a batch are counted; the extremes are always exact.
    """

    hist: Tensor
    edges: Tensor

    def __init__(self, spec: QuantSpec, bins: int = 2048, sample: int = 1 << 18) -> None:
        super().__init__()
        self.spec, self.bins, self.sample = spec, bins, sample
        self.register_buffer("hist", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("edges", torch.zeros(2, dtype=torch.float64))

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        flat = x.detach().to(torch.float32).reshape(-1)
        step = max(1, flat.numel() // self.sample)
        flat = flat[::step]
        self._cover(float(self.lo), float(self.hi))
        low, high = (float(e) for e in self.edges)
        self.hist += torch.histc(flat.clamp(low, high), self.bins, low, high).to(torch.float64) * step

    def _cover(self, lo: float, hi: float) -> None:
        low, high = (float(e) for e in self.edges)
        if low == high:
            low, high = (lo, hi) if lo < hi else (lo - 0.5, lo + 0.5)
        zeros = torch.zeros(self.bins // 2, dtype=torch.float64, device=self.hist.device)
        while lo < low or hi > high:
            merged = self.hist.reshape(-1, 2).sum(1)
            if hi > high:
                self.hist, high = torch.cat([merged, zeros]), high + (high - low)
            else:
                self.hist, low = torch.cat([zeros, merged]), low - (high - low)
        self.edges.copy_(torch.tensor([low, high], dtype=torch.float64))

    def _centres(self) -> Tensor:
        low, high = (float(e) for e in self.edges)
        width = (high - low) / self.bins
        return low + (torch.arange(self.bins, dtype=torch.float64, device=self.hist.device) + 0.5) * width


class Percentile(Histogram):
    """The range that leaves out the fraction ``1 - p`` of the values on each side (p = 0.9999)."""

    p: float = 0.9999

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = (float(e) for e in self.edges)
        width, total = (high - low) / self.bins, float(self.hist.sum())
        up = torch.searchsorted(self.hist.cumsum(0), torch.tensor(self.p * total, dtype=torch.float64))
        down = torch.searchsorted(self.hist.flip(0).cumsum(0), torch.tensor(self.p * total, dtype=torch.float64))
        hi = min(low + (int(up) + 1) * width, float(self.hi))
        lo = max(high - (int(down) + 1) * width, float(self.lo))
        return torch.tensor(min(lo, 0.0)), torch.tensor(max(hi, 0.0))


class MSE(Histogram):
    """Of the clips ``T = i/100`` of the extremes (both ends alike), the one with the least squared rounding error."""

    def range(self) -> tuple[Tensor, Tensor]:
        x, steps = self._centres(), torch.arange(1, 101, dtype=torch.float64, device=self.hist.device) / 100
        lo = (float(min(self.lo, torch.tensor(0.0))) * steps)[:, None]
        hi = (float(max(self.hi, torch.tensor(0.0))) * steps)[:, None]
        best = _clip_errors(x[None], self.hist[None], lo, hi, self.spec)
        i = 99 - int(best.flip(0).argmin())
        return lo[i, 0].to(torch.float32), hi[i, 0].to(torch.float32)


class Entropy(Histogram):
    """The clip of |x| whose quantized histogram has the least Kullback-Leibler divergence (TensorRT's calibration)."""

    def range(self) -> tuple[Tensor, Tensor]:
        levels = 1 << (self.spec.bits - 1)
        centres = self._centres().abs()
        top = max(abs(float(self.lo)), abs(float(self.hi))) or 1.0
        index = (centres / top * self.bins).long().clamp(max=self.bins - 1)
        h = torch.zeros_like(self.hist).scatter_add_(0, index, self.hist)
        best, clip = float("inf"), self.bins
        for i in range(levels, self.bins + 1, max(1, self.bins // 256)):
            d = _divergence(h, i, levels)
            if d <= best:
                best, clip = d, i
        t = clip / self.bins * top
        return torch.tensor(max(float(self.lo), -t)), torch.tensor(min(float(self.hi), t))


def _divergence(h: Tensor, i: int, levels: int) -> float:
    p = h[:i].clone()
    p[-1] += h[i:].sum()
    group = torch.arange(i) * levels // i
    count = torch.zeros(levels, dtype=torch.float64).scatter_add_(0, group, h[:i])
    filled = torch.zeros(levels, dtype=torch.float64).scatter_add_(0, group, (p > 0).to(torch.float64))
    q = torch.where(p > 0, (count / filled.clamp(min=1))[group], torch.zeros_like(p))
    if bool(((q == 0) & (p > 0)).any()) or float(q.sum()) == 0:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    on = p > 0
    return float((p[on] * (p[on] / q[on]).log()).sum())


def _clip_errors(x: Tensor, weight: Tensor, lo: Tensor, hi: Tensor, spec: QuantSpec) -> Tensor:
    """Squared rounding error of the values ``x`` for each row's range."""
    if spec.symmetric:
        scale, zero = torch.maximum(-lo, hi) / spec.qmax, torch.zeros_like(lo)
    else:
        scale = (hi - lo) / (spec.qmax - spec.qmin)
        zero = torch.round(spec.qmin - lo / scale.clamp(min=1e-300)).clamp(spec.qmin, spec.qmax)
    scale = scale.clamp(min=1e-300)
    q = ((torch.round(x / scale) + zero).clamp(spec.qmin, spec.qmax) - zero) * scale
    return (weight * (q - x) ** 2).sum(-1)


def make(name: str, spec: QuantSpec) -> MinMax:
    """Observer by name: ``minmax``, ``ema``, ``percentile``, ``mse``, ``entropy``."""
    plain: dict[str, type[MinMax]] = {"minmax": MinMax, "ema": MovingAverage}
    if name in plain:
        return plain[name]()
    table: dict[str, type[Histogram]] = {"percentile": Percentile, "mse": MSE, "entropy": Entropy}
    return table[name](spec)


def weight_range(w: Tensor, spec: QuantSpec, observer: str) -> tuple[Tensor, Tensor]:
    """``(lo, hi)`` of a weight, float32, rank 0 or ``[C]`` along ``spec.axis``; ``mse`` searches the clip, others take the extremes."""
    rows = w.reshape(1, -1) if spec.axis is None else w.movedim(spec.axis, 0).flatten(1)
    lo, hi = rows.amin(1), rows.amax(1)
    if observer == "mse":
        steps = torch.arange(20, 101, device=w.device) / 100
        errors = torch.stack([_clip_errors(rows, torch.ones_like(rows), (lo * s)[:, None], (hi * s)[:, None], spec) for s in steps])
        best = steps[errors.argmin(0)]
        lo, hi = lo * best, hi * best
    return (lo[0], hi[0]) if spec.axis is None else (lo, hi)
