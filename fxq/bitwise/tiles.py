"""The innermost operations as LLVM vectors, for numba: one source for every instruction set. All operands are addresses and numbers of int64.

LLVM chooses the instructions (``vpopcntq``, ``vpternlogq``, ``vpshufb``, ``cnt``, ...) for the processor that numba compiles for; here only the sizes
of the vectors depend on it. Imported only where numba is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

cgutils: Any = untyped_cgutils  # numba has types for a part of itself only
I1, I8, I16, I32, I64, F32, F64 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
ROUNDER = 1.5 * 2**23
"""Added and taken away, it rounds a float32 below 2**22 to even."""

PROBE = """define void @probe(<8 x i64>* %a) {
  %x = load <8 x i64>, <8 x i64>* %a
  %y = call <8 x i64> @llvm.ctpop.v8i64(<8 x i64> %x)
  store <8 x i64> %y, <8 x i64>* %a
  ret void
}
declare <8 x i64> @llvm.ctpop.v8i64(<8 x i64>)
"""


def probe(triple: str, cpu: str, features: str) -> tuple[str, int]:
    """The instructions that LLVM takes for a population count on a processor, and how many 64-bit lanes its vectors have."""
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    text = machine.emit_assembly(llvm.parse_assembly(PROBE.replace("* %a) {", '* %a) "prefer-vector-width"="512" "min-legal-vector-width"="512" {')))
    if "zmm" in text:
        return ("AVX-512 VPOPCNTDQ" if "vpopcnt" in text else "AVX-512"), 8
    if "ymm" in text:
        return ("AVX-512 VPOPCNTDQ" if "vpopcnt" in text else "AVX2" if re.search(r"vpshufb\s+%ymm", text) else "generic"), 4
    return ("NEON" if re.search(r"\bcnt\s+[vz]", text) else "generic"), 2


PATH, LANES = probe(*cpu_target.target_context.codegen().magic_tuple())
FUSED = PATH != "generic"
"""The processor multiplies and adds in one step."""
WIDE = 32 if LANES == 8 else 8
"""Output channels of the large tile; the accumulators of 5 pixels must stay in registers."""


# ---------------------------------------------------------------- helpers


def _operation(arity: int, result: Any = types.void) -> Callable[[Callable[..., Any]], Any]:
    """Make a numba intrinsic of ``arity`` int64 operands from ``body(builder, *operands)``."""

    def wrap(body: Callable[..., Any]) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            for wide in ('"prefer-vector-width"="512"', '"min-legal-vector-width"="512"'):  # some processors are tuned for 256 bits
                set.add(b.function.attributes, wide)
            value = body(b, *args)
            return context.get_dummy_value() if result is types.void else value

        def operation(context: Any, *operands: Any) -> Any:
            return result(*[types.int64] * arity), codegen

        names = ["context", *(f"operand{i}" for i in range(arity))]
        operation.__signature__ = Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names])  # type: ignore[attr-defined]
        return intrinsic(operation)

    return wrap


def _vec(element: Any, n: int) -> Any:
    return ir.VectorType(element, n)


def _const(element: Any, n: int, value: Any) -> Any:
    return ir.Constant(_vec(element, n), [value] * n)


def _pointer(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def _load(b: Any, address: Any, kind: Any, align: int = 1) -> Any:
    return b.load(_pointer(b, address, kind), align=align)


def _store(b: Any, value: Any, address: Any, align: int = 1) -> None:
    b.store(value, _pointer(b, address, value.type), align=align)


def _splat(b: Any, x: Any, n: int) -> Any:
    v = b.insert_element(ir.Constant(_vec(x.type, n), ir.Undefined), x, I32(0))
    return b.shuffle_vector(v, v, _const(I32, n, 0))


def _at(b: Any, address: Any, index: Any, size: int) -> Any:
    return b.add(address, b.mul(index, I64(size)))


def _variable(b: Any, value: Any) -> Any:
    return cgutils.alloca_once_value(b, value)


@_operation(2, types.int64)
def fetch_add(b: Any, address: Any, value: Any) -> Any:
    """Atomic sum: the old value of an int64."""
    return b.atomic_rmw("add", _pointer(b, address, I64), value, "monotonic")


@_operation(1, types.int64)
def load64(b: Any, address: Any) -> Any:
    """An int64."""
    return _load(b, address, I64, 8)


@_operation(1, types.int64)
def load32(b: Any, address: Any) -> Any:
    """An int32 as int64."""
    return b.sext(_load(b, address, I32, 4), I64)


@_operation(1, types.int64)
def load8(b: Any, address: Any) -> Any:
    """A uint8 as int64."""
    return b.zext(_load(b, address, I8), I64)


@_operation(2)
def store64(b: Any, address: Any, value: Any) -> None:
    """Write an int64."""
    _store(b, value, address, 8)


@_operation(2)
def store32(b: Any, address: Any, value: Any) -> None:
    """Write the low half of an int64."""
    _store(b, b.trunc(value, I32), address, 4)


@_operation(2)
def store8(b: Any, address: Any, value: Any) -> None:
    """Write the low byte of an int64."""
    _store(b, b.trunc(value, I8), address)


@_operation(1, types.int64)
def ctpop(b: Any, x: Any) -> Any:
    """Set bits."""
    return b.ctpop(x)


def _move(kind: Any) -> Any:
    @_operation(2)
    def move(b: Any, to: Any, source: Any) -> None:
        """One number to another place."""
        _store(b, _load(b, source, kind), to)

    return move


move8, move16, move32, move512 = _move(I8), _move(I16), _move(I32), _move(_vec(F32, 16))


@_operation(3)
def copy(b: Any, to: Any, source: Any, size: Any) -> None:
    """memcpy."""
    cgutils.raw_memcpy(b, _pointer(b, to, I8), _pointer(b, source, I8), size, 1)


@_operation(2)
def zero(b: Any, to: Any, size: Any) -> None:
    """memset with 0."""
    cgutils.memset(b, _pointer(b, to, I8), size, 0)


# ---------------------------------------------------------------- dot products


def tile(pixels: int, lanes: int, planes: int, masked: bool) -> Any:
    """Dot products of ``pixels`` positions with ``lanes`` output channels.

    Operands: weights; bytes from one word of them to the next; from plane 0 to plane 1 of them; table of the pixels' addresses; what is added to
    them; bytes from plane 0 to plane 1 of the pixels; offsets of the segments; how many; words of a segment; where the int32 results go (128
    bytes a pixel). They are ``-2 * popcount((w ^ x) & m)``; with two planes and masked weights the dot products themselves.
    """
    n = min(lanes, LANES)
    count = lanes // n

    @_operation(10)
    def dots(b: Any, w: Any, step: Any, second: Any, table: Any, first: Any, delta: Any, offsets: Any, segments: Any, words: Any, out: Any) -> None:
        pop = cgutils.get_or_insert_function(b.module, ir.FunctionType(_vec(I64, n), [_vec(I64, n)]), f"llvm.ctpop.v{n}i64")
        acc = [[_variable(b, _const(I64, n, 0)) for _ in range(count)] for _ in range(pixels)]
        place = _variable(b, w)
        bases = [b.add(_load(b, b.add(table, I64(8 * p)), I64, 8), first) for p in range(pixels)]
        with cgutils.for_range(b, segments, intp=I64) as segment:
            offset = _load(b, _at(b, offsets, segment.index, 8), I64, 8)
            starts = [b.add(x, offset) for x in bases]
            with cgutils.for_range(b, words, intp=I64) as word:
                at, here = b.mul(word.index, I64(8)), b.load(place)
                b.store(b.add(here, step), place)
                ws = [_load(b, b.add(here, I64(8 * n * v)), _vec(I64, n), 8) for v in range(count)]
                ms = [_load(b, b.add(b.add(here, second), I64(8 * n * v)), _vec(I64, n), 8) for v in range(count)] if masked else None
                for p in range(pixels):
                    _word(b, pop, acc[p], ws, ms, b.add(starts[p], at), delta, planes, n)
        for p in range(pixels):
            for v in range(count):
                value = b.trunc(b.load(acc[p][v]), _vec(I32, n))
                if planes == 1 or not masked:
                    value = b.sub(_const(I32, n, 0), b.shl(value, _const(I32, n, 1)))
                _store(b, value, b.add(out, I64(128 * p + 4 * n * v)), 4)

    return dots


def _word(b: Any, pop: Any, acc: Any, ws: Any, ms: Any, address: Any, delta: Any, planes: int, n: int) -> None:
    """Add one word of one pixel to its accumulators."""
    x = _splat(b, _load(b, address, I64, 8), n)
    m = _splat(b, _load(b, b.add(address, delta), I64, 8), n) if planes == 2 else None
    for v, w in enumerate(ws):
        differ, total = b.xor(w, x), b.load(acc[v])
        if m is not None and ms is not None:
            both = b.and_(ms[v], m)
            minus = b.and_(both, differ)
            total = b.add(total, b.call(pop, [b.and_(both, b.not_(differ))]))
            b.store(b.sub(total, b.call(pop, [minus])), acc[v])
            continue
        mask = m if m is not None else ms[v] if ms is not None else None
        b.store(b.add(total, b.call(pop, [differ if mask is None else b.and_(differ, mask)])), acc[v])


@_operation(2)
def count_bits(b: Any, words: Any, out: Any) -> None:
    """Set bits of 8 words, int32. Operands: words, counts."""
    pop = cgutils.get_or_insert_function(b.module, ir.FunctionType(_vec(I64, 8), [_vec(I64, 8)]), "llvm.ctpop.v8i64")
    _store(b, b.trunc(b.call(pop, [_load(b, words, _vec(I64, 8), 8)]), _vec(I32, 8)), out, 4)


def sum_taps(n: int) -> Any:
    """Sums of int32 counts of ``n`` neighbouring places over the taps. Operands: counts, int64 offsets of the taps in bytes, taps, sums."""

    @_operation(4)
    def write(b: Any, counts: Any, offsets: Any, taps: Any, out: Any) -> None:
        acc = _variable(b, _const(I32, n, 0))
        with cgutils.for_range(b, taps, intp=I64) as t:
            at = b.add(counts, _load(b, _at(b, offsets, t.index, 8), I64, 8))
            b.store(b.add(b.load(acc), _load(b, at, _vec(I32, n), 4)), acc)
        _store(b, b.load(acc), out, 4)

    return write


# ---------------------------------------------------------------- epilogues


def _dot(b: Any, dots: Any, base: Any, count: Any, n: int) -> Any:
    """Parts of a dot product put together: of the tile, of the border table, of the pixel."""
    return b.add(b.add(_load(b, dots, _vec(I32, n), 4), _load(b, base, _vec(I32, n), 4)), _splat(b, b.trunc(count, I32), n))


def _rounded(b: Any, real: Any, least: Any, most: Any, n: int) -> Any:
    """float32 values (least and most: vectors) clipped and rounded to even, int32."""
    real = b.select(b.fcmp_ordered(">", real, least), real, least)
    real = b.select(b.fcmp_ordered("<", real, most), real, most)
    magic = _const(F32, n, ROUNDER)
    return b.fptosi(b.fsub(b.fadd(real, magic), magic), _vec(I32, n))


def signs(n: int) -> Any:
    """Operands: dots, base, count, thresholds, where the ``n`` bits go."""

    @_operation(5)
    def write(b: Any, dots: Any, base: Any, count: Any, hi: Any, out: Any) -> None:
        bits = b.icmp_signed(">=", _dot(b, dots, base, count, n), _load(b, hi, _vec(I32, n), 4))
        _store(b, b.bitcast(bits, ir.IntType(n)), out)

    return write


def trits(n: int) -> Any:
    """Operands: dots, base, count, upper thresholds, lower ones, where the bits of both planes go."""

    @_operation(7)
    def write(b: Any, dots: Any, base: Any, count: Any, hi: Any, lo: Any, out: Any, second: Any) -> None:
        dot = _dot(b, dots, base, count, n)
        plus = b.icmp_signed(">=", dot, _load(b, hi, _vec(I32, n), 4))
        some = b.or_(plus, b.icmp_signed("<=", dot, _load(b, lo, _vec(I32, n), 4)))
        _store(b, b.bitcast(plus, ir.IntType(n)), out)
        _store(b, b.bitcast(some, ir.IntType(n)), second)

    return write


def numbers(n: int, kind: str) -> Any:
    """Operands: dots, base, count, mult, bias, scale, address of least, most and zero (float32), where the ``n`` results go."""

    @_operation(8)
    def write(b: Any, dots: Any, base: Any, count: Any, mult: Any, bias: Any, scale: Any, bounds: Any, out: Any) -> None:
        acc = b.add(b.mul(_dot(b, dots, base, count, n), _load(b, mult, _vec(I32, n), 4)), _load(b, bias, _vec(I32, n), 4))
        if kind == "int32":
            return _store(b, acc, out)
        real = b.fmul(b.sitofp(acc, _vec(F32, n)), _load(b, scale, _vec(F32, n), 4))
        if kind == "float":
            return _store(b, real, out)
        least, most, nil = (_splat(b, _load(b, b.add(bounds, I64(4 * i)), F32, 4), n) for i in range(3))
        codes = b.add(_rounded(b, real, least, most, n), b.fptosi(nil, _vec(I32, n)))
        return _store(b, b.trunc(codes, _vec(I8, n)), out)

    return write


# ---------------------------------------------------------------- packing


def _compared(b: Any, x: Any, bounds: Any, planes: int, kind: str, n: int) -> list[Any]:
    """Which values reach ``hi``, and which ``lo`` from below; ``bounds`` holds float32 (or int16) hi, lo."""
    if kind != "float32":
        x = (b.sext if kind == "int8" else b.zext)(x, _vec(I16, n))
    size, element = (4, F32) if kind == "float32" else (2, I16)
    hi, lo = (_splat(b, _load(b, b.add(bounds, I64(size * i)), element, size), n) for i in range(2))
    compare = b.fcmp_ordered if kind == "float32" else b.icmp_signed
    return [compare(">=", x, hi), compare("<=", x, lo)] if planes == 2 else [compare(">=", x, hi)]


def _element(kind: str) -> tuple[Any, int]:
    return (F32, 4) if kind == "float32" else (I8, 1)


def pack_places(kind: str, n: int, planes: int, stored: Any = I64) -> Any:
    """Up to 64 channels of ``n`` neighbouring places.

    Operands: values of the first channel; bytes from a channel to the next; channels; bounds; where the words go; bytes from a place's word to
    the next one's; to the second plane.
    """
    element, _ = _element(kind)

    @_operation(7)
    def write(b: Any, x: Any, step: Any, channels: Any, bounds: Any, out: Any, row: Any, plane: Any) -> None:
        g = min(n, LANES)
        acc = [[_variable(b, _const(I64, g, 0)) for _ in range(n // g)] for _ in range(planes)]
        bit = _variable(b, _const(I64, g, 1))
        with cgutils.for_range(b, channels, intp=I64) as c:
            values, here = _load(b, b.add(x, b.mul(c.index, step)), _vec(element, n)), b.load(bit)
            for hit, sums in zip(_compared(b, values, bounds, planes, kind, n), acc, strict=True):
                for i, total in enumerate(sums):
                    part = b.shuffle_vector(hit, hit, ir.Constant(_vec(I32, g), list(range(i * g, i * g + g))))
                    b.store(b.or_(b.load(total), b.select(part, here, _const(I64, g, 0))), total)
            b.store(b.add(here, here), bit)
        for p in range(planes):
            to = b.add(out, b.mul(plane, I64(p)))
            for i in range(n):
                words = b.load(acc[p][i // g])
                word = b.extract_element(b.or_(words, b.load(acc[0][i // g])) if p else words, I32(i % g))
                _store(b, b.trunc(word, stored) if stored is not I64 else word, b.add(to, b.mul(row, I64(i))))

    return write


def pack_channels(kind: str, n: int, planes: int) -> Any:
    """``n`` channels that lie one behind the other. Operands: values, bounds, where the ``n`` bits go, bytes to the second plane."""
    element, _ = _element(kind)

    @_operation(4)
    def write(b: Any, x: Any, bounds: Any, out: Any, plane: Any) -> None:
        hits = _compared(b, _load(b, x, _vec(element, n)), bounds, planes, kind, n)
        for p, hit in enumerate(hits):
            _store(b, b.bitcast(b.or_(hits[0], hit) if p else hit, ir.IntType(n)), b.add(out, b.mul(plane, I64(p))))

    return write


def unpack_word(planes: int) -> Any:
    """64 codes. Operands: word, bytes to the second plane's, where the int8 codes go."""

    @_operation(3)
    def write(b: Any, word: Any, plane: Any, out: Any) -> None:
        bits = [b.bitcast(_load(b, b.add(word, b.mul(plane, I64(p))), I64, 8), _vec(I1, 64)) for p in range(planes)]
        minus = _const(I8, 64, -1)
        other = minus if planes == 1 else b.select(bits[1], minus, _const(I8, 64, 0))
        _store(b, b.select(bits[0], _const(I8, 64, 1), other), out)

    return write


# ---------------------------------------------------------------- codes


def _sum_of_codes(b: Any, x: Any, y: Any, constants: Any, out: Any, fma: Callable[..., Any]) -> None:
    ra, rb, fixed, least, most = (_splat(b, _load(b, b.add(constants, I64(4 * i)), F32, 4), 16) for i in range(5))
    real = fma(b, ra, _load(b, x, _vec(I8, 16)), fma(b, rb, _load(b, y, _vec(I8, 16)), fixed))
    _store(b, b.trunc(_rounded(b, real, least, most, 16), _vec(I8, 16)), out)


def _wide_fma(b: Any, r: Any, v: Any, c: Any) -> Any:
    wide = b.fadd(b.fmul(b.fpext(r, _vec(F64, 16)), b.uitofp(v, _vec(F64, 16))), b.fpext(c, _vec(F64, 16)))
    return b.fptrunc(wide, _vec(F32, 16))


def _fma(b: Any, r: Any, v: Any, c: Any) -> Any:
    row = _vec(F32, 16)
    fused = cgutils.get_or_insert_function(b.module, ir.FunctionType(row, [row, row, row]), "llvm.fma.v16f32")
    return b.call(fused, [r, b.uitofp(v, row), c])


@_operation(4)
def add_codes(b: Any, x: Any, y: Any, constants: Any, out: Any) -> None:
    """16 sums of uint8 codes; constants: float32 ra, rb, fixed, least, most. Every step rounds as :func:`fxq.kernels.add` does, in float64 first."""
    _sum_of_codes(b, x, y, constants, out, _wide_fma)


@_operation(4)
def add_codes_narrow(b: Any, x: Any, y: Any, constants: Any, out: Any) -> None:
    """The same by fused operations of float32 where the processor has them: one rounding instead of two."""
    _sum_of_codes(b, x, y, constants, out, _fma if FUSED else _wide_fma)


def quantize_codes(n: int) -> Any:
    """``n`` codes of float32 values. Operands: values; constants: float32 scale, least, most, zero (bounds without the zero point); codes."""

    @_operation(3)
    def write(b: Any, x: Any, constants: Any, out: Any) -> None:
        scale, least, most, nil = (_splat(b, _load(b, b.add(constants, I64(4 * i)), F32, 4), n) for i in range(4))
        codes = _rounded(b, b.fdiv(_load(b, x, _vec(F32, n)), scale), least, most, n)
        _store(b, b.trunc(b.add(codes, b.fptosi(nil, _vec(I32, n))), _vec(I8, n)), out)

    return write


def max_values(n: int) -> Any:
    """``out = max(out, x)`` of ``n`` float32. Operands: x, out."""

    @_operation(2)
    def write(b: Any, x: Any, out: Any) -> None:
        a, c = _load(b, x, _vec(F32, n)), _load(b, out, _vec(F32, n))
        _store(b, b.select(b.fcmp_unordered("<", c, a), a, c), out)

    return write


@_operation(3)
def transpose(b: Any, x: Any, row: Any, out: Any) -> None:
    """16 rows of 16 float32, ``row`` bytes apart, as 16 columns that lie one behind the other."""
    rows = [_load(b, b.add(x, b.mul(row, I64(i))), _vec(F32, 16)) for i in range(16)]
    low, high = ([half + i // 2 + 16 * (i % 2) for i in range(16)] for half in (0, 8))
    for _ in range(4):  # each time the rows of both halves go between each other
        pairs = [(rows[i], rows[i + 8]) for i in range(8)]
        rows = [b.shuffle_vector(p, q, ir.Constant(_vec(I32, 16), order)) for p, q in pairs for order in (low, high)]
    for i, r in enumerate(rows):
        _store(b, r, b.add(out, I64(64 * i)))


def max_codes(n: int, signed: bool) -> Any:
    """``out = max(out, x)`` of ``n`` codes. Operands: x, out."""

    @_operation(2)
    def write(b: Any, x: Any, out: Any) -> None:
        a, c = _load(b, x, _vec(I8, n)), _load(b, out, _vec(I8, n))
        _store(b, b.select((b.icmp_signed if signed else b.icmp_unsigned)(">", a, c), a, c), out)

    return write
