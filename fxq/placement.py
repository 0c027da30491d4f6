"""Placing Q/DQ: what every planner of ``annotate`` shares, and the schemes that have no activation grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.graph import data_inputs, float_module, kind, module_of
from fxq.modules import WEIGHTED
from fxq.pipeline import PassContext
from fxq.schemes import S8N
from fxq.selectors import matches

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Plan:
    """A planner reads the graph and writes ``integer``, ``float_why``, ``grid``, ``weight_spec`` into the nodes' meta.

    Attributes:
        kinds: kind of every node.
        changed: places that were given a grid or integers.
    """

    def __init__(self, gm: GraphModule, ctx: PassContext) -> None:
        self.gm, self.ctx, self.target = gm, ctx, ctx.target
        self.kinds = {n: kind(gm, n) for n in gm.graph.nodes}
        self.changed = 0
        self._matched: set[Any] = set()
        self._matched8: set[Any] = set()
        weighted = [n for n, k in self.kinds.items() if k in WEIGHTED]
        self.stand_ins = {n for n in weighted if getattr(module_of(gm, n), "stands_in", False)}
        self.layers = [n for n in weighted if n not in self.stand_ins]
        self.roles = roles(self.kinds, self.layers) if ctx.scheme.float_layers or ctx.scheme.int8_layers else {}
        self.asked8 = {n for n in self.layers if self._asked8(n)} if ctx.int8_nodes else set()

    def weights_only(self) -> None:
        """The schemes without calibrated activation grids: float, dynamic, weight-only."""
        method = self.ctx.scheme.method
        layers = {"float": (), "dynamic": ("linear",), "weight-only": ("linear", "conv", "conv_transpose")}[method]
        why = {
            "float": "the scheme is float" if self.ctx.scheme.share is None else "the scheme computes in float",
            "dynamic": "the scheme quantizes linear layers only",
            "weight-only": "the scheme quantizes weights only",
        }[method]
        if self.ctx.scheme.weight is not None and self.ctx.scheme.weight.block is not None:
            layers = ("linear",)
        for node, k in self.kinds.items():
            if node.op not in ("call_module", "call_function", "call_method"):
                continue
            reason = self.excluded(node) or self._block_fault(node, k)
            if k in layers and reason is None:
                node.meta["weight_spec"] = str(self.ctx.scheme.weight_spec(k))
                node.meta["integer"] = method == "dynamic"
                self.changed += 1
            node.meta.setdefault("integer", False)
            if not node.meta["integer"]:
                node.meta["float_why"] = reason or why

    def _block_fault(self, node: Node, k: str) -> str | None:
        """Why the blocks of the scheme's weight do not fit this layer."""
        block = self.ctx.scheme.weight.block if self.ctx.scheme.weight is not None else None
        if block is None:
            return None
        if k != "linear":
            return "weights in blocks are for linear layers only" if k in WEIGHTED else None
        module: Any = module_of(self.gm, node)
        width, least = module.in_features, 2 if self.target.placement == "inputs" else 1
        if width % block or width < least * block:
            return f"its {width} input features are not {least} or more blocks of {block}"
        return None

    def excluded(self, node: Node) -> str | None:
        """Why the user or the scheme wants this node in float, or ``None``."""
        for pattern in self.ctx.float_nodes:
            if matches(self.gm, node, pattern, self.layers):
                self._matched.add(pattern)
                why = f"left float on request ({pattern.__name__ if isinstance(pattern, type) else pattern})"
                if self.ctx.scheme.share is not None:
                    node.meta["left"] = why
                return why
        for role in self.ctx.scheme.float_layers if node not in self.asked8 else ():
            if role in self.roles.get(node, ()):
                return f"the scheme leaves the {role} layer float" if role != "shortcut" else "the scheme leaves layers on shortcuts float"
        module = float_module(self.gm, node) if self.kinds[node] == "conv_transpose" and self._by_channel else None
        if module is not None and module.groups != 1:
            return "a grouped transposed convolution has no scale for each output channel"
        return None

    def _asked8(self, node: Node) -> bool:
        """Does the user want this layer in 8 bits?"""
        found = [s for s in self.ctx.int8_nodes if matches(self.gm, node, s, self.layers)]
        self._matched8.update(found)
        return bool(found)

    def keeps8(self, node: Node) -> bool:
        """A layer that a low-bit scheme, or the user, keeps in 8 bits; ``last_input`` keeps only what the last layer reads."""
        return node in self.asked8 or any(r in self.ctx.scheme.int8_layers for r in self.roles.get(node, ()) if r != "last_input")

    @property
    def _by_channel(self) -> bool:
        """Batch norms go into a scale for each output channel of the weight."""
        return self.ctx.scheme.trains and self.ctx.scheme.method != "float"

    def mark_int8_layers(self) -> None:
        """Layers that a low-bit scheme keeps in 8 bits read and hold 8-bit codes; so does what only stands in for another operation."""
        for node in self.stand_ins if self.ctx.scheme.stream is not None else ():
            if node.meta.get("integer"):
                node.meta["int8_layer"], node.meta["weight_spec"] = True, str(S8N)
        for node in self.layers:
            if node.meta.get("integer") and self.keeps8(node):
                node.meta["int8_layer"], node.meta["weight_spec"] = True, str(S8N)

    def check_patterns(self) -> None:
        """Record the patterns of ``skip=`` and ``int8=`` that match nothing."""
        for pattern in self.ctx.float_nodes:
            if pattern not in self._matched:
                self.ctx.skip(str(pattern), "this pattern of skip= matches no layer")
        for pattern in self.ctx.int8_nodes:
            if pattern not in self._matched8:
                self.ctx.skip(str(pattern), "this pattern of int8= matches no layer")


def roles(kinds: dict[Node, str], layers: list[Node]) -> dict[Node, set[str]]:
    """Roles of the model's layers: ``first`` (no layer before it), ``last`` (no layer behind it), ``shortcut`` (a layer alone on its branch of a
    residual sum, whose other branch starts at the same value and has more layers)."""
    before: dict[Node, int] = {}
    for n in kinds:
        before[n] = max((before[i] + (i in layers) for i in data_inputs(n)), default=0)
    behind: set[Node] = set()
    for n in reversed(list(kinds)):
        if any(u in behind or u in layers for u in n.users):
            behind.add(n)
    found: dict[Node, set[str]] = {n: set() for n in layers}
    for n in layers:
        if before[n] == 0:
            found[n].add("first")
        if n not in behind:
            found[n].add("last")
    for n, k in kinds.items():
        ends = [_branch(i, kinds) for i in data_inputs(n)] if k == "add" else []
        for mine, other in (ends, ends[::-1]) if len(ends) == 2 else ():
            if mine is not None and before[mine] < before[n] - 1 and (other is None or before[other] > before[mine]):
                found[mine].add("shortcut")
    return found


def _branch(node: Node, kinds: dict[Node, str]) -> Node | None:
    """The weighted layer whose value arrives here through a batch norm at most."""
    while kinds[node] == "batch_norm":
        node = data_inputs(node)[0]
    return node if kinds[node] in WEIGHTED else None


MOVES = ("max_pool", "reshape", "permute", "slice", "index_select", "pad", "resize", "avg_pool", "adaptive_avg_pool", "global_avg_pool", "adaptive_max_pool")
"""Kinds that a sign can be taken in front of as well as behind."""


def rectifies(gm: GraphModule, node: Node, kinds: Callable[[Node], str]) -> bool:
    """A ReLU, or a clamp that lets nothing below 0 through: a sign behind it would be constant."""
    if kinds(node) == "relu":
        return True
    module: Any = module_of(gm, node) if kinds(node) == "clamp" else None
    return module is not None and module.lo is not None and module.lo >= 0
