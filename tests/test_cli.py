"""The command line: every kind of source, every mistake in one line with exit code 2, no half-written file."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fxq
from fxq.cli import main
from fxq.shared import SharedWeight

NET = """
from torch import nn


def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def wrong():
    return 1
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    np.save("cal.npy", rng.normal(size=(12, 3, 8, 8)).astype(np.float32))
    np.savez("cal.npz", input=rng.normal(size=(12, 3, 8, 8)).astype(np.float32))
    Path("images").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(f"images/{i}.png")
    return tmp_path


@pytest.mark.parametrize("data", [["cal.npy"], ["cal.npz"], ["images", "--input", "1,3,8,8"]])
def test_compiles_verifies_and_saves(here: Path, data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["net.py:build", "--calibration", *data, "--verify", "-o", "m.onnx", "--report-json", "r.json"])
    out = capsys.readouterr()
    assert code == 0, out.err
    assert "0 of " in out.out and "fold-bn" in out.out and "fxq: calibrate" in out.err
    report = json.loads(Path("r.json").read_text())
    assert report["verify"]["ok"] and report["scheme"] == "iao_w8a8" and Path("m.onnx").stat().st_size > 500


def test_prints_graphs_and_lists(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["net.py:build", "--calibration", "cal.npy", "--print-diff", "fold-bn", "--print-after", "convert"]) == 0
    out = capsys.readouterr().out
    assert "-%_1 = batch_norm" in out and "fake_quantize" in out
    for what, word in (("schemes", "iao_w8a8"), ("passes", "fold-bn"), ("backends", "onnx-qdq"), ("targets", "onnxruntime")):
        assert main(["--list", what]) == 0 and word in capsys.readouterr().out


def test_weights_pt2_and_torchvision(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    save_file(net.state_dict(), "w.safetensors")
    torch.save(net.state_dict(), "w.pt")
    for w in ("w.safetensors", "w.pt"):
        assert main(["net.py:build", "--weights", w, "--calibration", "cal.npy", "--quiet"]) == 0
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),)), "net.pt2")
    assert main(["net.pt2", "--input", "2,3,8,8", "--scheme", "float", "--to", "onnx", "--quiet"]) == 0, capsys.readouterr().err
    assert main(["torchvision:squeezenet1_1", "--input", "1,3,64,64", "--scheme", "weight_only_w8", "--quiet", "-o", "s.onnx"]) == 0
    assert capsys.readouterr().out == "" and Path("s.onnx").exists()


MISTAKES = [
    ([], "no model is given"),
    (["net.py"], "is not a model source"),
    (["torchvision:resnet1"], "did you mean 'resnet18'"),
    (["net.py:buil"], "did you mean 'build'"),
    (["net.py:wrong"], "not a torch.nn.Module"),
    (["none.py:build"], "there is no such file"),
    (["no.such.module:build"], "cannot import"),
    (["net.py:build"], "needs calibration data"),
    (["net.py:build", "--calibration", "nowhere"], "no such calibration"),
    (["net.py:build", "--calibration", "net.py"], "cannot be read"),
    (["net.py:build", "--calibration", "cal.npy", "--scheme", "iao_w8a"], "did you mean 'iao_w8a8'"),
    (["net.py:build", "--calibration", "cal.npy", "--target", "onnxrutime"], "did you mean 'onnxruntime'"),
    (["net.py:build", "--calibration", "cal.npy", "--to", "onnx-qd"], "did you mean 'onnx-qdq'"),
    (["net.py:build", "--calibration", "cal.npy", "--observer", "mimax"], "did you mean 'minmax'"),
    (["net.py:build", "--calibration", "cal.npy", "--print-after", "fold"], "did you mean 'fold-bn'"),
    (["net.py:build", "--input", "1,x"], "is not a shape"),
    (["net.py:build", "--weights", "net.py", "--calibration", "cal.npy"], "cannot be read"),
    (["net.py:build", "--calibration", "cal.npy", "-o", "no/m.onnx"], "its folder does not exist"),
    (["net.py:build", "--calibration", "cal.npy", "-o", "net.py"], "the file exists"),
    (["net.py:build", "--frobnicate"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("argv", "text"), MISTAKES)
def test_mistakes_give_one_line_and_exit_code_2(here: Path, argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in here.iterdir())
    assert main(argv) == 2
    err = capsys.readouterr().err.strip().splitlines()
    message = [line for line in err if not line.startswith("fxq: ")]
    assert len(message) == 1 and text in message[0], err
    assert sorted(p.name for p in here.iterdir() if p.name != "__pycache__") == before


def test_weights_of_another_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), "w.pt")
    assert main(["net.py:build", "--weights", "w.pt", "--calibration", "cal.npy"]) == 2
    assert "belong to another model" in capsys.readouterr().err


PRUNED = """
from torch import nn


def build():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
"""


def test_prunes_saves_and_reports(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(PRUNED)
    args = ["net.py:build", "--input", "1,3,8,8", "--scheme", "float", "--to", "onnx", "--prune", "0.5", "--multiple-of", "4", "--prune-by", "l2"]
    args += ["--prune-scope", "layer"]  # whatever the random weights are
    assert main([*args, "-o", "m.onnx", "--save-model", "m.fxq", "--report-json", "r.json"]) == 0
    out = capsys.readouterr().out
    assert "prune-channels" in out and "left whole" in out and "8 of 16" in out
    groups = json.loads(Path("r.json").read_text())["pruning"]["groups"]
    assert [g["after"] for g in groups] == [8, 8]
    model = fxq.load("m.fxq")
    (session, x) = ort.InferenceSession("m.onnx", providers=["CPUExecutionProvider"]), torch.randn(2, 3, 8, 8)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)


def test_prunes_to_a_budget_and_quantizes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(PRUNED)
    options = ["--prune-macs", "0.5", "--multiple-of", "1", "--prune-by", "taylor", "--prune-scope", "layer", "--prune-at-least", "0.25"]
    assert main(["net.py:build", "--calibration", "cal.npy", *options, "--print-diff", "prune-channels", "--verify", "-o", "m.onnx"]) == 0
    out = capsys.readouterr().out
    assert "-%_0 = conv" in out and "+%_0 = conv" in out and "0 of " in out


def test_sparse_shared_weights_in_an_archive(here: Path) -> None:
    Path("net.py").write_text(PRUNED)
    options = ["--sparsity", "0.5", "--sparsity-scope", "layer", "--share-bits", "3", "--share-linear-bits", "1", "--share-init", "density"]
    assert main(["net.py:build", "--input", "1,3,8,8", "--scheme", "float", "--to", "archive", *options, "-o", "m.fxq"]) == 0
    m = fxq.load("m.fxq")
    assert m.scheme.share == fxq.Share(3, 1, init="density")
    assert all(d == pytest.approx(0.5, abs=0.1) for d in m.densities.values())
    first, second, last = (len(x.book) for x in m.modules() if isinstance(x, SharedWeight))
    assert 2 < first <= 8 and 2 < second <= 8 and 1 <= last <= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--multiple-of", "8"], "--multiple-of is for pruning. Add --prune"),
        (["--prune-keep", "0"], "--prune-keep is for pruning"),
        (["--prune", "1.5"], "would empty every layer"),
        (["--prune", "0.5", "--prune-macs", "0.5"], "both say how much"),
        (["--prune", "0.5", "--prune-by", "l22"], "did you mean 'l2'"),
        (["--prune", "0.5", "--multiple-of", "64"], "a multiple of 64 is larger than every layer"),
        (["--prune", "0.5", "--multiple-of", "1", "--prune-by", "bn-gamma", "--prune-keep", "0"], "finds no batch norm"),
        (["--sparsity-scope", "layer"], "--sparsity-scope is for single weights. Add --sparsity"),
        (["--sparsity", "1"], "sparsity 1.0 is not in [0, 1)"),
        (["--sparsity", "0.5", "--prune-scope", "layer"], "scope= is of channels"),
        (["--sparsity", "0.5", "--prune-keep", "nosuch"], "'nosuch' of keep= names no layer"),
        (["--share-rate", "0.1"], "--share-rate is for shared weights. Add --share-bits"),
        (["--share-bits", "13"], "bits=13 is no width of a codebook"),
        (["--share-bits", "3", "--share-init", "density", "--share-rate", "0.1"], "only optimal codebooks weigh the entropy"),
    ],
)
def test_wrong_pruning_is_one_line(here: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(PRUNED)
    assert main(["net.py:build", "--input", "1,3,8,8", "--scheme", "float", "--to", "onnx", *options, "-o", "m.onnx"]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert says in err[-1] and not Path("m.onnx").exists()
