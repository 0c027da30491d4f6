"""Modules of a lowered graph: one kernel each. Weights are packed words and tables in buffers; nothing here is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxq import kernels, numerics
from fxq.bitwise import layers, layout, ops
from fxq.bitwise.layers import BitLayer
from fxq.bitwise.thresholds import Cut
from fxq.kernels import Codes
from fxq.modules import FakeQuantize
from fxq.spec import QParams

MODES = {(True, 0): ops.LINEAR, (False, 1): ops.CONV1D, (False, 2): ops.CONV2D, (True, 2): ops.FLATTEN}


class BitConv(nn.Module):
    """A convolution or linear layer on packed values.

    Attributes:
        words, blocks: buffers, the packed weights (:class:`fxq.bitwise.layout.Layer`).
        table_0, ...: buffers, thresholds or multipliers of its output channels.
        kind: ``binary x ternary``: weights, activations. gives: ``sign``, ``ternary``, ``codes`` or ``float``.
        shape: of the float weight. turned: rows of the weight that a shuffle behind it has moved.
    """

    words: Tensor
    blocks: Tensor

    def __init__(self, layer: BitLayer, end: layers.Epilogue) -> None:
        super().__init__()
        packed = layout.pack_layer(
            layer.weights.numpy(), groups=layer.groups, stride=layer.stride, padding=layer.pads, dilation=layer.dilation
        )
        tables = _tables(packed, end)
        self.register_buffer("words", torch.from_numpy(packed.words.view(np.int64)))
        self.register_buffer("blocks", torch.from_numpy(packed.blocks))
        for i, t in enumerate(ops.tables(tables)):
            self.register_buffer(f"table_{i}", t)
        self.count = len(ops.tables(tables))
        self.geometry = ops.geometry(packed, MODES[layer.linear, layer.rank])
        self.gives, self.numbers = tables.kind, ops.numbers(tables)
        self.kind, self.shape, self.masked = layer.kind, tuple(layer.weights.shape), packed.masked

    def forward(self, x: Tensor) -> Tensor:
        buffers: Any = self._buffers
        tables = [buffers[f"table_{i}"] for i in range(self.count)]
        out: Tensor = ops.bit_conv(x, buffers["words"], buffers["blocks"], self.geometry, self.gives, tables, self.numbers)
        return out

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.words.nbytes

    @property
    def table_bytes(self) -> int:
        """Bytes of everything else that the layer holds."""
        return self.blocks.nbytes + sum(self.get_buffer(f"table_{i}").nbytes for i in range(self.count))

    def extra_repr(self) -> str:
        return f"{self.kind}, {list(self.shape)}, gives {self.gives}"


def _tables(packed: layout.Layer, end: layers.Epilogue) -> layout.Epilogue:
    lo, hi, mult, bias, scale = (None if v is None else v.numpy() for v in (end.lo, end.hi, end.mult, end.bias, end.scale))
    if end.kind == "sign":
        return layout.sign_epilogue(packed, hi)
    if end.kind == "ternary":
        return layout.ternary_epilogue(packed, lo, hi)
    if end.kind == "float":
        return layout.float_epilogue(packed, mult, bias, scale)
    return layout.codes_epilogue(packed, mult, bias, scale, qmin=end.qmin, qmax=end.qmax, zero=end.zero)


class Pack(nn.Module):
    """Bits of float32 values or 8-bit codes by thresholds; channels along ``axis``."""

    def __init__(self, cut: Cut, planes: int, axis: int) -> None:
        super().__init__()
        self.cut, self.planes, self.axis = cut, planes, axis

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.uint8, torch.int8):
            x = x.to(torch.float32)
        out: Tensor = ops.pack(x, self.cut.lo, self.cut.hi, self.planes, self.axis)
        return out

    def extra_repr(self) -> str:
        below = f", x <= {self.cut.lo:.6g}" if self.planes == 2 else ""
        return f"x >= {self.cut.hi:.6g}{below}, axis={self.axis}"


class Unpack(nn.Module):
    """int8 codes of packed values of ``channels``, which come to ``axis``."""

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.channels, self.axis = channels, axis

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.unpack(x, self.channels, self.axis)
        return out

    def extra_repr(self) -> str:
        return f"channels={self.channels}, axis={self.axis}"


class _Pool(nn.Module):
    """Window numbers of a max pool, of rows and columns."""

    def __init__(self, pool: Any, rank: int) -> None:
        super().__init__()
        self.window = [_rows_and_columns(v, rank, fill) for v, fill in ((pool.kernel_size, 1), (pool.stride, 1), (pool.padding, 0), (pool.dilation, 1))]
        self.ceil_mode = bool(pool.ceil_mode)

    def extra_repr(self) -> str:
        k, s, p, d = self.window
        return f"kernel={k}, stride={s}, padding={p}, dilation={d}, ceil_mode={self.ceil_mode}"


def _rows_and_columns(v: Any, rank: int, fill: int) -> list[int]:
    given = [int(i) for i in v] if isinstance(v, Sequence) else [int(v)] * rank
    return [fill] * (2 - rank) + given


class BitMaxPool(_Pool):
    """``MaxPool1d`` or ``MaxPool2d`` of packed values of ``channels``."""

    def __init__(self, pool: Any, rank: int, channels: int) -> None:
        super().__init__(pool, rank)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.bit_max_pool(x, self.channels, *self.window, self.ceil_mode)
        return out


class CodeMaxPool(_Pool):
    """``MaxPool2d`` of 8-bit codes."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.code_max_pool(x, *self.window, self.ceil_mode)
        return out


class BitCat(nn.Module):
    """Packed values of ``channels`` each, one behind the other along the channels."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)

    def forward(self, *xs: Tensor) -> Tensor:
        out: Tensor = ops.bit_cat(list(xs), self.channels)
        return out

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class BitSelect(nn.Module):
    """Channels ``indices`` of packed values of ``channels``."""

    indices: Tensor

    def __init__(self, channels: int, indices: Tensor) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("indices", indices.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.bit_select(x, self.channels, self.indices)
        return out


class Squeeze(nn.Module):
    """Packed ``[P, B, 1, 1, words]`` (or ``[P, B, 1, words]``) as ``[P, B, words]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], x.shape[-1])


# ---------------------------------------------------------------- 8-bit codes and floats


class Quantize(nn.Module):
    """Codes of float values, behind a ReLU if ``relu``; of four dimensions they lie in memory channels last."""

    def __init__(self, qp: QParams, relu: bool = False) -> None:
        super().__init__()
        self.grid = FakeQuantize(qp)
        self.relu = relu and int(qp.zero_point.max()) != qp.spec.qmin

    def forward(self, x: Tensor) -> Tensor:
        codes = numerics.quantize(x.relu() if self.relu else x, self.grid.qparams)
        return codes.contiguous(memory_format=torch.channels_last) if codes.ndim == 4 else codes


class Real(nn.Module):
    """Real values of codes, float32, in torch's own order in memory."""

    def __init__(self, qp: QParams) -> None:
        super().__init__()
        self.grid = FakeQuantize(qp)

    def forward(self, codes: Tensor) -> Tensor:
        return numerics.dequantize(codes, self.grid.qparams).contiguous()


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
    """An integer step that has no bit kernel, word for word as the reference runs it.

    Args:
        kind: of the step. module: what it reads its constants from. inputs: grids of its operands, a number for a constant.
        out: the grid that it rounds to, or ``None`` for float output. rank: of its result. index: of a part of a split.
    """

    def __init__(self, kind: str, module: nn.Module, inputs: Sequence[QParams | float], out: QParams | None, rank: int, index: int = 0) -> None:
        super().__init__()
        self.kind, self.module, self.rank, self.index = kind, module, rank, index
        self.constants = [v if isinstance(v, (int, float)) else None for v in inputs]
        self.grids = nn.ModuleList(FakeQuantize(v) for v in inputs if isinstance(v, QParams))
        self.out = None if out is None else FakeQuantize(out)

    def forward(self, *codes: Tensor) -> Tensor:
        given = iter(zip(codes, self.grids, strict=True))
        out: Any = None if self.out is None else self.out.qparams
        xs = []
        for c in self.constants:
            if c is None:
                x, grid = next(given)
                xs.append(Codes(x, grid.qparams))  # type: ignore[arg-type]
            else:
                xs.append(kernels.constant(c, out, self.rank if self.kind in kernels.BINARY else 0))
        if out is None:
            return kernels.float_output(self.module, xs)
        if self.kind == "requantize":
            return xs[0].onto(out)
        if self.kind == "split":
            return kernels.part(self.module, self.index, xs[0], out)
        return kernels.KERNELS[self.kind](self.module, xs, out)

    def extra_repr(self) -> str:
        return self.kind


class CodeAdd(nn.Module):
    """The integer add of two uint8 operands of one shape.

    Args:
        exact: the same step as the reference runs it, for the shapes (one element an image) that the runtime adds in another order.
        a, b, out: grids whose least code is 0.
    """

    def __init__(self, exact: CodesOp, a: QParams, b: QParams, out: QParams) -> None:
        super().__init__()
        self.exact = exact
        a, b, narrow = numerics.in_bytes(a), numerics.in_bytes(b), numerics.in_bytes(out)
        sc = np.float32(narrow.scale)
        ra, rb = np.float32(a.scale) / sc, np.float32(b.scale) / sc
        both = np.float32(np.float64(ra) * int(a.zero_point) + np.float64(rb * np.float32(int(b.zero_point))))
        fixed = np.float32(int(narrow.zero_point)) - both
        self.ra, self.rb, self.fixed, self.most = float(ra), float(rb), float(fixed), out.spec.qmax

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape or a.shape[1:].numel() == 1:
            return self.exact(a, b)  # type: ignore[no-any-return]
        out: Tensor = ops.code_add(a, b, self.ra, self.rb, self.fixed, self.most)
        return out
