"""What do x86 CPUs without VNNI make of int8 files, and what do portable weights cost? Trained nets, beside 7 bits for all weights (reduce_range).

Run: python benchmarks/bench_portable.py [--fresh] [--images 500] [--emulated 100] [--valgrind] [--threads 1] [names ...]

Data: $FXQ_DATA, see bench_accuracy.py. Accuracy is measured in ONNX Runtime here on ``--images``; without VNNI it is that of the emulated integer
reference, on the first ``--emulated`` of them. ``--valgrind`` also runs the files in ONNX Runtime on a CPU without VNNI, which valgrind emulates, on 8 images.
"""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_accuracy as accuracy
import common
import numpy as np
import torch
from torch import Tensor

import fxq
from fxq import portability, schemes, targets

NAMES = ("cifar10_resnet20", "cifar10_resnet44", "kws_dscnn", "efficientnet_lite0", "imagenet_squeezenet1_0_dc")
RUN = """
import sys
import numpy as np
import onnxruntime as ort
o = ort.SessionOptions()
o.intra_op_num_threads = o.inter_op_num_threads = 1
s = ort.InferenceSession(sys.argv[1], o, providers=["CPUExecutionProvider"])
np.save(sys.argv[3], s.run(None, {s.get_inputs()[0].name: np.load(sys.argv[2])})[0])
"""


def without_vnni(model: bytes, x: Tensor) -> Tensor:
    """ONNX Runtime's outputs on the CPU that valgrind emulates: AVX2, no VNNI."""
    with tempfile.TemporaryDirectory() as folder:
        file, given, out = (Path(folder) / n for n in ("m.onnx", "x.npy", "y.npy"))
        file.write_bytes(model)
        np.save(given, x.numpy())
        subprocess.run(["valgrind", "--tool=none", "-q", sys.executable, "-c", RUN, str(file), str(given), str(out)], check=True)
        return torch.from_numpy(np.load(out))


def seven_bits(case: accuracy.Case) -> fxq.CompiledModel:
    """All weights on 7 bits, as reduce_range of other tools does."""
    scheme, target = schemes.get("iao_w8a8"), targets.get("onnxruntime")
    assert scheme.weight is not None
    scheme = replace(scheme, name="seven_bits", weight=replace(scheme.weight, bits=7))
    target = replace(target, weights=(*target.weights, "s7n/pt"))
    return fxq.compile(case.net, scheme, calibration=case.calibration.split(accuracy.BATCH), target=target)


def db(y: Tensor, reference: Tensor) -> float:
    noise = float((y.double() - reference.double()).square().sum())
    return 10 * math.log10(float(reference.double().square().sum()) / noise) if noise else math.inf


def measure(case: accuracy.Case, a: argparse.Namespace) -> dict[str, Any]:
    x, y = case.x[: a.images], case.y[: a.images]
    few = slice(0, a.emulated)
    wanted = accuracy.outputs(case.net, x)
    batches = case.calibration.split(accuracy.BATCH)
    models = {
        "int8": fxq.compile(case.net, calibration=batches),
        "portable": fxq.compile(case.net, calibration=batches, portable=True),
        "7 bits": seven_bits(case),
    }
    row: dict[str, Any] = {"images": len(x), "float": f"{accuracy.top1(wanted, y):.2f}"}
    for name, m in models.items():
        here = accuracy.outputs(accuracy.runtime(m.lower().data, a.threads), x)
        row[name], row[f"{name} dB"] = f"{accuracy.top1(here, y):.2f}", f"{db(here, wanted):.2f}"
        if name == "7 bits":
            continue
        there = portability.PairSums(m)
        emulated = torch.cat([there(b) for b in x[few].split(25)])
        row[f"{name}: images emulated"] = len(emulated)
        row[f"{name}: without VNNI / with"] = f"{accuracy.top1(emulated, y[few]):.2f} / {accuracy.top1(here[few], y[few]):.2f}"
        row[f"{name}: outputs without VNNI, dB"] = f"{db(emulated, here[few]):.1f}"
        row[f"{name}: outputs that differ"] = f"{int((emulated != here[few]).sum())} of {emulated.numel()}"
        seen = there.layers.values()
        row[f"{name}: layers, pairs at risk"] = f"{sum(s.pairs_at_risk > 0 for s in seen)} of {len(seen)}, {sum(s.pairs_at_risk for s in seen)}"
        row[f"{name}: sums saturated"] = f"{sum(s.saturated for s in seen)} of {sum(s.sums for s in seen):.2e}"
        if a.valgrind:
            real = without_vnni(m.lower().data, x[:8])
            row[f"{name}: emulation and ONNX Runtime without VNNI differ"] = f"{int((real != emulated[:8]).sum())} of {real.numel()}"
    p = models["portable"]
    changed = p.history["make-portable"]
    grown = [layer.weight_grid.scale for layer in _layers(p)], [layer.weight_grid.scale for layer in _layers(models["int8"])]
    factor = torch.cat([(new / old).flatten() for new, old in zip(*grown, strict=True)])
    row["layers changed, ms"] = f"{changed.rewrites}, {changed.ms:.0f}"
    row["channels whose scale grew, mean factor"] = f"{100 * float((factor > 1.001).double().mean()):.0f} %, {float(factor.mean()):.3f}"
    row["proven"] = str(p.verify(p.lower(), x[:16].split(8)).ok)
    return row


def _layers(m: fxq.CompiledModel) -> list[Any]:
    from fxq.modules import Quantized

    return [layer for _, layer in m.graph_module.named_modules() if isinstance(layer, Quantized)]


def summary(table: common.Table) -> list[str]:
    lines = []
    for name, row in table.rows.items():
        cost = float(row["7 bits"]) - float(row["portable"])
        scores = ", ".join(f"{k} {row[k]} ({row[f'{k} dB']} dB)" for k in ("int8", "portable", "7 bits"))
        lines.append(
            f"{name}: {scores}: portable is {-cost:+.2f} points and {float(row['portable dB']) - float(row['7 bits dB']):+.2f} dB beside 7 bits"
        )
    return lines


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--images", type=int, default=500)
    p.add_argument("--emulated", type=int, default=100)
    p.add_argument("--valgrind", action="store_true")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    table = common.Table("portable", "int8 files on x86 CPUs with and without VNNI", a.fresh)
    for name in a.names or NAMES:
        if name not in table.rows:
            table.put(name, measure(accuracy.NETS[name](name), a))
            gc.collect()
    table.write(summary(table))


if __name__ == "__main__":
    main()
