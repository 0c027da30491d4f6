"""How a kernel becomes an operator of torch, and how tensors become the engine's arrays and back without a copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
_LIBRARY: Any = torch.library.Library("fxq", "FRAGMENT")  # type: ignore[no-untyped-call]
"""``torch.library.custom_op`` does the same in more layers of Python."""


class Operator:
    """``torch.ops.fxq.<name>``: called by way of torch's dispatcher where somebody watches (compiler, export, tracer, profiler), else directly.

    Attributes:
        op: the operator of torch. run: its kernel.
    """

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        name = fn.__name__
        _LIBRARY.define(name + torch.library.infer_schema(fn, mutates_args=()))
        _LIBRARY.impl(name, fn, "CPU")
        self.op, self.run = getattr(torch.ops.fxq, name).default, fn

    def __call__(self, *args: Any) -> Tensor:
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled()
        return self.op(*args) if watched else self.run(*args)


def meta(made: Operator) -> Callable[[Callable[..., Tensor]], None]:
    """Register what an operator says of its result before it runs."""
    return lambda fn: torch.library.register_fake(made.op._schema.name, fn, lib=_LIBRARY) and None


def bits(x: Tensor) -> Array:
    """Packed values, int64, as the engine's uint64."""
    return ordered(x.numpy()).view(np.uint64)


def ordered(a: Array) -> Array:
    """In the order of memory; a copy only where it is not."""
    return a if a.flags.c_contiguous else np.ascontiguousarray(a)


def places(x: Tensor) -> Array:
    """Codes as the engine takes them: channels last where they have four dimensions."""
    a = x.numpy()
    return ordered(a.transpose(0, 2, 3, 1) if a.ndim == 4 else a)


def codes(y: Array) -> Tensor:
    """The inverse of :func:`places`."""
    return torch.from_numpy(y.transpose(0, 3, 1, 2) if y.ndim == 4 else y)


def tensor(packed: Array) -> Tensor:
    """The inverse of :func:`bits`."""
    return torch.from_numpy(packed.view(np.int64))


def rows(a: Array, axis: int) -> tuple[Array, bool, tuple[int, ...]]:
    """Values as ``[B, S, C]``, or ``[B, C, S]`` where they lie so in memory: ``(values, channels are last, sizes but the channels)``."""
    if axis == a.ndim - 1:
        return ordered(a).reshape(1, math.prod(a.shape[:-1]), a.shape[-1]), True, a.shape[:-1]
    lead, places = (a.shape[0], *a.shape[2:]), math.prod(a.shape[2:])
    turned = a.transpose(0, *range(2, a.ndim), 1)
    if turned.flags.c_contiguous:
        return turned.reshape(a.shape[0], places, a.shape[1]), True, lead
    return ordered(a).reshape(a.shape[0], a.shape[1], places), False, lead
