"""Random small nets: compiled, lowered, run by ONNX Runtime and equal to the integer reference, element by element."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq

GRAPHS, PER_TEST = 200, 20
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Sigmoid, nn.Hardsigmoid, nn.Identity, lambda: nn.LeakyReLU(0.1), nn.Dropout,
)  # fmt: skip


class RandomNet(nn.Module):
    """A chain of random steps over a stack of feature maps; every step is a method name and what it needs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, tuple[int, ...]]] = []
        channels, size = 3, 16
        self._add("conv", self._conv(channels, 8))
        channels = 8
        for _ in range(self.rng.randint(3, 7)):
            channels, size = self._step(channels, size)
        self._add("head", nn.Linear(channels, self.rng.choice([1, 5, 10])))

    def _add(self, name: str, layer: nn.Module | None, *numbers: int) -> None:
        if layer is not None:
            self.layers.append(layer)
        self.steps.append((name, len(self.layers) - 1, numbers))

    def _conv(self, cin: int, cout: int) -> nn.Module:
        k, groups = self.rng.choice([1, 3, 3, 5]), self.rng.choice([1, 1, 2]) if cin % 2 == 0 else 1
        groups = cin if cin == cout and self.rng.random() < 0.3 else groups
        dilation = self.rng.choice([1, 1, 2])
        conv = nn.Conv2d(cin, cout, k, 1, dilation * (k // 2), dilation, groups, bias=self.rng.random() < 0.5)
        parts: list[nn.Module] = [conv]
        if self.rng.random() < 0.6:
            bn = nn.BatchNorm2d(cout)
            for b, (lo, hi) in ((bn.running_mean, (-0.3, 0.3)), (bn.running_var, (0.3, 2.0)), (bn.weight, (-1.5, 1.5)), (bn.bias, (-0.5, 0.5))):
                nn.init.uniform_(b, lo, hi)
            parts.append(bn)
        return nn.Sequential(*parts, self.rng.choice(ACTIVATIONS)())

    def _step(self, c: int, size: int) -> tuple[int, int]:
        kind = self.rng.choice(["conv", "conv", "residual", "concat", "gate", "max", "avg", "pad", "split", "shuffle", "strided", "up", "bn"])
        if kind == "conv":
            cout = self.rng.choice([4, 8, 12])
            self._add("conv", self._conv(c, cout))
            return cout, size
        if kind in ("residual", "concat"):
            self._add(kind, self._conv(c, c))
            return (2 * c if kind == "concat" else c), size
        if kind == "gate":
            self._add("gate", nn.Conv2d(c, c, 1))
        elif kind in ("max", "avg") and size >= 4:
            self._add(kind, None)
            return c, size // 2
        elif kind == "pad":
            self._add("pad", nn.Conv2d(c, c, 3))
        elif kind in ("split", "shuffle") and c % 2 == 0:
            self._add(kind, nn.Conv2d(c, c, 1))
        elif kind == "strided" and size >= 4:
            self._add("strided", nn.Conv2d(c, c, 1))
            return c, size // 2
        elif kind == "up" and size <= 16:
            self._add("up", nn.Conv2d(c, c, 1))
            return c, size * 2
        elif kind == "bn":
            self._add("bn", nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 1)))
        return c, size

    def forward(self, x: Tensor) -> Tensor:
        for name, i, _ in self.steps:
            layer = self.layers[i]
            if name in ("conv", "bn"):
                x = layer(x)
            elif name == "residual":
                x = F.relu(x + layer(x))
            elif name == "concat":
                x = torch.cat([x, layer(x)], 1)
            elif name == "gate":
                x = x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))
            elif name == "max":
                x = F.max_pool2d(x, 3, 2, 1)
            elif name == "avg":
                x = F.avg_pool2d(x, 2)
            elif name == "pad":
                x = F.relu(layer(F.pad(x, (1, 1, 0, 2))))
            elif name == "split":
                a, b = x.chunk(2, 1)
                x = layer(torch.cat([b, a], 1))
            elif name == "shuffle":
                n, c, h, w = x.shape
                x = layer(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))
            elif name == "strided":
                x = layer(x[:, :, ::2, ::2])
            elif name == "up":
                x = layer(F.interpolate(x, scale_factor=2, mode="nearest"))
            else:
                x = layer(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return x


@pytest.mark.parametrize("first", range(0, GRAPHS, PER_TEST))
def test_random_graphs_equal_the_reference(first: int) -> None:
    compared = 0
    for seed in range(first, first + PER_TEST):
        torch.manual_seed(seed)
        net = RandomNet(seed).eval()
        data = torch.randn(4, 3, 16, 16)
        scheme = ("iao_w8a8", "iao_w8a8", "iao_w8a8_pt", "iao_w8a8_asymw")[seed % 4]
        m = fxq.compile(net, scheme, calibration=[data])
        proof = m.verify(m.lower().data, [torch.randn(3, 3, 16, 16)])
        assert proof.ok, f"seed {seed}, {scheme}: {proof}"
        compared += proof.nodes
    assert compared > 5 * PER_TEST
