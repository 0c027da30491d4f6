"""What does quantization-aware training cost, and what does it give?

Run: python benchmarks/bench_training.py --steps [--net resnet20] [--batch 128] [--threads 2] [--rounds 11]
     python benchmarks/bench_training.py --accuracy [--minutes 120] [--seeds 0 1] [--set KEY=VALUE] [--force] [--out out] [recipes ...]

``--steps``: time of one training step (forward, backward, SGD) of the float net, of fxq's QAT and QAFT and of torch.ao's FX QAT, in turns in one
run, in both memory formats (results/training_steps.md). ``--accuracy``: runs the recipes (default: all of examples/recipes) through
examples/train_cifar10.py and collects their results (results/training.md). What is finished is not run again; what was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import zoo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from training import recipe, result  # noqa: E402

SCHEME = "iao_w8a8"
GOAL = 1.6
"""Greatest QAT step over the float step."""
STOPPED = 3


def fx_qat(net: nn.Module, x: Tensor) -> nn.Module:
    """The net as torch.ao's FX mode trains it: per-channel weights, fused batch norms, moving averages (its default for x86)."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = prepare_qat_fx(copy.deepcopy(net).train(), get_default_qat_qconfig_mapping("x86"), (x,))
    return made


def contestants(name: str, x: Tensor) -> dict[str, nn.Module]:
    """The trainable forms of a net, all from the same weights."""
    torch.manual_seed(0)
    net = common.randomise(zoo.build(name))
    qat = fxq.compile(net, SCHEME, calibration=x, mode="qat", progress=False)
    frozen = copy.deepcopy(qat)
    frozen.freeze()  # type: ignore[operator]
    return {"float": net, "fxq QAT": qat, "fxq QAFT": frozen, "torch.ao FX QAT": fx_qat(net, x)}


def stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """A training step as a function."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def step_times(name: str, batch: int, rounds: int, channels_last: bool) -> dict[str, list[float]]:
    """Seconds of each step of each contestant, taken in turns after two of warm-up."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *zoo.INPUTS[name], generator=g).contiguous(memory_format=form)
    y = torch.randint(0, 10, (batch,), generator=g)
    steps = {k: stepper(m.to(memory_format=form), x, y) for k, m in contestants(name, x).items()}  # type: ignore[call-overload]
    times: dict[str, list[float]] = {k: [] for k in steps}
    for i in range(rounds + 2):
        for k, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 2:
                times[k].append(time.perf_counter() - start)
    return times


def steps(a: argparse.Namespace) -> None:
    torch.set_num_threads(a.threads)
    table = common.Table("training_steps", f"Time of a training step, batch {a.batch}, {a.threads} threads ({SCHEME})", a.fresh)
    for channels_last in (False, True):
        times = step_times(a.net, a.batch, a.rounds, channels_last)
        row: dict[str, Any] = {}
        for k, seconds in times.items():
            row[f"{k} ms"] = f"{1e3 * statistics.median(seconds):.0f}"
        for k, seconds in times.items():
            if k != "float":
                row[f"{k} / float"] = f"{statistics.median(s / f for s, f in zip(seconds, times['float'], strict=True)):.2f}"
        table.put(f"{a.net} {'channels last' if channels_last else 'contiguous'}", row | {"batch": a.batch, "threads": a.threads, "rounds": a.rounds})
    notes = [f"medians of {a.rounds} steps in turns; the ratios are medians of each round's; torch.ao: prepare_qat_fx, its default for x86"]
    for key, row in table.rows.items():
        met = float(row["fxq QAT / float"]) <= GOAL
        notes.append(f"{key}: fxq QAT {row['fxq QAT / float']} times the float step, goal at most {GOAL}: {'met' if met else 'MISSED'}")
    table.write(notes)


def ordered(paths: list[Path], changes: list[str]) -> list[tuple[Path, recipe.Recipe]]:
    """Recipes, those whose weights other ones start from first."""
    made = [(p, recipe.load(p, changes)) for p in paths]
    wanted = {r.weights for _, r in made}
    return sorted(made, key=lambda pair: pair[0].stem not in wanted)


def train(path: Path, out: Path, changes: list[str], force: bool, seconds: float) -> int:
    """Run the example script in a process of its own; its exit code."""
    change = [w for c in [*changes, *([f"max_seconds={seconds:.0f}"] if seconds else [])] for w in ("--set", c)]
    command = [sys.executable, str(ROOT / "examples" / "train_cifar10.py"), str(path), "--out", str(out), "--force" if force else "--resume", *change]
    return subprocess.run(command, check=False).returncode


def collected(body: dict[str, Any]) -> dict[str, Any]:
    """A row of the table from a ``result.json``."""
    scores = body["accuracy"]
    shown = {k: f"{scores[k]['test']:.2f}" if k in scores else "" for k in ("float", "simulator", "onnxruntime")}
    goal = body["goal"]
    return {
        "net": body["net"], "scheme": body["scheme"], "float": shown["float"], "simulator": shown["simulator"], "ONNX Runtime": shown["onnxruntime"],
        "goal": "" if goal is None else f"{goal:g}, {'met' if scores['onnxruntime']['test'] >= goal else 'MISSED'}",
        "proof": "ok" if body["proof"]["ok"] else "NOT ok", "seed": body["seed"], "epochs": body["epochs"], "minutes": f"{body['minutes']:.0f}",
        "images/s": f"{body['images_per_second']:.0f}", "file KB": f"{body['file_bytes'] / 1e3:.0f}", "test images": body["test_images"],
        "trained": body["date"], "command": body["command"],
    }  # fmt: skip


def accuracy(a: argparse.Namespace) -> int:
    """Run what is not finished, until the minutes are over; 1 when a run failed."""
    table = common.Table("training", "CIFAR-10 test accuracy after training, of the float start, the simulator and the file in ONNX Runtime", a.fresh)
    end, failed = time.monotonic() + 60 * a.minutes, []
    for seed in a.seeds:
        changes = [*a.set, *([f"seed={seed}"] if seed is not None else [])]
        for path, made in ordered(a.recipes or sorted((ROOT / "examples" / "recipes").glob("*.toml")), changes):
            name = path.stem if seed in (None, 0) else f"{path.stem}-seed{seed}"
            out = a.out / name
            done = result.read(out)
            if a.force or done is None or recipe.difference(done["recipe"], made.same()):
                left = end - time.monotonic()
                if a.minutes and left < 1:
                    break
                code = train(path, out, changes, a.force or done is not None, left if a.minutes else 0)
                done = result.read(out)
                if code == STOPPED:
                    print(f"{name}: stopped, the same command goes on", flush=True)
                    continue
                if done is None:
                    failed.append(name)
                    continue
            table.put(name, collected(done))
    table.write([
        "the file is what fxq lowered; the test images are used once, at the end of a run; seeds, epochs and minutes of training on this machine are stated",
        f"{sum('MISSED' in r['goal'] for r in table.rows.values())} of {sum(bool(r['goal']) for r in table.rows.values())} goals missed",
    ])  # fmt: skip
    for name in failed:
        print(f"{name}: FAILED", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--steps", action="store_true", help="measure the time of a training step")
    what.add_argument("--accuracy", action="store_true", help="run recipes and collect their results")
    p.add_argument("--fresh", action="store_true", help="forget all finished rows of the table")
    p.add_argument("--net", default="resnet20", choices=zoo.NETS, metavar="NET")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=11)
    p.add_argument("--minutes", type=float, default=0, help="stop after so long; 0: never")
    p.add_argument("--seeds", type=int, nargs="+", default=[None], help="run each recipe with each of these")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of all recipes")
    p.add_argument("--force", action="store_true", help="run finished recipes again")
    p.add_argument("--out", type=Path, default=ROOT / "out")
    p.add_argument("recipes", type=Path, nargs="*")
    a = p.parse_args(argv)
    if a.steps:
        steps(a)
        return 0
    return accuracy(a)


if __name__ == "__main__":
    sys.exit(main())
