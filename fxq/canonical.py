"""How a form of ``canonicalize`` looks at a node and writes what replaces it.

A form is a function of :class:`At`. It replaces the node or raises :class:`NoForm` with the reason; what it has already
inserted when it raises is taken out again. Arguments are read by position and name, with numbers that are computed in the
graph (``size()`` arithmetic) as plain numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from fxq import modules as m
from fxq.graph import add_module, attr, copy_shape, infer_node, scope_name, shape
from fxq.shapes import plain


class NoForm(Exception):
    """The operation has no canonical form here; the message says why."""


_MISSING: Any = object()


class At:
    """One node of the graph, seen by a form.

    Attributes:
        gm, node: the graph and the node that is looked at.
        made: nodes inserted so far, in order.
    """

    def __init__(self, gm: GraphModule, node: Node) -> None:
        self.gm, self.node = gm, node
        self.made: list[Node] = []

    def arg(self, i: int, name: str, default: Any = _MISSING) -> Any:
        """Argument ``i`` or ``name``; numbers computed in the graph as numbers.

        Raises:
            NoForm: when it is missing without a default, or follows the batch.
        """
        if name in self.node.kwargs:
            return known(self.node.kwargs[name])
        if i < len(self.node.args):
            return known(self.node.args[i])
        if default is _MISSING:
            raise NoForm(f"without {name}")
        return default

    def tensor(self, i: int = 0, name: str = "input") -> Node:
        """Tensor argument ``i`` or ``name``.

        Raises:
            NoForm: when it is anything else.
        """
        x = self.node.kwargs.get(name, self.node.args[i] if i < len(self.node.args) else None)
        if not is_tensor(x):
            raise NoForm(f"{name} is no tensor")
        return x  # type: ignore[return-value]

    def rest(self, i: int, name: str) -> Any:
        """Numbers given as one sequence or as the arguments from ``i`` on: ``permute(0, 2, 1)``, ``permute((0, 2, 1))``."""
        if name in self.node.kwargs:
            return known(self.node.kwargs[name])
        found = known(self.node.args[i:])
        return list(found[0]) if len(found) == 1 and isinstance(found[0], (tuple, list)) else list(found)

    def const(self, i: int, name: str) -> Tensor | None:
        """Constant tensor (a parameter stays one) of an argument; ``None`` when it is not given.

        Raises:
            NoForm: when it is computed from an input.
        """
        x = self.arg(i, name, None)
        return None if x is None else self.value(x, name)

    def value(self, x: Any, name: str = "operand") -> Tensor:
        """Tensor behind a ``get_attr`` node.

        Raises:
            NoForm: when ``x`` is none.
        """
        if not isinstance(x, Node) or x.op != "get_attr":
            raise NoForm(f"{name} is not constant")
        held = attr(self.gm, x)
        if not isinstance(held, Tensor):
            raise NoForm(f"{name} is no tensor")
        return held

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the node's value.

        Raises:
            NoForm: when the node gives no tensor.
        """
        if not is_tensor(self.node):
            raise NoForm("gives no tensor")
        return shape(self.node)

    def new(self, suffix: str, module: nn.Module, *args: Any, like: Node | None = None) -> Node:
        """Insert a call of ``module`` before the node; its shape comes from ``like`` or is computed."""
        path = add_module(self.gm, scope_name(self.node, suffix), module)
        with self.gm.graph.inserting_before(self.node):
            node = self.gm.graph.call_module(path, args)
        self.made.append(node)
        if like is not None:
            copy_shape(like, node)
        else:
            infer_node(self.gm, node)
        if "nn_module_stack" in self.node.meta:
            node.meta["nn_module_stack"] = self.node.meta["nn_module_stack"]
        return node

    def put(self, suffix: str, module: nn.Module, *args: Any) -> None:
        """Replace the node by a call of ``module``, whose value has the node's shape."""
        self.become(self.new(suffix, module, *args, like=self.node))

    def become(self, other: Node) -> None:
        """Let the node's users read ``other`` and take the node out."""
        self.node.replace_all_uses_with(other)
        self.gm.graph.erase_node(self.node)

    def constant(self, name: str, value: Tensor) -> Node:
        """``get_attr`` node of a new buffer (of a parameter, when ``value`` is one)."""
        path = add_tensor(self.gm, scope_name(self.node, name), value)
        with self.gm.graph.inserting_before(self.node):
            node = self.gm.graph.get_attr(path)
        self.made.append(node)
        node.meta.update(shape=tuple(value.shape), dynamic=(False,) * value.ndim, dtype=value.dtype)
        return node

    def part(self, split: Node, i: int) -> Node:
        """``getitem`` node of part ``i`` of a split."""
        with self.gm.graph.inserting_before(self.node):
            node = self.gm.graph.call_function(operator.getitem, (split, i))
        self.made.append(node)
        node.meta.update({k: split.meta[k][i] for k in ("shape", "dynamic", "dtype")})
        return node

    def reshaped(self, x: Node, sizes: Sequence[int | None], suffix: str = "reshape") -> Node:
        """Insert a reshape of ``x``; ``None`` copies a size of ``x``, one ``-1`` is computed."""
        return self.new(suffix, m.Reshape(sizes), x)

    def parts(self) -> dict[int, list[Node]]:
        """``getitem`` users of a tuple-valued node by index.

        Raises:
            NoForm: when the tuple is read in another way.
        """
        found: dict[int, list[Node]] = {}
        for user in self.node.users:
            if user.target is not operator.getitem or user.args[0] is not self.node or not isinstance(user.args[1], int):
                raise NoForm("its tuple is read as a whole")
            n = len(self.node.meta["shape"])
            found.setdefault(user.args[1] % n, []).append(user)
        return found

    def become_parts(self, values: Sequence[Node | None]) -> None:
        """Let the ``getitem`` users read ``values`` and take them and the node out."""
        for i, users in self.parts().items():
            value = values[i]
            if value is None:
                raise NoForm(f"its result {i} is used")
            for user in users:
                user.replace_all_uses_with(value)
                self.gm.graph.erase_node(user)
        self.gm.graph.erase_node(self.node)

    def undo(self) -> None:
        """Take out what was inserted."""
        for node in reversed(self.made):
            if not node.users:
                self.gm.graph.erase_node(node)


Form = Callable[[At], None]


def add_tensor(gm: GraphModule, wish: str, value: Tensor) -> str:
    """Register a buffer (a parameter, when ``value`` is one) under a free path near ``wish`` and return that path."""
    name = free_name(gm, wish.replace(".", "_"))
    if isinstance(value, nn.Parameter):
        gm.register_parameter(name, value)
    else:
        gm.register_buffer(name, value)
    return name


def free_name(gm: GraphModule, wish: str) -> str:
    """``wish``, or ``wish_1``, ...: a name that no attribute of ``gm`` has."""
    name, n = wish, 0
    while hasattr(gm, name):
        n += 1
        name = f"{wish}_{n}"
    return name


def is_tensor(a: Any) -> bool:
    """Is ``a`` a node whose value is one tensor?"""
    return isinstance(a, Node) and isinstance(a.meta.get("shape"), tuple)


def is_number(a: Any) -> bool:
    """A Python number, no bool."""
    return isinstance(a, (int, float)) and not isinstance(a, bool)


def known(a: Any) -> Any:
    """``a`` with the numbers that nodes compute put in; tensor nodes stay.

    Raises:
        NoForm: for a number that follows the batch.
    """

    def one(n: Any) -> Any:
        if not isinstance(n, Node) or "value" not in n.meta:
            return n
        if n.meta["dynamic"]:
            raise NoForm("a number in its arguments follows the batch")
        return n.meta["value"]

    return plain(map_aggregate(a, one))


def name_of(node: Node) -> str:
    """Name of the operation of a ``call_function`` or ``call_method`` node, without overload and underscores."""
    if node.op == "call_method":
        return str(node.target).strip("_")
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(target, "__name__", str(target))
    return str(name).strip("_")


def is_aten(node: Node) -> bool:
    """Is it an operation of ``torch.ops.aten`` (whose argument order may differ from ``torch.nn.functional``'s)?"""
    return isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))


def target_sizes(x: Node, to: Node) -> list[int | None]:
    """``Reshape`` sizes from ``x`` to the known shape of ``to``: ``-1`` or ``None`` where it follows the batch.

    Raises:
        NoForm: when two batch-dependent sizes would have to be computed.
    """
    target, dynamic = shape(to), to.meta["dynamic"]
    source, moving = shape(x), x.meta["dynamic"]
    if sum(dynamic) <= 1:
        return [-1 if d else s for s, d in zip(target, dynamic, strict=True)]
    sizes: list[int | None] = []
    for i, (s, d) in enumerate(zip(target, dynamic, strict=True)):
        kept = d and i < len(source) and moving[i] and source[i] == s
        sizes.append(None if kept else -1 if d else s)
    if sizes.count(-1) > 1:
        raise NoForm("several sizes follow the batch")
    return sizes


def parameter(value: Tensor) -> nn.Parameter:
    """``value`` as a parameter: itself when it is one."""
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value)


def to_reshape(at: At, x: Node) -> None:
    """Replace the node by a reshape of ``x`` to the node's shape."""
    if not is_tensor(at.node) or at.node.meta["dtype"] != x.meta["dtype"]:
        raise NoForm("gives no tensor of the same type")
    if shape(at.node) == shape(x) and at.node.meta["dynamic"] == x.meta["dynamic"]:
        at.become(x)
        return
    at.put("reshape", m.Reshape(target_sizes(x, at.node)), x)
