"""What does cutting weights by magnitude cost in accuracy, and does it last: masked in training, then through int8 training to the ONNX file?

Run: python benchmarks/bench_sparsity.py [--net resnet20] [--images 20000] [--epochs 1] [--cuts 0.9 2:4] [--threads 1]

For each cut of the pretrained CIFAR-10 net: accuracy right behind the cut without training, after epochs of training in which the cut grows by the cubic
schedule in the first half (2:4 from the start), after a quarter epoch of iao_w8a8 training on top, and of its ONNX file in ONNX Runtime; how many masked
weights have another code than that of 0 (has to be none), and the share of the codes that are not 0 (results/sparsity.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import sparsity, zoo
from fxq.graph import module_of, walk
from fxq.modules import WEIGHTED

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from training import data

BATCH, EVERY = 128, 8
"""Images of a step; steps between two updates of the masks."""


def accuracy(run: Callable[[Tensor], Any], x: Tensor, y: Tensor) -> float:
    """Percent of right answers."""
    hits = 0
    with torch.inference_mode():
        for i in range(0, len(x), 500):
            hits += int((torch.as_tensor(np.asarray(run(x[i : i + 500]))).argmax(1) == y[i : i + 500]).sum())
    return round(100 * hits / len(x), 2)


def train(model: nn.Module, batches: data.Batches, steps: int, lr: float, each: Callable[[int], None] = lambda step: None) -> None:
    """SGD with momentum, weight decay and a linear fall of the rate."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    model.train()
    for step in range(steps):
        epoch, at = divmod(step, batches.steps)
        order = batches.order(epoch)
        x, y = batches.take(order[at], epoch, at)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        each(step)
    model.eval()


def codes(model: fxq.CompiledModel, masks: dict[str, Tensor]) -> tuple[int, float]:
    """Masked weights with another code than that of 0; the share of codes that are not 0, of the masked layers."""
    wrong = live = total = 0
    for node, _ in walk(model.graph_module, *WEIGHTED):
        layer: Any = module_of(model.graph_module, node)
        mask = masks.get(str(node.target))
        if mask is not None:
            c = layer.weight_codes()
            wrong, live, total = wrong + int((c[~mask] != 0).sum()), live + int((c != 0).sum()), total + c.numel()
    return wrong, round(live / total, 4)


def row(name: str, cut: str, a: argparse.Namespace, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """One cut, from the float net to the file."""
    normalise = data.Normalise(False, False)
    batches = data.Batches(x, y, BATCH, 0, True, normalise)
    images, labels = normalise(test[0]), test[1]
    net = zoo.build(name, data.folder() / "models" / f"cifar10_{name}.safetensors")
    found: dict[str, Any] = {"float": accuracy(net, images, labels)}
    steps, start, pattern = int(a.epochs * batches.steps), time.perf_counter(), ":" in cut
    one_shot = zoo.build(name, data.folder() / "models" / f"cifar10_{name}.safetensors")
    sparsity.sparsify(one_shot, None if pattern else float(cut), pattern=cut if pattern else None)
    found["cut at once"] = accuracy(one_shot, images, labels)
    masks = sparsity.sparsify(net, None if pattern else 0.0, pattern=cut if pattern else None)

    def more(step: int) -> None:
        if not pattern and step % EVERY == 0:
            masks.update(sparsity.cubic_ratio(step, begin=0, end=steps // 2, final=float(cut)))

    train(net, batches, steps, a.lr, more)
    found["trained"], found["density"] = accuracy(net, images, labels), round(masks.density(), 4)
    kept = {w.name.removesuffix(".weight"): w.own.mask.clone() for w in masks}
    q = fxq.compile(net, "iao_w8a8", mode="qat", calibration=normalise(x[:512]), progress=False)
    train(q, batches, steps // 4, a.lr / 5)
    q.freeze()
    m = q.convert()
    found["iao_w8a8"] = accuracy(m, images, labels)
    artifact = m.lower("onnx-qdq")
    session = common.session(artifact.data, a.threads)
    inputs = session.get_inputs()[0].name
    found["ONNX Runtime"] = accuracy(lambda b: session.run(None, {inputs: b.numpy()})[0], images, labels)
    found["masked but not 0"], found["codes not 0"] = codes(m, kept)
    found["steps"], found["minutes"] = f"{steps} + {steps // 4}", round((time.perf_counter() - start) / 60, 1)
    return found


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--net", default="resnet20")
    p.add_argument("--images", type=int, default=20000)
    p.add_argument("--epochs", type=float, default=1)
    p.add_argument("--cuts", nargs="+", default=["0.9", "2:4"])
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--fresh", action="store_true", help="begin the table anew")
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    x, y = data.load("train")
    test = data.load("test")
    table = common.Table("sparsity", "Weights cut by magnitude: CIFAR-10 test accuracy", a.fresh)
    for cut in a.cuts:
        table.put(f"{a.net} {cut}", row(a.net, cut, a, x[: a.images], y[: a.images], test))
    table.write([
        f"{a.epochs:g} epochs of {a.images} images, batch {BATCH}, SGD with momentum, rate {a.lr:g} falling linearly, for the cut; a quarter of it at a fifth "
        "of the rate for int8",
        "`cut at once`: without any training; `trained`: the cut grows by the cubic schedule in the first half of the training, 2:4 stands from the start",
    ])  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
