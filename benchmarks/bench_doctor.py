"""How long does `fxq doctor` look at a net, against a compilation, and does its forecast hold?

Run: python benchmarks/bench_doctor.py [--fresh] [names ...]

torchvision's nets at the inputs that `fxq doctor torchvision:NAME` takes (two images), for ONNX Runtime and TensorRT. A compilation reads 16 images (a few
hundred are usual); lowering is not in its time. Each net in a process of its own with one thread, whose processor seconds are counted: another load on the
machine does not change them. Both have run once on a small net before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from typing import Any

import common
import torch

import fxq
from fxq import zoo
from fxq.cli_doctor import default_inputs
from fxq.lint import lint

NETS = (
    "alexnet", "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "densenet121", "googlenet",
    "squeezenet1_1", "shufflenet_v2_x1_0", "mnasnet0_5", "regnet_y_400mf", "swin_t", "convnext_tiny", "vgg11_bn", "vit_b_16",
)  # fmt: skip
TARGETS = ("onnxruntime", "tensorrt")
LINT = (
    "lint: nodes of the file, of those named like an operation of the forecast, that its lint runs alike. Convolutions, products and arithmetic agree; "
    "a Reshape or Transpose beside a float operation may not, since ONNX Runtime moves Q and DQ across those and a linear layer on more than two "
    "dimensions is written with two Reshapes"
)


def floats(m: fxq.CompiledModel) -> list[tuple[str, str, str]]:
    """``(node, kind, reason)`` of what stays float, of all parts."""
    return [(o.node, o.kind, o.why) for part in (m.parts.values() or [m]) for o in part.float_ops]


def one(name: str) -> dict[str, Any]:
    """Seconds of both, and whether the forecast is the compilation's."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    net = common.torchvision_net(name)
    x = default_inputs(f"torchvision:{name}", net)
    assert x is not None
    small = torch.randn(2, 3, 32, 32)
    fxq.doctor(zoo.build("tiny_resnet8"), small)
    fxq.compile(zoo.build("tiny_resnet8"), "int8", calibration=[small], progress=False)
    row: dict[str, Any] = {}
    wrong: list[str] = []
    for target in TARGETS:
        start = time.process_time()
        found = fxq.doctor(net, x, target=target)
        middle = time.process_time()
        m = fxq.compile(net, "int8", calibration=[x] * 8, target=target, progress=False)
        doctor, whole = middle - start, time.process_time() - middle
        (forecast,) = found.forecasts
        if [(o.node, o.kind, o.why) for o in forecast.float_ops] != floats(m):
            wrong.append(target)
        row |= {f"{target}: s": round(doctor, 2), f"{target}: compile s": round(whole, 2), f"{target}: MACs in integers": f"{forecast.share:.2%}"}
        row[f"{target}: float operations"] = f"{len(forecast.float_ops)} of {len(forecast.ops)}"
        if target == "onnxruntime" and not m.parts:
            told = {o.node: o.runs for o in forecast.ops if o.why != "absorbed"}
            seen = {o.node: "float" if o.runs == "float" else "int" for o in lint(m.lower().data).ops if o.node in told}
            row["lint"] = f"{sum(told[n] == runs for n, runs in seen.items())} of {len(seen)}"
    row["forecast"] = "wrong: " + ", ".join(wrong) if wrong else "holds"
    return row


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--one")
    p.add_argument("--fresh", action="store_true")
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    if a.one:
        print(json.dumps(one(a.one)))
        return
    table = common.Table("doctor", "fxq doctor: seconds, and whether its forecast holds", a.fresh)
    for name in a.names or [n for n in NETS if n not in table.rows]:
        run = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False)
        failed = {"forecast": common.short((run.stderr.strip() or "no message").splitlines()[-1])}
        table.put(name, json.loads(run.stdout.strip().splitlines()[-1]) if run.returncode == 0 else failed)
    rows = [r for r in table.rows.values() if "lint" in r or r["forecast"] == "holds"]
    ratios = sorted(r[f"{t}: s"] / r[f"{t}: compile s"] for r in rows for t in TARGETS)
    holds = sum(r["forecast"] == "holds" for r in table.rows.values())
    table.write([
        f"the forecast of what stays float equals the compilation's, node by node with reasons and for both targets, for {holds} of {len(table.rows)} nets",
        f"processor seconds: {min(r[f'{t}: s'] for r in rows for t in TARGETS)} to {max(r[f'{t}: s'] for r in rows for t in TARGETS)}; the doctor takes"
        f" {ratios[len(ratios) // 2]:.0%} (median) of a compilation that reads 16 images",
        LINT,
    ])  # fmt: skip


if __name__ == "__main__":
    main()
