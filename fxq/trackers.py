"""Activation grids while they are learned: by their range, on a learned step, at a clip, as signs, as ternary values.

A tracker holds one grid; values that share the grid share it. State lies in buffers and parameters: a copy of ``state_dict`` resumes exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fxq import distributed, lowbit, numerics
from fxq.errors import CalibrationError
from fxq.graph import Grid
from fxq.modules import FakeQuantize
from fxq.observers import MovingAverage, Observer, share
from fxq.spec import QParams, QuantSpec

LEAST_STEP = 1e-8
"""Learned steps and clips end here instead of at 0."""


class MeanMagnitude(Observer):
    """Moving average of each batch's ``mean |x|``: ``r <- (1-m) r + m batch``; the first batch sets it. Its range is ``(0, r)``."""

    batches: Tensor

    def __init__(self, spec: QuantSpec, momentum: float = 0.1) -> None:
        super().__init__(spec)
        self.momentum = momentum
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def _take(self, x: Tensor, lo: Tensor, hi: Tensor, part: bool) -> None:
        self.batches += 1
        now = share(self.batches, self.momentum)
        mean = distributed.mean(x.abs()) if self.together else x.abs().mean()
        self.hi.copy_((1 - now) * self.hi.double() + now * mean.double())

    def _join(self, other: Observer) -> None:
        assert isinstance(other, MeanMagnitude)
        total = self.batches + other.batches
        share = float(other.batches) / float(total)
        self.hi.copy_((1 - share) * self.hi + share * other.hi)
        self.batches.copy_(total)


class Tracker(nn.Module):
    """The parameters of one activation grid while they are learned: a moving average of each batch's range.

    Buffers ``scale``, ``zero_point`` (the grid in use) and the observer's. Each batch counts once, whichever of the values that share the grid
    comes first.

    Attributes:
        spec: the codes; ``clamp``: an absorbed activation, ``(lo, hi or None)``; ``frozen``: nothing changes any more; ``fixed``: it never did.
        step: buffer, the scale that values are divided by, where it is another than ``scale``; or ``None``.
    """

    scale: Tensor
    zero_point: Tensor
    step: Tensor | None

    def __init__(self, qparams: QParams, grid: Grid, momentum: float = 0.1) -> None:
        super().__init__()
        self.spec, self.clamp = qparams.spec, grid.clamp
        self.frozen = self.fixed = grid.fixed is not None
        self.register_buffer("scale", qparams.scale.clone())
        self.register_buffer("zero_point", qparams.zero_point.clone())
        self.register_buffer("step", None if grid.step is None else grid.step.clone())
        self.observer = self._observer(momentum)
        self.observer.together = True

    def _observer(self, momentum: float) -> Observer:
        return MovingAverage(self.spec, momentum)

    def start(self, qparams: QParams, passing: bool = False) -> None:
        """Begin with a calibrated range instead of the first batch's. ``passing``: only until the first batch sets its own."""
        lo, hi = qparams.range
        if self.spec.symmetric and self.spec.qmin < 0:
            lo = -hi  # the lowest code would widen the range by a step
        self.observer.lo.fill_(lo)
        self.observer.hi.fill_(hi)
        if isinstance(self.observer, MovingAverage):
            self.observer.batches.fill_(0 if passing else 1)
        self.observer.has_data.fill_(True)

    @property
    def ready(self) -> bool:
        """The grid comes from data."""
        return self.fixed or bool(self.observer.has_data)

    @property
    def qparams(self) -> QParams:
        """The grid as data."""
        return QParams(self.spec, self.scale, self.zero_point)

    def see(self, x: Tensor, part: bool) -> None:
        """Take in a value of the running batch and move the grid. ``part``: another value of this grid was seen in the same batch."""
        if not self.frozen:
            self.observer.observe(x, part)
            self.update()

    def update(self) -> None:
        """Set the grid from what was observed."""
        lo, hi = self.observer.range()
        if self.clamp is not None:
            low, high = self.clamp
            lo, hi = torch.full_like(lo, low), hi.clamp(min=low, max=high)
        qp = numerics.choose_qparams(lo, hi, self.spec)
        self.scale.copy_(numerics.kept(qp.scale))
        self.zero_point.copy_(numerics.kept(qp.zero_point))

    def round(self, x: Tensor) -> Tensor:
        """``x`` rounded onto the grid, differentiable."""
        return numerics.fake_quantize_with(x, self.scale if self.step is None else self.step, self.zero_point, self.spec, self.scale)

    def settle(self) -> None:
        """Bring the buffers up to what was learned since the last batch."""

    def freeze(self) -> None:
        """Fix the grid as it is."""
        self.settle()
        self.fix()

    def fix(self, frozen: bool = True) -> None:
        """Set ``frozen``: parameters of a grid that is fixed are not trained."""
        if (frozen or self.fixed) == self.frozen:
            return
        self.frozen = frozen or self.fixed
        for p in self.parameters(recurse=False):
            p.requires_grad_(not frozen)
            if frozen:
                p.grad = None  # no optimizer moves it, and DDP does not wait for it

    def extra_repr(self) -> str:
        return f"{self.qparams}{', frozen' if self.frozen else ''}"


class _Learned(Tracker, ABC):
    """A tracker with parameters: the first batch sets them, then the optimizer does; the buffers follow."""

    def see(self, x: Tensor, part: bool) -> None:
        """Let the first batch set the start. Raises CalibrationError for NaN and infinity."""
        if self.frozen:
            return
        if not torch.compiler.is_compiling() and not self.ready:  # the first batch is never compiled
            self.observer.observe(x, part)
            self.first(x.detach())
        self.follow()

    def first(self, x: Tensor) -> None:
        """Begin with the first batch."""
        self.update()
        self.start(self.qparams)

    @abstractmethod
    def follow(self) -> None:
        """Copy the grid of the parameters into the buffers."""

    def settle(self) -> None:
        if not self.frozen:
            self.follow()


class LearnedStep(_Learned):
    """LSQ (arXiv 1902.08153): the step is a parameter; on asymmetric grids that absorbed no activation the offset is one too (LSQ+, arXiv 2004.09576)."""

    def __init__(self, qparams: QParams, grid: Grid, momentum: float = 0.1) -> None:
        super().__init__(qparams, grid, momentum)
        self.learned_step = nn.Parameter(qparams.scale.clone())
        moves = grid.clamp is None and not self.spec.symmetric
        self.learned_offset = nn.Parameter((self.spec.qmin - qparams.zero_point) * qparams.scale) if moves else None

    def start(self, qparams: QParams, passing: bool = False) -> None:
        super().start(qparams)
        with torch.no_grad():
            self.learned_step.copy_(qparams.scale)
            if self.learned_offset is not None:
                self.learned_offset.copy_((self.spec.qmin - qparams.zero_point) * qparams.scale)

    def first(self, x: Tensor) -> None:
        if self.learned_offset is None and (self.spec.symmetric or self.clamp is not None):
            size = distributed.mean((x if self.clamp is None else x.clamp(*self.clamp)).abs())
            self.observer.hi.copy_(lowbit.lsq_start(size, self.spec.qmax) * self.spec.qmax)
            self.observer.lo.fill_(0)
        super().first(x)

    def size(self) -> Tensor:
        """The step in use, differentiable: positive, and with the grid's end at or below an absorbed clamp's."""
        step = self.learned_step.abs().clamp(min=LEAST_STEP)
        top = None if self.clamp is None else self.clamp[1]
        return step if top is None else step.clamp(max=top / (self.spec.qmax - self.spec.qmin))

    def follow(self) -> None:
        with torch.no_grad():
            self.scale.copy_(self.size())
            if self.learned_offset is not None:
                zero = torch.round(self.spec.qmin - self.learned_offset / self.scale)
                self.zero_point.copy_(zero.clamp(self.spec.qmin, self.spec.qmax))

    def round(self, x: Tensor) -> Tensor:
        if self.frozen:
            return super().round(x)
        if self.learned_offset is not None:
            return lowbit.learned_offset(x, self.size(), self.learned_offset, self.spec.qmin, self.spec.qmax, distributed.world())
        return lowbit.learned_step(x, self.size(), self.spec.qmin, self.spec.qmax, self.zero_point, processes=distributed.world())


class Clip(_Learned):
    """DoReFa's activations (a constant clip, a buffer) and PACT's (a parameter; arXiv 1805.06085).

    Attributes:
        clip: where values are clipped, > 0; on signed grids on both sides.
    """

    clip: Tensor

    def __init__(self, qparams: QParams, grid: Grid, momentum: float = 0.1) -> None:
        super().__init__(qparams, grid, momentum)
        value = (qparams.scale if grid.step is None else grid.step) * self.spec.qmax
        if grid.how == "pact":
            self.clip = nn.Parameter(value)
        else:
            self.register_buffer("clip", value)

    def start(self, qparams: QParams, passing: bool = False) -> None:
        super().start(qparams)
        if self.step is None:
            with torch.no_grad():
                self.clip.copy_(qparams.scale * self.spec.qmax)

    def begin_at(self, clip: float) -> None:
        """Begin at a clip instead of where data lies."""
        self.start(QParams(self.spec, torch.full_like(self.scale, clip / self.spec.qmax), self.zero_point))

    def end(self) -> Tensor:
        """The clip in use, differentiable."""
        clip = self.clip.abs().clamp(min=LEAST_STEP)
        top = None if self.clamp is None else self.clamp[1]
        return clip if top is None else clip.clamp(max=top)

    def follow(self) -> None:
        with torch.no_grad():
            (self.scale if self.step is None else self.step).copy_(self.end() / self.spec.qmax)

    def see(self, x: Tensor, part: bool) -> None:
        if self.step is None:
            super().see(x, part)

    @property
    def ready(self) -> bool:
        return self.step is not None or super().ready

    def round(self, x: Tensor) -> Tensor:
        if self.step is not None:
            x_ = x.detach()
            end = self.step * self.spec.qmax
            inside = ((x_ >= (-end if self.spec.qmin < 0 else 0)) & (x_ <= end)).to(x.dtype)
            return lowbit.through(x, super().round(x_), inside * self.scale / self.step)
        return super().round(x) if self.frozen else lowbit.clipped(x, self.end(), self.spec.bits, self.spec.qmin < 0)


class Sign(Tracker):
    """Binary activations (arXiv 1602.02830).

    Attributes:
        ste: gradient, see :data:`fxq.lowbit.STES`; ``sharpness``: of ``tanh``, a buffer.
    """

    ste: str = "saturate"
    sharpness: Tensor

    def __init__(self, qparams: QParams, grid: Grid, momentum: float = 0.1) -> None:
        super().__init__(qparams, grid, momentum)
        self.register_buffer("sharpness", torch.ones(()))

    def round(self, x: Tensor) -> Tensor:
        x_ = x.detach()
        mask = lowbit.ste_mask(x_, self.ste, self.sharpness)
        return lowbit.through(x, self.value(x_), mask)

    def value(self, x: Tensor) -> Tensor:
        """``x`` rounded onto the grid; no gradient."""
        return torch.where(x >= 0, self.scale, -self.scale)


class Ternary(Sign):
    """TBN's activations: the threshold is 0.4 of the moving average of ``mean |x|``; ``step`` is twice the threshold."""

    def _observer(self, momentum: float) -> Observer:
        return MeanMagnitude(self.spec, momentum)

    def start(self, qparams: QParams, passing: bool = False) -> None:
        assert self.step is not None and isinstance(self.observer, MeanMagnitude)
        self.observer.hi.copy_(self.step / (2 * lowbit.TBN_RATIO))
        self.observer.batches.fill_(1)
        self.observer.has_data.fill_(True)

    def value(self, x: Tensor) -> Tensor:
        return Tracker.round(self, x)

    def update(self) -> None:
        assert self.step is not None
        self.step.copy_(numerics.kept((2 * lowbit.TBN_RATIO * self.observer.hi).clamp(min=numerics.TINY)))


TRACKERS: dict[str, type[Tracker]] = {"range": Tracker, "lsq": LearnedStep, "clip": Clip, "pact": Clip, "sign": Sign, "ternary": Ternary}


def tracker(qparams: QParams, grid: Grid, ste: str = "saturate") -> Tracker:
    """The tracker of a grid (``grid.how``)."""
    made = TRACKERS[grid.how](qparams, grid)
    if isinstance(made, Sign):
        made.ste = ste
    return made


class TrackedFakeQuantize(FakeQuantize):
    """A fake-quantizer whose grid a :class:`Tracker` finds while the model is in training mode.

    Attributes:
        first: of the fake-quantizers that share a tracker, the one that runs first in the graph.
        tracker: on the first one a submodule, on the others a plain reference.
        moves: it stands behind an operation that moves values of this very grid: they stay as they are, and so do their gradients.
    """

    def __init__(self, tracker: Tracker, grid: str, first: bool, moves: bool = False) -> None:
        super().__init__(tracker.qparams, grid)
        del self.scale, self.zero_point, self.step
        self.first, self.moves = first, moves
        if first:
            self.own = tracker
            tracker.observer.where = grid
        self._tracker = [tracker]

    @property
    def tracker(self) -> Tracker:
        return self._tracker[0]

    @property
    def qparams(self) -> QParams:
        """The grid as data, as its readers see it."""
        return self.tracker.qparams

    @property
    def rounding(self) -> QParams:
        """The grid that values are rounded to."""
        step = None if self.moves else self.tracker.step
        return self.qparams if step is None else QParams(self.spec, step, self.tracker.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        if self.moves:
            return x
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x  # under autocast
        try:
            if self.training:
                self.tracker.see(wide, part=not self.first)
            else:
                self.tracker.settle()
        except CalibrationError as e:
            raise CalibrationError(e.fact, where=self.grid, way_out=e.way_out) from e
        if not self.quantizing:  # the activation that the grid absorbed stays
            return x if self.tracker.clamp is None else x.clamp(*self.tracker.clamp)
        return self.tracker.round(wide).to(x.dtype)

    def deployed(self, qparams: QParams | None = None) -> FakeQuantize:
        """The fake-quantizer of the deployed model. ``qparams``: the grid as the target keeps it, where it is another."""
        t: Any = self.tracker
        return FakeQuantize(qparams or self.qparams, self.grid, None if self.moves else t.step)

    def extra_repr(self) -> str:
        return str(self.tracker)
