"""Random layers and random nets lowered to bits, and the search for thresholds, against the reference's arithmetic."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

import fxq
from fxq import kernels, numerics, zoo
from fxq.bitwise import layers, thresholds
from fxq.bitwise.lowered import lower
from fxq.bitwise.modules import BitConv
from fxq.convolutions import padded
from fxq.spec import QParams, QuantSpec
from tests.bit_checks import differing
from tests.bit_nets import randomized
from tests.converted import converted
from tests.lowbit_graphs import LEVELS, NARROW, Conv, Movers, Residual, low_bit, measure
from tests.test_random_graphs import RandomNet
from tests.test_random_lowbit import SCHEMES

seldom = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def grid(spec: str, scale: float = 1.0, zero: int = 0) -> QParams:
    return QParams(QuantSpec.parse(spec), torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))


@st.composite
def convs(draw: Any) -> tuple[GraphModule, torch.Tensor]:
    """A convolution of binary or ternary weights between two grids, with a rounding step, on a random size."""
    spec, levels = draw(st.sampled_from(["b1/pt", "t2/pt"])), draw(st.sampled_from(["binary", "ternary"]))
    groups = draw(st.sampled_from([1, 1, 2, 3, 5]))
    cin = 5 * 6 if groups > 1 else draw(st.integers(1, 70))
    groups = cin if draw(st.integers(0, 9)) == 0 else groups
    cout = groups * draw(st.integers(1, 3)) if groups > 1 else draw(st.integers(1, 70))
    k, d, s = draw(st.tuples(st.integers(1, 5), st.integers(1, 4))), draw(st.integers(1, 2)), draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    p = draw(st.tuples(st.integers(0, 3), st.integers(0, 2)))
    torch.manual_seed(draw(st.integers(0, 99)))
    net = Conv(spec, in_channels=cin, out_channels=cout, kernel_size=k, stride=s, padding=p, dilation=d, groups=groups, bias=draw(st.booleans()))
    net.a = nn.Conv2d(3, cin, 3, padding=1)
    out = draw(st.sampled_from(["b1/pt", "t2/pt", "u8/pt", "s8n/pt", "u4/pt"]))
    net.b_q.spec = QuantSpec.parse(out)
    if draw(st.booleans()):
        net.b = padded(net.b, draw(st.tuples(*[st.integers(0, 2)] * 4)))
    h, w = (max(draw(st.integers(3, 9)), d * (k[i] - 1) + 1) for i in (0, 1))
    x = torch.randn(draw(st.integers(1, 2)), 3, h, w)
    gm = measure(low_bit(converted(net, x), levels), x)
    fq: Any = gm.get_submodule("b_q")
    if out[0] in "tb" and draw(st.booleans()):
        fq.step = torch.tensor(float(torch.rand(())) * 3 + 0.1)
    return gm, x


@seldom
@given(convs())
def test_random_convolutions(case: tuple[GraphModule, torch.Tensor]) -> None:
    gm, x = case
    assert differing(gm, x) == []
    assert set(lower(gm).layers) == {"b"}


@pytest.mark.parametrize("levels", ["binary", "ternary", "dorefa2", "int8"])
@pytest.mark.parametrize("spec", NARROW)
def test_hand_made_graphs(spec: str, levels: str) -> None:
    for net in (Residual(spec), Residual(spec, pool=False), Movers(spec)):
        torch.manual_seed(0)
        x = torch.randn(3, 3, *((18, 18) if isinstance(net, Residual) else (9, 9)))
        gm = measure(low_bit(converted(net, x), levels), x)
        assert differing(gm, x) == []
        on_bits = spec[:2] in ("b1", "t2") and levels in ("binary", "ternary")
        assert bool(lower(gm).layers) == on_bits


@pytest.mark.parametrize("first", range(0, 30, 10))
def test_random_nets_of_all_low_bit_schemes(first: int) -> None:
    on_bits = 0
    for seed in range(first, first + 10):
        torch.manual_seed(seed)
        name = SCHEMES[seed % len(SCHEMES)]
        m = fxq.compile(RandomNet(seed).eval(), name, calibration=[torch.randn(4, 3, 16, 16)], progress=False)
        for batch in (1, 3):
            assert differing(m.graph_module, torch.randn(batch, 3, 16, 16)) == [], f"seed {seed}, {name}"
        on_bits += len(lower(m.graph_module).layers)
    assert on_bits >= 2


@pytest.mark.parametrize(("name", "size"), [("nin_gc", 32), ("nin", 32), ("resnet20", 32), ("resnet18", 64)])
def test_whole_nets(name: str, size: int) -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10) if name == "resnet18" else zoo.build(name)
    net = randomized(net)
    for scheme in ("xnor_w1a1", "tbn_w1at"):
        m = fxq.compile(net, scheme, calibration=[torch.randn(2, 3, size, size)], progress=False)
        assert differing(m.graph_module, torch.randn(1, 3, size, size)) == []
        found = lower(m.graph_module)
        assert len(found.layers) == {"nin_gc": 7, "nin": 7, "resnet20": 18, "resnet18": 19}[name]
        assert all(isinstance(layer, BitConv) for layer in found.layers.values())


# ---------------------------------------------------------------- thresholds


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 300), st.integers(1, 200), st.integers(-3000, 3000), st.floats(1e-6, 10), st.floats(0.01, 100), st.booleans())
def test_thresholds_of_sums(most: int, mult: int, bias: int, scale: float, step: float, binary: bool) -> None:
    qp = grid("b1/pt" if binary else "t2/pt", 1.0 if binary else step)

    def code(d: torch.Tensor) -> torch.Tensor:
        return kernels.requantized(mult * d + bias, torch.tensor([scale]), qp)

    lo, hi = thresholds.of_sums(code, torch.tensor([-most]), torch.tensor([most]))
    d = torch.arange(-most, most + 1)
    found = torch.where(d >= hi, 1, torch.where(d <= lo, -1, 0))
    assert torch.equal(found.to(torch.int8), code(d))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.floats(1e-30, 1e30), st.booleans(), st.booleans())
def test_thresholds_of_floats(step: float, relu: bool, binary: bool) -> None:
    qp = grid("b1/pt" if binary else "t2/pt", 1.0 if binary else step)

    def code(v: torch.Tensor) -> torch.Tensor:
        return numerics.quantize(v.relu() if relu else v, qp)

    cut = thresholds.of_floats(code)
    half = torch.tensor([step * 0.5])
    near = torch.cat([half, -half, torch.nextafter(half, half * 2), torch.nextafter(-half, -half * 2), torch.nextafter(half, half * 0)])
    x = torch.cat([near, torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, 3.4e38, -3.4e38, math.nan]), torch.randn(50) * step])
    found = torch.where(x >= cut.hi, 1, -1 if binary else torch.where(x <= cut.lo, -1, 0))
    assert torch.equal(found.to(torch.int8)[~x.isnan()], code(x)[~x.isnan()])
    assert not (torch.tensor(math.nan) >= cut.hi) and not (torch.tensor(math.nan) <= cut.lo)


def test_thresholds_of_codes() -> None:
    assert thresholds.of_codes(torch.tensor([-1, -1, 0, 0, 1]), 3) == thresholds.Cut(4, 7)
    assert thresholds.of_codes(torch.tensor([-1, -1]), 0) == thresholds.Cut(1, 2) and thresholds.of_codes(torch.tensor([1, 1]), -5) == thresholds.Cut(-6, -5)
    assert thresholds.of_codes(torch.tensor([-1, 1, -1]), 0) is None


def test_least() -> None:
    low, high = torch.tensor([-5, 0, 2, -9]), torch.tensor([5, 10, 2, -9])
    assert thresholds.least(lambda d: d >= torch.tensor([0, 11, -3, -10]), low, high).tolist() == [0, 11, 2, -9]


# ---------------------------------------------------------------- what is no layer on bits


def test_why_a_layer_is_none_on_bits() -> None:
    x = torch.randn(2, 3, 9, 9)
    gm = low_bit(converted(Conv("b1/pt"), x), "binary")
    layer: Any = gm.get_submodule("b")
    b1 = grid("b1/pt")
    assert isinstance(layers.bit_layer(layer, b1), layers.BitLayer)
    assert "u8/pt" in str(layers.bit_layer(layer, grid("u8/pt", 0.1)))
    assert "float" in str(layers.bit_layer(layer.op, b1))
    layer.op.padding_mode = "reflect"
    assert "reflect" in str(layers.bit_layer(layer, b1))
    layer.op.padding_mode = "zeros"
    layer.bias_grid.scale = torch.full_like(layer.bias_grid.scale, 1e-12)
    assert "int32" in str(layers.bit_layer(layer, b1))
    low_bit(gm, "dorefa2")
    assert "4 values" in str(layers.bit_layer(layer, b1))
    assert set(LEVELS) >= {"binary", "ternary"}


def test_layers_of_sixteen_bit_outputs_are_none() -> None:
    gm = low_bit(converted(Conv("b1/pt"), torch.randn(2, 3, 9, 9)), "binary")
    found = layers.bit_layer(gm.get_submodule("b"), grid("b1/pt"))
    assert isinstance(found, layers.BitLayer)
    assert layers.epilogue(found, QParams(replace(grid("u8/pt").spec, bits=12), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))) is None
