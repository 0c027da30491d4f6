"""Check of the passes behind ``convert``: what they corrected must be better on data than it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.audit import Finding
from fxq.layerwise import channel_mean
from fxq.toggles import OFF, Toggles
from fxq.values import watch

WORSE, NOTABLE = 1.5, 0.05
"""A correction is a fault when it leaves so many times the mean error that was there, and that is this share of the layer's output
(root mean square: the mean itself may be next to nothing)."""


def bias_findings(before: GraphModule, after: GraphModule, floats: Toggles, step: str, batches: Sequence[tuple[Any, ...]]) -> list[Finding]:
    """The first layer whose mean error over channels grew by the correction; those behind it see its error.

    Args:
        before: the graph as ``convert`` left it. after: as the pass left it. floats: switches on ``before``.
        step: the pass. batches: positional inputs.
    """
    floats.set(OFF)
    names = list(floats.layers)
    (truth, sizes), (old, _), (new, _) = (_means(gm, floats, names, batches) for gm in (floats.gm, before, after))
    found = []
    for name in names:
        size = float(sizes[name].sum().sqrt()) or 1.0
        was, now = float((old[name] - truth[name]).norm()) / size, float((new[name] - truth[name]).norm()) / size
        if now > WORSE * was and now > NOTABLE:
            fact = f"the mean error of its channels went from {was:.1%} to {now:.1%} of the output's size"
            found.append(Finding(step, name, floats.paths[name], "corrected the wrong way", fact, True, (name,)))
    return found[:1]


def _means(gm: GraphModule, t: Toggles, names: list[str], batches: Sequence[tuple[Any, ...]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean, and mean square, of each layer's output for each channel, over all batches, float64."""
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def look(node: Node, value: Any) -> None:
        if node.name in names:
            for into, v in ((sums, value), (squares, value.square())):
                mean = channel_mean(t.layers[node.name].made.op, v) / len(batches)
                into[node.name] = into.get(node.name, torch.zeros_like(mean)) + mean

    for batch in batches:
        watch(gm, batch, look)
    return sums, squares
