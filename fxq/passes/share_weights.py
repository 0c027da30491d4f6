"""share-weights: the weights of each layer share the values of a codebook."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import kmeans
from fxq.errors import PassError
from fxq.estimators import RangeEstimator
from fxq.folding import fold_back
from fxq.graph import module_of, swap_module, walk
from fxq.modules import WEIGHTED
from fxq.numerics import choose_qparams
from fxq.pipeline import Pass, PassContext
from fxq.shared import SHARED, SharedWeight, shared
from fxq.spec import QuantSpec
from fxq.training import Normed, TrainedLayer, folded
from fxq.training_lowbit import EstimatedLayer
from fxq.training_shared import SharedLayer
from fxq.weight_ranges import weight_range


@dataclass(frozen=True)
class ShareWeights(Pass):
    """Cluster the weights that are not 0 and swap in layers that hold codes and a codebook (Han et al. 2016, arXiv 1510.00149, section 3).

    It clusters the weight without its batch norm, which becomes a factor for each channel. A layer on an integer grid rounds its codebook onto it, with one
    step for the whole layer and the scale of each channel from the batch norm, so that its codebook is integers as well; layers that an integer scheme
    leaves float have float codebooks.
    """

    name: ClassVar[str] = "share-weights"
    requires: ClassVar[tuple[str, ...]] = ("converted",)
    ensures: ClassVar[tuple[str, ...]] = ("converted",)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        share = ctx.scheme.share
        if share is None:
            raise PassError(f"the scheme {ctx.scheme.name!r} shares no weights", where=self.name, way_out="Compile with scheme='deepcomp_w5', or with share=")
        done: dict[int, SharedWeight] = {}
        kept: list[nn.Module] = []  # alive, so that no id is given twice
        made: dict[Node, nn.Module] = {}  # all of them, before the first one is swapped in: a layer that fails leaves the graph as it was
        for node, k in walk(gm, *WEIGHTED):
            layer, path = module_of(gm, node), str(node.target)
            inner: Any = layer.op if isinstance(layer, Normed) else layer
            why = node.meta.get("left") or _refused(inner)
            if why is not None:
                ctx.skip(node, why)
                continue
            if isinstance(inner, SharedWeight):
                continue
            bn = layer.bn if isinstance(layer, Normed) else None
            fold = folded(bn) if k == "conv_transpose" and inner.groups != 1 else None
            if fold is not None:  # its factors lie along no single axis of the weight
                inner, bn = fold_back(layer.masked_op(), *(v.detach() for v in fold)), None  # type: ignore[operator]
            own = id(inner.weight)
            weight = layer.kept_weight if isinstance(layer, Normed) and inner is layer.op else inner.weight
            op = _tied(inner, done[own]) if own in done else _clustered(inner, weight.detach(), share.bits_of(path, k == "linear"), ctx, path)
            done.setdefault(own, op)
            kept.append(inner)
            made[node] = self._layer(layer, op, bn, k, ctx)
        for node, new in made.items():
            swap_module(gm, node, new)
        return len(made)

    def _layer(self, old: nn.Module, op: SharedWeight, bn: nn.Module | None, k: str, ctx: PassContext) -> nn.Module:
        """The training layer around a shared one."""
        if not isinstance(old, (TrainedLayer, EstimatedLayer)):
            made: Normed = SharedLayer(op, bn)
            made.frozen, made.together = getattr(old, "frozen", False), getattr(old, "together", True)
            return made
        spec = ctx.scheme.weight_spec(k).per_tensor()
        spec = replace(spec, signed=True, narrow=True, symmetric=True)
        source = old._source[0]
        made = EstimatedLayer(op, bn, _estimator(op, spec, ctx), source, old.path)
        made.together, made.frozen = old.together, False
        return made


def _estimator(op: SharedWeight, spec: QuantSpec, ctx: PassContext) -> RangeEstimator:
    with torch.no_grad():
        step = choose_qparams(*weight_range(op.weight.detach(), spec, "minmax"), spec).scale
    return RangeEstimator(op.axis, spec, "minmax", step)


def _refused(inner: nn.Module) -> str | None:
    """Why a layer keeps its weights as they are, or ``None``."""
    if getattr(inner, "stands_in", False):
        return "it stands in for another operation: its weights are few and constant"
    if type(inner) not in SHARED and not isinstance(inner, SharedWeight):
        return f"a {type(inner).__name__} has no form with shared weights"
    return None


def _clustered(op: nn.Module, weight: Tensor, bits: int, ctx: PassContext, path: str) -> SharedWeight:
    """The layer with the codebook of its weight."""
    share = ctx.scheme.share
    assert share is not None
    if weight.dtype != torch.float32:
        fact = f"the weight is {str(weight.dtype).removeprefix('torch.')}, codebooks are made of float32"
        raise PassError(fact, where=f"{ShareWeights.name} / {path}", way_out="Call float() on the model, share, then convert it back")
    if not bool(torch.isfinite(weight).all()):
        raise PassError("the weight holds NaN or infinity", where=f"{ShareWeights.name} / {path}", way_out="Load finite weights, or leave it out with skip=")
    flat = weight.reshape(-1)
    kept = flat != 0
    codes = torch.zeros(flat.shape, dtype=torch.int16, device=flat.device)
    book = flat.new_zeros(0)
    if bool(kept.any()):
        found, book = kmeans.cluster(flat[kept], 1 << bits, init=share.init, rate=share.rate, name=path)
        codes[kept] = found.to(codes.dtype)
    return shared(op, codes.reshape(weight.shape), book.to(weight.device))


def _tied(op: nn.Module, first: SharedWeight) -> SharedWeight:
    """A layer whose weight another layer uses too: the same codes and the same codebook."""
    made = shared(op, first.codes, first.book)
    made.book, made.codes = first.book, first.codes
    return made
