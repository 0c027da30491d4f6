"""``m.bisect`` names pass, node and reason of planted faults, is silent on clean models, and takes nodes back to float."""

import copy
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.audit import Finding
from fxq.errors import FxqError, InputError, PassError
from fxq.graph import grids, kind, module_of, swap_module
from fxq.moves import sqnr

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


class Net(nn.Module):
    """A place for every kind of fault: residual adds, a concatenation, square layers, ReLU6, values of very different size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.mix, self.fc1, self.fc2 = nn.Conv2d(16, 16, 1), nn.Linear(16, 16), nn.Linear(16, 4)
        self.relu, self.relu6 = nn.ReLU(), nn.ReLU6()
        for bn in (self.bn1, self.bn2, self.bn3):
            bn.running_mean, bn.running_var = torch.randn(8) * 0.3, torch.rand(8) + 0.2
            bn.weight, bn.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8) * 0.3)
        with torch.no_grad():
            self.mix.weight *= 30
            self.fc1.weight /= 20

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.relu6(self.bn2(self.conv2(x)) * 2.0 + 3.0)
        x = self.bn3(self.conv3(x)) + y
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.mix(x).mean((2, 3))
        return self.fc2(self.fc1(x))  # type: ignore[no-any-return]


def data(seed: int = 1, batches: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 8, 8, generator=g) for _ in range(batches)]


def compiled(scheme: str = "iao_w8a8", net: nn.Module | None = None, **options: Any) -> fxq.CompiledModel:
    return fxq.compile((net or Net()).eval(), scheme, calibration=data(), progress=False, **options)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("faults")


REASONS = {
    "concat order": "wrong form", "dropped skip connection": "wrong form", "forgotten eps": "wrong fold", "sign of the mean": "wrong fold",
    "forgotten gamma": "wrong fold", "wrong channel axis fold-bn": "wrong fold", "channels permuted wrongly": "wrong form", "clip too low": "wrong clamp",
    "wrong channel axis annotate": "wrong axis", "lost codes": "wrong codes", "unrelated grids joined": "grid shared wrongly",
    "swapped scales": "range", "stale observer": "range clipped", "range far too wide": "range too wide",
    "zero point of the wrong sign": "zero point", "grid ends beyond the clamp": "wrong clamp", "transposed weight": "transposed axis",
    "saturated bias": "saturation", "swapped channel scales": "swapped scales", "clip off: half the codes": "wrong codes",
    "zero point off": "wrong zero point", "scale off": "wrong scale", "dropped skip quantizer": "dropped quantizer",
    "wrong padding": "wrong form", "dropped bias": "wrong fold", "zero point of the weight": "wrong zero point", "another step": "wrong scale",
    "layers exchanged": "wrong weight", "quantizer behind the wrong node": "misplaced quantizer",
}  # fmt: skip


@pytest.mark.parametrize("key", REASONS)
def test_a_planted_fault_is_named_by_pass_node_and_reason(key: str, faults: Any) -> None:
    fault = next(f for f in faults.FAULTS if key in (f.name, f"{f.name} {f.step}"))
    for seed in range(9):
        with faults.planted(fault, seed) as truth:
            m = compiled()
        assert truth[0], "the net has a place for it"
        verdict = m.bisect("sqnr", data())
        if verdict.causes or fault.step not in ("share-qparams", "calibrate"):
            break  # a range that moves nothing is no fault
    assert not verdict.ok and verdict.word == "faults found"
    for cause in verdict.causes:
        assert cause.finding.step == fault.step and cause.finding.node in truth[0], str(verdict)
        assert REASONS[key] in cause.finding.reason or fault.name == "swapped scales"
    assert f"{fault.step} / {verdict.causes[0].finding.node}: " in str(verdict)


def test_two_faults_in_two_passes_and_two_in_one_are_all_named(faults: Any) -> None:
    by_name = {f"{f.step} {f.name}": f for f in faults.FAULTS}
    with faults.planted(by_name["fold-bn sign of the mean"], 0) as one, faults.planted(by_name["convert transposed weight"], 0) as two:
        found = [c.finding for c in compiled().bisect("sqnr", data()).causes]
    assert [f.step for f in found] == ["fold-bn", "convert"] and found[0].node in one[0] and found[1].node in two[0]
    with faults.planted(by_name["fold-bn sign of the mean"], 0) as one, faults.planted(by_name["fold-bn forgotten gamma"], 3) as two:
        found = [c.finding for c in compiled().bisect("sqnr", data()).causes]
    assert {f.node for f in found} == one[0] | two[0] and len(one[0] | two[0]) == 2


def test_the_effect_of_a_fault_is_the_metric_without_it(faults: Any) -> None:
    clean = compiled().bisect("sqnr", data()).scores["compiled"]
    fault = next(f for f in faults.FAULTS if f.name == "transposed weight")
    with faults.planted(fault, 1):
        verdict = compiled().bisect("sqnr", data())
    effect = verdict.causes[0].effect
    assert effect is not None and effect[0] == verdict.scores["compiled"] < clean - 6 and effect[1] == pytest.approx(clean, abs=1.5)


@pytest.mark.parametrize("scheme", ["iao_w8a8", "iao_w8a8_sym", "iao_w4a8", "dynamic_w8", "weight_only_w8"])
def test_a_clean_model_is_clean(scheme: str) -> None:
    m = compiled(scheme)
    for metric in ("sqnr", "agreement"):
        verdict = m.bisect(metric, data(5))
        assert verdict.ok and verdict.word == "nothing wrong" and not verdict.causes, str(verdict)
    assert verdict.scores["float"] == 1.0


WAYS: tuple[dict[str, Any], ...] = (
    {"target": "tensorrt", "scheme": "int8"}, {"portable": True}, {"prune": fxq.Prune(ratio=0.3, multiple_of=1)}, {"skip": "mix"}, {"observer": "mse"},
    {"scheme": "dorefa_w4a4"}, {"scheme": "dorefa_w4a4_compat"}, {"scheme": "tbn_w1at"}, {"budget": fxq.Budget(bytes=0.7)},
)  # fmt: skip


@pytest.mark.parametrize("options", WAYS)
def test_other_ways_to_compile_are_clean_too(options: dict[str, Any]) -> None:
    verdict = compiled(**options).bisect(data=data(5))
    assert verdict.ok, str(verdict)


def test_codes_that_are_too_few_are_no_fault_but_the_worst_places_are_named() -> None:
    m = compiled()
    verdict = m.bisect("sqnr", data(), tolerance=60)
    assert not verdict.ok and verdict.word == "the codes are too few" and not verdict.causes
    assert 0 < len(verdict.limits) <= len(m.graph_module.graph.nodes)
    assert "float in these" in str(verdict) and verdict.limits[0].path in str(verdict)
    assert m.bisect("sqnr", data(), tolerance=5).ok


def test_a_metric_of_ones_own_and_the_accuracy() -> None:
    m, net = compiled(), Net().eval()
    pairs = [(x, net(x).argmax(-1)) for x in data()]
    calls: list[Any] = []

    def score(model: Callable[..., Any], given: Any) -> float:
        calls.append(given)
        return -float(sum((model(x) - net(x)).abs().mean() for x, _ in given))

    assert m.bisect(score, pairs, tolerance=10.0).ok and all(g is pairs for g in calls)
    verdict = m.bisect("accuracy", pairs, tolerance=0.2)
    assert verdict.ok and verdict.scores["float"] == 1.0 and verdict.evaluations == len(verdict.scores)
    with pytest.raises(InputError, match="the accuracy needs labels"):
        m.bisect("accuracy", data())
    with pytest.raises(InputError, match="unknown metric 'accurcy'. did you mean 'accuracy'"):
        m.bisect("accurcy", data())


class Noisy(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.conv, self.noise = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.noise(x + self.size * torch.rand_like(x))  # type: ignore[no-any-return]


def test_a_model_that_is_clearly_random_is_not_compiled() -> None:
    with pytest.raises(PassError, match="canonicalize / rand_like: two runs of the model on one input differ from here on"):
        compiled(net=Noisy(1.0))


def test_what_is_not_deterministic_is_said_first() -> None:
    m = compiled(net=Noisy(1e-6))
    verdict = m.bisect(data=data())
    assert not verdict.ok and verdict.word == "not deterministic"
    assert verdict.causes[0].finding.node == "rand_like" and "two runs of the float model" in str(verdict)


def test_without_the_graphs_there_is_no_bisection() -> None:
    m = compiled(states=False)
    with pytest.raises(FxqError, match="bisect: the graphs of the passes were not kept. Compile the model again with states=True"):
        m.bisect(data=data())


def test_the_verdict_as_json(faults: Any) -> None:
    with faults.planted(next(f for f in faults.FAULTS if f.name == "saturated bias"), 0):
        verdict = compiled().bisect("sqnr", data())
    body = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert body["causes"][0]["pass"] == "convert" and body["causes"][0]["reason"] == "saturation" and body["scores"]["float"] is None
    assert body["evaluations"] == verdict.evaluations > 2


def test_number_of_evaluations_does_not_grow_with_the_net() -> None:
    """Passes and nodes are looked at in runs of whole graphs; only confirming suspects bisects."""
    deep = nn.Sequential(*[layer for _ in range(24) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())])
    few, many = compiled().bisect(data=data()), compiled(net=deep).bisect(data=data())
    assert many.evaluations == few.evaluations == 3 and many.runs <= few.runs


def test_with_float_equals_the_float_model_and_a_part_of_it() -> None:
    m, net, x = compiled(), Net().eval(), data(9)[0]
    with torch.no_grad():
        assert sqnr(net(x), m.with_float("*")(x)) > 100
        one = m.with_float("mix")
        assert sqnr(net(x), m(x)) < sqnr(net(x), m.with_float("conv1", "conv2", "conv3")(x)) < 100
    kinds = {str(n.target): kind(one.graph_module, n) for n in one.graph_module.graph.nodes if n.op == "call_module"}
    assert "mix_q" not in kinds and kinds["left_q"] == "fake_quantize"
    assert type(one.graph_module.get_submodule("mix")) is nn.Conv2d and "kept float by with_float" in str([str(op) for op in one.float_ops])
    assert "mix_q" in dict(m.graph_module.named_modules()), "the model itself is left alone"


def test_with_float_keeps_an_absorbed_clamp() -> None:
    m, x = compiled(), data(9)[0]
    grid = next(g for g in grids(m.graph_module).values() if g.clamp is not None and g.clamp[1] is None)
    assert grid.clamp == (0.0, None)
    part = m.with_float("conv1")
    clamp = next(n for n in part.graph_module.graph.nodes if n.target == "conv1_q")
    assert kind(part.graph_module, clamp) == "clamp" and float(module_of(part.graph_module, clamp)(torch.tensor([-3.0]))) == 0.0
    artifact = part.lower()
    assert part.verify(artifact, [x]).ok


def test_with_float_refuses_names_that_are_none() -> None:
    with pytest.raises(InputError, match="'layer9' names no node of the compiled graph"):
        compiled().with_float("layer9")
    with pytest.raises(InputError, match="99 names no node of the compiled graph. The graph has 8 weighted layers"):
        compiled().with_float(99)


def test_a_finding_reads_as_one_line() -> None:
    f = Finding("fold-bn", "conv1", "conv1", "wrong fold", "12.0 dB")
    assert str(f) == "fold-bn / conv1: wrong fold: 12.0 dB" and f.weight == math.inf


def test_a_graph_that_does_not_run_is_named_by_pass_and_node(faults: Any) -> None:
    def strided(gm: Any, rng: Any) -> set[str]:
        node = next(n for n in gm.graph.nodes if n.target == "left")
        op = copy.deepcopy(module_of(gm, node))
        op.stride = (2, 2)
        swap_module(gm, node, op)
        return {node.name}

    with faults.planted(faults.Fault("share-qparams", "wrong stride", strided), 0):
        m = compiled(scheme="weight_only_w8")
    verdict = m.bisect(data=data())
    cause = verdict.causes[0].finding
    assert not verdict.ok and verdict.word == "does not run" and cause.step == "share-qparams" and "cat" in cause.node
    assert "Sizes of tensors must match" in str(verdict)


@pytest.mark.parametrize("portable", [False, True])
def test_a_correction_that_makes_it_worse_is_named_whatever_pass_follows(portable: bool, faults: Any) -> None:
    def shifted(gm: Any, rng: Any) -> set[str]:
        node = next(n for n in gm.graph.nodes if n.target == "left")
        layer = copy.deepcopy(module_of(gm, node))
        layer.op.bias = nn.Parameter(layer.op.bias.detach() + 1.0)
        swap_module(gm, node, layer)
        return {node.name}

    clean = compiled("iao_w4a8", portable=portable).bisect(data=data(5))
    assert clean.ok, str(clean)
    with faults.planted(faults.Fault("round-weights", "shifted bias", shifted), 0) as truth:
        verdict = compiled("iao_w4a8", portable=portable).bisect(data=data())
    cause = verdict.causes[0].finding
    assert (cause.step, cause.reason) == ("round-weights", "corrected the wrong way") and cause.node in truth[0], str(verdict)
