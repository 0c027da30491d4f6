"""How far every value moves in every pass: one run of the graph on the probe after each pass that changed something."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fxq.graph import grid_of
from fxq.lineage import counterparts
from fxq.moves import Moved, measure
from fxq.states import State
from fxq.values import values


class Recorder:
    """Holds the values of the captured graph and of the last state; a value that did not change is held once.

    Args:
        state: of the captured graph.
        probe: positional inputs.
    """

    def __init__(self, state: State, probe: tuple[Any, ...]) -> None:
        self.state, self.probe = state, probe
        self.last: dict[str, Tensor] = values(state.build(), probe)
        self.first = dict(self.last)

    def record(self, gm: GraphModule, state: State) -> dict[str, Moved]:
        """Change of each surviving value since the last state; empty when the pass changed nothing that runs."""
        if state is self.state or (state.parts == self.state.parts and str(state.graph) == str(self.state.graph)):
            self.state = state
            return {}
        now, link = values(gm, self.probe), counterparts(self.state.graph, state.graph)
        moves: dict[str, Moved] = {}
        first: dict[str, Tensor] = {}
        for node in gm.graph.nodes:
            source = link.get(node.name, "")
            if node.name not in now or source not in self.last:
                continue
            if source in self.first:
                first[node.name] = self.first[source]
            grid = grid_of(gm, node)
            qp = None if grid is None else grid.qparams or grid.fixed
            moves[node.name] = move = measure(self.last[source], now[node.name], None if qp is None else qp.scale, self.first.get(source))
            if move.sqnr == float("inf"):
                now[node.name] = self.last[source]
        self.state, self.last, self.first = state, now, first
        return moves
