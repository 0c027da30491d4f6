"""Recipes of ``examples/train_cifar10.py``: what they may say, that those of the repository are valid, and the parts that they ask for."""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxq import zoo
from tests.train_example import QAT, RECIPES, ROOT, recipe, script

__all__ = ["script"]

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
    "stages=[{phase='share'},{}]": "stages: phase 'share' cannot stand there. Put the stages with phase = 'share' behind those that train",
    "stages=[{phase='share'}]": "shares no weights. Compile with scheme='deepcomp_w5', or with share=",
    "stages=[{},{phase='qaft', sparsity=0.5}]": "stages: sparsity grows in stages with phase = 'train' only. What is cut stays cut",
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
