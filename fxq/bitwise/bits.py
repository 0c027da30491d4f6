"""Bits in words of 64: channel ``c`` is bit ``c % 64`` of word ``c // 64``, spare bits are 0."""

from __future__ import annotations

from typing import Any

import numpy as np

WORD = 64
Array = np.ndarray[Any, Any]
Pair = tuple[int, int]


def words_of(channels: int) -> int:
    """Words that hold one bit a channel."""
    return -(-channels // WORD)


def popcount(x: Array) -> Array:
    """Set bits of each uint64 word, uint8."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(x)
    byte = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # numpy 1
    return np.asarray(byte[np.ascontiguousarray(x)[..., None].view(np.uint8)].sum(-1, dtype=np.uint8))


def pack_bits(bits: Array) -> Array:
    """Booleans ``[..., C]`` as words ``[..., ceil(C / 64)]``, uint64."""
    *lead, channels = bits.shape
    raw = np.zeros((*lead, words_of(channels) * 8), np.uint8)
    raw[..., : -(-channels // 8)] = np.packbits(bits, axis=-1, bitorder="little")
    return raw.view("<u8").astype(np.uint64, copy=False)


def unpack_bits(words: Array, channels: int) -> Array:
    """The inverse of :func:`pack_bits`, uint8 0 or 1."""
    raw = np.ascontiguousarray(words).astype("<u8", copy=False).view(np.uint8)
    return np.unpackbits(raw, axis=-1, count=channels, bitorder="little")
