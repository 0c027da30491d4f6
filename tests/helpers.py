"""Canonical graphs and contexts for tests of single passes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer

from fxq import schemes, targets
from fxq.pipeline import Pass, PassContext, Pipeline
from fxq.shapes import propagate
from fxq.snapshot import History, distance, take
from fxq.verify import INVARIANTS


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("fxq.") or super().is_leaf_module(m, module_qualified_name)


def canonical(model: nn.Module, *inputs: Tensor) -> GraphModule:
    """Graph of a module that calls torch.nn layers and fxq operations only, each once; shapes known."""
    gm = GraphModule(model, _Tracer().trace(model.eval()), type(model).__name__).eval()
    propagate(gm, inputs)
    return gm


def context(*inputs: Tensor, scheme: str = "iao_w8a8", target: str = "onnxruntime") -> PassContext:
    """Context of one pass for the given scheme and target."""
    return PassContext(schemes.get(scheme), targets.get(target), inputs)


class _Given(Pass):
    """Stands for the passes before the one under test."""

    name = "given"
    ensures = ("canonical", "shapes-known")

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        return 0


def run_pass(p: Pass, gm: GraphModule, ctx: PassContext) -> History:
    """Run ``p`` through the pipeline, which checks its tolerance and invariants; ``before`` and ``p.name`` are in the history.

    Shapes that the pass noted must be those that propagation finds.
    """
    history = History([take(gm, "before")])
    Pipeline((_Given(), p)).run(gm, ctx, history)
    for name in ("canonical", "shapes-known"):
        assert list(INVARIANTS[name](gm)) == []
    noted = {n.name: (n.meta["shape"], n.meta["dynamic"], n.meta["dtype"]) for n in gm.graph.nodes if n.op != "output"}
    propagate(gm, ctx.example)
    found = {n.name: (n.meta["shape"], n.meta["dynamic"], n.meta["dtype"]) for n in gm.graph.nodes if n.op != "output"}
    assert noted == found
    return history


def skips(history: History, name: str) -> dict[str, str]:
    """Node -> reason of the places that the pass left alone."""
    return {s.node: s.why for s in history[name].skips}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded batch-norm statistics and parameters: a fresh batch norm is (nearly) the identity and would prove nothing."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            tensors: tuple[Any, ...] = (m.running_mean, m.running_var, m.weight, m.bias)
            for t, (lo, hi) in zip(tensors, ((-0.5, 0.5), (0.5, 2.0), (0.5, 1.5), (-0.5, 0.5)), strict=True):
                if t is not None:
                    t.data.copy_(torch.empty_like(t).uniform_(lo, hi, generator=g))
    return model.eval()


def moved(gm: GraphModule, want: Any, *inputs: Tensor) -> float:
    """Greatest change of the output relative to its greatest magnitude."""
    with torch.inference_mode():
        return distance(want, gm(*inputs))
