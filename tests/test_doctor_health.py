"""Each unhealthy thing that is planted into a model is found, named and graded; a healthy one gives no word."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.doctor_health import TINY, Finding, of_model
from tests.helpers import randomize


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )  # fmt: skip
    randomize(made)
    return made


FOLLOWS = {"bn-variance": ("dead-channels", "channel-ranges")}
"""What one planted thing brings along: a gamma of 0 is a dead channel, a great factor a wide range."""
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def nan(m: Any) -> None:
    m[3].weight.data[0, 0] = float("nan")


def infinite(m: Any) -> None:
    m[1].running_var[2] = float("inf")


def denormal(m: Any) -> None:
    m[0].weight.data[0, 0, 0, :2] = TINY / 4


def small_variance(m: Any) -> None:
    m[1].running_var[:3], m[1].weight.data[0] = 1e-9, 0.0


def dead(m: Any) -> None:
    m[3].weight.data[4:7] = 0


def ranges(m: Any) -> None:
    m[3].weight.data[:8] *= 1e-3


def fresh(m: Any) -> None:
    m[1].reset_running_stats()


def moving(m: Any) -> None:
    m[1] = nn.BatchNorm2d(16, track_running_stats=False).eval()


def dropout(m: Any) -> None:
    m[2] = nn.Sequential(nn.ReLU(), nn.Dropout(0.1)).eval()


@pytest.mark.parametrize(
    ("plant", "level", "code", "places", "words"),
    [
        (nan, "stop", "not-finite", ("3.weight",), "NaN or infinity"),
        (infinite, "stop", "not-finite", ("1.running_var",), "Load finite weights"),
        (nn.Module.half, "stop", "dtype", ("0.weight", "0.bias"), "the weights are torch.float16, fxq compiles float32 models. Pass model.float()"),
        (denormal, "warning", "denormal", ("0.weight",), "2 values are denormal"),
        (small_variance, "warning", "bn-variance", ("1",), "2 channels have a variance below the batch norm's eps; folding multiplies their weights by up to"),
        (dead, "note", "dead-channels", ("3",), "3 output channels have weights of 0 only"),
        (ranges, "note", "channel-ranges", ("3",), "fewer than 16 codes (3: 8 of 16 channels); this scheme has a scale for each channel"),
        (fresh, "warning", "untrained", ("1",), "1 of 1 batch norms"),
        (moving, "warning", "bn-statistics", ("1",), "cannot be folded"),
        (nn.Module.train, "note", "train-mode", (), "compiles a copy in eval mode"),
        (dropout, "note", "dropout", ("2.1",), "1 dropout layers do nothing"),
    ],
)  # fmt: skip
def test_what_is_planted_is_found(plant: Callable[[Any], Any], level: str, code: str, places: tuple[str, ...], words: str) -> None:
    m = net()
    plant(m)
    found = fxq.doctor(m, X)
    every = [*found.findings, *(f for c in found.forecasts for f in c.findings)]
    (one,) = [f for f in every if f.code == code]
    assert (one.level, one.places[: len(places) or None]) == (level, places) and words in str(one) and str(one) in str(found)
    assert found.ok == (level != "stop") and (code in str(found.stops)) == (level == "stop")
    assert {f.code for f in every} == {code, *FOLLOWS.get(code, ())}


def test_a_healthy_model_gives_no_word() -> None:
    found = fxq.doctor(net(), X)
    assert found.findings == () and found.forecasts[0].findings == () and found.ok


def test_one_scale_for_a_whole_weight_is_warned_of() -> None:
    m = net()
    ranges(m)
    (forecast,) = fxq.doctor(m, X, scheme="iao_w8a8_pt").forecasts
    assert [(f.level, f.code) for f in forecast.findings] == [("warning", "channel-ranges")] and "scale for each channel" in forecast.findings[0].way_out


def test_the_grave_come_first_and_long_lists_are_cut() -> None:
    m = net().train()
    nan(m)
    denormal(m)
    assert [f.level for f in of_model(m)] == ["stop", "warning", "note"]
    assert str(Finding("note", "c", ("a", "b", "c", "d", "e"), "fact")) == "note [c] a, b, c and 2 more: fact"


class OnTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)), "0.weight: the tensor has no shape yet (a lazy module)"),
        (OnTwo, "b.weight: the tensor has no data (device meta). Load the weights"),
        (lambda: torch.zeros(3), "expected a torch.nn.Module, got Tensor"),
    ],
)  # fmt: skip
def test_what_compile_refuses_stops(model: Callable[[], Any], words: str) -> None:
    found = fxq.doctor(model(), X)
    assert not found.ok and words in found.stops[0] and found.capture is None


def test_compiled_and_pruned_models() -> None:
    found = fxq.doctor(fxq.compile(net(), "int8", calibration=X, progress=False), X)
    assert found.stops == ["stop [model] the model is compiled already. Give the float model that it was made from"]
    pruned = fxq.prune(net(), fxq.Prune(ratio=0.5, multiple_of=4), example=X, progress=False)
    (forecast,) = fxq.doctor(pruned, X).forecasts
    assert forecast.float_ops == fxq.compile(pruned, "int8", calibration=X, progress=False).float_ops
    assert forecast.macs[1] < fxq.doctor(net(), X).forecasts[0].macs[1]


def test_a_wrapped_model_is_looked_at() -> None:
    assert fxq.doctor(nn.DataParallel(net()), X).ok
