"""Canonical forms of functional layers (convolutions, norms, pools, resizes, embeddings) and of layer modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxq import modules as m
from fxq.canonical import At, Form, NoForm, is_aten, is_tensor, name_of, parameter, to_reshape
from fxq.canonical_math import linear as make_linear
from fxq.graph import module_of, shape, swap_module

GONE = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "StochasticDepth", "DropPath")
_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _per_dim(value: Any, n: int) -> tuple[int, ...]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return tuple(int(v) for v in (values * n if len(values) == 1 else values))


def linear(at: At) -> None:
    x, weight, bias = at.tensor(), at.const(1, "weight"), at.const(2, "bias")
    if weight is None:
        raise NoForm("without weight")
    make_linear(at, x, weight, bias)


def conv(at: At) -> None:
    """``conv{1,2,3}d``, ``conv_transpose{1,2,3}d`` and aten ``convolution`` with constant weights."""
    x, weight, bias, name = at.tensor(), at.const(1, "weight"), at.const(2, "bias"), name_of(at.node)
    if weight is None or not 3 <= weight.ndim <= 5 or len(shape(x)) != weight.ndim:
        raise NoForm("not over [N, C, *spatial]")
    n = weight.ndim - 2
    stride, padding, output_padding = at.arg(3, "stride", 1), at.arg(4, "padding", 0), 0
    if name == "convolution":
        dilation, transposed, output_padding, groups = (at.arg(i, str(i)) for i in (5, 6, 7, 8))
    elif name.startswith("conv_transpose"):
        output_padding, groups, dilation = at.arg(5, "output_padding", 0), at.arg(6, "groups", 1), at.arg(7, "dilation", 1)
        transposed = True
    else:
        dilation, groups, transposed = at.arg(5, "dilation", 1), at.arg(6, "groups", 1), False
    how: dict[str, Any] = {"stride": _per_dim(stride, n), "dilation": _per_dim(dilation, n), "groups": groups, "bias": bias is not None, "device": "meta"}
    how["padding"] = padding if isinstance(padding, str) else _per_dim(padding, n)
    kernel = tuple(weight.shape[2:])
    if transposed:
        cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
        made = cls(weight.shape[0], weight.shape[1] * groups, kernel, output_padding=_per_dim(output_padding, n), **how)
    else:
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        made = cls(weight.shape[1] * groups, weight.shape[0], kernel, **how)
    made.weight = parameter(weight)
    if bias is not None:
        made.bias = parameter(bias)
    at.put("conv", made, x)


def _filled(norm: Any, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """``norm`` with the given weight and bias; a missing one is the neutral value when the other is given."""
    if weight is not None or bias is not None:
        other: Any = weight if weight is not None else bias
        norm.weight = parameter(weight if weight is not None else torch.ones_like(other))
        norm.bias = parameter(bias if bias is not None else torch.zeros_like(other))
    return norm  # type: ignore[no-any-return]


def made_batch_norm(rank: int, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> nn.Module:
    """Batch norm in eval mode over a tensor of ``rank`` dimensions."""
    norm = _BATCH_NORMS[rank](len(mean), eps, affine=weight is not None or bias is not None)
    norm.running_mean, norm.running_var = mean.detach(), var.detach()
    return _filled(norm, weight, bias)


def batch_norm(at: At) -> None:
    """``F.batch_norm`` and the aten orders of its arguments, with running statistics."""
    x, name = at.tensor(), name_of(at.node)
    aten = is_aten(at.node) or getattr(at.node.target, "__module__", "").startswith("torch._C")
    legit = name == "native_batch_norm_legit_no_training"
    if aten or at.node.target is torch.batch_norm:
        weight, bias, mean, var = (at.const(i, n) for i, n in enumerate(("weight", "bias", "running_mean", "running_var"), 1))
        training, eps = (False, at.arg(6, "eps")) if legit else (at.arg(5, "training"), at.arg(7, "eps"))
    else:
        mean, var, weight, bias = (at.const(i, n) for i, n in enumerate(("running_mean", "running_var", "weight", "bias"), 1))
        training, eps = at.arg(5, "training", False), at.arg(7, "eps", 1e-5)
    if training or mean is None or var is None:
        raise NoForm("it uses the batch's statistics")
    norm = made_batch_norm(len(shape(x)), mean, var, weight, bias, float(eps))
    _maybe_tuple(at, "batch_norm", norm, x)


def _maybe_tuple(at: At, suffix: str, module: nn.Module, x: Node) -> None:
    """Replace the node, or the first result of one that gives a tuple."""
    if is_tensor(at.node):
        at.put(suffix, module, x)
        return
    used = at.parts()
    if set(used) - {0}:
        raise NoForm("its statistics are used")
    n = len(at.node.meta["shape"])
    at.become_parts([at.new(suffix, module, x), *([None] * (n - 1))])


def layer_norm(at: At) -> None:
    x, sizes, weight, bias, eps = at.tensor(), at.arg(1, "normalized_shape"), at.const(2, "weight"), at.const(3, "bias"), at.arg(4, "eps", 1e-5)
    norm = nn.LayerNorm(_per_dim(sizes, 1), float(eps), elementwise_affine=weight is not None or bias is not None)
    _maybe_tuple(at, "layer_norm", _filled(norm, weight, bias), x)


def group_norm(at: At) -> None:
    x, name = at.tensor(), name_of(at.node)
    if name == "native_group_norm":
        weight, bias, groups, eps = at.const(1, "weight"), at.const(2, "bias"), at.arg(6, "group"), at.arg(7, "eps")
    else:
        groups, weight, bias, eps = at.arg(1, "num_groups"), at.const(2, "weight"), at.const(3, "bias"), at.arg(4, "eps", 1e-5)
    norm = nn.GroupNorm(int(groups), shape(x)[1], float(eps), affine=weight is not None or bias is not None)
    _maybe_tuple(at, "group_norm", _filled(norm, weight, bias), x)


def instance_norm(at: At) -> None:
    x = at.tensor()
    order = ("weight", "bias", "running_mean", "running_var") if is_aten(at.node) else ("running_mean", "running_var", "weight", "bias")
    given = {n: at.const(i, n) for i, n in enumerate(order, 1)}
    mean, var, weight, bias = (given[n] for n in ("running_mean", "running_var", "weight", "bias"))
    uses, eps = at.arg(5, "use_input_stats", True), float(at.arg(7, "eps", 1e-5))
    rank = len(shape(x))
    if not 3 <= rank <= 5:
        raise NoForm("not over [N, C, *spatial]")
    if not uses and mean is not None and var is not None:
        at.put("batch_norm", made_batch_norm(rank, mean, var, weight, bias, eps), x)
        return
    cls: Any = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 3]
    at.put("instance_norm", _filled(cls(shape(x)[1], eps, affine=weight is not None or bias is not None), weight, bias), x)


def pool(which: str, n: int) -> Form:
    """``max_pool{n}d`` or ``avg_pool{n}d``; an average over the whole input is a global pool."""
    cls: Any = getattr(nn, f"{which.capitalize()}Pool{n}d")

    def form(at: At) -> None:
        x = at.tensor()
        if len(shape(x)) != n + 2:
            raise NoForm("not over [N, C, *spatial]")
        kernel = _per_dim(at.arg(1, "kernel_size"), n)
        stride = at.arg(2, "stride", None)
        how: dict[str, Any] = {"stride": kernel if not stride else _per_dim(stride, n), "padding": _per_dim(at.arg(3, "padding", 0), n)}
        if which == "max":
            how["dilation"], how["ceil_mode"] = _per_dim(at.arg(4, "dilation", 1), n), bool(at.arg(5, "ceil_mode", False))
            if at.arg(6, "return_indices", False):
                raise NoForm("its indices are used")
        else:
            how["ceil_mode"], how["count_include_pad"] = bool(at.arg(4, "ceil_mode", False)), bool(at.arg(5, "count_include_pad", True))
            if n > 1:
                how["divisor_override"] = at.arg(6, "divisor_override", None)
        if n == 1:
            kernel, how = kernel[0], {k: v[0] if isinstance(v, tuple) else v for k, v in how.items()}  # type: ignore[assignment]
        made = cls(kernel, **how)
        if which == "avg" and whole(made, x):
            made = m.GlobalAvgPool()
        _maybe_tuple(at, f"{which}_pool" if is_tensor(at.node) or which == "avg" else "max_pool", made, x)

    return form


def whole(pool: Any, x: Node) -> bool:
    """Does an average pool cover exactly the whole input?"""
    sizes = shape(x)[2:]
    kernel, padding = _per_dim(pool.kernel_size, len(sizes)), _per_dim(pool.padding, 1)
    return kernel == sizes and not any(padding) and getattr(pool, "divisor_override", None) is None and not any(x.meta["dynamic"][2:])


def adaptive(at: At, x: Node, size: Any, which: str) -> None:
    """Adaptive pools: a global pool, nothing, a plain pool when the windows are even, otherwise the adaptive layer."""
    sizes = shape(x)[2:]
    n = len(sizes)
    wanted = list(size) if isinstance(size, (tuple, list)) else [size] * n
    want = tuple(s if o is None else int(o) for s, o in zip(sizes, wanted, strict=True))
    if not 1 <= n <= 3:
        raise NoForm("not over [N, C, *spatial]")
    if which == "avg" and all(o == 1 for o in want):
        at.put("global_avg_pool", m.GlobalAvgPool(), x)
        return
    if any(x.meta["dynamic"][2:]):
        raise NoForm("its sizes follow the batch")
    if want == sizes:
        at.become(x)
        return
    if all(s % o == 0 for s, o in zip(sizes, want, strict=True)):
        kernel: Any = tuple(s // o for s, o in zip(sizes, want, strict=True))
        plain: Any = getattr(nn, f"{which.capitalize()}Pool{n}d")
        at.put(f"{which}_pool", plain(kernel if n > 1 else kernel[0]), x)
        return
    layer: Any = getattr(nn, f"Adaptive{which.capitalize()}Pool{n}d")
    if m.kind_of(layer(want)) == "opaque":
        raise NoForm("windows of different sizes")
    at.put(f"adaptive_{which}_pool", layer(want if n > 1 else want[0]), x)


def adaptive_pool(which: str) -> Form:
    def form(at: At) -> None:
        if not is_tensor(at.node) or at.arg(2, "return_indices", False):
            raise NoForm("its indices are used")
        adaptive(at, at.tensor(), at.arg(1, "output_size"), which)

    return form


def resize(at: At, x: Node, given: Any, scale: Any, mode: str, align: bool | None) -> None:
    """Replace the node by a resize by ``scale``, or to the node's size."""
    n = len(shape(x)) - 2
    if any(at.node.meta["dynamic"][2:]) or not 1 <= n <= 3:
        raise NoForm("its sizes follow the batch")
    factors = None if given is not None or scale is None else [float(f) for f in (scale if isinstance(scale, (tuple, list)) else [scale] * n)]
    if factors is None and at.shape == shape(x) and (mode.startswith("nearest") or align is not None):
        at.become(x)
        return
    at.put("resize", m.Resize(None if factors else at.shape[2:], factors, mode, align), x)


def interpolate(at: At) -> None:
    if at.arg(6, "antialias", False):
        raise NoForm("antialias has no canonical form")
    # A size may follow from the input's; the node's shape says what it is.
    given = at.node.kwargs.get("size", at.node.args[1] if len(at.node.args) > 1 else None)
    scale = at.arg(2, "scale_factor", None)
    if at.arg(5, "recompute_scale_factor", False):
        given, scale = at.shape[2:], None
    resize(at, at.tensor(), given, scale, at.arg(3, "mode", "nearest"), at.arg(4, "align_corners", None))


def upsample(mode: str, n: int) -> Form:
    """aten ``upsample_<mode>{n}d`` with ``.vec`` or ``.default`` arguments."""

    def form(at: At) -> None:
        x, given = at.tensor(), at.node.args[1]
        vec = getattr(at.node.target, "_overloadname", "") == "vec"
        align = None if mode.startswith("nearest") else bool(at.arg(2, "align_corners"))
        scales = at.arg(2 if align is None else 3, "scale_factors", None) if vec else list(at.node.args[2 if align is None else 3 :])
        if not scales or any(s is None for s in scales):
            scales = None
        resize(at, x, None if scales else given, scales, mode, align)

    return form


def embedding(at: At) -> None:
    a, b = (0, 1) if is_aten(at.node) else (1, 0)
    weight, x = at.const(a, "weight"), at.tensor(b, "indices" if is_aten(at.node) else "input")
    if weight is None or at.arg(3, "max_norm", None) is not None and not is_aten(at.node):
        raise NoForm("its weight is not constant, or renormalised")
    at.put("embedding", nn.Embedding(weight.shape[0], weight.shape[1], _weight=parameter(weight)), x)


def module(at: At) -> bool:
    """Canonical form of a layer module; ``False`` when the module is left as it is."""
    layer: Any = module_of(at.gm, at.node)
    name, x = type(layer).__name__, at.tensor()
    if name in GONE or isinstance(layer, nn.Identity):
        at.become(x)
        return True
    own = str(at.node.target).rsplit(".", 1)[-1]
    if isinstance(layer, nn.Hardtanh):
        at.put(own, m.Clamp(layer.min_val, layer.max_val), x)
    elif isinstance(layer, (nn.Flatten, nn.Unflatten)):
        to_reshape(at, x)
    elif isinstance(layer, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
        adaptive(at, x, layer.output_size, "avg")
    elif isinstance(layer, (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)) and not layer.return_indices:
        adaptive(at, x, layer.output_size, "max")
    elif isinstance(layer, nn.Upsample):
        again = layer.recompute_scale_factor
        resize(at, x, at.shape if again else layer.size, None if again else layer.scale_factor, layer.mode, layer.align_corners)
    elif name.startswith("ZeroPad") or name.startswith("ConstantPad"):
        at.put(own, m.Pad([int(p) for p in layer.padding], "constant", float(layer.value)), x)
    elif name.startswith(("ReflectionPad", "ReplicationPad")):
        at.put(own, m.Pad([int(p) for p in layer.padding], "reflect" if name[2] == "f" else "replicate"), x)
    elif type(layer) in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d) and len(shape(x)) > 3 and whole(layer, x):
        at.put(own, m.GlobalAvgPool(), x)
    elif isinstance(layer, nn.Softmax2d):
        at.put(own, nn.Softmax(1), x)
    elif isinstance(layer, (nn.Softmax, nn.LogSoftmax)) and layer.dim is None:
        at.put(own, type(layer)(0 if len(shape(x)) in (0, 1, 3) else 1), x)
    elif isinstance(layer, nn.ChannelShuffle):
        at.put(own, m.IndexSelect(1, torch.arange(shape(x)[1]).reshape(layer.groups, -1).t().reshape(-1)), x)
    elif isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.running_mean is not None and layer.running_var is not None:
        at.put(own, made_batch_norm(len(shape(x)), layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps), x)
    elif name == "FrozenBatchNorm2d":
        at.put(own, made_batch_norm(4, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps), x)
    else:
        return plain_layer(at, layer)
    return True


def plain_layer(at: At, layer: Any) -> bool:
    """Materialise parametrised weights; a subclass that inherits ``forward`` becomes its base class."""
    base = next((c for c in type(layer).__mro__ if c in m.KINDS), None)
    if base is None or type(layer).forward is not base.forward or getattr(type(layer), "_conv_forward", None) is not getattr(base, "_conv_forward", None):
        return False
    hooks = [h for h in layer._forward_pre_hooks.values() if hasattr(h, "compute_weight")]
    parametrised = "parametrizations" in layer._modules
    if type(layer) is base and not hooks:
        return False
    fixed: dict[str, Tensor] = {}
    with torch.no_grad():
        if parametrised:
            fixed = {k: getattr(layer, k).detach().clone() for k in layer.parametrizations}
        for hook in hooks:
            again = {"do_power_iteration": False} if type(hook).__name__ == "SpectralNorm" else {}
            fixed[hook.name] = hook.compute_weight(layer, **again).detach().clone()
    made = copy.copy(layer)
    made.__class__ = base
    drop = {"parametrizations", *(f"{k}_{s}" for k in fixed for s in ("g", "v", "orig", "u"))}
    for table in ("_parameters", "_buffers", "_modules"):
        made.__dict__[table] = {k: v for k, v in getattr(layer, table).items() if k not in drop}
    made._forward_pre_hooks = type(layer._forward_pre_hooks)((k, h) for k, h in layer._forward_pre_hooks.items() if h not in hooks)
    for k, value in fixed.items():
        made.__dict__.pop(k, None)
        setattr(made, k, nn.Parameter(value))
    swap_module(at.gm, at.node, made)
    return True


LAYERS: dict[str, Form] = {
    "linear": linear, **{f"conv{n}d": conv for n in (1, 2, 3)}, **{f"conv_transpose{n}d": conv for n in (1, 2, 3)}, "convolution": conv,
    **dict.fromkeys(("batch_norm", "native_batch_norm_legit_no_training", "cudnn_batch_norm"), batch_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), layer_norm), **dict.fromkeys(("group_norm", "native_group_norm"), group_norm),
    "instance_norm": instance_norm, "embedding": embedding, "interpolate": interpolate, "upsample": interpolate,
    **{f"{which}_pool{n}d": pool(which, n) for which in ("max", "avg") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": pool("max", n) for n in (2, 3)},
    **{f"adaptive_{which}_pool{n}d": adaptive_pool(which) for which in ("avg", "max") for n in (1, 2, 3)},
    **{f"upsample_{mode}{n}d": upsample(f"{mode}" if mode != "nearest_exact" else "nearest-exact", n)
       for mode, n in (("nearest", 1), ("nearest", 2), ("nearest", 3), ("linear", 1), ("bilinear", 2), ("trilinear", 3), ("bicubic", 2))},
    **{f"upsample_nearest_exact{n}d": upsample("nearest-exact", n) for n in (1, 2, 3)},
}  # fmt: skip

