"""NaN and infinity in a model in training: which parameter, statistic or value is the first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxq import distributed
from fxq.errors import CalibrationError, FxqError
from fxq.graph import kind

WAY_OUT = "Lower the learning rate, or clip the gradients; load the last good checkpoint"
STATISTICS = ("running_mean", "running_var")
WORDS = {
    "running_mean": "the batch norm's mean is NaN or infinite: so was a value in front of it in the last batch",
    "running_var": "the batch norm's variance is NaN or infinite: so was a value in front of it in the last batch",
    "estimator.learned_step": "a learned step is NaN or infinite", "own.learned_step": "the learned step is NaN or infinite",
    "own.learned_offset": "the learned offset is NaN or infinite", "own.clip": "the learned clip is NaN or infinite",
    "bn.weight": "the batch norm's weight is NaN or infinite", "bn.bias": "the batch norm's bias is NaN or infinite",
    "weight": "the weight is NaN or infinite", "bias": "the bias is NaN or infinite",
}  # fmt: skip
"""End of a tensor's name -> what is wrong with it."""
INNER = (".op", ".bn", ".estimator", ".own")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Statistics of batch norms, which forwards write, then parameters, which optimizers do, by name."""
    statistics = {k: b for k, b in model.named_buffers() if k.endswith(STATISTICS)}
    return {**statistics, **dict(model.named_parameters())}


def require_finite(model: nn.Module, together: bool = False) -> None:
    """Refuse parameters and batch norm statistics with NaN or infinity.

    Args:
        model: the model; ``together``: all processes do this now, and all raise when one has to.

    Raises:
        CalibrationError: naming the first one.
    """
    found = tensors(model)
    if not found:
        return
    with torch.no_grad():
        bad = ~torch.isfinite(torch.stack([torch.linalg.vector_norm(t.detach(), math.inf) for t in found.values() if t.numel()])).all()
        if together:
            bad = distributed.any_of(bad)
        if not bool(bad):
            return
        name = next((k for k, t in found.items() if not bool(torch.isfinite(t).all())), None)
    if name is None:
        raise CalibrationError("a parameter or statistic of another process is NaN or infinite", way_out=WAY_OUT)
    raise CalibrationError(said(name), where=layer(name), way_out=WAY_OUT)


def said(name: str) -> str:
    """What to say of a tensor that is not finite."""
    return next((text for end, text in WORDS.items() if name.endswith(f".{end}")), f"the parameter {name.rsplit('.', 1)[-1]} is NaN or infinite")


def layer(name: str) -> str | None:
    """Path of the layer, or name of the grid, that a tensor of this name belongs to."""
    path = name.removeprefix("root.").rpartition(".")[0]
    for inner in INNER:
        path = path.removesuffix(inner)
    return (path.removesuffix("_q") if ".own." in name else path) or None


class _Watch(Interpreter):
    """Runs a graph up to the first value that is not finite."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.found: str | None = None

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if self.found is None and isinstance(out, Tensor) and not bool(torch.isfinite(out).all()):
            name = str(n.target) if n.op in ("call_module", "placeholder") else n.name
            sources = [float(self.env[a].detach().abs().max()) for a in n.all_input_nodes if isinstance(self.env.get(a), Tensor) and self.env[a].numel()]
            size = f", whose inputs reach {max(sources):.3g}," if sources else ""
            what = "the input" if n.op == "placeholder" else f"the output of this {kind(self.module, n)}{size}"  # type: ignore[arg-type]
            self.found = f"{name}: {what} is the first that holds NaN or infinity"
        return out


def explain(gm: GraphModule, *args: Any) -> str:
    """Where NaN or infinity first appears: in a parameter, in a statistic, or in a value when the graph runs on ``args`` (in its mode: buffers may change)."""
    watch = _Watch(gm)
    try:
        require_finite(gm)
        with torch.no_grad(), distributed.alone():
            watch.run(*args)
    except FxqError as e:
        return watch.found or str(e)
    return watch.found or "all values are finite: the loss is what overflows"
