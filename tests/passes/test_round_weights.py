"""round-weights: the text it writes, the numbers it computes, the reasons it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import numerics, schemes
from fxq.errors import SchemeError
from fxq.graph import module_of, walk
from fxq.modules import Quantized
from fxq.passes.round_weights import RoundWeights, feedback, moments
from fxq.spec import QParams, QuantSpec
from tests.helpers import context

S4 = QuantSpec.parse("s4n/pc0")
NEAREST = replace(schemes.get("iao_w4a8"), name="w4_nearest", weight_rounding="nearest", bias_correction=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 3, groups=2)
        self.d, self.c = nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.b(nn.functional.relu(self.a(x))))
        return self.c(nn.functional.relu(self.d(x)).mean((2, 3)))


def case(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Smooth inputs: neighbouring pixels are correlated, as in pictures."""
    torch.manual_seed(seed)
    x = nn.functional.interpolate(torch.randn(160, 3, 4, 4), size=(12, 12), mode="bilinear", align_corners=False)
    return Net().eval(), x


def grid(rows: Tensor) -> QParams:
    top = rows.abs().amax((0, 2)) if rows.shape[0] == 1 else rows.abs().amax(2).flatten()
    return numerics.choose_qparams(-top.float(), top.float(), S4)


def loss(a: Tensor, b: Tensor, cov: Tensor) -> float:
    e = a - b
    return float(((e @ cov) * e).sum())


def test_feedback_without_correlation_is_nearest_rounding() -> None:
    rows = torch.randn(1, 5, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cov = torch.diag_embed(torch.rand(1, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1)
    want = numerics.fake_quantize(rows[0].float(), grid(rows))
    assert torch.equal(feedback(rows, cov, grid(rows))[0].float(), want)


def test_feedback_golden_vector() -> None:
    # Two equal inputs (correlation near 1), scale 1: 0.4 and 0.4 round to 0; the sum 0.8 is nearest to 1.
    cov = torch.tensor([[[1.0, 0.999], [0.999, 1.0]]], dtype=torch.float64)
    qp = QParams(S4, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    assert feedback(torch.tensor([[[0.4, 0.4]]], dtype=torch.float64), cov, qp).sum() == 1.0


@pytest.mark.parametrize("groups", [1, 3])
def test_feedback_stays_on_the_grid_and_beats_nearest(groups: int) -> None:
    g = torch.Generator().manual_seed(groups)
    rows = torch.randn(groups, 8, 150, dtype=torch.float64, generator=g)
    x = torch.randn(groups, 400, 150, dtype=torch.float64, generator=g).cumsum(2) * 0.3 + torch.randn(groups, 400, 150, generator=g)
    cov = x.transpose(1, 2) @ x / 400
    qp = grid(rows)
    got = feedback(rows, cov, qp)
    flat = got.reshape(groups * 8, 150).float()
    assert torch.equal(numerics.fake_quantize(flat, qp), flat)
    nearest = numerics.fake_quantize(rows.reshape(groups * 8, 150).float(), qp).reshape(rows.shape).double()
    assert loss(got, rows, cov) < 0.5 * loss(nearest, rows, cov)


def test_moments_are_the_covariances_of_the_patches() -> None:
    torch.manual_seed(0)
    op, q = nn.Conv2d(2, 3, 3), torch.randn(6, 2, 8, 8)
    f = q + 0.1 * torch.randn_like(q)
    cov, cross = moments(op, [(f[:4], q[:4]), (f[4:], q[4:])], 1 << 15)
    a, b = (nn.functional.unfold(v, 3).transpose(1, 2).reshape(-1, 18).double() for v in (q, f))
    assert torch.allclose(cov[0], torch.cov(a.T, correction=0), atol=1e-5)
    assert torch.allclose(cross[0], ((b - a) - (b - a).mean(0)).T @ (a - a.mean(0)) / len(a), atol=1e-5)


def test_moments_take_no_more_samples_than_asked() -> None:
    op, x = nn.Conv2d(1, 1, 1), torch.arange(32.0).reshape(32, 1, 1, 1).expand(32, 1, 8, 8)
    cov, _ = moments(op, [(x, x)], 4 * 64)
    assert float(cov) == pytest.approx(float(torch.arange(0.0, 32.0, 8).var(correction=0)), rel=1e-5)


def test_text_and_values() -> None:
    model, data = case()
    m = fxq.compile(model, "iao_w4a8", calibration=data.split(32))
    assert [s.name for s in m.history][-2:] == ["convert", "round-weights"] and m.history["round-weights"].rewrites == 4
    for node, _ in walk(m.graph_module, "conv", "linear"):
        layer = module_of(m.graph_module, node)
        assert isinstance(layer, Quantized) and layer.op.bias is not None
        assert torch.equal(layer.weight_grid(layer.op.weight), layer.op.weight), "the weights lie on their grid"


def test_unseen_data_comes_closer_than_with_nearest_rounding_and_the_artifact_is_equal() -> None:
    model, data = case()
    m = fxq.compile(model, "iao_w4a8", calibration=data[:128].split(32))
    plain = fxq.compile(model, NEAREST, calibration=data[:128].split(32))
    x = data[128:]
    with torch.no_grad():
        want = model(x)
        assert (m(x) - want).square().mean() < 0.3 * (plain(x) - want).square().mean()
    proof = m.verify(m.lower().data, x[:7])
    assert proof.ok, str(proof)


def test_old_modules_are_not_edited() -> None:
    model, data = case()
    m = fxq.compile(model, NEAREST, calibration=data)
    gm = m.graph_module
    old = {n.name: module_of(gm, n) for n, _ in walk(gm, "conv", "linear")}
    state = {n: {k: v.clone() for k, v in mod.state_dict().items()} for n, mod in old.items()}
    ctx = context(data[:2])
    ctx.kept = [(data,)]
    assert RoundWeights().run(gm, ctx) == 4
    assert all(torch.equal(v, state[n][k]) for n, mod in old.items() for k, v in mod.state_dict().items())


def test_dead_inputs_and_dead_channels_work() -> None:
    model, data = case()
    with torch.no_grad():
        model.a.weight[3:12] = 0
        model.d.weight.zero_()
    m = fxq.compile(model, "iao_w4a8", calibration=data)
    with torch.no_grad():
        assert torch.allclose(m(data), model(data), atol=0.05)
    assert m.verify(m.lower().data, data[:3]).ok


def test_float_layers_and_missing_data_are_refused() -> None:
    model, data = case()
    m = fxq.compile(model, "iao_w4a8", calibration=data, skip=["b"])
    assert [(s.node, s.why) for s in m.history["round-weights"].skips] == [("b", "it is not a layer with integer weights and activations")]
    assert RoundWeights().run(m.graph_module, context(data[:2])) == 0


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"unknown rounding 'up'\. Use nearest or feedback"):
        replace(NEAREST, weight_rounding="up")
