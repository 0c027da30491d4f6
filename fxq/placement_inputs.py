"""Q/DQ at the inputs of weighted layers: what TensorRT wants (``Target.placement == "inputs"``).

What a layer gives stays float, so that bias, ReLU and the sum of a residual block fuse into its kernel. Source: NVIDIA, "Working with
quantized types" (TensorRT documentation), Q/DQ placement recommendations; confirmed with the builder's layer tables where it shows them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import GraphModule, Node

from fxq.graph import Grid, data_inputs, float_module, grids, shape
from fxq.pipeline import PassContext
from fxq.placement import FLOATS, Plan
from fxq.spec import QuantSpec

MOVES = ("reshape", "permute", "slice", "pad", "max_pool", "resize", "index_select")
"""Kinds that hand values on: behind them a net's input is still its input."""


class InputsPlan(Plan):
    """Marks each edge that carries codes: ``meta["reads_codes"]`` of the reader names the producers."""

    def __init__(self, gm: GraphModule, ctx: PassContext) -> None:
        super().__init__(gm, ctx)
        self.reads: dict[Node, set[Node]] = {}

    def place(self, spec: QuantSpec) -> None:
        """Decide every node, mark the edges, give each value that is read in codes its grid."""
        for node in self.gm.graph.nodes:
            self._decide(node)
        for node in self.gm.graph.nodes:
            if node.meta.get("integer"):
                self.reads[node] = set(data_inputs(node))
        self._residuals()
        self._concats()
        for node in self.gm.graph.nodes:
            node.meta["reads_codes"] = tuple(sorted(s.name for s in self.reads.get(node, ())))
            if any(node in self.reads.get(user, ()) for user in node.users):
                name = str(node.target) if node.op == "call_module" else node.name
                node.meta["grid"] = name
                grids(self.gm)[name] = Grid(spec)
                self.changed += 1

    def _decide(self, node: Node) -> None:
        k = self.kinds[node]
        if k in ("input", "output", "attr"):
            return
        rule = self.target.ops.get(k)
        reason = self.excluded(node)
        if reason is None and (rule is None or not rule.always):
            reason = self.target.float_why.get(k, f"{self.target.family} has no integer kernel for {node.target if k == 'opaque' else k}")
        if reason is None:
            reason = self._fault(node, k)
        node.meta["integer"] = reason is None
        if reason is None:
            self.changed += 1
        else:
            node.meta["float_why"] = reason

    def _fault(self, node: Node, k: str) -> str | None:
        """What keeps this very layer from an integer kernel, or makes one not worth it."""
        if any(i.meta.get("dtype") not in FLOATS for i in data_inputs(node)) or len(data_inputs(node)) != (2 if k == "matmul" else 1):
            return "an input is not a float tensor"
        least = self.target.least_channels
        if k == "matmul":
            a, b = (shape(i) for i in data_inputs(node))
            if len(a) < 2 or len(b) < 2 or min(a[-2], b[-1]) == 1 or min(a[-1], b[-1]) < least:
                return f"a product with one row or column, or less than {least} along K or N, is faster in float"
            return None
        module: Any = float_module(self.gm, node)
        if k == "linear":
            few = min(module.in_features, module.out_features)
            return f"a linear layer with {few} features on one side is faster in float (from {least} on integers pay)" if few < least else None
        few = min(module.in_channels, module.out_channels)
        if len(shape(data_inputs(node)[0])) != module.weight.ndim:
            return "its input has no batch dimension"
        first = module.out_channels >= least and self._first(node)
        if few < least and first and self.ctx.scheme.activation is not None and self.ctx.scheme.activation.kind == "float8":
            return f"TensorRT computes a first convolution with {few} channels in float, not in float8"
        if few < least and not first:
            return f"a convolution with {few} channels on one side is faster in float (from {least} on integers pay)"
        return None

    def _first(self, node: Node) -> bool:
        """Does it read an input of the model, moved at most?"""
        (source,) = data_inputs(node)
        while self.kinds[source] in MOVES:
            source = data_inputs(source)[0]
        return self.kinds[source] == "input"

    def _residuals(self) -> None:
        """A sum of a convolution and a skip: the skip is read in codes, the convolution is not, so that they fuse."""
        depth: dict[Node, int] = {}
        for node in self.gm.graph.nodes:
            depth[node] = 1 + max((depth[i] for i in data_inputs(node)), default=-1)
            if self.kinds[node] != "add" or len(data_inputs(node)) != 2 or self.excluded(node) is not None:
                continue
            branches = [i for i in data_inputs(node) if self.kinds[i] == "conv" and i.meta.get("integer") and len(i.users) == 1]
            if not branches:
                continue
            branch = max(branches, key=depth.__getitem__)
            (skip,) = (i for i in data_inputs(node) if i is not branch)
            if skip.op != "get_attr" and skip.meta.get("dtype") in FLOATS and shape(skip) == shape(branch):
                self.reads[node] = {skip}

    def _concats(self) -> None:
        """A concatenation that is read in codes only hands codes on: one grid for all its inputs and its output."""
        for node in reversed(list(self.gm.graph.nodes)):
            if self.kinds[node] != "cat" or "cat" not in self.target.ops or self.excluded(node) is not None:
                continue
            repeated = max(Counter(node.args).values(), default=0) > 1
            if node.users and not repeated and all(node in self.reads.get(user, ()) for user in node.users):
                if all(i.meta.get("dtype") in FLOATS for i in data_inputs(node)):
                    self.reads[node] = set(data_inputs(node))
                    node.meta["integer"] = True
                    node.meta.pop("float_why", None)
            else:
                node.meta["float_why"] = "a float operation reads it as well" if node.users else "nothing reads it"
