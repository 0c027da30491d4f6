"""Train a net for CIFAR-10 from a recipe: float, quantization-aware, with fixed grids, DoReFa, binary or ternary. Ends with a proven ONNX file.

Run: python examples/train_cifar10.py examples/recipes/resnet20_iao_w8a8.toml [--set epochs=3 ...] [--resume] [--force] [--out FOLDER]

The folder (default: out/<name of the recipe>) takes ``checkpoint.pt``, ``<name>.onnx`` and ``result.json``. What a recipe may say: docs/recipes.md.
Several processes: ``torchrun --nproc-per-node 2 examples/train_cifar10.py ...``.

Exit code: 0 done, 1 the proof fails, 2 a mistake in what was given or a loss that is NaN, 3 stopped before the end with a checkpoint (Ctrl-C, SIGTERM,
``max_seconds``): the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch.distributed as dist
from training import checkpoint, parts, recipe, result
from training.run import Run
from training.show import Show

from fxq.errors import FxqError, InputError

STOPPED = 3


def prepared(out: Path, made: recipe.Recipe, resume: bool, force: bool) -> bool:
    """Make the folder; whether it holds the finished run already.

    Raises:
        InputError: when it holds a run and neither ``resume`` nor ``force`` is given, or the result of another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / checkpoint.NAME, out / result.NAME]
    if force:
        for f in files:
            f.unlink(missing_ok=True)
    elif not resume and any(f.exists() for f in files):
        raise InputError("the folder holds a run", where=str(out), way_out="Add --resume to go on, or --force to begin anew")
    done = result.read(out)
    if done is not None:
        other = recipe.difference(done["recipe"], made.same())
        if other:
            raise InputError(f"its result is of another recipe: {other}", where=str(out), way_out="Begin anew with --force, or use another --out")
    return done is not None


def summary(body: dict[str, object]) -> str:
    """The result in a few lines."""
    scores: dict[str, dict[str, float | None]] = body["accuracy"]  # type: ignore[assignment]
    proof: dict[str, object] = body["proof"]  # type: ignore[assignment]
    lines = [f"{k}: " + ", ".join(f"{part} {v:.2f} %" for part, v in s.items() if v is not None) for k, s in scores.items()]
    lines += [f"proof on {proof['images']} images: {'ok' if proof['ok'] else proof['text']}"]
    lines += [f"{body['file_bytes']:,} bytes, {body['epochs']} epochs, {body['minutes']} minutes, seed {body['seed']}"]
    got = scores["onnxruntime"]["test"]
    if body["goal"] is not None and got is not None:
        lines += [f"goal {body['goal']} %: {'met' if got >= float(body['goal']) else 'missed'}"]  # type: ignore[arg-type]
    return "\n".join(lines)


def work(a: argparse.Namespace, rank: int, world: int) -> int:
    """Train; returns the exit code."""
    made = recipe.load(a.recipe, a.set)
    parts.scheme(made)
    name = a.recipe.stem
    out = a.out or Path("out") / name
    finished = prepared(out, made, a.resume, a.force) if rank == 0 else False
    if world > 1:
        dist.barrier()
        finished = result.read(out) is not None
    with Show(quiet=rank > 0) as show:
        if finished:
            show.line(f"{out} is finished\n{summary(result.read(out) or {})}")
            return 0
        run = Run(made, out, show, rank, world)
        if a.resume and run.resume():
            show.line(f"goes on after epoch {run.at.number}, step {run.at.step}")
        if not run.train():
            show.line(f"stopped ({run.stopping}) after epoch {run.at.number}, step {run.at.step}: the same command with --resume goes on")
            return STOPPED
        if rank > 0:
            return 0
        changes = [w for c in a.set if c.split("=")[0].strip() not in recipe.FREE for w in ("--set", c)]
        body = result.write(run, name, shlex.join(["python", "examples/train_cifar10.py", f"examples/recipes/{a.recipe.name}", *changes]))
        show.line(summary(body))
        return 0 if body["proof"]["ok"] else 1


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = argparse.ArgumentParser(description="Train a net for CIFAR-10 from a recipe, down to a proven ONNX file", epilog="Keys of a recipe: docs/recipes.md")
    p.add_argument("recipe", type=Path, help="TOML file, such as examples/recipes/resnet20_iao_w8a8.toml")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe; repeatable")
    p.add_argument("--out", type=Path, help="folder of checkpoint, ONNX file and result (default: out/<name of the recipe>)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder, if there is one")
    p.add_argument("--force", action="store_true", help="begin anew in a folder that holds a run")
    a = p.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if world > 1:
            dist.init_process_group("gloo")
        return work(a, rank, world)
    except FxqError as e:
        print(f"train_cifar10: {e}", file=sys.stderr)
        return 2
    finally:
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
