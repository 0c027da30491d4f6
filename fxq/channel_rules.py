"""How each kind of operation treats labels of channels (:mod:`fxq.channels`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from fxq.channel_reshape import reshape
from fxq.channels import Cells, Channels, Dims, Giver, Labels, Rule, channel_dim, is_depthwise, replaced
from fxq.graph import attr, module_of, shape
from fxq.modules import kind_of


def _input(node: Node) -> Node:
    return node.all_input_nodes[0]


def same(c: Channels, node: Node) -> None:
    """Every element by itself: all places stay where they are."""
    c.dims[node] = c.of(_input(node))


def by_channel(c: Channels, node: Node) -> None:
    """Dimensions 0 and 1 pass; the operation mixes the others (means, statistics, resampling), which stay."""
    dims = c.of(_input(node))
    for d in dims[2:]:
        c.pin(d, node, "is a dimension of space here")
    c.dims[node] = [*dims[:2], *[None] * len(dims[2:])]


def spatial(c: Channels, node: Node) -> None:
    """Over the last dimensions, as many as the module's name says: those stay, channels pass."""
    dims, name = c.of(_input(node)), type(module_of(c.gm, node)).__name__
    n = next((k for k in (1, 2, 3) if f"{k}d" in name), len(dims) - 2)
    for d in dims[len(dims) - n :]:
        c.pin(d, node, "is a dimension of space here")
    c.dims[node] = [*dims[: len(dims) - n], *[None] * n]


def conv(c: Channels, node: Node) -> None:
    """Dense, grouped and depthwise convolutions, transposed ones too."""
    module: Any = module_of(c.gm, node)
    dims, k = c.of(_input(node)), len(module.kernel_size)
    at, g = channel_dim(module, len(dims)), module.groups
    for d in dims[at + 1 :]:
        c.pin(d, node, "is a dimension of space here")
    given: Labels | None
    if is_depthwise(module):
        read = dims[at]
        given = None if read is None else np.repeat(read, module.out_channels // g)
        c.weight(module.weight, 0, given if kind_of(module) == "conv" else read)
    else:
        given = c.new(module.out_channels)
        if given is not None:
            c.givers.append(Giver(node, given))
        out_dim, in_dim = (1, 0) if kind_of(module) == "conv_transpose" else (0, 1)
        c.weight(module.weight, out_dim + 2 * (g > 1), given)  # of a grouped one the dimensions are whole: numbers of their own
        c.weight(module.weight, in_dim + 2 * (g > 1), dims[at])
        if g > 1:
            for labels, role in ((dims[at], "inputs"), (given, "outputs")):
                if labels is not None:
                    c.cells.append(Cells(labels, g, node, role))
    c.dims[node] = [*dims[:at], given, *[None] * k]


def linear(c: Channels, node: Node) -> None:
    """Over the last dimension."""
    module: Any = module_of(c.gm, node)
    dims, given = c.of(_input(node)), c.new(module.out_features)
    if given is not None:
        c.givers.append(Giver(node, given))
    c.weight(module.weight, 0, given)
    c.weight(module.weight, 1, dims[-1])
    c.dims[node] = [*dims[:-1], given]


def embedding(c: Channels, node: Node) -> None:
    """Its width is what can be cut."""
    module: Any = module_of(c.gm, node)
    given = c.new(module.embedding_dim)
    if given is not None:
        c.givers.append(Giver(node, given))
        if module.max_norm is not None:
            c.pin(given, node, "has rows that are scaled to a norm")
    c.weight(module.weight, 1, given)
    c.dims[node] = [*c.of(_input(node)), given]


def channel_norm(c: Channels, node: Node) -> None:
    """Batch and instance norm: every channel by itself, on dimension 1 (``nn.PReLU`` likewise)."""
    module: Any = module_of(c.gm, node)
    (by_channel if kind_of(module) == "instance_norm" else same)(c, node)
    if getattr(module, "weight", None) is not None and module.weight.numel() > 1:
        c.weight(module.weight, 0, c.of(node)[1])


def group_norm(c: Channels, node: Node) -> None:
    """Statistics over equal groups of channels: each keeps the same number."""
    module: Any = module_of(c.gm, node)
    by_channel(c, node)
    labels = c.of(node)[1]
    if labels is None:
        return
    if module.weight is not None:
        c.weight(module.weight, 0, labels)
    if 1 < module.num_groups < module.num_channels:
        c.cells.append(Cells(labels, module.num_groups, node, "channels"))


def layer_norm(c: Channels, node: Node) -> None:
    """Statistics over the last dimensions; the weight is cut with them."""
    module: Any = module_of(c.gm, node)
    same(c, node)
    n = len(module.normalized_shape)
    if module.weight is not None:
        for i, labels in enumerate(c.of(node)[-n:]):
            c.weight(module.weight, i, labels)


def softmax(c: Channels, node: Node) -> None:
    """What it sums over stays."""
    module: Any = module_of(c.gm, node)
    same(c, node)
    dims = c.of(node)
    at = module.dim if module.dim is not None else 1
    at += len(dims) * (at < 0)
    c.pin(dims[at], node, "is what a softmax sums over")
    c.dims[node] = replaced(dims, at, None)


def arithmetic(c: Channels, node: Node) -> None:
    """Add, sub, mul, div with broadcasting: dimensions that meet are one."""
    xs = list(node.all_input_nodes)
    sizes = shape(node)
    out: Dims = []
    for i in range(-len(sizes), 0):
        wide = [c.of(x)[i] for x in xs if len(shape(x)) >= -i and shape(x)[i] == sizes[i]]
        why = "meets a value whose channels are fixed"
        out.append(c.join(wide, node, why) if sizes[i] > 1 else None)
    c.dims[node] = out


def matmul(c: Channels, node: Node) -> None:
    """Batch dimensions meet (heads), the summed dimension is one."""
    a, b = node.all_input_nodes if len(node.all_input_nodes) == 2 else (_input(node),) * 2
    if min(len(shape(a)), len(shape(b))) < 2:
        c.pinned_inputs(node, "goes into a product of vectors")
        c.dims[node] = [None] * len(shape(node))
        return
    da, db, sizes = c.of(a), c.of(b), shape(node)
    c.join([da[-1], db[-2]], node, "is summed over with a value whose channels are fixed")
    out: Dims = []
    for i in range(-len(sizes), -2):
        wide = [d[i] for d, x in ((da, a), (db, b)) if len(d) >= -i and shape(x)[i] == sizes[i]]
        out.append(c.join(wide, node, "meets a value whose channels are fixed") if sizes[i] > 1 else None)
    c.dims[node] = [*out, da[-2], db[-1]]


def cat(c: Channels, node: Node) -> None:
    """Along its dimension one after the other; the other dimensions are one."""
    xs, dim = list(node.args), int(module_of(c.gm, node).dim)  # type: ignore[arg-type]
    all_dims = [c.of(x) for x in xs]  # type: ignore[arg-type]
    out = [c.join([d[i] for d in all_dims], node, "is joined with a value whose channels are fixed") for i in range(len(shape(node))) if i != dim]
    if all(d[dim] is None for d in all_dims):
        joined = None
    else:
        parts = [d[dim] if d[dim] is not None else _pinned(c, node, shape(x)[dim]) for d, x in zip(all_dims, xs, strict=True)]  # type: ignore[arg-type]
        joined = np.concatenate([p for p in parts if p is not None])
    c.dims[node] = [*out[:dim], joined, *out[dim:]]


def _pinned(c: Channels, node: Node, size: int) -> Labels:
    """New labels that stay."""
    c.count += size
    labels = np.arange(c.count - size, c.count)
    c.pin(labels, node, "is fixed")
    return labels


def expand(c: Channels, node: Node) -> None:
    """What is repeated stays."""
    x = _input(node)
    ahead = len(shape(node)) - len(shape(x))
    c.dims[node] = [None] * ahead + [d if s == o else None for d, s, o in zip(c.of(x), shape(x), shape(node)[ahead:], strict=True)]


def permute(c: Channels, node: Node) -> None:
    """Dimensions change places."""
    dims = c.of(_input(node))
    c.dims[node] = [dims[i] for i in module_of(c.gm, node).dims]  # type: ignore[union-attr]


def slices(c: Channels, node: Node) -> None:
    """Part of the places, in order."""
    dims = list(c.of(_input(node)))
    for dim, start, stop, step in module_of(c.gm, node).slices:  # type: ignore[union-attr]
        labels = dims[dim]
        if labels is not None and (start, stop, step) != (0, None, 1):
            dims[dim] = labels[start:stop:step]
    c.dims[node] = dims


def index_select(c: Channels, node: Node) -> None:
    """Places in another order (a channel shuffle), or some of them."""
    module: Any = module_of(c.gm, node)
    dims = c.of(_input(node))
    labels = dims[module.dim]
    c.dims[node] = replaced(dims, module.dim, None if labels is None else labels[module.indices.cpu().numpy()])


def split(c: Channels, node: Node) -> None:
    """Consecutive parts."""
    module: Any = module_of(c.gm, node)
    dims, out, start = c.of(_input(node)), [], 0
    for s in node.meta["shape"]:
        size = s[module.dim]
        labels = dims[module.dim]
        out.append(replaced(dims, module.dim, None if labels is None else labels[start : start + size]))
        start += size
    c.dims[node] = out


def getitem(c: Channels, node: Node) -> None:
    """One value of a tuple."""
    found = c.dims[node.args[0]]  # type: ignore[index]
    at: Any = node.args[1]
    c.dims[node] = list(found[at]) if isinstance(at, int) and found and -len(found) <= at < len(found) else [None] * len(shape(node))


def pad(c: Channels, node: Node) -> None:
    """Zeros beside channels can be cut like channels; every other padding of channels fixes them."""
    module: Any = module_of(c.gm, node)
    dims, zeros = list(c.of(_input(node))), module.mode == "constant" and module.value in (0, None)
    for i in range(len(module.pads) // 2):
        before, behind = module.pads[2 * i : 2 * i + 2]
        at = len(dims) - 1 - i
        labels = dims[at]
        if labels is None or (before == 0 and behind == 0):
            continue
        if not zeros or min(before, behind) < 0:
            c.pin(labels, node, f"is padded or cropped ({module.mode})")
            dims[at] = None
            continue
        c.count += before + behind
        fresh = np.arange(c.count - before - behind, c.count)
        dims[at] = np.concatenate([fresh[:before], labels, fresh[before:]])
    c.dims[node] = dims


def reduce(c: Channels, node: Node) -> None:
    """Dimensions that are averaged or summed stay; the others pass."""
    module: Any = module_of(c.gm, node)
    dims = c.of(_input(node))
    gone = {d % len(dims) for d in module.dims}
    for d in gone:
        c.pin(dims[d], node, "is averaged or summed over")
    c.dims[node] = [None if i in gone else d for i, d in enumerate(dims) if module.keepdim or i not in gone]


def pixel_shuffle(c: Channels, node: Node) -> None:
    """``r * r`` channels become one: they go together."""
    module: Any = module_of(c.gm, node)
    dims, r2 = c.of(_input(node)), int(module.upscale_factor) ** 2
    at = len(dims) - 3
    labels = dims[at]
    if labels is not None:
        blocks = labels.reshape(-1, r2)
        for i in range(1, r2):
            c.tie(np.ascontiguousarray(blocks[:, 0]), np.ascontiguousarray(blocks[:, i]))
        labels = np.ascontiguousarray(blocks[:, 0])
    for d in dims[at + 1 :]:
        c.pin(d, node, "is a dimension of space here")
    c.dims[node] = [*dims[:at], labels, None, None]


def constant(c: Channels, node: Node) -> None:
    """A parameter or buffer: cut where what it meets is cut."""
    value = attr(c.gm, node)
    out: Dims = [c.new(s) for s in shape(node)] if isinstance(node.meta.get("shape"), tuple) else []
    for i, labels in enumerate(out):
        c.weight(value, i, labels)
    c.dims[node] = out


POINTWISE = tuple("relu clamp leaky_relu elu selu sigmoid hardsigmoid hardswish silu mish tanh gelu softplus unary power fake_quantize".split())
"""Kinds that treat every element by itself."""
POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")

RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, same), **dict.fromkeys(POOLS, spatial), **dict.fromkeys(("add", "sub", "mul", "div"), arithmetic),
    "conv": conv, "conv_transpose": conv, "linear": linear, "embedding": embedding, "batch_norm": channel_norm, "instance_norm": channel_norm,
    "prelu": channel_norm, "group_norm": group_norm, "layer_norm": layer_norm, "softmax": softmax, "log_softmax": softmax, "matmul": matmul,
    "cat": cat, "reshape": reshape, "expand": expand, "permute": permute, "slice": slices, "index_select": index_select, "split": split,
    "getitem": getitem, "pad": pad, "mean": reduce, "sum": reduce, "pixel_shuffle": pixel_shuffle, "attr": constant,
    "global_avg_pool": by_channel, "resize": by_channel,
}  # fmt: skip
"""Kind of node -> how it treats labels."""
