"""Ranges of weights, which are all there at once: from the tensor to ``(lo, hi)``, per tensor or per channel."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxq import numerics, observers
from fxq.errors import SchemeError, nearest
from fxq.spec import QuantSpec

_BLOCK = 1 << 16


def weight_range(w: Tensor, spec: QuantSpec, observer: str = "minmax") -> tuple[Tensor, Tensor]:
    """Range of a weight, from its current values.

    ``minmax`` and ``ema`` take the extremes; ``mse`` searches each channel's best clip (i/100 of its extremes, all channels at once);
    ``percentile`` and ``entropy`` run over each channel alone and count every value.

    Args:
        w: float weight of any shape, finite.
        spec: its grid; ``spec.axis`` is the channel axis, or that of the blocks, whose size divides it.
        observer: name.

    Returns:
        ``(lo, hi)``, float32, rank 0, ``[C]``, or of blocks the rank of ``w``.

    Raises:
        SchemeError: for an unknown observer.
    """
    w = w.detach().to(torch.float32)
    if torch.compiler.is_compiling() and observer not in ("minmax", "ema"):
        return _SEARCH(w, str(spec), observer)  # type: ignore[no-any-return]
    if spec.block is not None and spec.axis is not None:
        moved = w.movedim(spec.axis, -1)
        cut = moved.reshape(*moved.shape[:-1], -1, spec.block)
        ends = weight_range(cut.reshape(-1, spec.block), replace(spec, axis=0, block=None), observer)
        lo, hi = (v.reshape(cut.shape[:-1]).movedim(-1, spec.axis) for v in ends)
        return lo, hi
    rows = w.reshape(1, -1) if spec.axis is None else w.movedim(spec.axis, 0).flatten(1)
    lo, hi = torch.aminmax(rows, dim=1)
    if observer == "mse":
        lo, hi = _best_clip(rows, lo.clamp(max=0.0), hi.clamp(min=0.0), spec)
    elif observer in ("percentile", "entropy"):
        ranges = [_one_channel(row, spec, observer) for row in rows]
        lo, hi = torch.stack([r[0] for r in ranges]), torch.stack([r[1] for r in ranges])
    elif observer not in observers.CLASSES:
        raise SchemeError(f"unknown observer {observer!r}", way_out=nearest(observer, observers.CLASSES))
    return (lo[0], hi[0]) if spec.axis is None else (lo, hi)


def _search(w: Tensor, spec: str, observer: str) -> tuple[Tensor, Tensor]:
    lo, hi = weight_range(w, QuantSpec.parse(spec), observer)
    return lo.clone(), hi.clone()


def _shapes(w: Tensor, spec: str, observer: str) -> tuple[Tensor, Tensor]:
    axis = QuantSpec.parse(spec).axis
    return (w.new_empty(()), w.new_empty(())) if axis is None else (w.new_empty(w.shape[axis]), w.new_empty(w.shape[axis]))


_SEARCH = torch.library.custom_op("fxq::weight_range", _search, mutates_args=(), schema="(Tensor w, str spec, str observer) -> (Tensor, Tensor)")
"""A search is one operation to ``torch.compile``. Grids in blocks, which are not trained, are not for it."""
_SEARCH.register_fake(_shapes)


def _one_channel(row: Tensor, spec: QuantSpec, observer: str) -> tuple[Tensor, Tensor]:
    kind = observers.Percentile if observer == "percentile" else observers.Entropy
    one = kind(spec.per_tensor(), bins=observers.BINS if observer == "percentile" else 512, sample=None).to(row.device)
    one.observe(row)
    return one.range()


def _best_clip(rows: Tensor, lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Clip with the least squared rounding error for each row of ``[C, K]``, in blocks that stay in the cache."""
    steps = torch.arange(100, 0, -1, device=rows.device) / 100
    qps = [numerics.choose_qparams(lo * s, hi * s, replace(spec, axis=0)) for s in steps]
    scale, zero = torch.stack([q.scale for q in qps]), torch.stack([q.zero_point for q in qps]).to(torch.float32)
    errors = rows.new_zeros(len(qps), len(rows))
    columns = min(rows.shape[1], _BLOCK)
    block = max(1, _BLOCK // columns)
    for c in range(0, len(rows), block):
        for k in range(0, rows.shape[1], columns):
            x = rows[c : c + block, k : k + columns].contiguous()
            for i in range(len(qps)):
                y = numerics.rounded(x, scale[i, c : c + block, None], zero[i, c : c + block, None], spec)
                errors[i, c : c + block] += y.sub_(x).square_().sum(1)
    best = steps[errors.argmin(0)]
    return lo * best, hi * best
