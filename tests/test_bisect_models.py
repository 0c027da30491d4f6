"""What a bisection says of models that were trained, changed or corrected behind the passes, of shared grids, float islands and of clean small models."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.audit_grids import convert_findings, islands
from fxq.audit_ranges import Seen, _why, look, range_findings
from fxq.errors import FxqError, InputError, LoweringError
from fxq.modules import Quantized
from fxq.snapshot import History
from fxq.toggles import Toggles

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.bn1.running_mean, self.bn1.running_var = torch.randn(8) * 0.3, torch.rand(8) + 0.2

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.relu(self.conv2(x)).mean((2, 3)))  # type: ignore[no-any-return]


def data(seed: int = 1, batches: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 8, 8, generator=g) for _ in range(batches)]


def compiled(scheme: str = "iao_w8a8", net: nn.Module | None = None, **options: Any) -> Any:
    return fxq.compile((net or Net()).eval(), scheme, calibration=data(), progress=False, **options)


def trained() -> Any:
    q = compiled("int8", mode="qat")
    q.train()
    optimizer = torch.optim.SGD(q.parameters(), 0.01)
    for _ in range(3):
        for x in data():
            optimizer.zero_grad()
            (q(x) - 1).square().mean().backward()
            optimizer.step()
    return q.eval()


def test_a_trained_model_is_held_against_its_trained_weights() -> None:
    q = trained()
    m = q.convert()
    for verdict in (m.bisect("sqnr", data()), m.bisect(), q.bisect("sqnr", data())):
        assert verdict.ok and not verdict.causes and verdict.scores["compiled"] > 25, str(verdict)
    assert q.sensitivity(data()).compiled == m.sensitivity(data()).compiled > 25
    assert m.history.floats() == {}
    with torch.no_grad():
        x = data()[0]
        far = (m.with_float("*")(x) - Net().eval()(x)).abs().max()
        assert (m.with_float("*")(x) - m(x)).abs().max() < 0.1 * far
        assert torch.equal(q.with_float("fc")(x), m.with_float("fc")(x))


@pytest.mark.parametrize("how", ["double", "edited", "copied"])
def test_a_changed_model_is_not_held_against_its_passes(how: str) -> None:
    m = compiled()
    assert m.bisect(data=data()).ok and all(s.state.changed is None for s in m.history)
    if how == "copied":
        import copy

        m = copy.deepcopy(m)
        assert m.bisect(data=data()).ok
    if how == "double":
        m.double()
    else:
        with torch.no_grad():
            m.graph_module.get_submodule("conv2").op.weight.mul_(1.5)
    with pytest.raises(FxqError, match=r"bisect / \w+: it was changed after the passes"):
        m.bisect("sqnr", data())
    assert 10 < m.sensitivity(data()).compiled < 60, "what is there can still be measured"


def test_a_model_with_nodes_taken_back_to_float_is_still_bisected() -> None:
    m = compiled()
    part = m.with_float("conv1")
    verdict = part.bisect("sqnr", data())
    assert verdict.ok and verdict.scores["compiled"] != m.bisect("sqnr", data()).scores["compiled"]


def test_ranges_are_judged_where_weights_were_made_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    faults = importlib.import_module("faults")
    with faults.planted(next(f for f in faults.FAULTS if f.name == "stale observer"), 0) as truth:
        m = compiled("iao_w4a8")
    verdict = m.bisect("sqnr", data())
    finding, effect = verdict.causes[0].finding, verdict.causes[0].effect
    assert (finding.step, finding.reason) == ("calibrate", "range clipped") and finding.node in truth[0] and len(verdict.causes) == 1
    assert effect is not None and effect[0] == verdict.scores["weights float"] < effect[1] - 5
    assert "weights float" not in compiled().bisect("sqnr", data()).scores


class Join(nn.Module):
    """The small branch decides, the large one makes the grid."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(16, 6, 1)
        with torch.no_grad():
            self.large.weight.mul_(100)
            self.out.weight[:, :8] /= 1000

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.large(x), self.small(x)], 1))  # type: ignore[no-any-return]


def test_a_shared_grid_that_is_too_wide_is_named_with_its_narrow_member() -> None:
    m = compiled(net=Join())
    verdict = m.bisect("sqnr", data())
    assert verdict.ok and [(n.reason, n.path) for n in verdict.notes] == [("shared grid too wide", "small")]
    assert "note: share-qparams / small_q: shared grid too wide: its data" in str(verdict) and "it shares with large, cat" in str(verdict)
    assert verdict.to_json()["notes"][0]["path"] == "small"
    strict = m.bisect("sqnr", data(), tolerance=35)
    assert strict.limits[0].path == "small" and strict.limits[0].reason == "shared grid too wide"
    even = Join()
    with torch.no_grad():
        even.large.weight.div_(100)
    assert compiled(net=even).bisect("sqnr", data()).notes == ()


def test_a_float_island_is_noted_unless_it_was_asked_for() -> None:
    m = compiled(skip="conv2")
    assert m.bisect("sqnr", data()).notes == ()
    gm = m.graph_module
    node = next(n for n in gm.graph.nodes if n.name == "conv2")
    node.meta["float_why"] = "it has no kernel"
    found = list(islands(gm, m.target))
    assert [(f.node, f.reason) for f in found] == [("conv2", "float island")] and found[0].fact.endswith("it has no kernel")
    assert not found[0].certain and list(islands(compiled().graph_module, m.target)) == []


def test_bits_that_float32_rounds_are_no_saturation() -> None:
    """Next to nothing comes in: the codes of the bias lie beyond 2^24."""
    m = compiled()
    before = m.history.graph("calibrate")
    node = next(n for n in m.graph_module.graph.nodes if n.name == "fc")
    layer = m.graph_module.get_submodule("fc")
    assert isinstance(layer, Quantized) and layer.bias_grid is not None
    bias = layer.op.bias
    assert isinstance(bias, Tensor)
    small = float(bias.detach().abs().max()) / 2.0**30
    shrink = small / float((layer.bias_grid.scale).min())
    name = node.args[0].meta["grid"]
    before.meta["grids"][name].qparams.scale.mul_(shrink)
    layer.bias_grid.scale.mul_(shrink)
    found = [f for f in convert_findings(before, m.graph_module, m.scheme, m.target) if f.node == "fc"]
    assert [f.reason for f in found if f.reason == "saturation"] == []
    layer.bias_grid.scale.div_(64)
    assert any(f.reason == "saturation" for f in convert_findings(before, m.graph_module, m.scheme, m.target))


@pytest.mark.parametrize(
    ("grid", "symmetric", "reason"),
    [
        ((0.0, 0.8), False, "range clipped"),
        ((-1.0, 0.1), False, "wrong zero point"),
        ((-0.6, 0.6), True, "range clipped"),
        ((-9.0, 9.0), True, "range too wide"),
    ],
)
def test_the_reason_of_noise(grid: tuple[float, float], symmetric: bool, reason: str) -> None:
    clipped = 0 if grid[1] > 1 else 100
    assert _why(Seen("n", "n", "g", 0.0, 1.1, clipped=clipped, count=1000), grid, symmetric)[0] == reason


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention, self.head = nn.Linear(12, 16), nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        y = self.attention(x, x, x, need_weights=False)[0]
        return {"logits": self.head((x + y).mean(1)), "tokens": y}


def test_a_state_keeps_a_module_whose_children_passes_swap() -> None:
    net, x = Attention().eval(), torch.randn(8, 5, 12)
    m = fxq.compile(net, "iao_w8a8", calibration=[x], progress=False)
    with torch.no_grad():
        assert torch.equal(m.history.graph("trace")(x)["tokens"], net(x)["tokens"])
    assert all(s.state is not None and s.state.changed is None for s in m.history)
    assert type(m.history.graph("trace").get_submodule("attention.out_proj")).__module__.startswith("torch.")
    assert m.bisect("sqnr", [x]).ok


def test_metrics_that_are_no_numbers_and_labels_that_do_not_fit() -> None:
    m = compiled()
    with pytest.raises(InputError, match="the metric 'score' gave NaN"):

        def score(model: Any, given: Any) -> float:
            return float("nan")

        m.bisect(score, data())
    with pytest.raises(InputError, match="gave NoneType, which is no number"):
        m.bisect(lambda model, given: None, data())
    with pytest.raises(InputError, match=r"labels of \[8, 4\] do not fit outputs of \[8, 4\]"):
        m.bisect("accuracy", [(x, torch.rand(8, 4)) for x in data()])
    with pytest.raises(InputError, match="the tolerance is NaN"):
        m.bisect("sqnr", data(), tolerance=float("nan"))
    m.history = History(m.history.snapshots)
    with pytest.raises(InputError, match="no data is given, and the history kept no inputs"):
        m.bisect()


def test_accuracy_of_a_map_of_classes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    m = compiled(net=net)
    with torch.no_grad():
        pairs = [(x, net(x).argmax(1)) for x in data()]
        same = torch.cat([m(x).argmax(1) == y for x, y in pairs]).double().mean()
    verdict = m.bisect("accuracy", pairs)
    assert verdict.scores["float"] == 1.0 and verdict.scores["compiled"] == pytest.approx(float(same)) == m.bisect("agreement", data()).scores["compiled"]


def test_a_model_in_parts_says_so() -> None:
    m = compiled()
    m.root, m.parts = nn.Sequential(m.root), {"0": compiled()}
    with pytest.raises(LoweringError, match=r"captured in 1 parts and has no single graph. Use one part, m.parts\[path\]"):
        m.bisect("sqnr", data())
    assert m.parts["0"].bisect("sqnr", data()).ok


def test_few_values_are_no_evidence() -> None:
    t = Toggles(compiled().graph_module)
    x = data()[0] * 0.1
    few, many = (range_findings(t, look(t, [(v,)], {})) for v in (x[:1, :, :3, :3], x))
    assert "x" in [f.path for f in many] and "x" not in [f.path for f in few]


def test_a_fault_in_front_of_a_dead_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    faults = importlib.import_module("faults")
    net = Net()
    with torch.no_grad():
        net.fc.weight.mul_(1e-30)
    with faults.planted(next(f for f in faults.FAULTS if f.name == "wrong padding"), 0) as truth:
        m = compiled(net=net)
    found = [c.finding for c in m.bisect("sqnr", data()).causes]
    assert [(f.step, f.reason) for f in found] == [("canonicalize", "wrong form")] and found[0].node in truth[0]
