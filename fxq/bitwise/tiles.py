"""The innermost loops of a layer: dot products of a few positions with a block of output channels, and the epilogues. Imported only where numba is."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fxq.bitwise.vectors import F32, I8, I32, I64, LANES, cgutils, const, element, joined, load, operation, rounded, splat, store, variable, vec

WIDE = 32 if LANES == 8 else 8
"""Output channels of the large tile; the accumulators of 5 pixels must stay in registers."""


# ---------------------------------------------------------------- dot products


def tile(pixels: int, lanes: int, planes: int, masked: bool) -> Any:
    """Dot products of ``pixels`` positions with ``lanes`` output channels.

    Operands: weights; bytes from one word of them to the next; from plane 0 to plane 1 of them; table of the pixels' addresses; what is added to
    them; bytes from plane 0 to plane 1 of the pixels; offsets of the segments; how many; words of a segment; where the int32 results go (128
    bytes a pixel). They are what is taken away from the border table's or the pixel's number: ``2 * popcount((w ^ x) & m)``; with two planes and
    masked weights the negative dot products themselves.
    """
    n = min(lanes, LANES)
    count = lanes // n

    @operation(10)
    def dots(b: Any, w: Any, step: Any, second: Any, table: Any, first: Any, delta: Any, offsets: Any, segments: Any, words: Any, out: Any) -> None:
        pop = cgutils.get_or_insert_function(b.module, ir.FunctionType(vec(I64, n), [vec(I64, n)]), f"llvm.ctpop.v{n}i64")
        acc = [[variable(b, const(I64, n, 0)) for _ in range(count)] for _ in range(pixels)]
        place = variable(b, w)
        bases = [b.add(load(b, b.add(table, I64(8 * p)), I64, 8), first) for p in range(pixels)]
        with cgutils.for_range(b, segments, intp=I64) as segment:
            offset = load(b, element(b, offsets, segment.index, 8), I64, 8)
            starts = [b.add(x, offset) for x in bases]
            with cgutils.for_range(b, words, intp=I64) as word:
                at, here = b.mul(word.index, I64(8)), b.load(place)
                b.store(b.add(here, step), place)
                ws = [load(b, b.add(here, I64(8 * n * v)), vec(I64, n), 8) for v in range(count)]
                ms = [load(b, b.add(b.add(here, second), I64(8 * n * v)), vec(I64, n), 8) for v in range(count)] if masked else None
                for p in range(pixels):
                    _word(b, pop, acc[p], ws, ms, b.add(starts[p], at), delta, planes, n)
        for p in range(pixels):  # in one piece, as it is read: a processor hands on what it has just stored only if the pieces are the same
            value = joined(b, [b.trunc(b.load(a), vec(I32, n)) for a in acc[p]], n)
            store(b, value if planes == 2 and masked else b.shl(value, const(I32, lanes, 1)), b.add(out, I64(128 * p)), 4)

    return dots


def _word(b: Any, pop: Any, acc: Any, ws: Any, ms: Any, address: Any, delta: Any, planes: int, n: int) -> None:
    """Add one word of one pixel to its accumulators."""
    x = splat(b, load(b, address, I64, 8), n)
    m = splat(b, load(b, b.add(address, delta), I64, 8), n) if planes == 2 else None
    for v, w in enumerate(ws):
        differ, total = b.xor(w, x), b.load(acc[v])
        if m is not None and ms is not None:
            both = b.and_(ms[v], m)
            total = b.add(total, b.call(pop, [b.and_(both, differ)]))
            b.store(b.sub(total, b.call(pop, [b.and_(both, b.not_(differ))])), acc[v])
            continue
        mask = m if m is not None else ms[v] if ms is not None else None
        b.store(b.add(total, b.call(pop, [differ if mask is None else b.and_(differ, mask)])), acc[v])


@operation(2)
def count_bits(b: Any, words: Any, out: Any) -> None:
    """Set bits of 8 words, int32. Operands: words, counts."""
    pop = cgutils.get_or_insert_function(b.module, ir.FunctionType(vec(I64, 8), [vec(I64, 8)]), "llvm.ctpop.v8i64")
    store(b, b.trunc(b.call(pop, [load(b, words, vec(I64, 8), 8)]), vec(I32, 8)), out, 4)


def sum_taps(n: int) -> Any:
    """Sums of int32 counts of ``n`` neighbouring places over the taps. Operands: counts, int64 offsets of the taps in bytes, taps, sums."""

    @operation(4)
    def write(b: Any, counts: Any, offsets: Any, taps: Any, out: Any) -> None:
        acc = variable(b, const(I32, n, 0))
        with cgutils.for_range(b, taps, intp=I64) as t:
            at = b.add(counts, load(b, element(b, offsets, t.index, 8), I64, 8))
            b.store(b.add(b.load(acc), load(b, at, vec(I32, n), 4)), acc)
        store(b, b.load(acc), out, 4)

    return write


# ---------------------------------------------------------------- epilogues


def _dot(b: Any, dots: Any, base: Any, count: Any, n: int) -> Any:
    """Parts of a dot product put together: of the tile, of the border table, of the pixel."""
    return b.sub(b.add(load(b, base, vec(I32, n), 4), splat(b, b.trunc(count, I32), n)), load(b, dots, vec(I32, n), 4))


def signs(n: int) -> Any:
    """Operands: dots, base, count, thresholds, where the ``n`` bits go."""

    @operation(5)
    def write(b: Any, dots: Any, base: Any, count: Any, hi: Any, out: Any) -> None:
        bits = b.icmp_signed(">=", _dot(b, dots, base, count, n), load(b, hi, vec(I32, n), 4))
        store(b, b.bitcast(bits, ir.IntType(n)), out)

    return write


def trits(n: int) -> Any:
    """Operands: dots, base, count, upper thresholds, lower ones, where the bits of both planes go."""

    @operation(7)
    def write(b: Any, dots: Any, base: Any, count: Any, hi: Any, lo: Any, out: Any, second: Any) -> None:
        dot = _dot(b, dots, base, count, n)
        plus = b.icmp_signed(">=", dot, load(b, hi, vec(I32, n), 4))
        some = b.or_(plus, b.icmp_signed("<=", dot, load(b, lo, vec(I32, n), 4)))
        store(b, b.bitcast(plus, ir.IntType(n)), out)
        store(b, b.bitcast(some, ir.IntType(n)), second)

    return write


def numbers(n: int, kind: str) -> Any:
    """Operands: dots, base, count, mult, bias, scale, address of least, most and zero (float32), where the ``n`` results go."""

    @operation(8)
    def write(b: Any, dots: Any, base: Any, count: Any, mult: Any, bias: Any, scale: Any, bounds: Any, out: Any) -> None:
        acc = b.add(b.mul(_dot(b, dots, base, count, n), load(b, mult, vec(I32, n), 4)), load(b, bias, vec(I32, n), 4))
        if kind == "int32":
            return store(b, acc, out)
        real = b.fmul(b.sitofp(acc, vec(F32, n)), load(b, scale, vec(F32, n), 4))
        if kind == "float":
            return store(b, real, out)
        least, most, nil = (splat(b, load(b, b.add(bounds, I64(4 * i)), F32, 4), n) for i in range(3))
        codes = b.add(rounded(b, real, least, most, n), b.fptosi(nil, vec(I32, n)))
        return store(b, b.trunc(codes, vec(I8, n)), out)

    return write
