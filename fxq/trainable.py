"""The trainable form of a compiled model: quantization-aware training, then training with fixed grids, then the deployed model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from fxq.compiled import CompiledModel
from fxq.errors import FxqError, LoweringError
from fxq.estimators import Estimator
from fxq.graph import finish, grids, module_of, swap_module, walk
from fxq.lowering import Artifact
from fxq.modules import WEIGHTED
from fxq.snapshot import History, take
from fxq.trackers import Sign, TrackedFakeQuantize
from fxq.training import FloatLayer, FloatNorm, Normed, TrainedLayer, unsigned_where
from fxq.training_lowbit import EstimatedLayer

QAT, QAFT = "qat", "qaft"
LAYERS = (TrainedLayer, EstimatedLayer, FloatLayer, FloatNorm)


class TrainableModel(CompiledModel):
    """What ``fxq.compile(..., mode="qat")`` returns: an ordinary module for your loop, optimizer, scheduler and checkpoints.

    In training mode it observes ranges, rounds weights and activations and trains the batch norms; in eval mode it computes what would be deployed
    now. :meth:`freeze` fixes grids and statistics (QAFT), :meth:`convert` gives the deployed model.
    """

    phase: str = QAT

    @property
    def sync_batch_norm(self) -> bool:
        """In training on several processes batch norms take the statistics of all of them (the default); ``False``: each process its own, as in plain DDP."""
        return all(m.together for m in self.modules() if isinstance(m, Normed))

    @sync_batch_norm.setter
    def sync_batch_norm(self, together: bool) -> None:
        for m in self.modules():
            if isinstance(m, Normed):
                m.together = together

    def freeze(self) -> TrainableModel:
        """Fix all grids and batch norm statistics: from now on training and eval mode compute the same, bit for bit, which is what is deployed.

        Raises:
            FxqError: when it is frozen already, or has seen no data.
        """
        if self.phase == QAFT:
            raise FxqError("the model is frozen already", way_out="Go on training, or call convert()")
        self._require_data("freeze()")
        for m in self.modules():
            if isinstance(m, TrackedFakeQuantize):
                m.tracker.freeze()
        for m in list(self.modules()):
            if isinstance(m, LAYERS):
                m.freeze()
            elif isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()
        self.phase = QAFT
        return self

    def train(self, mode: bool = True) -> TrainableModel:
        """As in torch; after :meth:`freeze` batch norms stay in eval mode."""
        super().train(mode)
        if self.phase == QAFT:
            for m in self.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        return self

    def anneal(self, sharpness: float) -> None:
        """Make the gradient of the signs (``ste="tanh"``) steeper: ``k (1 - tanh(k x)^2)``; from 1 upwards in the course of training.

        Raises:
            FxqError: when it is not positive, or no sign has that gradient.
        """
        signs = [m.tracker for m in self.modules() if isinstance(m, TrackedFakeQuantize) and isinstance(m.tracker, Sign) and m.tracker.ste == "tanh"]
        if not sharpness > 0:
            raise FxqError(f"sharpness {sharpness} is not positive", way_out="Begin at 1 and let it grow")
        if not signs:
            raise FxqError("no sign of this model has the gradient 'tanh'", way_out="Compile with dataclasses.replace(scheme, ste='tanh')")
        for sign in signs:
            sign.sharpness.fill_(sharpness)

    def convert(self) -> CompiledModel:
        """The deployed model: a copy on integer grids, to verify and to lower. This one stays as it is.

        Raises:
            FxqError: before any data was seen.
        """
        self._require_data("convert()")
        gm = copy.deepcopy(self.graph_module).eval()
        for m in gm.modules():
            if isinstance(m, TrackedFakeQuantize):
                m.tracker.settle()
        for node, _ in walk(gm, *WEIGHTED, "batch_norm"):
            layer = module_of(gm, node)
            if isinstance(layer, LAYERS):
                swap_module(gm, node, layer.converted())
        for node, _ in walk(gm, "fake_quantize"):
            fq = module_of(gm, node)
            if isinstance(fq, TrackedFakeQuantize):
                qp = unsigned_where(fq.spec, self.target.unsigned_codes, fq.qparams)
                table = grids(gm)
                table[fq.grid] = replace(table[fq.grid], spec=qp.spec, qparams=qp, step=fq.tracker.step)
                swap_module(gm, node, fq.deployed(qp))
        finish(gm)
        history = History([*self.history, take(gm, "convert-trained")])
        return CompiledModel(gm, self.captured, history, self.scheme, self.target)

    def _require_data(self, what: str) -> None:
        for path, m in self.named_modules():
            if isinstance(m, TrackedFakeQuantize) and not m.tracker.ready:
                way_out = "Run a batch in training mode first, or compile with calibration="
                raise FxqError(f"{what} before any data: this grid has no range yet", where=path.removeprefix("root."), way_out=way_out)

    def reference(self, *args: Any) -> Any:
        """The integer reference of the model as it is now: that of :meth:`convert`."""
        return self.convert().reference(*args)

    def lower(self, backend_name: str = "onnx-qdq", target: Any = None, **options: Any) -> Artifact:
        """A model in training is not lowered.

        Raises:
            LoweringError: always; the deployed model is what :meth:`convert` returns.
        """
        raise LoweringError("the model is in training", way_out="Call convert() and lower what it returns")

    def get_extra_state(self) -> dict[str, str]:
        """Phase and scheme, for checkpoints."""
        return {"phase": self.phase, "scheme": self.scheme.name}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Go on in the phase of a checkpoint.

        Raises:
            FxqError: for the checkpoint of another scheme.
        """
        if state["scheme"] != self.scheme.name:
            raise FxqError(f"the checkpoint is of scheme {state['scheme']!r}, the model of {self.scheme.name!r}", way_out="Compile the model with that scheme")
        self.phase = state["phase"]
        for m in self.modules():
            if isinstance(m, TrackedFakeQuantize):
                m.tracker.fix(self.phase == QAFT)
            elif isinstance(m, Estimator):
                m.fix(self.phase == QAFT)
            elif isinstance(m, LAYERS):
                m.frozen = self.phase == QAFT
