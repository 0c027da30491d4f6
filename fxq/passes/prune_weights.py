"""prune-weights: single weights become 0, by magnitude, and stay 0 in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import distributed
from fxq.errors import FxqError, PassError, nearest
from fxq.graph import module_of, swap_module, walk
from fxq.modules import WEIGHTED
from fxq.pipeline import Pass, PassContext
from fxq.pruning import Prune
from fxq.selectors import fits, matches
from fxq.weight_levels import levels, measured, with_weight
from fxq.weight_masks import MASKED, magnitude_masks, magnitude_of, mask_of

MEASURED = 0.5
"""Share at which the sensitivity of layers is measured when nothing is cut yet."""
LEAST_LEVEL = 0.25
"""Level of layers of which the measured sensitivity cuts nothing yet, so that they give weights too when more is cut in training."""


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Cut single weights by magnitude (Han et al. 2015, arXiv 1506.02626, section 3); layers that share a weight share the mask.

    Masks that the model has already stay: what they cut counts. Each layer remembers its scope and its level, for cutting more in training.

    Attributes:
        how: the request (``sparsity``, ``sparsity_scope``, ``keep``).
    """

    how: Prune
    name: ClassVar[str] = "prune-weights"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        places = self._places(gm, ctx)
        ratios = self._mapped(places, ctx)
        found = [p for p in places if p[0] in ratios] if isinstance(self.how.sparsity, Mapping) else places
        if not found and not self.how.must:
            ctx.skip("(all)", "no conv or linear layer of this part is asked for")
            return 0
        if not found:
            raise PassError("no weight can be cut: the model has no conv or linear layer that is not kept", where=self.name, way_out="Keep fewer layers")
        masked = bool(gm.meta.get(MASKED, False))
        magnitudes = []
        for _, nodes in found:
            op: Any = module_of(gm, nodes[0])
            old = mask_of(op, masked)
            magnitude = magnitude_of(op.weight, f"{self.name} / {nodes[0].target}")
            magnitudes.append(magnitude if old is None else magnitude.masked_fill(~old, -1.0))
        masks, scale = self._masks(gm, found, magnitudes, ratios, ctx)
        masks = [mask & (magnitude >= 0) for mask, magnitude in zip(masks, magnitudes, strict=True)]
        for (_, nodes), mask, level in zip(found, masks, scale, strict=True):
            op = module_of(gm, nodes[0])
            new: Any = with_weight(op, op.weight.detach().masked_fill(~mask, 0.0))
            for node in nodes:
                layer: Any = new if node is nodes[0] else with_weight(module_of(gm, node), new.weight)
                if layer is not new:
                    layer.weight = new.weight
                more = bool(((new.weight == 0) & mask).any())
                layer.weight_masked = mask if more else True
                layer.mask_scope, layer.mask_level = "global" if self._together else "layer", level
                layer.mask_kept = float(mask.double().mean())
                swap_module(gm, node, layer)
        marked = {id(n) for _, nodes in found for n in nodes}
        for node, _ in walk(gm, *WEIGHTED):
            layer = module_of(gm, node)
            if id(node) not in marked and not hasattr(layer, "weight_masked"):
                vars(layer)["weight_masked"] = False
        gm.meta[MASKED] = True
        return len(found)

    @property
    def _together(self) -> bool:
        return self.how.sparsity_scope == "global" and not isinstance(self.how.sparsity, Mapping)

    def _places(self, gm: GraphModule, ctx: PassContext) -> list[tuple[str, list[Node]]]:
        """Path of each distinct weight, and the nodes that use it; kept layers are recorded."""
        nodes = [n for n, _ in walk(gm, *WEIGHTED) if not getattr(module_of(gm, n), "stands_in", False)]
        for s in self.how.selectors if self.how.must else ():
            if not any(matches(gm, n, s, nodes) for n in gm.graph.nodes if n.op == "call_module"):
                way_out = nearest(str(s), [str(n.target) for n in nodes])
                raise PassError(f"{s!r} of keep= names no layer", where=self.name, way_out=way_out)
        kept = {n for n in nodes for s in self.how.selectors if matches(gm, n, s, nodes)}
        found: dict[int, tuple[str, list[Node]]] = {}
        for n in nodes:
            weight: Any = module_of(gm, n).weight
            found.setdefault(id(weight), (str(n.target), []))[1].append(n)
        out = []
        for path, users in found.values():
            if any(n in kept for n in users):
                ctx.skip(users[0], "its weights stay: kept on request")
            else:
                out.append((path, users))
        return out

    def _mapped(self, places: list[tuple[str, list[Node]]], ctx: PassContext) -> dict[str, float]:
        """Path -> ratio where the request maps patterns."""
        if not isinstance(self.how.sparsity, Mapping):
            return {}
        found: dict[str, float] = {}
        for pattern, ratio in self.how.sparsity.items():
            hits = [path for path, _ in places if fits(path, pattern)]
            if not hits and self.how.must:
                raise PassError(f"sparsity of {pattern!r} names no layer", where=self.name, way_out=nearest(pattern, [path for path, _ in places]))
            found.update({path: ratio for path in hits if path not in found})
        for path, nodes in places:
            if path not in found:
                ctx.skip(nodes[0], "its weights stay: no pattern of sparsity= names it")
        return found

    def _masks(
        self, gm: GraphModule, found: list[tuple[str, list[Node]]], magnitudes: list[Tensor], ratios: dict[str, float], ctx: PassContext
    ) -> tuple[list[Tensor], list[float]]:
        """A mask for each weight, and its level: its own share over that of the whole."""
        try:
            if self._together:
                assert isinstance(self.how.sparsity, (int, float))
                return magnitude_masks(magnitudes, self.how.sparsity), [1.0] * len(found)
            whole = max(ratios.values()) if ratios else self.how.sparsity
            assert isinstance(whole, (int, float))
            shares = [ratios[path] for path, _ in found] if ratios else [whole] * len(found)
            scale = [s / whole if whole else 1.0 for s in shares]
            if self.how.sparsity_scope == "sensitivity" and not ratios:
                with torch.no_grad():
                    errors = measured(gm, [nodes for _, nodes in found], magnitudes, ctx.example)
                errors = np.mean(distributed.gather(errors), axis=0).tolist()  # the inputs of all processes: they cut alike
                sensible = levels(errors, [m.numel() for m in magnitudes], whole or MEASURED)
                shares, scale = sensible if whole else shares, [max(s / (whole or MEASURED), LEAST_LEVEL) for s in sensible]
            masks = [magnitude_masks([m], round(s, 9))[0] for m, s in zip(magnitudes, shares, strict=True)]
        except PassError:
            raise
        except FxqError as e:
            raise PassError(e.fact, where=self.name, way_out=e.way_out) from e
        return masks, scale
