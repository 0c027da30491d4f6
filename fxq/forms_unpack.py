"""The form ``unpack``: a linear layer that computes several projections at once becomes one layer for each. Exact.

TensorRT takes such a layer apart by itself (queries, keys and values in one matrix), after which it dequantizes the pieces of the
weight and computes in float; layers that are separate in the file run in int8.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq.graph import erase, insert_module, kind, module_of, shape, walk
from fxq.pipeline import PassContext

Part = tuple[Node, int, int, Callable[[Node], Node]]
"""``(node to replace, first and last feature + 1, how to make its value from the part's linear node)``."""


def unpack(gm: GraphModule, ctx: PassContext) -> int:
    """Take apart every linear layer whose readers each take a block of its features."""
    done = 0
    for node, _ in walk(gm, "linear"):
        parts = _split_parts(gm, node) or _sliced_parts(gm, node)
        if not parts:
            continue
        made: dict[tuple[int, int], Node] = {}
        for old, begin, end, make in parts:
            if (begin, end) not in made:
                made[begin, end] = insert_module(gm, _last(node, made), f"{node.target}_{len(made)}", _rows(module_of(gm, node), begin, end), node.args)
            erase(gm, old, make(made[begin, end]))
        done += 1
    return done


def _last(node: Node, made: dict[tuple[int, int], Node]) -> Node:
    return list(made.values())[-1] if made else node


def _rows(linear: Any, begin: int, end: int) -> nn.Linear:
    """The layer of the output features ``begin`` to ``end``."""
    new = nn.Linear(linear.in_features, end - begin, bias=linear.bias is not None, device="meta")
    new.weight = nn.Parameter(linear.weight.detach()[begin:end].clone())
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach()[begin:end].clone())
    return new


def _split_parts(gm: GraphModule, node: Node) -> list[Part]:
    """Parts of a split along the features."""
    (split,) = node.users if len(node.users) == 1 else (None,)
    if split is None or kind(gm, split) != "split":
        return []
    module: Any = module_of(gm, split)
    if module.dim % len(shape(node)) != len(shape(node)) - 1 or isinstance(module.sizes, int) or len(module.sizes) < 2:
        return []
    if any(kind(gm, u) != "getitem" or not isinstance(u.args[1], int) for u in split.users):
        return []
    ends = torch.tensor(module.sizes).cumsum(0).tolist()
    return [(u, ends[i] - module.sizes[i], ends[i], lambda new: new) for u in split.users for i in [int(u.args[1]) % len(ends)]]  # type: ignore[arg-type]


def _sliced_parts(gm: GraphModule, node: Node) -> list[Part]:
    """Slices along a dimension that a reshape (and a permute) made of the features: ``[..., N] -> [..., k, N/k] -> x[i]``."""
    (reshape,) = node.users if len(node.users) == 1 else (None,)
    if reshape is None or kind(gm, reshape) != "reshape":
        return []
    (permute,) = reshape.users if len(reshape.users) == 1 else (None,)
    moved = permute if permute is not None and kind(gm, permute) == "permute" else None
    sizes, features, lead = shape(reshape), shape(node)[-1], len(shape(node)) - 1
    if len(sizes) <= lead or sizes[:lead] != shape(node)[:-1] or prod(sizes[lead:]) != features:
        return []
    last = moved or reshape
    dims: Any = module_of(gm, moved).dims if moved is not None else range(len(sizes))
    along, parts = list(dims).index(lead), []
    width = features // sizes[lead]
    for user in last.users:
        if kind(gm, user) != "slice":
            return []
        slices: Any = module_of(gm, user).slices
        if len(slices) != 1 or slices[0][0] != along or slices[0][3] != 1:
            return []
        begin, end = slices[0][1], sizes[lead] if slices[0][2] is None else slices[0][2]
        parts.append((user, begin * width, end * width, _again(gm, reshape, moved, lead, end - begin)))
    return parts if len(parts) > 1 else []


def _again(gm: GraphModule, reshape: Node, permute: Node | None, lead: int, count: int) -> Callable[[Node], Node]:
    """The same reshape and permute on a linear layer of ``count`` blocks of features."""
    old: Any = module_of(gm, reshape).shape
    wanted = [count if i == lead else s for i, s in enumerate(old)]

    def make(new: Node) -> Node:
        y = insert_module(gm, new, f"{new.target}_heads", m.Reshape(wanted), (new,))
        return y if permute is None else insert_module(gm, y, f"{new.target}_turned", m.Permute(module_of(gm, permute).dims), (y,))  # type: ignore[arg-type]

    return make
