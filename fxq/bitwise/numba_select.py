"""Channels of packed values in another order, compiled by numba: four bits at a time through tables. Imported only where numba is."""

from __future__ import annotations

from typing import Any

import numpy as np

from fxq.bitwise.numba_jit import jit

Array = np.ndarray[Any, Any]
NIBBLE, LANES = 4, 4


def tables(channels: int, indices: Array) -> Array:
    """What each value of each four channels adds to the result: uint64 ``[ceil(channels / 4), 16, words]``, words rounded up to 4.

    Args:
        indices: int64, the channel that stands at each place of the result.
    """
    words = -(-len(indices) // (64 * LANES)) * LANES
    made = np.zeros((-(-channels // NIBBLE), 1 << NIBBLE, words), np.uint64)
    for place, channel in enumerate(indices.tolist()):
        group, bit = divmod(channel, NIBBLE)
        has = (np.arange(1 << NIBBLE) >> bit & 1).astype(np.uint64)
        made[group, :, place // 64] |= has << np.uint64(place % 64)
    return made


@jit()
def select(x: Array, by: Array, out: Array) -> None:
    """Write ``out`` ``[places, words]`` from ``x`` ``[places, words of the input]`` by :func:`tables`; ``words`` is a multiple of 4."""
    groups, words = by.shape[0], np.uint64(by.shape[2])
    flat = by.reshape(-1)
    for i in range(x.shape[0]):
        for first in range(0, by.shape[2], LANES):
            a = b = c = d = np.uint64(0)
            for word in range(x.shape[1]):
                bits, row = x[i, word], np.uint64(word * 256)
                for _ in range(min(groups - word * 16, 16)):
                    at = (row + (bits & np.uint64(15))) * words + np.uint64(first)  # unsigned: numba looks for no negative index
                    bits >>= np.uint64(4)
                    row += np.uint64(16)
                    a |= flat[at]
                    b |= flat[at + np.uint64(1)]
                    c |= flat[at + np.uint64(2)]
                    d |= flat[at + np.uint64(3)]
            out[i, first], out[i, first + 1], out[i, first + 2], out[i, first + 3] = a, b, c, d


def shuffled_groups(channels: int, indices: Array) -> int:
    """Groups of a channel shuffle that :func:`shuffle` takes: place ``j * groups + i`` holds channel ``i * channels / groups + j``; else 0."""
    for groups in (2, 4, 8, 16, 32):
        size = channels // groups
        fits = channels % 64 == 0 and len(indices) == channels
        if fits and np.array_equal(indices, np.arange(channels).reshape(groups, size).T.reshape(-1)):
            return groups
    return 0


def spread(groups: int) -> Array:
    """All values of as many bits (8, 4 or 2) of a group as fit one word of a :func:`shuffle`, their bits ``groups`` places apart: uint64 ``[2^bits]``."""
    piece = min(8, 64 // groups)
    n = np.arange(1 << piece, dtype=np.uint64)
    return sum(((n >> np.uint64(b) & np.uint64(1)) << np.uint64(b * groups) for b in range(piece)), np.zeros_like(n))


@jit()
def shuffle(x: Array, groups: int, by: Array, out: Array) -> None:
    """Write ``out`` ``[places, words]``: the channels of ``x``, of the same shape, shuffled; ``by`` of :func:`spread`."""
    words = x.shape[1]
    size, each, piece = np.uint64(words * 64 // groups), 64 // groups, min(8, 64 // groups)
    low, wide, count = np.uint64(len(by) - 1), np.uint64(piece * groups), each // piece
    for i in range(x.shape[0]):
        for w in range(words):
            made = np.uint64(0)
            for g in range(groups):
                at = np.uint64(g) * size + np.uint64(w * each)
                bits, shift = x[i, at >> np.uint64(6)] >> (at & np.uint64(63)), np.uint64(g)
                for _ in range(count):
                    made |= by[bits & low] << shift
                    bits >>= np.uint64(piece)
                    shift += wide
            out[i, w] = made
