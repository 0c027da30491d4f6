"""What the TensorRT lint says: findings, and how each weighted operation will run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

from fxq import tables_html

ERROR, WARNING = "error", "warning"
SHOWN = 5
"""Findings of one kind that the text of a report shows; its JSON has all."""


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT will reject, compute wrongly or degrade.

    Attributes:
        level: ``error`` when TensorRT rejects the file or silently computes other numbers, ``warning`` when something silently runs in float, or builds with
            TensorRT-RTX only.
        code: short name of the rule.
        node: of the file; the first output's name for a node without one.
        fact: what is wrong, one sentence.
        way_out: what can be done about it.
    """

    level: str
    code: str
    node: str
    fact: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.level} [{self.code}] {self.node}: {self.fact}. {self.way_out}"


@dataclass(frozen=True)
class TrtOp:
    """How one convolution or matrix product runs.

    Attributes:
        node: its name.
        op: operator type.
        runs: ``int8``, ``fp8``, ``int4-weights`` (weights unpacked by the kernel) or ``float``.
        why: for ``float``, the reason.
    """

    node: str
    op: str
    runs: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.op} {self.node}: {self.runs}" + (f", {self.why}" if self.why else "")


@dataclass(frozen=True)
class TrtReport:
    """Findings about an ONNX file, and how its weighted operations will run.

    Attributes:
        target: what was checked for.
        findings: errors first.
        ops: every Conv, ConvTranspose, Gemm and MatMul, in the order of the file.
        dynamic: inputs of unknown size, such as ``x [N, 3, 224, 224]``: the build needs a profile for each.
    """

    target: str
    findings: tuple[Finding, ...]
    ops: tuple[TrtOp, ...]
    dynamic: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """There is no error. Warnings do not count."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings of level ``error``."""
        return tuple(f for f in self.findings if f.level == ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings of level ``warning``."""
        return tuple(f for f in self.findings if f.level == WARNING)

    def counts(self) -> dict[str, dict[str, int]]:
        """Operator type -> how it runs -> number of nodes."""
        found: dict[str, dict[str, int]] = {}
        for (op, runs), n in Counter((o.op, o.runs) for o in self.ops).items():
            found.setdefault(op, {})[runs] = n
        return found

    def __str__(self) -> str:
        parts = [f"{op.lower()} " + " + ".join(f"{n} {runs}" for runs, n in runs.items()) for op, runs in self.counts().items()]
        head = f"{self.target}: {_number(len(self.errors), 'error')}, {_number(len(self.warnings), 'warning')}"
        lines = [", ".join([head, *parts])]
        by_code: dict[str, list[Finding]] = {}
        for f in self.findings:
            by_code.setdefault(f.code, []).append(f)
        for code, found in by_code.items():
            lines += [f"  {f}" for f in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"  {found[0].level} [{code}] ... and {len(found) - SHOWN} more")
        lines += [f"  {o}" for o in self.ops if o.runs == "float"]
        lines += [f"  input {text} is dynamic: the build needs a profile" for text in self.dynamic]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return tables_html.of_trt(self)

    def to_json(self) -> str:
        """The report as a JSON object."""
        body = {"target": self.target, "ok": self.ok, "counts": self.counts(), "dynamic": self.dynamic}
        return json.dumps(body | {"findings": [asdict(f) for f in self.findings], "ops": [asdict(o) for o in self.ops]}, indent=1)


def _number(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")
