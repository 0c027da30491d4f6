"""``examples/train_cifar10.py``: a stopped run goes on bit for bit, what is refused says why, the test images are read once, the file is what is reported."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fxq import zoo
from fxq.backends.onnxruntime import session
from fxq.errors import FxqError, InputError

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


@pytest.mark.parametrize("text", [QAT, FLOAT], ids=["qat", "float"])
def test_a_run_stopped_after_every_step_equals_an_uninterrupted_one(script: Any, text: str) -> None:
    path = recipe(text)
    assert script.main([path, "--out", "whole"]) == 0
    codes = [script.main([path, "--out", "parts", "--set", "max_seconds=1e-9", "--resume"])]
    while codes[-1] == 3:
        codes.append(script.main([path, "--out", "parts", "--set", "max_seconds=1e-9", "--resume"]))
    steps = 9 if text == QAT else 6
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


def test_a_parameter_that_is_nan_is_named(script: Any) -> None:
    parts = importlib.import_module("training.parts")
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.ones(1, 3, 2, 2)
    with torch.no_grad():
        assert "the loss overflows" in parts.not_finite(net, x)
        net[0].weight.fill_(3e38)
        assert parts.not_finite(net, x) == "the output of layer 0 is the first with NaN or infinity"
        net[2].bias[1] = torch.nan
    assert parts.not_finite(net, x) == "parameter 2.bias holds NaN or infinity"


CHANGES = {
    "epoch=3": "--set epoch=3: unknown key 'epoch'. did you mean 'epochs'",
    "stages.1.epoch=3": "unknown key 'stages.1.epoch'. did you mean 'epochs'",
    "batch=many": "batch is 'many'. It is a whole number",
    "batch=1": "batch is 1. It is at least 2",
    "batch=true": "batch is True. It is a whole number",
    "amp=1": "amp is 1. It is true or false",
    "lr=inf": "stages.0.lr is inf. It is at least 0, and finite",
    "ema=nan": "ema is nan. It is between 0 and 1",
    "net=3": "net is 3. It is a text",
    "net=resnet21": "the zoo has no net 'resnet21'. did you mean 'resnet",
    "scheme=iao_w8a": "unknown scheme 'iao_w8a'. did you mean 'iao_w8a8",
    "scheme=weight_only_w8": "the scheme 'weight_only_w8' is weight-only",
    "optimizer.name=sdg": "optimizer.name is 'sdg'. did you mean 'sgd'",
    "optimizer=sgd": "optimizer is 'sgd'. It is a table of keys",
    "stages=[]": "it has no stages. Add [[stages]]",
    "stages=3": "stages is 3. It is a list",
    "stages.7.lr=1": "--set stages.7.lr: there is no '7'. Keys of a stage are stages.N.key",
    "stages.0=1": "--set stages.0: it leads into no table",
    "stages.0.milestones=[2]": "stages.0.milestones.0 is 2.0. It is between 0 and 1",
    "scheme=float": "stages: phase 'qaft' cannot stand there. A float net has no grids to fix",
    "stages=[{phase='qaft'},{}]": "stages: phase 'qaft' cannot stand there. Put the stages with phase = 'qaft' last",
    "fxq.observr=mse": "fxq.compile has no argument 'observr' for a recipe. did you mean 'observer'",
    "scheme_options.observer=mse": "a scheme has no field 'observer' for a recipe. did you mean 'weight_observer'",
    "scheme_options.weight_observer=3": "scheme_options: weight_observer is 3. It is a str",
    "scheme_options.bias_correction=1": "scheme_options: bias_correction is 1. It is a bool",
    "scheme_options.weight=s8x": "s8x",
    "scheme_options.weight_observer=mss": "names the unknown observer 'mss'. did you mean 'mse'",
    "distill.weight=0.5": "distill.weight: distill needs a trained float net. Set weights",
    "weights=nothing": "weights: there are no weights 'nothing'. Neither ",
    "weights=no/file.pt": "no/file.pt: there is no such file",
    "validation=15": "validation: 15 of 80 images cannot be held out. Use a multiple of 10",
    "validation=80": "80 of 80 images cannot be held out",
    "train_images=100": "train_images: there are 60 training images, not 100",
    "batch=30": "batch: 24 images are less than a batch of 30",
    "batch": "--set: 'batch' is no change. Write --set key=value",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_mistake_is_one_line(script: Any, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([recipe(QAT), "--out", "run", "--set", change]) == 2
    error = capsys.readouterr().err
    assert CHANGES[change] in error and error.startswith("train_cifar10: ") and error.count("\n") == 1
    assert not Path("run/checkpoint.pt").exists()


def test_files_that_are_no_recipe_or_data(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["nowhere.toml"]) == 2 and "nowhere.toml: cannot be read: No such file" in capsys.readouterr().err
    assert script.main([recipe("net = ")]) == 2 and "tiny.toml: is no TOML" in capsys.readouterr().err
    file = tmp_path / "data" / "cifar10" / "data_batch_1.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert script.main([recipe(QAT)]) == 2 and "bytes are no whole number of images" in capsys.readouterr().err
    for f in (tmp_path / "data" / "cifar10").iterdir():
        f.unlink()
    assert script.main([recipe(QAT)]) == 2 and "cifar10: there is no CIFAR-10 here. Set FXQ_DATA" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(script: Any, path: Path) -> None:
    made = importlib.import_module("training.recipe").load(path)
    assert made.net in zoo.NETS and (made.scheme in path.stem or made.scheme == "float")
    if made.weights.startswith("nin"):
        assert (path.parent / f"{made.weights}.toml").exists()


def test_the_page_of_recipes_is_the_code(script: Any) -> None:
    """docs/recipes.md: every key with its default and its line, and the commands it shows are of recipes that exist."""
    made = importlib.import_module("training.recipe")
    want = []
    for prefix, kind in (("", made.Recipe), ("optimizer.", made.Optimizer), ("distill.", made.Distill), ("stages.N.", made.Stage)):
        for f in dataclasses.fields(kind):
            if f.metadata["what"]:
                default = f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore[misc]
                want.append(f"| `{prefix}{f.name}` | `{json.dumps(default)}` | {f.metadata['what']} |")
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == want and len(want) > 35
    commands = re.findall(r"examples/train_cifar10.py (\S+) ?(.*)", text.split("```")[1])
    assert len(commands) == 4
    for path, options in commands:
        changes = re.findall(r"--set (\S+)", options)
        assert (made.load(ROOT / path, changes) != made.load(ROOT / path)) == bool(changes)


def test_the_split_is_balanced_and_the_same_for_all(script: Any) -> None:
    data = importlib.import_module("training.data")
    _, y = data.load("train")
    train, held = data.split(y, 30)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(80))
    assert torch.bincount(y[held]).tolist() == [3] * 10 and held.tolist() != list(range(30))
    assert torch.equal(data.split(y, 30)[1], held) and data.split(y, 30, 7)[0].tolist() == train[:7].tolist()


def test_crops_and_mirrors(script: Any) -> None:
    """Each image is one of the 81 crops of the padded one, mirrored or not; draws depend on seed, epoch and step; two processes share one batch."""
    data = importlib.import_module("training.data")
    x, y = data.load("train")
    plain = data.Normalise(True, False)
    batches = data.Batches(x, y, 16, 5, True, plain)
    order = batches.order(2)
    assert order.shape == (5, 16) and sorted(order.flatten().tolist()) == list(range(80)) and not torch.equal(order, batches.order(3))
    got, labels = batches.take(order[1], 2, 1)
    assert torch.equal(labels, y[order[1]]) and got.shape == (16, 3, 32, 32) and got.is_contiguous()
    seen = set()
    for image, i in zip(got, order[1].tolist(), strict=True):
        padded = torch.nn.functional.pad(x[i].permute(2, 0, 1).float(), (4, 4, 4, 4))
        crops = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        for mirrored, option in enumerate((image, image.flip(2))):
            seen |= {(*map(int, at), mirrored) for at in (crops == option).flatten(2).all(2).nonzero()}
    assert len(seen) >= 12 and {m for *_, m in seen} == {0, 1}
    assert not torch.equal(batches.take(order[1], 2, 2)[0], got)
    halves = [data.Batches(x, y, 16, 5, True, plain, rank, 2).take(order[1], 2, 1)[0] for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), got)
    last = data.Normalise(False, True)(x[:2])
    assert last.is_contiguous(memory_format=torch.channels_last)
    mean, std = (np.reshape(v, (3, 1, 1)) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    want = (x[:2].permute(0, 3, 1, 2).numpy() / 255 - mean) / std
    assert torch.allclose(last, torch.from_numpy(want.astype(np.float32)), atol=1e-6)


def test_schemes_may_be_changed(script: Any) -> None:
    made, parts = importlib.import_module("training.recipe"), importlib.import_module("training.parts")
    changed = parts.scheme(made.build({"scheme": "iao_w8a8", "stages": [{}], "scheme_options": {"weight": "s4n/pc0", "weight_observer": "mse"}}, "x"))
    assert (str(changed.weight), changed.weight_observer, changed.name) == ("s4n/pc0", "mse", "iao_w8a8")
    model = parts.trainable(made.build({"stages": [{}], "fxq": {"skip": ["stem*"]}}, "x"), zoo.build("tiny_resnet8"), torch.randn(8, 3, 32, 32))
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    assert kinds["root.stem.conv"] == "FloatLayer" and kinds["root.fc"] == "TrainedLayer"


def test_learning_rates(script: Any) -> None:
    made, parts = importlib.import_module("training.recipe"), importlib.import_module("training.parts")
    cosine = made.Stage(epochs=2, lr=1.0, final=0.2, warmup=0.5)
    assert [round(parts.rate(cosine, s, 4), 4) for s in range(8)] == [0.5, 1.0, *(round(0.2 + 0.4 * (1 + np.cos(np.pi * k / 6)), 4) for k in range(6))]
    step = made.Stage(epochs=2, lr=1.0, schedule="step")
    assert [round(parts.rate(step, s, 4), 4) for s in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert {parts.rate(made.Stage(lr=0.3, schedule="constant"), s, 4) for s in range(4)} == {0.3}


def test_only_weights_decay(script: Any) -> None:
    made, parts = importlib.import_module("training.recipe"), importlib.import_module("training.parts")
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4))
    decays, rest = parts.optimizer(made.Optimizer(weight_decay=0.5), made.Stage(), net).param_groups
    assert [id(p) for p in decays["params"]] == [id(net[0].weight)] and decays["weight_decay"] == 0.5
    assert len(rest["params"]) == 4 and rest["weight_decay"] == 0
    assert parts.optimizer(made.Optimizer(weight_decay=0.5), made.Stage(weight_decay=0.0), net).param_groups[0]["weight_decay"] == 0
    assert [type(parts.optimizer(made.Optimizer(name=n), made.Stage(), net)).__name__ for n in ("sgd", "adam", "adamw")] == ["SGD", "Adam", "AdamW"]


def test_averages_and_losses(script: Any) -> None:
    made, parts = importlib.import_module("training.recipe"), importlib.import_module("training.parts")
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    ema = parts.Ema(net, 0.5)
    for value in (2.0, 4.0):
        with torch.no_grad():
            net[0].weight.fill_(value)
            net[1].running_mean.fill_(value)  # type: ignore[operator, union-attr]
        ema.update(net)
    first, second = 1 / 10, 2 / 11
    assert float(ema.into(net)[0].weight.detach()) == pytest.approx(second * (first * 1 + (1 - first) * 2) + (1 - second) * 4)
    assert float(net[1].running_mean) == pytest.approx(second * (1 - first) * 2 + (1 - second) * 4)  # type: ignore[arg-type]
    logits, soft, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0])
    p, q = (torch.softmax(v / 4, 1) for v in (soft, logits))
    want = 0.7 * np.log(1 + np.exp(-2)) + 0.3 * 16 * float((p * (p.log() - q.log())).sum())
    assert float(parts.loss(made.Recipe(distill=made.Distill(weight=0.3)), logits, y, soft)) == pytest.approx(want, rel=1e-5)
    assert float(parts.loss(made.Recipe(), logits, y, None)) == pytest.approx(np.log(1 + np.exp(-2)), rel=1e-5)


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
