"""The convolution of packed values, compiled by numba around the tiles of :mod:`fxq.bitwise.tiles`. Imported only where numba is.

A call is described by an array of int64 (offsets below); any number of threads may run a kernel on the same description: each takes units of work
(some output rows of an image times some blocks of output channels) until none is left. A unit copies the rows that it reads, with their zeros
around, into the thread's scratch, so that the tile needs addresses only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import overload

from fxq.bitwise import tiles
from fxq.bitwise.numba_compile import OPTIONS, helper
from fxq.bitwise.tiles import WIDE, count_bits, sum_taps
from fxq.bitwise.vectors import copy, ctpop, fetch_add, load32, load64, store32, store64, zero

KINDS = {"sign": 0, "ternary": 1, "int32": 2, "float": 3, "codes": 4}
SCRATCH = 1024
"""Bytes at the start of a thread's scratch: the results of a tile (5 pixels, 128 bytes each) and one row of numbers behind them."""
SPILL = 640

# Offsets in the description, in bytes; TAKEN counts units and THREADS threads, from 0.
TAKEN, THREADS, X, X_PLANE, X_IMAGE, HEIGHT, WIDTH, WORDS, COPIED, TOP, LEFT, ROW, EXTENT, STRIDE_Y, STRIDE_X = range(0, 120, 8)
OUT_H, OUT_W, UNIT_ROWS, ROW_UNITS, GROUPS, GROUP, UNITS, SCRATCH_AT, SCRATCH_SIZE, TABLE, CLASS, COUNT, BITS, ROWS, PLANE = range(120, 240, 8)
BLOCKS, BLOCK_COUNT, WEIGHTS, TAPS, ROW_OFFSETS, ROW_SEGMENTS, ROW_WORDS, TAP_OFFSETS, PIXEL_OFFSETS, BASE, ROW_CLASS, COLUMN_CLASS = range(240, 336, 8)
LANES, OUTPUTS, OUT, OUT_PLANE, OUT_PIXEL, KIND, HI, LO, MULT, BIAS, SCALE, BOUNDS, SIZE = range(336, 440, 8)

DOTS = {
    (pixels, lanes, planes, masked): tiles.tile(pixels, lanes, planes, bool(masked))
    for pixels in (1, 4, 5) for lanes in (WIDE, 8) for planes in (1, 2) for masked in (0, 1)
}  # fmt: skip
signs32, signs8, trits32, trits8 = (make(n) for make in (tiles.signs, tiles.trits) for n in (WIDE, 8))
int32_32, int32_8, float_32, float_8, codes_32, codes_8 = (tiles.numbers(n, kind) for kind in ("int32", "float", "codes") for n in (WIDE, 8))
sum_taps16, sum_taps1 = sum_taps(16), sum_taps(1)


@helper
def _copy_rows(d, scratch, planes, image, first, rows):  # type: ignore[no-untyped-def]
    """Input rows ``first`` and on with zeros around them into the scratch."""
    row, words, height = load64(d + ROW), load64(d + WORDS), load64(d + HEIGHT)
    size, left = load64(d + WIDTH) * words * 8, load64(d + LEFT) * words * 8
    for plane in range(planes):
        source = load64(d + X) + plane * load64(d + X_PLANE) + image * load64(d + X_IMAGE)
        to = scratch + load64(d + ROWS) + plane * load64(d + PLANE)
        for y in range(first, first + rows):
            if y < 0 or y >= height:
                zero(to, row)
            else:
                for i in range(0, left, 8):
                    store64(to + i, 0)
                copy(to + left, source + y * size, size)
                for i in range(left + size, row, 8):
                    store64(to + i, 0)
            to += row


@helper
def _places(d, scratch, start, y0, rows):  # type: ignore[no-untyped-def]
    """Tables of the unit's pixels: addresses of what the kernel reads there, and rows of the border table (in bytes)."""
    table, classes, width = scratch + load64(d + TABLE), scratch + load64(d + CLASS), load64(d + OUT_W)
    row_class, column_class, lanes = load64(d + ROW_CLASS) + 4 * y0, load64(d + COLUMN_CLASS), 4 * load64(d + LANES)
    down, right = load64(d + STRIDE_Y) * load64(d + ROW), load64(d + STRIDE_X) * load64(d + WORDS) * 8
    for y in range(rows):
        at, kind = start + y * down, load32(row_class + 4 * y)
        for x in range(width):
            store64(table + 8 * x, at + x * right)
            store32(classes + 4 * x, (kind + load32(column_class + 4 * x)) * lanes)
        table += 8 * width
        classes += 4 * width


@helper
def _counts(d, scratch, start, rows, first, words):  # type: ignore[no-untyped-def]
    """For each pixel of the unit how many inputs under the kernel are not 0, in ``words`` words from ``first`` on."""
    all_words = load64(d + WORDS)
    places = ((rows - 1) * load64(d + STRIDE_Y) + load64(d + EXTENT)) * (load64(d + ROW) // (8 * all_words))
    bits, i = scratch + load64(d + BITS), 0
    if all_words == 1:
        while i + 8 <= places:
            count_bits(start + 8 * i, bits + 4 * i)
            i += 8
    for place in range(i, places):
        n = 0
        for word in range(first, first + words):
            n += ctpop(load64(start + (place * all_words + word) * 8))
        store32(bits + 4 * place, n)
    taps, offsets, width, out = load64(d + TAPS), load64(d + PIXEL_OFFSETS), load64(d + OUT_W), scratch + load64(d + COUNT)
    down, right = load64(d + STRIDE_Y) * load64(d + ROW) // (2 * all_words), 4 * load64(d + STRIDE_X)
    for y in range(rows):
        x = 0
        if right == 4:
            while x + 16 <= width:
                sum_taps16(bits + y * down + 4 * x, offsets, taps, out + 4 * x)
                x += 16
            if x < width and width >= 16:  # once more with some places before it
                sum_taps16(bits + y * down + 4 * (width - 16), offsets, taps, out + 4 * (width - 16))
                x = width
        for rest in range(x, width):
            sum_taps1(bits + y * down + rest * right, offsets, taps, out + 4 * rest)
        out += 4 * width


@helper
def _finish(d, scratch, pixels, lanes, place, channel, pixel, counted):  # type: ignore[no-untyped-def]
    """Apply the epilogue to the tile's results: ``place`` within the unit, ``pixel`` of the output, first output ``channel``."""
    kind, at, base = load64(d + KIND), 4 * channel, load64(d + BASE) + 4 * channel
    classes, counts = scratch + load64(d + CLASS) + 4 * place, scratch + load64(d + COUNT) + 4 * place
    row = load64(d + OUT_PIXEL)
    out, count, size = load64(d + OUT) + pixel * row, 0, 1 if kind == 4 else 4
    short = load64(d + OUTPUTS) - channel
    for p in range(pixels):
        dots, border = scratch + 128 * p, base + load32(classes + 4 * p)
        if counted:
            count = load32(counts + 4 * p)
        if kind == 0:
            to = out + channel // 8
            if lanes == WIDE:
                signs32(dots, border, count, load64(d + HI) + at, to)
            else:
                signs8(dots, border, count, load64(d + HI) + at, to)
        elif kind == 1:
            to = out + channel // 8
            if lanes == WIDE:
                trits32(dots, border, count, load64(d + HI) + at, load64(d + LO) + at, to, to + load64(d + OUT_PLANE))
            else:
                trits8(dots, border, count, load64(d + HI) + at, load64(d + LO) + at, to, to + load64(d + OUT_PLANE))
        else:
            to = out + size * channel if lanes <= short else scratch + SPILL
            mult, bias, scale, bounds = load64(d + MULT) + at, load64(d + BIAS) + at, load64(d + SCALE) + at, load64(d + BOUNDS)
            if lanes == WIDE:
                if kind == 2:
                    int32_32(dots, border, count, mult, bias, scale, bounds, to)
                elif kind == 3:
                    float_32(dots, border, count, mult, bias, scale, bounds, to)
                else:
                    codes_32(dots, border, count, mult, bias, scale, bounds, to)
            elif kind == 2:
                int32_8(dots, border, count, mult, bias, scale, bounds, to)
            elif kind == 3:
                float_8(dots, border, count, mult, bias, scale, bounds, to)
            else:
                codes_8(dots, border, count, mult, bias, scale, bounds, to)
            if lanes > short:
                copy(out + size * channel, to, size * short)
        out += row


def _strip(*operands: Any) -> None:
    """All pixels of a unit for ``lanes`` output channels (a number that is known when it is compiled)."""


@overload(_strip, jit_options=OPTIONS, prefer_literal=True)
def _strip_code(d, scratch, planes, masked, lanes, channel, step, weights, second, first, delta, per_tap, n, pixel):  # type: ignore[no-untyped-def]
    if not all(isinstance(v, types.IntegerLiteral) for v in (planes, masked, lanes)):
        return None
    one, four, five = (DOTS[pixels, lanes.literal_value, planes.literal_value, masked.literal_value] for pixels in (1, 4, 5))
    wide, counted = lanes.literal_value, int(planes.literal_value == 2 and not masked.literal_value)

    def code(d, scratch, planes, masked, lanes, channel, step, weights, second, first, delta, per_tap, n, pixel):  # type: ignore[no-untyped-def]
        table, i = scratch + load64(d + TABLE), 0
        offsets, segments, words = load64(d + ROW_OFFSETS), load64(d + ROW_SEGMENTS), load64(d + ROW_WORDS)
        if per_tap:  # the words of a kernel row are not one behind the other: so many of each tap
            offsets, segments, words = load64(d + TAP_OFFSETS), load64(d + TAPS), per_tap
        while i < n:
            rest, at = n - i, table + 8 * i
            if rest >= 5 and rest % 4:
                pixels = 5
                five(weights, step, second, at, first, delta, offsets, segments, words, scratch)
            elif rest >= 4:
                pixels = 4
                four(weights, step, second, at, first, delta, offsets, segments, words, scratch)
            else:
                pixels = 1
                one(weights, step, second, at, first, delta, offsets, segments, words, scratch)
            _finish(d, scratch, pixels, wide, i, channel, pixel + i, counted)
            i += pixels

    return code


def kernel(planes: int, masked: int) -> Callable[[int], Callable[[Any], None]]:
    """Source of the kernel for inputs of one or two planes and plain or masked weights, from a number that stands for its version."""
    counted = planes == 2 and not masked

    def make(digest: int) -> Callable[[Any], None]:
        def conv_units(d: Any) -> None:
            if digest == 0:
                return
            scratch = load64(d + SCRATCH_AT) + fetch_add(d + THREADS, 1) * load64(d + SCRATCH_SIZE)
            while True:
                unit = fetch_add(d + TAKEN, 1)
                if unit >= load64(d + UNITS):
                    break
                groups, row_units = load64(d + GROUPS), load64(d + ROW_UNITS)
                block, part, image = unit % groups * load64(d + GROUP), unit // groups % row_units, unit // groups // row_units
                height, width, stride = load64(d + OUT_H), load64(d + OUT_W), load64(d + STRIDE_Y)
                y0 = part * load64(d + UNIT_ROWS)
                rows = min(load64(d + UNIT_ROWS), height - y0)
                if load64(d + COPIED):
                    _copy_rows(d, scratch, planes, image, y0 * stride - load64(d + TOP), (rows - 1) * stride + load64(d + EXTENT))
                    start, delta = scratch + load64(d + ROWS), load64(d + PLANE)
                else:
                    start, delta = load64(d + X) + image * load64(d + X_IMAGE) + y0 * stride * load64(d + ROW), load64(d + X_PLANE)
                _places(d, scratch, start, y0, rows)
                known, n, pixel, taps, all_words = -1, rows * width, (image * height + y0) * width, load64(d + TAPS), load64(d + WORDS)
                for k in range(block, min(block + load64(d + GROUP), load64(d + BLOCK_COUNT))):
                    place = load64(d + BLOCKS) + 40 * k
                    channel, lanes, first, words, offset = load64(place), load64(place + 8), load64(place + 16), load64(place + 24), load64(place + 32)
                    if counted and known != first * all_words + words:
                        _counts(d, scratch, start + delta, rows, first, words)
                        known = first * all_words + words
                    weights, second = load64(d + WEIGHTS) + 8 * offset, taps * words * lanes * 8
                    per_tap = 0 if words == all_words and load64(d + ROW_SEGMENTS) else words
                    for sub in range(0, lanes, WIDE if lanes >= WIDE else 8):
                        if lanes >= WIDE:
                            _strip(d, scratch, planes, masked, WIDE, channel + sub, 8 * lanes, weights + 8 * sub, second, 8 * first, delta, per_tap, n, pixel)
                        else:
                            _strip(d, scratch, planes, masked, 8, channel + sub, 8 * lanes, weights + 8 * sub, second, 8 * first, delta, per_tap, n, pixel)

        return conv_units

    return make
