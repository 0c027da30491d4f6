"""canonicalize: one module per call; functions and methods become module nodes; dropout and identity go."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq.graph import add_module, attr, copy_shape, erase, insert_module, module_of, scope_name, shape
from fxq.pipeline import Pass, PassContext
from fxq.shapes import propagate

GONE = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "StochasticDepth", "DropPath")
Form = Callable[[GraphModule, Node], bool]


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring every operation that has one into its canonical form (see ``docs/architecture.md``); the rest stays opaque."""

    name: ClassVar[str] = "canonicalize"
    ensures: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")
    tolerance: ClassVar[float | None] = 1e-4

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        propagate(gm, ctx.example)
        changed = 0
        for node in list(gm.graph.nodes):
            if node.op == "call_module":
                changed += _module(gm, node)
            elif node.op in ("call_function", "call_method"):
                form = FORMS.get(_name(node))
                if form is not None:
                    changed += form(gm, node)
        changed += _one_module_per_call(gm)
        gm.graph.eliminate_dead_code()
        propagate(gm, ctx.example)
        return changed


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(target, "__name__", str(target))
    return str(name).strip("_")


def _value(a: Any) -> Any:
    """A number that is constant over batches; the node itself for a tensor; ``None``-marker for a batch-dependent number."""
    if isinstance(a, Node) and "value" in a.meta:
        return -1 if a.meta["dynamic"] else a.meta["value"]
    return a


def _put(gm: GraphModule, node: Node, suffix: str, module: nn.Module, *args: Any) -> bool:
    path = add_module(gm, scope_name(node, suffix), module)
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(path, args)
    copy_shape(node, new)
    if "nn_module_stack" in node.meta:
        new.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return True


def _get(node: Node, i: int, name: str, default: Any = None) -> Any:
    if name in node.kwargs:
        return _value(node.kwargs[name])
    return _value(node.args[i]) if i < len(node.args) else default


def _is_tensor(a: Any) -> bool:
    return isinstance(a, Node) and isinstance(a.meta.get("shape"), tuple)


def _module(gm: GraphModule, node: Node) -> bool:
    module = module_of(gm, node)
    if type(module).__name__ in GONE:
        erase(gm, node)
        return True
    new: nn.Module | None = None
    if isinstance(module, nn.Hardtanh):
        new = m.Clamp(module.min_val, module.max_val)
    elif isinstance(module, nn.Flatten):
        return _flatten_to(gm, node, module.start_dim, module.end_dim)
    elif isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
        return _adaptive(gm, node, module.output_size, node.args[0])
    elif isinstance(module, nn.Upsample):
        size = module.size if module.size is None or isinstance(module.size, tuple) else (module.size,) * (len(shape(node)) - 2)
        factor = module.scale_factor
        scale = None if factor is None else tuple(factor) if isinstance(factor, tuple) else (float(factor),) * (len(shape(node)) - 2)
        new = m.Resize(size, scale, module.mode, module.align_corners)
    elif isinstance(module, nn.ZeroPad2d):
        new = m.Pad(module.padding)
    elif isinstance(module, (nn.AvgPool2d, nn.AvgPool3d)) and _whole(module, node):
        new = m.GlobalAvgPool()
    if new is None:
        return False
    return _put(gm, node, str(node.target).rsplit(".", 1)[-1], new, node.args[0])


def _whole(pool: Any, node: Node) -> bool:
    """Does an average pool cover exactly the whole input?"""
    source = node.args[0]
    sizes = shape(source)[2:] if isinstance(source, Node) else ()
    kernel = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * len(sizes)
    padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
    return tuple(kernel) == tuple(sizes) and not any(padding) and pool.divisor_override is None


def _adaptive(gm: GraphModule, node: Node, size: Any, x: Any) -> bool:
    sizes = shape(x)[2:]
    want = tuple(s if o is None else o for s, o in zip(sizes, size if isinstance(size, (tuple, list)) else (size,) * len(sizes), strict=True))
    if all(o == 1 for o in want):
        return _put(gm, node, "global_avg_pool", m.GlobalAvgPool(), x)
    if want == sizes:
        erase(gm, node, x)
        return True
    if len(sizes) == 2 and all(s % o == 0 for s, o in zip(sizes, want, strict=True)):
        kernel = tuple(s // o for s, o in zip(sizes, want, strict=True))
        return _put(gm, node, "avg_pool", nn.AvgPool2d((kernel[0], kernel[1])), x)
    cls: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(sizes) - 1]
    return False if node.op == "call_module" else _put(gm, node, "adaptive_avg_pool", cls(want), x)


def _reshape_to(gm: GraphModule, node: Node, x: Any) -> bool:
    """Reshape ``x`` to the node's known shape; the one batch-dependent size becomes -1."""
    target, dynamic = shape(node), node.meta["dynamic"]
    source, moving = shape(x), x.meta["dynamic"]
    if sum(dynamic) <= 1:
        sizes: list[int | None] = [-1 if d else s for s, d in zip(target, dynamic, strict=True)]
    else:
        sizes = [None if d and i < len(source) and moving[i] and source[i] == s else -1 if d else s for i, (s, d) in enumerate(zip(target, dynamic, strict=True))]
        if sizes.count(-1) > 1:
            return False
    return _put(gm, node, "reshape", m.Reshape(sizes), x)


def _reshape(gm: GraphModule, node: Node) -> bool:
    return _is_tensor(node.args[0]) and "shape" in node.meta and _reshape_to(gm, node, node.args[0])


def _flatten_to(gm: GraphModule, node: Node, start: int, end: int) -> bool:
    return _reshape_to(gm, node, node.args[0])


def _binary(cls: type[nn.Module]) -> Form:
    def form(gm: GraphModule, node: Node) -> bool:
        if not isinstance(node.meta.get("shape"), tuple) or len(node.args) != 2 or node.kwargs:
            return False
        args = [a if _is_tensor(a) else _value(a) for a in node.args]
        if any(isinstance(a, Node) and not _is_tensor(a) or a is None or isinstance(a, Node) and a.meta["dtype"] != node.meta["dtype"] for a in args):
            return False
        return _put(gm, node, cls.__name__.lower(), cls(), *args)

    return form


def _unary(make: Callable[[], nn.Module], suffix: str) -> Form:
    def form(gm: GraphModule, node: Node) -> bool:
        return _is_tensor(node.args[0] if node.args else None) and _put(gm, node, suffix, make(), node.args[0])

    return form


def _clamp(gm: GraphModule, node: Node) -> bool:
    lo, hi = _get(node, 1, "min"), _get(node, 2, "max")
    if _name(node) == "hardtanh":
        lo, hi = _get(node, 1, "min_val", -1.0), _get(node, 2, "max_val", 1.0)
    if isinstance(lo, Node) or isinstance(hi, Node):
        return False
    return _put(gm, node, "clamp", m.Clamp(None if lo is None else float(lo), None if hi is None else float(hi)), node.args[0])


def _cat(gm: GraphModule, node: Node) -> bool:
    xs: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = _get(node, 1, "dim", _get(node, 1, "axis", 0))
    if not isinstance(xs, (tuple, list)):
        return False
    return _put(gm, node, "cat", m.Cat(dim % len(shape(node))), *xs)


def _permute(gm: GraphModule, node: Node) -> bool:
    n, x = len(shape(node)), node.args[0]
    if _name(node) == "permute":
        raw: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        dims = [int(d) % n for d in raw]
    else:
        a, b = int(_get(node, 1, "dim0")) % n, int(_get(node, 2, "dim1")) % n
        dims = list(range(n))
        dims[a], dims[b] = b, a
    return _put(gm, node, "permute", m.Permute(dims), x)


def _split(gm: GraphModule, node: Node) -> bool:
    x = node.args[0]
    if not _is_tensor(x) or not isinstance(node.meta.get("shape"), list) or any(u.target is not operator.getitem for u in node.users):
        return False
    dim = int(_get(node, 2, "dim", 0)) % len(shape(x))  # type: ignore[arg-type]
    if x.meta["dynamic"][dim]:  # type: ignore[union-attr]
        return False
    return _put(gm, node, "split", m.Split([s[dim] for s in node.meta["shape"]], dim), x)


def _getitem(gm: GraphModule, node: Node) -> bool:
    x, index = node.args[0], node.args[1]
    if not _is_tensor(x):
        return False
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(shape(x)) - len(items) + 1)  # type: ignore[arg-type]
    cuts: list[tuple[int, int, int | None, int]] = []
    for dim, item in enumerate(items):
        item = _value(item)
        size = shape(x)[dim] if dim < len(shape(x)) else 0  # type: ignore[arg-type]
        if isinstance(item, int) and not x.meta["dynamic"][dim]:  # type: ignore[union-attr]
            cuts.append((dim, item % size, item % size + 1, 1))
        elif isinstance(item, slice) and all(v is None or isinstance(_value(v), int) for v in (item.start, item.stop, item.step)):
            if item == slice(None):
                continue
            start, stop, step = (_value(v) for v in (item.start, item.stop, item.step))
            if x.meta["dynamic"][dim] or (step or 1) < 1:  # type: ignore[union-attr]
                return False
            begin, end, step = slice(start, stop, step).indices(size)
            cuts.append((dim, begin, end, step))
        else:
            return False
    if all(isinstance(i, slice) for i in items):
        return _put(gm, node, "slice", m.Slice(cuts), x)
    cut = insert_module(gm, node.prev, scope_name(node, "slice"), m.Slice(cuts), (x,))
    return _reshape_to(gm, node, cut)


def _pad(gm: GraphModule, node: Node) -> bool:
    pads, mode = _get(node, 1, "pad"), _get(node, 2, "mode", "constant")
    value = _get(node, 3, "value", 0.0) or 0.0
    if any(isinstance(_value(p), Node) for p in pads):
        return False
    return _put(gm, node, "pad", m.Pad([int(_value(p)) for p in pads], mode, float(value)), node.args[0])


def _mean(gm: GraphModule, node: Node) -> bool:
    x, dims = node.args[0], _get(node, 1, "dim")
    if not _is_tensor(x) or dims is None or node.kwargs.get("dtype") is not None:
        return False
    n = len(shape(x))  # type: ignore[arg-type]
    where = sorted(d % n for d in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    keep = bool(_get(node, 2, "keepdim", False))
    if n >= 4 and where == list(range(2, n)):
        if keep:
            return _put(gm, node, "global_avg_pool", m.GlobalAvgPool(), x)
        pool = insert_module(gm, node.prev, scope_name(node, "global_avg_pool"), m.GlobalAvgPool(), (x,))
        return _reshape_to(gm, node, pool)
    return _put(gm, node, "mean", m.Mean(where, keep), x)


def _pool(cls2: Any, which: str) -> Form:
    def form(gm: GraphModule, node: Node) -> bool:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode") if which == "max" else ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        if isinstance(node.meta.get("shape"), list) or len(shape(node)) != 4:
            return False
        given = {n: _get(node, i + 1, n) for i, n in enumerate(names)}
        pool = cls2(**{k: v for k, v in given.items() if v is not None})
        if which == "avg" and _whole(pool, node):
            pool = m.GlobalAvgPool()
        return _put(gm, node, f"{which}_pool", pool, node.args[0])

    return form


def _interpolate(gm: GraphModule, node: Node) -> bool:
    size, scale, mode = _get(node, 1, "size"), _get(node, 2, "scale_factor"), _get(node, 3, "mode", "nearest")
    if node.kwargs.get("antialias") or len(shape(node)) != 4 or any(node.meta["dynamic"][2:]):
        return False
    factor = scale if isinstance(scale, (tuple, list)) else (scale,) * 2
    made = m.Resize(None if size is None else shape(node)[2:], None if scale is None else [float(f) for f in factor], mode, _get(node, 4, "align_corners"))
    return _put(gm, node, "resize", made, node.args[0])


def _gone(gm: GraphModule, node: Node) -> bool:
    erase(gm, node, node.args[0])  # type: ignore[arg-type]
    return True


def _softmax(gm: GraphModule, node: Node) -> bool:
    return _put(gm, node, "softmax", nn.Softmax(int(_get(node, 1, "dim"))), node.args[0])


def _conv(gm: GraphModule, node: Node) -> bool:
    """Functional convolution or linear layer with constant weights."""
    w, b = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight"), _raw(node, 2, "bias")
    if not isinstance(w, Node) or w.op != "get_attr" or (b is not None and (not isinstance(b, Node) or b.op != "get_attr")):
        return False
    weight = attr(gm, w)
    layer: nn.Module
    if _name(node) == "linear":
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=b is not None)
    else:
        cls: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
        groups = _get(node, 6, "groups", 1)
        extra = [_get(node, i, n, d) for i, n, d in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))]
        layer = cls(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), *extra, groups=groups, bias=b is not None)
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if b is not None:
        bias = attr(gm, b)
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return _put(gm, node, _name(node), layer, node.args[0])


def _layer_norm(gm: GraphModule, node: Node) -> bool:
    sizes, eps = _get(node, 1, "normalized_shape"), _get(node, 4, "eps", 1e-5)
    parts = [_raw(node, 2, "weight"), _raw(node, 3, "bias")]
    if any(p is not None and (not isinstance(p, Node) or p.op != "get_attr") for p in parts):
        return False
    norm = nn.LayerNorm(tuple(sizes), eps, elementwise_affine=parts[0] is not None, bias=parts[1] is not None)
    for name, part in zip(("weight", "bias"), parts, strict=True):
        if part is not None:
            value = attr(gm, part)
            setattr(norm, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
    return _put(gm, node, "layer_norm", norm, node.args[0])


def _gelu(gm: GraphModule, node: Node) -> bool:
    return _put(gm, node, "gelu", nn.GELU(_get(node, 1, "approximate", "none")), node.args[0])


def _raw(node: Node, i: int, name: str) -> Any:
    return node.kwargs.get(name, node.args[i] if i < len(node.args) else None)


def _adaptive_fn(gm: GraphModule, node: Node) -> bool:
    return _adaptive(gm, node, _get(node, 1, "output_size"), node.args[0])


def _one_module_per_call(gm: GraphModule) -> int:
    """A module that is called again gets another path for each further call (the same parameters)."""
    seen: set[str] = set()
    changed = 0
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        if str(node.target) in seen:
            node.target = add_module(gm, str(node.target), copy.copy(module_of(gm, node)))
            changed += 1
        seen.add(str(node.target))
    return changed


FORMS: dict[str, Form] = {
    **dict.fromkeys(("add", "iadd"), _binary(m.Add)), **dict.fromkeys(("sub", "isub"), _binary(m.Sub)),
    **dict.fromkeys(("mul", "imul"), _binary(m.Mul)), **dict.fromkeys(("div", "truediv", "itruediv"), _binary(m.Div)),
    **dict.fromkeys(("matmul", "bmm"), _binary(m.MatMul)),
    "relu": _unary(nn.ReLU, "relu"), "relu6": _unary(lambda: m.Clamp(0.0, 6.0), "relu6"), "sigmoid": _unary(nn.Sigmoid, "sigmoid"),
    "silu": _unary(nn.SiLU, "silu"), "hardswish": _unary(nn.Hardswish, "hardswish"), "hardsigmoid": _unary(nn.Hardsigmoid, "hardsigmoid"),
    "tanh": _unary(nn.Tanh, "tanh"), "clamp": _clamp, "hardtanh": _clamp, "cat": _cat, "concat": _cat, "concatenate": _cat,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"), _reshape),
    **dict.fromkeys(("permute", "transpose", "swapaxes"), _permute), **dict.fromkeys(("chunk", "split", "tensor_split"), _split),
    "getitem": _getitem, "pad": _pad, "mean": _mean, "max_pool2d": _pool(nn.MaxPool2d, "max"), "avg_pool2d": _pool(nn.AvgPool2d, "avg"),
    "interpolate": _interpolate, **dict.fromkeys(("contiguous", "dropout", "detach", "clone"), _gone), "softmax": _softmax,
    "layer_norm": _layer_norm, "gelu": _gelu,
    "conv1d": _conv, "conv2d": _conv, "conv3d": _conv, "linear": _conv, "adaptive_avg_pool2d": _adaptive_fn, "stochastic_depth": _gone,
}  # fmt: skip

