"""Forms of a kind that its ONNX emitter does not write; such a node becomes a float island or an issue."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxq.backends.onnx_float import UNARY
from fxq.graph import float_module, kind, shape
from fxq.modules import WEIGHTED


def refusal(gm: GraphModule, node: Node) -> str | None:
    """Why the emitter of the node's kind cannot write this very node; ``None`` when it can."""
    k, inputs = kind(gm, node), node.all_input_nodes
    if node.op != "call_module" or not inputs:
        return None
    module: Any = float_module(gm, node)
    if not all(isinstance(n.meta.get("shape"), tuple) for n in inputs):
        return "an input is not a tensor"
    if getattr(module, "return_indices", False):
        return "it returns indices as well"
    rank = len(shape(inputs[0]))
    wanted = _rank(module, k)
    if wanted is not None and rank != wanted:
        return f"its input has {rank} dimensions instead of {wanted}"
    if any(n.meta["dynamic"][d] for n in inputs[:1] for d in range(2, rank)) and k in SPATIAL:
        return "a spatial size follows the batch"
    return _own(module, k, node)


SPATIAL = ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "resize")


def _rank(module: nn.Module, k: str) -> int | None:
    """Rank of a batched input, for layers that also take unbatched ones."""
    if k in WEIGHTED and not isinstance(module, nn.Linear):
        weight: Any = module.weight
        return int(weight.ndim)
    digit = type(module).__name__[-2:-1]
    if k in SPATIAL[:-1] and digit.isdigit():
        return int(digit) + 2
    if k == "instance_norm":
        return int(digit) + 2
    return 4 if k == "pixel_shuffle" else None


def _own(module: Any, k: str, node: Node) -> str | None:
    if k == "unary" and module.fn not in UNARY:
        return f"ONNX has no operation for torch.{module.fn}"
    if k == "embedding" and module.max_norm is not None:
        return "max_norm rescales the table at run time"
    if k == "linear" and len(shape(node.all_input_nodes[0])) == 1:
        return "its input has no batch dimension"
    if k in ("reshape", "linear") and any(d and s == 0 for d, s in zip(node.meta["dynamic"], shape(node), strict=True)):
        return "it makes an empty tensor"
    if k == "clamp" and module.lo is not None and module.hi is not None and module.lo > module.hi:
        return "its bounds are crossed"
    return None
