"""The trainable form of a compiled model: quantization-aware training, then training with fixed grids, then the deployed model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fxq import compressing, finite
from fxq.compiled import CompiledModel
from fxq.errors import FxqError, LoweringError
from fxq.estimators import Estimator
from fxq.graph import finish, grids, module_of, swap_module, walk
from fxq.lowering import Artifact
from fxq.modules import WEIGHTED
from fxq.shared import any_shared
from fxq.snapshot import History, take
from fxq.trackers import Sign, TrackedFakeQuantize, Tracker
from fxq.training import FloatLayer, FloatNorm, Normed, TrainedLayer, unsigned_where
from fxq.training_lowbit import EstimatedLayer

if TYPE_CHECKING:
    from fxq.quant_sensitivity import QuantSensitivity
    from fxq.selectors import Selector
    from fxq.verdicts import Verdict

QAT, QAFT = "qat", "qaft"
LAYERS = (TrainedLayer, EstimatedLayer, FloatLayer, FloatNorm)


@_disable_dynamo
def _outside(call: Callable[..., Any], *args: Any) -> Any:
    """Run as it is, between two compiled graphs."""
    return call(*args)


class TrainableModel(CompiledModel):
    """What ``fxq.compile(..., mode="qat")`` returns: an ordinary module for your loop, optimizer, scheduler and checkpoints.

    In training mode it observes ranges, rounds weights and activations and trains the batch norms; in eval mode it computes what would be deployed now
    (weights that are to share codebooks: from :meth:`share_weights` on). :meth:`freeze` fixes grids and statistics (QAFT), :meth:`convert` gives the
    deployed model.
    """

    phase: str = QAT
    hold_at: int | None = None
    _held: bool = False
    _begun: bool = False
    steps: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any) -> Any:
        """The fake-quant simulator; in training mode it observes, and counts the step.

        Raises:
            CalibrationError: for NaN or infinity in the input of a grid that is found by its range, in a parameter or in a batch norm's statistics;
                what exploded first is named. Of several processes all raise.
        """
        if not torch.compiler.is_compiling():
            self._begin()
            return self.root(*args)
        _outside(TrainableModel._begin, self)
        if not self._begun:
            return _outside(self.root, *args)  # the first batch decides where learned grids begin
        return self.root(*args)

    def _begin(self) -> None:
        """What comes before each forward."""
        finite.require_finite(self, self.training)
        self._begun = self._begun or all(m.ready for m in self.modules() if isinstance(m, Tracker))
        if self.training and self.phase == QAT:
            if self.hold_at is not None and not self.batch_norm_frozen and int(self.steps) >= self.hold_at:
                self._hold(True)
            self.steps += 1

    def explain_nan(self, *args: Any) -> str:
        """Where NaN or infinity first appears: in a parameter, a statistic or the value of a node, when a copy of the model runs on ``args``."""
        gm = copy.deepcopy(self).graph_module
        return finite.explain(gm, *args)

    def freeze_batch_norm(self, after: int = 0) -> TrainableModel:
        """After so many training forwards more, statistics of batch norms stay, and training uses them instead of the batch's; grids go on moving.

        Layers that hold their batch norm then compute in training what they do in eval mode. Processes and checkpoints keep count (``steps``).

        Args:
            after: training forwards from now on; 0: at once.

        Raises:
            FxqError: for a negative number, or when :meth:`freeze` fixed the statistics already.
        """
        if after < 0:
            raise FxqError(f"{after} steps are in the past", way_out="Give 0 for at once, or a positive number")
        if self.phase == QAFT:
            raise FxqError("the statistics are fixed already, by freeze()", way_out="Call freeze_batch_norm() before freeze()")
        self.hold_at = int(self.steps) + after
        self._hold(after == 0)
        return self

    @property
    def batch_norm_frozen(self) -> bool:
        """The statistics of the batch norms stay."""
        return self.phase == QAFT or self._held

    def _hold(self, held: bool) -> None:
        was, self._held = self.batch_norm_frozen, held
        if was or held:
            self._still()

    def _still(self) -> None:
        """Batch norms whose statistics stay are in eval mode."""
        for m in self.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.train(self.training and not self.batch_norm_frozen)

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
        finite.require_finite(self)
        for m in self.modules():
            if isinstance(m, TrackedFakeQuantize):
                m.tracker.freeze()
        for m in list(self.modules()):
            if isinstance(m, LAYERS):
                m.freeze()
        self.phase = QAFT
        self._still()
        return self

    def train(self, mode: bool = True) -> TrainableModel:
        """As in torch; batch norms whose statistics are fixed stay in eval mode."""
        super().train(mode)
        if self.batch_norm_frozen:
            self._still()
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

    def prune_weights(self, ratio: float) -> TrainableModel:
        """Cut more weights by magnitude, so that ``ratio`` of those under masks are cut (compile with ``prune=fxq.Prune(sparsity=...)``).

        Each layer's part is as the request said (``sparsity_scope``). For a gradual schedule call it every few steps with
        :func:`fxq.sparsity.cubic_ratio`. Parameters, and so the optimizer's state, stay the same objects.

        Args:
            ratio: in [0, 1), of all weights under masks.

        Raises:
            FxqError: for a ratio below that of now, outside [0, 1) or above what the request allows (layers whose own share is 0), without masks, or
                after :meth:`share_weights`; the masks then stay as they were.
        """
        compressing.prune_weights(self.graph_module, ratio)
        return self

    def share_weights(self) -> TrainableModel:
        """Cluster each layer's weights as they are now: from here on codebooks train, with gradients summed over the weights of each entry, and 0 stays 0.

        Parameters of the weights are replaced by those of the codebooks: make a new optimizer. Calling :meth:`convert` without it clusters a copy.

        Raises:
            FxqError: when weights share codebooks already, or the model is frozen.
            PassError: for a scheme that shares none, and for weights that are not finite or not float32; the model then stays as it was.
        """
        if self.phase == QAFT:
            raise FxqError("the model is frozen", way_out="Call share_weights() before freeze()")
        self.history.snapshots.append(compressing.share_weights(self.graph_module, self.scheme, self.target, self.history.example))
        return self

    @property
    def shares_weights(self) -> bool:
        """:meth:`share_weights` was called."""
        return any_shared(self)

    def convert(self) -> CompiledModel:
        """The deployed model: a copy on integer grids, to verify and to lower. This one stays as it is.

        Raises:
            FxqError: before any data was seen.
        """
        self._require_data("convert()")
        finite.require_finite(self)
        gm = copy.deepcopy(self.graph_module).eval()
        for m in gm.modules():
            if isinstance(m, TrackedFakeQuantize):
                m.tracker.settle()
        more = []
        if self.scheme.share is not None and not self.shares_weights and all(s.name != "share-weights" for s in self.history):
            more.append(compressing.share_weights(gm, self.scheme, self.target, self.history.example))
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
        history = History([*self.history, *more, take(gm, "convert-trained")], self.history.example)
        made = CompiledModel(gm, self.captured, history, self.scheme, self.target)
        made.layer_times = self.layer_times
        return made

    def _require_data(self, what: str) -> None:
        for path, m in self.named_modules():
            if isinstance(m, TrackedFakeQuantize) and not m.tracker.ready:
                way_out = "Run a batch in training mode first, or compile with calibration="
                raise FxqError(f"{what} before any data: this grid has no range yet", where=path.removeprefix("root."), way_out=way_out)

    def reference(self, *args: Any) -> Any:
        """The integer reference of the model as it is now: that of :meth:`convert`."""
        return self.convert().reference(*args)

    def bisect(self, *args: Any, **options: Any) -> Verdict:
        """What is wrong with the model as it is now: that of :meth:`convert`."""
        return self.convert().bisect(*args, **options)

    def sensitivity(self, *args: Any, **options: Any) -> QuantSensitivity:
        """What each rounding costs in the model as it is now: that of :meth:`convert`."""
        return self.convert().sensitivity(*args, **options)

    def with_float(self, *selectors: Selector) -> CompiledModel:
        """The model as it is now with the named nodes in float: that of :meth:`convert`."""
        return self.convert().with_float(*selectors)

    def lower(self, backend_name: str = "onnx-qdq", target: Any = None, **options: Any) -> Artifact:
        """A model in training is not lowered.

        Raises:
            LoweringError: always; the deployed model is what :meth:`convert` returns.
        """
        raise LoweringError("the model is in training", way_out="Call convert() and lower what it returns")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "steps", torch.zeros_like(self.steps))  # in checkpoints from before steps were counted
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> dict[str, Any]:
        """Phase, scheme, the step at which statistics of batch norms stay, and whether weights share codebooks, for checkpoints."""
        return {"phase": self.phase, "scheme": self.scheme.name, "hold_at": self.hold_at, "shares": self.shares_weights}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on in the phase of a checkpoint.

        Raises:
            FxqError: for the checkpoint of another scheme, or of a model whose weights share codebooks when this one's do not (or the other way round).
        """
        shares = state.get("shares", self.shares_weights)
        if shares != self.shares_weights:
            fact = "share codebooks, the model's do not" if shares else "share no codebooks, the model's do"
            way_out = "Call share_weights() on the model first" if shares else "Load it into a model on which share_weights() was not called"
            raise FxqError(f"weights of the checkpoint {fact}", way_out=way_out)
        if state["scheme"] != self.scheme.name:
            raise FxqError(f"the checkpoint is of scheme {state['scheme']!r}, the model of {self.scheme.name!r}", way_out="Compile the model with that scheme")
        was, self._begun = self.batch_norm_frozen, False
        self.phase, self.hold_at = state["phase"], state.get("hold_at")
        self._held = self.hold_at is not None and int(self.steps) >= self.hold_at
        if was or self.batch_norm_frozen:
            self._still()
        for m in self.modules():
            if isinstance(m, TrackedFakeQuantize):
                m.tracker.fix(self.phase == QAFT)
            elif isinstance(m, Estimator):
                m.fix(self.phase == QAFT)
            elif isinstance(m, LAYERS):
                m.frozen = self.phase == QAFT
