"""Archives read: a compiled model, or plain tensors one by one (``docs/archive.md``)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq import __version__, graph_json, targets
from fxq import graph_json_rules as rules
from fxq.archive import encoder
from fxq.archive.decoder import Archive, opener
from fxq.archive_graph import AGAIN, Store, begins_archive, graph_of, run_of
from fxq.archive_items import DTYPES, Plan, plain, plan
from fxq.archive_report import Inspection, inspection
from fxq.compiled import CompiledModel
from fxq.errors import ArchiveError, ArtifactError, LoweringError
from fxq.lowering import Artifact
from fxq.pruned import PrunedModel
from fxq.schemes import Scheme
from fxq.snapshot import History, take
from fxq.trace import Captured

if TYPE_CHECKING:
    from fxq.bitwise.program import BitProgram

KINDS: dict[str, type[CompiledModel]] = {"compiled": CompiledModel, "pruned": PrunedModel}


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Does the file's header call it an archive? False for what cannot be read."""
    try:
        with open(path, "rb", opener=opener) as f:
            return begins_archive(f.read(4096))
    except OSError:
        return False


def to_items(model: CompiledModel) -> Plan:
    """What ``model.lower("archive")`` writes: the JSON of the index and the records.

    Raises:
        LoweringError, ArtifactError: for what an archive does not hold.
    """
    return plan(model.graph_module, model.scheme, model.target)


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None, run: bool = True) -> CompiledModel | BitProgram:
    """The model of an archive, in eval mode: it computes the same numbers as the one that was lowered; it can be trained on, and lowered.

    Its history is one snapshot, ``load``. Of ``m.lower("bitwise")`` it is a :class:`~fxq.bitwise.program.BitProgram`, which only runs.

    Args:
        path: from ``m.lower("archive").save(path)`` or ``m.lower("bitwise").save(path)``.
        max_bytes: most bytes of all tensors together; by default 64 MiB and 1024 times the file.
        run: False gives the compiled model of any file, also of one that is to run on bits: to lower it to ONNX, or to train on.

    Raises:
        ArchiveError: for a file that cannot be read, is damaged, too new or too large, or holds no model, or none that runs as the file says.
    """
    with _named(path), Archive(path, max_bytes=max_bytes) as archive:
        head: Any = archive.graph
        runs = run_of(archive)
        if head is not None and head["kind"] not in KINDS:
            raise ArchiveError(f"it holds a model of the unknown kind {str(head['kind'])[:40]!r}", way_out="Update fxq")
        gm = graph_of(archive, max_bytes)
        scheme: Scheme = rules.fitting(Scheme, {k: graph_json.Reader({}).value(v) for k, v in head["scheme"].items()})
        target = targets.get(head["target"])
        if runs and run:
            return _bitwise(gm)
        captured = Captured(gm, "archive", (), nn.Module())
        return KINDS[head["kind"]](gm, captured, History([take(gm, "load")]), scheme, target)


def _bitwise(gm: GraphModule) -> BitProgram:
    from fxq.bitwise.program import BitProgram

    try:
        return BitProgram(gm)
    except LoweringError as e:
        raise ArchiveError(f"it is to run bitwise, but {e.fact}", where=e.where, way_out=AGAIN) from e


def load_state_dict(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """All tensors of an archive, by the names of the model's own layers (``conv1.weight``), exactly as they were or as the model computes with them.

    Args:
        path: from ``m.lower("archive").save(path)``, ``m.lower("bitwise").save(path)`` or :func:`save_state_dict`.
        max_bytes: most bytes of all tensors together; by default 64 MiB and 1024 times the file.

    Raises:
        ArchiveError: for a file that cannot be read, is damaged, too new or too large.
    """
    return dict(iter_state_dict(path, max_bytes=max_bytes))


def iter_state_dict(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """The pairs of :func:`load_state_dict` one by one: only one tensor is decoded at a time."""
    with _named(path), Archive(path, max_bytes=max_bytes) as archive:
        head: Any = archive.graph
        store = Store(archive, head or {}, max_bytes)
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
