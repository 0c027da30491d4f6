"""What a pass promised, checked on the graphs that the history kept: what an audit finds, and the comparison of passes that must not move numbers.

Every check is made from the graph before and after a pass, never by running the pass again: a fault in the pass itself would repeat.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from fxq.lineage import counterparts
from fxq.moves import channel_order, sqnr
from fxq.states import State
from fxq.values import watch

EXACT_DB, EXACT_FLOAT32_DB = 115.0, 75.0
"""Least SQNR of a node that only moved weights into other weights, in float64 (float32 weights round at about 150 dB) and in float32."""

ROUNDS = 12
"""So many faults of one pass that hide each other are told apart; more are found when those are mended."""

ON_PURPOSE = ("prune-channels", "prune-weights", "replace-activations", "narrow-inputs")
"""Passes before ``convert`` that move numbers on purpose."""


@dataclass(frozen=True)
class Finding:
    """A fault, where it is and what it is.

    Attributes:
        step: the pass.
        node: name of the node in the graph after that pass.
        path: its module path, or name.
        reason: short, one of a fixed set (``wrong fold``, ``range clipped``, ...).
        fact: one line with the numbers.
        certain: the pass broke what it promised; otherwise the data speaks against the grid.
        switches: nodes of the compiled graph that undo it when they are switched.
        weight: how bad, for ranking: decibels of noise beyond what the grid can do.
        related: other nodes at which the same fault shows.
    """

    step: str
    node: str
    path: str
    reason: str
    fact: str
    certain: bool = True
    switches: tuple[str, ...] = ()
    weight: float = math.inf
    related: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.step} / {self.node}: {self.reason}: {self.fact}"


def exact_findings(before: State, after: GraphModule, step: str, batch: tuple[Any, ...], reason: str) -> list[Finding]:
    """Nodes of ``after`` that give something else than their counterparts, given the same inputs.

    Both graphs run in float64. Every node of ``after`` with a counterpart gets its inputs from the graph before; one that then gives
    another value is let run on, and is a fault unless its channels only stand in another order, or it has another form, and all that reads it comes to the
    old values again.

    Args:
        before: the state before the pass; after: the graph behind it (for ``convert``: with all rounding off).
        batch: positional inputs.
        reason: of what is found.
    """
    try:
        runs, least = _Pair(before, after, batch, torch.float64), EXACT_DB
        runs.run(frozenset(), least)
    except RuntimeError:  # an operation with float32 constants of its own
        runs, least = _Pair(before, after, batch, torch.float32), EXACT_FLOAT32_DB
    excused: set[str] = set()
    found: list[Finding] = []
    for _ in range(ROUNDS):
        errors, strays, output = runs.run(frozenset(excused), least)
        small = {n for n, db in errors.items() if db < least} - strays
        lost = _reach_output(runs.after, strays, set(errors)) | runs.torn
        first = [n for n in runs.after.graph.nodes if n.name in small or n.name in lost and not runs.behind[n.name] & lost]
        if not first:
            break
        for n in first:
            excused.add(n.name)
            path = str(n.target) if n.op == "call_module" else n.name
            source = runs.link[n.name]
            than = "" if source == n.name else f" than {source} gave"
            found.append(Finding(step, n.name, path, reason, f"from the same inputs it gives another value{than}: {errors[n.name]:.1f} dB in {runs.text}"))
    if not found and output < least:
        return [Finding(step, "output", "output", reason, f"the output moved to {output:.1f} dB and no single node shows why")]
    return found


class _Pair:
    """The two graphs in one type, and the values of the first."""

    def __init__(self, before: State, after: GraphModule, batch: tuple[Any, ...], dtype: torch.dtype) -> None:
        self.batch = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, batch)
        self.link = counterparts(before.graph, after.graph)
        wanted = set(self.link.values())
        self.truth: dict[str, Any] = {}

        def keep(node: Node, value: Any) -> None:
            if node.name in wanted:
                self.truth[node.name] = value

        watch(_cast(before.build(), dtype), self.batch, keep)
        self.after, self.text = _cast(after, dtype), str(dtype).removeprefix("torch.")
        self.torn: set[str] = set()
        self.behind = {n.name: _behind(n, self.link) for n in self.after.graph.nodes}

    def run(self, excused: frozenset[str], least: float) -> tuple[dict[str, float], set[str], float]:
        """One run of the graph after the pass.

        A node that gives the old value from old inputs hands the old value on; so does one that is a little off. One that is far off, or that reads
        from such a one, is a stray and hands its own value on. Of ``excused`` nodes the old value goes on.

        Returns:
            SQNR of every node that can be compared, the strays, SQNR of the output.
        """
        errors: dict[str, float] = {}
        strays: set[str] = set()
        self.torn.clear()
        last = math.inf

        def look(node: Node, value: Any) -> Any:
            nonlocal last
            source = self.link.get(node.name)
            if source is None or node.op in ("placeholder", "get_attr") or source not in self.truth:
                return None
            old = self.truth[source]
            if node.op == "output":
                last = _worst(old, value)
                return None
            if node.name in excused:
                return old
            errors[node.name] = db = _worst(old, value)
            if db >= least or db >= EXACT_FLOAT32_DB and not self.behind[node.name] & strays:
                return old
            if not self.behind[node.name] & strays and _torn(old, value):
                self.torn.add(node.name)
            strays.add(node.name)
            return None

        watch(self.after, self.batch, look)
        return errors, strays, last


def _torn(old: Any, value: Any) -> bool:
    """Is it an image of one shape whose channels are not the old ones in another order? Nothing behind it makes that good, but a layer that is dead."""
    if not (isinstance(old, Tensor) and isinstance(value, Tensor)) or old.ndim != 4 or old.shape != value.shape:
        return False
    return channel_order(old, value) is None


def _cast(gm: GraphModule, dtype: torch.dtype) -> GraphModule:
    return copy.deepcopy(gm).to(dtype)


def _worst(a: Any, b: Any) -> float:
    """Least SQNR of two values' tensors; other values do not count."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return sqnr(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        return min((_worst(x, y) for x, y in zip(a, b, strict=True)), default=math.inf)
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return min((_worst(a[k], b[k]) for k in a), default=math.inf)
    return math.inf


def _reach_output(gm: GraphModule, strays: set[str], compared: set[str]) -> set[str]:
    """Those of ``strays`` from which strays, or values that cannot be compared, lead to the output."""
    reached: set[str] = set()
    for node in reversed(gm.graph.nodes):
        if (node.name in strays or node.name not in compared) and any(u.op == "output" or u.name in reached for u in node.users):
            reached.add(node.name)
    return reached & strays


def _behind(node: Node, link: dict[str, str]) -> set[str]:
    """Names of the nodes that it reads; through those without a counterpart, of what they read."""
    found: set[str] = set()
    todo, seen = list(node.all_input_nodes), set[Node]()
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.name in link:
            found.add(n.name)
        else:
            todo += n.all_input_nodes
    return found
