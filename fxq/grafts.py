"""Nodes and regions of a compiled graph back to float, to see what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.fx import GraphModule, Node

from fxq.errors import InputError, nearest
from fxq.graph import grid_of, kind, module_of, swap_module
from fxq.modules import WEIGHTED, Clamp, FakeQuantize, Quantized
from fxq.selectors import Selector, matches
from fxq.shared import SharedWeight
from fxq.states import State

WHY = "kept float by with_float"


def chosen(gm: GraphModule, selectors: Sequence[Selector]) -> list[Node]:
    """The nodes that the selectors name.

    Raises:
        InputError: for a selector that names none; the nearest path is offered.
    """
    layers = [n for n in gm.graph.nodes if kind(gm, n) in WEIGHTED]
    found: dict[Node, None] = {}
    for s in selectors:
        some = [n for n in gm.graph.nodes if n.op != "output" and matches(gm, n, s, layers)]
        if not some:
            names = [str(n.target) if n.op == "call_module" else n.name for n in gm.graph.nodes]
            way_out = nearest(s, names) if isinstance(s, str) else f"The graph has {len(layers)} weighted layers"
            raise InputError(f"{s!r} names no node of the compiled graph", way_out=way_out)
        found.update(dict.fromkeys(some))
    return list(found)


def with_float(gm: GraphModule, selectors: Sequence[Selector], floats: dict[str, nn.Module]) -> GraphModule:
    """A copy of a converted graph in which the named nodes compute in float, from float weights, and what they give is not rounded.

    Args:
        gm: a converted graph; not changed, modules are shared with it.
        selectors: patterns of module paths or node names, module types, numbers of weighted layers.
        floats: module path -> float layer as it was before ``convert``.

    Raises:
        InputError: for a selector that names nothing.
    """
    chosen(gm, selectors)
    new = State.of(gm).build()
    for node in chosen(new, selectors):
        module = module_of(new, node) if node.op == "call_module" else None
        if isinstance(module, Quantized):
            swap_module(new, node, floats.get(str(node.target), module.op))
        if isinstance(module, SharedWeight) and str(node.target) in floats:
            swap_module(new, node, floats[str(node.target)])
        if isinstance(module, FakeQuantize):
            _unround(new, node)
            continue
        if node.meta.get("integer"):
            node.meta["integer"], node.meta["float_why"] = False, WHY
        for reader in list(node.users):
            if reader.op == "call_module" and isinstance(module_of(new, reader), FakeQuantize):
                _unround(new, reader)
    new.graph.eliminate_dead_code()
    new.delete_all_unused_submodules()
    new.recompile()
    return new


def _unround(gm: GraphModule, node: Node) -> None:
    """Take a fake-quantizer out; a clamp that its grid absorbed stays, as an operation."""
    grid = grid_of(gm, node)
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or node not in gm.graph.nodes:
        return
    if grid is not None and grid.clamp is not None:
        swap_module(gm, node, Clamp(*grid.clamp))
        node.meta.pop("grid", None)
        node.meta["integer"], node.meta["float_why"] = False, WHY
    else:
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
    if source.meta.get("grid") and not any(u.op == "call_module" and isinstance(module_of(gm, u), FakeQuantize) for u in source.users):
        source.meta.pop("grid")
