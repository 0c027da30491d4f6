"""Interleaved range asymmetric numeral systems (rANS; Duda 2013, arXiv 1311.2540; lanes as in Giesen 2014, arXiv 1402.3392): the writing side, numpy.

A lane's state ``x`` is in [2^16, 2^32); a symbol with frequency ``f`` of ``2^bits`` takes it to ``(x // f << bits) + x % f + start``, after its low 16 bits
have gone out as a word where it would grow too large. Symbol ``i`` belongs to lane ``i % lanes``; the reader goes forwards, so the writer goes backwards.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fxq.archive.decoder import BLOCK, LOW, STEPS
from fxq.archive.fast import FEW, kernels

Array = np.ndarray[Any, Any]
PRECISIONS = (8, 9, 10, 11, 12, 13, 14, 15)


def entropy(counts: Array) -> float:
    """Bits of all symbols together under their own distribution."""
    c = counts[counts > 0].astype(np.float64)
    return float((c * np.log2(c.sum() / c)).sum()) if c.size else 0.0


def frequencies(counts: Array, bits: int) -> Array:
    """Integer frequencies (int64 [K]) with the sum ``2^bits``; a symbol that occurs keeps at least 1.

    Raises:
        ValueError: when more than ``2^bits`` symbols occur.
    """
    c, total = np.asarray(counts, np.float64), 1 << bits
    used = c > 0
    if used.sum() > total:
        raise ValueError(f"{int(used.sum())} symbols do not fit in 2^{bits} slots")
    f, rest = np.zeros(len(c), np.int64), used.copy()
    if not used.any():
        f[:1] = total
        return f
    while True:  # what is too rare gets 1, the others share the rest
        share = c * rest / max(float((c * rest).sum()), 1.0) * (total - int((used & ~rest).sum()))
        rare = rest & (share < 1)
        if not rare.any():
            break
        rest &= ~rare
    f[used] = np.maximum(np.floor(share[used]), 1).astype(np.int64)
    left = total - int(f.sum())
    while left > 0:  # the last slots go where they save most
        gain = np.where(used, c * np.log2((f + 1) / np.maximum(f, 1)), -1.0)
        best = np.argsort(-gain, kind="stable")[: min(left, int(used.sum()))]
        f[best] += 1
        left -= len(best)
    return f


def coded_bits(counts: Array, freq: Array, bits: int) -> float:
    """Bits of all symbols together when coded with these frequencies."""
    used = counts > 0
    return float((counts[used] * (bits - np.log2(freq[used]))).sum())


def varint_bytes(freq: Array) -> int:
    """Bytes of the frequencies as varints."""
    return int((1 + (freq >= 1 << 7).astype(np.int64) + (freq >= 1 << 14)).sum())


def varints(values: Array) -> bytes:
    """7 bits a byte, low ones first; the high bit says that more follow."""
    out = bytearray()
    for v in values.tolist():
        while v > 127:
            out.append(v & 127 | 128)
            v >>= 7
        out.append(v)
    return bytes(out)


def choose(counts: Array) -> tuple[Array, int, float]:
    """Frequencies and precision for a histogram: the smallest precision within 0.1 % of the best -> (frequencies, bits, bytes of table and payload)."""
    used = int((np.asarray(counts) > 0).sum())
    found = []
    for bits in PRECISIONS:
        if used <= 1 << bits:
            freq = frequencies(counts, bits)
            found.append((coded_bits(counts, freq, bits) / 8 + varint_bytes(freq), bits, freq))
    best = min(size for size, *_ in found)
    size, bits, freq = next(one for one in found if one[0] <= 1.001 * best)
    return freq, bits, size


def lanes_for(size: int, payload: float) -> int:
    """Lanes for ``size`` symbols in ``payload`` bytes: a lane costs 2 bytes on top: 0.4 % up to 512 lanes, then 0.2 %; at most 2^16 symbols a lane."""
    lanes = 1 << max(0, round(math.log2(max(1.0, min(payload / 512, 512.0), payload / 1024))))
    return max(1, min(1 << 14, size, lanes), -(-size // STEPS))


def encode(symbols: Array, freq: Array, lanes: int, bits: int) -> tuple[Array, Array]:
    """Symbols (any shape, unsigned) -> (words uint16 in reading order, final state uint32 of each lane).

    Memory: the words and a few blocks of 2^16 symbols.
    """
    s = np.ascontiguousarray(symbols).reshape(-1)
    f = np.maximum(freq, 1).astype(np.float64)
    tables = np.stack([1 / f, (1 << bits) - f, np.cumsum(freq) - freq, f * 2.0 ** (32 - bits)])
    x = np.full(lanes, float(LOW))
    compiled = kernels(s.size)
    words = (compiled.encode if compiled is not None else one_by_one if lanes < FEW else lockstep)(s, x, tables)
    return np.concatenate([*words[::-1], np.empty(0, np.uint16)]), x.astype(np.uint32)


def lockstep(symbols: Array, x: Array, tables: Array) -> list[Array]:
    """All lanes ``x`` (float64) at once -> words in pieces, the last ones first. ``tables`` [4, K]: 1 / f, 2^bits - f, start, limit of the state."""
    lanes, words = len(x), []
    rows = max(1, BLOCK // lanes)
    for first in range((len(symbols) - 1) // (rows * lanes) * rows * lanes, -1, -rows * lanes):
        block = symbols[first : first + rows * lanes]
        inverse, rest, start, limit = (np.take(t, block) for t in tables)
        for at in range((len(block) - 1) // lanes * lanes, -1, -lanes):
            part = slice(at, min(at + lanes, len(block)))
            y = x[: part.stop - at]
            full = (y >= limit[part]).nonzero()[0]
            if len(full):
                large = y[full].astype(np.int64)
                words.append((large & 0xFFFF).astype(np.uint16))
                y[full] = large >> 16
            q = np.floor((y + 0.5) * inverse[part])  # exact: y < 2^32, and the quotient is at least 2^-16 from the next integer
            q *= rest[part]
            y += q
            y += start[part]
    return words


def one_by_one(symbols: Array, x: Array, tables: Array) -> list[Array]:
    """As :func:`lockstep`, one symbol after the other: quicker for few lanes."""
    total = round(float((1 / tables[0] + tables[1])[0]))
    freq, start, limit = (np.rint(t).astype(np.int64).tolist() for t in (total - tables[1], tables[2], tables[3]))
    lanes, state, words = len(x), [int(v) for v in x], []
    for first in range((len(symbols) - 1) // BLOCK * BLOCK, -1, -BLOCK):
        part = symbols[first : first + BLOCK].tolist()
        for i in range(len(part) - 1, -1, -1):
            s, lane = part[i], (first + i) % lanes
            v = state[lane]
            if v >= limit[s]:
                words.append(v & 0xFFFF)
                v >>= 16
            state[lane] = v // freq[s] * total + v % freq[s] + start[s]
    x[:] = state
    return [np.array(words[::-1], np.uint16)]
