"""How fast are binary and ternary layers on packed bits, beside float32 and int8 kernels, and how near to what the machine can count?

Run: python benchmarks/bench_bitwise.py [--fresh] [--quick] [--seconds 6] [names ...]

One layer at a time, one thread, all of its runs in turns: processor time of the thread (which other processes disturb little) and wall time, medians. In
each turn a run is called once, cold: the runs before it have emptied the caches (one of float32 moves megabytes); then five times, warm, as behind the layer
that made its input. Ratios are of warm times unless they say cold. Two threads against one: wall time.

float32: torch (NCHW and channels last) and ONNX Runtime, NCHW float32 in and out, with a bias. int8: ONNX Runtime's kernel as inside a net, u8 codes in and
out, channels last; torch's own through oneDNN. Bits: ``packed`` takes float32 NCHW, packs it, and gives float32, channels last;
``net`` takes packed values and gives packed ones, as between two binary layers. TBN: ternary activations; ternary weights: with binary activations.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import bit_limit
import common
import numpy as np
import torch

from fxq import layer_runs
from fxq.bitwise import engine as engines
from fxq.doctor_machine import machine
from fxq.layer_shapes import BITS, TRITS, Form, LayerShape

Run = Callable[[], Any]
WARMUP, LEAST, MOST, WARM = 3, 5, 101, 5
FLOATS = ("torch", "torch channels_last", "ORT")
GOALS = {"3x3 64@56": 6.0, "3x3 128@28": 8.0, "3x3 256@14": 11.0, "3x3 512@7": 14.0, "FC 4096x4096": 40.0}
"""Times float32 that the layer must be faster, packing included."""
INT8_GOAL, TBN_GOAL, LIMIT_GOAL, THREADS_GOAL = 1.6, 1.12, 0.6, 1.7
BINARY, TBN, TERNARY = Form(), Form("ternary", "binary", TRITS, TRITS), Form("binary", "ternary", BITS, BITS)


def conv(channels: int, size: int, kernel: int = 3, stride: int = 1, batch: int = 1) -> LayerShape:
    """A convolution with as many outputs as inputs, whose padding keeps the size."""
    two = (kernel, kernel)
    return LayerShape("conv", batch, channels, channels, two, (stride, stride), (kernel // 2,) * 4, (1, 1), (size, size))


LAYERS = {
    **{f"3x3 {c}@{s}": conv(c, s) for c, s in ((64, 56), (128, 28), (192, 14), (256, 14), (512, 7))},
    "1x1 256@14": conv(256, 14, 1), "5x5 64@28": conv(64, 28, 5), "3x3 128@56 stride 2": conv(128, 56, stride=2),
    "3x3 256@14 batch 8": conv(256, 14, batch=8), "3x3 256@14 batch 32": conv(256, 14, batch=32), "1x1 64@56 batch 8": conv(64, 56, 1, batch=8),
    "FC 4096x4096": LayerShape("linear", 1, 4096, 4096), "FC 4096x4096 batch 64": LayerShape("linear", 64, 4096, 4096),
    "GEMM 1024x1024x1024": LayerShape("linear", 1024, 1024, 1024),
}  # fmt: skip
QUICK = ("3x3 64@56", "3x3 256@14", "1x1 256@14", "FC 4096x4096")


def torch_int8(shape: LayerShape) -> Run:
    """The layer in torch's int8 kernels (oneDNN), as torch's own compiler calls them; codes in and out."""
    ops, rng = torch.ops.onednn, np.random.default_rng(0)
    w = torch.from_numpy(rng.integers(-127, 128, shape.weight, np.int8))
    scale, zero, bias = torch.full((shape.outputs,), 0.01), torch.zeros(shape.outputs, dtype=torch.int32), torch.zeros(shape.outputs)
    x = torch.from_numpy(rng.integers(0, 256, (shape.batch, shape.inputs, *shape.size), np.uint8))
    if shape.kind == "linear":
        flat = ops.qlinear_prepack(w, list(x.shape))
        return lambda: ops.qlinear_pointwise(x, 0.02, 128, flat, scale, zero, bias, 0.05, 128, torch.uint8, "none", [], "")
    x = x.contiguous(memory_format=torch.channels_last)
    window: list[Any] = [list(shape.stride), list(shape.pads[:2]), list(shape.dilation), shape.groups]
    packed = ops.qconv_prepack(w, scale, 0.02, 128, *window, list(x.shape))
    return lambda: ops.qconv2d_pointwise(x, 0.02, 128, packed, scale, zero, bias, *window, 0.05, 128, torch.uint8, "none", [], "")


def runs_of(shape: LayerShape) -> dict[str, Run]:
    """All runs of a layer, one thread."""
    found: dict[str, Run] = {"torch": layer_runs.torch_run(shape), "ORT": layer_runs.onnx_float_run(shape, 1)}
    if shape.size:
        found["torch channels_last"] = layer_runs.torch_run(shape, channels_last=True)
    int8 = layer_runs.onnx_int8_run(shape, 1)
    assert int8 is not None
    found |= {"ORT int8": int8, "torch int8": torch_int8(shape)}
    for name, form in (("binary", BINARY), ("TBN", TBN), ("ternary weights", TERNARY)):
        made = layer_runs.bit_runs(shape, form, 1)
        found |= {f"{name} packed": made["packed"], f"{name} net": made["bits"]}
    found["numpy net"] = layer_runs.bit_runs(shape, BINARY, 1, engines.NUMPY)["bits"]
    return found


def measure(runs: dict[str, Run], seconds: float) -> dict[str, tuple[float, float, float]]:
    """Medians, microseconds, in turns: processor time of this thread and wall time of calls with warm caches, processor time of the first call of a turn."""
    for run in runs.values():
        for _ in range(WARMUP):
            run()
    times: dict[str, list[tuple[float, float]]] = {k: [] for k in runs}
    cold: dict[str, list[float]] = {k: [] for k in runs}
    start = time.perf_counter()
    for i in range(MOST):
        for k, run in runs.items():
            cpu = time.thread_time()
            run()
            cold[k].append(time.thread_time() - cpu)
            for _ in range(WARM):
                cpu, wall = time.thread_time(), time.perf_counter()
                run()
                times[k].append((time.thread_time() - cpu, time.perf_counter() - wall))
        if i + 1 >= LEAST and time.perf_counter() - start > seconds:
            break
    middle = statistics.median
    return {k: (1e6 * middle(t[0] for t in v), 1e6 * middle(t[1] for t in v), 1e6 * middle(cold[k])) for k, v in times.items()}


def two_threads(shape: LayerShape, seconds: float) -> dict[str, float]:
    """One thread's wall time over that of two."""
    runs: dict[str, Run] = {}
    for n in (1, 2):
        made, int8 = layer_runs.bit_runs(shape, BINARY, n), layer_runs.onnx_int8_run(shape, n)
        assert int8 is not None
        runs |= {f"packed {n}": made["packed"], f"net {n}": made["bits"], f"int8 {n}": int8, f"float {n}": layer_runs.onnx_float_run(shape, n)}
    found = measure(runs, seconds)
    return {k: round(found[f"{k} 1"][1] / found[f"{k} 2"][1], 2) for k in ("net", "packed", "int8", "float")}


def row_of(name: str, shape: LayerShape, limit: Run, limit_macs: float, seconds: float) -> dict[str, Any]:
    """Times, ratios and goals of one layer."""
    t = measure({**runs_of(shape), "limit": limit}, seconds)
    gc.collect()
    threads = two_threads(shape, seconds / 3)
    cpu = {k: v[0] for k, v in t.items()}
    best, int8 = min((k for k in FLOATS if k in cpu), key=lambda k: cpu[k]), cpu["ORT int8"]
    peak, gmacs = limit_macs / cpu["limit"] / 1e3, shape.macs / cpu["binary net"] / 1e3
    row: dict[str, Any] = {k: round(v, 1) for k, v in cpu.items() if k != "limit"}
    row |= {
        "best float": best, "packed x float": round(cpu[best] / cpu["binary packed"], 2), "net x float": round(cpu[best] / cpu["binary net"], 2),
        "packed x int8": round(int8 / cpu["binary packed"], 2), "net x int8": round(int8 / cpu["binary net"], 2),
        "packed x torch int8": round(cpu["torch int8"] / cpu["binary packed"], 2), "TBN / binary": round(cpu["TBN packed"] / cpu["binary packed"], 3),
        "TBN / binary net": round(cpu["TBN net"] / cpu["binary net"], 3), "net x numpy": round(cpu["numpy net"] / cpu["binary net"], 2),
        "GMAC/s": round(gmacs), "limit GMAC/s": round(peak), "of the limit": round(gmacs / peak, 3),
        **{f"2 threads {k}": v for k, v in threads.items()},
        "cold us": {k: round(v[2], 1) for k, v in t.items()}, "cold packed x float": round(min(t[k][2] for k in FLOATS if k in t) / t["binary packed"][2], 2),
        "wall us": {k: round(v[1], 1) for k, v in t.items()},
    }  # fmt: skip
    return row | {"goals": goals(name, shape, row)}


def goals(name: str, shape: LayerShape, row: dict[str, Any]) -> str:
    """The issue's figures, each ``ok`` or ``missed``, with what was found."""
    wanted: list[tuple[str, float, float]] = []
    if name in GOALS:
        wanted.append(("float32", row["packed x float"], GOALS[name]))
    if name in GOALS and shape.kernel:
        wanted += [("int8", row["packed x int8"], INT8_GOAL), ("TBN", -row["TBN / binary"], -TBN_GOAL)]
    if min(shape.inputs, shape.outputs) >= 256 and shape.kernel == (3, 3):
        wanted.append(("limit", row["of the limit"], LIMIT_GOAL))
    if name in GOALS:
        wanted.append(("2 threads", row["2 threads net"], THREADS_GOAL))
    wanted.append(("numpy", row["net x numpy"], 1.0))
    return ", ".join(f"{what} {abs(is_):g}/{abs(goal):g} {'ok' if is_ >= goal else 'missed'}" for what, is_, goal in wanted)


def summary(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The head of the page."""
    facts, engine = machine(), engines.engine()
    missed = [f"{k}: {g}" for k, r in rows.items() for g in r["goals"].split(", ") if g.endswith("missed")]
    total = sum(len(r["goals"].split(", ")) for r in rows.values())
    loses = [k for k, r in rows.items() if min(r["packed x int8"], r["packed x torch int8"]) < 1]
    return [
        f"{facts.cpu}, {facts.cores} cores; engine {engine.name} ({engine.path})",
        "us of processor time, one thread; `wall us`: wall time of the same runs; ratios: of processor time; 2 threads: wall time of one over two",
        f"goals: {total - len(missed)} of {total} ok; missed: {'; '.join(missed) or 'none'}",
        f"with packing slower than an int8 kernel (ONNX Runtime's or torch's): {', '.join(loses) or 'none of these layers'}",
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--quick", action="store_true", help="four layers, half a second each; nothing is written")
    p.add_argument("--seconds", type=float, default=6.0, help="for each layer's runs on one thread, a third of it for two threads")
    p.add_argument("names", nargs="*", help="layers, by default all")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if unknown := set(a.names) - set(LAYERS):
        p.error(f"no layer {', '.join(unknown)}; there are {', '.join(LAYERS)}")
    limit, macs = bit_limit.limit_run()
    if a.quick:
        for name in a.names or QUICK:
            print(name, row_of(name, LAYERS[name], limit, macs, 0.5), flush=True)
        return
    table = common.Table("bitwise", "Layers on packed bits, beside float32 and int8", a.fresh)
    for name in a.names or LAYERS:
        if name in table.rows and not a.names:
            continue
        table.put(name, row_of(name, LAYERS[name], limit, macs, a.seconds))
        gc.collect()
    table.rows = {k: table.rows[k] for k in LAYERS if k in table.rows}
    table.write(summary(table.rows))


if __name__ == "__main__":
    main()
