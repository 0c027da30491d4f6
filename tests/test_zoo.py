"""The nets of the zoo: their sizes, their padding, and each from float to a proven file."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import zoo
from fxq.backends.onnxruntime import session
from fxq.errors import InputError
from fxq.zoo.efficientnet_lite import EfficientNetLite0
from fxq.zoo.nin import Block
from fxq.zoo.same import SameConv2d

PARAMETERS = {
    "nin": 969_822, "nin_gc": 591_390, "resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "tiny_resnet8": 78_186, "ds_cnn": 23_756,
    "efficientnet_lite0": 4_652_008, "squeezenet1_0_caffe": 1_248_424,
}  # fmt: skip
PRETRAINED = {
    "cifar10_resnet20": "resnet20", "cifar10_resnet32": "resnet32", "cifar10_resnet44": "resnet44", "cifar10_tiny_resnet8": "tiny_resnet8",
    "kws_dscnn": "ds_cnn", "imagenet_squeezenet1_0_dc": "squeezenet1_0_caffe",
}  # fmt: skip


def randomised(net: nn.Module) -> nn.Module:
    """Seeded statistics: a fresh batch norm is nearly the identity and would prove nothing."""
    g = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, lo, hi in ((m.running_mean, -0.2, 0.2), (m.running_var, 0.5, 1.5), (m.weight, 0.7, 1.3), (m.bias, -0.2, 0.3)):
                assert t is not None
                t.data.uniform_(lo, hi, generator=g)
    return net.eval()


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A net with seeded weights and inputs; the ImageNet nets at a size that suits a test."""
    torch.manual_seed(0)
    size = {"efficientnet_lite0": 64, "squeezenet1_0_caffe": 67}.get(name)
    net = EfficientNetLite0(64) if name == "efficientnet_lite0" else zoo.build(name)
    c, h, w = zoo.INPUTS[name]
    return randomised(net), torch.randn(4, c, size or h, size or w, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", zoo.NETS)
def test_compiles_lowers_and_verifies(name: str) -> None:
    net, x = made(name)
    m = fxq.compile(net, "iao_w8a8", calibration=x)
    proof = m.verify(m.lower().data, x[:2])
    assert proof.ok and proof.differ == 0 and proof.hidden_differ == 0
    assert proof.nodes == proof.planned > 8 and proof.elements == 2 * net(x[:1]).numel()
    assert {op.kind for op in m.float_ops} <= {"reshape"}  # the flatten of a last pool computes nothing
    with torch.inference_mode():
        want, got = net(x), m(x)
    assert float((want - got).norm() / want.norm()) < 0.2


@pytest.mark.parametrize("name", zoo.NETS)
def test_has_the_stated_parameters_and_input(name: str) -> None:
    net = zoo.build(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    with torch.inference_mode():
        assert net(torch.zeros(1, *zoo.INPUTS[name])).shape[0] == 1


@pytest.mark.parametrize("name", zoo.NETS)
def test_everything_runs_in_integers(name: str) -> None:
    """The shuffles of nin_gc stand between grouped convolutions, where no order of weights can replace them: they move codes."""
    net, x = made(name)
    report = fxq.compile(net, "iao_w8a8", calibration=x).lint()
    convs = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert report.counts()["Conv"] == (convs, 0) and [o for o in report.ops if o.runs == "float"] == []
    assert report.q_left == 1 and report.dq_left <= 1


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 8), (3, 2, 8), (3, 2, 7), (5, 2, 9), (1, 2, 6), ((10, 4), 2, (49, 10))])
def test_same_padding_is_tensorflows(kernel: int | tuple[int, int], stride: int, size: int | tuple[int, int]) -> None:
    k, s = ((v, v) if isinstance(v, int) else v for v in (kernel, size))
    conv = SameConv2d(2, 3, k, stride, s)
    x = torch.randn(1, 2, *s, generator=torch.Generator().manual_seed(0))
    pads = [max((-(-n // stride) - 1) * stride + m - n, 0) for n, m in zip(s, k, strict=True)]
    full = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
    assert torch.allclose(conv(x), F.conv2d(full, conv.weight, stride=stride), atol=1e-6)
    assert conv(x).shape[2:] == tuple(-(-n // stride) for n in s)


def test_shuffle_deals_channels_like_cards() -> None:
    block = Block(6, 6, 1, shuffle=2)
    block.bn, block.relu = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        block.conv.weight.copy_(torch.eye(6)[:, :, None, None])
        block.conv.bias.zero_()
        assert block(torch.arange(6.0).view(1, 6, 1, 1)).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_says_which_nets_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'resnet"):
        zoo.build("resnet21")
    torch.save(zoo.resnet32().state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="belong to another model"):
        zoo.build("resnet20", tmp_path / "w.pth")


@pytest.mark.data
@pytest.mark.parametrize("file", PRETRAINED)
def test_pretrained_weights_fit(file: str, data: Path, loader: Callable[[str], ModuleType]) -> None:
    net = zoo.build(PRETRAINED[file], data / "models" / f"{file}.safetensors")
    x = torch.randn(2, *zoo.INPUTS[PRETRAINED[file]], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(net(x), loader("models/zoo.py").build(file)(x))


def resnet20_on_cifar10(data: Path, loader: Callable[[str], ModuleType]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The trained net, 128 training images, 1,000 test images and their labels."""
    net, images = zoo.build("resnet20", data / "models" / "cifar10_resnet20.safetensors"), loader("cifar10/load_cifar10.py")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    (train, _), (test, labels) = images.load("train", [0]), images.load("test")
    calibration, x = (((torch.from_numpy(a).permute(0, 3, 1, 2) / 255 - mean) / std).contiguous() for a in (train[:128], test[:1000]))
    return net, calibration, x, torch.from_numpy(labels[:1000]).long()


@pytest.mark.data
def test_accuracy_of_resnet20_for_tensorrt(data: Path, loader: Callable[[str], ModuleType]) -> None:
    """The file for TensorRT, as it is written, within two images of the simulator; both within 0.5 points of float; every code the simulator's."""
    net, calibration, x, y = resnet20_on_cifar10(data, loader)
    m = fxq.compile(net, "int8", calibration=calibration.split(32), target="sm86", progress=False)
    artifact = m.lower()
    runtime = torch.from_numpy(session(artifact.data, "off").run(None, {"x": x.numpy()})[0])
    with torch.inference_mode():
        top1 = [float((logits.argmax(1) == y).double().mean()) * 100 for logits in (net(x), m(x), runtime)]
    assert top1[0] > 90 and abs(top1[1] - top1[2]) <= 0.2 + 1e-9 and abs(top1[0] - top1[2]) <= 0.5
    assert m.verify(artifact, x[:64]).ok


@pytest.mark.data
def test_accuracy_of_resnet20_on_cifar10(data: Path, loader: Callable[[str], ModuleType]) -> None:
    """1,000 test images, the first 128 training images for calibration: within 0.5 points of float, and the runtime gives the reference's logits."""
    net, calibration, x, y = resnet20_on_cifar10(data, loader)
    m = fxq.compile(net, "iao_w8a8", calibration=calibration.split(32))
    runtime = torch.from_numpy(session(m.lower().data).run(None, {"x": x.numpy()})[0])
    with torch.inference_mode():
        top1 = [float((logits.argmax(1) == y).double().mean()) * 100 for logits in (net(x), runtime)]
        assert torch.equal(m.reference(x), runtime)
    assert top1[0] > 90 and abs(top1[0] - top1[1]) <= 0.5
