"""What does a codebook cost, how good is it, and what is a bit worth?

Run: python benchmarks/bench_kmeans.py [--most 100000000]

Weights are drawn: Gaussian, and Gaussian with the smallest 90 % pruned (what a codebook sees after magnitude pruning). Times are CPU seconds of this thread
(one run from 10 million values on, else the best of three).
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import common
import torch
from torch import Tensor

from fxq import kmeans

ENTRIES = (16, 32, 256)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def gauss(count: int, pruned: float = 0.0) -> Tensor:
    """Seeded weights; with ``pruned`` the values of this part that are smallest in magnitude are drawn again from the tails."""
    g = torch.Generator().manual_seed(0)
    if not pruned:
        return torch.randn(count, generator=g) * 0.02
    tail = torch.rand(count, generator=g, dtype=torch.float64) * (1 - pruned)
    sign = torch.where(torch.rand(count, generator=g) < 0.5, -1.0, 1.0)
    magnitude = torch.special.ndtri(1 - tail / 2).to(torch.float32)
    return magnitude * sign * 0.02


def spent(work: Any, count: int) -> tuple[float, Any]:
    """CPU seconds, result."""
    best = float("inf")
    for _ in range(1 if count >= 10_000_000 else 3):
        begin = time.process_time()
        found = work()
        best = min(best, time.process_time() - begin)
    return best, found


def quality(x: Tensor, codes: Tensor, book: Tensor) -> tuple[float, float]:
    """Mean squared error over the variance, entropy of the codes in bits."""
    total = 0.0
    for part, code in zip(x.split(1 << 22), codes.split(1 << 22), strict=True):
        total += float(((part - book[code.long() - 1]).double() ** 2).sum())
    share = torch.bincount(codes, minlength=len(book) + 1)[1:].double() / x.numel()
    share = share[share > 0]
    return total / x.numel() / float(x.var(unbiased=False)), -float((share * share.log2()).sum())


def run(table: common.Table, name: str, x: Tensor, k: int, init: str, rate: float, best: float | None) -> float:
    """Put one row; the mean squared error over the variance."""
    book_time, _ = spent(lambda: kmeans.codebook(x, k, init=init, rate=rate), x.numel())
    both_time, (codes, book) = spent(lambda: kmeans.cluster(x, k, init=init, rate=rate), x.numel())
    error, bits = quality(x, codes, book)
    table.put(f"{name}, k={k}, {init}" + (f", rate {rate:g}" if rate else ""), {
        "codebook s": f"{book_time:.3f}", "with codes s": f"{both_time:.3f}", "entries": len(book), "error": f"{error:.4e}",
        "above optimal": "" if best is None else f"{error / best - 1:+.2%}", "SNR dB": f"{-10 * math.log10(error):.2f}", "entropy bits": f"{bits:.3f}",
    })  # fmt: skip
    return error


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--most", type=float, default=1e8, help="number of weights of the large case")
    a = p.parse_args()
    torch.set_num_threads(1)
    table = common.Table("kmeans", "Codebooks of weights by one-dimensional k-means", fresh=True)
    small, most = 1_000_000, int(a.most)
    sets = {f"{small:.0e} gauss": gauss(small), f"{small:.0e} pruned": gauss(small, 0.9), f"{most:.0e} gauss": gauss(most)}
    for name, x in sets.items():
        for k in ENTRIES:
            best: float | None = None
            for init in kmeans.INITS:
                error = run(table, name, x, k, init, 0.0, best)
                best = error if best is None else best
    for name in list(sets)[:2]:
        for k in (24, 12, 8):
            run(table, name, sets[name], k, "optimal", 0.0, None)
        for rate in RATES:
            run(table, name, sets[name], 32, "optimal", rate, None)
    table.write([
        "seconds: CPU time of one thread, alone and with the codes of all weights; error: mean squared error over the variance",
        "linear, quantile, density: Lloyd's algorithm to convergence from that start; above optimal: their error against the optimal start's",
        "rate: error + rate * bits is minimised (32 entries asked for); entropy bits: of the codes, zeros not counted",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
