"""Which channels of a canonical graph belong together: labels on the places of every dimension that can be cut.

Each dimension of each value has an array of labels, one for each of its places, or ``None`` when nothing can be cut from it (batch, space, inputs).
A layer gives its output channels new labels; what only moves channels hands labels on; an addition ties the labels of its sides. After one walk over
the graph tied labels are one *unit*: what must be cut together, as in the dependency graph of Fang et al. 2023 (arXiv 2301.12900), here by single channels.
The walk is linear in the nodes and the channels. :mod:`fxq.channel_rules` has a rule for each kind of operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.graph import kind

Labels = np.ndarray[Any, Any]
"""int64 ``[n]``: the label of each place of a dimension."""
Dims = list[Labels | None]
"""One entry for each dimension of a tensor."""

LARGEST = 1 << 20
"""A dimension with more places is never cut."""


@dataclass(frozen=True)
class Pin:
    """Labels that must stay, and why."""

    labels: Labels
    node: Node
    why: str


@dataclass(frozen=True)
class Cells:
    """``groups`` equal parts of a dimension, each of which must keep the same number of places (a grouped convolution, a group norm)."""

    labels: Labels
    groups: int
    node: Node
    role: str


@dataclass(frozen=True)
class Giver:
    """A layer that gives channels their labels: the rows of its weight are what a cut saves.

    Attributes:
        node: conv, transposed conv, linear or embedding.
        labels: of its output channels.
    """

    node: Node
    labels: Labels


@dataclass
class Channels:
    """Labels of a whole graph, and what is known about them.

    Attributes:
        gm: canonical, with shapes.
        dims: node -> labels of its dimensions; of a tuple-valued node a list of such lists.
        ties: pairs of arrays whose labels are one, place by place.
        pins, cells, givers: see the classes.
        count: labels so far.
    """

    gm: GraphModule
    dims: dict[Node, Any] = field(default_factory=dict)
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    cells: list[Cells] = field(default_factory=list)
    givers: list[Giver] = field(default_factory=list)
    count: int = 0
    _weights: dict[tuple[int, int], Labels] = field(default_factory=dict)
    _tensors: list[Tensor] = field(default_factory=list)

    def of(self, node: Node) -> Dims:
        """Labels of a tensor's dimensions."""
        found: Dims = self.dims[node]
        return found

    def new(self, size: int) -> Labels | None:
        """New labels for a dimension; ``None`` for one of a single place, which cannot be cut."""
        if not 1 < size <= LARGEST:
            return None
        self.count += size
        return np.arange(self.count - size, self.count)

    def tie(self, a: Labels, b: Labels) -> None:
        """Place by place, what is cut from one is cut from the other."""
        if a is not b:
            self.ties.append((a, b))

    def pin(self, labels: Labels | None, node: Node, why: str) -> None:
        """These places stay."""
        if labels is not None:
            self.pins.append(Pin(labels, node, why))

    def join(self, parts: Iterable[Labels | None], node: Node, why: str) -> Labels | None:
        """Dimensions of one length that are one: tied, or pinned where one of them is fixed."""
        all_parts = list(parts)
        live = [p for p in all_parts if p is not None]
        if len(live) < len(all_parts):
            for p in live:
                self.pin(p, node, why)
            return None
        for p in live[1:]:
            self.tie(live[0], p)
        return live[0] if live else None

    def weight(self, tensor: Tensor, dim: int, labels: Labels | None) -> None:
        """Dimension ``dim`` of a weight has these labels; layers that share the weight are cut alike."""
        if labels is None:
            return
        key = (id(tensor), dim)
        if key in self._weights:
            self.tie(self._weights[key], labels)
        self._weights[key] = labels
        self._tensors.append(tensor)  # alive as long as its id is a key

    def pinned_inputs(self, node: Node, why: str) -> None:
        """Everything that the node reads stays as it is."""
        for n in node.all_input_nodes:
            for labels in flat_dims(self.dims.get(n)):
                self.pin(labels, node, why)

    def units(self) -> Labels:
        """Unit of each label, int64 ``[count]``: connected components, numbered in the order of their first labels."""
        parent = list(range(self.count))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        seen: set[tuple[int, int]] = set()
        for a, b in self.ties:
            if (id(a), id(b)) in seen:
                continue
            seen.add((id(a), id(b)))
            for i, j in zip(a.tolist(), b.tolist(), strict=True):
                p, q = root(i), root(j)
                if p != q:
                    parent[max(p, q)] = min(p, q)
        found = np.fromiter((root(i) for i in range(self.count)), np.int64, self.count)
        return np.unique(found, return_inverse=True)[1].astype(np.int64)


Rule = Callable[[Channels, Node], None]


def flat_dims(dims: Any) -> list[Labels]:
    """All label arrays of a value."""
    if dims is None:
        return []
    if isinstance(dims, np.ndarray):
        return [dims]
    return [labels for d in dims for labels in flat_dims(d)]


def fixed(shape: Any) -> Any:
    """Nothing can be cut from a value of this shape (a list of shapes for a tuple)."""
    if isinstance(shape, dict):
        return [fixed(s) for s in shape.values()]
    if isinstance(shape, list):
        return [fixed(s) for s in shape]
    return [None] * len(shape) if shape is not None else []


def label(gm: GraphModule, rules: dict[str, Rule]) -> Channels:
    """Walk the graph once and label it.

    Args:
        gm: canonical, with shapes.
        rules: kind of node -> rule. A rule reads ``channels.of(input)`` and sets ``channels.dims[node]``.
    """
    channels = Channels(gm)
    for node in gm.graph.nodes:
        rule = rules.get(kind(gm, node))
        if node.op == "output":
            channels.pinned_inputs(node, "is an output of the model")
            channels.dims[node] = []
        elif node.op == "placeholder" or ("value" in node.meta and node.meta.get("shape") is None):
            channels.dims[node] = fixed(node.meta.get("shape"))
        elif rule is None:
            what = getattr(node.target, "__name__", str(node.target))
            channels.pinned_inputs(node, f"goes into {what}, which may mix or move its channels")
            channels.dims[node] = fixed(node.meta.get("shape"))
        else:
            rule(channels, node)
            _batch(channels, node)
    return channels


def _batch(channels: Channels, node: Node) -> None:
    """A dimension that follows the batch is no dimension of channels."""
    dims, dynamic = channels.dims[node], node.meta.get("dynamic")
    if not isinstance(node.meta.get("shape"), tuple) or not any(dynamic or ()):
        return
    for i, moves in enumerate(dynamic or ()):
        if moves and dims[i] is not None:
            channels.pin(dims[i], node, "is mixed with the batch")
            dims = [*dims[:i], None, *dims[i + 1 :]]
    channels.dims[node] = dims


def replaced(dims: Sequence[Labels | None], at: int, labels: Labels | None) -> Dims:
    """A copy with another entry at ``at``."""
    out = list(dims)
    out[at] = labels
    return out


def is_depthwise(module: Any) -> bool:
    """One group for each input channel."""
    return bool(getattr(module, "groups", 1) > 1 and module.groups == module.in_channels)


def channel_dim(module: Any, rank: int) -> int:
    """The dimension of channels of a value of ``rank`` dimensions that a convolution, linear layer or embedding reads or gives."""
    return rank - 1 - len(getattr(module, "kernel_size", ()))


def layer_labels(channels: Channels, node: Node, module: Any) -> tuple[Labels | None, Labels | None]:
    """Labels of the input and of the output channels of a weighted layer; an embedding has no input channels."""
    given = channels.of(node)
    if not hasattr(module, "weight") or hasattr(module, "embedding_dim"):
        return None, given[-1]
    read = channels.of(node.all_input_nodes[0])
    return read[channel_dim(module, len(read))], given[channel_dim(module, len(given))]
