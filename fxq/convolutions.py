"""Convolutions that torch has not: with a padding of its own on each side, 1x1 depthwise ones as plain arithmetic, means under a kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _PaddedConv:
    """Mix-in: explicit zero padding (``pads``, torch's order, last dimension first) instead of ``padding``."""

    pads: tuple[int, ...]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(F.pad(x, self.pads), weight, bias)  # type: ignore[misc]
        return y


class PaddedConv1d(_PaddedConv, nn.Conv1d):
    """Conv1d with its own begin and end padding."""


class PaddedConv2d(_PaddedConv, nn.Conv2d):
    """Conv2d with its own padding on each of the four sides (TensorFlow's SAME, merged pads)."""


class PaddedConv3d(_PaddedConv, nn.Conv3d):
    """Conv3d with its own padding on each of the six sides."""


class _ChannelAffine:
    """Mix-in: a 1x1 depthwise conv, ``x * weight + bias`` per channel, without torch's slow kernel for it (4 to 40 times)."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        w = weight.reshape(-1, *weight.shape[2:])
        return x * w if bias is None else torch.addcmul(bias.reshape(w.shape), x, w)


class ChannelAffine1d(_ChannelAffine, nn.Conv1d):
    """Scale and shift of each channel, ``[N, C, L]``."""


class ChannelAffine2d(_ChannelAffine, nn.Conv2d):
    """Scale and shift of each channel, ``[N, C, H, W]``."""


class ChannelAffine3d(_ChannelAffine, nn.Conv3d):
    """Scale and shift of each channel, ``[N, C, D, H, W]``."""


class BoxMean(nn.Module):
    """XNOR-Net's ``K`` (Rastegari et al. 2016, arXiv 1603.05279, equation 11): the mean of ``|x|`` under the kernel of a layer; no gradient.

    Of a convolution ``[N, 1, *out]``: zero padding counts as 0. Of a linear layer ``[..., 1]``.
    """

    def __init__(self, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (), dilation: Sequence[int] = ()) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.dilation = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)

    @classmethod
    def of(cls, op: Any) -> BoxMean:
        """The box of a conv (zero padding in numbers) or linear module."""
        if isinstance(op, nn.Linear):
            return cls(())
        return cls(op.kernel_size, op.stride, op.padding, op.dilation)

    def forward(self, x: Tensor) -> Tensor:
        magnitude = x.detach().abs()
        if not self.kernel:
            return magnitude.mean(-1, keepdim=True)
        box = torch.full((1, 1, *self.kernel), 1 / math.prod(self.kernel), dtype=x.dtype, device=x.device)
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        return torch.as_tensor(conv(magnitude.mean(1, keepdim=True), box, None, self.stride, self.padding, self.dilation))

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


PADDED = (PaddedConv1d, PaddedConv2d, PaddedConv3d)
CHANNEL_AFFINE = (ChannelAffine1d, ChannelAffine2d, ChannelAffine3d)


def padded(conv: Any, pads: Sequence[int]) -> nn.Module:
    """A conv with the weights of ``conv`` (shared, not copied) and explicit ``pads`` in torch's order."""
    cls = PADDED[conv.weight.ndim - 3]
    out: Any = cls.__new__(cls)
    out.__dict__.update({k: (dict(v) if isinstance(v, dict) else v) for k, v in conv.__dict__.items()})
    zero = (0,) * len(conv.kernel_size)
    out.padding, out.pads = zero, tuple(pads)
    out._reversed_padding_repeated_twice = [0, 0] * len(zero)
    return out  # type: ignore[no-any-return]


def conv_pads(conv: nn.Module) -> tuple[tuple[int, int], ...]:
    """``(begin, end)`` zero padding of each spatial dimension of a convolution, first dimension first."""
    pads = getattr(conv, "pads", None)
    n = len(conv.kernel_size)  # type: ignore[arg-type]
    if pads is not None:
        full = [*pads, *([0] * (2 * n - len(pads)))]
        return tuple((full[2 * (n - 1 - d)], full[2 * (n - 1 - d) + 1]) for d in range(n))
    padding: Any = conv.padding
    if padding == "valid":
        return ((0, 0),) * n
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]  # type: ignore[arg-type]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in padding)
