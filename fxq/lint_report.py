"""What a lint for runtimes with fused Q/DQ graphs says: how each node of a file runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

from fxq import tables_html
from fxq.lint_graph import BYTES, FLOATS, Net, Op

GONE = "gone"
SHOWN = 20
"""Nodes left over that the text of a report shows; its JSON has all."""
CLIPS = ("Relu", "Clip")  # they vanish: into a kernel or into a Q, which cannot be told apart afterwards


@dataclass(frozen=True)
class OpReport:
    """How one node of the file runs.

    Attributes:
        node: its name, or its first output's when it has none.
        op: operator type.
        runs: ``int8``, ``float``, or ``gone`` (removed or merged; only in reports of what a runtime did).
        kernel: operator that does the work, e.g. ``QLinearConv``.
        why: for ``float``, the rule that blocked the integer kernel.
    """

    node: str
    op: str
    runs: str
    kernel: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.op} {self.node}: {self.runs}" + (f", {self.why}" if self.why else f" ({self.kernel})")


@dataclass(frozen=True)
class LintReport:
    """How each compute node runs, and how many Q and DQ nodes are left after optimization.

    Attributes:
        ops: in the order of the file.
        q_left, dq_left: QuantizeLinear and DequantizeLinear nodes that are executed beside the kernels instead of inside of one.
        left: those of them that the file names, each with the reason; one that the runtime makes itself has none.
    """

    ops: tuple[OpReport, ...]
    q_left: int
    dq_left: int
    left: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Operator type -> (nodes in int8, nodes in float)."""
        tally = Counter((o.op, o.runs) for o in self.ops)
        types = dict.fromkeys(o.op for o in self.ops)
        return {t: (tally[t, "int8"], tally[t, "float"]) for t in types}

    def __str__(self) -> str:
        parts = [f"{op.lower()} {i}/{i + f} int8" for op, (i, f) in self.counts().items() if i + f]
        head = ", ".join([*parts, f"{self.q_left} Q + {self.dq_left} DQ left"])
        return "\n".join([head, *(f"  {o}" for o in self.ops if o.runs == "float")])

    def _repr_html_(self) -> str:
        return tables_html.of_lint(self)

    def leftovers(self) -> str:
        """The first nodes of :attr:`left`, a line each, with the reason; empty for none."""
        lines = [f"  left: {node}, {why}" for node, why in self.left[:SHOWN]]
        more = len(self.left) - SHOWN
        return "\n".join(lines if more <= 0 else [*lines, f"  left: ... and {more} more"])

    def to_json(self) -> str:
        """The report as a JSON object."""
        left = [{"node": node, "why": why} for node, why in self.left]
        body = {"ops": [asdict(o) for o in self.ops], "q_left": self.q_left, "dq_left": self.dq_left, "left": left, "counts": self.counts()}
        return json.dumps(body, indent=1)


def label(op: Op) -> str:
    """Name of a node in a report: its own, or its first output's when it has none."""
    return op.name or op.outputs[0]


def compute_nodes(net: Net) -> dict[int, OpReport]:
    """Nodes of the file that compute with values: position -> name and type. Q, DQ, constants and shape arithmetic are none."""
    constant = set(net.const_names)
    nodes: dict[int, OpReport] = {}
    for op in net:
        given = [name for name in op.inputs if name]
        if given and all(name in constant for name in given):
            constant.update(op.outputs)
            continue
        kinds = {net.types.get(name, 0) for name in (*given, *op.outputs) if name not in constant}
        if op.is_q or op.is_dq or op.op in ("Shape", "Size", "Identity", "Dropout") or not kinds & {0, *FLOATS, *BYTES}:
            continue
        nodes[op.origins[0]] = OpReport(label(op), op.op, "float", op.op)
    return nodes


def agrees(predicted: LintReport, actual: LintReport) -> list[str]:
    """Differences between a prediction and what the runtime did; nodes that the runtime removed or merged are not compared."""
    truth = {o.node: o for o in actual.ops}
    lines = []
    for o in predicted.ops:
        real = truth.get(o.node)
        if real is None:
            lines.append(f"{o}: not in the runtime's report")
        elif real.runs != GONE and (o.runs != real.runs or (o.runs == "int8" and o.kernel != real.kernel and o.op not in CLIPS)):
            lines.append(f"predicted {o}; the runtime: {real.runs} ({real.kernel})")
    for what, a, b in (("QuantizeLinear", predicted.q_left, actual.q_left), ("DequantizeLinear", predicted.dq_left, actual.dq_left)):
        if a != b:
            lines.append(f"{what} left: predicted {a}, the runtime has {b}")
    return lines
