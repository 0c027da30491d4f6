"""calibrate: one pass over the data in eval mode; every grid gets its scale and zero point."""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from fxq import distributed, numerics
from fxq.errors import CalibrationError
from fxq.graph import Grid, data_inputs, grids, kind, module_of, walk
from fxq.lowbit import TBN_RATIO
from fxq.modules import WEIGHTED
from fxq.observers import Observer, make
from fxq.pipeline import Pass, PassContext
from fxq.spec import QParams
from fxq.targets import Target
from fxq.trackers import MeanMagnitude

FRESH = (*WEIGHTED, "add", "sub", "mul", "batch_norm", "sigmoid", "hardsigmoid")
"""Kinds whose output is a tensor of its own, no view."""

IN_PLACE: dict[str, Callable[..., Any]] = {"relu": torch.relu_, "add": Tensor.add_, "mul": Tensor.mul_}


class _Observe(Interpreter):
    """Runs the graph, frees what is read for the last time, and shows each watched value to its observer.

    An operation that alone reads a fresh tensor, which its observer has seen by then, overwrites it: new memory costs more than arithmetic.
    """

    def __init__(self, gm: GraphModule, watch: dict[Node, list[Observer]]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        flat = [n for n in gm.graph.nodes if n.op == "call_module" and not n.kwargs and not any(isinstance(a, (list, tuple, dict)) for a in n.args)]
        self.calls = {n: _in_place(gm, n) or module_of(gm, n) for n in flat}
        self.watch, self.batch = watch, 0
        first = {observer: node for node, observers in reversed(watch.items()) for observer in observers}
        self.first = first

    def run_node(self, n: Node) -> Any:
        try:
            module = self.calls.get(n)
            out = super().run_node(n) if module is None else module(*(self.env[a] if isinstance(a, Node) else a for a in n.args))
        except Exception as e:
            fact = (str(e) or type(e).__name__).splitlines()[0]
            way_out = "Check the batch's shape and type"
            raise CalibrationError(f"the float forward failed: {fact}", where=self._where(n), way_out=way_out) from e
        for observer in self.watch.get(n, ()) if n.op != "get_attr" or self.batch == 0 else ():
            try:
                observer.observe(out, self.first[observer] is not n)
            except CalibrationError as e:
                raise CalibrationError(e.fact, where=self._where(n), way_out=e.way_out) from e
        return out

    def _where(self, n: Node) -> str:
        return f"calibrate / {n.name}, batch {self.batch}"


@dataclass(frozen=True)
class Calibrate(Pass):
    """Observe the float forward (arXiv 1712.05877, section 3.1) and choose each grid's parameters.

    Values that share a grid share its observer. A value that only moves codes of the same grid (max-pool, reshape, ...) holds
    nothing new and is not observed; a constant is observed once. A grid that absorbed a clamp starts at exactly the clamp's lower end
    and ends at or below its upper end.

    Of several processes (:mod:`fxq.distributed`) each observes its own data, however many batches that is; then their observers are merged, so that all
    of them find the same grids.

    Attributes:
        observer: overrides the scheme's activation observer.
        keep: a scheme with bias correction or weight rounding keeps the first batches in ``ctx.kept``, while they hold at most
            so many numbers (the first batch always).
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)
    ensures: ClassVar[tuple[str, ...]] = ("calibrated",)

    observer: str | None = None
    keep: int = 1 << 22

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        table = grids(gm)
        members: dict[str, list[Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            name = node.meta.get("grid")
            if name is not None and table[name].fixed is None and table[name].qparams is None:
                members[name].append(node)
            second = node.meta.get("narrow")
            if second is not None and table[second].qparams is None:
                members[second].append(data_inputs(node)[0])
        if not members:
            return 0
        if ctx.calibration is None:
            raise CalibrationError("there is no calibration data", where=self.name, way_out="Pass calibration= (a few hundred samples)")
        made = {name: self._observer(table[name], ctx).to(_device(ctx)) for name in members}
        watch: dict[Node, list[Observer]] = {}
        for name, nodes in members.items():
            for node in dict.fromkeys(nodes):
                if node.meta.get("grid") != name or not _moves(gm, node, ctx.target):
                    watch.setdefault(node, []).append(made[name])
        with _on_all(made, ctx):
            self._observe(gm, ctx, watch)
        for name, observer in made.items():
            table[name] = _with_qparams(name, table[name], observer, ctx)
        return len(made)

    def _observer(self, grid: Grid, ctx: PassContext) -> Observer:
        if grid.how == "ternary":
            return MeanMagnitude(grid.spec)
        wide = ctx.scheme.stream is not None and grid.spec == ctx.scheme.stream
        return make(self.observer or ("ema" if wide else ctx.scheme.activation_observer), grid.spec)

    def _observe(self, gm: GraphModule, ctx: PassContext, watch: dict[Node, list[Observer]]) -> None:
        assert ctx.calibration is not None
        runner = _Observe(gm.eval(), {n: watch[n] for n in gm.graph.nodes if n in watch})
        total = operator.length_hint(ctx.calibration, 0) or None
        room = self.keep if ctx.scheme.reconstructs else 0
        layout = _channels_last if all(k != "opaque" for _, k in walk(gm)) else tuple
        with torch.inference_mode():
            for batch in ctx.calibration:
                runner.run(*layout(batch))
                size = sum(x.numel() for x in batch if isinstance(x, Tensor))
                if room >= size or (room and not ctx.kept):
                    ctx.kept.append(batch)
                    room = max(0, room - size)
                else:
                    room = 0
                runner.batch += 1
                ctx.progress(self.name, runner.batch, total)


@contextmanager
def _on_all(made: dict[str, Observer], ctx: PassContext) -> Iterator[None]:
    """Merge what all processes observed inside, in the order of their ranks; an error of one stops all."""
    if distributed.world() == 1:
        yield
        return
    try:
        yield
    except Exception as e:
        distributed.report(e)
        raise
    states = {name: {k: v.cpu() for k, v in observer.state_dict().items()} for name, observer in made.items()}
    every = distributed.gather((states, _moved(ctx.kept, "cpu")))
    for rank, (other, _) in enumerate(every):
        if list(other) != list(states):
            way_out = "Compile the same model in all of them; what one does by itself goes into fxq.distributed.alone()"
            raise CalibrationError(f"the process of rank {rank} calibrates another model", where=Calibrate.name, way_out=way_out)
    for name, observer in made.items():
        first, *rest = (copy.deepcopy(observer) for _ in every)
        for one, (other, _) in zip((first, *rest), every, strict=True):
            one.load_state_dict(other[name])
        for one in rest:
            first.merge(one)
        observer.load_state_dict(first.state_dict())
    ctx.kept[:] = [batch for _, kept in every for batch in _moved(kept, _device(ctx))]


def _moved(batches: list[tuple[Any, ...]], device: torch.device | str) -> list[tuple[Any, ...]]:
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batches)  # type: ignore[no-any-return]


def _in_place(gm: GraphModule, node: Node) -> Callable[..., Any] | None:
    """The operation on the first of its inputs that it may overwrite."""
    op = IN_PLACE.get(kind(gm, node))
    if op is None or not all(isinstance(a, Node) for a in node.args):
        return None
    for i, a in enumerate(node.args):
        assert isinstance(a, Node)
        if len(a.users) == 1 and kind(gm, a) in FRESH and all(a.meta[key] == node.meta[key] for key in ("shape", "dynamic", "dtype")):
            return op if i == 0 else lambda x, y: op(y, x)
    return None


def _channels_last(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Images and volumes with the channels innermost in memory, which CPU convolutions take without reordering."""
    return tuple(_format(x) for x in batch)


def _format(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.ndim not in (4, 5):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _moves(gm: GraphModule, node: Node, target: Target) -> bool:
    """True when the node only hands on values of its own grid."""
    rule = target.ops.get(kind(gm, node))
    if rule is None or rule.output != "same" or not node.meta.get("integer"):
        return False
    sources = data_inputs(node)
    if kind(gm, node) == "getitem":
        sources = data_inputs(sources[0])
    return bool(sources) and all(s.meta.get("grid") == node.meta["grid"] for s in sources)


def _with_qparams(name: str, grid: Grid, observer: Observer, ctx: PassContext) -> Grid:
    """The grid with the parameters that its observer found."""
    if not bool(observer.has_data):
        way_out = "Check that the loader yields batches"
        raise CalibrationError("no calibration data reached it", where=f"calibrate / {name}", way_out=way_out)
    lo, hi = (v.cpu() for v in observer.range())
    if grid.clamp is not None:
        lo, hi = _clamped(lo, hi, grid.clamp)
    if grid.how == "ternary":
        step = (2 * TBN_RATIO * hi).clamp(min=numerics.TINY)
        return replace(grid, qparams=QParams(grid.spec, torch.ones(()), torch.zeros((), dtype=torch.int32)), step=step)
    if grid.how in ("clip", "pact"):
        return _clipped(grid, lo, hi, ctx)
    qp = numerics.choose_qparams(lo, hi, grid.spec)
    if ctx.target.unsigned_codes and qp.spec.signed and not qp.spec.narrow:
        qp = numerics.unsigned(qp)
    return replace(grid, spec=qp.spec, qparams=qp)


def _clipped(grid: Grid, lo: Tensor, hi: Tensor, ctx: PassContext) -> Grid:
    """Levels from 0 to the clip; from minus the clip on for values that go below 0."""
    signed = grid.clamp is None and float(lo) < 0
    spec = replace(grid.spec, signed=signed, narrow=signed, symmetric=True)
    if not ctx.scheme.compat:
        return replace(grid, spec=spec, qparams=numerics.choose_qparams(lo, hi, spec))
    steps = torch.tensor(float(spec.qmax))
    qp = QParams(spec, 1 / steps, torch.zeros((), dtype=torch.int32))
    return replace(grid, spec=spec, qparams=qp, step=ctx.scheme.clip / steps)


def _clamped(lo: Tensor, hi: Tensor, clamp: tuple[float, float | None]) -> tuple[Tensor, Tensor]:
    low, high = clamp
    return torch.full_like(lo, low), hi.clamp(min=low, max=high)


def _device(ctx: PassContext) -> torch.device:
    return next((x.device for x in ctx.example if isinstance(x, Tensor)), torch.device("cpu"))
