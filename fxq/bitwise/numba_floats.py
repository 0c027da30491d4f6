"""Floats of images, compiled by numba: max pools with channels last as their result, real values of codes. Imported only where numba is."""

from __future__ import annotations

from typing import Any

import numpy as np

from fxq.bitwise.numba_jit import jit

Array = np.ndarray[Any, Any]
BLOCK = 16
"""Channels whose results are written after one another: one line of the cache."""


@jit("nnan", "nsz")
def _rows(plane: Array, first: int, last: int, step: int, to: Array, start: int, width: int) -> None:
    """``to[start:start + width]``: maximum of the rows ``first``, ``first + step``, ... below ``last``; of none (the window lies in the padding) -inf."""
    to = to[start : start + width]
    if first >= last:
        to[:] = -np.inf
        return
    row = plane[first]
    for i in range(len(row)):
        to[i] = row[i]
    r = first + step
    while r < last:
        row = plane[r]
        for i in range(len(row)):
            to[i] = max(to[i], row[i])
        r += step


@jit("nnan", "nsz")
def _columns3(line: Array, to: Array, count: int, stride: int) -> None:
    """``to[i]``: maximum of three neighbours from ``line[i * stride]`` on."""
    for i in range(count):
        at = i * stride
        to[i] = max(line[at], max(line[at + 1], line[at + 2]))


@jit("nnan", "nsz")
def _columns(line: Array, to: Array, count: int, stride: int, kernel: int, dilation: int) -> None:
    """``to[i]``: maximum of ``kernel`` values from ``line[i * stride]`` on, ``dilation`` apart."""
    for i in range(count):
        v = line[i * stride]
        for k in range(1, kernel):
            v = max(v, line[i * stride + k * dilation])
        to[i] = v


@jit("nnan", "nsz")
def float_pool(x: Array, window: Array, out: Array) -> None:
    """Maximum over windows; what a NaN gives is not defined.

    Args:
        x: float32 ``[B, C, H, W]``. window: int64: kernel, stride, padding, dilation, of rows and columns each.
        out: float32 ``[B, OH, OW, C]``.
    """
    kh, kw, sy, sx, py, px, dy, dx = window
    if min(kh, kw, sy, sx, dy, dx) < 1 or min(py, px) < 0:
        raise ValueError("numbers of a window")
    batch, channels, height, width = x.shape
    oh, ow = out.shape[1], out.shape[2]
    line = np.full(max(width + px, (ow - 1) * sx + dx * (kw - 1) + 1), -np.inf, np.float32)
    for b in range(batch):
        for c0 in range(0, channels, BLOCK):
            for y in range(oh):
                top = y * sy - py
                first = top + max(0, -(top // dy)) * dy
                last = min(height, top + (kh - 1) * dy + 1)
                for c in range(c0, min(channels, c0 + BLOCK)):
                    _rows(x[b, c], first, last, dy, line, px, width)
                    if kw == 3 and dx == 1 and sx == 2:  # a number that the compiler knows makes it three times as fast
                        _columns3(line, out[b, y, :, c], ow, 2)
                    elif kw == 3 and dx == 1:
                        _columns3(line, out[b, y, :, c], ow, sx)
                    else:
                        _columns(line, out[b, y, :, c], ow, sx, kw, dx)


PLACES, LINE = 16, 64
"""Positions and channels of codes whose lines stay in the first-level cache while they are turned."""


@jit()
def real(codes: Array, values: Array, out: Array) -> None:
    """``out[b, c, s] = values[codes[b, s, c]]``.

    Args:
        codes: uint8 ``[B, S, C]``. values: float32 ``[256]``. out: float32 ``[B, C, S]``.
    """
    batch, places, channels = codes.shape
    for b in range(batch):
        for s0 in range(0, places, PLACES):
            last = min(places, s0 + PLACES)
            for c0 in range(0, channels, LINE):
                for c in range(c0, min(channels, c0 + LINE)):
                    for s in range(s0, last):
                        out[b, c, s] = values[codes[b, s, c]]
