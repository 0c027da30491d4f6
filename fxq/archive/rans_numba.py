"""The inner loops of rANS, compiled by numba: the same bytes in and out as the numpy forms. Imported only where numba is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]
BLOCK = 1 << 20
"""Symbols that are encoded at a time."""


@njit(nogil=True, cache=True, boundscheck=False)
def _decode(words: Array, x: Array, freq: Array, within: Array, bits: int, values: Array, out: Array) -> Any:
    """-1 when words are missing. Reads stay inside: a slot is below 2^bits, and a row of lanes runs unchecked only where a word is left for each of them."""
    lanes, size, total, pos, one = np.uint64(len(x)), np.uint64(len(out)), np.uint64(len(words)), np.uint64(0), np.uint64(1)
    mask, shift, low, sixteen = np.uint32((1 << bits) - 1), np.uint32(bits), np.uint32(1 << 16), np.uint32(16)
    for start in range(np.uint64(0), size, lanes):
        row = out[start : min(start + lanes, size)]
        count = np.uint64(len(row))
        checked = pos + count > total
        for i in range(count):  # unsigned indices: numba would wrap negative ones around
            slot = x[i] & mask
            row[i] = values[slot]
            v = np.uint32(np.uint32(freq[slot]) * (x[i] >> shift) + np.uint32(within[slot]))
            grow = v < low
            if checked:
                if grow and pos >= total:
                    return -1
                x[i] = np.uint32(v << sixteen | np.uint32(words[pos])) if grow else v
            else:
                longer = np.uint32(v << sixteen | np.uint32(words[pos]))
                x[i] = longer if grow else v
            pos += one if grow else np.uint64(0)
    return np.int64(pos)


@njit(nogil=True, cache=True, boundscheck=False)
def _encode(symbols: Array, x: Array, tables: Array, words: Array) -> Any:
    """Fills ``words`` (as many as symbols) from the end; returns where they begin. ``tables`` [K, 4]: 1 / f, 2^bits - f, start, limit of the state."""
    lanes, pos, zero, one = np.uint64(len(x)), np.uint64(len(words)), np.uint64(0), np.uint64(1)
    for step in range((len(symbols) - 1) // len(x) + 1):
        start = len(symbols) - 1 - step * len(x)
        start -= start % len(x)
        row = symbols[start : start + len(x)]
        count = min(np.uint64(len(row)), lanes)
        for k in range(count):
            i = count - one - k
            s, v = np.uint64(row[i]), x[i]
            if v >= tables[s, 3]:
                pos -= one
                large = np.uint32(v)
                words[pos] = np.uint16(large)
                v = np.float64(large >> np.uint32(16))
            x[i] = v + np.floor((v + 0.5) * tables[s, zero]) * tables[s, 1] + tables[s, 2]
    return np.int64(pos)


def decode(words: Array, x: Array, slots: Array, bits: int, values: Array, out: Array) -> int:
    """As :func:`fxq.archive.decoder.lockstep`; ``len(words) // 2 + 1`` where words are missing."""
    if not (len(slots) == len(values) == 1 << bits and values.dtype == out.dtype and len(x)):
        raise ValueError("tables and precision do not fit")
    kind = np.dtype(f"u{out.dtype.itemsize}")
    freq, within = ((slots >> np.uint32(k) & np.uint32(0xFFFF)).astype(np.uint16) for k in (0, 16))
    w = np.require(words.view("<u2"), np.uint16, "A")
    pos = int(_decode(_locked(w), x, _locked(freq), _locked(within), bits, _locked(values.view(kind)), out.view(kind)))
    return pos if pos >= 0 else len(words) // 2 + 1


def encode(symbols: Array, x: Array, tables: Array) -> list[Array]:
    """Flat symbols, all below ``tables.shape[1]`` -> words in pieces, the last ones first; ``x`` (float64) becomes the states."""
    rows = _locked(tables.T)
    words, found = np.empty(min(BLOCK + len(x), len(symbols)), np.uint16), []
    block = max(len(x), BLOCK // len(x) * len(x))
    for start in range((len(symbols) - 1) // block * block, -1, -block):
        part = symbols[start : start + block]
        room = words[: len(part)]
        found.append(room[_encode(_locked(part), x, rows, room) :].copy())
    return found


def _locked(array: Array) -> Array:
    """A read-only view: one compiled form serves files, bytes and arrays."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
