"""propagate-shapes: shape, batch-dependence and dtype on every node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from fxq.pipeline import Pass, PassContext
from fxq.shapes import propagate


@dataclass(frozen=True)
class PropagateShapes(Pass):
    """Run the graph on the meta device at two batch sizes and note what it sees."""

    name: ClassVar[str] = "propagate-shapes"
    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    ensures: ClassVar[tuple[str, ...]] = ("shapes-known",)
    tolerance: ClassVar[float | None] = 0.0

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        propagate(gm, ctx.example)
        return 0
