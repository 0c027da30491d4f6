"""How a layer runs on inputs of one shape: windows, units of work, tables and offsets, as a description for the kernel. Imported only where numba is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fxq.bitwise import layout
from fxq.bitwise import numba_conv as c
from fxq.bitwise.bits import Array, Pair
from fxq.bitwise.layout import Layer
from fxq.bitwise.numba_compile import address, compiled

VECTORS = 1 << 14
"""Vectors of 8 words that a convolution compares for each thread at least: about 7 microseconds, as long as a second thread takes to start and to end."""
CACHE_BYTES = 192 << 10
"""Bytes of activations of a unit of work: half of a small second-level cache."""
PIXELS = 28
"""Output positions of a unit of work at least, where rows are dealt out."""


@dataclass(frozen=True)
class _Windows:
    """What the kernel sees of a layer and its input."""

    batch: int
    height: int
    width: int
    words: int
    out: Pair
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)

    @property
    def across(self) -> int:
        """Words of a padded row."""
        return (self.width + self.padding[2] + self.padding[3]) * self.words

    @property
    def extent(self) -> int:
        """Input rows of one output row."""
        return self.dilation[0] * (self.kernel[0] - 1) + 1


def _windows(shape: tuple[int, ...], layer: Layer) -> tuple[_Windows, bool]:
    """The windows, and whether their positions lie as in the output (for the border tables)."""
    _, batch, h, w, words = shape
    oh, ow = layer.out_size(h, w)
    if layer.gathered:
        return _Windows(batch, oh, ow, layer.steps[1], (oh, ow)), True
    if layer.taps == 1 and layer.stride == (1, 1) and not any(layer.padding):  # a matrix product: every position is a row
        return _Windows(1, batch * h * w, 1, words, (batch * h * w, 1)), False
    return _Windows(batch, h, w, words, (oh, ow), layer.kernel, layer.stride, layer.padding, layer.dilation), True


class Plan:
    """How a layer runs on inputs of one shape: the description without the addresses of a call.

    Attributes:
        size: images, rows and columns of the output.
        kernel, threads, scratch: what runs, in how many threads, with how many bytes for each.
        result: the last epilogue and what the call needs of it.
    """

    def __init__(self, shape: tuple[int, ...], layer: Layer, threads: int) -> None:
        planes, in_place = shape[0], layer.out_size(shape[2], shape[3])
        self.size, self.kernel = (shape[1], *in_place), compiled(("conv", planes, layer.masked), c.kernel(planes, int(layer.masked)))
        self.threads = min(threads, max(1, shape[1] * in_place[0] * in_place[1] * len(layer.words) // 8 // VECTORS))
        self.description, self.kept = np.zeros(c.SIZE // 8, np.int64), list[Array]()
        self.result: tuple[Any, ...] = (None,)
        v, as_output = _windows(shape, layer)
        (oh, ow), (kh, kw), (dy, dx) = v.out, v.kernel, v.dilation
        fit = max(1, (CACHE_BYTES // (8 * v.across * planes) - v.extent) // v.stride[0] + 1)
        unit_rows, group = self._split(oh, ow, v.batch, fit, len(layer.blocks))
        rows_in = (unit_rows - 1) * v.stride[0] + v.extent
        sizes = [c.SCRATCH, 8 * unit_rows * ow, 4 * unit_rows * ow, 4 * unit_rows * ow, 4 * rows_in * v.across // v.words if planes == 2 else 0]
        at = np.cumsum([-(-s // 64) * 64 for s in sizes]).tolist()
        self.scratch = at[-1] + (8 * rows_in * v.across * planes if any(v.padding) else 0) + 64
        taps = [8 * (i * dy * v.across + j * dx * v.words) for i in range(kh) for j in range(kw)]
        rows = taps[::kw] if dx == 1 else []  # their words stand one behind the other
        if dy == 1 and rows and kw * v.words == v.across:
            rows = rows[:1]
        border = layout.borders(layer, shape[2], shape[3]) if planes == 1 else None
        self._put(
            X_IMAGE=8 * v.height * v.width * v.words, HEIGHT=v.height, WIDTH=v.width, WORDS=v.words, COPIED=any(v.padding), TOP=v.padding[0],
            LEFT=v.padding[2], ROW=8 * v.across, EXTENT=v.extent, STRIDE_Y=v.stride[0], STRIDE_X=v.stride[1], OUT_H=oh, OUT_W=ow, UNIT_ROWS=unit_rows,
            ROW_UNITS=-(-oh // unit_rows), GROUPS=-(-len(layer.blocks) // group), GROUP=group, SCRATCH_SIZE=self.scratch, TABLE=at[0], CLASS=at[1],
            COUNT=at[2], BITS=at[3], ROWS=at[4], PLANE=8 * rows_in * v.across, BLOCKS=layer.blocks, BLOCK_COUNT=len(layer.blocks), WEIGHTS=layer.words,
            TAPS=len(taps), ROW_OFFSETS=rows, ROW_SEGMENTS=len(rows), ROW_WORDS=kh * kw * v.words // max(1, len(rows)), TAP_OFFSETS=taps,
            PIXEL_OFFSETS=[t // (2 * v.words) for t in taps], LANES=layer.lanes, OUTPUTS=layer.outputs,
            BASE=border.base if border else np.zeros((1, layer.lanes), np.int32),
            ROW_CLASS=border.rows if border and as_output else np.zeros(oh, np.int32),
            COLUMN_CLASS=border.columns if border and as_output else np.zeros(ow, np.int32),
        )  # fmt: skip
        d = self.description
        d[c.UNITS // 8] = v.batch * d[c.ROW_UNITS // 8] * d[c.GROUPS // 8]

    def _put(self, **fields: Any) -> None:
        """Numbers, and the addresses of arrays."""
        for name, value in fields.items():
            if isinstance(value, list):
                value = np.array(value, np.int64)
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value)
                self.kept.append(value)
                value = address(value)
            self.description[getattr(c, name) // 8] = value

    def _split(self, oh: int, ow: int, batch: int, fit: int, blocks: int) -> tuple[int, int]:
        """Output rows and blocks of output channels of a unit: what fits into the cache, and the same work for each thread.

        Rows are dealt out first, as threads that write to the same places get in each other's way, then blocks.
        """
        most, n = max(1, min(oh, fit, 4096 // ow)), self.threads
        if n == 1:
            return -(-oh // -(-oh // most)), blocks

        def share(rows: int, some: int) -> float:
            """Of all work, that of the thread that has most."""
            units = batch * -(-oh // rows) * -(-blocks // some)
            return -(-units // n) * rows * some / (batch * oh * blocks)

        def rank(rows: int) -> tuple[float, int]:
            return share(rows, blocks), abs(batch * -(-oh // rows) - 4 * n)

        rows = min(range(most, min(most, -(-PIXELS // ow)) - 1, -1), key=rank)
        group = max(1, blocks * batch * -(-oh // most) // (4 * n))
        return (most, group) if share(most, group) * 1.06 < share(rows, blocks) else (rows, blocks)
