"""Constants that cut channels still emit: ``relu(beta)`` of a batch norm whose gamma is 0, and where the next layer's bias can take them over.

A cut channel is one whose weights, and the gammas behind them, are taken as 0. What is left of it is a constant: the bias, after a batch norm
``beta``, after a ReLU ``relu(beta)``. A linear layer, or a convolution that pads nothing, adds ``sum W[:, c] * constant`` to every output: its
bias takes that over exactly. A padded convolution adds less of it at the borders, so there the constant is dropped.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from fxq.channel_rules import POINTWISE, RULES
from fxq.channels import Channels, Labels, channel_dim, is_depthwise
from fxq.graph import attr, kind, module_of, shape

Value = tuple[int, Labels]
"""A dimension and the constant of each of its places: float64, NaN where it is kept or not constant."""
MOVES = ("reshape", "permute", "slice", "index_select", "split", "getitem", "expand")
SAME = ("adaptive_avg_pool", "adaptive_max_pool", "global_avg_pool", "resize", "max_pool", "mean")


@dataclass(frozen=True)
class Reading:
    """A layer that reads cut channels.

    Attributes:
        node: dense or grouped conv, transposed conv, linear.
        places: int64, its cut input channels whose constant its bias takes over.
        values: float64, those constants.
        dropped: cut input channels whose constant is not 0 (or not known) and is lost.
    """

    node: Node
    places: Labels
    values: Labels
    dropped: int


class Constants:
    """Constants of the cut channels of every value.

    Attributes:
        channels, keep: labels and which stay, bool ``[labels]``.
        of: node -> its value's constants, where exactly one dimension has cut places (of a tuple: one entry a part).
    """

    def __init__(self, channels: Channels, keep: Labels) -> None:
        self.channels, self.gm, self.keep = channels, channels.gm, keep
        self.of: dict[Node, Any] = {}
        for node in self.gm.graph.nodes:
            self.of[node] = self._value(node)

    def readings(self) -> list[Reading]:
        """All layers that read cut channels."""
        found = []
        for node in self.gm.graph.nodes:
            k = kind(self.gm, node)
            module: Any = module_of(self.gm, node) if k in ("conv", "conv_transpose", "linear") else None
            if module is None or is_depthwise(module):
                continue
            x = node.all_input_nodes[0]
            at = channel_dim(module, len(shape(x)))
            labels = self.channels.of(x)[at]
            cut = np.flatnonzero(~self.keep[labels]) if labels is not None else np.empty(0, np.int64)
            if not len(cut):
                continue
            value = self.of[x]
            values = value[1][cut] if value is not None and value[0] == at else np.full(len(cut), np.nan)
            takes = np.isfinite(values) & (values != 0) & (k == "linear" or (k == "conv" and pads_nothing(module)))
            found.append(Reading(node, cut[takes], values[takes], int((~takes & (values != 0)).sum())))
        return found

    def _value(self, node: Node) -> Any:
        k = kind(self.gm, node)
        dims = self.channels.dims[node]
        if k == "split":
            return [self._moved(node, d, i) for i, d in enumerate(dims)]
        cut = [i for i, d in enumerate(dims) if isinstance(d, np.ndarray) and not bool(self.keep[d].all())]
        if len(cut) != 1:
            return None
        at, labels = cut[0], dims[cut[0]]
        found = self._constant(node, k, at, dims)
        if found is None:
            return None
        return at, np.where(self.keep[labels], np.nan, found)

    def _constant(self, node: Node, k: str, at: int, dims: Any) -> Labels | None:
        """Constant of each place of dimension ``at``; kept places may hold anything."""
        n = len(dims[at])
        if k == "attr":
            t = attr(self.gm, node).detach().double()
            return t.reshape(-1).cpu().numpy() if t.numel() == n else None
        if node.op != "call_module":
            return self._moved_values(node, at) if k == "getitem" else None
        module: Any = module_of(self.gm, node)
        if k in ("conv", "conv_transpose", "linear"):
            return np.zeros(n) if module.bias is None else np.asarray(module.bias.detach().double().cpu().numpy())
        if k == "embedding":
            return np.zeros(n)
        if k in ("batch_norm", "layer_norm", "group_norm", "instance_norm"):
            return self._normed(module, n) if at == (len(dims) - 1 if k == "layer_norm" else 1) else None
        if k in ("add", "sub", "mul", "div"):
            return self._arithmetic(node, module, at, n)
        if k == "cat":
            return self._cat(node, module, at, n)
        if k == "pad":
            return self._pad(node, module, at, n)
        if k in MOVES:
            return self._moved_values(node, at)
        value = self.of[node.all_input_nodes[0]]
        if value is None:
            return None
        if k == "prelu" and module.num_parameters > 1 and at != 1:
            return None
        if k in POINTWISE or k == "prelu":
            return self._pointwise(module, value[1], value[0])
        if k in SAME or (k == "avg_pool" and (not _any(module.padding) or not module.count_include_pad)):
            return np.asarray(value[1])
        return np.where(value[1] == 0, 0.0, np.nan) if k in ("avg_pool", "sum", "pixel_shuffle") and len(value[1]) == n else None

    def _normed(self, module: Any, n: int) -> Labels | None:
        """With gamma 0 a norm gives beta."""
        if module.weight is None:
            return None
        return np.zeros(n) if module.bias is None else np.asarray(module.bias.detach().double().cpu().numpy()).reshape(-1)

    def _pointwise(self, module: nn.Module, values: Labels, at: int) -> Labels:
        form = [1, len(values)] if at == 1 else [1] * at + [len(values)]
        with torch.no_grad():
            return np.asarray(copy.deepcopy(module).double().cpu()(torch.from_numpy(values).reshape(form)).reshape(-1).numpy())

    def _arithmetic(self, node: Node, module: nn.Module, at: int, n: int) -> Labels | None:
        sides: list[Any] = []
        for a in node.args:
            if not isinstance(a, Node):
                sides.append(torch.tensor(float(a), dtype=torch.float64))  # type: ignore[arg-type]
                continue
            value, back = self.of[a], len(shape(node)) - len(shape(a))
            known = value is not None and value[0] + back == at and len(value[1]) == n
            sides.append(torch.from_numpy(value[1]) if known else torch.full((n,), torch.nan, dtype=torch.float64))
        out = module(*sides).expand(n).numpy().copy()
        if kind(self.gm, node) == "mul":
            out[(sides[0].expand(n) == 0).numpy() | (sides[1].expand(n) == 0).numpy()] = 0.0
        return np.asarray(out)

    def _cat(self, node: Node, module: Any, at: int, n: int) -> Labels | None:
        parts: list[Any] = []
        for x in node.args:
            assert isinstance(x, Node)
            value, size = self.of[x], shape(x)[at]
            parts.append(value[1] if value is not None and value[0] == at else np.full(size, np.nan))
        if module.dim == at:
            return np.concatenate(parts)
        return np.where(np.all([p == parts[0] for p in parts], 0), parts[0], np.nan)

    def _pad(self, node: Node, module: Any, at: int, n: int) -> Labels | None:
        rank = len(shape(node))
        own = rank - 1 - at
        before, behind = (*module.pads[2 * own : 2 * own + 2], 0, 0)[:2]
        value = self.of[node.all_input_nodes[0]]
        inner = n - before - behind
        values = value[1] if value is not None and value[0] == at else np.full(inner, np.nan)
        elsewhere = any(p for i, p in enumerate(module.pads) if i // 2 != own)
        if elsewhere and module.mode == "constant":
            values = np.where(values == (module.value or 0), values, np.nan)
        return np.concatenate([np.zeros(before), values, np.zeros(behind)])

    def _moved_values(self, node: Node, at: int) -> Labels | None:
        if kind(self.gm, node) == "getitem":
            parts = self.of.get(node.args[0])  # type: ignore[arg-type]
            value = parts[node.args[1]] if isinstance(parts, list) else None  # type: ignore[index]
            return value[1] if value is not None and value[0] == at else None
        found = self._moved(node, self.channels.of(node), None)
        return None if found is None or found[0] != at else found[1]

    def _moved(self, node: Node, dims: Any, part: int | None) -> Value | None:
        """Constants behind an operation that only moves places: where each comes from is asked of its rule, with places as labels."""
        x = node.all_input_nodes[0]
        value = self.of[x]
        if value is None:
            return None
        shadow = Channels(self.gm, count=len(value[1]))
        shadow.dims[x] = [np.arange(len(value[1])) if i == value[0] else None for i in range(len(shape(x)))]
        RULES[kind(self.gm, node)](shadow, node)
        if shadow.ties or shadow.pins:
            return None
        out = shadow.dims[node] if part is None else shadow.dims[node][part]
        at = next((i for i, d in enumerate(out) if d is not None), None)
        return None if at is None else (at, value[1][out[at]])


def pads_nothing(module: Any) -> bool:
    """Every output of the convolution reads whole windows of its input (or of a continuation of it)."""
    if hasattr(module, "pads"):
        return not _any(module.pads)
    if module.padding_mode != "zeros":
        return True
    return module.padding == "valid" or (module.padding == "same" and not _any(k - 1 for k in module.kernel_size)) or (
        not isinstance(module.padding, str) and not _any(module.padding)
    )


def _any(sizes: Any) -> bool:
    return bool(sizes) if isinstance(sizes, int) else any(sizes)


def added(module: Any, reading: Reading, k: str) -> Tensor:
    """What the constants add to each output: ``sum over c of W[:, c] * constant_c``, float64 ``[O]``."""
    w = module.weight.detach()
    values = torch.from_numpy(reading.values).to(w.device)
    if k == "linear" or module.groups == 1:
        columns = w[:, torch.from_numpy(reading.places).to(w.device)].double()
        return torch.as_tensor(columns.reshape(*columns.shape[:2], -1).sum(-1) @ values)
    w = w.double().reshape(*w.shape[:2], -1).sum(-1)
    per, rows = module.in_channels // module.groups, module.out_channels // module.groups
    out = torch.zeros(module.out_channels, dtype=torch.float64, device=w.device)
    for place, v in zip(reading.places.tolist(), values, strict=True):
        g = place // per
        out[g * rows : (g + 1) * rows] += w[g * rows : (g + 1) * rows, place - g * per] * v
    return out
