"""Puts the graph of an opaque module or Python function in the place of its call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Proxy
from torch.fx.node import map_aggregate

from fxq.canonical import add_tensor, is_tensor
from fxq.concrete import ConcreteProxy, ConcreteTracer, set_item
from fxq.graph import attr, module_of, scope_name
from fxq.shapes import plain
from fxq.snapshot import distance

_NEAR = 1e-4
_RESHAPES = ("view", "reshape", "unsqueeze", "squeeze", "flatten", "view_as", "reshape_as")


class CannotInline(RuntimeError):
    """The call cannot be traced, or tracing it gives the same call again; the message says which."""


class _Call(nn.Module):
    """Calls ``fn`` with the arguments of a node, whose nodes are the inputs."""

    def __init__(self, node: Node, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.args, self.kwargs, self.inputs = node.args, node.kwargs, list(node.all_input_nodes)
        if isinstance(fn, nn.Module):
            self.inner = fn
        else:
            self.fn = fn

    def forward(self, *xs: Any) -> Any:
        table = dict(zip(self.inputs, xs, strict=True))

        def fill(n: Any) -> Any:
            return table[n] if isinstance(n, Node) else n

        call = self.inner.forward if hasattr(self, "inner") else self.fn
        return call(*plain(map_aggregate(self.args, fill)), **plain(map_aggregate(self.kwargs, fill)))


class _Tracer(ConcreteTracer):
    """Traces with the nodes' values at two batch sizes; in-place changes of slices reach the tensor that they are slices of."""

    def __init__(self, nodes: list[Node], batch: int) -> None:
        super().__init__(tuple(0 for _ in nodes))
        self.nodes, self.at, self.views = nodes, batch, dict[int, tuple[ConcreteProxy, Any]]()

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = [self._given(f"input_{i}", n) for i, n in enumerate(self.nodes)]
        return lambda root, *args: root.forward(*args), [self.root, *proxies]

    def _given(self, name: str, node: Node) -> Any:
        placeholder = super(ConcreteTracer, self).create_proxy("placeholder", name, (), {}, proxy_factory_fn=lambda n: Proxy(n, self))
        value, other = (self._value(node, grown) for grown in (False, True))
        if "value" in node.meta and not node.meta["dynamic"]:
            return node.meta["value"]
        return ConcreteProxy(placeholder.node, self, value, other)

    def _value(self, node: Node, grown: bool) -> Any:
        if "value" in node.meta:
            return node.meta["other" if grown else "value"]
        return self._tensors(node.meta["shape"], node.meta["dynamic"], node.meta["dtype"], grown)

    def _tensors(self, shape: Any, dynamic: Any, dtype: Any, grown: bool) -> Any:
        if isinstance(shape, list):
            return tuple(self._tensors(s, d, t, grown) for s, d, t in zip(shape, dynamic, dtype, strict=True))
        if not isinstance(shape, tuple):
            raise CannotInline("an argument is neither tensor nor number")
        sizes = [s * (self.at + 1) // self.at if d and grown else s for s, d in zip(shape, dynamic, strict=True)]
        return self._faked(torch.empty(sizes, dtype=dtype))

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        changes = kind == "call_method" and str(target).endswith("_") and not str(target).startswith("__")
        if changes and issubclass(type(args[0]), ConcreteProxy):
            return self._changed(str(target), args, kwargs)
        made = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if issubclass(type(made), ConcreteProxy) and args and issubclass(type(args[0]), ConcreteProxy):
            name = str(getattr(target, "__name__", target))
            if name == "getitem" or name in _RESHAPES:
                self.views[id(made)] = (args[0], args[1] if name == "getitem" else _RESHAPES)
                self._keep.append(made)
        return made

    @property
    def _keep(self) -> list[Any]:
        kept: list[Any] = self.__dict__.setdefault("_kept", [])
        return kept

    def _changed(self, method: str, args: Any, kwargs: Any) -> Any:
        """The object stands for the changed tensor from here on, and so does the one it is a slice of."""
        x: ConcreteProxy = args[0]
        if method == "zero_":
            new = super().create_proxy("call_function", torch.zeros_like, (x,), {})
        elif hasattr(Tensor, method[:-1]):
            new = super().create_proxy("call_method", method[:-1], args, kwargs)
        else:
            raise CannotInline(f"it changes a tensor in place with {method}")
        x.node = new.node
        view = x
        while id(view) in self.views:
            base, index = self.views[id(view)]
            if index is _RESHAPES:
                base.node = super().create_proxy("call_method", "view_as", (view, base), {}).node
            else:
                base.node = super().create_proxy("call_function", set_item, (base, index, view), {}).node
            view = base
        return x


def inline(gm: GraphModule, node: Node, fn: Callable[..., Any] | None, batch: int) -> list[Node]:
    """Trace what ``node`` calls with the shapes of its inputs, and put that graph in its place.

    Args:
        node: a call of a module (``fn`` is ``None``) or of the Python function ``fn``; its inputs' shapes are known.
        batch: the example's batch size, by which batch-dependent sizes are scaled to a second one.

    Returns:
        The new nodes; their shapes are not known yet.

    Raises:
        CannotInline: with the reason; the graph is unchanged.
    """
    target = module_of(gm, node) if fn is None else fn
    inputs = list(node.all_input_nodes)
    root = _Call(node, target)
    tracer = _Tracer(inputs, batch)
    try:
        with torch.no_grad():
            graph = tracer.trace(root.eval())
    except Exception as e:
        raise CannotInline(f"{getattr(target, '__name__', type(target).__name__)} cannot be traced: {e}") from e
    if tracer.batch_places:
        raise CannotInline("it computes with the batch size in Python")
    calls = [n for n in graph.nodes if n.op.startswith("call")]
    if any(n.target is target or n.op == "call_module" and root.get_submodule(str(n.target)) is target for n in calls):
        raise CannotInline("tracing gives the same call again")
    if not _same(gm, root, graph, inputs):
        raise CannotInline("its trace does not compute the same")
    return _splice(gm, node, root, graph, inputs)


def _same(gm: GraphModule, root: nn.Module, graph: Any, inputs: list[Node]) -> bool:
    """Does the traced graph give what the call gives, on random inputs?"""
    generator = torch.Generator().manual_seed(0)
    values = [_random(gm, n, generator) for n in inputs]
    with torch.no_grad():
        want = root(*(_copied(v) for v in values))
        got = GraphModule(root, graph)(*(_copied(v) for v in values))
    return distance(want, got) < _NEAR


def _copied(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def _random(gm: GraphModule, node: Node, generator: torch.Generator) -> Any:
    """A value like the node's: its own when it is constant, noise for floats, zeros otherwise."""
    if node.op == "get_attr":
        return attr(gm, node)
    if "value" in node.meta:
        return node.meta["value"]

    def one(shape: Any, dtype: Any) -> Any:
        if isinstance(shape, list):
            return tuple(one(s, d) for s, d in zip(shape, dtype, strict=True))
        return torch.randn(shape, generator=generator, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)

    return one(node.meta["shape"], node.meta["dtype"])


def _splice(gm: GraphModule, node: Node, root: nn.Module, graph: Any, inputs: list[Node]) -> list[Node]:
    prefix = str(node.target) if node.op == "call_module" else ""
    table: dict[Node, Any] = {}
    waiting = list(inputs)
    made: list[Node] = []
    result: Any = None
    for old in graph.nodes:
        if old.op == "placeholder":
            table[old] = waiting.pop(0)
            continue
        if old.op == "output":
            result = map_aggregate(old.args[0], lambda n: table[n] if isinstance(n, Node) else n)
            continue
        with gm.graph.inserting_before(node):
            new = gm.graph.node_copy(old, lambda n: table[n])
        _retarget(gm, node, new, root, prefix)
        if "nn_module_stack" in node.meta:
            new.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        table[old] = new
        made.append(new)
    _replace(gm, node, result)
    return made


def _retarget(gm: GraphModule, node: Node, new: Node, root: nn.Module, prefix: str) -> None:
    """Paths of the traced holder as paths of ``gm``; tensors that tracing made become buffers."""
    path = str(new.target)
    if new.op == "call_module" or new.op == "get_attr" and path.startswith("inner."):
        new.target = f"{prefix}.{path.removeprefix('inner.')}"
    elif new.op == "get_attr":
        new.target = add_tensor(gm, scope_name(node, "constant"), getattr(root, path))


def _replace(gm: GraphModule, node: Node, result: Any) -> None:
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    elif isinstance(result, (tuple, list)):
        for user in list(node.users):
            if getattr(user.target, "__name__", "") == "getitem" and user.args[0] is node and isinstance(user.args[1], int):
                part = result[user.args[1]]
                if isinstance(part, Node):
                    user.replace_all_uses_with(part)
                    gm.graph.erase_node(user)
    if node.users:
        replacement = result if not isinstance(result, Node) else None
        for user in list(node.users):
            user.args = map_aggregate(user.args, lambda n: replacement if n is node else n)
            user.kwargs = map_aggregate(user.kwargs, lambda n: replacement if n is node else n)
    gm.graph.erase_node(node)


def wants_inline(gm: GraphModule, node: Node) -> Callable[..., Any] | nn.Module | None:
    """The Python function or the opaque module that a node calls, if it may be looked into."""
    if node.op == "call_module":
        module = module_of(gm, node)
        return None if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else module
    target: Any = node.target
    is_python = node.op == "call_function" and hasattr(target, "__code__") and not getattr(target, "__module__", "").startswith(("torch.", "_operator"))
    return target if is_python and target is not set_item and all(is_tensor(n) or "shape" in n.meta for n in node.all_input_nodes) else None
