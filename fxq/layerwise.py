"""Float and rounded forward side by side, layer by layer: what the reconstruction passes after ``convert`` measure on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxq import numerics
from fxq.graph import data_inputs, grids, module_of
from fxq.modules import FakeQuantize, Quantized

Pair = tuple[Any, Any]
Before = Callable[[Node, list[Pair]], None]
After = Callable[[Node, list[Pair]], bool]


class Sides(Interpreter):
    """Runs a converted graph on several batches at once; each value is a list of ``(float, rounded)``, one pair a batch.

    The float side uses the float weights and does not round; an absorbed clamp clamps. Both callbacks may swap the node's module: the
    rounded side of all later layers then sees the new one, the float side keeps the layer as it was.

    Args:
        gm: a converted graph.
        batches: tuples of positional inputs. All of them, and what the graph still needs of them, are in memory at the same time.
        before: ``before(node, inputs)``, called for every :class:`~fxq.modules.Quantized` layer before it runs.
        after: ``after(node, outputs)``, called behind it; True when it swapped the module (the rounded side then runs again).
    """

    def __init__(self, gm: GraphModule, batches: Sequence[tuple[Any, ...]], *, before: Before | None = None, after: After) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.gm, self.batches, self.before, self.after = gm, batches, before, after

    def sweep(self) -> None:
        """One run over all layers, in inference mode."""
        with torch.inference_mode():
            self.run(*([(v, v) for v in column] for column in zip(*self.batches, strict=True)))

    def run_node(self, n: Node) -> Any:
        if n.op == "output":
            return None
        if n.op in ("placeholder", "get_attr"):
            value = super().run_node(n)
            return value if n.op == "placeholder" else [(value, value)] * len(self.batches)
        layer, every = module_of(self.gm, n) if n.op == "call_module" else None, range(len(self.batches))
        floats = [self._float(n, layer, b) for b in every]
        if not isinstance(layer, Quantized):
            return [(f, self._call(n, b, 1)) for b, f in enumerate(floats)]
        if self.before is not None:
            self.before(n, self.env[data_inputs(n)[0]])
        out = [(f, self._call(n, b, 1)) for b, f in enumerate(floats)]
        return [(f, self._call(n, b, 1)) for b, f in enumerate(floats)] if self.after(n, out) else out

    def _float(self, n: Node, layer: nn.Module | None, b: int) -> Any:
        if isinstance(layer, Quantized):
            return layer.op(self.env[data_inputs(n)[0]][b][0])
        if isinstance(layer, FakeQuantize):
            value, clamp = self.env[data_inputs(n)[0]][b][0], grids(self.gm)[n.meta["grid"]].clamp
            return value if clamp is None else value.clamp(*clamp)
        return self._call(n, b, 0)

    def _call(self, n: Node, b: int, side: int) -> Any:
        args = torch.fx.node.map_arg(n.args, lambda a: self.env[a][b][side])
        kwargs = torch.fx.node.map_arg(n.kwargs, lambda a: self.env[a][b][side])
        return getattr(self, n.op)(n.target, args, kwargs)


def with_parameters(gm: GraphModule, node: Node, weight: Tensor, bias: Tensor | None, int32_bias: bool) -> Quantized:
    """A new quantized layer on the same weight grid with other parameters; the old one is not changed.

    Args:
        gm, node: a converted graph and the node of a :class:`~fxq.modules.Quantized` layer.
        weight: float32, shape of the layer's.
        bias: float32 ``[C]``, or ``None``.
        int32_bias: the target wants the bias on the grid ``s_a * s_w``.
    """
    old = module_of(gm, node)
    assert isinstance(old, Quantized)
    op: Any = copy.copy(old.op)
    op._parameters = dict(old.op._parameters)
    op.weight = nn.Parameter(weight.detach().clone())
    op.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    grid = old.weight_grid.qparams
    bias_grid = None
    if bias is not None and int32_bias:
        source = grids(gm)[data_inputs(node)[0].meta["grid"]].qparams
        assert source is not None
        bias_grid = numerics.bias_qparams(source, grid)
    return Quantized(op, grid, bias_grid)


def corrected(gm: GraphModule, node: Node, outputs: list[Pair], int32_bias: bool) -> Quantized:
    """A new layer whose bias takes up the mean output error of each channel: ``b += E[float - rounded]``.

    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2 and appendix D (empirical, layer by layer).
    """
    layer = module_of(gm, node)
    assert isinstance(layer, Quantized)
    op: Any = layer.op
    shift = torch.stack([channel_mean(op, f) - channel_mean(op, q) for f, q in outputs])
    weight = torch.tensor([float(len(f)) for f, _ in outputs], dtype=torch.float64, device=shift.device)
    error = (weight[:, None] * shift).sum(0) / weight.sum()
    if op.bias is None:
        return with_parameters(gm, node, op.weight, error.to(torch.float32), int32_bias)
    used = op.bias if layer.bias_grid is None else layer.bias_grid(op.bias)  # the error was measured with the rounded bias
    bias = used.detach().to(torch.float64) + error
    return with_parameters(gm, node, op.weight, bias.to(torch.float32), int32_bias)


def channel_mean(op: nn.Module, y: Tensor) -> Tensor:
    """Mean of a layer's output for each channel, float64 ``[C]``."""
    dims = [d for d in range(y.ndim) if d != (y.ndim - 1 if isinstance(op, nn.Linear) else 1)]
    return y.mean(dims).to(torch.float64)


def why_not(layer: nn.Module, node: Node) -> str | None:
    """Why a layer's parameters cannot be reconstructed; ``None`` when they can."""
    if isinstance(layer, Quantized) and layer.dynamic is None and node.meta.get("integer"):
        return None
    return "it is not a layer with integer weights and activations"


def patches(op: Any, x: Tensor) -> Tensor:
    """What each output position of a conv or linear layer multiplies its weights with: ``[groups, M, K]``, M positions.

    ``K`` runs like ``weight.flatten(1)``. A conv's patches are cut out by a depthwise conv with one-hot weights, so stride,
    padding and dilation are the layer's own.
    """
    if isinstance(op, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    taps = op.weight[0, 0].numel()
    one_hot = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *op.weight.shape[2:])
    cut = copy.copy(op)
    cut.groups = op.in_channels
    out: Tensor = cut._conv_forward(x, one_hot.repeat(op.in_channels, *[1] * (x.ndim - 1)), None)
    return out.reshape(len(x), op.groups, -1, out[0, 0].numel()).permute(1, 0, 3, 2).flatten(1, 2)
