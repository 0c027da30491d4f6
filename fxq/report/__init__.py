"""The HTML report of a compilation: one file for eyes, without network, opened from disk.

:func:`render` gives its bytes; :meth:`fxq.compiled.CompiledModel.report` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxq.report import charts, facts, states, tensors
from fxq.report.page import page
from fxq.schemes import Scheme
from fxq.snapshot import History
from fxq.targets import Target

__all__ = ["BATCHES", "Section", "render"]

BATCHES = 8
"""At most so many batches of the user's data are looked at."""
NO_DATA = "Activations are not shown: there was neither data= nor an example input. Call m.report(path, data) with a few batches."


@dataclass(frozen=True)
class Section:
    """One graph of a model: the whole one, or a part of one that was captured in parts.

    Attributes:
        name: module path of the part; empty for the whole model.
        gm: the compiled graph.
        history: its passes.
    """

    name: str
    gm: GraphModule
    history: History


def render(
    sections: Sequence[Section],
    runs: Iterable[tuple[nn.Module, Sequence[tuple[Any, ...]]]],
    *,
    title: str,
    scheme: Scheme,
    target: Target,
    proof: Any = None,
    command: str | None = None,
    sensitivity: Iterable[tuple[str, str, float, float]] | None = None,
    bisect: Any = None,
    notes: Sequence[str] = (),
    extra: str = "",
    made: str = "",
) -> bytes:
    """The report as the bytes of an HTML file.

    Args:
        sections: the graphs.
        runs: what to run for the histograms of activations: a module that holds one or more of the graphs, in eval mode, and batches of its inputs.
        title: the model's name.
        scheme, target: what it was compiled for.
        proof: result of ``verify`` (``ok``, and words by ``str``), or ``None``.
        command: the command line that made it.
        sensitivity: rows ``(name, what, dB when it alone is quantized, dB when all but it are)``, ranked here by the first number; what has ``rows`` with
            ``drop_alone`` and ``drop_without`` shows how much the metric ``metric`` loses, too.
        bisect: a verdict: its lines, or what gives them by ``str``.
        notes: how the model was captured, what it is specialised to.
        extra: a finished HTML fragment (what pruning did).
        made: when it was made.

    Returns:
        The same bytes for the same arguments.

    Raises:
        FxqError: when a package of the extra ``report`` is not installed.
    """
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    graphs = [(s.name, s.gm) for s in sections]
    for module, batches in runs:
        seen |= tensors.activations(module, [(n, gm) for n, gm in graphs if any(m is gm for m in module.modules())], batches)
    parts = [_section(s, {node: h for (name, node), h in seen.items() if name == s.name}) for s in sections]
    about = {"scheme": f"{scheme.name}: {scheme.summary}", "target": f"{target.name}: {target.summary}"}
    data = {
        "title": title, "scheme": scheme.name, "target": target.name, "about": {**about, "command": command or "", "versions": facts.versions()},
        "notes": list(notes), "sections": parts, "proof": None if proof is None else {"ok": bool(proof.ok), "text": str(proof)},
        "sensitivity": None if sensitivity is None else _sensitivity(sensitivity),
        "bisect": None if bisect is None else [str(line) for line in bisect] if isinstance(bisect, (list, tuple)) else str(bisect).splitlines(),
    }  # fmt: skip
    return page(data, made=made, extra=extra)


def _sensitivity(given: Iterable[tuple[str, str, float, float]]) -> dict[str, Any]:
    """Rows with the two drops of the metric behind them, the most sensitive first; NaN before all."""
    drops = [(getattr(r, "drop_alone", None), getattr(r, "drop_without", None)) for r in getattr(given, "rows", ())]
    rows = [(*r, *d) for r, d in zip_longest(given, drops, fillvalue=(None, None))]
    rows.sort(key=lambda r: -math.inf if math.isnan(r[2]) else r[2])
    shown = [[name, what, *map(states.number, numbers)] for name, what, *numbers in rows]
    return {"rows": shown, "metric": str(getattr(given, "metric", None) or "")}


def _section(s: Section, activations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything of one graph as plain data."""
    weights = tensors.weights(s.gm)
    layers = facts.layers(s.gm, weights)
    order = {n.name: i for i, n in enumerate(s.gm.graph.nodes)}
    grids = sorted((g for g in activations.items() if "grid" in g[1]), key=lambda g: order[g[0]])
    drawn = {"costs": charts.cost_chart(layers) if layers else "", "clipping": charts.clipping_chart([g for _, g in grids]) if grids else ""}
    return {
        "name": s.name, **states.history_json(s.history), "weights": weights, "activations": activations, "layers": layers,
        "float_bytes": facts.float_bytes(s.gm), "charts": drawn, "note": "" if activations else NO_DATA,
    }  # fmt: skip
