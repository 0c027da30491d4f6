"""The nets of the examples and benchmarks: small functions that return a ``torch.nn.Module`` with fresh weights.

On the command line: ``fxq-lower fxq.zoo:nin_gc --input 1,3,32,32 ...``. :func:`build` also loads weights. ``import fxq`` does not import
this package, and only :func:`squeezenet1_0_caffe` imports torchvision.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from fxq.errors import InputError, nearest
from fxq.sources import load_weights
from fxq.zoo.cifar_resnet import CifarResNet, resnet20, resnet32, resnet44
from fxq.zoo.ds_cnn import DsCnn, ds_cnn
from fxq.zoo.efficientnet_lite import EfficientNetLite0, efficientnet_lite0
from fxq.zoo.nin import NIN, NINGroupConv, nin, nin_gc
from fxq.zoo.squeezenet import squeezenet1_0_caffe
from fxq.zoo.tiny_resnet import TinyResNet8, tiny_resnet8

NETS: dict[str, Callable[[], nn.Module]] = {
    "nin": nin,
    "nin_gc": nin_gc,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "tiny_resnet8": tiny_resnet8,
    "ds_cnn": ds_cnn,
    "efficientnet_lite0": efficientnet_lite0,
    "squeezenet1_0_caffe": squeezenet1_0_caffe,
}

INPUTS: dict[str, tuple[int, int, int]] = {
    **dict.fromkeys(NETS, (3, 32, 32)),
    "ds_cnn": (1, 49, 10),
    "efficientnet_lite0": (3, 224, 224),
    "squeezenet1_0_caffe": (3, 227, 227),
}
"""Sizes ``(channels, height, width)`` of one input of each net."""

__all__ = [
    "INPUTS", "NETS", "NIN", "CifarResNet", "DsCnn", "EfficientNetLite0", "NINGroupConv", "TinyResNet8", "build", "ds_cnn", "efficientnet_lite0",
    "nin", "nin_gc", "resnet20", "resnet32", "resnet44", "squeezenet1_0_caffe", "tiny_resnet8",
]  # fmt: skip


def build(name: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """A net by name, in eval mode.

    Args:
        name: one of :data:`NETS`.
        weights: ``.safetensors`` or torch state dict, loaded strictly; ``None`` leaves fresh weights (seed torch for repeatable ones).

    Raises:
        InputError: for an unknown name (the nearest one is offered), or a weight file that is not there or does not fit.
    """
    if name not in NETS:
        raise InputError(f"the zoo has no net {name!r}", way_out=nearest(name, NETS))
    net = NETS[name]()
    if weights is not None:
        load_weights(net, Path(weights))
    return net.eval()
