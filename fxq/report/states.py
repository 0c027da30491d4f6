"""The history as compact plain data: rows stored once, a pass as what it changed, one layout for its graph before and after."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

from fxq.report.layout import arrange
from fxq.snapshot import NodeRow, Snapshot

Edit = list[Any]
"""``[first row, number of rows that go, [rows that come]]`` on the list of row numbers before."""

MOST = 4000
"""Nodes of a graph that is still drawn."""


def history_json(history: Iterable[Snapshot]) -> dict[str, Any]:
    """All states of a compilation.

    Returns:
        ``rows``: every distinct node row (the fields of :class:`~fxq.snapshot.NodeRow` in order, ``inputs`` a list);
        ``passes``: name, rewrites, ms, moved, skips, ``edits`` against the state before, ``numbers`` (place in the state ->
        SQNR, cosine, steps, total SQNR, and 1 where they hold for channels put back into their order), ``layout``: which of ``layouts``.
    """
    known: dict[NodeRow, int] = {}
    layouts: dict[tuple[Any, ...], int] = {}
    drawn: list[dict[str, Any]] = []
    passes, before, last = [], list[NodeRow](), list[int]()
    for state in history:
        rows = list(state.rows)
        ids = [known.setdefault(r, len(known)) for r in rows]
        passes.append({
            "name": state.name, "rewrites": state.rewrites, "ms": round(state.ms, 2), "moved": number(state.moved),
            "skips": [[s.node, s.why] for s in state.skips], "edits": edits(last, ids), "numbers": _numbers(rows, state.numbers),
            "layout": _layout(before, rows, layouts, drawn),
        })  # fmt: skip
        before, last = rows, ids
    return {"rows": [_row(r) for r in known], "passes": passes, "layouts": drawn}


def edits(before: Sequence[int], after: Sequence[int]) -> list[Edit]:
    """What turns one list into the other, from the front to the back; places count in ``before``."""
    codes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [[i1, i2 - i1, list(after[j1:j2])] for tag, i1, i2, j1, j2 in codes if tag != "equal"]


def number(value: float | None, digits: int = 6) -> Any:
    """Rounded to so many significant digits; an infinite one as ``inf`` or ``-inf``, NaN as ``nan``: JSON has none of them."""
    if value is None:
        return None
    return float(f"{value:.{digits}g}") if math.isfinite(value) else str(float(value))


def _row(r: NodeRow) -> list[Any]:
    return [list(v) if isinstance(v, tuple) else v for v in astuple(r)]


def _numbers(rows: Sequence[NodeRow], found: Mapping[str, Any]) -> dict[str, list[Any]]:
    made = {}
    for i, r in enumerate(rows):
        m = found.get(r.name)
        if m is not None:
            made[str(i)] = [number(m.sqnr), number(m.cosine), number(m.steps), number(m.total), *([1] if m.reordered else [])]
    return made


def _layout(before: Sequence[NodeRow], after: Sequence[NodeRow], known: dict[tuple[Any, ...], int], drawn: list[dict[str, Any]]) -> int | None:
    """The layout of both states together, so that what stays does not move; ``None`` for a graph that is too large to draw."""
    names = list(dict.fromkeys(r.name for r in (*after, *before)))
    if len(names) > MOST:
        return None
    there = set(names)
    links = dict.fromkeys((source, r.name) for r in (*after, *before) for source in r.inputs if source in there)
    key = (frozenset(names), frozenset(links))
    if key not in known:
        known[key] = len(drawn)
        drawn.append(arrange(names, list(links)).to_json())
    return known[key]
