"""How much faster are nets that lost half of their MACs in ONNX Runtime, and which multiples of the widths pay?

Run: python benchmarks/bench_prune_speed.py [--rounds 60] [--threads 1] [names ...]

Random weights, 224 pixels, batch 1. Each row is one net cut to half of its MACs in multiples of 1, 8, 16, 32, in fp32 and ``iao_w8a8``; all files of a net run
in turns. Time left: median, by that of the whole net in the same format. The MACs that are left differ a little, so the last column divides the two.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch

import fxq
from fxq.costs import total

NAMES = ("resnet18", "resnet50", "mobilenet_v2", "regnet_x_400mf", "vgg11_bn")
MULTIPLES = (1, 8, 16, 32)
SCHEMES = {"fp32": "float", "int8": "iao_w8a8"}


def runner(model: bytes, x: np.ndarray[Any, Any], threads: int) -> Callable[[], Any]:
    """One run of a file."""
    session = common.session(model, threads)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})


def measure(name: str, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """Rows of one net, by multiple."""
    net, data = common.torchvision_net(name), torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], Any]] = {}
    left: dict[int, float] = {}
    for multiple in (0, *MULTIPLES):
        source: Any = net
        if multiple:
            pruned = fxq.prune(net, fxq.Prune(macs=0.5, multiple_of=multiple), example=data[:1], progress=False)
            left[multiple] = total(pruned.prune_report.after).macs / total(pruned.prune_report.before).macs  # type: ignore[union-attr]
            source = pruned.eval()
        for label, scheme in SCHEMES.items():
            m = fxq.compile(source, scheme, calibration=data, progress=False)
            runs[f"{label} {multiple}"] = runner(m.lower().data, data[:1].numpy(), threads)
    seconds = common.interleaved(runs, rounds)
    rows = {}
    for multiple in MULTIPLES:
        row: dict[str, Any] = {"MACs left": f"{left[multiple]:.1%}"}
        for label in SCHEMES:
            share = seconds[f"{label} {multiple}"] / seconds[f"{label} 0"]
            row |= {f"{label} time left": f"{share:.1%}", f"{label} time / MACs": f"{share / left[multiple]:.2f}"}
        rows[f"{name} x{multiple}"] = row
    return rows


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=60)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("names", nargs="*")
    a = p.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(a.threads)
    table = common.Table("prune_speed", "Time that is left at half of the MACs in ONNX Runtime", True)
    for name in a.names or NAMES:
        for key, row in measure(name, a.rounds, a.threads).items():
            table.put(key, row)
    means = []
    for label in SCHEMES:
        shares = [np.mean([float(r[f"{label} time / MACs"]) for k, r in table.rows.items() if k.endswith(f" x{m}")]) for m in MULTIPLES]
        means.append(f"{label}: time left by MACs left, mean over the nets, " + ", ".join(f"x{m} {s:.2f}" for m, s in zip(MULTIPLES, shares, strict=True)))
    table.write(means)


if __name__ == "__main__":
    main()
