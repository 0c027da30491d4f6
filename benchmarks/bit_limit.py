"""The machine's limit of xor, popcount and add on vectors: operands in the first cache, sums in registers, no packing, no borders, no result."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

LANES, VECTORS, PIXELS, WORDS, REPEATS = 8, 4, 4, 36, 400
"""Words of a vector; vectors and broadcast words whose products are summed in registers; words of a sum; sums of a run."""


def _kernel() -> Any:
    """``run(weights address, activations address, words, repeats) -> sum of the counts``."""
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    word = ir.IntType(64)
    vector = ir.VectorType(word, LANES)

    @intrinsic
    def tile(context: Any, weights: Any, values: Any, words: Any) -> Any:
        def generate(cg: Any, b: Any, signature: Any, args: Any) -> Any:
            count = cgutils.get_or_insert_function(b.module, ir.FunctionType(vector, [vector]), f"llvm.ctpop.v{LANES}i64")
            sums = [[cgutils.alloca_once_value(b, ir.Constant(vector, [0] * LANES)) for _ in range(VECTORS)] for _ in range(PIXELS)]
            with cgutils.for_range(b, args[2], intp=word) as step:
                row = b.add(args[0], b.mul(step.index, word(8 * LANES * VECTORS)))
                ws = [b.load(b.inttoptr(b.add(row, word(8 * LANES * v)), vector.as_pointer()), align=8) for v in range(VECTORS)]
                column = b.add(args[1], b.mul(step.index, word(8 * PIXELS)))
                for p in range(PIXELS):
                    x = b.load(b.inttoptr(b.add(column, word(8 * p)), word.as_pointer()), align=8)
                    first = b.insert_element(ir.Constant(vector, ir.Undefined), x, ir.IntType(32)(0))
                    x = b.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))
                    for v in range(VECTORS):
                        b.store(b.add(b.load(sums[p][v]), b.call(count, [b.xor(ws[v], x)])), sums[p][v])
            total = ir.Constant(vector, [0] * LANES)
            for s in (s for row in sums for s in row):
                total = b.add(total, b.load(s))
            out = word(0)
            for lane in range(LANES):
                out = b.add(out, b.extract_element(total, ir.IntType(32)(lane)))
            return out

        return types.int64(types.int64, types.int64, types.int64), generate

    @njit(nogil=True)
    def run(weights: int, values: int, words: int, repeats: int) -> int:
        total = 0
        for _ in range(repeats):
            total += tile(weights, values, words)
        return total

    return run


def limit_run() -> tuple[Any, float]:
    """A run at the limit, and its multiply-accumulates of one bit; the counts are checked against numpy's."""
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 1 << 63, (WORDS, VECTORS * LANES), np.uint64)
    values = rng.integers(0, 1 << 63, (WORDS, PIXELS), np.uint64)
    kernel = _kernel()
    want = int(np.bitwise_count(weights[:, None] ^ values[:, :, None]).sum())
    assert kernel(weights.ctypes.data, values.ctypes.data, WORDS, 3) == 3 * want
    # the arrays live as long as the run
    return (lambda: kernel(weights.ctypes.data, values.ctypes.data, WORDS, REPEATS)), 64.0 * WORDS * VECTORS * LANES * PIXELS * REPEATS


if __name__ == "__main__":
    run, macs = limit_run()
    best = []
    for _ in range(50):
        start = time.thread_time()
        run()
        best.append(time.thread_time() - start)
    print(f"{macs / np.median(best) / 1e9:.0f} GMAC/s")
