"""calibrate: one pass over the data in eval mode; every grid gets its scale and zero point."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Interpreter, Node

from fxq import numerics, observers
from fxq.errors import CalibrationError
from fxq.graph import grids
from fxq.pipeline import Pass, PassContext


class _Observe(Interpreter):
    """Runs the graph and shows each value that has an open grid to that grid's observer."""

    def __init__(self, gm: GraphModule, watch: dict[Node, observers.MinMax]) -> None:
        super().__init__(gm)
        self.watch = watch

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        observer = self.watch.get(n)
        if observer is not None:
            try:
                observer.observe(out)
            except CalibrationError as e:
                raise CalibrationError(e.fact, where=f"calibrate / {n.name}", way_out=e.way_out) from e
        return out


@dataclass(frozen=True)
class Calibrate(Pass):
    """Observe the float forward. A grid that absorbed a clamp starts at exactly 0 and ends at or below the clamp.

    Attributes:
        observer: overrides the scheme's activation observer.
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)
    ensures: ClassVar[tuple[str, ...]] = ("calibrated",)

    observer: str | None = None

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        table = grids(gm)
        members: dict[str, list[Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            name = node.meta.get("grid")
            if name is not None and table[name].qparams is None:
                members[name].append(node)
        if not members:
            return 0
        kind = self.observer or ctx.scheme.activation_observer
        made = {name: observers.make(kind, table[name].spec) for name in members}
        watch = {node: made[name] for name, nodes in members.items() for node in nodes}
        runner = _Observe(gm, watch)
        with torch.inference_mode():
            for i, batch in enumerate(ctx.calibration or ()):
                runner.run(*batch)
                ctx.progress("calibrate", i + 1, None)
        for name, observer in made.items():
            if not bool(observer.has_data):
                raise CalibrationError("no calibration data reached it", where=f"calibrate / {name}")
            lo, hi = (v.cpu().clone() for v in observer.range())
            clamp = table[name].clamp
            if clamp is not None:
                lo = torch.tensor(clamp[0])
                hi = hi if clamp[1] is None else hi.clamp(max=clamp[1])
            table[name] = replace(table[name], qparams=numerics.choose_qparams(lo, hi, table[name].spec))
        return len(made)
