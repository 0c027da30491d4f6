"""What do shared weights cost in an ONNX file, and what does ONNX Runtime make of them?

Run: python benchmarks/bench_shared_onnx.py [--rounds 41] [nets ...]

Nets have random weights, 90 % pruned by magnitude, and are not trained: sizes and times do not depend on it. Each file is compared with that of the same
compiled net whose layers hold the same weights in the ordinary way. *Bits a weight*: all constants of the file but biases, over the weights. Load: CPU
time, the best of five sessions. Run: the best of interleaved rounds, batch 1. One thread. *Same operations*: the optimized graphs have the same ones.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from typing import Any

import common
import numpy as np
import onnx
import torch
from torch import nn

import fxq
from fxq import zoo
from fxq.graph import swap_module
from fxq.shared import SharedWeight, plain

NETS = {"nin_gc": (3, 32, 32), "resnet20": (3, 32, 32), "resnet18": (3, 224, 224)}
DEFAULT = ("nin_gc", "resnet20")
SCHEMES: tuple[tuple[str, int | None], ...] = (("deepcomp_w3", None), ("deepcomp_w5", None), ("deepcomp_w8_fc5", None), ("iao_w8a8", 5), ("iao_w8a8", 4))


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return common.torchvision_net(name) if name == "resnet18" else common.randomise(zoo.build(name))


def lowered(name: str, scheme: str, bits: int | None) -> tuple[bytes, bytes]:
    """The files of a pruned net with shared weights, and with the same weights held in the ordinary way."""
    x = torch.randn(2, *NETS[name], generator=torch.Generator().manual_seed(0))
    share = None if bits is None else fxq.Share(bits=bits)
    made: Any = fxq.compile(net(name), scheme, calibration=x, prune=fxq.Prune(sparsity=0.9), share=share, progress=False)
    data = bytes(made.lower("onnx").data)
    gm = made.graph_module
    for node in gm.graph.nodes:
        layer: Any = gm.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, SharedWeight):
            swap_module(gm, node, plain(layer))
        elif isinstance(getattr(layer, "op", None), SharedWeight):
            layer.op = plain(layer.op)
    return data, bytes(made.lower("onnx").data)


def load_ms(data: bytes) -> float:
    best = float("inf")
    for _ in range(5):
        begin = time.process_time()
        common.session(data)
        best = min(best, time.process_time() - begin)
    return best * 1e3


def fastest(runs: list[Any], rounds: int) -> list[float]:
    """Best milliseconds of each, taken in turns."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            begin = time.perf_counter()
            run()
            best[i] = min(best[i], (time.perf_counter() - begin) * 1e3)
    return best


def bits_a_weight(data: bytes, weights: int) -> float:
    held = sum(t.ByteSize() for t in onnx.load_from_string(data).graph.initializer if "bias" not in t.name)
    return held * 8 / weights


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=41)
    p.add_argument("nets", nargs="*", choices=[*NETS, []])
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    table = common.Table("shared_onnx", "Shared weights in ONNX files", fresh=True)
    for name in a.nets or DEFAULT:
        size = NETS[name]
        weights = sum(m.weight.numel() for m in net(name).modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        x = np.random.default_rng(0).standard_normal((1, *size)).astype(np.float32)
        for scheme, bits in SCHEMES:
            shared, ordinary = lowered(name, scheme, bits)
            pair = [common.session(shared), common.session(ordinary)]
            times = fastest([partial(s.run, None, {s.get_inputs()[0].name: x}) for s in pair], a.rounds)
            table.put(f"{name} {scheme}" + ("" if bits is None else f", {bits} bits"), {
                "file MB": f"{len(shared) / 1e6:.4f}", "ordinary MB": f"{len(ordinary) / 1e6:.4f}",
                "bits a weight": f"{bits_a_weight(shared, weights):.2f}", "ordinary bits": f"{bits_a_weight(ordinary, weights):.2f}",
                "load ms": f"{load_ms(shared):.0f}", "ordinary load ms": f"{load_ms(ordinary):.0f}",
                "run ms": f"{times[0]:.3f}", "ordinary run ms": f"{times[1]:.3f}",
                "same operations": "yes" if common.runtime_ops(shared) == common.runtime_ops(ordinary) else "no",
            })  # fmt: skip
    table.write([
        "weights are random, 90 % are 0, nothing was trained; bits a weight: all constants but biases; codes of weights that are 0 take the same bits",
        "ordinary: the same compiled net, weights as float32 or int8; load: CPU time, best of five; run: best of interleaved rounds, batch 1, one thread",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
