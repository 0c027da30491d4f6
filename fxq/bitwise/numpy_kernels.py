"""The kernels in numpy: always there, the definition that the compiled ones are tested against. Arguments are those of :mod:`fxq.bitwise.engine`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fxq.bitwise import checks, layout
from fxq.bitwise.bits import WORD, Array, Pair, pack_bits, popcount, unpack_bits, words_of
from fxq.bitwise.layout import CHUNK, AddConstants, Epilogue, Layer

F4, F8 = np.float32, np.float64
SMALL = 1 << 15
"""Words of a temporary array that stays in the cache."""


# ---------------------------------------------------------------- convolution, matrix product


def conv(x: Array, layer: Layer, epilogue: Epilogue, threads: int = 1) -> Array:
    """Convolution of packed values; one thread."""
    checks.check_conv(x, layer, epilogue)
    _, batch, h, w, _ = x.shape
    oh, ow = layer.out_size(h, w)
    shape, dtype = result_shape(layer, epilogue, batch, oh, ow)
    out = np.zeros(shape, dtype)
    if not out.size:
        return out
    bits = 8 * WORD * layer.taps * words_of(layer.channels) if layer.gathered else 0  # a byte each
    rows = max(1, CHUNK // (ow * max(layer.lanes, 2 * layer.taps * words_of(layer.channels), bits // 8)))
    for b in range(batch):
        padded = _padded(x[:, b], layer)
        for y in range(0, oh, rows):
            to = min(y + rows, oh)
            dots = _dots(padded, layer, (h, w), y, to, ow)
            finish(dots, epilogue, layer.outputs, out[:, b, y:to] if epilogue.planes else out[b, y:to])
    return out


def result_shape(layer: Layer, epilogue: Epilogue, batch: int, oh: int, ow: int) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of what :func:`conv` gives."""
    if epilogue.planes:
        return (epilogue.planes, batch, oh, ow, words_of(layer.outputs)), np.uint64
    codes = np.int8 if epilogue.signed else np.uint8
    return (batch, oh, ow, layer.outputs), {"int32": np.int32, "float": np.float32, "codes": codes}[epilogue.kind]


def _padded(x: Array, layer: Layer) -> Array:
    """``x`` ``[P, H, W, words]`` with the layer's zeros around it."""
    top, bottom, left, right = layer.padding
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))) if any(layer.padding) else x


def _dots(x: Array, layer: Layer, size: Pair, y0: int, y1: int, ow: int) -> Array:
    """int32 dot products ``[rows, OW, lanes]`` of the output rows ``y0`` to ``y1``."""
    kw, (sy, sx), (dy, dx) = layer.kernel[1], layer.stride, layer.dilation
    ternary, count, taps = len(x) == 2, (y1 - y0) * ow, layer.steps[0]
    under = np.empty((len(x), count, layer.taps, x.shape[-1]), np.uint64)
    for t in range(layer.taps):
        i, j = divmod(t, kw)
        rows = slice(y0 * sy + i * dy, (y1 - 1) * sy + i * dy + 1, sy)
        under[:, :, t] = x[:, rows, j * dx : (ow - 1) * sx + j * dx + 1 : sx].reshape(len(x), count, -1)
    if layer.gathered:
        under = _gathered(under, layer)
    dots: Array = np.empty((count, layer.lanes), np.int32)
    for n0, lanes, word0, words, offset in layer.blocks.tolist():
        planes = layer.words[offset : offset + (2 if layer.masked else 1) * taps * words * lanes].reshape(-1, taps * words, lanes)
        part = np.ascontiguousarray(under[..., word0 : word0 + words]).reshape(len(x), count, -1)
        dots[:, n0 : n0 + lanes] = _sums(part, planes)
    dots = dots.reshape(y1 - y0, ow, layer.lanes)
    if not ternary:
        b = layout.borders(layer, *size)
        dots += b.base[b.rows[y0:y1, None] + b.columns[None]]
    return dots


def _gathered(x: Array, layer: Layer) -> Array:
    """``x`` ``[P, pixels, taps, words]`` with the bits of a group's taps one behind the other: ``[P, pixels, 1, groups * group_words]``."""
    bits = unpack_bits(x, layer.channels).reshape(*x.shape[:3], layer.groups, -1)
    together = pack_bits(bits.transpose(0, 1, 3, 2, 4).reshape(*x.shape[:2], layer.groups, -1) != 0)
    return together.reshape(*x.shape[:2], 1, -1)


def _sums(x: Array, w: Array) -> Array:
    """``popcount(m) - 2 * popcount((x ^ w) & m)``, without the first term for binary ``x``; x ``[P, pixels, k]``, w ``[planes, k, lanes]``."""
    count, lanes = x.shape[1], w.shape[2]
    out = np.zeros((count, lanes), np.int32)
    if len(x) == 2 and len(w) == 1:
        out += popcount(x[1]).sum(1, dtype=np.int32)[:, None]
    x, w = np.ascontiguousarray(x.transpose(0, 2, 1))[..., None], w[:, :, None]
    pixels = min(count, SMALL // lanes)
    words = max(1, SMALL // (pixels * lanes))
    for i in range(0, count, pixels):
        part = out[i : i + pixels]
        for k in range(0, x.shape[1], words):
            a, b = x[:, k : k + words, i : i + pixels], w[:, k : k + words]
            diff = a[0] ^ b[0]
            if len(a) == 2 and len(b) == 2:
                mask = a[1] & b[1]
                diff &= mask
                part += popcount(mask).sum(0, dtype=np.int32)
            elif len(a) == 2 or len(b) == 2:
                diff &= a[1] if len(a) == 2 else b[1]
            part -= 2 * popcount(diff).sum(0, dtype=np.int32)
    return out


def finish(dots: Array, e: Epilogue, outputs: int, out: Array) -> None:
    """Apply the epilogue to ``dots`` ``[..., lanes]`` and write ``out`` (see :class:`fxq.bitwise.layout.Epilogue`)."""
    if e.planes:
        assert e.hi is not None
        plus = dots >= e.hi
        out[0] = pack_bits(plus[..., :outputs])
        if e.lo is not None:
            out[1] = pack_bits((plus | (dots <= e.lo))[..., :outputs])
        return
    assert e.mult is not None and e.bias is not None
    acc = (e.mult * dots + e.bias)[..., :outputs]
    if e.kind == "int32":
        out[...] = acc
        return
    assert e.scale is not None
    real = acc.astype(F4) * e.scale[:outputs]
    out[...] = real if e.kind == "float" else (np.rint(np.clip(real, F4(e.least), F4(e.most))) + F4(e.zero)).astype(out.dtype)


# ---------------------------------------------------------------- packing


def pack(x: Array, lo: float, hi: float, planes: int, channels_last: bool, threads: int = 1) -> Array:
    """Values against thresholds: plane 0 is ``x >= hi``, plane 1 ``x >= hi or x <= lo``; uint64 ``[planes, B, S, words]``."""
    checks.check_pack(x, planes)
    channels, places = (x.shape[2], x.shape[1]) if channels_last else (x.shape[1], x.shape[2])
    out = np.empty((planes, x.shape[0], places, words_of(channels)), np.uint64)
    step = max(1, CHUNK // max(1, channels))
    for b in range(x.shape[0]):
        for i in range(0, places, step):
            part = x[b, i : i + step] if channels_last else x[b, :, i : i + step]
            plus = _reaches(part, hi)
            bits = [plus, plus | _reaches(part, lo, below=True)][:planes]
            for p, plane in enumerate(bits):
                out[p, b, i : i + step] = pack_bits(plane if channels_last else plane.T)
    return out


def _reaches(x: Array, bound: float, below: bool = False) -> Array:
    """``x >= bound`` or ``x <= bound``; a bound of float32 values is one of float32."""
    if x.dtype == np.float32:
        return x <= F4(bound) if below else x >= F4(bound)
    return x.astype(np.int16) <= bound if below else x.astype(np.int16) >= bound


def unpack(packed: Array, channels: int, threads: int = 1) -> Array:
    """int8 ``[B, H, W, C]`` of -1 and 1, or of -1, 0 and 1."""
    checks.check_packed(packed, channels)
    out = np.empty((*packed.shape[1:4], channels), np.int8)
    for b in range(len(out)):
        plus = unpack_bits(packed[0, b], channels).view(np.int8)
        other = unpack_bits(packed[1, b], channels).view(np.int8) if len(packed) == 2 else 1
        out[b] = 2 * plus - other
    return out


# ---------------------------------------------------------------- pooling, codes


def max_pool(
    packed: Array, channels: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), ceil_mode: bool = False, threads: int = 1
) -> Array:
    """Maximum over windows: OR of ``+1``; not 0 is where that is set, or all values are not 0 (then all are -1). Padding takes no part."""
    oh, ow = checks.pool_geometry(packed, channels, kernel, stride, padding, dilation, ceil_mode)
    h, w = packed.shape[2:4]
    shape = (*packed.shape[1:2], oh, ow, packed.shape[4])
    plus, some = np.zeros(shape, np.uint64), np.full(shape, ~np.uint64(0))
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            to_y, y = _inside(oh, stride[0], i * dilation[0] - padding[0], h)
            to_x, x = _inside(ow, stride[1], j * dilation[1] - padding[1], w)
            plus[:, to_y, to_x] |= packed[0][:, y, x]
            if len(packed) == 2:
                some[:, to_y, to_x] &= packed[1][:, y, x]
    return plus[None] if len(packed) == 1 else np.stack([plus, plus | some])


def _inside(out: int, stride: int, shift: int, size: int) -> tuple[slice, slice]:
    """Output positions whose input position ``i * stride + shift`` lies inside, and those input positions."""
    first = max(0, -(shift // stride))
    last = min(out - 1, (size - 1 - shift) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(first * stride + shift, last * stride + shift + 1, stride)


def add(a: Array, b: Array, constants: AddConstants, threads: int = 1) -> Array:
    """Integer add of uint8 codes of one shape, each step with the roundings of :func:`fxq.kernels.add`."""
    checks.check_codes(a, b)
    c, out = constants, np.empty(a.shape, np.uint8)
    flat_a, flat_b, flat = a.reshape(-1), b.reshape(-1), out.reshape(-1)
    for i in range(0, flat.size, CHUNK):
        at = slice(i, i + CHUNK)
        inner = (F8(F4(c.rb)) * flat_b[at] + F8(F4(c.fixed))).astype(F4)
        real = (F8(F4(c.ra)) * flat_a[at] + inner.astype(F8)).astype(F4)
        flat[at] = np.clip(np.rint(real), c.least, c.most)
    return out


def table(x: Array, values: Array, threads: int = 1) -> Array:
    """``values[x]`` for uint8 ``x`` and 256 values of uint8."""
    checks.check_table(x, values)
    return np.asarray(values[x])


def code_pool(codes: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), ceil_mode: bool = False, threads: int = 1) -> Array:
    """Maximum of codes over windows; padding takes no part."""
    oh, ow = checks.code_pool_geometry(codes, kernel, stride, padding, dilation, ceil_mode)
    out = np.full((codes.shape[0], oh, ow, codes.shape[3]), np.iinfo(codes.dtype).min, codes.dtype)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            to_y, y = _inside(oh, stride[0], i * dilation[0] - padding[0], codes.shape[1])
            to_x, x = _inside(ow, stride[1], j * dilation[1] - padding[1], codes.shape[2])
            np.maximum(out[:, to_y, to_x], codes[:, y, x], out=out[:, to_y, to_x])
    return out


def quantize(x: Array, scale: float, zero: int, qmin: int, qmax: int, channels_last: bool, threads: int = 1) -> Array:
    """``clip(rne(x / scale), qmin - zero, qmax - zero) + zero``: the codes of :func:`fxq.numerics.quantize`, places before channels."""
    checks.check_quantize(x)
    batch, channels, places = (x.shape[0], x.shape[2], x.shape[1]) if channels_last else x.shape
    out = np.empty((batch, places, channels), np.int8 if qmin < 0 else np.uint8)
    for b in range(batch):
        with np.errstate(over="ignore", invalid="ignore"):
            steps = np.clip(np.rint(x[b] / F4(scale)), F4(qmin - zero), F4(qmax - zero)) + F4(zero)
        out[b] = (steps if channels_last else steps.T).astype(out.dtype)
    return out
