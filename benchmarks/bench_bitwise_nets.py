"""Whole binary nets on packed bits, beside ONNX Runtime in float32 and int8: time, time by kind of layer, bytes, memory, starts.

Run: python benchmarks/bench_bitwise_nets.py [--fresh] [--quick] [--scheme xnor_w1a1] [--seconds 12] [names ...]

Random weights with batch norms of a plausible scale, grids calibrated on random data: fine for time, nothing is said of accuracy. Batch 1. All runs of a net in
turns, one thread: processor time and wall time, medians; then two threads, wall time. By kind of layer: wall time of each module of the lowered graph, by
hooks. Memory and starts: fresh processes that load one file and run it once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from bench_bitwise import measure
from torch import nn

import fxq
from fxq.bitwise import engine as engines
from fxq.doctor_machine import machine

NETS = {"resnet18": 224, "nin_gc": 32, "nin": 32, "resnet20": 32}
KINDS = {
    "BitConv": "binary layers", "Conv2d": "float layers", "Linear": "float layers", "Pack": "packing", "CodeAdd": "adds", "BitMaxPool": "pools",
    "CodeMaxPool": "pools", "GlobalPool": "pools", "MaxPool2d": "pools", "AvgPool2d": "pools", "GlobalAvgPool": "pools", "Int8Layer": "int8 layers",
    "IntegerLayer": "int8 layers", "BitSelect": "shuffles", "Quantize": "rounding", "Real": "rounding", "CodeTable": "tables",
}  # fmt: skip
"""Class of a module of the lowered graph -> kind of layer; others are the rest, and the first layer is the stem."""
SPEED_GOAL, SIZE_GOAL = 3.0, 28.0
PROCESS = """
import json, os, sys, time
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
import torch
torch.set_num_threads(1)
x = torch.randn({shape}, generator=torch.Generator().manual_seed(0))
{imports}
before, start = rss(), time.perf_counter()
run = ({load})
loaded, held = time.perf_counter(), rss()
run()
first = time.perf_counter()
run()
print(json.dumps({{"MB": rss() - before, "loaded MB": held - before, "load s": loaded - start, "first s": first - loaded}}))
"""
SESSION = """
def session(path):
    o = ort.SessionOptions()
    o.intra_op_num_threads = 1
    s = ort.InferenceSession(path, o, providers=["CPUExecutionProvider"])
    return lambda: s.run(None, {s.get_inputs()[0].name: x.numpy()})
"""


def build(name: str) -> nn.Module:
    """The float net."""
    if name == "resnet18":
        return common.torchvision_net(name)
    from fxq import zoo

    torch.manual_seed(0)
    return common.randomise(getattr(zoo, name)())


def process(path: Path, shape: tuple[int, ...], env: dict[str, str] | None = None) -> dict[str, float]:
    """What a fresh process that loads and runs one file says of its memory and its times."""
    if path.suffix == ".fxq":
        imports, load = "import fxq", f"lambda p: lambda: p(x))(fxq.load({str(path)!r})"
    else:
        imports, load = "import onnxruntime as ort" + SESSION, f"session({str(path)!r})"
    code = PROCESS.format(shape=shape, imports=imports, load=load)
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **(env or {})})
    found: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return found


def import_cost(what: str) -> float:
    """Milliseconds that an import takes on top of torch, in a fresh process; the least of three."""
    code = f"import time, torch, numpy; s = time.perf_counter(); {what}; print((time.perf_counter() - s) * 1e3)"
    return min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3))


def starts(files: dict[str, Path], shape: tuple[int, ...]) -> dict[str, Any]:
    """Memory and start times of all files; of the program with an empty compile cache, with a warm one, and in numpy."""
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        env = {"NUMBA_CACHE_DIR": cache}
        for what in ("cold", "warm"):
            t = process(files["bits"], shape, env)
            row[f"{what} start s"] = round(t["load s"] + t["first s"], 2)
        row["bits MB"] = round(t["MB"], 1)
    t = process(files["bits"], shape, {"FXQ_NUMBA": "0"})
    row["numpy start s"], row["numpy MB"] = round(t["load s"] + t["first s"], 2), round(t["MB"], 1)
    for what in ("fp32", "int8"):
        t = process(files[what], shape)
        row[f"{what} start s"], row[f"{what} MB"] = round(t["load s"] + t["first s"], 2), round(t["MB"], 1)
    return row


def by_kind(program: Any, x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Wall microseconds of each kind of layer; ``between``: what the modules do not take of a run without hooks."""
    gm = program.graph_module
    parts = {str(n.target): gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"}
    plain = []
    for _ in range(rounds):
        start = time.perf_counter()
        program(x)
        plain.append(time.perf_counter() - start)
    begun: dict[str, float] = {}
    times: dict[str, list[float]] = defaultdict(list)
    hooks = []
    for path, part in parts.items():
        hooks.append(part.register_forward_pre_hook(lambda *_, path=path: begun.__setitem__(path, time.perf_counter())))
        hooks.append(part.register_forward_hook(lambda *_, path=path: times[path].append(time.perf_counter() - begun[path])))
    for _ in range(rounds):
        program(x)
    for h in hooks:
        h.remove()
    found: dict[str, float] = defaultdict(float)
    kinds = {path: KINDS.get(type(part).__name__, "rest") for path, part in parts.items()}
    stem = next(path for path, kind in kinds.items() if kind.endswith("layers"))
    for path, seconds in times.items():
        found["stem" if path == stem else kinds[path]] += 1e6 * statistics.median(seconds)
    found["between"] = 1e6 * statistics.median(plain) - sum(found.values())
    return {k: round(v) for k, v in sorted(found.items(), key=lambda kv: -kv[1])}


def runs_of(files: dict[str, Path], program: Any, net: nn.Module, x: torch.Tensor, threads: int) -> dict[str, Callable[[], Any]]:
    """All runs of a net."""

    def torch_run() -> Any:
        with torch.inference_mode():
            return net(x)

    def bits_run() -> Any:
        with torch.inference_mode():
            return program(x)

    runs: dict[str, Callable[[], Any]] = {"torch fp32": torch_run, "bits": bits_run}
    for what in ("fp32", "int8"):
        s = common.session(files[what].read_bytes(), threads)
        runs[what] = lambda s=s: s.run(None, {s.get_inputs()[0].name: x.numpy()})
    return runs


def row_of(name: str, a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of a net."""
    net, size = build(name), NETS[name]
    data = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    files = {"fp32": folder / "fp32.onnx", "int8": folder / "int8.onnx", "bits": folder / "net.fxq"}
    fxq.compile(net, "float", example=data, progress=False).lower().save(files["fp32"])
    fxq.compile(net, "iao_w8a8", calibration=data, progress=False).lower().save(files["int8"])
    m = fxq.compile(net, a.scheme, calibration=data, progress=False)
    artifact = m.lower("bitwise")
    artifact.save(files["bits"])
    program: Any = fxq.load(files["bits"])
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    differ = int((program(x) != m.reference(x)).sum())
    torch.set_num_threads(1)
    one = measure(runs_of(files, program, net, x, 1), a.seconds)
    kinds = by_kind(program, x, 9 if a.quick else 31)
    torch.set_num_threads(2)
    two = measure({k: run for k, run in runs_of(files, program, net, x, 2).items() if k != "torch fp32"}, a.seconds / 3)
    torch.set_num_threads(1)
    report = program.report()
    smaller = report.float_bytes / report.packed_bytes
    stored = [r for r in artifact.info["archive"]["rows"] if r["name"] in {f"{layer.name}.weight" for layer in report.layers}]
    dense = sum(r["dense"] for r in stored)
    best = min(one["fp32"][0], one["torch fp32"][0])
    row: dict[str, Any] = {f"{k} ms": round(v[0] / 1e3, 2) for k, v in one.items()}
    row |= {
        "wall ms": {k: round(v[1] / 1e3, 2) for k, v in one.items()},
        "x fp32": round(best / one["bits"][0], 2), "x int8": round(one["int8"][0] / one["bits"][0], 2),
        "2 threads": {k: round(one[k][1] / two[k][1], 2) for k in two}, "us by kind": kinds, "differ": f"{differ} of {m.reference(x).numel()}",
        **{f"{k} kB": round(p.stat().st_size / 1e3, 1) for k, p in files.items()},
        "binary layers kB": round(report.packed_bytes / 1e3, 1), "their tables kB": round(report.table_bytes / 1e3, 1), "smaller": round(smaller, 2),
        "smaller in the file": round(dense / sum(r["coded"] for r in stored), 2), "with scales": round(dense / sum(r["file"] for r in stored), 2),
        "resident kB": round(report.resident_bytes / 1e3, 1), "layers on bits": len(report.layers), "not on bits": ", ".join(f.name for f in report.floats),
    }  # fmt: skip
    row |= {} if a.quick else starts(files, tuple(x.shape))
    goals = [("fp32", row["x fp32"], SPEED_GOAL), ("memory", row["smaller"], SIZE_GOAL), ("file", row["smaller in the file"], SIZE_GOAL)]
    return row | {"goals": ", ".join(f"{what} {is_:g}/{goal:g} {'ok' if is_ >= goal else 'missed'}" for what, is_, goal in goals)}


def summary(rows: dict[str, dict[str, Any]], imports: dict[str, float]) -> list[str]:
    """The head of the page."""
    facts, engine = machine(), engines.engine()
    return [
        f"{facts.cpu}, {facts.cores} cores; engine {engine.name} ({engine.path})",
        "random weights, batch 1; ms: processor time of one thread; x fp32: the best of ONNX Runtime and torch; x int8: ONNX Runtime on iao_w8a8; differ: "
        "outputs unlike the integer reference's",
        "us by kind: wall time of the modules of the lowered graph; between: the calls themselves; 2 threads: wall time of one over two",
        "smaller: float32 weights of the binary layers over their packed ones in memory, over their codes in the file, over these with all scales and heads; "
        "resident: all that the program holds",
        "MB: resident memory of a fresh process beyond torch, the file loaded and run once; start: load and first call; cold: with an empty compile cache",
        "import on top of torch: " + ", ".join(f"{k} {v:.0f} ms" for k, v in imports.items()),
        "goals: " + "; ".join(f"{k}: {r['goals']}" for k, r in rows.items()),
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--quick", action="store_true", help="half a second a net, no fresh processes; nothing is written")
    p.add_argument("--scheme", default="xnor_w1a1")
    p.add_argument("--seconds", type=float, default=12.0, help="for each net on one thread, a third of it for two threads")
    p.add_argument("names", nargs="*", help="nets, by default all")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    if unknown := set(a.names) - set(NETS):
        p.error(f"no net {', '.join(unknown)}; there are {', '.join(NETS)}")
    a.seconds = 0.5 if a.quick else a.seconds
    table = None if a.quick else common.Table("bitwise_nets", "Whole binary nets on packed bits, beside ONNX Runtime", a.fresh)
    for name in a.names or NETS:
        key = name if a.scheme == "xnor_w1a1" else f"{name} {a.scheme}"
        if table is not None and key in table.rows and not a.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = row_of(name, a, Path(folder))
        if table is None:
            print(key, json.dumps(row, indent=1), flush=True)
        else:
            table.put(key, row)
        gc.collect()
    if table is not None:
        imports = {"fxq": import_cost("import fxq"), "fxq.bitwise.program": import_cost("import fxq.bitwise.program")}
        table.write(summary(table.rows, imports))


if __name__ == "__main__":
    main()
