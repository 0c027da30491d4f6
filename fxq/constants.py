"""Computes the parts of a graph that depend on parameters, buffers and numbers only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from fxq.canonical import add_tensor, name_of
from fxq.graph import attr, module_of

_RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal uniform poisson empty empty_like new_empty "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout stochastic_depth rrelu".split()
)
_FILLED = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "new_tensor")


def fold_constants(gm: GraphModule) -> int:
    """Replace every value that does not depend on an input by a buffer, or by a parameter when it comes from one.

    Shapes and numbers must be known (:func:`fxq.shapes.propagate`). Values are computed in eval mode, without gradients; a
    ``get_attr`` node alone is left as it is.

    Returns:
        How many values were replaced.
    """
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if _is_constant(gm, node, found):
            found.add(node)
    values: dict[Node, Any] = {}
    done = 0
    for node in list(gm.graph.nodes):
        wanted = node in found and node.op != "get_attr" and isinstance(node.meta.get("shape"), tuple)
        if not wanted or all(u in found for u in node.users):
            continue
        try:
            value = _evaluate(gm, node, values)
        except Exception:  # noqa: S112 - what cannot be computed now stays in the graph
            continue
        if isinstance(value, Tensor):
            _replace(gm, node, value, found)
            done += 1
    if done:
        gm.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    return done


def _is_constant(gm: GraphModule, node: Node, found: set[Node]) -> bool:
    if node.op == "get_attr":
        held = attr(gm, node)
        return isinstance(held, Tensor) and held.device.type != "meta"
    if node.op in ("placeholder", "output"):
        return False
    if node.op != "call_module" and name_of(node) in _RANDOM:
        return False
    if node.op == "call_module" and module_of(gm, node).training:
        return False
    return all(n in found or _static(n) for n in _inputs(node))


def _static(node: Node) -> bool:
    """A number that is the same at every batch size."""
    return "value" in node.meta and not node.meta["dynamic"]


def _inputs(node: Node) -> list[Node]:
    """Nodes that the value depends on; a fill depends on its template's sizes only, which are in the meta."""
    if node.op == "call_module" or name_of(node) not in _FILLED or not node.args:
        return list(node.all_input_nodes)
    like = node.args[0]
    same_size = name_of(node).endswith("_like")
    if same_size and any(node.meta.get("dynamic") or ()):
        return list(node.all_input_nodes)
    return [n for n in node.all_input_nodes if n is not like]


def _evaluate(gm: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node in values:
        return values[node]
    if _static(node):
        return node.meta["value"]
    if node.op == "get_attr":
        held: Any = attr(gm, node)
        return held.detach()
    free = set(node.all_input_nodes) - set(_inputs(node))

    def one(n: Any) -> Any:
        if not isinstance(n, Node):
            return n
        if n in free:
            return torch.empty(n.meta["shape"], dtype=n.meta["dtype"])
        return _evaluate(gm, n, values)

    args, kwargs = _plain(map_aggregate(node.args, one)), _plain(map_aggregate(node.kwargs, one))
    with torch.no_grad():
        if node.op == "call_module":
            value = module_of(gm, node)(*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            target: Any = node.target
            value = target(*args, **kwargs)
    values[node] = value
    return value


def _plain(a: Any) -> Any:
    """fx's immutable containers as Python's own."""
    if isinstance(a, list):
        return [_plain(v) for v in a]
    if isinstance(a, dict):
        return {k: _plain(v) for k, v in a.items()}
    return tuple(_plain(v) for v in a) if type(a) is tuple else a


def _from_parameter(gm: GraphModule, node: Node) -> bool:
    if node.op == "get_attr":
        return isinstance(attr(gm, node), nn.Parameter)
    if node.op == "call_module" and any(True for _ in module_of(gm, node).parameters()):
        return True
    return any(_from_parameter(gm, n) for n in _inputs(node) if not _static(n))


def _replace(gm: GraphModule, node: Node, value: Tensor, found: set[Node]) -> None:
    value = value.detach().clone(memory_format=torch.contiguous_format)
    kept = nn.Parameter(value) if value.is_floating_point() and _from_parameter(gm, node) else value
    path = add_tensor(gm, node.name, kept)
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(path)
    new.meta.update({k: v for k, v in node.meta.items() if k in ("shape", "dynamic", "dtype", "nn_module_stack")})
    found.add(new)
    node.replace_all_uses_with(new)
