"""Emitters of the kinds that ONNX Runtime executes in float: norms, activations, reductions, pointwise functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from fxq.backends.onnx_ops import attribute, simple, windows
from fxq.backends.onnx_writer import Emitter, Writer
from fxq.graph import shape

UNARY = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin", "asinh": "Asinh", "atan": "Atan", "atanh": "Atanh", "ceil": "Ceil",
    "cos": "Cos", "cosh": "Cosh", "erf": "Erf", "exp": "Exp", "floor": "Floor", "log": "Log", "logical_not": "Not", "neg": "Neg",
    "negative": "Neg", "reciprocal": "Reciprocal", "relu": "Relu", "round": "Round", "sigmoid": "Sigmoid", "sign": "Sign", "sin": "Sin",
    "sinh": "Sinh", "sqrt": "Sqrt", "tan": "Tan", "tanh": "Tanh", "isnan": "IsNaN", "isinf": "IsInf", "rsqrt": "", "square": "",
}  # fmt: skip


def _affine(w: Writer, node: Node, weight: Any, bias: Any, size: int | tuple[int, ...]) -> list[str]:
    """Weight and bias initializers; ones and zeros where the module has none."""
    out = w.out(node)
    parts = {"weight": torch.ones(size) if weight is None else weight, "bias": torch.zeros(size) if bias is None else bias}
    return [w.const(f"{out}/{k}", v) for k, v in parts.items()]


def batch_norm(w: Writer, node: Node, module: nn.Module) -> str:
    """With running statistics BatchNormalization; without them the batch's own mean and variance, as torch's eval mode takes."""
    b: Any = module
    out = w.out(node)
    affine = _affine(w, node, b.weight, b.bias, b.num_features)
    if b.running_mean is not None:
        moments = [w.const(f"{out}/mean", b.running_mean), w.const(f"{out}/var", b.running_var)]
        return w.op("BatchNormalization", [w.input(node), *affine, *moments], out, epsilon=b.eps)
    n = len(shape(node))
    return _normalised(w, node, [0, *range(2, n)], b.eps, affine, [-1, *([1] * (n - 2))])


def _normalised(w: Writer, node: Node, axes: list[int], eps: float, affine: list[str], along: list[int]) -> str:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the given axes, from single operations."""
    out, x, dims = w.out(node), w.input(node), w.ints(f"{w.out(node)}/axes", axes)
    centred = w.op("Sub", [x, w.op("ReduceMean", [x, dims], f"{out}/batch_mean")], f"{out}/centred")
    var = w.op("ReduceMean", [w.op("Mul", [centred, centred], f"{out}/squares"), dims], f"{out}/batch_var")
    sigma = w.op("Sqrt", [w.op("Add", [var, w.const(f"{out}/eps", np.float32(eps))], f"{out}/var_eps")], f"{out}/sigma")
    y = w.op("Div", [centred, sigma], f"{out}/unit")
    shaped = [w.op("Reshape", [a, w.ints(f"{out}/along", along)], f"{a}/shaped") for a in affine]
    return w.op("Add", [w.op("Mul", [y, shaped[0]], f"{out}/scaled"), shaped[1]], out)


def layer_norm(w: Writer, node: Node, module: nn.Module) -> str:
    n: Any = module
    out = w.out(node)
    names = [w.const(f"{out}/weight", torch.ones(n.normalized_shape) if n.weight is None else n.weight)]
    if n.bias is not None:
        names.append(w.const(f"{out}/bias", n.bias))
    return w.op("LayerNormalization", [w.input(node), *names], out, axis=-len(n.normalized_shape), epsilon=n.eps)


def instance_norm(w: Writer, node: Node, module: nn.Module) -> str:
    n: Any = module
    out, affine = w.out(node), _affine(w, node, n.weight, n.bias, n.num_features)
    if n.running_mean is not None:
        moments = [w.const(f"{out}/mean", n.running_mean), w.const(f"{out}/var", n.running_var)]
        return w.op("BatchNormalization", [w.input(node), *affine, *moments], out, epsilon=n.eps)
    return w.op("InstanceNormalization", [w.input(node), *affine], out, epsilon=n.eps)


def group_norm(w: Writer, node: Node, module: nn.Module) -> str:
    """InstanceNormalization over [N, groups, rest], then the channels' own scale and shift."""
    g: Any = module
    out, rank = w.out(node), len(shape(node))
    ones = w.const(f"{out}/ones", torch.ones(g.num_groups))
    zeros = w.const(f"{out}/zeros", torch.zeros(g.num_groups))
    x = w.op("Reshape", [w.input(node), w.ints(f"{out}/groups", [0, g.num_groups, -1])], f"{out}/grouped")
    y = w.op("InstanceNormalization", [x, ones, zeros], f"{out}/unit", epsilon=g.eps)
    like = w.op("Shape", [w.input(node)], f"{out}/shape")
    if g.weight is None:
        return w.op("Reshape", [y, like], out)
    y = w.op("Reshape", [y, like], f"{out}/normed")
    along = [-1, *([1] * (rank - 2))]
    y = w.op("Mul", [y, w.const(f"{out}/weight", g.weight.reshape(along))], f"{out}/scaled" if g.bias is not None else out)
    return y if g.bias is None else w.op("Add", [y, w.const(f"{out}/bias", g.bias.reshape(along))], out)


def _reduce(op: str) -> Emitter:
    def emit(w: Writer, node: Node, module: nn.Module) -> str:
        r: Any = module
        return w.op(op, [w.input(node), w.ints(f"{w.out(node)}/axes", r.dims)], w.out(node), keepdims=int(r.keepdim))

    return emit


def _softmax(op: str) -> Emitter:
    def emit(w: Writer, node: Node, module: nn.Module) -> str:
        s: Any = module
        rank = len(shape(node))
        dim = (0 if rank in (0, 1, 3) else 1) if s.dim is None else s.dim % rank  # torch's implicit dimension
        return w.op(op, [w.input(node)], w.out(node), axis=dim)

    return emit


def silu(w: Writer, node: Node, module: nn.Module) -> str:
    return w.op("Mul", [w.input(node), w.op("Sigmoid", [w.input(node)], f"{w.out(node)}/gate")], w.out(node))


def prelu(w: Writer, node: Node, module: nn.Module) -> str:
    slope: Any = module.weight
    rank = len(shape(node))
    if slope.numel() > 1:
        slope = slope.reshape([-1, *([1] * (rank - 2))])
    return w.op("PRelu", [w.input(node), w.const(f"{w.out(node)}/slope", slope)], w.out(node))


def softplus(w: Writer, node: Node, module: nn.Module) -> str:
    """``log(1 + exp(beta x)) / beta``; torch's linear part above ``threshold`` is equal to it in float32."""
    s: Any = module
    out, x = w.out(node), w.input(node)
    if s.beta == 1:
        return w.op("Softplus", [x], out)
    beta = w.const(f"{out}/beta", np.float32(s.beta))
    return w.op("Div", [w.op("Softplus", [w.op("Mul", [x, beta], f"{out}/scaled")], f"{out}/plus"), beta], out)


def gelu(w: Writer, node: Node, module: nn.Module) -> str:
    """Gelu, an operation from opset 20 on; before that its definition (Hendrycks and Gimpel, arXiv 1606.08415)."""
    g: Any = module
    out, x = w.out(node), w.input(node)
    if w.target.opset >= 20:
        return w.op("Gelu", [x], out, approximate=g.approximate)
    half, one = w.const(f"{out}/half", np.float32(0.5)), w.const(f"{out}/one", np.float32(1))
    if g.approximate == "tanh":
        cube = w.op("Mul", [w.op("Mul", [x, x], f"{out}/square"), x], f"{out}/cube")
        cube = w.op("Mul", [cube, w.const(f"{out}/k3", np.float32(0.044715))], f"{out}/scaled_cube")
        inner = w.op("Mul", [w.op("Add", [x, cube], f"{out}/sum"), w.const(f"{out}/k", np.float32(np.sqrt(2 / np.pi)))], f"{out}/inner")
        gate = w.op("Tanh", [inner], f"{out}/tanh")
    else:
        gate = w.op("Erf", [w.op("Mul", [x, w.const(f"{out}/k", np.float32(np.sqrt(0.5)))], f"{out}/inner")], f"{out}/erf")
    return w.op("Mul", [w.op("Mul", [x, half], f"{out}/half_x"), w.op("Add", [gate, one], f"{out}/gate")], out)


def unary(w: Writer, node: Node, module: nn.Module) -> str:
    fn, out, x = str(module.fn), w.out(node), w.input(node)
    if fn == "square":
        return w.op("Mul", [x, x], out)
    if fn == "rsqrt":
        return w.op("Reciprocal", [w.op("Sqrt", [x], f"{out}/sqrt")], out)
    return w.op(UNARY[fn], [x], out)


def power(w: Writer, node: Node, module: nn.Module) -> str:
    p: Any = module
    out, x = w.out(node), w.input(node)
    if p.exponent == 2:
        return w.op("Mul", [x, x], out)
    return w.op("Pow", [x, w.const(f"{out}/exponent", torch.tensor(p.exponent, dtype=node.meta["dtype"]))], out)


def expand(w: Writer, node: Node, module: nn.Module) -> str:
    """ONNX's Expand broadcasts: a size of 1 keeps the input's."""
    e: Any = module
    return w.op("Expand", [w.input(node), w.ints(f"{w.out(node)}/shape", (1 if s == -1 else s for s in e.shape))], w.out(node))


def embedding(w: Writer, node: Node, module: nn.Module) -> str:
    return w.op("Gather", [w.const(f"{w.out(node)}/weight", module.weight), w.input(node)], w.out(node), axis=0)


def pixel_shuffle(w: Writer, node: Node, module: nn.Module) -> str:
    return w.op("DepthToSpace", [w.input(node)], w.out(node), blocksize=module.upscale_factor, mode="CRD")


def adaptive_max_pool(w: Writer, node: Node, module: nn.Module) -> str:
    """The maximum over each window, one dimension after the other."""
    out, x = w.out(node), w.input(node)
    sizes, wanted = shape(node.all_input_nodes[0])[2:], shape(node)[2:]
    for d, (size, want) in enumerate(zip(sizes, wanted, strict=True)):
        axis, parts = w.ints(f"{out}/axis{d}", [d + 2]), []
        for j, (begin, end) in enumerate(windows(size, want)):
            at = [w.ints(f"{out}/at{v}", [v]) for v in (begin, end)]
            cut = w.op("Slice", [x, *at, axis], f"{out}/{d}/{j}")
            parts.append(w.op("ReduceMax", [cut, axis], f"{out}/{d}/{j}/max"))
        x = w.op("Concat", parts, out if d == len(sizes) - 1 else f"{out}/{d}", axis=d + 2)
    return x


EMITTERS: dict[str, Emitter] = {
    "batch_norm": batch_norm, "layer_norm": layer_norm, "instance_norm": instance_norm, "group_norm": group_norm,
    "mean": _reduce("ReduceMean"), "sum": _reduce("ReduceSum"), "softmax": _softmax("Softmax"), "log_softmax": _softmax("LogSoftmax"),
    "silu": silu, "prelu": prelu, "softplus": softplus, "tanh": simple("Tanh"), "hardswish": simple("HardSwish"), "mish": simple("Mish"),
    "elu": attribute("alpha", "Elu", "alpha"), "selu": simple("Selu"), "gelu": gelu,
    "unary": unary, "power": power, "expand": expand, "embedding": embedding, "pixel_shuffle": pixel_shuffle, "adaptive_max_pool": adaptive_max_pool,
}  # fmt: skip
