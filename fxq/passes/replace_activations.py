"""replace-activations: what sign and ternary activations need of the float graph: no ReLU in front of them, pools in their place, XNOR-Net's K."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from fxq.convolutions import BoxMean
from fxq.graph import add_module, copy_shape, data_inputs, infer_node, insert_module, kind, module_of, walk
from fxq.modules import WEIGHTED, Mul
from fxq.pipeline import Pass, PassContext
from fxq.placement import MOVES, Plan, rectifies

POOLS = ("max_pool", "avg_pool")
BETWEEN = ("batch_norm", "relu", "clamp", "leaky_relu", "prelu", "sigmoid", "tanh")


@dataclass(frozen=True)
class ReplaceActivations(Pass):
    """Let each binary or ternary layer read the value in front of the ReLU, which would leave a sign nothing to tell apart.

    By dataflow: from the layer back through pools, reshapes, concatenations and the like to each ReLU (module or function). A ReLU that something else
    reads as well (the shortcut of a residual block) stays for those readers.

    ``scheme.order`` moves pools (``B-A-C-P``: right behind the layer in front of batch norm and activation; ``C-B-A-P``: behind them), ``scheme.box_scale``
    multiplies each layer's output by the local mean of the input's magnitude (XNOR-Net, equation 11).
    """

    name: ClassVar[str] = "replace-activations"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        scheme = ctx.scheme
        moved = _order(gm, ctx, scheme.order) if scheme.order else 0
        if scheme.activations not in ("sign", "ternary"):
            return moved
        plan = Plan(gm, ctx)
        layers = [n for n in plan.layers if plan.excluded(n) is None and not plan.keeps8(n)]
        made: dict[Node, Node] = {}
        changed = moved
        for layer in layers:
            source = data_inputs(layer)[0]
            bare = _bare(gm, source, made)
            if bare is not source:
                layer.replace_input_with(source, bare)
                changed += 1
            if scheme.box_scale:
                _box_scale(gm, layer, bare)
                changed += 1
        return changed


def _bare(gm: GraphModule, node: Node, made: dict[Node, Node]) -> Node:
    """The value without the ReLUs that it comes through; operations on the way are repeated in front of the sign."""
    if node in made:
        return made[node]
    k, out = kind(gm, node), node
    if node.op == "call_module" and rectifies(gm, node, lambda n: kind(gm, n)):
        out = _bare(gm, data_inputs(node)[0], made)
    elif k in MOVES or k == "cat":
        sources = data_inputs(node)
        bare = [_bare(gm, s, made) for s in sources]
        if bare != sources:
            path = add_module(gm, f"{node.target}_signed", copy.deepcopy(module_of(gm, node)))
            with gm.graph.inserting_after(node):
                out = gm.graph.call_module(path, tuple(dict(zip(sources, bare, strict=True)).get(a, a) for a in node.args))  # type: ignore[arg-type]
            copy_shape(node, out)
            if "nn_module_stack" in node.meta:
                out.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    made[node] = out
    return out


def _box_scale(gm: GraphModule, layer: Node, source: Node) -> None:
    op: Any = module_of(gm, layer)
    if kind(gm, layer) == "conv_transpose":
        return
    box = insert_module(gm, source, f"{layer.target}_k", BoxMean.of(op), (source,))
    users = list(layer.users)
    layer.append(box)
    mul = insert_module(gm, box, f"{layer.target}_scaled", Mul(), (layer, box), like=layer)
    for user in users:
        user.replace_input_with(layer, mul)


def _order(gm: GraphModule, ctx: PassContext, order: str) -> int:
    """Move each pool over the batch norm and the activation beside it. Shapes between them change with it."""
    moved = 0
    for pool, _ in walk(gm, *POOLS):
        chain = _chain_before(gm, pool) if order == "B-A-C-P" else _chain_behind(gm, pool)
        if not chain:
            continue
        if order == "B-A-C-P":  # layer, BN, act, pool -> layer, pool, BN, act
            first, last = chain[0], chain[-1]
            source = data_inputs(first)[0]
            pool.replace_all_uses_with(last)
            first.replace_input_with(source, pool)
            pool.replace_input_with(last, source)
            first.prepend(pool)
        else:
            source, last = data_inputs(pool)[0], chain[-1]
            users = [u for u in last.users if u is not pool]
            pool.replace_all_uses_with(source)
            pool.replace_input_with(source, last)
            for user in users:
                user.replace_input_with(last, pool)
            last.append(pool)
        for node in sorted([pool, *chain], key=list(gm.graph.nodes).index):
            infer_node(gm, node)
        moved += 1
    return moved


def _chain_before(gm: GraphModule, pool: Node) -> list[Node]:
    """Batch norm and activation between a layer and the pool, in order, each read by its successor alone."""
    chain: list[Node] = []
    node = data_inputs(pool)[0]
    while kind(gm, node) in BETWEEN and len(node.users) == 1 and len(data_inputs(node)) == 1:
        chain.insert(0, node)
        node = data_inputs(node)[0]
    return chain if chain and kind(gm, node) in WEIGHTED and len(node.users) == 1 else []


def _chain_behind(gm: GraphModule, pool: Node) -> list[Node]:
    """Batch norm and activation behind a pool that follows a layer."""
    source = data_inputs(pool)[0]
    if kind(gm, source) not in WEIGHTED or len(source.users) != 1:
        return []
    chain: list[Node] = []
    node = pool
    while len(node.users) == 1 and kind(gm, next(iter(node.users))) in BETWEEN and len(data_inputs(next(iter(node.users)))) == 1:
        node = next(iter(node.users))
        chain.append(node)
    return chain
