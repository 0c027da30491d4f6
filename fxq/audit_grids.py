"""Checks of the passes that choose grids: ``annotate``, ``share-qparams``, ``calibrate``, ``convert``, from the graphs they left and from data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.audit import Finding
from fxq.graph import Grid, data_inputs, grid_of, grids, kind, module_of, reads_codes, walk
from fxq.modules import WEIGHTED, Clamp, FakeQuantize, Quantized
from fxq.schemes import Scheme
from fxq.spec import QParams
from fxq.targets import Target
from fxq.toggles import CHANNELS
from fxq.weight_ranges import weight_range

PRODUCTS = (*WEIGHTED, "matmul")
ASKED = "left float on request"
CLOSE = 1e-4
"""Relative difference up to which two scales are the same."""


def path_of(node: Node) -> str:
    """Module path of the node, or its name."""
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def annotate_findings(gm: GraphModule, scheme: Scheme) -> Iterator[Finding]:
    """Grids that do not fit what they stand for: an absorbed clamp that is another one, codes that the scheme does not have, a weight's axis."""
    step = "annotate"
    for node in gm.graph.nodes:
        grid = grid_of(gm, node)
        if node.meta.get("absorbed") and grid is not None:
            module = module_of(gm, node)
            want = (0.0, module.hi if isinstance(module, Clamp) else None)
            if grid.clamp != want:
                yield Finding(step, node.name, path_of(node), "wrong clamp", f"it clamps to {_ends(want)}, its grid to {_ends(grid.clamp)}")
        elif grid is not None and grid.clamp is not None and not any(u.meta.get("absorbed") for u in node.users):
            yield Finding(step, node.name, path_of(node), "wrong clamp", f"its grid clamps to {_ends(grid.clamp)}, and no activation was absorbed there")
        spec = str(node.meta.get("weight_spec", ""))
        k = kind(gm, node)
        if "/pc" in spec and k in CHANNELS and not spec.endswith(f"/pc{CHANNELS[k]}"):
            fact = f"its weight has scales along axis {spec.rsplit('pc', 1)[1]}, its channels lie on {CHANNELS[k]}"
            yield Finding(step, node.name, path_of(node), "wrong axis", fact)
        wanted = scheme.kept_activation
        if grid is not None and wanted is not None and scheme.stream is None and grid.spec.bits != wanted.bits:
            yield Finding(step, node.name, path_of(node), "wrong codes", f"its grid has {grid.spec.bits} bits, the scheme {wanted.bits}")


def _ends(clamp: tuple[float, float | None] | None) -> str:
    return "nothing" if clamp is None else f"[{clamp[0]:g}, {'inf' if clamp[1] is None else format(clamp[1], 'g')}]"


def share_findings(before: GraphModule, after: GraphModule, target: Target) -> Iterator[Finding]:
    """Values that came to one grid though nothing hands codes from one to the other and no operation joins them."""
    old = {n.name: n.meta.get("grid") for n in before.graph.nodes}
    ties: dict[str, str] = {}

    def root(name: str) -> str:
        while ties.get(name, name) != name:
            name = ties[name]
        return name

    def tie(*names: Any) -> None:
        known = [root(n) for n in names if n is not None]
        for n in known[1:]:
            ties[n] = known[0]

    for node, k in walk(before):
        rule = target.ops.get(k)
        if rule is not None and "grid" in node.meta and (rule.output == "same" or k in target.share):
            sources = data_inputs(node)
            sources = data_inputs(sources[0]) if k == "getitem" and sources and kind(before, sources[0]) == "split" else sources
            tie(node.meta["grid"], *(s.meta.get("grid") for s in sources))
    groups: dict[str, dict[str, list[Node]]] = {}
    for node in after.graph.nodes:
        name, was = node.meta.get("grid"), old.get(node.name)
        if name is not None and was is not None:
            groups.setdefault(str(name), {}).setdefault(root(str(was)), []).append(node)
    for name, members in groups.items():
        home = root(name) if root(name) in members else next(iter(members))
        for other, nodes in members.items():
            if other != home:
                fact = f"it shares the grid {name!r} with values that it hands no codes to"
                yield Finding("share-qparams", nodes[0].name, path_of(nodes[0]), "grid shared wrongly", fact)


def calibrate_findings(gm: GraphModule) -> Iterator[Finding]:
    """Parameters that no grid may have: zero points outside the codes, scales that are no positive numbers, ends that miss the clamp."""
    for node in gm.graph.nodes:
        grid = grid_of(gm, node)
        if grid is None or grid.qparams is None or _seen_before(gm, node):
            continue
        for reason, fact in _bad(grid, grid.qparams):
            yield Finding("calibrate", node.name, path_of(node), reason, fact)


def _seen_before(gm: GraphModule, node: Node) -> bool:
    """Is another node the first one with this grid?"""
    return next(n for n in gm.graph.nodes if n.meta.get("grid") == node.meta["grid"]) is not node


def _bad(grid: Grid, qp: QParams) -> Iterator[tuple[str, str]]:
    spec = qp.spec
    if not bool(torch.isfinite(qp.scale).all()) or bool((qp.scale <= 0).any()):
        yield "bad scale", f"its scale is {float(qp.scale.min()):g}"
        return
    if spec.kind not in ("affine",):
        return
    if bool((qp.zero_point < spec.qmin).any()) or bool((qp.zero_point > spec.qmax).any()):
        yield "zero point outside", f"its zero point {int(qp.zero_point.max())} is outside the codes {spec.qmin}..{spec.qmax}"
    if grid.fixed is not None and not _same(qp, grid.fixed):
        yield "wrong scale", f"its scale is {float(qp.scale):.6g}; its operation fixes {float(grid.fixed.scale):.6g}"
    if grid.clamp is not None and grid.step is None and qp.scale.numel() == 1:
        lo, hi = ((end - int(qp.zero_point)) * float(qp.scale) for end in (spec.qmin, spec.qmax))
        low, high = grid.clamp
        if abs(lo - low) > CLOSE * float(qp.scale) or high is not None and hi > high + 0.5 * float(qp.scale):
            yield "wrong clamp", f"its grid ends at {lo:.6g} and {hi:.6g}, the clamp that it absorbed at {_ends(grid.clamp)}"


def _same(a: QParams, b: QParams) -> bool:
    equal = a.spec == b.spec and torch.equal(a.zero_point.cpu(), b.zero_point.cpu())
    return equal and torch.allclose(a.scale.cpu(), b.scale.cpu(), rtol=CLOSE, atol=0)


def islands(gm: GraphModule, target: Target) -> Iterator[Finding]:
    """Layers and products that the target has integer forms of and that stay float though integers come in and are read behind, with the planner's reason.

    Connected float operations are one island, named by its first layer or product. What the user asked to stay float is none.
    """
    floats = {n for n, _ in walk(gm) if n.meta.get("integer") is False and n.op != "output"}
    seen: set[Node] = set()
    for node in gm.graph.nodes:
        if node not in floats or node in seen:
            continue
        region, todo, edge = {node}, [node], set[Node]()
        while todo:
            n = todo.pop()
            for other in (*n.all_input_nodes, *n.users):
                if other in floats and other not in region:
                    region.add(other)
                    todo.append(other)
                elif other not in floats and other.op != "get_attr":
                    edge.add(other)
        seen |= region
        first = next((n for n in gm.graph.nodes if n in region and kind(gm, n) in PRODUCTS and kind(gm, n) in target.ops), None)
        if first is not None and not str(first.meta.get("float_why")).startswith(ASKED) and all(n.meta.get("integer") for n in edge):
            why = first.meta.get("float_why") or "no reason was given"
            more = f" (and {len(region) - 1} more behind or before it)" if len(region) > 1 else ""
            yield Finding("annotate", first.name, path_of(first), "float island", f"it stays float between integer operations{more}: {why}", False)


def convert_findings(before: GraphModule, after: GraphModule, scheme: Scheme, target: Target) -> Iterator[Finding]:
    """Fake-quantizers that are missing or have another grid than was calibrated, and weights and biases that are not what the float layer had."""
    floats = {n.name: n for n in before.graph.nodes}
    for node, k in walk(after):
        module = module_of(after, node) if node.op == "call_module" else None
        if isinstance(module, FakeQuantize):
            yield from _fake_quantize(grids(before), floats, node, module)
        elif isinstance(module, Quantized) and node.name in floats:
            yield from _Layer(grids(before), node, module, module_of(before, floats[node.name]), k, scheme).findings()
        if node.meta.get("integer") and not isinstance(module, FakeQuantize) and target.placement == "outputs" and scheme.method == "static":
            yield from _unrounded(after, node, k, target)


def _fake_quantize(calibrated: dict[str, Grid], floats: dict[str, Node], node: Node, module: FakeQuantize) -> Iterator[Finding]:
    name = node.meta.get("grid")
    grid = calibrated.get(str(name))
    want = None if grid is None else grid.qparams
    if grid is None or want is None:
        return
    source, narrowed = node.all_input_nodes[0], {u.meta.get("narrow") for u in node.users}
    while source.all_input_nodes and source.name not in floats:
        source = source.all_input_nodes[0]
    there = floats[source.name].meta.get("grid") if source.name in floats else None
    if there is not None and there != name and name not in narrowed:
        fact = f"it rounds {source.name}, whose grid is {there!r}, to the grid {name!r}"
        related = (source.name, *(u.name for u in node.users))
        yield Finding("convert", node.name, path_of(node), "misplaced quantizer", fact, True, (node.name,), related=related)
        return
    have = module.qparams
    if have.spec != want.spec:
        fact = f"it rounds to {have.spec} ({have.spec.qmin}..{have.spec.qmax}), calibrated was {want.spec}"
        yield Finding("convert", node.name, path_of(node), "wrong codes", fact, True, (node.name,))
    elif not torch.equal(have.zero_point.cpu(), want.zero_point.cpu()):
        fact = f"its zero point is {have.zero_point.flatten()[:1].tolist()[0]}, calibrated was {want.zero_point.flatten()[:1].tolist()[0]}"
        yield Finding("convert", node.name, path_of(node), "wrong zero point", fact, True, (node.name,))
    elif not _same(have, want):
        fact = f"its scale is {float(have.scale.flatten()[0]):.6g}, calibrated was {float(want.scale.flatten()[0]):.6g}"
        yield Finding("convert", node.name, path_of(node), "wrong scale", fact, True, (node.name,))
    elif not _same_step(module.step, grid.step) and not (module.step is None and _handed_on(floats.get(source.name), name)):
        have_step, want_step = ("none" if s is None else f"{float(s.flatten()[0]):.6g}" for s in (module.step, grid.step))
        fact = f"the scale that it divides by is {have_step}, calibrated was {want_step}"
        yield Finding("convert", node.name, path_of(node), "wrong scale", fact, True, (node.name,))


def _handed_on(node: Node | None, grid: Any) -> bool:
    """Does the operation hand codes on, so that what it gives was divided before?"""
    return node is not None and any(a.meta.get("grid") == grid for a in data_inputs(node))


def _same_step(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or a is not None and b is not None and torch.allclose(a.cpu(), b.cpu(), rtol=CLOSE, atol=0)


def _unrounded(gm: GraphModule, node: Node, k: str, target: Target) -> Iterator[Finding]:
    if k in ("output", "attr", "input", "getitem") or k not in target.ops:
        return
    for source in data_inputs(node):
        inner = kind(gm, source)
        if inner in ("fake_quantize", "attr") or inner == "getitem" or (grid_of(gm, node) is None and not reads_codes(node, source)):
            continue
        fact = f"{node.name} runs in integers and reads {source.name} unrounded"
        yield Finding("convert", node.name, path_of(node), "dropped quantizer", fact, related=(source.name,))


@dataclass(frozen=True)
class _Layer:
    """One quantized layer beside the float one."""

    calibrated: dict[str, Grid]
    node: Node
    made: Quantized
    was: Any
    kind: str
    scheme: Scheme

    def findings(self) -> Iterator[Finding]:
        w, have = self.made.op.weight.detach(), self.was.weight.detach()  # type: ignore[operator]
        spec = self.made.weight_grid.spec
        if w.shape != have.shape or not torch.equal(w, have):
            yield self._find("transposed axis" if _transposed(w, have) else "wrong weight", self._weight_fact(w, have))
            return
        if spec.axis is not None and spec.block is None and spec.axis != CHANNELS[self.kind]:
            yield self._find("wrong axis", f"its weight has scales along axis {spec.axis}, its output channels lie on {CHANNELS[self.kind]}")
        else:
            yield from self._scales(have)
        yield from self._bias()

    def _weight_fact(self, w: Tensor, have: Tensor) -> str:
        if _transposed(w, have):
            return "its weight is the float layer's with two axes exchanged"
        return f"its weight differs from the float layer's in {int((w != have).sum()) if w.shape == have.shape else 'all'} of {have.numel()} elements"

    def _scales(self, weight: Tensor) -> Iterator[Finding]:
        grid = self.made.weight_grid
        if grid.spec.kind != "affine":
            return
        want = numerics.choose_qparams(*weight_range(weight, grid.spec, self.scheme.weight_observer), grid.spec)
        a, b = grid.scale.flatten().to(torch.float64), want.scale.flatten().to(torch.float64)
        if a.shape == b.shape and not torch.equal(grid.zero_point.flatten(), want.zero_point.flatten().to(grid.zero_point)):
            yield self._find("wrong zero point", "the zero point of its weight is not that of its range")
        if a.shape != b.shape:
            yield self._find("wrong axis", f"its weight has {a.numel()} scales for {b.numel()} channels")
            return
        low, high = a < b * (1 - CLOSE), (a > b * (1 + CLOSE)) & ~self._for_bias(a, b)
        if bool((low | high).any()):
            swapped = bool(torch.allclose(a.sort().values, b.sort().values, rtol=CLOSE, atol=0))
            count = f"{int((low | high).sum())} of {a.numel()} scales of its weight"
            ratio = a / b
            fact = "belong to other channels" if swapped else f"are not those of its range ({float(ratio.min()):.3g} to {float(ratio.max()):.3g} times)"
            yield self._find("swapped scales" if swapped else "wrong scale", f"{count} {fact}")

    def _for_bias(self, a: Tensor, b: Tensor) -> Tensor:
        """Where a scale had to grow so that the int32 bias fits."""
        bias = self.made.op.bias
        if not isinstance(bias, Tensor) or self.made.bias_grid is None or a.numel() not in (1, bias.numel()):
            return torch.zeros_like(a, dtype=torch.bool)
        step = self._input_scale()
        if step is None:
            return torch.zeros_like(a, dtype=torch.bool)
        room = bias.detach().abs().to(torch.float64) / (step * b) > 2.0**30
        return room if a.numel() == bias.numel() else room.any().expand_as(a)

    def _input_scale(self) -> float | None:
        """Calibrated scale of the input: that of the fake-quantizer may be a fault of its own."""
        name = self.node.meta.get("narrow") or data_inputs(self.node)[0].meta.get("grid")
        grid = self.calibrated.get(str(name))
        return None if grid is None or grid.qparams is None or grid.qparams.scale.numel() != 1 else float(grid.qparams.scale)

    def _bias(self) -> Iterator[Finding]:
        bias, grid, step = self.made.op.bias, self.made.bias_grid, self._input_scale()
        if not isinstance(bias, Tensor):
            return
        old = self.was.bias
        if not isinstance(old, Tensor) or old.shape != bias.shape or not torch.equal(old.detach(), bias.detach()):
            yield self._find("wrong bias", "its bias is not the float layer's")
            return
        if grid is None or step is None:
            return
        want = step * self.made.weight_grid.scale.to(torch.float64)
        have = grid.scale.to(torch.float64)
        rounded = numerics.dequantize(numerics.quantize_bias(bias.detach(), grid.qparams), grid.qparams)
        error = (rounded.to(torch.float64) - bias.detach().to(torch.float64)).abs()
        fine = bias.detach().abs().to(torch.float64) * torch.finfo(torch.float32).eps  # codes beyond 2^24 are rounded on their way back
        saturated = int((error > have * 0.75 + fine).sum())
        if saturated:
            yield self._find("saturation", f"its bias does not fit the codes in {saturated} of {bias.numel()} channels")
        elif not torch.allclose(have, want.expand_as(have), rtol=CLOSE, atol=0):
            yield self._find("wrong bias scale", "the scale of its bias is not input scale times weight scale: the runtime's sums count in that")

    def _find(self, reason: str, fact: str) -> Finding:
        return Finding("convert", self.node.name, path_of(self.node), reason, fact, True, (self.node.name,))


def _transposed(w: Tensor, have: Tensor) -> bool:
    pairs = [(i, j) for i in range(have.ndim) for j in range(i + 1, have.ndim)]
    return any(have.transpose(i, j).shape == w.shape and torch.equal(have.transpose(i, j), w) for i, j in pairs)
