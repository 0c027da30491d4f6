"""Arithmetic of low-bit weights and activations, with straight-through gradients: DoReFa, binary, ternary, learned steps.

Sources: DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160); BinaryNet (Courbariaux et al. 2016, arXiv 1602.02830); XNOR-Net (Rastegari et al. 2016,
arXiv 1603.05279); ternary weight networks (Li et al. 2016, arXiv 1605.04711); TBN (Wan et al. 2018, ECCV); LSQ (Esser et al. 2020,
arXiv 1902.08153); PACT (Choi et al. 2018, arXiv 1805.06085); ApproxSign: Bi-Real Net (Liu et al. 2018, arXiv 1808.00278).

``sgn0(x)`` is 1 where ``x >= 0`` and -1 elsewhere. Rows of a weight are its output channels: a scale per row has one element for each index of
``axis``, or is rank 0 when ``axis`` is ``None``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxq import numerics
from fxq.errors import SchemeError, nearest

STES = ("saturate", "identity", "soft", "approx", "tanh")
"""Gradients of the sign: of ``|x| < 1``, of everything, ``max(0, 1-|x|)``, ``max(0, 2-2|x|)``, ``k (1 - tanh(k x)^2)``."""

TERNARY_RATIO = 0.7
TBN_RATIO = 0.4


def ste_mask(x: Tensor, ste: str, sharpness: float | Tensor = 1.0) -> Tensor:
    """What the gradient of the sign is multiplied by, shape of ``x`` (``saturate``: a mask of bools).

    Args:
        x: float tensor.
        ste: one of :data:`STES`.
        sharpness: ``k`` of ``tanh``, which anneals from 1 upwards; the others do not use it.

    Raises:
        SchemeError: for an unknown name.
    """
    if ste == "saturate":
        return x.abs() < 1
    if ste == "identity":
        return torch.ones_like(x)
    if ste == "soft":
        return (1 - x.abs()).clamp(min=0)
    if ste == "approx":
        return (2 - 2 * x.abs()).clamp(min=0)
    if ste == "tanh":
        return sharpness * (1 - torch.tanh(sharpness * x).square())
    raise SchemeError(f"unknown straight-through estimator {ste!r}", way_out=nearest(ste, STES))


class _Masked(torch.autograd.Function):
    """Forward: ``value``. Backward: the gradient times ``mask`` to ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return grads[0] * mask, None, None


def through(x: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """``value`` whose gradient goes to ``x``, times ``mask`` (all of one shape)."""
    out: Tensor = _Masked.apply(x, value.detach(), mask.detach())
    return out


def sgn0(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, -1 elsewhere; no gradient."""
    return torch.where(x.detach() >= 0, 1.0, -1.0).to(x.dtype)


def sign(x: Tensor, ste: str = "saturate", sharpness: float = 1.0) -> Tensor:
    """``sgn0(x)`` with a straight-through gradient (BinaryNet, equation 1 and section 1.3)."""
    return through(x, sgn0(x), ste_mask(x.detach(), ste, sharpness))


def bits01(x: Tensor, ste: str = "saturate") -> Tensor:
    """1 where ``x >= 0``, 0 elsewhere: the sign for AND and popcount; gradient of the sign, halved."""
    return (sign(x, ste) + 1) / 2


def ternary(x: Tensor, delta: Tensor, ste: str = "saturate", sharpness: float = 1.0) -> Tensor:
    """``sgn(x)`` where ``|x| > delta``, 0 elsewhere (TBN, section 3.1). ``delta``: rank 0; it gets no gradient."""
    x_ = x.detach()
    return through(x, torch.where(x_.abs() > delta, torch.sign(x_), torch.zeros_like(x_)), ste_mask(x_, ste, sharpness))


def _rows(w: Tensor, axis: int | None) -> tuple[int, ...]:
    """Dimensions that a row's mean runs over."""
    return tuple(d for d in range(w.ndim) if axis is None or d != axis % w.ndim)


def _row_mean(w: Tensor, axis: int | None) -> Tensor:
    return w.mean(_rows(w, axis)) if axis is None or w.ndim > 1 else w


def centred(w: Tensor, dim: int = 1) -> Tensor:
    """``clamp(w - mean over the input channels, -1, 1)`` as a function: the weight itself stays (a 1-channel weight is only clamped)."""
    return (w - w.mean(dim, keepdim=True) if w.shape[dim] > 1 else w).clamp(-1, 1)


def binary_weight(w: Tensor, axis: int | None = 0, scaled: bool = True, masked: bool = False) -> Tensor:
    """``alpha * sgn0(w)``: ``alpha`` is the mean of ``|w|`` of each row (XNOR-Net, equation 6), or 1 (BinaryNet).

    Gradient: ``alpha g_i + sgn(w_i) / n * sum_j g_j sgn0(w_j)``, exact in ``alpha`` and straight through the sign.

    Args:
        w: float weight of any rank.
        axis: rows; ``None`` for one ``alpha``.
        scaled: with ``alpha``.
        masked: no gradient through the sign where ``|w| >= 1``.
    """
    mask = (w.detach().abs() < 1).to(w.dtype) if masked else torch.ones_like(w)
    signs = through(w, sgn0(w), mask)
    return signs if not scaled else signs * numerics.along(_row_mean(w.abs(), axis), axis, w.ndim)


def binary_codes(w: Tensor, axis: int | None = 0, scaled: bool = True) -> tuple[Tensor, Tensor]:
    """Codes (-1 and 1, dtype of ``w``) and scale per row of :func:`binary_weight`; no gradient."""
    w = w.detach()
    alpha = _row_mean(w.abs(), axis)
    return sgn0(w), alpha if scaled else torch.ones_like(alpha)


def ternary_threshold(w: Tensor, axis: int | None = 0, exact: bool = False) -> Tensor:
    """The threshold of each row, no gradient: ``0.7 mean |w|`` (TWN, equation 6), or the one of least squared error.

    Args:
        exact: search all of them: keep the ``k`` largest ``|w|`` with the greatest ``(sum |w|)^2 / k`` (equation 5); ``delta`` lies half-way to the next.
    """
    w = w.detach()
    if not exact:
        return TERNARY_RATIO * _row_mean(w.abs(), axis)
    rows = w.abs().reshape(1, -1) if axis is None else w.abs().movedim(axis, 0).flatten(1)
    order = rows.sort(1, descending=True).values
    gain = order.double().cumsum(1).square() / torch.arange(1, order.shape[1] + 1, device=w.device)
    k = gain.argmax(1, keepdim=True)
    following = torch.cat([order[:, 1:], torch.zeros_like(order[:, :1])], 1)
    delta = ((order.gather(1, k) + following.gather(1, k)) / 2).squeeze(1)
    return delta[0] if axis is None else delta


def ternary_codes(w: Tensor, axis: int | None = 0, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (-1, 0, 1, dtype of ``w``) and scale of each row: the mean of the ``|w|`` above the threshold, 0 for a row without one; no gradient."""
    w = w.detach()
    large = w.abs() > numerics.along(ternary_threshold(w, axis, exact), axis, w.ndim)
    count = large.to(w.dtype).sum(_rows(w, axis))
    alpha = (w.abs() * large).sum(_rows(w, axis)) / count.clamp(min=1)
    return torch.sign(w) * large, alpha


def ternary_weight(w: Tensor, axis: int | None = 0, exact: bool = False) -> Tensor:
    """``alpha t`` with ``t`` in -1, 0, 1 (TWN, equations 3 and 6).

    Gradient: ``alpha g_i + 1[|w_i| > delta] sgn(w_i) / #I sum_j g_j t_j``; the threshold is not differentiated.
    """
    codes, _ = ternary_codes(w, axis, exact)
    large = codes.abs()
    alpha = (w.abs() * large).sum(_rows(w, axis)) / large.sum(_rows(w, axis)).clamp(min=1)
    return through(w, codes, torch.ones_like(w)) * numerics.along(alpha, axis, w.ndim)


def dorefa_levels(w: Tensor, bits: int) -> Tensor:
    """Odd codes ``2q - m`` in ``[-m, m]``, ``m = 2^bits - 1``, dtype of ``w``; no gradient.

    ``q = rne((tanh w / 2 max|tanh w| + 1/2) m)``; all codes of a zero tensor are 0.
    """
    m = 2**bits - 1
    t = torch.tanh(w.detach())
    top = t.abs().max()
    codes: Tensor = 2 * torch.round((t / (2 * top.clamp(min=numerics.TINY)) + 0.5) * m) - m
    return torch.where(top > 0, codes, 0.0)


def dorefa_scale(w: Tensor, bits: int, compat: bool = False) -> Tensor:
    """Real value of one step of :func:`dorefa_levels`: ``max|w| / m``; with ``compat`` ``1 / m``. Rank 0, no gradient."""
    m = 2**bits - 1
    top = torch.ones((), dtype=w.dtype, device=w.device) if compat else w.detach().abs().max()
    return torch.div(top, m)


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0]  # type: ignore[no-any-return]


def rounded(x: Tensor) -> Tensor:
    """Nearest integers, half to even, with the gradient of the identity."""
    out: Tensor = _Round.apply(x)
    return out


def dorefa_weight(w: Tensor, bits: int, compat: bool = False) -> Tensor:
    """DoReFa's weight (equation 9): ``2 q / m - 1``, times ``max|w|`` (a constant in backward) unless ``compat``.

    Gradient: straight through the rounding; the greatest ``|tanh w|`` is differentiated, shared evenly by those that tie for it.
    An all-zero tensor stays 0.

    Args:
        w: float weight; its codes are those of :func:`dorefa_levels`, its step that of :func:`dorefa_scale`.
        bits: 2 to 8.
    """
    m = 2**bits - 1
    t = torch.tanh(w)
    top = t.abs().max()
    alive = top.detach() > 0
    scale = torch.where(alive, dorefa_scale(w, bits, compat), 0.0)
    out: Tensor = (2 * rounded((t / torch.where(alive, 2 * top, 1.0) + 0.5) * m) - m) * scale
    return out


class _Clipped(torch.autograd.Function):
    """``rne(clamp(x, lo, c) / s) s``; gradients to ``x`` inside and to the clip outside (PACT, equation 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, m: int, signed: bool) -> Tensor:
        step = clip / m
        held = torch.clamp(x, -clip if signed else torch.zeros_like(clip), clip)
        ctx.save_for_backward(held == x, held if clip.requires_grad else None, clip)
        ctx.signed = signed
        return held.div(step).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        inside, held, clip = ctx.saved_tensors
        (g,) = grads
        if held is None:
            return g * inside, None, None, None
        to_clip = (g * (held == clip)).sum()
        if ctx.signed:
            to_clip = to_clip - (g * (held == -clip)).sum()
        return g * inside, to_clip.reshape(clip.shape).to(clip.dtype), None, None


def clipped(x: Tensor, clip: Tensor, bits: int, signed: bool = False) -> Tensor:
    """An activation on ``2^bits`` levels of ``[0, clip]``, or on those of ``[-clip, clip]`` with 0 among them.

    ``rne(clamp(x, 0, c) / s) s`` with ``s = c / (2^bits - 1)`` (signed: ``c / (2^(bits-1) - 1)``). Gradient to ``x`` where it lies inside, ends included;
    to ``clip``: ``sum g 1[x >= c]``, signed also ``-sum g 1[x <= -c]``.
    """
    m = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    out: Tensor = _Clipped.apply(x, clip, m, signed)
    return out


def dorefa_activation(x: Tensor, bits: int, clip: float = 10.0) -> Tensor:
    """DoReFa's activation in its older form (``compat``): ``rne(clamp(x / clip, 0, 1) m) / m``; gradient ``g / clip`` inside, ends included."""
    c = torch.tensor(clip, dtype=x.dtype, device=x.device)
    m = 2**bits - 1
    value = torch.round(x.detach().div(c).clamp(0, 1) * m) / m
    return through(x, value, ((x.detach() >= 0) & (x.detach() <= c)).to(x.dtype) / c)


class _LearnedStep(torch.autograd.Function):
    """LSQ, equations 1 to 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, qmin: int, qmax: int, factor: Tensor, axis: int | None) -> Tensor:
        s, z = numerics.along(step, axis, x.ndim), numerics.along(zero, axis, x.ndim)
        v = x / s
        r = torch.round(v)
        codes = (r + z).clamp(qmin, qmax)
        ctx.save_for_backward(v, codes - z, (v + z <= qmin) | (v + z >= qmax), codes == r + z, factor)
        ctx.axis = axis
        return (codes - z) * s

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        v, q, outside, inside, factor = ctx.saved_tensors
        (g,) = grads
        ds = torch.where(outside, q, q - v) * g
        dims = _rows(v, ctx.axis)
        return g * inside, (ds.sum(dims) if dims else ds) * factor, None, None, None, None, None


def learned_step(
    x: Tensor, step: Tensor, qmin: int, qmax: int, zero: Tensor | None = None, axis: int | None = None, factor: float | None = None, processes: int = 1
) -> Tensor:
    """Rounding with a step size that gets a gradient (LSQ).

    ``ds = rne(v) - v`` inside, the code outside (a value at a bound counts as outside), ``v = x / s``; times ``1 / sqrt(N qmax)``.

    Args:
        x: float tensor; its gradient passes where the code was not clamped.
        step: float, > 0: rank 0, or one for each index of ``axis``.
        zero: zero point, shape of ``step``; no gradient (see :func:`learned_offset`).
        factor: what the gradient of ``step`` is multiplied by; default ``1 / sqrt(N (qmax - zero))``, ``N`` elements for each step.
        processes: so many see a batch like ``x`` each, and average their gradients: ``N`` counts all of them.
    """
    z = torch.zeros_like(step.detach()) if zero is None else zero.to(step.dtype)
    if factor is None:
        count = max(1, x.numel() // max(1, step.numel())) * processes
        scale = torch.rsqrt((qmax - z.max()).clamp(min=1) * count)
    else:
        scale = step.new_full((), factor)
    out: Tensor = _LearnedStep.apply(x, step, z, qmin, qmax, scale.detach(), axis)
    return out


def learned_offset(x: Tensor, step: Tensor, offset: Tensor, qmin: int, qmax: int, processes: int = 1) -> Tensor:
    """LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576): step and offset are learned; ``x`` is shifted by ``offset`` and back.

    The zero point is ``rne(qmin - offset / step)``, as exported; the gradient of ``offset`` is that of its shift: 1 outside, 0 inside.

    Args:
        step, offset: rank 0; ``offset`` is the real value of the least code, at most 0.
        processes: as for :func:`learned_step`.
    """
    zero = torch.round(qmin - offset.detach() / step.detach()).clamp(qmin, qmax)
    y = learned_step(x, step, qmin, qmax, zero, processes=processes)
    codes = torch.round(x.detach() / step.detach()) + zero
    outside = ((codes < qmin) | (codes > qmax)).to(x.dtype)
    factor = torch.rsqrt(torch.full_like(offset.detach(), max(1, qmax - qmin)) * (max(1, x.numel()) * processes))
    shift = (offset - offset.detach()) * factor
    return y + outside * shift


def lsq_start(x: Tensor, qmax: int, axis: int | None = None) -> Tensor:
    """LSQ's first step size ``2 mean|x| / sqrt(qmax)`` (section 2.1), per row; not denormal."""
    return (2 * _row_mean(x.detach().abs(), axis) / math.sqrt(qmax)).clamp(min=1e-8)


def sign_threshold(alpha: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The batch norm and scale between an integer dot product and a sign, as an integer threshold.

    ``sgn0(gamma (alpha d + bias - mean) / sigma + beta)`` is 1 exactly where ``direction * d >= threshold``. With
    ``tau = (mean - bias - beta sigma / gamma) / alpha``: gamma > 0: ``d >= ceil(tau)``; gamma < 0: ``d <= floor(tau)``; gamma = 0 or alpha = 0: a constant.

    Args:
        alpha, bias, gamma, beta, mean, sigma: float64 ``[C]``; ``alpha >= 0``, ``sigma > 0``.

    Returns:
        ``threshold`` float64 (an integer, or an infinity for a constant), ``direction`` float64 (1 or -1), both ``[C]``.
    """
    direct = (gamma * alpha) != 0
    tau = (mean - bias - beta * sigma / torch.where(gamma == 0, 1.0, gamma)) / torch.where(alpha == 0, 1.0, alpha)
    constant = torch.where(gamma == 0, beta, gamma * (bias - mean) / sigma + beta) >= 0
    up = torch.ceil(tau)
    down = -torch.floor(tau)
    inf = torch.full_like(tau, torch.inf)
    threshold = torch.where(direct, torch.where(gamma > 0, up, down), torch.where(constant, -inf, inf))
    return threshold, torch.where(gamma < 0, -1.0, 1.0).to(tau.dtype)
