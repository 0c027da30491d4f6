"""How sparse each layer may get: shares that cut the same number of weights and move the output least, by what each layer does to it alone.

Source of the idea: Han et al. 2015 (arXiv 1506.02626), section 3.1 and figure 6, sensitivity to pruning layer by layer; here the shares follow from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.graph import module_of
from fxq.snapshot import flat
from fxq.weight_masks import magnitude_masks

GRID = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Shares that are measured; between them the error is taken as linear."""


def with_weight(op: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of a layer with another weight; the rest is the same objects."""
    new: Any = copy.copy(op)
    new._parameters = dict(new._parameters)
    new.weight = nn.Parameter(weight)
    return new  # type: ignore[no-any-return]


def _output(gm: GraphModule, example: tuple[Any, ...]) -> Tensor:
    """All floating outputs as one vector, float64."""
    return torch.cat([t.double().reshape(-1) for t in flat(gm(*example)) if t.is_floating_point()])


def measured(gm: GraphModule, layers: Sequence[Node], magnitudes: Sequence[Tensor], example: tuple[Any, ...]) -> list[list[float]]:
    """Relative squared error of the output when one layer alone is cut by each share of :data:`GRID`: ``[layers][shares]``."""
    training = gm.training
    gm.eval()
    with torch.inference_mode():
        want = _output(gm, example)
        size = float(want.square().sum()) or 1.0
        found = []
        for node, magnitude in zip(layers, magnitudes, strict=True):
            parent, _, name = str(node.target).rpartition(".")
            holder, op = gm.get_submodule(parent), module_of(gm, node)
            row = []
            for share in GRID:
                mask = magnitude_masks([magnitude], share)[0]
                setattr(holder, name, with_weight(op, op.weight.detach().masked_fill(~mask, 0.0)))  # type: ignore[operator]
                try:
                    row.append(float((_output(gm, example) - want).square().sum()) / size)
                finally:
                    setattr(holder, name, op)
            found.append(row)
    gm.train(training)
    return found


def levels(errors: Sequence[Sequence[float]], sizes: Sequence[int], ratio: float, keep: float = 0.01) -> list[float]:
    """Shares of the layers whose sum of errors is least while ``ratio`` of all weights are cut.

    The errors are made convex (the best a mixture of shares reaches), so that the greatest number of weights for the least error is taken step by step.

    Args:
        errors: ``[layers][len(GRID)]``, as :func:`measured` gives. sizes: weights of each layer. keep: share of each layer that stays in any case.

    Returns:
        A share in [0, 1) for each layer; together they cut ``floor(ratio * sum(sizes))`` weights, within one a layer.
    """
    steps: list[tuple[float, int, float]] = []
    for i, row in enumerate(errors):
        top = 1 - max(keep, 1 / sizes[i])
        points = [(0.0, 0.0), *((s, e) for s, e in zip(GRID, row, strict=True) if s < top)]
        last = points[-1]
        points.append((top, max(last[1], 0.0) + (row[-1] + 1.0) * (top - last[0])))
        hull: list[tuple[float, float]] = []
        for p in points:
            while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (p[0] - hull[-2][0]) >= (p[1] - hull[-2][1]) * (hull[-1][0] - hull[-2][0]):
                hull.pop()
            hull.append(p)
        steps += [((b[1] - a[1]) / ((b[0] - a[0]) * sizes[i]), i, b[0] - a[0]) for a, b in pairwise(hull) if b[0] > a[0]]
    left, shares = float(math.floor(ratio * sum(sizes))), [0.0] * len(sizes)
    for _, i, width in sorted(steps):
        taken = min(width, left / sizes[i])
        shares[i] += taken
        left -= taken * sizes[i]
        if left <= 0:
            break
    return shares
