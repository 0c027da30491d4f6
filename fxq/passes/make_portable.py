"""make-portable: integer weights whose pair sums stay in 16 bits, so that CPUs with and without VNNI give the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.graph import data_inputs, grids, module_of, swap_module, walk
from fxq.modules import WEIGHTED, Quantized
from fxq.pipeline import Pass, PassContext
from fxq.portability_pairs import at_risk, greatest_code, made_safe, paired, unpaired, unsafe
from fxq.spec import QParams


@dataclass(frozen=True)
class MakePortable(Pass):
    """Weights on grids where no sum of two products can leave int16, whatever the input.

    For each output channel (for the whole layer where it has one scale) the scale grows by the factor, out of ``1 + i / steps`` up to 2, that gives the least
    squared error of the weights; pairs that are still too large move to the edge. A factor of 2 alone is the 7-bit grid that other tools take for all weights.
    """

    name: ClassVar[str] = "make-portable"
    requires: ClassVar[tuple[str, ...]] = ("converted",)
    ensures: ClassVar[tuple[str, ...]] = ("converted", "portable")

    steps: int = 8

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        changed = 0
        for node, kind in walk(gm, *WEIGHTED):
            layer = module_of(gm, node)
            if not isinstance(layer, Quantized):
                continue
            if kind == "conv_transpose":
                ctx.skip(node, "the runtime computes transposed convolutions in float")
                continue
            most = greatest_code(gm, node, layer)
            if most is None or not bool(at_risk(layer, most).any()):
                continue
            swap_module(gm, node, self._safe(gm, node, layer, most))
            changed += 1
        return changed

    def _safe(self, gm: GraphModule, node: Node, layer: Quantized, most: int) -> Quantized:
        grid = layer.weight_grid.qparams
        weight: Any = layer.op.weight
        weight = weight.detach()
        rows = at_risk(layer, most).any(1)
        if grid.scale.ndim == 0:
            rows = torch.ones_like(rows)
        part = grid if grid.scale.ndim == 0 else QParams(grid.spec, grid.scale[rows], grid.zero_point[rows])
        factors = [1 + i / self.steps for i in range(self.steps + 1)]
        codes, scale = layer.weight_codes(), grid.scale.clone()
        codes[rows], least = safest(weight[rows], part, most, factors)
        if grid.scale.ndim == 0:
            scale = least
        else:
            scale[rows] = least
        return _with_codes(gm, node, layer, codes, QParams(grid.spec, scale, grid.zero_point))


def safest(weight: Tensor, grid: QParams, most: int, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Safe codes of a weight and the scale with which their squared error is the least, for each channel or for the whole weight.

    Args:
        weight: float32 ``[O, ...]``, O at least 1.
        grid: signed grid of at most 8 bits, per tensor or along axis 0.
        most: greatest activation code.
        factors: by which the scale may grow.

    Returns:
        Codes in the dtype of the grid, shape of ``weight``; scale float32, shape of the grid's.
    """
    spec, zero = grid.spec, grid.zero_point.to(torch.float32).reshape(-1, 1)
    pairs = paired(weight / numerics.along(grid.scale, spec.axis, weight.ndim))
    halves = pairs[..., 0].contiguous(), pairs[..., 1].contiguous()

    def codes(by: Tensor) -> list[Tensor]:
        reals = [(h / by + zero).clamp_(spec.qmin, spec.qmax) for h in halves]
        first, second = (torch.round(r) for r in reals)
        made_safe(first, second, (reals[0], reals[1]), unsafe(first, second, most), most)
        return [first, second]

    def error(by: Tensor) -> Tensor:
        parts = [((c - zero) * by).sub_(h).square_().sum(1) for c, h in zip(codes(by), halves, strict=True)]
        both = parts[0] + parts[1]
        return both if grid.scale.ndim else both.sum()

    tried = torch.tensor(factors, dtype=torch.float32, device=weight.device)
    best = tried[torch.stack([error(f) for f in tried]).argmin(0)]
    found = unpaired(torch.stack(codes(best.reshape(-1, 1)), -1), tuple(weight.shape))
    return found.to(spec.dtype), grid.scale * best


def _with_codes(gm: GraphModule, node: Node, layer: Quantized, codes: Tensor, grid: QParams) -> Quantized:
    """A new layer on ``grid`` with just these codes: weights that round to others are put in the middle of theirs."""
    op: Any = copy.copy(layer.op)
    op._parameters = dict(layer.op._parameters)
    weight = op.weight.detach()
    fits = numerics.quantize(weight, grid) == codes
    op.weight = nn.Parameter(torch.where(fits, weight, numerics.dequantize(codes, grid)))
    bias = None
    if layer.bias_grid is not None:
        source = grids(gm)[data_inputs(node)[0].meta["grid"]].qparams
        assert source is not None
        bias = numerics.bias_qparams(source, grid)
    return Quantized(op, grid, bias, layer.dynamic)
