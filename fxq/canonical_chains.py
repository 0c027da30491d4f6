"""Chains of canonical operations that one operation replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq.canonical import At, NoForm, target_sizes
from fxq.graph import kind, module_of, shape


def shorten(gm: GraphModule) -> int:
    """Channel shuffles become one selection, reshapes of reshapes one reshape, and linear layers read unflattened tensors.

    Returns:
        How many chains were replaced.
    """
    return _shuffles(gm) + _reshapes(gm) + _unflattened(gm)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shuffles(gm: GraphModule) -> int:
    """Reshape, permute, reshape that reorders one dimension (a channel shuffle) becomes one selection."""
    done = 0
    for first in list(gm.graph.nodes):
        if first._erased or kind(gm, first) != "reshape":
            continue
        chain = [first]
        while (following := _only_user(chain[-1])) is not None and kind(gm, following) in ("reshape", "permute"):
            chain.append(following)
        x: Any = first.args[0]
        while len(chain) > 2 and not (kind(gm, chain[-1]) == "reshape" and chain[-1].meta["shape"] == x.meta["shape"]):
            chain.pop()
        found = reorder_of(x, [module_of(gm, n) for n in chain]) if len(chain) > 2 else None
        if found is None:
            continue
        At(gm, chain[-1]).put("shuffle", m.IndexSelect(*found), x)
        for node in reversed(chain[:-1]):
            gm.graph.erase_node(node)
        done += 1
    return done


def reorder_of(x: Node, chain: list[torch.nn.Module]) -> tuple[int, Tensor] | None:
    """Dimension and order when ``chain`` of reshapes and permutes only reorders one dimension of ``x``, else ``None``."""
    sizes = [s * 2 if d else s for s, d in zip(shape(x), x.meta["dynamic"], strict=True)]
    count = torch.Size(sizes).numel()
    iota = torch.arange(count).reshape(sizes)
    try:
        out = iota
        for step in chain:
            out = step(out)
    except RuntimeError:
        return None
    if out.shape != iota.shape:
        return None
    for dim, dynamic in enumerate(x.meta["dynamic"]):
        if dynamic:
            continue
        at_zero = tuple(slice(None) if d == dim else 0 for d in range(len(sizes)))
        stride = iota.stride(dim)
        order = out[at_zero] // stride % sizes[dim]
        if torch.equal(iota.index_select(dim, order), out):
            return dim, order
    return None


def _reshapes(gm: GraphModule) -> int:
    done = 0
    for node in list(gm.graph.nodes):
        source: Any = node.args[0] if node.args else None
        if kind(gm, node) != "reshape" or kind(gm, source) != "reshape":
            continue
        x, at = source.args[0], At(gm, node)
        try:
            same = shape(x) == shape(node) and x.meta["dynamic"] == node.meta["dynamic"]
            if same:
                at.become(x)
            else:
                at.put("reshape", m.Reshape(target_sizes(x, node)), x)
        except NoForm:
            continue
        if not source.users:
            gm.graph.erase_node(source)
        done += 1
    return done


def _unflattened(gm: GraphModule) -> int:
    """``[N * L, C]`` around a linear layer, as exported graphs write it."""
    done = 0
    for node in list(gm.graph.nodes):
        before: Any = node.args[0] if node.args else None
        after = _only_user(node)
        if kind(gm, node) != "linear" or kind(gm, before) != "reshape" or after is None or kind(gm, after) != "reshape":
            continue
        x = before.args[0]
        kept = shape(x)[-1] == shape(before)[-1] and shape(after) == (*shape(x)[:-1], shape(node)[-1])
        if not kept or x.meta["dynamic"] != after.meta["dynamic"] or x.meta["dynamic"][-1] or len(shape(x)) < 2:
            continue
        node.args = (x,)
        node.meta.update({k: after.meta[k] for k in ("shape", "dynamic", "dtype")})
        after.replace_all_uses_with(node)
        gm.graph.erase_node(after)
        if not before.users:
            gm.graph.erase_node(before)
        done += 1
    return done
