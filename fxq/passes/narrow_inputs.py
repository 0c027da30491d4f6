"""narrow-inputs: the grids of a low-bit scheme for what its weighted layers read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fxq.graph import Grid, data_inputs, grids, kind, reads_codes
from fxq.kernels import MOVERS
from fxq.modules import WEIGHTED
from fxq.pipeline import Pass, PassContext
from fxq.schemes import Scheme
from fxq.spec import QParams


@dataclass(frozen=True)
class NarrowInputs(Pass):
    """Give each low-bit layer's input the codes of ``scheme.activation``.

    A grid whose values are read by such layers alone (through operations that hand codes on) becomes narrow itself. Otherwise the layer reads the
    value through a second, narrow grid, ``meta["narrow"]``, and the others (residual sums, 8-bit and float layers) read the grid of ``scheme.stream``.
    """

    name: ClassVar[str] = "narrow-inputs"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)
    ensures: ClassVar[tuple[str, ...]] = ("annotated",)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        scheme = ctx.scheme
        if scheme.stream is None or scheme.method != "static" or (scheme.activation == scheme.stream and scheme.activations == "range"):
            return 0
        last = max((n for n in gm.graph.nodes if kind(gm, n) in WEIGHTED), default=None)
        wide_end = "last_input" in scheme.int8_layers
        layers = [
            n for n in gm.graph.nodes
            if kind(gm, n) in WEIGHTED and n.meta.get("integer") and not n.meta.get("int8_layer") and not (wide_end and n is last)
        ]  # fmt: skip
        table, chosen = grids(gm), set(layers)
        fixed = {name for name in table if table[name].fixed is not None}
        same = scheme.activation == scheme.stream  # then one grid serves all
        mixed = fixed if same else fixed | _read_by_others(gm, chosen)
        if scheme.activations == "sign":
            mixed |= _computed(gm)
        for layer in layers:
            name = data_inputs(layer)[0].meta["grid"]
            if same and name in mixed:
                continue
            if name not in mixed:
                table[name] = narrow_grid(table[name], scheme)
                continue
            second = f"{name}/narrow"
            table.setdefault(second, narrow_grid(replace(table[name], fixed=None, qparams=None), scheme))
            layer.meta["narrow"] = second
        return len(layers)


def narrow_grid(grid: Grid, scheme: Scheme) -> Grid:
    """The grid of what a low-bit layer reads where the stream has ``grid``."""
    assert scheme.activation is not None
    fixed = None
    if scheme.activations == "sign":
        fixed = QParams(scheme.activation, torch.ones(()), torch.zeros((), dtype=torch.int32))
    return Grid(scheme.activation, grid.clamp, fixed, fixed, scheme.activations)


def _computed(gm: GraphModule) -> set[str]:
    """Grids of values that integer operations other than binary layers compute: sums, products, tables, means, 8-bit layers.

    A runtime gives the sign of a binary layer's sum, which is never 0, and of a value on a grid, in integers; the sign of these it would compute in float.
    """
    kinds = ((n, kind(gm, n)) for n in gm.graph.nodes if n.meta.get("integer") and "grid" in n.meta)
    return {n.meta["grid"] for n, k in kinds if k not in (*WEIGHTED, *MOVERS) or n.meta.get("int8_layer")}


def _read_by_others(gm: GraphModule, layers: set[Node]) -> set[str]:
    """Grids whose values something else reads in codes, or in float where they come from integers."""
    found = set()
    for node in gm.graph.nodes:
        name = node.meta.get("grid")
        if name is None:
            continue
        for user in node.users:
            parts = list(user.users) if kind(gm, user) == "split" and user.meta.get("integer") else [user]
            hands_on = all(p.meta.get("grid") == name and p.meta.get("integer") and kind(gm, p) not in ("add", "mul", "sigmoid", *WEIGHTED) for p in parts)
            if user not in layers and not hands_on and reads_codes(user, node):
                found.add(name)
    return found
