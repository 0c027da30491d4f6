"""The whole street: compile, lower, run in ONNX Runtime, equal to the integer reference, all in integers."""

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxq
from fxq.backends.onnxruntime import session
from fxq.errors import ArtifactError, CalibrationError, SchemeError, TargetError, TraceError


class Small(nn.Module):
    """Residual add, concat, pools, shared module, functionals, hard-swish, squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.act = nn.Hardswish()
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(F.pad(x, (0, 1, 0, 1)))))
        y = self.act(self.a(x))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        x = F.relu(x + self.b(y))
        x = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    m = Small()
    with torch.no_grad():
        for b in (m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias):
            b.uniform_(0.2, 1.0)
    return m.eval()


def data() -> torch.Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def fused(raw: bytes, folder: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "o.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "o.onnx").graph.node)


@pytest.mark.parametrize("scheme", ["iao_w8a8", "iao_w8a8_pt", "iao_w8a8_asymw", "iao_w4a8"])
def test_artifact_equals_reference(scheme: str, tmp_path: Path) -> None:
    m = fxq.compile(model(), scheme, calibration=data())
    path = m.lower("onnx-qdq").save(tmp_path / "m.onnx")
    proof = m.verify(path, data()[:7])
    assert proof.ok and proof.elements == 35 and proof.nodes > 10, str(proof)


def test_everything_runs_in_integers(tmp_path: Path) -> None:
    m = fxq.compile(model(), calibration=data())
    ops = fused(m.lower().data, tmp_path)
    assert m.float_ops == []
    assert not {"Conv", "Gemm", "Relu", "Add", "Mul", "Sigmoid", "DequantizeLinear"} & set(ops)
    assert ops["QuantizeLinear"] == 1 and ops["QGemm"] == 1 and ops["QLinearConv"] == 5


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvision_nets_equal_the_reference(name: str) -> None:
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(3, 3, 64, 64)
    m = fxq.compile(net, calibration=[x])
    proof = m.verify(m.lower().data, [x[:2] * 0.9])
    assert proof.ok and proof.nodes > 20, str(proof)


def test_simulator_is_close_differentiable_and_leaves_the_model_alone() -> None:
    net = model().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    m = fxq.compile(net, calibration=data())
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    want = net.eval()(data())
    got = m(data())
    assert float(((want - got).norm() / want.norm()).detach()) < 0.1
    got.sum().backward()
    trained = [p for n, p in m.named_parameters() if n.endswith("weight") and p.requires_grad]  # not that of a pool that runs as a convolution
    assert len(trained) > 3 and all(p.grad is not None for p in trained)


@pytest.mark.parametrize("scheme", ["float", "weight_only_w8"])
def test_schemes_without_activation_grids(scheme: str) -> None:
    m = fxq.compile(model(), scheme, example=data()[:2])
    exact = session(m.lower().data, float_matmul=True)  # by default the runtime rounds the activations of weight-only layers
    got = torch.from_numpy(exact.run(None, {"x": data().numpy()})[0])
    assert torch.allclose(got, m(data()), atol=1e-4)


def test_history_shows_each_pass() -> None:
    m = fxq.compile(model(), calibration=data())
    assert [s.name for s in m.history] == [
        "trace", "canonicalize", "propagate-shapes", "fold-bn", "legalize", "annotate", "share-qparams", "calibrate", "convert",
    ]  # fmt: skip
    assert "-%bn = batch_norm(%stem)" in m.history.diff("fold-bn")
    assert m.history["fold-bn"].rewrites == 1 and "fold-bn" in str(m.history)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c(x)
        g = F.interpolate(F.relu(F.adaptive_avg_pool2d(y, 1)), size=y.shape[-2:], mode="bilinear", align_corners=False)
        return self.d(torch.cat([y, g], 1))


def test_interpolation_of_one_cell_moves_codes() -> None:
    torch.manual_seed(0)
    m = fxq.compile(Pyramid().eval(), calibration=data())
    assert m.float_ops == [] and m.verify(m.lower().data, data()[:3]).ok


class Upsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.c(x), size=(70, 48), mode="bilinear", align_corners=False)


def test_bilinear_resize_stays_float_with_a_reason_and_runs() -> None:
    torch.manual_seed(0)
    m = fxq.compile(Upsample().eval(), calibration=data())
    assert [(op.kind, op.why) for op in m.float_ops] == [("resize", "bilinear interpolation has no integer kernel")]
    session = ort.InferenceSession(m.lower().data, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"x": data().numpy()})[0])
    assert torch.allclose(got, m.reference(data()), atol=1e-5)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_untraceable_code_names_file_line_and_expression() -> None:
    with pytest.raises(TraceError, match=r"test_street.py:\d+.*x.sum\(\) > 0"):
        fxq.compile(Branch(), calibration=data())


def test_users_mistakes() -> None:
    with pytest.raises(SchemeError, match="did you mean 'iao_w8a8'"):
        fxq.compile(model(), "iao_w8a", calibration=data())
    with pytest.raises(TargetError, match="did you mean 'onnxruntime'"):
        fxq.compile(model(), calibration=data(), target="onnxrutime")
    with pytest.raises(CalibrationError, match="needs calibration data"):
        fxq.compile(model())
    with pytest.raises(CalibrationError, match="is empty"):
        fxq.compile(model(), calibration=[])
    with pytest.raises(CalibrationError, match="batch 1 has shape"):
        fxq.compile(model(), calibration=[data(), data()[:, :, :16]])
    with pytest.raises(CalibrationError, match="batch 0 holds NaN"):
        fxq.compile(model(), calibration=data() * float("nan"))
    with pytest.raises(SchemeError, match=r"model.float\(\)"):
        fxq.compile(model().double(), calibration=data())


def test_damaged_and_existing_files(tmp_path: Path) -> None:
    m = fxq.compile(model(), calibration=data())
    path = m.lower().save(tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match="the file exists"):
        m.lower().save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="not a whole ONNX file"):
        m.verify(path, data())
    with pytest.raises(ArtifactError, match="cannot write"):
        m.lower().save(tmp_path / "no" / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_dead_channel_and_constant_activation() -> None:
    net = model()
    with torch.no_grad():
        net.a.weight[3] = 0
        net.b.weight.zero_()
        net.b.bias.zero_()
    m = fxq.compile(net, calibration=data())
    assert m.verify(m.lower().data, data()).ok


def test_adaptive_pool_with_uneven_windows_runs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((7, 4)), nn.Flatten(), nn.Linear(112, 5))
    m = fxq.compile(net.eval(), "float", example=data()[:2])
    session = ort.InferenceSession(m.lower().data, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: data().numpy()})[0])
    assert torch.allclose(got, net(data()), atol=1e-5)


class Mixer(nn.Module):
    """A token block: layer norm and GELU stay float, the linear layers run in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.conv, self.up, self.down = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.conv(x).flatten(2).transpose(1, 2)
        return t + self.down(F.gelu(self.up(F.layer_norm(t, (8,), self.weight, self.bias))))


def test_layer_norm_and_residual_stream_stay_float_linears_do_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    m = fxq.compile(Mixer().eval(), calibration=data())
    assert {op.kind for op in m.float_ops} == {"layer_norm", "gelu", "add", "reshape", "permute"}
    ops = fused(m.lower().data, tmp_path)
    assert ops["QGemm"] == 2 and ops["Gemm"] == 0
    assert m.verify(m.lower().data, data()[:3]).hidden_differ <= 2
