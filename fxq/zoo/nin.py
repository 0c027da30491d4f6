"""Network in Network for CIFAR-10 (Lin et al. 2013, arXiv 1312.4400), and its grouped form with channel shuffles (Zhang et al. 2017, arXiv 1707.01083).

Both in the variant of the low-bit literature: every convolution has a bias, a batch norm and a ReLU, the last one too. Weights are counted without
biases and batch norms, multiply-accumulates (MAC) for one image; ``benchmarks/bench_size.py`` counts both in the lowered file.
"""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """Channel shuffle of the input (if ``shuffle`` > 1), convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, cin: int, cout: int, kernel: int, groups: int = 1, shuffle: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(cout)
        self.relu, self.shuffle = nn.ReLU(), shuffle

    def forward(self, x: Tensor) -> Tensor:
        """``[N, cin, H, W] -> [N, cout, H, W]``."""
        if self.shuffle > 1:
            n, c, h, w = x.shape
            x = x.view(n, self.shuffle, c // self.shuffle, h, w).transpose(1, 2).reshape(n, c, h, w)
        y: Tensor = self.relu(self.bn(self.conv(x)))
        return y


class NIN(nn.Module):
    """Nine convolutions, two overlapping max pools, average pool: 965,568 weights, 1,418 biases, 222.49 million MAC.

    Args:
        classes: outputs.
        second: kernel of the fourth convolution. With 3 there are 670,656 weights and 147 million MAC.
    """

    def __init__(self, classes: int = 10, second: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Block(3, 192, 5), Block(192, 160, 1), Block(160, 96, 1), nn.MaxPool2d(3, 2, 1),
            Block(96, 192, second), Block(192, 192, 1), Block(192, 192, 1), nn.MaxPool2d(3, 2, 1),
            Block(192, 192, 3), Block(192, 192, 1), Block(192, classes, 1), nn.AvgPool2d(8),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` float32 -> ``[N, classes]``, not negative (a ReLU stands last)."""
        return self.features(x).flatten(1)  # type: ignore[no-any-return]


class NINGroupConv(nn.Module):
    """NIN of grouped convolutions with a channel shuffle before each that follows another one: 578,304 weights, 4,362 biases, 157.68 million MAC."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Block(3, 256, 5), Block(256, 256, 1, 2), Block(256, 256, 1, 2, 2), nn.MaxPool2d(2),
            Block(256, 512, 3, 16, 2), Block(512, 512, 1, 4, 16), Block(512, 512, 1, 4, 4), nn.MaxPool2d(2),
            Block(512, 1024, 3, 32, 4), Block(1024, 1024, 1, 8, 32), Block(1024, classes, 1), nn.AvgPool2d(8),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` float32 -> ``[N, classes]``, not negative (a ReLU stands last)."""
        return self.features(x).flatten(1)  # type: ignore[no-any-return]


def nin(second: int = 5) -> NIN:
    """NIN for ten classes; ``second``: kernel of the fourth convolution, see :class:`NIN`."""
    return NIN(second=second)


def nin_gc() -> NINGroupConv:
    """NIN_GC for ten classes."""
    return NINGroupConv()
