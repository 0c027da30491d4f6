"""Proof: run the artifact in ONNX Runtime and compare it with the integer reference, end to end and node by node."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from torch.fx import GraphModule

from fxq.backends.reference import Reference
from fxq.errors import ArtifactError
from fxq.snapshot import flat


@dataclass(frozen=True)
class Proof:
    """Result of :func:`verify`.

    Attributes:
        elements, differ: of the model's outputs.
        nodes, planned: quantized tensors that were compared, and those that the graph has.
        hidden, hidden_differ: elements of these tensors.
        batches: batches that were run.
        first: the first quantized tensor that differs, or ``None``.
    """

    elements: int
    differ: int
    nodes: int
    planned: int
    hidden: int
    hidden_differ: int
    batches: int
    first: str | None = None

    @property
    def ok(self) -> bool:
        """Nothing differs, and something was compared."""
        return self.differ == 0 and self.hidden_differ == 0 and self.elements > 0 and self.batches > 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        inner = f"{self.hidden_differ} of {self.hidden} elements of {self.nodes} of {self.planned} quantized tensors ({self.batches} batches)"
        text = f"{self.differ} of {self.elements} output elements differ; {inner}"
        return text if self.first is None else f"{text}; the first node that differs is {self.first}"


def load(artifact: str | os.PathLike[str] | bytes) -> onnx.ModelProto:
    """Parse an ONNX file.

    Raises:
        ArtifactError: when it cannot be read or is damaged.
    """
    where = "artifact" if isinstance(artifact, bytes) else str(artifact)
    try:
        data = artifact if isinstance(artifact, bytes) else Path(artifact).read_bytes()
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
    except OSError as e:
        raise ArtifactError(f"cannot be read: {e.strerror or e}", where=where) from e
    except Exception as e:
        raise ArtifactError(f"not a whole ONNX file: {str(e).splitlines()[0]}", where=where, way_out="Lower the model again") from e
    return model


def _session(model: bytes, level: Any, save: str | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    if save is not None:
        options.optimized_model_filepath = save
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _exposed(model: bytes) -> tuple[ort.InferenceSession, list[str]]:
    """The fused graph with every integer tensor visible."""
    levels = ort.GraphOptimizationLevel
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "fused.onnx")
        _session(model, levels.ORT_ENABLE_EXTENDED, path)
        fused = onnx.load(path)
    have = {o.name for o in fused.graph.output}
    tensors = [t for n in fused.graph.node for t in n.output if t.endswith("_q") and t not in have]
    for t in tensors:
        fused.graph.output.append(onnx.ValueInfoProto(name=t))
    return _session(fused.SerializeToString(), levels.ORT_DISABLE_ALL), tensors


def verify(gm: GraphModule, artifact: str | os.PathLike[str] | bytes, data: Iterable[tuple[Any, ...]]) -> Proof:
    """Compare the artifact with the integer reference on the same inputs.

    Args:
        gm: a converted graph.
        artifact: path or bytes of its ONNX file.
        data: batches, tuples of positional inputs.

    Raises:
        ArtifactError: damaged or foreign file, or inputs that do not fit it.
    """
    raw = load(artifact).SerializeToString()
    full, reference = _session(raw, ort.GraphOptimizationLevel.ORT_ENABLE_ALL), Reference(gm)
    inner, tensors = _exposed(raw)
    names = [i.name for i in full.get_inputs()]
    if names != [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]:
        raise ArtifactError("its inputs are " + ", ".join(names), way_out="This file belongs to another model")
    planned = [str(n.target) for n in gm.graph.nodes if n.op == "call_module" and n.meta.get("grid") and str(n.target).endswith("_q")]
    tensors = [t for t in tensors if t in set(planned)]
    count = dict(elements=0, differ=0, hidden=0, hidden_differ=0, batches=0)
    first: str | None = None
    for batch in data:
        feed = {n: x.cpu().numpy() for n, x in zip(names, batch, strict=True)}
        want = flat(reference(*batch))
        try:
            got = full.run(None, feed)
            codes = inner.run(tensors, feed) if tensors else []
        except Exception as e:
            raise ArtifactError(f"the runtime refuses the inputs: {str(e).splitlines()[0]}", way_out="Check the shapes of the data") from e
        for a, b in zip(want, got, strict=True):
            _count(count, "elements", "differ", a.cpu().numpy(), b)
        for name, b in zip(tensors, codes, strict=True):
            wrong = _count(count, "hidden", "hidden_differ", reference.watch[name].cpu().numpy(), b)
            first = first or (name if wrong else None)
        count["batches"] += 1
    return Proof(nodes=len(tensors), planned=len(planned), first=first, **count)


def _count(count: dict[str, int], total: str, differ: str, a: Any, b: Any) -> int:
    if a.shape != b.shape:
        raise ArtifactError(f"a tensor has shape {list(b.shape)}, the reference {list(a.shape)}", way_out="This file belongs to another model")
    wrong = int((~((a == b) | (np.isnan(a) & np.isnan(b)))).sum()) if a.dtype.kind == "f" else int((a != b).sum())
    count[total] += a.size
    count[differ] += wrong
    return wrong


