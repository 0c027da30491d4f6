"""The kernels as operators of torch, ``torch.ops.fxq.*``: a lowered graph can be printed, compiled, exported and profiled.

Packed values are int64 tensors ``[P, B, *spatial, words]`` (of a linear layer ``[P, *lead, words]``), the carriers of the uint64 words of
:mod:`fxq.bitwise.layout`. Codes have torch's shape; where they have four dimensions they lie in memory channels last. No operator is differentiable.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxq.bitwise import operators
from fxq.bitwise.bits import WORD, pack_bits, unpack_bits, words_of
from fxq.bitwise.checks import check_codes, pool_size, windows
from fxq.bitwise.engine import engine
from fxq.bitwise.layout import AddConstants, Epilogue, Layer
from fxq.bitwise.operators import Operator, meta
from fxq.errors import FxqError

Array = np.ndarray[Any, Any]
LINEAR, CONV1D, CONV2D, FLATTEN = range(4)
"""Modes of :func:`bit_conv`: a linear layer, the convolutions, a linear layer behind a flatten of ``[B, C, H, W]`` as a convolution."""

_orders: dict[int, tuple[Any, int, Array]] = {}
"""By the identity of :func:`bit_select`'s indices: a weak reference to them, the groups of a shuffle or 0, and tables."""
_made: dict[int, tuple[Any, Any, Layer, Epilogue, tuple[int, int]]] = {}
"""By the identity of a layer's words: weak references to its words and first table, what the engine reads (with its caches), and their addresses."""


def geometry(layer: Layer, mode: int) -> list[int]:
    """What :func:`bit_conv` takes as ``geometry``."""
    ints = [mode, layer.channels, layer.outputs, layer.groups, *layer.kernel, *layer.stride, *layer.padding, *layer.dilation, int(layer.masked)]
    return [int(v) for v in ints]


def numbers(e: Epilogue) -> list[float]:
    """What :func:`bit_conv` takes as ``numbers``."""
    return [e.least, e.most, e.zero, float(e.signed)]


def tables(e: Epilogue) -> list[Tensor]:
    """What :func:`bit_conv` takes as ``tables``: thresholds ``hi``, ``lo``, or ``mult``, ``bias``, ``scale``."""
    return [torch.from_numpy(v) for v in (e.hi, e.lo, e.mult, e.bias, e.scale) if v is not None]


def _prepared(words: Tensor, blocks: Tensor, geometry: Sequence[int], kind: str, tables: Sequence[Tensor], numbers: Sequence[float]) -> tuple[Layer, Epilogue]:
    """The engine's layer and epilogue over the very memory of the tensors; kept as long as ``words`` lives."""
    key, at = id(words), (words.data_ptr(), tables[0].data_ptr())  # `share_memory` moves a tensor
    found = _made.get(key)
    if found is not None and found[0]() is words and found[1]() is tables[0] and found[4] == at:
        return found[2], found[3]
    _, channels, outputs, groups, kh, kw, sy, sx, top, bottom, left, right, dy, dx, masked = geometry
    layer = Layer(
        words.numpy().view(np.uint64), blocks.numpy(), channels, outputs, groups, (kh, kw), (sy, sx), (top, bottom, left, right), (dy, dx), bool(masked)
    )
    names = ("hi", "lo") if kind in ("sign", "ternary") else ("mult", "bias", "scale")
    arrays: Any = {name: t.numpy() for name, t in zip(names, tables, strict=False)}
    epilogue = Epilogue(kind, **arrays, least=numbers[0], most=numbers[1], zero=numbers[2], signed=bool(numbers[3]))
    _made[key] = (weakref.ref(words, lambda _: _made.pop(key, None)), weakref.ref(tables[0]), layer, epilogue, at)
    return layer, epilogue


def kept_bytes(t: Tensor) -> int:
    """Bytes of what is kept for a layer's words, or for the indices of a selection, beside them."""
    made, order = _made.get(id(t)), _orders.get(id(t))
    if order is not None and order[0]() is t:
        return order[2].nbytes
    if made is None or made[0]() is not t:
        return 0
    layer = made[2]
    own = {id(a) for a in (layer.words, layer.blocks)}
    arrays = [a for plan in layer.cache.values() for a in getattr(plan, "kept", ())]
    _, borders = layer.cache.get("borders", (None, None))
    arrays += [] if borders is None else [borders.base, borders.rows, borders.columns]
    return sum(a.nbytes for a in {id(a): a for a in arrays}.values() if id(a) not in own)


def _out_size(geometry: Sequence[int], h: int, w: int) -> tuple[int, int]:
    _, _, _, _, kh, kw, sy, sx, top, bottom, left, right, dy, dx, _ = geometry
    return (h + top + bottom - dy * (kh - 1) - 1) // sy + 1, (w + left + right - dx * (kw - 1) - 1) // sx + 1


def _channels_last(y: Tensor, mode: int, lead: Sequence[int]) -> Tensor:
    """The engine's ``[B, OH, OW, N]`` in torch's shape."""
    if mode == CONV2D:
        return y.permute(0, 3, 1, 2)
    return y.squeeze(1).permute(0, 2, 1) if mode == CONV1D else y.reshape(*lead, y.shape[-1])


def _packed(y: Tensor, mode: int, lead: Sequence[int]) -> Tensor:
    """The engine's ``[P, B, OH, OW, words]`` in the shape of packed values."""
    if mode == CONV2D:
        return y
    return y.squeeze(2) if mode == CONV1D else y.reshape(y.shape[0], *lead, y.shape[-1])


def _as_5d(x: Tensor, mode: int) -> tuple[Tensor, list[int]]:
    """A packed input as the engine takes it, and the leading sizes of a linear layer's output."""
    if mode == LINEAR:
        lead = list(x.shape[1:-1])
        return x.reshape(x.shape[0], 1, 1, math.prod(lead), x.shape[-1]), lead
    return (x.unsqueeze(2) if mode == CONV1D or x.ndim == 4 else x), [x.shape[1]]  # a flatten may join one dimension alone


@Operator
def bit_conv(x: Tensor, words: Tensor, blocks: Tensor, geometry: Sequence[int], kind: str, tables: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    """Convolution or linear layer on packed values.

    Args:
        x: packed.
        words, blocks: of :class:`fxq.bitwise.layout.Layer`, int64.
        geometry, kind, tables, numbers: the layer's numbers and its epilogue: :func:`geometry`, :func:`tables`, :func:`numbers`.

    Returns:
        Packed values (``kind`` ``sign``, ``ternary``), codes, float32 or int32.

    Raises:
        FxqError: for an input that does not fit.
    """
    layer, epilogue = _prepared(words, blocks, geometry, kind, tables, numbers)
    five, lead = _as_5d(x, geometry[0])
    if geometry[0] == FLATTEN and tuple(five.shape[2:4]) != layer.kernel:
        raise FxqError(f"a layer of {list(layer.kernel)} places does not fit an input of {list(five.shape[2:4])}", way_out="Pass inputs of the example's size")
    if not x.numel():
        return _empty_result(x, geometry, kind, numbers)
    y = engine().conv(operators.bits(five), layer, epilogue, torch.get_num_threads())
    if epilogue.planes:
        return _packed(operators.tensor(y), geometry[0], lead)
    return operators.codes(y) if geometry[0] == CONV2D else _channels_last(torch.from_numpy(y), geometry[0], lead)


@meta(bit_conv)
def _(x: Tensor, words: Tensor, blocks: Tensor, geometry: Sequence[int], kind: str, tables: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    return _empty_result(x, geometry, kind, numbers)


def _empty_result(x: Tensor, geometry: Sequence[int], kind: str, numbers: Sequence[float]) -> Tensor:
    five, lead = _as_5d(x, geometry[0])
    oh, ow = _out_size(geometry, five.shape[2], five.shape[3])
    batch, n = five.shape[1], geometry[2]
    if kind in ("sign", "ternary"):
        return _packed(x.new_empty(1 + (kind == "ternary"), batch, oh, ow, words_of(n)), geometry[0], lead)
    dtype = {"int32": torch.int32, "float": torch.float32, "codes": torch.int8 if numbers[3] else torch.uint8}[kind]
    return _channels_last(x.new_empty(batch, oh, ow, n, dtype=dtype), geometry[0], lead)


# ---------------------------------------------------------------- bits of values, and back


@Operator
def pack(x: Tensor, lo: float, hi: float, planes: int, axis: int) -> Tensor:
    """Bits of float32 values or 8-bit codes: plane 0 is ``x >= hi``, plane 1 (of two) ``x >= hi`` or ``x <= lo``; channels along ``axis`` (1 or the last)."""
    a, last, lead = operators.rows(x.detach().numpy(), axis)
    y = engine().pack(a, lo, hi, planes, last, torch.get_num_threads())
    return operators.tensor(y.reshape(planes, *lead, y.shape[-1]))


@meta(pack)
def _(x: Tensor, lo: float, hi: float, planes: int, axis: int) -> Tensor:
    lead = [s for d, s in enumerate(x.shape) if d != axis]
    return x.new_empty(planes, *lead, words_of(x.shape[axis]), dtype=torch.int64)


@Operator
def unpack(x: Tensor, channels: int, axis: int) -> Tensor:
    """int8 codes -1 and 1, or -1, 0 and 1, of packed values; channels come to ``axis`` (1 or the last)."""
    lead = list(x.shape[1:-1])
    y = engine().unpack(operators.bits(x.reshape(x.shape[0], 1, 1, -1, x.shape[-1])), channels, torch.get_num_threads())
    return torch.from_numpy(y).reshape(*lead, channels).movedim(-1, axis)


@meta(unpack)
def _(x: Tensor, channels: int, axis: int) -> Tensor:
    return x.new_empty(*x.shape[1:-1], channels, dtype=torch.int8).movedim(-1, axis)


# ---------------------------------------------------------------- pooling


@Operator
def bit_max_pool(
    x: Tensor, channels: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool
) -> Tensor:
    """Maximum over windows of packed values, as ``torch.nn.MaxPool1d`` and ``MaxPool2d``; the numbers are of rows and columns."""
    flat = x.ndim == 4
    k, s, p, d = ((v[0], v[1]) for v in (kernel, stride, padding, dilation))
    y = engine().max_pool(operators.bits(x.unsqueeze(2) if flat else x), channels, k, s, p, d, ceil_mode, torch.get_num_threads())
    return operators.tensor(y).squeeze(2) if flat else operators.tensor(y)


@meta(bit_max_pool)
def _(x: Tensor, channels: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool) -> Tensor:
    sizes = [1, x.shape[2]] if x.ndim == 4 else list(x.shape[2:4])
    out = [pool_size(sizes[i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)]
    return x.new_empty(x.shape[0], x.shape[1], *(out[1:] if x.ndim == 4 else out), x.shape[-1])


@Operator
def code_max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool) -> Tensor:
    """Maximum over windows of 8-bit codes ``[B, C, H, W]``; padding takes no part."""
    k, s, p, d = ((v[0], v[1]) for v in (kernel, stride, padding, dilation))
    return operators.codes(engine().code_pool(operators.places(x), k, s, p, d, ceil_mode, torch.get_num_threads()))


@meta(code_max_pool)
def _(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool) -> Tensor:
    out = [pool_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)]
    return x.new_empty(x.shape[0], *out, x.shape[1]).movedim(-1, 1)


@Operator
def float_max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool
) -> Tensor:
    """``torch.nn.MaxPool2d`` of float32 ``[B, C, H, W]``; the result lies in memory channels last."""
    a = x.detach().numpy()
    if a.ndim != 4 or a.dtype != np.float32:
        raise FxqError(f"a tensor of {x.dtype} {list(x.shape)} is no batch of float images", way_out="Pass float32 [B, C, H, W]")
    k, s, p, d = ((v[0], v[1]) for v in (kernel, stride, padding, dilation))
    oh, ow = windows(a.shape[2:], k, s, p, d, ceil_mode)
    if engine().name != "numba" or not a.flags.c_contiguous:
        last = x.detach().contiguous(memory_format=torch.channels_last)  # torch pools these 20 times as fast
        pooled: Tensor = torch.nn.functional.max_pool2d(last, list(kernel), list(stride), list(padding), list(dilation), ceil_mode)
        return pooled
    from fxq.bitwise import numba_floats

    out = np.empty((a.shape[0], oh, ow, a.shape[1]), np.float32)
    numba_floats.float_pool(a, np.array([*kernel, *stride, *padding, *dilation], np.int64), out)
    return operators.codes(out)


@meta(float_max_pool)
def _(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool) -> Tensor:
    out = [pool_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)]
    return x.new_empty(x.shape[0], *out, x.shape[1]).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- channels of packed values


@Operator
def bit_cat(xs: Sequence[Tensor], channels: Sequence[int]) -> Tensor:
    """Packed values of ``channels`` each, one behind the other along the channels."""
    lead = xs[0].shape[:-1]
    out = np.zeros((*lead, words_of(sum(channels))), np.uint64)
    start = 0
    for x, count in zip(xs, channels, strict=True):
        if x.shape[-1] != words_of(count) or x.shape[:-1] != lead:
            raise FxqError(f"packed values of shape {list(x.shape)} do not join {count} channels of {list(lead)}", way_out="Pass parts of one size")
        word, shift = divmod(start, WORD)
        bits = operators.bits(x)
        out[..., word : word + bits.shape[-1]] |= bits << np.uint64(shift)
        if shift:
            above = bits[..., : words_of(start + count) - word - 1]
            out[..., word + 1 : word + 1 + above.shape[-1]] |= above >> np.uint64(WORD - shift)
        start += count
    return operators.tensor(out)


@meta(bit_cat)
def _(xs: Sequence[Tensor], channels: Sequence[int]) -> Tensor:
    return xs[0].new_empty(*xs[0].shape[:-1], words_of(sum(channels)))


@Operator
def bit_select(x: Tensor, channels: int, indices: Tensor) -> Tensor:
    """Channels ``indices`` of packed values of ``channels``."""
    if x.shape[-1] != words_of(channels):
        raise FxqError(f"packed values of shape {list(x.shape)} do not hold {channels} channels", way_out="Pass one bit a channel")
    if engine().name == "numba":
        return operators.tensor(_selected(operators.bits(x), channels, indices))
    _check_indices(channels, indices)
    bits = unpack_bits(operators.bits(x), channels)
    return operators.tensor(pack_bits(np.take(bits, indices.numpy(), axis=-1)))


def _check_indices(channels: int, indices: Tensor) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < channels:
        raise FxqError(f"channels {int(indices.min())} to {int(indices.max())} are not among {channels}", way_out="Count them from 0")


def _selected(x: Array, channels: int, indices: Tensor) -> Array:
    from fxq.bitwise import numba_select

    key, words = id(indices), words_of(len(indices))
    found = _orders.get(key)
    if found is None or found[0]() is not indices:
        _check_indices(channels, indices)
        groups = numba_select.shuffled_groups(channels, indices.numpy())
        by = numba_select.spread(groups) if groups else numba_select.tables(channels, indices.numpy())
        found = weakref.ref(indices, lambda _: _orders.pop(key, None)), groups, by
        _orders[key] = found
    _, groups, by = found
    rows = x.reshape(-1, x.shape[-1])
    if groups:
        out = np.empty_like(rows)
        numba_select.shuffle(rows, groups, by, out)
        return out.reshape(x.shape)
    out = np.empty((len(rows), by.shape[2]), np.uint64)
    numba_select.select(rows, by, out)
    return operators.ordered(out[:, :words]).reshape(*x.shape[:-1], words)


@meta(bit_select)
def _(x: Tensor, channels: int, indices: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], words_of(indices.shape[0]))


# ---------------------------------------------------------------- 8-bit codes


@Operator
def code_add(a: Tensor, b: Tensor, ra: float, rb: float, fixed: float, most: int) -> Tensor:
    """The integer add of :func:`fxq.kernels.add` on uint8 codes of one shape, whose least code is 0."""
    constants, e = AddConstants(ra, rb, fixed, 0, most), engine()
    if e.name == "numba" and _adds_in_float32(constants):
        from fxq.bitwise import numba_add

        one, other = operators.places(a), operators.places(b)
        check_codes(one, other)
        return operators.codes(numba_add.add(one, other, constants))
    return operators.codes(e.add(operators.places(a), operators.places(b), constants, torch.get_num_threads()))


@lru_cache(maxsize=1024)
def _adds_in_float32(constants: AddConstants) -> bool:
    from fxq.bitwise import numba_add

    return numba_add.is_exact(constants)


@meta(code_add)
def _(a: Tensor, b: Tensor, ra: float, rb: float, fixed: float, most: int) -> Tensor:
    if a.ndim == 4:
        return a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).clone()
    return a.contiguous().clone()


@Operator
def code_table(x: Tensor, values: Tensor) -> Tensor:
    """``values[x]``: uint8 codes through a table of 256 entries, uint8; the result lies in memory as ``x``."""
    return operators.codes(engine().table(operators.places(x), values.numpy(), torch.get_num_threads()))


@meta(code_table)
def _(x: Tensor, values: Tensor) -> Tensor:
    if x.ndim == 4:
        return torch.empty_like(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    return torch.empty_like(x.contiguous())


@Operator
def code_real(x: Tensor, values: Tensor) -> Tensor:
    """``values[x]``: real values of uint8 or int8 codes ``[B, C, H, W]``, in torch's own order in memory; ``values``: float32, by the 256 bytes."""
    if x.ndim != 4 or x.element_size() != 1 or values.dtype != torch.float32 or tuple(values.shape) != (256,):
        fact = f"{values.dtype} {list(values.shape)} is no table of real values for codes of {x.dtype} {list(x.shape)}"
        raise FxqError(fact, way_out="Pass uint8 or int8 [B, C, H, W] and float32 [256]")
    codes = operators.places(x).view(np.uint8)
    if engine().name != "numba":
        return torch.from_numpy(operators.ordered(values.numpy()[codes.transpose(0, 3, 1, 2)]))
    from fxq.bitwise import numba_floats

    batch, height, width, channels = codes.shape
    out = np.empty((batch, channels, height * width), np.float32)
    numba_floats.real(codes.reshape(batch, height * width, channels), values.numpy(), out)
    return torch.from_numpy(out.reshape(batch, channels, height, width))


@meta(code_real)
def _(x: Tensor, values: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@Operator
def quantize(x: Tensor, scale: float, zero: int, qmin: int, qmax: int) -> Tensor:
    """Codes of float32 values on a grid of 8 bits or less with one scale (:func:`fxq.numerics.quantize`); of four dimensions channels last in memory."""
    a = x.detach().numpy()
    rows, last, lead = operators.rows(a, 1) if a.ndim == 4 else (operators.ordered(a).reshape(1, 1, -1), True, ())
    y = engine().quantize(rows, scale, zero, qmin, qmax, last, torch.get_num_threads())
    return operators.codes(y.reshape(*lead, a.shape[1])) if a.ndim == 4 else torch.from_numpy(y.reshape(a.shape))


@meta(quantize)
def _(x: Tensor, scale: float, zero: int, qmin: int, qmax: int) -> Tensor:
    dtype = torch.int8 if qmin < 0 else torch.uint8
    if x.ndim == 4:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[3], x.shape[1], dtype=dtype).permute(0, 3, 1, 2)
    return x.new_empty(x.shape, dtype=dtype)
