"""fold-bn: BatchNorm into the conv, transposed conv or linear layer before it, by dataflow (algorithms: W*g/s, b' = beta + (b-mu)*g/s)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.graph import data_inputs, erase, kind, module_of, swap_module, walk
from fxq.modules import WEIGHTED
from fxq.pipeline import Pass, PassContext


@dataclass(frozen=True)
class FoldBN(Pass):
    """Fold with the running statistics in float64; only where the BN is the layer's single user."""

    name: ClassVar[str] = "fold-bn"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")
    ensures: ClassVar[tuple[str, ...]] = ("bn-folded",)
    tolerance: ClassVar[float | None] = 1e-4

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        folded = 0
        for node, _ in walk(gm, "batch_norm"):
            (source,) = data_inputs(node)
            why = _cannot(gm, node, source)
            if why is not None:
                ctx.skip(node, why)
                continue
            swap_module(gm, source, fold(module_of(gm, source), module_of(gm, node)))
            erase(gm, node)
            folded += 1
        return folded


def _cannot(gm: GraphModule, node: Node, source: Node) -> str | None:
    if kind(gm, source) not in WEIGHTED:
        return f"there is no conv or linear layer before it, but {kind(gm, source)}"
    if len(source.users) != 1:
        return f"{source.name} has {len(source.users)} users"
    return None if module_of(gm, node).running_var is not None else "it has no running statistics"


def affine_of(bn: Any) -> tuple[Tensor, Tensor]:
    """``(scale, shift)`` of a batch norm in eval mode, float64 ``[C]``."""
    sigma = torch.sqrt(bn.running_var.double() + bn.eps)
    scale = (bn.weight.double() if bn.weight is not None else torch.ones_like(sigma)) / sigma
    shift = (bn.bias.double() if bn.bias is not None else torch.zeros_like(sigma)) - bn.running_mean.double() * scale
    return scale.detach(), shift.detach()


def fold(layer: nn.Module, bn: nn.Module) -> nn.Module:
    """A new layer that computes ``bn(layer(x))``; ``layer`` is not changed."""
    scale, shift = affine_of(bn)
    old: Any = layer
    new: Any = copy.copy(layer)
    new._parameters = dict(old._parameters)
    w = old.weight.detach()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        per = scale.reshape(old.groups, 1, -1, *([1] * (w.ndim - 2)))
        weight = (w.double().reshape(old.groups, -1, *w.shape[1:]) * per).reshape(w.shape)
    else:
        weight = w.double() * scale.reshape(-1, *([1] * (w.ndim - 1)))
    bias = shift if old.bias is None else shift + old.bias.detach().double() * scale
    new.weight, new.bias = nn.Parameter(weight.to(w.dtype)), nn.Parameter(bias.to(w.dtype))
    return new  # type: ignore[no-any-return]
