"""Integer-friendly forms: one function a form. Each rewrites what the target cannot execute in integers and returns how often.

The function of the graph stays the same up to float rounding. Ratios in the docstrings: ONNX Runtime 1.31 on a CPU with VNNI,
one thread, against the form that they replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq.convolutions import CHANNEL_AFFINE, conv_pads, padded
from fxq.folding import bn_affine
from fxq.graph import attr, copy_shape, data_inputs, erase, free_path, insert_module, kind, module_of, shape, swap_module, walk
from fxq.pipeline import PassContext
from fxq.targets import Target

Form = Callable[[GraphModule, PassContext], int]

BECOMES_INTEGER = ("clamp", "hardswish", "silu", "batch_norm", "avg_pool", "prelu")
"""Kinds that a grid absorbs or that a form below turns into integer operations."""

KEEPS_ORDER = ("max_pool", "reshape", "permute", "index_select", "pixel_shuffle")
"""Kinds that commute with every monotone pointwise function: they only move values or take the greatest."""

CONV: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def gridable(gm: GraphModule, target: Target) -> set[Node]:
    """Values that are on a grid without an extra quantization of a stream that had better stay float.

    A conv's output, a linear layer's on ``[N, C]``, the input, constants, and what integer operations make of them.
    """
    free: set[Node] = set()
    for node in gm.graph.nodes:
        k = kind(gm, node)
        rule = target.ops.get(k)
        if k in ("input", "attr"):
            free.add(node)
        elif rule is not None and rule.always:
            if k != "linear" or len(shape(node)) == 2:
                free.add(node)
        elif (rule is not None or k in BECOMES_INTEGER) and all(i in free for i in data_inputs(node)):
            free.add(node)
    return free


def _symmetric(ctx: PassContext) -> bool:
    spec = ctx.scheme.activation
    return spec is not None and spec.symmetric and spec.signed


def _depthwise(kernel: tuple[int, ...], weight: Tensor, bias: Tensor | None, dtype: torch.dtype, **how: Any) -> nn.Module:
    """Depthwise conv with constant weights: ``weight`` ``[C]`` over every tap of ``kernel``, ``bias`` ``[C]``; ``stands_in``: no layer of the model."""
    c = weight.numel()
    table = CHANNEL_AFFINE if set(kernel) == {1} and not how else CONV
    conv: Any = table[len(kernel) - 1](c, c, kernel, groups=c, bias=bias is not None, **how)
    conv.weight = nn.Parameter(weight.reshape(c, 1, *([1] * len(kernel))).expand(c, 1, *kernel).contiguous().to(dtype))
    conv.stands_in = True
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(dtype))
    return conv  # type: ignore[no-any-return]


def _device(gm: GraphModule) -> torch.device:
    return next((p.device for p in gm.parameters()), torch.device("cpu"))


def batch_norm(gm: GraphModule, ctx: PassContext) -> int:
    """A batch norm that no layer takes over becomes a 1x1 depthwise conv (1.57 instead of 0.86 of float speed)."""
    done = 0
    for node, _ in walk(gm, "batch_norm"):
        bn: Any = module_of(gm, node)
        spatial = len(shape(node)) - 2
        if bn.running_var is None:
            ctx.skip(node, "it has no running statistics: it normalises each batch by itself")
            continue
        if spatial < 1:
            ctx.skip(node, "on [N, C] it has no form as a convolution")
            continue
        scale, shift = bn_affine(bn)
        swap_module(gm, node, _depthwise((1,) * spatial, scale, shift, bn.running_var.dtype))
        done += 1
    return done


def _gated(of: str, gate: Callable[[], nn.Module]) -> Form:
    def form(gm: GraphModule, ctx: PassContext) -> int:
        done, free = 0, gridable(gm, ctx.target)
        for node, _ in walk(gm, of):
            (x,) = data_inputs(node)
            if of == "hardswish" and _symmetric(ctx):
                ctx.skip(node, "a hard sigmoid has no integer form on a signed symmetric grid")
                continue
            if x not in free:
                ctx.skip(node, f"its input comes from {kind(gm, x)} and stays float")
                continue
            g = insert_module(gm, x, f"{node.target}_gate", gate(), (x,), like=node)
            g.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            swap_module(gm, node, m.Mul())
            node.args = (x, g)
            done += 1
        return done

    form.__doc__ = f"``{of}(x)`` as ``x * {gate.__name__.lower()}(x)``, where ``x`` is on a grid anyway."
    return form


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * n if len(values) == 1 else values


def avg_pool(gm: GraphModule, ctx: PassContext) -> int:
    """Average pool of full windows as a depthwise conv with constant weights: QLinearAveragePool runs at 0.3 of float speed."""
    done, free = 0, gridable(gm, ctx.target)
    for node, _ in walk(gm, "avg_pool"):
        pool: Any = module_of(gm, node)
        n = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[type(pool)]
        (x,) = data_inputs(node)
        kernel, stride, pads = (_each(v, n) for v in (pool.kernel_size, pool.stride, pool.padding))
        floor = [(s + 2 * p - k) // d + 1 for s, p, k, d in zip(shape(x)[-n:], pads, kernel, stride, strict=True)]
        if len(shape(x)) != n + 2:
            ctx.skip(node, "its input has no batch dimension")
        elif x not in free:
            ctx.skip(node, f"its input comes from {kind(gm, x)} and stays float")
        elif pool.ceil_mode and (floor != list(shape(node)[2:]) or any(node.meta["dynamic"][2:])):
            ctx.skip(node, "ceil_mode lets windows end outside")
        elif any(pads) and not pool.count_include_pad and pool_divisor(pool) is None:
            ctx.skip(node, "its padding is not counted: windows at the border divide by less")
        else:
            size = pool_divisor(pool) or torch.Size(kernel).numel()
            weight = torch.full((shape(x)[1],), 1.0 / size, dtype=torch.float64, device=_device(gm))
            swap_module(gm, node, _depthwise(kernel, weight, None, node.meta["dtype"], stride=stride, padding=pads).requires_grad_(False))
            done += 1
    return done


def pool_divisor(pool: Any) -> int | None:
    """``divisor_override`` of an average pool (1-d pools have none)."""
    return getattr(pool, "divisor_override", None)


def merge_pad(gm: GraphModule, ctx: PassContext) -> int:
    """Zero padding of spatial dimensions into the pads of the convs behind it (no op instead of one that leaves the integers)."""
    done = 0
    for node, _ in walk(gm, "pad"):
        pad: Any = module_of(gm, node)
        users = list(node.users)
        spatial = len(shape(node)) - 2
        why = _cannot_merge(gm, pad, spatial, users)
        if why is not None:
            ctx.skip(node, why)
            continue
        extra = [*pad.pads, *([0] * (2 * spatial))][: 2 * spatial]
        for user in users:
            own = [p for pair in reversed(conv_pads(module_of(gm, user))) for p in pair]
            swap_module(gm, user, _with_pads(module_of(gm, user), [a + b for a, b in zip(extra, own, strict=True)]))
        erase(gm, node)
        done += 1
    return done


def _cannot_merge(gm: GraphModule, pad: Any, spatial: int, users: list[Node]) -> str | None:
    if pad.mode != "constant" or pad.value != 0:
        return f"it pads with {pad.value if pad.mode == 'constant' else pad.mode}, a convolution with 0"
    if min(pad.pads, default=0) < 0:
        return "it cuts off a border"
    if any(pad.pads[2 * spatial :]):
        return "it pads the batch or channel dimension"
    for user in users:
        if kind(gm, user) != "conv":
            return f"not only convolutions read it, but {kind(gm, user)}"
        conv: Any = module_of(gm, user)
        if conv.weight.ndim != spatial + 2:
            return f"{user.name} takes its dimensions in another way"
        if conv.padding_mode != "zeros" and any(p for pair in conv_pads(conv) for p in pair):
            return f"{user.name} pads with {conv.padding_mode} itself"
    return None if users else "nothing reads it"


def _with_pads(conv: nn.Module, pads: list[int]) -> nn.Module:
    """The conv with these pads (torch's order): an ordinary layer where begin and end are alike."""
    new: Any = padded(conv, pads)
    new.padding_mode = "zeros"
    if pads[0::2] == pads[1::2]:
        plain: Any = CONV[len(pads) // 2 - 1]
        state = {k: v for k, v in new.__dict__.items() if k != "pads"}
        new = plain.__new__(plain)
        new.__dict__.update(state, padding=tuple(reversed(pads[0::2])), _reversed_padding_repeated_twice=list(pads))
    return new  # type: ignore[no-any-return]


def relu_first(gm: GraphModule, ctx: PassContext) -> int:
    """conv, max-pool, ReLU becomes conv, ReLU, max-pool, so that the conv's grid takes the ReLU over; likewise reshapes, clamps.

    Exact: these kinds commute with every monotone function.
    """
    done = 0
    for node, _ in walk(gm, "relu", "clamp"):
        (x,) = data_inputs(node)
        reader = node
        while kind(gm, x) in KEEPS_ORDER and len(x.users) == 1:
            reader, (x,) = x, data_inputs(x)
        rule = ctx.target.ops.get(kind(gm, x))
        if reader is node or len(x.users) != 1 or rule is None or not rule.clamps or _symmetric(ctx):
            continue
        with gm.graph.inserting_after(x):
            first = gm.graph.call_module(str(node.target), (x,))
        copy_shape(x, first)
        first.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        reader.replace_input_with(x, first)
        erase(gm, node)
        done += 1
    return done


def resize_point(gm: GraphModule, ctx: PassContext) -> int:
    """Interpolation of a single cell (a pooled branch, as in ASPP) repeats it: the nearest form moves codes, the linear one is float."""
    done = 0
    for node, _ in walk(gm, "resize"):
        resize: Any = module_of(gm, node)
        (x,) = data_inputs(node)
        if resize.mode.startswith("nearest") or any(s != 1 for s in shape(x)[2:]) or any(x.meta["dynamic"][2:]):
            continue
        swap_module(gm, node, m.Resize(resize.size, resize.scale, "nearest"))
        done += 1
    return done


def prelu(gm: GraphModule, ctx: PassContext) -> int:
    """A PReLU with one slope is a leaky ReLU, which runs in integers (a table)."""
    done = 0
    for node, _ in walk(gm, "prelu"):
        slope = module_of(gm, node).weight
        assert isinstance(slope, Tensor)
        if slope.numel() != 1:
            ctx.skip(node, "one slope per channel has no integer kernel")
            continue
        swap_module(gm, node, nn.LeakyReLU(float(slope.detach())))
        done += 1
    return done


def constants(gm: GraphModule, ctx: PassContext) -> int:
    """``x - c`` as ``x + (-c)`` and ``x / c`` as ``x * (1/c)`` where ``x`` is on a grid: the runtime has no integer Sub and Div."""
    done, free = 0, gridable(gm, ctx.target)
    for node, k in walk(gm, "sub", "div"):
        x, c = node.args
        if not isinstance(x, Node) or x.op == "get_attr" or (isinstance(c, Node) and c.op != "get_attr"):
            ctx.skip(node, "it has an integer form only with a constant as its second operand")
            continue
        value = attr(gm, c) if isinstance(c, Node) else torch.tensor(c, dtype=torch.float64)
        if x not in free:
            ctx.skip(node, f"its input comes from {kind(gm, x)} and stays float")
        elif not x.meta["dtype"].is_floating_point or not value.is_floating_point() or (k == "div" and not bool(value.all())):
            ctx.skip(node, "an operand is no float tensor, or a divisor is 0")
        else:
            new = -value.double() if k == "sub" else 1 / value.double()
            other: Any = _constant(gm, node, c, new.to(value.dtype)) if isinstance(c, Node) else float(new)
            swap_module(gm, node, m.Add() if k == "sub" else m.Mul())
            node.args = (x, other)
            done += 1
    return done


def _constant(gm: GraphModule, before: Node, like: Node, value: Tensor) -> Node:
    name = free_path(gm, f"{like.target}_{'neg' if kind(gm, before) == 'sub' else 'inv'}".replace(".", "_"))
    gm.register_buffer(name, value.detach())
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(name)
    copy_shape(like, node)
    return node


hardswish = _gated("hardswish", nn.Hardsigmoid)
silu = _gated("silu", nn.Sigmoid)
