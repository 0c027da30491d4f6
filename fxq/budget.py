"""What a choice of units would cost, from the labels alone: MACs, parameters, bytes. Nothing is cut for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from fxq.channels import Labels, channel_dim, is_depthwise, layer_labels
from fxq.graph import attr, kind, module_of, shape
from fxq.groups import Groups

COSTS = ("macs", "parameters", "bytes")
"""Budgets."""


@dataclass
class Budget:
    """Cost of a graph as a function of the units that stay.

    Attributes:
        terms: ``(amount, numbers of dimensions)``: the amount shrinks with the share of each dimension that stays.
        dims: units of each dimension.
    """

    count: int
    terms: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    dims: list[Labels] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _arrays: list[Labels] = field(default_factory=list)

    def add(self, amount: float, g: Groups, *labels: Labels | None) -> None:
        """A term that shrinks with these dimensions."""
        found = []
        for array in labels:
            if array is None:
                continue
            if id(array) not in self._numbers:
                self._numbers[id(array)] = len(self.dims)
                self.dims.append(g.unit[array])
                self._arrays.append(array)
            found.append(self._numbers[id(array)])
        if amount:
            self.terms.append((amount, tuple(found)))

    def cost(self, keep: Labels) -> float:
        """Cost when the units ``keep`` (bool ``[count]``) stay."""
        shares = [float(keep[d].mean()) for d in self.dims]
        return sum(amount * math.prod(shares[i] for i in dims) for amount, dims in self.terms)


def budget(g: Groups, what: str, bits: Callable[[Node], int] | None = None) -> Budget:
    """The costs of a graph.

    Args:
        what: one of :data:`COSTS`; MACs are those of the example batch.
        bits: of a layer's weight, for ``bytes`` (default 32; all other parameters have 32).
    """
    gm, out, seen = g.channels.gm, Budget(g.count), set[int]()
    for node in gm.graph.nodes:
        k = kind(gm, node)
        module: Any = module_of(gm, node) if node.op == "call_module" else None
        own = {id(t) for t in (module.parameters() if module is not None else [attr(gm, node)] if k == "attr" else [])}
        if what != "macs" and own and own <= seen:
            continue  # shared weights are kept once
        seen |= own
        if k in ("conv", "conv_transpose", "linear", "embedding"):
            _layer(out, g, node, k, module, what, bits(node) if bits is not None else 32)
        elif k == "matmul" and what == "macs":
            a = node.all_input_nodes[0]
            out.add(math.prod(shape(node)) * shape(a)[-1], g, *g.channels.of(node), g.channels.of(a)[-1])
        elif what != "macs" and k == "attr":
            t = attr(gm, node)
            out.add(t.numel() * (4 if what == "bytes" else 1) * isinstance(t, nn.Parameter), g, *g.channels.of(node))
        elif what != "macs" and module is not None:
            n = sum(p.numel() for p in module.parameters())
            dims = g.channels.of(node) if n else []
            labels = [d for d in dims[-len(module.normalized_shape) :]] if k == "layer_norm" else dims[1:2] if n > 1 else []
            out.add(n * (4 if what == "bytes" else 1), g, *labels)
    return out


def _layer(out: Budget, g: Groups, node: Node, k: str, module: Any, what: str, bits: int) -> None:
    read, given = layer_labels(g.channels, node, module)
    if is_depthwise(module):
        read = None
    placed = shape(node.all_input_nodes[0] if k == "conv_transpose" else node)
    places = 0 if k == "embedding" else math.prod(placed) // placed[channel_dim(module, len(placed))]
    n = module.weight.numel()
    out.add({"macs": n * places, "parameters": n, "bytes": n * bits / 8}[what], g, given, read)
    if what != "macs" and getattr(module, "bias", None) is not None:
        out.add(module.bias.numel() * (4 if what == "bytes" else 1), g, given)


def share(b: Budget, keep: Labels) -> float:
    """Cost of ``keep`` by the cost of everything."""
    return b.cost(keep) / max(b.cost(np.ones(b.count, bool)), 1e-300)
