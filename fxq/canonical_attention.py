"""Canonical forms of attention: linear layers, reshapes, permutes, two matrix products around a scaled softmax."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fxq import modules as m
from fxq.canonical import At, Form, NoForm, is_number, is_tensor, known
from fxq.canonical_math import made_linear
from fxq.graph import module_of, shape


@dataclass(frozen=True)
class Projections:
    """Weights of multi-head attention.

    Attributes:
        weights, bias: of the projections of queries, keys and values, ``[out, in]`` and ``[out]``.
        packed: the three of them as one weight and bias, where they are kept so.
        out: the output projection.
    """

    weights: tuple[Tensor, ...]
    bias: tuple[Tensor | None, ...]
    packed: tuple[Tensor, Tensor | None] | None
    out: nn.Linear
    heads: int


def attend(at: At, q: Node, kt: Node, v: Node, mask: Node | None, scale: float) -> tuple[Node, Node]:
    """``softmax(scale * q @ kt + mask) @ v`` and the softmax; ``kt`` is already transposed."""
    scores = at.new("scale", m.Mul(), at.new("scores", m.MatMul(), q, kt), scale)
    if mask is not None:
        scores = at.new("mask", m.Add(), scores, mask)
    weights = at.new("softmax", nn.Softmax(len(shape(scores)) - 1), scores)
    return at.new("attend", m.MatMul(), weights, v), weights


def mask_node(at: At, mask: Any, dtype: torch.dtype, keep: bool) -> Node | None:
    """An additive mask: a constant bool mask becomes 0 and minus infinity.

    Args:
        keep: ``True`` in a bool mask means that the position takes part (``scaled_dot_product_attention``), not that it is left out.
    """
    if mask is None:
        return None
    if isinstance(mask, Node) and mask.op != "get_attr":
        if not is_tensor(mask) or mask.meta["dtype"] != dtype:
            raise NoForm("its mask is computed and not additive")
        return mask
    value = at.value(mask, "mask")
    if value.dtype != torch.bool:
        return at.constant("mask", value.detach().to(dtype)) if value.dtype != dtype else mask
    return at.constant("mask", _additive(~value if keep else value, dtype))


def _additive(left_out: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(left_out.shape, dtype=dtype, device=left_out.device).masked_fill(left_out, -math.inf)


def scaled_dot_product(at: At) -> None:
    """``F.scaled_dot_product_attention`` and aten's; a causal mask is a constant."""
    q, k, v = at.tensor(0, "query"), at.tensor(1, "key"), at.tensor(2, "value")
    if at.arg(4, "dropout_p", 0.0) or at.arg(9, "enable_gqa", False):
        raise NoForm("with dropout or grouped queries")
    dtype = q.meta["dtype"]
    mask = mask_node(at, at.node.kwargs.get("attn_mask", at.node.args[3] if len(at.node.args) > 3 else None), dtype, True)
    rows, columns = shape(q)[-2], shape(k)[-2]
    if at.arg(5, "is_causal", False):
        if q.meta["dynamic"][-2] or k.meta["dynamic"][-2]:
            raise NoForm("a causal mask over the batch")
        mask = at.constant("mask", _additive(torch.ones(rows, columns, dtype=torch.bool).triu(1), dtype))
    n, scale = len(shape(k)), at.arg(6, "scale", None)
    kt = at.new("permute", m.Permute([*range(n - 2), n - 1, n - 2]), k)
    out, _ = attend(at, q, kt, v, mask, 1 / math.sqrt(shape(q)[-1]) if scale is None else float(scale))
    at.become(out)


def _projected(at: At, x: tuple[Node, Node, Node], p: Projections) -> list[Node]:
    """Queries, keys and values ``[..., E]``; one linear layer where they read one tensor."""
    q, k, v = x
    if q is k is v and p.packed is not None:
        both = at.new("in_proj", made_linear(*p.packed), q)
        parts = at.new("split", m.Split([len(w) for w in p.weights], len(shape(both)) - 1), both)
        return [at.part(parts, i) for i in range(3)]
    names = ("q_proj", "k_proj", "v_proj")
    return [at.new(n, made_linear(w, b), t) for n, w, b, t in zip(names, p.weights, p.bias, x, strict=True)]


def _heads(at: At, x: Node, heads: int, batch_first: bool, order: str) -> Node:
    """``[N, L, E]`` (or ``[L, N, E]``) to ``[N, H, L, D]``; ``order`` ``"t"`` gives ``[N, H, D, L]``."""
    sizes = shape(x)
    width = sizes[-1] // heads
    if len(sizes) == 2:
        cut = at.reshaped(x, [-1 if x.meta["dynamic"][0] else sizes[0], heads, width])
        return at.new("permute", m.Permute((1, 2, 0) if order == "t" else (1, 0, 2)), cut)
    lead: list[int | None] = [None if d else s for s, d in zip(sizes[:2], x.meta["dynamic"][:2], strict=True)]
    if lead.count(None) == 1:
        lead[lead.index(None)] = -1
    cut = at.reshaped(x, [*lead, heads, width])
    n, length = (0, 1) if batch_first else (1, 0)
    return at.new("permute", m.Permute((n, 2, 3, length) if order == "t" else (n, 2, length, 3)), cut)


def multi_head(at: At, x: tuple[Node, Node, Node], p: Projections, mask: Any, batch_first: bool, average: bool) -> None:
    """Replace the node ``(output, weights)`` by canonical operations."""
    used = at.parts()
    dtype = x[0].meta["dtype"]
    if isinstance(mask, Node) and len(shape(mask)) != 2:
        raise NoForm("its mask is not [L, S]")
    additive = mask_node(at, mask, dtype, False)
    q, k, v = _projected(at, x, p)
    width = shape(q)[-1] // p.heads
    y, weights = attend(
        at, _heads(at, q, p.heads, batch_first, ""), _heads(at, k, p.heads, batch_first, "t"), _heads(at, v, p.heads, batch_first, ""), additive,
        1 / math.sqrt(width),
    )  # fmt: skip
    back = (1, 0, 2) if len(shape(y)) == 3 else (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
    y = at.new("permute", m.Permute(back), y)
    lead: list[int | None] = [None if d else s for s, d in zip(shape(y)[:-2], y.meta["dynamic"][:-2], strict=True)]
    if lead.count(None) == 1:
        lead[lead.index(None)] = -1
    out = at.new("out_proj", p.out, at.reshaped(y, [*lead, shape(y)[-2] * shape(y)[-1]]))
    second: Node | None = None
    if 1 in used:
        second = weights if not average else at.new("mean", m.Mean([len(shape(weights)) - 3], False), weights)
    at.become_parts([out, second])


def module_attention(at: At) -> None:
    """``nn.MultiheadAttention``."""
    layer: Any = module_of(at.gm, at.node)
    x = _inputs(at)
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        raise NoForm("it adds rows to keys and values")
    if at.arg(3, "key_padding_mask", None) is not None:
        raise NoForm("with a key padding mask")
    bias = layer.in_proj_bias
    parts: tuple[Tensor | None, ...] = (None, None, None) if bias is None else tuple(bias.detach().chunk(3))
    packed = None
    if layer._qkv_same_embed_dim:
        weights = layer.in_proj_weight.detach().chunk(3)
        packed = (layer.in_proj_weight, bias)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    out = made_linear(layer.out_proj.weight, layer.out_proj.bias)
    given = at.node.kwargs.get("attn_mask", at.node.args[5] if len(at.node.args) > 5 else None)
    p = Projections(weights=weights, bias=parts, packed=packed, out=out, heads=layer.num_heads)
    multi_head(at, x, p, given, layer.batch_first, bool(at.arg(6, "average_attn_weights", True)))


def _inputs(at: At) -> tuple[Node, Node, Node]:
    q, k, v = at.tensor(0, "query"), at.tensor(1, "key"), at.tensor(2, "value")
    if len(shape(q)) not in (2, 3):
        raise NoForm("not over [N, L, E]")
    return q, k, v


def functional_attention(at: At) -> None:
    """``F.multi_head_attention_forward`` with constant weights; inputs ``[L, N, E]``."""
    try:
        bound = inspect.signature(F.multi_head_attention_forward).bind(*at.node.args, **at.node.kwargs)
    except TypeError as e:
        raise NoForm(str(e)) from e
    bound.apply_defaults()
    a = bound.arguments
    if any(a[n] is not None for n in ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v")) or a["add_zero_attn"] or a["is_causal"]:
        raise NoForm("with added rows, a key padding mask or given keys")
    x: Any = (a["query"], a["key"], a["value"])
    if not all(is_tensor(t) for t in x) or len(shape(x[0])) not in (2, 3):
        raise NoForm("not over [L, N, E]")
    if a["training"] and a["dropout_p"]:
        raise NoForm("it drops at random in eval mode as well")
    bias = None if a["in_proj_bias"] is None else at.value(a["in_proj_bias"], "in_proj_bias")
    parts: tuple[Tensor | None, ...] = (None, None, None) if bias is None else tuple(bias.detach().chunk(3))
    packed = None
    if a["use_separate_proj_weight"]:
        weights = tuple(at.value(a[n], n) for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
        if x[0] is x[1] is x[2]:
            packed = (torch.cat([w.detach() for w in weights]), bias)
    else:
        whole = at.value(a["in_proj_weight"], "in_proj_weight")
        weights, packed = tuple(whole.detach().chunk(3)), (whole, bias)
    heads = known(a["num_heads"])
    if not is_number(heads):
        raise NoForm("the number of heads is not known")
    out_bias = None if a["out_proj_bias"] is None else at.value(a["out_proj_bias"], "out_proj_bias")
    out = made_linear(at.value(a["out_proj_weight"], "out_proj_weight"), out_bias)
    p = Projections(weights=weights, bias=parts, packed=packed, out=out, heads=int(heads))
    multi_head(at, x, p, a["attn_mask"], False, bool(known(a["average_attn_weights"])))


ATTENTION: dict[str, Form] = {
    "scaled_dot_product_attention": scaled_dot_product,
    "multi_head_attention_forward": functional_attention,
}
