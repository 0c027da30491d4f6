"""Faults that a quantization compiler can have, planted into one pass of a compilation: what ``bench_bisect.py`` and the tests look for.

Each function changes the graph behind (or in front of) one pass and returns the names of the nodes that a debugger may name, or None where the net
has no place for it. Passes and their order are those of the product.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq import api
from fxq.graph import grids, kind, module_of, swap_module, walk
from fxq.modules import FakeQuantize, Quantized
from fxq.pipeline import Pass, PassContext, Pipeline
from fxq.spec import QParams

Names = set[str]
Mutation = Callable[[GraphModule, random.Random], Names | None]


@dataclass(frozen=True)
class Fault:
    """A mutation of one pass. ``before``: it changes what the pass reads, and is taken back behind it (the recorded graphs stay right)."""

    step: str
    name: str
    mutate: Mutation
    before: bool = False


def pick(rng: random.Random, items: list[Any]) -> Any:
    return rng.choice(items) if items else None


# fold-bn ----------------------------------------------------------------------------------------------------------------------------------------


def _with_bn(change: Callable[[Any], None]) -> Mutation:
    """The pass sees another batch norm than the graph has."""

    def mutate(gm: GraphModule, rng: random.Random) -> Names | None:
        node = pick(rng, [n for n, _ in walk(gm, "batch_norm") if kind(gm, n.all_input_nodes[0]) == "conv" and len(n.all_input_nodes[0].users) == 1])
        if node is None:
            return None
        bn = copy.deepcopy(module_of(gm, node))
        change(bn)
        swap_module(gm, node, bn)
        return {node.all_input_nodes[0].name}

    return mutate


def _no_eps(bn: Any) -> None:
    bn.eps = 0.0


def _mean_sign(bn: Any) -> None:
    bn.running_mean = -bn.running_mean


def _no_gamma(bn: Any) -> None:
    bn.weight = nn.Parameter(torch.ones_like(bn.weight))


def _wrong_fold_axis(gm: GraphModule, rng: random.Random) -> Names | None:
    """The scale of the output channels went onto the input channels: on the folded weight, rows and columns are divided by other norms."""
    node = pick(rng, _square(gm))
    if node is None:
        return None
    op = copy.deepcopy(module_of(gm, node))
    scale = torch.linspace(0.5, 1.5, op.weight.shape[0]).reshape(-1, *[1] * (op.weight.ndim - 1))
    op.weight = nn.Parameter(op.weight.detach() / scale * scale.transpose(0, 1))
    swap_module(gm, node, op)
    return {node.name}


def _square(gm: GraphModule) -> list[Node]:
    found = []
    for n, _ in walk(gm, "conv", "linear"):
        w = module_of(gm, n)
        w = w.op.weight if isinstance(w, Quantized) else w.weight
        if w.shape[0] == w.shape[1] and w.shape[0] > 1:
            found.append(n)
    return found


# canonicalize, legalize -------------------------------------------------------------------------------------------------------------------------


def _concat_order(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n, _ in walk(gm, "cat") if len(n.args) > 1 and len({a.meta["shape"] for a in n.args}) == 1])
    if node is None:
        return None
    node.args = (node.args[1], node.args[0], *node.args[2:])
    return {node.name}


def _dropped_skip(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n, _ in walk(gm, "add") if all(isinstance(a, Node) for a in n.args) and n.args[0].meta.get("shape") == n.args[1].meta.get("shape")])
    if node is None:
        return None
    node.args = (node.args[0], node.args[0])
    return {node.name}


def _rolled_inputs(gm: GraphModule, rng: random.Random) -> Names | None:
    """A permutation of channels that went into the weights the wrong way round."""
    node = pick(rng, [n for n, _ in walk(gm, "conv", "linear") if module_of(gm, n).weight.shape[1] > 3])
    if node is None:
        return None
    op = copy.deepcopy(module_of(gm, node))
    op.weight = nn.Parameter(op.weight.detach().roll(1, 1))
    swap_module(gm, node, op)
    return {node.name}


# annotate, share-qparams, calibrate -------------------------------------------------------------------------------------------------------------


def _replace_grid(gm: GraphModule, name: str, **fields: Any) -> None:
    grids(gm)[name] = replace(grids(gm)[name], **fields)


def _members(gm: GraphModule, name: str) -> Names:
    return {n.name for n in gm.graph.nodes if n.meta.get("grid") == name}


def _clip_too_low(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n in gm.graph.nodes if n.meta.get("absorbed")])
    if node is None:
        return None
    lo, hi = grids(gm)[node.meta["grid"]].clamp or (0.0, None)
    _replace_grid(gm, node.meta["grid"], clamp=(lo, 1.0 if hi is None else hi - 1.0))
    return {node.name}


def _axis_in_the_plan(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n in _square(gm) if n.meta.get("integer")])
    if node is None:
        return None
    node.meta["weight_spec"] = "s8n/pc1"
    return {node.name}


def _codes_lost(gm: GraphModule, rng: random.Random) -> Names | None:
    name = pick(rng, [n for n, g in grids(gm).items() if g.fixed is None])
    _replace_grid(gm, name, spec=replace(grids(gm)[name].spec, bits=4))
    return _members(gm, name)


def _shared_wrongly(gm: GraphModule, rng: random.Random) -> Names | None:
    table = grids(gm)
    free = [n for n, g in table.items() if g.fixed is None and g.clamp is None]
    if len(free) < 2:
        return None
    a, b = rng.sample(free, 2)
    names = _members(gm, a) | _members(gm, b)
    for node in gm.graph.nodes:
        if node.meta.get("grid") == b:
            node.meta["grid"] = a
    del table[b]
    return names


def _params(gm: GraphModule) -> list[str]:
    return [n for n, g in grids(gm).items() if g.qparams is not None and g.fixed is None and _members(gm, n)]


def _scaled(gm: GraphModule, name: str, factor: float) -> None:
    qp = grids(gm)[name].qparams
    assert qp is not None
    _replace_grid(gm, name, qparams=QParams(qp.spec, qp.scale * factor, qp.zero_point))


def _swapped_scales(gm: GraphModule, rng: random.Random) -> Names | None:
    names = _params(gm)
    scale = {n: float(grids(gm)[n].qparams.scale) for n in names}
    pairs = [(a, b) for a in names for b in names if scale[a] > 4 * scale[b] and (grids(gm)[a].clamp is None) == (grids(gm)[b].clamp is None)]
    pair = pick(rng, pairs)
    if pair is None:
        return None
    a, b = pair
    qa, qb = grids(gm)[a].qparams, grids(gm)[b].qparams
    _replace_grid(gm, a, qparams=QParams(qa.spec, qb.scale, qa.zero_point))
    _replace_grid(gm, b, qparams=QParams(qb.spec, qa.scale, qb.zero_point))
    return _members(gm, a) | _members(gm, b)


def _ranges(factor: float, clamped: bool | None = None) -> Mutation:
    def mutate(gm: GraphModule, rng: random.Random) -> Names | None:
        names = [n for n in _params(gm) if clamped is None or (grids(gm)[n].clamp is not None) == clamped]
        name = pick(rng, [n for n in names if factor < 1 or grids(gm)[n].clamp is None or grids(gm)[n].clamp[1] is None])
        if name is None:
            return None
        _scaled(gm, name, factor)
        return _members(gm, name)

    return mutate


def _zero_sign(gm: GraphModule, rng: random.Random) -> Names | None:
    def mirrored(n: str) -> int:
        qp = grids(gm)[n].qparams
        return qp.spec.qmin + qp.spec.qmax - int(qp.zero_point)

    names = [n for n in _params(gm) if grids(gm)[n].clamp is None and abs(mirrored(n) - int(grids(gm)[n].qparams.zero_point)) > 60]
    name = pick(rng, names)
    if name is None:
        return None
    qp = grids(gm)[name].qparams
    _replace_grid(gm, name, qparams=QParams(qp.spec, qp.scale, torch.full_like(qp.zero_point, mirrored(name))))
    return _members(gm, name)


def _clamp_passed(gm: GraphModule, rng: random.Random) -> Names | None:
    """The grid ends one step and more above the clamp that it absorbed."""
    name = pick(rng, [n for n in _params(gm) if grids(gm)[n].clamp is not None and grids(gm)[n].clamp[1] is not None])
    if name is None:
        return None
    qp, hi = grids(gm)[name].qparams, grids(gm)[name].clamp[1]
    steps = qp.spec.qmax - qp.spec.qmin
    _replace_grid(gm, name, qparams=QParams(qp.spec, torch.tensor(hi / (steps - 1), dtype=torch.float32), qp.zero_point))
    return _members(gm, name)


# convert ----------------------------------------------------------------------------------------------------------------------------------------


def _transposed(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n in _square(gm) if isinstance(module_of(gm, n), Quantized)])
    if node is None:
        return None
    q = copy.deepcopy(module_of(gm, node))
    q.op.weight = nn.Parameter(q.op.weight.detach().transpose(0, 1).contiguous())
    swap_module(gm, node, q)
    return {node.name}


def _layers(gm: GraphModule) -> list[Node]:
    return [n for n, _ in walk(gm, "conv", "linear") if isinstance(module_of(gm, n), Quantized)]


def _saturated_bias(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n in _layers(gm) if module_of(gm, n).bias_grid is not None])
    if node is None:
        return None
    q = copy.deepcopy(module_of(gm, node))
    q.bias_grid.scale = q.bias_grid.scale * (float(q.op.bias.detach().abs().max()) / 2.0**33 / float(q.bias_grid.scale.max()))
    swap_module(gm, node, q)
    return {node.name}


def _weight_scales(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n in _layers(gm) if module_of(gm, n).weight_grid.scale.numel() > 1])
    if node is None:
        return None
    q = copy.deepcopy(module_of(gm, node))
    q.weight_grid.scale = q.weight_grid.scale.roll(1)
    swap_module(gm, node, q)
    return {node.name}


def _quantizer(change: Callable[[FakeQuantize], None]) -> Mutation:
    def mutate(gm: GraphModule, rng: random.Random) -> Names | None:
        node = pick(rng, [n for n, _ in walk(gm, "fake_quantize") if module_of(gm, n).scale.numel() == 1])
        fq = copy.deepcopy(module_of(gm, node))
        change(fq)
        swap_module(gm, node, fq)
        return {node.name}

    return mutate


def _half_codes(fq: Any) -> None:
    fq.spec = replace(fq.spec, bits=7)
    fq.zero_point = fq.zero_point.clamp(fq.spec.qmin, fq.spec.qmax)


def _zero_off(fq: Any) -> None:
    fq.zero_point = (fq.zero_point + 9).clamp(max=fq.spec.qmax) if int(fq.zero_point) + 9 <= fq.spec.qmax else fq.zero_point - 9


def _scale_off(fq: Any) -> None:
    fq.scale = fq.scale * 0.5


def _dropped_quantizer(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n, _ in walk(gm, "add", "mul") if n.meta.get("integer") and any(kind(gm, a) == "fake_quantize" for a in n.all_input_nodes)])
    if node is None:
        return None
    source = pick(rng, [a for a in node.all_input_nodes if kind(gm, a) == "fake_quantize"])
    node.replace_input_with(source, source.all_input_nodes[0])
    return {node.name}


FAULTS = (
    Fault("canonicalize", "concat order", _concat_order),
    Fault("canonicalize", "dropped skip connection", _dropped_skip),
    Fault("fold-bn", "forgotten eps", _with_bn(_no_eps), before=True),
    Fault("fold-bn", "sign of the mean", _with_bn(_mean_sign), before=True),
    Fault("fold-bn", "forgotten gamma", _with_bn(_no_gamma), before=True),
    Fault("fold-bn", "wrong channel axis", _wrong_fold_axis),
    Fault("legalize", "channels permuted wrongly", _rolled_inputs),
    Fault("annotate", "clip too low", _clip_too_low),
    Fault("annotate", "wrong channel axis", _axis_in_the_plan),
    Fault("annotate", "lost codes", _codes_lost),
    Fault("share-qparams", "unrelated grids joined", _shared_wrongly),
    Fault("calibrate", "swapped scales", _swapped_scales),
    Fault("calibrate", "stale observer", _ranges(0.2)),
    Fault("calibrate", "range far too wide", _ranges(12.0, clamped=False)),
    Fault("calibrate", "zero point of the wrong sign", _zero_sign),
    Fault("calibrate", "grid ends beyond the clamp", _clamp_passed),
    Fault("convert", "transposed weight", _transposed),
    Fault("convert", "saturated bias", _saturated_bias),
    Fault("convert", "swapped channel scales", _weight_scales),
    Fault("convert", "clip off: half the codes", _quantizer(_half_codes)),
    Fault("convert", "zero point off", _quantizer(_zero_off)),
    Fault("convert", "scale off", _quantizer(_scale_off)),
    Fault("convert", "dropped skip quantizer", _dropped_quantizer),
)


def mutated(p: Pass, fault: Fault, rng: random.Random, truth: list[Names | None]) -> Pass:
    """``p`` with the fault in it. That it moves the output is not checked, as if the fault were in that check as well."""
    cls: Any = type(p)

    def run(self: Pass, gm: GraphModule, ctx: PassContext) -> int:
        if fault.before:
            truth.append(fault.mutate(gm, rng))
        changed = int(cls.run(self, gm, ctx))
        if not fault.before:
            truth.append(fault.mutate(gm, rng))
        return max(1, changed)

    made = copy.copy(p)
    object.__setattr__(made, "__class__", type(cls.__name__ + "WithFault", (cls,), {"run": run, "tolerance": None}))
    return made


@contextmanager
def planted(fault: Fault, seed: int) -> Iterator[list[Names | None]]:
    """Inside, ``fxq.compile`` runs with the fault in its pass; the list gets the nodes that may be named (None: no place in this net)."""
    truth: list[Names | None] = []
    rng, original = random.Random(seed), api.pipeline_for

    def pipeline(*args: Any, **options: Any) -> Pipeline:
        return Pipeline(tuple(mutated(p, fault, rng, truth) if p.name == fault.step else p for p in original(*args, **options).passes))

    with mock.patch.object(api, "pipeline_for", pipeline):
        yield truth
