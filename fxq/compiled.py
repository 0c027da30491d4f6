"""What :func:`fxq.compile` returns: the compiled model, its backends, its proof."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn
from torch.fx import GraphModule

from fxq import admission, compressing, graph, tables_html, tabular, targets
from fxq.calibration import Batches
from fxq.debugging import Debugging
from fxq.errors import ArtifactError, FxqError, LoweringError, TargetError, nearest
from fxq.heap import young
from fxq.lowering import Artifact, Lowering
from fxq.schemes import Scheme
from fxq.snapshot import History
from fxq.targets import Target
from fxq.trace import Captured

if TYPE_CHECKING:
    from fxq.archive_proof import ArchiveProof
    from fxq.engine_proof import EngineProof
    from fxq.layer_table import LayerTimes
    from fxq.lint import LintReport
    from fxq.lint_trt_report import TrtReport
    from fxq.mixed import BitPlan
    from fxq.portability_lint import PairReport
    from fxq.proof import Proof
    from fxq.prune_report import PruneReport
    from fxq.selectors import Selector
    from fxq.tensorrt import EngineArtifact

ENGINE_MAGIC = (b"vtrt", b"ftrt")
"""First bytes of an engine of TensorRT-RTX, of full TensorRT."""
BACKENDS: dict[str, str] = {
    "onnx-qdq": "ONNX with Q/DQ pairs and integer weights",
    "onnx": "ONNX; the same writer (for the scheme float)",
    "tensorrt": "TensorRT engine, built with TensorRT-RTX on any machine or with full TensorRT where there is a GPU",
    "bitwise": "binary and ternary layers on packed bits, XNOR and popcount: a file for fxq.load",
    "archive": "entropy-coded weights with the graph: a file for fxq.load (Deep Compression)",
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

        return lambda **o: TensorRT(EngineOptions(**o)), tuple(f.name for f in fields(EngineOptions) if f.name != "capability")
    if name == "trt-calibration-cache":
        from fxq.backends.trt_cache import CalibrationCache

        return CalibrationCache, ("version",)
    if name == "bitwise":
        from fxq.bitwise.backend import BitwiseBackend

        return BitwiseBackend, ("coding",)
    if name == "archive":
        from fxq.backends.archive import ArchiveBackend

        return ArchiveBackend, ("coding",)
    from fxq.backends.onnx_qdq import OnnxQdq

    return OnnxQdq, ("float_dtype",)


@dataclass(frozen=True)
class FloatOp:
    """An operation that stays float, with the reason."""

    node: str
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.node} ({self.kind}): {self.why}"


class CompiledModel(Debugging, nn.Module):
    """A compiled model: call it for the fake-quant simulator, :meth:`lower` it for a file.

    Attributes:
        history: every pass with its graph text.
        scheme, target: what it was compiled for.
        captured: how the model was captured (rung, notes, what it is specialised to).
        prune_report: what ``prune=`` cut, or None.
        bit_plan: what ``budget=`` chose, or None.
        layer_times: what the scheme ``auto-lowbit`` chose by, or None.
        parts: of a model that could only be captured in parts: module path -> CompiledModel; otherwise empty.
    """

    def __init__(self, root: nn.Module, captured: Captured, history: History, scheme: Scheme, target: Target) -> None:
        super().__init__()
        self.root = tabular.adopt(root) if isinstance(root, GraphModule) else root
        self.captured, self.history, self.scheme, self.target = captured, history, scheme, target
        self.parts: dict[str, CompiledModel] = {}
        self.prune_report: PruneReport | None = None
        self.bit_plan: BitPlan | None = None
        self.layer_times: LayerTimes | None = None
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

    @property
    def densities(self) -> dict[str, float]:
        """Module path of each weighted layer -> share of its weights that is not 0."""
        return compressing.densities(self.graph_module)

    def save_graph(self, path: str | os.PathLike[str], state: str | None = None, format: str | None = None, *, force: bool = False) -> Path:
        """Write the graph after a pass for a viewer: ``.onnx`` for Netron, ``.json`` for Model Explorer; no weights.

        Args:
            path: the file.
            state: name of the pass; by default the last.
            format: ``onnx`` or ``json``; by default the ending of ``path``.
            force: replace an existing file.

        Raises:
            PassError: for an unknown pass.
            ArtifactError: for an unknown format, or a file that cannot be written.
        """
        from fxq.interop import save_graph

        return save_graph(self.history, path, state, format, force=force)

    def _repr_html_(self) -> str:
        return tables_html.of_compiled(self)

    @young()
    def lower(self, backend_name: str = "onnx-qdq", target: str | Target | None = None, **options: Any) -> Artifact:
        """Translate into a file's bytes; ``.save(path)`` writes them whole or not at all.

        Args:
            backend_name: a key of :data:`BACKENDS`.
            target: runtime; by default the one that the model was compiled for. One compiled for any ``tensorrt`` target can be lowered
                for each of them (``sm80``, ``sm86``, ... or ``tensorrt``: all from 8.0 on).
            options: of the backend: ``float_dtype`` (``"fp16"`` for what is not quantized; TensorRT only), and for ``tensorrt`` the fields
                of :class:`fxq.tensorrt.EngineOptions`; ``trt-calibration-cache`` has ``version``, ``archive`` has ``coding``.

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

    @overload
    def lint(self, target: str | None = None, *, portable: Literal[False] = False) -> LintReport | TrtReport: ...
    @overload
    def lint(self, target: str | None = None, *, portable: Literal[True]) -> PairReport: ...
    def lint(self, target: str | None = None, *, portable: bool = False) -> LintReport | TrtReport | PairReport:
        """Which nodes of the lowered file the target executes in integers, which not and why, and the Q/DQ nodes that are left.

        Args:
            target: another runtime's rules.
            portable: instead, which products can saturate on x86 CPUs without VNNI (:func:`fxq.portability_lint.check`).
        """
        if portable:
            from fxq import portability_lint

            return portability_lint.check(self.lower().data)
        from fxq.lint import lint

        return lint(self.lower().data, target or self.target.lint_name)

    def verify(
        self, artifact: str | os.PathLike[str] | bytes | Artifact, data: Any, *, limit: int | None = None
    ) -> Proof | EngineProof | ArchiveProof:
        """Run the artifact and compare with the integer reference, node by node and end to end.

        Of a TensorRT engine the builder's layers are compared with the plan and its ONNX file with the simulator; it runs where there is a GPU.
        An archive is read, and its model compared with this one bit for bit; one that runs on packed bits, with the integer reference.

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
        from fxq import archive_graph

        if archive_graph.begins_archive(raw):
            if archive_graph.runs_bitwise(raw, where):
                from fxq import bit_proof

                return bit_proof.verify(gm, raw, where, batches)
            from fxq import archive_proof

            return archive_proof.verify(gm, raw, where, batches)
        from fxq.proof import verify

        return verify(gm, artifact, batches, fused=self.target.fused)

    def with_float(self, *selectors: Selector) -> CompiledModel:
        """A copy in which the named nodes compute in float and what they give is not rounded, to see what they cost: ``m.with_float("layer3.*")``.

        It runs, lowers and can be proven; a model to ship had better be compiled with ``skip=``, which also places the Q/DQ around what is float.

        Args:
            selectors: patterns (``fnmatch``) of module paths or node names, module types, numbers of weighted layers (-1 the last).

        Raises:
            InputError: for a selector that names nothing.
        """
        from fxq.grafts import with_float

        gm = with_float(self.graph_module, selectors, self.history.floats())
        return CompiledModel(gm, self.captured, History(list(self.history.snapshots), self.history.example), self.scheme, self.target)

    def report(
        self,
        path: str | os.PathLike[str],
        data: Any = None,
        *,
        proof: Proof | EngineProof | ArchiveProof | None = None,
        sensitivity: Iterable[tuple[str, str, float, float]] | None = None,
        bisect: Any = None,
        title: str | None = None,
        command: str | None = None,
        force: bool = False,
    ) -> Path:
        """Write the HTML report: passes, graph, diffs, numbers, histograms, costs, proof in one file that is opened from disk, without network.

        Args:
            path: of the file, which is written whole or not at all.
            data: calibration-like data for the histograms of activations, of which at most :data:`fxq.report.BATCHES` batches are read;
                by default the example that ``compile`` kept.
            proof: what :meth:`verify` gave.
            sensitivity: what :meth:`sensitivity` gave, or rows ``(name, what, dB when it alone is quantized, dB when all but it are)``.
            bisect: the verdict on what broke the accuracy: its lines, or what gives them by ``str``.
            title: name of the model; by default that of its class.
            command: the command line that made it.
            force: replace a file that is there.

        Returns:
            The path.

        Raises:
            ArtifactError: when the file exists and ``force`` is false, or it cannot be written.
            CalibrationError: data that does not fit.
            FxqError: when a package of the extra ``report`` is not installed.
        """
        from fxq import report

        parts = self.parts or {"": self}
        runs: list[tuple[nn.Module, Any]] = []
        if data is not None:
            runs = [(self.root, list(Batches(data, self.root, limit=report.BATCHES, what="data for the report")))]
        else:
            runs = [(p.root, list(Batches([p.history.example], p.root))) for p in parts.values() if p.history.example is not None]
        extra = "\n".join(p.prune_report.to_html() for p in (self, *self.parts.values()) if p.prune_report is not None)
        made = report.render(
            [report.Section(name, p.graph_module, p.history) for name, p in parts.items()], runs,
            title=title or self._title(), scheme=self.scheme, target=self.target, proof=proof, command=command, sensitivity=sensitivity, bisect=bisect,
            notes=(f"captured: {self.captured.rung}", *self.captured.specialised, *self.captured.notes),
            extra=extra, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )  # fmt: skip
        return Artifact("report", made).save(path, force=force)

    def _title(self) -> str:
        root = self.captured.root
        return type(self.root).__name__ if type(root) is nn.Module else type(root).__name__

    def _engine(self, given: Any, raw: bytes, where: str) -> EngineArtifact:
        """The engine with its layer table: what ``lower`` gave, or the one of these bytes that it gave before."""
        from fxq.tensorrt import EngineArtifact

        artifact = given if isinstance(given, EngineArtifact) else self._engines.get(sha256(raw).hexdigest())
        if not isinstance(artifact, EngineArtifact):
            way_out = "Lower the model again (the same options give the same bytes) and verify that"
            raise ArtifactError("this engine was not made by this model here, so the types of its layers are not known", where=where, way_out=way_out)
        return artifact
