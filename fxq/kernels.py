"""Integer kernels: codes in, codes out, equal to ONNX Runtime's fused CPU kernels bit for bit.

Each kernel takes the canonical module, the operands as :class:`Codes` and the output grid, and returns the codes of the result.
Sums are exact integers; where the runtime works in float32 (scales, the sum of an integer add, a sigmoid's table), the same
operations run in the same order. The orders of roundings are those of MLAS, ONNX Runtime's kernel library, on x86-64 with AVX2 and
FMA; on CPUs without VNNI its u8*s8 products can saturate, which no kernel here does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq import numerics
from fxq.errors import FxqError
from fxq.graph import kind, module_of, shape
from fxq.spec import QParams

F4 = np.float32
EXACT_FLOAT32 = float(1 << 24)
INT32 = float(1 << 31)
Array = Any


@dataclass(frozen=True, eq=False)
class Codes:
    """An integer tensor on its grid: ``codes`` in ``qp.spec.dtype``."""

    codes: Tensor
    qp: QParams

    def real(self) -> Tensor:
        """Dequantized float32 values."""
        return numerics.dequantize(self.codes, self.qp)

    def centred(self) -> Tensor:
        """Codes minus zero point, int32 (8-bit grids: within [-255, 255])."""
        return self.codes.to(torch.int32) - self.qp.zero_point

    def onto(self, qp: QParams) -> Tensor:
        """Codes on the grid ``qp``: unchanged on the same grid, otherwise dequantized and quantized."""
        return self.codes if self.qp.same_grid(qp) else numerics.quantize(self.real(), qp)


def constant(value: float, qp: QParams, rank: int) -> Codes:
    """A Python scalar operand of shape ``[1] * rank`` on the grid that ``constant_qparams`` gives next to the codes of ``qp``."""
    v = torch.tensor(float(value))
    grid = numerics.constant_qparams(v, qp.spec)
    return Codes(numerics.quantize(v, grid).reshape([1] * rank), grid)


def in_bytes(x: Codes) -> Codes:
    """Codes as the fused kernels see them, unsigned 8 bits: the file holds narrow grids so, the runtime rewrites s8 (same reals, other roundings)."""
    return Codes((x.codes.to(torch.int32) - x.qp.spec.qmin).to(torch.uint8), numerics.in_bytes(x.qp))


def from_bytes(codes: Tensor, qp: QParams) -> Tensor:
    """Codes of the grid ``qp`` from unsigned bytes on ``numerics.in_bytes(qp)``; what lies above its greatest code is clipped to it."""
    return (codes.to(torch.int32) + qp.spec.qmin).clamp(max=qp.spec.qmax).to(qp.spec.dtype)


# ---------------------------------------------------------------- conv, linear, matmul


def _exact_sum(a: tuple[int, int], w: Tensor, dims: tuple[int, ...]) -> torch.dtype:
    """The float type in which every partial sum of ``w`` times values in ``a`` is an exact integer.

    Raises:
        FxqError: when the runtime's int32 accumulator could overflow.
    """
    lo, hi = a
    up = torch.maximum(w * hi, w * lo).clamp(min=0).sum(dims, dtype=torch.float64).max()
    down = torch.minimum(w * hi, w * lo).clamp(max=0).sum(dims, dtype=torch.float64).min()
    bound = max(float(up), -float(down))
    if bound >= INT32:
        raise FxqError(f"an integer sum can reach {bound:.3g}, beyond int32", way_out="Leave the layer in float with skip=")
    return torch.float32 if bound < EXACT_FLOAT32 and _ieee() else torch.float64


def _ieee() -> bool:
    """Float32 convolutions and products are true float32 (not bfloat16 or TensorFloat-32 by a user's setting)."""
    return torch.get_float32_matmul_precision() == "highest"


def _span(qp: QParams) -> tuple[int, int]:
    z = int(qp.zero_point)
    return qp.spec.qmin - z, qp.spec.qmax - z


def accumulate(module: m.Quantized, x: Codes) -> tuple[Tensor, Tensor]:
    """Integer sums (with the int32 bias) of a weighted layer, and the float32 scale ``fl(s_x * s_w)`` that broadcasts against them.

    Returns:
        ``acc`` int64 in the layer's output shape; ``scale`` float32.

    Raises:
        FxqError: when the runtime's int32 accumulator could overflow.
    """
    wq, op = module.weight_grid.qparams, module.op
    codes = module.weight_codes().to(torch.float32)
    w = codes - numerics.along(wq.zero_point.to(torch.float32), wq.spec.axis, codes.ndim)
    # A transposed convolution's filters lie along axis 1; the bound over both holds for it.
    dtype = _exact_sum(_span(x.qp), w, tuple(range(1, w.ndim)) if not isinstance(op, nn.modules.conv._ConvTransposeNd) else tuple(range(w.ndim)))
    acc = m.call_with(op, x.centred().to(dtype), w.to(dtype), None).to(torch.int64)
    shape = [1] * acc.ndim
    shape[-1 if isinstance(op, nn.Linear) else 1] = -1
    bias = module.bias_codes()
    if bias is not None:
        acc = acc + bias.to(torch.int64).reshape(shape)
    scale = x.qp.scale * wq.scale
    return acc, scale.reshape(shape) if scale.ndim else scale


def products(a: Codes, b: Codes) -> tuple[Tensor, Tensor]:
    """Integer sums of ``a @ b`` and their scale ``fl(s_a * s_b)``."""
    x, y = a.centred(), b.centred()
    top = max(map(abs, _span(a.qp))) * max(map(abs, _span(b.qp))) * x.shape[-1]
    dtype = torch.float32 if top < EXACT_FLOAT32 and _ieee() else torch.float64
    return torch.matmul(x.to(dtype), y.to(dtype)).to(torch.int64), a.qp.scale * b.qp.scale


def requantized(acc: Tensor, scale: Tensor, qp: QParams) -> Tensor:
    """``clip(rne(fl(acc) * fl(scale / s_y))) + z_y``: the requantization of convolution and matrix products. On a binary grid the sign of ``acc``."""
    if qp.spec.kind == "binary":
        return numerics.quantize(acc, qp)
    real = acc.to(torch.float32).numpy() * (scale / qp.scale).numpy()
    return torch.from_numpy(numerics.requantize(real, qp.spec, int(qp.zero_point)))


def weighted(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """QLinearConv, QGemm with a quantized output."""
    assert isinstance(module, m.Quantized)
    return requantized(*accumulate(module, xs[0]), qp)


def matmul(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """QLinearMatMul."""
    return requantized(*products(xs[0], xs[1]), qp)


def float_output(module: nn.Module, xs: Sequence[Codes]) -> Tensor:
    """QGemm and MatMulIntegerToFloat without an output grid: ``fl(acc) * fl(s_a * s_b)`` as float32."""
    acc, scale = accumulate(module, xs[0]) if isinstance(module, m.Quantized) else products(xs[0], xs[1])
    return acc.to(torch.float32) * scale


# ---------------------------------------------------------------- add, mul


def _fma(r: Array, x: Array, c: Array) -> Array:
    """``r*x + c`` with one rounding to float32 (the product of a float32 and a code is exact in float64)."""
    return (np.asarray(r, np.float64) * np.asarray(x, np.float64) + np.asarray(c, np.float64)).astype(F4)


def _saturate(real: Array, qp: QParams) -> Tensor:
    dtype = np.int8 if qp.spec.qmin < 0 else np.uint8
    return torch.from_numpy(np.clip(np.rint(real), qp.spec.qmin, qp.spec.qmax).astype(dtype))


def first_is_scalar(a: Sequence[int], b: Sequence[int]) -> bool:
    """Does the runtime's broadcaster see the first operand as a scalar in its innermost span?

    It joins trailing dimensions until one of them is larger than 1; two operands that are both 1 there count as "first is scalar".
    A rank-0 operand compares with the last dimension alone.
    """
    a, b = list(a), list(b)
    if not a or not b:
        return (a[-1] if a else 1) == 1
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1] == 1:
        a.pop()
        b.pop()
    return a[-1] == 1


def operand_order(node: Node) -> tuple[Any, ...]:
    """Operands of an integer add or mul in the order in which the file has them and the reference computes: the larger tensor first.

    The roundings of an add depend on which operand the runtime broadcasts from a scalar, and its layout optimizer moves that for a small
    first operand (``[N, C, 1, 1] + [N, C, H, W]``); with the larger one first the numbers are the same in every layout.
    """
    return tuple(sorted(node.args, key=lambda a: math.prod(shape(a)) if isinstance(a, Node) else 0, reverse=True))


def add_constants(a: QParams, b: QParams, out: QParams) -> tuple[Array, Array, Array]:
    """``r_a``, ``r_b`` and the constant part of :func:`add`, float32, of grids in bytes (:func:`fxq.numerics.in_bytes`)."""
    ra, rb = F4(a.scale) / F4(out.scale), F4(b.scale) / F4(out.scale)
    return ra, rb, F4(int(out.zero_point)) - _fma(ra, F4(int(a.zero_point)), rb * F4(int(b.zero_point)))


def add(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """QLinearAdd: ``rne(fma(r_a, a, fma(r_b, b, z_c - fma(r_a, z_a, r_b*z_b))))`` with ``r = s / s_c``; a scalar operand comes last."""
    a, b = map(in_bytes, xs)
    if first_is_scalar(a.codes.shape, b.codes.shape):
        a, b = b, a
    given, qp = qp, numerics.in_bytes(qp)
    ra, rb, fixed = add_constants(a.qp, b.qp, qp)
    return from_bytes(_saturate(_fma(ra, a.codes.numpy(), _fma(rb, b.codes.numpy(), fixed)), qp), given)


def mul(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """QLinearMul: ``rne(fl((a-z_a)*(b-z_b)) * fl(fl(s_a*s_b)/s_c) + z_c)``; the zero point is added before rounding."""
    a, b = xs
    zero = F4(int(qp.zero_point) - min(qp.spec.qmin, 0))  # signed grids run as unsigned ones
    product = (a.centred() * b.centred()).numpy().astype(F4)
    real = product * (F4(F4(a.qp.scale) * F4(b.qp.scale)) / F4(qp.scale)) + zero
    return _saturate(np.rint(real) + min(qp.spec.qmin, 0), qp)


def hardsigmoid(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """A saturating add of the constant 3 onto the grid six times as wide; the readers take the codes with the narrow scale."""
    wide = QParams(qp.spec, qp.scale * 6.0, qp.zero_point)
    return add(module, [xs[0], constant(3.0, wide, xs[0].codes.ndim)], wide)


# ---------------------------------------------------------------- tables, pooling


def table(fn: Callable[[Array], Array], x: Codes, qp: QParams) -> Tensor:
    """A pointwise function as a table over all codes: dequantize, apply in float32, quantize."""
    spec = x.qp.spec
    codes = torch.arange(spec.qmin, spec.qmax + 1)
    real = fn(Codes(codes, x.qp).real().numpy()).astype(F4)
    return numerics.quantize(torch.from_numpy(real), qp)[x.codes.long() - spec.qmin]


_NUMERATOR = (4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 2.48287947061529e-01)
_DENOMINATOR = (6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03, 1.16817656904453e-01, 9.93151921023180e-01)


def logistic(x: Array) -> Array:
    """The rational approximation of the logistic function (Eigen's, which MLAS uses) with its float32 roundings; float32 in and out."""
    x = np.clip(x, F4(-18), F4(18))
    square = x * x

    def polynomial(coefficients: Sequence[float]) -> Array:
        value: Array = np.full_like(square, coefficients[0])
        for c in coefficients[1:]:
            value = _fma(value, square, F4(c))
        return value

    return np.clip(polynomial(_NUMERATOR) * x / polynomial(_DENOMINATOR) + F4(0.5), F4(0), F4(1))


def sigmoid(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """QLinearSigmoid."""
    return table(logistic, xs[0], qp)


def leaky_relu(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """QLinearLeakyRelu; a ReLU that no grid absorbed is one of slope 0."""
    slope = F4(getattr(module, "negative_slope", 0.0))
    return table(lambda t: np.where(t >= 0, t, slope * t), xs[0], qp)


def global_avg_pool(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """QLinearGlobalAveragePool: integer sum times ``fl(s_x / fl(s_y * n))``."""
    x = xs[0]
    dims = tuple(range(2, x.codes.ndim))
    n = int(np.prod([x.codes.shape[d] for d in dims]))
    acc = x.centred().sum(dims, keepdim=True)
    real = acc.to(torch.float32).numpy() * (F4(x.qp.scale) / F4(F4(qp.scale) * F4(n)))
    return torch.from_numpy(numerics.requantize(real, qp.spec, int(qp.zero_point)))


# ---------------------------------------------------------------- movers


def cat(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """QLinearConcat: each part through a table onto the common grid."""
    assert isinstance(module, m.Cat)
    return torch.cat([x.onto(qp) for x in xs], module.dim)


def move(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """Operations that only move codes (max pool, reshape, permute, slice, gather, nearest resize); exact in float32."""
    x = xs[0]
    moved: Tensor = module(x.codes.to(torch.float32))
    return Codes(moved.to(x.codes.dtype), x.qp).onto(qp)


def pad(module: nn.Module, xs: Sequence[Codes], qp: QParams) -> Tensor:
    """Padding with 0 writes the code of 0; other modes copy codes."""
    assert isinstance(module, m.Pad)
    x = xs[0]
    value = float(numerics.quantize(torch.zeros(()), x.qp)) if module.mode == "constant" else None  # on a binary grid 1
    moved = torch.nn.functional.pad(x.codes.to(torch.float32), module.pads, module.mode, value)
    return Codes(moved.to(x.codes.dtype), x.qp).onto(qp)


def part(module: nn.Module, index: int, x: Codes, qp: QParams) -> Tensor:
    """Part ``index`` of a split."""
    return Codes(module(x.codes)[index], x.qp).onto(qp)


Kernel = Callable[[nn.Module, Sequence[Codes], QParams], Tensor]
KERNELS: dict[str, Kernel] = {
    "conv": weighted, "linear": weighted, "matmul": matmul, "add": add, "mul": mul, "hardsigmoid": hardsigmoid,
    "sigmoid": sigmoid, "leaky_relu": leaky_relu, "relu": leaky_relu, "global_avg_pool": global_avg_pool, "cat": cat, "pad": pad,
    **dict.fromkeys(("max_pool", "reshape", "permute", "slice", "index_select", "resize"), move),
}  # fmt: skip
FLOAT_OUTPUT = ("linear", "matmul")
BINARY = ("add", "mul")
MOVERS = ("max_pool", "reshape", "permute", "slice", "index_select", "resize", "pad", "cat", "getitem")


# ---------------------------------------------------------------- which nodes run on codes


def _is_grid(gm: GraphModule, n: Any) -> bool:
    return isinstance(n, Node) and kind(gm, n) == "fake_quantize"


def is_integer(gm: GraphModule, n: Node) -> bool:
    """The node reads grids only and has a kernel."""
    k = kind(gm, n)
    if not n.meta.get("integer") or n.kwargs:
        return False
    if k == "getitem":
        split = n.args[0]
        return isinstance(split, Node) and kind(gm, split) == "split" and _is_grid(gm, split.args[0])
    if k not in KERNELS or not all(_is_grid(gm, a) or isinstance(a, (int, float)) for a in n.args):
        return False
    module: Any = module_of(gm, n)
    if k in m.WEIGHTED:
        fits = isinstance(module, m.Quantized) and module.weight_grid.spec.bits <= 8
        return fits and module.dynamic is None and (module.op.bias is None or module.bias_grid is not None)
    if k == "resize":
        return bool(module.mode.startswith("nearest"))
    return k != "pad" or module.mode != "constant" or module.value == 0


def moved(gm: GraphModule, node: Node) -> list[Node]:
    """The ``fake_quantize`` nodes whose codes an integer ``node`` moves; none when it does more than that."""
    if kind(gm, node) not in MOVERS or not is_integer(gm, node):
        return []
    source = node.all_input_nodes[0]
    return source.all_input_nodes if kind(gm, node) == "getitem" else node.all_input_nodes


def keeps_grid(gm: GraphModule, fq: Node) -> bool:
    """Does the ``fake_quantize`` node stand behind an integer mover of values that are on its grid already?"""
    grid: Any = module_of(gm, fq)
    inputs: list[Any] = [module_of(gm, n) for n in moved(gm, fq.all_input_nodes[0])]
    return bool(inputs) and all(i.qparams.same_grid(grid.rounding) for i in inputs)


def gives_sign(gm: GraphModule, layer: Node) -> bool:
    """Is it an integer weighted layer whose only reader is a binary grid? Such a layer gives the sign of its integer sum."""
    users = list(layer.users)
    if kind(gm, layer) not in m.WEIGHTED or len(users) != 1 or not _is_grid(gm, users[0]) or not is_integer(gm, layer):
        return False
    fq: Any = module_of(gm, users[0])
    return bool(fq.spec.kind == "binary")


def can_vanish(module: m.Quantized, x: QParams) -> bool:
    """Can an integer sum of the layer be 0? Not where its bias is no multiple of what all weights of the filter are multiples of, or too large.

    Args:
        module: conv or linear layer with int32 bias.
        x: grid of its input.
    """
    wq, bias = module.weight_grid.qparams, module.bias_codes()
    codes = module.weight_codes().to(torch.int64)
    w = (codes - numerics.along(wq.zero_point, wq.spec.axis, codes.ndim)).flatten(1)
    if bias is None:
        return True
    divisor = torch.from_numpy(np.gcd.reduce(w.numpy(), axis=1))
    lo, hi = _span(x)
    most = torch.maximum(w * hi, w * lo).clamp(min=0).sum(1) + bias
    least = torch.minimum(w * hi, w * lo).clamp(max=0).sum(1) + bias
    multiple = torch.where(divisor == 0, bias == 0, bias % divisor.clamp(min=1) == 0)
    return bool((multiple & (least <= 0) & (most >= 0)).any())
