"""One emitter per kind of node that ONNX Runtime can execute in integers, and their float forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from fxq import modules as m
from fxq.backends.onnx_codes import HARD_SIGMOID_WIDTH, stored_codes
from fxq.backends.onnx_weighted import PAD_MODES, weighted
from fxq.backends.onnx_writer import Emitter, Writer, quantizer, rounder
from fxq.graph import kind, module_of, shape
from fxq.kernels import operand_order

HARD_SIGMOID_SHIFT = 3.0
RESIZE_MODES = {"nearest": "nearest", "nearest-exact": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}
TO_THE_END = 2**62  # a slice bound beyond every size


def simple(op: str, **attrs: Any) -> Emitter:
    """An operation with the node's tensor and scalar arguments and constant attributes."""

    def emit(w: Writer, node: Node, module: nn.Module) -> str:
        args = operand_order(node) if op in ("Add", "Mul") and node.meta.get("integer") else node.args
        return w.op(op, [w.operand(node, a, i) for i, a in enumerate(args)], w.out(node), **attrs)

    return emit


def attribute(name: str, op: str, field: str) -> Emitter:
    """An operation with one attribute that is a field of the module."""

    def emit(w: Writer, node: Node, module: nn.Module) -> str:
        return w.op(op, [w.name(n) for n in node.args if isinstance(n, Node)], w.out(node), **{name: getattr(module, field)})

    return emit


def cat(w: Writer, node: Node, module: nn.Module) -> str:
    op: Any = module
    return w.op("Concat", [w.name(n) for n in node.args if isinstance(n, Node)], w.out(node), axis=op.dim)


def reshape(w: Writer, node: Node, module: nn.Module) -> str:
    op: Any = module
    return w.op("Reshape", [w.input(node), w.ints(f"{w.out(node)}/shape", (0 if s is None else s for s in op.shape))], w.out(node))


def cut(w: Writer, node: Node, module: nn.Module) -> str:
    op: Any = module
    out, s = w.out(node), op.slices
    if not s:
        return w.input(node)
    columns = zip(*[(b, TO_THE_END if e is None else e, d, k) for d, b, e, k in s], strict=True)
    names = [w.ints(f"{out}/{k}", c) for k, c in zip(("starts", "ends", "axes", "steps"), columns, strict=True)]
    return w.op("Slice", [w.input(node), *names], out)


def split(w: Writer, node: Node, module: nn.Module) -> str:
    """Split; with a part that nobody reads Slices of the others, because the runtime fuses a Split only if each part has its Q."""
    op: Any = module
    if isinstance(op.sizes, int):
        out = w.out(node)
        w.multi("Split", [w.input(node)], [f"{out}/{i}" for i in range(op.sizes)], out, axis=op.dim, num_outputs=op.sizes)
        return out
    out, count = w.out(node), len(op.sizes)
    read = {int(u.args[1]) % count for u in node.users}  # type: ignore[arg-type]
    if len(read) == count:
        w.multi("Split", [w.input(node), w.ints(f"{out}/sizes", op.sizes)], [f"{out}/{i}" for i in range(count)], out, axis=op.dim)
        return out
    for i in sorted(read):
        begin = sum(op.sizes[:i])
        bounds = {"begin": begin, "end": begin + op.sizes[i], "axis": op.dim}
        w.op("Slice", [w.input(node), *(w.ints(f"{out}/{i}/{k}", [v]) for k, v in bounds.items())], f"{out}/{i}")
    return out


def index_select(w: Writer, node: Node, module: nn.Module) -> str:
    op: Any = module
    return w.op("Gather", [w.input(node), w.const(f"{w.out(node)}/indices", op.indices)], w.out(node), axis=op.dim)


def pad(w: Writer, node: Node, module: nn.Module) -> str:
    """Pad; an integer one writes the codes themselves, padded with the code of 0 (between DQ and Q it would run in float)."""
    p: Any = module
    out, source, n = w.out(node), node.all_input_nodes[0], len(shape(node))
    full = [*p.pads, *([0] * (2 * n - len(p.pads)))]
    begin, end = [full[2 * (n - 1 - d)] for d in range(n)], [full[2 * (n - 1 - d) + 1] for d in range(n)]
    pads = w.ints(f"{out}/pads", begin + end)
    if p.mode != "constant":
        return w.op("Pad", [w.input(node), pads], out, mode=PAD_MODES[p.mode])
    user = moved_to(w, node)
    if user is not None and p.value == 0:
        w.nodes_on_codes.add(node)
        value = w.const(f"{out}/value", stored_codes(torch.zeros(()), quantizer(w.gm, source).qparams))
        return w.op("Pad", [w.codes(source), pads, value], w.codes(user), mode="constant")
    value = w.const(f"{out}/value", torch.tensor(p.value, dtype=source.meta["dtype"]))
    return w.op("Pad", [w.input(node), pads, value], out, mode="constant")


def moved_to(w: Writer, node: Node) -> Node | None:
    """The only user of an integer mover, when it is a ``fake_quantize`` on the very grid of the mover's input."""
    source, users = node.all_input_nodes[0], list(node.users)
    if not node.meta.get("integer") or len(users) != 1 or kind(w.gm, source) != "fake_quantize":
        return None
    user = rounder(w.gm, node)
    return user if user is not None and quantizer(w.gm, source).qparams.same_grid(quantizer(w.gm, user).rounding) else None


def _each(v: Any, n: int) -> list[int]:
    return list(v) if isinstance(v, (tuple, list)) else [v] * n


def pool(w: Writer, node: Node, module: nn.Module) -> str:
    """MaxPool and AveragePool with the end padding that gives torch's output size: ``ceil_mode`` is not written."""
    p: Any = module
    sizes, wanted = shape(node.all_input_nodes[0])[2:], shape(node)[2:]
    n, most = len(sizes), isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d))
    kernel, stride, begin = _each(p.kernel_size, n), _each(p.stride or p.kernel_size, n), _each(p.padding, n)
    dilation = _each(p.dilation, n) if most else [1] * n
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(wanted, stride, dilation, kernel, strict=True)]
    end = [max(b, r - i - b) for b, r, i in zip(begin, reach, sizes, strict=True)]
    attrs: dict[str, Any] = dict(kernel_shape=kernel, strides=stride)
    out, x = w.out(node), w.input(node)
    if most:
        return w.op("MaxPool", [x], out, dilations=dilation, pads=begin + end, **attrs)
    divisor = getattr(p, "divisor_override", None)
    if divisor is None and (begin == end or not p.count_include_pad):
        return w.op("AveragePool", [x], out, pads=begin + end, count_include_pad=int(p.count_include_pad), **attrs)
    if divisor is None:  # the declared padding counts, what ceil_mode adds does not
        x = w.op("Pad", [x, w.ints(f"{out}/pads", [0, 0, *begin, 0, 0, *begin])], f"{out}/padded")
        rest = [e - b for b, e in zip(begin, end, strict=True)]
        return w.op("AveragePool", [x], out, pads=[0] * n + rest, count_include_pad=0, **attrs)
    mean = w.op("AveragePool", [x], f"{out}/mean", pads=begin + end, count_include_pad=1, **attrs)
    return w.op("Mul", [mean, w.const(f"{out}/factor", np.float32(np.prod(kernel) / divisor))], out)


def windows(size: int, wanted: int) -> list[tuple[int, int]]:
    """torch's adaptive pooling windows ``[begin, end)`` along one dimension."""
    return [(i * size // wanted, -(-(i + 1) * size // wanted)) for i in range(wanted)]


def adaptive_avg_pool(w: Writer, node: Node, module: nn.Module) -> str:
    """Windows of different sizes: along each dimension a product with a constant pooling matrix."""
    out, x = w.out(node), w.input(node)
    sizes, wanted = shape(node.all_input_nodes[0])[2:], shape(node)[2:]
    n = len(sizes)
    last = list(range(n + 2))
    for d, (size, want) in enumerate(zip(sizes, wanted, strict=True)):
        matrix = np.zeros((size, want), np.float32)
        for j, (begin, end) in enumerate(windows(size, want)):
            matrix[begin:end, j] = 1 / (end - begin)
        final = out if d == n - 1 else f"{out}/{d}"
        if d == n - 1:
            return w.op("MatMul", [x, w.const(f"{out}/matrix{d}", matrix)], final)
        if d == n - 2:
            x = w.op("MatMul", [w.const(f"{out}/matrix{d}", matrix.T.copy()), x], final)
        else:
            turn = [*last[: d + 2], *last[d + 3 :], d + 2]
            back = [turn.index(i) for i in last]
            x = w.op("Transpose", [x], f"{out}/{d}/turned", perm=turn)
            x = w.op("MatMul", [x, w.const(f"{out}/matrix{d}", matrix)], f"{out}/{d}/pooled")
            x = w.op("Transpose", [x], final, perm=back)
    raise AssertionError("a pool has spatial dimensions")


def resize(w: Writer, node: Node, module: nn.Module) -> str:
    """Resize by all scales: the layout optimizer of ONNX Runtime mishandles ``axes``, and ``sizes`` would fix the batch.

    Nearest neighbours whose indices differ from torch's in float32 are written as constant Gathers.
    """
    r: Any = module
    out, source = w.out(node), node.all_input_nodes[0]
    sizes, wanted = shape(source)[2:], shape(node)[2:]
    mode = RESIZE_MODES[r.mode]
    scale = [np.float32(s) for s in r.scale] if r.scale else [_ratio(i, o) for i, o in zip(sizes, wanted, strict=True)]
    how: dict[str, Any]
    if mode == "nearest":
        exact = r.mode == "nearest-exact"
        picks = [_torch_picks(i, o, None if not r.scale else r.scale[d], exact) for d, (i, o) in enumerate(zip(sizes, wanted, strict=True))]
        if any(not np.array_equal(p, _runtime_picks(o, s, i, exact)) for p, o, s, i in zip(picks, wanted, scale, sizes, strict=True)):
            return _gathers(w, node, picks)
        how = {"coordinate_transformation_mode": "half_pixel" if exact else "asymmetric", "nearest_mode": "round_prefer_ceil" if exact else "floor"}
    else:
        how = {"coordinate_transformation_mode": "align_corners" if r.align_corners else "half_pixel"}
        if mode == "cubic":
            how["cubic_coeff_a"] = -0.75
    scales = w.const(f"{out}/scales", np.array([1, 1, *scale], np.float32))
    return w.op("Resize", [w.input(node), "", scales], out, mode=mode, **how)


def _ratio(size: int, wanted: int) -> np.float32:
    """The least float32 scale whose product with ``size`` is not below ``wanted``: rounded down it gives ``wanted``."""
    ratio = np.float32(wanted / size)
    while size * float(ratio) < wanted:
        ratio = np.nextafter(ratio, np.float32(np.inf))
    return ratio


def _torch_picks(size: int, wanted: int, scale: float | None, exact: bool) -> np.ndarray[Any, Any]:
    """Indices that torch's nearest interpolation reads (one dimension), by asking it."""
    ramp = torch.arange(size, dtype=torch.float32).reshape(1, 1, size)
    mode = "nearest-exact" if exact else "nearest"
    picked = torch.nn.functional.interpolate(ramp, size=wanted if scale is None else None, scale_factor=scale, mode=mode)
    return picked.reshape(-1).to(torch.int64).numpy()


def _runtime_picks(wanted: int, scale: np.float32, size: int, exact: bool) -> np.ndarray[Any, Any]:
    """Indices that ONNX Runtime's Resize reads, in its float32 arithmetic."""
    at = np.arange(wanted, dtype=np.float32)
    half = np.float32(0.5)
    x = (at + half) / scale - half if exact else np.floor(at / scale)
    where = np.floor(x + half)  # exact: round_prefer_ceil
    picks: np.ndarray[Any, Any] = np.clip(where, 0, size - 1).astype(np.int64)
    return picks


def _gathers(w: Writer, node: Node, picks: list[np.ndarray[Any, Any]]) -> str:
    out, x = w.out(node), w.input(node)
    for d, pick in enumerate(picks):
        final = out if d == len(picks) - 1 else f"{out}/{d}"
        x = w.op("Gather", [x, w.const(f"{out}/picks{d}", pick)], final, axis=d + 2)
    return x


def clamp(w: Writer, node: Node, module: nn.Module) -> str:
    op: Any = module
    return _bounded(w, node, op.lo, op.hi)


def _bounded(w: Writer, node: Node, lo: float | None, hi: float | None) -> str:
    """Clip; behind an integer linear layer Max and Min: of Gemm and Relu or Clip the runtime makes a float Gemm before it sees the Q/DQ."""
    out, x, source = w.out(node), w.input(node), node.all_input_nodes[0]
    ends = {k: w.const(f"{out}/{k}", torch.tensor(v, dtype=node.meta["dtype"])) for k, v in (("lo", lo), ("hi", hi)) if v is not None}
    if kind(w.gm, source) != "linear" or not isinstance(module_of(w.gm, source), m.Quantized):
        return w.op("Clip", [x, ends.get("lo", ""), ends.get("hi", "")], out)
    if lo is not None:
        x = w.op("Max", [x, ends["lo"]], out if hi is None else f"{out}/above")
    return x if hi is None else w.op("Min", [x, ends["hi"]], out)


def relu(w: Writer, node: Node, module: nn.Module) -> str:
    """An integer ReLU that no grid absorbed runs as a leaky ReLU of slope 0, a table in ONNX Runtime."""
    source = node.all_input_nodes[0]
    if node.meta.get("integer"):
        return w.op("LeakyRelu", [w.input(node)], w.out(node), alpha=0.0)
    if kind(w.gm, source) == "linear" and isinstance(module_of(w.gm, source), m.Quantized):
        return _bounded(w, node, 0.0, None)
    return w.op("Relu", [w.input(node)], w.out(node))


def hardsigmoid(w: Writer, node: Node, module: nn.Module) -> str:
    """Integer: x + 3 saturated on [0, 6] (``fake_quantize`` writes that grid); float: the op of that name."""
    out, x = w.out(node), w.input(node)
    if not node.meta.get("integer"):
        return w.op("HardSigmoid", [x], out, alpha=1 / HARD_SIGMOID_WIDTH, beta=0.5)
    return w.op("Add", [x, w.operand(node, HARD_SIGMOID_SHIFT, 0)], out)


EMITTERS: dict[str, Emitter] = {
    **dict.fromkeys(m.WEIGHTED, weighted), "add": simple("Add"), "sub": simple("Sub"), "mul": simple("Mul"), "div": simple("Div"),
    "matmul": simple("MatMul"), "sigmoid": simple("Sigmoid"), "global_avg_pool": simple("GlobalAveragePool"), "cat": cat,
    "permute": attribute("perm", "Transpose", "dims"), "reshape": reshape, "slice": cut, "split": split, "index_select": index_select, "pad": pad,
    "max_pool": pool, "avg_pool": pool, "adaptive_avg_pool": adaptive_avg_pool, "resize": resize, "clamp": clamp, "relu": relu,
    "hardsigmoid": hardsigmoid, "leaky_relu": attribute("alpha", "LeakyRelu", "negative_slope"),
}  # fmt: skip
