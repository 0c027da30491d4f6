"""prune-channels: coupled channels are cut for real, over the whole graph."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from fxq import graph, pruning
from fxq.calibration import Batches
from fxq.costs import LayerCost, layer_costs
from fxq.cutting import drop_unread
from fxq.errors import PassError
from fxq.pipeline import Pass, PassContext
from fxq.prune_report import GroupCut, PruneReport
from fxq.snapshot import distance

TOLERANCE = 1e-4
"""Greatest relative difference of the cut graph and the masked one, in float32."""


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Cut the least important channels, and with each everything that belongs to it; the graph computes what the masked one computes.

    Layers whose outputs stay are named with the reason. The pass fails when the cut graph differs from the masked one on the probe.

    Attributes:
        how: the request.
    """

    how: pruning.Prune
    name: ClassVar[str] = "prune-channels"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")
    ensures: ClassVar[tuple[str, ...]] = ("shapes-known",)
    tolerance: ClassVar[float | None] = math.inf

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        multiple = self.how.multiple_of or ctx.target.channel_multiple
        weight = ctx.scheme.weight
        before = layer_costs(gm)
        data = _labelled(self.how, gm, ctx) if self.how.by == "taylor" else ()
        try:
            plan = pruning.plan(gm, self.how, multiple, data, len(ctx.example), None if weight is None else lambda _: weight.bits)
        except PassError as e:
            if self.how.must:
                raise
            ctx.skip("(all)", e.fact)
            return 0
        probe = ctx.example if ctx.probe is None else ctx.probe
        uncut = plan.masked()
        with torch.inference_mode():
            want = uncut(*probe)
        changed = pruning.apply(plan)
        graph.finish(gm)
        drop_unread(gm)
        with torch.inference_mode():
            moved = distance(want, gm(*probe))
        if moved > TOLERANCE:
            raise PassError(f"the cut graph differs from the masked one by {moved:.1e} of its greatest output", where=self.name,
                            way_out="This is a fault of fxq: please report the model")  # fmt: skip
        for path, why in plan.groups.left.items():
            ctx.skip(path, f"its outputs stay: {why}")
        if plan.flat:
            ctx.skip(f"by={self.how.by!r}", "all scores are equal, so the cut is spread evenly: train with fxq.sparsity.SlimmingPenalty first, or use by='l2'")
        gm.meta["masked"], gm.meta["prune_report"] = uncut, report(plan, before, layer_costs(gm))
        return changed


def _labelled(how: pruning.Prune, gm: GraphModule, ctx: PassContext) -> Iterable[tuple[Any, ...]]:
    """Batches for ``taylor``: the user's, or the first ones of the calibration data."""
    if how.data is not None:
        return Batches(how.data, gm, limit=how.batches, what="data of Prune", labels=True)
    if isinstance(ctx.calibration, Batches):
        return ctx.calibration.peek(how.batches)
    return list(islice(ctx.calibration or [], how.batches))


def report(plan: pruning.Plan, before: list[LayerCost], after: list[LayerCost]) -> PruneReport:
    """What was cut, as data."""
    cuts = []
    for group, kept in zip(plan.groups.groups, plan.kept, strict=True):
        widths = {w for _, w in group.givers}
        unit = "channel" if widths == {1} else f"block of {min(widths)} channels"
        cuts.append(GroupCut(group.name, tuple(str(n.target) for n, _ in group.givers), kept, unit))
    absorbed = sum(len(r.places) for r in plan.readings)
    return PruneReport(before, after, cuts, list(plan.groups.left.items()), absorbed)
