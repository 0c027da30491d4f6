"""Placing Q/DQ: what every planner of ``annotate`` shares, and the schemes that have no activation grids."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.graph import kind, module_of
from fxq.modules import WEIGHTED
from fxq.pipeline import PassContext

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
        self._matched: set[str] = set()

    def weights_only(self) -> None:
        """The schemes without calibrated activation grids: float, dynamic, weight-only."""
        method = self.ctx.scheme.method
        layers = {"float": (), "dynamic": ("linear",), "weight-only": ("linear", "conv", "conv_transpose")}[method]
        why = {
            "float": "the scheme is float",
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
        """Why the user wants this node in float, or ``None``."""
        for pattern in self.ctx.float_nodes:
            for name in (str(node.target) if node.op == "call_module" else node.name, node.name):
                if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, pattern + ".*"):
                    self._matched.add(pattern)
                    return f"left float on request ({pattern})"
        return None

    def check_patterns(self) -> None:
        """Record the patterns of ``skip=`` that match nothing."""
        for pattern in self.ctx.float_nodes:
            if pattern not in self._matched:
                self.ctx.skip(pattern, "this pattern of skip= matches no layer")
