"""fold-bn: constant affine maps, batch norms first of all, into the layer before or behind them, by dataflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxq import folding
from fxq.graph import kind, module_of, walk
from fxq.modules import WEIGHTED
from fxq.pipeline import Pass, PassContext


@dataclass(frozen=True)
class FoldBN(Pass):
    """Batch norms with running statistics vanish into conv, transposed conv and linear layers; so do constant factors and terms.

    A map goes into the layer before it when that layer has no other user (through permutes and reshapes that keep its
    channels apart); otherwise into a conv or linear layer that follows directly and pads nothing. Two maps in a row become one.
    Computed in float64, written as new modules. What is left is named with its reason; constants that stay are ordinary
    operations and are not reported. For training, ``gm.meta["batch_norms"]`` keeps layers and batch norms as they were, by the layer's path.
    """

    name: ClassVar[str] = "fold-bn"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")
    ensures: ClassVar[tuple[str, ...]] = ("bn-folded",)
    tolerance: ClassVar[float | None] = 1e-4

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        folded, again = 0, True
        left: dict[Node, str] = {}
        while again:  # a map that a neighbour joined may fit where it did not fit before
            again, left = False, {}
            for node, k in walk(gm, "batch_norm", *folding.ARITHMETIC):
                fold = folding.plan(gm, node)
                if isinstance(fold, folding.Fold):
                    if ctx.train:
                        _remember(gm, fold, k)
                    fold.apply(gm)
                    folded, again = folded + 1, True
                elif k == "batch_norm":
                    left[node] = fold
        for node, why in left.items():
            ctx.skip(node, why)
        return folded


def _remember(gm: GraphModule, fold: folding.Fold, k: str) -> None:
    """Keep a layer that takes a batch norm over, if that is all it takes over."""
    kept, path = gm.meta.setdefault("batch_norms", {}), str(fold.layer.target)
    whole = k == "batch_norm" and not fold.ahead and path not in kept and kind(gm, fold.layer) in WEIGHTED
    kept[path] = (module_of(gm, fold.layer), module_of(gm, fold.node)) if whole else None
