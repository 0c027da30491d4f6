"""Canonical forms of reductions: means, sums, variances, norms, the maximum over space."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.fx import Node

from fxq import modules as m
from fxq.canonical import At, Form, NoForm, is_tensor, name_of, to_reshape
from fxq.graph import shape


def reduction(cls: type[m.Mean]) -> Form:
    """``mean`` or ``sum`` over constant dimensions."""

    def form(at: At) -> None:
        x = at.tensor()
        if x.meta["dtype"] != at.node.meta["dtype"] or not is_tensor(at.node):
            raise NoForm("the result has another type")
        n = len(shape(x))
        dims = at.arg(1, "dim", None)
        if dims is None or dims == [] or dims == ():
            dims = list(range(n))
        where = sorted(int(d) % n for d in (dims if isinstance(dims, (tuple, list)) else (dims,)))
        keep = bool(at.arg(2, "keepdim", False))
        if cls is m.Mean and n >= 4 and where == list(range(2, n)):
            if keep:
                at.put("global_avg_pool", m.GlobalAvgPool(), x)
            else:
                to_reshape(at, at.new("global_avg_pool", m.GlobalAvgPool(), x))
            return
        at.put(cls.__name__.lower(), cls(where, keep), x)

    return form


def amax(at: At) -> None:
    """The maximum over all spatial dimensions is a max pool of the whole input."""
    x = at.tensor()
    n = len(shape(x))
    dims = at.arg(1, "dim")
    where = sorted(int(d) % n for d in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    if n not in (3, 4, 5) or where != list(range(2, n)) or any(x.meta["dynamic"][2:]) or not is_tensor(at.node):
        raise NoForm("not over the spatial dimensions")
    cls: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[n - 3]
    to_reshape(at, at.new("max_pool", cls(shape(x)[2:] if n > 3 else shape(x)[2]), x))


def variance(at: At) -> None:
    """``var`` and ``std``: the mean of squared distances from the mean."""
    x, dims, n = at.tensor(), at.arg(1, "dim"), len(shape(at.tensor()))
    where = sorted(int(d) % n for d in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    if any(x.meta["dynamic"][d] for d in where) or not is_tensor(at.node):
        raise NoForm("over the batch")
    unbiased = at.arg(2, "unbiased", True) if not is_tensor(at.arg(2, "unbiased", True)) else True
    correction = at.arg(9, "correction", int(bool(unbiased)))
    count = math.prod(shape(x)[d] for d in where)
    if count <= correction:
        raise NoForm("over too few values")
    far = at.new("far", m.Sub(), x, at.new("mean", m.Mean(where, True), x))
    total = at.new("mean", m.Mean(where, bool(at.arg(3, "keepdim", False))), at.new("square", m.Mul(), far, far))
    scaled = at.new("scaled", m.Mul(), total, count / (count - correction)) if correction else total
    at.become(at.new("sqrt", m.Unary("sqrt"), scaled) if name_of(at.node) == "std" else scaled)


def norm_of(at: At, x: Node, where: list[int], keep: bool) -> Node:
    """Euclidean norm over ``where``."""
    return at.new("norm", m.Unary("sqrt"), at.new("sum", m.Sum(where, keep), at.new("square", m.Mul(), x, x)))


def vector_norm(at: At) -> None:
    x = at.tensor()
    name = name_of(at.node)
    order = at.arg(1, "ord" if name.startswith("linalg") or name == "vector_norm" else "p", 2)
    dims = at.arg(2, "dim", None)
    n = len(shape(x))
    if order not in (2, 2.0, "fro", None) or dims is None:
        raise NoForm("not the Euclidean norm over given dimensions")
    where = sorted(int(d) % n for d in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    at.become(norm_of(at, x, where, bool(at.arg(3, "keepdim", False))))


def normalize(at: At) -> None:
    """``F.normalize``: ``x / max(norm, eps)``."""
    x, p, dim, eps = at.tensor(), at.arg(1, "p", 2.0), at.arg(2, "dim", 1), at.arg(3, "eps", 1e-12)
    if p != 2 or not isinstance(dim, int):
        raise NoForm("not by the Euclidean norm over one dimension")
    norm = norm_of(at, x, [dim % len(shape(x))], True)
    at.put("normalize", m.Div(), x, at.new("eps", m.Clamp(float(eps), None), norm))


REDUCE: dict[str, Form] = {
    "mean": reduction(m.Mean), "sum": reduction(m.Sum), "amax": amax, **dict.fromkeys(("var", "std"), variance),
    **dict.fromkeys(("norm", "vector_norm", "linalg_vector_norm"), vector_norm), "normalize": normalize,
}  # fmt: skip
