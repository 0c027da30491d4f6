"""SqueezeNet 1.0 as its Caffe original: Iandola et al. 2016 (arXiv 1602.07360)."""

from __future__ import annotations

from torch import nn


def squeezenet1_0_caffe() -> nn.Module:
    """torchvision's SqueezeNet 1.0 whose last 1x1 convolution is padded by 1, as in the original weight file; ``[N, 3, 227, 227]`` BGR minus the mean."""
    from torchvision.models import squeezenet1_0

    net: nn.Module = squeezenet1_0(weights=None)
    head = net.get_submodule("classifier.1")
    assert isinstance(head, nn.Conv2d)
    head.padding = (1, 1)
    return net
