"""What each layer costs: multiply-accumulates, parameters, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxq.graph import attr, data_inputs, float_module, kind, shape

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCost:
    """Cost of one node of a canonical graph.

    Attributes:
        path: module path; for a parameter that the graph reads itself, its name.
        kind: canonical kind (``conv``, ``linear``, ``matmul``, ``attr``, ...).
        inputs: channels in; of a matmul the inner size.
        outputs: channels out; of a matmul the columns.
        groups: groups of a convolution, otherwise 1.
        macs: multiply-accumulates of one sample; those of norms, activations and pools are not counted.
        parameters: number of parameters; one that several nodes share counts at the first of them.
        bytes: their size in the given bits.
    """

    path: str
    kind: str
    inputs: int
    outputs: int
    groups: int
    macs: int
    parameters: int
    bytes: int


def layer_costs(gm: GraphModule, bits: Callable[[Node], int] | None = None) -> list[LayerCost]:
    """The costs of all nodes that have parameters or multiply-accumulates, in the order of the graph.

    Convolutions, transposed convolutions, linear layers and matrix products count. Opaque nodes count with their parameters only. What counts is the graph:
    a parameter that ``canonicalize`` expanded (Swin's position tables, ViT's class token) counts as large as it is there, auxiliary heads that only
    run in training do not count.

    Args:
        gm: a canonical graph with shapes in ``node.meta``; it may be quantized.
        bits: bits of a parameter of the node; None for 32.

    Returns:
        One entry for each such node.
    """
    batch, seen, costs = _batch(gm), set[int](), []
    for node in gm.graph.nodes:
        parameters = sum(p.numel() for p in _parameters(gm, node) if id(p) not in seen)
        seen.update(map(id, _parameters(gm, node)))
        macs = _macs(gm, node, batch)
        if parameters or macs:
            size = math.ceil(parameters * (bits(node) if bits else FLOAT_BITS) / 8)
            costs.append(LayerCost(str(node.target), kind(gm, node), *_channels(gm, node), macs, parameters, size))
    return costs


def total(costs: list[LayerCost]) -> LayerCost:
    """The sum of ``macs``, ``parameters`` and ``bytes``; its path is ``total``, its other fields are empty."""
    return LayerCost("total", "", 0, 0, 1, sum(c.macs for c in costs), sum(c.parameters for c in costs), sum(c.bytes for c in costs))


def _batch(gm: GraphModule) -> int:
    """Samples in the example: the first size of the first input that has one which follows the batch."""
    for node in gm.graph.nodes:
        sizes = node.meta.get("shape")
        if node.op == "placeholder" and isinstance(sizes, tuple) and sizes and node.meta["dynamic"][0]:
            return max(1, int(sizes[0]))
    return 1


def _parameters(gm: GraphModule, node: Node) -> Iterator[nn.Parameter]:
    if node.op == "call_module":
        yield from float_module(gm, node).parameters()
    elif node.op == "get_attr" and isinstance(value := attr(gm, node), nn.Parameter):
        yield value


def _macs(gm: GraphModule, node: Node, batch: int) -> int:
    k = kind(gm, node)
    if k == "matmul":
        return math.prod(shape(node)) * shape(data_inputs(node)[0])[-1] // batch
    if k not in ("conv", "conv_transpose", "linear"):
        return 0
    module: Any = float_module(gm, node)
    if k == "linear":
        return math.prod(shape(node)) * int(module.in_features) // batch
    kernel = int(math.prod(module.kernel_size))
    if k == "conv_transpose":
        return math.prod(shape(data_inputs(node)[0])) * int(module.out_channels) // int(module.groups) * kernel // batch
    return math.prod(shape(node)) * int(module.in_channels) // int(module.groups) * kernel // batch


def _channels(gm: GraphModule, node: Node) -> tuple[int, int, int]:
    k = kind(gm, node)
    if k == "attr":
        width = int(attr(gm, node).shape[-1]) if attr(gm, node).ndim else 1
        return width, width, 1
    if k == "matmul":
        return shape(data_inputs(node)[0])[-1], shape(node)[-1], 1
    module: Any = float_module(gm, node)
    if k in ("conv", "conv_transpose"):
        return module.in_channels, module.out_channels, module.groups
    if k == "linear":
        return module.in_features, module.out_features, 1
    if k == "embedding":
        return module.num_embeddings, module.embedding_dim, 1
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(module, name):
            return getattr(module, name), getattr(module, name), 1
    width = next(p.shape[-1] if p.ndim else 1 for p in module.parameters())
    return width, width, 1
