"""How far every value moves in every pass: one run of the graph on the probe after each pass that changed something."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fxq.graph import grid_of
from fxq.lineage import counterparts
from fxq.moves import Moved, measure, sqnr
from fxq.states import State
from fxq.values import values

RENAMED_DB = 90.0
"""Two nodes of other names that read the same and are so near in float32 are one."""


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
        link.update(self._renamed(state, link, now))
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

    def _renamed(self, state: State, link: dict[str, str], now: dict[str, Tensor]) -> dict[str, str]:
        """Nodes that came under another name: the only one that reads the same values as one that is gone, and gives the same."""
        taken = set(link.values())
        gone: dict[tuple[str, ...], list[str]] = {}
        for node in self.state.graph.nodes:
            if node.name not in taken and node.name in self.last:
                gone.setdefault(tuple(a.name for a in node.all_input_nodes), []).append(node.name)
        found: dict[str, str] = {}
        for node in state.graph.nodes:
            if node.name in link or node.name not in now:
                continue
            reads = tuple(link.get(a.name, found.get(a.name, "")) for a in node.all_input_nodes)
            same = [name for name in gone.get(reads, ()) if sqnr(self.last[name], now[node.name]) > RENAMED_DB]
            if len(same) == 1:
                found[node.name] = same[0]
        return found
