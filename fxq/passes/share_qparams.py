"""share-qparams: one grid through operations that only move codes, and over the inputs of a concatenation (union-find)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxq.graph import Grid, data_inputs, grids, kind
from fxq.pipeline import Pass, PassContext


@dataclass(frozen=True)
class ShareQParams(Pass):
    """Join the grids of values that hold the same codes.

    The output of a mover (``output="same"``: max-pool, reshape, slice, zero pad, ...) takes its input's grid. The inputs and
    the output of a kind in ``target.share`` take one grid when they absorbed the same clamp; otherwise (a ReLU's output beside a
    signed one) a common grid would bring the ReLU back as a float operation, so each keeps its own and the operation requantizes.
    """

    name: ClassVar[str] = "share-qparams"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)
    ensures: ClassVar[tuple[str, ...]] = ("annotated",)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        table = grids(gm)
        find = _UnionFind(table)
        joined = 0
        for node in gm.graph.nodes:
            if not node.meta.get("integer") or "grid" not in node.meta or node.meta.get("absorbed"):
                continue
            rule = ctx.target.ops.get(kind(gm, node))
            if rule is None:
                continue
            if kind(gm, node) in ctx.target.share:
                joined += self._share(gm, node, find, ctx)
            elif rule.output == "same":
                source = _source(gm, node)
                find.join(source.meta["grid"], node.meta["grid"])
                joined += 1
        for node in gm.graph.nodes:
            if "grid" in node.meta:
                node.meta["grid"] = find.root(node.meta["grid"])
        for name in [n for n in table if find.root(n) != n]:
            del table[name]
        return joined

    def _share(self, gm: GraphModule, node: Node, find: _UnionFind, ctx: PassContext) -> int:
        names = [n.meta["grid"] for n in data_inputs(node)]
        members = [find.grid(n) for n in names]
        why = None
        if any(i.op == "placeholder" for i in data_inputs(node)):
            why = "an input of the model keeps its own grid"
        elif len({m.clamp for m in members}) > 1:
            why = "its inputs absorbed different clamps; it requantizes"
        elif any(m.fixed for m in members):
            why = "an input's grid follows from its operation; it requantizes"
        if why is not None:
            ctx.skip(node, why)
            return 0
        for name in names[1:]:
            find.join(names[0], name)
        find.join(names[0], node.meta["grid"])
        return 1


def _source(gm: GraphModule, node: Node) -> Node:
    """The value whose codes a mover hands on (for a part of a split: the split's input)."""
    source = data_inputs(node)[0]
    return data_inputs(source)[0] if kind(gm, source) == "split" else source


class _UnionFind:
    """Grids by name; the first name of a set stands for it and keeps its clamp and fixed parameters."""

    def __init__(self, table: dict[str, Grid]) -> None:
        self.table = table
        self.parent = {name: name for name in table}

    def root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def grid(self, name: str) -> Grid:
        return self.table[self.root(name)]

    def join(self, a: str, b: str) -> None:
        ra, rb = self.root(a), self.root(b)
        if ra != rb:
            self.parent[rb] = ra
