"""The TensorRT backend: ONNX in the form its parser takes, linted, built in a child process, and its layer table checked against the plan."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import onnx
from torch.fx import GraphModule, Node

from fxq import lint_trt
from fxq.backends.onnx_qdq import OnnxQdq
from fxq.backends.trt_builder import BuildOptions, Built, build
from fxq.backends.trt_layers import Layer, runs, table_text
from fxq.errors import EngineError
from fxq.graph import kind, module_of
from fxq.lowering import Artifact, Issue, Lowering
from fxq.modules import WEIGHTED, Quantized
from fxq.pipeline import Progress, no_progress
from fxq.schemes import Scheme
from fxq.targets import Target


@dataclass(frozen=True)
class EngineOptions(BuildOptions):
    """How to make an engine: what the builder takes (the capability comes from the target), and:

    Attributes:
        float_dtype: ``fp32`` or ``fp16``: type of everything that is not quantized.
        strict: an operation that the builder does not run as planned is an error, otherwise a warning.
        progress: callback ``(what, done, total)``; an exception that it raises stops the build.
    """

    float_dtype: str = "fp32"
    strict: bool = False
    progress: Progress = no_progress

    def for_capability(self, version: int | None) -> EngineOptions:
        """These options for a compute capability (``86`` for 8.6; ``None``: all from 8.0 on)."""
        return replace(self, capability=None if version is None else f"sm{version}")


@dataclass(frozen=True)
class LayerCheck:
    """One convolution or product of the model: what was planned and what the builder made of it.

    Attributes:
        path: module path (or node name) in the model; ``kind``: ``conv``, ``conv_transpose``, ``linear``, ``matmul``.
        planned: ``int8``, ``fp8``, ``int4-weights`` or ``float``.
        built: the same from the builder's table; ``absent`` when no layer names the operation.
        layer: the engine's layer; ``onnx``: the ONNX node.
        why: of a planned float operation the reason.
    """

    path: str
    kind: str
    planned: str
    built: str
    layer: str
    onnx: str
    why: str = ""

    @property
    def ok(self) -> bool:
        """It runs in the type that was planned (in float also where the builder dissolved it)."""
        return self.built == self.planned or self.planned == "float"

    def __str__(self) -> str:
        text = f"{self.path} ({self.kind}): planned {self.planned}, built {self.built}"
        return text + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class EngineArtifact(Artifact):
    """A TensorRT engine with what is known of it.

    Attributes:
        onnx: the ONNX file that it was built from.
        layers: the builder's table.
        checks: every convolution and product of the model, planned and built.
    """

    onnx: bytes = b""
    layers: tuple[Layer, ...] = ()
    checks: tuple[LayerCheck, ...] = ()

    @property
    def mismatches(self) -> tuple[LayerCheck, ...]:
        """Operations that the builder does not run as planned."""
        return tuple(c for c in self.checks if not c.ok)

    def table(self) -> str:
        """The layer plan as text: every layer of the engine, then every operation of the model that multiplies."""
        return f"{table_text(self.layers)}\n\n{checks_text(self.checks)}"


def checks_text(checks: Sequence[LayerCheck]) -> str:
    """A table of :class:`LayerCheck`, one line each."""
    rows = [("operation", "kind", "planned", "built", "ONNX node")]
    rows += [(c.path, c.kind, c.planned, c.built, c.onnx) for c in checks]
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[4]]) for r in rows]
    good = sum(c.ok for c in checks)
    quantized = [c for c in checks if c.planned != "float"]
    lines.append(f"{sum(c.ok for c in quantized)} of {len(quantized)} quantized operations run as planned; {len(checks) - len(quantized)} stay float")
    if good != len(checks):
        lines += [f"not as planned: {c}" for c in checks if not c.ok]
    return "\n".join(lines)


def planned(gm: GraphModule, scheme: Scheme) -> list[tuple[Node, str]]:
    """Every convolution and product of a converted graph with the type that it should run in."""
    activation = scheme.activation
    low = "fp8" if activation is not None and activation.kind == "float8" else "int8"
    found = []
    for node in gm.graph.nodes:
        k = kind(gm, node)
        if k not in (*WEIGHTED, "matmul"):
            continue
        weight_only = node.op == "call_module" and isinstance(module_of(gm, node), Quantized) and not node.meta.get("integer")
        found.append((node, low if node.meta.get("integer") else "int4-weights" if weight_only else "float"))
    return found


def compare(gm: GraphModule, scheme: Scheme, layers: Sequence[Layer]) -> tuple[LayerCheck, ...]:
    """Each convolution and product of the model beside the layer that computes it."""
    holders: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer.onnx:
            holders.setdefault(name, []).append(layer)
    return tuple(_check(gm, node, plan, holders) for node, plan in planned(gm, scheme))


def _check(gm: GraphModule, node: Node, plan: str, holders: Mapping[str, Sequence[Layer]]) -> LayerCheck:
    path = str(node.target) if node.op == "call_module" else node.name
    why = str(node.meta.get("float_why", "")) if plan == "float" else ""
    for name in (f"{path}/matmul", f"{path}/gemm", path, f"{path}_"):
        computing = [layer for layer in holders.get(name, ()) if layer.weighted]
        if computing:
            kinds = [runs(layer) for layer in computing]
            built = plan if plan in kinds else kinds[0]
            return LayerCheck(path, kind(gm, node), plan, built, computing[kinds.index(built)].name, name, why)
    return LayerCheck(path, kind(gm, node), plan, "absent", "", path, why)


class TensorRT(Lowering):
    """Lints the ONNX file, builds the engine and compares the builder's layer table with the plan. It needs no GPU with TensorRT-RTX."""

    name: ClassVar[str] = "tensorrt"

    def __init__(self, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self.writer = OnnxQdq(self.options.float_dtype)
        self._file: tuple[GraphModule, Artifact] | None = None

    def check(self, gm: GraphModule, scheme: Scheme, target: Target) -> list[Issue]:
        """What the ONNX writer or the lint finds; no TensorRT is needed for it."""
        if target.family != "tensorrt":
            return [Issue("target", f"the graph is placed for {target.name!r}", "Compile it with target='tensorrt' or 'sm86', ...")]
        issues = self.writer.check(gm, scheme, target)
        if issues:
            return issues
        artifact = self.writer.emit(gm, scheme, target)
        self._file = gm, artifact
        return [Issue(f.node, f.fact, f.way_out) for f in lint_trt.check(onnx.load_from_string(artifact.data), target.lint_name).errors]

    def emit(self, gm: GraphModule, scheme: Scheme, target: Target) -> EngineArtifact:
        """Build.

        Raises:
            EngineError: see :func:`fxq.backends.trt_builder.build`; with ``strict`` also when an operation does not run as planned.
        """
        assert self._file is not None and self._file[0] is gm, "check comes first"
        file, self._file = self._file[1], None
        built = build(file.data, self.options.for_capability(target.capability), self.options.progress)
        checks = compare(gm, scheme, built.layers)
        artifact = EngineArtifact(self.name, built.engine, _info(file, built, checks, target), file.data, built.layers, checks)
        if artifact.mismatches:
            first, more = artifact.mismatches[0], len(artifact.mismatches) - 1
            fact = f"planned {first.planned}, but the builder runs it in {first.built}" + (f" (and {more} more)" if more else "")
            if self.options.strict:
                raise EngineError(fact, where=first.path, way_out="Leave it float with skip=, or build without strict")
            warnings.warn(f"{first.path}: {fact}", stacklevel=4)
        return artifact


def _info(file: Artifact, built: Built, checks: Sequence[LayerCheck], target: Target) -> dict[str, Any]:
    return {
        "bytes": {"total": len(built.engine), "onnx": len(file.data)}, "seconds": built.seconds, "package": built.package, "version": built.version,
        "capability": target.capability, "profiles": built.profiles, "warnings": list(built.warnings), "layers": [asdict(x) for x in built.layers],
        "checks": [{**asdict(c), "ok": c.ok} for c in checks], "mismatches": [str(c) for c in checks if not c.ok], "float_ops": file.info["float_ops"],
    }  # fmt: skip
