"""How much each unit matters: the criteria of structured pruning.

Sources: ``bn-gamma`` Liu et al. 2017 (arXiv 1708.06519); ``l1`` Li et al. 2016 (arXiv 1608.08710); ``taylor`` Molchanov et al. 2019 (arXiv 1906.10771,
equation 8, at the batch norm where there is one); ``group-l2`` Fang et al. 2023 (arXiv 2301.12900, equation 5: all weights that go with a unit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fxq import distributed
from fxq.channels import Labels, is_depthwise, layer_labels
from fxq.errors import CalibrationError, PassError
from fxq.graph import kind, module_of
from fxq.groups import Groups

CRITERIA = ("bn-gamma", "l1", "l2", "group-l2", "taylor", "random")
"""Names for ``by=``."""
RELATIVE = ("l1", "l2", "group-l2")
"""Norms of filters of different sizes: compared over layers after division by the mean of their group."""

Loss = Callable[..., Tensor]


@dataclass
class _Sums:
    """Sum and number of the evidence for each unit."""

    count: int
    total: Labels = field(init=False)
    number: Labels = field(init=False)

    def __post_init__(self) -> None:
        self.total, self.number = np.zeros(self.count), np.zeros(self.count)

    def add(self, units: Labels, values: Tensor) -> None:
        v = values.detach().double().cpu().numpy()
        self.total += np.bincount(units, v, self.count)
        self.number += np.bincount(units, minlength=self.count)

    def mean(self) -> Labels:
        """NaN where there is no evidence."""
        with np.errstate(invalid="ignore"):
            return np.where(self.number > 0, self.total / np.maximum(self.number, 1), np.nan)


def scores(g: Groups, by: str, *, seed: int = 0, data: Iterable[tuple[Any, ...]] = (), inputs: int = 1, loss: Loss | None = None) -> Labels:
    """Score of each unit, float64 ``[count]``, larger is more important; NaN where the criterion says nothing.

    Args:
        by: one of :data:`CRITERIA`.
        seed: of ``random``.
        data: batches for ``taylor``: the model's inputs, then what ``loss`` takes behind the output.
        inputs: how many of a batch are the model's inputs.
        loss: ``loss(output, *rest) -> scalar``; default: cross entropy with the first of ``rest`` where there is one, else with the model's own answer.

    Raises:
        PassError: a criterion that says nothing about this model, or weights that are not finite.
        CalibrationError: ``taylor`` without data.
    """
    if by == "random":
        return np.random.default_rng(seed).random(g.count)
    sums = _Sums(g.count)
    if by == "taylor":
        _taylor(g, sums, data, inputs, loss or self_labelled)
        return sums.mean()
    for units, values, where in _gammas(g) if by == "bn-gamma" else _norms(g, by):
        if not bool(torch.isfinite(values).all()):
            raise PassError("its weights are not finite, so its channels have no order", where=f"prune-channels / {where}", way_out="Load sound weights")
        sums.add(units, values)
    found = sums.mean()
    if by == "group-l2":
        found = np.sqrt(found)
    return _relative(g, found) if by in RELATIVE else found


def _relative(g: Groups, found: Labels) -> Labels:
    """Scores divided by the mean of their group."""
    for group in g.groups:
        mine = found[group.units]
        mean = float(np.nanmean(mine)) if bool(np.isfinite(mine).any()) else 0.0
        if mean > 0:
            found[group.units] = mine / mean
    return found


def _gammas(g: Groups) -> Iterator[tuple[Labels, Tensor, str]]:
    """``|gamma|`` of every batch norm."""
    gm = g.channels.gm
    for node in gm.graph.nodes:
        if kind(gm, node) != "batch_norm":
            continue
        module: Any = module_of(gm, node)
        labels = g.channels.of(node)[1]
        if labels is not None and module.weight is not None:
            yield g.unit[labels], module.weight.detach().abs(), str(node.target)


def rows(module: Any, k: str) -> Tensor:
    """Weight with its output channels first, ``[O, ...]``."""
    w: Tensor = module.weight
    if k == "embedding":
        return w.t()
    if k != "conv_transpose":
        return w
    groups = module.groups
    return w.reshape(groups, w.shape[0] // groups, *w.shape[1:]).transpose(1, 2).reshape(module.out_channels, -1)


def columns(module: Any, k: str) -> Tensor:
    """Weight with its input channels first, ``[I, ...]``."""
    w: Tensor = module.weight
    if k == "conv_transpose":
        return w
    groups = getattr(module, "groups", 1)
    return w.reshape(groups, w.shape[0] // groups, *w.shape[1:]).transpose(1, 2).reshape(w.shape[1] * groups, -1)


def _layers(g: Groups) -> Iterator[tuple[Node, str, Any]]:
    gm = g.channels.gm
    for node in gm.graph.nodes:
        k = kind(gm, node)
        if k in ("conv", "conv_transpose", "linear", "embedding"):
            yield node, k, module_of(gm, node)


def _norms(g: Groups, by: str) -> Iterator[tuple[Labels, Tensor, str]]:
    """Norm of each filter; for ``group-l2`` the squared norm of everything of a unit, incoming and outgoing."""
    for node, k, module in _layers(g):
        read, given = layer_labels(g.channels, node, module)
        if given is not None:
            norm = torch.linalg.vector_norm(rows(module, k).detach().flatten(1), 1 if by == "l1" else 2, 1, dtype=torch.float64)
            yield g.unit[given], norm.square() if by == "group-l2" else norm, str(node.target)
        if by == "group-l2" and read is not None and not is_depthwise(module):
            yield g.unit[read], torch.linalg.vector_norm(columns(module, k).detach().flatten(1), 2, 1, dtype=torch.float64).square(), str(node.target)
    if by == "group-l2":
        for units, gamma, where in _gammas(g):
            yield units, gamma.double().square(), where


def self_labelled(output: Any, *rest: Any) -> Tensor:
    """Cross entropy with labels; without them with the model's own answer for logits ``[N, classes]``, or the mean square of any other output."""
    first = output
    while not isinstance(first, Tensor):
        first = next(iter(first.values() if isinstance(first, dict) else first))
    if rest and first.ndim >= 2:
        return F.cross_entropy(first, rest[0])
    if first.ndim == 2:
        return F.cross_entropy(first, first.detach().argmax(1))
    return first.square().mean()


def _taylor(g: Groups, sums: _Sums, data: Iterable[tuple[Any, ...]], inputs: int, loss: Loss) -> None:
    """Squared first-order change of the loss when a unit becomes 0, mean over its layers and the batches of all processes."""
    gm = g.channels.gm
    taken = _taylor_parts(g)
    wanted = list({id(t): t for _, ts, _ in taken for t in ts}.values())
    before = [t.requires_grad for t in wanted]
    seen = 0
    try:
        for t in wanted:
            t.requires_grad_(True)
        for batch in data:
            seen += 1
            with torch.enable_grad():
                value = loss(gm(*batch[:inputs]), *batch[inputs:])
                if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value)):
                    raise CalibrationError(f"the loss of batch {seen - 1} is no finite number", way_out="loss(output, *labels) must give a finite scalar")
                grads = dict(zip(map(id, wanted), torch.autograd.grad(value, wanted, allow_unused=True), strict=True))
            for units, ts, change in taken:
                given = [grads[id(t)] for t in ts]
                if all(v is not None for v in given):
                    sums.add(units, change(*given).square())
    finally:
        for t, flag in zip(wanted, before, strict=True):
            t.requires_grad_(flag)
    every = distributed.gather((sums.total, sums.number, seen))  # all processes cut alike
    sums.total, sums.number = sum(e[0] for e in every), sum(e[1] for e in every)
    if not sum(e[2] for e in every):
        raise CalibrationError("by='taylor' needs data", way_out="Pass data= (a few batches, labels behind the inputs), or use by='l2'")


Change = Callable[..., Tensor]


def _taylor_parts(g: Groups) -> list[tuple[Labels, list[Tensor], Change]]:
    """``(units, tensors, first-order change of each row from their gradients)``: batch norms, and layers that none follows."""
    gm, parts = g.channels.gm, []
    for node in gm.graph.nodes:
        module: Any = module_of(gm, node) if kind(gm, node) == "batch_norm" else None
        labels = g.channels.of(node)[1] if module is not None else None
        if labels is not None and module.weight is not None:
            ts = [t for t in (module.weight, module.bias) if t is not None]
            parts.append((g.unit[labels], ts, _dot(*ts)))
    for node, k, module in _layers(g):
        labels = layer_labels(g.channels, node, module)[1]
        if labels is not None and not any(kind(gm, u) == "batch_norm" for u in node.users):
            parts.append((g.unit[labels], [module.weight], _filter(module, k)))
    return parts


def _dot(*ts: Tensor) -> Change:
    def change(*grads: Tensor) -> Tensor:
        return sum((t.detach() * v for t, v in zip(ts, grads, strict=True)), torch.zeros(()))

    return change


def _filter(module: nn.Module, k: str) -> Change:
    def change(grad: Tensor) -> Tensor:
        product = (module.weight.detach() * grad).detach()  # type: ignore[operator]
        return rows(_As(module, product), k).flatten(1).sum(1)

    return change


class _As:
    """A module's sizes with another tensor as its weight."""

    def __init__(self, module: Any, weight: Tensor) -> None:
        self.weight, self.groups, self.out_channels = weight, getattr(module, "groups", 1), getattr(module, "out_channels", 0)
