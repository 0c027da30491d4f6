"""Tables for notebooks: HTML fragments from strings, everything escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

LEFT, RIGHT = "text-align:left", "text-align:right"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", numbers: Sequence[int] = ()) -> str:
    """A table as an HTML fragment without scripts.

    Args:
        head: titles of the columns.
        rows: cells; what is no string is written as ``str`` does.
        caption: a line above the table.
        numbers: columns that are aligned right.
    """
    styles = [f' style="{RIGHT if i in numbers else LEFT}"' for i in range(len(head))]

    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}{style}>{html.escape(str(c))}</{tag}>" for style, c in zip(styles, cells, strict=True)) + "</tr>"

    above = f'<caption style="caption-side:top;{LEFT}">{html.escape(caption)}</caption>' if caption else ""
    return f"<table>{above}<thead>{line('th', head)}</thead><tbody>{''.join(line('td', r) for r in rows)}</tbody></table>"


def folded(summary: str, body: str) -> str:
    """A fragment that opens on a click.

    Args:
        summary: text, escaped here.
        body: HTML.
    """
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def listing(head: str, lines: Sequence[str]) -> str:
    """A heading and lines that keep their spaces."""
    return f"<h4>{html.escape(head)}</h4><pre>{html.escape(chr(10).join(lines))}</pre>"


def of_history(history: Any) -> str:
    """A line a pass (:class:`fxq.snapshot.History`); what passes left alone opens on a click."""
    rows = [(s.name, s.rewrites, s.nodes, f"{s.ms:.1f}", "-" if s.moved is None else f"{s.moved:.2e}" if s.moved else "0") for s in history]
    made = table(("pass", "rewrites", "nodes", "ms", "output moved"), rows, numbers=(1, 2, 3, 4))
    left = [(s.name, k.node, k.why) for s in history for k in s.skips]
    return made + (folded(f"left alone: {len(left)}", table(("pass", "node", "reason"), left)) if left else "")


def of_compiled(model: Any) -> str:
    """Scheme, target, what runs in float with reasons, and the passes (:class:`fxq.CompiledModel`)."""
    name = type(model).__name__
    if model.parts:
        rows = [(path, part.history.snapshots[-1].nodes, len(part.float_ops)) for path, part in model.parts.items()]
        return table(("part", "nodes", "operations in float"), rows, f"{name}: {model.scheme.name} for {model.target.name}, in parts", (1, 2))
    ops = [n for n in model.graph_module.graph.nodes if "integer" in n.meta and n.op.startswith("call_")]
    integer = sum(bool(n.meta["integer"]) for n in ops)
    head = f"{name}: {model.scheme.name} for {model.target.name}; {integer} of {len(ops)} nodes in integers"
    floats = [(o.node, o.kind, o.why) for o in model.float_ops]
    below = folded(f"in float: {len(floats)}", table(("node", "kind", "reason"), floats)) if floats else ""
    return f"<p>{html.escape(head)}</p>{of_history(model.history)}{below}"


def of_lint(report: Any) -> str:
    """Operator types with their counts, then the nodes in float with reasons (:class:`fxq.lint.LintReport`)."""
    caption = f"{report.q_left} QuantizeLinear and {report.dq_left} DequantizeLinear left"
    made = table(("operator", "int8", "float"), [(op, *n) for op, n in report.counts().items()], caption, (1, 2))
    floats = [(o.node, o.op, o.why) for o in report.ops if o.runs == "float"]
    made += table(("node in float", "operator", "reason"), floats) if floats else ""
    return made + (folded(f"left: {len(report.left)}", table(("node", "reason"), report.left)) if report.left else "")


def of_trt(report: Any) -> str:
    """Findings, then how the weighted operations run (:class:`fxq.lint_trt_report.TrtReport`)."""
    caption = f"{report.target}: {len(report.errors)} errors, {len(report.warnings)} warnings"
    found = table(("level", "rule", "node", "fact", "way out"), [(f.level, f.code, f.node, f.fact, f.way_out) for f in report.findings], caption)
    return found + folded(f"operations: {len(report.ops)}", table(("node", "operator", "runs", "reason"), [(o.node, o.op, o.runs, o.why) for o in report.ops]))


def of_proof(proof: Any) -> str:
    """The verdict, each output, and the nodes that differ (:class:`fxq.verdict.Proof`)."""
    rows = [(o.name, "exact" if o.exact else "within the bound", f"{o.differ} of {o.elements}", f"{o.drift:.2g}", f"{o.error:.2g}") for o in proof.outputs]
    outputs = table(("output", "has to be", "elements off", "end to end", "given the runtime's codes"), rows, proof.verdict, (2, 3, 4))
    wrong = [(d.node, d.tensor, f"{d.differ} of {d.elements}", f"{d.greatest:g}", d.cause) for d in proof.differences]
    facts = [
        (proof.what, f"{proof.nodes} of {proof.planned} compared"), ("elements off", f"{proof.hidden_differ} of {proof.hidden}"), ("ties", proof.ties),
        ("batches", proof.batches), ("operations in float", len(proof.float_nodes)),
    ]  # fmt: skip
    nodes = table(("node", "tensor", "elements off", "greatest", "cause"), wrong, numbers=(2, 3)) if wrong else ""
    return outputs + table(("of the nodes", ""), facts) + nodes
