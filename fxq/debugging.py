"""How a compiled model is debugged: the methods ``bisect`` and ``sensitivity``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from fxq.bisect import bisect
from fxq.errors import InputError, nearest
from fxq.metrics import Metric, Score, with_labels
from fxq.quant_sensitivity import PER, QuantSensitivity, sensitivity
from fxq.schemes import Scheme
from fxq.snapshot import History
from fxq.targets import Target
from fxq.toggles import OFF, Toggles
from fxq.verdicts import Verdict


class Debugging:
    """Methods of a compiled model that look for what is wrong and for what each rounding costs."""

    history: History
    scheme: Scheme
    target: Target

    if TYPE_CHECKING:

        @property
        def graph_module(self) -> GraphModule:
            """The compiled graph."""

    def bisect(self, metric: str | Score = "sqnr", data: Any = None, tolerance: float | None = None, *, limit: int | None = None) -> Verdict:
        """Which pass, which node and why, when the compiled model is worse than it should be. ``print`` the verdict.

        First both models run twice on one input: what is not deterministic is named. Then every pass is held to what it promised, on the graphs
        before and after it: folding and rewriting give the same values from the same inputs in float64, grids fit their operations and share only
        where codes are handed on, weights and biases are those of the float layers. Then the grids are compared with the best ones for this data,
        and the fewest that explain the loss are found by bisection. Every fault comes with the metric after undoing it alone. Where nothing is wrong
        and the codes are just too few, the least set of roundings that would have to go is named.

        Args:
            metric: ``sqnr``, ``agreement``, ``accuracy`` (needs data with labels), or a function ``(model, data) -> float``, greater is better.
            data: like calibration data; all of it goes through the metric, the first samples through everything else. Default: the inputs that
                the history kept.
            tolerance: greatest drop below the float model that is still right; of ``sqnr`` the least dB. Default: as good as the scheme's codes can be.
            limit: at most so many batches.

        Raises:
            FxqError: the graphs of the passes were let go, or the model was changed since it was compiled (retyped, moved, edited in place).
            InputError: unknown metric, no labels for the accuracy, a metric or tolerance that is no number; no data where the history kept none.
            CalibrationError: data that does not fit.
        """
        given = self._given(data)
        return bisect(self.graph_module, self.history, self.scheme, self.target, metric, given, tolerance, limit)

    def sensitivity(self, data: Any = None, metric: str | Score | None = None, *, per: str = "grid", limit: int | None = None) -> QuantSensitivity:
        """What each rounding costs: SQNR of the output, and the drop of a metric, when it alone is quantized and when all but it are. Ranked in print.

        ``skip=m.sensitivity(data, per="layer").worst(2)`` keeps the two most sensitive layers float; ``m.report(path, sensitivity=...)`` draws it.

        Args:
            data: like calibration data, labels behind the inputs; default: the inputs that the history kept. All values of a batch are in memory.
            metric: as of :meth:`bisect`, measured twice for every row over all data; or None for the SQNR alone.
            per: ``grid`` (weights of each layer, each grid of activations) or ``layer`` (its weights and what it gives).
            limit: at most so many batches.

        Raises:
            InputError: unknown metric or ``per``, no labels for the accuracy, a metric that is no number; no data where the history kept none.
            CalibrationError: data that does not fit.
        """
        if per not in PER:
            raise InputError(f"unknown unit {per!r}", way_out=nearest(per, PER))
        given = self._given(data)
        batches, labels = with_labels(given, self.graph_module, limit, "data for the sensitivity")
        t = Toggles(self.graph_module, self.history.floats())
        t.set(OFF)
        measure = None if metric is None else Metric(metric, batches, labels, given, t.gm)
        return sensitivity(t, batches, measure, per)

    def _given(self, data: Any) -> Any:
        if data is None and self.history.example is None:
            raise InputError("no data is given, and the history kept no inputs", way_out="Give data, like the calibration data")
        return [self.history.example] if data is None else data
