"""``benchmarks/bench_pruning.py`` and ``bench_prune_training.py``: their own functions, without Torch-Pruning."""

import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fxq import zoo

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script, with results and data in a folder of their own."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path / "results")
    monkeypatch.setenv("FXQ_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def rows(name: str) -> dict[str, dict[str, Any]]:
    return json.loads(Path("results", f"{name}.json").read_text())["rows"]  # type: ignore[no-any-return]


def test_rows_of_fxq_and_what_is_done_is_not_done_again(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_pruning")
    monkeypatch.setattr(bench.peer, "version", lambda: "1")
    command = ["resnet20", "--tools", "fxq", "--ratios", "0.5", "--multiples", "1", "8", "--int8"]
    bench.main(command)
    found = rows("pruning")
    assert list(found) == ["resnet20 0.5 x1", "resnet20 0.5 x8"]
    for row in found.values():
        assert row["fxq is"] == row["fxq int8"] == "ok" and 20 < float(row["fxq MACs left"].rstrip("%")) < 40
        assert 0 < row["fxq groups s"] + row["fxq choice s"] + row["fxq cut s"] < row["fxq s"] and row["fxq nodes"] > 60
    text = Path("results/pruning.md").read_text()
    assert "fxq: 2 of 2 right, 0 wrong, 0 not cut" in text and "equal to the integer reference: 2 of 2" in text
    monkeypatch.setattr(bench, "net_of", None)
    bench.main(command)
    assert rows("pruning") == found


def test_an_error_and_a_slow_tool_become_cells(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_pruning")
    net, x = zoo.build("tiny_resnet8"), torch.randn(2, 3, 32, 32)

    def fails(*_: object) -> None:
        raise ZeroDivisionError("by zero\nat once")

    monkeypatch.setitem(bench.RUNS, "TP", fails)
    assert bench.one("TP", net, x, 0.5, 1, 5) == {"TP is": "ZeroDivisionError: by zero"}
    monkeypatch.setitem(bench.RUNS, "TP", lambda *_: time.sleep(30))
    row = bench.one("TP", net, x, 0.5, 1, 1)
    assert row == {"TP is": "TimeoutError: not within 1 s"}
    assert bench.out_of_time({"a 0.3 x1": row}, "a", "TP") == row["TP is"]
    assert bench.out_of_time({"a 0.3 x1": row}, "b", "TP") is None and bench.out_of_time({"a 0.3 x1": row}, "a", "fxq") is None


def test_macs_and_parameters(load: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 25, 7))
    assert load("bench_pruning").size_of(net, torch.zeros(2, 3, 5, 5)) == (25 * 4 * 27 + 700, 112 + 707)


def test_verdicts(load: Any) -> None:
    verdict, x = load("bench_pruning").verdict, torch.randn(2, 4)
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    off = nn.Linear(4, 3)
    off.load_state_dict(net.state_dict())
    assert verdict(net, off, x, torch.Size([2, 3])) == "ok"
    assert verdict(net, off, x, torch.Size([2, 4])) == "WRONG: output [2, 3]"
    off.weight.data[0, 0] += 1e-2
    assert verdict(net, off, x, torch.Size([2, 3])).endswith("from the masked net")
    net.weight.data.zero_()
    assert verdict(net, net, x, torch.Size([2, 3])) == "the output is flat"


class Net(nn.Module):
    """Plain, grouped and depthwise convolutions, a layer norm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depth, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=2)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.tanh(self.depth(torch.tanh(self.a(x)))))
        y: Tensor = self.head(self.norm(x.mean((2, 3))))
        return y


def test_the_masked_twin_follows_groups_that_are_cut_one_after_the_other(load: Any) -> None:
    """Groups as Torch-Pruning gives them: places in the net as it is at that moment."""
    peer = load("torch_pruning_peer")
    torch.manual_seed(0)
    net = Net().double()
    watch = peer.Watch(net)

    def group(*parts: tuple[nn.Module, str, list[int]]) -> list[Any]:
        return [(SimpleNamespace(target=SimpleNamespace(module=m), handler=way), places) for m, way, places in parts]

    def is_out(way: str) -> bool:
        return way == "out"

    watch.group(group((net.a, "out", [0, 5]), (net.depth, "out", [0, 5]), (net.b, "in", [0, 5])), is_out)
    watch.group(group((net.b, "out", [1, 6]), (net.norm, "out", [1, 6]), (net.head, "in", [1, 6])), is_out)
    watch.group(group((net.b, "out", [1, 5]), (net.norm, "out", [1, 5]), (net.head, "in", [1, 5])), is_out)
    masked = watch.masked()
    first, second = [1, 2, 3, 4, 6, 7], [0, 3, 4, 5]  # of 0 2 3 4 5 7, the places 1 and 5 are the channels 2 and 7
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        y = torch.tanh(F.conv2d(x, net.a.weight[first], net.a.bias[first]))  # type: ignore[index]
        y = torch.tanh(F.conv2d(y, net.depth.weight[first], net.depth.bias[first], groups=6))  # type: ignore[index]
        halves = [F.conv2d(y[:, :3], net.b.weight[:4][:, [1, 2, 3]]), F.conv2d(y[:, 3:], net.b.weight[4:][:, [0, 2, 3]])]
        y = (torch.cat(halves, 1) + net.b.bias[None, :, None, None])[:, second].mean((2, 3))  # type: ignore[index]
        y = F.layer_norm(y, (4,), net.norm.weight[second], net.norm.bias[second])
        want = F.linear(y, net.head.weight[:, second], net.head.bias)
        torch.testing.assert_close(masked(x), want)


def test_a_grouped_convolution_that_becomes_depthwise_is_still_followed(load: Any) -> None:
    watch_of = load("torch_pruning_peer").Watch
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    net.groups = 2  # type: ignore[assignment]  # as torchvision's ResNet has
    watch = watch_of(net)
    net[0].out_channels = 2  # its outputs are cut already
    watch.group([(SimpleNamespace(target=SimpleNamespace(module=net[0]), handler="in"), [1, 3])], lambda way: way == "out")
    weight = watch.masked()[0].weight
    assert not weight[:, 1].any() and bool((weight[:, 0] != 0).all())


def test_the_classifier_is_found(load: Any) -> None:
    net = zoo.build("nin_gc")
    assert load("torch_pruning_peer").classifier(net, 10) is net.features[10].conv


def test_resnets_that_can_be_followed_compute_the_same(load: Any) -> None:
    peer, common = load("torch_pruning_peer"), load("common")
    net, x = common.randomise(zoo.build("resnet20")), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(peer.followable(net)(x), net(x))
    assert not any(isinstance(m, peer.PadShortcut) for m in net.modules())


@pytest.fixture
def training(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with a few random images, small batches and a random net."""
    bench = load("bench_prune_training")
    monkeypatch.setattr(bench, "BATCH", 8)
    monkeypatch.setattr(bench.peer, "version", lambda: "1")
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    (tmp_path / "data" / "models").mkdir()
    for name in ("data_batch_1", "test_batch"):
        y, x = np.arange(40, dtype=np.uint8) % 10, rng.integers(0, 256, (40, 3072), np.uint8)
        np.concatenate([y[:, None], x], 1).tofile(tmp_path / "data" / "cifar10" / f"{name}.bin")
    torch.manual_seed(0)
    save_file(zoo.build("resnet20").state_dict(), tmp_path / "data" / "models" / "cifar10_resnet20.safetensors")
    return bench


def test_rows_of_training(training: Any, tmp_path: Path) -> None:
    common = ["--nets", "resnet20", "--epochs", "1", "--steps", "2", "--images", "32", "--threads", "1", "--out", str(tmp_path / "out")]
    training.main([*common, "--tools", "fxq", "fxq-target"])
    found = rows("prune_training")
    row = found["resnet20 fxq l2, 1 epochs, seed 0"]
    assert 45 < float(row["MACs left"].rstrip("%")) <= 50 and row["test images"] == 32
    assert all(0 <= float(row[k]) <= 100 for k in ("float", "cut", "trained", "int8"))
    assert float(row["int8 - trained"]) == pytest.approx(float(row["int8"]) - float(row["trained"]), abs=0.011)
    refused = found["resnet20 fxq-target l2, 1 epochs, seed 0"]
    assert "more than the budget" in refused["cut"] and "trained" not in refused
    assert "8 bits within 0.3 points" in Path("results/prune_training.md").read_text()
    assert (tmp_path / "out" / "prune" / "resnet20-fxq-l2-1-0.pt").exists()


def test_a_stopped_run_goes_on_to_the_same_weights(training: Any, tmp_path: Path) -> None:
    found, settings = training.images(32), {"epochs": 2}

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10))

    whole, parts = fresh(), fresh()
    training.tune(whole, found, 2, 0, 0, tmp_path / "whole.pt", settings)

    class Stop(Exception):
        pass

    calls = 0

    def stop(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:  # four steps an epoch
            raise Stop

    hook = parts.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        training.tune(parts, found, 2, 0, 0, tmp_path / "parts.pt", settings)
    hook.remove()
    again = fresh()
    training.tune(again, found, 2, 0, 0, tmp_path / "parts.pt", settings)
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole.state_dict()["0.weight"], fresh().state_dict()["0.weight"])
    other = fresh()
    training.tune(other, found, 2, 0, 1, tmp_path / "parts.pt", {"epochs": 3})  # of other settings: from the start
    assert not torch.equal(other.state_dict()["0.weight"], again.state_dict()["0.weight"])


def test_the_rate_falls_to_nothing(training: Any) -> None:
    assert training.rate(0, 10) == 0.02 and training.rate(5, 10) == pytest.approx(0.01) and training.rate(10, 10) == 0


def test_taylor_gets_its_data(training: Any) -> None:
    found = training.images(32)
    cut = training.pruned("fxq", zoo.build("resnet20"), found, 0.5, "taylor")
    assert sum(p.numel() for p in cut.parameters()) < 250_000
