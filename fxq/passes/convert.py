"""convert: swap in the quantized modules and put a fake-quantizer behind every value that has a grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.errors import CalibrationError
from fxq.graph import add_module, copy_shape, data_inputs, erase, grids, kind, module_of, reads_codes, swap_module
from fxq.kernels import moved
from fxq.modules import WEIGHTED, FakeQuantize, Quantized
from fxq.pipeline import Pass, PassContext
from fxq.schemes import S8N
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
                self._round(gm, node, grid, device)
                changed += 1
        changed += self._narrow(gm, device)
        return changed

    def _narrow(self, gm: GraphModule, device: torch.device) -> int:
        """The second, narrow grids: behind the wide one, or behind the float value itself."""
        made: dict[tuple[Node, str], Node] = {}
        for node in list(gm.graph.nodes):
            name = node.meta.get("narrow")
            if name is None:
                continue
            (source,) = data_inputs(node)
            value = source.all_input_nodes[0]
            origin = source if value.meta.get("integer") or value.op == "get_attr" else value
            if (origin, name) not in made:
                made[origin, name] = self._fake_quantize(gm, origin, name, f"{_wish(value)}_narrow_q", device)
            node.replace_input_with(source, made[origin, name])
            if not source.users:
                gm.graph.erase_node(source)
        return len(made)

    def _quantized(self, gm: GraphModule, node: Node, ctx: PassContext) -> Quantized:
        op = module_of(gm, node)
        scheme, k = ctx.scheme, kind(gm, node)
        spec = QuantSpec.parse(node.meta["weight_spec"]) if "weight_spec" in node.meta else scheme.weight_spec(k)
        if spec.kind in ("binary", "ternary"):  # prepare-training puts an estimator there
            spec = replace(S8N, axis=spec.axis)
        weight = weight_qparams(op, spec, scheme.weight_observer, node.name)
        if scheme.method != "static":
            return Quantized(op, weight, dynamic=scheme.activation if scheme.method == "dynamic" else None)
        source = grids(gm)[node.meta.get("narrow") or data_inputs(node)[0].meta["grid"]].qparams
        assert source is not None
        bias = op.bias
        if not ctx.target.int32_bias or not isinstance(bias, torch.Tensor):
            return Quantized(op, weight)
        weight = numerics.widen_for_bias(weight, bias, source)
        return Quantized(op, weight, numerics.bias_qparams(source, weight))

    def _round(self, gm: GraphModule, node: Node, name: str, device: torch.device) -> None:
        users = [u for u in node.users if reads_codes(u, node)]
        rounded = self._fake_quantize(gm, node, name, f"{_wish(node)}_q", device)
        for user in users:
            user.replace_input_with(node, rounded)

    def _fake_quantize(self, gm: GraphModule, node: Node, name: str, wish: str, device: torch.device) -> Node:
        grid = grids(gm)[name]
        assert grid.qparams is not None
        sources = moved(gm, node)  # what moves values of the grid rounds them once more, as they are
        step = None if sources and all(s.meta["grid"] == name for s in sources) else grid.step
        path = add_module(gm, wish, FakeQuantize(grid.qparams, name, step).to(device))
        with gm.graph.inserting_after(node):
            rounded = gm.graph.call_module(path, (node,))
        copy_shape(node, rounded)
        rounded.meta["grid"], rounded.meta["integer"] = name, True
        if "nn_module_stack" in node.meta:
            rounded.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        return rounded


def _wish(node: Node) -> str:
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


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

