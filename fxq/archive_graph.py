"""The graph of an archive, and its tensors by their references (``docs/archive.md``): nothing of it is run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import graph_json, numerics
from fxq import graph_json_rules as rules
from fxq.archive.decoder import Archive, Record, inside
from fxq.archive_items import DTYPES, PARTS
from fxq.errors import ArchiveError, ArtifactError
from fxq.graph_slim import full
from fxq.shared import lookup
from fxq.spec import QParams, QuantSpec

TYPES = {name: dtype for dtype, name in DTYPES.items()}
MOST = 1 << 17
"""Tensors of a graph, those that they are computed from included."""
AGAIN = "Lower the model again, or take files from m.lower('archive') and fxq.save_state_dict"


FOREIGN = "This file belongs to another model; lower this one and verify that file"
RUNS = ("bitwise",)
"""What a file may ask to be run as, instead of as a compiled model."""


def run_of(archive: Archive) -> str:
    """What an open archive is to be run as: one of :data:`RUNS`; empty for a compiled model, or plain tensors.

    Raises:
        ArchiveError: for anything else.
    """
    head: Any = archive.graph
    if head is None or "run" not in head:
        return ""
    if head["run"] not in RUNS:
        raise ArchiveError(f"it is to run as {str(head['run'])[:40]!r}, which is unknown", way_out="Update fxq")
    return str(head["run"])


def runs_bitwise(data: bytes, where: str) -> bool:
    """Is an archive one of ``m.lower("bitwise")``?

    Raises:
        ArchiveError: for a damaged header or index, or an unknown way to run; ``where`` is the file's name.
    """
    with inside(where), Archive(data, max_bytes=1 << 62) as archive:
        return run_of(archive) == "bitwise"


def begins_archive(data: bytes) -> bool:
    """Is this the beginning of an archive, as its header says?"""
    return b'"format":"fxq-archive"' in data[:4096].replace(b" ", b"")


def graph_of(archive: Archive, max_bytes: int | None = None) -> GraphModule:
    """The graph of an open archive, in eval mode.

    Args:
        max_bytes: most bytes of all its tensors together; by default 64 MiB and 1024 times the file.

    Raises:
        ArtifactError: for what an archive does not hold. Anything else that a hostile file may cause in torch and numpy is the caller's to catch.
    """
    head: Any = archive.graph
    if head is None:
        raise ArchiveError("it holds plain tensors, no model", way_out="Read them with fxq.load_state_dict")
    rules.check_size(head)
    return Reader(Store(archive, head, max_bytes)).graph(full(head["graph"]))


def own_graph(gm: GraphModule, data: bytes, where: str) -> GraphModule:
    """The graph of the archive ``data``, which has the nodes of ``gm``.

    Raises:
        ArtifactError: when the file is damaged, or its graph is another one.
    """
    room = sum(t.numel() * t.element_size() for t in [*gm.parameters(), *gm.buffers()])
    bound = 4 * room + 1024 * len(data) + (64 << 20)
    with inside(where), Archive(data, max_bytes=bound) as archive:
        try:
            again = graph_of(archive, bound)
        except ArtifactError as e:
            raise ArtifactError(e.fact, where=f"{where}: {e.where}" if e.where else where, way_out=e.way_out) from e
    if [_line(n) for n in gm.graph.nodes] != [_line(n) for n in again.graph.nodes]:
        raise ArtifactError("it holds another graph", where=where, way_out=FOREIGN)
    return again


def _line(n: Node) -> tuple[str, ...]:
    return n.op, n.name, str(n.target), str(n.args), str(n.kwargs)


class Store:
    """Tensors of an archive by their references."""

    def __init__(self, archive: Archive, head: Any, max_bytes: int | None) -> None:
        self.archive, self.small = archive, head.get("small", [])
        self.left = max_bytes if max_bytes is not None else 1024 * archive.size + (64 << 20)
        self.asked = 0

    def tensor(self, ref: Any, before: int | None = None) -> Tensor:
        """A new tensor. ``before``: only small tensors that stand before this one, so that nothing refers to itself."""
        self.asked += 1  # a small tensor may stand for two others, and those for four
        if self.asked > MOST:
            raise ArchiveError(f"it asks for more than {MOST:,} tensors", way_out=AGAIN)
        if isinstance(ref, int) and not isinstance(ref, bool):
            if not 0 <= ref < (len(self.small) if before is None else before):
                raise ArchiveError(f"it names the small tensor {ref}, which is not there", way_out=AGAIN)
            return self._small(ref)
        name, found = str(ref)[1:], self.archive.by_name.get(str(ref)[1:])
        if found is not None:
            return self.dense(found)
        base, _, part = name.rpartition(":")
        if str(ref)[:1] != "/" or base not in self.archive.by_name or part not in PARTS:
            raise ArchiveError(f"it names the tensor {str(ref)[:200]!r}, which is not there", way_out=AGAIN)
        return self._part(self.archive.by_name[base], part)

    def dense(self, r: Record) -> Tensor:
        """The tensor of a record."""
        self._need(r.dense_bytes)
        return _torch(self.archive.dense(r), r.dtype)

    def _need(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ArchiveError("its tensors need more memory than its size explains", way_out="Pass max_bytes= if you trust the file")

    def _part(self, r: Record, part: str) -> Tensor:
        self._need(r.bytes + (math.prod(r.shape) * (1 if r.entries <= 256 else 2) if part == "symbols" else 0))  # its blob is read each time
        if part == "symbols":
            codes = self.archive.symbols(r)
            return _torch(codes.view(np.int16) if codes.dtype == np.uint16 else codes)
        if part == "book":
            return _torch(self.archive.table(r)[1:].astype(np.float32))
        found = self.archive.scale(r) if part == "scale" else self.archive.zero(r)
        if found is None:
            raise ArchiveError(f"it has no {part}", where=repr(r.name), way_out=AGAIN)
        return _torch(found)

    def _small(self, i: int) -> Tensor:
        entry = self.small[i]
        if isinstance(entry, list):
            dtype, shape, text = entry
            raw, item = bytes.fromhex(text), TYPES[dtype].itemsize
            fits = len(shape) <= 32 and all(type(d) is int and 0 <= d <= 1 << 20 for d in shape)
            count = math.prod(shape) if fits else -1
            if not 0 <= count <= 1 << 20 or len(raw) not in (item, item * count):
                raise ArchiveError(f"the small tensor {i} does not fit its shape", way_out=AGAIN)
            self._need(item * count)
            flat = torch.frombuffer(bytearray(raw), dtype=TYPES[dtype]) if raw else torch.empty(0, dtype=TYPES[dtype])
            return (flat if len(flat) == count else flat[:1].expand(count)).reshape(shape).clone()
        ((what, parts),) = entry.items()
        make: dict[str, Callable[..., Tensor]] = {"product": self._product, "blocks": self._blocks, "table": self._table}
        return make[what](i, *parts)

    def _product(self, i: int, a: Any, b: Any) -> Tensor:
        x, y = self.tensor(a, i), self.tensor(b, i)
        if x.ndim and y.ndim and x.shape != y.shape:
            raise ArchiveError(f"the factors of the small tensor {i} do not fit", way_out=AGAIN)
        self._need(4 * max(x.numel(), y.numel()))
        return (x * y).to(torch.float32).clamp(min=numerics.TINY)

    def _blocks(self, i: int, codes: Any, scale: Any, zero: Any, text: str) -> Tensor:
        q, s, spec = self.tensor(codes, i), self.tensor(scale, i), QuantSpec.parse(text)
        if spec.block is None or spec.axis is None or q.ndim != s.ndim or any(
            -(-n // spec.block) != m if d == spec.axis else n != m for d, (n, m) in enumerate(zip(q.shape, s.shape, strict=True))
        ):  # fmt: skip
            raise ArchiveError(f"the blocks of the small tensor {i} do not fit", way_out=AGAIN)
        z = torch.zeros_like(s, dtype=torch.int32) if zero is None else self.tensor(zero, i)
        if z.shape != s.shape:
            raise ArchiveError(f"the zeros of the small tensor {i} do not fit", way_out=AGAIN)
        self._need(4 * q.numel())
        return numerics.dequantize(q, QParams(spec, s, z))

    def _table(self, i: int, codes: Any, book: Any, rows: Any, axis: int) -> Tensor:
        q, b = self.tensor(codes, i), self.tensor(book, i)
        if b.ndim != 1 or b.dtype != torch.float32 or q.dtype not in (torch.uint8, torch.int16):
            raise ArchiveError(f"the codes of the small tensor {i} do not fit its table", way_out=AGAIN)
        self._need(4 * q.numel())
        w = lookup(torch.cat([b.new_zeros(1), b]), q)
        if rows is None:
            return w
        r = self.tensor(rows, i)
        if r.shape != q.shape[axis : axis + 1]:
            raise ArchiveError(f"the factors of the small tensor {i} do not fit", way_out=AGAIN)
        return w * numerics.along(r, axis, w.ndim)


def _torch(a: np.ndarray[Any, Any], dtype: str = "") -> Tensor:
    t = torch.from_numpy(a if a.flags.writeable else a.copy())
    return t.view(torch.bfloat16) if dtype == "BF16" else t


class Reader(graph_json.Reader):
    """The graph, with tensors that are decoded when a module asks for them; parameters that were one are one again."""

    def __init__(self, store: Store) -> None:
        super().__init__({})
        self.store = store
        self.one: dict[tuple[Any, bool], Tensor] = {}

    def _tensor(self, entry: Any) -> Tensor:
        ref, parameter = entry["tensor"], bool(entry["parameter"])
        known = self.one.get((ref, parameter))
        if known is not None:
            return known
        t = self.store.tensor(ref)
        if parameter:
            t = nn.Parameter(t, requires_grad=bool(entry["grad"]))
        if parameter or (isinstance(ref, str) and (ref[1:] in self.store.archive.by_name or ref.endswith(":symbols"))):
            self.one[ref, parameter] = t
        return t

