"""Runs an FX graph node by node, its modules looked up once: what a graph's own code costs at each call is as much as a small kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxq import graph as g
from fxq.backends.reference import plain


@dataclass(frozen=True)
class Line:
    """A node: where its value goes (below 0: it is the output), what is called (None: the next input), which values it takes, which are dead then.

    ``args`` of values only; otherwise None, and ``call`` takes all values.
    """

    place: int
    call: Any
    args: tuple[int, ...] | None
    dead: tuple[int, ...]


class Runner:
    """Does what the graph's code does.

    Args:
        gm: a graph whose placeholders come first; a later change of it is not seen.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.lines = _lines(gm)

    def __call__(self, *inputs: Any) -> Any:
        env: list[Any] = [None] * len(self.lines)
        given = iter(inputs)
        for line in self.lines:
            if line.call is None:
                env[line.place] = next(given)
            elif line.args is not None:
                env[line.place] = line.call(*[env[i] for i in line.args])
            elif line.place < 0:
                return line.call(env)
            else:
                env[line.place] = line.call(env)
            for i in line.dead:
                env[i] = None
        raise AssertionError("a graph without output")


def _lines(gm: GraphModule) -> list[Line]:
    """The nodes of a graph as lines."""
    places = {n: i for i, n in enumerate(gm.graph.nodes)}
    last: dict[Node, Node] = {}
    for n in gm.graph.nodes:
        last.update(dict.fromkeys(n.all_input_nodes, n))
    lines = []
    for n, place in places.items():
        dead = tuple(places[a] for a, reader in last.items() if reader is n)
        if n.op == "placeholder":
            lines.append(Line(place, None, (), ()))
        elif n.op == "call_module" and not n.kwargs and all(isinstance(a, Node) for a in n.args):
            lines.append(Line(place, gm.get_submodule(str(n.target)), tuple(places[a] for a in n.args), dead))
        else:
            lines.append(Line(-1 if n.op == "output" else place, partial(_other, gm, n, places), None, dead))
    return lines


def _other(gm: GraphModule, n: Node, places: dict[Node, int], env: list[Any]) -> Any:
    """A node that takes more than values."""
    args: Any
    kwargs: Any
    args, kwargs = (map_arg(v, lambda a: env[places[a]]) for v in (n.args, n.kwargs))
    if n.op == "output":
        return plain(args[0])
    if n.op == "get_attr":
        return g.attr(gm, n)
    if n.op == "call_module":
        return gm.get_submodule(str(n.target))(*args, **kwargs)
    if n.op == "call_method":
        return getattr(args[0], str(n.target))(*args[1:], **kwargs)
    return n.target(*args, **kwargs)  # type: ignore[operator]
