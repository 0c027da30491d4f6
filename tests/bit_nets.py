"""Nets whose layers run on bits: strides, dilations, groups, odd channels, zero padding, pools, residual sums, linear layers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fxq
from fxq import schemes
from fxq.compiled import CompiledModel
from fxq.schemes import Scheme

SCHEMES: dict[str, Scheme] = {
    **{name: schemes.get(name) for name in ("xnor_w1a1", "bnn_w1a1", "twn_wta1", "tbn_w1at")},
    "twn_wtat": replace(schemes.get("tbn_w1at"), name="twn_wtat", weights="ternary", weight=schemes.get("twn_wta1").weight, scaled=True),
}
"""Binary and ternary weights with binary and ternary activations."""


class BitNet(nn.Module):
    """A float stem; convolutions of every shape, a pool, a shortcut over an odd number of channels; two linear layers."""

    def __init__(self, width: int = 13, classes: int = 5) -> None:
        super().__init__()
        w, even = width, 2 * width
        self.stem, self.bn = nn.Conv2d(3, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)
        self.a, self.bn_a = nn.Conv2d(w, even, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(even)
        self.pool = nn.MaxPool2d(2, 1, 1)
        self.b, self.bn_b = nn.Conv2d(even, even, 3, padding=2, dilation=2, groups=2, bias=False), nn.BatchNorm2d(even)
        self.c, self.bn_c = nn.Conv2d(even, even, 5, padding=(2, 1), bias=False), nn.BatchNorm2d(even)
        self.d, self.bn_d = nn.Conv2d(even, even, 1, padding=(0, 1), bias=False), nn.BatchNorm2d(even)
        self.fc1, self.bn_fc, self.fc2 = nn.Linear(even, 40, bias=False), nn.BatchNorm1d(40), nn.Linear(40, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = self.pool(torch.relu(self.bn_a(self.a(x))))
        x = torch.relu(self.bn_b(self.b(x)))
        x = torch.relu(x + self.bn_d(self.d(torch.relu(self.bn_c(self.c(x))))))
        out: Tensor = self.fc2(torch.relu(self.bn_fc(self.fc1(x.mean((2, 3))))))
        return out


class Wide(nn.Module):
    """A float stem, then two convolutions of 128 channels: for sizes."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.a, self.bn_a = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.bn_b = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.bn_b(self.b(torch.relu(self.bn_a(self.a(x))))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def batches(count: int = 2, size: int = 4, side: int = 12, seed: int = 0) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(seed)
    yield from (torch.randn(size, 3, side, side, generator=g) for _ in range(count))


def randomized(net: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms with statistics of their own and gammas of every sign, 0 too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for t, low, high in ((m.running_mean, -1.0, 1.0), (m.running_var, 0.5, 2.0), (m.weight, -1.5, 1.5), (m.bias, -0.5, 0.5)):
                    assert t is not None
                    t.copy_(torch.rand(t.shape, generator=g) * (high - low) + low)
                m.weight[0] = 0.0
    return net.eval()


def compiled(scheme: str = "xnor_w1a1", net: nn.Module | None = None, target: str = "onnxruntime", seed: int = 0, **options: Any) -> CompiledModel:
    torch.manual_seed(seed)
    net = randomized(BitNet() if net is None else net, seed)
    return fxq.compile(net, SCHEMES[scheme], calibration=list(batches()), target=target, progress=False, **options)
