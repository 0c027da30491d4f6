"""What an archive takes, by stage of Deep Compression (Han et al. 2016, arXiv 1510.00149), and what is inside of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fxq.archive.decoder import VERSION, Archive, Record
from fxq.archive.encoder import Overhead, Stat

INDEX_BITS = {"conv": 8, "conv_transpose": 8}
"""Bits of a relative index in the paper (section 2): 8 for convolutions, 5 for the others."""
OTHER_INDEX_BITS = 5
LONGEST = 200
"""Characters of a name that are printed."""


@dataclass(frozen=True)
class Row:
    """Bytes of one tensor after each stage.

    Attributes:
        name, coding, values: of the tensor; ``kept``: how many values are not 0.
        dense: as it is in memory: float32 for coded weights.
        pruned: kept values as they are in memory, each with a relative index of 8 (convolutions) or 5 bits; fillers for long gaps are not counted.
            ``dense`` where that is less or nothing is 0.
        shared: kept values as codes of a fixed width, the index, and the table; ``pruned`` for tensors without a table.
        coded: words of the entropy coder, or raw bytes.
        overhead: tables, scales, frequencies and states of lanes.
        bound: the entropy of its symbols, bytes: no code of single symbols takes less than this for ``coded``.
    """

    name: str
    coding: str
    values: int
    kept: int
    dense: int
    pruned: int
    shared: int
    coded: int
    overhead: int
    bound: float

    @property
    def file(self) -> int:
        """Bytes in the file, without its part of the index."""
        return self.coded + self.overhead


def row(s: Stat) -> Row:
    """The stages of one tensor. The role ``codes`` is that of integers that stand for float32 weights."""
    item = 4 if s.role == "codes" else s.dense // max(s.symbols, 1)
    dense = item * s.symbols
    index = 0 if s.kept == s.symbols else INDEX_BITS.get(s.role, OTHER_INDEX_BITS)
    pruned = min(dense, -(-s.kept * (8 * item + index) // 8))
    shared = pruned
    if s.coding != "raw":
        other = s.entries - (1 if s.kept < s.symbols else 0)
        bits = max(1, (max(other, 1) - 1).bit_length())
        shared = min(pruned, -(-s.kept * (bits + index) // 8) + s.tables)
    return Row(s.name, s.coding, s.symbols, s.kept, dense, pruned, shared, s.payload, s.tables + s.states, s.entropy_bits / 8)


@dataclass(frozen=True)
class ArchiveReport:
    """Bytes by stage, for each tensor and in all. ``print(report)`` shows a table.

    Attributes:
        rows: a tensor each. index: bytes of the index. header: of the container's header.
        encode_mb_s, decode_mb_s: dense megabytes a second that were encoded and read again, or ``None`` when it was not measured.
    """

    rows: tuple[Row, ...]
    index: int
    header: int
    encode_mb_s: float | None = None
    decode_mb_s: float | None = None

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return sum(r.file for r in self.rows) + self.index + self.header

    @property
    def dense(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(r.dense for r in self.rows)

    @property
    def bound(self) -> float:
        """Sum of the entropies of all tensors, bytes."""
        return sum(r.bound for r in self.rows)

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than its tensors in memory."""
        return self.dense / self.bytes if self.bytes else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("values", "kept", "dense", "pruned", "shared", "coded", "overhead", "bound")
        total = {k: sum(getattr(r, k) for r in self.rows) for k in names}
        return {
            "rows": [{**asdict(r), "file": r.file} for r in self.rows], "total": {**total, "index": self.index, "header": self.header, "file": self.bytes},
            "ratio": self.ratio, "encode_mb_s": self.encode_mb_s, "decode_mb_s": self.decode_mb_s,
        }  # fmt: skip

    def __str__(self) -> str:
        t = {k: sum(getattr(r, k) for r in self.rows) for k in ("values", "kept", "dense", "pruned", "shared", "coded", "overhead", "bound")}
        body = [_cells(shown(r.name), r.coding, vars(r)) for r in self.rows]
        lines = aligned(("tensor", "coding", "values", "not 0", "dense", "pruned", "shared", "coded", "overhead", "entropy"), [*body, _cells("all", "", t)])
        parts = f"index {self.index:,}, header {self.header:,}"
        speeds = [f"{what} at {v:,.0f} MB/s" for what, v in (("encoded", self.encode_mb_s), ("decoded", self.decode_mb_s)) if v is not None]
        over = 100 * (self.bytes / self.bound - 1) if self.bound else 0.0
        end = f"{self.bytes:,} bytes in the file ({parts}), {self.ratio:.1f} times smaller than dense, {over:.1f} % above the entropy"
        return "\n".join([*lines[:-1], lines[1], lines[-1], "; ".join([end, *speeds])])


def _cells(name: str, coding: str, v: Any) -> list[str]:
    kept = f"{100 * v['kept'] / v['values']:.1f} %" if v["values"] else "-"
    return [name, coding, f"{v['values']:,}", kept, *(f"{v[k]:,}" for k in ("dense", "pruned", "shared", "coded", "overhead")), f"{v['bound']:,.0f}"]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Lines of a table with a rule below the head; the first ``left`` columns are texts, the others numbers."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    put: Callable[[int, str], str] = lambda i, c: c.ljust(widths[i]) if i < left else c.rjust(widths[i])  # noqa: E731
    lines = ["  ".join(put(i, c) for i, c in enumerate(r)).rstrip() for r in (head, *rows)]
    return [lines[0], "-" * sum(widths, 2 * (len(head) - 1)), *lines[1:]]


def report(stats: Sequence[Stat], overhead: Overhead) -> ArchiveReport:
    """The report of what :func:`fxq.archive.encoder.write` wrote."""
    return ArchiveReport(tuple(map(row, stats)), overhead.index, overhead.header)


@dataclass(frozen=True)
class Inspection:
    """What an archive says of itself; nothing was decoded. ``print`` shows a table.

    Attributes:
        file, size: name and bytes. fxq: version that wrote it. format: of the format.
        kind, scheme, target: of the model, empty for plain tensors. nodes: of its graph.
        records: its tensors. overhead: bytes of header and index.
        run: ``bitwise`` when the model is to run on packed bits, empty for the simulator.
    """

    file: str
    size: int
    fxq: str
    format: int
    kind: str
    scheme: str
    target: str
    nodes: int
    records: tuple[Record, ...]
    overhead: int
    run: str = ""

    @property
    def dense(self) -> int:
        """Bytes of all tensors when decoded."""
        return sum(r.dense_bytes for r in self.records)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        own = {k: getattr(self, k) for k in ("file", "size", "fxq", "format", "kind", "scheme", "target", "run", "nodes", "overhead")}
        records = [
            {
                "name": r.name, "dtype": r.dtype, "shape": list(r.shape), "coding": r.coding, "entries": r.entries, "bytes": r.bytes,
                "dense_bytes": r.dense_bytes, "bits_per_value": 8 * r.bytes / count(r) if count(r) else None,
                "ratio": r.dense_bytes / r.bytes if r.bytes else None,
            }
            for r in self.records
        ]  # fmt: skip
        return {**own, "dense_bytes": self.dense, "ratio": self.dense / self.size, "records": records}

    def __str__(self) -> str:
        kind, scheme, target, run = map(shown, (self.kind, self.scheme, self.target, self.run))
        what = f"model ({kind}{run and f', runs {run}'}), scheme {scheme}, target {target}, {self.nodes} nodes" if kind else "plain tensors"
        head = f"{self.file}: {what}; archive version {self.format}, written by fxq {shown(self.fxq)}"
        body = []
        for r in self.records:
            bits, ratio = (f"{8 * r.bytes / count(r):.2f}" if count(r) else "-"), (f"{r.dense_bytes / r.bytes:.1f}" if r.bytes else "-")
            body.append([shown(r.name), r.dtype, r.coding, "x".join(map(str, r.shape)) or "-", f"{r.entries or '-'}", bits, f"{r.bytes:,}", ratio])
        lines = aligned(("tensor", "type", "coding", "shape", "entries", "bits/value", "bytes", "ratio"), body, 3)
        end = f"{self.size:,} bytes, of them {self.overhead:,} header and index; {self.dense:,} bytes when decoded: {self.dense / self.size:.1f} times as many"
        return "\n".join([head, *lines, end])


def shown(text: str) -> str:
    """A text of a file for a terminal: one line, no control characters, not too long."""
    return (text if text.isprintable() else ascii(text)[1:-1])[:LONGEST]


def count(r: Record) -> int:
    """Values of a tensor."""
    return math.prod(r.shape)


def inspection(archive: Archive, file: str) -> Inspection:
    """What the index of an open archive says."""
    head: Any = archive.graph or {}
    graph = head.get("graph") if isinstance(head.get("graph"), dict) else {}
    scheme = head.get("scheme") if isinstance(head.get("scheme"), dict) else {}
    nodes = graph.get("nodes")
    return Inspection(
        file, archive.size, archive.version, VERSION, str(head.get("kind", "")), str(scheme.get("name", "")), str(head.get("target", "")),
        len(nodes) if isinstance(nodes, list) else 0, archive.records, archive.size - sum(r.bytes for r in archive.records),
        str(head.get("run", "")),
    )  # fmt: skip
