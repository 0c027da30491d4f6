"""What a bisection says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxq.audit import Finding
from fxq.metrics import Metric

SHOWN = 12
"""So many places of a list are printed."""


@dataclass(frozen=True)
class Cause:
    """A fault and what it does.

    Attributes:
        finding: pass, node, reason.
        effect: the metric as it is, and with this one fault undone; ``None`` where that cannot be measured.
    """

    finding: Finding
    effect: tuple[float, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of ``m.bisect``.

    Attributes:
        ok: no pass broke its promise, and the metric is within the tolerance.
        word: the result in a few words.
        scores: what was measured: ``float``, ``compiled``, ``best grids`` (the scheme's codes on the best grids for this data). Where weights or
            biases were made for the grids as they are (feedback, bias correction), grids are compared with float weights, and ``weights float`` is that
            with the grids as they are.
        causes: what is wrong, in the order of the passes, then by weight.
        limits: nothing is wrong there, but without these roundings the metric would be within the tolerance: the codes are too few.
        notes: no faults, but what costs: values that use a small part of a grid they have to share, operations that stay float between integer ones.
        evaluations: how often the metric was measured.
        runs: how often a batch went through a graph besides.
        seconds: wall time.
    """

    ok: bool
    word: str
    metric: Metric = field(repr=False)
    scores: dict[str, float]
    causes: tuple[Cause, ...] = ()
    limits: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    evaluations: int = 0
    runs: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        show = self.metric.text
        scores = ", ".join(f"{name} {show(v)}" for name, v in self.scores.items())
        lines = [f"{self.word} ({self.metric.name}: {scores})"]
        for i, c in enumerate(self.causes, 1):
            effect = "" if c.effect is None else f" [{show(c.effect[0])}, undone {show(c.effect[1])}]"
            lines.append(f"  {i}. {c.finding}{effect}")
        if self.limits:
            lines.append(f"  float in these {len(self.limits)} places would be enough, the noisiest first:")
            lines += [f"    {f.path}: {f.reason}, {f.fact}" for f in self.limits[:SHOWN]]
            if len(self.limits) > SHOWN:
                lines.append(f"    ... {len(self.limits) - SHOWN} more in verdict.limits")
        lines += [f"  note: {f}" for f in self.notes[:SHOWN]]
        if len(self.notes) > SHOWN:
            lines.append(f"  ... {len(self.notes) - SHOWN} more in verdict.notes")
        lines.append(f"  {self.evaluations} evaluations, {self.runs} more runs, {self.seconds:.1f} s")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite score (an equal output) is ``None``."""

        def number(v: float) -> float | None:
            return v if abs(v) != float("inf") else None

        def plain(f: Finding) -> dict[str, Any]:
            return {"pass": f.step, "node": f.node, "path": f.path, "reason": f.reason, "fact": f.fact, "certain": f.certain}

        causes = [{**plain(c.finding), "effect": None if c.effect is None else [number(v) for v in c.effect]} for c in self.causes]
        counts = {"evaluations": self.evaluations, "runs": self.runs, "seconds": self.seconds}
        scores = {k: number(v) for k, v in self.scores.items()}
        head = {"ok": self.ok, "word": self.word, "metric": self.metric.name, "scores": scores}
        return {**head, "causes": causes, "limits": [plain(f) for f in self.limits], "notes": [plain(f) for f in self.notes], **counts}
