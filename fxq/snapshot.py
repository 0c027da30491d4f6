"""A graph as text, and the history of a compilation: one record per pass."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq import tables_html
from fxq.errors import PassError, nearest
from fxq.graph import grid_of, kind
from fxq.moves import Moved
from fxq.states import State


@dataclass(frozen=True)
class NodeRow:
    """One node of a recorded graph, as plain data.

    Attributes:
        name, kind: of the node; the kind is that of :func:`fxq.graph.kind` (or the target of an operation that has none).
        path: module path, or the empty string.
        inputs: names of the nodes it reads, in order.
        sizes: like ``[*,64,56,56]``; sizes that follow the batch are marked ``*``; empty when not known.
        grid: name of the grid that its value is rounded to, or empty.
        codes: that grid as text.
        runs: ``int``, ``float``, or empty before ``annotate``.
        why: why it stays float.
        detail: the module's own description.
        text: the line of the graph text: ``%name = kind(args) <path> {detail} [sizes] @grid codes int``.
    """

    name: str
    kind: str
    path: str = ""
    inputs: tuple[str, ...] = ()
    sizes: str = ""
    grid: str = ""
    codes: str = ""
    runs: str = ""
    why: str = ""
    detail: str = ""
    text: str = ""


def _detail(module: nn.Module) -> str:
    """A module's own description, and how many of its weights are left where they were cut."""
    kept = vars(module).get("mask_kept")
    return module.extra_repr() + ("" if kept is None else f", {kept:.2%} of the weights kept")


def row(gm: GraphModule, node: Node) -> NodeRow:
    """The node as plain data."""
    args = ", ".join(_arg(a) for a in node.args) + "".join(f", {k}={_arg(v)}" for k, v in node.kwargs.items())
    k = kind(gm, node)
    what = str(node.target) if k == "opaque" or node.op == "get_attr" else k
    if k == "opaque" and node.op == "call_function":
        what = getattr(node.target, "__name__", str(node.target))
    path = str(node.target) if node.op in ("call_module", "get_attr") else ""
    detail = _detail(gm.get_submodule(path)) if node.op == "call_module" else ""
    sizes = _sizes(node.meta.get("shape"), node.meta.get("dynamic"))
    grid = grid_of(gm, node)
    runs = ("int" if node.meta["integer"] else "float") if "integer" in node.meta else ""
    line = f"%{node.name} = {what}({args})"
    if node.op == "call_module":
        line += f" <{path}>" + (f" {{{detail}}}" if detail else "")
    line += f" {sizes}" if sizes else ""
    line += f" @{node.meta['grid']} {grid}" if grid is not None else ""
    line += f" {runs}" if runs else ""
    name, codes = ("", "") if grid is None else (str(node.meta["grid"]), str(grid))
    inputs = tuple(n.name for n in node.all_input_nodes)
    why = str(node.meta.get("float_why") or "")
    return NodeRow(node.name, what if k == "opaque" else k, path, inputs, sizes, name, codes, runs, why, detail, line)


def node_text(gm: GraphModule, node: Node) -> str:
    """One line: ``%name = kind(args) path [sizes] grid``; batch-dependent sizes are marked ``*``."""
    return row(gm, node).text


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
        rows: the graph, a row a node.
        rewrites: how many places the pass changed.
        ms: wall time of the pass, milliseconds.
        moved: greatest change of the output on the probe, relative to its greatest magnitude; ``None`` when not measured.
        skips: places left alone, with reasons.
        numbers: node -> how far its value moved on the probe; empty unless compiled with ``numbers=True``.
        state: the graph itself, to run it again; ``None`` in a loaded history.
    """

    name: str
    rows: tuple[NodeRow, ...]
    rewrites: int
    ms: float
    moved: float | None = None
    skips: tuple[Skip, ...] = ()
    numbers: dict[str, Moved] = field(default_factory=dict, compare=False)
    state: State | None = field(default=None, compare=False, repr=False)

    @property
    def text(self) -> str:
        """The graph, a line a node."""
        return "\n".join(r.text for r in self.rows)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite SQNR (an equal value) is ``None``."""
        numbers = {k: m.to_json() for k, m in self.numbers.items()}
        plain = {"name": self.name, "text": self.text, "rewrites": self.rewrites, "nodes": self.nodes, "ms": self.ms, "moved": self.moved}
        return {**plain, "skips": [asdict(k) for k in self.skips], "rows": [asdict(r) for r in self.rows], "numbers": numbers}


@dataclass
class History:
    """All snapshots of a compilation, in order. ``print(history)`` shows a table.

    Attributes:
        snapshots: one a pass.
        example: positional inputs on which the changes were measured, or None.
    """

    snapshots: list[Snapshot] = field(default_factory=list)
    example: tuple[Any, ...] | None = field(default=None, compare=False, repr=False)

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
        """Plain data of all snapshots, for ``json.dump``; an infinite SQNR (an equal value) is ``None``."""
        return [s.to_json() for s in self.snapshots]

    def graph(self, name: str) -> GraphModule:
        """The graph after the pass ``name``, to run, print or export; its modules are those of the compilation, not copies.

        Raises:
            PassError: for an unknown pass, or when the graph was let go (``release``, a loaded model).
        """
        state = self[name].state
        if state is None:
            raise PassError("the graph itself was not kept", where=name, way_out="Compile the model again with states=True, the default")
        return state.build()

    def numbers(self, name: str) -> str:
        """How far each value moved in the pass ``name``, worst first, as a table; empty when it was not measured or nothing moved."""
        found = sorted(((m, n) for n, m in self[name].numbers.items() if m.sqnr != math.inf), key=lambda p: (p[0].sqnr, p[1]))
        if not found:
            return ""
        head = f"{'node':<44} {'SQNR':>8} {'cosine':>9} {'steps':>7} {'to float':>9}"
        return "\n".join([head, "-" * len(head), *(f"{n:<44} {m}" for m, n in found)])

    def floats(self) -> dict[str, nn.Module]:
        """Module path -> float layer as it was before ``convert``; empty when the graphs were not kept, or the model was changed since (trained, retyped)."""
        names = [s.name for s in self.snapshots]
        state = self.snapshots[names.index("convert") - 1].state if "convert" in names[1:] else None
        return {} if state is None or state.changed else {k: v for k, v in state.parts.items() if isinstance(v, nn.Module)}

    def release(self) -> None:
        """Let the graphs of all passes go: the float weights that only they hold leave memory. Texts and numbers stay."""
        self.snapshots = [replace(s, state=None) for s in self.snapshots]

    def __deepcopy__(self, memo: dict[int, Any]) -> History:
        return History(list(self.snapshots), self.example)  # snapshots never change

    def __str__(self) -> str:
        head = f"{'pass':<18} {'rewrites':>8} {'nodes':>6} {'ms':>9}  output moved"
        rows = [head, "-" * len(head)]
        for s in self.snapshots:
            moved = "-" if s.moved is None else ("0" if s.moved == 0 else f"{s.moved:.2e}")
            rows.append(f"{s.name:<18} {s.rewrites:>8} {s.nodes:>6} {s.ms:>9.1f}  {moved}")
            rows += [f"    left alone: {k.node}: {k.why}" for k in s.skips]
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        return tables_html.of_history(self)


def take(
    gm: GraphModule,
    name: str,
    *,
    rewrites: int = 0,
    ms: float = 0.0,
    moved: float | None = None,
    skips: tuple[Skip, ...] = (),
    before: Snapshot | None = None,
    keep: bool = False,
    numbers: dict[str, Moved] | None = None,
) -> Snapshot:
    """Snapshot of ``gm`` as it is now; with ``keep`` its graph too. What equals the snapshot ``before`` is shared with it."""
    rows = tuple(row(gm, n) for n in gm.graph.nodes)
    if before is not None:
        same = {r.text: r for r in before.rows}
        rows = tuple(old if (old := same.get(r.text)) == r else r for r in rows)
    state = State.of(gm, None if before is None else before.state) if keep else None
    return Snapshot(name, rows, rewrites, ms, moved, skips, numbers or {}, state)


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
