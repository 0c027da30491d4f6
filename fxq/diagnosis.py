"""``fxq doctor``: before any quantization, without data: what can be captured, what will run in integers, what is unhealthy, what is installed."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from fxq import admission, doctor_health, schemes, tables_html, targets
from fxq.calibration import Batches
from fxq.compiled import CompiledModel
from fxq.doctor_health import Finding
from fxq.doctor_machine import Machine, Package, machine, packages
from fxq.doctor_plan import Forecast, forecast, refused
from fxq.errors import CalibrationError, FxqError, TargetError, TraceError
from fxq.exported import program_module
from fxq.heap import young
from fxq.lint_trt_report import TrtReport
from fxq.pruned import PrunedModel
from fxq.schemes import Scheme
from fxq.targets import Target
from fxq.trace import Captured, capture

ALL = "all"
"""As a target: every one that is known."""
NOTES = {
    "symbolic": "one graph, by symbolic tracing", "concrete": "one graph, traced with example values: its control flow depends on shapes",
    "export": "one graph, by torch.export", "submodules": "in parts: no graph holds the whole model",
}  # fmt: skip


@dataclass(frozen=True)
class Capture:
    """How the model was captured.

    Attributes:
        rung: of :data:`fxq.trace.RUNGS`; empty when no rung could.
        nodes: operations of the captured graph, or of the parts together.
        specialised: what the graph holds for only, one line each.
        notes: why earlier rungs failed, with file and line where known.
        parts: paths of the parts.
        error: what cannot be traced, with file, line and way out; None when it could.
    """

    rung: str
    nodes: int = 0
    specialised: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    error: str | None = None

    def lines(self) -> list[str]:
        """The capture as text."""
        if self.error is not None:
            return [f"cannot be captured: {self.error}"]
        head = f"{self.rung}: {NOTES[self.rung]}, {self.nodes} operations"
        parts = [f"part      {p}" for p in self.parts]
        return [head, *(f"holds for {s}" for s in self.specialised), *(f"tried     {n}" for n in self.notes), *parts]


@dataclass(frozen=True)
class Diagnosis:
    """What ``fxq doctor`` found. ``print(diagnosis)`` shows all of it.

    Attributes:
        model: what was looked at; None when only the machine was.
        capture: None without a model, or for an ONNX file.
        forecasts: one for each target.
        findings: about the model, the grave ones first.
        file: of an ONNX file, what it is, one line each.
        lints: of an ONNX file, target -> the lint's report.
        machine, packages: where it would run, and with what.
        seconds: how long the look at the model took.
        needs_all: every target has to be possible (they were named); otherwise one is enough.
    """

    model: str | None
    machine: Machine
    packages: tuple[Package, ...]
    capture: Capture | None = None
    forecasts: tuple[Forecast, ...] = ()
    findings: tuple[Finding, ...] = ()
    file: tuple[str, ...] = ()
    lints: tuple[tuple[str, Any], ...] = ()
    seconds: float = 0.0
    needs_all: bool = True

    @property
    def stops(self) -> list[str]:
        """What would stop the compilation, one line each; empty when nothing would."""
        found = [f"{p.name}: {p.state}: {p.note}" for p in self.packages if p.bad]
        found += [str(f) for f in self.findings if f.level == "stop"]
        if self.capture is not None and self.capture.error is not None:
            found.append(f"it cannot be captured: {self.capture.error}")
        stopped = [f"{f.target}: {f.stop}" for f in self.forecasts if f.stop is not None]
        found += stopped if self.needs_all or len(stopped) == len(self.forecasts) else []
        refused = [f"{name}: {len(r.errors)} errors" for name, r in self.lints if isinstance(r, TrtReport) and not r.ok]
        return found + (refused if self.needs_all or len(refused) == len(self.lints) else [])

    @property
    def ok(self) -> bool:
        """Nothing would stop the compilation."""
        return not self.stops

    def sections(self) -> list[tuple[str, list[str]]]:
        """Headings and their lines."""
        made: list[tuple[str, list[str]]] = []
        if self.model is not None:
            verdict = "nothing stops its compilation" if self.ok else "; ".join(self.stops)
            made.append((self.model, [verdict, f"looked at in {self.seconds:.1f} s, no data was needed"]))
        if self.capture is not None:
            made.append(("capture", self.capture.lines()))
        made += [(f.lines()[0], [line.removeprefix("  ") for line in f.lines()[1:]]) for f in self.forecasts]
        if self.file:
            made.append(("file", list(self.file)))
        made += [(f"lint for {name}", str(report).splitlines()) for name, report in self.lints]
        if self.findings:
            made.append(("model", [str(f) for f in self.findings]))
        made.append(("machine", self.machine.lines()))
        made.append(("software", [_software(p) for p in self.packages]))
        return made

    def __str__(self) -> str:
        return "\n".join(line for head, lines in self.sections() for line in (head, *(f"  {text}" for text in lines)))

    def _repr_html_(self) -> str:
        return "".join(tables_html.listing(head, lines) for head, lines in self.sections())

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        return {
            "model": self.model, "ok": self.ok, "stops": self.stops, "seconds": self.seconds,
            "capture": None if self.capture is None else asdict(self.capture), "forecasts": [f.to_json() for f in self.forecasts],
            "findings": [asdict(f) for f in self.findings], "file": list(self.file), "lints": {n: json.loads(r.to_json()) for n, r in self.lints},
            "machine": {**asdict(self.machine), "int8": self.machine.int8}, "packages": [asdict(p) for p in self.packages],
        }  # fmt: skip


def _software(p: Package) -> str:
    return f"{p.name:<13} {p.version or '-':<11} {p.what}" + (f": {p.note}" if p.note else "")


@young()
def doctor(
    model: nn.Module | torch.export.ExportedProgram | str | os.PathLike[str] | None = None,
    example: Any = None,
    *,
    target: str | Target | Sequence[str | Target] = "onnxruntime",
    scheme: str | Scheme = "int8",
    leaf_modules: Sequence[type[nn.Module]] = (),
    name: str | None = None,
) -> Diagnosis:
    """Look at a float model, this machine and its software, before any quantization.

    The model is captured, and the passes up to the placement of grids run for each target; they need no data. So ``forecasts[0].float_ops`` equals
    what ``fxq.compile(...).float_ops`` will say.

    Args:
        model: float32 module, exported program, path of an ONNX file (then it is linted), or None for the machine alone.
        example: one batch of inputs (a tensor or a tuple); an exported program brings its own.
        target: one or several; ``"all"`` for every known target.
        scheme: as of :func:`fxq.compile`.
        leaf_modules: module types that capture keeps whole.
        name: the model's name in the report.

    Raises:
        TargetError, SchemeError: for an unknown target or scheme.
        CalibrationError: the shapes are not known, or the model does not run on ``example``.
        ArtifactError: when the ONNX file cannot be read.
    """
    start = time.perf_counter()
    asked = [target] if isinstance(target, (str, Target)) else list(target)
    base = Diagnosis(None, machine(), tuple(packages()), needs_all=ALL not in asked)
    if isinstance(model, (str, os.PathLike)):
        found = _of_file(replace(base, model=name or os.fspath(model)), model, asked)
        return replace(found, seconds=time.perf_counter() - start)
    wanted = [targets.get(t) for t in (targets.names() if ALL in asked else dict.fromkeys(asked))]
    if scheme != "int8":
        schemes.get(scheme)
    if model is None:
        return base
    found = _of_model(base, model, example, wanted, scheme, tuple(leaf_modules), name)
    return replace(found, seconds=time.perf_counter() - start)


def _of_model(
    base: Diagnosis, model: Any, example: Any, wanted: list[Target], scheme: str | Scheme, leaves: tuple[type[nn.Module], ...], name: str | None
) -> Diagnosis:
    if isinstance(model, torch.export.ExportedProgram):
        example = model.example_inputs[0] if example is None and model.example_inputs else example
        model = program_module(model)
    net = admission.unwrapped(model)
    net = net.root if isinstance(net, PrunedModel) else net
    findings = _health(net)
    base = replace(base, model=name or type(net).__name__, findings=tuple(findings))
    if any(f.level == "stop" for f in findings):
        return base
    if example is None:
        raise CalibrationError("the shapes are not known", way_out="Pass example= with one batch of inputs (on the command line --input 1,3,224,224)")
    inputs = Batches([example], net, what="example").example
    few = tuple(x[:2] if isinstance(x, torch.Tensor) and x.ndim else x for x in inputs)
    try:
        captured = capture(net, few, leaf_modules=leaves)
    except TraceError as e:
        admission.require_runs(net, few, inputs, e)
        return replace(base, capture=Capture("", error=str(e)))
    return replace(base, capture=_capture(captured), forecasts=_forecasts(captured, few, wanted, scheme))


def _health(net: Any) -> list[Finding]:
    """Findings of a model, and what :func:`fxq.compile` would refuse it for."""
    findings = doctor_health.of_model(net) if isinstance(net, nn.Module) else []
    if isinstance(net, CompiledModel):
        return [Finding("stop", "model", (), "the model is compiled already", "Give the float model that it was made from")]
    if not any(f.level == "stop" for f in findings):
        try:
            admission.check_model(net)
        except FxqError as e:
            findings.insert(0, Finding("stop", "model", (e.where,) if e.where else (), e.fact, e.way_out or ""))
    return findings


def _capture(captured: Captured) -> Capture:
    graphs = [captured.gm] if captured.gm is not None else [gm for gm, _ in captured.parts.values()]
    nodes = sum(n.op.startswith("call_") for gm in graphs for n in gm.graph.nodes)
    return Capture(captured.rung, nodes, captured.specialised, captured.notes, tuple(captured.parts))


def _forecasts(captured: Captured, example: tuple[Any, ...], wanted: list[Target], scheme: str | Scheme) -> tuple[Forecast, ...]:
    """One for each target; targets of one family differ in nothing that passes decide, so one run is enough for them."""
    made: dict[tuple[str, str], Forecast] = {}
    found = []
    for target in wanted:
        no = refused(target, scheme)
        if no is not None:
            found.append(no)
            continue
        chosen = target.scheme(scheme)
        key = target.family, chosen.name
        if key not in made:
            made[key] = forecast(captured, example, target, chosen)
        found.append(replace(made[key], target=target.name))
    return tuple(found)


def _of_file(base: Diagnosis, path: str | os.PathLike[str], asked: Sequence[str | Target]) -> Diagnosis:
    """What an ONNX file is, and what its targets' lints say."""
    from fxq.lint import TARGETS, lint, load
    from fxq.lint_trt_graph import inlined

    proto = load(path)
    names = list(TARGETS) if ALL in asked else [t if isinstance(t, str) and t in TARGETS else targets.get(t).lint_name for t in asked]
    missing = [n for n in names if n not in TARGETS]
    if missing:
        raise TargetError(f"there are no lint rules for {', '.join(missing)}", where=os.fspath(path), way_out="Choose of " + ", ".join(TARGETS))
    return replace(base, file=tuple(_described(inlined(proto))), lints=tuple((n, lint(path, n)) for n in dict.fromkeys(names)))


def _described(proto: Any) -> list[str]:
    import onnx

    graph = proto.graph
    stored = {t.name for t in graph.initializer}
    opsets = ", ".join(f"{o.domain or 'onnx'} {o.version}" for o in proto.opset_import)
    ops = Counter(n.op_type for n in graph.node)
    kinds: Counter[str] = Counter()
    for t in graph.initializer:
        count = 1
        for d in t.dims:
            count *= d
        kinds[onnx.TensorProto.DataType.Name(t.data_type).lower()] += count

    def value(v: Any) -> str:
        sizes = [d.dim_param or str(d.dim_value) for d in v.type.tensor_type.shape.dim]
        return f"{v.name} [{', '.join(sizes)}]"

    pairs = ops["QuantizeLinear"], ops["DequantizeLinear"]
    return [
        f"written by {proto.producer_name or 'unknown'} {proto.producer_version}".rstrip() + f"; IR {proto.ir_version}; opsets {opsets}",
        "inputs    " + ", ".join(value(v) for v in graph.input if v.name not in stored), "outputs   " + ", ".join(value(v) for v in graph.output),
        "nodes     " + ", ".join(f"{n} {k}" for k, n in ops.most_common()),
        "weights   " + (", ".join(f"{n:,} of {k}" for k, n in kinds.most_common()) or "none"),
        f"quantized {pairs[0]} QuantizeLinear, {pairs[1]} DequantizeLinear" if any(pairs) else "a float model: quantize it with fxq from PyTorch",
    ]  # fmt: skip
