"""``examples/train_cifar10.py``: a stopped run goes on bit for bit, what is refused says why, the test images are read once, the file is what is reported."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import fxq
from fxq import zoo
from fxq.backends.onnxruntime import session
from fxq.errors import FxqError, InputError
from fxq.shared import SharedWeight
from tests.train_example import DEEPCOMP, EXAMPLES, FLOAT, QAT, recipe, same, script, state

__all__ = ["script"]


@pytest.mark.parametrize("text", [QAT, FLOAT, DEEPCOMP], ids=["qat", "float", "deepcomp"])
def test_a_run_stopped_after_every_step_equals_an_uninterrupted_one(script: Any, text: str) -> None:
    path = recipe(text)
    assert script.main([path, "--out", "whole"]) == 0
    codes = [script.main([path, "--out", "parts", "--set", "max_seconds=1e-9", "--resume"])]
    while codes[-1] == 3:
        codes.append(script.main([path, "--out", "parts", "--set", "max_seconds=1e-9", "--resume"]))
    steps = 6 if text == FLOAT else 9
    assert codes == [3] * steps + [0]
    assert same(state("whole"), state("parts"))
    assert not same(state("whole")["state_dict"], {**state("whole")["state_dict"], "x": 1})
    assert Path("whole/tiny.onnx").read_bytes() == Path("parts/tiny.onnx").read_bytes()
    (a, b) = (json.loads(Path(f, "result.json").read_text()) for f in ("whole", "parts"))
    assert len(a["history"]) == a["epochs"] == steps // 3 and same(a["history"], b["history"]) and a["accuracy"] == b["accuracy"]


def test_the_result_is_that_of_the_file(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([recipe(QAT), "--out", "run", "--set", "seed=3", "--set", "max_seconds=900", "--set", "label_smoothing=0.1"]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^stage \d/2 \w+, epoch \d/\d: loss .* images/s, validation .* %, \d+ s$", text, re.M)) == 3 and "\x1b" not in text
    body = json.loads(Path("run/result.json").read_text())
    data = importlib.import_module("training.data")
    x, y = data.load("test")
    opened = session("run/tiny.onnx")
    logits = opened.run(None, {opened.get_inputs()[0].name: data.Normalise(False, False)(x).numpy()})[0]
    assert body["accuracy"]["onnxruntime"]["test"] == 100 * float((logits.argmax(1) == y.numpy()).mean())
    assert set(body["accuracy"]) == {"simulator", "onnxruntime"} and body["test_images"] == 30
    assert body["proof"]["ok"] is True and body["proof"]["images"] == 24 and "proven" in body["proof"]["text"]
    assert body["file_bytes"] == Path("run/tiny.onnx").stat().st_size > body["weight_bytes"]
    stored = onnx.load("run/tiny.onnx").graph.initializer
    assert body["weight_bytes"] == sum(onnx.numpy_helper.to_array(t).nbytes for t in stored) > 78_000
    assert body["seed"] == body["recipe"]["seed"] == 3 and body["epochs"] == 3 and body["processes"] == 1
    assert body["command"] == "python examples/train_cifar10.py examples/recipes/tiny.toml --set seed=3 --set label_smoothing=0.1"
    assert str(Path.cwd()) not in json.dumps(body)
    assert script.main([recipe(QAT), "--out", "run", "--set", "seed=3", "--set", "label_smoothing=0.1", "--resume"]) == 0
    assert "run is finished" in capsys.readouterr().out


def test_a_compressed_run_writes_an_archive(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([recipe(DEEPCOMP), "--out", "run"]) == 0
    body = json.loads(Path("run/result.json").read_text())
    assert body["archive_bytes"] == Path("run/tiny.fxq").stat().st_size < body["file_bytes"] < body["float_bytes"]
    assert body["accuracy"]["archive"] == body["accuracy"]["simulator"]
    layers = [m for m in fxq.load("run/tiny.fxq").modules() if isinstance(m, SharedWeight)]
    zeros, total = sum(int((m.codes == 0).sum()) for m in layers), sum(m.codes.numel() for m in layers)
    assert len(layers) == 10 and abs(zeros - 0.6 * total) <= len(layers) and all(len(m.book) <= 8 for m in layers)
    assert [h["phase"] for h in body["history"]] == ["train", "train", "share"]


def test_the_test_images_are_read_once_at_the_end(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = importlib.import_module("training.data"), importlib.import_module("training.run")
    log: list[str] = []
    load, end = data.load, run.Run._end_of_epoch
    monkeypatch.setattr(data, "load", lambda split: (log.append(split), load(split))[1])
    monkeypatch.setattr(run.Run, "_end_of_epoch", lambda self, name: (log.append("epoch"), end(self, name))[1])
    assert script.main([recipe(FLOAT), "--out", "run"]) == 0
    assert log == ["train", "epoch", "epoch", "test"]


def test_a_later_run_starts_from_an_earlier_one_and_learns_from_it(script: Any) -> None:
    """The weights of a float run by name, its checkpoint by path; the first loss is that of the float net."""
    assert script.main([recipe(FLOAT, "first"), "--out", "out/first"]) == 0
    net = zoo.build("tiny_resnet8", "out/first/first.safetensors")
    parts, run, show = (importlib.import_module(f"training.{m}") for m in ("parts", "run", "show"))
    made = importlib.import_module("training.recipe")
    for weights, want in (("first", net.state_dict()), ("out/first/checkpoint.pt", state("out/first")["state_dict"])):
        loaded = parts.float_net(made.build({"net": "tiny_resnet8", "weights": weights, "stages": [{}]}, "x"), Path("out/second"))
        assert same(loaded.state_dict(), want)
    text = "weights = 'first'\n" + QAT.replace("[[stages]]", "[distill]\nweight = 0.5\n[[stages]]", 1)
    second = run.Run(made.load(Path(recipe(text, "second"))), Path("out/second"), show.Show())
    x = second.normalise(second.images[:8])
    with torch.no_grad():
        assert torch.allclose(second.teacher(x), net(x), atol=1e-3)
        assert float((second.model.eval()(x) - net(x)).norm() / net(x).norm()) < 0.1
    assert script.main(["second.toml"]) == 0
    assert set(json.loads(Path("out/second/result.json").read_text())["accuracy"]) == {"float", "simulator", "onnxruntime"}


def test_a_signal_stops_with_a_checkpoint(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = importlib.import_module("training.run")
    step = run.Run._step

    def interrupted(self: Any, name: str, rows: Any, steps: int) -> None:
        step(self, name, rows, steps)
        if self.at.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run.Run, "_step", interrupted)
    assert script.main([recipe(FLOAT), "--out", "run"]) == 3
    assert "stopped (SIGTERM) after epoch 1, step 1: the same command with --resume goes on" in capsys.readouterr().out
    assert state("run")["place"]["step"] == 1 and signal.getsignal(signal.SIGTERM) is before and not Path("run/result.json").exists()


@pytest.mark.parametrize(
    ("before", "again", "text"),
    [
        ([], [], "run: the folder holds a run. Add --resume to go on, or --force"),
        ([], ["--resume", "--set", "lr=0.02"], "checkpoint.pt: it is of another recipe: stages.0.lr is 0.02, was 0.01. Use that recipe"),
        ([], ["--resume", "--set", "scheme=iao_w4a8"], "it is of another recipe: scheme is 'iao_w4a8', was 'iao_w8a8'"),
        (["world"], ["--resume"], "it is of a run of 2 processes, this one has 1. Start 2 processes"),
        (["damage"], ["--resume"], "checkpoint.pt: cannot be read: .* Begin anew with --force"),
        (["finish"], ["--resume", "--set", "seed=1"], "run: its result is of another recipe: seed is 1, was 0. Begin anew with --force"),
    ],
)  # fmt: skip
def test_a_folder_of_another_run_is_refused(script: Any, before: list[str], again: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop = [] if before == ["finish"] else ["--set", "max_seconds=1e-9"]
    assert script.main([recipe(QAT), "--out", "run", *stop]) == (0 if before == ["finish"] else 3)
    file = Path("run/checkpoint.pt")
    if before == ["world"]:
        torch.save({**state("run"), "world": 2}, file)
    elif before == ["damage"]:
        file.write_bytes(file.read_bytes()[:1000])
    kept = file.read_bytes()
    assert script.main(["tiny.toml", "--out", "run", *again]) == 2
    error = capsys.readouterr().err
    assert re.search(text, error) and error.count("\n") == 1
    assert file.read_bytes() == kept
    assert script.main(["tiny.toml", "--out", "run", "--force", "--set", "max_seconds=1e-9"]) == 3


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (QAT, r"stage 1/2 train, epoch 1/2, step 2: [\w.]+: the weight is NaN or infinite. Lower lr"),
        (FLOAT.replace("adam", "sgd"), r"stage 1/1 train, epoch 1/2, step \d: the loss is (nan|inf): the output of layer [\w.]+ is the first with NaN"),
    ],
    ids=["qat", "float"],
)
def test_a_loss_of_nan_names_the_layer_and_the_step(script: Any, text: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([recipe(text), "--out", "run", "--set", "lr=1e30", "--set", "checkpoint_steps=1"]) == 2
    assert re.search(error, capsys.readouterr().err)
    assert state("run")["place"]["step"] >= 1


def test_what_torch_compile_does_not_take_is_one_line(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The compiler itself takes minutes here: its place is taken by one that hands the module back, and one that fails in the first call."""
    from torch._dynamo.exc import TorchDynamoException

    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: (asked.append(options), module)[1])
    assert script.main([recipe(FLOAT), "--out", "run", "--set", "compile=true"]) == 0 and asked == [{"dynamic": False}]

    def fails(*args: Any) -> None:
        raise TorchDynamoException("\nno such thing\nand more")

    monkeypatch.setattr(torch, "compile", lambda module, **options: fails)
    assert script.main([recipe(FLOAT), "--out", "run", "--set", "compile=true", "--force"]) == 2
    error = "epoch 1/2: torch.compile does not take this training graph: no such thing. Set compile = false\n"
    assert capsys.readouterr().err.endswith(error)


@pytest.mark.parametrize(
    ("text", "changes"),
    [(QAT, ["channels_last=true", "amp=true"]), (FLOAT, ["optimizer.clip_norm=1e-3", "stages.0.schedule=step", "augment=false", "bn_momentum=0.5"])],
    ids=["qat", "float"],
)
def test_each_option_changes_the_run(script: Any, text: str, changes: list[str]) -> None:
    """The last bits or the steps differ, the run ends with a proven file."""
    assert script.main([recipe(text), "--out", "plain"]) == 0
    for change in changes:
        assert script.main(["tiny.toml", "--out", "other", "--force", "--set", change]) == 0
        assert not same(state("other")["state_dict"], state("plain")["state_dict"]), change
        assert json.loads(Path("other/result.json").read_text())["proof"]["ok"] is True


def test_the_best_epoch_is_kept(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = importlib.import_module("training.run")
    scores = iter([50.0, 80.0, 60.0])
    monkeypatch.setattr(run, "percent", lambda found, y: next(scores))
    kept: list[Any] = []
    end = run.Run._end_of_epoch
    monkeypatch.setattr(run.Run, "_end_of_epoch", lambda self, name: (kept.append({k: v.clone() for k, v in self.model.state_dict().items()}), end(self, name)))
    made = importlib.import_module("training.recipe").load(Path(recipe(FLOAT)), ["epochs=3", "lr=0.1"])
    Path("run").mkdir()
    one = run.Run(made, Path("run"), importlib.import_module("training.show").Show(quiet=True))
    assert one.train()
    again = run.Run(made, Path("run"), importlib.import_module("training.show").Show(quiet=True))
    assert again.resume() and again.train()
    for model in (one.model, again.model):
        assert [same(model.state_dict(), k) for k in kept] == [False, True, False]


def test_two_processes(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """``torchrun`` with gloo; the run of two processes is refused by one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLES / "train_cifar10.py")]
    path = recipe(QAT)
    done = subprocess.run([*command, path, "--out", "run", "--set", "stages=[{}]"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1: loss") == 1 and "proof on 24 images: ok" in done.stdout
    assert json.loads(Path("run/result.json").read_text())["processes"] == 2
    Path("run/result.json").unlink()
    assert script.main([path, "--out", "run", "--set", "stages=[{}]", "--resume"]) == 2
    assert "it is of a run of 2 processes, this one has 1" in capsys.readouterr().err


def test_an_unknown_format_is_refused(script: Any) -> None:
    checkpoint, made = importlib.import_module("training.checkpoint"), importlib.import_module("training.recipe")
    recipe_ = made.build({"stages": [{}]}, "x")
    checkpoint.save(Path("."), recipe_, 1, {"n": 1})
    assert checkpoint.load(Path("."), recipe_, 1)["n"] == 1 and not Path("checkpoint.pt.part").exists()
    torch.save({**state("."), "format": 9}, "checkpoint.pt")
    with pytest.raises(InputError, match="it has format 9, this script writes 1"):
        checkpoint.load(Path("."), recipe_, 1)
    assert issubclass(InputError, FxqError)
