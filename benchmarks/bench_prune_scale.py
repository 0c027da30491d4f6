"""How long do finding the groups, choosing and cutting take, and how do they grow with the graph?

Run: python benchmarks/bench_prune_scale.py [--repeats 3] [names ...]

Nets of several families in growing depth, random weights, 64 pixels. Each time is the least of the repeats. Writes a table and a plot (``prune_scale.svg``).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from typing import Any

import common
import torch

from fxq import pruning, schemes, targets
from fxq.groups import find
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.pipeline import PassContext, Pipeline
from fxq.snapshot import History
from fxq.trace import capture

NAMES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121", "densenet169", "densenet201", "swin_t", "swin_s", "swin_b",
    "regnet_y_400mf", "regnet_y_3_2gf", "efficientnet_b0", "efficientnet_b4", "efficientnet_b7", "convnext_tiny", "convnext_base",
    "shufflenet_v2_x1_0", "inception_v3", "vit_b_16",
)  # fmt: skip
WIDTH, HEIGHT, EDGE = 640, 400, 50


def measure(name: str, repeats: int) -> dict[str, Any]:
    """A row: nodes, channels, seconds of each step."""
    net, size = common.torchvision_net(name), 224 if name.startswith("vit") else 96 if name.startswith("inception") else 64
    x = torch.randn(2, 3, size, size)
    captured = capture(net, (x,))
    assert captured.gm is not None
    ctx = PassContext(schemes.get("float"), targets.get("onnxruntime"), (x,))
    Pipeline((Canonicalize(), PropagateShapes())).run(captured.gm, ctx, History())
    best = {"find s": math.inf, "plan s": math.inf, "cut s": math.inf}
    labels = groups = 0
    for _ in range(repeats):
        gm = copy.deepcopy(captured.gm)
        marks = [time.perf_counter()]
        found = find(gm)
        marks.append(time.perf_counter())
        plan = pruning.plan(gm, pruning.Prune(ratio=0.5, multiple_of=8), 8, groups=found)
        marks.append(time.perf_counter())
        pruning.apply(plan)
        marks.append(time.perf_counter())
        labels, groups = found.channels.count, len(found.groups)
        for key, a, b in zip(best, marks, marks[1:], strict=False):
            best[key] = min(best[key], b - a)
    return {"nodes": len(captured.gm.graph.nodes), "channels": labels, "groups": groups, **{k: f"{v:.3f}" for k, v in best.items()}}


def plot(rows: dict[str, dict[str, Any]]) -> str:
    """Seconds of finding the groups over nodes, as SVG."""
    right = max(r["nodes"] for r in rows.values())
    top = max(float(r["find s"]) for r in rows.values())
    dots = []
    for name, r in rows.items():
        x = EDGE + (WIDTH - 2 * EDGE) * r["nodes"] / right
        y = HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * float(r["find s"]) / top
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text x="{x + 5:.1f}" y="{y - 3:.1f}">{name}</text>')
    base = HEIGHT - EDGE
    axes = f'<path d="M{EDGE},{EDGE} V{base} H{WIDTH - EDGE}" fill="none" stroke="black"/>'
    words = (
        f'<text x="{WIDTH - EDGE}" y="{base + 20}" text-anchor="end">{right} nodes</text>'
        f'<text x="{EDGE}" y="{EDGE - 8}">{top:.2f} s to find the groups</text><text x="{EDGE - 8}" y="{base + 12}">0</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 80}" height="{HEIGHT}" font-family="sans-serif" font-size="10">'
        f"{axes}{words}{''.join(dots)}</svg>\n"
    )


def slope(rows: dict[str, dict[str, Any]], key: str) -> float:
    """Exponent of the seconds over ``key``: least squares in logarithms."""
    xs = [math.log(r[key]) for r in rows.values()]
    ys = [math.log(float(r["find s"])) for r in rows.values()]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("names", nargs="*")
    a = p.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(a.threads)
    table = common.Table("prune_scale", "Structured pruning: seconds by the size of the graph", True)
    for name in a.names or NAMES:
        table.put(name, measure(name, a.repeats))
    rows = table.rows
    lines = [f"greatest: find {max(float(r['find s']) for r in rows.values()):.2f} s, cut {max(float(r['cut s']) for r in rows.values()):.2f} s"]
    if len(rows) > 2:
        lines.append(f"finding grows with nodes to the power {slope(rows, 'nodes'):.2f}, with channels to the power {slope(rows, 'channels'):.2f}")
        (common.RESULTS / "prune_scale.svg").write_text(plot(rows), encoding="utf-8")
    table.write(lines)


if __name__ == "__main__":
    main()
