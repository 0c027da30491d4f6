"""Costs of the layers, integer and float operations, versions: what the page says beside the graph."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from torch.fx import GraphModule

from fxq.costs import layer_costs
from fxq.graph import module_of
from fxq.modules import Quantized

PACKAGES = ("fxq", "torch", "torchvision", "onnx", "onnxruntime", "tensorrt-rtx", "numpy")
"""Whose versions the page states, where they are installed."""
FLOAT_BITS = 32


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide what the artifact is; ``-`` for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def layers(gm: GraphModule, weights: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What has weights or multiply-accumulates, in the order of the graph.

    Args:
        gm: the compiled graph, shapes known.
        weights: histograms by node name (:func:`fxq.report.tensors.weights`).

    Returns:
        For each: ``node``, ``path``, ``kind``, ``runs``, channels, ``macs`` of one sample, ``parameters``, ``bits`` of a weight,
        ``bytes`` in the file (codes at their bits, scales and biases 4 bytes each), ``grid`` of the weight, its ``sqnr`` in dB.
    """
    nodes = {str(n.target): n for n in reversed(gm.graph.nodes) if n.op in ("call_module", "get_attr")}
    made = []
    for cost in layer_costs(gm):
        node = nodes[cost.path]
        module = module_of(gm, node) if node.op == "call_module" else None
        weight = weights.get(node.name, {})
        spec = module.weight_grid.spec if isinstance(module, Quantized) else None
        made.append({
            "node": node.name, "path": cost.path, "kind": cost.kind, "runs": _runs(node.meta), "in": cost.inputs, "out": cost.outputs, "groups": cost.groups,
            "macs": cost.macs, "parameters": cost.parameters, "bits": FLOAT_BITS if spec is None else spec.bits,
            "bytes": _bytes(cost.parameters, module), "grid": "" if spec is None else str(spec), "sqnr": weight.get("sqnr"),
        })  # fmt: skip
    return made


def _bytes(parameters: int, module: Any) -> int:
    """Codes at their bits, scales and all else at 4 bytes; a weight that an earlier layer holds costs nothing."""
    if not isinstance(module, Quantized) or not parameters:
        return parameters * FLOAT_BITS // 8
    weight: Any = module.op.weight
    size = int(weight.numel())
    rest = max(0, parameters - size)
    return math.ceil(size * module.weight_grid.spec.bits / 8) + 4 * (rest + module.weight_grid.qparams.scale.numel())


def _runs(meta: Mapping[str, Any]) -> str:
    return ("int" if meta["integer"] else "float") if "integer" in meta else ""


def float_bytes(gm: GraphModule) -> int:
    """Bytes of all weights and parameters in float32."""
    return sum(c.parameters for c in layer_costs(gm)) * FLOAT_BITS // 8
