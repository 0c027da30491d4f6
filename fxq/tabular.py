"""Compiled graphs print themselves as a table without the package ``tabulate``, which torch's own ``print_tabular`` needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule

from fxq.graph import grid_of, kind

HEAD = ("opcode", "name", "target", "args", "kwargs", "kind", "grid", "runs")
"""Columns: those of torch, then fxq's."""


class TabularModule(GraphModule):
    """A GraphModule whose ``print_tabular`` (its own and its graph's) needs no other package. Copies have it too."""

    @property
    def graph(self) -> Graph:
        """The graph of this module."""
        return self._graph

    @graph.setter
    def graph(self, g: Graph) -> None:
        GraphModule.graph.fset(self, g)  # type: ignore[attr-defined]
        self._graph.print_tabular = self.print_tabular  # type: ignore[method-assign]

    def print_tabular(self) -> None:
        """Print a line a node: opcode, name, target, args, kwargs as torch does; kind, grid, and whether it runs in integers."""
        print(tabular(self))


def adopt(gm: GraphModule) -> GraphModule:
    """Give ``gm`` and its copies :class:`TabularModule`'s ``print_tabular``. Every GraphModule has a class of its own, whose base becomes that one."""
    own = type(gm)
    if own.__bases__ == (GraphModule,):
        own.__bases__ = (TabularModule,)
        gm.graph = gm.graph
    return gm


def tabular(gm: GraphModule) -> str:
    """The graph as an aligned table, a line a node."""
    rows = []
    for node in gm.graph.nodes:
        grid = grid_of(gm, node)
        runs = "" if "integer" not in node.meta else "int" if node.meta["integer"] else "float"
        target = getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else str(node.target)
        rows.append((node.op, node.name, target, str(node.args), str(dict(node.kwargs)), kind(gm, node), "" if grid is None else str(grid), runs))
    return aligned(HEAD, rows)


def aligned(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Cells in columns, a rule below the head."""
    widths = [max(len(str(r[i])) for r in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(str(c).ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in (head, *rows)]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
