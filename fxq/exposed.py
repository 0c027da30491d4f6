"""The fused graph that ONNX Runtime made of a file, with the tensor of every integer step visible."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch.fx import Node

from fxq.backends.onnxruntime import session
from fxq.backends.reference import Step, value_name

CHUNK_BYTES = 1 << 28
QUANTIZE = "QuantizeLinear"


def constant(model: onnx.ModelProto, name: str) -> np.ndarray[Any, Any] | None:
    """The constant tensor ``name`` of a file: an initializer, or what nodes make of initializers (run by ONNX Runtime); otherwise ``None``."""
    stored = {t.name: t for t in model.graph.initializer}
    if name in stored:
        return numpy_helper.to_array(stored[name])
    made = {o: n for n in model.graph.node for o in n.output}
    nodes: list[onnx.NodeProto] = []
    read: list[onnx.TensorProto] = []
    todo, seen = [name], set[str]()
    while todo:
        tensor = todo.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        if tensor in stored:
            read.append(stored[tensor])
        elif tensor in made:
            nodes.append(made[tensor])
            todo += [i for i in made[tensor].input if i]
        else:
            return None
    order = {n.output[0]: i for i, n in enumerate(model.graph.node)}
    graph = onnx.helper.make_graph(sorted(nodes, key=lambda n: order[n.output[0]]), "constant", [], [onnx.ValueInfoProto(name=name)], read)
    small = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    value: np.ndarray[Any, Any] = session(small.SerializeToString(), "off").run(None, {})[0]
    return value


class Exposed:
    """The graph at an optimization level with every tensor visible; results are fetched in chunks, so that big nets fit in memory."""

    def __init__(self, model: bytes, steps: Sequence[Step], outputs: dict[Node, str], level: str = "extended") -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "fused.onnx")
            session(model, level, save_optimized=path, float_matmul=True)
            fused = onnx.load(path)
        self.producer = {t: n.op_type for n in fused.graph.node for t in n.output if t}
        self.merged = {t for n in fused.graph.node for t in n.output if any(i.startswith("DoubleQDQRemoved_") for i in n.input)}
        self.outputs = [o.name for o in fused.graph.output]
        nodes = {n.name.split(":")[0]: list(n.output) for n in fused.graph.node}
        tensors = {s: t for s in steps if (t := self._tensor(s, outputs, nodes)) is not None}
        for t in dict.fromkeys(tensors.values()):
            if t not in self.outputs:
                fused.graph.output.append(onnx.ValueInfoProto(name=t))
        self.session = session(fused.SerializeToString(), "off", float_matmul=True)
        floats = {o.name for o in self.session.get_outputs() if o.type == "tensor(float)"}
        self.tensors = {s: t for s, t in tensors.items() if (t in floats) == s.gives_float}
        self._feed: dict[str, Any] = {}
        self._have: dict[str, Any] = {}

    def _tensor(self, s: Step, outputs: dict[Node, str], nodes: dict[str, list[str]]) -> str | None:
        """The tensor of a step: by its name, or as the output of the node that kept its name (the runtime renames what it turns from s8 to u8)."""
        wishes = [s.name, f"{s.name}/gemm", outputs.get(s.result, "")] if s.gives_float else [s.name]
        wishes += nodes.get(s.name, [])[:1]
        wishes += nodes.get(value_name(s.split or s.core), [])[s.index : s.index + 1]
        return next((w for w in wishes if w in self.producer), None)

    def rounds_float(self, s: Step) -> bool:
        """Is the step's tensor rounded from floats (and clipped), instead of given by an integer kernel?"""
        tensor = self.tensors[s]
        return QUANTIZE in (self.producer[tensor], self.producer.get(f"{s.name}/wide") if self.producer[tensor] == "Clip" else "")

    def start(self, feed: dict[str, Any]) -> list[Any]:
        """Begin a batch; returns the graph's outputs."""
        self._feed, self._have = feed, {}
        return list(self.session.run(self.outputs, feed))

    def get(self, s: Step) -> Any:
        """The runtime's value of a step of the running batch."""
        tensor = self.tensors[s]
        if tensor not in self._have:
            names = self._chunk(tensor)
            self._have = dict(zip(names, self.session.run(names, self._feed), strict=True))
        return self._have[tensor]

    def _chunk(self, first: str) -> list[str]:
        steps = list(self.tensors)
        start = next(i for i, s in enumerate(steps) if self.tensors[s] == first)
        names: list[str] = []
        budget = float(CHUNK_BYTES)
        for s in steps[start:]:
            shape, dynamic = s.result.meta.get("shape", ()), s.result.meta.get("dynamic", ())
            batch = max((len(x) for x in self._feed.values() if x.ndim), default=1)
            budget -= float(np.prod([batch if d else n for n, d in zip(shape, dynamic, strict=True)])) * (4 if s.gives_float else 1)
            if names and budget < 0:
                break
            names.append(self.tensors[s])
        return list(dict.fromkeys(names))
