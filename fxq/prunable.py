"""A user's model as a canonical float graph, to look at its channels; which of its batch norms stand on channels that can be cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxq import schemes, targets
from fxq.errors import TraceError
from fxq.groups import batch_norms, find
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.pipeline import PassContext, Pipeline
from fxq.snapshot import History
from fxq.trace import capture


def canonical_graph(model: nn.Module, inputs: tuple[Any, ...], way_out: str) -> GraphModule:
    """The model, captured on at most 2 samples: canonical, with shapes.

    Args:
        model: float module; it is not changed. inputs: positional example inputs.
        way_out: what to do with a model that can only be captured in parts.

    Raises:
        TraceError: the model cannot be captured as one graph.
    """
    few = tuple(x[:2] if isinstance(x, torch.Tensor) and x.ndim else x for x in inputs)
    captured = capture(model, few)
    if captured.gm is None:
        raise TraceError(f"the model can only be captured in parts ({', '.join(captured.parts)})", way_out=way_out)
    ctx = PassContext(schemes.get("float"), targets.get("onnxruntime"), few)
    return Pipeline((Canonicalize(), PropagateShapes())).run(captured.gm, ctx, History())


def prunable_batch_norms(model: nn.Module, example: Any) -> set[str]:
    """Module paths of the batch norms with a gamma for each of their channels that can be cut; others lead into what must stay.

    Args:
        model: float module; it is not changed.
        example: one batch of inputs, a tensor or a tuple.

    Raises:
        TraceError: the model cannot be captured as one graph.
    """
    inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    gm = canonical_graph(model, inputs, "Name the batch norms yourself (only=)")
    return {str(node.target) for node, _ in batch_norms(find(gm))}
