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
from faults_grids import (
    Mutation,
    Names,
    axis_in_the_plan,
    clamp_passed,
    clip_too_low,
    codes_lost,
    pick,
    ranges,
    shared_wrongly,
    square,
    swapped_scales,
    zero_sign,
)
from torch import nn
from torch.fx import GraphModule, Node

from fxq import api
from fxq.graph import kind, module_of, swap_module, walk
from fxq.modules import FakeQuantize, Quantized
from fxq.pipeline import Pass, PassContext, Pipeline


@dataclass(frozen=True)
class Fault:
    """A mutation of one pass. ``before``: it changes what the pass reads, and is taken back behind it (the recorded graphs stay right)."""

    step: str
    name: str
    mutate: Mutation
    before: bool = False


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
    node = pick(rng, square(gm))
    if node is None:
        return None
    op = copy.deepcopy(module_of(gm, node))
    scale = torch.linspace(0.5, 1.5, op.weight.shape[0]).reshape(-1, *[1] * (op.weight.ndim - 1))
    op.weight = nn.Parameter(op.weight.detach() / scale * scale.transpose(0, 1))
    swap_module(gm, node, op)
    return {node.name}


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


def _edited(change: Callable[[Any], None], fits: Callable[[Any], bool]) -> Mutation:
    """A layer got another setting or parameter on its way."""

    def mutate(gm: GraphModule, rng: random.Random) -> Names | None:
        node = pick(rng, [n for n, _ in walk(gm, "conv", "linear") if fits(module_of(gm, n))])
        if node is None:
            return None
        op = copy.deepcopy(module_of(gm, node))
        change(op)
        swap_module(gm, node, op)
        return {node.name}

    return mutate


def _wraps(op: Any) -> None:
    op.padding_mode, op._reversed_padding_repeated_twice = "circular", [p for p in reversed(op.padding) for _ in range(2)]


def _no_bias(op: Any) -> None:
    op.bias = nn.Parameter(torch.zeros_like(op.bias))


# convert ----------------------------------------------------------------------------------------------------------------------------------------


def _transposed(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n in square(gm) if isinstance(module_of(gm, n), Quantized)])
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


def _weight_zero(q: Any) -> None:
    q.weight_grid.zero_point = q.weight_grid.zero_point + 3


def _other_step(fq: Any) -> None:
    fq.step = fq.scale * 1.3


def _exchanged(gm: GraphModule, rng: random.Random) -> Names | None:
    """Two layers of one shape got each other's place."""
    layers = [(n, module_of(gm, n)) for n in _layers(gm)]
    alike = [(a, p, b, q) for a, p in layers for b, q in layers if a is not b and p.op.weight.shape == q.op.weight.shape and str(p.op) == str(q.op)]
    found = pick(rng, alike)
    if found is None:
        return None
    swap_module(gm, found[0], found[3])
    swap_module(gm, found[2], found[1])
    return {found[0].name, found[2].name}


def _misplaced(gm: GraphModule, rng: random.Random) -> Names | None:
    """A quantizer stands before the operation whose value it is for."""

    def fits(node: Node) -> bool:
        source = node.all_input_nodes[0]
        before = source.all_input_nodes
        return len(before) == 1 and before[0].meta.get("shape") == source.meta.get("shape") and node.meta.get("grid") != before[0].meta.get("grid")

    node = pick(rng, [n for n, _ in walk(gm, "fake_quantize") if fits(n)])
    if node is None:
        return None
    source = node.all_input_nodes[0]
    before = source.all_input_nodes[0]
    node.replace_all_uses_with(source)
    node.replace_input_with(source, before)
    source.prepend(node)
    source.replace_input_with(before, node)
    return {node.name, source.name}


FAULTS = (
    Fault("canonicalize", "concat order", _concat_order),
    Fault("canonicalize", "dropped skip connection", _dropped_skip),
    Fault("fold-bn", "forgotten eps", _with_bn(_no_eps), before=True),
    Fault("fold-bn", "sign of the mean", _with_bn(_mean_sign), before=True),
    Fault("fold-bn", "forgotten gamma", _with_bn(_no_gamma), before=True),
    Fault("fold-bn", "wrong channel axis", _wrong_fold_axis),
    Fault("legalize", "channels permuted wrongly", _rolled_inputs),
    Fault("annotate", "clip too low", clip_too_low),
    Fault("annotate", "wrong channel axis", axis_in_the_plan),
    Fault("annotate", "lost codes", codes_lost),
    Fault("share-qparams", "unrelated grids joined", shared_wrongly),
    Fault("calibrate", "swapped scales", swapped_scales),
    Fault("calibrate", "stale observer", ranges(0.2)),
    Fault("calibrate", "range far too wide", ranges(12.0, clamped=False)),
    Fault("calibrate", "zero point of the wrong sign", zero_sign),
    Fault("calibrate", "grid ends beyond the clamp", clamp_passed),
    Fault("convert", "transposed weight", _transposed),
    Fault("convert", "saturated bias", _saturated_bias),
    Fault("convert", "swapped channel scales", _weight_scales),
    Fault("convert", "clip off: half the codes", _quantizer(_half_codes)),
    Fault("convert", "zero point off", _quantizer(_zero_off)),
    Fault("convert", "scale off", _quantizer(_scale_off)),
    Fault("convert", "dropped skip quantizer", _dropped_quantizer),
    Fault("canonicalize", "wrong padding", _edited(_wraps, lambda op: getattr(op, "padding", 0) not in (0, (0, 0)) and op.padding_mode == "zeros")),
    Fault("fold-bn", "dropped bias", _edited(_no_bias, lambda op: op.bias is not None and bool(op.bias.any()))),
    Fault("convert", "zero point of the weight", _edited(_weight_zero, lambda q: isinstance(q, Quantized))),
    Fault("convert", "another step", _quantizer(_other_step)),
    Fault("convert", "layers exchanged", _exchanged),
    Fault("convert", "quantizer behind the wrong node", _misplaced),
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
