"""A graph as text, and the history of a compilation: one record per pass."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.errors import PassError, nearest
from fxq.graph import grid_of, kind


def node_text(gm: GraphModule, node: Node) -> str:
    """One line: ``%name = kind(args) path [sizes] grid``; batch-dependent sizes are marked ``*``."""
    args = ", ".join(_arg(a) for a in node.args) + "".join(f", {k}={_arg(v)}" for k, v in node.kwargs.items())
    k = kind(gm, node)
    what = str(node.target) if k == "opaque" or node.op == "get_attr" else k
    if k == "opaque" and node.op == "call_function":
        what = getattr(node.target, "__name__", str(node.target))
    line = f"%{node.name} = {what}({args})"
    if node.op == "call_module":
        detail = gm.get_submodule(str(node.target)).extra_repr()
        line += f" <{node.target}>" + (f" {{{detail}}}" if detail else "")
    sizes = _sizes(node.meta.get("shape"), node.meta.get("dynamic"))
    line += f" {sizes}" if sizes else ""
    grid = grid_of(gm, node)
    if grid is not None:
        line += f" @{node.meta['grid']} {grid}"
    if "integer" in node.meta:
        line += " int" if node.meta["integer"] else " float"
    return line


def _arg(a: Any) -> str:
    if isinstance(a, Node):
        return f"%{a.name}"
    if isinstance(a, (tuple, list)):
        return "(" + ", ".join(_arg(v) for v in a) + ")"
    if isinstance(a, dict):
        return "{" + ", ".join(f"{k}: {_arg(v)}" for k, v in a.items()) + "}"
    return str(a)


def _sizes(shape: Any, dynamic: Any) -> str:
    if not isinstance(shape, tuple):
        return ""
    marks = dynamic or (False,) * len(shape)
    return "[" + ",".join("*" if d else str(s) for s, d in zip(shape, marks, strict=True)) + "]"


def graph_text(gm: GraphModule) -> str:
    """The whole graph, a line a node."""
    return "\n".join(node_text(gm, n) for n in gm.graph.nodes)


@dataclass(frozen=True)
class Skip:
    """A place that a pass looked at and left alone, with the reason."""

    node: str
    why: str


@dataclass(frozen=True)
class Snapshot:
    """The state after one pass.

    Attributes:
        name: the pass.
        text: the graph, a line a node.
        rewrites: how many places the pass changed.
        nodes: number of nodes after it.
        ms: wall time of the pass, milliseconds.
        moved: greatest change of the output on the probe, relative to its greatest magnitude; ``None`` when not measured.
        skips: places left alone, with reasons.
    """

    name: str
    text: str
    rewrites: int
    nodes: int
    ms: float
    moved: float | None = None
    skips: tuple[Skip, ...] = ()


@dataclass
class History:
    """All snapshots of a compilation, in order. ``print(history)`` shows a table."""

    snapshots: list[Snapshot] = field(default_factory=list)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self.snapshots)

    def __len__(self) -> int:
        return len(self.snapshots)

    def __getitem__(self, name: str) -> Snapshot:
        """Snapshot after the pass ``name``.

        Raises:
            PassError: for an unknown pass; the nearest one is offered.
        """
        return self.snapshots[self._index(name)]

    def _index(self, name: str) -> int:
        for i, s in enumerate(self.snapshots):
            if s.name == name:
                return i
        raise PassError(f"no pass called {name!r} ran", way_out=nearest(name, [s.name for s in self.snapshots]))

    def diff(self, name: str) -> str:
        """What the pass ``name`` did, as a unified text diff of the graph; empty when it changed nothing."""
        i = self._index(name)
        before = self.snapshots[i - 1].text.splitlines() if i else []
        lines = difflib.unified_diff(before, self.snapshots[i].text.splitlines(), f"before {name}", f"after {name}", n=2, lineterm="")
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data of all snapshots, for ``json.dump``."""
        return [asdict(s) for s in self.snapshots]

    def __str__(self) -> str:
        head = f"{'pass':<18} {'rewrites':>8} {'nodes':>6} {'ms':>9}  output moved"
        rows = [head, "-" * len(head)]
        for s in self.snapshots:
            moved = "-" if s.moved is None else ("0" if s.moved == 0 else f"{s.moved:.2e}")
            rows.append(f"{s.name:<18} {s.rewrites:>8} {s.nodes:>6} {s.ms:>9.1f}  {moved}")
            rows += [f"    left alone: {k.node}: {k.why}" for k in s.skips]
        return "\n".join(rows)


def take(gm: GraphModule, name: str, *, rewrites: int = 0, ms: float = 0.0, moved: float | None = None, skips: tuple[Skip, ...] = ()) -> Snapshot:
    """Snapshot of ``gm`` as it is now."""
    return Snapshot(name, graph_text(gm), rewrites, len(gm.graph.nodes), ms, moved, skips)


def distance(a: Any, b: Any) -> float:
    """Greatest difference of two outputs relative to the greatest magnitude of ``a``; NaN equals NaN in the same place.

    Args:
        a, b: tensors, or tuples, lists, dicts of them, of one structure.
    """
    xs, ys = flat(a), flat(b)
    worst = 0.0
    for x, y in zip(xs, ys, strict=True):
        if x.shape != y.shape:
            return float("inf")
        x, y = x.detach().to(torch.float64), y.detach().to(torch.float64)
        gap = (x - y).abs()
        gap = torch.where(torch.isnan(x) & torch.isnan(y) | (x == y), torch.zeros_like(gap), gap)
        top = float(x[torch.isfinite(x)].abs().max()) if bool(torch.isfinite(x).any()) else 0.0
        if gap.numel():
            worst = max(worst, float(gap.nan_to_num(nan=float("inf")).max()) / (top or 1.0))
    return worst


def flat(value: Any) -> list[torch.Tensor]:
    """All tensors of a nested output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in flat(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in flat(v)]
    return []
