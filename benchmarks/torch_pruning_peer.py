"""Torch-Pruning (``pip install torch-pruning``) as its examples use it, the uncut net that a cut of it must equal, and CIFAR ResNets for it."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fxq.zoo.cifar_resnet import BasicBlock, CifarResNet

SWIN = torchvision.models.swin_transformer.ShiftedWindowAttention


def version() -> str:
    return metadata.version("torch-pruning")


def output(value: Any) -> Tensor:
    """The tensor that a net is judged by: itself, or the ``out`` of a segmentation net."""
    return value["out"] if isinstance(value, dict) else value  # type: ignore[no-any-return]


def classifier(net: nn.Module, width: int) -> nn.Module:
    """The last layer with as many outputs as the net: it is not pruned."""
    layers = [m for m in net.modules() if getattr(m, "out_features", getattr(m, "out_channels", None)) == width]
    return layers[-1]


def options(net: nn.Module, multiple: int) -> dict[str, Any]:
    """What Torch-Pruning must be told: ViT keeps multiples of its heads, Swin's joint projections have heads."""
    found: dict[str, Any] = {}
    if isinstance(net, torchvision.models.VisionTransformer):
        multiple = math.lcm(multiple, net.encoder.layers[0].num_heads)
    heads = {m.qkv: m.num_heads for m in net.modules() if isinstance(m, SWIN)}
    if heads:
        found["num_heads"] = heads
    if multiple > 1:
        found["round_to"] = multiple
    return found


def pruner(net: nn.Module, x: Tensor, ratio: float, multiple: int = 1, steps: int = 1) -> Any:
    """A global pruner by group norm (p = 2) that keeps the classifier."""
    import torch_pruning as tp

    for p in net.parameters():
        p.requires_grad_(True)
    with torch.no_grad():
        width = output(net(x)).shape[1]
    return tp.pruner.MagnitudePruner(
        net, x, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True, pruning_ratio=ratio, iterative_steps=steps,
        ignored_layers=[classifier(net, width)], output_transform=output, **options(net, multiple),
    )  # fmt: skip


@dataclass
class Cut:
    """A cut net, the whole net in which the readers of what was cut see zeros, and the seconds of analysis and cut."""

    net: nn.Module
    masked: nn.Module
    seconds: float


class KeptNorm(nn.Module):
    """A layer norm over the channels that stay; zeros elsewhere."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept, self.first = norm, kept, type(norm) is not nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        y = x.movedim(1, -1) if self.first else x
        weight, bias = (None if p is None else p[self.kept] for p in (self.norm.weight, self.norm.bias))
        out = torch.zeros_like(y)
        out[..., self.kept] = F.layer_norm(y[..., self.kept], (len(self.kept),), weight, bias, self.norm.eps)
        return out.movedim(-1, 1) if self.first else out


class Watch:
    """Which original channels each module still reads, followed through the groups that are cut one after the other."""

    def __init__(self, net: nn.Module) -> None:
        self.names = {m: n for n, m in net.named_modules()}
        self.depthwise = {m for m in net.modules() if _depthwise(m)}  # a grouped convolution may become one on the way
        self.whole = copy.deepcopy(net)
        self.reads: dict[str, list[int]] = {}
        self.norms: dict[str, list[int]] = {}

    def group(self, group: Any, is_out: Callable[[Any], bool]) -> None:
        """Note a group before it is cut."""
        for dep, idxs in group:
            module = dep.target.module
            if module not in self.names:
                continue
            name = self.names[module]
            if isinstance(module, (nn.LayerNorm, nn.MultiheadAttention)):
                width = module.embed_dim if isinstance(module, nn.MultiheadAttention) else module.normalized_shape[-1]
                _drop(self.norms, name, width, idxs)
            elif isinstance(module, (nn.Linear, nn.Conv2d)) and module not in self.depthwise and not is_out(dep.handler):
                _drop(self.reads, name, module.weight.shape[1] * getattr(module, "groups", 1), idxs)

    def masked(self) -> nn.Module:
        """The whole net: weights of inputs that are gone are zero, layer norms see what stays."""
        modules = dict(self.whole.named_modules())
        with torch.no_grad():
            for name, stay in self.reads.items():
                _forget(modules[name], stay)
            for name, stay in self.norms.items():
                module = modules[name]
                if isinstance(module, nn.MultiheadAttention):
                    _forget_heads(module, stay)
                else:
                    parent, _, last = name.rpartition(".")
                    setattr(modules[parent], last, KeptNorm(module, torch.tensor(stay)))
        return self.whole


def _depthwise(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.out_channels


def _drop(table: dict[str, list[int]], name: str, width: int, idxs: list[int]) -> None:
    alive = table.setdefault(name, list(range(width)))
    gone = set(idxs)
    table[name] = [c for i, c in enumerate(alive) if i not in gone]


def _forget(layer: Any, stay: list[int]) -> None:
    groups = getattr(layer, "groups", 1)
    inside, rows = layer.weight.shape[1], layer.weight.shape[0] // groups
    for c in set(range(inside * groups)) - set(stay):
        g = c // inside
        layer.weight[g * rows : (g + 1) * rows, c % inside] = 0


def _forget_heads(attention: Any, stay: list[int]) -> None:
    width = attention.embed_dim
    gone = torch.tensor(sorted(set(range(width)) - set(stay)), dtype=torch.long)
    attention.in_proj_weight[:, gone] = 0
    for part in range(3):
        attention.in_proj_weight[gone + part * width] = 0
        attention.in_proj_bias[gone + part * width] = 0
    attention.out_proj.weight[:, gone] = 0


def cut(net: nn.Module, x: Tensor, ratio: float, multiple: int = 1) -> Cut:
    """Cut a net (in place) by the ratio of its channels.

    Raises:
        Exception: whatever Torch-Pruning raises.
    """
    watch, seconds = Watch(net), 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        made = pruner(net, x, ratio, multiple)
        for group in made.step(interactive=True):
            seconds += time.perf_counter() - start
            watch.group(group, made.DG.is_out_channel_pruning_fn)
            start = time.perf_counter()
            group.prune()
        seconds += time.perf_counter() - start
    if isinstance(net, torchvision.models.VisionTransformer):
        net.hidden_dim = net.conv_proj.out_channels  # its forward uses this number
    return Cut(net, watch.masked(), seconds)


class PadShortcut(nn.Module):
    """The shortcut of a block that strides, as a concatenation: Torch-Pruning cannot follow ``F.pad``, but it cuts parameters. They stay zero."""

    def __init__(self, grow: int) -> None:
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.zeros(1, grow, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C + 2 grow, H / 2, W / 2]``."""
        x = x[:, :, ::2, ::2]
        n, _, h, w = x.shape
        return torch.cat([self.before.expand(n, -1, h, w), x, self.after.expand(n, -1, h, w)], 1)


class Block(nn.Module):
    """A block of a CIFAR ResNet with a shortcut that Torch-Pruning can follow."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.shortcut = PadShortcut(block.grow) if block.grow else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """As the block that it was made from."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


def followable(net: CifarResNet) -> CifarResNet:
    """A copy of a CIFAR ResNet that computes the same and that Torch-Pruning can cut."""
    net = copy.deepcopy(net)
    for stage in (net.layer1, net.layer2, net.layer3):
        for i, block in enumerate(stage):
            stage[i] = Block(block)  # type: ignore[arg-type]
    return net


def to_macs(net: CifarResNet, x: Tensor, share: float, steps: int = 400) -> nn.Module:
    """A copy of a CIFAR ResNet, cut in small steps until at most this share of its MACs (as Torch-Pruning counts them) is left.

    The steps, the criterion and the global ranking are those of the project's own benchmarks of group norm without sparse training.
    """
    import torch_pruning as tp

    made = followable(net)
    whole, _ = tp.utils.count_ops_and_params(made, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cutter = pruner(made, x, 1.0, steps=steps)
        for _ in range(steps):
            if tp.utils.count_ops_and_params(made, x)[0] <= share * whole:
                break
            cutter.step()
    for m in made.modules():
        if isinstance(m, PadShortcut):
            m.requires_grad_(False)
    return made
