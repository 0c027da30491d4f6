"""TensorFlow's SAME padding, for the nets whose weights were trained with it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


class SameConv2d(nn.Conv2d):
    """``Conv2d`` with SAME padding for a fixed input size: the output is ``ceil(size / stride)``, the odd pixel goes to the bottom and the right.

    Args:
        cin, cout, kernel, stride, groups, bias: as in ``nn.Conv2d``.
        size: input height and width. Symmetric padding stays inside the convolution, asymmetric padding is an explicit ``F.pad``.
    """

    def __init__(self, cin: int, cout: int, kernel: Size, stride: int, size: Size, *, groups: int = 1, bias: bool = False) -> None:
        total = [max((-(-s // stride) - 1) * stride + k - s, 0) for s, k in zip(size, kernel, strict=True)]
        even = all(t % 2 == 0 for t in total)
        super().__init__(cin, cout, kernel, stride, (total[0] // 2, total[1] // 2) if even else 0, groups=groups, bias=bias)
        top, left = total[0] // 2, total[1] // 2
        self.extra = None if even else (left, total[1] - left, top, total[0] - top)

    def forward(self, input: Tensor) -> Tensor:
        """``[N, cin, H, W] -> [N, cout, ceil(H / stride), ceil(W / stride)]``."""
        return super().forward(input if self.extra is None else F.pad(input, self.extra))
