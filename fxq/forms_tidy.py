"""The form ``tidy``: movers that move nothing vanish, and two in a row become one. Exact."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq.graph import data_inputs, erase, kind, module_of, swap_module, walk
from fxq.pipeline import PassContext

MOVERS = ("reshape", "permute", "slice", "index_select", "pad", "expand", "cat", "split")


def tidy(gm: GraphModule, ctx: PassContext) -> int:
    """Merge reshapes and permutes that follow each other; take out what hands its input on as it is."""
    done, again = 0, True
    while again:
        again = False
        for node, k in walk(gm, *MOVERS):
            if _merged(gm, node, k) or _gone(gm, node, k):
                done, again = done + 1, True
    return done


def _merged(gm: GraphModule, node: Node, k: str) -> bool:
    """Let a reshape or permute behind another one read that one's input."""
    before = data_inputs(node)[0]
    if k not in ("reshape", "permute") or kind(gm, before) != k:
        return False
    outer: Any = module_of(gm, node)
    inner: Any = module_of(gm, before)
    if k == "permute":
        swap_module(gm, node, m.Permute([inner.dims[d] for d in outer.dims]))
    else:
        sizes = [_size(s, i, inner.shape) for i, s in enumerate(outer.shape)]
        if sizes.count(-2) or sizes.count(-1) > 1:
            return False
        swap_module(gm, node, m.Reshape([s if s != -3 else None for s in sizes]))
    node.replace_input_with(before, data_inputs(before)[0])
    if not before.users:
        gm.graph.erase_node(before)
    return True


def _size(size: int | None, i: int, inner: tuple[int | None, ...]) -> int:
    """Size of the outer reshape in terms of the inner one's input: -3 is "its own size here", -2 is unknown."""
    if size is not None:
        return size
    known = inner[i]
    return -3 if known is None else -2 if known == -1 else known


def _gone(gm: GraphModule, node: Node, k: str) -> bool:
    """Take out a mover that hands on its input unchanged."""
    inputs = data_inputs(node)
    if k == "split":
        if len(node.meta["shape"]) != 1:
            return False
        for part in list(node.users):
            erase(gm, part, inputs[0])
        gm.graph.erase_node(node)
        return True
    if not _same(gm, node, k, inputs):
        return False
    erase(gm, node, inputs[0])
    return True


def _same(gm: GraphModule, node: Node, k: str, inputs: list[Node]) -> bool:
    module: Any = module_of(gm, node)
    alike = len(node.args) == 1 and node.meta["shape"] == inputs[0].meta["shape"] and node.meta["dynamic"] == inputs[0].meta["dynamic"]
    if k == "permute":
        return list(module.dims) == list(range(len(module.dims)))
    if k == "index_select":
        return torch.equal(module.indices.cpu(), torch.arange(inputs[0].meta["shape"][module.dim])) and alike
    if k == "pad":
        return not any(module.pads)
    return alike  # the same elements in the same (row-major) order
