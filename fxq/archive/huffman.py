"""Canonical Huffman codes with relative indices, the form of Deep Compression (Han et al. 2016, arXiv 1510.00149, sections 2 and 4): the writing side, numpy.

Only symbols other than 0 are stored, each with the number of zeros before it (its gap). A gap has ``bits`` bits; a longer one is split by filler zeros:
pairs of the largest gap and symbol 0. Gaps and symbols have one canonical code each. ``SEGMENT`` pairs make a segment, whose length in bits is stored,
so that a reader can take all segments at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxq.archive.decoder import SEGMENT

Array = np.ndarray[Any, Any]
GAPS = (4, 5, 8)
LONGEST = 15
CHUNK = 1 << 17


def code_lengths(counts: Array, longest: int = LONGEST) -> Array:
    """Lengths of a Huffman code (uint8 [K], 0 where nothing is counted), at most ``longest`` bits: where one gets longer, all counts are halved."""
    c = np.asarray(counts, np.int64)
    used = np.flatnonzero(c).tolist()
    out = np.zeros(len(c), np.uint8)
    if len(used) == 1:
        out[used[0]] = 1
    while len(used) > 1:
        heap = [(int(c[s]), i) for i, s in enumerate(used)]
        heapq.heapify(heap)
        parent = [0] * (2 * len(used) - 1)
        for node in range(len(used), len(parent)):
            a = heapq.heappop(heap)
            b = heap[0]
            parent[a[1]] = parent[b[1]] = node
            heapq.heapreplace(heap, (a[0] + b[0], node))
        depth = [0] * len(parent)
        for node in range(len(parent) - 2, -1, -1):
            depth[node] = depth[parent[node]] + 1
        if max(depth) <= longest:
            out[used] = depth[: len(used)]
            break
        c = (c + 1) >> 1
    return out


def codes(lengths: Array) -> Array:
    """Canonical codes (int64 [K]): in the order of (length, symbol), each the one before plus one, shifted to its own length."""
    out, code, before = np.zeros(len(lengths), np.int64), 0, 0
    for s in sorted(np.flatnonzero(lengths).tolist(), key=lambda s: (int(lengths[s]), s)):
        code <<= int(lengths[s]) - before
        out[s], before = code, int(lengths[s])
        code += 1
    return out


def pairs(symbols: Array, bits: int) -> Iterator[tuple[Array, Array]]:
    """Flat symbols -> chunks of (gaps int64, symbols), with filler zeros."""
    for gaps, found in _gaps(symbols):
        more = gaps >> bits
        ends = np.cumsum(more + 1) - 1
        gap = np.full(int(ends[-1]) + 1, (1 << bits) - 1, np.int64)
        value = np.zeros(len(gap), symbols.dtype)
        gap[ends], value[ends] = gaps & ((1 << bits) - 1), found
        yield gap, value


def _gaps(symbols: Array) -> Iterator[tuple[Array, Array]]:
    """Chunks of (zeros before each symbol other than 0, that symbol)."""
    last = -1
    for at in range(0, len(symbols), CHUNK):
        part = symbols[at : at + CHUNK]
        where = np.flatnonzero(part)
        if len(where):
            yield np.diff(where + at, prepend=last) - 1, part[where]
            last = int(where[-1]) + at


@dataclass(frozen=True)
class Plan:
    """How a tensor is coded: ``bits`` of a gap, ``items`` pairs, code lengths, ``size`` bytes without table and scale."""

    bits: int
    items: int
    value: Array
    gap: Array
    payload: int
    size: int


def plan(symbols: Array, counts: Array) -> Plan:
    """The index of 4, 5 or 8 bits that makes the tensor smallest. ``counts``: histogram of the flat symbols."""
    fillers, ends = dict.fromkeys(GAPS, 0), {b: np.zeros(1 << b, np.int64) for b in GAPS}
    for gaps, _ in _gaps(symbols):
        for b in GAPS:
            fillers[b] += int((gaps >> b).sum())
            ends[b] += np.bincount(gaps & ((1 << b) - 1), minlength=1 << b)
    plans = []
    for b in GAPS:
        values, gaps = counts.copy(), ends[b]
        values[0] = fillers[b]
        gaps[-1] += fillers[b]
        value, gap = code_lengths(values), code_lengths(gaps)
        total, items = int((value * values).sum() + (gap * gaps).sum()), int(values.sum())
        payload = -(-total // 8)
        plans.append(Plan(b, items, value, gap, payload, payload + (len(value) + len(gap) + 1) // 2 + 2 * -(-items // SEGMENT)))
    return min(plans, key=lambda p: p.size)


def encode(symbols: Array, p: Plan) -> tuple[bytes, bytes, bytes]:
    """Code lengths (4 bits each, values before gaps), bits of each segment (u16), codes (the first bit is a byte's highest)."""
    value_codes, gap_codes = codes(p.value), codes(p.gap)
    out, segments = np.zeros(p.payload + 8, np.uint8), np.zeros(-(-p.items // SEGMENT), np.int64)
    at, item = 0, 0
    for gap, value in pairs(symbols, p.bits):
        length = p.value[value].astype(np.int64)
        code = gap_codes[gap] << length | value_codes[value]
        length += p.gap[gap]
        end = at + np.cumsum(length)
        start = end - length
        code <<= 40 - length - (start & 7)
        base = start >> 3
        first = int(base[0])
        for k in range(5):
            byte = np.bincount(base - first, weights=(code >> (32 - 8 * k)) & 255).astype(np.uint8)
            out[first + k : first + k + len(byte)] += byte
        number = np.arange(item, item + len(gap)) // SEGMENT
        filled = np.bincount(number - number[0], weights=length).astype(np.int64)
        segments[number[0] : number[0] + len(filled)] += filled
        at, item = int(end[-1]), item + len(gap)
    nibbles = np.concatenate([p.value, p.gap, np.zeros((len(p.value) + len(p.gap)) % 2, np.uint8)])
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes(), segments.astype("<u2").tobytes(), out[: p.payload].tobytes()
