"""Does ``m.bisect`` name the pass and the node of a planted fault, and stay silent on clean compilations?

60 faults of 29 kinds (``faults.py``), six in each of ten nets, each in one pass of the real pipeline; 20 clean compilations (two schemes, other data than
the calibration). A fault counts as named when the first cause has its pass and one of its nodes and no other cause is named; a net that has no place for a
kind passes it on to the next kind. Faults that move the output by less than MOVES dB are planted elsewhere in the same net, unless the pass promised
not to move anything or to copy what it was given (then they count however small they are).

    python benchmarks/bench_bisect.py [--fresh] [--only NET] [--seed N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import Table, randomise, torchvision_net
from faults import FAULTS, Fault, planted
from torch import Tensor, nn

import fxq
from fxq.errors import FxqError
from fxq.zoo import nin_gc

NETS = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x1_0",
    "efficientnet_b0", "regnet_y_400mf", "densenet121", "swin_t", "nin_gc",
)  # fmt: skip
EACH, MOVES = 6, 1.5
STATISTICAL = ("share-qparams", "calibrate")


def net(name: str, seed: int) -> nn.Module:
    if name == "nin_gc":
        torch.manual_seed(seed)
        return randomise(nin_gc(), seed)
    return torchvision_net(name, seed)


def data(name: str, seed: int, batches: int = 2, size: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    side = 32 if name == "nin_gc" else 96
    return [torch.randn(size, 3, side, side, generator=g) for _ in range(batches)]


def compiled(model: nn.Module, calibration: list[Tensor], scheme: str = "iao_w8a8") -> fxq.CompiledModel:
    return fxq.compile(model, scheme, calibration=calibration, progress=False)


def one(name: str, model: nn.Module, fault: Fault, clean: float, seed: int) -> dict[str, Any] | None:
    """Plant the fault where it matters and look for it; None where the net has no place for it."""
    seen, refused = data(name, 1), ""
    for attempt in range(8):
        with planted(fault, seed + 100 * attempt) as truth:
            try:
                m = compiled(model, seen)
            except FxqError as e:
                refused = str(e)
                continue
        names = truth[0]
        if names is None:
            return None
        start = time.perf_counter()
        verdict = m.bisect("sqnr", seen)
        seconds = time.perf_counter() - start
        moved = clean - verdict.scores["compiled"]
        if moved < MOVES and fault.step in STATISTICAL and fault.name != "grid ends beyond the clamp":
            continue
        causes = [c.finding for c in verdict.causes]
        right = len(causes) > 0 and all(f.step == fault.step and (f.node in names or f.path in names) for f in causes)
        said = "; ".join(f"{f.step} / {f.node}: {f.reason}" for f in causes[:3]) or verdict.word
        row = {"pass": fault.step, "fault": fault.name, "node": ", ".join(sorted(names)[:2]), "SQNR": f"{verdict.scores['compiled']:.1f} (clean {clean:.1f})"}
        return {**row, "said": said, "right": right, "evaluations": verdict.evaluations, "runs": verdict.runs, "seconds": round(seconds, 2)}
    return None if not refused else {"pass": fault.step, "fault": fault.name, "said": f"refused by the compiler: {refused}", "right": None}


def faults(table: Table, only: str | None, seed: int) -> None:
    turn = 0
    for i, name in enumerate(NETS):
        if only not in (None, name):
            continue
        model, seen = net(name, 0), data(name, 1)
        clean = float("nan")
        done = sum(k.startswith(name + " ") and " clean" not in k for k in table.rows)
        tried: set[str] = set()
        turn = i * EACH
        while done < EACH and len(tried) < len(FAULTS):
            fault = FAULTS[turn % len(FAULTS)]
            turn += 1
            key = f"{name} {fault.step} {fault.name}"
            tried.add(fault.step + fault.name)
            if key in table.rows:
                continue
            if clean != clean:
                clean = compiled(model, seen).bisect("sqnr", seen).scores["compiled"]
            row = one(name, model, fault, clean, seed + turn)
            if row is not None and row["right"] is not None:
                table.put(key, row)
                done += 1


def silence(table: Table, only: str | None) -> None:
    """Clean compilations on other data than the bisection's."""
    for name in NETS:
        for scheme in ("iao_w8a8", "iao_w4a8"):
            key = f"{name} clean {scheme}"
            if only not in (None, name) or key in table.rows:
                continue
            m = compiled(net(name, 2), data(name, 3, 4), scheme)
            verdict = m.bisect("sqnr", data(name, 4))
            said = "; ".join(f"{c.finding}" for c in verdict.causes) or verdict.word
            row = {"pass": "", "fault": "none", "node": "", "SQNR": f"{verdict.scores['compiled']:.1f} (best grids {verdict.scores['best grids']:.1f})"}
            row.update(said=said, right=verdict.ok, evaluations=verdict.evaluations, runs=verdict.runs, seconds=round(verdict.seconds, 2))
            table.put(key, row)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--only")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    table = Table("bisect", "Planted faults: does the debugger name pass and node?", fresh=a.fresh)
    faults(table, a.only, a.seed)
    silence(table, a.only)
    rows = [r for k, r in table.rows.items() if " clean " not in k]
    clean = [r for k, r in table.rows.items() if " clean " in k]
    right = sum(bool(r["right"]) for r in rows)
    median = {k: statistics.median(r[k] for r in rows) for k in ("evaluations", "runs", "seconds")} if rows else {}
    table.write([
        f"**{right} of {len(rows)}** faults named by pass and node, nothing else named; medians: {median.get('evaluations')} evaluations of the metric, "
        f"{median.get('runs')} more runs of a batch, {median.get('seconds')} s (one thread)",
        f"**{sum(not r['right'] for r in clean)}** false verdicts on {len(clean)} clean compilations",
        "`evaluations`: the metric on all data; `runs`: a batch through a graph besides, two samples of it in float64",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
