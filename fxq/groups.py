"""Groups: the units of a graph that can be cut, pooled by the layers that give them, with the limits that grouped layers set.

A *unit* is what must be cut together (one channel through all the layers that it runs through; a whole attention head). A *group* is the set of units that
the same layers give, so that one count of kept units decides the widths of all these layers. Grouped convolutions and group norms divide a group into
cells that must keep the same number each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.fx import GraphModule, Node

from fxq.channel_rules import RULES
from fxq.channels import Cells, Channels, Labels, label
from fxq.graph import kind, module_of


@dataclass(frozen=True)
class Group:
    """Units with one count.

    Attributes:
        name: module path of the first layer that gives them.
        units: int64 ``[n]``, ascending.
        cells: int64 ``[n]``: which cell a unit lies in; all cells have one size and keep one number. Zeros without grouped layers.
        columns: int64 ``[n]``, where two grouped layers cross (a channel shuffle between them): the cells of the second; or ``None``.
        givers: the layers whose outputs they are, and how many channels of each one unit is (the width of a head, 1 for channels).
    """

    name: str
    units: Labels
    cells: Labels
    givers: tuple[tuple[Node, int], ...]
    columns: Labels | None = None

    def step(self, multiple: int) -> int:
        """Least step of the count of units that keeps every giver's width a multiple of ``multiple``."""
        return math.lcm(*(multiple // math.gcd(multiple, width) for _, width in self.givers))


@dataclass
class Groups:
    """What can be cut from a graph, and what cannot.

    Attributes:
        channels: labels of the graph.
        unit: int64 ``[labels]``: unit of each label.
        count: number of units.
        groups: in the order of the graph.
        left: path of a layer whose outputs cannot be cut (or only some of them) -> the reason.
    """

    channels: Channels
    unit: Labels
    count: int
    groups: list[Group] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def kept(self, keep: Labels, labels: Labels | None, size: int = 0) -> Labels:
        """bool ``[n]``: which places of a dimension stay when the units ``keep`` (bool ``[count]``) do."""
        found: Labels = np.ones(size, bool) if labels is None else keep[self.unit[labels]]
        return found

    def all_kept(self) -> Labels:
        """bool ``[count]``, all true."""
        return np.ones(self.count, bool)


def find(gm: GraphModule, keep: Mapping[Node, str] | None = None) -> Groups:
    """Groups of a canonical graph with shapes.

    Args:
        keep: layers whose outputs stay as they are, and why.
    """
    channels = label(gm, RULES)
    for giver in channels.givers:
        if keep and giver.node in keep:
            channels.pin(giver.labels, giver.node, keep[giver.node])
    unit = channels.units()
    found = Groups(channels, unit, int(unit.max()) + 1 if len(unit) else 0)
    why = _fixed(found)
    tags = _tags(found, why)
    _pool(found, why, tags)
    _name_left(found, why)
    return found


def _fixed(g: Groups) -> dict[int, str]:
    """Units that stay, and why."""
    why: dict[int, str] = {}
    for pin in g.channels.pins:
        reason = pin.why if pin.node.op == "output" else f"{pin.why} ({pin.node.name})"
        for u in np.unique(g.unit[pin.labels]).tolist():
            why.setdefault(u, reason)
    return why


def _cell_of(cells: Cells) -> Labels:
    """Cell of each place."""
    return np.repeat(np.arange(cells.groups), len(cells.labels) // cells.groups)


def _tags(g: Groups, why: dict[int, str]) -> dict[int, list[tuple[int, int]]]:
    """Unit -> (number of the constraint, cell) of each grouped layer it runs through; units that no equal count can hold are added to ``why``."""
    tags: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i, cells in enumerate(g.channels.cells):
        where: dict[int, set[int]] = defaultdict(set)
        for u, cell in zip(g.unit[cells.labels].tolist(), _cell_of(cells).tolist(), strict=True):
            where[u].add(cell)
        for u, found in where.items():
            if len(found) == 1:
                tags[u].append((i, found.pop()))
            elif len(found) < cells.groups:
                why.setdefault(u, f"lies in several groups of {cells.node.name}")
    again = True
    while again:  # a cell with a unit that stays cannot keep the number of the others
        again = False
        for cells in g.channels.cells:
            units = np.unique(g.unit[cells.labels]).tolist()
            stays = next((u for u in units if u in why), None)
            if stays is not None and not all(u in why for u in units):
                again = True
                for u in units:
                    why.setdefault(u, f"is in one group of {cells.node.name} with channels that stay: {why[stays]}")
    return tags


def _pool(g: Groups, why: dict[int, str], tags: dict[int, list[tuple[int, int]]]) -> None:
    """Units by the layers that give them, linked where grouped layers ask for equal counts."""
    given: dict[int, dict[int, int]] = defaultdict(dict)
    for i, giver in enumerate(g.channels.givers):
        units, counts = np.unique(g.unit[giver.labels], return_counts=True)
        for u, n in zip(units.tolist(), counts.tolist(), strict=True):
            if u not in why:
                given[u][i] = n
    classes: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for u in sorted(given):
        classes[(tuple(given[u].items()), tuple(tags.get(u, ())))].append(u)
    linked: dict[int, int] = {}
    pools: list[list[tuple[Any, ...]]] = []
    for key in classes:
        mine = sorted({linked[i] for i, _ in key[1] if i in linked})
        at = mine[0] if mine else len(pools)
        if not mine:
            pools.append([])
        for other in mine[1:]:
            pools[at] += pools[other]
            pools[other] = []
            linked = {i: at if p == other else p for i, p in linked.items()}
        pools[at].append(key)
        linked.update({i: at for i, _ in key[1]})
    taken: dict[str, int] = defaultdict(int)
    for keys in filter(None, pools):
        fault = _unequal(g, keys, classes)
        if fault is not None:
            why.update({u: fault for key in keys for u in classes[key]})
            continue
        cells, columns = _partitions(g, keys, classes)
        pairs = sorted((u, i) for i, key in enumerate(keys) for u in classes[key])
        units, place = np.array([u for u, _ in pairs]), np.array([i for _, i in pairs])
        widths: dict[int, int] = {}
        for key in keys:
            for i, n in key[0]:
                widths[i] = math.gcd(widths.get(i, 0), n)
        givers = tuple((g.channels.givers[i].node, n) for i, n in sorted(widths.items()))
        name = str(givers[0][0].target)
        taken[name] += 1
        name = name if taken[name] == 1 else f"{name}#{taken[name]}"
        g.groups.append(Group(name, units, cells[place], givers, None if columns is None else columns[place]))
    order = {giver.node: i for i, giver in enumerate(g.channels.givers)}
    g.groups.sort(key=lambda x: (order[x.givers[0][0]], int(x.units[0])))


def _partitions(g: Groups, keys: list[tuple[Any, ...]], classes: Mapping[tuple[Any, ...], list[int]]) -> tuple[Labels, Labels | None]:
    """The fewest partitions of the classes that hold every constraint: cell of each class, and where two cross freely the cell of the second."""
    whole = np.arange(len(keys))
    found: dict[tuple[int, ...], None] = {}
    for i in sorted({i for k in keys for i, _ in k[1]}):
        cell = [dict(k[1]).get(i, -1) for k in keys]
        times = np.bincount(g.unit[g.channels.cells[i].labels], minlength=g.count)
        if -1 in cell or len({int(times[classes[k][0]]) for k in keys}) > 1:
            return whole, None
        found[tuple(np.unique(cell, return_inverse=True)[1].tolist())] = None
    parts = [p for p in found if not any(q != p and _refines(q, p) for q in found)]
    if not parts:
        return np.zeros(len(keys), np.int64), None
    if len(parts) == 1:
        return np.array(parts[0]), None
    a, b = np.array(parts[0]), np.array(parts[1])
    both = np.unique(a * (b.max() + 1) + b, return_counts=True)[1]
    crossed = len(parts) == 2 and len(both) == (a.max() + 1) * (b.max() + 1) and len(set(both.tolist())) == 1
    return (a, b) if crossed else (whole, None)


def _refines(fine: tuple[int, ...], coarse: tuple[int, ...]) -> bool:
    """Each cell of ``fine`` lies in one of ``coarse``."""
    return len(set(zip(fine, coarse, strict=True))) == len(set(fine))


def _unequal(g: Groups, keys: list[tuple[Any, ...]], classes: Mapping[tuple[Any, ...], list[int]]) -> str | None:
    """Why cells that keep one number each do not give the groups of a layer equal numbers, or ``None``."""
    if len({len(classes[k]) for k in keys}) > 1:
        return "lies in cells of different sizes between grouped layers"
    for i in sorted({i for k in keys for i, _ in k[1]}):
        cells = g.channels.cells[i]
        per = np.zeros(cells.groups, np.int64)
        times = np.bincount(g.unit[cells.labels], minlength=g.count)
        for k in keys:
            for j, cell in k[1]:
                if j == i:
                    per[cell] += int(times[classes[k][0]])
        if len(set(per.tolist())) > 1:
            return f"would give the groups of {cells.node.name} unequal numbers"
    return None


def _name_left(g: Groups, why: Mapping[int, str]) -> None:
    """Layers whose outputs stay, whole or in part."""
    for giver in g.channels.givers:
        stays = [why[u] for u in np.unique(g.unit[giver.labels]).tolist() if u in why]
        if stays:
            g.left.setdefault(str(giver.node.target), stays[0])


def batch_norms(g: Groups) -> Iterable[tuple[Node, Labels]]:
    """Batch norms with a weight, and the units of their channels that lie in groups (-1 elsewhere)."""
    inside = np.full(g.count, -1)
    for group in g.groups:
        inside[group.units] = group.units
    gm = g.channels.gm
    for node in gm.graph.nodes:
        if kind(gm, node) != "batch_norm" or module_of(gm, node).weight is None:
            continue
        labels = g.channels.of(node)[1]
        if labels is not None and bool((inside[g.unit[labels]] >= 0).any()):
            yield node, inside[g.unit[labels]]
