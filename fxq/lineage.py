"""Which value of one state of a graph is which of another: by name, and by what the surviving readers read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.fx import Graph, Node


def counterparts(old: Graph, new: Graph) -> dict[str, str]:
    """Name of a node in ``new`` -> name of the node in ``old`` whose value it stands for.

    A node keeps its value under its name, unless a reader says otherwise: where a reader that is in both graphs reads ``y`` at the place
    where it read ``x``, ``y`` carries the value of ``x`` if ``x`` is gone (a conv that took over its batch norm) or ``y`` is new (a fake-quantizer).
    Readers that disagree leave ``y`` without a counterpart.
    """
    before, now = {n.name: n for n in old.nodes}, {n.name: n for n in new.nodes}
    found = {name: name for name in now if name in before}
    said: dict[str, set[str]] = {}
    for name in found:
        if len(_slots(before[name])) != len(_slots(now[name])):
            continue
        for x, y in zip(_slots(before[name]), _slots(now[name]), strict=True):
            if x.name != y.name and (x.name not in now or y.name not in before):
                said.setdefault(y.name, set()).add(x.name)
    for name, sources in said.items():
        if len(sources) == 1:
            found[name] = next(iter(sources))
        else:
            found.pop(name, None)
    return found


def _slots(node: Node) -> list[Node]:
    """The nodes among the arguments in order, repeats included."""
    return list(_nodes((node.args, node.kwargs)))


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (tuple, list)):
        yield from (n for v in value for n in _nodes(v))
    elif isinstance(value, dict):
        yield from (n for v in value.values() for n in _nodes(v))


def chain(links: Iterable[dict[str, str]]) -> dict[str, str]:
    """Counterparts over several steps, from those of each: last state's name -> first state's."""
    total: dict[str, str] | None = None
    for link in links:
        total = dict(link) if total is None else {name: total[via] for name, via in link.items() if via in total}
    return total or {}
