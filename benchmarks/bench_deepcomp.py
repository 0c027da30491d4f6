"""What is left of a net after Deep Compression: accuracy and bytes by stage, from archives that recipes trained.

Run: python examples/train_cifar10.py examples/recipes/resnet20_deepcomp_w5.toml
     python benchmarks/train_nin_gc.py; python benchmarks/compress_nin_gc.py
     python benchmarks/bench_deepcomp.py [--out out] [names ...]

The accuracy of the archive is measured in a process of its own that has nothing but the file. results/deepcomp.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch

import fxq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from training import data, result  # noqa: E402
from training.run import percent, predictions  # noqa: E402

GOAL = 0.5
"""Points below float that the compressed net may be."""


def score(path: Path) -> float:
    """Test accuracy of an archive, percent."""
    torch.set_num_threads(1)
    x, y = data.load("test")
    return percent(predictions(fxq.load(path), x, data.Normalise(False, True)), y)


def apart(path: Path) -> float:
    """The same in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--score", str(path)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def stages(path: Path) -> dict[str, Any]:
    """Bytes of the weights after each stage, and of the file."""
    report: dict[str, Any] = fxq.load(path).lower("archive").info["archive"]
    return {**report["total"], "rows": report["rows"]}


def row(out: Path) -> dict[str, Any]:
    """The row of a finished run."""
    done = result.read(out)
    path = out / f"{out.name}.fxq"
    if done is None or not path.exists():
        raise SystemExit(f"{out.name} is not finished: python examples/train_cifar10.py examples/recipes/{out.name}.toml --resume")
    size, found, scores = os.path.getsize(path), stages(path), done["accuracy"]
    before = scores["float"]["test"]
    archive, dense = apart(path), done["float_bytes"]
    weights = [r for r in found["rows"] if r["name"].endswith(".weight")]
    cut = 1 - sum(r["kept"] for r in weights) / sum(r["values"] for r in weights)
    return {
        "net": done["net"], "float": round(before, 2), "archive": round(archive, 2), "points": round(archive - before, 2),
        "goal": "met" if archive >= before - GOAL else f"MISSED ({GOAL} points)", "sparsity %": round(100 * cut, 2), "epochs": done["epochs"],
        "minutes": round(done["minutes"]), **{f"{k} kB": round(found[k] / 1e3, 2) for k in ("dense", "pruned", "shared", "coded")},
        "tables kB": round(found["overhead"] / 1e3, 2), "index and header kB": round((found["index"] + found["header"]) / 1e3, 2),
        "file kB": round(size / 1e3, 2), "entropy kB": round(found["bound"] / 1e3, 2), "ratio": round(dense / size, 1), "seed": done["seed"],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "out")
    p.add_argument("--score", type=Path, help="print the test accuracy of this archive, and stop")
    p.add_argument("recipes", nargs="*", default=["resnet20_deepcomp_w5", "nin_gc_deepcomp_w5"])
    a = p.parse_args(argv)
    if a.score is not None:
        print(score(a.score))
        return 0
    table = common.Table("deepcomp", "Deep Compression, CIFAR-10 test accuracy and bytes by stage")
    for name in a.recipes:
        table.put(name, row(a.out / name))
    table.write(["one seed; dense: all float parameters; pruned, shared: as fxq's report counts them; ratio: float parameters over the size of the file"])
    print(json.dumps(table.rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
