"""The rule of reshapes: which dimensions of input and output hold the same elements, and which of them is the one that can be cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.fx import Node

from fxq.channels import LARGEST, Channels, Dims, Labels
from fxq.graph import kind, module_of, shape

LOOKAHEAD = 16
"""How many operations to look ahead for the product of an attention."""


def blocks(source: tuple[int, ...], target: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of both shapes that hold the same elements: ``[4, 6, 5] -> [24, 5]`` gives ``[0, 1], [0]`` and ``[2], [1]``."""
    i = j = 0
    while i < len(source) or j < len(target):
        ins: list[int] = []
        outs: list[int] = []
        a = b = 1
        while not ins or not outs or a != b:
            more_in, more_out = i < len(source), j < len(target)
            if more_in and (not ins or not more_out or (outs and a < b)):
                ins.append(i)
                a, i = a * source[i], i + 1
            elif more_out:
                outs.append(j)
                b, j = b * target[j], j + 1
            else:
                break
        yield ins, outs


def reshape(c: Channels, node: Node) -> None:
    """One dimension becomes several (heads, groups) or several one (flatten); whole blocks of places go together."""
    x = node.all_input_nodes[0]
    dims, source, target = c.of(x), shape(x), shape(node)
    out: Dims = [None] * len(target)
    moving, made = x.meta["dynamic"], node.meta["dynamic"]
    for ins, outs in blocks(source, target):
        live = [i for i in ins if dims[i] is not None]
        if not live:
            continue
        size = int(np.prod([source[i] for i in ins]))
        wide = [j for j in outs if target[j] > 1]
        if any(moving[i] for i in ins) and len([i for i in ins if source[i] > 1 or moving[i]]) > 1 or any(made[j] for j in outs) or size > LARGEST:
            for i in live:
                c.pin(dims[i], node, "is mixed with the batch")
            continue
        for i in live[1:]:
            c.pin(dims[i], node, "is merged with other channels")
        flat = _flat(source, ins, live[0], dims[live[0]])
        if wide:
            at = wide[0] if len(wide) == 1 else _chosen(c, node, flat, wide, target)
            out[at] = _gathered(c, flat, wide, target, at)
    c.dims[node] = out


def _flat(source: tuple[int, ...], ins: list[int], at: int, labels: Labels | None) -> Labels:
    """Labels of the merged dimension."""
    assert labels is not None
    if len(ins) == 1:
        return labels
    form = [source[i] if i == at else 1 for i in ins]
    return np.broadcast_to(labels.reshape(form), [source[i] for i in ins]).reshape(-1)


def _cube(flat: Labels, wide: list[int], target: tuple[int, ...], at: int) -> Labels:
    """``[before, places, behind]``."""
    before = int(np.prod([target[j] for j in wide if j < at]))
    return flat.reshape(before, target[at], -1)


def _chosen(c: Channels, node: Node, flat: Labels, wide: list[int], target: tuple[int, ...]) -> int:
    """The dimension that already holds whole labels; else the one that is a batch of products (heads); else the last but one."""
    for j in wide:
        cube = _cube(flat, wide, target, j)
        if bool((cube == cube[:1, :, :1]).all()):
            return j
    return next((j for j in wide if _is_heads(c, node, j)), wide[-2])


def _gathered(c: Channels, flat: Labels, wide: list[int], target: tuple[int, ...], at: int) -> Labels:
    """Labels of the dimension ``at``: all elements of one place are one."""
    cube = _cube(flat, wide, target, at)
    first = np.ascontiguousarray(cube[0, :, 0])
    rest = cube.transpose(0, 2, 1).reshape(-1, target[at])[1:]
    for row in rest:
        if not np.array_equal(row, first):
            c.tie(first, np.ascontiguousarray(row))
    return first


def _is_heads(c: Channels, node: Node, dim: int) -> bool:
    """Does this dimension reach a matrix product as one of its batch dimensions?"""
    todo: list[tuple[Node, int]] = [(node, dim)]
    for _ in range(LOOKAHEAD):
        if not todo:
            return False
        value, at = todo.pop(0)
        for user in value.users:
            k = kind(c.gm, user)
            if k == "matmul":
                if at < len(shape(user)) - 2:
                    return True
                continue
            moved = _follow(c, user, k, value, at)
            if moved is not None:
                todo.append((user, moved))
    return False


def _follow(c: Channels, user: Node, k: str, value: Node, at: int) -> int | None:
    """Where the dimension is behind ``user``; ``None`` when it is lost."""
    if user.op != "call_module":
        return None
    module: Any = module_of(c.gm, user)
    if k == "permute":
        return list(module.dims).index(at)
    if k == "reshape":
        for ins, outs in blocks(shape(value), shape(user)):
            wide = [j for j in outs if shape(user)[j] > 1]
            if at in ins and [i for i in ins if shape(value)[i] > 1] == [at] and len(wide) == 1:
                return wide[0]
        return None
    if isinstance(user.meta.get("shape"), tuple) and len(shape(user)) == len(shape(value)) and shape(user)[at] == shape(value)[at]:
        return at
    return None
