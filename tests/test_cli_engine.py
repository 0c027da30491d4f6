"""``fxq-lower --to tensorrt``: the engine, its plan, its profiles, the calibration cache; every mistake in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from fxq.cli import main

NET = """
from torch import nn


def build():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16))
"""
RUN = ["net.py:build", "--calibration", "cal.npy", "--to", "tensorrt", "--target", "sm86"]
SHAPES = ["--min", "1,3,8,8", "--opt", "2,3,8,8", "--max", "4,3,8,8"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    np.save("cal.npy", np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype(np.float32))
    return tmp_path


def test_builds_verifies_and_saves(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["-o", "m.engine", "--calibration-cache", "c.cache", "--report-json", "r.json"]
    code = main([*RUN, *SHAPES, "--float-dtype", "fp16", "--strict", "--verify", *files])
    out = capsys.readouterr().out
    assert code == 0 and "3 of 3 quantized operations run as planned" in out and "x 1x3x8x8 2x3x8x8 4x3x8x8" in out.replace("input", "x"), out
    assert Path("m.engine").read_bytes().startswith(b"vtrt") and Path("c.cache").read_text().startswith("TRT-8601-EntropyCalibration2\n")
    report = json.loads(Path("r.json").read_text())
    assert report["scheme"] == "iao_w8a8_sym" and report["capability"] == 86 and report["mismatches"] == [] and report["verify"]["ok"]
    assert {c["planned"] for c in report["checks"]} == {"int8"} and all(c["ok"] for c in report["checks"]) and len(report["layers"]) > 3


def test_dry_run_prints_the_plan_and_saves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(here.iterdir())
    assert main([*RUN, "--dry-run", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "correlation" in out and "ONNX nodes" in out and "compute capability 8.6" in out
    assert "3 of 3 quantized operations run as planned; 0 stay float" in out
    assert set(here.iterdir()) - before <= {here / "__pycache__"}


def test_the_onnx_file_and_its_cache_without_an_engine(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["net.py:build", "--calibration", "cal.npy", "--target", "tensorrt", "--calibration-cache", "c.cache", "--trt-version", "10.3.0"]
    assert main([*run, "-o", "m.onnx"]) == 0
    assert Path("c.cache").read_text().startswith("TRT-100300-") and "c.cache: 3 scales" in capsys.readouterr().out
    assert main(["net.py:build", "--input", "1,3,8,8", "--scheme", "float", "--target", "tensorrt", "--to", "onnx", "-o", "float.onnx"]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([*RUN, "--scheme", "iao_w8a8"], "target 'sm86' does not take activation grids of u8/pt (scheme 'iao_w8a8'). Use scheme='int8'"),
        ([*RUN[:-1], "sm75"], "target 'sm75' runs no int8"),
        ([*RUN[:-1], "sm89", "--scheme", "fp8_w8a9"], "unknown scheme 'fp8_w8a9'. did you mean 'fp8_w8a8'?"),
        ([*RUN, "--min", "1,3,8,8"], "--min, --opt and --max belong together"),
        ([*RUN, *SHAPES, *SHAPES], "2 shapes are given, the model has the inputs"),
        ([*RUN, "--min", "1,3", "--opt", "1,3", "--max", "1,3"], "the profile's shape 1x3 has 2 dimensions, the input -1x3x8x8 has 4"),
        ([*RUN, "--min", "9,3,8,8", "--opt", "2,3,8,8", "--max", "4,3,8,8"], "input 'input'"),
        ([*RUN, "--dry-run", "-o", "x.engine"], "--dry-run saves nothing"),
        ([*RUN, "-o", "same", "--calibration-cache", "same"], "the model and the calibration cache would be the same file"),
        ([*RUN, "--timeout", "0.001"], "did not finish in 0.001 s"),
        (["net.py:build", "--calibration", "cal.npy", "--strict"], "--strict is for engines. Add --to tensorrt"),
        (["net.py:build", "--calibration", "cal.npy", "--float-dtype", "fp16"], "computes float16 slower than float32"),
        (["net.py:build", "--calibration", "cal.npy", "--calibration-cache", "c"], "its grid is not symmetric int8"),
        ([*RUN, "--calibration-cache", "c", "--trt-version", "11.0.0"], "TensorRT 11.0.0 reads no calibration cache"),
    ],
)
def test_mistakes_end_in_one_line(here: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fxq-lower: ") and text in err and len(err.strip().splitlines()) == 1, err
    assert not any(Path(name).exists() for name in ("x.engine", "same", "c"))
