"""Which batch norms of a user's model stand on channels that can be cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxq import schemes, targets
from fxq.errors import TraceError
from fxq.groups import batch_norms, find
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.pipeline import PassContext, Pipeline
from fxq.snapshot import History
from fxq.trace import capture


def prunable_batch_norms(model: nn.Module, example: Any) -> set[str]:
    """Module paths of the batch norms with a gamma for each of their channels that can be cut; others lead into what must stay.

    Args:
        model: float module; it is not changed.
        example: one batch of inputs, a tensor or a tuple.

    Raises:
        TraceError: the model cannot be captured as one graph.
    """
    inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    few = tuple(x[:2] if isinstance(x, torch.Tensor) and x.ndim else x for x in inputs)
    captured = capture(model, few)
    if captured.gm is None:
        way_out = "Name the batch norms yourself (only=)"
        raise TraceError(f"the model can only be captured in parts ({', '.join(captured.parts)})", way_out=way_out)
    ctx = PassContext(schemes.get("float"), targets.get("onnxruntime"), few)
    Pipeline((Canonicalize(), PropagateShapes())).run(captured.gm, ctx, History())
    return {str(node.target) for node, _ in batch_norms(find(captured.gm))}
