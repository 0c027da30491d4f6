"""What kernels ask of their arguments before they touch memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fxq.bitwise.bits import Array, Pair, words_of
from fxq.errors import FxqError

if TYPE_CHECKING:
    from fxq.bitwise.layout import Epilogue, Layer

FAR = 1 << 16
"""Greatest size, step or padding of a window."""


def check_window(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int]) -> None:
    """Raises:
    FxqError: for windows of no size, steps that are not positive, or absurd padding.
    """
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0 or max(*kernel, *stride, *dilation, *padding) > FAR:
        raise FxqError(
            f"kernel {list(kernel)}, stride {list(stride)}, dilation {list(dilation)} and padding {list(padding)} do not make a window",
            way_out=f"Sizes are 1 to {FAR}, paddings 0 to {FAR}",
        )


def check_packed(x: Array, channels: int | None = None) -> None:
    """Raises:
    FxqError: when ``x`` is no packed tensor (of ``channels``).
    """
    if x.dtype != np.uint64 or x.ndim != 5 or x.shape[0] not in (1, 2):
        raise FxqError(f"an array of {x.dtype} {list(x.shape)} is not packed", way_out="Pass uint64 [1 or 2 planes, batch, rows, columns, words]")
    if channels is not None and x.shape[-1] != words_of(channels):
        raise FxqError(f"{x.shape[-1]} words do not hold {channels} channels", way_out=f"Pass {words_of(channels)} words a position")


def check_conv(x: Array, layer: Layer, epilogue: Epilogue) -> None:
    """Raises:
    FxqError: when input, layer and epilogue do not fit.
    """
    check_packed(x, layer.channels)
    e = epilogue
    needed = {"sign": [e.hi], "ternary": [e.hi, e.lo], "int32": [e.mult, e.bias], "float": [e.mult, e.bias, e.scale], "codes": [e.mult, e.bias, e.scale]}
    tables = needed.get(e.kind, [None])
    if any(t is None or t.shape != (layer.lanes,) or t.dtype != (np.float32 if t is e.scale else np.int32) for t in tables):
        raise FxqError(f"the {epilogue.kind} epilogue is not one of this layer", way_out="Make it with the functions of fxq.bitwise.layout")


def check_pack(x: Array, planes: int) -> None:
    """Raises:
    FxqError: when ``x`` cannot be packed.
    """
    if x.ndim != 3 or x.dtype not in (np.float32, np.uint8, np.int8) or planes not in (1, 2):
        raise FxqError(
            f"an array of {x.dtype} {list(x.shape)} cannot be packed in {planes} planes", way_out="Pass float32, uint8 or int8 of 3 dimensions, 1 or 2 planes"
        )


def pool_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Output positions of a pooling along one dimension, as torch counts them."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def pool_geometry(x: Array, channels: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Pair:
    """Rows and columns of a pooled packed tensor.

    Raises:
        FxqError: when ``x`` is not packed or a window does not fit.
    """
    check_packed(x, channels)
    return windows(x.shape[2:4], kernel, stride, padding, dilation, ceil_mode)


def code_pool_geometry(x: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Pair:
    """Rows and columns of pooled codes ``[B, H, W, C]``.

    Raises:
        FxqError: when ``x`` is no such array or a window does not fit.
    """
    if x.ndim != 4 or x.dtype not in (np.uint8, np.int8):
        raise FxqError(f"an array of {x.dtype} {list(x.shape)} cannot be pooled", way_out="Pass uint8 or int8 [batch, rows, columns, channels]")
    return windows(x.shape[1:3], kernel, stride, padding, dilation, ceil_mode)


def windows(size: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Pair:
    """Rows and columns of what a pool makes of ``size``.

    Raises:
        FxqError: for windows that are none, or do not fit.
    """
    check_window(kernel, stride, dilation, padding)
    oh, ow = (pool_size(size[i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1))
    if oh < 1 or ow < 1 or any(2 * padding[i] > kernel[i] for i in (0, 1)):
        raise FxqError(f"a window of {kernel[0]}x{kernel[1]} does not fit into an input of {size[0]}x{size[1]}", way_out="Pass larger inputs")
    return oh, ow


def check_codes(a: Array, b: Array) -> None:
    """Raises:
    FxqError: unless both are uint8 of one shape.
    """
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape:
        raise FxqError(f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)} are no codes of one shape", way_out="Pass uint8 arrays of one shape")


def check_table(x: Array, values: Array) -> None:
    """Raises:
    FxqError: unless both are uint8, and there are 256 values.
    """
    if x.dtype != np.uint8 or values.dtype != np.uint8 or values.shape != (256,):
        raise FxqError(f"{values.dtype} {list(values.shape)} is no table for codes of {x.dtype}", way_out="Pass uint8 codes, and uint8 [256] values")


def check_quantize(x: Array) -> None:
    """Raises:
    FxqError: unless ``x`` is float32 of 3 dimensions.
    """
    if x.dtype != np.float32 or x.ndim != 3:
        raise FxqError(f"an array of {x.dtype} {list(x.shape)} cannot be quantized", way_out="Pass float32 [B, C, S] or [B, S, C]")
