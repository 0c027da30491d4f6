"""``fxq times``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fxq
from fxq import cli, command, layer_runs
from fxq.layer_table import LayerTimes
from tests.lowbit_nets import X, net

SOURCE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_runs, "BUDGET", 0.005)
    monkeypatch.setattr(layer_runs, "_CACHE", {})


def test_a_float_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(SOURCE)
    source = f"{tmp_path / 'model.py'}:build"
    assert command.main(["times", source, "--input", "2,3,4,4", "--activations", "ternary"]) == 0
    out = capsys.readouterr().out
    assert "3->64 3x3 @4x4 batch 2" in out and "binary x ternary, trits to" in out and "fastest" in out
    assert command.main(["times", source, "--input", "2,3,4,4", "--json"]) == 0
    assert [t.path for t in LayerTimes.from_json(capsys.readouterr().out).layers] == ["0", "2", "5"]


def test_a_net_on_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.fxq"
    fxq.compile(net(), "xnor_w1a1", calibration=X, progress=False).lower("bitwise").save(path)
    assert command.main(["times", str(path), "--input", "1,3,12,12", "--json"]) == 0
    found = {t["path"]: t["runs"] for t in json.loads(capsys.readouterr().out)["layers"]}
    assert found == {"a": "float32", "b": "bits", "c": "bits", "up": "float32", "d": "bits", "fc": "float32"}


def test_a_saved_model_has_its_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.fxq"
    fxq.save(fxq.compile(net(), "xnor_w1a1", calibration=X, progress=False), path)
    assert command.main(["times", str(path), "--json"]) == 0
    assert [t["path"] for t in json.loads(capsys.readouterr().out)["layers"]] == ["a", "b", "c", "up", "d", "fc"]
    assert command.main(["times", str(path), "--input", "1,3,12,12"]) == 2
    assert "a compiled model has its shapes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["nothing.fxq", "--input", "1,3"], "nothing.fxq: there is no such file"),
        (["torchvision:nothing"], "nothing"),
        (["MODEL:build"], "the shapes are not known. Give --input 1,3,224,224"),
        (["MODEL:build", "--input", "1,3,4,4", "--threads", "0"], "0 threads run nothing"),
        (["MODEL:build", "--weights", "u8"], "invalid choice"),
    ],
)
def test_mistakes(argv: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(SOURCE)
    argv = [a.replace("MODEL", str(tmp_path / "model.py")) for a in argv]
    assert command.main(["times", *argv]) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1


def test_fxq_lower_chooses_by_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(SOURCE)
    source, times, out = f"{tmp_path / 'model.py'}:build", tmp_path / "times.json", tmp_path / "report.json"
    assert command.main(["times", source, "--input", "1,3,4,4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for layer in found["layers"]:  # float32 is slow, bits are fast
        for way, us in (("float32", 9.0), ("int8", 5.0), ("bits", 1.0)):
            layer["times"][way]["us"] = us
    times.write_text(json.dumps(found))
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((4, 3, 4, 4)).astype(np.float32))
    argv = [source, "--calibration", str(tmp_path / "data.npy"), "--times", str(times), "--verify", "--report-json", str(out), "--force"]
    assert cli.main([*argv, "--scheme", "auto-lowbit", "--int8", "5", "-o", str(tmp_path / "m.onnx")]) == 0
    report = json.loads(out.read_text())
    notes = {s["node"]: s["why"] for h in report["history"] if h["name"] == "choose-layers" for s in h["skips"]}
    assert notes == {"0": "int8: float32 9 us, int8 5 us", "2": "binary: bits 1 us, int8 5 us"} and len(report["layer_times"]["layers"]) == 2
    assert "float32/bits" in capsys.readouterr().out
    for more, text in (
        (["--scheme", "xnor_w1a1"], "times= is what 'auto-lowbit' chooses by"), (["--scheme", "auto-lowbit", "--times", str(out)], "these are no layer times"),
        (["--scheme", "auto-lowbit", "--times", str(tmp_path / "no.json")], "no file of times can be read there"),
        (["--scheme", "int8", "--int8", "0", "--times", str(times)], "int8= keeps layers of a low-bit scheme in 8 bits"),
    ):  # fmt: skip
        assert cli.main([*argv, *more]) == 2
        assert text in capsys.readouterr().err


def test_the_state_of_torch_stays() -> None:
    model = torch.nn.Linear(8, 8)
    before = torch.random.get_rng_state(), torch.get_num_threads()
    fxq.layer_times(model, torch.zeros(1, 8), threads=2)
    assert torch.equal(torch.random.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]
