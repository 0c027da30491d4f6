"""A recorded graph as a file for other viewers: an ONNX skeleton for Netron, a graph collection for Model Explorer. Reads snapshots only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import ArtifactError
from fxq.lowering import Artifact
from fxq.moves import decibels
from fxq.snapshot import History, NodeRow, Snapshot

if TYPE_CHECKING:
    import onnx

DOMAIN = "fxq"
"""Operator domain of the skeleton: no runtime knows it, viewers show it."""
OPSET, IR = 21, 10
"""Of the skeleton; both below what onnx's checker of the least supported version takes."""
ENDS = ("input", "output")
FORMATS = {"onnx": "Netron", "json": "Model Explorer"}


def save_graph(history: History, path: str | os.PathLike[str], state: str | None = None, format: str | None = None, *, force: bool = False) -> Path:
    """Write one state of a compilation for a viewer, whole or not at all.

    Args:
        history: the compilation.
        path: the file.
        state: the pass whose result is written; by default the last.
        format: ``onnx`` (for Netron) or ``json`` (for Model Explorer); by default the ending of ``path``.
        force: replace an existing file.

    Raises:
        PassError: for an unknown pass.
        ArtifactError: unknown format, or the file cannot be written.
    """
    kind = format or Path(path).suffix.removeprefix(".")
    if kind not in FORMATS:
        fact = f"there is no graph format {kind!r}" if kind else "its name has no ending that tells the format"
        raise ArtifactError(fact, where=os.fspath(path), way_out="Use " + " or ".join(f"{k} ({v})" for k, v in FORMATS.items()))
    snapshot = history.snapshots[-1] if state is None else history[state]
    known = sizes_of(history, snapshot)
    data = skeleton(snapshot, known).SerializeToString() if kind == "onnx" else (json.dumps(collection(snapshot, known), indent=1) + "\n").encode()
    return Artifact(f"graph-{kind}", data).save(path, force=force)


def sizes_of(history: History, snapshot: Snapshot) -> dict[str, str]:
    """Sizes of the values of one state; before ``propagate-shapes`` those that the values of the same names have after it. Empty where they are not known."""
    later = {r.name: r.sizes for s in reversed(history.snapshots) for r in s.rows if r.sizes}
    return {r.name: r.sizes or later.get(r.name, "") for r in snapshot.rows}


def facts(row: NodeRow, snapshot: Snapshot) -> dict[str, str]:
    """What a viewer shows of a node: its name, path, grid, codes, runs, why, detail and, where measured, how far its value moved. Empty facts are left out."""
    found = {
        "node": row.name, "path": row.path, "sizes": row.sizes, "grid": row.grid, "codes": row.codes, "runs": row.runs, "why": row.why, "detail": row.detail,
    }  # fmt: skip
    moved = snapshot.numbers.get(row.name)
    if moved is not None:
        found["sqnr"] = decibels(moved.sqnr)
        found["cosine"] = f"{moved.cosine:.6f}"
        found["steps"] = "" if moved.steps is None else f"{moved.steps:g}"
        found["sqnr_to_float"] = "" if moved.total is None else decibels(moved.total)
        found["reordered"] = "channels, put back for these numbers" if moved.reordered else ""
    return {k: v for k, v in found.items() if v}


def skeleton(snapshot: Snapshot, sizes: Mapping[str, str]) -> onnx.ModelProto:
    """The graph as ONNX without weights: one node of the domain ``fxq`` for each FX node, its facts as attributes, sizes as value infos.

    Constants that the graph reads (``attr``) are nodes without inputs. The file is for viewers and ``onnx.checker``; no runtime executes it. All values
    are called float32, since the history keeps no types.

    Args:
        snapshot: the state.
        sizes: of its values by name, as in :class:`~fxq.snapshot.NodeRow`.
    """
    from onnx import helper

    nodes, inputs, ends, outputs = [], [], [], []
    for row in snapshot.rows:
        if row.kind == "input":
            inputs.append(_value(row.name, sizes[row.name]))
        elif row.kind == "output":
            ends += list(dict.fromkeys(row.inputs))
        else:
            nodes.append(helper.make_node(row.kind, list(row.inputs), [row.name], name=row.path or row.name, domain=DOMAIN, **facts(row, snapshot)))
    given = {name for node in nodes for name in node.output}
    for name in ends:
        shown = name if name in given else f"{name}/output"  # an input that is an output as well
        if shown != name:
            nodes.append(helper.make_node("identity", [name], [shown], name=shown, domain=DOMAIN))
        outputs.append(_value(shown, sizes[name]))
    inner = [_value(name, sizes[name]) for node in nodes for name in node.output if sizes.get(name) and name not in ends]
    graph = helper.make_graph(nodes, snapshot.name, inputs, outputs, value_info=inner)
    return helper.make_model(
        graph, producer_name="fxq", ir_version=IR, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        doc_string=f"The graph after the pass {snapshot.name}, for viewers: it holds no weights and no runtime executes it.",
    )  # fmt: skip


def _value(name: str, sizes: str) -> onnx.ValueInfoProto:
    """Name and sizes: ``[*,64,56,56]`` is batch and numbers; sizes that are not known are one dimension of that name, since the checker wants some."""
    from onnx import TensorProto, helper

    inner = sizes.strip("[]").split(",") if sizes else ["unknown"]
    dims = [int(v) if v.isdecimal() else "batch" if v == "*" else v for v in inner if v]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def collection(snapshot: Snapshot, sizes: Mapping[str, str], label: str = "fxq") -> dict[str, Any]:
    """The graph as Model Explorer's graph collection: nodes with incoming edges, attributes, and module paths as namespaces, so that layers collapse.

    Args:
        snapshot: the state.
        sizes: of its values by name.
        label: name of the collection.
    """
    spaces = namespaces(snapshot)
    nodes = []
    for row in snapshot.rows:
        edges = [{"sourceNodeId": n, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)} for i, n in enumerate(row.inputs)]
        node: dict[str, Any] = {"id": row.name, "label": row.kind, "namespace": spaces[row.name], "incomingEdges": edges}
        node["attrs"] = [{"key": k, "value": v} for k, v in facts(row, snapshot).items()]
        if row.kind != "output":
            shape = [{"key": "tensor_shape", "value": sizes[row.name] or "unknown"}]
            node["outputsMetadata"] = [{"id": "0", "attrs": [*shape, *([{"key": "codes", "value": row.codes}] if row.codes else [])]}]
        nodes.append(node)
    return {"label": label, "graphs": [{"id": snapshot.name, "nodes": nodes}]}


def namespaces(snapshot: Snapshot) -> dict[str, str]:
    """Name of a node -> the modules around it, as ``layer1/0``; of one without a module path, those of the first value that it reads."""
    found: dict[str, str] = {}
    for row in snapshot.rows:
        if row.path:
            found[row.name] = row.path.rpartition(".")[0].replace(".", "/")
        else:
            found[row.name] = "" if row.kind in ENDS else next((found[n] for n in row.inputs), "")
    return found
