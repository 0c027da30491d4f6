"""Canonical operations and quantized modules: the vocabulary of every graph after ``canonicalize``.

Each operation of a canonical graph is a ``call_module`` of a ``torch.nn`` layer or of one class below; whatever has
no canonical form stays a ``call_function``/``call_method`` and is an opaque float operation. ``None`` in a shape
means "the size of the input in this place" (a batch-dependent dimension); ``-1`` is computed, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq import numerics
from fxq.convolutions import CHANNEL_AFFINE, PADDED
from fxq.shared import SHARED, SharedWeight
from fxq.spec import QParams, QuantSpec


class Op(nn.Module):
    """Base of the stateless canonical operations; ``fields`` are the constructor's arguments, in order."""

    fields: tuple[str, ...] = ()

    def extra_repr(self) -> str:
        return ", ".join(f"{f}={getattr(self, f)}" for f in self.fields)


class Add(Op):
    """``a + b``; a Python scalar may stand for one side."""

    def forward(self, a: Any, b: Any) -> Tensor:
        return torch.as_tensor(a + b)


class Sub(Op):
    """``a - b``."""

    def forward(self, a: Any, b: Any) -> Tensor:
        return torch.as_tensor(a - b)


class Mul(Op):
    """``a * b``."""

    def forward(self, a: Any, b: Any) -> Tensor:
        return torch.as_tensor(a * b)


class Div(Op):
    """``a / b``, true division."""

    def forward(self, a: Any, b: Any) -> Tensor:
        return torch.as_tensor(a / b)


class MatMul(Op):
    """``torch.matmul(a, b)``."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


class Cat(Op):
    """Concatenate along ``dim`` (non-negative)."""

    fields = ("dim",)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.dim)


class Reshape(Op):
    """``x.reshape(shape)``; ``None`` copies the input's size in that place, one ``-1`` is computed."""

    fields = ("shape",)

    def __init__(self, shape: Sequence[int | None]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape([x.shape[i] if s is None else s for i, s in enumerate(self.shape)])


class Expand(Op):
    """``x.expand(shape)``; ``-1`` keeps a size."""

    fields = ("shape",)

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(self.shape)


class Permute(Op):
    """``x.permute(dims)``."""

    fields = ("dims",)

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class Slice(Op):
    """Strided slices; ``slices`` holds ``(dim, start, stop or None, step > 0)``, one entry a dimension."""

    fields = ("slices",)

    def __init__(self, slices: Sequence[tuple[int, int, int | None, int]]) -> None:
        super().__init__()
        self.slices = tuple(slices)

    def forward(self, x: Tensor) -> Tensor:
        index: list[slice] = [slice(None)] * x.ndim
        for dim, start, stop, step in self.slices:
            index[dim] = slice(start, stop, step)
        return x[tuple(index)]


class IndexSelect(Op):
    """``x.index_select(dim, indices)`` with constant indices: gathers, rolls, flips, channel shuffles."""

    fields = ("dim",)
    indices: Tensor

    def __init__(self, dim: int, indices: Sequence[int] | Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("indices", torch.as_tensor(indices, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.indices)


class Split(Op):
    """``torch.split(x, sizes, dim)``: a tuple; ``operator.getitem`` nodes take the parts. A number: so many equal parts (of the batch)."""

    fields = ("sizes", "dim")

    def __init__(self, sizes: Sequence[int] | int, dim: int) -> None:
        super().__init__()
        self.sizes, self.dim = sizes if isinstance(sizes, int) else tuple(sizes), dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.chunk(x, self.sizes, self.dim) if isinstance(self.sizes, int) else torch.split(x, list(self.sizes), self.dim))


class Pad(Op):
    """``F.pad(x, pads, mode, value)``; ``pads`` in torch's order, last dimension first."""

    fields = ("pads", "mode", "value")

    def __init__(self, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> None:
        super().__init__()
        self.pads, self.mode, self.value = tuple(pads), mode, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, self.mode, self.value if self.mode == "constant" else None)


class Resize(Op):
    """``F.interpolate`` to a fixed spatial ``size`` or by ``scale``; antialias is not canonical."""

    fields = ("size", "scale", "mode", "align_corners")

    def __init__(self, size: Sequence[int] | None, scale: Sequence[float] | None, mode: str, align_corners: bool | None = None) -> None:
        super().__init__()
        self.size = None if size is None else tuple(size)
        self.scale = None if scale is None else tuple(scale)
        self.mode, self.align_corners = mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = None if self.size is None else list(self.size)
        scale = None if self.scale is None else list(self.scale)
        return F.interpolate(x, size, scale, self.mode, self.align_corners)


class Mean(Op):
    """``x.mean(dims, keepdim)``."""

    fields = ("dims", "keepdim")

    def __init__(self, dims: Sequence[int], keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = tuple(dims), keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, self.keepdim)


class Sum(Mean):
    """``x.sum(dims, keepdim)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.dims, self.keepdim)


class GlobalAvgPool(Op):
    """Mean over all spatial dimensions of ``[N, C, *spatial]``, kept as size 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.ndim)), keepdim=True)


class Clamp(Op):
    """``clamp(x, lo, hi)``; ReLU6 is ``Clamp(0, 6)``. ``None`` leaves a side open."""

    fields = ("lo", "hi")

    def __init__(self, lo: float | None, hi: float | None) -> None:
        super().__init__()
        self.lo, self.hi = lo, hi

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.lo, self.hi)


class Unary(Op):
    """A pointwise torch function without arguments: ``exp``, ``sqrt``, ``rsqrt``, ``abs``, ``neg``, ``log``, ``erf``, ..."""

    fields = ("fn",)

    def __init__(self, fn: str) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(torch, self.fn)(x)
        return out


class Power(Op):
    """``x ** exponent`` with a constant exponent."""

    fields = ("exponent",)

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        return torch.pow(x, self.exponent)


def call_with(op: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a conv, transposed conv or linear module with other weights than its own."""
    if isinstance(op, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(op, nn.modules.conv._ConvTransposeNd):
        fn: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
        args = (op.stride, op.padding, op.output_padding, op.groups, op.dilation)
        return torch.as_tensor(fn(x, weight, bias, *args))
    y: Tensor = op._conv_forward(x, weight, bias)  # type: ignore[operator]
    return y


class FakeQuantize(nn.Module):
    """Rounds a tensor onto a grid and back: what a Q/DQ pair computes. Differentiable (straight-through).

    Buffers ``scale`` (float32) and ``zero_point`` (int32); ``spec`` is the grid's codes. ``quantizing`` switches the
    rounding, independent of ``train()``/``eval()``.

    Attributes:
        step: buffer, what values are divided by where it is another scale than ``scale``, by which readers multiply the codes; or ``None``.
    """

    scale: Tensor
    zero_point: Tensor
    step: Tensor | None

    def __init__(self, qparams: QParams, grid: str = "", step: Tensor | None = None) -> None:
        super().__init__()
        self.spec: QuantSpec = qparams.spec
        self.grid, self.quantizing = grid, True
        self.register_buffer("scale", qparams.scale.clone())
        self.register_buffer("zero_point", qparams.zero_point.clone())
        self.register_buffer("step", None if step is None else step.clone())

    @property
    def qparams(self) -> QParams:
        """The grid as data, as its readers see it."""
        return QParams(self.spec, self.scale, self.zero_point)

    @property
    def rounding(self) -> QParams:
        """The grid that values are rounded to: that of :attr:`qparams` with the scale ``step``."""
        return self.qparams if self.step is None else QParams(self.spec, self.step, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantizing:
            return x
        if self.step is None:
            return numerics.fake_quantize_with(x, self.scale, self.zero_point, self.spec)
        return numerics.fake_quantize_with(x, self.step, self.zero_point, self.spec, self.scale)

    def extra_repr(self) -> str:
        return str(self.qparams) if self.step is None else f"{self.qparams}, step {float(self.step):.6g}"


class Wrapper(nn.Module):
    """A module that stands for the operation ``op`` inside it: its kind is that of ``op``."""

    op: nn.Module

    def extra_repr(self) -> str:
        return self.op.said if isinstance(self.op, SharedWeight) else ""


class Quantized(Wrapper):
    """A weighted module (``op``: conv, transposed conv, linear) with its weight, and with it its bias, on a grid.

    Attributes:
        op: the float module; its parameters stay trainable and are never edited.
        weight_grid: :class:`FakeQuantize` of the weight.
        bias_grid: grid of the int32 bias (scale ``s_a * s_w``), or ``None`` for a float bias.
        dynamic: grid of an activation that is measured at every call (``dynamic_w8``), or ``None``.
    """

    def __init__(
        self,
        op: nn.Module,
        weight: QParams,
        bias: QParams | None = None,
        dynamic: QuantSpec | None = None,
    ) -> None:
        super().__init__()
        self.op = op
        self.weight_grid = FakeQuantize(weight)
        self.bias_grid: FakeQuantize | None = None if bias is None else FakeQuantize(bias)
        self.dynamic = dynamic

    def weight_codes(self) -> Tensor:
        """Integer codes of the weight, its shape, dtype of its grid."""
        w: Tensor = self.op.weight  # type: ignore[assignment]
        return numerics.quantize(w.detach(), self.weight_grid.qparams)

    def bias_codes(self) -> Tensor | None:
        """int32 codes of the bias, or ``None`` when the bias is float or absent."""
        b = self.op.bias
        if self.bias_grid is None or b is None:
            return None
        return numerics.quantize_bias(b, self.bias_grid.qparams)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        w: Tensor = self.op.weight  # type: ignore[assignment]
        b: Tensor | None = self.op.bias  # type: ignore[assignment]
        if self.dynamic is not None:
            x = numerics.fake_quantize(x, numerics.choose_qparams(x.amin(), x.amax(), self.dynamic))
        if b is not None and self.bias_grid is not None:
            b = self.bias_grid(b)
        return call_with(self.op, x, self.weight_grid(w), b)


KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv", nn.Conv2d: "conv", nn.Conv3d: "conv", nn.Linear: "linear",
    nn.ConvTranspose1d: "conv_transpose", nn.ConvTranspose2d: "conv_transpose", nn.ConvTranspose3d: "conv_transpose",
    nn.BatchNorm1d: "batch_norm", nn.BatchNorm2d: "batch_norm", nn.BatchNorm3d: "batch_norm",
    nn.LayerNorm: "layer_norm", nn.GroupNorm: "group_norm",
    nn.InstanceNorm1d: "instance_norm", nn.InstanceNorm2d: "instance_norm", nn.InstanceNorm3d: "instance_norm",
    nn.ReLU: "relu", Clamp: "clamp", nn.LeakyReLU: "leaky_relu", nn.PReLU: "prelu", nn.ELU: "elu", nn.SELU: "selu",
    nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid", nn.Hardswish: "hardswish", nn.SiLU: "silu", nn.Mish: "mish",
    nn.Tanh: "tanh", nn.GELU: "gelu", nn.Softplus: "softplus", nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax",
    nn.MaxPool1d: "max_pool", nn.MaxPool2d: "max_pool", nn.MaxPool3d: "max_pool",
    nn.AvgPool1d: "avg_pool", nn.AvgPool2d: "avg_pool", nn.AvgPool3d: "avg_pool",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool", nn.AdaptiveAvgPool2d: "adaptive_avg_pool",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool", nn.AdaptiveMaxPool2d: "adaptive_max_pool",
    nn.Embedding: "embedding", nn.PixelShuffle: "pixel_shuffle",
    Add: "add", Sub: "sub", Mul: "mul", Div: "div", MatMul: "matmul", Cat: "cat", Reshape: "reshape", Expand: "expand",
    Permute: "permute", Slice: "slice", IndexSelect: "index_select", Split: "split", Pad: "pad", Resize: "resize",
    Mean: "mean", Sum: "sum", GlobalAvgPool: "global_avg_pool", Unary: "unary", Power: "power",
    **dict.fromkeys((*PADDED, *CHANNEL_AFFINE), "conv"), FakeQuantize: "fake_quantize",
}  # fmt: skip
KINDS.update({made: KINDS[plain] for plain, made in SHARED.items()})

WEIGHTED = ("conv", "conv_transpose", "linear")


def kind_of(module: nn.Module) -> str:
    """Canonical kind of a module (``conv``, ``add``, ``fake_quantize``, ...); ``opaque`` when it has none."""
    if isinstance(module, Wrapper):
        return kind_of(module.op)
    if isinstance(module, FakeQuantize):
        return "fake_quantize"
    return KINDS.get(type(module), "opaque")
