"""``fxq doctor`` from the command line: sources, default inputs, exit codes, one line for a mistake."""

import json
import sys
from pathlib import Path

import pytest
import torch

import fxq
from fxq import zoo
from fxq.cli_doctor import default_inputs
from fxq.command import main

MODEL = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()

def half():
    return net().half()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MODEL)
    Path("no.onnx").write_bytes(b"\\x08nonsense")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("", 0, "machine\n  system"),
        ("mine.py:net --input 2,3,16,16", 0, "mine.py:net\n  nothing stops its compilation"),
        ("mine.py:half --input 2,3,16,16", 1, "stop [dtype]"),
        ("mine.py:net --input 2,3,16,16 --target sm75", 1, "sm75, int8: cannot be compiled"),
        ("mine.py:net --input 2,3,16,16 --target all", 0, "sm75, int8: cannot be compiled"),
        ("mine.py:net --input 2,3,16,16 --target sm86 --target onnxruntime --scheme float", 0, "the scheme is float"),
        ("torchvision:squeezenet1_1", 0, "onnxruntime, iao_w8a8: all of 349.2 M MACs in integers"),
    ],
)
def test_exit_codes(here: Path, arguments: str, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments.split()]) == code
    out = capsys.readouterr()
    assert words in out.out and "software\n  torch " in out.out and not out.err


def test_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "mine.py:net", "--input", "2,3,16,16", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["model"] == "mine.py:net" and [o["runs"] for o in plain["forecasts"][0]["ops"]] == ["int", "int", "int"]


def test_weights_and_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = zoo.build("tiny_resnet8")
    x = torch.randn(2, 3, 32, 32)
    torch.export.save(torch.export.export(net, (x,)), "net.pt2")
    fxq.compile(net, "int8", calibration=[x], progress=False).lower().save("net.onnx")
    torch.save({"0.weight": torch.full((16, 3, 3, 3), float("nan"))}, "nan.pt")
    assert main(["doctor", "net.pt2"]) == 0 and "MACs in integers" in capsys.readouterr().out
    assert main(["doctor", "net.onnx"]) == 0 and "lint for onnxruntime" in capsys.readouterr().out
    assert main(["doctor", "net.onnx", "--target", "tensorrt"]) == 1 and "lint for tensorrt" in capsys.readouterr().out
    assert main(["doctor", "mine.py:net", "--input", "2,3,16,16", "--weights", "nan.pt"]) == 2 and "nan.pt: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mine.py:net", "fxq: the shapes are not known. Pass example= with one batch of inputs (on the command line --input 1,3,224,224)"),
        ("mine.py:nett", "did you mean 'net'?"),
        ("mine.py:net --input 2,5,16,16", "does not run on an input of float32 [2, 5, 16, 16]"),
        ("mine.py:net --input 2,3,16,16 --target onnx", "unknown target 'onnx'. did you mean 'onnxruntime'?"),
        ("mine.py:net --input 2,3,16,16 --scheme int9", "unknown scheme 'int9'. "),
        ("torchvision:resnet19", "did you mean 'resnet1"),
        ("no.onnx", "no.onnx: is not a whole ONNX file"),
        ("missing.onnx", "missing.onnx: cannot be read"),
        ("no.onnx --input 1,3,8,8", "no.onnx: an ONNX file holds its own weights and shapes. Leave --weights and --input out"),
        ("--input 1,3,8,8", "no model is given. For example torchvision:resnet18"),
        ("mine.py:net --nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes(here: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments.split()]) == 2
    out = capsys.readouterr()
    assert message in out.err and out.err.count("\n") == 1 and not out.out


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("torchvision:resnet18", (2, 3, 224, 224)), ("torchvision:inception_v3", (2, 3, 299, 299)), ("torchvision:r3d_18", (2, 3, 8, 112, 112)),
        ("torchvision:vit_b_16", (2, 3, 224, 224)), ("timm:resnet18", (2, 3, 224, 224)),
    ],
)  # fmt: skip
def test_default_inputs(source: str, sizes: tuple[int, ...]) -> None:
    module = "torchvision.models." + ("video.resnet" if "r3d" in source else "x")
    model = type("Net", (), {"__module__": module, "pretrained_cfg": {"input_size": (3, 224, 224)}})()
    made = default_inputs(source, model)
    assert made is not None and tuple(made[0].shape) == sizes


def test_default_inputs_of_detectors() -> None:
    detector = type("Net", (), {"__module__": "torchvision.models.detection.retinanet"})()
    made = default_inputs("torchvision:retinanet_resnet50_fpn", detector)
    assert made is not None and [tuple(x.shape) for x in made[0]] == [(3, 320, 320)] * 2
    assert default_inputs("mine:net", detector) is None


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_is_one_line(package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["doctor", f"{package}:resnet18"]) == 2
    assert capsys.readouterr().err == f"fxq: {package} is not installed. pip install {package}\n"
