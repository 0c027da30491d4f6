"""Overview charts as SVG, drawn by matplotlib; colours are the page's own variables, so that they follow its theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fxq.errors import FxqError

INK, FAINT, INT, FLOAT, CUT = "#010203", "#020304", "#030405", "#040506", "#050607"
"""Stand for the page's variables: no other colour of a chart is so dark and so close to them."""
VARIABLES = {INK: "var(--muted)", FAINT: "var(--line)", INT: "var(--int)", FLOAT: "var(--float)", CUT: "var(--bad)"}
WIDTH = 11.0
"""Inches."""


def cost_chart(layers: Sequence[Mapping[str, Any]]) -> str:
    """Two rows of bars in the order of the graph: multiply-accumulates and bytes of each layer; integer and float in two colours."""
    figure = _figure(3.4)
    colours = [FLOAT if layer["runs"] == "float" else INT for layer in layers]
    for i, (key, label, unit) in enumerate((("macs", "MACs", 1e6), ("bytes", "bytes", 1e3))):
        axes = figure.add_subplot(2, 1, i + 1)
        axes.bar(range(len(layers)), [layer[key] / unit for layer in layers], color=colours, width=0.8, linewidth=0)
        _tidy(axes, f"{label}, {'millions' if unit == 1e6 else 'kB'}", len(layers))
    axes.set_xlabel("layers in the order of the graph", color=INK, fontsize=8)
    return _svg(figure, "costs")


def clipping_chart(grids: Sequence[Mapping[str, Any]]) -> str:
    """Two rows of bars, a place a grid in the order of the graph: the share of the values that it cuts off, and the SQNR of rounding onto it."""
    figure = _figure(3.4)
    shares = [100 * (g["below"] + g["above"]) / max(1, g["n"]) for g in grids]
    top = max([float(g["sqnr"]) for g in grids if g["sqnr"] != "inf"], default=1.0)
    decibels = [top if g["sqnr"] == "inf" else float(g["sqnr"]) for g in grids]
    colours = [FAINT if g["sqnr"] == "inf" else INT for g in grids]
    for i, (values, label, colour) in enumerate(((shares, "clipped, %", CUT), (decibels, "SQNR of rounding, dB (grey: exact)", colours))):
        axes = figure.add_subplot(2, 1, i + 1)
        axes.bar(range(len(values)), values, color=colour, width=0.8, linewidth=0)
        _tidy(axes, label, len(values))
        axes.set_ylim(bottom=0, top=max([*values, 0.0]) * 1.05 or 1.0)
    axes.set_xlabel("grids in the order of the graph", color=INK, fontsize=8)
    return _svg(figure, "clipping")


def _figure(height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise FxqError("the package matplotlib is not installed, which draws the report's charts", way_out="pip install fxq[report]") from e
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _tidy(axes: Any, label: str, count: int) -> None:
    """Two thin axes, a light grid behind the bars, small type."""
    axes.set_title(label, color=INK, fontsize=9, loc="left", parse_math=False)
    axes.set_xlim(-0.8, max(count, 1) - 0.2)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_edgecolor(FAINT)


def _svg(figure: Any, name: str) -> str:
    """The figure's SVG element: text as text, the same bytes for the same numbers, ``name`` in front of its identifiers."""
    import matplotlib

    figure.patch.set_visible(False)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue()[out.getvalue().index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", text)
