"""The uncut graph with masks: what a cut graph must compute, made without cutting anything."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.channels import Channels, Labels, channel_dim, is_depthwise, layer_labels
from fxq.dead_channels import Reading
from fxq.graph import kind, module_of, shape


class Masked(nn.Module):
    """``x`` where ``mask`` (bool, of its rank) is True, else 0."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


class MaskedLayerNorm(nn.Module):
    """Layer norm with the statistics of the places that stay; elsewhere it gives the bias.

    Args:
        norm: the layer norm. mask: bool, of the normalized shape.
    """

    mask: Tensor

    def __init__(self, norm: nn.LayerNorm, mask: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        n, dims = self.mask.sum(), tuple(range(-self.mask.ndim, 0))
        kept = self.mask.to(x.dtype)
        mean = (x * kept).sum(dims, keepdim=True) / n
        var = ((x - mean).square() * kept).sum(dims, keepdim=True) / n
        y = (x - mean) * torch.rsqrt(var + self.norm.eps) * kept
        y = y if self.norm.weight is None else y * self.norm.weight
        return torch.as_tensor(y if self.norm.bias is None else y + self.norm.bias)


class MaskedGroupNorm(nn.Module):
    """Group norm with the statistics of the channels that stay; the others give the bias.

    Args:
        norm: the group norm. mask: bool ``[C]``.
    """

    mask: Tensor

    def __init__(self, norm: nn.GroupNorm, mask: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        g = self.norm.num_groups
        v = x.reshape(x.shape[0], g, x.shape[1] // g, -1)
        kept = self.mask.to(x.dtype).reshape(1, g, -1, 1)
        n = kept.sum((2, 3), keepdim=True) * v.shape[3]
        mean = (v * kept).sum((2, 3), keepdim=True) / n
        var = ((v - mean).square() * kept).sum((2, 3), keepdim=True) / n
        y = ((v - mean) * torch.rsqrt(var + self.norm.eps) * kept).reshape(x.shape)
        form = (1, -1, *[1] * (x.ndim - 2))
        y = y if self.norm.weight is None else y * self.norm.weight.reshape(form)
        return torch.as_tensor(y if self.norm.bias is None else y + self.norm.bias.reshape(form))


def masked(channels: Channels, keep: Labels, readings: list[Reading]) -> GraphModule:
    """A copy of the graph, uncut: cut channels have weights and gammas of 0, readers do not see them, or see the constant that they absorb.

    Modules that nothing was taken from are shared with the graph (:func:`apart` gives the copy its own).

    Args:
        channels: labels of the graph. keep: bool ``[labels]``.
        readings: what each reader takes into its bias.
    """
    graph = copy.deepcopy(channels.gm.graph)
    copies = dict(zip(channels.gm.graph.nodes, graph.nodes, strict=True))
    gm = GraphModule(channels.gm, graph, "Masked")
    takes = {r.node: r.places for r in readings}
    for node, mine in copies.items():
        k = kind(gm, mine)
        dims = channels.dims[node]
        if k in ("conv", "conv_transpose", "linear", "embedding"):
            _without_rows(gm, mine, k, _gone(keep, layer_labels(channels, node, module_of(gm, mine))[1]))
        if k in ("batch_norm", "instance_norm") or (k == "group_norm" and _per_channel(gm, mine)):
            _without_gamma(gm, mine, _gone(keep, dims[1]))
        elif k == "group_norm" and _gone(keep, dims[1]) is not None:
            _put(gm, mine, MaskedGroupNorm(module_of(gm, mine), torch.from_numpy(keep[dims[1]])))  # type: ignore[arg-type]
        elif k == "layer_norm":
            _mask_layer_norm(gm, mine, dims, keep)
        _mask_inputs(gm, node, mine, k, channels, keep, takes.get(node))
    gm.graph.lint()
    gm.recompile()
    home = next((p.device for p in channels.gm.parameters()), None)
    for module in gm.modules():
        if home is not None and isinstance(module, (Masked, MaskedLayerNorm, MaskedGroupNorm)):
            module.mask = module.mask.to(home)
    return gm


def apart(gm: GraphModule, other: GraphModule) -> None:
    """Give ``gm`` its own copies of the modules and tensors that it shares with ``other``."""
    theirs = {id(m) for m in other.modules()}
    shared = {id(t) for t in (*other.parameters(), *other.buffers())}
    memo: dict[int, Any] = {}
    for path, module in list(gm.named_modules(remove_duplicate=False)):
        if id(module) in theirs:
            gm.set_submodule(path, copy.deepcopy(module, memo))
    for module in gm.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None and id(t) in shared:
                    table[name] = copy.deepcopy(t, memo)  # type: ignore[assignment]


def _gone(keep: Labels, labels: Labels | None) -> Labels | None:
    """Places that are cut, or ``None``."""
    if labels is None or bool(keep[labels].all()):
        return None
    found: Labels = np.flatnonzero(~keep[labels])
    return found


def _put(gm: GraphModule, node: Node, module: nn.Module) -> None:
    """Another module at the node's own path (canonical graphs have one module a call)."""
    gm.set_submodule(str(node.target), module)


def _per_channel(gm: GraphModule, node: Node) -> bool:
    module: Any = module_of(gm, node)
    return bool(module.num_groups == module.num_channels)


def _without_rows(gm: GraphModule, node: Node, k: str, gone: Labels | None) -> None:
    module: Any = module_of(gm, node)
    if gone is None:
        return
    w = module.weight.detach().clone()
    if k == "embedding":
        w[:, gone] = 0
    elif k == "conv_transpose" and module.groups > 1:
        per = module.out_channels // module.groups
        rows = module.in_channels // module.groups
        for o in gone.tolist():
            w[o // per * rows : (o // per + 1) * rows, o % per] = 0
    elif k == "conv_transpose":
        w[:, gone] = 0
    else:
        w[gone] = 0
    _put_weight(gm, node, w)


def _put_weight(gm: GraphModule, node: Node, weight: Tensor) -> None:
    """The node's module with another weight; the module itself may be another graph's too."""
    new: Any = copy.copy(module_of(gm, node))
    new._parameters = {**new._parameters, "weight": nn.Parameter(weight)}
    _put(gm, node, new)


def _without_gamma(gm: GraphModule, node: Node, gone: Labels | None) -> None:
    module: Any = module_of(gm, node)
    if gone is None or module.weight is None:
        return
    w = module.weight.detach().clone()
    w[gone] = 0
    _put_weight(gm, node, w)


def _mask_layer_norm(gm: GraphModule, node: Node, dims: Any, keep: Labels) -> None:
    module: Any = module_of(gm, node)
    n = len(module.normalized_shape)
    if all(_gone(keep, d) is None for d in dims[-n:]):
        return
    mask = torch.ones(module.normalized_shape, dtype=torch.bool)
    for i, d in enumerate(dims[-n:]):
        if d is not None:
            mask = mask & torch.from_numpy(keep[d]).reshape([-1 if j == i else 1 for j in range(n)])
    _put(gm, node, MaskedLayerNorm(module, mask))


def _mask_inputs(gm: GraphModule, node: Node, mine: Node, k: str, channels: Channels, keep: Labels, takes: Labels | None) -> None:
    """Readers that mix channels do not see the cut ones, but for the constants that they absorb."""
    if k not in ("conv", "conv_transpose", "linear", "matmul"):
        return
    for place, x in enumerate(node.args):
        assert isinstance(x, Node)
        rank = len(shape(x))
        at = rank - 1 - place if k == "matmul" else channel_dim(module_of(gm, mine), rank)
        labels = channels.of(x)[at]
        gone = _gone(keep, labels)
        if gone is None or labels is None or (k != "matmul" and is_depthwise(module_of(gm, mine))):
            continue
        mask = keep[labels].copy()
        if takes is not None:
            mask[takes] = True
        m = torch.from_numpy(mask).reshape([-1 if i == at else 1 for i in range(rank)])
        name = f"mask_{mine.name}_{place}"
        gm.add_submodule(name, Masked(m))
        with gm.graph.inserting_before(mine):
            made = gm.graph.call_module(name, (mine.args[place],))
        made.meta.update({key: x.meta[key] for key in ("shape", "dynamic", "dtype") if key in x.meta})
        mine.update_arg(place, made)
