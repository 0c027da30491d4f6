"""The innermost loops of packing, unpacking, sums and maxima of codes. Imported only where numba is."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fxq.bitwise.vectors import F32, F64, I1, I8, I16, I32, I64, LANES, cgutils, const, load, operation, rounded, splat, store, variable, vec

# ---------------------------------------------------------------- packing


def _compared(b: Any, x: Any, bounds: Any, planes: int, kind: str, n: int) -> list[Any]:
    """Which values reach ``hi``, and which ``lo`` from below; ``bounds`` holds float32 (or int16) hi, lo."""
    if kind != "float32":
        x = (b.sext if kind == "int8" else b.zext)(x, vec(I16, n))
    size, element = (4, F32) if kind == "float32" else (2, I16)
    hi, lo = (splat(b, load(b, b.add(bounds, I64(size * i)), element, size), n) for i in range(2))
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

    @operation(7)
    def write(b: Any, x: Any, step: Any, channels: Any, bounds: Any, out: Any, row: Any, plane: Any) -> None:
        g = min(n, LANES)
        acc = [[variable(b, const(I64, g, 0)) for _ in range(n // g)] for _ in range(planes)]
        bit = variable(b, const(I64, g, 1))
        with cgutils.for_range(b, channels, intp=I64) as c:
            values, here = load(b, b.add(x, b.mul(c.index, step)), vec(element, n)), b.load(bit)
            for hit, sums in zip(_compared(b, values, bounds, planes, kind, n), acc, strict=True):
                for i, total in enumerate(sums):
                    part = b.shuffle_vector(hit, hit, ir.Constant(vec(I32, g), list(range(i * g, i * g + g))))
                    b.store(b.or_(b.load(total), b.select(part, here, const(I64, g, 0))), total)
            b.store(b.add(here, here), bit)
        for p in range(planes):
            to = b.add(out, b.mul(plane, I64(p)))
            for i in range(n):
                words = b.load(acc[p][i // g])
                word = b.extract_element(b.or_(words, b.load(acc[0][i // g])) if p else words, I32(i % g))
                store(b, b.trunc(word, stored) if stored is not I64 else word, b.add(to, b.mul(row, I64(i))))

    return write


def pack_channels(kind: str, n: int, planes: int) -> Any:
    """``n`` channels that lie one behind the other. Operands: values, bounds, where the ``n`` bits go, bytes to the second plane."""
    element, _ = _element(kind)

    @operation(4)
    def write(b: Any, x: Any, bounds: Any, out: Any, plane: Any) -> None:
        hits = _compared(b, load(b, x, vec(element, n)), bounds, planes, kind, n)
        for p, hit in enumerate(hits):
            store(b, b.bitcast(b.or_(hits[0], hit) if p else hit, ir.IntType(n)), b.add(out, b.mul(plane, I64(p))))

    return write


def unpack_word(planes: int) -> Any:
    """64 codes. Operands: word, bytes to the second plane's, where the int8 codes go."""

    @operation(3)
    def write(b: Any, word: Any, plane: Any, out: Any) -> None:
        bits = [b.bitcast(load(b, b.add(word, b.mul(plane, I64(p))), I64, 8), vec(I1, 64)) for p in range(planes)]
        minus = const(I8, 64, -1)
        other = minus if planes == 1 else b.select(bits[1], minus, const(I8, 64, 0))
        store(b, b.select(bits[0], const(I8, 64, 1), other), out)

    return write


# ---------------------------------------------------------------- codes


@operation(4)
def add_codes(b: Any, x: Any, y: Any, constants: Any, out: Any) -> None:
    """16 sums of uint8 codes; constants: float32 ra, rb, fixed, least, most. Every step rounds as :func:`fxq.kernels.add` does."""
    ra, rb, fixed, least, most = (splat(b, load(b, b.add(constants, I64(4 * i)), F32, 4), 16) for i in range(5))

    def fma(r: Any, v: Any, c: Any) -> Any:
        wide = b.fadd(b.fmul(b.fpext(r, vec(F64, 16)), b.uitofp(v, vec(F64, 16))), b.fpext(c, vec(F64, 16)))
        return b.fptrunc(wide, vec(F32, 16))

    real = fma(ra, load(b, x, vec(I8, 16)), fma(rb, load(b, y, vec(I8, 16)), fixed))
    store(b, b.trunc(rounded(b, real, least, most, 16), vec(I8, 16)), out)


def quantize_codes(n: int) -> Any:
    """``n`` codes of float32 values. Operands: values; constants: float32 scale, least, most, zero (bounds without the zero point); codes."""

    @operation(3)
    def write(b: Any, x: Any, constants: Any, out: Any) -> None:
        scale, least, most, nil = (splat(b, load(b, b.add(constants, I64(4 * i)), F32, 4), n) for i in range(4))
        codes = rounded(b, b.fdiv(load(b, x, vec(F32, n)), scale), least, most, n)
        store(b, b.trunc(b.add(codes, b.fptosi(nil, vec(I32, n))), vec(I8, n)), out)

    return write


def max_codes(n: int, signed: bool) -> Any:
    """``out = max(out, x)`` of ``n`` codes. Operands: x, out."""

    @operation(2)
    def write(b: Any, x: Any, out: Any) -> None:
        a, c = load(b, x, vec(I8, n)), load(b, out, vec(I8, n))
        store(b, b.select((b.icmp_signed if signed else b.icmp_unsigned)(">", a, c), a, c), out)

    return write
