"""convert: swap in the quantized modules and put a fake-quantizer behind every value that has a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.errors import CalibrationError
from fxq.graph import Grid, add_module, copy_shape, data_inputs, erase, grids, kind, module_of, reads_codes, swap_module
from fxq.modules import WEIGHTED, FakeQuantize, Quantized
from fxq.pipeline import Pass, PassContext
from fxq.spec import QParams, QuantSpec
from fxq.weight_ranges import weight_range


@dataclass(frozen=True)
class Convert(Pass):
    """Weights and biases onto their grids, fake-quantizers onto the edges, absorbed clamps out of the graph."""

    name: ClassVar[str] = "convert"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "calibrated")
    ensures: ClassVar[tuple[str, ...]] = ("converted",)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        changed, device = 0, next((p.device for p in gm.parameters()), torch.device("cpu"))
        for node in list(gm.graph.nodes):
            if kind(gm, node) in WEIGHTED and (node.meta.get("integer") or "weight_spec" in node.meta):
                swap_module(gm, node, self._quantized(gm, node, ctx))
                changed += 1
        for node in list(gm.graph.nodes):
            if node.meta.get("absorbed"):
                source = data_inputs(node)[0]
                source.meta["grid"] = node.meta["grid"]
                erase(gm, node, source)
        for node in list(gm.graph.nodes):
            grid = node.meta.get("grid")
            if grid is not None and kind(gm, node) != "fake_quantize":
                self._round(gm, node, grids(gm)[grid], device)
                changed += 1
        return changed

    def _quantized(self, gm: GraphModule, node: Node, ctx: PassContext) -> Quantized:
        op = module_of(gm, node)
        scheme, k = ctx.scheme, kind(gm, node)
        spec = QuantSpec.parse(node.meta["weight_spec"]) if "weight_spec" in node.meta else scheme.weight_spec(k)
        weight = weight_qparams(op, spec, scheme.weight_observer, node.name)
        if scheme.method != "static":
            return Quantized(op, weight, dynamic=scheme.activation if scheme.method == "dynamic" else None)
        source = grids(gm)[data_inputs(node)[0].meta["grid"]].qparams
        assert source is not None
        bias = op.bias
        if not ctx.target.int32_bias or not isinstance(bias, torch.Tensor):
            return Quantized(op, weight)
        weight = numerics.widen_for_bias(weight, bias, source)
        return Quantized(op, weight, numerics.bias_qparams(source, weight))

    def _round(self, gm: GraphModule, node: Node, grid: Grid, device: torch.device) -> None:
        assert grid.qparams is not None
        name = node.meta["grid"]
        wish = str(node.target) if node.op in ("call_module", "get_attr") else node.name
        module = FakeQuantize(grid.qparams, name)
        path = add_module(gm, f"{wish}_q", module.to(device))
        users = [u for u in node.users if reads_codes(u, node)]
        with gm.graph.inserting_after(node):
            rounded = gm.graph.call_module(path, (node,))
        copy_shape(node, rounded)
        rounded.meta["grid"], rounded.meta["integer"] = name, True
        if "nn_module_stack" in node.meta:
            rounded.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        for user in users:
            user.replace_input_with(node, rounded)


def weight_qparams(op: nn.Module, spec: QuantSpec, observer: str, where: str) -> QParams:
    """Grid of a module's weight.

    Raises:
        CalibrationError: when the weight holds NaN or infinity.
    """
    weight = op.weight
    assert isinstance(weight, torch.Tensor)
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError("the weight holds NaN or infinity", where=where, way_out="Load finite weights, or leave the layer out with skip=")
    lo, hi = weight_range(weight.detach(), spec, observer)
    return numerics.choose_qparams(lo, hi, spec)

