"""Quantization-aware training: activations and weights rounded in the forward pass, straight-through gradients, batch norm folded as deployed.

Sources: Jacob et al. 2018 (arXiv 1712.05877), section 3; Krishnamoorthi 2018 (arXiv 1806.08342), section 3.2, for the folded batch norm.
Three switches, independent of ``train()`` and ``eval()``: a tracker observes or not, it is frozen or not, a layer's batch norm is frozen or not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq import distributed, numerics
from fxq.errors import CalibrationError
from fxq.folding import fold_back
from fxq.modules import FakeQuantize, Quantized, Wrapper, call_with
from fxq.spec import QParams, QuantSpec
from fxq.trackers import Tracker
from fxq.weight_masks import masked
from fxq.weight_ranges import weight_range

WEIGHT_MOMENTUM = 0.1
"""Share of a step's range in the moving average of a weight's range."""

LEAST_FACTOR = 1e-12
"""A fold factor ``gamma / sigma`` below it is taken as 1 in training: its channel gives ``beta`` whatever its weight is."""


class Normed(nn.Module):
    """Base of the layers in training that hold a batch norm.

    Attributes:
        bn: the batch norm, or ``None``.
        frozen: nothing but parameters changes any more.
        together: batch statistics are those of all processes (:func:`fxq.distributed.batch_norm`).
        weight_mask: bool buffer, False where the weight of ``op`` stays 0; ``None`` (and none in files from before there were masks): nowhere.
    """

    op: nn.Module
    bn: nn.Module | None
    frozen: bool = False
    together: bool = True

    def set_mask(self, mask: Tensor | None) -> None:
        """Keep the weight at 0 where ``mask`` (bool, its shape) is False."""
        self.register_buffer("weight_mask", mask)

    @property
    def mask(self) -> Tensor | None:
        """The mask, or ``None``."""
        return self._buffers.get("weight_mask")

    @property
    def kept_weight(self) -> Tensor:
        """The weight of ``op``, 0 where it is masked, differentiable."""
        op: Any = self.op
        return masked(op.weight, self._buffers.get("weight_mask"))

    def deployed(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of ``op`` with its batch norm folded, in float; the very numbers of :func:`fxq.folding.fold_back`."""
        op: Any = self.op
        weight, fold = self.kept_weight, folded(self.bn)
        if fold is None:
            return weight, op.bias
        scale, shift = fold
        bias = shift if op.bias is None else op.bias.double() * scale + shift
        return (weight.double() * along_weight(op, scale)).to(weight.dtype), bias.to(weight.dtype)

    def masked_op(self) -> nn.Module:
        """``op``, or a copy whose weight holds the zeros of the mask."""
        if self._buffers.get("weight_mask") is None:
            return self.op
        new: Any = copy.copy(self.op)
        new._parameters = dict(new._parameters)
        new.weight = nn.Parameter(self.kept_weight.detach())
        return new  # type: ignore[no-any-return]

    @property
    def by_batch(self) -> bool:
        """The batch norm takes the statistics of the batch: in training mode, unless it itself is in eval mode."""
        return self.bn is not None and self.training and self.bn.training and not self.frozen

    def normed(self, x: Tensor) -> Tensor:
        """``bn(x)``, by the statistics of the batch or by those that stay."""
        bn: Any = self.bn
        if self.by_batch or bn.running_mean is None:
            return distributed.batch_norm(bn, x, self.together)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


class FloatNorm(Normed, Wrapper):
    """A batch norm that no layer took in, in training.

    Attributes:
        op: the batch norm.
    """

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    @property
    def bn(self) -> nn.Module:  # type: ignore[override]
        return self.op

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x)

    def freeze(self) -> None:
        """Fix the statistics."""
        self.frozen = True

    def converted(self) -> nn.Module:
        """The deployed batch norm."""
        return self.op


class FloatLayer(Normed, Wrapper):
    """A conv, transposed conv or linear layer that stays float, with the batch norm that was folded into it, in training.

    While the batch norm trains it computes ``BN(op(x))``; in eval mode, or once its statistics are fixed, the folded layer.

    Attributes:
        op: the float layer.
    """

    def __init__(self, op: nn.Module, bn: nn.Module | None) -> None:
        super().__init__()
        self.op, self.bn, self.frozen = op, bn, False

    def forward(self, x: Tensor) -> Tensor:
        if self.by_batch:
            op: Any = self.op
            plain = self._buffers.get("weight_mask") is None
            return self.normed(torch.as_tensor(op(x)) if plain else call_with(op, x, self.kept_weight, op.bias))
        return call_with(self.op, x, *self.deployed())

    def freeze(self) -> None:
        """Fix the statistics of the batch norm."""
        self.frozen = True

    def converted(self) -> nn.Module:
        """The deployed layer."""
        fold, op = folded(self.bn), self.masked_op()
        return op if fold is None else fold_back(op, *(v.detach() for v in fold))


def folded(bn: Any) -> tuple[Tensor, Tensor] | None:
    """``(scale, shift)`` of a batch norm by its running statistics, float64 ``[C]``, differentiable in gamma and beta."""
    if bn is None:
        return None
    sigma = torch.sqrt(bn.running_var.double() + bn.eps)
    scale = (torch.ones_like(sigma) if bn.weight is None else bn.weight.double()) / sigma
    return scale, (0.0 if bn.bias is None else bn.bias.double()) - bn.running_mean.double() * scale


def along_weight(op: Any, v: Tensor) -> Tensor:
    """A value ``[C]`` per output channel in the shape that multiplies the weight of ``op``."""
    if isinstance(op, nn.modules.conv._ConvTransposeNd):
        per = v.reshape(op.groups, 1, -1, *([1] * (op.weight.ndim - 2)))
        return per.expand(op.groups, op.weight.shape[0] // op.groups, *per.shape[2:]).reshape(op.weight.shape[0], -1, *per.shape[3:])
    return v.reshape(-1, *([1] * (op.weight.ndim - 1)))


class TrainedLayer(Normed, Quantized):
    """A conv, transposed conv or linear layer in training, with the batch norm behind it.

    While ``bn`` trains, one convolution runs: ``BN(conv(x, Q(W f)) / f + b)`` with the fold factor ``f = gamma / sigma`` of the running
    statistics (no gradient through ``f``, on which the result does not depend but for the rounding). It equals conv and BN when nothing is rounded.
    In eval mode, or once its statistics are fixed, it computes what is deployed: ``conv(x, Q(W f)) + Q(beta + (b - mu) f)``.

    Attributes:
        op: the float layer, its parameters train.
        weight_spec, observer: codes of the weight, and how its range is found: anew from the current weight in each forward, or with ``ema`` as a
            moving average over the training steps (buffer ``weight_ends``, lo and hi).
        source: tracker of the input's grid, for the int32 bias; ``None`` for a float bias.
        path: of the layer in the model, for errors.
        frozen: grids and batch norm are fixed.
    """

    def __init__(self, op: nn.Module, bn: nn.Module | None, weight: QParams, observer: str, source: Tracker | None, path: str = "") -> None:
        bias = None if source is None else numerics.bias_qparams(source.qparams, weight)
        super().__init__(op, weight, bias if op.bias is not None or bn is not None else None)
        self.bn, self.observer, self.frozen, self.path = bn, observer, False, path
        self._source = [source]
        if observer == "ema":
            self.register_buffer("weight_ends", torch.full((2, *weight.scale.shape), torch.nan, device=weight.scale.device))

    def _range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Range of the weight, per channel where its grid is."""
        lo, hi = weight_range(weight, self.weight_grid.spec, self.observer)
        if self.observer != "ema":
            return lo, hi
        ends: Tensor = self.weight_ends  # type: ignore[assignment]
        now = torch.stack([lo, hi])
        average = numerics.kept(torch.where(torch.isnan(ends), now, torch.lerp(ends, now, WEIGHT_MOMENTUM) if self.training else ends))
        if self.training:
            ends.copy_(average)
        return average[0], average[1]

    def _weight_qparams(self, weight: Tensor) -> QParams:
        lo, hi = self._range(weight)
        if torch.compiler.is_compiling():
            return numerics.choose_qparams(lo, hi, self.weight_grid.spec)
        try:
            return numerics.choose_qparams(lo, hi, self.weight_grid.spec)
        except CalibrationError as e:  # finite parameters whose product with the fold factor is not
            way_out = "Lower the learning rate, or clip the gradients; load the last good checkpoint"
            raise CalibrationError("the weight is NaN or infinite", where=self.path or None, way_out=way_out) from e

    def grids(self, weight: Tensor, bias: Tensor | None) -> tuple[QParams, QParams | None]:
        """Grids of a weight and of its int32 bias; of the frozen layer those that were fixed."""
        if self.frozen:
            return self.weight_grid.qparams, None if self.bias_grid is None else self.bias_grid.qparams
        with torch.no_grad():
            qp = self._weight_qparams(weight.detach())
            source = self._source[0]
            if bias is None or source is None:
                return qp, None
            qp = numerics.widen_for_bias(qp, bias, source.qparams)
            return qp, numerics.bias_qparams(source.qparams, qp)

    def forward(self, x: Tensor) -> Tensor:
        op: Any = self.op
        if self.by_batch:
            fold = folded(self.bn)
            assert fold is not None
            factor = fold[0].detach().to(op.weight.dtype)
            factor = numerics.kept(torch.where(factor.abs() < LEAST_FACTOR, torch.ones_like(factor), factor))
            weight = self.kept_weight * along_weight(op, factor)
            qp, _ = self.grids(weight, None)
            y = call_with(op, x, numerics.fake_quantize(weight, qp), None)
            shape = [1, -1, *([1] * (y.ndim - 2))] if not isinstance(op, nn.Linear) else [-1]
            y = y / factor.reshape(shape)
            return self.normed(y if op.bias is None else y + op.bias.reshape(shape))
        weight, bias = self.deployed()
        qp, bias_qp = self.grids(weight, bias)
        if bias is not None and bias_qp is not None:
            bias = numerics.fake_quantize(bias, bias_qp)
        return call_with(op, x, numerics.fake_quantize(weight, qp), bias)

    def freeze(self) -> None:
        """Fix the grids of the weight and bias and the statistics of the batch norm."""
        weight, bias = self.deployed()
        qp, bias_qp = self.grids(weight, bias)
        self.weight_grid = FakeQuantize(qp)
        self.bias_grid = None if bias_qp is None else FakeQuantize(bias_qp)
        self.frozen = True

    def converted(self) -> Quantized:
        """The deployed layer."""
        fold = folded(self.bn)
        with torch.no_grad():
            weight, bias = self.deployed()
            qp, bias_qp = self.grids(weight, bias)
            op = self.masked_op()
            op = op if fold is None else fold_back(op, *(v.detach() for v in fold))
        return Quantized(op, qp, bias_qp)


def unsigned_where(spec: QuantSpec, wanted: bool, qp: QParams) -> QParams:
    """The grid as the target stores it."""
    return numerics.unsigned(qp) if wanted and spec.signed and not spec.narrow and spec.kind == "affine" else qp
