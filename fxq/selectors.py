"""How a user names layers: patterns on module paths, module types, numbers of weighted layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from torch.fx import GraphModule, Node

from fxq.errors import PassError, nearest
from fxq.graph import float_module

T = TypeVar("T")

Selector = str | type | int
"""A pattern (``fnmatch``) of a module path or node name, a module type, or the number of a weighted layer (-1 the last)."""


def fits(path: str, pattern: str) -> bool:
    """Does the pattern name this module path, or a module that it lies in?"""
    return fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, pattern + ".*")


def inside(patterns: Mapping[str, T], path: str, names: Collection[str]) -> dict[str, T]:
    """A mapping from patterns for one part of a model, in the paths of that part; of several patterns that fit the first counts.

    Args:
        path: of the part. names: module paths inside it.
    """
    own: dict[str, T] = {}
    for pattern, value in patterns.items():
        own.update({n: value for n in (*names, pattern.removeprefix(f"{path}.")) if n and n not in own and fits(f"{path}.{n}", pattern)})
    return own


def of_part(selectors: Sequence[Selector], path: str) -> tuple[Selector, ...]:
    """Selectors of a model's layers as one part of it reads them, in its own paths; one that names the part as a whole names all its layers."""
    return tuple(("*" if fits(path, s) else s.removeprefix(f"{path}.")) if isinstance(s, str) else s for s in selectors)


def require_named(patterns: Collection[str], paths: Collection[str], what: str, where: str) -> None:
    """Each pattern names one of the module paths.

    Raises:
        PassError: for a pattern of ``what`` that names none.
    """
    for pattern in patterns:
        if not any(fits(p, pattern) for p in paths):
            raise PassError(f"{pattern!r} of {what} names no layer", where=where, way_out=nearest(pattern, list(paths)))


def matches(gm: GraphModule, node: Node, selector: Selector, layers: Sequence[Node]) -> bool:
    """Does ``selector`` name this node?

    Args:
        layers: the weighted layers in the order of the graph, which numbers count.
    """
    if isinstance(selector, int):
        at = selector + len(layers) * (selector < 0)
        return 0 <= at < len(layers) and layers[at] is node
    if isinstance(selector, type):
        return node.op == "call_module" and isinstance(float_module(gm, node), selector)
    names = (str(node.target) if node.op == "call_module" else node.name, node.name)
    return any(fits(name, selector) for name in names)
