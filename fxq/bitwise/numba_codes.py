"""Packing, unpacking, pooling and tables, compiled by numba around :mod:`fxq.bitwise.code_tiles`. Imported only where numba is.

A call is described by an array of int64: a counter from 0, the number of units, then what each kernel says; any number of threads may run a kernel
on it (see :mod:`fxq.bitwise.numba_conv`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import overload

from fxq.bitwise import code_tiles
from fxq.bitwise.code_tiles import add_codes, unpack_word
from fxq.bitwise.numba_compile import OPTIONS, helper
from fxq.bitwise.vectors import copy, fetch_add, load8, load64, move8, move16, move32, store8, store64, zero

# Offsets in the description, in bytes.
UNITS, A, B, C, D, E, F, G, H, IMAGE, J, K = range(8, 104, 8)
STRIP = 32
"""Places that are packed at once where channels do not lie together."""
FLOATS = {"float32": 4, "uint8": 1, "int8": 1}
PLACES = {(kind, n, planes): code_tiles.pack_places(kind, n, planes) for kind in FLOATS for n in (STRIP, 8, 1) for planes in (1, 2)}
REST = {(kind, planes): code_tiles.pack_places(kind, 1, planes, ir.IntType(8)) for kind in FLOATS for planes in (1, 2)}
CHANNELS = {(kind, n, planes): code_tiles.pack_channels(kind, n, planes) for kind in FLOATS for n in (64, 8) for planes in (1, 2)}
unpack1, unpack2 = unpack_word(1), unpack_word(2)
quantize16, quantize1 = code_tiles.quantize_codes(16), code_tiles.quantize_codes(1)
(max_u64, max_u1), (max_s64, max_s1) = ([code_tiles.max_codes(n, signed) for n in (64, 1)] for signed in (False, True))


def pack(d: Any, kind: Any, planes: Any) -> None:
    """Pack values of ``kind``: A values, B batch stride (bytes), C channels, D places, E channels last, F bounds, G words, H bytes to plane 1,
    IMAGE bytes of an image's words, J places of a unit, K units of an image (J and K count strips of places, times words unless E)."""


@overload(pack, jit_options=OPTIONS, prefer_literal=True)
def _pack_code(d, kind, planes):  # type: ignore[no-untyped-def]
    if not isinstance(kind, types.StringLiteral) or not isinstance(planes, types.IntegerLiteral):
        return None
    name, p = kind.literal_value, planes.literal_value
    size, strip, strip8, strip1, rest = FLOATS[name], PLACES[name, STRIP, p], PLACES[name, 8, p], PLACES[name, 1, p], REST[name, p]
    all64, some8 = CHANNELS[name, 64, p], CHANNELS[name, 8, p]

    def code(d, kind, planes):  # type: ignore[no-untyped-def]
        channels, places, bounds, plane, per_unit, per_image = (
            load64(d + C), load64(d + D), load64(d + F), load64(d + H), load64(d + J), load64(d + K),
        )  # fmt: skip
        words, last = (channels + 63) // 64, load64(d + E)
        while True:
            unit = fetch_add(d, 1)
            if unit >= load64(d + UNITS):
                break
            image, part = unit // per_image, unit % per_image
            x, out = load64(d + A) + image * load64(d + B), load64(d + G) + image * load64(d + IMAGE)
            if last:
                for place in range(part * per_unit, min(places, part * per_unit + per_unit)):
                    source, to = x + place * channels * size, out + place * words * 8
                    for _ in range(channels // 64):
                        all64(source, bounds, to, plane)
                        source += 64 * size
                        to += 8
                    left = channels % 64
                    if left:
                        store64(to, 0)
                        store64(to + (p - 1) * plane, 0)
                    while left >= 8:
                        some8(source, bounds, to, plane)
                        source += 8 * size
                        to += 1
                        left -= 8
                    if left:
                        rest(source, size, left, bounds, to, 0, plane)
            else:
                word, first = part % words, part // words * per_unit
                end, n, step = min(places, first + per_unit), min(64, channels - 64 * word), places * size
                source, to, row = x + word * 64 * step, out + word * 8, words * 8
                place = first
                while place + STRIP <= end:
                    strip(source + place * size, step, n, bounds, to + place * row, row, plane)
                    place += STRIP
                if place < end and places >= STRIP:  # once more with some places before it
                    strip(source + (end - STRIP) * size, step, n, bounds, to + (end - STRIP) * row, row, plane)
                    place = end
                while place + 8 <= end:
                    strip8(source + place * size, step, n, bounds, to + place * row, row, plane)
                    place += 8
                while place < end:
                    strip1(source + place * size, step, n, bounds, to + place * row, row, plane)
                    place += 1

    return code


@helper
def unpack(d):  # type: ignore[no-untyped-def]
    """A words, B bytes to plane 1, C channels, D places, E planes, F codes, G places of a unit, H 64 bytes of scratch a unit."""
    channels, plane, per_unit = load64(d + C), load64(d + B), load64(d + G)
    words = (channels + 63) // 64
    while True:
        unit = fetch_add(d, 1)
        if unit >= load64(d + UNITS):
            break
        spill = load64(d + H) + 64 * unit
        for place in range(unit * per_unit, min(load64(d + D), unit * per_unit + per_unit)):
            for word in range(words):
                source, out, n = load64(d + A) + (place * words + word) * 8, load64(d + F) + place * channels + 64 * word, min(64, channels - 64 * word)
                to = out if n == 64 else spill
                if load64(d + E) == 1:
                    unpack1(source, plane, to)
                else:
                    unpack2(source, plane, to)
                if n < 64:
                    copy(out, to, n)


@helper
def max_pool(d):  # type: ignore[no-untyped-def]
    """A packed, B bytes to plane 1, C words, D height, E width, F out height, G out width, H geometry (int64 kernel, stride, padding, dilation of
    rows, then of columns), IMAGE out, J bytes to its plane 1, K planes. A unit is an output row of an image."""
    words, height, width, oh, ow, g = load64(d + C), load64(d + D), load64(d + E), load64(d + F), load64(d + G), load64(d + H)
    while True:
        unit = fetch_add(d, 1)
        if unit >= load64(d + UNITS):
            break
        image, oy = unit // oh, unit % oh
        for ox in range(ow):
            for word in range(words):
                plus, some = 0, -1  # where nothing is +1, what is not 0 everywhere is -1 everywhere
                for i in range(load64(g)):
                    y = oy * load64(g + 8) - load64(g + 16) + i * load64(g + 24)
                    if y >= 0 and y < height:
                        for j in range(load64(g + 32)):
                            x = ox * load64(g + 40) - load64(g + 48) + j * load64(g + 56)
                            if x >= 0 and x < width:
                                at = load64(d + A) + (((image * height + y) * width + x) * words + word) * 8
                                plus |= load64(at)
                                if load64(d + K) == 2:
                                    some &= load64(at + load64(d + B))
                to = load64(d + IMAGE) + ((unit * ow + ox) * words + word) * 8
                store64(to, plus)
                if load64(d + K) == 2:
                    store64(to + load64(d + J), plus | some)


@helper
def code_pool(d):  # type: ignore[no-untyped-def]
    """A codes, C channels, D height, E width, F out height, G out width, H geometry as of ``max_pool``, IMAGE out, J signed. A unit is an output row."""
    channels, height, width, oh, ow, g = load64(d + C), load64(d + D), load64(d + E), load64(d + F), load64(d + G), load64(d + H)
    signed = load64(d + J)
    while True:
        unit = fetch_add(d, 1)
        if unit >= load64(d + UNITS):
            break
        image, oy = unit // oh, unit % oh
        for ox in range(ow):
            to, seen = load64(d + IMAGE) + (unit * ow + ox) * channels, False
            for i in range(load64(g)):
                y = oy * load64(g + 8) - load64(g + 16) + i * load64(g + 24)
                if y < 0 or y >= height:
                    continue
                for j in range(load64(g + 32)):
                    x = ox * load64(g + 40) - load64(g + 48) + j * load64(g + 56)
                    if x < 0 or x >= width:
                        continue
                    at = load64(d + A) + ((image * height + y) * width + x) * channels
                    if not seen:
                        copy(to, at, channels)
                        seen = True
                    else:
                        _max_row(at, to, channels, signed)


@helper
def _max_row(x, out, n, signed):  # type: ignore[no-untyped-def]
    i = 0
    while i + 64 <= n:
        if signed:
            max_s64(x + i, out + i)
        else:
            max_u64(x + i, out + i)
        i += 64
    while i < n:
        if signed:
            max_s1(x + i, out + i)
        else:
            max_u1(x + i, out + i)
        i += 1


@helper
def add(d):  # type: ignore[no-untyped-def]
    """A and B codes, C constants, D out, E elements, F elements of a unit (a multiple of 16), G 64 bytes of scratch a unit."""
    a, b, out = load64(d + A), load64(d + B), load64(d + D)
    while True:
        unit = fetch_add(d, 1)
        if unit >= load64(d + UNITS):
            break
        i, spill = unit * load64(d + F), load64(d + G) + 64 * unit
        end = min(load64(d + E), i + load64(d + F))
        while i + 16 <= end:
            add_codes(a + i, b + i, load64(d + C), out + i)
            i += 16
        if i < end:
            zero(spill, 64)
            copy(spill, a + i, end - i)
            copy(spill + 16, b + i, end - i)
            add_codes(spill, spill + 16, load64(d + C), spill + 32)
            copy(out + i, spill + 32, end - i)


@helper
def table(d):  # type: ignore[no-untyped-def]
    """A codes, B 256 values, D out, E elements, F elements of a unit."""
    a, values, out = load64(d + A), load64(d + B), load64(d + D)
    while True:
        unit = fetch_add(d, 1)
        if unit >= load64(d + UNITS):
            break
        for i in range(unit * load64(d + F), min(load64(d + E), (unit + 1) * load64(d + F))):
            store8(out + i, load8(values + load8(a + i)))


@helper
def quantize(d):  # type: ignore[no-untyped-def]
    """A float32 values, C constants, D codes, E channels (1: values lie as their codes), F places, G places of a unit, H units of an image, IMAGE scratch:
    bytes ``E * 16`` a unit. With more than one channel values are ``[B, C, S]`` and codes ``[B, S, C]``."""
    channels, places, per_unit, constants = load64(d + E), load64(d + F), load64(d + G), load64(d + C)
    while True:
        unit = fetch_add(d, 1)
        if unit >= load64(d + UNITS):
            break
        image, first = unit // load64(d + H), unit % load64(d + H) * per_unit
        x, out, spill = load64(d + A) + image * channels * places * 4, load64(d + D) + image * channels * places, load64(d + IMAGE) + unit * channels * 16
        place, end = first, min(places, first + per_unit)
        while place + 16 <= end:
            if channels == 1:
                quantize16(x + 4 * place, constants, out + place)
            else:
                for c in range(channels):
                    quantize16(x + 4 * (c * places + place), constants, spill + 16 * c)
                for i in range(16):
                    for c in range(channels):
                        store8(out + (place + i) * channels + c, load8(spill + 16 * c + i))
            place += 16
        while place < end:
            for c in range(channels):
                quantize1(x + 4 * (c * places + place), constants, out + place * channels + c)
            place += 1


@helper
def gather(d):  # type: ignore[no-untyped-def]
    """Bits of all taps of a group one behind the other. A to G as of ``max_pool``, H its geometry and channels of a group, groups, words of a group,
    IMAGE out, J bytes to its plane 1, K planes. A unit is an output row."""
    words, height, width, oh, ow, g = load64(d + C), load64(d + D), load64(d + E), load64(d + F), load64(d + G), load64(d + H)
    size, groups, stored = load64(g + 64), load64(g + 72), load64(g + 80)
    while True:
        unit = fetch_add(d, 1)
        if unit >= load64(d + UNITS):
            break
        image, oy = unit // oh, unit % oh
        for plane in range(load64(d + K)):
            source, to = load64(d + A) + plane * load64(d + B), load64(d + IMAGE) + plane * load64(d + J) + unit * ow * groups * stored * 8
            zero(to, ow * groups * stored * 8)
            for ox in range(ow):
                for i in range(load64(g)):
                    y = oy * load64(g + 8) - load64(g + 16) + i * load64(g + 24)
                    if y < 0 or y >= height:
                        continue
                    for j in range(load64(g + 32)):
                        x = ox * load64(g + 40) - load64(g + 48) + j * load64(g + 56)
                        if x >= 0 and x < width:
                            at = source + ((image * height + y) * width + x) * words * 8
                            _move_groups(at, to + ox * groups * stored * 8, i * load64(g + 32) + j, size, groups, stored)


@helper
def _move_groups(source, to, tap, size, groups, stored):  # type: ignore[no-untyped-def]
    """The bits of one position, ``size`` a group, to those of a tap."""
    if size == 16:
        for group in range(groups):
            move16(to + group * stored * 8 + tap * 2, source + group * 2)
    elif size == 32:
        for group in range(groups):
            move32(to + group * stored * 8 + tap * 4, source + group * 4)
    elif size == 8:
        for group in range(groups):
            move8(to + group * stored * 8 + tap, source + group)
    else:
        for group in range(groups):
            done = 0
            while done < size:
                a, b = group * size + done, tap * size + done
                n = min(size - done, min(64 - a % 64, 64 - b % 64))
                mask = -1 if n == 64 else (1 << n) - 1
                out = to + (group * stored + b // 64) * 8
                store64(out, load64(out) | (((load64(source + a // 64 * 8) >> (a % 64)) & mask) << (b % 64)))
                done += n
