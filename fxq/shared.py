"""Layers whose weights are shared: a small codebook and, for each weight, the number of its entry (Han et al. 2016, arXiv 1510.00149, section 3)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxq.convolutions import PaddedConv1d, PaddedConv2d, PaddedConv3d

MOST = (1 << 15) - 1
"""Greatest number of entries of a codebook: codes are int16 at most."""


class _Lookup(torch.autograd.Function):
    """``table[codes]``; the gradient of an entry is the sum of those of its weights (section 3.3, equation 3)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.entries = len(table)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        sums = torch.zeros(ctx.entries, dtype=torch.float64, device=grad.device)
        sums.index_add_(0, codes.reshape(-1).to(torch.int32), grad.reshape(-1).double())
        return sums.to(grad.dtype), None


def lookup(table: Tensor, codes: Tensor) -> Tensor:
    """``table[codes]``, differentiable in ``table``: gradients are summed in float64 per entry.

    Args:
        table: ``[K]``. codes: integers in ``[0, K)``, any shape.
    """
    found: Tensor = _Lookup.apply(table, codes)
    return found


class SharedWeight(nn.Module):
    """Mix-in of a conv, transposed conv or linear layer: ``weight = table[codes] * rows``, computed at every call, differentiable.

    Attributes:
        codes: buffer, uint8 (int16 for more than 256 entries), shape of the weight; 0 stands for a weight of 0, which stays 0 in training.
        book: parameter, float32 ``[K]``: code ``i`` stands for ``book[i - 1]``.
        rows: a factor for each index along ``axis``, float32 ``[C]`` (a batch norm that was folded in, or the scale of an integer grid), or ``None``.
        axis: of the output channels: 0, of transposed convs 1.
    """

    codes: Tensor
    book: nn.Parameter
    rows: Tensor | None
    axis: int

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.said}"

    @property
    def said(self) -> str:
        """The sharing in words."""
        return f"{len(self.book)} shared values"

    @property
    def table(self) -> Tensor:
        """``[K + 1]``: 0, then the codebook."""
        return torch.cat([self.book.new_zeros(1), self.book])

    def dense(self) -> Tensor:
        """The layer's weight, float32."""
        w = lookup(self.table, self.codes)
        if self.rows is None:
            return w
        return w * self.rows.reshape([-1 if d == self.axis else 1 for d in range(w.ndim)])

    weight: Any = property(dense)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        book, codes = state_dict.get(prefix + "book"), state_dict.get(prefix + "codes")
        if isinstance(book, Tensor) and isinstance(codes, Tensor) and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= book.numel():
            args[-1].append(f"a code of {prefix}codes is outside [0, {book.numel()}], the entries of {prefix}book")
            return
        if isinstance(book, Tensor) and book.ndim == 1 and len(book) <= MOST and book.shape != self.book.shape:
            self.book.data = self.book.new_zeros(book.shape)  # clustered again, a layer may have another number of values
        if isinstance(codes, Tensor) and codes.dtype != self.codes.dtype and codes.dtype in (torch.uint8, torch.int16):
            self.codes = self.codes.to(codes.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SharedConv1d(SharedWeight, nn.Conv1d):
    """Conv1d with a shared weight."""


class SharedConv2d(SharedWeight, nn.Conv2d):
    """Conv2d with a shared weight."""


class SharedConv3d(SharedWeight, nn.Conv3d):
    """Conv3d with a shared weight."""


class SharedConvTranspose1d(SharedWeight, nn.ConvTranspose1d):
    """ConvTranspose1d with a shared weight."""


class SharedConvTranspose2d(SharedWeight, nn.ConvTranspose2d):
    """ConvTranspose2d with a shared weight."""


class SharedConvTranspose3d(SharedWeight, nn.ConvTranspose3d):
    """ConvTranspose3d with a shared weight."""


class SharedLinear(SharedWeight, nn.Linear):
    """Linear layer with a shared weight."""


class SharedPaddedConv1d(SharedWeight, PaddedConv1d):
    """Conv1d with its own padding on each side and a shared weight."""


class SharedPaddedConv2d(SharedWeight, PaddedConv2d):
    """Conv2d with its own padding on each side and a shared weight."""


class SharedPaddedConv3d(SharedWeight, PaddedConv3d):
    """Conv3d with its own padding on each side and a shared weight."""


SHARED: dict[type[nn.Module], type[SharedWeight]] = {
    nn.Conv1d: SharedConv1d, nn.Conv2d: SharedConv2d, nn.Conv3d: SharedConv3d, nn.Linear: SharedLinear,
    nn.ConvTranspose1d: SharedConvTranspose1d, nn.ConvTranspose2d: SharedConvTranspose2d, nn.ConvTranspose3d: SharedConvTranspose3d,
    PaddedConv1d: SharedPaddedConv1d, PaddedConv2d: SharedPaddedConv2d, PaddedConv3d: SharedPaddedConv3d,
}  # fmt: skip
"""Type of a layer -> its type with a shared weight."""


def _copied(layer: nn.Module, cls: type[nn.Module]) -> Any:
    """A layer of type ``cls`` with all that ``layer`` has; the tensors are the same objects."""
    out: Any = cls.__new__(cls)
    out.__dict__.update({k: (copy.copy(v) if isinstance(v, (dict, set)) else v) for k, v in layer.__dict__.items()})
    return out


def _set_rows(layer: nn.Module, rows: Tensor | None, train: bool) -> None:
    """Give a layer factors (a copy, float32): a parameter if they train, otherwise a buffer."""
    factor = None if rows is None else rows.detach().to(torch.float32).clone()
    if factor is not None and train:
        layer.register_parameter("rows", nn.Parameter(factor))
    else:
        layer.register_buffer("rows", factor)


def shared(op: nn.Module, codes: Tensor, book: Tensor, rows: Tensor | None = None, *, train_rows: bool = True) -> SharedWeight:
    """The layer ``op`` (its bias is shared, not copied) with the weight ``[0, *book][codes] * rows``. The codebook trains if the weight did.

    Args:
        op: of a type in :data:`SHARED`.
        codes: integers in ``[0, K]``, shape of the weight. book: float ``[K]``, ``K`` at most :data:`MOST`.
        rows: float ``[C]`` along the output channels. train_rows: they are a parameter; otherwise a buffer.

    Raises:
        KeyError: for another type. ValueError: when a code has no entry, or shapes do not fit.
    """
    cls, weight = SHARED[type(op)], op.weight
    assert isinstance(weight, Tensor)
    axis = 1 if isinstance(op, nn.modules.conv._ConvTransposeNd) else 0
    if codes.shape != weight.shape or book.ndim != 1 or len(book) > MOST or (rows is not None and rows.shape != weight.shape[axis : axis + 1]):
        raise ValueError(f"codes {list(codes.shape)}, book {list(book.shape)} do not fit the weight {list(weight.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= len(book):
        raise ValueError(f"a code is outside [0, {len(book)}]")
    out = _copied(op, cls)
    del out._parameters["weight"]
    out.axis = axis
    out.register_parameter("book", nn.Parameter(book.detach().to(torch.float32).clone(), weight.requires_grad))
    out.register_buffer("codes", codes.detach().to(torch.uint8 if len(book) < 256 else torch.int16).contiguous())
    _set_rows(out, rows, train_rows)
    return out  # type: ignore[no-any-return]


def plain(layer: SharedWeight) -> nn.Module:
    """The layer with an ordinary weight (a new parameter) of the same values."""
    cls = next(k for k, v in SHARED.items() if v is type(layer))
    out = _copied(layer, cls)
    for name in ("book", "codes", "rows"):
        out._parameters.pop(name, None)
        out._buffers.pop(name, None)
    del out.__dict__["axis"]
    bias = out._parameters.pop("bias")
    out.register_parameter("weight", nn.Parameter(layer.weight.detach().clone(), layer.book.requires_grad))
    out.register_parameter("bias", bias)
    return out  # type: ignore[no-any-return]


def rebuilt(layer: SharedWeight, book: Tensor | None, rows: Tensor | None, bias: Tensor | None, *, train_rows: bool = True) -> SharedWeight:
    """A copy of the layer on the same codes with another codebook (``None``: the same parameter), other factors and another bias.

    Args:
        book: float ``[K]``. rows: float ``[C]``. bias: float ``[channels]``.
    """
    out = _copied(layer, type(layer))
    if book is not None:
        out._parameters["book"] = nn.Parameter(book.detach().to(torch.float32).clone(), layer.book.requires_grad)
    out._parameters.pop("rows", None)
    out._buffers.pop("rows", None)
    _set_rows(out, rows, train_rows)
    out._parameters["bias"] = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
    return out  # type: ignore[no-any-return]


def any_shared(model: nn.Module) -> bool:
    """Does a layer of the model share its weights?"""
    return any(isinstance(m, SharedWeight) for m in model.modules())
