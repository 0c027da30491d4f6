"""What the debugger costs: recorded graphs, numbers of every pass, bisection, sensitivity.

    python benchmarks/bench_debugger.py [--fresh] [--only NET]

Compile times are medians of interleaved runs of one process. Memory: bytes of tensors that only the history holds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from bench_bisect import net
from common import Table
from torch import Tensor

import fxq

NETS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "swin_t", "nin_gc")
ROUNDS = 5


def batches(name: str, seed: int, count: int, size: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    side = 32 if name == "nin_gc" else 224
    return [torch.randn(size, 3, side, side, generator=g) for _ in range(count)]


def tensors(values: Any) -> dict[int, int]:
    """Storage -> its bytes, of all modules and tensors given."""
    found = {}
    for v in values:
        for t in [v] if isinstance(v, Tensor) else [*v.parameters(), *v.buffers()]:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return found


def held(m: fxq.CompiledModel) -> float:
    """Megabytes that only the history holds."""
    own = tensors([m.root])
    kept = tensors(p for s in m.history if s.state is not None for p in s.state.parts.values())
    return sum(size for key, size in kept.items() if key not in own) / 1e6


def one(name: str) -> dict[str, Any]:
    model, data = net(name, 0), batches(name, 1, 4, 8)
    times: dict[str, list[float]] = {"off": [], "states": [], "numbers": []}
    for i in range(ROUNDS + 1):
        for what, options in (("off", {"states": False}), ("states", {}), ("numbers", {"numbers": True})):
            start = time.perf_counter()
            m = fxq.compile(model, "iao_w8a8", calibration=data, progress=False, **options)
            if i:
                times[what].append(time.perf_counter() - start)
    mid = {k: statistics.median(v) for k, v in times.items()}
    few = batches(name, 2, 1, 8)
    start = time.perf_counter()
    verdict = m.bisect("sqnr", few)
    bisected = time.perf_counter() - start
    start = time.perf_counter()
    rows = len(m.sensitivity(few, per="layer").rows)
    return {
        "nodes": m.history["trace"].nodes, "compile s": round(mid["off"], 2), "states": f"{mid['states'] / mid['off'] - 1:+.1%}",
        "numbers": f"{mid['numbers'] / mid['off'] - 1:+.1%}", "held MB": round(held(m), 1), "bisect s": round(bisected, 1), "verdict": verdict.word,
        "evaluations": verdict.evaluations, "runs": verdict.runs, "sensitivity s": round(time.perf_counter() - start, 1), "its rows": rows,
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--only")
    a = p.parse_args()
    torch.set_num_threads(1)
    table = Table("debugger", "What the debugger costs", fresh=a.fresh)
    for name in NETS:
        if a.only in (None, name) and name not in table.rows:
            table.put(name, one(name))
    table.write([
        f"int8, 32 images of 224 px (nin_gc: 32 px), one thread; medians of {ROUNDS} interleaved compilations",
        "`states`: more compile time with the graph of every pass kept (the default) than without; `numbers`: with numbers=True as well",
        "`held MB`: float weights and other tensors that only the history holds (m.history.release() lets them go)",
        "`bisect`, `sensitivity`: on 8 images, SQNR",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
