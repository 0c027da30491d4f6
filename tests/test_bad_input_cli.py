"""Mistakes on the command line: exit code 2, one line on stderr, no traceback, no half-written file."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fxq.cli import main

NET = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def double():
    return build().double()


def nan():
    m = build()
    m[0].weight.data[0] = float("nan")
    return m


def needs(size):
    return nn.Linear(size, size)


def breaks():
    raise RuntimeError("no such weights")


class Loop(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("bad.py").write_text("def build(:\n")
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    np.save("cal.npy", x)
    np.save("nan.npy", x * np.nan)
    np.save("images.npy", (x * 50).astype(np.uint8))
    np.save("channels.npy", x[:, :2])
    np.save("none.npy", x[:0])
    np.save("text.npy", np.array(["a"]))
    np.save("number.npy", np.float32(1))
    np.savez("ragged.npz", a=x, b=x[:2])
    np.savez("other.npz", image=x)
    Path("cut.npz").write_bytes(Path("ragged.npz").read_bytes()[:900])
    Path("cut.npy").write_bytes(Path("cal.npy").read_bytes()[:900])
    Path("empty.pt").write_bytes(b"")
    torch.save(torch.ones(3), "tensor.pt")
    Path("there.onnx").write_bytes(b"mine")
    Path("folder").mkdir()
    Path("photos").mkdir()
    Path("photos/a.png").write_bytes(b"no image")
    return tmp_path


MISTAKES = [
    (["net.py:double", "--calibration", "cal.npy"], "0.weight: the weights are torch.float64, fxq compiles float32 models. Pass model.float()"),
    (["net.py:nan", "--calibration", "cal.npy"], "0.weight: the tensor holds NaN or infinity"),
    (["net.py:Loop", "--calibration", "cal.npy"], "cannot be traced: `x.sum() > 0`: the result depends on the values of a tensor"),
    (["net.py:needs", "--calibration", "cal.npy"], "net.py:needs fails: TypeError: needs() missing 1 required positional argument"),
    (["net.py:breaks", "--calibration", "cal.npy"], "net.py:breaks fails: RuntimeError: no such weights. It has to return the model"),
    (["net.py:number", "--calibration", "cal.npy"], "net.py:number is a int. Name a function"),
    (["bad.py:build", "--calibration", "cal.npy"], "bad.py: fails when it is read: SyntaxError"),
    (["net.py:build", "--calibration", "nan.npy"], "batch 0 holds NaN or infinity"),
    (["net.py:build", "--calibration", "images.npy"], "the model does not run on an input of uint8 [4, 3, 8, 8]"),
    (["net.py:build", "--calibration", "channels.npy"], "the model does not run on an input of float32 [4, 2, 8, 8]"),
    (["net.py:build", "--calibration", "none.npy"], "none.npy: its arrays have lengths"),
    (["net.py:build", "--calibration", "text.npy"], "text.npy: cannot be read"),
    (["net.py:build", "--calibration", "number.npy"], "number.npy: cannot be read"),
    (["net.py:build", "--calibration", "ragged.npz"], "ragged.npz: its arrays have lengths {'a': 4, 'b': 2}"),
    (["net.py:build", "--calibration", "other.npz"], "batch 0 has no input 'input'. Its keys are image"),
    (["net.py:build", "--calibration", "cut.npz"], "cut.npz: cannot be read"),
    (["net.py:build", "--calibration", "cut.npy"], "cut.npy: cannot be read"),
    (["net.py:build", "--calibration", "folder"], "folder: the folder holds no images. It may hold .jpg"),
    (["net.py:build", "--calibration", "photos"], "photos/a.png: not an image"),
    (["net.py:build", "--calibration", "cal.npy", "--weights", "tensor.pt"], "tensor.pt: it holds a Tensor. Give a state dict"),
    (["net.py:build", "--calibration", "cal.npy", "--weights", "empty.pt"], "empty.pt: cannot be read"),
    (["net.py:build", "--calibration", "cal.npy", "--batch-size", "0"], "argument --batch-size: '0' is not a number from 1 on"),
    (["net.py:build", "--calibration", "cal.npy", "--calibration-batches", "-1"], "is not a number from 1 on"),
    (["net.py:build", "--scheme", "weight_only_w8"], "the shapes are not known"),
    (["net.py:build", "--scheme", "weight_only_w8", "--input", "1,3,9,9"], "the model does not run on an input of float32 [1, 3, 9, 9]"),
    (["net.py:build", "--calibration", "cal.npy", "-o", "there.onnx"], "there.onnx: the file exists. Add --force"),
    (["net.py:build", "--calibration", "cal.npy", "-o", "folder"], "folder: it is a folder"),
    (["net.py:build", "--calibration", "cal.npy", "-o", "folder", "--force"], "folder: it is a folder"),
    (["net.py:build", "--calibration", "cal.npy", "-o", "no/m.onnx"], "no/m.onnx: its folder does not exist"),
    (["net.py:build", "--calibration", "cal.npy", "-o", "m.onnx", "--report-json", "./m.onnx"], "would be the same file"),
]


@pytest.mark.parametrize(("argv", "text"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_on_the_command_line(here: Path, argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def files() -> list[str]:
        return sorted(str(p) for p in here.rglob("*") if "__pycache__" not in p.parts)

    before = files()
    assert main(argv) == 2
    out = capsys.readouterr()
    message = [line for line in out.err.splitlines() if not line.startswith("fxq: ")]
    assert len(message) == 1 and message[0].startswith("fxq-lower: ") and text in message[0], out.err
    assert files() == before and Path("there.onnx").read_bytes() == b"mine"


def test_force_replaces_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["net.py:build", "--calibration", "cal.npy", "-o", "there.onnx", "--force", "--verify", "--quiet"]) == 0
    assert Path("there.onnx").stat().st_size > 500 and capsys.readouterr().out == ""


def test_a_stopped_run_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(fd: int) -> None:
        raise KeyboardInterrupt

    before = sorted(os.listdir())
    monkeypatch.setattr(os, "fsync", stop)
    assert main(["net.py:build", "--calibration", "cal.npy", "-o", "m.onnx", "--quiet"]) == 130
    assert capsys.readouterr().err == "fxq-lower: stopped\n" and [f for f in sorted(os.listdir()) if f != "__pycache__"] == before
