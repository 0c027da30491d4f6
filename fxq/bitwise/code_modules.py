"""Modules of a lowered graph that compute on codes and floats: what has no kernel on bits, and the ways onto grids and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxq import kernels, numerics
from fxq.bitwise import ops
from fxq.bitwise.pools import Pool
from fxq.kernels import Codes
from fxq.modules import Quantized, call_with
from fxq.spec import QParams

EXACT = 1 << 24
"""Up to here float32 holds every integer."""


class CodeMaxPool(Pool):
    """``MaxPool2d`` of 8-bit codes."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.code_max_pool(x, *self.window, self.ceil_mode)
        return out


class FloatMaxPool(Pool):
    """``MaxPool2d`` of float32 values whose readers want them channels last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            x = x.to(torch.float32)
        out: Tensor = ops.float_max_pool(x, *self.window, self.ceil_mode)
        return out


class Quantize(nn.Module):
    """Codes of float values, behind a ReLU if ``relu``; of four dimensions they lie in memory channels last."""

    def __init__(self, qp: QParams, relu: bool = False) -> None:
        super().__init__()
        self.grid = qp
        self.plain = qp.spec.kind in ("affine", "ternary") and qp.spec.bits <= 8 and qp.scale.ndim == 0
        self.step = float(qp.scale) if self.plain else 0.0
        self.relu = relu and not (self.plain and int(qp.zero_point) == qp.spec.qmin)
        self.zero = int(qp.zero_point) if self.plain else 0

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu() if self.relu else x
        spec = self.grid.spec
        if self.plain:
            out: Tensor = ops.quantize(x.to(torch.float32), self.step, self.zero, spec.qmin, spec.qmax)
            return out
        codes = numerics.quantize(x, self.grid)
        return codes.contiguous(memory_format=torch.channels_last) if codes.ndim == 4 else codes

    def extra_repr(self) -> str:
        return f"{self.grid}{', behind a ReLU' if self.relu else ''}"


class Real(nn.Module):
    """Real values of codes, float32, in torch's own order in memory."""

    values: Tensor | None

    def __init__(self, qp: QParams) -> None:
        super().__init__()
        self.grid = qp
        is_table = qp.spec.dtype in (torch.uint8, torch.int8) and qp.scale.ndim == 0
        bytes_ = torch.arange(256, dtype=torch.uint8)
        self.register_buffer("values", numerics.dequantize(bytes_.view(qp.spec.dtype), qp) if is_table else None)

    def forward(self, codes: Tensor) -> Tensor:
        if self.values is None or codes.ndim != 4:
            return numerics.dequantize(codes, self.grid).contiguous()
        out: Tensor = ops.code_real(codes, self.values)
        return out

    def extra_repr(self) -> str:
        return str(self.grid)


class CodeTable(nn.Module):
    """A pointwise function of 8-bit codes: ``values[code & 255]``.

    Args:
        codes: results, for the codes from ``first`` on.
    """

    values: Tensor

    def __init__(self, codes: Tensor, first: int) -> None:
        super().__init__()
        values = torch.zeros(256, dtype=codes.dtype)
        values[torch.arange(first, first + len(codes)) % 256] = codes
        self.register_buffer("values", values)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.code_table(x.view(torch.uint8), self.values.view(torch.uint8)).view(self.values.dtype)
        return out


class CodesOp(nn.Module):
    """An integer step that has no kernel of its own, word for word as the reference runs it.

    Args:
        kind: of the step. module: what it reads its constants from. inputs: grids of its operands, a number for a constant.
        out: the grid that it rounds to, or ``None`` for float output. rank: of its result. index: of a part of a split.
    """

    def __init__(self, kind: str, module: nn.Module, inputs: Sequence[QParams | float], out: QParams | None, rank: int, index: int = 0) -> None:
        super().__init__()
        self.kind, self.module, self.rank, self.index = kind, module, rank, index
        self.inputs, self.out = list(inputs), out

    def forward(self, *codes: Tensor) -> Tensor:
        given = iter(codes)
        xs = [Codes(next(given), grid) if isinstance(grid, QParams) else self._constant(grid) for grid in self.inputs]
        if self.out is None:
            return kernels.float_output(self.module, xs)
        if self.kind == "requantize":
            return xs[0].onto(self.out)
        if self.kind == "split":
            return kernels.part(self.module, self.index, xs[0], self.out)
        return kernels.KERNELS[self.kind](self.module, xs, self.out)

    def _constant(self, value: float) -> Codes:
        assert self.out is not None
        return kernels.constant(value, self.out, self.rank if self.kind in kernels.BINARY else 0)

    def extra_repr(self) -> str:
        return f"{self.kind}, {', '.join(map(str, self.inputs))} -> {'float' if self.out is None else self.out}"


class CodeAdd(nn.Module):
    """The integer add of two uint8 operands of one shape.

    Args:
        exact: the same step as the reference runs it, for the shapes (one element an image) that the runtime adds in another order.
        a, b, out: grids whose least code is 0.
    """

    def __init__(self, exact: CodesOp, a: QParams, b: QParams, out: QParams) -> None:
        super().__init__()
        self.exact = exact
        ra, rb, fixed = kernels.add_constants(numerics.in_bytes(a), numerics.in_bytes(b), numerics.in_bytes(out))
        self.ra, self.rb, self.fixed, self.most = float(ra), float(rb), float(fixed), out.spec.qmax

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape or a.shape[1:].numel() == 1:
            return self.exact(a, b)  # type: ignore[no-any-return]
        out: Tensor = ops.code_add(a, b, self.ra, self.rb, self.fixed, self.most)
        return out


class GlobalPool(nn.Module):
    """The mean over all places of 8-bit codes ``[B, C, *spatial]`` (:func:`fxq.kernels.global_avg_pool`)."""

    scale: Tensor
    unit: Tensor

    def __init__(self, exact: CodesOp, qp: QParams, out: QParams) -> None:
        super().__init__()
        self.most = max(-qp.spec.qmin, qp.spec.qmax)
        self.exact, self.zero, self.spec, self.out_zero = exact, int(qp.zero_point), out.spec, int(out.zero_point)
        self.register_buffer("scale", qp.scale.detach().clone())
        self.register_buffer("unit", out.scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        count = math.prod(x.shape[2:])
        if count * self.most >= EXACT:
            return self.exact(x)  # type: ignore[no-any-return]
        total = x.movedim(1, -1).flatten(1, -2).to(torch.float32).sum(1).sub_(count * self.zero).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        return numerics.requantized(total, self.scale / (self.unit * count), self.spec, self.out_zero)


class Mover(nn.Module):
    """What only moves codes of one grid: reshapes, permutes, slices, gathers, pads, splits, concatenations, resizes.

    Args:
        module: the float module. floats: it takes floats only. fill: code that a padding writes. index: of a part of a split.
    """

    def __init__(self, module: nn.Module, floats: bool = False, fill: int | None = None, index: int | None = None) -> None:
        super().__init__()
        self.module, self.floats, self.index = module, floats, index
        if fill is not None:
            module.value = float(fill)  # type: ignore[assignment]

    def forward(self, *xs: Tensor) -> Tensor:
        y = self.module(*(x.to(torch.float32) for x in xs)).to(xs[0].dtype) if self.floats else self.module(*xs)
        return y if self.index is None else y[self.index]  # type: ignore[no-any-return]


class IntegerLayer(nn.Module):
    """A conv or linear layer on codes of 8 bits or less by float32 sums, all of whose parts are exact integers.

    Its weights are held as float32 integers. Where a sum can pass 2^24, the codes are taken in two halves of 4 bits; the sums are joined as integers.

    Attributes:
        parts: 1, or 2 for halves.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor

    def __init__(self, module: Quantized, x: QParams, out: QParams | None, parts: int) -> None:
        super().__init__()
        wq = module.weight_grid.qparams
        codes = module.weight_codes().to(torch.float32)
        weight = codes - numerics.along(wq.zero_point.to(torch.float32), wq.spec.axis, codes.ndim)
        self.op = copy.copy(module.op)
        self.op.__dict__["_parameters"] = {}
        self.op.__dict__["_buffers"] = {}
        self.linear = isinstance(module.op, nn.Linear)
        shape = [-1] if self.linear else [-1, *[1] * (codes.ndim - 2)]
        bias = module.bias_codes()
        bias = torch.zeros(len(codes), dtype=torch.int32) if bias is None else bias
        scale = (x.scale * wq.scale).detach().expand(len(codes))
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight)
        self.register_buffer("bias", bias.to(torch.int64).reshape(shape))
        self.plain = out is not None and out.spec.kind in ("affine", "ternary") and out.scale.ndim == 0
        self.register_buffer("scale", (scale / out.scale if out is not None and self.plain else scale.clone()).reshape(shape))
        self.out_zero = int(out.zero_point) if out is not None and self.plain else 0
        self.zero, self.out, self.parts = int(x.zero_point), out, parts

    def forward(self, x: Tensor) -> Tensor:
        centred = x.to(torch.float32).sub_(self.zero)
        if self.parts == 1:
            acc = self._sums(centred).to(torch.int64)
        else:
            high = torch.floor(centred / 16)
            acc = 16 * self._sums(high).to(torch.int64) + self._sums(centred.sub_(16 * high)).to(torch.int64)
        acc = acc + self.bias
        if self.out is None:
            return acc.to(torch.float32) * self.scale
        return numerics.requantized(acc, self.scale, self.out.spec, self.out_zero) if self.plain else kernels.requantized(acc, self.scale, self.out)

    def _sums(self, x: Tensor) -> Tensor:
        return call_with(self.op, x, self.weight, None)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)} -> {'float' if self.out is None else self.out}"


def parts_of(module: nn.Module, x: QParams) -> int | None:
    """How many parts :class:`IntegerLayer` needs; ``None``: it cannot hold the layer.

    Args:
        module: conv or linear layer. x: grid of its input.
    """
    if not isinstance(module, Quantized) or isinstance(module.op, nn.modules.conv._ConvTransposeNd):
        return None
    if x.spec.bits > 8 or x.scale.ndim or x.spec.kind == "float8":
        return None
    wq = module.weight_grid.qparams
    if wq.spec.block is not None or wq.spec.axis not in (None, 0) or wq.spec.kind == "float8":
        return None
    codes = module.weight_codes().to(torch.float64)
    sums = (codes - numerics.along(wq.zero_point.to(torch.float64), wq.spec.axis, codes.ndim)).abs().flatten(1).sum(1)
    bias = module.bias_codes()
    zero = int(x.zero_point)
    top = max(abs(x.spec.qmin - zero), abs(x.spec.qmax - zero))
    most = float(sums.max()) if len(sums) else 0.0
    if most * top + (0.0 if bias is None else float(bias.abs().max())) >= kernels.INT32:
        return None  # the reference may refuse it
    if most * top < EXACT:
        return 1
    return 2 if most * 16 < EXACT else None
