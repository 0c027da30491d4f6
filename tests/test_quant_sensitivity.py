"""What each rounding costs, and bits by layer under a budget."""

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.errors import InputError, SchemeError
from fxq.graph import module_of
from fxq.mixed import FLOAT, LayerBits, cheapest
from fxq.modules import FakeQuantize, Quantized
from fxq.moves import sqnr
from fxq.toggles import IDEAL, OFF, ON, Toggles
from fxq.verify import portable


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.conv2, self.conv3, self.fc = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 32, 1), nn.Linear(32, 5)
        with torch.no_grad():
            self.conv2.weight[:, 0] *= 40  # spread inside each channel: coarse for the others

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        return self.fc(self.relu(self.conv3(self.relu(self.conv2(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def data(seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 8, 8, generator=g) for _ in range(2)]


def compiled(scheme: str = "iao_w8a8", **options: Any) -> fxq.CompiledModel:
    return fxq.compile(Net().eval(), scheme, calibration=data(), progress=False, **options)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x in data()])


def test_rows_are_what_the_switched_graph_gives() -> None:
    m = compiled()
    t = Toggles(m.graph_module, m.history.floats())
    t.set(OFF)
    truth = output(t.gm)
    assert sqnr(output(Net().eval()), truth) > 100, "all off is the float model"
    found = m.sensitivity(data())
    assert {(r.name, r.what) for r in found.rows} == set(t.units) and found.compiled == pytest.approx(sqnr(truth, output(m)), abs=1e-6)
    for row in found.rows:
        t.only(t.units[row.name, row.what])
        assert row.alone == pytest.approx(sqnr(truth, output(t.gm)), abs=1e-6) and row.alone > found.compiled
        t.without(t.units[row.name, row.what])
        assert row.without == pytest.approx(sqnr(truth, output(t.gm)), abs=1e-6)


def test_layers_join_weights_and_what_they_give() -> None:
    found = compiled().sensitivity(data(), per="layer")
    assert [r.name for r in found.rows if r.what == "layer"] == ["conv1", "conv2", "conv3", "fc"]
    assert next(r.name for r in found.rows if r.what == "activations") == "x"
    worst = found.worst(2)
    assert len(worst) == 2 and worst[0] == min((r for r in found.rows if r.what == "layer"), key=lambda r: r.alone).name
    better = fxq.compile(Net().eval(), "iao_w8a8", calibration=data(), skip=worst, progress=False)
    truth = output(Net().eval())
    assert sqnr(truth, output(better)) > sqnr(truth, output(compiled()))


def test_a_metric_is_measured_for_every_row() -> None:
    m = compiled("iao_w4a8")
    pairs = [(x, Net().eval()(x).argmax(-1)) for x in data()]
    found = m.sensitivity(pairs, "accuracy", per="layer")
    assert found.metric == "accuracy" and all(r.drop_alone is not None and 0 <= r.drop_alone <= 1 for r in found.rows)
    t = Toggles(m.graph_module, m.history.floats())
    first = found.rows[0]
    t.only(t.layer_units[first.name, first.what])
    wrong = (output(t.gm).argmax(-1) != torch.cat([y for _, y in pairs])).double().mean()
    assert first.drop_alone == pytest.approx(float(wrong))
    assert "drop alone" in str(found) and str(found).splitlines()[0].startswith("everything quantized: ")


def test_the_result_as_text_json_and_in_the_report(tmp_path: Any) -> None:
    m = compiled()
    found = m.sensitivity(data())
    ranked = [r.alone for r in found.ranked()]
    assert ranked == sorted(ranked) and str(found).splitlines()[3].startswith(found.ranked()[0].name)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["rows"][0]["name"] == found.rows[0].name
    assert next(iter(found)) == (found.rows[0].name, found.rows[0].what, found.rows[0].alone, found.rows[0].without)
    with pytest.raises(InputError, match="unknown unit 'channel'"):
        m.sensitivity(data(), per="channel")
    assert m.report(tmp_path / "r.html", data(), sensitivity=found).stat().st_size > 10_000


def test_ideal_switches_use_fresh_grids() -> None:
    m = compiled()
    t = Toggles(m.graph_module, m.history.floats())
    name = next(iter(t.layers))
    module: Any = m.graph_module.get_submodule(t.paths[name])
    right = module.weight_grid.scale.clone()
    module.weight_grid.scale *= 9
    t.set(OFF)
    truth = output(t.gm)
    t.set(ON, [name])
    bad = sqnr(truth, output(t.gm))
    t.set(IDEAL, [name])
    assert sqnr(truth, output(t.gm)) > bad + 10 and torch.equal(t.layers[name].fresh().scale, right)


def weight_bits(m: fxq.CompiledModel) -> dict[str, int]:
    gm = m.graph_module
    nodes = [(str(n.target), module_of(gm, n)) for n in gm.graph.nodes if n.op == "call_module"]
    return {p: q.weight_grid.spec.bits if isinstance(q, Quantized) else FLOAT for p, q in nodes if isinstance(q, (Quantized, nn.Conv2d, nn.Linear))}


@pytest.mark.parametrize("share", [0.5, 0.62, 0.8, 1.0])
def test_bits_by_layer_keep_the_budget_in_bytes(share: float) -> None:
    m = compiled(budget=fxq.Budget(bytes=share))
    assert m.bit_plan is not None
    have = weight_bits(m)
    sizes = {name: p.numel() for name, p in Net().named_parameters() if name.endswith("weight")}
    total = sum(math.ceil(sizes[f"{p}.weight"] * b / 8) for p, b in have.items())
    assert total == m.bit_plan.cost <= share * sum(sizes.values()) and have == m.bit_plan.bits
    assert (set(have.values()) == {4}) == (share == 0.5) and (set(have.values()) == {8}) == (share == 1.0)


def test_mixed_bits_lie_between_and_give_the_sensitive_layer_more() -> None:
    four, mixed, eight = compiled("iao_w4a8"), compiled(budget=fxq.Budget(bytes=0.88)), compiled()
    with torch.no_grad():
        x = torch.cat(data(7))
        assert sqnr(Net().eval()(x), four(x)) + 2 < sqnr(Net().eval()(x), mixed(x))
    assert weight_bits(mixed)["conv2"] == 8, "its channels have the widest spread"
    artifact = mixed.lower()
    assert mixed.verify(artifact, data()).ok
    assert len(four.lower().data) < len(artifact.data) < len(eight.lower().data)


def test_a_budget_in_bit_operations_and_float_layers() -> None:
    m = compiled(budget=fxq.Budget(bops=0.7))
    assert m.bit_plan is not None and m.bit_plan.unit == "bops" and m.bit_plan.cost <= 0.7 * m.bit_plan.own
    macs = {"conv1": 8 * 27 * 64, "conv2": 32 * 72 * 64, "conv3": 32 * 32 * 64, "fc": 160}
    assert m.bit_plan.own == sum(v * 64 for v in macs.values())
    wide = compiled(budget=fxq.Budget(bytes=3.0, bits=(4, 8, 32)))
    assert wide.bit_plan is not None and wide.bit_plan.floats and all(weight_bits(wide)[p] == FLOAT for p in wide.bit_plan.floats)
    assert "float" in str(wide.bit_plan) and sqnr(output(Net().eval()), output(wide)) > sqnr(output(Net().eval()), output(compiled()))


def test_an_absolute_budget_is_in_whole_bytes() -> None:
    own = compiled(budget=fxq.Budget(bytes=1.0)).bit_plan
    assert own is not None
    m = compiled(budget=fxq.Budget(bytes=int(own.own) - 1))
    assert m.bit_plan is not None and m.bit_plan.limit == own.own - 1 and m.bit_plan.narrowed


def test_budgets_that_cannot_be() -> None:
    with pytest.raises(SchemeError, match="a budget limits bytes or bops"):
        fxq.Budget()
    with pytest.raises(SchemeError, match="a layer cannot have 1 bits. Use 2 to 8, or 32"):
        fxq.Budget(bytes=0.5, bits=(1, 8))
    with pytest.raises(SchemeError, match="a budget of 0 is nothing"):
        fxq.Budget(bytes=0)
    with pytest.raises(SchemeError, match="the budget is .* bytes, the smallest choice takes .*. Give at least 0.5"):
        compiled(budget=fxq.Budget(bytes=0.3))
    with pytest.raises(SchemeError, match="'weight_only_w4' has no integer weights whose bits can be chosen|is weight-only"):
        compiled("weight_only_w4", budget=fxq.Budget(bytes=0.5))
    with pytest.raises(SchemeError, match="bits are chosen after training"):
        compiled(budget=fxq.Budget(bytes=0.5), mode="qat")


@pytest.mark.parametrize("limit", [6, 9, 13, 17.5, 22, 40])
def test_the_choice_is_the_best_one_of_all(limit: float) -> None:
    g = torch.Generator().manual_seed(int(limit))
    layers = [[LayerBits(f"l{i}", b, c, float(torch.rand((), generator=g)) / c**2) for b, c in ((4, 2), (8, 4), (32, 8 + i))] for i in range(3)]
    got = cheapest(layers, limit)
    legal = [c for c in itertools.product(*layers) if sum(o.cost for o in c) <= limit]
    assert sum(o.cost for o in got) <= limit and sum(o.noise for o in got) == pytest.approx(min(sum(o.noise for o in c) for c in legal))


def test_switches_leave_the_model_alone() -> None:
    m = compiled()
    before = output(m)
    Toggles(m.graph_module, m.history.floats()).set(OFF)
    m.sensitivity(data())
    assert torch.equal(output(m), before) and any(isinstance(x, FakeQuantize) for x in m.graph_module.modules())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.out = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.left(x).relu() + self.right(y))  # type: ignore[no-any-return]


def test_several_inputs() -> None:
    pairs = [(torch.randn(8, 8), torch.randn(8, 4)) for _ in range(2)]
    m = fxq.compile(TwoInputs().eval(), "iao_w8a8", calibration=pairs, progress=False)
    found = m.sensitivity(pairs)
    t = Toggles(m.graph_module, m.history.floats())
    t.set(OFF)
    truth = t.gm(*pairs[0])
    row = next(r for r in m.sensitivity(pairs[:1]).rows if r.name == "right" and r.what == "weights")
    t.only(t.units["right", "weights"])
    assert row.alone == pytest.approx(sqnr(truth, t.gm(*pairs[0])), abs=1e-6) and len(found.rows) == len(t.units)


def test_a_budget_without_a_quantized_layer() -> None:
    with pytest.raises(SchemeError, match="no layer is quantized, so there are no bits to choose"):
        compiled(budget=fxq.Budget(bytes=0.8), skip="*")


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_keeps_weights_portable(seed: int) -> None:
    """Error feedback rounds the weights of all layers again; no pair may saturate behind it."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    some = [torch.rand(16, 3, 8, 8) for _ in range(2)]
    m = fxq.compile(net, "iao_w8a8", calibration=some, progress=False, portable=True, budget=fxq.Budget(bytes=0.9))
    assert m.bit_plan is not None and set(m.bit_plan.bits.values()) == {4, 8}
    assert list(portable(m.graph_module)) == [] and m.verify(m.lower(), some).ok
