"""``make demo``: the digits task as a user runs it, the ImageNet task on few photographs, and the exit code of a failed proof."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from fxq.api import CompiledModel

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "demo.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    return module


def row(text: str, net: str) -> list[str]:
    """Cells of a net's row in the last table."""
    line = next(line for line in text.splitlines() if line.startswith(f"│ {net} "))
    return [c.strip() for c in line.strip("│").split("│")]


def test_digits_in_a_pipe(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path), "digits"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "every proof holds" in done.stdout
    assert "fold-bn                   3" in done.stdout and "-%bn1 = batch_norm(%conv1)" in done.stdout
    _, score, *scores, fp32, int8, speed, ops, differ = row(done.stdout, "digits CNN")
    assert score == "accuracy" and len(scores) == 5 and all(float(s) > 95 for s in scores) and scores[2] == scores[3]
    assert float(int8.split()[0]) < float(fp32) / 2 and speed.endswith("x")
    assert ops == "8 of 8, 1 Q + 0 DQ left" and differ.startswith("0 of ") and len(differ) > len("0 of 100,000")
    assert "3 of 3 quantized operations run as planned in the engine" in done.stdout
    onnx.checker.check_model(onnx.load(tmp_path / "digits.onnx"))
    assert (tmp_path / "digits.engine").read_bytes().startswith(b"vtrt")


def test_photographs_with_imagenet_weights(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "CALIBRATE", ("astronaut", "coins"))
    monkeypatch.setattr(demo, "MEASURE", ("chelsea", "coffee"))
    monkeypatch.setattr(demo, "ROUNDS", 2)
    assert demo.main(["--out", str(tmp_path), "photographs"]) == 0
    out = capsys.readouterr().out
    assert row(out, "chelsea")[1:] == ["tiger cat", "tiger cat"] and row(out, "coffee")[1:] == ["espresso", "espresso"]
    _, score, same, *scores, _, int8, _, ops, differ = row(out, "EfficientNet-Lite0")
    assert score == "same top-1 as float" and same == "100.0" and all(float(s) >= 80 for s in scores)
    assert "(3." in int8 and ops == "61 of 61, 1 Q + 0 DQ left" and differ.startswith("0 of ")


def test_a_failed_proof_ends_in_exit_code_1(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with other scales than the reference's: the proof must say so."""
    real = CompiledModel.lower

    def wrong(self: CompiledModel, *args: Any, **options: Any) -> Any:
        artifact = real(self, *args, **options)
        if artifact.backend == "tensorrt":
            return artifact
        model = onnx.load_from_string(artifact.data)
        for t in model.graph.initializer:
            if t.name == "conv2/weight_q":
                t.raw_data = bytes(t.raw_data[:-1]) + b"\x05"
        return dataclasses.replace(artifact, data=model.SerializeToString())

    monkeypatch.setattr(demo, "ROUNDS", 2)
    monkeypatch.setattr(CompiledModel, "lower", wrong)
    assert demo.main(["--out", str(tmp_path), "digits"]) == 1
    got = capsys.readouterr()
    assert "digits CNN: the proof is not ok" in got.err and "FAILED" in got.out


def test_an_unknown_task_is_named(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["cats"])
    assert stop.value.code == 2 and "there is no task 'cats'" in capsys.readouterr().err
