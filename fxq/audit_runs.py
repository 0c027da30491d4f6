"""Does every recorded graph run, and give the same each time?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from fxq.audit import Finding
from fxq.moves import sqnr
from fxq.snapshot import Snapshot, flat
from fxq.values import watch


def broken(snapshots: Sequence[Snapshot], gm: GraphModule, batch: tuple[Any, ...]) -> Finding | None:
    """The pass behind which the graph runs no more on the batch, and the node that fails; ``None`` when ``gm``, the compiled graph, runs."""
    if _failure(gm, batch) is None:
        return None
    for s in snapshots:
        found = None if s.state is None else _failure(s.state.build(), batch)
        if found is not None:
            return _finding(s.name, *found)
    found = _failure(gm, batch)
    return None if found is None else _finding(snapshots[-1].name, *found)


def _finding(step: str, node: Node, why: str) -> Finding:
    return Finding(step, node.name, _path(node), "does not run", why)


def _failure(gm: GraphModule, batch: tuple[Any, ...]) -> tuple[Node, str] | None:
    """The node that raises, and what it says."""
    done: set[Node] = set()
    try:
        watch(gm, batch, lambda n, _: done.add(n))
    except Exception as e:  # whatever an operation raises
        node = next(n for n in gm.graph.nodes if n not in done)
        return node, (str(e) or type(e).__name__).splitlines()[0]
    return None


def not_deterministic(floating: GraphModule, gm: GraphModule, batch: tuple[Any, ...]) -> Finding | None:
    """The first node that gives two values for one input, in the float or the compiled graph."""
    for what, model in (("float model", floating), ("compiled model", gm)):
        seen: dict[str, Any] = {}
        strays: list[Node] = []
        watch(model, batch, lambda n, v, seen=seen: seen.update({n.name: v}))  # type: ignore[misc]
        watch(model, batch, lambda n, v, seen=seen, strays=strays: strays.append(n) if _differ(seen[n.name], v) else None)  # type: ignore[misc]
        if strays:
            step = "trace" if what == "float model" else "convert"
            return Finding(step, strays[0].name, _path(strays[0]), "not deterministic", f"two runs of the {what} on one input differ")
    return None


def _path(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _differ(a: Any, b: Any) -> bool:
    return any(sqnr(x, y) != math.inf for x, y in zip(flat(a), flat(b), strict=True))
