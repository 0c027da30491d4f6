"""A compiled model as a file that needs neither the user's class nor pickle: safetensors, with the graph as JSON in its header."""

from __future__ import annotations

import json
import os
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxq import archived, graph_json, targets
from fxq import graph_json_rules as rules
from fxq.compiled import CompiledModel
from fxq.errors import ArtifactError, LoweringError
from fxq.lowering import Artifact
from fxq.pruned import PrunedModel
from fxq.schemes import Scheme
from fxq.snapshot import History, NodeRow, Skip, Snapshot
from fxq.trace import Captured
from fxq.trainable import TrainableModel

if TYPE_CHECKING:
    from fxq.bitwise.program import BitProgram

FORMAT, VERSION = "fxq-model", 2
KINDS: dict[str, type[CompiledModel]] = {"compiled": CompiledModel, "trainable": TrainableModel, "pruned": PrunedModel}


def save(model: CompiledModel, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a compiled or trainable model, whole or not at all: graph, grids, weights, history, state of the training.

    Args:
        model: from :func:`fxq.compile`, captured as one graph.
        path: of the file. force: replace one that is there.

    Raises:
        ArtifactError: for modules or values that a file cannot hold, and when it cannot be written.
        LoweringError: for a model that was captured in parts, or a target that is not registered.
    """
    from safetensors.torch import save as encode

    from fxq import __version__

    if not isinstance(model, CompiledModel):
        raise ArtifactError(f"{type(model).__name__} is no compiled model", way_out="Save what fxq.compile returned")
    target = model.target
    if target.name not in targets.names() or targets.get(target.name) != target:
        raise LoweringError(f"the target {target.name!r} is not registered", way_out="Give it a name of its own and call fxq.targets.register")
    w = graph_json.Writer()
    kind = next(name for name, made in reversed(KINDS.items()) if isinstance(model, made))
    head = {
        "kind": kind, "version": VERSION, "fxq": __version__, "graph": w.graph(model.graph_module), "scheme": w.value(model.scheme, "scheme"),
        "target": target.name, "phase": getattr(model, "phase", ""), "training": model.training, "rung": model.captured.rung,
        "steps": int(getattr(model, "steps", 0)), "hold_at": getattr(model, "hold_at", None), "specialised": list(model.captured.specialised),
        "history": [[s.name, [astuple(r) for r in s.rows], s.rewrites, s.ms, s.moved, [[k.node, k.why] for k in s.skips]] for s in model.history],
    }  # fmt: skip
    return Artifact(FORMAT, encode(w.tensors, {"format": FORMAT, "model": json.dumps(head)})).save(path, force=force)


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None, run: bool = True) -> CompiledModel | BitProgram:
    """Read what :func:`save` wrote, or ``m.lower("archive").save``: a model that runs, trains on, and lowers.

    Of ``m.lower("bitwise").save`` it is a :class:`~fxq.bitwise.program.BitProgram`: it runs on packed bits.

    Args:
        path: of the file.
        max_bytes: of an archive: most bytes of all its tensors together; by default 64 MiB and 1024 times the file.
        run: False gives the compiled model of a file that is to run on bits, too: to lower it to ONNX, or to train on.

    Raises:
        ArtifactError: for a file that cannot be read, is damaged, or is none of fxq's.
    """
    where = os.fspath(path)
    if Path(path).is_fifo():  # it would be waited for
        raise ArtifactError("it is a pipe", where=where, way_out="Write it to a file first")
    if archived.is_archive(path):
        return archived.load(path, max_bytes=max_bytes, run=run)
    try:
        return _load(Path(path))
    except ArtifactError as e:
        raise ArtifactError(e.fact, where=f"{where}: {e.where}" if e.where else where, way_out=e.way_out) from e


def _load(path: Path) -> CompiledModel:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise ArtifactError(f"cannot be read: {getattr(e, 'strerror', None) or e}", way_out="Check the path; take files from fxq.save") from e
    if meta.get("format") != FORMAT:
        raise ArtifactError("is no model of fxq", way_out="Take files from fxq.save")
    try:
        head: Any = json.loads(meta["model"])
        if head["version"] > VERSION:
            raise ArtifactError(f"has version {head['version']}, this fxq reads up to {VERSION}", way_out="Update fxq")
        reader = graph_json.Reader(tensors)
        gm = reader.graph(head["graph"])
        rules.check_size([head["scheme"], head["history"], head["specialised"]])
        scheme, target = reader.value(head["scheme"]), targets.get(head["target"])
        if not isinstance(scheme, Scheme):
            raise ArtifactError("its scheme is none", way_out="Save the model again")
        history = History([_snapshot(s, int(head["version"])) for s in head["history"]])
        captured = Captured(gm, str(head["rung"]), tuple(head["specialised"]), nn.Module())
        model = KINDS[head["kind"]](gm, captured, history, scheme, target)
        if isinstance(model, TrainableModel):
            model.steps.fill_(int(head["steps"]))
            model.set_extra_state({"phase": str(head["phase"]), "scheme": scheme.name, "hold_at": head["hold_at"]})
        return model.train(bool(head["training"]))
    except ArtifactError:
        raise
    except Exception as e:  # whatever a file causes, its message is about the file
        raise ArtifactError(f"its header is damaged: {type(e).__name__}: {e}", way_out="Save the model again") from e


def _snapshot(s: list[Any], version: int) -> Snapshot:
    """A snapshot without its graph. Version 1 held the text only."""
    if version == 1:
        rows = tuple(_row({"name": line[1:].split(" ", 1)[0], "kind": "", "text": line}) for line in s[1].splitlines())
        name, rewrites, ms, moved, skips = s[0], s[2], s[4], s[5], s[6]
    else:
        names = [f.name for f in fields(NodeRow)]
        rows = tuple(_row({**dict(zip(names, r, strict=True)), "inputs": tuple(r[3])}) for r in s[1])
        name, _, rewrites, ms, moved, skips = s
    found = tuple(rules.fitting(Skip, {"node": node, "why": why}) for node, why in skips)
    made: Snapshot = rules.fitting(Snapshot, {"name": name, "rows": rows, "rewrites": rewrites, "ms": ms, "moved": moved, "skips": found})
    return made


def _row(values: dict[str, Any]) -> NodeRow:
    row: NodeRow = rules.fitting(NodeRow, values)
    return row
