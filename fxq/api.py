"""The public entry: :func:`compile`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxq import admission, distributed, schemes, targets
from fxq.calibration import Batches
from fxq.compiled import BACKENDS, CompiledModel, FloatOp, backend
from fxq.errors import CalibrationError, FxqError, PassError, SchemeError, TraceError, nearest
from fxq.exported import program_module
from fxq.graph import walk
from fxq.heap import young
from fxq.modules import WEIGHTED
from fxq.passes.annotate import Annotate
from fxq.passes.calibrate import Calibrate
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.convert import Convert
from fxq.passes.correct_bias import CorrectBias
from fxq.passes.fold_bn import FoldBN
from fxq.passes.legalize import Legalize
from fxq.passes.make_portable import MakePortable
from fxq.passes.narrow_inputs import NarrowInputs
from fxq.passes.prepare_training import PrepareTraining
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.passes.replace_activations import ReplaceActivations
from fxq.passes.round_weights import RoundWeights
from fxq.passes.share_qparams import ShareQParams
from fxq.pipeline import Pass, PassContext, Pipeline, Progress, no_progress
from fxq.progress import ProgressBar
from fxq.pruned import PrunedModel
from fxq.schemes import Scheme
from fxq.selectors import Selector, inside, of_part, require_named
from fxq.snapshot import History, Skip, take
from fxq.targets import Target
from fxq.trace import Captured, capture, resized
from fxq.trainable import TrainableModel

if TYPE_CHECKING:
    from fxq.layer_table import LayerTimes
    from fxq.mixed import Budget
    from fxq.prune_report import PruneReport
    from fxq.pruning import Prune
    from fxq.sharing import Share

__all__ = ["BACKENDS", "CompiledModel", "FloatOp", "backend", "compile", "pipeline_for"]


MODES = ("ptq", "qat")
"""Post-training, or a trainable model."""
SHARED_LAYERS = ("layers= of Share", "share-weights")


def _front(scheme: Scheme, how: Prune | None = None, times: LayerTimes | None = None) -> tuple[Pass, ...]:
    """The passes up to the calibrated and converted graph."""
    head: tuple[Pass, ...] = (Canonicalize(), PropagateShapes())
    if how is not None and how.cuts_channels:
        from fxq.passes.prune_channels import PruneChannels

        head = (*head, PruneChannels(how))
    if how is not None and how.sparsity is not None:
        from fxq.passes.prune_weights import PruneWeights

        head = (*head, PruneWeights(how))
    if scheme.auto:
        from fxq.auto_lowbit import asker
        from fxq.passes.choose_layers import ChooseLayers

        head = (*head, ChooseLayers(asker(scheme, times)))
    if scheme.activations in ("sign", "ternary") or scheme.order:
        head = (*head, ReplaceActivations())
    head = (*head, FoldBN(), Legalize(), Annotate(), ShareQParams())
    return (*head, NarrowInputs()) if scheme.stream is not None else head


def training_pipeline(
    scheme: Scheme, observer: str | None, calibrated: bool, how: Prune | None = None, share: bool = False, times: LayerTimes | None = None
) -> Pipeline:
    """The passes that make a model trainable, in order. ``share``: its weights share codebooks from the start, if the scheme says so."""
    passes: tuple[Pass, ...] = (*_front(scheme, how, times), Calibrate(observer=observer), Convert(), PrepareTraining(calibrated))
    if share and scheme.share is not None:
        from fxq.passes.share_weights import ShareWeights

        passes = (*passes, ShareWeights())
    return Pipeline(passes)


def pipeline_for(scheme: Scheme, observer: str | None = None, how: Prune | None = None, portable: bool = False) -> Pipeline:
    """The passes that a scheme runs, in order. Of a scheme that is made for training they are those of training."""
    if scheme.trains:
        return training_pipeline(scheme, observer, True, how, share=True)
    back: tuple[Pass, ...] = (Calibrate(observer=observer), Convert())
    if scheme.weight_rounding == "feedback":
        back = (*back, RoundWeights())
    elif scheme.bias_correction:
        back = (*back, CorrectBias())
    if portable:  # last: what rounds weights again would undo it
        back = (*back, MakePortable())
    return Pipeline((*_front(scheme, how), *back))


@young()
def compile(
    model: nn.Module | torch.export.ExportedProgram,
    scheme: str | Scheme = "iao_w8a8",
    *,
    calibration: Any = None,
    example: Any = None,
    target: str | Target = "onnxruntime",
    skip: str | type[nn.Module] | int | Sequence[str | type[nn.Module] | int] = (),
    observer: str | None = None,
    leaf_modules: Sequence[type[nn.Module]] = (),
    batches: int | None = None,
    progress: Progress | bool = True,
    mode: str = "ptq",
    prune: Prune | None = None,
    share: Share | None = None,
    portable: bool = False,
    states: bool = True,
    numbers: bool = False,
    budget: Budget | None = None,
    int8: Selector | Sequence[Selector] = (),
    times: LayerTimes | None = None,
) -> CompiledModel:
    """Capture ``model`` (a copy), rewrite it for ``target`` and quantize it, after training or to be trained.

    Args:
        model: float32 module, exported program or :class:`~fxq.pruned.PrunedModel`; its parameters, buffers and mode are not changed.
        scheme: name or :class:`~fxq.schemes.Scheme`; ``int8`` is the int8 scheme that the target runs best.
        calibration: any iterable of tensors, tuples (labels behind the inputs are dropped) or dicts; read once.
        example: one batch of inputs when there is no calibration data (a tensor or a tuple).
        target: runtime to place the Q/DQ for.
        skip: what stays float: patterns (``fnmatch``) of module paths, module types, numbers of weighted layers in the order of the graph (-1 the last).
        observer: overrides the scheme's activation observer.
        leaf_modules: module types that capture keeps whole.
        batches: read at most so many calibration batches.
        mode: ``ptq`` quantizes post-training; ``qat`` returns a :class:`~fxq.trainable.TrainableModel`, for schemes with calibrated grids. There
            calibration data is where the ranges begin; with ``example`` alone the first training batch sets them. Dropout is taken out.
        prune: cut channels first, and single weights (:class:`~fxq.pruning.Prune`); the report is in ``m.prune_report``. To fine-tune in float in between,
            call :func:`prune`.
        share: weights of each layer share the values of a codebook (:class:`~fxq.sharing.Share`), instead of what the scheme says; with ``mode="qat"`` from
            ``share_weights()`` on.
        portable: integer weights that give the same numbers on every x86 CPU, with and without VNNI (``docs/portability.md``); of a trained model call
            :func:`fxq.portability.portable`.
        states: keep the graph after every pass (``m.history.graph(name)``, ``m.bisect``); they share all that a pass left alone, and hold the float
            weights that it replaced until ``m.history.release()``.
        numbers: measure how far every value moves in every pass (``m.history.numbers(name)``): one run of the first inputs a pass.
        budget: bits of each layer's weights under a limit (:class:`~fxq.mixed.Budget`): the layers that matter most keep theirs. What was chosen is in
            ``m.bit_plan``. The calibration batches are then held in memory, and the model is compiled twice.
        int8: layers that a low-bit scheme keeps in 8 bits, named as for ``skip``; among them the first and the last one, which it would leave float.
        times: for ``scheme="auto-lowbit"``: times of another process or machine (:func:`fxq.layer_times`) to choose by; without them layers are measured
            here. The times that it chose by are in ``m.layer_times``.
        progress: a bar on a terminal or in a notebook; False for none; or a callback ``(what, done, total)`` instead.

    Raises:
        TraceError, SchemeError, TargetError, CalibrationError, PassError: with node, fact and way out.
    """
    tgt = targets.get(target)
    sch = tgt.scheme(scheme)
    admission.check_requests(prune, share)
    if share is not None:
        sch = replace(sch, share=share)
    if observer is not None and observer not in schemes.OBSERVERS:
        raise SchemeError(f"unknown observer {observer!r}", way_out=nearest(observer, schemes.OBSERVERS))
    if isinstance(model, torch.export.ExportedProgram):
        model = program_module(model)
    net: nn.Module = admission.unwrapped(model)
    before = net.prune_report if isinstance(net, PrunedModel) else None
    net = net.root if isinstance(net, PrunedModel) else net
    if isinstance(net, CompiledModel):
        raise FxqError("the model is compiled already", way_out="Pass the float model that it was made from")
    admission.check_model(net)
    if mode not in MODES:
        raise SchemeError(f"unknown mode {mode!r}", way_out=nearest(mode, MODES))
    if mode == "qat" and sch.method != "static" and not sch.trains:
        way_out = "Use an int8 scheme such as scheme='int8', or mode='ptq'"
        raise SchemeError(f"the scheme {sch.name!r} is {sch.method}: it has no grids to train", way_out=way_out)
    if portable:
        admission.require_portable(sch, tgt, mode)
    if sch.method == "static" and calibration is None and mode == "ptq":
        raise CalibrationError(
            f"the scheme {sch.name!r} needs calibration data",
            way_out="Pass calibration= (a few hundred samples), or use dynamic_w8 or weight_only_w8",
        )
    if calibration is None and example is None:
        raise CalibrationError("the shapes are not known", way_out="Pass example= with one batch of inputs, or calibration=")
    if budget is not None:
        admission.require_budget(sch, mode)
    eights = _listed(int8)
    admission.require_lowbit(sch, bool(eights), times is not None)
    measures = prune is not None and prune.sparsity_scope == "sensitivity"
    with distributed.meeting(sch.method == "static" or measures):
        spare = example if distributed.world() > 1 else None
        data = Batches(calibration if calibration is not None else [example], net, limit=batches, spare=spare)
        left = _listed(skip)
        with nullcontext(progress) if callable(progress) else ProgressBar() if progress else nullcontext(no_progress) as report:
            ctx = PassContext(sch, tgt, (), data, left, report, train=mode == "qat", states=states or budget is not None, numbers=numbers)
            ctx.int8_nodes = eights
            how = _How(observer, tuple(leaf_modules), calibration is not None, prune, portable, times)
            made = _compile(net, data, ctx, how) if budget is None else _mixed(net, data, ctx, how, budget, states)
            made.prune_report = made.prune_report or before
            return made


@dataclass(frozen=True)
class _How:
    """Options of a compilation that passes do not read from the context."""

    observer: str | None
    leaves: tuple[type[nn.Module], ...]
    calibrated: bool
    prune: Prune | None
    portable: bool
    times: LayerTimes | None


def _listed(selectors: Selector | Sequence[Selector]) -> tuple[Selector, ...]:
    """Raises:
    PassError: for what names no layers.
    """
    found = tuple(selectors) if isinstance(selectors, Sequence) and not isinstance(selectors, str) else (selectors,)
    for s in found:
        if not isinstance(s, (str, type, int)):
            raise PassError(f"{s!r} names no layers", where="skip=, int8=", way_out="Give patterns of module paths, module types, or numbers of layers")
    return found


def _mixed(net: nn.Module, data: Batches, ctx: PassContext, how: _How, budget: Budget, states: bool) -> CompiledModel:
    """Compile in the scheme's own bits, measure every layer in the others, choose, compile again. The calibration batches are held in memory."""
    from fxq import mixed
    from fxq.toggles import Toggles

    read = list(data)
    own = _compile(net, Batches(read, net), replace(ctx, calibration=Batches(read, net), numbers=False), how)
    few = read[: max(1, -(-mixed.SAMPLES // max(1, len(read[0][0]) if isinstance(read[0][0], torch.Tensor) and read[0][0].ndim else 1)))]
    activation = ctx.scheme.kept_activation
    found = mixed.plan(Toggles(own.graph_module, own.history.floats()), few, budget, mixed.FLOAT if activation is None else activation.bits)
    scheme = ctx.scheme
    if found.narrowed and scheme.method == "static":
        scheme = replace(scheme, weight_observer="mse", bias_correction=True, weight_rounding="feedback")
    again = PassContext(
        scheme, ctx.target, (), Batches(read, net), (*ctx.float_nodes, *found.floats), ctx.progress, states=states, numbers=ctx.numbers, bits=found.bits
    )
    made = _compile(net, Batches(read, net), again, how)
    made.bit_plan = found
    return made


def _compile(net: nn.Module, data: Batches, ctx: PassContext, how: _How) -> CompiledModel:
    """Capture, then the passes."""
    start = time.perf_counter()
    few = tuple(x[:2] if isinstance(x, torch.Tensor) and x.ndim else x for x in data.example)
    try:
        captured = capture(net, few, leaf_modules=how.leaves)
    except TraceError as e:
        admission.require_runs(net, few, data.example, e)
        raise
    ms = (time.perf_counter() - start) * 1e3
    notes = tuple(captured.specialised)
    if captured.gm is None and ctx.train:
        way_out = "Train its parts one by one: compile each with mode='qat' and put it in its place"
        raise TraceError(f"the model can only be captured in parts ({', '.join(captured.parts)})", way_out=way_out)
    if captured.gm is None:
        return _compile_parts(captured, data, ctx, how, ms)
    history = History([take(captured.gm, "trace", ms=ms, skips=tuple(Skip("capture", f"specialised: {n}") for n in notes))])
    ctx.example, ctx.probe = few, few if notes else resized(few, 1)
    return _model(captured.gm, captured, ctx, how, history)


def _model(gm: GraphModule, captured: Captured, ctx: PassContext, how: _How, history: History) -> CompiledModel:
    """Run the passes on a captured graph; what is trained first is converted unless it was asked for."""
    if ctx.train or ctx.scheme.trains:
        wanted, ctx.train = ctx.train, True
        training_pipeline(ctx.scheme, how.observer, how.calibrated, how.prune, share=not wanted, times=how.times).run(gm, ctx, history)
        model = TrainableModel(gm, captured, history, ctx.scheme, ctx.target)
        model.layer_times, report = gm.meta.pop("layer_times", None), _pruned(gm)
        made = model if wanted else model.convert()
    else:
        pipeline_for(ctx.scheme, how.observer, how.prune, how.portable).run(gm, ctx, history)
        made, report = CompiledModel(gm, captured, history, ctx.scheme, ctx.target), _pruned(gm)
    made.prune_report = report
    if ctx.scheme.share is not None and captured.gm is not None:
        require_named(ctx.scheme.share.layers, [str(n.target) for n, _ in walk(made.graph_module, *WEIGHTED)], *SHARED_LAYERS)
    return made


def _pruned(gm: Any) -> PruneReport | None:
    """The report of ``prune-channels``; the uncut graph is let go."""
    gm.meta.pop("masked", None)
    found: PruneReport | None = gm.meta.pop("prune_report", None)
    return found


def _compile_parts(captured: Captured, data: Iterable[tuple[Any, ...]], outer: PassContext, how: _How, ms: float) -> CompiledModel:
    """Compile each captured submodule on the inputs it sees inside the float model, then put it in its place."""
    root, sch, tgt = captured.root, outer.scheme, outer.target
    static = sch.method == "static"
    seen = _record_inputs(root, list(captured.parts), data) if static else {}
    model = CompiledModel(root, captured, History(), sch, tgt)
    for path, (gm, example) in captured.parts.items():
        skips, eights = (of_part(s, path) for s in (outer.float_nodes, outer.int8_nodes))
        history = History([take(gm, "trace", ms=ms)])
        names = [n for n, _ in gm.named_modules()]
        own = sch if sch.share is None else replace(sch, share=replace(sch.share, layers=inside(sch.share.layers, path, names)))
        ctx = PassContext(own, tgt, example, seen.get(path), skips, outer.progress, states=outer.states, numbers=outer.numbers, int8_nodes=eights)
        try:
            asked = None if how.prune is None else how.prune.inside(path, names)
            part = _model(gm, captured, ctx, replace(how, prune=asked), history)
        except FxqError as e:
            reached = any(x.numel() for x in tree_leaves(seen.get(path, [])) if isinstance(x, torch.Tensor))
            way_out = e.way_out if reached or not static else f"Give data on which the model uses this part, or keep it float with skip='{path}.*'"
            raise type(e)(e.fact, where=f"{path} / {e.where}" if e.where else path, way_out=way_out) from e
        model.parts[path] = part
        model.history.snapshots += [replace(s, name=f"{path}/{s.name}") for s in part.history]
    paths = [f"{path}.{n.target}" for path, part in model.parts.items() for n, _ in walk(part.graph_module, *WEIGHTED)]
    if sch.share is not None:
        require_named(sch.share.layers, paths, *SHARED_LAYERS)
    if how.prune is not None and isinstance(how.prune.sparsity, Mapping):
        require_named(how.prune.sparsity, paths, "sparsity=", "prune-weights")
    for path, part in model.parts.items():
        root.set_submodule(path, part.root)
    return model


def _record_inputs(root: nn.Module, paths: list[str], data: Iterable[tuple[Any, ...]]) -> dict[str, list[tuple[Any, ...]]]:
    """Inputs of each submodule over one pass of the float model; a module that is called twice records both calls."""
    seen: dict[str, list[tuple[Any, ...]]] = {p: [] for p in paths}
    handles = []
    for path in paths:

        def hook(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            seen[path].append(args)

        handles.append(root.get_submodule(path).register_forward_pre_hook(hook))
    try:
        with torch.inference_mode():
            for batch in data:
                root(*batch)
    finally:
        for h in handles:
            h.remove()
    return seen
