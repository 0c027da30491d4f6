"""Deep Compression of a model in training: cutting more weights, sharing codebooks (Han et al. 2016, arXiv 1510.00149)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from fxq.errors import FxqError
from fxq.graph import finish, module_of, walk
from fxq.modules import WEIGHTED
from fxq.passes.share_weights import ShareWeights
from fxq.pipeline import PassContext
from fxq.schemes import Scheme
from fxq.shared import any_shared
from fxq.snapshot import Snapshot, take
from fxq.targets import Target
from fxq.training import Normed
from fxq.weight_masks import cut_of, magnitude_masks, magnitude_of, require_ratio

MOST = 0.999
"""Share of a layer that is cut at most."""


def masked_layers(gm: GraphModule) -> dict[str, Normed]:
    """Module path -> each layer whose weight has a mask, in the order of the graph."""
    found = {str(n.target): module_of(gm, n) for n, _ in walk(gm, *WEIGHTED)}
    return {path: m for path, m in found.items() if isinstance(m, Normed) and m.mask is not None}


def prune_weights(gm: GraphModule, ratio: float) -> None:
    """Cut more weights by their magnitudes as they are now, so that ``ratio`` of those under masks are cut; what was cut stays cut.

    Raises:
        FxqError: for a ratio below that of now, outside [0, 1) or above what the layers' levels allow, without masks, when weights share codebooks
            already, and for NaN in a weight.
    """
    require_ratio(ratio)
    if any_shared(gm):
        raise FxqError("the weights share codebooks already", way_out="Cut first, then call share_weights()")
    layers = masked_layers(gm)
    if not layers:
        raise FxqError("no weight has a mask", way_out="Compile with prune=fxq.Prune(sparsity=...); 0.0 cuts nothing yet")
    weights: dict[int, list[Normed]] = {}
    for m in layers.values():
        weights.setdefault(id(m.op.weight), []).append(m)
    paths = {id(m): path for path, m in layers.items()}
    magnitudes, ops = [], [users[0].op for users in weights.values()]
    for users, op in zip(weights.values(), ops, strict=True):
        mask = users[0].mask
        assert mask is not None
        magnitudes.append(magnitude_of(op.weight, f"prune_weights / {paths[id(users[0])]}").masked_fill(~mask, -1.0))  # type: ignore[arg-type]
    cut, total = [int((m < 0).sum()) for m in magnitudes], sum(m.numel() for m in magnitudes)
    if cut_of(ratio, total) < sum(cut):
        raise FxqError(f"ratio {ratio} is below the share that is cut already ({sum(cut) / total:.4g})", way_out="Give a greater ratio; what is cut stays cut")
    if getattr(ops[0], "mask_scope", "global") == "global":
        masks = magnitude_masks(magnitudes, ratio)
    else:
        shares = _shares([float(getattr(op, "mask_level", 1.0)) for op in ops], [m.numel() for m in magnitudes], cut, ratio)
        masks = [magnitude_masks([m], s)[0] for m, s in zip(magnitudes, shares, strict=True)]
    masks = [mask & (m >= 0) for mask, m in zip(masks, magnitudes, strict=True)]
    with torch.no_grad():
        for users, mask in zip(weights.values(), masks, strict=True):
            for m in users:
                own = m.mask
                assert own is not None
                own.copy_(mask)


def _shares(levels: list[float], sizes: list[int], cut: list[int], ratio: float) -> list[float]:
    """Share of each layer in proportion to its level, at least what is ``cut`` and at most :data:`MOST`, which together cut ``ratio`` of all."""
    bounds = [(c / n, max(c / n, min(MOST, 1 - 1 / n))) for c, n in zip(cut, sizes, strict=True)]

    def shares(t: float) -> list[float]:
        return [min(top, max(least, t * level)) for (least, top), level in zip(bounds, levels, strict=True)]

    def count(t: float) -> float:
        return sum(s * n for s, n in zip(shares(t), sizes, strict=True))

    want, lo, hi = ratio * sum(sizes), 0.0, 1 / min((x for x in levels if x > 0), default=1.0)
    if count(hi) < want - len(sizes):
        fact = f"at most {count(hi) / sum(sizes):.4g} of the weights can be cut: the request leaves some layers whole"
        raise FxqError(fact, way_out="Give a smaller ratio, or compile with a share above 0 for more layers")
    for _ in range(60):
        t = (lo + hi) / 2
        lo, hi = (t, hi) if count(t) < want else (lo, t)
    return [round(s, 9) for s in shares(hi)]


def densities(gm: GraphModule) -> dict[str, float]:
    """Module path of each weighted layer -> share of its weights that is not 0."""
    out = {}
    for node, _ in walk(gm, *WEIGHTED):
        layer: Any = module_of(gm, node)
        while hasattr(layer, "op") and not isinstance(layer, Normed):
            layer = layer.op
        weight = layer.kept_weight if isinstance(layer, Normed) else layer.weight
        out[str(node.target)] = float((weight.detach() != 0).double().mean())
    return out


def share_weights(gm: GraphModule, scheme: Scheme, target: Target, example: Any) -> Snapshot:
    """Run ``share-weights`` on a graph in training; the new state.

    Raises:
        FxqError: when its weights share codebooks already.
        PassError: for a scheme that shares none.
    """
    if any_shared(gm):
        raise FxqError("the weights share codebooks already", way_out="Train on, or compile the float model again")
    ctx = PassContext(scheme, target, example if example is not None else (), train=True)
    changed = ShareWeights().run(gm, ctx)
    finish(gm)
    return take(gm, ShareWeights.name, rewrites=changed, skips=tuple(ctx.skips))
