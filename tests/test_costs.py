"""Multiply-accumulates, parameters and bytes of layers: by hand, and against the numbers that torchvision publishes."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq import schemes, targets
from fxq.costs import LayerCost, layer_costs, total
from fxq.graph import kind
from fxq.modules import Add, MatMul, Permute
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.pipeline import PassContext, Pipeline
from fxq.snapshot import History, take
from tests.helpers import canonical


def traced(net: nn.Module, x: Tensor) -> GraphModule:
    gm = fxq.capture(net.eval(), (x,)).gm
    assert gm is not None
    ctx = PassContext(schemes.get("float"), targets.get("onnxruntime"), (x,))
    Pipeline((Canonicalize(), PropagateShapes())).run(gm, ctx, History([take(gm, "trace")]))
    return gm


class Layers(nn.Module):
    """One of each kind that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2), nn.BatchNorm2d(6), nn.PReLU(6)
        self.up, self.norm, self.opaque = nn.ConvTranspose2d(6, 8, 2, 2, groups=2, bias=False), nn.GroupNorm(2, 8), nn.Bilinear(4, 4, 2)
        self.linear, self.permute, self.product, self.add = nn.Linear(10, 3), Permute((0, 1, 3, 2)), MatMul(), Add()
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.act(self.bn(self.conv(x)))))
        x = self.add(self.linear(x), self.bias)
        return self.product(x, self.permute(x))


EXPECTED = [
    LayerCost("conv", "conv", 4, 6, 2, 6 * 7 * 5 * 2 * 3, 42, 168),
    LayerCost("bn", "batch_norm", 6, 6, 1, 0, 12, 48),
    LayerCost("act", "prelu", 6, 6, 1, 0, 6, 24),
    LayerCost("up", "conv_transpose", 6, 8, 2, 6 * 7 * 5 * 4 * 4, 96, 384),
    LayerCost("norm", "group_norm", 8, 8, 1, 0, 16, 64),
    LayerCost("linear", "linear", 10, 3, 1, 8 * 14 * 3 * 10, 33, 132),
    LayerCost("bias", "attr", 3, 3, 1, 0, 3, 12),
    LayerCost("product", "matmul", 3, 14, 1, 8 * 14 * 14 * 3, 0, 0),
]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_costs_by_hand_of_one_sample(batch: int) -> None:
    costs = layer_costs(canonical(Layers(), torch.zeros(batch, 4, 7, 5)))
    assert sorted(costs, key=str) == sorted(EXPECTED, key=str)
    assert [c.path for c in costs if c.kind != "attr"] == [c.path for c in EXPECTED if c.kind != "attr"]
    assert total(costs) == LayerCost("total", "", 0, 0, 1, sum(c.macs for c in EXPECTED), 208, 832)


def test_bits_of_each_node() -> None:
    gm = canonical(Layers(), torch.zeros(2, 4, 7, 5))
    costs = {c.path: c.bytes for c in layer_costs(gm, lambda n: 3 if kind(gm, n) == "conv" else 8)}
    assert costs == {"conv": 16, "bn": 12, "act": 6, "up": 96, "norm": 16, "linear": 33, "bias": 3, "product": 0}


class Twice(nn.Module):
    """One layer at two places, an opaque layer, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv1d(4, 4, 1), nn.GRU(4, 4)
        self.register_buffer("constant", torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn((self.conv(self.conv(x)) + self.constant).transpose(1, 2))[0]
        return out


def test_a_shared_parameter_counts_once_and_an_opaque_layer_without_macs() -> None:
    costs = layer_costs(traced(Twice(), torch.zeros(2, 4, 9)))
    assert [(c.kind, c.macs, c.parameters) for c in costs] == [("conv", 144, 20), ("conv", 144, 0), ("opaque", 0, 120)]


def test_a_quantized_net_costs_as_many_macs() -> None:
    x = torch.randn(4, 3, 16, 16)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
    quantized = layer_costs(fxq.compile(net, "iao_w8a8", calibration=[x]).graph_module)
    assert [(c.kind, c.macs, c.parameters) for c in quantized] == [(c.kind, c.macs, c.parameters) for c in layer_costs(traced(net, x))]


NETS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "regnet_x_400mf", "shufflenet_v2_x1_0", "densenet121", "swin_t", "vit_b_32")
EXPANDED = {"vit_b_32": 49 * 768, "swin_t": sum((49 * 49 - 169) * heads * blocks for heads, blocks in ((3, 2), (6, 2), (12, 6), (24, 2)))}
"""Parameters that the canonical graph holds more: the class token in a whole sequence, position tables with one entry per pair."""


@pytest.mark.parametrize("name", NETS)
def test_published_numbers(name: str, no_init: None) -> None:
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    costs = total(layer_costs(traced(torchvision.models.get_model(name), torch.zeros(1, 3, 224, 224))))
    assert costs.macs / 1e9 == pytest.approx(published["_ops"], rel=0.004)
    assert costs.parameters == published["num_params"] + EXPANDED.get(name, 0)
    assert costs.bytes == 4 * costs.parameters


@pytest.fixture
def no_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros as weights, which cost no time; their values do not matter here."""
    fill: Callable[..., Tensor] = lambda t, *a, **k: t.data.zero_()  # noqa: E731
    for name in ("trunc_normal_", "normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_", "uniform_"):
        monkeypatch.setattr(nn.init, name, fill)
