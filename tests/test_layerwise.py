"""Patches and the two sides of a converted graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import fxq
from fxq.convolutions import padded
from fxq.layerwise import Pair, Sides, channel_mean, patches

LAYERS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 4, 3, groups=4, padding=1),
    nn.Conv1d(4, 5, 3, padding=2),
    nn.Conv3d(4, 2, 2),
    padded(nn.Conv2d(4, 3, 3), (0, 1, 1, 0)),
    nn.Linear(7, 3),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_patches_times_weights_are_the_layers_output(layer: Any) -> None:
    torch.manual_seed(0)
    rank = layer.weight.ndim - 2
    x = torch.randn(2, 5, 7) if isinstance(layer, nn.Linear) else torch.randn(2, 4, *[7, 6, 5][:rank])
    with torch.no_grad():
        p = patches(layer, x)
        rows = layer.weight.reshape(p.shape[0], -1, p.shape[2])
        got = (p @ rows.transpose(1, 2)).transpose(0, 1).flatten(1)  # [M, C]
        want = layer(x) - (layer.bias if isinstance(layer, nn.Linear) else layer.bias.reshape(-1, *[1] * rank))
    want = want.reshape(-1, 3) if isinstance(layer, nn.Linear) else want.movedim(1, -1).flatten(0, -2)
    assert torch.allclose(got, want, atol=1e-5)


def test_channel_mean() -> None:
    y = torch.arange(24.0).reshape(2, 3, 4)
    assert channel_mean(nn.Conv1d(1, 3, 1), y).tolist() == [7.5, 11.5, 15.5]
    assert channel_mean(nn.Linear(1, 4), y).tolist() == [10.0, 11.0, 12.0, 13.0]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.a(x))
        x = x + nn.functional.relu(self.b(x))
        return self.c(x.mean((2, 3)))


def test_both_sides_are_the_float_model_and_the_simulator() -> None:
    torch.manual_seed(0)
    model, data = Two().eval(), torch.randn(8, 3, 6, 6)
    m = fxq.compile(model, "iao_w8a8", calibration=data)
    seen: dict[str, list[Pair]] = {}

    def after(node: Node, outputs: list[Pair]) -> bool:
        seen[str(node.target)] = outputs
        return False

    Sides(m.graph_module, [(data[:5],), (data[5:],)], after=after).sweep()
    assert list(seen) == ["a", "b", "c"] and [len(f) for f, _ in seen["c"]] == [5, 3]
    with torch.no_grad():
        assert torch.allclose(torch.cat([f for f, _ in seen["c"]]), model(data), atol=1e-5)
        assert torch.equal(torch.cat([q for _, q in seen["c"]]), m(data))
