"""Capture: a float module to a GraphModule, on a copy. Symbolic tracing first, then torch.export, else a clear error."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Tracer

from fxq.errors import TraceError
from fxq.modules import Op
from fxq.snapshot import distance


@dataclass(frozen=True)
class Captured:
    """What capture found.

    Attributes:
        gm: the model as one graph.
        rung: ``symbolic`` or ``export``.
        specialised: what the graph is specialised to, one line each.
        root: the copy of the model that the graph was made from.
        notes: why earlier rungs failed, one line each with file and line.
    """

    gm: GraphModule
    rung: str
    specialised: tuple[str, ...]
    root: nn.Module
    notes: tuple[str, ...] = ()


class _Tracer(Tracer):
    """Keeps torch.nn layers, fxq's operations and the user's leaf types whole."""

    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*self.leaves, Op)) or super().is_leaf_module(m, module_qualified_name)


def capture(model: nn.Module, example: tuple[Any, ...], *, leaf_modules: Sequence[type[nn.Module]] = ()) -> Captured:
    """Capture ``model`` as a graph that equals it bit for bit on the example.

    Args:
        model: any module; it is copied, not changed.
        example: positional example inputs.
        leaf_modules: module types that stay whole.

    Raises:
        TraceError: with file, line and expression of what cannot be traced, and the way out.
    """
    try:
        root = copy.deepcopy(model).eval()
    except RuntimeError as e:
        raise TraceError(f"the model cannot be copied: {e}", way_out="Detach tensors that the model keeps from a forward pass") from e
    notes: list[str] = []
    rungs: tuple[tuple[str, Callable[[], GraphModule]], ...] = (
        ("symbolic", lambda: _symbolic(root, example, tuple(leaf_modules))),
        ("export", lambda: _export(root, example)),
    )
    first: tuple[str | None, str] | None = None
    for rung, make in rungs:
        try:
            gm = make()
            fault = _unequal(gm, root, example)
        except Exception as e:
            where, what = _place(e)
            first = first or (where, what)
            notes.append(f"{rung}: {where or 'torch'}: {what}")
            continue
        if fault is None:
            return Captured(gm, rung, _specialised(gm, root, example), root, tuple(notes))
        notes.append(f"{rung}: {fault}")
    where, what = first or (None, notes[0])
    raise TraceError(
        f"cannot be traced: {what}",
        where=where,
        way_out="Keep its module whole with leaf_modules=[...], or move the data-dependent part out of forward. Tried: " + "; ".join(notes),
    )


def _symbolic(root: nn.Module, example: tuple[Any, ...], leaves: tuple[type[nn.Module], ...]) -> GraphModule:
    import inspect

    params = [p for p in inspect.signature(root.forward).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = {p.name: p.default for p in params[len(example) :] if p.default is not p.empty}
    traced = copy.deepcopy(root)
    graph = _Tracer(leaves).trace(traced, concrete_args=rest or None)
    for node in list(graph.nodes):
        if node.op == "placeholder" and str(node.target).rsplit("_", 1)[0] in rest | {str(node.target): 0} and not node.users and str(node.target) in rest:
            graph.erase_node(node)
    gm = GraphModule(traced, graph, type(root).__name__)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node in inputs[len(example) :]:
        gm.graph.erase_node(node)
    gm.recompile()
    return gm.eval()


def _export(root: nn.Module, example: tuple[Any, ...]) -> GraphModule:
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] > 1 else None for x in example)
    try:
        program = torch.export.export(root, example, dynamic_shapes=shapes, strict=False)
    except Exception:
        program = torch.export.export(root, example, strict=False)
    module = program.module(check_guards=False)
    graph = torch.fx.Graph()
    values: dict[Any, Any] = {}
    for node in module.graph.nodes:
        if "guards" in str(node.target) or "assert" in str(node.target):
            continue
        values[node] = graph.node_copy(node, lambda n: values[n])
    return GraphModule(module, graph, type(root).__name__)


def _unequal(gm: GraphModule, root: nn.Module, example: tuple[Any, ...]) -> str | None:
    with torch.inference_mode():
        gap = distance(root(*example), gm(*example))
    return None if gap == 0 else f"the captured graph differs from the model by {gap:.1e}"


def _specialised(gm: GraphModule, root: nn.Module, example: tuple[Any, ...]) -> tuple[str, ...]:
    """Compare on another batch size where the model itself accepts one."""
    more = tuple(torch.cat([x, x[:1]]) if isinstance(x, torch.Tensor) and x.ndim else x for x in example)
    with torch.inference_mode():
        try:
            want = root(*more)
        except Exception:
            return ("the model itself takes only the example's batch size",)
        try:
            same = distance(want, gm(*more)) == 0
        except Exception:
            same = False
    return () if same else ("the graph is valid for the example's batch size only",)


def _place(e: Exception) -> tuple[str | None, str]:
    """``file:line`` and source text of the innermost frame outside torch and fxq, and the message."""
    message = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    for frame in reversed(traceback.extract_tb(e.__traceback__)):
        path = frame.filename.replace("\\", "/")
        if "/torch/" not in path and "/fxq/" not in path and not path.startswith("<"):
            return f"{frame.filename}:{frame.lineno}", f"`{frame.line}`: {message}"
    return None, message
