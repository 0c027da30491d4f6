"""What each rounding costs: the output when it alone is there, and when it alone is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from fxq.metrics import Metric
from fxq.moves import decibels
from fxq.snapshot import flat
from fxq.toggles import OFF, ON, Toggles

PER = ("grid", "layer")


@dataclass(frozen=True)
class UnitRow:
    """One rounding, or one layer.

    Attributes:
        name: module path of the layer, or name of the grid (which several values may share).
        what: ``weights``, ``activations``, or ``layer`` (both its weights and what it gives).
        alone: SQNR of the output in dB when it alone is quantized; infinite when nothing moves.
        without: SQNR of the output in dB when all but it are quantized.
        drop_alone, drop_without: how much worse the metric is than the float model's then; ``None`` without a metric.
    """

    name: str
    what: str
    alone: float
    without: float
    drop_alone: float | None = None
    drop_without: float | None = None


@dataclass(frozen=True)
class QuantSensitivity:
    """One row for each grid or layer, in the order of the graph; iterating gives ``(name, what, alone, without)``.

    Attributes:
        rows: of all units.
        compiled: SQNR of the output in dB with everything quantized.
        metric: name of the metric, or None. drop: what it loses with everything quantized.
    """

    rows: tuple[UnitRow, ...]
    compiled: float
    metric: str | None = None
    drop: float | None = None

    def __iter__(self) -> Iterator[tuple[str, str, float, float]]:
        return iter((r.name, r.what, r.alone, r.without) for r in self.rows)

    def ranked(self) -> list[UnitRow]:
        """The most sensitive first: by the drop of the metric when it alone is quantized where there is one, otherwise by SQNR."""
        return sorted(self.rows, key=lambda r: (-(r.drop_alone or 0.0), r.alone))

    def worst(self, count: int) -> tuple[str, ...]:
        """Module paths of the most sensitive layers, for ``skip=``."""
        return tuple(dict.fromkeys(r.name for r in self.ranked() if r.what != "activations"))[:count]

    def __str__(self) -> str:
        head = f"{'name':<40} {'what':<12} {'alone':>9} {'all but it':>11}" + (f" {'drop alone':>11} {'drop without':>13}" if self.metric else "")
        drop = "" if self.drop is None else f", {self.metric} drops by {self.drop:.4g}"
        lines = [f"everything quantized: {decibels(self.compiled)}{drop}", head, "-" * len(head)]
        for r in self.ranked():
            tail = "" if r.drop_alone is None or r.drop_without is None else f" {r.drop_alone:>11.4g} {r.drop_without:>13.4g}"
            lines.append(f"{r.name:<40} {r.what:<12} {decibels(r.alone):>9} {decibels(r.without):>11}{tail}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite SQNR is ``None``."""
        rows = [{k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(r).items()} for r in self.rows]
        return {"compiled": None if math.isinf(self.compiled) else self.compiled, "metric": self.metric, "drop": self.drop, "rows": rows}


class Resumed:
    """Runs a switched graph from the first node on that a change can reach, on values kept from a run before it."""

    def __init__(self, gm: GraphModule, batch: tuple[Any, ...]) -> None:
        self.gm, self.batch = gm, batch
        self.order = {n.name: i for i, n in enumerate(gm.graph.nodes)}
        self.kept: dict[Node, Any] = {}

    def keep(self) -> Any:
        """Run all of it, keep every value; the output."""
        runner = Interpreter(self.gm, garbage_collect_values=False)
        runner.extra_traceback = False
        with torch.inference_mode():
            out = runner.run(*self.batch)
        self.kept = dict(runner.env)
        return out

    def run(self, changed: Sequence[str]) -> Any:
        """The output with other modules behind the nodes ``changed``."""
        first = min(self.order[n] for n in changed)
        env = {n: v for n, v in self.kept.items() if self.order[n.name] < first or n.op == "placeholder"}
        runner = Interpreter(self.gm)
        runner.extra_traceback = False
        with torch.inference_mode():
            return runner.run(*self.batch, initial_env=env)


class Energies:
    """Sums for one SQNR over batches."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, truth: Any, out: Any) -> None:
        """One batch: the float model's output and another one."""
        for a, b in zip(flat(truth), flat(out), strict=True):
            if a.is_floating_point():
                x = a.to(torch.float64)
                gap = torch.where(a == b, torch.zeros_like(x), x - b.to(torch.float64))
                self.signal += float(x.square().sum())
                self.noise += float(gap.square().sum())

    @property
    def sqnr(self) -> float:
        """In dB."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and math.isfinite(self.noise) else -math.inf


def sensitivity(t: Toggles, batches: Sequence[tuple[Any, ...]], metric: Metric | None, per: str) -> QuantSensitivity:
    """Switch every unit on alone, then off alone.

    Args:
        t: the switched graph. batches: positional inputs; every value of one batch is in memory at a time.
        metric: measured for every unit as well, twice over all data, or None. per: ``grid`` or ``layer``.
    """
    units = t.layer_units if per == "layer" else t.units
    sums = {key: (Energies(), Energies()) for key in units}
    whole = Energies()
    for batch in batches:
        runs = Resumed(t.gm, batch)
        t.set(OFF)
        truth = runs.keep()
        for key, names in units.items():
            t.set(ON, names)
            sums[key][0].add(truth, runs.run(names))
            t.set(OFF, names)
        t.set(ON)
        whole.add(truth, runs.keep())
        for key, names in units.items():
            t.set(OFF, names)
            sums[key][1].add(truth, runs.run(names))
            t.set(ON, names)
    rows = []
    for (name, what), names in units.items():
        drops: list[float | None] = [None, None]
        if metric is not None:
            for i, switch in enumerate((t.only, t.without)):
                switch(names)
                drops[i] = metric.drop(metric(t.gm))
        rows.append(UnitRow(name, what, *(e.sqnr for e in sums[name, what]), *drops))
    t.set(ON)
    return QuantSensitivity(tuple(rows), whole.sqnr, None if metric is None else metric.name, None if metric is None else metric.drop(metric(t.gm)))


def noise_at(t: Toggles, batches: Sequence[tuple[Any, ...]], bits: Sequence[int]) -> dict[str, dict[int, float]]:
    """Node of a layer -> bits of its weights -> energy of the output's error relative to the output, when its weights alone are rounded so."""
    sums = {(name, b): Energies() for name in t.layers for b in bits}
    for batch in batches:
        runs = Resumed(t.gm, batch)
        t.set(OFF)
        truth = runs.keep()
        for (name, b), energies in sums.items():
            t.layers[name].at(b)
            energies.add(truth, runs.run([name]))
            t.set(OFF, [name])
    t.set(ON)
    return {name: {b: _share(sums[name, b]) for b in bits} for name in t.layers}


def _share(e: Energies) -> float:
    return e.noise / e.signal if e.signal > 0 else 0.0

