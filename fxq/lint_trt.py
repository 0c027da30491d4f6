"""What TensorRT will reject, silently compute wrongly or silently run in float of an ONNX file, found without TensorRT: onnx and numpy only."""

from __future__ import annotations

import os
from collections.abc import Iterator

import onnx
from onnx import TensorProto

from fxq.lint_trt_graph import Graph, inlined, read, read_external
from fxq.lint_trt_model import constants, functions, names, operators, placement, types
from fxq.lint_trt_ops import operations
from fxq.lint_trt_report import ERROR, TrtOp, TrtReport
from fxq.lint_trt_rules import quantizers

CAPABILITIES: dict[str, int | None] = {"tensorrt": None, "sm75": 75, "sm80": 80, "sm86": 86, "sm89": 89, "sm120": 120, "sm121": 121}
"""Target -> compute capability, times 10; ``None`` for any."""

SUMMARIES = {
    name: "TensorRT, any GPU" if capability is None else f"TensorRT, compute capability {capability / 10}" for name, capability in CAPABILITIES.items()
}

def check(model: onnx.ModelProto, target: str = "tensorrt", folder: str | os.PathLike[str] | None = None) -> TrtReport:
    """Lint a model.

    Args:
        model: of any tool; it is not changed. Weights in external files are not needed.
        target: one of :data:`CAPABILITIES`.
        folder: of the model's file, where scales and zero points that are stored outside of it are read. What is not there is reported as not checked.
    """
    capability = CAPABILITIES[target]
    if folder is not None and any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        model = read_external(model, folder)
    findings = [*functions(model), *types(model)]
    graph = read(inlined(model))
    ops: list[TrtOp] = []
    for scope in graph.all():
        findings += [*operators(scope, model), *quantizers(scope, capability), *constants(scope), *placement(scope)]
        for op, finding in operations(scope, capability):
            ops.append(op)
            findings += [finding] if finding else []
    findings += names(graph)
    findings = sorted(findings, key=lambda f: f.level != ERROR)
    return TrtReport(target, tuple(findings), tuple(ops), tuple(_dynamic(graph)))


def _dynamic(graph: Graph) -> Iterator[str]:
    for value in graph.inputs:
        dims = value.type.tensor_type.shape.dim
        if any(not d.HasField("dim_value") for d in dims):
            yield f"{value.name} [{', '.join(str(d.dim_value) if d.HasField('dim_value') else d.dim_param or '?' for d in dims)}]"
