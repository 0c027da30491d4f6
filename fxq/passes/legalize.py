"""legalize: forms that the target can execute in integers for operations that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq.graph import data_inputs, erase, insert_module, kind, module_of, shape, swap_module, walk
from fxq.pipeline import Pass, PassContext

FREE = ("conv", "add", "mul", "cat", "max_pool", "global_avg_pool", "slice", "pad", "relu", "clamp")


@dataclass(frozen=True)
class Legalize(Pass):
    """Apply the rewrites named in ``target.forms``; the function stays the same up to float rounding."""

    name: ClassVar[str] = "legalize"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")
    tolerance: ClassVar[float | None] = 1e-4

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        forms = [f for f in ctx.target.forms if f in FORMS]
        if ctx.scheme.method != "static":
            forms = [f for f in forms if f == "merge-pad"]
        return sum(FORMS[f](gm, ctx) for f in forms)


def _depthwise(channels: int, kernel: tuple[int, ...], weight: torch.Tensor, bias: torch.Tensor | None, **how: Any) -> nn.Module:
    cls: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    conv = cls(channels, channels, kernel, groups=channels, bias=bias is not None, **how)
    conv.weight = nn.Parameter(weight.to(torch.float32).reshape(channels, 1, *kernel))
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(torch.float32))
    return conv  # type: ignore[no-any-return]


def batch_norm(gm: GraphModule, ctx: PassContext) -> int:
    """A batch norm that could not be folded becomes a 1x1 depthwise conv."""
    done = 0
    for node, _ in walk(gm, "batch_norm"):
        bn: Any = module_of(gm, node)
        spatial = len(shape(node)) - 2
        if bn.running_var is None or not 1 <= spatial <= 3:
            ctx.skip(node, "not over [N, C, *spatial] with running statistics")
            continue
        sigma = torch.sqrt(bn.running_var.double() + bn.eps)
        scale = (bn.weight.detach().double() if bn.affine else 1.0) / sigma
        shift = (bn.bias.detach().double() if bn.affine else 0.0) - bn.running_mean.double() * scale
        swap_module(gm, node, _depthwise(bn.num_features, (1,) * spatial, scale, shift))
        done += 1
    return done


def _gated(cls: type[nn.Module], gate: Callable[[], nn.Module], suffix: str) -> Callable[[GraphModule, PassContext], int]:
    def form(gm: GraphModule, ctx: PassContext) -> int:
        done = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_module" or type(module_of(gm, node)) is not cls:
                continue
            (x,) = data_inputs(node)
            if kind(gm, x) not in FREE:
                ctx.skip(node, f"its input comes from {kind(gm, x)}, which stays float")
                continue
            g = insert_module(gm, node.prev, f"{node.target}_{suffix}", gate(), (x,), like=node)
            swap_module(gm, node, m.Mul())
            node.args = (x, g)
            done += 1
        return done

    return form


def avg_pool(gm: GraphModule, ctx: PassContext) -> int:
    """AvgPool2d as a depthwise conv with constant weights: QLinearAveragePool is slow in ONNX Runtime."""
    done = 0
    for node, _ in walk(gm, "avg_pool"):
        pool: Any = module_of(gm, node)
        if not isinstance(pool, nn.AvgPool2d) or pool.ceil_mode or (pool.padding not in (0, (0, 0)) and not pool.count_include_pad):
            ctx.skip(node, "not the mean of a full window (ceil_mode, or padding that is not counted)")
            continue
        k = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * 2
        c = shape(node)[1]
        weight = torch.full((c, 1, *k), 1.0 / (pool.divisor_override or k[0] * k[1]))
        swap_module(gm, node, _depthwise(c, k, weight, None, stride=pool.stride, padding=pool.padding))
        done += 1
    return done


def merge_pad(gm: GraphModule, ctx: PassContext) -> int:
    """Zero padding of spatial dimensions into the pads of the convs behind it."""
    done = 0
    for node, _ in walk(gm, "pad"):
        pad: Any = module_of(gm, node)
        users = list(node.users)
        spatial = len(shape(node)) - 2
        if pad.mode != "constant" or pad.value != 0 or min(pad.pads) < 0 or any(pad.pads[2 * spatial :]):
            continue
        if not users or any(kind(gm, u) != "conv" for u in users):
            ctx.skip(node, "not only convolutions read it")
            continue
        for user in users:
            conv = module_of(gm, user)
            extra = [*pad.pads, *([0] * (2 * spatial - len(pad.pads)))][: 2 * spatial]
            own = [p for pair in reversed(m.conv_pads(conv)) for p in pair]
            swap_module(gm, user, m.padded(conv, [a + b for a, b in zip(extra, own, strict=True)]))
        erase(gm, node)
        done += 1
    return done


def relu_first(gm: GraphModule, ctx: PassContext) -> int:
    """max_pool then ReLU becomes ReLU then max_pool, so that the conv's grid absorbs the ReLU."""
    done = 0
    for node, _ in walk(gm, "relu"):
        (pool,) = data_inputs(node)
        if kind(gm, pool) != "max_pool" or len(pool.users) != 1:
            continue
        (x,) = data_inputs(pool)
        relu = insert_module(gm, x, f"{node.target}_first", nn.ReLU(), (x,), like=x)
        pool.args = (relu,)
        erase(gm, node)
        done += 1
    return done




FORMS: dict[str, Callable[[GraphModule, PassContext], int]] = {
    "batch-norm": batch_norm,
    "hardswish": _gated(nn.Hardswish, nn.Hardsigmoid, "gate"),
    "silu": _gated(nn.SiLU, nn.Sigmoid, "gate"),
    "avg-pool": avg_pool,
    "merge-pad": merge_pad,
    "relu-first": relu_first,
}
