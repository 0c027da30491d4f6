"""Float weights for NIN_GC on CIFAR-10, fast on a small machine: progressive resizing (images of 16, then 32 pixels), one cycle of the rate.

Run: python benchmarks/train_nin_gc.py [--out FOLDER] [--epochs 16:6,32:1]

The folder (default: out/nin_gc_progressive) takes ``nin_gc_progressive.safetensors`` (named as the folder), ``result.json`` and a checkpoint after every
epoch; the same command goes on after a stop. compress_nin_gc.py starts from it. Trains on all 50,000 training images and reads the test images
once, at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from training import data

from fxq.zoo.nin import nin_gc

BATCH, PAD, PEAK, WARM = 128, 4, 4e-3, 0.15
MEAN, STD = torch.tensor(data.MEAN).view(1, 3, 1, 1), torch.tensor(data.STD).view(1, 3, 1, 1)


def images(x: Tensor, size: int, g: torch.Generator | None) -> Tensor:
    """uint8 ``[N, 32, 32, 3]`` to normalised float ``[N, 3, size, size]``; with a generator cropped and mirrored."""
    y = x.permute(0, 3, 1, 2).float()
    if g is not None:
        y = F.pad(y, (PAD,) * 4, mode="reflect")
        dx, dy = torch.randint(0, 2 * PAD + 1, (2, len(y)), generator=g)
        rows = (dy[:, None] + torch.arange(32))[:, None, :, None]
        columns = (dx[:, None] + torch.arange(32))[:, None, None, :]
        y = y[torch.arange(len(y))[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]
        flip = torch.rand(len(y), generator=g) < 0.5
        y[flip] = y[flip].flip(3)
    y = y if size == 32 else F.interpolate(y, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return ((y / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent, in float32."""
    net.eval()
    with torch.inference_mode():
        hits = sum(int((net(images(x[i : i + 250], 32, None)).argmax(1) == y[i : i + 250]).sum()) for i in range(0, len(x), 250))
    return 100 * hits / len(x)


def step_of(run: Any, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One training step under autocast; its loss."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = run(x)
    loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return float(loss.detach())


def rate(at: float) -> float:
    """Share of the peak rate at a share of the training."""
    return at / WARM if at < WARM else max(0.0, 1 - (at - WARM) / (1 - WARM))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out/nin_gc_progressive"))
    p.add_argument("--epochs", default="16:6,32:1", help="SIZE:EPOCHS, comma-separated")
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    sizes = [int(s) for part in a.epochs.split(",") for s in [part.split(":")[0]] * int(part.split(":")[1])]
    a.out.mkdir(parents=True, exist_ok=True)
    saved = a.out / "checkpoint.pt"
    torch.manual_seed(0)
    net = nin_gc().to(memory_format=torch.channels_last)
    net.features[-1] = nn.AdaptiveAvgPool2d(1)  # at 8 x 8 the same as the net's own pool
    opt = torch.optim.AdamW(net.parameters(), lr=PEAK, weight_decay=1e-2)
    x, y = data.load("train")
    begin, minutes, log = 0, 0.0, list[dict[str, Any]]()
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
        begin, minutes, log = state["epoch"], state["minutes"], state["log"]
    run = torch.compile(net, dynamic=False)  # one graph a size
    steps = len(x) // BATCH
    for epoch in range(begin, len(sizes)):
        g = torch.Generator().manual_seed(epoch)
        order, size, start, total = torch.randperm(len(x), generator=g), sizes[epoch], time.time(), 0.0
        net.train()
        for step in range(steps):
            for group in opt.param_groups:
                group["lr"] = PEAK * rate((epoch * steps + step) / (len(sizes) * steps))
            at = order[step * BATCH : (step + 1) * BATCH]
            total += step_of(run, opt, images(x[at], size, g), y[at])
        minutes += (time.time() - start) / 60
        log.append({"epoch": epoch, "size": size, "loss": total / steps, "minutes": minutes})
        print(log[-1], flush=True)
        torch.save({"net": net.state_dict(), "opt": opt.state_dict(), "epoch": epoch + 1, "minutes": minutes, "log": log}, saved)
    score = accuracy(net, *data.load("test"))
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(a.out / f"{a.out.name}.safetensors"))
    body = {"test": score, "minutes": minutes, "torch": torch.__version__, "log": log, "command": f"python benchmarks/train_nin_gc.py --epochs {a.epochs}"}
    (a.out / "result.json").write_text(json.dumps(body, indent=1) + "\n")
    print(f"test {score:.2f} %, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
