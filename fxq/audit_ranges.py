"""What data says about the calibrated grids: noise beyond what the best grid of the same codes leaves, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxq import numerics
from fxq.audit import Finding
from fxq.graph import Grid, grids
from fxq.spec import QParams, QuantSpec
from fxq.toggles import OFF, Toggles, ValueSwitch
from fxq.values import watch

SUSPECT_DB = 8.0
"""A grid is a suspect from so many decibels of noise beyond the best grid on: more than a calibration on other data of one kind costs."""
NOISY_DB = 3.0
"""The same where no grid by itself stands out, but all together cost too much."""
CLIPPED = 1e-3
"""A grid clips from this share of values on."""
SHIFTED = 0.05
"""Both ends of a grid with a wrong zero point lie to one side of the data's, by this share of the grid."""
FEW, SOME, STRAYS = 32, 100, 4
"""On fewer values no grid is a suspect; on fewer than ``SOME``, or for fewer clipped ones than ``STRAYS``, none with little more noise than it needs."""


@dataclass
class Seen:
    """One value on the data, and its grid there.

    Attributes:
        lo, hi: extremes. signal, noise, best: energy of the value, of the grid's error, of the error of the best grid (float64 sums).
        own: the same of the best grid for this value alone, where the grid is shared.
        clipped, count: values beyond the grid's ends by more than half a step, and all values.
    """

    node: str
    path: str
    grid: str
    lo: float = math.inf
    hi: float = -math.inf
    signal: float = 0.0
    noise: float = 0.0
    best: float = 0.0
    own: float = 0.0
    clipped: int = 0
    count: int = 0

    @property
    def excess(self) -> float:
        """Decibels of noise beyond what the best grid leaves; never negative."""
        if self.noise <= self.best or self.noise == 0:
            return 0.0
        return math.inf if self.best == 0 else 10 * math.log10(self.noise / self.best)

    @property
    def shared_excess(self) -> float:
        """Decibels of noise beyond what the value would have on a grid of its own; 0 where the grid is not shared."""
        return 10 * math.log10(self.noise / self.own) if 0 < self.own < self.noise else 0.0

    @property
    def sqnr(self) -> float:
        """Signal to noise of the grid on the data, dB."""
        return math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclass
class Ranges:
    """Grids beside data.

    Attributes:
        seen: node of a fake-quantizer -> what came there in the float graph.
        best: name of a grid -> the best parameters for this data. own: node -> those for its value alone, where the grid is shared.
        runs: how often the graph ran.
    """

    seen: dict[str, Seen] = field(default_factory=dict)
    best: dict[str, QParams] = field(default_factory=dict)
    own: dict[str, QParams] = field(default_factory=dict)
    runs: int = 0


def plain(switch: ValueSwitch) -> bool:
    """Is it a grid with a scale and a zero point, whose best parameters follow from the extremes?"""
    return switch.made.spec.kind == "affine" and switch.made.step is None and switch.made.scale.numel() == 1


def look(t: Toggles, batches: Sequence[tuple[Any, ...]], planned: dict[str, Grid]) -> Ranges:
    """Run the float graph over the batches twice: extremes, then errors. The switches' ``best`` are set; all switches are off afterwards.

    Args:
        t: the switched graph. batches: positional inputs.
        planned: the grids before they were calibrated, whose codes the best ones have.
    """
    t.set(OFF)
    found, names = Ranges(), {n: g for g, nodes in t.grids.items() for n in nodes}
    found.seen = {name: Seen(name, t.paths[name], names[name]) for name in t.values}

    def extremes(node: Any, value: Any) -> None:
        if node.name in t.values and isinstance(value, Tensor) and value.numel():
            s = found.seen[node.name]
            lo, hi = value.aminmax()
            s.lo, s.hi = min(s.lo, float(lo)), max(s.hi, float(hi))

    def errors(node: Any, value: Any) -> None:
        switch = t.values.get(node.name)
        if switch is not None and isinstance(value, Tensor) and value.numel():
            _add(found.seen[node.name], switch, value, found.best.get(names[node.name]), found.own.get(node.name))

    for batch in batches:
        watch(t.gm, batch, extremes)
    for grid, nodes in t.grids.items():
        switch, every = t.values[nodes[0]], [found.seen[n] for n in nodes]
        lo, hi = min(s.lo for s in every), max(s.hi for s in every)
        plan = planned.get(grid, grids(t.gm).get(grid))
        if plan is not None and plain(switch) and math.isfinite(lo) and math.isfinite(hi) and plan.fixed is None and plan.how == "range":
            found.best[grid] = _best(lo, hi, plan.spec, switch)
            for n in nodes:
                t.values[n].best = found.best[grid]
                if len(nodes) > 1:
                    found.own[n] = _best(found.seen[n].lo, found.seen[n].hi, plan.spec, t.values[n])
    for batch in batches:
        watch(t.gm, batch, errors)
    found.runs = 2 * len(batches)
    return found


def _best(lo: float, hi: float, spec: QuantSpec, switch: ValueSwitch) -> QParams:
    if switch.clamp is not None:
        lo, high = switch.clamp
        hi = hi if high is None else min(hi, high)
    qp = numerics.choose_qparams(torch.tensor(lo), torch.tensor(hi), spec)
    device = switch.made.scale.device
    return QParams(qp.spec, qp.scale.to(device), qp.zero_point.to(device))


def _add(s: Seen, switch: ValueSwitch, value: Tensor, best: QParams | None, own: QParams | None) -> None:
    x = value.detach()
    made = switch.made
    s.signal += float(x.double().square().sum())
    s.noise += float((made(x) - x).double().square().sum())
    s.best += float((numerics.fake_quantize(x, best) - x).double().square().sum()) if best is not None else 0.0
    s.own += float((numerics.fake_quantize(x, own) - x).double().square().sum()) if own is not None else 0.0
    s.count += x.numel()
    if plain(switch):
        lo, hi = ends(made.qparams)
        half = 0.5 * float(made.scale)
        s.clipped += int(((x < lo - half) | (x > hi + half)).sum())


def ends(qp: QParams) -> tuple[float, float]:
    """Least and greatest number of a grid with one scale."""
    zero, scale = int(qp.zero_point), float(qp.scale)
    return (qp.spec.qmin - zero) * scale, (qp.spec.qmax - zero) * scale


def range_findings(t: Toggles, found: Ranges, least: float = SUSPECT_DB) -> list[Finding]:
    """Grids with much more noise than their codes need on this data, worst first, with the reason."""
    suspects = []
    for grid, nodes in t.grids.items():
        switch, every = t.values[nodes[0]], [found.seen[n] for n in nodes]
        worst = max(every, key=lambda s: s.excess)
        total = Seen(worst.node, worst.path, grid, min(s.lo for s in every), max(s.hi for s in every))
        for s in every:
            total.signal, total.noise, total.best = total.signal + s.signal, total.noise + s.noise, total.best + s.best
            total.clipped, total.count = total.clipped + s.clipped, total.count + s.count
        enough = total.count >= FEW if least >= SUSPECT_DB else total.count >= SOME and not 0 < total.clipped < STRAYS
        if grid not in found.best or not plain(switch) or total.excess < least or not enough:
            continue
        reason, fact = _why(total, ends(switch.made.qparams), switch.made.spec.symmetric)
        source = next(n for n in t.gm.graph.nodes if n.name == nodes[0]).all_input_nodes[0]
        fact = f"{fact}; {total.excess:.1f} dB more noise than its best grid"
        suspects.append(Finding("calibrate", source.name, worst.path, reason, fact, False, (worst.node, *(n for n in nodes if n != worst.node)), total.excess))
    return sorted(suspects, key=lambda f: -f.weight)


def shared_findings(t: Toggles, found: Ranges) -> list[Finding]:
    """Values that use a small part of a grid that they share for a reason (they are concatenated, or hand codes on), worst first."""
    narrow = [s for n, s in found.seen.items() if n in found.own and s.shared_excess >= SUSPECT_DB and s.count >= FEW]
    made = [Finding("share-qparams", s.node, s.path, SHARED, _shared(t, s), False, (s.node,), s.shared_excess) for s in narrow]
    return sorted(made, key=lambda f: -f.weight)


SHARED = "shared grid too wide"


def _shared(t: Toggles, s: Seen) -> str:
    lo, hi = ends(t.values[s.node].made.qparams)
    others = ", ".join(dict.fromkeys(t.paths[n] for n in t.grids[s.grid] if t.paths[n] != s.path))
    used = f"its data [{s.lo:.4g}, {s.hi:.4g}] uses a part of the grid [{lo:.4g}, {hi:.4g}] that it shares with {others}"
    return f"{used}; {s.shared_excess:.1f} dB more noise than alone"


def _why(s: Seen, grid: tuple[float, float], symmetric: bool) -> tuple[str, str]:
    """The reason of too much noise, from the grid's ends beside the data's."""
    lo, hi = min(s.lo, 0.0), max(s.hi, 0.0)
    have, want = grid[1] - grid[0], hi - lo
    said = f"grid [{grid[0]:.4g}, {grid[1]:.4g}], data [{s.lo:.4g}, {s.hi:.4g}], {s.clipped / max(1, s.count):.2%} clipped"
    if s.clipped / max(1, s.count) < CLIPPED and have > want:
        return "range too wide", said
    moved = sorted((grid[0] - lo, grid[1] - hi), key=abs)
    if not symmetric and want > 0 and 0.5 < have / want < 2 and moved[0] * moved[1] > 0 and abs(moved[0]) > have * SHIFTED:
        return "wrong zero point", said
    return "range clipped", said
