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

from fxq.errors import FxqError
from fxq.graph import module_of
from fxq.snapshot import flat
from fxq.weight_masks import magnitude_masks

GRID = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Shares that are measured; between them the error is taken as linear."""
WORST = 1e30
"""Error of an output that is no longer finite."""


def with_weight(op: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of a layer with another weight; the rest is the same objects."""
    new: Any = copy.copy(op)
    new._parameters = dict(new._parameters)
    new.weight = nn.Parameter(weight)
    return new  # type: ignore[no-any-return]


def _output(gm: GraphModule, example: tuple[Any, ...]) -> Tensor:
    """All floating outputs as one vector, float64."""
    found = [t.double().reshape(-1) for t in flat(gm(*example)) if t.is_floating_point()]
    if not found:
        raise FxqError("the model has no floating output whose error could be measured", way_out="Use sparsity_scope='global' or 'layer'")
    return torch.cat(found)


def measured(gm: GraphModule, layers: Sequence[Sequence[Node]], magnitudes: Sequence[Tensor], example: tuple[Any, ...]) -> list[list[float]]:
    """Relative squared error of the output when one weight alone is cut by each share of :data:`GRID`: ``[layers][shares]``.

    Values that are infinite without a cut (masked scores) do not count.

    Args:
        layers: nodes that use one weight, for each weight. magnitudes: of the weights.

    Raises:
        FxqError: without a floating output.
    """
    training = gm.training
    gm.eval()
    with torch.inference_mode():
        want = _output(gm, example)
        counts = want.isfinite()
        size = float(want[counts].square().sum()) or 1.0
        found = []
        for nodes, magnitude in zip(layers, magnitudes, strict=True):
            ops = {str(n.target): module_of(gm, n) for n in nodes}
            row = []
            for share in GRID:
                mask = magnitude_masks([magnitude], share)[0]
                try:
                    for path, op in ops.items():
                        gm.set_submodule(path, with_weight(op, op.weight.detach().masked_fill(~mask, 0.0)))  # type: ignore[operator]
                    error = float((_output(gm, example) - want)[counts].square().sum()) / size
                finally:
                    for path, op in ops.items():
                        gm.set_submodule(path, op)
                row.append(error if math.isfinite(error) else WORST)
            found.append(row)
    gm.train(training)
    return found


def levels(errors: Sequence[Sequence[float]], sizes: Sequence[int], ratio: float, keep: float = 0.01) -> list[float]:
    """Shares of the layers whose sum of errors is least while ``ratio`` of all weights are cut.

    The errors are made convex (the best a mixture of shares reaches), so that the greatest number of weights for the least error is taken step by step.

    Args:
        errors: ``[layers][len(GRID)]``, as :func:`measured` gives. sizes: weights of each layer.
        keep: share of each layer that stays in any case, but less where ``ratio`` asks for it.

    Returns:
        A share in [0, 1) for each layer; together they cut ``floor(ratio * sum(sizes))`` weights, within one a layer.

    Raises:
        FxqError: when one weight of each layer stays and still less would be cut.
    """
    steps: list[tuple[float, int, float]] = []
    keep = min(keep, (1 - ratio) / 2)
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
    if left >= 1:
        raise FxqError(f"ratio {ratio} leaves less than a weight for each of {len(sizes)} layers", way_out="Give a smaller ratio")
    return shares
