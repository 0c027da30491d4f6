"""Deep Compression of NIN_GC on a small machine: progressive resizing once more. Starts from what train_nin_gc.py wrote.

Run: python benchmarks/compress_nin_gc.py [--start FOLDER] [--out FOLDER] [--small 5] [--large 300] [--codebooks 100]

Masks grow to 90 % and train on images of 16 pixels (epochs), then on 32 pixels (steps), then 5-bit codebooks train (steps). The graph of the channel
shuffles knows its image size, so there is one trainable model a size; the state goes over. The folder (default: out/nin_gc_deepcomp_w5) takes
``nin_gc_deepcomp_w5.fxq``, ``result.json`` and a checkpoint after each part; the same command goes on after a stop. bench_deepcomp.py reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from train_nin_gc import BATCH, accuracy, images, step_of
from training import data

import fxq
from fxq.sparsity import cubic_ratio
from fxq.trainable import TrainableModel
from fxq.zoo.nin import nin_gc

SPARSITY, EVERY, RAMP = 0.9, 20, 0.6


def float_net(start: Path) -> nn.Module:
    """The float net, in eval mode, with a pool for any size."""
    net = nin_gc()
    net.load_state_dict(load_file(start / f"{start.name}.safetensors"))
    net.features[-1] = nn.AdaptiveAvgPool2d(1)
    return net.eval()


def trainable(net: nn.Module, size: int) -> TrainableModel:
    """Masks that cut nothing yet, for images of that size."""
    made = fxq.compile(net, "deepcomp_w5", example=torch.zeros(2, 3, size, size), prune=fxq.Prune(sparsity=0.0), mode="qat", progress=False)
    assert isinstance(made, TrainableModel)
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def train(q: TrainableModel, size: int, steps: int, lr: float, seed: int, cut: bool) -> float:
    """AdamW under one cosine; the last loss, averaged. ``cut``: the sparsity grows in the first part."""
    x, y = data.load("train")
    run = torch.compile(q, dynamic=False)
    opt = torch.optim.AdamW([p for p in q.parameters() if p.requires_grad], lr=lr, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    g, mean, start = torch.Generator().manual_seed(seed), 0.0, time.time()
    order = torch.cat([torch.randperm(len(x), generator=g) for _ in range(-(-steps * BATCH // len(x)))])
    q.train()
    for step in range(steps):
        if cut and step % EVERY == 0:
            q.prune_weights(cubic_ratio(step, begin=0, end=round(RAMP * steps), final=SPARSITY))
        at = order[step * BATCH : (step + 1) * BATCH]
        loss = step_of(run, opt, images(x[at], size, g), y[at])
        rate.step()
        mean += (loss - mean) * max(0.02, 1 / (step + 1))
        if step % 50 == 0:
            print(f"{size} pixels, step {step} of {steps}: loss {mean:.3f}, {(time.time() - start) / (step + 1):.2f} s a step", flush=True)
    return mean


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--start", type=Path, default=Path("out/nin_gc_progressive"))
    p.add_argument("--out", type=Path, default=Path("out/nin_gc_deepcomp_w5"))
    p.add_argument("--small", type=float, default=5, help="epochs on 16 pixels")
    p.add_argument("--large", type=int, default=300, help="steps on 32 pixels")
    p.add_argument("--codebooks", type=int, default=100, help="steps on 32 pixels with shared weights")
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    a.out.mkdir(parents=True, exist_ok=True)
    saved, name = a.out / "checkpoint.pt", a.out.name
    net = float_net(a.start)
    done = torch.load(saved, weights_only=True) if saved.exists() else {"part": 0, "minutes": 0.0, "losses": []}
    q = trainable(net, 32)
    steps = round(a.small * 50_000 / BATCH)
    parts = [(16, steps, 2e-3, True), (32, a.large, 1e-3, False), (32, a.codebooks, 3e-4, False)]
    for part in range(done["part"], len(parts)):
        size, count, lr, cut = parts[part]
        run = q if size == 32 else trainable(net, size)
        if part == 2:
            run.share_weights()
        if part and part == done["part"]:  # goes on after a stop; the masks, and with them the state, are those of the part before
            before = trainable(net, 32)
            before.load_state_dict(done["state"])
            q = run = before.share_weights() if part == 2 else before
        start = time.time()
        loss = train(run, size, count, lr, part, cut)
        if size != 32:
            q.load_state_dict(run.state_dict())
        done = {"part": part + 1, "minutes": done["minutes"] + (time.time() - start) / 60, "losses": [*done["losses"], loss], "state": q.state_dict()}
        torch.save(done, saved)
    if not q.shares_weights:  # everything was done before
        q.share_weights().load_state_dict(done["state"])
    made = q.eval().convert()
    made.lower("archive").save(a.out / f"{name}.fxq", force=True)
    x, y = data.load("test")
    scores = {"float": {"test": accuracy(net, x, y)}, "simulator": {"test": accuracy(made, x, y)}}
    body = {
        "net": "nin_gc", "accuracy": scores, "epochs": f"{a.small:g} at 16 pixels, {a.large} + {a.codebooks} steps at 32",
        "minutes": done["minutes"], "seed": 0,
        "float_bytes": sum(4 * p.numel() for p in net.parameters()), "losses": done["losses"], "torch": torch.__version__,
        "bytes": os.path.getsize(a.out / f"{name}.fxq"),
    }  # fmt: skip
    (a.out / "result.json").write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body))


if __name__ == "__main__":
    main()
