"""Low-bit weights in training: float weight to values that are codes times a scale, differentiable, and those codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxq import lowbit, numerics
from fxq.schemes import Scheme
from fxq.spec import QuantSpec
from fxq.weight_ranges import weight_range

LEAST_STEP = 1e-8


class Estimator(nn.Module, ABC):
    """Base of the weight estimators.

    ``forward(w)`` gives the values, shape of ``w``; :meth:`codes` gives integers (dtype of ``w``) and a scale, rank 0 or ``[C]`` along ``axis``, whose product
    are these values. Once frozen the scale is a buffer and stays; the codes follow the weight.

    Attributes:
        axis: of the output channels in the weight.
        top: greatest magnitude of a code.
    """

    fixed: Tensor

    def __init__(self, axis: int, top: int, scale: Tensor) -> None:
        super().__init__()
        self.axis, self.top, self.frozen = axis, top, False
        self.register_buffer("fixed", torch.ones_like(scale))

    @abstractmethod
    def live(self, w: Tensor) -> Tensor:
        """Values, differentiable."""

    @abstractmethod
    def live_codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale, no gradient."""

    def mask(self, w: Tensor) -> Tensor:
        """Where the gradient passes when the scale is fixed."""
        return torch.ones_like(w)

    def forward(self, w: Tensor) -> Tensor:
        if not self.frozen:
            return self.live(w)
        codes, scale = self.codes(w)
        return lowbit.through(w, codes * numerics.along(scale, self.axis, w.ndim), self.mask(w.detach()))

    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale, no gradient."""
        with torch.no_grad():
            codes, scale = self.live_codes(w.detach())
        return codes, self.fixed if self.frozen else scale.to(torch.float32)

    def freeze(self, w: Tensor) -> None:
        """Fix the scale as it is."""
        self.fixed.copy_(self.codes(w)[1])
        self.fix()

    def fix(self, frozen: bool = True) -> None:
        """Set ``frozen``: a learned scale that is fixed is not trained."""
        if frozen == self.frozen:
            return
        self.frozen = frozen
        for p in self.parameters(recurse=False):
            p.requires_grad_(not frozen)
            if frozen:
                p.grad = None


class SignEstimator(Estimator):
    """Binary weights; the weight may be centred first."""

    def __init__(self, axis: int, scale: Tensor, scaled: bool, centre: bool, masked: bool) -> None:
        super().__init__(axis, 1, scale)
        self.scaled, self.centre, self.masked = scaled, centre, masked

    def _weight(self, w: Tensor) -> Tensor:
        return lowbit.centred(w, 0 if self.axis == 1 else 1) if self.centre else w

    def live(self, w: Tensor) -> Tensor:
        return lowbit.binary_weight(self._weight(w), self.axis, self.scaled, self.masked)

    def live_codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return lowbit.binary_codes(self._weight(w), self.axis, self.scaled)

    def mask(self, w: Tensor) -> Tensor:
        scale = numerics.along(self.fixed, self.axis, w.ndim)
        return scale * (self._weight(w).abs() < 1) if self.masked else scale.expand_as(w)


class TernaryEstimator(Estimator):
    """Ternary weights."""

    def __init__(self, axis: int, scale: Tensor, exact: bool) -> None:
        super().__init__(axis, 1, scale)
        self.exact = exact

    def live(self, w: Tensor) -> Tensor:
        return lowbit.ternary_weight(w, self.axis, self.exact)

    def live_codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return lowbit.ternary_codes(w, self.axis, self.exact)

    def mask(self, w: Tensor) -> Tensor:
        return numerics.along(self.fixed, self.axis, w.ndim).expand_as(w)


class DoReFaEstimator(Estimator):
    """DoReFa's weights: odd codes, one scale."""

    def __init__(self, axis: int, bits: int, compat: bool) -> None:
        super().__init__(axis, 2**bits - 1, torch.ones(()))
        self.bits, self.compat = bits, compat

    def live(self, w: Tensor) -> Tensor:
        return lowbit.dorefa_weight(w, self.bits, self.compat)

    def live_codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return lowbit.dorefa_levels(w, self.bits), lowbit.dorefa_scale(w, self.bits, self.compat).clamp(min=numerics.TINY)

    def mask(self, w: Tensor) -> Tensor:
        t = torch.tanh(w)
        return (1 - t.square()) / t.abs().max().clamp(min=numerics.TINY) * self.fixed * self.top


class _Rounded(Estimator):
    """Weights rounded to the nearest multiple of a step."""

    @abstractmethod
    def step(self, w: Tensor) -> Tensor:
        """The step in use, rank 0 or ``[C]``."""

    def live(self, w: Tensor) -> Tensor:
        return lowbit.learned_step(w, self.step(w), -self.top, self.top, axis=self.axis)

    def live_codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        step = self.fixed if self.frozen else self.step(w).detach()
        return torch.round(w / numerics.along(step, self.axis, w.ndim)).clamp(-self.top, self.top), step

    def mask(self, w: Tensor) -> Tensor:
        return (torch.round(w / numerics.along(self.fixed, self.axis, w.ndim)).abs() <= self.top).to(w.dtype)


class StepEstimator(_Rounded):
    """The step of each output channel is learned (LSQ)."""

    def __init__(self, axis: int, bits: int, start: Tensor) -> None:
        super().__init__(axis, 2 ** (bits - 1) - 1, start)
        self.learned_step = nn.Parameter(start.clone())

    def step(self, w: Tensor) -> Tensor:
        return self.learned_step.abs().clamp(min=LEAST_STEP)


class RangeEstimator(_Rounded):
    """The step follows from the range of the weight as it is, without its batch norm."""

    def __init__(self, axis: int, spec: QuantSpec, observer: str, start: Tensor) -> None:
        super().__init__(axis, 2 ** (spec.bits - 1) - 1, start)
        self.spec, self.observer = spec, observer

    def step(self, w: Tensor) -> Tensor:
        return _range_step(w.detach(), self.spec, self.observer)


def _range_step(w: Tensor, spec: QuantSpec, observer: str) -> Tensor:
    with torch.no_grad():
        return numerics.choose_qparams(*weight_range(w, spec, observer), spec).scale.clamp(min=LEAST_STEP)


def estimator(scheme: Scheme, kind: str, w: Tensor) -> Estimator:
    """How the weight ``w`` of a ``conv``, ``conv_transpose`` or ``linear`` layer is estimated under ``scheme``."""
    assert scheme.weight is not None
    w = w.detach().to(torch.float32)
    axis = 1 if kind == "conv_transpose" else 0
    rows = torch.ones(w.shape[axis], device=w.device)
    if scheme.weights == "sign":
        return SignEstimator(axis, rows, scheme.scaled, scheme.centre, scheme.masked)
    if scheme.weights == "ternary":
        return TernaryEstimator(axis, rows, scheme.exact)
    if scheme.weights == "dorefa":
        return DoReFaEstimator(axis, scheme.weight.bits, scheme.compat).to(w.device)
    spec = replace(scheme.weight_spec(kind), axis=axis)
    start = _range_step(w, spec, scheme.weight_observer)
    return StepEstimator(axis, spec.bits, start) if scheme.weights == "lsq" else RangeEstimator(axis, spec, scheme.weight_observer, start)
