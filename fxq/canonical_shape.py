"""Canonical forms of operations that move values: reshapes, permutes, splits, concatenation, padding, casts."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxq import modules as m
from fxq.canonical import At, Form, NoForm, is_tensor, name_of, target_sizes, to_reshape
from fxq.graph import shape


def reshape(at: At) -> None:
    to_reshape(at, at.tensor())


def as_strided(at: At) -> None:
    """A plain reshape of a contiguous tensor, as exported graphs write it."""
    x, strides = at.tensor(), at.arg(2, "stride")
    dense = torch.empty(at.shape, device="meta").stride()
    offset = at.arg(3, "storage_offset", None) or 0
    if offset or any(s != d for s, d, n in zip(strides, dense, at.shape, strict=True) if n > 1):
        raise NoForm("not the strides of a contiguous tensor")
    if [s for s in shape(x) if s > 1] != [s for s in at.shape if s > 1]:
        raise NoForm("not a reshape")
    to_reshape(at, x)


def cat(at: At) -> None:
    given: Any = at.node.kwargs.get("tensors", at.node.args[0] if at.node.args else ())
    dim = at.arg(1, "dim", at.arg(1, "axis", 0))
    n = len(at.shape)
    if not isinstance(given, (tuple, list)):
        raise NoForm("its tensors are no list")
    xs = [x for x in given if not (is_tensor(x) and shape(x) == (0,) and n > 1)]
    if not xs or not all(is_tensor(x) and x.meta["dtype"] == at.node.meta["dtype"] for x in xs):
        raise NoForm("tensors of several types")
    at.put("cat", m.Cat(int(dim) % n), *xs)


def stack(at: At) -> None:
    given: Any = at.node.kwargs.get("tensors", at.node.args[0] if at.node.args else ())
    n = len(at.shape)
    dim = int(at.arg(1, "dim", 0)) % n
    if not isinstance(given, (tuple, list)) or not all(is_tensor(x) and x.meta["dtype"] == at.node.meta["dtype"] for x in given):
        raise NoForm("its tensors are no list of one type")
    parts = []
    for x in given:
        sizes: list[Any] = list(target_sizes(x, x))
        if None in sizes:
            raise NoForm("several sizes follow the batch")
        parts.append(at.reshaped(x, [*sizes[:dim], 1, *sizes[dim:]]))
    at.put("stack", m.Cat(dim), *parts)


def permute(at: At) -> None:
    x = at.tensor()
    n, name = len(shape(x)), name_of(at.node)
    if name == "permute":
        dims = [int(d) % n for d in at.rest(1, "dims")]
    elif name in ("t", "T", "numpy_T"):
        dims = list(reversed(range(n)))
    elif name in ("mT", "adjoint"):
        dims = [*range(n - 2), n - 1, n - 2]
    elif name in ("movedim", "moveaxis"):
        source, target = at.arg(1, "source"), at.arg(2, "destination")
        moved = [int(d) % n for d in (source if isinstance(source, (tuple, list)) else [source])]
        places = [int(d) % n for d in (target if isinstance(target, (tuple, list)) else [target])]
        dims = [d for d in range(n) if d not in moved]
        for place, d in sorted(zip(places, moved, strict=True)):
            dims.insert(place, d)
    else:
        a, b = int(at.arg(1, "dim0", at.arg(1, "axis0", 0))) % n, int(at.arg(2, "dim1", at.arg(2, "axis1", 0))) % n
        dims = list(range(n))
        dims[a], dims[b] = b, a
    if dims == list(range(n)):
        at.become(x)
    else:
        at.put("permute", m.Permute(dims), x)


def attribute(at: At) -> None:
    """``x.T``, ``x.mT``, ``x.data``."""
    x, name = at.tensor(), at.node.args[1]
    n = len(shape(x))
    if name == "data":
        at.become(x)
    elif name in ("T", "mT", "H", "mH"):
        dims = list(reversed(range(n))) if name in ("T", "H") else [*range(n - 2), n - 1, n - 2]
        at.put("permute", m.Permute(dims), x)
    else:
        raise NoForm(f"attribute {name}")


def split(at: At) -> None:
    """``split``, ``chunk``, ``tensor_split``."""
    x = at.tensor()
    if not isinstance(at.node.meta.get("shape"), list):
        raise NoForm("gives no tuple")
    at.parts()
    dim = int(at.arg(2, "dim", 0)) % len(shape(x))
    sizes = [s[dim] for s in at.node.meta["shape"]]
    if not x.meta["dynamic"][dim]:
        at.put("split", m.Split(sizes, dim), x)
    elif name_of(at.node) in ("chunk", "unsafe_chunk") and len(set(sizes)) == 1 and len(sizes) == int(at.arg(1, "chunks")):
        at.put("split", m.Split(len(sizes), dim), x)
    else:
        raise NoForm("along the batch")


def unbind(at: At) -> None:
    x = at.tensor()
    users = at.parts()
    dim = int(at.arg(1, "dim", 0)) % len(shape(x))
    if x.meta["dynamic"][dim]:
        raise NoForm("along the batch")
    cut = at.new("split", m.Split([1] * shape(x)[dim], dim), x)
    values: list[Node | None] = [None] * shape(x)[dim]
    for i in sorted(users):
        part = at.part(cut, i)
        values[i] = at.new("reshape", m.Reshape(target_sizes(part, users[i][0])), part, like=users[i][0])
    at.become_parts(values)


def repeat(at: At) -> None:
    """Concatenation of the tensor with itself along each repeated dimension."""
    x, times = at.tensor(), [int(t) for t in at.rest(1, "repeats")]
    if name_of(at.node) == "tile":
        times = [1] * (len(shape(x)) - len(times)) + times
    extra = len(times) - len(shape(x))
    if extra:
        x = at.reshaped(x, [*([1] * extra), *target_sizes(x, x)])
    for dim, t in enumerate(times):
        if t < 1:
            raise NoForm("repeats nothing")
        if t > 1 and shape(x)[dim] == 1 and not x.meta["dynamic"][dim]:
            x = at.new("expand", m.Expand([t if d == dim else -1 for d in range(len(times))]), x)
        elif t > 1:
            x = at.new("cat", m.Cat(dim), *([x] * t))
    at.become(x)


def repeat_interleave(at: At) -> None:
    x, times, dim = at.tensor(), at.arg(1, "repeats"), at.arg(2, "dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        raise NoForm("repeats differ")
    dim %= len(shape(x))
    if x.meta["dynamic"][dim]:
        raise NoForm("along the batch")
    at.put("index_select", m.IndexSelect(dim, torch.arange(shape(x)[dim]).repeat_interleave(times)), x)


def channel_shuffle(at: At) -> None:
    x, groups = at.tensor(), int(at.arg(1, "groups"))
    channels = shape(x)[1]
    at.put("shuffle", m.IndexSelect(1, torch.arange(channels).reshape(groups, -1).t().reshape(-1)), x)


def pixel_shuffle(at: At) -> None:
    x, r = at.tensor(), int(at.arg(1, "upscale_factor"))
    if len(shape(x)) != 4:
        raise NoForm("not over [N, C, H, W]")
    at.put("pixel_shuffle", torch.nn.PixelShuffle(r), x)


def pixel_unshuffle(at: At) -> None:
    """Reshape, permute, reshape."""
    x, r = at.tensor(), int(at.arg(1, "downscale_factor"))
    if len(shape(x)) != 4 or any(x.meta["dynamic"][1:]):
        raise NoForm("not over [N, C, H, W]")
    _, c, h, w = shape(x)
    n = -1 if x.meta["dynamic"][0] else shape(x)[0]
    y = at.reshaped(x, [n, c, h // r, r, w // r, r])
    to_reshape(at, at.new("permute", m.Permute((0, 1, 3, 5, 2, 4)), y))


def pad(at: At) -> None:
    x, pads, mode = at.tensor(), at.arg(1, "pad"), at.arg(2, "mode", "constant")
    value = at.arg(3, "value", 0.0)
    if name_of(at.node) == "constant_pad_nd":
        mode, value = "constant", at.arg(2, "value", 0.0)
    n = len(shape(x))
    pads = [int(p) for p in pads]
    if not any(pads):
        at.become(x)
        return
    if any(x.meta["dynamic"][n - 1 - i // 2] for i, p in enumerate(pads) if p):
        raise NoForm("along the batch")
    if min(pads) < 0:
        if mode != "constant":
            raise NoForm("negative padding")
        cuts = [(n - 1 - k, max(0, -pads[2 * k]), shape(x)[n - 1 - k] + min(0, pads[2 * k + 1]), 1) for k in range(len(pads) // 2)]
        x = at.new("slice", m.Slice([c for c in cuts if (c[1], c[2]) != (0, shape(x)[c[0]])]), x)
        pads = [max(0, p) for p in pads]
    at.put("pad", m.Pad(pads, mode, float(value or 0.0)), x)


def cast(at: At) -> None:
    """``to``, ``float``, ``type_as``, ``cpu``: gone when the type stays."""
    x = at.tensor()
    if not is_tensor(at.node) or x.meta["dtype"] != at.node.meta["dtype"]:
        raise NoForm(f"a cast from {x.meta['dtype']} to {at.node.meta.get('dtype')}")
    at.become(x)


def gone(at: At) -> None:
    """Nothing in eval mode."""
    x = at.tensor()
    if name_of(at.node) in _RANDOM and at.arg(2, "training" if name_of(at.node) != "stochastic_depth" else "mode", False) is True:
        raise NoForm("it drops at random in eval mode as well")
    at.become(x)


_RANDOM = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout")


def stochastic_depth(at: At) -> None:
    if at.arg(3, "training", True):
        raise NoForm("it drops at random in eval mode as well")
    at.become(at.tensor())


SHAPE: dict[str, Form] = {
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten", "unsafe_view", "view_as", "reshape_as", "ravel"), reshape),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "t", "mT", "adjoint", "movedim", "moveaxis", "numpy_T"), permute),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat), "stack": stack, "getattr": attribute,
    **dict.fromkeys(("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "split_with_sizes_copy"), split),
    "unbind": unbind, **dict.fromkeys(("repeat", "tile"), repeat), "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle), "pixel_shuffle": pixel_shuffle, "pixel_unshuffle": pixel_unshuffle,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("to", "float", "type", "type_as", "to_copy", "cpu", "cuda", "half", "double", "bfloat16", "convert_element_type"), cast),
    **dict.fromkeys(("contiguous", "detach", "clone", "alias", "lift_fresh_copy", "lift_fresh", "positive", "requires_grad", "detach_copy", *_RANDOM), gone),
    "as_strided": as_strided, "stochastic_depth": stochastic_depth,
}  # fmt: skip
