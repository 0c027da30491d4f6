"""Keyword spotting with depthwise-separable convolutions: Zhang et al. 2017 (arXiv 1711.07128), as in MLPerf Tiny (arXiv 2106.07597)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fxq.zoo.same import SameConv2d

CHANNELS = 64
EPS = 1e-3


class SeparableBlock(nn.Module):
    """Depthwise 3x3, batch norm, ReLU, pointwise, batch norm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels), nn.BatchNorm2d(channels, eps=EPS)
        self.pw, self.bn2 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, H, W]``."""
        x = F.relu(self.bn1(self.dw(x)))
        return F.relu(self.bn2(self.pw(x)))


class DsCnn(nn.Module):
    """A 10x4 convolution with stride 2 and four separable blocks over 49 frames of 10 coefficients: 23,756 parameters."""

    def __init__(self, classes: int = 12) -> None:
        super().__init__()
        self.stem, self.stem_bn = SameConv2d(1, CHANNELS, (10, 4), 2, (49, 10), bias=True), nn.BatchNorm2d(CHANNELS, eps=EPS)
        self.blocks = nn.Sequential(*(SeparableBlock(CHANNELS) for _ in range(4)))
        self.fc = nn.Linear(CHANNELS, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 49, 10]`` float32 -> logits ``[N, classes]``."""
        x = self.blocks(F.relu(self.stem_bn(self.stem(x))))
        logits: Tensor = self.fc(F.avg_pool2d(x, (25, 5)).flatten(1))
        return logits


def ds_cnn() -> DsCnn:
    """MLPerf Tiny's keyword spotting net for twelve classes."""
    return DsCnn()
