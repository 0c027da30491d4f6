"""The image classification net of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597), with the padding of its TensorFlow weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fxq.zoo.same import SameConv2d

WIDTHS = (16, 32, 64)
EPS = 1e-3


class Stage(nn.Module):
    """One residual block; the shortcut of a strided block is a 1x1 convolution with a bias and without batch norm."""

    def __init__(self, cin: int, cout: int, stride: int, size: int) -> None:
        super().__init__()
        inner = -(-size // stride)
        self.conv1, self.bn1 = SameConv2d(cin, cout, (3, 3), stride, (size, size), bias=True), nn.BatchNorm2d(cout, eps=EPS)
        self.conv2, self.bn2 = SameConv2d(cout, cout, (3, 3), 1, (inner, inner), bias=True), nn.BatchNorm2d(cout, eps=EPS)
        self.short = SameConv2d(cin, cout, (1, 1), stride, (size, size), bias=True) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """``[N, cin, H, W] -> [N, cout, H / stride, W / stride]``."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu((x if self.short is None else self.short(x)) + y)


class TinyResNet8(nn.Module):
    """Stem and three residual blocks on 32x32 images: 78,186 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.stem_bn = SameConv2d(3, WIDTHS[0], (3, 3), 1, (32, 32), bias=True), nn.BatchNorm2d(WIDTHS[0], eps=EPS)
        self.stages = nn.Sequential(Stage(16, 16, 1, 32), Stage(16, 32, 2, 32), Stage(32, 64, 2, 16))
        self.fc = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` float32 (0 to 255, as the weights were trained) -> logits ``[N, classes]``."""
        x = self.stages(F.relu(self.stem_bn(self.stem(x))))
        logits: Tensor = self.fc(F.avg_pool2d(x, 8).flatten(1))
        return logits


def tiny_resnet8() -> TinyResNet8:
    """MLPerf Tiny's ResNet-8 for ten classes."""
    return TinyResNet8()
