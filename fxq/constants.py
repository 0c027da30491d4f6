"""Computes the parts of a graph that depend on parameters, buffers and numbers only, and constants repeated over the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from fxq import modules as m
from fxq.canonical import At, add_tensor, name_of
from fxq.graph import attr, module_of, shape
from fxq.shapes import plain

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
        except Exception:
            continue
        if isinstance(value, Tensor) and value.device.type != "meta":
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


def _evaluate(gm: GraphModule, node: Node, values: dict[Node, Any], which: str = "value") -> Any:
    """Value at the example's batch, or with ``which="other"`` at the second one."""
    if node in values:
        return values[node]
    if "value" in node.meta:
        return node.meta[which]
    if node.op == "get_attr":
        held: Any = attr(gm, node)
        return held.detach()
    free = set(node.all_input_nodes) - set(_inputs(node))

    def one(n: Any) -> Any:
        if not isinstance(n, Node):
            return n
        if n in free:
            return torch.empty(n.meta["shape"], dtype=n.meta["dtype"])
        return _evaluate(gm, n, values, which)

    args, kwargs = plain(map_aggregate(node.args, one)), plain(map_aggregate(node.kwargs, one))
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


def _from_parameter(gm: GraphModule, node: Node) -> bool:
    if node.op == "get_attr":
        return isinstance(attr(gm, node), nn.Parameter)
    if node.op == "call_module" and any(True for _ in module_of(gm, node).parameters()):
        return True
    return any(_from_parameter(gm, n) for n in _inputs(node) if not _static(n))


def _replace(gm: GraphModule, node: Node, value: Tensor, found: set[Node]) -> None:
    value = value.detach()  # a view of a weight stays one: its reader often transposes it back
    if 0 in value.stride():
        value = value.clone(memory_format=torch.contiguous_format)
    kept = nn.Parameter(value) if value.is_floating_point() and _from_parameter(gm, node) else value
    path = add_tensor(gm, node.name, kept)
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(path)
    new.meta.update({k: v for k, v in node.meta.items() if k in ("shape", "dynamic", "dtype", "nn_module_stack")})
    found.add(new)
    node.replace_all_uses_with(new)


def fold_repeated(gm: GraphModule) -> int:
    """Take out constants that are repeated over the batch (a class token): no size has to follow the batch any more.

    Where such a value is added or multiplied, broadcasting repeats it. Where it is concatenated to a tensor, that tensor is
    padded and the constant is added in the free place.

    Returns:
        How many readers were changed.
    """
    repeated: dict[Node, bool] = {}
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module") and "value" not in node.meta:
            sources = node.all_input_nodes
            tensors = [n for n in sources if "value" not in n.meta]
            constant = all(n in repeated or n.op == "get_attr" for n in tensors) and not (node.op == "call_module" and module_of(gm, node).training)
            if constant and sources and (node.op == "call_module" or name_of(node) not in _RANDOM):
                repeated[node] = True
    done = 0
    values: tuple[dict[Node, Any], dict[Node, Any]] = ({}, {})
    users = dict.fromkeys(u for node in repeated for u in node.users if u not in repeated and u.op in ("call_function", "call_method"))
    for user in users:
        ones = {n: one for n in user.all_input_nodes if n in repeated and (one := _single(gm, n, values)) is not None}
        done += bool(ones) and (_token(gm, user, ones) or _broadcast(gm, user, ones))
    return done


def _single(gm: GraphModule, node: Node, values: tuple[dict[Node, Any], dict[Node, Any]]) -> Tensor | None:
    """The one sample that the value repeats over the batch (size 1 there), or ``None``."""
    dynamic = node.meta.get("dynamic")
    if not isinstance(dynamic, tuple) or dynamic.count(True) != 1:
        return None
    dim = dynamic.index(True)
    try:
        both = [_evaluate(gm, node, table, which) for table, which in zip(values, ("value", "other"), strict=True)]
    except Exception:
        return None
    if any(not isinstance(v, Tensor) or v.device.type == "meta" for v in both):
        return None
    one: Tensor = both[0].narrow(dim, 0, 1)
    if not one.is_floating_point() or any(not torch.equal(v, one.expand_as(v)) for v in both):
        return None
    one = one.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(one) if _from_parameter(gm, node) else one


def _token(gm: GraphModule, user: Node, ones: dict[Node, Tensor]) -> bool:
    """``cat([constant, x])`` is ``pad(x) + constant``; constants may stand on both sides."""
    xs: Any = user.args[0] if user.args else None
    if name_of(user) not in ("cat", "concat", "concatenate") or not isinstance(xs, (tuple, list)):
        return False
    rest = [x for x in xs if x not in ones]
    n, at = len(shape(user)), At(gm, user)
    dim = int(at.arg(1, "dim", at.arg(1, "axis", 0))) % n
    dynamic = user.meta["dynamic"]
    if len(rest) != 1 or dynamic[dim] or any(x.meta["dynamic"] != dynamic or x.meta["dtype"] != user.meta["dtype"] for x in xs):
        return False
    (x,), i = rest, list(xs).index(rest[0])
    room = list(next(iter(ones.values())).shape)
    room[dim] = shape(x)[dim]
    zeros = next(iter(ones.values())).detach().new_zeros(room)
    fill = torch.cat([zeros if v is x else ones[v].detach() for v in xs], dim)
    pads = [0] * (2 * (n - dim))
    pads[2 * (n - 1 - dim)] = sum(ones[v].shape[dim] for v in xs[:i])
    pads[2 * (n - 1 - dim) + 1] = sum(ones[v].shape[dim] for v in xs[i + 1 :])
    held = at.constant("token", nn.Parameter(fill) if any(isinstance(v, nn.Parameter) for v in ones.values()) else fill)
    at.put("token", m.Add(), at.new("pad", m.Pad(pads), x), held)
    return True


def _broadcast(gm: GraphModule, user: Node, ones: dict[Node, Tensor]) -> bool:
    """Arithmetic with a tensor that has the batch itself."""
    others = [a for a in user.args if isinstance(a, Node) and a not in ones]
    if name_of(user) not in ("add", "iadd", "sub", "mul", "imul", "div", "truediv") or len(others) != 1:
        return False
    x = others[0]
    if x.meta.get("shape") != user.meta["shape"] or x.meta["dynamic"] != user.meta["dynamic"]:
        return False
    for node, one in ones.items():
        user.replace_input_with(node, At(gm, user).constant("repeated", one))
    return True
