"""Modules of a lowered graph that compute on bits: one kernel each. Weights are packed words and tables in buffers; nothing here is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxq.bitwise import layers, layout, ops
from fxq.bitwise.layers import BitLayer
from fxq.bitwise.pools import Pool
from fxq.bitwise.thresholds import Cut
from fxq.errors import FxqError

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
        self.register_buffer("words", torch.from_numpy(packed.words.view(np.int64)).clone())  # torch aligns to 64 bytes
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
    """Bits of float32 values or 8-bit codes by thresholds.

    Args:
        channels, axis, rank: of what it takes: so many channels along ``axis`` of ``rank`` dimensions. Words of bits do not tell 13 channels from 14.
    """

    def __init__(self, cut: Cut, planes: int, channels: int, axis: int, rank: int) -> None:
        super().__init__()
        self.cut, self.planes, self.channels, self.axis, self.rank = cut, planes, channels, axis, rank

    def forward(self, x: Tensor) -> Tensor:
        """Raises:
        FxqError: for other channels or dimensions.
        """
        if x.ndim != self.rank or x.shape[self.axis] != self.channels:
            fact = f"a value of shape {list(x.shape)} does not fit a layer of {self.channels} channels"
            raise FxqError(fact, way_out=f"Pass inputs with {self.rank} dimensions and the channels in dimension {self.axis}")
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


class BitMaxPool(Pool):
    """``MaxPool1d`` or ``MaxPool2d`` of packed values of ``channels``."""

    def __init__(self, pool: Any, rank: int, channels: int) -> None:
        super().__init__(pool, rank)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ops.bit_max_pool(x, self.channels, *self.window, self.ceil_mode)
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
        """Raises:
        FxqError: for more than one place.
        """
        if any(s != 1 for s in x.shape[2:-1]):
            raise FxqError(f"a flatten of one place gets {list(x.shape[2:-1])} places", way_out="Pass inputs of the example's size")
        return x.reshape(x.shape[0], x.shape[1], x.shape[-1])
