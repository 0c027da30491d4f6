"""Scores of a model on data: what a debugger compares. Greater is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq.calibration import Batches
from fxq.errors import InputError, nearest
from fxq.snapshot import flat

Score = Callable[[Any, Any], float]
"""``score(model, data) -> float``, greater is better; ``data`` is what the caller gave."""

METRICS = {
    "sqnr": "signal to noise of the outputs against the float model, dB",
    "agreement": "share of samples (of an image of classes: of pixels) whose greatest output is the float model's",
    "accuracy": "share of samples whose greatest output is the label behind the inputs",
}


class Metric:
    """A score against the float model.

    Args:
        metric: a key of :data:`METRICS`, or a function ``(model, data) -> float``, greater is better.
        batches: tuples of positional inputs; labels: one tensor a batch, or None.
        data: what a function gets.
        floating: the float model.

    Attributes:
        runs: how often data went through a model (a whole pass over it counts once).

    Raises:
        InputError: unknown name; ``accuracy`` without labels, or with labels that do not fit; a function that gives no number.
    """

    def __init__(self, metric: str | Score, batches: Sequence[tuple[Any, ...]], labels: Sequence[Any], data: Any, floating: GraphModule) -> None:
        if isinstance(metric, str) and metric not in METRICS:
            raise InputError(f"unknown metric {metric!r}", way_out=nearest(metric, METRICS) + ", or a function (model, data) -> float, greater is better")
        if metric == "accuracy" and not all(isinstance(y, Tensor) for y in labels):
            raise InputError("the accuracy needs labels", way_out="Give data of (inputs, labels), or metric='agreement'")
        self.metric, self.batches, self.labels, self.data, self.runs = metric, batches, labels, data, 0
        self.truth = [] if metric == "accuracy" or callable(metric) else [flat(self._run(floating, b)) for b in batches]
        self.floor = self(floating)

    @property
    def name(self) -> str:
        """Of the metric, for texts."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric")

    def __call__(self, model: Any) -> float:
        """The model's score."""
        self.runs += 1
        if callable(self.metric):
            with torch.inference_mode():
                return self._number(self.metric(model, self.data))
        outs = [flat(self._run(model, b)) for b in self.batches]
        if self.metric == "sqnr":
            return self._sqnr(outs)
        if self.metric == "accuracy":
            want, axes = self.labels, [_axis(o[0], y) for o, y in zip(outs, self.labels, strict=True)]
        else:
            axes = [1 if t[0].ndim == 4 else -1 for t in self.truth]
            want = [t[0].argmax(axis) for t, axis in zip(self.truth, axes, strict=True)]
        right: int = sum(int((o[0].argmax(axis) == y.to(o[0].device)).sum()) for o, y, axis in zip(outs, want, axes, strict=True))
        total: int = sum(y.numel() for y in want)
        return right / max(1, total)

    def _number(self, value: Any) -> float:
        try:
            found = float(value)
        except (TypeError, ValueError) as e:
            raise InputError(f"the metric {self.name!r} gave {type(value).__name__}, which is no number", way_out="Return a float, greater is better") from e
        if math.isnan(found):
            raise InputError(f"the metric {self.name!r} gave NaN", way_out="Return a number for every model, greater is better")
        return found

    def text(self, value: float) -> str:
        """A score with its unit."""
        if self.metric == "sqnr":
            return "equal" if value == math.inf else f"{value:.1f} dB"
        return f"{value:.2%}" if isinstance(self.metric, str) else f"{value:.6g}"

    def drop(self, value: float) -> float:
        """How much worse than the float model; of the SQNR, which is infinite there, minus its value."""
        return -value if self.metric == "sqnr" else self.floor - value

    def _sqnr(self, outs: Sequence[Sequence[Tensor]]) -> float:
        signal = noise = 0.0
        for truth, out in zip(self.truth, outs, strict=True):
            for a, b in zip(truth, out, strict=True):
                if a.is_floating_point():
                    x, gap = a.double(), (a.double() - b.double())
                    signal += float(x.square().sum())
                    noise += float(gap[x != b].square().sum())
        if noise == 0:
            return math.inf
        return -math.inf if not math.isfinite(noise) or signal == 0 else 10 * math.log10(signal / noise)

    @staticmethod
    def _run(model: Any, batch: tuple[Any, ...]) -> Any:
        with torch.inference_mode():
            return model(*batch)


def _axis(out: Tensor, label: Tensor) -> int:
    """Dimension of the classes in an output, so that the others are the label's: the last, or the one behind the batch (a map of classes)."""
    for axis in (-1, 1):
        if out.ndim > 1 and out.select(axis, 0).shape == label.shape:
            return axis
    fact = f"labels of {list(label.shape)} do not fit outputs of {list(out.shape)}"
    raise InputError(fact, way_out="Give class numbers, one for each sample (or pixel, or token)")


def with_labels(data: Any, model: nn.Module, limit: int | None, what: str) -> tuple[list[tuple[Any, ...]], list[Any]]:
    """Batches of positional inputs in the type of the model's weights, and what stands behind the inputs of each (``None`` where there is nothing).

    Raises:
        CalibrationError: as :class:`~fxq.calibration.Batches`.
    """
    loader = Batches(data, model, limit=limit, what=what, labels=True)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    read = [tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in b) for b in loader]
    return [b[: loader.count] for b in read], [b[loader.count] if len(b) > loader.count else None for b in read]
