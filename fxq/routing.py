"""Where channels come from: what concatenations, gathers, splits and slices on axis 1 hand on, as lists of (value, channel)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.graph import data_inputs, kind, module_of, shape

Channel = tuple[Node, int]
"""A value (a node that is no routing) and its channel, in the order of the graph before any rewrite."""

POINTWISE = (
    "relu", "clamp", "leaky_relu", "elu", "selu", "sigmoid", "hardsigmoid", "hardswish", "silu", "mish", "tanh", "gelu", "softplus",
    "unary", "power", "prelu", "batch_norm", "global_avg_pool", "resize",
)  # fmt: skip
POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")


class Routes:
    """Channel lists of all routing nodes of a graph, and what each other node does with an order of channels.

    Attributes:
        nodes: the graph's nodes, in order; position: their places.
        lists: routing node -> its channels (for a split, those of its input).
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.lists: dict[Node, list[Channel]] = {}
        self._gathers: dict[Node, frozenset[Node]] = {}
        self._roles: dict[Node, str] = {}
        for node in self.nodes:
            found = self._route(node)
            if found is not None:
                self.lists[node] = found
                own = {node} if kind(gm, node) == "index_select" else set()
                self._gathers[node] = frozenset(own).union(*(self._gathers.get(i, frozenset()) for i in data_inputs(node)))

    def routes(self, node: Node) -> bool:
        """Does ``node`` only route channels?"""
        return node in self.lists

    def gathers(self, node: Node) -> frozenset[Node]:
        """Gathers between ``node`` and the values that its channels come from."""
        return self._gathers.get(node, frozenset())

    def width(self, node: Node) -> int:
        """Number of channels of a value: its size on axis 1; 0 when it has no such axis of fixed size."""
        sizes, dynamic = node.meta.get("shape"), node.meta.get("dynamic")
        return sizes[1] if isinstance(sizes, tuple) and len(sizes) > 1 and dynamic is not None and not dynamic[1] else 0

    def listing(self, node: Node) -> list[Channel]:
        """The channels of any node."""
        return self.lists.get(node) or [(node, c) for c in range(self.width(node))]

    def root(self, channel: Channel) -> Channel:
        """The channel that this one is made of alone: through depthwise convs and pointwise functions."""
        value, c = channel
        while not self.routes(value) and self.role(value) == "passes":
            value, c = self.listing(data_inputs(value)[0])[c // self.multiplier(value)]
        return value, c

    def _route(self, node: Node) -> list[Channel] | None:
        k = kind(self.gm, node)
        if k == "getitem":
            split = node.args[0]
            if not isinstance(split, Node) or split not in self.lists or not isinstance(node.args[1], int):
                return None
            sizes: Any = module_of(self.gm, split).sizes
            start = sum(sizes[: node.args[1]])
            return self.lists[split][start : start + sizes[node.args[1]]]
        inputs = data_inputs(node)
        if k not in ("cat", "index_select", "split", "slice") or any(not self.width(i) for i in inputs):
            return None
        module: Any = module_of(self.gm, node)
        if k == "slice":
            if any(dim != 1 for dim, *_ in module.slices) or len(module.slices) != 1:
                return None
            _, start, stop, step = module.slices[0]
            return self.listing(inputs[0])[start:stop:step]
        if module.dim != 1 or len(inputs) != len(node.args):
            return None
        if k == "cat":
            return [c for i in inputs for c in self.listing(i)]
        source = self.listing(inputs[0])
        return source if k == "split" else [source[i] for i in module.indices.tolist()]

    def role(self, node: Node) -> str:
        """``absorbs`` any order into its weights, ``passes`` it on, or the order is ``fixed``."""
        if node not in self._roles:
            self._roles[node] = self._role(node)
        return self._roles[node]

    def _role(self, node: Node) -> str:
        inputs, k = data_inputs(node), kind(self.gm, node)
        if node.op != "call_module" or len(inputs) != 1 or not self.width(inputs[0]) or not self.width(node):
            return "fixed"
        x, module = inputs[0], module_of(self.gm, node)
        if k in ("conv", "conv_transpose", "linear"):
            return self._weighted_role(node, module, len(shape(x)))
        if k in POINTWISE:
            return "passes"
        if k in POOLS:
            return "passes" if len(shape(x)) == int(type(module).__name__[-2]) + 2 else "fixed"
        return "passes" if self._keeps_channels(node, x, k, module) else "fixed"

    def _weighted_role(self, node: Node, module: Any, rank: int) -> str:
        if rank != module.weight.ndim or module._forward_hooks or module._forward_pre_hooks:
            return "fixed"
        groups = getattr(module, "groups", 1)
        if kind(self.gm, node) == "conv" and groups > 1 and groups == module.in_channels:
            return "passes"
        return "fixed" if groups > 1 and kind(self.gm, node) == "conv_transpose" else "absorbs"

    @staticmethod
    def _keeps_channels(node: Node, x: Node, k: str, module: Any) -> bool:
        """Operations on other axes than 0 and 1, and arithmetic with a scalar."""
        if k in ("add", "sub", "mul", "div"):
            return len(node.args) == 2
        if k == "reshape":
            return shape(node)[:2] == shape(x)[:2] and node.meta["dynamic"][:2] == x.meta["dynamic"][:2]
        if k == "pad":
            return len(module.pads) <= 2 * (len(shape(x)) - 2)
        if k == "slice":
            return all(dim > 1 for dim, *_ in module.slices)
        return k in ("mean", "sum") and all(dim > 1 for dim in module.dims)

    def groups(self, node: Node) -> int:
        """Blocks of input channels that stay apart (1 where any order will do)."""
        return int(getattr(module_of(self.gm, node), "groups", 1)) if self.role(node) == "absorbs" else 1

    def multiplier(self, node: Node) -> int:
        """Output channels for each input channel of a node that passes an order on."""
        return self.width(node) // self.width(data_inputs(node)[0])

    def reorders(self, node: Node) -> bool:
        """Can it give its output channels in any order?"""
        return not self.routes(node) and self.role(node) == "absorbs" and kind(self.gm, node) == "conv" and self.groups(node) == 1

    def free(self, banned: set[Node]) -> set[Node]:
        """Nodes whose channels may come in any order: all that read them absorb an order, or pass it on to such nodes."""
        out: set[Node] = set()
        for node in reversed(self.nodes):
            if all(self._accepts(u, out, banned) for u in node.users):
                out.add(node)
        return out

    def _accepts(self, user: Node, free: set[Node], banned: set[Node]) -> bool:
        if self.routes(user):
            return user in free
        role = self.role(user)
        return user not in banned and (role == "absorbs" or (role == "passes" and user in free))


def permuted(module: nn.Module, read: list[int] | None, order: list[int] | None) -> nn.Module | None:
    """The module for inputs in the order ``read`` and outputs in the order ``order`` (channel at each place); ``None``: no change.

    ``module`` is not changed; parameters that need no other order are shared with it.
    """
    old: Any = module
    new: dict[str, Tensor | None] = {}
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        w, groups = old.weight.detach(), getattr(old, "groups", 1)
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            w = w if read is None else w[read]
        elif read is not None and (groups == 1 or groups != old.in_channels):
            size = len(read) // groups
            local = torch.tensor(read, device=w.device).reshape(groups, size) - size * torch.arange(groups, device=w.device)[:, None]
            w = torch.cat([part[:, i] for part, i in zip(w.chunk(groups), local, strict=True)])
        new["weight"] = w if order is None else w[order]
        new["bias"] = old.bias if old.bias is None or order is None else old.bias.detach()[order]
    elif order is not None:
        tensors = {**module._parameters, **module._buffers}
        new = {k: t.detach()[order] for k, t in tensors.items() if t is not None and t.ndim == 1 and t.numel() == len(order)}
    changed = {k: t for k, t in new.items() if t is not getattr(old, k) and not (t is not None and torch.equal(t, getattr(old, k)))}
    if not changed:
        return None
    out: Any = copy.copy(module)
    out._parameters, out._buffers = dict(module._parameters), dict(module._buffers)
    for name, value in changed.items():
        setattr(out, name, nn.Parameter(value) if name in out._parameters and value is not None else value)
    return out  # type: ignore[no-any-return]
