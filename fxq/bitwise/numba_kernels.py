"""The kernels compiled by numba: the functions of :mod:`fxq.bitwise.engine`. They plan a call, describe it and run it. Imported only where numba is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from fxq.bitwise import checks, numba_codes, numpy_kernels, vectors
from fxq.bitwise import numba_conv as c
from fxq.bitwise import threads as workers
from fxq.bitwise.bits import Array, Pair, words_of
from fxq.bitwise.layout import AddConstants, Epilogue, Layer
from fxq.bitwise.numba_compile import KERNELS, Kernel, address, compiled
from fxq.bitwise.numba_plan import Plan
from fxq.bitwise.numpy_kernels import result_shape

PATH = vectors.PATH
WORK = 1 << 18
"""Bytes that are read for each thread at least."""
KEPT = 16
"""Plans of a layer, one for each shape of input, that are kept."""


# ---------------------------------------------------------------- kernels of codes


def _pack_kernel(kind: str, planes: int) -> Kernel:
    def make(digest: int) -> Callable[[Any], None]:
        def pack_units(d: Any) -> None:
            if digest != 0:
                numba_codes.pack(d, kind, planes)

        return pack_units

    return compiled((kind, planes), make)


def _unpack(digest: int) -> Callable[[Any], None]:
    def unpack_units(d: Any) -> None:
        if digest != 0:
            numba_codes.unpack(d)

    return unpack_units


def _gather_units(digest: int) -> Callable[[Any], None]:
    def gather_units(d: Any) -> None:
        if digest != 0:
            numba_codes.gather(d)

    return gather_units


def _max_pool(digest: int) -> Callable[[Any], None]:
    def max_pool_units(d: Any) -> None:
        if digest != 0:
            numba_codes.max_pool(d)

    return max_pool_units


def _code_pool(digest: int) -> Callable[[Any], None]:
    def code_pool_units(d: Any) -> None:
        if digest != 0:
            numba_codes.code_pool(d)

    return code_pool_units


def _add(digest: int) -> Callable[[Any], None]:
    def add_units(d: Any) -> None:
        if digest != 0:
            numba_codes.add(d)

    return add_units


def _table(digest: int) -> Callable[[Any], None]:
    def table_units(d: Any) -> None:
        if digest != 0:
            numba_codes.table(d)

    return table_units


def _quantize(digest: int) -> Callable[[Any], None]:
    def quantize_units(d: Any) -> None:
        if digest != 0:
            numba_codes.quantize(d)

    return quantize_units


# ---------------------------------------------------------------- convolution


class _Scratch(threading.local):
    """Memory of one calling thread, kept between calls."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint64)

    def at_least(self, size: int) -> Array:
        if self.memory.nbytes < size:
            self.memory = np.empty(-(-size // 8) + 8, np.uint64)
        return self.memory


_SCRATCH = _Scratch()


def _constants(e: Epilogue) -> list[int]:
    """The epilogue's fields of a description, from ``KIND`` to ``BOUNDS``: addresses of arrays that its cache keeps."""
    if "numba" not in e.cache:
        bounds = np.array([e.least, e.most, e.zero], np.float32)
        e.cache["numba"] = [
            None if a is None else np.ascontiguousarray(a) for a in (e.hi, e.lo, e.mult, e.bias, e.scale if e.kind != "int32" else e.bias, bounds)
        ]
    return [c.KINDS[e.kind], *(0 if a is None else address(a) for a in e.cache["numba"])]


def conv(x: Array, layer: Layer, epilogue: Epilogue, threads: int = 1) -> Array:
    """Convolution of packed values, see :meth:`fxq.bitwise.engine.Engine.conv`."""
    if not x.size:
        return numpy_kernels.conv(x, layer, epilogue)
    plan: Any = layer.cache.get((x.shape, threads))
    result: Any = plan.result if plan is not None and x.dtype is U64 else (None,)
    if result[0] is not epilogue:
        plan, result = _planned(x, layer, epilogue, threads)
    _, shape, dtype, blank, fields = result
    x = np.ascontiguousarray(x)
    if layer.gathered:
        x = _gather(x, layer, plan.size[1:], plan.threads)
    out = np.zeros(shape, dtype) if blank else np.empty(shape, dtype)
    scratch, d = _SCRATCH.at_least(plan.scratch * plan.threads), plan.description.copy()
    d[_X], d[_X_PLANE], d[_OUT], d[_SCRATCH_AT] = address(x), x.nbytes // len(x), address(out), address(scratch)
    d[_FIELDS] = fields
    workers.run(plan.kernel, d, plan.threads)
    return out


U64 = np.dtype(np.uint64)
_X, _X_PLANE, _OUT, _SCRATCH_AT, _FIELDS = c.X // 8, c.X_PLANE // 8, c.OUT // 8, c.SCRATCH_AT // 8, slice(c.OUT_PLANE // 8, c.SIZE // 8)


def _planned(x: Array, layer: Layer, e: Epilogue, threads: int) -> tuple[Plan, tuple[Any, ...]]:
    """The plan of a call, made at the first one of its kind, with what the epilogue needs (that of the last call is kept)."""
    checks.check_conv(x, layer, e)
    plan: Plan | None = layer.cache.get((x.shape, threads))
    if plan is None:
        if len(layer.cache) > KEPT:
            layer.cache.clear()
        plan = layer.cache[x.shape, threads] = Plan(x.shape, layer, threads)
    shape, dtype = result_shape(layer, e, *plan.size)
    plane = int(np.prod(shape[1:])) * 8 if e.planes else 0
    row = shape[-1] * np.dtype(dtype).itemsize
    fields = np.array([plane, row, *_constants(e)], np.int64)
    plan.result = result = (e, shape, dtype, bool(e.planes and layer.outputs % 64), fields)
    return plan, result


def _gather(x: Array, layer: Layer, size: tuple[int, ...], threads: int) -> Array:
    """The words that a gathered layer reads, ``[P, B, OH, OW, groups * group_words]``."""
    per_group = layer.channels // layer.groups
    out = np.empty((*x.shape[:2], *size, layer.steps[1]), np.uint64)
    (kh, kw), (sy, sx), (dy, dx), (top, _, left, _) = layer.kernel, layer.stride, layer.dilation, layer.padding
    geometry = np.array([kh, sy, top, dy, kw, sx, left, dx, per_group, layer.groups, layer.steps[1] // layer.groups], np.int64)
    _call(
        KERNELS.get("gather") or compiled("gather", _gather_units), threads, x.shape[1] * size[0], address(x), x.nbytes // len(x), x.shape[4], x.shape[2],
        x.shape[3], size[0], size[1], address(geometry), address(out), out.nbytes // len(out), len(x),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- packing, codes


def _share(total: int, amount: int, threads: int, multiple: int = 1) -> tuple[int, int, int]:
    """Threads, elements of a unit and units for ``total`` elements of ``amount`` bytes of work in all."""
    threads = min(threads, max(1, amount // WORK))
    per_unit = max(1, -(-total // (4 * threads if threads > 1 else 1)))
    per_unit = -(-per_unit // multiple) * multiple
    return threads, per_unit, -(-total // per_unit)


def _call(job: Kernel, threads: int, units: int, *fields: int) -> None:
    workers.run(job, np.array([0, units, *fields], np.int64), threads)


NAMES = {"f": "float32", "B": "uint8", "b": "int8"}


def pack(x: Array, lo: float, hi: float, planes: int, channels_last: bool, threads: int = 1) -> Array:
    """Values against thresholds, see :meth:`fxq.bitwise.engine.Engine.pack`."""
    checks.check_pack(x, planes)
    x = np.ascontiguousarray(x)
    batch, channels, places = (x.shape[0], x.shape[2], x.shape[1]) if channels_last else x.shape
    channels_last = channels_last or places == 1
    words, kind = words_of(channels), NAMES[x.dtype.char]
    out = np.empty((planes, batch, places, words), np.uint64)
    if not out.size:
        return out
    if x.dtype.char == "f":
        bounds = np.array([hi, lo], np.float32)
    else:
        bounds = np.clip([np.ceil(hi), np.floor(lo)], -1000, 1000).astype(np.int16)
    threads, per_unit, parts = _share(places, x.nbytes, threads, 1 if channels_last else numba_codes.STRIP)
    per_image = parts if channels_last else parts * words
    _call(
        KERNELS.get((kind, planes)) or _pack_kernel(kind, planes), threads, batch * per_image, address(x), x.nbytes // batch, channels, places,
        int(channels_last),
        address(bounds), address(out), out.nbytes // planes, out.nbytes // planes // batch, per_unit, per_image,
    )  # fmt: skip
    return out


def unpack(packed: Array, channels: int, threads: int = 1) -> Array:
    """Codes of packed values, see :meth:`fxq.bitwise.engine.Engine.unpack`."""
    checks.check_packed(packed, channels)
    packed = np.ascontiguousarray(packed)
    out = np.empty((*packed.shape[1:4], channels), np.int8)
    if not out.size:
        return out
    places = out.size // channels
    threads, per_unit, units = _share(places, out.nbytes, threads)
    spill = np.empty(64 * units, np.uint8)
    _call(
        compiled("unpack", _unpack), threads, units, address(packed), packed.strides[0], channels, places, len(packed), address(out), per_unit,
        address(spill),
    )  # fmt: skip
    return out


def max_pool(
    packed: Array, channels: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), ceil_mode: bool = False, threads: int = 1
) -> Array:
    """Maximum over windows, see :meth:`fxq.bitwise.engine.Engine.max_pool`."""
    oh, ow = checks.pool_geometry(packed, channels, kernel, stride, padding, dilation, ceil_mode)
    packed = np.ascontiguousarray(packed)
    out = np.empty((*packed.shape[:2], oh, ow, packed.shape[4]), np.uint64)
    geometry = np.array([v[i] for i in (0, 1) for v in (kernel, stride, padding, dilation)], np.int64)
    threads, _, _ = _share(1, packed.nbytes, threads)
    _call(
        compiled("max_pool", _max_pool), threads, packed.shape[1] * oh, address(packed), packed.strides[0], packed.shape[4], packed.shape[2], packed.shape[3],
        oh, ow, address(geometry), address(out), out.strides[0], len(packed),
    )  # fmt: skip
    return out


def code_pool(codes: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), ceil_mode: bool = False, threads: int = 1) -> Array:
    """Maximum of codes over windows, see :meth:`fxq.bitwise.engine.Engine.code_pool`."""
    oh, ow = checks.code_pool_geometry(codes, kernel, stride, padding, dilation, ceil_mode)
    codes = np.ascontiguousarray(codes)
    out = np.empty((codes.shape[0], oh, ow, codes.shape[3]), codes.dtype)
    geometry = np.array([v[i] for i in (0, 1) for v in (kernel, stride, padding, dilation)], np.int64)
    threads, _, _ = _share(1, codes.nbytes, threads)
    _call(
        compiled("code_pool", _code_pool), threads, codes.shape[0] * oh, address(codes), 0, codes.shape[3], codes.shape[1], codes.shape[2], oh, ow,
        address(geometry), address(out), int(codes.dtype == np.int8),
    )  # fmt: skip
    return out


def add(a: Array, b: Array, constants: AddConstants, threads: int = 1) -> Array:
    """Integer add, see :meth:`fxq.bitwise.engine.Engine.add`."""
    checks.check_codes(a, b)
    a, b, k = np.ascontiguousarray(a), np.ascontiguousarray(b), constants
    out, values = np.empty(a.shape, np.uint8), np.array([k.ra, k.rb, k.fixed, k.least, k.most], np.float32)
    threads, per_unit, units = _share(a.size, 8 * a.nbytes, threads, 64)
    spill = np.empty(64 * units, np.uint8)
    _call(compiled("add", _add), threads, units, address(a), address(b), address(values), address(out), a.size, per_unit, address(spill))
    return out


def table(x: Array, values: Array, threads: int = 1) -> Array:
    """Table of codes, see :meth:`fxq.bitwise.engine.Engine.table`."""
    checks.check_table(x, values)
    x, values, out = np.ascontiguousarray(x), np.ascontiguousarray(values), np.empty(x.shape, np.uint8)
    threads, per_unit, units = _share(x.size, 2 * x.nbytes, threads, 64)
    _call(compiled("table", _table), threads, units, address(x), address(values), 0, address(out), x.size, per_unit)
    return out


def quantize(x: Array, scale: float, zero: int, qmin: int, qmax: int, channels_last: bool, threads: int = 1) -> Array:
    """Codes of float values, see :meth:`fxq.bitwise.engine.Engine.quantize`."""
    checks.check_quantize(x)
    x = np.ascontiguousarray(x)
    batch, channels, places = (x.shape[0], x.shape[2], x.shape[1]) if channels_last else x.shape
    out = np.empty((batch, places, channels), np.int8 if qmin < 0 else np.uint8)
    constants = np.array([scale, qmin - zero, qmax - zero, zero], np.float32)
    if channels_last or places == 1 or channels == 1:
        batch, channels, places = 1, 1, x.size
    threads, per_unit, parts = _share(places, x.nbytes, threads, 64)
    spill = np.empty(16 * channels * batch * parts, np.uint8)
    _call(
        compiled("quantize", _quantize), threads, batch * parts, address(x), 0, address(constants), address(out), channels, places, per_unit, parts,
        address(spill),
    )  # fmt: skip
    return out
