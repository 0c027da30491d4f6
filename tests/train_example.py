"""A folder with random images in which the tests of ``examples/train_cifar10.py`` run it, two recipes, and what reads its checkpoints."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.toml"))
BASE = """
net = "tiny_resnet8"
scheme = "iao_w8a8"
threads = 1
batch = 8
train_images = 24
validation = 20
calibration = 16
checkpoint_steps = 2
"""
QAT = BASE + "ema = 0.9\n[[stages]]\nepochs = 2\nlr = 0.01\n[[stages]]\nphase = 'qaft'\nepochs = 1\nlr = 1e-3\n"
DEEPCOMP = BASE.replace("iao_w8a8", "deepcomp_w3") + """
sparsity_scope = "sensitivity"
[[stages]]
epochs = 2
lr = 0.01
sparsity = 0.6
ramp = 0.0
[[stages]]
phase = "share"
epochs = 1
lr = 1e-3
"""
FLOAT = BASE.replace("iao_w8a8", "float") + "select = 'best'\n[optimizer]\nname = 'adam'\n[[stages]]\nepochs = 2\nlr = 0.01\nwarmup = 0.5\n"


def write_images(path: Path, count: int, rng: np.random.Generator) -> None:
    """A file of the authors' binary form: images that show their class."""
    y = np.arange(count) % 10
    x = (np.arange(3072)[None] * (y[:, None] + 1) % 128 + rng.integers(0, 128, (count, 3072))).astype(np.uint8)
    np.concatenate([y[:, None].astype(np.uint8), x], 1).tofile(path)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module, in a folder with random images; threads of torch are put back."""
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    for i in range(1, 3):
        write_images(tmp_path / "data" / "cifar10" / f"data_batch_{i}.bin", 40, rng)
    write_images(tmp_path / "data" / "cifar10" / "test_batch.bin", 30, rng)
    monkeypatch.setenv("FXQ_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield importlib.import_module("train_cifar10")
    torch.set_num_threads(threads)


def recipe(text: str, name: str = "tiny") -> str:
    Path(f"{name}.toml").write_text(text)
    return f"{name}.toml"


def state(folder: str) -> dict[str, Any]:
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)  # type: ignore[no-any-return]


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit; times aside."""
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a if k not in ("seconds", "spent", "images_per_second"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)
