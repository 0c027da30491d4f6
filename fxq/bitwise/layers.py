"""Which weighted layers run on bits, and what their integer sums turn into: read off the quantized layer and the grids around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxq import kernels, numerics
from fxq.bitwise import thresholds
from fxq.convolutions import CHANNEL_AFFINE, conv_pads
from fxq.modules import Quantized
from fxq.spec import QParams, QuantSpec

INT32 = 1 << 31
PLANES = {"binary": 1, "ternary": 2}
"""Bit planes of an activation on a grid of this kind."""


@dataclass(frozen=True, eq=False)
class BitLayer:
    """A layer of binary or ternary weights: ``sum = mult * dot(weights, x) + bias``, per output channel.

    Attributes:
        weights: int8 ``[N, C / groups, kh, kw]`` of -1, 0, 1; ``(kh, kw)`` of a linear layer is ``(1, 1)``, or the size that a flatten in front of it joins.
        mult, bias, most: int64 ``[N]``: the factor of the weights, the int32 bias, the number of weights that are not 0.
        scale: float32 ``[N]``, real value of one step of the sum.
        groups: of channels. stride, dilation: ``(rows, columns)``. pads: zero padding ``(top, bottom, left, right)``.
        linear: a linear layer: channels come last. rank: spatial dimensions of its input.
        planes: bit planes of its input.
    """

    weights: Tensor
    mult: Tensor
    bias: Tensor
    most: Tensor
    scale: Tensor
    groups: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    linear: bool
    rank: int
    planes: int

    @property
    def ternary(self) -> bool:
        """Some weights are 0."""
        return bool((self.most < self.weights[0].numel()).any())

    @property
    def kind(self) -> str:
        """``binary x ternary``: weights, activations."""
        return f"{'ternary' if self.ternary else 'binary'} x {'binary' if self.planes == 1 else 'ternary'}"

    def behind_flatten(self, rows: int, columns: int) -> BitLayer:
        """A linear layer behind a flatten of ``[B, C, rows, columns]`` as a convolution over all of it."""
        return BitLayer(**{**self.__dict__, "weights": self.weights.reshape(len(self.mult), -1, rows, columns), "rank": 2})

    def selected(self, rows: Tensor) -> BitLayer:
        """The layer with its output channels taken from ``rows``, in that order."""
        picked = {k: getattr(self, k)[rows] for k in ("weights", "mult", "bias", "most", "scale")}
        return BitLayer(**{**self.__dict__, **picked})


def is_bits(qp: QParams) -> bool:
    """A binary or ternary grid around 0 with one scale."""
    return qp.spec.kind in PLANES and qp.scale.ndim == 0 and int(qp.zero_point) == 0


def bit_layer(module: nn.Module, x: QParams) -> BitLayer | str:
    """The layer as one of bits, or why it is none.

    Args:
        module: what an integer ``conv`` or ``linear`` step runs.
        x: grid of its input.
    """
    if not isinstance(module, Quantized):
        return "its weights are float"
    op: Any = module.op
    wq = module.weight_grid.qparams
    if not is_bits(x):
        return f"its input is on the grid {x.spec}, not on a binary or ternary one"
    if not isinstance(op, (nn.Conv1d, nn.Conv2d, nn.Linear)) or isinstance(op, CHANNEL_AFFINE):
        return f"there is no bit kernel for {type(op).__name__}"
    if getattr(op, "padding_mode", "zeros") != "zeros":
        return f"its padding is {op.padding_mode}, not zeros"
    if wq.spec.axis not in (None, 0) or wq.spec.block is not None or wq.spec.bits > 16:
        return f"its weights are on the grid {wq.spec}"
    codes = module.weight_codes().to(torch.int64)
    if not is_sound(module):
        return f"a weight of shape {list(codes.shape)} does not fit {op}"
    whole = codes - numerics.along(wq.zero_point.to(torch.int64), wq.spec.axis, codes.ndim)
    rows = whole.flatten(1)
    mult = rows.abs().amax(1).clamp(min=1)
    if bool(((rows != 0) & (rows.abs() != mult[:, None])).any()):
        return f"its weights take {len(torch.unique(whole))} values, not -f, 0 and f"
    bias = module.bias_codes()
    bias = torch.zeros_like(mult) if bias is None else bias.to(torch.int64)
    most = (rows != 0).sum(1)
    if bool((mult * most + bias.abs() >= INT32).any()):
        return "its sums can leave int32"
    scale = (x.scale * wq.scale).detach().expand(len(mult)).clone()
    weights = torch.sign(whole).to(torch.int8)
    weights = weights[:, :, None, None] if weights.ndim == 2 else weights[:, :, None] if weights.ndim == 3 else weights
    return BitLayer(weights, mult, bias, most, scale, *_geometry(op), PLANES[x.spec.kind])


def is_sound(module: nn.Module) -> bool:
    """The numbers of a conv or linear layer are such as torch takes (those of a file may be others)."""
    op: Any = module.op if isinstance(module, Quantized) else module
    shape = tuple(op.weight.shape)
    if 0 in shape or (op.bias is not None and tuple(op.bias.shape) != shape[:1]):
        return False
    if isinstance(op, nn.Linear):
        return len(shape) == 2
    pads = [p for pair in conv_pads(op) for p in pair]
    rank = len(op.kernel_size)
    fits = len(shape) == rank + 2 and shape[2:] == tuple(op.kernel_size) and len(op.stride) == len(op.dilation) == rank == len(pads) // 2
    return bool(fits and min(op.groups, *op.stride, *op.dilation) >= 1 and min(pads) >= 0 and shape[0] % op.groups == 0)


def _geometry(op: Any) -> tuple[int, tuple[int, int], tuple[int, int], tuple[int, int, int, int], bool, int]:
    """``(groups, stride, dilation, pads, linear, rank)``."""
    if isinstance(op, nn.Linear):
        return 1, (1, 1), (1, 1), (0, 0, 0, 0), True, 0
    pads = conv_pads(op)
    if isinstance(op, nn.Conv1d):
        return op.groups, (1, op.stride[0]), (1, op.dilation[0]), (0, 0, *pads[0]), False, 1
    return op.groups, tuple(op.stride), tuple(op.dilation), (*pads[0], *pads[1]), False, 2


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What an integer sum turns into.

    Attributes:
        kind: ``sign``, ``ternary`` (bits), ``codes`` (8 bits) or ``float``.
        lo, hi: int32 ``[N]``, thresholds of the dot product (``sign``, ``ternary``).
        mult, bias: int32 ``[N]``; scale: float32 ``[N]`` (``codes``, ``float``).
        qmin, qmax, zero: codes of the grid.
    """

    kind: str
    lo: Tensor | None = None
    hi: Tensor | None = None
    mult: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    qmin: int = 0
    qmax: int = 0
    zero: int = 0


def epilogue(layer: BitLayer, out: QParams | None) -> Epilogue | None:
    """The epilogue that gives the codes of the grid ``out`` (rounded to: :attr:`FakeQuantize.rounding`), or floats without one; ``None``: there is none."""
    mult, bias = layer.mult.to(torch.int32), layer.bias.to(torch.int32)
    if out is None:
        return Epilogue("float", mult=mult, bias=bias, scale=layer.scale)
    if is_bits(out):
        lo, hi = thresholds.of_sums(lambda d: kernels.requantized(layer.mult * d + layer.bias, layer.scale, out), -layer.most, layer.most)
        return Epilogue("sign" if out.spec.kind == "binary" else "ternary", lo, hi)
    if out.spec.kind != "affine" or out.spec.bits > 8 or out.scale.ndim:
        return None
    return Epilogue("codes", mult=mult, bias=bias, scale=layer.scale / out.scale, qmin=out.spec.qmin, qmax=out.spec.qmax, zero=int(out.zero_point))


def is_code(spec: QuantSpec) -> bool:
    """The grid's codes fit a byte."""
    return spec.kind != "float8" and spec.bits <= 8
