"""Coordinates of a graph in layers, by fast-sugiyama (Sugiyama, Tagawa, Toda 1981)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxq.errors import FxqError

GAP = 72.0
"""Distance of two neighbours of a layer, and of two layers, in the layout library's units."""


@dataclass(frozen=True)
class Layout:
    """Where the nodes of a graph are drawn.

    Attributes:
        places: node -> ``(column, layer)``; whole numbers of layers from 0 at the top on, columns in widths of a node.
        routes: edge ``(source, user)`` -> the points between them, where it passes layers.
    """

    places: Mapping[str, tuple[float, int]]
    routes: Mapping[tuple[str, str], Sequence[tuple[float, int]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; nodes are numbered by their place in ``names``."""
        number = {name: i for i, name in enumerate(self.places)}
        flat = [v for x, y in self.places.values() for v in (round(x, 2), y)]
        routes = [[number[a], number[b], *(v for x, y in points for v in (round(x, 2), y))] for (a, b), points in self.routes.items()]
        return {"names": list(number), "xy": flat, "routes": routes}


def arrange(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> Layout:
    """A layered layout, the same for the same graph.

    Args:
        nodes: names; those without an edge stand at the right.
        edges: ``(source, user)``, both in ``nodes``.

    Raises:
        FxqError: when the layout package is not installed.
    """
    number = {name: i for i, name in enumerate(nodes)}
    numbered = list(dict.fromkeys((number[a], number[b]) for a, b in edges if a != b))
    xy: dict[int, tuple[float, int]] = {}
    follow: dict[int, list[int]] = {}
    right = 0.0
    for positions, width, height, steps in _components(numbered):
        for v, (x, y) in positions:
            xy[int(v)] = (right + x / GAP, round((height - y) / GAP))
        for a, b in steps or ():
            follow.setdefault(int(a), []).append(int(b))
        right += width / GAP + 1.5
    for i, name in enumerate(n for n in nodes if number[n] not in xy):
        xy[number[name]] = (right, i)
    return Layout({n: xy[number[n]] for n in nodes}, _routes(list(nodes), numbered, follow, xy))


def _components(edges: list[tuple[int, int]]) -> list[Any]:
    """``(positions, width, height, edges)`` of each connected part."""
    if not edges:
        return []
    try:
        from fast_sugiyama import from_edges
    except ImportError as e:
        raise FxqError("the package fast-sugiyama is not installed, which lays the report's graph out", way_out="pip install fxq[report]") from e
    return sorted(from_edges(edges).to_list(), key=lambda part: min(int(v) for v, _ in part[0]))


def _routes(
    names: list[str], edges: list[tuple[int, int]], follow: Mapping[int, list[int]], xy: Mapping[int, tuple[float, int]]
) -> dict[tuple[str, str], list[tuple[float, int]]]:
    """Through which places an edge over several layers goes; an edge that was turned around (a cycle) has none."""
    ends: dict[tuple[int, int], list[tuple[float, int]]] = {}
    count = len(names)
    for a, nexts in follow.items():
        for b in nexts if a < count else ():
            points = []
            while b >= count:
                points.append(xy[b])
                (b,) = follow[b]
            ends[a, b] = points
    return {(names[a], names[b]): ends[a, b] for a, b in edges if ends.get((a, b))}
