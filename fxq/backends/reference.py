"""The integer reference: integer-only arithmetic that equals ONNX Runtime's fused kernels on the same codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxq import modules as m
from fxq import numerics
from fxq.graph import data_inputs, kind, module_of
from fxq.spec import QParams

EXACT = float(1 << 24)
F4 = np.float32
MOVERS = ("max_pool", "reshape", "permute", "slice", "index_select", "resize", "pad", "getitem", "cat", "split")


class Codes:
    """An integer tensor on its grid."""

    def __init__(self, codes: Tensor, qp: QParams) -> None:
        self.codes, self.qp = codes, qp

    def centred(self) -> Tensor:
        """Codes minus zero point, float32 (exact)."""
        return self.codes.to(torch.float32) - float(self.qp.zero_point)

    def real(self) -> Tensor:
        """Dequantized float32 values."""
        return numerics.dequantize(self.codes, self.qp)


class Pending:
    """An operation whose result is still an exact accumulator or waits for its output grid."""

    def __init__(self, node: Node, args: tuple[Any, ...]) -> None:
        self.node, self.args = node, args


class Reference(Interpreter):
    """Runs a converted graph on codes. ``watch`` collects the codes of every fake-quantizer by its path."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.gm = gm
        self.watch: dict[str, Tensor] = {}

    def __call__(self, *inputs: Any) -> Any:
        """Outputs of the model as dequantized float32 tensors."""
        self.watch = {}
        with torch.inference_mode():
            return torch.utils._pytree.tree_map(_float, self.run(*inputs))

    def run_node(self, n: Node) -> Any:
        k = kind(self.gm, n)
        if k in ("input", "attr", "output"):
            return super().run_node(n)
        args = self.map_nodes_to_values(n.args, n)
        if k == "fake_quantize":
            out = self.round(n, args[0])
            self.watch[str(n.target)] = out.codes
            return out
        if n.meta.get("integer") and self._fused(n, k):
            pending = Pending(n, args)
            if k == "linear" and not self._rounded(n):
                acc, scale = _accumulate(module_of(self.gm, n), args[0])  # type: ignore[arg-type]
                return acc.to(torch.float32) * scale
            if k in ("split", "getitem"):
                return _move(module_of(self.gm, n) if k == "split" else None, n, args)
            return pending
        floats = torch.utils._pytree.tree_map(_float, args)
        if n.op == "call_module":
            return module_of(self.gm, n)(*floats)
        return getattr(self, n.op)(n.target, floats, torch.utils._pytree.tree_map(_float, self.map_nodes_to_values(n.kwargs, n)))

    def map_nodes_to_values(self, args: Any, n: Node) -> Any:
        return torch.fx.node.map_arg(args, lambda a: self.env[a])

    def _rounded(self, n: Node) -> bool:
        return any(kind(self.gm, u) == "fake_quantize" for u in n.users)

    def _fused(self, n: Node, k: str) -> bool:
        return all(isinstance(self.env[a], (Codes, tuple)) for a in data_inputs(n)) and (k in KERNELS or k in MOVERS or k in m.WEIGHTED)

    def round(self, n: Node, value: Any) -> Codes:
        """Give a value its output grid: the epilogue of a fused kernel, or plain QuantizeLinear."""
        fq = module_of(self.gm, n)
        assert isinstance(fq, m.FakeQuantize)
        qp = fq.qparams
        if isinstance(value, Codes):
            return value if value.qp.same_grid(qp) else Codes(numerics.quantize(value.real(), qp), qp)
        if not isinstance(value, Pending):
            return Codes(numerics.quantize(_float(value), qp), qp)
        node, args = value.node, value.args
        module, k = module_of(self.gm, node), kind(self.gm, node)
        if k in m.WEIGHTED:
            acc, scale = _accumulate(module, args[0])  # type: ignore[arg-type]
            real = acc.to(torch.float32).numpy() * (scale / qp.scale).numpy()
            return Codes(torch.from_numpy(numerics.requantize(real, qp.spec, int(qp.zero_point))), qp)
        if k in MOVERS:
            return Codes(_requantized(_move(module, node, args), qp), qp)
        operands = [a if isinstance(a, Codes) else _scalar(a, qp) for a in args]
        return Codes(KERNELS[k](module, operands, qp), qp)


def _float(v: Any) -> Any:
    return v.real() if isinstance(v, Codes) else v


def _scalar(value: float, qp: QParams) -> Codes:
    v = torch.tensor(float(value))
    grid = numerics.choose_qparams(v, v, qp.spec)
    return Codes(numerics.quantize(v, grid), grid)


def _accumulate(module: m.Quantized, x: Codes) -> tuple[Tensor, Tensor]:
    """Exact integer sums (with bias) of a weighted layer and the float32 scale ``fl(s_x * s_w)``, broadcastable."""
    op, wq = module.op, module.weight_grid.qparams
    w = module.weight_codes().to(torch.float32) - numerics.along(wq.zero_point.to(torch.float32), wq.spec.axis, op.weight.ndim)  # type: ignore[arg-type]
    a = x.centred()
    top = max(abs(x.qp.spec.qmin - int(x.qp.zero_point)), abs(x.qp.spec.qmax - int(x.qp.zero_point)))
    dims = tuple(range(1, w.ndim))
    dtype = torch.float32 if float(w.abs().sum(dims).max()) * top < EXACT else torch.float64
    acc = m.call_with(op, a.to(dtype), w.to(dtype), None).to(torch.int64)
    shape = [1] * acc.ndim
    shape[-1 if isinstance(op, nn.Linear) else 1] = -1
    bias = module.bias_codes()
    if bias is not None:
        acc = acc + bias.to(torch.int64).reshape(shape)
    scale = x.qp.scale * wq.scale
    return acc, scale.reshape(shape) if scale.ndim else scale


def _move(module: nn.Module | None, node: Node, args: tuple[Any, ...]) -> Any:
    """Movers work on codes; a list of Codes for a concatenation, padding writes the zero point."""
    if module is None:
        return args[0][args[1]]
    if isinstance(module, m.Cat):
        return list(args), module.dim
    x: Codes = args[0]
    if isinstance(module, m.Pad):
        out = torch.nn.functional.pad(x.codes, module.pads, "constant", int(x.qp.zero_point))
        return Codes(out, x.qp)
    if isinstance(module, m.Split):
        return tuple(Codes(p, x.qp) for p in module(x.codes))
    return Codes(module(x.codes.to(torch.float32)).to(x.codes.dtype), x.qp)


def _requantized(value: Any, qp: QParams) -> Tensor:
    if isinstance(value, Codes):
        return value.codes if value.qp.same_grid(qp) else numerics.quantize(value.real(), qp)
    parts, dim = value
    return torch.cat([p.codes if p.qp.same_grid(qp) else numerics.quantize(p.real(), qp) for p in parts], dim)


def _fma(r: Any, x: Any, c: Any) -> Any:
    """``r*x + c`` with one rounding to float32 (the product of a float32 and a code is exact in float64)."""
    return (np.float64(r) * np.asarray(x, np.float64) + np.asarray(c, np.float64)).astype(F4)


def _clip(real: Any, qp: QParams) -> Tensor:
    dtype = np.int8 if qp.spec.qmin < 0 else np.uint8
    return torch.from_numpy(np.clip(np.rint(real), qp.spec.qmin, qp.spec.qmax).astype(dtype))


def _add(module: nn.Module, xs: list[Codes], qp: QParams) -> Tensor:
    a, b = xs
    if b.codes.numel() == 1 < a.codes.numel() and a.codes.shape[-1] == 1:
        a, b = b, a  # measured: the runtime takes a scalar operand first when the last dimension is 1; the roundings follow
    sc = F4(qp.scale)
    ra, rb = F4(a.qp.scale) / sc, F4(b.qp.scale) / sc
    fixed = F4(int(qp.zero_point)) - _fma(ra, F4(int(a.qp.zero_point)), rb * F4(int(b.qp.zero_point)))
    return _clip(_fma(ra, a.codes.numpy(), _fma(rb, b.codes.numpy(), fixed)), qp)


def _mul(module: nn.Module, xs: list[Codes], qp: QParams) -> Tensor:
    a, b = xs
    product = (a.centred() * b.centred()).numpy()
    return _clip(product * (F4(F4(a.qp.scale) * F4(b.qp.scale)) / F4(qp.scale)) + F4(int(qp.zero_point)), qp)


def _table(fn: Callable[[Any], Any], x: Codes, qp: QParams) -> Tensor:
    """A pointwise function as a table over all codes, as the runtime builds it."""
    codes = np.arange(x.qp.spec.qmin, x.qp.spec.qmax + 1)
    real = (codes.astype(F4) - F4(int(x.qp.zero_point))) * F4(x.qp.scale)
    table = np.clip(np.rint(fn(real).astype(F4) / F4(qp.scale)) + int(qp.zero_point), qp.spec.qmin, qp.spec.qmax)
    return torch.from_numpy(table)[x.codes.long() - x.qp.spec.qmin].to(qp.spec.dtype)


def _sigmoid(module: nn.Module, xs: list[Codes], qp: QParams) -> Tensor:
    return _table(lambda t: 1 / (1 + np.exp(-t.astype(np.float64))), xs[0], qp)


def _leaky(module: nn.Module, xs: list[Codes], qp: QParams) -> Tensor:
    slope = F4(getattr(module, "negative_slope", 0.0))
    return _table(lambda t: np.where(t >= 0, t, slope * t), xs[0], qp)


def _hardsigmoid(module: nn.Module, xs: list[Codes], qp: QParams) -> Tensor:
    wide = QParams(qp.spec, qp.scale * 6.0, qp.zero_point)
    return _add(module, [xs[0], _scalar(3.0, wide)], wide)


def _global_avg_pool(module: nn.Module, xs: list[Codes], qp: QParams) -> Tensor:
    x = xs[0]
    dims = tuple(range(2, x.codes.ndim))
    n = int(np.prod([x.codes.shape[d] for d in dims]))
    acc = (x.codes.to(torch.int64) - int(x.qp.zero_point)).sum(dims, keepdim=True)
    real = acc.to(torch.float32).numpy() * (F4(x.qp.scale) / F4(F4(qp.scale) * F4(n)))
    return torch.from_numpy(numerics.requantize(real, qp.spec, int(qp.zero_point)))


KERNELS: dict[str, Callable[[nn.Module, list[Codes], QParams], Tensor]] = {
    "add": _add,
    "mul": _mul,
    "sigmoid": _sigmoid,
    "leaky_relu": _leaky,
    "relu": _leaky,
    "hardsigmoid": _hardsigmoid,
    "global_avg_pool": _global_avg_pool,
}
