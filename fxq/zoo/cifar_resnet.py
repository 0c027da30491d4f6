"""CIFAR-10 ResNets with parameter-free shortcuts: He et al. 2015 (arXiv 1512.03385), section 4.2, option A; depth ``6 n + 2``.

The state dict has the layout of the widely used pretrained nets (``conv1``, ``bn1``, ``layer1.0.conv1`` ... ``linear``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the block strides, the shortcut takes every second pixel and pads channels with zeros on both sides."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.grow = (cout - cin) // 2

    def forward(self, x: Tensor) -> Tensor:
        """``[N, cin, H, W] -> [N, cout, H / stride, W / stride]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow, self.grow))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """Stem of 16 channels, three stages of ``blocks`` blocks with 16, 32 and 64 channels, average pool, linear layer.

    Args:
        blocks: per stage; 3, 5, 7 give ResNet-20, 32, 44.
        classes: number of logits.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` float32 -> logits ``[N, classes]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(cin: int, cout: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(cin, cout, stride), *(BasicBlock(cout, cout, 1) for _ in range(blocks - 1)))


def resnet20() -> CifarResNet:
    """ResNet-20: 269,722 parameters."""
    return CifarResNet(3)


def resnet32() -> CifarResNet:
    """ResNet-32: 464,154 parameters."""
    return CifarResNet(5)


def resnet44() -> CifarResNet:
    """ResNet-44: 658,586 parameters."""
    return CifarResNet(7)
