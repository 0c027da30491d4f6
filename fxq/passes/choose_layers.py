"""choose-layers: which layers of a low-bit scheme become 8-bit ones, because they run faster so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxq.pipeline import Pass, PassContext
from fxq.placement import Plan
from fxq.selectors import matches

Ask = Callable[[GraphModule, Mapping[Node, str]], Mapping[str, tuple[str, str]]]
"""``ask(graph, what the scheme makes of each layer: "bits" or "float32") -> {module path: (the choice, the times in words)}``."""


@dataclass(frozen=True)
class ChooseLayers(Pass):
    """Ask for each weighted layer whether it is faster in 8 bits than as the scheme has it; those that are become 8-bit layers.

    Layers that the user named (``skip=``, ``int8=``) are not asked for. The choice and its times stand in the history.

    Attributes:
        ask: who knows the times (:mod:`fxq.auto_lowbit`).
    """

    ask: Ask
    name: ClassVar[str] = "choose-layers"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        plan = Plan(gm, ctx)
        named = (*ctx.float_nodes, *ctx.int8_nodes)
        free = [n for n in plan.layers if not any(matches(gm, n, s, plan.layers) for s in named)]
        options = {n: "float32" if any(r in plan.roles.get(n, ()) for r in ctx.scheme.float_layers) else "bits" for n in free}
        found = self.ask(gm, options)
        for path, (_, said) in found.items():
            ctx.skip(path, said)
        chosen = tuple(path for path, (what, _) in found.items() if what == "int8")
        ctx.int8_nodes = (*ctx.int8_nodes, *chosen)
        return len(chosen)
