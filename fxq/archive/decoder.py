"""A stand-alone reader of archives, numpy only, written to be ported: everything a file says is checked before anything is allocated or decoded.

The format is described byte by byte in ``docs/archive.md``. Apart from the error's class nothing of fxq is needed; the compiled kernels are optional.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from fxq.errors import ArchiveError

FORMAT, VERSION = "fxq-archive", 1
DTYPES = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8", "BOOL": "?",
}  # fmt: skip
"""Name of a dtype in the file -> numpy's; numpy has no bfloat16, so that comes as its bits in uint16."""
LOW, STEPS, BLOCK = 1 << 16, 1 << 16, 1 << 16
"""rANS: smallest state of a lane, most symbols of a lane; symbols that are decoded at a time."""
SEGMENT, GROUP = 1 << 10, 1 << 10
"""Huffman: entries of a segment, segments that are decoded at a time."""
PARTS = {"dense", "symbols", "book", "scale", "zero"}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Record:
    """One tensor of an archive, as its index states it (checked).

    ``dtype`` and ``shape`` are the dense tensor's; ``at`` and ``bytes`` say where its blob lies in ``data``. Coded records have ``entries`` table values of
    dtype ``table``; ``bits``, ``lanes`` are rANS's, ``gap`` (bits of an index), ``items`` (gap-value pairs) are Huffman's. ``axis`` is that of scale and zero, -1: one for all.
    ``parts``: what a graph calls pieces of this record.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    bytes: int
    crc32: int
    entries: int = 0
    table: str = ""
    bits: int = 12
    lanes: int = 0
    gap: int = 0
    items: int = 0
    axis: int = 0
    scale: bool = False
    zero: bool = False
    parts: dict[str, str] = field(default_factory=dict)
    at: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.size * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def channels(self) -> int:
        """Length of scale and zero."""
        return self.shape[self.axis] if self.scale and self.axis >= 0 else 1


def need(true: object, fact: str, where: str | None = None, way_out: str = "The file is damaged or not written by fxq: fetch or save it again") -> None:
    """Raise :class:`ArchiveError` unless ``true``."""
    if not true:
        raise ArchiveError(fact, where=where, way_out=way_out)


def parsed(text: bytes, what: str) -> dict[str, Any]:
    """JSON of an object; whatever is wrong with it is an :class:`ArchiveError`."""
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as e:
        raise ArchiveError(f"its {what} is no JSON: {type(e).__name__}", way_out="The file is damaged or not written by fxq: fetch or save it again") from e
    need(type(value) is dict, f"its {what} is no JSON object")
    return dict(value)


def record(entry: Any, at: int) -> Record:
    """Check one entry of the index by itself."""
    need(type(entry) is dict and type(entry.get("name")) is str and entry["name"], "a record has no name")
    where = repr(entry["name"][:200])
    kinds = {k: v for k, v in Record.__annotations__.items() if k != "at"}
    types = {"str": str, "int": int, "bool": bool, "tuple[int, ...]": list, "dict[str, str]": dict}
    need(entry.keys() <= kinds.keys() and all(type(v) is types[kinds[k]] for k, v in entry.items()), "unknown fields, or fields of a wrong type", where)
    need({"dtype", "shape", "coding", "bytes", "crc32"} <= entry.keys() and entry["dtype"] in DTYPES, "fields are missing or the dtype is unknown", where)
    shape = entry["shape"]
    need(len(shape) <= 32 and all(type(d) is int and d >= 0 for d in shape) and math.prod(max(d, 1) for d in shape) < 1 << 48, "an impossible shape", where)
    r = Record(**{"table": entry["dtype"] if entry["coding"] != "raw" else "", **entry, "shape": tuple(shape), "at": at})
    need(0 <= r.bytes < 1 << 62 and 0 <= r.crc32 < 1 << 32, "an impossible length or checksum", where)
    need(r.parts.keys() <= PARTS and all(type(v) is str for v in r.parts.values()), "unknown parts", where)
    need(r.coding in ("raw", "rans", "huffman"), f"unknown coding {r.coding[:40]!r}", where, "Update fxq")
    if r.coding == "raw":
        need(r.bytes == r.dense_bytes and not (r.scale or r.zero or r.table), "length and shape do not fit", where)
        return r
    need(0 < r.entries <= 1 << 15 and r.table in DTYPES, "an impossible table", where)
    need(r.dtype == "F32" if r.scale else r.dtype == r.table and not r.zero, "table, scale and dtype do not fit", where)
    need(-1 <= r.axis < max(len(shape), 0 if r.scale else 1), "no such axis", where)
    if r.coding == "rans":
        need(8 <= r.bits <= 15 and 0 <= r.lanes <= 1 << 16 and (r.lanes == 0 or r.size <= r.lanes * STEPS), "impossible lanes or bits", where)
    else:
        need(r.gap in (4, 5, 8) and 0 <= r.items <= r.size, "an impossible index", where)
    return r


def varints(blob: Array, count: int) -> tuple[Array, int]:
    """``count`` numbers of 7 bits a byte, low ones first, at most 3 bytes each -> (int64 numbers, bytes read)."""
    ends = np.flatnonzero(blob[: 3 * count] < 128)[:count]
    need(len(ends) == count, "its frequencies are cut off")
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    need(np.all(ends - starts < 3), "a frequency is too long")
    value = np.zeros(count, np.int64)
    for k in range(3):
        at = np.minimum(starts + k, ends)
        value += np.where(starts + k <= ends, (blob[at] & 127).astype(np.int64) << 7 * k, 0)
    return value, int(ends[-1]) + 1


def rans(blob: Array, r: Record, values: Array, out: Array) -> None:
    """Undo interleaved rANS: ``out[i] = values[symbol i]``; frequencies (varints), lane states (u32), words (u16)."""
    freq, at = varints(blob, r.entries)
    need(freq.sum() == 1 << r.bits, "its frequencies do not add up")
    words, state = blob[at + 4 * r.lanes :], blob[at : at + 4 * r.lanes]
    need(len(state) == 4 * r.lanes and len(words) % 2 == 0, "its states are cut off")
    if not r.lanes:  # one symbol only, or nothing
        need(len(words) == 0 and (out.size == 0 or freq.max() == 1 << r.bits), "it has no lanes")
        out[...] = values[int(freq.argmax())]
        return
    x = np.frombuffer(state.tobytes(), "<u4").astype(np.uint32)
    need(np.all(x >= LOW) and len(words) <= 2 * out.size, "states and words do not fit")
    symbol = np.repeat(np.arange(r.entries), freq)
    slots = freq[symbol] | (np.arange(1 << r.bits) - (np.cumsum(freq) - freq)[symbol]) << 16
    step = kernel("rans", out.size) or (rans_few if r.lanes < 32 else rans_many)
    used = step(words, x, slots.astype(np.uint32), r.bits, np.ascontiguousarray(values[symbol]), out)
    need(2 * used == len(words) and np.all(x == LOW), "its words do not end where its states do")


def rans_many(words: Array, x: Array, slots: Array, bits: int, values: Array, out: Array) -> int:
    """All lanes in lock-step; returns the number of words read. ``slots``: frequency + (slot - first slot of the symbol) << 16."""
    w, lanes, pos, mask, low = words.view("<u2") if words.size else words, len(x), 0, np.uint32((1 << bits) - 1), np.uint32(LOW)
    block, g, h = np.empty((max(1, BLOCK // lanes), lanes), np.intp), np.empty(lanes, np.uint32), np.empty(lanes, np.uint32)
    for start in range(0, out.size, block.size):
        n = min(block.size, out.size - start)
        for t in range(-(-n // lanes)):
            k = min(lanes, n - t * lanes)
            row, y, a, b = block[t, :k], x[:k], g[:k], h[:k]
            np.bitwise_and(y, mask, out=a)
            row[:] = a
            np.take(slots, row, out=a, mode="clip")
            np.right_shift(y, np.uint32(bits), out=y)
            np.multiply(y, np.bitwise_and(a, np.uint32(0xFFFF), out=b), out=y)
            np.add(y, np.right_shift(a, np.uint32(16), out=a), out=y)
            low_ones = (y < low).nonzero()[0]
            need(pos + len(low_ones) <= len(w), "its words are cut off")
            y[low_ones] = y[low_ones] << np.uint32(16) | w[pos : pos + len(low_ones)]
            pos += len(low_ones)
        np.take(values, block.reshape(-1)[:n], out=out[start : start + n], mode="clip")
    return pos


def rans_few(words: Array, x: Array, slots: Array, bits: int, values: Array, out: Array) -> int:
    """The same one symbol after the other: quicker than numpy for few lanes."""
    w, state, table, lanes, pos, mask = words.view("<u2").tolist(), x.tolist(), slots.tolist(), len(x), 0, (1 << bits) - 1
    for start in range(0, out.size, BLOCK - BLOCK % lanes):
        found = []
        for i in range(min(BLOCK - BLOCK % lanes, out.size - start)):
            v = state[i % lanes]
            found.append(v & mask)
            v = (table[v & mask] & 0xFFFF) * (v >> bits) + (table[v & mask] >> 16)
            if v < LOW:
                need(pos < len(w), "its words are cut off")
                v, pos = v << 16 | w[pos], pos + 1
            state[i % lanes] = v
        out[start : start + len(found)] = values[found]
    x[:] = state
    return pos


def kernel(name: str, size: int) -> Callable[..., int] | None:
    """The compiled form of an inner loop, where numba is installed and the tensor is worth it; ``FXQ_NUMBA=0`` switches it off."""
    try:
        found: Callable[..., int] | None = importlib.import_module("fxq.archive.rans_numba").kernel(name, size)
    except ImportError:
        return None
    return found


def prefix(lengths: Array) -> tuple[Array, Array, int]:
    """Canonical code lengths -> (symbol, length) for each of the next ``m`` bits, and ``m``. Short codes come first, then small symbols."""
    order = np.lexsort((np.arange(len(lengths)), lengths))[np.count_nonzero(lengths == 0) :]
    need(len(order), "it has no codes")
    m = int(lengths[order[-1]])
    width = 1 << (m - lengths[order].astype(np.int64))
    need(width.sum() == 1 << m or len(order) == m == 1, "its code lengths do not add up")
    table = np.resize(np.repeat(order, width), 1 << m).astype(np.uint16)
    return table, lengths[table], m


def huffman(blob: Array, r: Record, values: Array, out: Array) -> None:
    """Undo Huffman with relative indices: code lengths (4 bits each; values, then gaps), bits of each segment (u16), then the codes."""
    head, segments = (r.entries + (1 << r.gap) + 1) // 2, -(-r.items // SEGMENT)
    need(len(blob) >= head + 2 * segments, "its code lengths are cut off")
    lengths = np.stack([blob[:head] & 15, blob[:head] >> 4], 1).reshape(-1)
    out[...] = values[0]
    codes = blob[head + 2 * segments :]
    start = np.concatenate([[0], np.cumsum(np.frombuffer(blob[head : head + 2 * segments].tobytes(), "<u2"), dtype=np.int64)])
    need(len(codes) == -(-int(start[-1]) // 8), "its codes do not fill its segments")
    if not r.items:
        return
    value, gap = prefix(lengths[: r.entries]), prefix(lengths[r.entries : r.entries + (1 << r.gap)])
    padded = np.concatenate([codes, np.zeros(8, np.uint8)])
    window, last = np.ndarray((len(codes) + 1,), ">u8", padded, strides=(1,)), -1
    for first in range(0, segments, GROUP):
        ends = start[first + 1 : first + GROUP + 1]
        count = min(len(ends) * SEGMENT, r.items - first * SEGMENT)
        pairs = segment_group(window, start[first : first + len(ends)].copy(), ends, count, gap, value)
        where = np.cumsum(pairs[0][:count], dtype=np.int64) + (np.arange(1, count + 1) + last)
        last = int(where[-1])
        need(last < out.size, "its indices leave the tensor")
        out[where] = values[pairs[1][:count]]


def segment_group(window: Array, p: Array, ends: Array, count: int, gap: tuple[Array, Array, int], value: tuple[Array, Array, int]) -> list[Array]:
    """Some segments in lock-step: the gaps and the symbols of ``count`` pairs. ``window``: 64 bits from each byte on; ``p``: first bit of each segment."""
    found = [np.zeros((len(p), SEGMENT), np.uint16) for _ in range(2)]
    for t in range(min(count, SEGMENT)):
        k = len(p) - (len(p) * SEGMENT - count > SEGMENT - 1 - t)
        v = window[np.minimum(p[:k] >> 3, len(window) - 1)].astype(np.uint64) << (p[:k] & 7).astype(np.uint64)
        for (symbol, length, m), column in zip((gap, value), found, strict=True):
            i = (v >> np.uint64(64 - m)).astype(np.intp)
            column[:k, t], used = symbol[i], length[i]
            v <<= used.astype(np.uint64)
            p[:k] += used
    need(np.array_equal(p, ends), "a segment does not end where it should")
    return [f.reshape(-1) for f in found]


class Archive:
    """An open archive: what is inside is known and checked, tensors are decoded one at a time when asked for.

    Args:
        source: path of a file, or its bytes.
        max_bytes: most bytes of all dense tensors together; by default 64 MiB and 1024 times the file.

    Attributes:
        version: of fxq that wrote the file. graph: what the writer gave as graph, or None. records: all tensors. size: bytes of the file.

    Raises:
        ArchiveError: for everything that is wrong with the file.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, *, max_bytes: int | None = None) -> None:
        self.where = "archive" if isinstance(source, bytes) else os.fspath(source)
        self._bytes = memoryview(source) if isinstance(source, bytes) else None
        self._file: BinaryIO | None = None
        try:
            if not isinstance(source, bytes):
                self._file = open(source, "rb")  # noqa: SIM115
            self.size = len(source) if isinstance(source, bytes) else os.fstat(self._file.fileno()).st_size if self._file else 0
            self._open(max_bytes)
        except OSError as e:
            raise ArchiveError(f"cannot be read: {e.strerror or e}", where=self.where, way_out="Check the path") from e
        except ArchiveError as e:
            self.close()
            raise ArchiveError(e.fact, where=f"{self.where}: {e.where}" if e.where else self.where, way_out=e.way_out) from None

    def _open(self, max_bytes: int | None) -> None:
        length = int.from_bytes(self._read(0, 8), "little")
        need(length <= min(self.size - 8, 1 << 16), "its header is longer than the file, or it is no archive")
        header = parsed(self._read(8, length), "header")
        meta = header.get("__metadata__")
        need(type(meta) is dict and meta.get("format") == FORMAT, "is no archive of fxq", way_out="Take files that fxq wrote as archives")
        need(meta.get("version") == str(VERSION), f"has version {str(meta.get('version'))[:20]}, this fxq reads {VERSION}", way_out="Update fxq")
        need(header.keys() == {"__metadata__", "index", "data"} and all(type(header[k]) is dict for k in ("index", "data")), "its header lists other tensors")
        end = self.size - 8 - length
        cut = header["index"].get("shape", [None])
        need(type(cut) is list and len(cut) == 1 and type(cut[0]) is int and 0 < cut[0] <= end, "its index is cut off")
        n = cut[0]
        need(header["index"] == {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}, "its header is damaged")
        need(header["data"] == {"dtype": "U8", "shape": [end - n], "data_offsets": [n, end]}, "its header and its size do not fit")
        packed = self._read(8 + length, n)
        need(meta.get("index") == str(zlib.crc32(packed)), "the checksum of its index is wrong")
        self._index(packed, 8 + length + n, (1024 * self.size + (64 << 20)) if max_bytes is None else max_bytes)

    def _index(self, packed: bytes, at: int, max_bytes: int) -> None:
        unpack = zlib.decompressobj()
        try:
            text = unpack.decompress(packed, index_limit(len(packed)))
        except zlib.error as e:
            raise ArchiveError("its index cannot be unpacked", way_out="The file is damaged: fetch or save it again") from e
        need(unpack.eof and not unpack.unused_data, "its index is too long or cut off")
        index = parsed(text, "index")
        need(index.keys() == {"fxq", "graph", "records"} and type(index["fxq"]) is str and type(index["graph"]) in (dict, type(None)), "its index is no index")
        need(type(index["records"]) is list and len(index["records"]) <= 1 << 16, "its index has no records, or too many")
        self.version, self.graph, total, records = index["fxq"], index["graph"], 0, []
        for entry in index["records"]:
            records.append(record(entry, at))
            at, total = at + records[-1].bytes, total + records[-1].dense_bytes
            need(at <= self.size, "the file ends before its tensors", repr(records[-1].name))
            fact = f"its tensors need more than {max_bytes:,} bytes when decoded"
            need(total <= max_bytes, fact, way_out="Pass max_bytes= if you trust the file")
        need(at == self.size, "the file goes on behind its tensors")
        self.records: tuple[Record, ...] = tuple(records)
        self.by_name = {r.name: r for r in self.records}
        need(len(self.by_name) == len(self.records), "two of its tensors have the same name")

    def _read(self, at: int, count: int) -> bytes:
        if self._bytes is not None:
            found = bytes(self._bytes[at : at + count])
        else:
            need(self._file is not None, "is closed", way_out="Open it again")
            assert self._file is not None
            self._file.seek(at)
            found = self._file.read(count)
        need(len(found) == count, "the file is cut off")
        return found

    def close(self) -> None:
        """Close the file; arrays that were decoded stay valid."""
        if self._file is not None:
            self._file.close()
        self._file = self._bytes = None

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def _blob(self, r: Record) -> Array:
        blob = self._read(r.at, r.bytes)
        need(zlib.crc32(blob) == r.crc32, "the checksum is wrong", repr(r.name))
        return np.frombuffer(blob, np.uint8)

    def _head(self, r: Record) -> tuple[Array, Array | None, Array | None, Array]:
        """Table, scale, zero and the rest of a coded record's blob."""
        need(r.coding != "raw", "is stored raw: it has no symbols", repr(r.name), "Ask for its dense values")
        blob, found = self._blob(r), []
        for there, dtype, count in ((True, DTYPES[r.table], r.entries), (r.scale, "<f4", r.channels), (r.zero, "<i4", r.channels)):
            cut = np.dtype(dtype).itemsize * count * there
            need(len(blob) >= cut, "its table is cut off", repr(r.name))
            found.append(np.frombuffer(blob[:cut].tobytes(), dtype) if there else None)
            blob = blob[cut:]
        table, scale, zero = found
        assert table is not None
        return table, scale, zero, blob

    def _fill(self, r: Record, rest: Array, values: Array) -> Array:
        out = np.empty(r.size, values.dtype)
        try:
            (rans if r.coding == "rans" else huffman)(rest, r, values, out)
        except ArchiveError as e:
            raise ArchiveError(e.fact, where=f"{self.where}: {r.name!r}", way_out=e.way_out) from None
        return out.reshape(r.shape)

    def table(self, r: Record) -> Array:
        """The values of the symbols [entries], dtype ``r.table``."""
        return self._head(r)[0]

    def scale(self, r: Record) -> Array | None:
        """float32 [channels], or None."""
        return self._head(r)[1]

    def zero(self, r: Record) -> Array | None:
        """int32 [channels], or None."""
        return self._head(r)[2]

    def symbols(self, r: Record) -> Array:
        """Symbols of a coded record, uint8 (up to 256 entries) or uint16, in the tensor's shape."""
        rest = self._head(r)[3]
        return self._fill(r, rest, np.arange(r.entries, dtype=np.uint8 if r.entries <= 256 else np.uint16))

    def dense(self, r: Record) -> Array:
        """The tensor; bfloat16 comes as its bits in uint16. With a scale: ``(table[symbol] - zero) * scale`` in float32, in this order."""
        if r.coding == "raw":
            return self._blob(r).view(DTYPES[r.dtype]).reshape(r.shape).copy()
        table, scale, zero, rest = self._head(r)
        out = self._fill(r, rest, table if scale is None else table.astype(np.float32))
        shape = [1] * len(r.shape)
        if r.axis >= 0 and scale is not None:
            shape[r.axis] = -1
        if zero is not None:
            np.subtract(out, zero.astype(np.float32).reshape(shape), out=out)
        if scale is not None:
            np.multiply(out, scale.reshape(shape), out=out)
        return out


def index_limit(packed: int) -> int:
    """Most bytes that an index of ``packed`` bytes may have when unpacked."""
    return min(64 << 20, 100 * packed + (1 << 20))
