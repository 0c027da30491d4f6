"""Passes and their order. The pipeline is the only place that cleans, checks, times, measures and records."""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fxq import graph, snapshot
from fxq.errors import PassError
from fxq.recorder import Recorder
from fxq.schemes import Scheme
from fxq.snapshot import History, Skip
from fxq.targets import Target
from fxq.values import watch
from fxq.verify import INVARIANTS

Progress = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``; ``total`` is ``None`` while it is not known."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """A progress callback that shows nothing."""


@dataclass
class PassContext:
    """What a pass may read besides the graph.

    Attributes:
        scheme, target: the choice of grids and the runtime they are for.
        example: positional example inputs, tensors on the model's device.
        probe: inputs on which the change of the output is measured; default: ``example``.
        calibration: the user's data, already normalised to tuples of positional inputs; read once.
        float_nodes: what stays float: patterns (``fnmatch`` on module path or node name), module types, numbers of weighted layers.
        progress: callback for long work.
        train: the graph will be trained: passes keep what that needs.
        states: keep the graph after every pass in the history.
        numbers: measure how far every value moves in every pass.
        kept: the first calibration batches, for passes that measure after ``calibrate`` (filled by it where the scheme needs them).
        int8_nodes: weighted layers that a low-bit scheme keeps in 8 bits, named like ``float_nodes``.
        skips: filled through :meth:`skip`.
    """

    scheme: Scheme
    target: Target
    example: tuple[Any, ...]
    calibration: Iterable[tuple[Any, ...]] | None = None
    float_nodes: tuple[str | type | int, ...] = ()
    progress: Progress = no_progress
    skips: list[Skip] = field(default_factory=list)
    kept: list[tuple[Any, ...]] = field(default_factory=list)
    probe: tuple[Any, ...] | None = None
    train: bool = False
    states: bool = True
    numbers: bool = False
    bits: Mapping[str, int] = field(default_factory=dict)
    int8_nodes: tuple[str | type | int, ...] = ()

    @property
    def probed(self) -> tuple[Any, ...]:
        """The inputs on which changes are measured."""
        return self.example if self.probe is None else self.probe

    def skip(self, node: Node | str, why: str) -> None:
        """Record that a pass left ``node`` alone, and why."""
        self.skips.append(Skip(node if isinstance(node, str) else node.name, why))


class Pass(ABC):
    """A graph rewrite. A frozen dataclass whose fields are its options; it finds, asks and swaps, nothing else.

    Class attributes:
        name: as in the history and on the command line.
        requires, ensures, breaks: invariants (keys of :data:`fxq.verify.INVARIANTS`).
        tolerance: greatest allowed relative change of the output; ``None`` when numbers move on purpose.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()
    breaks: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float | None] = None

    @abstractmethod
    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Rewrite ``gm`` in place; return the number of places changed."""


@dataclass(frozen=True)
class Pipeline:
    """An ordered tuple of passes, checked when it is made.

    Raises:
        PassError: when a pass requires what no earlier pass ensures, or what one of them broke.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        holds: set[str] = set()
        for p in self.passes:
            for name in (*p.requires, *p.ensures, *p.breaks):
                if name not in INVARIANTS:
                    raise PassError(f"unknown invariant {name!r}", where=p.name)
            missing = [r for r in p.requires if r not in holds]
            if missing:
                raise PassError(f"needs {', '.join(missing)}, which no earlier pass ensures", where=p.name, way_out="Put the pass that ensures it before")
            holds = (holds - set(p.breaks)) | set(p.ensures)

    def run(self, gm: GraphModule, ctx: PassContext, history: History, *, after: Callable[[str, History], None] | None = None) -> GraphModule:
        """Run all passes on ``gm`` (in place; the caller owns it) and record each in ``history``.

        With ``FXQ_VERIFY=1`` every invariant that holds so far is checked after every pass, otherwise those that the
        pass ensures. ``FXQ_DEBUG=1`` prints a line a pass, ``FXQ_DUMP=DIR`` writes each graph text to ``DIR``.

        Raises:
            PassError: when an invariant does not hold or the output moved more than the pass allows.
        """
        check_all = os.environ.get("FXQ_VERIFY", "") not in ("", "0")
        holds: set[str] = set()
        code = graph.structure(gm)
        last = snapshot.take(gm, "", before=history.snapshots[-1] if history.snapshots else None, keep=ctx.states or ctx.numbers)
        recorder = Recorder(last.state, ctx.probed) if ctx.numbers and last.state is not None else None
        history.example = ctx.probed
        if ctx.states and history.snapshots:
            history.snapshots[-1] = replace(history.snapshots[-1], state=last.state)
        before = _output(gm, ctx) if any(p.tolerance is not None for p in self.passes) else None
        for i, p in enumerate(self.passes):
            ctx.progress(p.name, i, len(self.passes))
            ctx.skips = []
            start = time.perf_counter()
            rewrites = p.run(gm, ctx)
            code, old = graph.structure(gm), code
            if code != old:
                graph.finish(gm)
            ms = (time.perf_counter() - start) * 1e3
            holds = (holds - set(p.breaks)) | set(p.ensures)
            for name in sorted(holds) if check_all else p.ensures:
                for node, fault in INVARIANTS[name](gm):
                    raise PassError(f"{name} does not hold: {fault}", where=f"{p.name} / {node.name}")
            moved: float | None = None
            if rewrites and p.tolerance is not None:
                now = _output(gm, ctx)
                moved = snapshot.distance(before, now)
                if moved > p.tolerance:
                    _require_deterministic(gm, ctx, p.name)
                    raise PassError(f"moved the output by {moved:.2e}, more than its tolerance {p.tolerance:.0e}", where=p.name)
                before = now
            elif rewrites:
                before = None
            if before is None and any(q.tolerance is not None for q in self.passes[i + 1 :]):
                before = _output(gm, ctx)
            last = snapshot.take(gm, p.name, rewrites=rewrites, ms=ms, moved=moved, skips=tuple(ctx.skips), before=last, keep=ctx.states or ctx.numbers)
            numbers = recorder.record(gm, last.state) if recorder is not None and last.state is not None else {}
            history.snapshots.append(replace(last, numbers=numbers, state=last.state if ctx.states else None))
            _debug(history)
            if after is not None:
                after(p.name, history)
        ctx.progress("done", len(self.passes), len(self.passes))
        return gm


def _output(gm: GraphModule, ctx: PassContext) -> Any:
    with torch.inference_mode():
        return gm(*ctx.probed)


def _require_deterministic(gm: GraphModule, ctx: PassContext, where: str) -> None:
    """Tell a pass that moved the output from a model that gives another one each time."""
    first: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        watch(gm, ctx.probed, lambda n, v: first.update({n.name: v}))
        for node, value in _twice(gm, ctx.probed):
            if snapshot.distance(first[node.name], value) > 0:
                way_out = "Take the random operation out, or keep it outside the model that is compiled"
                fact = "two runs of the model on one input differ from here on: it is not deterministic"
                raise PassError(fact, where=f"{where} / {node.name}", way_out=way_out)


def _twice(gm: GraphModule, batch: tuple[Any, ...]) -> list[tuple[Node, Any]]:
    seen: list[tuple[Node, Any]] = []
    watch(gm, batch, lambda n, v: seen.append((n, v)))
    return seen


def _debug(history: History) -> None:
    last = history.snapshots[-1]
    if os.environ.get("FXQ_DEBUG", "") not in ("", "0"):
        print(f"fxq: {last.name}: {last.rewrites} rewrites, {last.nodes} nodes, {last.ms:.1f} ms", file=sys.stderr)
    folder = os.environ.get("FXQ_DUMP", "")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{len(history) - 1:02d}-{last.name}.txt").write_text(last.text + "\n", encoding="utf-8")
