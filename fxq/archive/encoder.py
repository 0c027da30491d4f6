"""Writes archives: picks the coding of every tensor, one tensor at a time, and puts the container around (``docs/archive.md``)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxq.archive import huffman, rans
from fxq.archive.decoder import DTYPES, FORMAT, VERSION
from fxq.errors import ArchiveError

Array = np.ndarray[Any, Any]
CODINGS = ("auto", "rans", "huffman", "raw")
MOST, CHUNK, SAMPLE = 1 << 15, 1 << 17, 1 << 16
LONGEST_INDEX, MOST_RECORDS = 16 << 20, 1 << 16
"""Entries of a table; elements that are looked at together; elements that show whether a tensor has few distinct values."""
NAMES = {np.dtype(v): k for k, v in DTYPES.items() if k != "BF16"}


@dataclass(frozen=True)
class Factored:
    """A tensor that is known as symbols and a table.

    Attributes:
        symbols: uint8 or uint16, the shape of the tensor. table: [K] values of the symbols, K up to 2^15.
        dtype: of the dense tensor; F32 with a scale, else the table's.
        scale: float32 [C], the dense value is ``(table[symbol] - zero) * scale``; C is the length of ``axis``, or 1. zero: int32 [C] or [1], only with a scale.
        role: for reports, not stored.
    """

    name: str
    symbols: Array
    table: Array
    dtype: str = "F32"
    scale: Array | None = None
    zero: Array | None = None
    axis: int = 0
    role: str = ""


@dataclass(frozen=True)
class Plain:
    """Any tensor; where it has few distinct values (bit for bit), those are coded when that is smaller.

    ``dtype`` is for bfloat16 only ("BF16"), whose bits come as uint16.
    """

    name: str
    array: Array
    dtype: str | None = None
    role: str = ""


@dataclass(frozen=True)
class Stat:
    """Bytes of one tensor by what they are for; ``total`` = tables + states + payload is its blob.

    Attributes:
        dense: bytes of the dense tensor. kept: symbols other than 0, or values other than 0. symbols: how many there are. entropy_bits: of all symbols together
            under their own distribution (a raw tensor: its bits). payload: words or codes. tables: values, scale, zero, frequencies or code lengths.
            states: of lanes, or lengths of segments.
    """

    name: str
    shape: tuple[int, ...]
    coding: str
    dense: int
    kept: int
    symbols: int
    entropy_bits: float
    payload: int
    tables: int
    states: int
    role: str = ""
    entries: int = 0

    @property
    def total(self) -> int:
        """Bytes of the blob."""
        return self.payload + self.tables + self.states


@dataclass(frozen=True)
class Overhead:
    """Bytes of the file that belong to no tensor: ``header`` of the container with its length, ``index`` as packed; ``index_text``: before packing."""

    header: int
    index: int
    index_text: int

    @property
    def total(self) -> int:
        """Bytes of header and index."""
        return self.header + self.index


def write(
    items: Iterable[Factored | Plain], graph: dict[str, Any] | None = None, *, coding: str = "auto", version: str = ""
) -> tuple[bytes, list[Stat], Overhead]:
    """Encode tensors and a graph as one archive.

    Args:
        items: taken one at a time, so a generator needs memory for one tensor only.
        graph: any JSON object, kept as it is.
        coding: "auto" takes the smallest; "rans" or "huffman" for everything that has symbols, "raw" for none.
        version: of fxq, for the record.

    Raises:
        ArchiveError: for an unknown coding, names that occur twice, arrays that do not fit together, a graph that is no JSON.
    """
    if coding not in CODINGS:
        raise ArchiveError(f"unknown coding {coding!r}", way_out=f"Use one of {', '.join(CODINGS)}")
    records: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    stats: list[Stat] = []
    names: set[str] = set()
    for item in items:
        if item.name in names or not item.name:
            raise ArchiveError(f"two tensors are called {item.name!r}" if item.name else "a tensor has no name", way_out="Give every tensor a name of its own")
        names.add(item.name)
        made = _factored(item, coding) if isinstance(item, Factored) else _plain(item, coding)
        blob = made.blob()
        records.append({"name": item.name, **made.record, "bytes": len(blob), "crc32": zlib.crc32(blob)})
        blobs.append(blob)
        stats.append(made.stat(item.name, item.role))
    file, overhead = _container(records, blobs, graph, version)
    return file, stats, overhead


@dataclass
class _Made:
    """A coded tensor on its way into the file."""

    record: dict[str, Any]
    dense: int
    kept: int
    symbols: int
    entropy_bits: float
    tables: bytes = b""
    states: bytes = b""
    payload: bytes = b""
    entries: int = 0

    def blob(self) -> bytes:
        return self.tables + self.states + self.payload

    def stat(self, name: str, role: str) -> Stat:
        sizes = len(self.payload), len(self.tables), len(self.states)
        shape, coding = tuple(self.record["shape"]), self.record["coding"]
        return Stat(name, shape, coding, self.dense, self.kept, self.symbols, self.entropy_bits, *sizes, role, self.entries)


def histogram(symbols: Array, entries: int) -> Array:
    """How often each symbol occurs, int64 [at least ``entries``]; flat symbols, a block at a time."""
    counts = np.zeros(entries, np.int64)
    for at in range(0, len(symbols), CHUNK):
        part = np.bincount(symbols[at : at + CHUNK], minlength=entries)
        if len(part) > entries:
            raise ArchiveError(f"symbol {len(part) - 1} has no entry in a table of {entries}", way_out="Give symbols below the length of the table")
        counts += part
    return counts


def _factored(item: Factored, coding: str) -> _Made:
    """Look first, then code; never raw, because what is asked for later are symbols and table."""
    where, shape, k = repr(item.name), item.symbols.shape, len(item.table)
    if coding == "raw":
        raise ArchiveError("symbols and a table cannot be stored raw", where=where, way_out="Use another coding, or give the dense values")
    table = NAMES.get(item.table.dtype.newbyteorder("=")) if item.dtype != "BF16" or item.table.dtype != np.uint16 else "BF16"
    if item.symbols.dtype not in (np.uint8, np.uint16) or item.table.ndim != 1 or not 0 < k <= MOST or table is None:
        fact = "its symbols or its table have a dtype or a length that archives do not hold"
        raise ArchiveError(fact, where=where, way_out=f"Use uint8 or uint16, and up to {MOST} entries")
    if (item.dtype != "F32" if item.scale is not None else item.dtype != table or item.zero is not None):
        way_out = "With a scale the tensor is F32, without one it has the table's dtype and no zero"
        raise ArchiveError(f"a table of {table} does not give {item.dtype}", where=where, way_out=way_out)
    try:
        axis, scale, zero = _grid(item)
        counts = histogram(item.symbols.reshape(-1), k)
    except (ValueError, ArchiveError) as e:
        raise ArchiveError(getattr(e, "fact", str(e)), where=where, way_out=getattr(e, "way_out", None)) from None
    head: dict[str, Any] = {"dtype": item.dtype, "shape": list(shape), "entries": k}
    usual = {"table": item.dtype, "axis": 0, "scale": False, "zero": False}
    given = {"table": table, "axis": axis, "scale": scale is not None, "zero": zero is not None}
    head |= {k: v for k, v in given.items() if v != usual[k]}
    tables = b"".join(np.ascontiguousarray(a, a.dtype.newbyteorder("<")).tobytes() for a in (item.table, scale, zero) if a is not None)
    made = _coded(item.symbols, counts, tables, head, coding, item.symbols.size * np.dtype(DTYPES[item.dtype]).itemsize)
    made.kept = int(counts[item.table != 0].sum())
    return made


def _grid(item: Factored) -> tuple[int, Array | None, Array | None]:
    """Axis, scale and zero as the file holds them: one channel is axis -1; zero has scale's length."""
    if item.scale is None:
        return 0, None, None
    scale = np.asarray(item.scale, np.float32).reshape(-1)
    zero = None if item.zero is None else np.asarray(item.zero).astype(np.int32).reshape(-1)
    count = max(len(scale), 1 if zero is None else len(zero))
    axis = item.axis + (item.symbols.ndim if item.axis < 0 else 0)
    if count == 1:
        axis = -1
    elif not 0 <= axis < item.symbols.ndim or item.symbols.shape[axis] != count:
        raise ValueError(f"{count} scales do not fit axis {item.axis} of {item.symbols.shape}")
    return axis, np.broadcast_to(scale, count), None if zero is None else np.broadcast_to(zero, count)


def _coded(symbols: Array, counts: Array, tables: bytes, head: dict[str, Any], coding: str, dense: int) -> _Made:
    """rANS or Huffman, whichever is smaller or asked for."""
    flat = np.ascontiguousarray(symbols).reshape(-1)
    freq, bits, size = rans.choose(counts)
    made = _Made({}, dense, 0, flat.size, rans.entropy(counts), entries=len(counts))
    sparse = 2 * (flat.size - int(counts[0])) <= flat.size
    planned = huffman.plan(flat, counts) if coding == "huffman" or coding == "auto" and sparse else None
    payload = rans.coded_bits(counts, freq, bits) / 8
    lanes = rans.lanes_for(flat.size, payload)
    if planned is not None and (coding == "huffman" or planned.size < size + 2 * lanes):
        made.record = {**head, "coding": "huffman", "bits": planned.bits, "count": planned.items}
        lengths, made.states, made.payload = huffman.encode(flat, planned)
        made.tables = tables + lengths
        return made
    made.record = {**head, "coding": "rans", "bits": bits, "count": lanes}
    words, state = rans.encode(flat, freq, lanes, bits)
    made.tables, made.states, made.payload = tables + rans.varints(freq), state.astype("<u4").tobytes(), words.astype("<u2").tobytes()
    return made


def _raw(array: Array, dtype: str, kept: int) -> _Made:
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return _Made({"dtype": dtype, "shape": list(array.shape), "coding": "raw"}, len(data), kept, array.size, 8.0 * len(data), payload=data)


def _plain(item: Plain, coding: str) -> _Made:
    array = np.asarray(item.array)
    dtype = item.dtype or NAMES.get(array.dtype.newbyteorder("="))
    if dtype not in DTYPES or array.dtype.itemsize != np.dtype(DTYPES[dtype]).itemsize:
        raise ArchiveError(f"archives hold no {array.dtype} as {dtype}", where=repr(item.name), way_out=f"Use one of {', '.join(DTYPES)}")
    kept = int(np.count_nonzero(array))
    found = None if coding == "raw" else distinct(array)
    if found is not None:
        symbols, table = found
        counts = histogram(symbols.reshape(-1), len(table))
        head = {"dtype": dtype, "shape": list(array.shape), "entries": len(table)}
        made = _coded(symbols, counts, table.astype(table.dtype.newbyteorder("<")).tobytes(), head, coding, array.nbytes)
        made.kept = kept
        if coding != "auto" or len(made.blob()) < array.nbytes:
            return made
    return _raw(array, dtype, kept)


def distinct(array: Array) -> tuple[Array, Array] | None:
    """Symbols (uint16, its shape) and values of an array with at most 2^15 values, told apart by bits; None when it has more, or coding cannot pay."""
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = flat.view(f"u{flat.dtype.itemsize}")
    most = min(MOST, 3 * bits.size // 4 + 1)
    known, counts = np.unique(bits[:: max(1, bits.size // SAMPLE)], return_counts=True)
    if bits.size == 0 or len(known) > most:
        return None
    known = known[np.argsort(-counts, kind="stable")]
    order = np.argsort(known)
    symbols = np.empty(bits.size, np.uint16)
    for at in range(0, bits.size, CHUNK):
        part = bits[at : at + CHUNK]
        place = np.minimum(np.searchsorted(known, part, sorter=order), len(known) - 1)
        new = np.unique(part[known[order[place]] != part])
        if len(new):
            known = np.concatenate([known, new])
            if len(known) > most:
                return None
            order = np.argsort(known)
            place = np.searchsorted(known, part, sorter=order)
        symbols[at : at + CHUNK] = order[place]
    return symbols.reshape(array.shape), known.view(flat.dtype)


def _container(records: list[dict[str, Any]], blobs: list[bytes], graph: dict[str, Any] | None, version: str) -> tuple[bytes, Overhead]:
    try:
        text = json.dumps({"fxq": version, "graph": graph, "records": records}, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise ArchiveError(f"the graph is no JSON: {e}", way_out="Give dicts, lists, strings, finite numbers") from e
    packed = zlib.compress(text, 9)
    if len(text) > 100 * len(packed):  # what a reader may take for a bomb
        packed = zlib.compress(text, 0)
    if len(text) > LONGEST_INDEX or len(records) > MOST_RECORDS:
        raise ArchiveError(f"an index of {len(text):,} bytes is too long", way_out="Save fewer tensors in one archive")
    n, m = len(packed), sum(map(len, blobs))
    header = json.dumps({
        "__metadata__": {"format": FORMAT, "version": str(VERSION), "index": str(zlib.crc32(packed))},
        "index": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}, "data": {"dtype": "U8", "shape": [m], "data_offsets": [n, n + m]},
    }, separators=(",", ":")).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, packed, *blobs]), Overhead(8 + len(header), n, len(text))
