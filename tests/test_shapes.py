"""Shapes that are computed without running a layer are those that the layer gives."""

import itertools

import pytest
import torch
from torch import nn

from fxq.shapes import _layer_sizes


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sizes_of_convolutions_are_those_of_torch(k):
    conv, seen = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[k - 1], 0
    for width, stride, padding, dilation, size in itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2), (5, 8)):
        layer = conv(4, 6, width, stride, padding, dilation, groups=2)
        for x in (torch.empty(2, 4, *[size] * k), torch.empty(4, *range(size, size + k))):
            assert _layer_sizes(layer, x) == tuple(layer(x).shape)
            seen += 1
    assert seen == 216


def test_sizes_of_linear_layers():
    layer = nn.Linear(3, 5)
    for shape in ((3,), (2, 3), (2, 0, 3), (2, 4, 4, 3)):
        assert _layer_sizes(layer, torch.empty(shape)) == tuple(layer(torch.empty(shape)).shape)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(3, 4, 3, padding="same"), torch.empty(1, 3, 5, 5)),
        (nn.Conv2d(3, 4, 3, padding_mode="circular", padding=1), torch.empty(1, 3, 5, 5)),
        (nn.Conv2d(3, 4, 7), torch.empty(1, 3, 5, 5)),
        (nn.Conv2d(3, 4, 3), torch.empty(1, 2, 5, 5)),
        (nn.Conv2d(3, 4, 3), torch.empty(1, 3, 5, 5, dtype=torch.float64)),
        (nn.Linear(3, 4), torch.empty(2, 4)),
        (nn.ConvTranspose2d(3, 4, 3), torch.empty(1, 3, 5, 5)),
    ],
)
def test_everything_else_is_run(layer, x):
    assert _layer_sizes(layer, x) is None
