"""Masked = cut in float64 on torchvision's families and fxq's own nets, and the cut nets in integers."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision

import fxq
from fxq import pruning, zoo
from fxq.graph import finish
from fxq.snapshot import distance
from tests.pruning_nets import canonical

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common

SIZES = {"inception_v3": 80, "vit_b_32": 224, "nin_gc": 32, "resnet20": 32, "deeplabv3_mobilenet_v3_large": 64}
NETS = (
    "resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "regnet_y_400mf", "googlenet",
    "inception_v3", "squeezenet1_1", "mnasnet0_5", "swin_t", "swin_v2_t", "convnext_tiny", "vit_b_32", "deeplabv3_mobilenet_v3_large", "nin_gc", "resnet20",
)  # fmt: skip
INT8 = ("shufflenet_v2_x0_5", "mobilenet_v3_small", "regnet_y_400mf", "densenet121", "nin_gc", "deeplabv3_mobilenet_v3_large")


def build(name):
    torch.manual_seed(0)
    return common.randomise(zoo.build(name)) if name in ("nin_gc", "resnet20") else common.torchvision_net(name)


def sample(name, seed=0):
    size = SIZES.get(name, 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETS)
def test_masked_equals_cut(name):
    gm = canonical(build(name), sample(name))
    ratio, multiple = (0.5, 8) if NETS.index(name) % 2 else (0.3, 1)
    plan = pruning.plan(gm, pruning.Prune(ratio=ratio, multiple_of=multiple, by="random" if NETS.index(name) % 3 else "l2"), multiple)
    masked = plan.masked()
    pruning.apply(plan)
    finish(gm)
    x = sample(name, 1).double()
    with torch.no_grad():
        assert distance(masked(x), gm(x)) < 1e-10
    assert plan.share < 0.9
    for group, kept in zip(plan.groups.groups, plan.kept, strict=True):
        width = group.givers[0][1]
        assert int(kept.sum()) * width % multiple == 0 or bool(kept.all())


@pytest.mark.parametrize("name", INT8)
def test_cut_nets_run_in_integers(name):
    data = [sample(name, s) for s in range(2)]
    m = fxq.compile(build(name), calibration=data, prune=fxq.Prune(ratio=0.3, multiple_of=1, by="random"), progress=False)
    assert m.verify(m.lower(), data[:1]).ok
    whole = fxq.compile(build(name), calibration=data, progress=False)
    assert len(m.float_ops) == len(whole.float_ops)


def test_all_families_are_here():
    """A family that torchvision adds must be added above."""
    first = {n.split("_")[0].rstrip("0123456789") for n in NETS if n not in ("nin_gc", "resnet20")}
    known = first | {"alexnet", "vgg", "wide", "maxvit"}
    assert {n.split("_")[0].rstrip("0123456789") for n in torchvision.models.list_models(module=torchvision.models)} <= known
