"""A graph as it is now, kept so that it can be run again: nodes are copied, modules are shared (passes swap modules, they never edit weights)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxq.graph import Grid, attr, grids, module_of, new_graph_module


@dataclass(frozen=True, eq=False)
class State:
    """A recorded graph.

    Attributes:
        graph: a copy of the nodes with their meta.
        parts: module path or attribute path -> the module or tensor that the graph had there.
        grids: the grids by name.
        marks: each node with what its meta says.
        stamps: path -> what tells that a part was changed in place since.
    """

    graph: Graph
    parts: dict[str, Any]
    grids: dict[str, Grid]
    marks: tuple[Any, ...] = field(repr=False)
    stamps: dict[str, dict[str, tuple[Any, ...]]] = field(repr=False)

    @classmethod
    def of(cls, gm: GraphModule, before: State | None = None) -> State:
        """The state of ``gm``; where its nodes read the same and its modules and grids are those of ``before``, that one."""
        parts = {str(n.target): module_of(gm, n) if n.op == "call_module" else attr(gm, n) for n in gm.graph.nodes if n.op in ("call_module", "get_attr")}
        kept = {path: _kept(part, None if before is None else before.parts.get(path)) for path, part in parts.items()}
        marks = tuple((n.format_node(), *(n.meta.get(key) for key in MARKS)) for n in gm.graph.nodes)
        if before is not None and marks == before.marks and _same(kept, before.parts) and _same(grids(gm), before.grids):
            return before
        old = {} if before is None else {path: before.stamps[path] for path, part in before.parts.items() if kept.get(path) is part}
        stamps = {path: old[path] if path in old else _stamp(part) for path, part in kept.items()}
        return cls(copy.deepcopy(gm.graph), kept, dict(grids(gm)), marks, stamps)

    def build(self) -> GraphModule:
        """A graph module of its own over the shared modules, in eval mode."""
        gm = new_graph_module(self.parts, copy.deepcopy(self.graph), "GraphModule")  # type: ignore[arg-type]
        gm.meta["grids"] = dict(self.grids)
        return gm

    @property
    def changed(self) -> str | None:
        """Path of the first part that was trained, retyped, moved or edited since; ``None`` when all are as they were recorded."""
        return next((path for path, part in self.parts.items() if not self.stamps[path].items() <= _stamp(part).items()), None)


def _kept(part: Any, before: Any) -> Any:
    """The part itself; of a module of torch or of the user with children (an attention layer) a shell with the same tensors, since passes swap such children.

    Where the shell ``before`` has the same children and tensors, that one.
    """
    if not isinstance(part, nn.Module) or isinstance(part, (GraphModule, torch.jit.ScriptModule)) or type(part).__module__.startswith("fxq."):
        return part
    if not any(m is not None for m in part._modules.values()):
        return part
    if type(before) is type(part) and _inside(part) == _inside(before):
        return before
    shell = part.__class__.__new__(part.__class__)
    shell.__dict__ = {**part.__dict__, "_parameters": dict(part._parameters), "_buffers": dict(part._buffers)}
    shell._modules = {name: None if child is None else _kept(child, None) for name, child in part._modules.items()}
    return shell


def _inside(module: nn.Module) -> dict[str, int]:
    """Name -> identity of the leaves and tensors in a module."""
    leaves = {name: id(m) for name, m in module.named_modules() if not m._modules}
    return leaves | {name: id(t) for name, t in part_tensors(module).items()}


def _stamp(part: Any) -> dict[str, tuple[Any, ...]]:
    """Type, device and version (which every change in place counts up) of each tensor. Modules may get children later: grids stand inside them."""
    return {name: (t.dtype, t.device, None if t.is_inference() else t._version) for name, t in part_tensors(part).items()}


def part_tensors(part: Any) -> dict[str, Tensor]:
    """The tensor itself, or the parameters and buffers of a module, by name."""
    if isinstance(part, Tensor):
        return {"": part}
    return dict(chain(part.named_parameters(), part.named_buffers())) if isinstance(part, nn.Module) else {}


MARKS = ("shape", "grid", "integer", "weight_spec", "absorbed", "narrow", "reads_codes", "int8_layer")


def _same(a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
