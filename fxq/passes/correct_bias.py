"""correct-bias: biases take up the mean output error that rounding causes on the calibration data (no training)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxq.graph import module_of, swap_module, walk
from fxq.layerwise import Pair, Sides, corrected, why_not
from fxq.modules import WEIGHTED
from fxq.pipeline import Pass, PassContext


@dataclass(frozen=True)
class CorrectBias(Pass):
    """``b += E[float output - rounded output]`` for each channel, layer by layer.

    A layer sees the inputs that the corrected ones before it give.

    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2 and appendix D (empirical bias correction). Measured on ``ctx.kept``.
    """

    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[tuple[str, ...]] = ("converted",)
    ensures: ClassVar[tuple[str, ...]] = ("converted",)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        todo: set[Node] = set()
        for node, _ in walk(gm, *WEIGHTED):
            why = why_not(module_of(gm, node), node)
            if why is None:
                todo.add(node)
            else:
                ctx.skip(node, why)
        if not ctx.kept:
            return 0
        done: list[Node] = []

        def after(node: Node, outputs: list[Pair]) -> bool:
            if node not in todo:
                return False
            swap_module(gm, node, corrected(gm, node, outputs, ctx.target.int32_bias))
            done.append(node)
            ctx.progress(self.name, len(done), len(todo))
            return True

        Sides(gm, ctx.kept, after=after).sweep()
        return len(done)
