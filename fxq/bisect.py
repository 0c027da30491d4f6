"""Which pass, which node, and why: the debugger behind ``m.bisect``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxq import audit_grids, audit_ranges
from fxq.audit import ON_PURPOSE, Finding, exact_findings
from fxq.audit_bias import bias_findings
from fxq.audit_runs import broken, not_deterministic
from fxq.errors import FxqError, InputError
from fxq.lineage import counterparts
from fxq.metrics import Metric, Score, with_labels
from fxq.schemes import Scheme
from fxq.snapshot import History, Snapshot
from fxq.states import State, part_tensors
from fxq.targets import Target
from fxq.toggles import IDEAL, OFF, ON, Toggles
from fxq.verdicts import Cause, Verdict

MARGIN = {"sqnr": 1.5, "agreement": 0.02, "accuracy": 0.01}
"""A compiled model is as good as its codes allow when it is no worse than with the best grids by more than this."""
TRAINED = "convert-trained"
"""The last state of a model that was made to be trained."""
MOST = 0.9
"""This share of what the best grids gain is explained by the grids that are named."""
PROBE = 32
"""Samples on which grids are looked at; the metric sees all data."""
EXACT_SAMPLES = 2
"""Samples on which passes that must not move numbers are compared in float64."""
EFFECTS = 8
"""The effect of so many causes is measured."""
REASONS = {"fold-bn": "wrong fold"}
CORRECTIONS = ("correct-bias", "round-weights")
PLANS = ("annotate", "share-qparams", "calibrate")
"""Passes that choose the grids of values."""


@dataclass
class _Case:
    """What one bisection works on."""

    history: History
    gm: GraphModule
    scheme: Scheme
    target: Target
    metric: Metric
    batches: list[tuple[Any, ...]]
    toggles: Toggles
    runs: int = 0
    trained: bool = False

    @property
    def remade(self) -> bool:
        """Were weights or biases made for the grids as they are (feedback, bias correction)? On other grids they are worse whatever those are."""
        return self.correction is not None

    @property
    def correction(self) -> Snapshot | None:
        """What the pass that corrected weights or biases left, if there was one."""
        return next((s for s in self.history if s.name in CORRECTIONS), None)

    def rest(self) -> None:
        """Switch everything as compiled to compare grids of values; weights that were made for these grids are float meanwhile."""
        self.toggles.set(ON)
        if self.remade:
            self.toggles.set(OFF, self.toggles.layers)

    def state(self, name: str) -> State | None:
        """State after the first pass of that name."""
        return next((s.state for s in self.history if s.name == name), None)

    def graph(self, name: str) -> GraphModule | None:
        state = self.state(name)
        return None if state is None else state.build()

    @property
    def probe(self) -> list[tuple[Any, ...]]:
        """The first batches, at most :data:`PROBE` samples."""
        taken: list[tuple[Any, ...]] = []
        room = PROBE
        for batch in self.batches:
            n = _samples(batch)
            if room <= 0:
                break
            taken.append(batch if n <= room else _cut(batch, n, room))
            room -= n
        return taken


def bisect(
    gm: GraphModule, history: History, scheme: Scheme, target: Target, metric: str | Score, data: Any, tolerance: float | None, limit: int | None
) -> Verdict:
    """See :meth:`fxq.compiled.CompiledModel.bisect`."""
    start = time.perf_counter()
    first = history.snapshots[0] if len(history) else None
    if first is None or first.state is None:
        way_out = "Compile the model again with states=True, the default, and do not release them"
        raise FxqError("the graphs of the passes were not kept", where="bisect", way_out=way_out)
    if tolerance is not None and math.isnan(tolerance):
        raise InputError("the tolerance is NaN", way_out="Give the greatest drop, of 'sqnr' the least dB, or leave it out")
    trained = _trained(history, gm)
    batches, labels = with_labels(data, gm, limit, "data to bisect with")
    floating = _switched_off(gm) if trained else first.state.build()
    stray = broken(history.snapshots, gm, batches[0]) or not_deterministic(floating, gm, batches[0])
    measure = Metric(metric, batches, labels, data, floating)
    case = _Case(history, gm, scheme, target, measure, batches, Toggles(gm, history.floats()), 5, trained)
    if stray is not None:
        causes = (Cause(stray, None),)
        spent = {"evaluations": measure.runs, "runs": case.runs, "seconds": time.perf_counter() - start}
        return Verdict(False, stray.reason, measure, {"float": measure.floor}, causes, **spent)  # type: ignore[arg-type]
    verdict = _judge(case, tolerance)
    return replace(verdict, seconds=time.perf_counter() - start)


def _trained(history: History, gm: GraphModule) -> bool:
    """Were the weights trained behind the passes? Then the recorded graphs are of other weights, and the float model is the trained one.

    Raises:
        FxqError: something else changed them.
    """
    changed = next((c for s in history if s.state is not None and (c := s.state.changed)), None)
    if changed is not None and history.snapshots[-1].name == TRAINED:
        return True
    final = history.snapshots[-1].state
    changed = changed or (None if final is None else _unlike(final, State.of(gm)))
    if changed is None:
        return False
    way_out = "Bisect it before it is retyped, moved or edited, or compile the changed model"
    raise FxqError("it was changed after the passes, whose graphs cannot be held against it", where=f"bisect / {changed}", way_out=way_out)


def _unlike(a: State, b: State) -> str | None:
    """Path of the first part with other tensors in ``b`` (a copy of the model has its own); a part of another type was grafted by ``with_float``."""
    for path, part in a.parts.items():
        other = b.parts.get(path)
        if part is not other and type(part) is type(other) and not _same_tensors(part_tensors(part), part_tensors(other)):
            return path
    return None


def _same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].device == b[k].device and torch.equal(a[k], b[k]) for k in a)


def _switched_off(gm: GraphModule) -> GraphModule:
    t = Toggles(gm)
    t.set(OFF)
    return t.gm


def _judge(case: _Case, tolerance: float | None) -> Verdict:
    """Findings, their effects, and the word on the whole."""
    metric, t = case.metric, case.toggles
    scores = {"float": metric.floor, "compiled": metric(case.gm)}
    findings = [] if case.trained else audit(case)
    planned = case.state("share-qparams")
    ranges = audit_ranges.look(t, case.probe, {} if planned is None else planned.grids)
    case.runs += ranges.runs
    allowed = None if tolerance is None else -tolerance if metric.metric == "sqnr" else tolerance
    bad = allowed is not None and metric.drop(scores["compiled"]) > allowed
    causes = [Cause(f, None) for f in findings]
    if not case.scheme.trains:  # ranges that were trained are no one's to judge
        causes += [Cause(f, None) for f in _grids(case, ranges, findings, scores, bad or tolerance is None)]
    best = scores.get("best grids")
    short = allowed is not None and bad and (best is None or metric.drop(best) > allowed or not causes)
    causes = [replace(c, effect=_effect(case, c.finding, scores["compiled"])) for c in causes[:EFFECTS]] + causes[EFFECTS:]
    notes = () if causes else _notes(case, ranges, scores)
    limits = _limits(case, ranges, allowed) if short and allowed is not None else ()
    word = "faults found" if causes else "the codes are too few" if limits else "below the tolerance" if bad else "nothing wrong"
    return Verdict(not causes and not bad, word, metric, scores, tuple(causes), limits, notes, metric.runs, case.runs)


def _grids(case: _Case, ranges: audit_ranges.Ranges, findings: Sequence[Finding], scores: dict[str, float], wanted: bool) -> list[Finding]:
    """The grids that explain why the model is worse than with the best ones; ``scores`` gets what was measured for that."""
    metric, t = case.metric, case.toggles
    now = scores["compiled"]
    if case.remade:
        case.rest()
        scores["weights float"] = now = metric(t.gm)
    case.rest()
    t.set(IDEAL, [*t.values, *(name for f in findings for name in f.switches)])
    scores["best grids"] = metric(t.gm)
    t.set(ON)
    goal = scores["best grids"] - _margin(metric, scores["best grids"])
    return _suspects(case, ranges, findings, goal) if now < goal and wanted else []


def audit(case: _Case) -> list[Finding]:
    """What passes broke of what they promise, in their order; a fault that follows from an earlier one is left out."""
    found: list[Finding] = []
    few = _cut(case.batches[0], _samples(case.batches[0]), EXACT_SAMPLES)
    before: Snapshot | None = None
    for s in case.history:
        if before is not None and before.state is not None and s.state is not None and s.state is not before.state and s.name not in ON_PURPOSE:
            found += _of_pass(case, before.state, s, few)
        before = s
        if s.name == "convert":
            break
    converted, corrected = case.graph("convert"), case.correction
    if converted is not None and corrected is not None and corrected.state is not None:
        found += bias_findings(converted, corrected.state.build(), Toggles(converted, case.history.floats()), corrected.name, case.probe)
        case.runs += 3 * len(case.probe)
    return _distinct(case, found)


def _of_pass(case: _Case, before: State, s: Snapshot, few: tuple[Any, ...]) -> list[Finding]:
    assert s.state is not None
    after = s.state.build()
    if s.name == "annotate":
        return list(audit_grids.annotate_findings(after, case.scheme))
    if s.name == "share-qparams":
        return list(audit_grids.share_findings(before.build(), after, case.target))
    if s.name == "calibrate":
        return list(audit_grids.calibrate_findings(after))
    if s.name == "convert":
        found = list(audit_grids.convert_findings(before.build(), after, case.scheme, case.target))
        off = Toggles(after)
        off.set(OFF)
        case.runs += 2
        return found + exact_findings(before, off.gm, s.name, few, "wrong wiring")
    if str(s.state.graph) == str(before.graph) and all(s.state.parts.get(k) is v for k, v in before.parts.items()):
        return []
    case.runs += 3
    return exact_findings(before, after, s.name, few, REASONS.get(s.name, "wrong form"))


def _at_calibrate(case: _Case, f: Finding) -> Finding:
    """The suspect under the name that its value has in the graph that ``calibrate`` left (there a ReLU is not absorbed yet)."""
    state = case.state(f.step)
    if state is None:
        return f
    source = counterparts(state.graph, case.gm.graph).get(f.switches[0])
    node = next((n for n in state.graph.nodes if n.name == source), None)
    return f if node is None else replace(f, node=node.name, path=audit_grids.path_of(node))


def _distinct(case: _Case, found: list[Finding]) -> list[Finding]:
    """Each fault once, with the switches of the compiled graph that undo it."""
    kept: list[Finding] = []
    taken: set[str] = set()
    for f in found:
        if f.node in taken or f.path in taken or taken & set(f.related):
            continue
        state = case.state(f.step)
        grid = next((n.meta.get("grid") for n in state.graph.nodes if n.name == f.node), None) if state is not None else None
        switches = f.switches or (tuple(case.toggles.grids.get(str(grid), ())) if f.step in PLANS else ())
        if f.step in ("annotate", "convert") and f.node in case.toggles.layers and not f.switches:
            switches = (f.node,)
        switches = tuple(n for n in switches if n in case.toggles.layers or n in case.toggles.values)
        kept.append(replace(f, switches=switches))
        taken |= {f.node, f.path, *switches, *f.related}
    return kept


def _effect(case: _Case, f: Finding, now: float) -> tuple[float, float] | None:
    """The metric with the fault, and with only this one undone; ``None`` where no switch undoes it."""
    t = case.toggles
    if f.switches:
        t.set(ON)
        if f.step in PLANS and case.remade:
            case.rest()
            now = case.metric(t.gm)
        t.set(IDEAL, f.switches)
        undone = case.metric(t.gm)
        t.set(ON)
        return now, undone
    names = [s.name for s in case.history]
    if f.step not in names or names.index(f.step) == 0 or f.step == "convert":
        return None
    i = names.index(f.step)
    after, before = case.graph(names[i]), case.graph(names[i - 1])
    return None if after is None or before is None else (case.metric(after), case.metric(before))


def _suspects(case: _Case, ranges: audit_ranges.Ranges, certain: Sequence[Finding], goal: float) -> list[Finding]:
    """The grids that explain why the metric is below ``goal``: few with very much noise, or else many with much."""
    known = {name for f in certain for name in f.switches}
    for least in (audit_ranges.SUSPECT_DB, audit_ranges.NOISY_DB):
        some = [_at_calibrate(case, f) for f in audit_ranges.range_findings(case.toggles, ranges, least) if not known & set(f.switches)]
        found = _confirmed(case, certain, some, goal, least == audit_ranges.NOISY_DB) if some else []
        if found:
            return found
    return []


def _confirmed(case: _Case, certain: Sequence[Finding], suspects: Sequence[Finding], goal: float, partly: bool) -> list[Finding]:
    """The fewest of the worst suspects whose best grids bring the metric to ``goal``: bisection over their ranking, then without those that are not needed.

    ``partly``: where all of them together do not reach it but gain more than the margin, most of that gain is the goal.
    """
    t = case.toggles
    base = [n for f in certain for n in f.switches]

    def score(chosen: Sequence[Finding]) -> float:
        case.rest()
        t.set(IDEAL, [*base, *(n for f in chosen for n in f.switches)])
        found = case.metric(t.gm)
        t.set(ON)
        return found

    reached = score(suspects)
    if reached < goal:
        now = score([]) if partly else reached
        if not reached - now > _margin(case.metric, now):
            return []
        goal = now + MOST * (reached - now)
    k = _first(len(suspects), lambda n: score(suspects[:n]) >= goal)
    chosen = list(suspects[:k])
    for f in list(chosen[:-1] if len(chosen) <= 6 else ()):
        rest = [c for c in chosen if c is not f]
        if score(rest) >= goal:
            chosen = rest
    return chosen


def _margin(metric: Metric, score: float) -> float:
    """Differences up to this are none."""
    return MARGIN.get(metric.name, abs(score) * 0.05)


def _first(n: int, good: Callable[[int], bool]) -> int:
    """Least ``k`` in ``0..n`` with ``good(k)``; ``n`` when there is none before."""
    lo, hi = 0, n
    while lo < hi:
        mid = (lo + hi) // 2
        lo, hi = (lo, mid) if good(mid) else (mid + 1, hi)
    return lo


def _notes(case: _Case, ranges: audit_ranges.Ranges, scores: dict[str, float]) -> tuple[Finding, ...]:
    """What costs accuracy or time though no pass is wrong: values on shared grids that are too wide for them, where it matters; float islands."""
    t, metric = case.toggles, case.metric
    notes = audit_ranges.shared_findings(t, ranges)
    if notes:
        case.rest()
        now = scores.get("weights float", scores["compiled"])
        t.set(OFF, [n for f in notes for n in t.grids[ranges.seen[f.node].grid]])
        gained = metric(t.gm) - now
        t.set(ON)
        notes = notes if gained > _margin(metric, now) else []
    return (*notes, *audit_grids.islands(case.gm, case.target)) if case.scheme.method == "static" else tuple(notes)


def _limits(case: _Case, ranges: audit_ranges.Ranges, allowed: float) -> tuple[Finding, ...]:
    """The least set of roundings, the noisiest first, without which the metric is within the tolerance: where 8 bits, or fewer, are not enough."""
    t, metric = case.toggles, case.metric
    layers = t.measure(case.probe)
    case.runs += len(case.probe)
    rank = [(db, name, "weights") for name, db in layers.items()] + [(s.sqnr, name, "activations") for name, s in ranges.seen.items()]
    rank.sort()

    def good(k: int) -> bool:
        t.without([name for _, name, _ in rank[:k]])
        return metric.drop(metric(t.gm)) <= allowed

    k = _first(len(rank), good)
    t.set(ON)
    last = case.history.snapshots[-1].name
    shared = {f.node: f for f in audit_ranges.shared_findings(t, ranges)}
    made = [Finding(last, name, t.paths[name], f"{what} too coarse", f"{db:.1f} dB by itself", False, (name,), -db) for db, name, what in rank[:k]]
    return tuple(replace(shared[f.node], fact=f"{f.fact}; {shared[f.node].fact}") if f.node in shared else f for f in made)


def _samples(batch: tuple[Any, ...]) -> int:
    return next((len(x) for x in batch if isinstance(x, Tensor) and x.ndim), 1)


def _cut(batch: tuple[Any, ...], n: int, wanted: int) -> tuple[Any, ...]:
    """The first samples of a batch, where every tensor input has the batch's size."""
    if wanted >= n or not all(isinstance(x, Tensor) and x.ndim and len(x) == n for x in batch):
        return batch
    return tuple(x[:wanted] for x in batch)
