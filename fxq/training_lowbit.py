"""Layers with low-bit weights in training: the weight is rounded as it is, its batch norm goes into the scale, or into the threshold of a sign.

Source of the threshold: Courbariaux et al. 2016 (arXiv 1602.02830), section 1.5 and Umuroglu et al. 2017 (arXiv 1612.07119), section 4.2.2.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxq import lowbit, numerics
from fxq.estimators import Estimator, RangeEstimator
from fxq.modules import FakeQuantize, Quantized, call_with
from fxq.shared import SharedWeight, rebuilt
from fxq.spec import QParams, QuantSpec
from fxq.trackers import Tracker
from fxq.training import Normed, along_weight, folded

FINEST = 64
"""Codes are multiplied by the greatest power of two that keeps them at or below it: the int32 bias, whose step is the product of both scales, gets that
much finer, and pairs of u8 x s8 products still fit 16 bits (2 * 255 * 64 < 2^15)."""
WIDE = 9
"""Bits of the codes of DoReFa's 8-bit weights, odd numbers to 255."""


class EstimatedLayer(Normed, Quantized):
    """A conv, transposed conv or linear layer whose weight is ``codes * scale`` by an estimator, with the batch norm behind it, in training.

    While ``bn`` trains it computes ``BN(conv(x, values(W)) + b)``, by the statistics of the batch, or by those that stay. In eval mode, or frozen,
    it computes what is deployed:
    ``conv(x, values(W) f) + Q(beta + (b - mu) f)``, ``f = gamma / sigma``; a negative ``f`` turns the signs of the codes. If only signs read its output
    (``signs``), it gives values that lie on the very side of 0 that the integer threshold says.

    Attributes:
        op: the float layer; ``estimator``: of the weight.
        signs: all its readers are signs.
        frozen: scales and batch norm statistics are fixed.
    """

    def __init__(self, op: nn.Module, bn: nn.Module | None, estimator: Estimator, source: Tracker | None, path: str = "", signs: bool = False) -> None:
        axis = estimator.axis
        bits = 8 if estimator.top < 128 else WIDE
        self_spec = QuantSpec(bits, True, True, True, axis)
        weight: Any = op.weight
        ones = torch.ones(weight.shape[axis], device=weight.device)
        super().__init__(op, QParams(self_spec, ones, torch.zeros_like(ones, dtype=torch.int32)))
        self.spec, self.bn, self.estimator, self.path, self.signs, self.frozen = self_spec, bn, estimator, path, signs, False
        self.fine = 1 if source is None else 2 ** max(0, (FINEST // estimator.top).bit_length() - 1)
        self._source = [source]

    @property
    def source(self) -> Tracker | None:
        """Tracker of the input's grid; ``None`` when the input is float."""
        return self._source[0]

    def forward(self, x: Tensor) -> Tensor:
        op: Any = self.op
        if self.bn is not None and self.training and not self.frozen:
            return self.normed(call_with(op, x, self.estimator(self.kept_weight), op.bias))
        return self._thresholded(x) if self.signs and self.source is not None else self._deployed(x)

    def _fold(self) -> tuple[Tensor, Tensor]:
        """``(scale, shift)`` of the batch norm and the layer's own bias, float64 ``[C]``, differentiable."""
        op: Any = self.op
        fold = folded(self.bn)
        if fold is None:
            channels = op.weight.shape[self.estimator.axis] * (op.groups if self.estimator.axis else 1)
            scale = torch.ones(channels, dtype=torch.float64, device=op.weight.device)
            fold = scale, torch.zeros_like(scale)
        return fold[0], fold[1] if op.bias is None else fold[1] + op.bias.double() * fold[0]

    def grids(self) -> tuple[Tensor, QParams, Tensor | None, QParams | None]:
        """What is deployed: codes (float32, signs turned, made finer), their grid, the float bias and its int32 grid."""
        op: Any = self.op
        factor, bias = self._fold()
        has_bias = op.bias is not None or self.bn is not None
        with torch.no_grad():
            codes, scale = self.estimator.codes(self.kept_weight)
            turned = torch.where(factor < 0, -1.0, 1.0)
            codes = codes * self.fine * along_weight(op, turned).to(codes.dtype)
            rows = (scale.double() / self.fine).expand(self.weight_grid.scale.shape) * self._per_row(factor.abs())
            # Scales stay far from the denormals, so that the product with the input's scale is none: such a channel adds nothing.
            qp = QParams(self.spec, rows.to(torch.float32).clamp(min=1e-30), torch.zeros_like(rows, dtype=torch.int32))
            if self.source is None or not has_bias:
                return codes, qp, bias.to(op.weight.dtype) if has_bias else None, None
            qp = numerics.widen_for_bias(qp, bias, self.source.qparams)
            bias_qp = numerics.bias_qparams(self.source.qparams, qp)
        return codes, qp, bias.to(op.weight.dtype), bias_qp

    def _per_row(self, factor: Tensor) -> Tensor:
        """A value for each output channel as one for each index of the weight's axis."""
        op: Any = self.op
        return factor if self.estimator.axis == 0 else factor.reshape(op.groups, -1)[0]

    def _deployed(self, x: Tensor) -> Tensor:
        op: Any = self.op
        codes, qp, bias, bias_qp = self.grids()
        weight = codes * numerics.along(qp.scale, self.estimator.axis, codes.ndim)
        if torch.is_grad_enabled() and (op.weight.requires_grad or self.bn is not None):
            smooth = self.estimator(self.kept_weight) * along_weight(op, self._fold()[0]).to(op.weight.dtype)
            weight = weight + (smooth - smooth.detach())
        if bias is not None:
            bias = self._fold()[1].to(bias.dtype)  # differentiable
            bias = bias if bias_qp is None else numerics.fake_quantize(bias, bias_qp)
        return call_with(op, x, weight, bias)

    def threshold(self) -> tuple[Tensor, Tensor]:
        """The integer threshold and its direction for each output channel, float64 ``[C]``: see :func:`fxq.lowbit.sign_threshold`."""
        op: Any = self.op
        assert self.source is not None
        with torch.no_grad():
            _, scale = self.estimator.codes(self.kept_weight)
            alpha = (scale.double() * self.source.scale.double()).expand(self.weight_grid.scale.shape)
            zero = torch.zeros_like(alpha)
            bias = zero if op.bias is None else op.bias.double()
            bn: Any = self.bn
            if bn is None:
                return lowbit.sign_threshold(alpha, bias, zero + 1, zero, zero, zero + 1)
            gamma, beta = (zero + d if v is None else v.double() for v, d in ((bn.weight, 1), (bn.bias, 0)))
            return lowbit.sign_threshold(alpha, bias, gamma, beta, bn.running_mean.double(), torch.sqrt(bn.running_var.double() + bn.eps))

    def _thresholded(self, x: Tensor) -> Tensor:
        """The output's real values, moved onto the side of 0 where the integer threshold puts them."""
        op: Any = self.op
        assert self.source is not None
        codes, scale = self.estimator.codes(self.kept_weight)
        rows = numerics.along(scale.clamp(min=numerics.TINY), self.estimator.axis, codes.ndim)
        smooth = self.estimator(self.kept_weight) / rows
        dot = call_with(op, x, codes + (smooth - smooth.detach()), None).to(codes.dtype) / self.source.scale
        shape = [-1] if isinstance(op, nn.Linear) else [1, -1, *([1] * (dot.ndim - 2))]
        factor, bias = self._fold()
        alpha = (scale * self.source.scale).expand(self.weight_grid.scale.shape)
        y = dot * (factor.to(dot.dtype) * alpha).reshape(shape) + bias.to(dot.dtype).reshape(shape)
        threshold, direction = (v.to(dot.dtype).reshape(shape) for v in self.threshold())
        positive = direction * torch.round(dot.detach()) >= threshold
        side = torch.where(positive, y.detach().clamp(min=0), y.detach().clamp(max=-numerics.TINY))
        return lowbit.through(y, side, torch.ones_like(y))

    def freeze(self) -> None:
        """Fix the scales of the weight and the statistics of the batch norm."""
        self.estimator.freeze(self.kept_weight)
        self.frozen = True

    def converted(self) -> Quantized:
        """The deployed layer."""
        with torch.no_grad():
            codes, qp, bias, bias_qp = self._threshold_grids() if self.signs and self.source is not None else self.grids()
            if isinstance(self.op, SharedWeight):
                return Quantized(self._shared_op(self.op, qp, bias), qp, bias_qp)
            op: Any = copy.copy(self.op)
            op._parameters = dict(op._parameters)
            op.weight = nn.Parameter(codes * numerics.along(qp.scale, self.estimator.axis, codes.ndim))
            op.bias = None if bias is None else nn.Parameter(bias)
        return Quantized(op, qp, bias_qp)

    def _shared_op(self, op: SharedWeight, qp: QParams, bias: Tensor | None) -> SharedWeight:
        """The shared weight on its integer grid: integers as codebook, the scale of each channel with the sign of its batch norm as factor."""
        assert isinstance(self.estimator, RangeEstimator)
        _, step = self.estimator.codes(self.kept_weight)
        grid = QParams(self.estimator.spec, step, torch.zeros_like(step, dtype=torch.int32))
        whole = numerics.quantize(op.book.detach(), grid).to(op.book.dtype) * self.fine
        rows = qp.scale * torch.where(self._per_row(self._fold()[0]) < 0, -1.0, 1.0).to(qp.scale.dtype)
        return rebuilt(op, whole, rows, bias, train_rows=False)

    def _threshold_grids(self) -> tuple[Tensor, QParams, Tensor, QParams]:
        """Codes and an int32 bias whose sum has the sign of ``direction d - threshold + 1/2``, and is never 0."""
        op: Any = self.op
        assert self.source is not None
        codes, _ = self.estimator.codes(self.kept_weight)
        threshold, direction = self.threshold()
        fine = max(2, self.fine)
        spec, zero = self.source.spec, int(self.source.zero_point)
        most = float(codes.abs().movedim(self.estimator.axis, 0).flatten(1).sum(1).max()) * max(spec.qmax - zero, zero - spec.qmin)
        steps = fine // 2 - fine * threshold.clamp(-most - 1, most + 1)
        ones = torch.full_like(self.weight_grid.scale, 1 / fine)
        qp = QParams(self.spec, ones, torch.zeros_like(ones, dtype=torch.int32))
        bias_qp = numerics.bias_qparams(self.source.qparams, qp)
        codes = codes * fine * along_weight(op, direction).to(codes.dtype)
        return codes, qp, (steps * bias_qp.scale.double()).to(codes.dtype), bias_qp


def is_binary(fq: FakeQuantize) -> bool:
    """The grid of a sign."""
    return fq.spec.kind == "binary"
