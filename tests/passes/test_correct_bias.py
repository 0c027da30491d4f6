"""correct-bias: the text it writes, the numbers it computes, the reasons it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import numerics, schemes
from fxq.graph import grids, module_of, swap_module, walk
from fxq.layerwise import channel_mean
from fxq.modules import Quantized
from fxq.passes.correct_bias import CorrectBias
from fxq.spec import QParams, QuantSpec
from tests.helpers import context

SCHEME = replace(schemes.get("iao_w4a8"), name="w4_bias", weight_rounding="nearest")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d, self.c = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, groups=8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.b(nn.functional.relu(self.a(x))))
        return self.c(nn.functional.relu(self.d(x)).mean((2, 3)))


def case() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.rand(48, 3, 9, 9) + 0.5


def outputs(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
    """Output of every layer before it is rounded."""
    seen: dict[str, Tensor] = {}
    for name in "abdc":
        model.get_submodule(name).register_forward_hook(lambda mod, args, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        model(data)
    return seen


def errors(m: Any, model: nn.Module, data: Tensor) -> dict[str, float]:
    """Greatest mean error of a channel, by layer, relative to the layer's output."""
    want, got = outputs(model, data), outputs(m.graph_module, data)
    gaps = {n: channel_mean(model.get_submodule(n), got[n] - want[n]) for n in want}
    return {n: float(gap.abs().max() / want[n].abs().mean()) for n, gap in gaps.items()}


def test_text_a_conv_without_bias_gets_one_and_the_graph_stays_as_it_is() -> None:
    model, data = case()
    m = fxq.compile(model, SCHEME, calibration=data.split(16))
    assert [s.name for s in m.history][-2:] == ["convert", "correct-bias"] and m.history["correct-bias"].rewrites == 4
    assert m.history.diff("correct-bias") == "" and m.graph_module.get_submodule("a").op.bias.shape == (8,)


def test_golden_vector() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.l(x)

    model, data = One().eval(), torch.tensor([[1.0], [3.0]])
    with torch.no_grad():
        model.l.weight.fill_(1.3)
        model.l.bias.fill_(0.25)
    gm = fxq.compile(model, SCHEME, calibration=data).graph_module
    (node,) = (n for n, _ in walk(gm, "linear"))
    one = QParams(QuantSpec.parse("s4n/pc0"), torch.ones(1), torch.zeros(1, dtype=torch.int32))  # W = 1.3 -> 1
    swap_module(gm, node, Quantized(model.l, one, numerics.bias_qparams(grids(gm)["x"].qparams, one)))
    ctx = context(data, scheme="iao_w4a8")
    ctx.kept = [(data,)]
    assert CorrectBias().run(gm, ctx) == 1
    assert gm.get_submodule("l").op.bias.tolist() == pytest.approx([0.25 + 0.6], abs=1e-3) and model.l.bias.tolist() == [0.25]


def test_mean_error_of_every_channel_vanishes() -> None:
    model, data = case()
    plain = fxq.compile(model, replace(SCHEME, name="w4_plain", bias_correction=False), calibration=data.split(16))
    m = fxq.compile(model, SCHEME, calibration=data.split(16))
    before, after = errors(plain, model, data), errors(m, model, data)
    assert list(after) == ["a", "b", "d", "c"] and max(after.values()) < 2e-3 < max(before.values())
    with torch.no_grad():
        want = model(data)
        assert (m(data) - want).square().mean() < 0.7 * (plain(data) - want).square().mean()


def test_the_artifact_equals_the_reference_with_corrected_biases() -> None:
    model, data = case()
    m = fxq.compile(model, SCHEME, calibration=data.split(16))
    proof = m.verify(m.lower().data, data[:7])
    assert proof.ok, str(proof)


def test_old_modules_are_not_edited() -> None:
    model, data = case()
    m = fxq.compile(model, replace(SCHEME, name="w4_plain", bias_correction=False), calibration=data)
    gm = m.graph_module
    old = {n.name: module_of(gm, n) for n, _ in walk(gm, "conv", "linear")}
    state = {n: {k: v.clone() for k, v in mod.state_dict().items()} for n, mod in old.items()}
    ctx = context(data[:2])
    ctx.kept = [(data,)]
    assert CorrectBias().run(gm, ctx) == 4
    assert all(torch.equal(v, state[n][k]) for n, mod in old.items() for k, v in mod.state_dict().items())
    assert all(module_of(gm, n) is not old[n.name] for n, _ in walk(gm, "conv", "linear"))


def test_layers_without_integer_activations_are_refused_and_no_data_changes_nothing() -> None:
    model, data = case()
    m = fxq.compile(model, SCHEME, calibration=data, skip=["b"])
    assert [(s.node, s.why) for s in m.history["correct-bias"].skips] == [("b", "it is not a layer with integer weights and activations")]
    assert m.history["correct-bias"].rewrites == 3
    assert CorrectBias().run(m.graph_module, context(data[:2])) == 0
