"""Cut a canonical graph: every layer becomes a narrower one that keeps the given places of its dimensions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq.canonical import add_tensor
from fxq.channels import Channels, Labels, is_depthwise, layer_labels
from fxq.graph import attr, insert_module, kind, module_of, shape, swap_module

Kept = Labels | None
"""int64 indices of the places that stay, or ``None`` when all do."""


class Cutter:
    """Narrows the nodes of one graph in place.

    Attributes:
        channels: labels of the graph as it was.
        keep: bool ``[labels]``: which stay.
        changed: nodes that were rewritten.
    """

    def __init__(self, channels: Channels, keep: Labels) -> None:
        self.channels, self.gm, self.keep = channels, channels.gm, keep
        self.changed = 0
        self._made: dict[tuple[Any, ...], Tensor] = {}
        self._held: list[Tensor] = []
        self._replaced: set[str] = set()

    def run(self) -> int:
        """Cut all nodes, then write the new shapes into their meta."""
        for node in list(self.gm.graph.nodes):
            cut = CUTS.get(kind(self.gm, node))
            if cut is not None:
                cut(self, node)
        read = {str(n.target) for n in self.gm.graph.nodes if n.op == "get_attr"}
        for node in self.gm.graph.nodes:
            self._resize(node)
        runs = {str(n.target) for n in self.gm.graph.nodes if n.op == "call_module"}
        for name in self._replaced - read:
            owner, _, last = name.rpartition(".")
            if owner not in runs:
                delattr(self.gm.get_submodule(owner), last)
        return self.changed

    def _resize(self, node: Node) -> None:
        """The node's shape after the cut: only labelled dimensions shrink."""
        dims, sizes = self.channels.dims.get(node), node.meta.get("shape")
        if isinstance(sizes, tuple) and dims:
            node.meta["shape"] = tuple(self.size(d, s) for d, s in zip(dims, sizes, strict=True))
        elif isinstance(sizes, list) and dims:
            parts = zip(dims, sizes, strict=True)
            node.meta["shape"] = [tuple(self.size(d, s) for d, s in zip(ds, ss, strict=True)) if isinstance(ss, tuple) else ss for ds, ss in parts]

    def kept(self, labels: Labels | None) -> Kept:
        """Places of a dimension that stay; ``None``: all."""
        if labels is None:
            return None
        mask = self.keep[labels]
        return None if bool(mask.all()) else np.flatnonzero(mask)

    def size(self, labels: Labels | None, size: int) -> int:
        """How many places stay."""
        return size if labels is None else int(self.keep[labels].sum())

    def take(self, t: Tensor | None, *places: Kept) -> Tensor | None:
        """The tensor with these places of its first dimensions; one that layers share stays shared."""
        if t is None or all(p is None for p in places):
            return t
        key = (id(t), *(None if p is None else p.tobytes() for p in places))
        if key not in self._made:
            out = t.detach()
            for dim, p in enumerate(places):
                if p is not None:
                    out = out.index_select(dim, torch.from_numpy(p).to(out.device))
            out = out.contiguous()
            self._made[key] = nn.Parameter(out, t.requires_grad) if isinstance(t, nn.Parameter) else out
            self._held.append(t)
        return self._made[key]

    def swap(self, node: Node, tensors: dict[str, Tensor | None], **fields: Any) -> None:
        """A copy of the node's module with these tensors and fields takes its place."""
        old = module_of(self.gm, node)
        new = copy.copy(old)
        for table in ("_parameters", "_buffers"):
            new.__dict__[table] = dict(new.__dict__[table])
        for name, t in tensors.items():
            if t is not None:
                new.__dict__["_parameters" if name in new._parameters else "_buffers"][name] = t
        new.__dict__.update(fields)
        swap_module(self.gm, node, new)
        self.changed += 1


def drop_unread(gm: GraphModule) -> None:
    """Take out tensors of modules that the graph only passes through on its way to others: an attention's packed weight that became a layer of its own."""
    runs = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for path, module in gm.named_modules():
        if any(path == r or path.startswith(f"{r}.") for r in runs):
            continue
        for table in (module._parameters, module._buffers):
            for name in [n for n in table if (f"{path}.{n}" if path else n) not in read]:
                table.pop(name)


def grouped_rows(weight: Tensor, groups: int, given: Kept, read: Kept, transposed: bool = False) -> Tensor:
    """Weight of a grouped convolution with these output and input channels: in each group its own rows and columns.

    Args:
        weight: ``[O, I / groups, *kernel]``, or ``[I, O / groups, *kernel]`` when ``transposed``.
        given, read: kept output and input channels, the same number in each group.
    """
    first, second = (read, given) if transposed else (given, read)
    w = weight.detach().reshape(groups, -1, *weight.shape[1:])
    rows, columns = w.shape[1], w.shape[2]
    out = []
    for g in range(groups):
        part = w[g]
        for dim, places, size in ((0, first, rows), (1, second, columns)):
            if places is not None:
                mine = places[(places >= g * size) & (places < (g + 1) * size)] - g * size
                part = part.index_select(dim, torch.from_numpy(mine).to(part.device))
        out.append(part)
    return torch.cat(out).contiguous()


def _conv(c: Cutter, node: Node) -> None:
    module: Any = module_of(c.gm, node)
    read, given = map(c.kept, layer_labels(c.channels, node, module))
    if read is None and given is None:
        return
    g, transposed = module.groups, kind(c.gm, node) == "conv_transpose"
    fields: dict[str, Any] = {
        "in_channels": module.in_channels if read is None else len(read), "out_channels": module.out_channels if given is None else len(given)
    }
    if g == 1:
        weight = c.take(module.weight, *((read, given) if transposed else (given, read)))
    elif is_depthwise(module):
        fields["groups"] = fields["in_channels"]
        weight = c.take(module.weight, read if transposed else given)
    else:
        weight = nn.Parameter(grouped_rows(module.weight, g, given, read, transposed), module.weight.requires_grad)
    c.swap(node, {"weight": weight, "bias": c.take(module.bias, given)}, **fields)


def _linear(c: Cutter, node: Node) -> None:
    module: Any = module_of(c.gm, node)
    read, given = map(c.kept, layer_labels(c.channels, node, module))
    if read is None and given is None:
        return
    fields = {"in_features": module.in_features if read is None else len(read), "out_features": module.out_features if given is None else len(given)}
    c.swap(node, {"weight": c.take(module.weight, given, read), "bias": c.take(module.bias, given)}, **fields)


def _embedding(c: Cutter, node: Node) -> None:
    module: Any = module_of(c.gm, node)
    given = c.kept(c.channels.of(node)[-1])
    if given is not None:
        c.swap(node, {"weight": c.take(module.weight, None, given)}, embedding_dim=len(given))


def _norm(c: Cutter, node: Node) -> None:
    """Batch, instance and group norm, PReLU: tensors over dimension 1."""
    module: Any = module_of(c.gm, node)
    kept = c.kept(c.channels.of(node)[1]) if len(c.channels.of(node)) > 1 else None
    if kept is None:
        return
    fields: dict[str, Any] = {}
    if hasattr(module, "num_features"):
        fields["num_features"] = len(kept)
    elif hasattr(module, "num_channels"):
        fields["num_channels"] = len(kept)
        if module.num_groups == module.num_channels:
            fields["num_groups"] = len(kept)
    elif module.num_parameters == 1:
        return
    else:
        fields["num_parameters"] = len(kept)
    names = ("weight", "bias", "running_mean", "running_var")
    c.swap(node, {n: c.take(getattr(module, n, None), kept) for n in names}, **fields)


def _layer_norm(c: Cutter, node: Node) -> None:
    module: Any = module_of(c.gm, node)
    n = len(module.normalized_shape)
    dims = c.channels.of(node)[-n:]
    kept = [c.kept(d) for d in dims]
    if any(k is not None for k in kept):
        sizes = tuple(c.size(d, s) for d, s in zip(dims, module.normalized_shape, strict=True))
        c.swap(node, {"weight": c.take(module.weight, *kept), "bias": c.take(module.bias, *kept)}, normalized_shape=sizes)


def _constant(c: Cutter, node: Node) -> None:
    kept = [c.kept(d) for d in c.channels.of(node)]
    if any(k is not None for k in kept):
        value = c.take(attr(c.gm, node), *kept)
        assert value is not None
        c._replaced.add(str(node.target))
        owner = {id(t): name for name, t in [*c.gm._parameters.items(), *c.gm._buffers.items()] if t is not None}
        node.target = owner.get(id(value)) or add_tensor(c.gm, str(node.target), value)
        c.changed += 1


def _sizes(c: Cutter, node: Node) -> None:
    """Reshape and expand: the sizes of what was cut."""
    module: Any = module_of(c.gm, node)
    dims = c.channels.of(node)
    new = [s if d is None or s in (None, -1) else c.size(d, s) for d, s in zip(dims, module.shape, strict=True)]
    if tuple(new) != tuple(module.shape):
        swap_module(c.gm, node, type(module)(new))
        c.changed += 1


def _split(c: Cutter, node: Node) -> None:
    module: Any = module_of(c.gm, node)
    if isinstance(module.sizes, int):
        return
    dims = c.channels.dims[node]
    new = [c.size(d[module.dim], s) for d, s in zip(dims, module.sizes, strict=True)]
    if new != list(module.sizes):
        swap_module(c.gm, node, m.Split(new, module.dim))
        c.changed += 1


def _slice(c: Cutter, node: Node) -> None:
    """Contiguous parts stay slices; what a stride picks becomes a gather."""
    module: Any = module_of(c.gm, node)
    x = node.all_input_nodes[0]
    before = c.channels.of(x)
    entries: list[tuple[int, int, int | None, int]] = []
    gathers: list[tuple[int, list[int]]] = []
    for dim, start, stop, step in module.slices:
        keep = None if before[dim] is None or c.kept(before[dim]) is None else c.keep[before[dim]]
        if keep is None:
            entries.append((dim, start, stop, step))
            continue
        chosen = np.arange(shape(x)[dim])[start:stop:step]
        place = np.cumsum(keep) - 1
        new = place[chosen[keep[chosen]]].tolist()
        if step == 1 or new == list(range(new[0], new[0] + len(new))):
            entries.append((dim, new[0], new[-1] + 1, 1))
        else:
            gathers.append((dim, new))
    if entries == list(module.slices):
        return
    c.changed += 1
    swap_module(c.gm, node, m.Slice(entries))
    dims, sizes = list(c.channels.of(node)), list(shape(node))
    for dim, _ in gathers:  # the slice itself leaves these dimensions whole now
        dims[dim], sizes[dim] = before[dim], shape(x)[dim]
    last, final = node, (list(c.channels.of(node)), list(shape(node)))
    for dim, new in gathers:
        users = [u for u in last.users]
        made = insert_module(c.gm, last, f"{node.target}_places", m.IndexSelect(dim, new), (last,), like=node)
        for u in users:
            u.replace_input_with(last, made)
        c.channels.dims[last], last.meta["shape"] = list(dims), tuple(sizes)
        dims[dim], sizes[dim] = final[0][dim], final[1][dim]
        last = made
    c.channels.dims[last], last.meta["shape"] = dims, tuple(sizes)


def _index_select(c: Cutter, node: Node) -> None:
    module: Any = module_of(c.gm, node)
    labels = c.channels.of(node.all_input_nodes[0])[module.dim]
    if labels is None or c.kept(labels) is None:
        return
    keep = c.keep[labels]
    indices = module.indices.cpu().numpy()
    new = (np.cumsum(keep) - 1)[indices[keep[indices]]]
    swap_module(c.gm, node, m.IndexSelect(module.dim, torch.from_numpy(new).to(module.indices.device)))
    c.changed += 1


def _pad(c: Cutter, node: Node) -> None:
    module: Any = module_of(c.gm, node)
    dims, pads = c.channels.of(node), list(module.pads)
    for i in range(len(pads) // 2):
        labels = dims[len(dims) - 1 - i]
        if labels is not None and (pads[2 * i] or pads[2 * i + 1]):
            before, behind = pads[2 * i : 2 * i + 2]
            pads[2 * i : 2 * i + 2] = [c.size(labels[:before], before), c.size(labels[len(labels) - behind :], behind)]
    if pads != list(module.pads):
        swap_module(c.gm, node, m.Pad(pads, module.mode, module.value))
        c.changed += 1


def _places(names: str, cut: Callable[[Cutter, Node], None]) -> dict[str, Callable[[Cutter, Node], None]]:
    return dict.fromkeys(names.split(), cut)


CUTS: dict[str, Callable[[Cutter, Node], None]] = {
    **_places("conv conv_transpose", _conv), **_places("batch_norm instance_norm group_norm prelu", _norm), **_places("reshape expand", _sizes),
    "linear": _linear, "embedding": _embedding, "layer_norm": _layer_norm, "attr": _constant, "split": _split, "slice": _slice,
    "index_select": _index_select, "pad": _pad,
}  # fmt: skip
"""Kind of node -> how it is narrowed; other kinds need no change."""
