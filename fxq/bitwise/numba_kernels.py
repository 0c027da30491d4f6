"""The kernels compiled by numba: the functions of :mod:`fxq.bitwise.engine`. They plan a call, describe it and run it. Imported only where numba is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxq.bitwise import checks, layout, numba_codes, tiles
from fxq.bitwise import numba_conv as c
from fxq.bitwise import threads as workers
from fxq.bitwise.bits import Array, Pair, words_of
from fxq.bitwise.layout import AddConstants, Epilogue, Layer
from fxq.bitwise.numba_compile import KERNELS, Kernel, address, compiled
from fxq.bitwise.numpy_kernels import result_shape

PATH = tiles.PATH
WORK = 1 << 18
"""Bytes that are read for each thread at least."""
VECTORS = 1 << 15
"""Vectors of 8 words that a convolution compares for each thread at least: about 15 microseconds."""
CACHE_BYTES = 192 << 10
"""Bytes of activations of a unit of work: half of a small second-level cache."""
PIXELS = 28
"""Output positions of a unit of work at least, where rows are dealt out."""
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


def _float_pool(digest: int) -> Callable[[Any], None]:
    def float_pool_units(d: Any) -> None:
        if digest != 0:
            numba_codes.float_pool(d)

    return float_pool_units


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


@dataclass(frozen=True)
class _Windows:
    """What the kernel sees of a layer and its input."""

    batch: int
    height: int
    width: int
    words: int
    out: Pair
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)

    @property
    def across(self) -> int:
        """Words of a padded row."""
        return (self.width + self.padding[2] + self.padding[3]) * self.words

    @property
    def extent(self) -> int:
        """Input rows of one output row."""
        return self.dilation[0] * (self.kernel[0] - 1) + 1


def _windows(shape: tuple[int, ...], layer: Layer) -> tuple[_Windows, bool]:
    """The windows, and whether their positions lie as in the output (for the border tables)."""
    _, batch, h, w, words = shape
    oh, ow = layer.out_size(h, w)
    if layer.gathered:
        return _Windows(batch, oh, ow, layer.steps[1], (oh, ow)), True
    if layer.taps == 1 and layer.stride == (1, 1) and not any(layer.padding):  # a matrix product: every position is a row
        return _Windows(1, batch * h * w, 1, words, (batch * h * w, 1)), False
    return _Windows(batch, h, w, words, (oh, ow), layer.kernel, layer.stride, layer.padding, layer.dilation), True


class _Plan:
    """How a layer runs on inputs of one shape: the description without the addresses of a call.

    Attributes:
        size: images, rows and columns of the output.
        kernel, threads, scratch: what runs, in how many threads, with how many bytes for each.
        result: the last epilogue and what the call needs of it.
    """

    def __init__(self, shape: tuple[int, ...], layer: Layer, threads: int) -> None:
        planes, in_place = shape[0], layer.out_size(shape[2], shape[3])
        self.size, self.kernel = (shape[1], *in_place), compiled(("conv", planes, layer.masked), c.kernel(planes, int(layer.masked)))
        self.threads = min(threads, max(1, shape[1] * in_place[0] * in_place[1] * len(layer.words) // 8 // VECTORS))
        self.description, self.kept = np.zeros(c.SIZE // 8, np.int64), list[Array]()
        self.result: tuple[Any, ...] = (None,)
        v, as_output = _windows(shape, layer)
        (oh, ow), (kh, kw), (dy, dx) = v.out, v.kernel, v.dilation
        fit = max(1, (CACHE_BYTES // (8 * v.across * planes) - v.extent) // v.stride[0] + 1)
        unit_rows, group = self._split(oh, ow, v.batch, fit, len(layer.blocks))
        rows_in = (unit_rows - 1) * v.stride[0] + v.extent
        sizes = [c.SCRATCH, 8 * unit_rows * ow, 4 * unit_rows * ow, 4 * unit_rows * ow, 4 * rows_in * v.across // v.words if planes == 2 else 0]
        at = np.cumsum([-(-s // 64) * 64 for s in sizes]).tolist()
        self.scratch = at[-1] + (8 * rows_in * v.across * planes if any(v.padding) else 0) + 64
        taps = [8 * (i * dy * v.across + j * dx * v.words) for i in range(kh) for j in range(kw)]
        rows = taps[::kw] if dx == 1 else []  # their words stand one behind the other
        if dy == 1 and rows and kw * v.words == v.across:
            rows = rows[:1]
        border = layout.borders(layer, shape[2], shape[3]) if planes == 1 else None
        self._put(
            X_IMAGE=8 * v.height * v.width * v.words, HEIGHT=v.height, WIDTH=v.width, WORDS=v.words, COPIED=any(v.padding), TOP=v.padding[0],
            LEFT=v.padding[2], ROW=8 * v.across, EXTENT=v.extent, STRIDE_Y=v.stride[0], STRIDE_X=v.stride[1], OUT_H=oh, OUT_W=ow, UNIT_ROWS=unit_rows,
            ROW_UNITS=-(-oh // unit_rows), GROUPS=-(-len(layer.blocks) // group), GROUP=group, SCRATCH_SIZE=self.scratch, TABLE=at[0], CLASS=at[1],
            COUNT=at[2], BITS=at[3], ROWS=at[4], PLANE=8 * rows_in * v.across, BLOCKS=layer.blocks, BLOCK_COUNT=len(layer.blocks), WEIGHTS=layer.words,
            TAPS=len(taps), ROW_OFFSETS=rows, ROW_SEGMENTS=len(rows), ROW_WORDS=kh * kw * v.words // max(1, len(rows)), TAP_OFFSETS=taps,
            PIXEL_OFFSETS=[t // (2 * v.words) for t in taps], LANES=layer.lanes, OUTPUTS=layer.outputs,
            BASE=border.base if border else np.zeros((1, layer.lanes), np.int32),
            ROW_CLASS=border.rows if border and as_output else np.zeros(oh, np.int32),
            COLUMN_CLASS=border.columns if border and as_output else np.zeros(ow, np.int32),
        )  # fmt: skip
        d = self.description
        d[c.UNITS // 8] = v.batch * d[c.ROW_UNITS // 8] * d[c.GROUPS // 8]

    def _put(self, **fields: Any) -> None:
        """Numbers, and the addresses of arrays."""
        for name, value in fields.items():
            if isinstance(value, list):
                value = np.array(value, np.int64)
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value)
                self.kept.append(value)
                value = address(value)
            self.description[getattr(c, name) // 8] = value

    def _split(self, oh: int, ow: int, batch: int, fit: int, blocks: int) -> tuple[int, int]:
        """Output rows and blocks of output channels of a unit: what fits into the cache, and four units a thread where there are so many."""
        rows = min(oh, fit, max(1, 4096 // ow))
        parts, group = -(-oh // rows), blocks
        if self.threads > 1:  # rows first: threads that write to the same places get in each other's way
            wanted = 4 * self.threads
            parts = max(parts, min(-(-wanted // batch), oh * ow // PIXELS, oh))
            if batch * parts < wanted:
                group = max(1, blocks * batch * parts // wanted)
        return -(-oh // parts), group


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


def _planned(x: Array, layer: Layer, e: Epilogue, threads: int) -> tuple[_Plan, tuple[Any, ...]]:
    """The plan of a call, made at the first one of its kind, with what the epilogue needs (that of the last call is kept)."""
    checks.check_conv(x, layer, e)
    plan: _Plan | None = layer.cache.get((x.shape, threads))
    if plan is None:
        if len(layer.cache) > KEPT:
            layer.cache.clear()
        plan = layer.cache[x.shape, threads] = _Plan(x.shape, layer, threads)
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


def float_pool(x: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), ceil_mode: bool = False, threads: int = 1) -> Array:
    """Maximum of float values over windows, see :meth:`fxq.bitwise.engine.Engine.float_pool`."""
    oh, ow = checks.float_pool_geometry(x, kernel, stride, padding, dilation, ceil_mode)
    x = np.ascontiguousarray(x)
    batch, channels, height, width = x.shape
    out = np.empty((batch, oh, ow, channels), np.float32)
    geometry = np.array([v[i] for i in (0, 1) for v in (kernel, stride, padding, dilation)], np.int64)
    threads, _, _ = _share(1, x.nbytes, threads)
    size = 32 * 64 * -(-width // 16)
    scratch = _SCRATCH.at_least(threads * size)
    _call(
        compiled("float_pool", _float_pool), threads, batch * oh, address(x), 0, channels, height, width, oh, ow, address(geometry), address(out),
        address(scratch), size,
    )  # fmt: skip
    return out


def add(a: Array, b: Array, constants: AddConstants, threads: int = 1) -> Array:
    """Integer add, see :meth:`fxq.bitwise.engine.Engine.add`."""
    checks.check_codes(a, b)
    a, b, k = np.ascontiguousarray(a), np.ascontiguousarray(b), constants
    out, values = np.empty(a.shape, np.uint8), np.array([k.ra, k.rb, k.fixed, k.least, k.most], np.float32)
    threads, per_unit, units = _share(a.size, 8 * a.nbytes, threads, 64)
    spill = np.empty(64 * units, np.uint8)
    _call(
        compiled("add", _add),
        threads,
        units,
        address(a),
        address(b),
        address(values),
        address(out),
        a.size,
        per_unit,
        address(spill),
        int(k.narrow),
    )
    return out


def table(x: Array, values: Array, threads: int = 1) -> Array:
    """Table of codes, see :meth:`fxq.bitwise.engine.Engine.table`."""
    checks.check_codes(x, x)
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
