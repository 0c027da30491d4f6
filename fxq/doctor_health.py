"""What trips up quantization in a float model: weights, batch norms, modes, types. Reads the model, runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from fxq.graph import float_module, walk
from fxq.modules import WEIGHTED
from fxq.spec import QuantSpec

LEVELS = ("stop", "warning", "note")
"""It stops the compilation; it costs accuracy or speed; good to know."""
SHOWN = 3
FEW_CODES = 16
"""A channel that is left with fewer codes than this on a grid for the whole tensor has lost half of its bits."""
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Finding:
    """One thing about the model.

    Attributes:
        level: of :data:`LEVELS`.
        code: short name.
        places: module paths, tensors or nodes concerned.
        fact: what is the case.
        way_out: what can be done; empty when nothing has to be.
    """

    level: str
    code: str
    places: tuple[str, ...]
    fact: str
    way_out: str = ""

    def __str__(self) -> str:
        shown = ", ".join(self.places[:SHOWN]) + (f" and {len(self.places) - SHOWN} more" if len(self.places) > SHOWN else "")
        return f"{self.level} [{self.code}] " + (f"{shown}: " if shown else "") + self.fact + (f". {self.way_out}" if self.way_out else "")


def of_model(model: nn.Module) -> list[Finding]:
    """Findings about weights, batch norms and modes, the grave ones first.

    Args:
        model: float model; it is not changed. Tensors without data are passed over.
    """
    found = [*_tensors(model), *_batch_norms(model), *_dead(model), *_modes(model)]
    return sorted(found, key=lambda f: LEVELS.index(f.level))


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if not is_lazy(t) and t.device.type != "meta" and t.is_floating_point() and t.numel():
            yield name, t.detach()


def _tensors(model: nn.Module) -> Iterator[Finding]:
    values = list(_values(model))
    half = [(name, t) for name, t in values if t.dtype != torch.float32]
    if half:
        kinds = ", ".join(sorted({str(t.dtype) for _, t in half}))
        yield Finding("stop", "dtype", tuple(n for n, _ in half), f"the weights are {kinds}, fxq compiles float32 models", "Pass model.float()")
    wrong = tuple(name for name, t in values if not bool(torch.isfinite(t.sum())) and not bool(torch.isfinite(t).all()))
    if wrong:
        yield Finding("stop", "not-finite", wrong, "the tensor holds NaN or infinity", "Load finite weights")
    small = {name: int(((t != 0) & (t.abs() < TINY)).sum()) for name, t in values if t.dtype == torch.float32 and name not in wrong}
    small = {name: n for name, n in small.items() if n}
    if small:
        fact = f"{sum(small.values())} values are denormal: float arithmetic with them is slow, a grid rounds them to 0"
        yield Finding("warning", "denormal", tuple(small), fact, "Set them to 0 before compiling")


def _batch_norms(model: nn.Module) -> Iterator[Finding]:
    norms: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm) and _has_data(m.running_var)]
    fresh = tuple(n for n, m in norms if bool((m.running_var == 1).all()) and m.running_mean is not None and not bool(m.running_mean.any()))
    if fresh:
        fact = f"{len(fresh)} of {len(norms)} batch norms have the statistics they were made with"
        yield Finding("warning", "untrained", fresh, fact, "Load trained weights: ranges of an untrained model say little")
    flat, gain, count = [], 0.0, 0
    for name, m in norms:
        low = m.running_var < m.eps
        gamma = torch.ones_like(m.running_var) if m.weight is None else m.weight.detach()
        low = low & (gamma != 0)
        if bool(low.any()):
            flat.append(name)
            count += int(low.sum())
            gain = max(gain, float((gamma.abs() / torch.sqrt(m.running_var + m.eps))[low].max()))
    if flat:
        fact = f"{count} channels have a variance below the batch norm's eps; folding multiplies their weights by up to {gain:.3g}"
        yield Finding("warning", "bn-variance", tuple(flat), fact, "Keep weights per channel; prune channels that never fire (fxq.prune)")
    moving = tuple(n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_var is None)
    if moving:
        fact = "it has no running statistics and normalises each batch by itself, so it cannot be folded"
        yield Finding("warning", "bn-statistics", moving, fact, "Train with track_running_stats=True")


def _has_data(t: Any) -> bool:
    return isinstance(t, Tensor) and not is_lazy(t) and t.device.type != "meta"


def _dead(model: nn.Module) -> Iterator[Finding]:
    count, places = 0, []
    for name, m in model.named_modules():
        weight: Any = getattr(m, "weight", None)
        if not isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, _BatchNorm)) or not _has_data(weight):
            continue
        zero = int((weight.detach().reshape(len(weight), -1) == 0).all(1).sum())
        if zero:
            places.append(name)
            count += zero
    if places:
        fact = f"{count} output channels have weights of 0 only: they give a constant"
        yield Finding("note", "dead-channels", tuple(places), fact, "fxq.prune takes them out for real")


def _modes(model: nn.Module) -> Iterator[Finding]:
    if model.training:
        fact = "the model is in train mode; fxq compiles a copy in eval mode"
        yield Finding("note", "train-mode", (), fact, "Compare with model.eval()")
    drops = tuple(n for n, m in model.named_modules() if isinstance(m, _DropoutNd) and m.p)
    if drops:
        yield Finding("note", "dropout", drops, f"{len(drops)} dropout layers do nothing in a compiled model")


def of_weights(gm: GraphModule, spec: QuantSpec | None) -> list[Finding]:
    """Weighted layers whose channels have so different ranges that one scale for all of them would hurt, batch norms folded.

    Args:
        gm: canonical graph behind ``fold-bn``.
        spec: the scheme's grid of weights, None for a scheme without.
    """
    if spec is None or spec.kind != "affine":
        return []
    lost: dict[str, str] = {}
    for node, k in walk(gm, *WEIGHTED):
        module: Any = float_module(gm, node)
        weight = module.weight.detach()
        out = weight.transpose(0, 1) if k == "conv_transpose" else weight
        top = out.reshape(len(out), -1).abs().amax(1)
        top = top[top > 0]
        if len(top) < 2:
            continue
        few = int((top / top.max() * (spec.qmax - spec.qmin) < FEW_CODES).sum())
        if few * 10 >= len(top):
            lost[str(node.target)] = f"{few} of {len(top)} channels"
    if not lost:
        return []
    worst, share = next(iter(lost.items()))
    fact = f"with one scale for the whole weight a tenth or more of the channels keep fewer than {FEW_CODES} codes ({worst}: {share})"
    if spec.axis is None:
        return [Finding("warning", "channel-ranges", tuple(lost), fact, "Use a scheme with a scale for each channel, such as scheme='int8'")]
    return [Finding("note", "channel-ranges", tuple(lost), f"{fact}; this scheme has a scale for each channel")]
