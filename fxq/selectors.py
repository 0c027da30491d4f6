"""How a user names layers: patterns on module paths, module types, numbers of weighted layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch.fx import GraphModule, Node

from fxq.graph import float_module

Selector = str | type | int
"""A pattern (``fnmatch``) of a module path or node name, a module type, or the number of a weighted layer (-1 the last)."""


def fits(path: str, pattern: str) -> bool:
    """Does the pattern name this module path, or a module that it lies in?"""
    return fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, pattern + ".*")


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
