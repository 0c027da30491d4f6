"""How long does fxq take from the module to the saved file, against quantize_static incl. its fp32 export, and against the float passes alone?

Run: python benchmarks/bench_compile.py [--fresh] [names ...]     8 batches of 8 images; each net and way in a fresh process:
the least of three times (quantize_static: of two), and the peak memory above that of the loaded net.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import common
import torch
from bench_speed import NETS, export_fp32, quantize_static, size_of

import fxq


def one(name: str, which: str) -> dict[str, float]:
    """Seconds and peak MB of one way, alone in this process."""
    warnings.filterwarnings("ignore")
    net, size = common.torchvision_net(name), size_of(name)
    data = [torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with torch.inference_mode():
        net(data[0])
    out: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        if which == "fxq":
            fxq.compile(net, calibration=data[:1])  # imports and kernel caches, as the float passes have theirs
            for i in range(3):
                start = time.perf_counter()
                with torch.inference_mode():
                    for b in data:
                        net(b)
                out["float"] = min(out.get("float", math.inf), time.perf_counter() - start)
                start = time.perf_counter()
                fxq.compile(net, calibration=data).lower().save(folder / f"{i}.onnx")
                out["s"] = min(out.get("s", math.inf), time.perf_counter() - start)
        else:
            for i in range(2):  # the first time it imports its tools
                start = time.perf_counter()
                export_fp32(net, data[0], folder / f"f{i}.onnx")
                quantize_static(folder / f"f{i}.onnx", folder / f"q{i}.onnx", [b.numpy() for b in data])
                out["s"] = min(out.get("s", math.inf), time.perf_counter() - start)
    out["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base
    return out


def child(name: str, which: str) -> dict[str, float]:
    run = subprocess.run([sys.executable, __file__, "--one", name, which], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--one", nargs=2)
    p.add_argument("--fresh", action="store_true")
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    if a.one:
        print(json.dumps(one(*a.one)))
        return
    table = common.Table("compile", "Compile time, trace to saved file, 64 images", a.fresh)
    for name in a.names or [*NETS[:12], "deeplabv3_mobilenet_v3_large"]:
        if name in table.rows:
            continue
        ours, static = child(name, "fxq"), child(name, "static")
        row: dict[str, Any] = {
            "fxq s": round(ours["s"], 2), "quantize_static s": round(static["s"], 2), "float passes s": round(ours["float"], 2),
            "fxq / static": round(ours["s"] / static["s"], 3), "fxq / float": round(ours["s"] / ours["float"], 2),
            "fxq peak MB": round(ours["mb"]), "static peak MB": round(static["mb"]),
        }  # fmt: skip
        table.put(name, row)
    rows = list(table.rows.values())
    mean = {k: math.exp(sum(math.log(r[k]) for r in rows) / len(rows)) for k in ("fxq / static", "fxq / float")}
    table.write([f"geometric means over {len(rows)} nets: fxq / quantize_static {mean['fxq / static']:.3f}, fxq / float passes {mean['fxq / float']:.2f}"])


if __name__ == "__main__":
    main()
