"""round-weights: round each weight so that the layer's output on calibration data moves least, not the weight itself (no training)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.graph import module_of, swap_module, walk
from fxq.layerwise import Pair, Sides, corrected, patches, why_not, with_parameters
from fxq.modules import WEIGHTED, Quantized
from fxq.pipeline import Pass, PassContext
from fxq.spec import QParams
from fxq.weight_masks import MASKED, mask_of

_NOISE = 1e-6
_BLOCK = 64


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Error-feedback rounding in closed form, layer by layer on the kept calibration batches.

    A layer's columns are rounded one after another, the most active first; each column's error is given on to the columns that are
    still open, by the inverse covariance of the layer's input (Frantar et al. 2022, "GPTQ", arXiv 2210.17323, algorithm 1; the update of
    OBQ, arXiv 2208.11580). The covariance is taken around the mean, because the bias takes up the mean output error afterwards (bias
    correction, Nagel et al. 2019, arXiv 1906.04721, section 4.2). The target is the float layer on the float input; the rounded layer sees
    the rounded input, so the error of the layers before it is made good where a linear map can do that.

    Attributes:
        damping: added to the covariance's diagonal, as a fraction of its mean.
        positions: at least so many output positions (and 16 for each column) make the covariance, while the kept data has them.
    """

    name: ClassVar[str] = "round-weights"
    requires: ClassVar[tuple[str, ...]] = ("converted",)
    ensures: ClassVar[tuple[str, ...]] = ("converted",)

    damping: float = 0.01
    positions: int = 1 << 15

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        todo: set[Node] = set()
        for node, k in walk(gm, *WEIGHTED):
            why = why_not(module_of(gm, node), node)
            if why is None and k == "conv_transpose":
                why = "a transposed conv has no covariance of patches: rounded to nearest, its bias corrected"
            elif why is None:
                todo.add(node)
            if why is not None:
                ctx.skip(node, why)
        if not ctx.kept:
            return 0
        done: list[Node] = []

        def before(node: Node, inputs: list[Pair]) -> None:
            if node in todo:
                swap_module(gm, node, self._rounded(gm, node, inputs, ctx))

        def after(node: Node, outputs: list[Pair]) -> bool:
            if why_not(module_of(gm, node), node) is not None:
                return False
            swap_module(gm, node, corrected(gm, node, outputs, ctx.target.int32_bias))
            done.append(node)
            ctx.progress(self.name, len(done), len(todo))
            return True

        Sides(gm, ctx.kept, before=before, after=after).sweep()
        return len(done)

    def _rounded(self, gm: GraphModule, node: Node, inputs: list[Pair], ctx: PassContext) -> Quantized:
        layer = module_of(gm, node)
        assert isinstance(layer, Quantized)
        op: Any = layer.op
        cov, cross = moments(op, inputs, self.positions)
        if not bool(torch.isfinite(cov).all() & torch.isfinite(cross).all()):
            ctx.skip(node, "its inputs are too large for their moments: the weights are rounded to nearest")
            return layer
        rows = op.weight.detach().to(torch.float64).reshape(len(cov), -1, cov.shape[1])
        diagonal = cov.diagonal(dim1=1, dim2=2)
        kept = mask_of(op, gm.meta.get(MASKED, False))
        stays = None if kept is None else kept.reshape(rows.shape)
        ridge = self.damping * diagonal.mean(1, keepdim=True)
        ridge = torch.where(ridge > 0, ridge, 1.0)
        for _ in range(8):
            damped = cov + torch.diag_embed(ridge.expand_as(diagonal))
            goal = rows + torch.linalg.solve_ex(damped, (rows @ cross).transpose(1, 2))[0].transpose(1, 2)
            weight = feedback(goal, damped, layer.weight_grid.qparams, stays)
            if weight is not None:
                return with_parameters(gm, node, weight.reshape(op.weight.shape).to(torch.float32), op.bias, ctx.target.int32_bias)
            ridge = ridge * 10
        ctx.skip(node, "the moments of its inputs have no inverse: the weights are rounded to nearest")
        return layer


def moments(op: Any, inputs: list[Pair], positions: int) -> tuple[Tensor, Tensor]:
    """Covariance ``[G, K, K]`` of the rounded input's patches, and that of (float - rounded) with them, float64.

    As many whole samples as give ``positions`` (at least 16 K) positions count, evenly taken from each batch.
    """
    one = patches(op, inputs[0][1][:1])
    wanted = -(-max(positions, 16 * one.shape[2]) // one.shape[1])
    have = sum(len(q) for _, q in inputs)
    step = max(1, have // wanted)
    total, sums = 0, [torch.zeros((), dtype=torch.float64, device=one.device)] * 4
    for f, q in inputs:
        for i in range(0, len(q), step):
            a, b = patches(op, q[i : i + 1]), patches(op, f[i : i + 1])
            b = b - a
            total += a.shape[1]
            new = (a.sum(1), b.sum(1), a.transpose(1, 2) @ a, b.transpose(1, 2) @ a)
            sums = [s + v.to(torch.float64) for s, v in zip(sums, new, strict=True)]
    mean, gap, square, cross = (s / total for s in sums)
    # The products are summed in float32: where the inputs hardly vary, what is left of them is noise.
    noise = _NOISE * square.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    square = square + torch.diag_embed(noise.expand(-1, square.shape[1]))
    return square - mean[:, :, None] * mean[:, None, :], cross - gap[:, :, None] * mean[:, None, :]


def feedback(rows: Tensor, cov: Tensor, qp: QParams, kept: Tensor | None = None) -> Tensor | None:
    """Values on the grid for ``rows``, each column's rounding error fed on to the columns after it; ``None`` when ``cov`` has no factors.

    Args:
        rows: float64 ``[G, R, K]``; output channel ``g * R + r`` has the grid of that index.
        cov: positive definite, float64 ``[G, K, K]``.
        qp: grid, per tensor or per channel.
        kept: bool, shape of ``rows``: the others become 0, and that error is fed on too.
    """
    groups, count, columns = rows.shape
    order = cov.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    w = rows.gather(2, order[:, None, :].expand(-1, count, -1)).clone()
    zeros = None if kept is None else ~kept.gather(2, order[:, None, :].expand(-1, count, -1))
    cov = cov.gather(1, order[:, :, None].expand_as(cov)).gather(2, order[:, None, :].expand_as(cov))
    inverse, failed = torch.linalg.inv_ex(cov)
    upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if bool((failed != 0).any() | (info != 0).any()):
        return None
    scale = qp.scale.to(torch.float64).expand(groups * count).reshape(groups, count)
    zero = qp.zero_point.to(torch.float64).expand(groups * count).reshape(groups, count)
    out = torch.empty_like(w)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.zeros_like(w[:, :, start:stop])
        for k in range(start, stop):
            out[:, :, k] = numerics.rounded(w[:, :, k], scale, zero, qp.spec)
            if zeros is not None:
                out[:, :, k].masked_fill_(zeros[:, :, k], 0.0)
            error = (w[:, :, k] - out[:, :, k]) / upper[:, k, k, None]
            w[:, :, k:stop] -= error[:, :, None] * upper[:, k, None, k:stop]
            errors[:, :, k - start] = error
        w[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return torch.empty_like(out).scatter_(2, order[:, None, :].expand(-1, count, -1), out)
