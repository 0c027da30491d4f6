"""Constant affine maps (``x * scale + shift`` per channel) merged into the layer before or behind them.

A batch norm with running statistics is such a map (W' = W * gamma / sigma, b' = beta + (b - mu) * gamma / sigma; Jacob et al.
2017, arXiv 1712.05877, section 3.2), and so is an add, sub, mul or div with a constant (layer scale, ``Affine`` layers).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.convolutions import conv_pads
from fxq.graph import attr, data_inputs, erase, float_module, kind, module_of, shape, swap_module
from fxq.modules import WEIGHTED

ARITHMETIC = ("add", "sub", "mul", "div")


@dataclass(frozen=True)
class Affine:
    """``y = x * scale + shift`` with constants along one axis.

    Attributes:
        source: the node that gives ``x``.
        scale, shift: float64, ``[C]`` or ``[1]``.
        axis: axis of ``x`` that the constants run along; ``None`` when they are scalars.
    """

    source: Node
    scale: Tensor
    shift: Tensor
    axis: int | None


@dataclass(frozen=True)
class Fold:
    """A map that one layer can take over.

    Attributes:
        node: the map's node, which vanishes.
        layer: the node of the layer.
        affine: the map.
        ahead: the layer reads the map (instead of giving its input).
    """

    node: Node
    layer: Node
    affine: Affine
    ahead: bool

    def apply(self, gm: GraphModule) -> None:
        """Swap in a layer with new weights and take the map's node out. No tensor is edited in place."""
        merge = fold_ahead if self.ahead else fold_back
        swap_module(gm, self.layer, merge(module_of(gm, self.layer), self.affine.scale, self.affine.shift))
        erase(gm, self.node, self.affine.source)


def affine_of(gm: GraphModule, node: Node) -> Affine | str:
    """The map that a batch norm or an add, sub, mul, div computes, or why it is none.

    Args:
        node: its meta holds ``shape`` and ``dtype``.
    """
    if kind(gm, node) == "batch_norm":
        bn: Any = module_of(gm, node)
        if bn.running_var is None or bn.running_mean is None:
            return "it has no running statistics: it normalises each batch by itself"
        scale, shift = bn_affine(bn)
        return Affine(data_inputs(node)[0], scale, shift, None if scale.numel() == 1 else 1)
    return _arithmetic(gm, node) if kind(gm, node) in ARITHMETIC else "it is no affine map"


def bn_affine(bn: Any) -> tuple[Tensor, Tensor]:
    """``(scale, shift)``, float64 ``[C]``, of a batch norm in eval mode with running statistics."""
    sigma = torch.sqrt(bn.running_var.detach().double() + bn.eps)
    scale = (torch.ones_like(sigma) if bn.weight is None else bn.weight.detach().double()) / sigma
    shift = (torch.zeros_like(sigma) if bn.bias is None else bn.bias.detach().double()) - bn.running_mean.detach().double() * scale
    return scale, shift


def _arithmetic(gm: GraphModule, node: Node) -> Affine | str:
    fixed = [a for a in node.args if not isinstance(a, Node) or a.op == "get_attr"]
    moving = [a for a in node.args if isinstance(a, Node) and a.op != "get_attr"]
    if len(fixed) != 1 or len(moving) != 1 or shape(moving[0]) != shape(node):
        return "it is no affine map with constants"
    x, k = moving[0], kind(gm, node)
    value = attr(gm, fixed[0]) if isinstance(fixed[0], Node) else torch.tensor(fixed[0], dtype=torch.float64)
    if not isinstance(value, Tensor) or not value.is_floating_point() or (k == "div" and node.args[0] is fixed[0]):
        return "it is no affine map with constants"
    sizes = [1] * (len(shape(node)) - value.ndim) + list(value.shape)
    wide = [i for i, s in enumerate(sizes) if s != 1]
    if len(wide) > 1:
        return "its constant runs along more than one axis"
    c = value.detach().double().reshape(-1)
    one, zero = torch.ones_like(c), torch.zeros_like(c)
    first = node.args[0] is fixed[0]
    scale, shift = {
        "mul": (c, zero), "div": (1 / c, zero), "add": (one, c), "sub": (-one, c) if first else (one, -c),
    }[k]  # fmt: skip
    return Affine(x, scale, shift, wide[0] if wide else None)


def plan(gm: GraphModule, node: Node) -> Fold | str:
    """Where the map of ``node`` can go: into the layer before it, else into the one behind it; or why it stays."""
    affine = affine_of(gm, node)
    if isinstance(affine, str):
        return affine
    if not (bool(torch.isfinite(affine.scale).all()) and bool(torch.isfinite(affine.shift).all())):
        return "its constants are not finite"
    back = _layer_before(gm, affine)
    if isinstance(back, Node):
        return Fold(node, back, affine, ahead=False)
    ahead = _layer_behind(gm, node, affine)
    return Fold(node, ahead, affine, ahead=True) if isinstance(ahead, Node) else f"{back}; {ahead}"


def _layer_before(gm: GraphModule, affine: Affine) -> Node | str:
    """The layer that gives the map's input, seen through permutes and reshapes that nothing else reads."""
    node, axis = affine.source, affine.axis
    while True:
        k = kind(gm, node)
        if k not in ("permute", "reshape") and k not in (*WEIGHTED, "batch_norm"):
            return f"there is no conv or linear layer before it, but {k}"
        if len(node.users) != 1:
            return f"{node.name}, before it, has {len(node.users)} users"
        if k not in ("permute", "reshape"):
            break
        if axis is not None:
            op: Any = module_of(gm, node)
            axis = op.dims[axis] if k == "permute" else _axis_before(node, axis)
            if axis is None:
                return f"{node.name}, before it, mixes its channels with other axes"
        node = data_inputs(node)[0]
    if axis is not None and axis != channel_axis(gm, node):
        return f"it runs along axis {axis}, but {node.name} gives its channels on axis {channel_axis(gm, node)}"
    return _has_hooks(gm, node) or node


def _axis_before(node: Node, axis: int) -> int | None:
    """Axis of a reshape's input that its output axis runs along: of the same size, with as many elements behind it."""
    source = data_inputs(node)[0]
    after = shape(node)[axis + 1 :]
    if any(node.meta["dynamic"][axis:]):
        return None
    for i, size in enumerate(shape(source)):
        if size == shape(node)[axis] and prod(shape(source)[i + 1 :]) == prod(after) and not any(source.meta["dynamic"][i:]):
            return i
    return None


def _layer_behind(gm: GraphModule, node: Node, affine: Affine) -> Node | str:
    if len(node.users) != 1:
        return f"it has {len(node.users)} users"
    (layer,) = node.users
    k = kind(gm, layer)
    if k not in ("conv", "linear"):
        return f"no conv or linear layer follows directly, but {k}"
    conv: Any = float_module(gm, layer)
    axis = len(shape(node)) - (1 if k == "linear" else conv.weight.ndim - 1)
    if affine.axis is not None and affine.axis != axis:
        return f"it runs along axis {affine.axis}, but {layer.name} takes its channels on axis {axis}"
    shifts = bool((affine.shift != 0).any())
    if k == "conv" and shifts and conv.padding_mode == "zeros" and any(p for pair in conv_pads(conv) for p in pair):
        return f"{layer.name} pads with zeros, which its shift does not reach"
    return _has_hooks(gm, layer) or layer


def _has_hooks(gm: GraphModule, node: Node) -> str | None:
    m = float_module(gm, node)
    if m._forward_hooks or m._forward_pre_hooks or not isinstance(m._parameters.get("weight", m), (nn.Parameter, type(None))):
        return f"{node.name} has forward hooks or computes its weight"
    return None


def channel_axis(gm: GraphModule, node: Node) -> int:
    """Axis of the output channels in a layer's output: of a linear layer the last, otherwise the one before the spatial ones."""
    module: Any = float_module(gm, node)
    if isinstance(module, nn.Linear):
        return len(shape(node)) - 1
    return 1 if kind(gm, node) == "batch_norm" else len(shape(node)) - module.weight.ndim + 1


def fold_back(layer: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """A new layer that computes ``layer(x) * scale + shift``; ``layer`` is not changed.

    Args:
        layer: conv, transposed conv, linear layer or batch norm.
        scale, shift: float64, one value or one per output channel.
    """
    old: Any = layer
    scale, shift = (v.to(_device(layer)) for v in (scale, shift))
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        like = old.weight if old.weight is not None else layer.running_mean
        like = torch.ones(layer.num_features) if like is None else like.detach()
        weight = torch.ones_like(like) if old.weight is None else old.weight.detach()
        bias = torch.zeros_like(like) if old.bias is None else old.bias.detach()
        new: Any = _with(layer, weight, weight.double() * scale, bias.double() * scale + shift)
        new.affine = True
        return new  # type: ignore[no-any-return]
    w = old.weight.detach()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        per = scale.expand(layer.out_channels).reshape(layer.groups, 1, -1, *([1] * (w.ndim - 2)))
        weight = (w.double().reshape(layer.groups, -1, *w.shape[1:]) * per).reshape(w.shape)
        channels = layer.out_channels
    else:
        weight, channels = w.double() * scale.reshape(-1, *([1] * (w.ndim - 1))), w.shape[0]
    if old.bias is None and not bool(shift.any()):
        return _with(layer, w, weight, None)
    start = torch.zeros(channels, dtype=torch.float64, device=w.device) if old.bias is None else old.bias.detach().double()
    return _with(layer, w, weight, start * scale + shift)


def fold_ahead(layer: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """A new layer that computes ``layer(x * scale + shift)``; exact only if the layer adds no zeros of its own to ``x``.

    Args:
        layer: conv or linear layer; it is not changed.
        scale, shift: float64, one value or one per input channel.
    """
    old: Any = layer
    w, groups = old.weight.detach(), getattr(old, "groups", 1)
    wide = w.double().reshape(groups, -1, *w.shape[1:])  # [groups, out/groups, in/groups, *kernel]
    per = (groups, 1, w.shape[1], *([1] * (w.ndim - 2)))
    scale, shift = (v.to(w.device).expand(groups * w.shape[1]).reshape(per) for v in (scale, shift))
    weight = (wide * scale).reshape(w.shape)
    if old.bias is None and not bool(shift.any()):
        return _with(layer, w, weight, None)
    start = 0.0 if old.bias is None else old.bias.detach().double()
    return _with(layer, w, weight, (wide * shift).flatten(2).sum(2).reshape(-1) + start)


def _device(layer: nn.Module) -> torch.device:
    return next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))


def _with(layer: nn.Module, like: Tensor, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of ``layer`` with parameters of its own, of ``like``'s dtype; running statistics are shared."""
    new: Any = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    new._buffers = dict(layer._buffers)
    new.weight = nn.Parameter(weight.to(like.dtype))
    new.bias = None if bias is None else nn.Parameter(bias.to(like.dtype))
    return new  # type: ignore[no-any-return]
