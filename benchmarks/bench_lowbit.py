"""Low-bit schemes in ONNX Runtime: bits a weight in the file, bytes, load time, and speed beside fp32 and int8, interleaved in one run.

Run: python benchmarks/bench_lowbit.py [--fresh] [--threads 1] [--rounds 31] [--parts layers nets] [names of schemes ...]

``layers``: chains of four equal 3x3 convolutions with batch norm and ReLU, every layer low-bit (the schemes' own first and last layers in float or
int8 are left out). ``nets``: ResNet-18 at 224x224 with random weights, the schemes as they are.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import common
import onnx
import torch
from torch import nn

import fxq
from fxq import schemes
from fxq.errors import FxqError

SCHEMES = (
    "iao_w4a8", "iao_w4a4", "dorefa_w4a4", "dorefa_w2a2", "xnor_w1a1", "xnor_w1a1_k", "tbn_w1at", "twn_wta1", "twn_wta8", "xnor_w1a32", "twn_wta32",
    "dorefa_w4a32",
)  # fmt: skip
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
CHAIN, LOADS, WARMUP = 4, 7, 3


def chain(channels: int) -> nn.Module:
    """Equal convolutions with batch norm and ReLU."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(CHAIN):
        parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return common.randomise(nn.Sequential(*parts))


def everywhere(name: str) -> schemes.Scheme:
    """The scheme with all layers low-bit."""
    found = schemes.get(name)
    return replace(found, name=f"{name}_everywhere", float_layers=(), int8_layers=()) if found.float_layers or found.int8_layers else found


def bits(data: bytes, weights: int) -> float:
    """Bits a weight of quantized layers: their codes, tables, scales and zero points in the file."""
    parts = ("/weight_packed", "/weight_q4", "/weight_q", "/weight_scale", "/weight_zero", "/weight_shape", "/weight_all", "/weight_from", "/weight_count")
    stored = onnx.load_from_string(data).graph.initializer
    return 8 * sum(t.ByteSize() for t in stored if t.name.endswith(parts) or t.name.startswith("tables/")) / weights


def weights_of(m: fxq.CompiledModel) -> int:
    """Weights of quantized layers."""
    return sum(q.op.weight.numel() for q in m.graph_module.modules() if isinstance(q, fxq.modules.Quantized))  # type: ignore[attr-defined, union-attr]


def known(names: list[str]) -> list[str]:
    """Those that exist."""
    out = []
    for name in names:
        try:
            schemes.get(name)
        except FxqError:
            print(f"{name}: not there yet", flush=True)
        else:
            out.append(name)
    return out


def timed(runs: dict[str, Callable[[], Any]], a: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each, in turns; with one thread its CPU time, which other processes on the machine disturb less."""
    clock = time.thread_time if a.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {k: [] for k in runs}
    for i in range(a.rounds + WARMUP):
        for k, run in runs.items():
            start = clock()
            run()
            if i >= WARMUP:
                times[k].append(clock() - start)
    return {k: statistics.median(v) for k, v in times.items()}


def measure(net: nn.Module, x: torch.Tensor, chosen: dict[str, str | schemes.Scheme], a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Row by scheme; the proof of each file on one more batch, and its integer coverage, beside the figures."""
    files: dict[str, bytes] = {}
    rows: dict[str, dict[str, Any]] = {}
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    for name, scheme in chosen.items():
        m = fxq.compile(net, scheme, calibration=x)
        files[name] = data = m.lower().data
        rows[name] = {"bits/weight": round(bits(data, weights_of(m)), 3) if name != "float" else 32, "kB": round(len(data) / 1000, 1)}
        proof = m.verify(data, other)
        rows[name]["differ"] = f"{proof.hidden_differ} of {proof.hidden}" if proof.nodes else "float"
        rows[name]["conv, gemm, Q+DQ"] = common.coverage(common.runtime_ops(data))
        assert proof.ok, f"{name}: {proof}"
    sessions = {k: common.session(v, a.threads) for k, v in files.items()}
    one = x[:1].numpy()
    times = timed({k: (lambda s=s: s.run(None, {s.get_inputs()[0].name: one})) for k, s in sessions.items()}, a)
    loads: dict[str, list[float]] = {k: [] for k in files}
    for _ in range(LOADS):
        for k, data in files.items():
            start = time.thread_time()
            common.session(data, 1)
            loads[k].append(time.thread_time() - start)
    for k, row in rows.items():
        row["load ms"], row["ms"] = round(1e3 * statistics.median(loads[k]), 1), round(1e3 * times[k], 3)
        row["x fp32"], row["x int8"] = round(times["float"] / times[k], 2), round(times["iao_w8a8"] / times[k], 3)
    return rows


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=31)
    p.add_argument("--parts", nargs="+", default=["layers", "nets"], choices=["layers", "nets"])
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = common.Table("lowbit", f"Low-bit schemes in ONNX Runtime, {a.threads} thread{'s' * (a.threads > 1)}, batch 1", a.fresh)
    names = ["float", "iao_w8a8", *known(a.names or list(SCHEMES))]
    if "layers" in a.parts:
        for channels, size in LAYERS:
            rows = measure(chain(channels), torch.randn(4, channels, size, size), {n: everywhere(n) for n in names}, a)
            for name, row in rows.items():
                table.put(f"{CHAIN} x {channels}@{size} {name}", row)
            gc.collect()
    if "nets" in a.parts:
        rows = measure(common.torchvision_net("resnet18"), torch.randn(2, 3, 224, 224), {n: n for n in names}, a)
        for name, row in rows.items():
            table.put(f"resnet18 {name}", row)
    table.write(summarised(table.rows))


def summarised(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The head of the page: what the columns are, and the figures that the issue asks for."""
    out = [
        "bits/weight: codes, tables, scales and zero points of quantized layers; kB: the whole file; load: ONNX Runtime, with its optimizations, CPU time",
        "x fp32, x int8: time of that file over this one's, medians of one interleaved run (one thread: CPU time); differ: codes unlike the reference's",
    ]
    for kind, tag in (("binary", "w1a"), ("ternary", "wta")):
        mine = [r["bits/weight"] for k, r in rows.items() if tag in k and any(f" {c}@" in k for c in (128, 256, 512))]
        if mine:
            out.append(f"{kind} weights, layers of 128 channels and more: at most {max(mine):.3f} bits a weight")
    for part in ("4 x", "resnet18"):
        integer = [r for k, r in rows.items() if k.startswith(part) and "a32" not in k and not k.endswith(("float", "iao_w8a8", "_k"))]
        if integer:
            fp32, int8 = ([r[c] for r in integer] for c in ("x fp32", "x int8"))
            what = "layers" if part == "4 x" else f"{part}, first layer float where the scheme says so"
            out.append(f"{what}: {min(fp32):.2f} to {max(fp32):.2f} times fp32, {min(int8):.3f} to {max(int8):.3f} times int8 (without xnor_w1a1_k)")
    return out


if __name__ == "__main__":
    main()
