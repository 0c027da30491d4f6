"""What are bits by layer worth? Accuracy in ONNX Runtime of models under budgets of bytes, between all layers in 4 and all in 8 bits.

    python benchmarks/bench_mixed.py [--fresh] [--nets cifar10_resnet20 ...]       (needs the research data, $FXQ_DATA)

`share`: budget relative to the int8 model's weights. `largest first`: the same budget given to sizes alone (the largest layers go to 4 bits first), as a
yardstick for the measured choice. Accuracies on the nets' whole test sets.
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest import mock

import common
import numpy as np
import torch
from bench_accuracy import NETS
from torch import Tensor

import fxq
from fxq import mixed

SHARES = (0.6, 0.75, 0.9)


def in_runtime(m: fxq.CompiledModel, x: Tensor, y: Tensor) -> tuple[float, int]:
    """Percent of right answers of the file in ONNX Runtime, and its bytes."""
    artifact = m.lower("onnx-qdq")
    session = common.session(artifact.data, 1)
    name, hits = session.get_inputs()[0].name, 0
    for i in range(0, len(x), 250):
        out: Any = session.run(None, {name: x[i : i + 250].numpy()})[0]
        hits += int((torch.from_numpy(np.asarray(out)).argmax(1) == y[i : i + 250]).sum())
    return round(100 * hits / len(x), 2), len(artifact.data)


def largest_first(choices: Any, limit: float) -> list[Any]:
    """The yardstick: everything in the most bits, then the largest layers in the fewest until the limit holds."""
    taken = [max(o, key=lambda c: c.bits) for o in choices]
    for i in sorted(range(len(taken)), key=lambda i: -taken[i].cost):
        if sum(t.cost for t in taken) <= limit:
            break
        taken[i] = min(choices[i], key=lambda c: c.bits)
    return taken


def row(name: str, net: Any, calibration: Tensor, x: Tensor, y: Tensor, options: dict[str, Any], scheme: str = "iao_w8a8") -> dict[str, Any]:
    start = time.perf_counter()
    m = fxq.compile(net, scheme, calibration=calibration, progress=False, **options)
    seconds = time.perf_counter() - start
    right, size = in_runtime(m, x, y)
    bits = [] if m.bit_plan is None else list(m.bit_plan.bits.values())
    share = "" if m.bit_plan is None else f"{m.bit_plan.cost / m.bit_plan.own:.3f}"
    four = f"{bits.count(4)} of {len(bits)}" if bits else ""
    return {"accuracy": right, "share": share, "layers in 4 bits": four, "file kB": round(size / 1e3, 1), "compile s": round(seconds, 1)}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--nets", nargs="+", default=["kws_dscnn", "efficientnet_lite0", "cifar10_resnet20"])
    a = p.parse_args()
    torch.set_num_threads(1)
    table = common.Table("mixed", "Bits by layer under a budget of bytes", fresh=a.fresh)
    for name in a.nets:
        case = NETS[name](name)
        todo: dict[str, tuple[dict[str, Any], str]] = {"all 8 bits": ({}, "iao_w8a8"), "all 4 bits": ({}, "iao_w4a8")}
        todo.update({f"{s:.2f} measured": ({"budget": fxq.Budget(bytes=s)}, "iao_w8a8") for s in SHARES})
        todo.update({f"{s:.2f} largest first": ({"budget": fxq.Budget(bytes=s)}, "iao_w8a8") for s in SHARES})
        for what, (options, scheme) in todo.items():
            if f"{name} {what}" in table.rows:
                continue
            with mock.patch.object(mixed, "cheapest", largest_first if "largest" in what else mixed.cheapest):
                table.put(f"{name} {what}", row(name, case.net, case.calibration, case.x, case.y, options, scheme))
    table.write([
        "`measured`: fxq.Budget; `largest first`: the same budget by sizes alone",
        "accuracy of the ONNX file in ONNX Runtime on the whole test set, one thread",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
