"""What accuracy is left of CIFAR-10 ResNets that are pruned to half of their MACs and trained for a few epochs, and in 8 bits then?

Run: python benchmarks/bench_prune_training.py [--nets resnet20 ...] [--tools fxq ...] [--by l2] [--epochs 3] [--threads 2] [--seed 0]

``fxq``: any widths; ``fxq-8``: multiples of 8; ``fxq-target``: widths that ONNX Runtime's kernels like (the default of ``fxq.Prune``); ``torch-pruning``:
global group norm, in small steps until its MACs are at or below the share. All start from the same trained net and see the same images in the same order:
SGD with Nesterov momentum 0.9, cosine from 0.02 to 0, weight decay 5e-4, batch 128, shifted and mirrored images. Then 8 bits (``iao_w8a8``, 512 training
images) in ONNX Runtime. The numbers are of the 10,000 test images. What is finished is not run again; a run that was stopped goes on behind its last epoch.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_pruning
import common
import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning_peer as peer
from torch import Tensor, nn

import fxq
from fxq import zoo
from fxq.errors import PassError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from training import data  # noqa: E402

NETS = ("resnet20", "resnet32", "resnet44")
MULTIPLES = {"fxq": 1, "fxq-8": 8, "fxq-target": None}
TOOLS = (*MULTIPLES, "torch-pruning")
SCHEME = "iao_w8a8"
CALIBRATION = 512
RATE, MOMENTUM, DECAY, BATCH = 0.02, 0.9, 5e-4, 128
GOAL = 0.3
"""Points that 8 bits may cost."""
NORMALISE = data.Normalise(raw=False, channels_last=False)


@dataclass
class Images:
    """Training and test images, uint8 ``[N, 32, 32, 3]``, and their labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def calibration(self) -> Tensor:
        """The first training images as inputs."""
        return NORMALISE(self.train[0][:CALIBRATION])


def images(limit: int) -> Images:
    """All images, or the first ``limit`` of both parts."""
    train, test = data.load("train"), data.load("test")
    return Images(*((x[:limit], y[:limit]) if limit else (x, y) for x, y in (train, test)))


def accuracy(run: Callable[[Tensor], Tensor], test: tuple[Tensor, Tensor], batch: int = 250) -> float:
    """Percent of the test images that are right."""
    x, y = test
    hits = 0
    with torch.no_grad():
        for i in range(0, len(x), batch):
            hits += int((run(NORMALISE(x[i : i + batch])).argmax(1) == y[i : i + batch]).sum())
    return 100 * hits / len(x)


def in_float(net: nn.Module, found: Images) -> float:
    return accuracy(net.eval(), found.test)


def in_int8(net: nn.Module, found: Images, threads: int) -> float:
    """Accuracy of the net in 8 bits, by ONNX Runtime."""
    m = fxq.compile(net.eval(), SCHEME, calibration=list(found.calibration().split(64)), progress=False)
    session = common.session(m.lower().data, threads)
    name = session.get_inputs()[0].name
    return accuracy(lambda x: torch.from_numpy(np.asarray(session.run(None, {name: x.numpy()})[0])), found.test)


def pruned(tool: str, net: nn.Module, found: Images, share: float, by: str) -> nn.Module:
    """The net cut to this share of its MACs."""
    x = found.calibration()[:2]
    if tool == "torch-pruning":
        return peer.to_macs(net, x[:1], share)  # type: ignore[arg-type]
    more: dict[str, Any] = {}
    if by == "taylor":
        y = found.train[1][:CALIBRATION]
        more = {"data": list(zip(found.calibration().split(64), y.split(64), strict=True)), "loss": F.cross_entropy}
    how = fxq.Prune(macs=share, multiple_of=MULTIPLES[tool], by=by, **more)
    return fxq.prune(net, how, example=x, progress=False)


def rate(step: int, steps: int) -> float:
    return RATE * 0.5 * (1 + math.cos(math.pi * step / steps))


def tune(net: nn.Module, found: Images, epochs: int, seed: int, limit: int, path: Path, settings: dict[str, Any]) -> float:
    """Train in place, keep a checkpoint of each epoch at ``path`` and go on from it; the minutes of all epochs."""
    batches = data.Batches(*found.train, BATCH, seed, True, NORMALISE)
    steps = min(batches.steps, limit) if limit else batches.steps
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], RATE, MOMENTUM, weight_decay=DECAY, nesterov=True)
    first, minutes = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if json.loads(saved["settings"]) == settings:
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
            first, minutes = saved["epoch"], saved["minutes"]
    for epoch in range(first, epochs):
        start, total = time.perf_counter(), 0.0
        net.train()
        for step, rows in enumerate(batches.order(epoch)[:steps]):
            optimizer.param_groups[0]["lr"] = rate(epoch * steps + step, epochs * steps)
            x, y = batches.take(rows, epoch, step)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        minutes += (time.perf_counter() - start) / 60
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1, "minutes": minutes, "settings": json.dumps(settings)}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        print(f"{path.stem}: epoch {epoch + 1} of {epochs}, loss {total / steps:.4f}, {minutes:.1f} min", flush=True)
    net.eval()
    return minutes


def one(name: str, tool: str, found: Images, a: argparse.Namespace) -> dict[str, Any]:
    """A row: accuracy before, after the cut, after training, in 8 bits."""
    net = zoo.build(name, data.folder() / "models" / f"cifar10_{name}.safetensors")
    x = found.calibration()[:2]
    whole = bench_pruning.size_of(net, x)
    torch.manual_seed(a.seed)
    try:
        cut = pruned(tool, copy.deepcopy(net), found, a.share, a.by)
    except PassError as e:
        return {"float": f"{in_float(net, found):.2f}", "cut": common.short(e.fact)}
    left = bench_pruning.size_of(cut, x)
    scores = {"float": in_float(net, found), "cut": in_float(cut, found)}
    settings = {k: getattr(a, k) for k in ("epochs", "seed", "share", "by", "images", "steps")} | {"shapes": [list(p.shape) for p in cut.parameters()]}
    minutes = tune(cut, found, a.epochs, a.seed, a.steps, a.out / "prune" / f"{name}-{tool}-{a.by}-{a.epochs}-{a.seed}.pt", settings)
    scores["trained"], scores["int8"] = in_float(cut, found), in_int8(cut, found, a.threads)
    shown = {k: f"{v:.2f}" for k, v in scores.items()}
    return shown | {
        "int8 - trained": f"{scores['int8'] - scores['trained']:+.2f}",
        "MACs left": f"{left[0] / whole[0]:.1%}", "parameters left": f"{left[1] / whole[1]:.1%}", "by": "group norm" if tool == "torch-pruning" else a.by,
        "epochs": a.epochs, "seed": a.seed, "minutes": f"{minutes:.1f}", "test images": len(found.test[0]),
    }  # fmt: skip


def summary(rows: dict[str, dict[str, Any]]) -> list[str]:
    within = [abs(float(r["int8 - trained"])) <= GOAL for r in rows.values() if "int8" in r]
    lines = [
        f"accuracy in percent; 8 bits within {GOAL} points of the trained net: {sum(within)} of {len(within)}",
        f"Torch-Pruning {peer.version()}; it cannot follow the padded shortcut, so these concatenate zeros there, which compute the same",
    ]
    for key, row in rows.items():
        name, tool, *rest = key.split(" ")
        other = rows.get(" ".join([name, "torch-pruning", *rest]))
        if tool != "torch-pruning" and other and "trained" in row:
            lines.append(f"{key}: {float(row['trained']) - float(other['trained']):+.2f} points beside Torch-Pruning")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    p.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--share", type=float, default=0.5, help="of the MACs that may be left")
    p.add_argument("--by", default="l2", help="fxq's criterion")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--images", type=int, default=0, help="use so many training and test images; 0: all")
    p.add_argument("--steps", type=int, default=0, help="so many steps in an epoch; 0: all")
    p.add_argument("--out", type=Path, default=ROOT / "out", help="folder of checkpoints")
    p.add_argument("--fresh", action="store_true", help="forget all finished rows")
    a = p.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(a.threads)
    table = common.Table("prune_training", f"CIFAR-10 ResNets pruned to {a.share:.0%} of their MACs and trained", a.fresh)
    found = images(a.images)
    for name in a.nets:
        for tool in a.tools:
            key = f"{name} {tool} {a.by}, {a.epochs} epochs, seed {a.seed}"
            if key not in table.rows:
                table.put(key, one(name, tool, found, a))
    table.write(summary(table.rows))


if __name__ == "__main__":
    main()
