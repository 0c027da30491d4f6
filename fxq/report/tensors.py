"""Histograms of weights and activations beside the grids that they are rounded to, and what the grids cut off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.hooks import RemovableHandle

from fxq import numerics
from fxq.graph import grid_of, kind, module_of
from fxq.modules import FakeQuantize, Quantized
from fxq.observers import stride
from fxq.spec import QParams

BINS = 96
"""Bars of a histogram."""
TINY = 1e-30
SAMPLE = 1 << 18
"""At most so many numbers of a tensor are counted; the extremes are those of all."""
FLOAT8_STEP = 32
"""Distance of the two greatest numbers of E4M3FN."""


@dataclass
class _Watched:
    """What was seen of one value.

    Attributes:
        node: the value's name.
        quantizer: rounds it, or ``None`` for a value that stays float.
        clamp: an activation clamp that its grid stands for.
    """

    node: str
    quantizer: FakeQuantize | None
    clamp: tuple[float, float | None] | None = None
    lo: float = math.inf
    hi: float = -math.inf
    count: Tensor | None = None
    numbers: int = 0
    below: int = 0
    above: int = 0
    absorbed: int = 0
    power: float = 0.0
    noise: float = 0.0

    def extremes(self, x: Tensor) -> None:
        finite = x[torch.isfinite(x)] if not bool(torch.isfinite(x).all()) else x
        if finite.numel():
            self.lo, self.hi = min(self.lo, float(finite.min())), max(self.hi, float(finite.max()))

    def add(self, x: Tensor) -> None:
        """Count the values of one tensor; of a large one every so many."""
        step = stride(x.shape, SAMPLE)
        x = x.reshape(-1)[::step] if step > 1 else x
        found = _counts(x, self.lo, self.hi)
        self.count = found if self.count is None else self.count + found
        self.numbers += x.numel()
        if self.quantizer is None:
            return
        kept = x
        if self.clamp is not None:
            kept = x.clamp(*self.clamp)
            self.absorbed += int((kept != x).sum())
        lo, hi, half = _ends(self.quantizer.rounding)
        self.below += int((kept < lo - half).sum())
        self.above += int((kept > hi + half).sum())
        error = numerics.fake_quantize(kept, self.quantizer.rounding) - kept
        self.power += float(kept.to(torch.float64).square().sum())
        self.noise += float(error.to(torch.float64).square().sum())

    def to_json(self) -> dict[str, Any]:
        """Plain data for the page."""
        assert self.count is not None
        made: dict[str, Any] = {"lo": self.lo, "hi": self.hi, "bins": self.count.to(torch.int64).tolist(), "n": self.numbers}
        if self.quantizer is not None:
            made["grid"] = _grid(self.quantizer.rounding)
            made["clamp"] = None if self.clamp is None else list(self.clamp)
            made |= {"below": self.below, "above": self.above, "absorbed": self.absorbed, "sqnr": sqnr(self.power, self.noise)}
        return made


def activations(root: nn.Module, graphs: Iterable[tuple[str, GraphModule]], batches: Iterable[tuple[Any, ...]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Histograms of all values of one or more graphs while ``root`` runs; the batches are run twice, first for the extremes.

    A value with a grid is seen before it is rounded, in the simulator: behind what was rounded before it.

    Args:
        root: what runs, in eval mode (its mode is restored); it holds the graphs' modules.
        graphs: ``(name, converted graph)``.
        batches: positional inputs; read once.

    Returns:
        ``(graph name, node name)`` -> extremes, counts, the grid, the shares below and above it, and the SQNR of rounding in dB.
    """
    kept, training = list(batches), [m for m in root.modules() if m.training]
    watched = {(name, w.node): (module, w) for name, gm in graphs for module, w in _places(gm)}
    root.eval()
    try:
        for step in ("extremes", "add"):
            with _watching(watched.values(), step), torch.inference_mode():
                for batch in kept:
                    root(*batch)
    finally:
        for m in training:
            m.training = True
    return {key: w.to_json() for key, (_, w) in watched.items() if w.count is not None}


def _places(gm: GraphModule) -> Iterable[tuple[nn.Module, _Watched]]:
    """Modules to look at: quantizers for what they round, other operations for what they give."""
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = module_of(gm, node)
        if isinstance(module, FakeQuantize):
            grid = grid_of(gm, node)
            yield module, _Watched(node.name, module, None if grid is None else grid.clamp)
        elif not any(kind(gm, u) == "fake_quantize" for u in node.users):
            yield module, _Watched(node.name, None)


@contextmanager
def _watching(places: Iterable[tuple[nn.Module, _Watched]], step: str) -> Iterator[None]:
    handles = [_watch(module, w, step) for module, w in places]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def _watch(module: nn.Module, w: _Watched, step: str) -> RemovableHandle:
    """Show what the module reads (a quantizer) or gives to :class:`_Watched`."""
    see: Callable[[Tensor], None] = getattr(w, step)

    def usable(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0 and (step == "extremes" or math.isfinite(w.lo))

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        if usable(args[0]):
            see(args[0])

    def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if usable(out):
            see(out)

    return module.register_forward_hook(after) if w.quantizer is None else module.register_forward_pre_hook(before)


def weights(gm: GraphModule) -> dict[str, dict[str, Any]]:
    """Histograms of all weights by node name.

    A weight on an affine grid is counted in steps of that grid (``weight / scale + zero point`` of its own channel or block), so that one picture shows
    the grid of all channels; other weights as they are.
    """
    found = {}
    for node in gm.graph.nodes:
        weight = _weight(gm, node)
        if weight is not None and bool(torch.isfinite(weight).all()):
            module = module_of(gm, node)
            found[node.name] = _weight_json(weight, module.weight_grid.qparams if isinstance(module, Quantized) else None)
    return found


def _weight(gm: GraphModule, node: Node) -> Tensor | None:
    """The weight of a layer of two dimensions or more."""
    if node.op != "call_module":
        return None
    module = module_of(gm, node)
    weight = getattr(module.op if isinstance(module, Quantized) else module, "weight", None)
    usable = isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim > 1 and weight.numel() > 0
    return weight.detach().to(torch.float32) if usable and isinstance(weight, Tensor) else None


def _weight_json(w: Tensor, qp: QParams | None) -> dict[str, Any]:
    made: dict[str, Any] = {"n": w.numel(), "values": [float(w.min()), float(w.max())]}
    x = w
    if qp is not None:
        spec = qp.spec
        error = numerics.fake_quantize(w, qp) - w
        made["sqnr"] = sqnr(float(w.to(torch.float64).square().sum()), float(error.to(torch.float64).square().sum()))
        made["grid"] = _grid(qp)
        if spec.kind == "affine":
            x = w / numerics.spread(qp.scale, spec, w.shape) + numerics.spread(qp.zero_point, spec, w.shape)
            made |= {"below": int((x < spec.qmin - 0.5).sum()), "above": int((x > spec.qmax + 0.5).sum()), "absorbed": 0, "steps": True}
            made["grid"] |= {"lo": spec.qmin, "hi": spec.qmax, "step": 1}
    lo, hi = float(x.min()), float(x.max())
    return made | {"lo": lo, "hi": hi, "bins": _counts(x, lo, hi).to(torch.int64).tolist()}


def _counts(x: Tensor, lo: float, hi: float) -> Tensor:
    if hi <= lo:  # one value: torch.histc would take [0, 1) for it
        return torch.tensor([x.numel(), *[0] * (BINS - 1)], dtype=torch.float64)
    return torch.histc(x.detach().to(torch.float32), BINS, lo, hi).to(torch.float64).cpu()


def _ends(qp: QParams) -> tuple[float, float, float]:
    """Least and greatest value of a grid and half of its step."""
    steps = {"affine": 0.5, "float8": FLOAT8_STEP / 2}.get(qp.spec.kind, math.inf)
    return (*qp.range, steps * float(qp.scale.max()))


def _grid(qp: QParams) -> dict[str, Any]:
    lo, hi = qp.range
    scales = qp.scale.reshape(-1)
    return {
        "text": str(qp), "kind": qp.spec.kind, "lo": lo, "hi": hi, "step": float(scales.max()), "codes": qp.spec.qmax - qp.spec.qmin + 1,
    }  # fmt: skip


def sqnr(power: float, noise: float) -> float | str:
    """Signal to rounding noise in dB; ``inf`` when nothing was rounded."""
    return "inf" if noise <= 0 else round(10 * math.log10(max(power, TINY) / noise), 3)
