"""How far a value moved: signal to noise, cosine, steps of its grid."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moved:
    """Change of one value between two states of a graph.

    Attributes:
        sqnr: signal to quantization noise in dB, ``10 log10(sum(a^2) / sum((a - b)^2))``; infinite when nothing moved.
        cosine: cosine of the angle between the two as vectors.
        steps: greatest difference in steps of the value's grid; ``None`` for a value without a grid.
        total: SQNR in dB against the captured float graph; ``None`` where that has no such value.
        reordered: the channels stand in another order (a shuffle went into the weights); what is said holds for the channels put back.
    """

    sqnr: float
    cosine: float
    steps: float | None = None
    total: float | None = None
    reordered: bool = False

    def __str__(self) -> str:
        steps = "-" if self.steps is None else f"{self.steps:.1f}"
        total = "-" if self.total is None else decibels(self.total)
        return f"{decibels(self.sqnr):>8} {self.cosine:>9.6f} {steps:>7} {total:>9}" + (", channels reordered" if self.reordered else "")

    def to_json(self) -> dict[str, float | bool | None]:
        """Plain data; infinity is ``None``, since JSON has none."""
        return {k: None if v is None or math.isinf(v) else v for k, v in asdict(self).items()}


def decibels(value: float) -> str:
    """``31.4 dB``, or ``equal`` for infinity."""
    return "equal" if value == math.inf else f"{value:.1f} dB"


def sqnr(a: Tensor, b: Tensor) -> float:
    """Signal to noise of ``b`` as a replacement of ``a``, in dB.

    Infinite when they are equal (NaN equals NaN in the same place), minus infinity when ``b`` has another shape or is not finite where ``a`` is.
    """
    if a.shape != b.shape:
        return -math.inf
    a, b = a.detach().to(torch.float64), b.detach().to(torch.float64)
    gap = torch.where((a == b) | torch.isnan(a) & torch.isnan(b), torch.zeros_like(a), a - b)
    noise, signal = float(gap.square().sum()), float(a.nan_to_num(posinf=0.0, neginf=0.0).square().sum())
    if noise == 0:
        return math.inf
    if not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors of one shape; 1 for two zero tensors, 0 when only one is zero or one is not finite."""
    x, y = a.detach().to(torch.float64).flatten(), b.detach().to(torch.float64).flatten()
    if x.shape != y.shape:
        return 0.0
    lengths = float(x.norm()), float(y.norm())
    if not all(map(math.isfinite, lengths)):
        return 0.0
    if min(lengths) == 0:
        return 1.0 if max(lengths) == 0 else 0.0
    return min(1.0, float(x @ y) / lengths[0] / lengths[1])


def measure(before: Tensor, now: Tensor, scale: Tensor | None, first: Tensor | None) -> Moved:
    """Change of a value.

    Args:
        before, now: the value in the two states.
        scale: step of its grid (broadcast over the value), or None.
        first: the value in the captured float graph, or None where it has none.
    """
    order = channel_order(before, now) if sqnr(before, now) < FAR_DB else None
    if order is not None:
        before, first = before[:, order], None
    total = None if first is None else sqnr(first, now)
    steps = None
    if scale is not None and before.shape == now.shape and now.numel():
        gap = (now.to(torch.float64) - before.to(torch.float64)).abs().nan_to_num(posinf=math.inf)
        steps = float(gap.max() / scale.to(torch.float64).max())
    return Moved(sqnr(before, now), cosine(before, now), steps, total, order is not None)


FAR_DB, SAME_DB = 20.0, 60.0
"""A value that moved so far may have its channels in another order; it has when they are so near after putting them back."""


def channel_order(a: Tensor, b: Tensor) -> Tensor | None:
    """The order of channels (dimension 1) that makes ``b`` of ``a``; ``None`` when there is none."""
    if a.ndim < 2 or a.shape != b.shape or a.shape[1] < 2:
        return None
    sums = [v.to(torch.float64).movedim(1, 0).flatten(1).sum(1) for v in (a, b)]
    order = torch.empty_like(sums[0], dtype=torch.long)
    order[sums[1].argsort()] = sums[0].argsort()
    return order if sqnr(a[:, order], b) > SAME_DB else None
