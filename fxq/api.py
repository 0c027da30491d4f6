"""The public entry: :func:`compile` and what it returns."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxq import admission, graph, schemes, targets
from fxq.calibration import Batches
from fxq.errors import ArtifactError, CalibrationError, FxqError, LoweringError, SchemeError, TargetError, TraceError, nearest
from fxq.exported import program_module
from fxq.heap import young
from fxq.lowering import Artifact, Lowering
from fxq.passes.annotate import Annotate
from fxq.passes.calibrate import Calibrate
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.convert import Convert
from fxq.passes.correct_bias import CorrectBias
from fxq.passes.fold_bn import FoldBN
from fxq.passes.legalize import Legalize
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.passes.round_weights import RoundWeights
from fxq.passes.share_qparams import ShareQParams
from fxq.pipeline import Pass, PassContext, Pipeline, Progress, no_progress
from fxq.progress import ProgressBar
from fxq.schemes import Scheme
from fxq.snapshot import History, Skip, take
from fxq.targets import Target
from fxq.trace import Captured, capture, resized

if TYPE_CHECKING:
    from fxq.engine_proof import EngineProof
    from fxq.lint import LintReport
    from fxq.lint_trt_report import TrtReport
    from fxq.proof import Proof
    from fxq.tensorrt import EngineArtifact

ENGINE_MAGIC = (b"vtrt", b"ftrt")
"""First bytes of an engine of TensorRT-RTX, of full TensorRT."""
BACKENDS: dict[str, str] = {
    "onnx-qdq": "ONNX with Q/DQ pairs and integer weights",
    "onnx": "ONNX; the same writer (for the scheme float)",
    "tensorrt": "TensorRT engine, built with TensorRT-RTX on any machine or with full TensorRT where there is a GPU",
    "trt-calibration-cache": "scales as a calibration cache for TensorRT 8 to 10.11 (implicit quantization)",
}


def backend(name: str, options: dict[str, Any] | None = None) -> Lowering:
    """Backend by name with its options, imported when it is asked for.

    Raises:
        TargetError: for an unknown name or option; the nearest one is offered.
    """
    if name not in BACKENDS:
        raise TargetError(f"unknown backend {name!r}", way_out=nearest(name, BACKENDS))
    make, known = _backend(name)
    for option in options or {}:
        if option not in known:
            raise TargetError(f"backend {name!r} has no option {option!r}", way_out=nearest(option, known) if known else "It has none")
    return make(**(options or {}))


def _backend(name: str) -> tuple[Callable[..., Lowering], tuple[str, ...]]:
    """How to make a backend, and the names of its options."""
    if name == "tensorrt":
        from fxq.tensorrt import EngineOptions, TensorRT

        return lambda **o: TensorRT(EngineOptions(**o)), tuple(f.name for f in fields(EngineOptions))
    if name == "trt-calibration-cache":
        from fxq.backends.trt_cache import CalibrationCache

        return CalibrationCache, ("version",)
    from fxq.backends.onnx_qdq import OnnxQdq

    return OnnxQdq, ("float_dtype",)


def pipeline_for(scheme: Scheme, observer: str | None = None) -> Pipeline:
    """The passes that a scheme runs, in order."""
    front: tuple[Pass, ...] = (Canonicalize(), PropagateShapes(), FoldBN(), Legalize(), Annotate())
    if scheme.method == "static":
        back: tuple[Pass, ...] = (ShareQParams(), Calibrate(observer=observer), Convert())
        if scheme.weight_rounding == "feedback":
            back = (*back, RoundWeights())
        elif scheme.bias_correction:
            back = (*back, CorrectBias())
        return Pipeline((*front, *back))
    return Pipeline((*front, ShareQParams(), Calibrate(observer=observer), Convert()))


@dataclass(frozen=True)
class FloatOp:
    """An operation that stays float, with the reason."""

    node: str
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.node} ({self.kind}): {self.why}"


class CompiledModel(nn.Module):
    """A compiled model: call it for the fake-quant simulator, :meth:`lower` it for a file.

    Attributes:
        history: every pass with its graph text.
        scheme, target: what it was compiled for.
        captured: how the model was captured (rung, notes, what it is specialised to).
        parts: of a model that could only be captured in parts: module path -> CompiledModel; otherwise empty.
    """

    def __init__(self, root: nn.Module, captured: Captured, history: History, scheme: Scheme, target: Target) -> None:
        super().__init__()
        self.root = root
        self.captured, self.history, self.scheme, self.target = captured, history, scheme, target
        self.parts: dict[str, CompiledModel] = {}
        self._reference: Any = None
        self._engines: dict[str, Artifact] = {}
        self.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModel:
        self._reference = None  # it may have been made on another device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """A copy of its own; the integer reference is made anew when it is asked for."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_reference"}, _reference=None)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FxqError(
            "a CompiledModel cannot be pickled: torch.fx drops the grids of its nodes",
            way_out="Save m.lower(), or m.state_dict() to load into the same model compiled again",
        )

    @property
    def graph_module(self) -> GraphModule:
        """The compiled FX graph.

        Raises:
            LoweringError: when the model was captured in parts and has no single graph.
        """
        if not isinstance(self.root, GraphModule):
            raise LoweringError(
                f"the model was captured in {len(self.parts)} parts and has no single graph",
                way_out="Use one part, m.parts[path]; the paths are " + ", ".join(self.parts),
            )
        return self.root

    def forward(self, *args: Any) -> Any:
        """The fake-quant simulator: float tensors rounded onto the grids; differentiable (straight-through)."""
        return self.root(*args)

    def reference(self, *args: Any) -> Any:
        """The integer reference: the numbers that the fused artifact gives, as dequantized float32 tensors.

        For TensorRT, whose kernels' arithmetic is not known here, it is the Q/DQ graph's own: float between rounded values.
        """
        if self._reference is None or self._reference.gm is not self.root:  # of a model on another device it is a copy, which ages
            from fxq.backends.reference import Reference

            self._reference = Reference(self.graph_module, self.target.fused)
        return self._reference(*args)

    @property
    def float_ops(self) -> list[FloatOp]:
        """Every operation that the target does not execute in integers, with the reason."""
        gm = self.graph_module
        return [
            FloatOp(str(n.target) if n.op == "call_module" else n.name, graph.kind(gm, n), n.meta["float_why"])
            for n in gm.graph.nodes
            if n.meta.get("float_why") and n.op not in ("output", "placeholder", "get_attr")
        ]

    @young()
    def lower(self, backend_name: str = "onnx-qdq", target: str | Target | None = None, **options: Any) -> Artifact:
        """Translate into a file's bytes; ``.save(path)`` writes them whole or not at all.

        Args:
            backend_name: a key of :data:`BACKENDS`.
            target: runtime; by default the one that the model was compiled for. One compiled for any ``tensorrt`` target can be lowered
                for each of them (``sm80``, ``sm86``, ... or ``tensorrt``: all from 8.0 on).
            options: of the backend: ``float_dtype`` (``"fp16"`` for what is not quantized; TensorRT only), and for ``tensorrt`` the fields
                of :class:`fxq.tensorrt.EngineOptions`; ``trt-calibration-cache`` has ``version``.

        Raises:
            LoweringError: with every finding when the backend cannot take the graph.
            TargetError: unknown backend or option, or a target other than the one the model was compiled for.
            SchemeError, CalibrationError: weights that were changed to another type, or to NaN, after compiling.
            EngineError: TensorRT is missing, refuses the graph or crashes.
        """
        to = self.target if target is None else targets.get(target)
        if to != self.target and to.family != self.target.family:
            raise TargetError(
                f"the model was compiled for {self.target.name!r}, not {to.name!r}", way_out=f"Compile it with target={to.name!r}, scheme='int8'"
            )
        to.require(self.scheme)
        admission.check_model(self.root)
        artifact = backend(backend_name, options).lower(self.graph_module, self.scheme, to)
        if artifact.backend == "tensorrt":
            self._engines[sha256(artifact.data).hexdigest()] = artifact
        return artifact

    def lint(self, target: str | None = None) -> LintReport | TrtReport:
        """Which nodes of the lowered file the target executes in integers, which not and why, and the Q/DQ nodes that are left."""
        from fxq.lint import lint

        return lint(self.lower().data, target or self.target.lint_name)

    def verify(
        self, artifact: str | os.PathLike[str] | bytes | Artifact, data: Any, *, limit: int | None = None
    ) -> Proof | EngineProof:
        """Run the artifact and compare with the integer reference, node by node and end to end.

        Of a TensorRT engine the builder's layers are compared with the plan and its ONNX file with the simulator; it runs where there is a GPU.

        Args:
            artifact: path or bytes of the lowered file, or what :meth:`lower` returned.
            data: calibration-like data (any iterable of tensors, tuples, dicts).
            limit: at most so many batches.

        Raises:
            ArtifactError: when the file is damaged or belongs to another model.
        """
        from fxq.lowering import contents

        gm = self.graph_module
        batches = Batches(data, gm, limit=limit, what="data to verify with")
        raw, where = contents(artifact)
        if raw.startswith(ENGINE_MAGIC):
            from fxq import engine_proof

            return engine_proof.verify(gm, self._engine(artifact, raw, where), batches, self)
        from fxq.proof import verify

        return verify(gm, artifact, batches, fused=self.target.fused)

    def _engine(self, given: Any, raw: bytes, where: str) -> EngineArtifact:
        """The engine with its layer table: what ``lower`` gave, or the one of these bytes that it gave before."""
        from fxq.tensorrt import EngineArtifact

        artifact = given if isinstance(given, EngineArtifact) else self._engines.get(sha256(raw).hexdigest())
        if not isinstance(artifact, EngineArtifact):
            way_out = "Lower the model again (the same options give the same bytes) and verify that"
            raise ArtifactError("this engine was not made by this model here, so the types of its layers are not known", where=where, way_out=way_out)
        return artifact


@young()
def compile(
    model: nn.Module | torch.export.ExportedProgram,
    scheme: str | Scheme = "iao_w8a8",
    *,
    calibration: Any = None,
    example: Any = None,
    target: str | Target = "onnxruntime",
    skip: str | Sequence[str] = (),
    observer: str | None = None,
    leaf_modules: Sequence[type[nn.Module]] = (),
    batches: int | None = None,
    progress: Progress | bool = True,
) -> CompiledModel:
    """Capture ``model`` (a copy), rewrite it for ``target`` and quantize it post-training.

    Args:
        model: float32 module or exported program; its parameters, buffers and mode are not changed.
        scheme: name or :class:`~fxq.schemes.Scheme`; ``int8`` is the int8 scheme that the target runs best.
        calibration: any iterable of tensors, tuples (labels behind the inputs are dropped) or dicts; read once.
        example: one batch of inputs when there is no calibration data (a tensor or a tuple).
        target: runtime to place the Q/DQ for.
        skip: patterns (``fnmatch``) of module paths that stay float.
        observer: overrides the scheme's activation observer.
        leaf_modules: module types that capture keeps whole.
        batches: read at most so many calibration batches.
        progress: a bar on a terminal or in a notebook; False for none; or a callback ``(what, done, total)`` instead.

    Raises:
        TraceError, SchemeError, TargetError, CalibrationError, PassError: with node, fact and way out.
    """
    tgt = targets.get(target)
    sch = tgt.scheme(scheme)
    if observer is not None and observer not in schemes.OBSERVERS:
        raise SchemeError(f"unknown observer {observer!r}", way_out=nearest(observer, schemes.OBSERVERS))
    if isinstance(model, torch.export.ExportedProgram):
        model = program_module(model)
    net: nn.Module = admission.unwrapped(model)
    if isinstance(net, CompiledModel):
        raise FxqError("the model is compiled already", way_out="Pass the float model that it was made from")
    admission.check_model(net)
    if sch.method == "static" and calibration is None:
        raise CalibrationError(
            f"the scheme {sch.name!r} needs calibration data",
            way_out="Pass calibration= (a few hundred samples), or use dynamic_w8 or weight_only_w8",
        )
    if calibration is None and example is None:
        raise CalibrationError("the shapes are not known", way_out="Pass example= with one batch of inputs, or calibration=")
    data = Batches(calibration if calibration is not None else [example], net, limit=batches)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    with nullcontext(progress) if callable(progress) else ProgressBar() if progress else nullcontext(no_progress) as report:
        return _compile(net, data, PassContext(sch, tgt, (), data, skip, report), observer, tuple(leaf_modules))


def _compile(net: nn.Module, data: Batches, ctx: PassContext, observer: str | None, leaves: tuple[type[nn.Module], ...]) -> CompiledModel:
    """Capture, then the passes."""
    start = time.perf_counter()
    few = tuple(x[:2] if isinstance(x, torch.Tensor) and x.ndim else x for x in data.example)
    try:
        captured = capture(net, few, leaf_modules=leaves)
    except TraceError as e:
        admission.require_runs(net, few, data.example, e)
        raise
    ms = (time.perf_counter() - start) * 1e3
    notes = tuple(captured.specialised)
    if captured.gm is None:
        return _compile_parts(captured, ctx.scheme, ctx.target, data, ctx.float_nodes, observer, ctx.progress, ms)
    history = History([take(captured.gm, "trace", ms=ms, skips=tuple(Skip("capture", f"specialised: {n}") for n in notes))])
    ctx.example, ctx.probe = few, few if notes else resized(few, 1)
    pipeline_for(ctx.scheme, observer).run(captured.gm, ctx, history)
    return CompiledModel(captured.gm, captured, history, ctx.scheme, ctx.target)


def _compile_parts(
    captured: Captured,
    sch: Scheme,
    tgt: Target,
    data: Iterable[tuple[Any, ...]],
    skip: tuple[str, ...],
    observer: str | None,
    progress: Progress,
    ms: float,
) -> CompiledModel:
    """Compile each captured submodule on the inputs it sees inside the float model, then put it in its place."""
    root = captured.root
    static = sch.method == "static"
    seen = _record_inputs(root, list(captured.parts), data) if static else {}
    model = CompiledModel(root, captured, History(), sch, tgt)
    for path, (gm, example) in captured.parts.items():
        inner = tuple(p.removeprefix(f"{path}.") for p in skip)
        history = History([take(gm, "trace", ms=ms)])
        ctx = PassContext(sch, tgt, example, seen.get(path), inner, progress)
        try:
            pipeline_for(sch, observer).run(gm, ctx, history)
        except FxqError as e:
            reached = any(x.numel() for x in tree_leaves(seen.get(path, [])) if isinstance(x, torch.Tensor))
            way_out = e.way_out if reached or not static else f"Give data on which the model uses this part, or keep it float with skip='{path}.*'"
            raise type(e)(e.fact, where=f"{path} / {e.where}" if e.where else path, way_out=way_out) from e
        part = CompiledModel(gm, captured, history, sch, tgt)
        model.parts[path] = part
        model.history.snapshots += [replace(s, name=f"{path}/{s.name}") for s in history]
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
