"""canonicalize: one module per call; functions and methods become module nodes; dropout and identity go."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.canonical import At, Form, NoForm, name_of
from fxq.canonical_attention import ATTENTION, module_attention
from fxq.canonical_chains import shorten
from fxq.canonical_index import INDEX
from fxq.canonical_layers import LAYERS, module
from fxq.canonical_math import MATH
from fxq.canonical_reduce import REDUCE
from fxq.canonical_shape import SHAPE
from fxq.constants import fold_constants, fold_repeated
from fxq.graph import add_module, kind, module_of
from fxq.inline import CannotInline, inline, wants_inline
from fxq.pipeline import Pass, PassContext
from fxq.shapes import propagate

FORMS: dict[str, Form] = {**MATH, **REDUCE, **SHAPE, **INDEX, **LAYERS, **ATTENTION}
"""Canonical forms of functions and methods, by their names without overload and underscores."""

ODD = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, AssertionError)
_CHECKS = ("assert", "assert_async", "assert_scalar", "assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size", "check")
_ROUNDS = 8


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring every operation that has one into its canonical form (see ``docs/architecture.md``); the rest stays opaque.

    Opaque modules and Python functions are looked into; what depends on constants only is computed.
    """

    name: ClassVar[str] = "canonicalize"
    ensures: ClassVar[tuple[str, ...]] = ("canonical",)
    tolerance: ClassVar[float | None] = 1e-4

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        changed = _without_checks(gm)
        propagate(gm, ctx.example)
        why: dict[Node, str] = {}
        for _ in range(_ROUNDS):
            changed += fold_constants(gm) + fold_repeated(gm)
            done = sum(_apply(gm, node, why) for node in list(gm.graph.nodes) if not node._erased)
            opened = _open(gm, ctx, why)
            changed += done + opened
            gm.graph.eliminate_dead_code(_stays)
            if not opened:
                break
            changed += _without_checks(gm)
            propagate(gm, ctx.example)
        changed += shorten(gm) + _one_module_per_call(gm)
        gm.graph.eliminate_dead_code(_stays)
        for node in gm.graph.nodes:
            if node in why and kind(gm, node) == "opaque":
                ctx.skip(node, why[node])
        return changed


def _stays(node: Node) -> bool:
    return node.op in ("placeholder", "output")


def _without_checks(gm: GraphModule) -> int:
    """Take out assertions on sizes and types: the graph is captured for what it was checked with."""
    found = [n for n in gm.graph.nodes if n.op == "call_function" and name_of(n) in _CHECKS and not n.users]
    for node in found:
        gm.graph.erase_node(node)
    if found:
        gm.graph.eliminate_dead_code(_stays)
    return len(found)


def _apply(gm: GraphModule, node: Node, why: dict[Node, str]) -> bool:
    """Give ``node`` its canonical form; on odd arguments it stays as it is."""
    at = At(gm, node)
    try:
        if node.op == "call_module":
            if not isinstance(module_of(gm, node), nn.MultiheadAttention):
                return module(at)
            module_attention(at)
            return True
        form = FORMS.get(name_of(node)) if node.op in ("call_function", "call_method") and _is_torch(node) else None
        if form is None:
            return False
        form(at)
        return True
    except NoForm as e:
        why[node] = str(e)
    except ODD as e:
        why[node] = f"unexpected arguments ({type(e).__name__}: {e})"
    at.undo()
    return False


def _is_torch(node: Node) -> bool:
    """Only torch's and Python's own functions go by their name."""
    target: Any = node.target
    if node.op == "call_method":
        return True
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target).split(".")[0].split("::")[0] in ("aten", "prims")
    return str(getattr(target, "__module__", None) or "torch").split(".")[0] in ("torch", "torchvision", "_operator", "builtins", "fxq")


def _open(gm: GraphModule, ctx: PassContext, why: dict[Node, str]) -> int:
    """Look into opaque modules and Python functions."""
    batch = next((x.shape[0] for x in ctx.example if isinstance(x, Tensor) and x.ndim), 1)
    opened = 0
    for node in list(gm.graph.nodes):
        if node._erased or kind(gm, node) != "opaque" or node.meta.get("closed") or "value" in node.meta:
            continue
        target = wants_inline(gm, node)
        if target is None:
            continue
        try:
            inline(gm, node, None if node.op == "call_module" else target, batch)
            opened += 1
        except CannotInline as e:
            node.meta["closed"] = True
            why.setdefault(node, str(e))
    return opened


def _one_module_per_call(gm: GraphModule) -> int:
    """A module that is called again gets another path for each further call (the same parameters)."""
    seen: set[str] = set()
    changed = 0
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        if str(node.target) in seen:
            twin = copy.copy(module_of(gm, node))
            for table in ("_parameters", "_buffers", "_modules"):  # the same tensors, not the same tables: swapping one must not touch the other
                twin.__dict__[table] = dict(twin.__dict__[table])
            node.target = add_module(gm, str(node.target), twin)
            changed += 1
        seen.add(str(node.target))
    return changed
