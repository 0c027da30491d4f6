"""Canonical forms of arithmetic: pointwise functions, matrix products, fills."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxq import modules as m
from fxq.canonical import At, Form, NoForm, is_number, is_tensor, known, name_of, parameter, target_sizes
from fxq.graph import module_of, shape


def operand(at: At, a: Any) -> Any:
    """A tensor node of the node's dtype or a Python number.

    Raises:
        NoForm: for anything else.
    """
    a = known(a)
    if is_number(a):
        return a
    if not is_tensor(a) or a.meta["dtype"] != at.node.meta["dtype"]:
        raise NoForm("an operand has another type than the result")
    return a


def binary(cls: type[nn.Module], flip: bool = False) -> Form:
    """``cls(a, b)``; with ``flip`` the operands change places; ``alpha`` scales the second one."""

    def form(at: At) -> None:
        at.shape  # noqa: B018 - refuses what gives no tensor
        args = list(at.node.args[:2])
        if "other" in at.node.kwargs:
            args.append(at.node.kwargs["other"])
        if len(args) != 2 or at.arg(9, "rounding_mode", None) is not None:
            raise NoForm("not two operands")
        a, b = (operand(at, v) for v in args)
        alpha = at.arg(2, "alpha", 1)
        if not is_number(alpha):
            raise NoForm("alpha is no number")
        if alpha != 1:
            b = b * alpha if is_number(b) else at.new("mul", m.Mul(), b, alpha)
        if flip:
            a, b = b, a
        if cls is m.Add and is_number(a):
            a, b = b, a
        at.put(cls.__name__.lower(), cls(), a, b)

    return form


def unary(fn: str) -> Form:
    """A pointwise torch function without arguments."""

    def form(at: At) -> None:
        x = at.tensor()
        if x.meta["dtype"] != at.node.meta["dtype"] or not at.node.meta["dtype"].is_floating_point:
            raise NoForm("not float to float")
        at.put(fn, m.Unary(fn), x)

    return form


def layer(make: Callable[[At], nn.Module], suffix: str) -> Form:
    """A pointwise layer made from the node's arguments."""

    def form(at: At) -> None:
        x = at.tensor()
        at.put(suffix, make(at), x)

    return form


def clamp(at: At) -> None:
    x, name = at.tensor(), name_of(at.node)
    if name == "hardtanh":
        lo, hi = at.arg(1, "min_val", -1.0), at.arg(2, "max_val", 1.0)
    elif name == "clamp_min":
        lo, hi = at.arg(1, "min"), None
    elif name == "clamp_max":
        lo, hi = None, at.arg(1, "max")
    else:
        lo, hi = at.arg(1, "min", None), at.arg(2, "max", None)
    if any(v is not None and not is_number(v) for v in (lo, hi)):
        raise NoForm("its ends are tensors")
    at.put("clamp", m.Clamp(None if lo is None else float(lo), None if hi is None else float(hi)), x)


def extreme(at: At) -> None:
    """``maximum(x, number)`` and ``minimum`` with a one-element constant."""
    x, limit = at.tensor(0), at.const(1, "other")
    if limit is None or limit.numel() != 1 or shape(x) != at.shape:
        raise NoForm("not with one constant number")
    value = float(limit)
    at.put("clamp", m.Clamp(value, None) if name_of(at.node) == "maximum" else m.Clamp(None, value), x)


def power(at: At) -> None:
    x, exponent = at.tensor(), at.arg(1, "exponent")
    if not is_number(exponent):
        raise NoForm("its exponent is no number")
    if exponent == 1:
        at.become(x)
    else:
        at.put("power", m.Power(float(exponent)), x)


def matmul(at: At) -> None:
    """A product with a constant matrix is a linear layer."""
    a, b = at.tensor(0), at.tensor(1, "other" if name_of(at.node) == "matmul" else "mat2")
    if b.op == "get_attr" and len(shape(b)) == 2 and len(shape(a)) >= 2:
        linear(at, a, at.value(b).t(), None)
        return
    if min(len(shape(a)), len(shape(b))) < 2 or a.meta["dtype"] != b.meta["dtype"]:
        raise NoForm("a product with a vector")
    at.put("matmul", m.MatMul(), a, b)


def linear(at: At, x: Node, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Replace the node by a linear layer with the given constant weights."""
    at.put("linear", made_linear(weight, bias), x)


def made_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Linear layer with these weights (parameters are shared, not copied)."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = parameter(weight if isinstance(weight, nn.Parameter) else weight.detach().contiguous())
    if bias is not None:
        made.bias = parameter(bias if isinstance(bias, nn.Parameter) else bias.detach())
    return made


def addmm(at: At) -> None:
    """``addmm(c, a, b)``, ``baddbmm``: a linear layer when ``b`` and ``c`` are constant, otherwise product and sum."""
    c, a, b = at.tensor(0), at.tensor(1, "mat1"), at.tensor(2, "mat2")
    if at.arg(3, "beta", 1) != 1 or at.arg(4, "alpha", 1) != 1:
        raise NoForm("scaled by alpha or beta")
    if b.op == "get_attr" and c.op == "get_attr" and len(shape(b)) == 2 and shape(c) == shape(b)[1:]:
        linear(at, a, at.value(b).t(), at.value(c))
        return
    at.put("add", m.Add(), at.new("matmul", m.MatMul(), a, b), c)


def einsum(at: At) -> None:
    """A product of two tensors over shared letters: permute, reshape, matrix product, and back."""
    equation, xs = at.arg(0, "equation"), at.node.args[1:]
    if len(xs) == 1 and isinstance(xs[0], (tuple, list)):
        xs = tuple(xs[0])
    sides = str(equation).replace(" ", "").split("->")
    terms = sides[0].split(",")
    if len(sides) != 2 or "." in str(equation) or not all(is_tensor(x) for x in xs) or len(terms) != len(xs):
        raise NoForm(f"the equation {equation} is not a matrix product")
    out = sides[1]
    if any(len(set(t)) != len(t) for t in (*terms, out)):
        raise NoForm("a letter twice in a term")
    if len(xs) == 1 and sorted(terms[0]) == sorted(out):
        at.put("permute", m.Permute([terms[0].index(c) for c in out]), xs[0])
        return
    if len(xs) != 2:
        raise NoForm("not of two tensors")
    _einsum2(at, (xs[0], xs[1]), terms[0], terms[1], out)  # type: ignore[arg-type]


def _einsum2(at: At, xs: tuple[Node, Node], a: str, b: str, out: str) -> None:
    both = [c for c in a if c in b and c in out]
    inner = [c for c in a if c in b and c not in out]
    left, right = [c for c in a if c not in b], [c for c in b if c not in a]
    if not inner or any(c not in out for c in (*left, *right)):
        raise NoForm("a letter that only one side has is summed")
    sizes: dict[str, int] = {}
    for x, term in zip(xs, (a, b), strict=True):
        sizes.update({c: -1 if d else s for c, s, d in zip(term, shape(x), x.meta["dynamic"], strict=True)})
    if any(sizes[c] == -1 for c in inner):
        raise NoForm("the batch is summed")

    def laid_out(x: Node, term: str, groups: tuple[list[str], ...]) -> Node:
        order = [term.index(c) for g in groups for c in g]
        x = x if order == sorted(order) else at.new("permute", m.Permute(order), x)
        wanted = [sizes[c] for c in groups[0]] + [_product([sizes[c] for c in g]) for g in groups[1:]]
        return x if all(len(g) == 1 for g in groups[1:]) else at.reshaped(x, _one_free(wanted))

    y = at.new("matmul", m.MatMul(), laid_out(xs[0], a, (both, left, inner)), laid_out(xs[1], b, (both, inner, right)))
    letters = [*both, *left, *right]
    if not len(left) == len(right) == 1:
        y = at.reshaped(y, _one_free([sizes[c] for c in letters]))
    order = [letters.index(c) for c in out]
    at.become(y if order == sorted(order) else at.new("permute", m.Permute(order), y))


def _product(sizes: list[int]) -> int:
    return -1 if -1 in sizes else math.prod(sizes)


def _one_free(sizes: list[int]) -> list[int | None]:
    if sizes.count(-1) > 1:
        raise NoForm("several sizes follow the batch")
    return list(sizes)


def where(at: At) -> None:
    """Choose by a constant mask; the guard of an exported attention against rows that are masked out."""
    soft = _guarded_softmax(at)
    if soft is not None:
        at.become(soft)
        return
    kept = at.const(0, "condition")
    fill(at, at.tensor(1), None if kept is None else ~kept, at.arg(2, "other"))


def _guarded_softmax(at: At) -> Node | None:
    """The softmax of ``where(not any(x != -inf), 0, softmax(x))`` when ``x`` is scaled products, which are never minus infinity."""
    steps: Any = at.node.args[0]
    for name in ("logical_not", "any", "logical_not", "eq"):
        if not isinstance(steps, Node) or steps.op != "call_function" or name_of(steps) != name:
            return None
        last, steps = steps, steps.args[0]
    x, soft = steps, at.node.args[2]
    while isinstance(x, Node) and x.op == "call_module" and isinstance(module_of(at.gm, x), (m.Mul, m.Reshape)):
        x = x.args[0]
    unmasked = isinstance(x, Node) and x.op == "call_module" and isinstance(module_of(at.gm, x), m.MatMul)
    plain = isinstance(soft, Node) and soft.op == "call_module" and isinstance(module_of(at.gm, soft), nn.Softmax) and soft.args[0] is steps
    return soft if unmasked and plain and last.args[1] == -math.inf else None  # type: ignore[return-value]


def masked_fill(at: At) -> None:
    fill(at, at.tensor(), at.const(1, "mask"), at.arg(2, "value"))


def fill(at: At, x: Node, mask: torch.Tensor | None, value: Any) -> None:
    """Fill by a constant mask: add 0 or minus infinity, otherwise multiply by 0 or 1 and add."""
    if isinstance(value, Node) and value.op == "get_attr" and at.value(value).numel() == 1:
        value = float(at.value(value))
    if mask is None or mask.dtype != torch.bool or not is_number(value) or not at.node.meta["dtype"].is_floating_point:
        raise NoForm("not a constant mask and number")
    dtype = at.node.meta["dtype"]
    filled = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask.cpu(), float(value)).to(mask.device)
    if value != -math.inf:
        x = at.new("keep", m.Mul(), x, at.constant("keep", (~mask).to(dtype)))
    at.put("fill", m.Add(), x, at.constant("fill", filled))


def softmax(cls: Any, suffix: str) -> Form:
    """``softmax`` or ``log_softmax`` along a given dimension, without a change of type."""

    def form(at: At) -> None:
        x, dim = at.tensor(), at.arg(1, "dim")
        if not isinstance(dim, int) or x.meta["dtype"] != at.node.meta["dtype"]:
            raise NoForm("without a dimension, or to another type")
        at.put(suffix, cls(dim % len(shape(x))), x)

    return form


def softmin(at: At) -> None:
    x, dim = at.tensor(), at.arg(1, "dim")
    at.put("softmax", nn.Softmax(int(dim) % len(shape(x))), at.new("neg", m.Unary("neg"), x))


def glu(at: At) -> None:
    x, dim = at.tensor(), int(at.arg(1, "dim", -1)) % len(shape(at.tensor()))
    if x.meta["dynamic"][dim]:
        raise NoForm("along the batch")
    half = shape(x)[dim] // 2
    parts = at.new("split", m.Split([half, half], dim), x)
    at.put("mul", m.Mul(), at.part(parts, 0), at.new("gate", nn.Sigmoid(), at.part(parts, 1)))


def logsigmoid(at: At) -> None:
    """``-softplus(-x)``."""
    x = at.tensor()
    at.put("neg", m.Unary("neg"), at.new("softplus", nn.Softplus(), at.new("neg", m.Unary("neg"), x)))


def softsign(at: At) -> None:
    x = at.tensor()
    at.put("div", m.Div(), x, at.new("add", m.Add(), at.new("abs", m.Unary("abs"), x), 1.0))


def prelu(at: At) -> None:
    x, weight = at.tensor(), at.const(1, "weight")
    if weight is None:
        raise NoForm("without weight")
    made = nn.PReLU(weight.numel())
    made.weight = parameter(weight)
    at.put("prelu", made, x)


def expand(at: At) -> None:
    """Broadcasting to constant sizes; what follows the batch already keeps its size."""
    x = at.tensor()
    target, dynamic = at.shape, at.node.meta["dynamic"]
    extra = len(target) - len(shape(x))
    source = (1,) * extra + shape(x)
    moving = (False,) * extra + tuple(x.meta["dynamic"])
    if any(d and not f for d, f in zip(dynamic, moving, strict=True)):
        raise NoForm("a size is expanded to the batch")
    if extra:
        x = at.reshaped(x, [*([1] * extra), *target_sizes(x, x)])
    if source == target:
        at.become(x)
        return
    at.put("expand", m.Expand([-1 if s == t or d else t for s, t, d in zip(source, target, dynamic, strict=True)]), x)


MATH: dict[str, Form] = {
    **dict.fromkeys(("add", "iadd", "radd"), binary(m.Add)), **dict.fromkeys(("sub", "isub", "subtract"), binary(m.Sub)),
    **dict.fromkeys(("rsub",), binary(m.Sub, True)), **dict.fromkeys(("mul", "imul", "rmul", "multiply"), binary(m.Mul)),
    **dict.fromkeys(("div", "truediv", "itruediv", "divide", "true_divide"), binary(m.Div)), "rtruediv": binary(m.Div, True), "rdiv": binary(m.Div, True),
    **dict.fromkeys(("matmul", "bmm", "mm", "imatmul"), matmul), **dict.fromkeys(("addmm", "baddbmm"), addmm), "einsum": einsum,
    **{n: unary(n) for n in ("exp", "sqrt", "rsqrt", "log", "abs", "neg", "erf", "reciprocal", "sin", "cos", "floor", "ceil", "round", "sign", "square")},
    "negative": unary("neg"), "absolute": unary("abs"), "special_erf": unary("erf"),
    **dict.fromkeys(("pow", "ipow"), power), **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"), clamp),
    **dict.fromkeys(("maximum", "minimum"), extreme), "relu6": layer(lambda at: m.Clamp(0.0, 6.0), "relu6"),
    "relu": layer(lambda at: nn.ReLU(), "relu"), **dict.fromkeys(("sigmoid", "special_expit"), layer(lambda at: nn.Sigmoid(), "sigmoid")),
    "silu": layer(lambda at: nn.SiLU(), "silu"), "hardswish": layer(lambda at: nn.Hardswish(), "hardswish"),
    "hardsigmoid": layer(lambda at: nn.Hardsigmoid(), "hardsigmoid"), "tanh": layer(lambda at: nn.Tanh(), "tanh"), "mish": layer(lambda at: nn.Mish(), "mish"),
    "elu": layer(lambda at: nn.ELU(at.arg(1, "alpha", 1.0)), "elu"), "selu": layer(lambda at: nn.SELU(), "selu"),
    "leaky_relu": layer(lambda at: nn.LeakyReLU(at.arg(1, "negative_slope", 0.01)), "leaky_relu"),
    "softplus": layer(lambda at: nn.Softplus(at.arg(1, "beta", 1.0), at.arg(2, "threshold", 20.0)), "softplus"),
    "gelu": layer(lambda at: nn.GELU(at.arg(1, "approximate", "none")), "gelu"),
    "softmax": softmax(nn.Softmax, "softmax"), "log_softmax": softmax(nn.LogSoftmax, "log_softmax"), "softmin": softmin,
    "glu": glu, **dict.fromkeys(("logsigmoid", "log_sigmoid"), logsigmoid), "softsign": softsign, "prelu": prelu,
    "masked_fill": masked_fill, "where": where, **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
}  # fmt: skip
