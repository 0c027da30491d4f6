"""The form ``shuffle``: channel shuffles vanish into the order of the weights of the layers around them.

``Cat``, ``IndexSelect``, ``Split`` and ``Slice`` on the channels only *route* them: what they give is a list of (value, channel).
A convolution reads its input channels in any order when its weights are reordered with them, and can give its output channels in
any order; a depthwise conv or a pointwise function hands an order on. So each reader takes its channels sorted by value and
place, and what is left of the routing is one ``Split`` per value and one ``Cat`` per reader.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq.graph import data_inputs, insert_module, kind, module_of, scope_name, swap_module
from fxq.pipeline import PassContext
from fxq.routing import Channel, Routes, permuted

MAX_PIECES = 16
"""A reader that would need more pieces than this keeps its gather."""

Run = tuple[Node, int, int]
"""Channels ``start`` to ``stop`` of a value, in the order it gives them."""


def shuffle(gm: GraphModule, ctx: PassContext) -> int:
    """Take channel shuffles out; returns how many gathers went. A gather on channels runs at 1.7 of float speed, no op at all is free."""
    routes = Routes(gm)
    gathers = [n for n in gm.graph.nodes if n in routes.lists and kind(gm, n) == "index_select"]
    if not gathers:
        return 0
    plan = _plan(routes)
    left = len(plan.kept) + sum(plan.gathered(x) for x in plan.rebuilt)
    if left >= len(gathers):
        for node in gathers:
            ctx.skip(node, "what reads its channels needs them in this order")
        return 0
    for node, reader in plan.kept.items():
        ctx.skip(node, f"{reader.name} needs its channels in this order")
    _Writer(gm, plan).write()
    return len(gathers) - left


@dataclass
class _Plan:
    """Who reads what, and in which order each value gives its channels.

    Attributes:
        order: value -> the channel at each place, where that is not the natural order.
        reads: reader -> place -> channel of its (logical) input.
        rebuilt: inputs of readers that need the natural order, gathered once instead of many times.
        kept: gathers that stay as they are -> a reader that needs them.
        places: ``order`` turned round, as far as it was asked for.
    """

    routes: Routes
    order: dict[Node, list[int]] = field(default_factory=dict)
    reads: dict[Node, list[int]] = field(default_factory=dict)
    rebuilt: dict[Node, list[Node]] = field(default_factory=dict)
    kept: dict[Node, Node] = field(default_factory=dict)
    places: dict[Node, dict[int, int]] = field(default_factory=dict)

    def place(self, channel: Channel) -> tuple[Node, int]:
        """Value and place of a channel."""
        value, c = channel
        if value not in self.order:
            return value, c
        if value not in self.places:
            self.places[value] = {c: i for i, c in enumerate(self.order[value])}
        return value, self.places[value][c]

    def sorted_places(self, x: Node, groups: int = 1) -> list[int]:
        """Order of reading ``x`` (within each of ``groups``): by value, then by place."""
        places = [self.place(c) for c in self.routes.listing(x)]
        size, at = len(places) // groups, self.routes.position
        return [i for g in range(groups) for i in sorted(range(g * size, (g + 1) * size), key=lambda i: (at[places[i][0]], places[i][1]))]

    def runs(self, x: Node, read: Sequence[int]) -> list[Run]:
        """The channels of ``x`` in the order ``read``, as runs of neighbours."""
        listing = self.routes.listing(x)
        out: list[Run] = []
        for i in read:
            value, at = self.place(listing[i])
            if out and out[-1][0] is value and out[-1][2] == at:
                out[-1] = (value, out[-1][1], at + 1)
            else:
                out.append((value, at, at + 1))
        return out

    def pieces(self, x: Node) -> list[Run]:
        """Runs of an input that is rebuilt in its natural order."""
        return self.runs(x, self.sorted_places(x))

    def gathered(self, x: Node) -> bool:
        """Does rebuilding ``x`` need a gather?"""
        read = self.sorted_places(x)
        return read != list(range(len(read)))


def _plan(routes: Routes) -> _Plan:
    """Plan until no reader asks for too many pieces or reads a gather that stays anyway."""
    banned: set[Node] = set()
    while True:
        plan = _Plan(routes)
        free = routes.free(banned)
        _choose_orders(plan, free, banned)
        for node in routes.nodes:
            _plan_reader(plan, node, free, banned)
        bad = {n for n in plan.reads if len(plan.runs(_input(n), plan.reads[n])) > MAX_PIECES or _no_gain(plan, n)}
        if not bad:
            return plan
        banned |= bad


def _input(node: Node) -> Node:
    return data_inputs(node)[0]


def _no_gain(plan: _Plan, node: Node) -> bool:
    """Does it read only gathers that stay, of values in their natural order?"""
    x = _input(node)
    gathers = plan.routes.gathers(x)
    return bool(gathers) and gathers <= set(plan.kept) and not any(v in plan.order for v, _ in plan.routes.listing(x))


def _plan_reader(plan: _Plan, node: Node, free: set[Node], banned: set[Node]) -> None:
    routes = plan.routes
    if routes.routes(node):
        return
    role = routes.role(node)
    if node not in banned and (role == "absorbs" or (role == "passes" and node in free)):
        x = _input(node)
        if routes.gathers(x) or any(v in plan.order for v, _ in routes.listing(x)):
            read = plan.sorted_places(x, routes.groups(node))
            plan.reads[node] = read
            if role == "passes" and read != list(range(len(read))):
                wide = routes.multiplier(node)
                plan.order[node] = [c * wide + j for c in read for j in range(wide)]
        return
    for x in data_inputs(node):
        gathers = routes.gathers(x)
        if len(gathers) > 1:
            plan.rebuilt.setdefault(x, []).append(node)
        for g in gathers if len(gathers) == 1 else ():
            plan.kept.setdefault(g, node)


def _choose_orders(plan: _Plan, free: set[Node], banned: set[Node]) -> None:
    """Output orders of convolutions: channels that the same readers take stand together, where that makes fewer runs."""
    routes = plan.routes
    readers: dict[Node, dict[Node, set[int]]] = {}
    for node in routes.nodes:
        role = "" if routes.routes(node) or node in banned else routes.role(node)
        if role not in ("absorbs", "passes") or not routes.gathers(_input(node)):
            continue
        for channel in routes.listing(_input(node)):
            root, c = routes.root(channel)
            readers.setdefault(root, {}).setdefault(node, set()).add(c)
    for root, sets in readers.items():
        if root not in free or not routes.reorders(root):
            continue
        natural = list(range(routes.width(root)))
        by_size = sorted(sets.values(), key=len, reverse=True)
        better = sorted(natural, key=lambda c: tuple(c not in s for s in by_size))
        if _breaks(better, by_size) < _breaks(natural, by_size):
            plan.order[root] = better


def _breaks(order: list[int], sets: list[set[int]]) -> int:
    return sum((a in s) != (b in s) for s in sets for a, b in pairwise(order))


class _Writer:
    """Carries a plan out."""

    def __init__(self, gm: GraphModule, plan: _Plan) -> None:
        self.gm, self.plan = gm, plan
        self.made: dict[tuple[Run, ...], Node] = {}
        self.parts: dict[Run, Node] = {}

    def write(self) -> None:
        plan, routes = self.plan, self.plan.routes
        wanted = {n: plan.runs(_input(n), read) for n, read in plan.reads.items()}
        again = {x: plan.pieces(x) for x in plan.rebuilt}
        self._cut([*wanted.values(), *again.values()])
        for node in routes.nodes:
            if node in wanted:
                node.replace_input_with(_input(node), self._joined(node, wanted[node]))
            for x in [x for x, users in plan.rebuilt.items() if users[0] is node]:
                whole = self._natural(node, x, again[x])
                for user in plan.rebuilt[x]:
                    user.replace_input_with(x, whole)
        for node in set(plan.reads) | set(plan.order):
            new = permuted(module_of(self.gm, node), plan.reads.get(node), plan.order.get(node))
            if new is not None:
                swap_module(self.gm, node, new)
        for node in reversed(routes.nodes):
            if routes.routes(node) and not node.users:
                self.gm.graph.erase_node(node)

    def _cut(self, lists: list[list[Run]]) -> None:
        """Split each value at every end of a run; only the parts that are read get a node."""
        edges: dict[Node, set[int]] = {}
        for value, start, stop in (r for runs in lists for r in runs):
            edges.setdefault(value, {0, self.plan.routes.width(value)}).update((start, stop))
        atoms = {v: list(pairwise(sorted(e))) for v, e in edges.items()}
        for value, cuts in atoms.items():
            used = [(a, b) for a, b in cuts if any(v is value and s <= a and b <= e for runs in lists for v, s, e in runs)]
            if len(cuts) == 1:
                self.parts[(value, *cuts[0])] = value
            elif used == cuts:
                split = insert_module(self.gm, value, _beside(value, "split"), m.Split([b - a for a, b in cuts], 1), (value,))
                for i, (a, b) in reversed(list(enumerate(cuts))):
                    self.parts[value, a, b] = _part(self.gm, split, i)
            else:
                for a, b in used:
                    self.parts[value, a, b] = insert_module(self.gm, value, _beside(value, "slice"), m.Slice([(1, a, b, 1)]), (value,))
        self.atoms = atoms

    def _joined(self, before: Node, runs: list[Run]) -> Node:
        """A node with the runs' channels, made once and in front of its first reader."""
        parts = [(v, a, b) for v, s, e in runs for a, b in self.atoms[v] if s <= a and b <= e]
        key = tuple(parts)
        if key not in self.made:
            nodes = [self.parts[p] for p in parts]
            one = len(nodes) == 1
            self.made[key] = nodes[0] if one else insert_module(self.gm, before.prev, _beside(before, "cat"), m.Cat(1), nodes)
        return self.made[key]

    def _natural(self, before: Node, x: Node, runs: list[Run]) -> Node:
        """``x`` itself, from the values that it is made of, with at most one gather."""
        read = self.plan.sorted_places(x)
        joined = self._joined(before, runs)
        if not self.plan.gathered(x):
            return joined
        back = torch.argsort(torch.tensor(read))
        return insert_module(self.gm, before.prev, _beside(before, "gather"), m.IndexSelect(1, back), (joined,))


def _beside(node: Node, suffix: str) -> str:
    """A path next to the node's module, not below it: a module below would go when that one is swapped."""
    if node.op != "call_module":
        return scope_name(node, suffix)
    scope, dot, _ = str(node.target).rpartition(".")
    return f"{scope}{dot}{suffix}"


def _part(gm: GraphModule, split: Node, i: int) -> Node:
    with gm.graph.inserting_after(split):
        part = gm.graph.call_function(operator.getitem, (split, i))
    for key in ("shape", "dynamic", "dtype"):
        part.meta[key] = split.meta[key][i]
    if "nn_module_stack" in split.meta:
        part.meta["nn_module_stack"] = split.meta["nn_module_stack"]
    return part
