"""``fxq-lower --bisect --sensitivity --numbers --budget-bytes`` and ``fxq bisect``."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxq import cli, command

SOURCE = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
"""


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "net.py").write_text(SOURCE)
    np.save(tmp_path / "c.npy", np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype("f4"))
    return [f"{tmp_path / 'net.py'}:build", "--calibration", str(tmp_path / "c.npy")]


def test_bisect_of_a_clean_model(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*base, "--bisect", "--report-json", str(tmp_path / "r.json"), "--report", str(tmp_path / "r.html")]) == 0
    assert "nothing wrong (sqnr: float equal, compiled " in capsys.readouterr().out
    body = json.loads((tmp_path / "r.json").read_text())
    assert body["bisect"]["ok"] is True and body["bisect"]["word"] == "nothing wrong" and body["bisect"]["causes"] == []
    assert (tmp_path / "r.html").stat().st_size > 10_000


def test_bisect_of_a_faulty_compiler_and_the_other_name(base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    faults: Any = importlib.import_module("faults")
    with faults.planted(next(f for f in faults.FAULTS if f.name == "swapped channel scales"), 0) as truth:
        assert command.main(["bisect", *base]) == 1
    out = capsys.readouterr().out
    assert "faults found" in out and any(f"convert / {n}: swapped scales" in out for n in truth[0])
    with faults.planted(next(f for f in faults.FAULTS if f.name == "swapped channel scales"), 0):
        assert cli.main([*base, "--bisect", "--quiet"]) == 1
    assert capsys.readouterr().out == ""


def test_a_tolerance_that_eight_bits_do_not_reach(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*base, "--bisect", "--tolerance", "70"]) == 1
    assert "the codes are too few" in capsys.readouterr().out


def test_numbers_and_sensitivity(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*base, "--numbers", "--sensitivity", "layer"]) == 0
    out = capsys.readouterr().out
    assert "moved by convert:" in out and "everything quantized: " in out and "all but it" in out


def test_a_budget(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*base, "--budget-bytes", "0.7", "-o", str(tmp_path / "m.onnx"), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "of the scheme's own)" in out and "4 bits" in out and "proven" in out
    assert cli.main([*base, "--budget-bops", "0.9", "--bits", "4,8,32"]) == 0
    assert "bops: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--tolerance", "3"], "--tolerance is for --bisect"),
        (["--budget-bytes", "0.5", "--budget-bops", "0.5"], "a budget limits bytes or bops"),
        (["--budget-bytes", "0.5", "--bits", "4,x"], "--bits '4,x' is no list of numbers"),
        (["--budget-bytes", "much"], "'much' is no number"),
        (["--budget-bytes", "0.1"], "the smallest choice takes"),
        (["--bisect", "--metric", "f1"], "invalid choice: 'f1'"),
    ],
)
def test_mistakes_end_with_2_and_one_line(options: list[str], text: str, base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*base, *options, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1 and "Traceback" not in err


def test_bisect_without_calibration_runs_on_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    torch.manual_seed(0)
    assert command.main(["bisect", f"{tmp_path / 'net.py'}:build", "--input", "2,3,8,8", "--scheme", "weight_only_w8"]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    assert command.main(["bisect"]) == 2
    assert "no model is given" in capsys.readouterr().err
