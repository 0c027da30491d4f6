"""What pruning did: layers before and after, groups, what could not be cut, sensitivity. As text, plain data and an HTML fragment."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fxq.costs import LayerCost, total

WEIGHTED = ("conv", "conv_transpose", "linear", "matmul", "embedding")
"""Kinds that the text shows one by one; norms, activations and single parameters are one line together."""

WIDTH = 32
"""Characters of a full bar."""

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_CELL = 'style="text-align:right;padding:0 .6em"'


@dataclass(frozen=True, eq=False)
class GroupCut:
    """What stays of one coupled group.

    Attributes:
        name: of the group.
        members: nodes that are cut together.
        kept: bool ``[units]``, True for units that stay.
        unit: what one unit is, the noun first: ``channel``, ``block of 4 channels``.
    """

    name: str
    members: tuple[str, ...]
    kept: np.ndarray[Any, np.dtype[np.bool_]]
    unit: str = "channel"

    @property
    def before(self) -> int:
        """Units before the cut."""
        return len(self.kept)

    @property
    def after(self) -> int:
        """Units that stay."""
        return int(self.kept.sum())


@dataclass(frozen=True)
class SensitivityRow:
    """What happens when this group alone is cut.

    Attributes:
        group: its name.
        units: its units.
        cut: how many of them were cut.
        sqnr: signal to error of the output, dB; infinite when nothing moved.
        metric: the user's metric (accuracy, ...), None when there is none.
    """

    group: str
    units: int
    cut: int
    sqnr: float
    metric: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """One row for each group (and share), in the order of the graph."""

    rows: tuple[SensitivityRow, ...]

    def ranked(self) -> list[SensitivityRow]:
        """The most sensitive group first: by the metric where there is one, otherwise by SQNR."""
        return sorted(self.rows, key=lambda r: r.sqnr if r.metric is None else r.metric)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        head = ["group", "units cut", "share", "SQNR dB"]
        cells = [[r.group, f"{r.cut} of {r.units}", f"{r.cut / r.units:.0%}", _db(r.sqnr)] for r in self.ranked()]
        if any(r.metric is not None for r in self.rows):
            head.append("metric")
            cells = [[*c, "" if r.metric is None else f"{r.metric:.4g}"] for c, r in zip(cells, self.ranked(), strict=True)]
        return head, cells

    def __str__(self) -> str:
        return "\n".join(_aligned(*self._table()))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data for ``json.dump``; an infinite SQNR is None."""
        return [asdict(r) | {"sqnr": r.sqnr if math.isfinite(r.sqnr) else None} for r in self.rows]

    def to_html(self) -> str:
        """The table as an HTML fragment."""
        return _html_table(*self._table())


@dataclass(frozen=True)
class PruneReport:
    """Costs before and after, groups, and what was left whole. ``print(report)`` shows all of it.

    Attributes:
        before: layers of the whole net, in the order of the graph.
        after: layers of the cut net; the same ``path`` is the same layer.
        groups: what stays of each group.
        left: ``(node, reason)`` of what cannot be pruned.
        absorbed: channels whose constant went into the next layer's bias.
        sensitivity: of each group alone, when it was measured.
    """

    before: Sequence[LayerCost]
    after: Sequence[LayerCost]
    groups: Sequence[GroupCut]
    left: Sequence[tuple[str, str]] = field(default=())
    absorbed: int = 0
    sensitivity: Sensitivity | None = None

    def pairs(self) -> list[tuple[LayerCost, LayerCost]]:
        """Each layer before and after; a layer that is only on one side has a partner without cost."""
        after, known = {c.path: c for c in self.after}, {c.path for c in self.before}
        new = [(LayerCost(c.path, c.kind, 0, 0, 1, 0, 0, 0), c) for c in self.after if c.path not in known]
        return [(c, after.get(c.path, LayerCost(c.path, c.kind, 0, 0, 1, 0, 0, 0))) for c in self.before] + new

    def totals(self) -> tuple[LayerCost, LayerCost]:
        """Sums before and after."""
        return total(list(self.before)), total(list(self.after))

    def __str__(self) -> str:
        shown = [p for p in self.pairs() if p[0].kind in WEIGHTED]
        rest = [p for p in self.pairs() if p[0].kind not in WEIGHTED]
        rows = [_layer(b, a) for b, a in shown]
        if rest:
            sums = [total([p[i] for p in rest]) for i in (0, 1)]
            rows.append(["norms and others", "", *_costs(sums[0], sums[1])])
        lines = _aligned(_HEAD, [*rows, ["total", "", *_costs(*self.totals())]])
        lines.insert(-1, lines[1])
        lines += ["", *_aligned(["group", "stay", "members"], [[g.name, _stay(g), ", ".join(g.members)] for g in self.groups])]
        if self.absorbed:
            lines += ["", f"the constants of {self.absorbed} cut channels went into the next layer's bias"]
        if self.left:
            lines += ["", "left whole:", *(f"  {node}: {why}" for node, why in self.left)]
        if self.sensitivity is not None:
            lines += ["", "each group cut alone, the most sensitive first:", str(self.sensitivity)]
        return "\n".join(lines)

    def plot(self) -> str:
        """A bar for each weighted layer with channels: what stays of its outputs."""
        bars = [(b.path, b.outputs, a.outputs) for b, a in self.pairs() if b.kind in WEIGHTED and b.kind != "matmul" and b.outputs]
        wide = max((len(path) for path, _, _ in bars), default=0)
        return "\n".join(f"{path:<{wide}} {_bar(after / before)} {after} of {before}" for path, before, after in bars)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; ``kept`` holds the indices of the units that stay."""
        sums = [{k: getattr(c, k) for k in ("macs", "parameters", "bytes")} for c in self.totals()]
        return {
            "before": [asdict(c) for c in self.before],
            "after": [asdict(c) for c in self.after],
            "totals": {"before": sums[0], "after": sums[1]},
            "groups": [
                {"name": g.name, "unit": g.unit, "members": list(g.members), "before": g.before, "after": g.after, "kept": np.flatnonzero(g.kept).tolist()}
                for g in self.groups
            ],
            "left": [{"node": node, "why": why} for node, why in self.left],
            "absorbed": self.absorbed,
            "sensitivity": None if self.sensitivity is None else self.sensitivity.to_json(),
        }

    def to_html(self) -> str:
        """A fragment without scripts, links and style sheets: totals, bars of kept channels, tables."""
        before, after = self.totals()
        head = ", ".join(f"{name} {_short(b)} → {_short(a)} ({_share(b, a)})" for name, b, a in _compared(before, after))
        parts = ['<section class="fxq-pruning">', "<h2>Pruning</h2>", f"<p>{head}</p>", self._svg()]
        parts.append(_html_table(_HEAD, [*(_layer(b, a) for b, a in self.pairs()), ["total", "", *_costs(before, after)]]))
        parts += ["<h3>Groups</h3>", self._html_groups()]
        if self.absorbed:
            parts.append(f"<p>The constants of {self.absorbed} cut channels went into the next layer's bias.</p>")
        if self.left:
            parts += ["<h3>Left whole</h3>", "<ul>", *(f"<li><code>{html.escape(n)}</code>: {html.escape(why)}</li>" for n, why in self.left), "</ul>"]
        if self.sensitivity is not None:
            parts += ["<h3>Each group cut alone</h3>", self.sensitivity.to_html()]
        return "\n".join([*parts, "</section>"])

    def _repr_html_(self) -> str:
        return self.to_html()

    def _svg(self) -> str:
        """Bars of all weighted layers, as wide as their channels."""
        bars = [(b.path, b.outputs, a.outputs) for b, a in self.pairs() if b.kind in WEIGHTED and b.kind != "matmul" and b.outputs]
        widest, names = max((b for _, b, _ in bars), default=1), 7 * max((len(p) for p, _, _ in bars), default=0) + 10
        lines = [f'<svg role="img" width="{names + 500}" height="{16 * len(bars) + 4}" font-family="monospace" font-size="11" fill="currentColor">']
        for i, (path, before, after) in enumerate(bars):
            y, whole, stays = 16 * i + 2, 400 * before / widest, 400 * after / widest
            lines.append(f'<text x="0" y="{y + 10}">{html.escape(path)}</text>')
            lines.append(f'<rect x="{names}" y="{y}" width="{whole:.1f}" height="12" fill-opacity=".15"/>')
            lines.append(f'<rect x="{names}" y="{y}" width="{stays:.1f}" height="12" fill="#2a78b8"><title>{after} of {before} channels</title></rect>')
            lines.append(f'<text x="{names + whole + 5:.1f}" y="{y + 10}">{after} of {before}</text>')
        return "\n".join([*lines, "</svg>"])

    def _html_groups(self) -> str:
        rows = [f"<tr><td>{html.escape(g.name)}</td><td {_CELL}>{_stay(g)}</td><td>{_strip(g)}</td><td>{_joined(g.members)}</td></tr>" for g in self.groups]
        return "\n".join(["<table>", "<tr><th>group</th><th>stay</th><th>which</th><th>members</th></tr>", *rows, "</table>"])


_HEAD = ["layer", "channels", "MACs", "left", "parameters", "left", "bytes", "left"]


def _compared(before: LayerCost, after: LayerCost) -> list[tuple[str, int, int]]:
    return [("MACs", before.macs, after.macs), ("parameters", before.parameters, after.parameters), ("bytes", before.bytes, after.bytes)]


def _layer(before: LayerCost, after: LayerCost) -> list[str]:
    return [before.path, f"{before.inputs}x{before.outputs} -> {after.inputs}x{after.outputs}", *_costs(before, after)]


def _costs(before: LayerCost, after: LayerCost) -> list[str]:
    return [cell for _, b, a in _compared(before, after) for cell in (f"{_short(b)} -> {_short(a)}", _share(b, a))]


def _short(n: float) -> str:
    """Three digits and a decimal unit: ``1.81 G``."""
    for size, unit in _UNITS:
        if n >= size:
            value = n / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{n:g}"


def _share(before: float, after: float) -> str:
    return "-" if not before else f"{after / before:.1%}"


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def _stay(g: GroupCut) -> str:
    noun, blank, rest = g.unit.partition(" ")
    return f"{g.after} of {g.before} {noun}{'' if g.before == 1 else 's'}{blank}{rest}"


def _bar(share: float) -> str:
    """``WIDTH`` characters, filled in eighths."""
    eighths = round(share * WIDTH * 8)
    full, part = divmod(eighths, 8)
    text = "█" * full + (_EIGHTHS[part] if part else "")
    return text + "░" * (WIDTH - len(text))


def _strip(g: GroupCut) -> str:
    """The units that stay as one path of runs, a pixel a unit, at most 256 pixels wide."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], g.kept, [False]]).astype(np.int8))).reshape(-1, 2)
    path = "".join(f"M{a} 0h{b - a}v1h{a - b}z" for a, b in edges.tolist())
    return (
        f'<svg width="{min(g.before, 256)}" height="10" viewBox="0 0 {g.before} 1" preserveAspectRatio="none">'
        f'<rect width="{g.before}" height="1" fill="currentColor" fill-opacity=".15"/><path d="{path}" fill="#2a78b8"/></svg>'
    )


def _joined(names: Sequence[str]) -> str:
    return ", ".join(html.escape(n) for n in names)


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column and the last, when it is text, to the left, the others to the right."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    text = head[-1] == "members"
    lines = []
    for row in (head, *rows):
        cells = [c.ljust(w) if i == 0 or text and i == len(row) - 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["<table>", "<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    for row in rows:
        lines.append(f"<tr><td>{html.escape(row[0])}</td>" + "".join(f"<td {_CELL}>{html.escape(c)}</td>" for c in row[1:]) + "</tr>")
    return "\n".join([*lines, "</table>"])
