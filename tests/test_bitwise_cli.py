"""``fxq-lower --to bitwise`` and ``fxq inspect`` of what it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fxq
from fxq import bit_proof, cli
from fxq.bitwise.program import BitProgram
from fxq.command import main

NET = """
from torch import nn


def build():
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 16, 3, 2)]
    return nn.Sequential(*layers, nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    torch.manual_seed(0)
    return tmp_path


def lower(*more: str, scheme: str = "xnor_w1a1") -> int:
    np.save("cal.npy", torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0)).numpy())
    return cli.main(["net.py:build", "--calibration", "cal.npy", "--scheme", scheme, "--to", "bitwise", *more])


def test_lower_prints_what_runs_on_bits(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lower("-o", "net.fxq", "--verify", "--report-json", "r.json") == 0
    out = capsys.readouterr().out
    size = Path("net.fxq").stat().st_size
    rows = [line for line in out.splitlines() if "binary x binary" in line]
    assert [r.split()[0] for r in rows][:2] == ["3", "6"] and f"{size:,} bytes in the file" in out and "proven: " in out
    assert "the scheme leaves the first layer float" in out and "the scheme leaves the last layer float" in out
    report = json.loads(Path("r.json").read_text())
    assert report["verify"]["ok"] and report["verify"]["hidden_differ"] == 0 and report["bitwise"] and report["bytes"]["total"] == size
    assert type(fxq.load("net.fxq")) is BitProgram
    assert lower("-o", "net.fxq", "--quiet", "--force") == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize("scheme", ["bnn_w1a1", "twn_wta1", "tbn_w1at"])
def test_other_schemes_are_proven(here: Path, scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lower("-o", "net.fxq", "--verify", scheme=scheme) == 0 and "proven: " in capsys.readouterr().out


def test_it_is_compiled_for_the_target_bitwise_or_onnxruntime(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, target in (((), "bitwise"), (("--target", "onnxruntime"), "onnxruntime")):
        assert lower("-o", "net.fxq", "--quiet", "--force", *options) == 0
        assert fxq.load("net.fxq", run=False).target.name == target
    assert cli.main(["net.py:build", "--calibration", "cal.npy", "--scheme", "xnor_w1a1", "--target", "bitwise", "--verify", "--quiet", "-o", "n.onnx"]) == 0


def test_a_difference_ends_with_code_1(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_proof, "unequal", lambda a, b: torch.ones_like(a, dtype=torch.bool))
    assert lower("--verify") == 1 and "not proven: the first node that differs is " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheme", "int8"), "xnor_w1a1"),
        (("--target", "sm86", "--scheme", "int8"), "the graph is placed for 'sm86'. Compile it with target='bitwise'"),
        (("--target", "sm86"), "target 'sm86' does not take activation grids of u8/pt (scheme 'xnor_w1a1')"),
        (("--float-dtype", "fp16"), "--float-dtype is for ONNX files and engines. Leave it out, or add --to onnx-qdq"),
        (("--strict",), "--strict is for engines. Add --to tensorrt"),
        (("--to", "bitwse"), "unknown backend 'bitwse'. did you mean 'bitwise'?"),
    ],
)
def test_refusals_are_one_line(here: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lower("-o", "net.fxq", "--quiet", *options) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("fxq-lower: ") and out.err.count("\n") == 1 and message in out.err
    assert not Path("net.fxq").exists()


def test_inspect_says_that_it_runs_bitwise(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lower("-o", "net.fxq", "--quiet")
    assert main(["inspect", "net.fxq"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("net.fxq: model (compiled, runs bitwise), scheme xnor_w1a1, target bitwise, ") and "3.weight" in out
    assert main(["inspect", "net.fxq", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "bitwise"


def test_lists_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("backends", "targets"):
        assert cli.main(["--list", what]) == 0 and any(line.startswith("bitwise ") for line in capsys.readouterr().out.splitlines())
