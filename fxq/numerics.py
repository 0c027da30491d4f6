"""All arithmetic on codes. Round half to even, divide by the scale: codes equal ONNX Runtime's QuantizeLinear.

Source of the affine grid: Jacob et al. 2018 (arXiv 1712.05877), section 2.1; straight-through estimator:
Bengio et al. 2013 (arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxq.errors import CalibrationError
from fxq.spec import QParams, QuantSpec

TINY = torch.finfo(torch.float32).tiny
INT32_MAX = 2**31 - 1


def choose_qparams(lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point for the range ``[lo, hi]``, widened to hold 0.

    Asymmetric: ``s = (hi-lo)/(qmax-qmin)``, ``z = clamp(rne(qmin - lo/s), qmin, qmax)``.
    Symmetric: ``s = max(|lo|, |hi|)/qmax``, ``z = 0``; an unsigned symmetric grid takes ``s = hi/qmax``.
    A constant zero has ``s = 1``; a dead channel takes the largest scale among the others. A binary grid has ``s = 1``.

    Args:
        lo, hi: float tensors, rank 0 or ``[C]`` for a per-channel grid.
        spec: the codes.

    Raises:
        CalibrationError: when a bound is NaN or infinite.
    """
    lo, hi = lo.detach().to(torch.float32), hi.detach().to(torch.float32)
    traced = torch.compiler.is_compiling()  # then no number decides what is computed
    if not traced and not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
        raise CalibrationError("the range holds NaN or infinity", way_out="Look for the layer or batch that makes them")
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    if spec.kind == "binary":
        return QParams(spec, torch.ones_like(hi), torch.zeros_like(hi, dtype=torch.int32))
    if spec.symmetric:
        top = torch.maximum(-lo, hi) if spec.qmin < 0 else hi
        scale = top / spec.qmax
    else:
        steps = spec.qmax - spec.qmin
        # Where a range is wider than float32 can hold as a difference, its ends are divided first.
        scale = torch.where(torch.isinf(hi - lo), hi / steps - lo / steps, (hi - lo) / steps)
    dead = scale < TINY
    if traced or bool(dead.any()):
        top = torch.where(dead, 0.0, scale).amax()
        scale = torch.where(dead, torch.where(top > 0, top, 1.0), scale)
    if spec.symmetric:
        zero = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero = torch.round(spec.qmin - lo / scale).clamp(spec.qmin, spec.qmax).to(torch.int32)
    return QParams(spec, scale, zero)


_KEPT = torch.library.custom_op("fxq::kept", lambda v: v.clone(), mutates_args=(), schema="(Tensor v) -> Tensor")
_KEPT.register_fake(lambda v: torch.empty_like(v))


def kept(v: Tensor) -> Tensor:
    """``v`` itself (no gradient); a compiled graph saves it for the backward.

    Otherwise ``torch.compile`` may compute it anew there, from buffers that the forward has changed meanwhile.
    """
    return _KEPT(v.detach()) if torch.compiler.is_compiling() else v.detach()


def unsigned(qp: QParams) -> QParams:
    """The unsigned grid of as many bits with the same reals: codes and zero point moved up by ``-qmin``."""
    spec = replace(qp.spec, signed=False, narrow=False, symmetric=False)
    return QParams(spec, qp.scale, qp.zero_point - qp.spec.qmin)


def top_code(spec: QuantSpec) -> int | None:
    """Greatest code of a grid with less than 256 codes, counted from its least one; ``None`` for grids that use 8 bits or more in full."""
    return None if spec.kind == "float8" or spec.qmax - spec.qmin >= 255 else spec.qmax - spec.qmin


def in_bytes(qp: QParams) -> QParams:
    """The 8-bit unsigned grid on which a file holds the codes of a narrower or a signed 8-bit one: the same reals, codes moved up by ``-qmin``."""
    spec = replace(qp.spec, bits=8, signed=False, narrow=False, symmetric=False, kind="affine")
    return QParams(spec, qp.scale, qp.zero_point - qp.spec.qmin)


def constant_qparams(value: Tensor, spec: QuantSpec) -> QParams:
    """Grid of a number next to codes of ``spec`` (rank 0): always 8 bits or more."""
    if top_code(spec) is not None:
        spec = replace(spec.per_tensor(), bits=8, signed=False, narrow=False, symmetric=False, kind="affine")
    return choose_qparams(value, value, spec)


def along(v: Tensor, axis: int | None, ndim: int) -> Tensor:
    """View a ``[C]`` vector so that it broadcasts along ``axis`` of a tensor with ``ndim`` dimensions."""
    if v.ndim == 0 or axis is None:
        return v
    return v.reshape([-1 if d == axis % ndim else 1 for d in range(ndim)])


def spread(v: Tensor, spec: QuantSpec, shape: Sequence[int]) -> Tensor:
    """View (of blocks: a copy) of a scale or zero point of ``spec`` that broadcasts over a tensor of ``shape``."""
    if spec.block is None or spec.axis is None:
        return along(v, spec.axis, len(shape))
    return v.repeat_interleave(spec.block, spec.axis).narrow(spec.axis, 0, shape[spec.axis])


def quantize(x: Tensor, qp: QParams) -> Tensor:
    """Codes ``clamp(rne(x/s) + z, qmin, qmax)`` in ``qp.spec.dtype``, shape of ``x``. NaN is not allowed.

    A ``float8`` code is the nearest number of that type to ``x/s``, saturated (ONNX QuantizeLinear, ``saturate=1``); a ``binary``
    code is 1 where ``x >= 0`` and -1 elsewhere, whatever the scale is.
    """
    if qp.spec.kind == "binary":
        return torch.where(x >= 0, 1, -1).to(qp.spec.dtype)
    steps = x.to(torch.float32) / spread(qp.scale.to(x.device), qp.spec, x.shape)
    if qp.spec.kind != "float8":
        steps = torch.round(steps) + spread(qp.zero_point.to(x.device), qp.spec, x.shape)
    return steps.clamp(qp.spec.qmin, qp.spec.qmax).to(qp.spec.dtype)


def dequantize(codes: Tensor, qp: QParams) -> Tensor:
    """Real values ``(code - z) * s`` as float32, shape of ``codes``."""
    s = spread(qp.scale.to(codes.device), qp.spec, codes.shape)
    if qp.spec.kind == "float8":
        return codes.to(torch.float32) * s
    z = spread(qp.zero_point.to(codes.device), qp.spec, codes.shape)
    return (codes.to(torch.int32) - z).to(torch.float32) * s


class _FakeQuantize(torch.autograd.Function):
    """Forward: quantize and dequantize. Backward: the gradient passes where the code was not clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, value: Tensor | None = None) -> Tensor:
        steps = torch.div(x.to(torch.float32), scale).round_()
        shifted = torch.compiler.is_compiling() or x.device.type != "cpu" or zero.ndim > 0 or int(zero) != 0  # to ask another device would wait for it
        if shifted:
            steps = steps.add_(zero)
        codes = steps.clamp(qmin, qmax)
        ctx.save_for_backward(codes == steps)
        if shifted:
            codes = codes.sub_(zero)
        return codes.mul_(scale if value is None else value).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None, None


class _FakeFloat8(torch.autograd.Function):
    """Forward: the nearest E4M3FN number in units of the scale, saturated. Backward: the gradient passes where nothing saturated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, top: int) -> Tensor:
        steps = x.to(torch.float32) / scale
        ctx.save_for_backward(steps.abs() <= top)
        return (steps.clamp(-top, top).to(torch.float8_e4m3fn).to(torch.float32) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


class _FakeSign(torch.autograd.Function):
    """Forward: ``scale`` where ``x >= 0``, ``-scale`` elsewhere. Backward: the gradient passes where ``|x| < 1``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() < 1)
        return torch.where(x >= 0, scale, -scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


def fake_quantize_with(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, value: Tensor | None = None) -> Tensor:
    """:func:`fake_quantize` with scale and zero point as tensors (unchecked; a training step needs no more).

    Args:
        value: scale of the values given, where it is another than the one that ``x`` is divided by.
    """
    s = spread(scale.to(x.device), spec, x.shape)
    v = None if value is None or value is scale else spread(value.to(x.device), spec, x.shape)
    if spec.kind == "float8":
        out: Tensor = _FakeFloat8.apply(x, s, spec.qmax)
    elif spec.kind == "binary":
        out = _FakeSign.apply(x, s if v is None else v)
    else:
        out = _FakeQuantize.apply(x, s, spread(zero.to(x.device), spec, x.shape), spec.qmin, spec.qmax, v)
    return out


def fake_quantize(x: Tensor, qp: QParams) -> Tensor:
    """``dequantize(quantize(x))`` in the dtype of ``x`` with a straight-through gradient.

    The gradient is ``g * 1[qmin <= rne(x/s)+z <= qmax]`` (bounds included); scale and zero point get none.
    """
    return fake_quantize_with(x, qp.scale, qp.zero_point, qp.spec)


def rounded(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Nearest values on grids whose ``scale`` and ``zero`` (float32) broadcast to ``x`` (float32): no gradient, one new tensor. For searches."""
    if spec.kind == "float8":
        return torch.div(x, scale).clamp_(spec.qmin, spec.qmax).to(torch.float8_e4m3fn).to(torch.float32).mul_(scale)
    return torch.div(x, scale).round_().add_(zero).clamp_(spec.qmin, spec.qmax).sub_(zero).mul_(scale)


def bias_qparams(input_qp: QParams, weight_qp: QParams) -> QParams:
    """Grid of an int32 bias: scale ``s_a * s_w`` (float32), zero point 0; per channel where the weight is.

    Source: arXiv 1712.05877, section 2.4.
    """
    scale = (input_qp.scale * weight_qp.scale).to(torch.float32).clamp(min=TINY)
    spec = QuantSpec(32, True, True, True, 0 if scale.ndim else None)
    return QParams(spec, scale, torch.zeros_like(scale, dtype=torch.int32))


def quantize_bias(bias: Tensor, qp: QParams) -> Tensor:
    """int32 codes of a bias: rne in float64, saturated; shape ``[C]``."""
    codes = torch.round(bias.detach().to(torch.float64) / qp.scale.to(torch.float64))
    return codes.clamp(-INT32_MAX, INT32_MAX).to(torch.int32)


def widen_for_bias(weight_qp: QParams, bias: Tensor, input_qp: QParams) -> QParams:
    """Raise weight scales where the int32 bias would take more than half of int32 (the other half is for the sums).

    ``s_w >= |b| / (s_a * 2^30)``, per channel where the weight's scale is.
    """
    floor = bias.detach().abs().to(torch.float64) / (input_qp.scale.to(torch.float64) * (INT32_MAX // 2))
    floor = floor.to(torch.float32)
    if weight_qp.scale.ndim == 0:
        floor = floor.max()
    if not torch.compiler.is_compiling() and not bool((floor > weight_qp.scale).any()):
        return weight_qp
    return QParams(weight_qp.spec, torch.maximum(weight_qp.scale, floor), weight_qp.zero_point)


def requantize(real: Any, spec: QuantSpec, zero_point: int) -> Any:
    """Real values in units of the output scale (numpy float32) to codes: clip, round half to even, add the zero point.

    This is the order of ONNX Runtime's convolution and GEMM epilogues.
    """
    lo, hi = np.float32(spec.qmin - zero_point), np.float32(spec.qmax - zero_point)
    dtype = np.int8 if spec.qmin < 0 else np.uint8
    return (np.rint(np.clip(real, lo, hi)) + np.float32(zero_point)).astype(dtype)


def requantized(acc: Tensor, scale: Tensor, spec: QuantSpec, zero_point: int) -> Tensor:
    """:func:`requantize` of integer sums in torch: ``acc`` (any type) times ``scale`` (float32, in units of the output scale) as codes of ``spec``."""
    real = acc.to(torch.float32) * scale
    return real.clamp_(spec.qmin - zero_point, spec.qmax - zero_point).round_().add_(zero_point).to(spec.dtype)
