"""Float layers with shared weights in training: the codebook trains, its batch norm stands behind the layer and becomes a factor for each channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxq import numerics
from fxq.shared import SharedWeight, rebuilt
from fxq.training import FloatLayer, folded


class SharedLayer(FloatLayer):
    """A conv, transposed conv or linear layer with a shared weight (Han et al. 2016, arXiv 1510.00149, section 3.3), with its batch norm, in training.

    While the batch norm trains it computes ``BN(op(x))``; in eval mode, or once its statistics are fixed, what is deployed: ``table[codes] * rows`` with
    ``rows = gamma / sigma``.

    Attributes:
        op: the layer with the shared weight; it has no factors of its own if there is a batch norm.
    """

    def deployed(self) -> tuple[Tensor, Tensor | None]:
        op: Any = self.op
        weight, fold = op.weight, folded(self.bn)
        if fold is None:
            return weight, op.bias
        bias = fold[1] if op.bias is None else op.bias.double() * fold[0] + fold[1]
        return weight * numerics.along(fold[0].to(weight.dtype), op.axis, weight.ndim), bias.to(weight.dtype)

    def converted(self) -> nn.Module:
        """The deployed layer, whose codebook, factors and bias train on."""
        op, fold = self.op, folded(self.bn)
        assert isinstance(op, SharedWeight)
        return op if fold is None else rebuilt(op, None, fold[0], self.deployed()[1])
