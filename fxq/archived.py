"""Archives read: a compiled model, or plain tensors one by one (``docs/archive.md``)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxq import __version__, graph_json, numerics, targets
from fxq import graph_json_rules as rules
from fxq.archive import encoder
from fxq.archive.decoder import Archive, Record
from fxq.archive_items import DTYPES, PARTS, Plan, plain, plan
from fxq.archive_report import Inspection, inspection
from fxq.compiled import CompiledModel
from fxq.errors import ArchiveError, ArtifactError
from fxq.graph_slim import full
from fxq.lowering import Artifact
from fxq.pruned import PrunedModel
from fxq.schemes import Scheme
from fxq.shared import lookup
from fxq.snapshot import History, take
from fxq.spec import QParams, QuantSpec
from fxq.trace import Captured

KINDS: dict[str, type[CompiledModel]] = {"compiled": CompiledModel, "pruned": PrunedModel}
TYPES = {name: dtype for dtype, name in DTYPES.items()}
MOST = 1 << 17
"""Tensors of a graph, those that they are computed from included."""
AGAIN = "Lower the model again, or take files from m.lower('archive') and fxq.save_state_dict"


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Does the file's header call it an archive? False for what cannot be read."""
    try:
        with open(path, "rb") as f:
            return b'"format":"fxq-archive"' in f.read(4096).replace(b" ", b"")
    except OSError:
        return False


def to_items(model: CompiledModel) -> Plan:
    """What ``model.lower("archive")`` writes: the JSON of the index and the records.

    Raises:
        LoweringError, ArtifactError: for what an archive does not hold.
    """
    return plan(model.graph_module, model.scheme, model.target)


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> CompiledModel:
    """The model of an archive, in eval mode: it computes the same numbers as the one that was lowered; it can be trained on, and lowered.

    Its history is one snapshot, ``load``.

    Args:
        path: from ``m.lower("archive").save(path)``.
        max_bytes: most bytes of all tensors together; by default 64 MiB and 1024 times the file.

    Raises:
        ArchiveError: for a file that cannot be read, is damaged, too new or too large, or holds no model.
    """
    with _named(path), Archive(path, max_bytes=max_bytes) as archive:
        head: Any = archive.graph
        if head is None:
            raise ArchiveError("it holds plain tensors, no model", way_out="Read them with fxq.load_state_dict")
        if head["kind"] not in KINDS:
            raise ArchiveError(f"it holds a model of the unknown kind {str(head['kind'])[:40]!r}", way_out="Update fxq")
        rules.check_size(head)
        store = _Store(archive, head, max_bytes)
        gm = _Reader(store).graph(full(head["graph"]))
        scheme: Scheme = rules.fitting(Scheme, {k: graph_json.Reader({}).value(v) for k, v in head["scheme"].items()})
        captured = Captured(gm, "archive", (), nn.Module())
        return KINDS[head["kind"]](gm, captured, History([take(gm, "load")]), scheme, targets.get(head["target"]))


def load_state_dict(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """All tensors of an archive, by the names of the model's own layers (``conv1.weight``), exactly as they were or as the model computes with them.

    Args:
        path: from ``m.lower("archive").save(path)`` or :func:`save_state_dict`.
        max_bytes: most bytes of all tensors together; by default 64 MiB and 1024 times the file.

    Raises:
        ArchiveError: for a file that cannot be read, is damaged, too new or too large.
    """
    return dict(iter_state_dict(path, max_bytes=max_bytes))


def iter_state_dict(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """The pairs of :func:`load_state_dict` one by one: only one tensor is decoded at a time."""
    with _named(path), Archive(path, max_bytes=max_bytes) as archive:
        head: Any = archive.graph
        store = _Store(archive, head or {}, max_bytes)
        for r in archive.records:
            if head is None or not r.name.startswith("@"):
                yield r.name, store.dense(r)
        for name, ref in (head or {}).get("weights", {}).items():
            yield str(name), store.tensor(ref)


def save_state_dict(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, force: bool = False, coding: str = "auto") -> Path:
    """Write tensors of any type as an archive, bit for bit; those with few distinct values are entropy-coded.

    Args:
        tensors: by name; read one by one. path: of the file, written whole or not at all. force: replace one that is there.
        coding: ``auto`` takes the smallest for each tensor; ``rans``, ``huffman`` or ``raw`` for all that it can code.

    Raises:
        ArtifactError: for a value that is no dense tensor of a type that archives hold, an empty name, or a file that cannot be written.
    """
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise ArtifactError(f"a value of type {type(t).__name__} is no tensor", where=str(name), way_out="Leave it out")
        if t.dtype not in DTYPES or t.layout != torch.strided or t.device.type == "meta":
            raise ArtifactError(f"an archive holds no tensor of type {t.dtype}, {t.layout}, on {t.device}", where=name, way_out="Convert it, or leave it out")
    data, _, _ = encoder.write((plain(name, t) for name, t in tensors.items()), None, coding=coding, version=__version__)
    return Artifact("archive", data).save(path, force=force)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """What is inside of an archive, from its index alone: nothing is decoded, and no checksum of a tensor is looked at.

    Raises:
        ArchiveError: for a file that cannot be read, whose header or index is damaged, or that is too new.
    """
    with _named(path), Archive(path, max_bytes=1 << 62) as archive:
        return inspection(archive, os.fspath(path))


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a file causes is an :class:`ArchiveError` that names it."""
    where = os.fspath(path)
    try:
        yield
    except ArchiveError as e:
        if (e.where or "").startswith(where):
            raise
        raise ArchiveError(e.fact, where=f"{where}: {e.where}" if e.where else where, way_out=e.way_out) from e
    except ArtifactError as e:
        raise ArchiveError(e.fact, where=f"{where}: {e.where}" if e.where else where, way_out=e.way_out) from e
    except Exception as e:  # of a hostile file: in torch, in numpy, in modules that it describes
        raise ArchiveError(f"its graph is damaged: {type(e).__name__}: {str(e)[:200]}", where=where, way_out=AGAIN) from e


class _Store:
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
            return self._spent(self._small(ref))
        name, found = str(ref)[1:], self.archive.by_name.get(str(ref)[1:])
        if found is not None:
            return self.dense(found)
        base, _, part = name.rpartition(":")
        if str(ref)[:1] != "/" or base not in self.archive.by_name or part not in PARTS:
            raise ArchiveError(f"it names the tensor {str(ref)[:200]!r}, which is not there", way_out=AGAIN)
        return self._spent(self._part(self.archive.by_name[base], part))

    def dense(self, r: Record) -> Tensor:
        """The tensor of a record."""
        self._need(r.dense_bytes)
        return _torch(self.archive.dense(r), r.dtype)

    def _need(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ArchiveError("its tensors need more memory than its size explains", way_out="Pass max_bytes= if you trust the file")

    def _spent(self, t: Tensor) -> Tensor:
        self._need(t.numel() * t.element_size())
        return t

    def _part(self, r: Record, part: str) -> Tensor:
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
            count, raw = math.prod(shape), bytes.fromhex(text)
            item = TYPES[dtype].itemsize
            if not all(type(d) is int and d >= 0 for d in shape) or count > 1 << 20 or len(raw) not in (item, item * count):
                raise ArchiveError(f"the small tensor {i} does not fit its shape", way_out=AGAIN)
            flat = torch.frombuffer(bytearray(raw), dtype=TYPES[dtype]) if raw else torch.empty(0, dtype=TYPES[dtype])
            return (flat if len(flat) == count else flat[:1].expand(count)).reshape(shape).clone()
        ((what, parts),) = entry.items()
        make: dict[str, Callable[..., Tensor]] = {"product": self._product, "blocks": self._blocks, "table": self._table}
        return make[what](i, *parts)

    def _product(self, i: int, a: Any, b: Any) -> Tensor:
        x, y = self.tensor(a, i), self.tensor(b, i)
        if x.ndim and y.ndim and x.shape != y.shape:
            raise ArchiveError(f"the factors of the small tensor {i} do not fit", way_out=AGAIN)
        return (x * y).to(torch.float32).clamp(min=numerics.TINY)

    def _blocks(self, i: int, codes: Any, scale: Any, zero: Any, text: str) -> Tensor:
        q, s, spec = self.tensor(codes, i), self.tensor(scale, i), QuantSpec.parse(text)
        if spec.block is None or spec.axis is None or q.ndim != s.ndim or any(
            -(-n // spec.block) != m if d == spec.axis else n != m for d, (n, m) in enumerate(zip(q.shape, s.shape, strict=True))
        ):  # fmt: skip
            raise ArchiveError(f"the blocks of the small tensor {i} do not fit", way_out=AGAIN)
        z = torch.zeros_like(s, dtype=torch.int32) if zero is None else self.tensor(zero, i)
        return numerics.dequantize(q, QParams(spec, s, z))

    def _table(self, i: int, codes: Any, book: Any, rows: Any, axis: int) -> Tensor:
        q, b = self.tensor(codes, i), self.tensor(book, i)
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


class _Reader(graph_json.Reader):
    """The graph, with tensors that are decoded when a module asks for them; parameters that were one are one again."""

    def __init__(self, store: _Store) -> None:
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

