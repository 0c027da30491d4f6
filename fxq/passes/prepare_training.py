"""prepare-training: a converted graph becomes trainable: trackers on its grids, float weights with their batch norms in its layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq.errors import SchemeError
from fxq.estimators import DoReFaEstimator, SignEstimator, estimator
from fxq.folding import bn_affine, fold_back
from fxq.graph import grids, kind, module_of, swap_module, walk
from fxq.kernels import moved
from fxq.modules import WEIGHTED, FakeQuantize, Quantized
from fxq.pipeline import Pass, PassContext
from fxq.schemes import S8N
from fxq.spec import QParams
from fxq.trackers import Clip, TrackedFakeQuantize, Tracker, tracker
from fxq.training import FloatLayer, FloatNorm, Normed, TrainedLayer
from fxq.training_lowbit import EstimatedLayer, is_binary
from fxq.weight_masks import MASKED, mask_of

INT8_MAX = S8N.qmax
NO_KERNEL = "8-bit DoReFa weights have odd codes to 255, which no integer kernel takes: it runs in float between its Q/DQ (7 bits run in integers)"


@dataclass(frozen=True)
class PrepareTraining(Pass):
    """Give each grid a tracker and each quantized layer its float weight and the batch norm that ``fold-bn`` took away.

    Of a model with weight masks each layer keeps its weight at 0 where it is 0 now (:func:`fxq.weight_masks.mask_of`): found anew from the weight, which
    every pass before may have reordered, and with the batch norm outside.

    Attributes:
        calibrated: the grids come from data and are where the trackers begin; otherwise the first training batch sets them. With signs in the net
            (whose float batch norms say nothing of its values) they hold until the first training batch.
    """

    calibrated: bool = True
    name: ClassVar[str] = "prepare-training"
    requires: ClassVar[tuple[str, ...]] = ("converted",)
    ensures: ClassVar[tuple[str, ...]] = ("converted",)
    breaks: ClassVar[tuple[str, ...]] = ("bn-folded",)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        trackers: dict[str, Tracker] = {}
        changed = 0
        for node, _ in walk(gm, "fake_quantize"):
            old = module_of(gm, node)
            assert isinstance(old, FakeQuantize)
            first = old.grid not in trackers
            if first:
                qp, grid = _as_learned(old.qparams, ctx), grids(gm)[old.grid]
                trackers[old.grid] = made = tracker(qp, grid, ctx.scheme.ste).to(old.scale.device)
                if self.calibrated:
                    made.start(qp, passing=ctx.scheme.activations in ("sign", "ternary"))
                elif isinstance(made, Clip):
                    made.begin_at(ctx.scheme.clip)
            sources = moved(gm, node.all_input_nodes[0])
            moves = bool(sources) and all(s.meta["grid"] == old.grid for s in sources)
            padded = is_binary(old) and kind(gm, node.all_input_nodes[0]) == "pad"  # the sign of 0 is 1
            swap_module(gm, node, TrackedFakeQuantize(trackers[old.grid], old.grid, first, moves and not padded))
            changed += 1
        for node, _ in walk(gm, "batch_norm"):
            swap_module(gm, node, FloatNorm(module_of(gm, node)))
            changed += 1
        for node, _ in walk(gm, *WEIGHTED):
            layer = module_of(gm, node)
            if isinstance(layer, Quantized) and (node.meta.get("integer") or ctx.scheme.trains):
                trained: Normed | None = self._layer(gm, node, layer, ctx)
            elif not isinstance(layer, Quantized):
                trained = self._float(gm, node, layer, ctx)
            else:
                continue
            if trained is not None:
                swap_module(gm, node, trained)
                changed += 1
        return changed

    def _float(self, gm: GraphModule, node: Node, old: nn.Module, ctx: PassContext) -> FloatLayer | None:
        """A layer that stays float, if there is more to it than itself: a batch norm, or a mask."""
        op, bn = self._unfolded(gm, node, old, ctx)
        mask = mask_of(op, gm.meta.get(MASKED, False))
        if bn is None and mask is None:
            return None
        layer = FloatLayer(op, bn)
        layer.set_mask(mask)
        return layer

    def _layer(self, gm: GraphModule, node: Node, old: Quantized, ctx: PassContext) -> TrainedLayer | EstimatedLayer:
        fq: Any = module_of(gm, node.all_input_nodes[0]) if node.meta.get("integer") else None
        source = fq.tracker if fq is not None and ctx.target.int32_bias else None
        op, bn = self._unfolded(gm, node, old.op, ctx)
        scheme, mask = ctx.scheme, mask_of(op, gm.meta.get(MASKED, False))
        if (scheme.weights != "range" or scheme.batch_norm == "plain") and not node.meta.get("int8_layer"):
            readers = [module_of(gm, u) if kind(gm, u) == "fake_quantize" else None for u in node.users]
            signs = bool(readers) and all(isinstance(r, FakeQuantize) and is_binary(r) for r in readers)
            weight: Any = op.weight
            found = estimator(scheme, kind(gm, node), weight)
            if found.top > INT8_MAX and source is not None:
                node.meta["float_why"] = NO_KERNEL
            if mask is not None and isinstance(found, (SignEstimator, DoReFaEstimator)):
                way_out = f"Take a scheme whose weights have a 0 (iao_w4a4_lsq, twn_wta8), leave it float with skip={str(node.target)!r}, or remove() the masks"
                raise SchemeError(f"its weight is masked, but weights of {scheme.name!r} have no 0", where=str(node.target), way_out=way_out)
            estimated = EstimatedLayer(op, bn, found, source, str(node.target), signs)
            estimated.set_mask(mask)
            return estimated
        layer = TrainedLayer(op, bn, old.weight_grid.qparams, ctx.scheme.weight_observer, source, str(node.target))
        layer.set_mask(mask)
        return layer

    def _unfolded(self, gm: GraphModule, node: Node, old: nn.Module, ctx: PassContext) -> tuple[nn.Module, nn.Module | None]:
        """The layer before its batch norm was folded, and that batch norm."""
        found = gm.meta.get("batch_norms", {}).get(str(node.target))
        if found is None:
            return old, None
        before, bn = found
        again = fold_back(before, *bn_affine(bn))
        same = again.weight.shape == old.weight.shape and torch.equal(again.weight, old.weight)  # type: ignore[arg-type]
        if not same:
            ctx.skip(node, "its weight was rewritten after its batch norm was folded: it trains with the batch norm inside, its statistics fixed")
            return old, None
        op: Any = copy.copy(old)
        op._parameters = dict(op._parameters)
        op.weight, op.bias = before.weight, before.bias
        return op, bn


def _as_learned(qp: QParams, ctx: PassContext) -> QParams:
    """The scheme's own codes where the target stores signed grids as unsigned ones."""
    spec = ctx.scheme.kept_activation
    if spec is None or not spec.signed or qp.spec.signed:
        return qp
    return QParams(spec, qp.scale, qp.zero_point + spec.qmin)
