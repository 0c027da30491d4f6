"""annotate: scheme x target -> which nodes run in integers and which values get a grid, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fxq.graph import Grid, data_inputs, grids, kind, module_of, shape, walk
from fxq.modules import WEIGHTED, Clamp, Pad, Resize
from fxq.pipeline import Pass, PassContext
from fxq.placement import FLOATS, Plan
from fxq.placement_inputs import InputsPlan
from fxq.spec import QParams, QuantSpec
from fxq.targets import Target

POINTWISE = ("relu", "clamp", "batch_norm", "leaky_relu", "prelu", "sigmoid", "hardsigmoid", "hardswish", "silu", "tanh", "gelu", "elu")


@dataclass(frozen=True)
class Annotate(Pass):
    """Decide where integers are worth it.

    A weighted layer always runs in integers; every other operation of ``target.ops`` does when all its inputs are
    on a grid anyway (a conv's output, not a transformer's residual stream) and an integer operation reads its
    result, or when it shrinks its tensor. A ReLU or clamp from 0 behind an operation whose rule says ``clamps`` is absorbed:
    the grid starts at exactly 0.

    A target that wants its Q/DQ at the inputs of weighted layers (TensorRT) has rules of its own: :mod:`fxq.placement_inputs`.
    """

    name: ClassVar[str] = "annotate"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")
    ensures: ClassVar[tuple[str, ...]] = ("annotated",)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        for node in gm.graph.nodes:
            for key in ("integer", "float_why", "grid", "absorbed", "weight_spec", "reads_codes", "narrow", "int8_layer", "left"):
                node.meta.pop(key, None)
        gm.meta["grids"] = {}
        plan = InputsPlan(gm, ctx) if ctx.target.placement == "inputs" else OutputsPlan(gm, ctx)
        if ctx.scheme.method == "static":
            spec = ctx.scheme.kept_activation
            assert spec is not None
            plan.place(spec)
            plan.mark_int8_layers()
        else:
            plan.weights_only()
        plan.check_patterns()
        self._give_bits(gm, ctx)
        return plan.changed

    def _give_bits(self, gm: GraphModule, ctx: PassContext) -> None:
        """Weights with other bits than the scheme's."""
        for node, k in walk(gm, *WEIGHTED):
            bits = ctx.bits.get(str(node.target))
            if bits is not None and node.meta.get("integer"):
                node.meta["weight_spec"] = str(replace(ctx.scheme.weight_spec(k), bits=bits))


class OutputsPlan(Plan):
    """Q/DQ around every value that integer operations give (``Target.placement == "outputs"``)."""

    def __init__(self, gm: GraphModule, ctx: PassContext) -> None:
        super().__init__(gm, ctx)
        self.free: dict[Node, bool] = {}
        self.behind_float: set[Node] = set()

    def place(self, spec: QuantSpec) -> None:
        nodes = list(self.gm.graph.nodes)
        why = {n: self._cannot(n) for n in nodes}
        for n in nodes:
            if self._follows_float_layer(n):
                self.behind_float.add(n)
            self.free[n] = n in self.behind_float or (why[n] is None and self._free(n))
        absorbed = {n: n.args[0] for n in nodes if self._absorbable(n, spec, why)}
        for n in reversed(nodes):
            self._decide(n, why[n], absorbed)
        for n in absorbed:
            if n.meta["integer"]:
                n.meta["absorbed"] = True
        for n in nodes:
            self._give_grid(n, spec)

    def _cannot(self, node: Node) -> str | None:
        """Why the target cannot run this node in integers at all; ``None`` when it can."""
        k = self.kinds[node]
        if k in ("input", "attr"):
            return None if node.meta.get("dtype") in FLOATS else "not a float tensor"
        if k == "output":
            return "output"
        reason = self.excluded(node)
        if reason is not None:
            return reason
        if k == "clamp":
            return None
        if k not in self.target.ops:
            what = str(node.target) if k == "opaque" else k
            return f"{self.target.name} has no integer kernel for {what}"
        spec = self.ctx.scheme.kept_activation
        if k == "hardsigmoid" and spec is not None and spec.symmetric and spec.signed:
            return "its integer form saturates at 0, where a signed symmetric grid does not end"
        return _shape_fault(self.gm, node, k, self.target)

    def _free(self, node: Node) -> bool:
        """Is the value on a grid without an extra quantization (of a stream that had better stay float)?"""
        k = self.kinds[node]
        if k in ("input", "attr"):
            return True
        rule = self.target.ops.get(k)
        if rule is not None and rule.always:
            return k == "conv" or len(shape(node)) == 2
        return all(self.free[i] for i in data_inputs(node))

    def _follows_float_layer(self, node: Node) -> bool:
        """A first layer that the scheme keeps float, or a pointwise operation or max pool on its output: float itself, but what it gives is worth a grid.

        (On codes in the layout of a float convolution ONNX Runtime pools 50 times slower than behind an integer one.)
        """
        if self.ctx.scheme.stream is None:
            return False
        if "first" in self.roles.get(node, ()) and "first" in self.ctx.scheme.float_layers and node not in self.asked8:
            return self.kinds[node] == "conv" or len(shape(node)) == 2
        return self.kinds[node] in (*POINTWISE, "max_pool") and bool(data_inputs(node)) and all(i in self.behind_float for i in data_inputs(node))

    def _absorbable(self, node: Node, spec: QuantSpec, why: dict[Node, str | None]) -> bool:
        """A ReLU or clamp from 0 that its producer's output grid can take over."""
        k = self.kinds[node]
        if k not in ("relu", "clamp") or why[node] is not None or (spec.symmetric and spec.signed):
            return False
        module = module_of(self.gm, node)
        if isinstance(module, Clamp) and (module.lo != 0 or (module.hi is not None and module.hi <= 0)):
            return False
        source = node.args[0]
        if not isinstance(source, Node) or len(source.users) != 1 or why[source] is not None:
            return False
        rule = self.target.ops.get(self.kinds[source])
        return rule is not None and rule.clamps

    def _wanted(self, node: Node) -> bool:
        return any(u.meta.get("integer") for u in node.users)

    def _decide(self, node: Node, why: str | None, absorbed: dict[Node, object]) -> None:
        k = self.kinds[node]
        if k in ("input", "output", "attr"):
            return
        reason = why if why is not None else self._not_worth(node, k, absorbed)
        node.meta["integer"] = reason is None
        if reason is None:
            self.changed += 1
        else:
            node.meta["float_why"] = reason
        if k == "split":
            for part in node.users:
                part.meta["integer"] = reason is None
                if reason is not None:
                    part.meta["float_why"] = reason

    def _not_worth(self, node: Node, k: str, absorbed: dict[Node, object]) -> str | None:
        rule = self.target.ops.get(k)
        if rule is not None and rule.always:
            return None
        source = absorbed.get(node)
        if isinstance(source, Node):
            always = self.target.ops[self.kinds[source]].always
            must = self.target.ops[self.kinds[source]].output == "must"
            if always and (must or self._wanted(node)):
                return None
        elif k == "clamp":
            return "a clamp that is not absorbed has no integer kernel"
        if node in self.behind_float:
            return "it follows a layer that the scheme leaves float"
        if not self.free[node]:
            return "an input is a float stream: quantizing it costs accuracy and saves nothing"
        if k == "split":
            return None if any(self._wanted(part) for part in node.users) else "no integer operation reads it"
        if self._wanted(node) or (rule is not None and rule.shrinks) or (k == "reshape" and self._ends(node)):
            return None
        return "no integer operation reads it"

    def _ends(self, node: Node) -> bool:
        """Does it reshape the last integer result? Then the runtime moves the dequantization behind it."""
        if any(self.kinds[u] != "output" for u in node.users):
            return False
        rule = self.target.ops.get(self.kinds[data_inputs(node)[0]])
        return rule is not None and (rule.shrinks or rule.output == "must") and self.free[data_inputs(node)[0]]

    def _give_grid(self, node: Node, spec: QuantSpec) -> None:
        k = self.kinds[node]
        if k in ("output", "split"):
            return
        if node.meta.get("integer"):
            if any(u.meta.get("absorbed") for u in node.users):
                return
            rule = self.target.ops.get(k)
            if rule is not None and rule.output == "may" and not self._wanted(node):
                return
        elif not self._wanted(node):
            return
        clamp = None
        if node.meta.get("absorbed"):
            module = module_of(self.gm, node)
            clamp = (0.0, module.hi if isinstance(module, Clamp) else None)
        name = str(node.target) if node.op == "call_module" else node.name
        node.meta["grid"] = name
        fixed = None
        if k == "hardsigmoid" and node.meta.get("integer"):
            fixed = unit_grid(spec)
        grids(self.gm)[name] = Grid(spec, clamp, fixed, fixed)

def unit_grid(spec: QuantSpec) -> QParams:
    """The grid of a hard sigmoid: codes qmin..qmax on [0, 1], exactly; the zero point is the least code."""
    scale = torch.tensor(1.0 / (spec.qmax - spec.qmin), dtype=torch.float32)
    return QParams(spec, scale, torch.tensor(spec.qmin, dtype=torch.int32))


def _shape_fault(gm: GraphModule, node: Node, k: str, target: Target) -> str | None:
    """Facts about this very node that keep it from the integer kernel of its kind."""
    if k == "getitem":
        source = node.args[0]
        if not isinstance(source, Node) or kind(gm, source) != "split":
            return "takes a part of a tuple that no split made"
        return None
    if k != "split" and node.meta.get("dtype") not in FLOATS:
        return "not a float tensor"
    inputs = data_inputs(node)
    rule = target.ops[k]
    if rule.dims and inputs and len(shape(inputs[0])) not in rule.dims:
        return f"{target.name}'s integer {k} does not take a tensor of {len(shape(inputs[0]))} dimensions"
    if k in ("add", "mul") and any(i.meta.get("dtype") not in FLOATS for i in inputs):
        return "an operand is not a float tensor"
    if k in WEIGHTED or not inputs:
        return None
    module = module_of(gm, node)
    if isinstance(module, Pad) and (module.mode != "constant" or module.value != 0 or min(module.pads, default=0) < 0):
        return "padding with other values than 0 has no integer form"
    if isinstance(module, Resize) and not module.mode.startswith("nearest"):
        return f"{module.mode} interpolation has no integer kernel"
    return None
