"""Faults of the passes that choose grids: ``annotate``, ``share-qparams``, ``calibrate`` (see ``faults.py``)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.graph import grids, module_of, walk
from fxq.modules import Quantized
from fxq.spec import QParams

Names = set[str]
Mutation = Callable[[GraphModule, random.Random], Names | None]


def pick(rng: random.Random, items: list[Any]) -> Any:
    return rng.choice(items) if items else None


def square(gm: GraphModule) -> list[Node]:
    found = []
    for n, _ in walk(gm, "conv", "linear"):
        w = module_of(gm, n)
        w = w.op.weight if isinstance(w, Quantized) else w.weight
        if w.shape[0] == w.shape[1] and w.shape[0] > 1:
            found.append(n)
    return found


def _replace_grid(gm: GraphModule, name: str, **fields: Any) -> None:
    grids(gm)[name] = replace(grids(gm)[name], **fields)


def _members(gm: GraphModule, name: str) -> Names:
    return {n.name for n in gm.graph.nodes if n.meta.get("grid") == name}


def clip_too_low(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n in gm.graph.nodes if n.meta.get("absorbed")])
    if node is None:
        return None
    lo, hi = grids(gm)[node.meta["grid"]].clamp or (0.0, None)
    _replace_grid(gm, node.meta["grid"], clamp=(lo, 1.0 if hi is None else hi - 1.0))
    return {node.name}


def axis_in_the_plan(gm: GraphModule, rng: random.Random) -> Names | None:
    node = pick(rng, [n for n in square(gm) if n.meta.get("integer")])
    if node is None:
        return None
    node.meta["weight_spec"] = "s8n/pc1"
    return {node.name}


def codes_lost(gm: GraphModule, rng: random.Random) -> Names | None:
    name = pick(rng, [n for n, g in grids(gm).items() if g.fixed is None])
    _replace_grid(gm, name, spec=replace(grids(gm)[name].spec, bits=4))
    return _members(gm, name)


def shared_wrongly(gm: GraphModule, rng: random.Random) -> Names | None:
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


def swapped_scales(gm: GraphModule, rng: random.Random) -> Names | None:
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


def ranges(factor: float, clamped: bool | None = None) -> Mutation:
    def mutate(gm: GraphModule, rng: random.Random) -> Names | None:
        names = [n for n in _params(gm) if clamped is None or (grids(gm)[n].clamp is not None) == clamped]
        name = pick(rng, [n for n in names if factor < 1 or grids(gm)[n].clamp is None or grids(gm)[n].clamp[1] is None])
        if name is None:
            return None
        _scaled(gm, name, factor)
        return _members(gm, name)

    return mutate


def zero_sign(gm: GraphModule, rng: random.Random) -> Names | None:
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


def clamp_passed(gm: GraphModule, rng: random.Random) -> Names | None:
    """The grid ends one step and more above the clamp that it absorbed."""
    name = pick(rng, [n for n in _params(gm) if grids(gm)[n].clamp is not None and grids(gm)[n].clamp[1] is not None])
    if name is None:
        return None
    qp, hi = grids(gm)[name].qparams, grids(gm)[name].clamp[1]
    steps = qp.spec.qmax - qp.spec.qmin
    _replace_grid(gm, name, qparams=QParams(qp.spec, torch.tensor(hi / (steps - 1), dtype=torch.float32), qp.zero_point))
    return _members(gm, name)
