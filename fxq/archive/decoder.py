"""A stand-alone reader of archives in numpy, short enough to be ported: whatever a file says is checked before anything is allocated or decoded.

``docs/archive.md`` describes the format byte by byte. Of fxq it needs the error's class only; :mod:`fxq.archive.fast` replaces its inner loop.
"""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from fxq.errors import ArchiveError

Array = np.ndarray[Any, Any]
FORMAT, VERSION = "fxq-archive", 1
DTYPES = dict(F32="<f4", F16="<f2", F64="<f8", I8="i1", U8="u1", I16="<i2", U16="<u2", I32="<i4", U32="<u4", I64="<i8", BOOL="?", BF16="<u2")
"""Names in the file -> numpy's dtypes; numpy has no bfloat16, so that comes as its bits in uint16."""
LOW, STEPS, BLOCK, SEGMENT, GROUP = 1 << 16, 1 << 16, 1 << 16, 1 << 10, 1 << 8
"""rANS: the smallest state, most symbols of a lane, symbols decoded at a time. Huffman: pairs of a segment, segments decoded at a time."""
LOOP: Callable[[Array, Array, Array, int, Array, Array], int] | None = None  # a quicker form of lockstep
DAMAGED = "The file is damaged or not written by fxq: fetch or save it again"


@dataclass(frozen=True)
class Record:
    """One tensor as the index states it (checked). ``dtype`` and ``shape`` are the dense tensor's, ``at`` and ``bytes`` the place of its blob in the file.

    ``dense_bytes`` are those of the dense tensor; :meth:`Archive.dense` decodes it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str  # "raw", "rans" or "huffman"
    bytes: int
    crc32: int  # of the blob
    entries: int = 0  # of the table
    table: str = ""  # dtype of the table
    bits: int = 12  # rANS: frequencies have the sum 2^bits; Huffman: bits of an index
    count: int = 0  # rANS: lanes; Huffman: pairs of gap and symbol
    axis: int = 0  # of scale and zero; -1: one for all
    scale: bool = False
    zero: bool = False
    at: int = 0
    dense_bytes: int = 0


def need(true: object, fact: str, where: str | None = None, way_out: str = DAMAGED) -> None:
    """Raise :class:`ArchiveError` unless ``true``."""
    if not true:
        raise ArchiveError(fact, where=where, way_out=way_out)


@contextmanager
def inside(where: str) -> Iterator[None]:
    """Whatever goes wrong inside is an :class:`ArchiveError` that names the place."""
    try:
        yield
    except ArchiveError as e:
        raise ArchiveError(e.fact, where=f"{where}: {e.where}" if e.where else where, way_out=e.way_out) from None
    except (OSError, AttributeError, LookupError, TypeError, ValueError, RecursionError, MemoryError, OverflowError, zlib.error) as e:
        raise ArchiveError(f"cannot be read: {getattr(e, 'strerror', None) or f'{type(e).__name__}: {e}'}", where=where, way_out=DAMAGED) from e


def opener(path: str, flags: int) -> int:
    """Opens a file; a pipe is refused later, it is not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys occur once: readers must not differ in which one they take."""
    need(len(dict(pairs)) == len(pairs), "a key occurs twice")
    return dict(pairs)


parse = partial(json.loads, object_pairs_hook=once, parse_constant=lambda name: need(False, f"{name} is no number of JSON"))


def record(entry: dict[str, Any], at: int) -> Record:
    """Check one entry of the index by itself."""
    where, coding, shape, raw = f"{entry['name']!r:.200}", entry["coding"], entry["shape"], entry["coding"] == "raw"
    types = {k: {"str": str, "int": int, "bool": bool}.get(v, list) for k, v in Record.__annotations__.items() if k not in ("at", "dense_bytes")}
    need(all(type(v) is types.get(k) for k, v in entry.items()), "it has unknown fields, or fields of a wrong type", where)
    need(coding in ("raw", "rans", "huffman") and {entry["dtype"], entry.get("table", "F32")} <= DTYPES.keys(), "unknown coding or dtype", where, "Update fxq")
    need(len(shape) <= 32 and all(type(d) is int and d >= 0 for d in shape) and math.prod(d or 1 for d in shape) < 1 << 48, "an impossible shape", where)
    size, dense = math.prod(shape), math.prod(shape) * np.dtype(DTYPES[entry["dtype"]]).itemsize
    r = Record(**{"table": "" if raw else entry["dtype"], **entry, "shape": tuple(shape), "at": at, "dense_bytes": dense})
    need(r.dtype == "F32" and -1 <= r.axis < len(shape) if r.scale else not r.zero and (raw or r.dtype == r.table), "table, scale and dtype do not fit", where)
    lanes = 8 <= r.bits <= 15 and 0 < r.count <= 1 << 16 and size <= r.count * STEPS if coding == "rans" else r.bits in (4, 5, 8) and 0 <= r.count <= size
    need(r.bytes >= 0 and (r.bytes == dense and not (r.scale or r.table) if raw else lanes and 0 < r.entries <= 1 << 15), "impossible lengths", where)
    return r


def varints(blob: Array, count: int) -> tuple[Array, int]:
    """``count`` numbers of 7 bits a byte, low ones first, up to 3 bytes each -> (int64 numbers, bytes read)."""
    ends = np.flatnonzero(blob[: 3 * count] < 128)[:count]
    starts = np.concatenate([[0], ends[:-1] + 1])
    need(len(ends) == count and np.all(ends - starts < 3), "its frequencies are cut off")
    return np.sum([(blob[np.minimum(starts + k, ends)] & 127) * np.int64(1 << 7 * k) * (starts + k <= ends) for k in range(3)], axis=0), int(ends[-1]) + 1


def rans(blob: Array, r: Record, values: Array, out: Array) -> None:
    """Undo interleaved rANS, ``out[i] = values[symbol i]``: frequencies (varints), lane states (u32), words (u16)."""
    freq, at = varints(blob, r.entries)
    x, words = np.frombuffer(blob[at : at + 4 * r.count].tobytes(), "<u4").astype(np.uint32), blob[at + 4 * r.count :]
    fits = len(x) == r.count and len(words) % 2 == 0 and len(words) <= 2 * out.size and np.all(x >= LOW)
    need(fits and freq.sum() == 1 << r.bits, "its frequencies, states and words do not fit")
    symbol = np.repeat(np.arange(r.entries), freq)  # of each slot; a slot is the low bits of a state
    slots = (freq[symbol] | (np.arange(1 << r.bits) - (np.cumsum(freq) - freq)[symbol]) << 16).astype(np.uint32)
    need(2 * (LOOP or lockstep)(words, x, slots, r.bits, values[symbol], out) == len(words) and np.all(x == LOW), "its words do not end where its states do")


def lockstep(words: Array, x: Array, slots: Array, bits: int, values: Array, out: Array) -> int:
    """All lanes ``x`` at once; the number of words read. Of each slot: ``slots`` has its symbol's frequency + (its number within the symbol << 16)."""
    w, lanes, pos, block = words.view("<u2"), len(x), 0, np.empty(len(x) * max(1, BLOCK // len(x)), np.intp)
    for start in range(0, out.size, len(block)):
        part = block[: out.size - start]
        for row in (part[t : t + lanes] for t in range(0, len(part), lanes)):
            x = x[: len(row)]  # the last row may be short
            row[:] = x & ((1 << bits) - 1)
            slot = slots.take(row)
            x >>= bits
            x *= slot & 0xFFFF
            x += slot >> 16
            low = (x < LOW).nonzero()[0]
            need(pos + len(low) <= len(w), "its words are cut off")
            x[low] = x[low] << 16 | w[pos : (pos := pos + len(low))]
        np.take(values, part, out=out[start : start + len(part)], mode="clip")
    return pos


def prefix(lengths: Array) -> tuple[Array, Array, int]:
    """Canonical code lengths -> what the next ``m`` bits mean (symbols, lengths), and ``m``: short codes come first, then small symbols."""
    order, m = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths == 0) :], int(lengths.max())
    width = 1 << (m - lengths[order].astype(np.int64))
    need(width.sum() == 1 << m or len(order) == m <= 1, "its code lengths do not add up")
    table = np.resize(np.repeat(order, width), 1 << m).astype(np.uint16)
    return table, lengths[table].astype(np.uint64), m


def huffman(blob: Array, r: Record, values: Array, out: Array) -> None:
    """Undo Huffman with relative indices: code lengths (4 bits each; values, gaps), bits of each segment (u16), then the codes, high bits first."""
    head, segments = (r.entries + (1 << r.bits) + 1) // 2, -(-r.count // SEGMENT)
    lengths, codes = np.stack([blob[:head] & 15, blob[:head] >> 4], 1).reshape(-1), blob[head + 2 * segments :]
    start = np.concatenate([[0], np.frombuffer(blob[head : head + 2 * segments].tobytes(), "<u2")]).cumsum(dtype=np.int64)
    need(len(blob) >= head and len(start) == segments + 1 and len(codes) == -(-int(start[-1]) // 8), "its codes do not fill its segments")
    out[...] = values[0]
    tables, last = (prefix(lengths[r.entries : r.entries + (1 << r.bits)]), prefix(lengths[: r.entries])), -1
    window = np.ndarray((len(codes) + 1,), ">u8", np.concatenate([codes, np.zeros(8, np.uint8)]), strides=(1,))  # 64 bits from each byte on
    for first in range(0, segments, GROUP):
        p, count = start[first : min(first + GROUP, segments)].copy(), min(GROUP * SEGMENT, r.count - first * SEGMENT)
        found = np.zeros((2, len(p), SEGMENT), np.uint16)
        for t in range(min(count, SEGMENT)):  # a pair of every segment; only the last segment may be short
            k = len(p) - (len(p) * SEGMENT - count >= SEGMENT - t)
            v = window[np.minimum(p[:k] >> 3, len(window) - 1)].astype(np.uint64) << (p[:k] & 7).astype(np.uint64)
            for (symbol, length, m), column in zip(tables, found, strict=True):
                i = (v >> np.uint64(64 - m)).astype(np.intp)
                column[:k, t] = symbol[i]
                v <<= length[i]
                p[:k] += length[i].astype(np.int64)
        need(np.array_equal(p, start[first + 1 : first + 1 + len(p)]), "a segment does not end where it should")
        where = found[0].reshape(-1)[:count].cumsum(dtype=np.int64) + np.arange(last + 1, last + 1 + count)
        out[where], last = values[found[1].reshape(-1)[:count]], int(where[-1])  # numpy raises when an index leaves the tensor


class Archive:
    """An open archive: what is inside is known and checked; tensors are decoded one at a time, when asked for.

    Args:
        source: path of a file, or its bytes.
        max_bytes: most bytes of all dense tensors together; by default 64 MiB and 1024 times the file.

    Attributes:
        version: of the fxq that wrote it. graph: as given to the writer, or None. records, by_name: all tensors. size: bytes of the file. where: for messages.

    Raises:
        ArchiveError: here and in all methods, for everything that is wrong with the file.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, *, max_bytes: int | None = None) -> None:
        self.where = "archive" if isinstance(source, bytes) else os.fspath(source)
        with inside(self.where):
            self._file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", opener=opener)  # noqa: SIM115
            try:
                self.size = self._file.seek(0, os.SEEK_END)
                self._open(1024 * self.size + (64 << 20) if max_bytes is None else max_bytes)
            except BaseException:
                self.close()
                raise

    def _open(self, max_bytes: int) -> None:
        length = int.from_bytes(self._read(0, 8), "little")
        need(length <= min(self.size - 8, 1 << 16), "is no archive of fxq", way_out="Take files that fxq wrote as archives")
        header, at, end = parse(self._read(8, length).decode()), 8 + length, self.size - 8 - length
        meta = header.get("__metadata__", {})
        need(meta.get("format") == FORMAT, "is no archive of fxq", way_out="Take files that fxq wrote as archives")
        need(meta.get("version") == str(VERSION), f"has version {meta.get('version')!r:.20}, this fxq reads {VERSION}", way_out="Update fxq")
        n = header["index"]["shape"][0]
        cut = {k: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for k, a, b in (("index", 0, n), ("data", n, end))}
        need(type(n) is int and 0 < n <= end and header == {"__metadata__": meta, **cut}, "its header and its size do not fit")
        packed, unpack = self._read(at, n), zlib.decompressobj()
        need(meta.get("index") == str(zlib.crc32(packed)), "the checksum of its index is wrong")
        index, at, total = parse(unpack.decompress(packed, min(16 << 20, 100 * n + (1 << 20))).decode()), at + n, 0
        self.version, self.graph, self.by_name = str(index["fxq"]), index["graph"], dict[str, Record]()
        fits = unpack.eof and not unpack.unused_data and type(self.graph) in (dict, type(None)) and len(index) == 3
        need(fits and type(index["records"]) is list and len(index["records"]) <= 1 << 16, "its index is no index, or too long")
        for entry in index["records"]:
            r = record(entry, at)
            need(r.name and r.name not in self.by_name, "the name is empty or occurs twice", repr(r.name))
            self.by_name[r.name], at, total = r, at + r.bytes, total + r.dense_bytes
            need(total <= max_bytes, f"its tensors need more than {max_bytes:,} bytes when decoded", way_out="Pass max_bytes= if you trust the file")
        need(at == self.size, "its tensors and its size do not fit")
        self.records = tuple(self.by_name.values())

    def _read(self, at: int, count: int) -> bytes:
        found = self._file.read(count) if self._file.seek(at) == at else b""
        need(len(found) == count, "the file is cut off")
        return found

    def close(self, *_: object) -> None:
        """Close the file; arrays that were decoded stay valid."""
        self._file.close()

    def __enter__(self) -> Archive:
        return self

    __exit__ = close

    def _get(self, r: Record, what: str) -> Array:
        with inside(f"{self.where}: {r.name!r}"), np.errstate(all="ignore"):
            data = self._read(r.at, r.bytes)
            need(zlib.crc32(data) == r.crc32, "the checksum is wrong")
            blob: Array = np.frombuffer(data, np.uint8)
            need((r.table or r.dtype) != "BOOL" or not np.any(blob[: r.entries or None] > 1), "a truth value is neither 0 nor 1")
            if r.coding == "raw":
                need(what == "dense", "is stored raw: it has neither table nor symbols", way_out="Ask for its dense values")
                return np.array(blob.view(DTYPES[r.dtype]).reshape(r.shape))
            cuts, channels = dict[str, Array](), r.shape[r.axis] if r.scale and r.axis >= 0 else 1
            for name, dtype, n in (("table", DTYPES[r.table], r.entries), ("scale", "<f4", channels * r.scale), ("zero", "<i4", channels * r.zero)):
                n *= np.dtype(dtype).itemsize
                need(len(blob) >= n, "its table is cut off")
                cuts[name], blob = np.frombuffer(blob[:n].tobytes(), dtype), blob[n:]
            if what in cuts:
                return cuts[what]
            symbols, table = np.arange(r.entries, dtype=np.uint8 if r.entries <= 256 else np.uint16), cuts["table"]
            values = symbols if what == "symbols" else table.astype(np.float32) if r.scale else table
            out, along = np.empty(r.shape, values.dtype), [-1 if i == r.axis else 1 for i in range(len(r.shape))]
            (rans if r.coding == "rans" else huffman)(blob, r, values, out.reshape(-1))
            for name, there, operation in (("zero", r.zero, np.subtract), ("scale", r.scale, np.multiply)):
                if there and what == "dense":
                    operation(out, cuts[name].astype(np.float32).reshape(along), out=out)
            return out

    def table(self, r: Record) -> Array:
        """The values of the symbols of a coded record [entries], dtype ``r.table``."""
        return self._get(r, "table")

    def scale(self, r: Record) -> Array | None:
        """float32 [channels], or None."""
        return self._get(r, "scale") if r.scale else None

    def zero(self, r: Record) -> Array | None:
        """int32 [channels], or None."""
        return self._get(r, "zero") if r.zero else None

    def symbols(self, r: Record) -> Array:
        """Symbols of a coded record, uint8 (up to 256 entries) or uint16, in the tensor's shape."""
        return self._get(r, "symbols")

    def dense(self, r: Record) -> Array:
        """The tensor; bfloat16 as its bits in uint16. With a scale it is ``(table[symbol] - zero) * scale``, in float32 and in this order."""
        return self._get(r, "dense")
