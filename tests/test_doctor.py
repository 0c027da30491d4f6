"""``fxq.doctor`` tells before any data what a compilation will say, and what stands in its way."""

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import schemes, targets, zoo
from fxq.compiled import FloatOp
from fxq.doctor_plan import Forecast
from fxq.errors import CalibrationError, TargetError
from fxq.lint import TARGETS, lint
from fxq.modules import WEIGHTED


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def torchvision_net(name: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    net: nn.Module = torchvision.models.get_model(name, weights=None)
    return net.eval()


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "ds_cnn":
        return zoo.build(name).eval(), torch.randn(2, 1, 49, 10)
    if name in zoo.NETS:
        return zoo.build(name).eval(), images(32)
    return torchvision_net(name), images(64)


NETS = (
    "resnet20", "nin_gc", "ds_cnn", "tiny_resnet8", "efficientnet_lite0", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18",
    "mnasnet0_5",
)  # fmt: skip


def weights_of(file: bytes) -> int:
    """Bytes of the file's codes, weight scales and biases."""
    mine = ("/weight_q", "/weight_scale", "/bias_q")
    return sum(len(onnx.numpy_helper.to_array(t).tobytes()) for t in onnx.load_from_string(file).graph.initializer if t.name.endswith(mine))


def agrees_with_its_file(f: Forecast, file: bytes) -> None:
    """The lint runs in integers what the forecast does, and the bytes are those of the file."""
    told = {o.node: o.runs for o in f.ops if o.why != "absorbed"}
    seen = {o.node: {"int8": "int"}.get(o.runs, o.runs) for o in lint(file).ops}
    common = told.keys() & seen.keys()
    assert {o.node for o in f.ops if o.kind in WEIGHTED} <= common and {n: told[n] for n in common} == {n: seen[n] for n in common}
    assert {n for n, runs in seen.items() if runs == "float"} <= {o.node for o in f.float_ops}
    assert f.bytes_after == weights_of(file) < 0.3 * f.bytes_before


@pytest.mark.parametrize("name", NETS)
def test_the_forecast_is_what_a_compilation_says(name: str) -> None:
    net, x = build(name)
    found = fxq.doctor(net, x, target=["onnxruntime", "tensorrt"])
    assert found.ok and [f.target for f in found.forecasts] == ["onnxruntime", "tensorrt"]
    for f in found.forecasts:
        m = fxq.compile(net, "int8", calibration=[x], target=f.target, progress=False)
        assert f.float_ops == m.float_ops and f.scheme == m.scheme.name
        integer = {str(n.target) for n in m.graph_module.graph.nodes if n.meta.get("integer") and not str(n.target).endswith("_q")}
        told = {o.node for o in f.ops if o.runs == "int" and o.why != "absorbed"}
        modules = dict(m.graph_module.named_modules())
        assert told & modules.keys() == integer & modules.keys()
        if f.target == "onnxruntime":
            agrees_with_its_file(f, m.lower().data)


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        ("float", "onnxruntime"), ("dynamic_w8", "onnxruntime"), ("weight_only_w8", "onnxruntime"), ("iao_w8a8_pt", "onnxruntime"), ("iao_w4a8", "onnxruntime"),
        ("dorefa_w4a4", "onnxruntime"), ("xnor_w1a1", "onnxruntime"), ("twn_wta8", "onnxruntime"), ("weight_only_w4_b64", "tensorrt"), ("fp8_w8a8", "sm89"),
    ],
)  # fmt: skip
def test_other_schemes(scheme: str, target: str) -> None:
    net, x = build("tiny_resnet8")
    (f,) = fxq.doctor(net, x, target=target, scheme=scheme).forecasts
    m = fxq.compile(net, scheme, calibration=[x], target=target, progress=False)
    assert f.float_ops == m.float_ops and (f.scheme, f.target, f.stop) == (scheme, target, None)
    assert f.bytes_after < f.bytes_before or scheme in ("float", "weight_only_w4_b64", "dynamic_w8")
    assert (f.share > 0.9) == (scheme not in ("float", "dynamic_w8", "weight_only_w8", "weight_only_w4_b64"))


def test_a_scheme_that_is_trained_keeps_its_shuffles() -> None:
    """``legalize`` rewrites fewer operations of a graph that will be trained."""
    net, x = build("shufflenet_v2_x0_5")
    (f,) = fxq.doctor(net, x, scheme="dorefa_w4a4").forecasts
    m = fxq.compile(net, "dorefa_w4a4", calibration=[x], progress=False)
    assert f.float_ops == m.float_ops
    kinds = Counter(o.kind for o in f.ops)
    last = Counter(r.kind for r in m.history["annotate"].rows)
    assert kinds["index_select"] == last["index_select"] > 0


class Routed(nn.Module):
    """Its middle depends on values, so only its parts can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 1))
        self.tail = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x).mean((2, 3))
        if float(x.sum()) > 1e9:
            x = -x
        return self.tail(x)  # type: ignore[no-any-return]


def test_a_model_in_parts() -> None:
    torch.manual_seed(0)
    net, x = Routed().eval(), images(12)
    found = fxq.doctor(net, x)
    assert found.ok and found.capture is not None and (found.capture.rung, found.capture.parts) == ("submodules", ("head", "tail"))
    assert any(Path(__file__).name in n and "float(x.sum())" in n for n in found.capture.notes)  # file and line of what stands in the way
    (f,) = found.forecasts
    m = fxq.compile(net, "int8", calibration=[x], progress=False)
    for path, part in m.parts.items():
        mine = [FloatOp(o.node, o.kind, o.why) for o in f.ops if o.part == path and o.runs == "float"]
        assert mine == part.float_ops and mine
    assert "in parts" in str(found) and "part      tail" in str(found)


class Unsupported(nn.Module):
    """No part of it holds a layer that could be captured alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.abs().max() * 3)] @ torch.ones(5)


def test_what_cannot_be_captured() -> None:
    found = fxq.doctor(Unsupported(), torch.randn(4, 5))
    assert not found.ok and found.forecasts == () and found.capture is not None and found.capture.error is not None
    assert f"{Path(__file__).name}:" in found.capture.error and "int(x.abs().max() * 3)" in found.capture.error
    assert "cannot be captured" in str(found) and found.stops[0].startswith("it cannot be captured: ")


def test_targets() -> None:
    net, x = build("tiny_resnet8")
    every = fxq.doctor(net, x, target="all")
    assert [f.target for f in every.forecasts] == targets.names() and every.ok
    stopped = {f.target: f.stop for f in every.forecasts if f.stop is not None}
    assert "sm75" in stopped and "runs no int8" in str(stopped["sm75"])
    named = fxq.doctor(net, x, target=["onnxruntime", "sm75"])
    assert not named.ok and named.stops == [f"sm75: {stopped['sm75']}"] and "sm75, int8: cannot be compiled" in str(named)
    assert not fxq.doctor(net, x, target="sm75").ok
    with pytest.raises(TargetError, match="unknown target 'onnx'"):
        fxq.doctor(net, x, target="onnx")
    with pytest.raises(CalibrationError, match="the shapes are not known"):
        fxq.doctor(net)
    with pytest.raises(CalibrationError, match="does not run on an input of float32"):
        fxq.doctor(net, torch.randn(2, 5, 8, 8))


def test_the_forecast_says_what_is_rewritten_and_folded() -> None:
    (f,) = fxq.doctor(*build("mobilenet_v3_small")).forecasts
    assert f.rewrites == ({"hardswish": 19}, {"hardsigmoid": 19, "mul": 19}) and f.folded == 34 and f.unfolded == ()
    text = "\n".join(f.lines())
    assert "rewritten hardswish 19 -> hardsigmoid 19, mul 19" in text and "folded    34 batch norms" in text
    assert text.startswith("onnxruntime, iao_w8a8: all of ") and "weights 10.1" in text
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.BatchNorm2d(16), nn.ReLU())
    (f,) = fxq.doctor(net, images(8), target="tensorrt").forecasts
    assert [n for n, _ in f.unfolded] == ["_2"] and "stays     _2: " in "\n".join(f.lines())
    assert f.grouped()[0][:3] == ("relu", f.float_ops[0].why, 2)


def test_nothing_is_changed_and_plain_data_comes_out() -> None:
    net, x = build("tiny_resnet8")
    net.train()
    before = copy.deepcopy(net.state_dict())
    found = fxq.doctor(net, x, target="all", name="mine")
    assert net.training and all(bool((before[k] == v).all()) for k, v in net.state_dict().items())
    plain = json.loads(json.dumps(found.to_json()))
    assert (plain["model"], plain["ok"], plain["stops"], plain["capture"]["rung"]) == ("mine", True, [], "symbolic")
    assert plain["forecasts"][0]["macs"] == found.forecasts[0].macs[1] and plain["machine"]["int8"] == found.machine.int8
    assert {f["code"] for f in plain["findings"]} >= {"train-mode", "untrained"}
    assert found.seconds > 0 and str(found).startswith("mine\n  nothing stops its compilation\n")


def test_an_exported_program_brings_its_inputs() -> None:
    net, x = build("tiny_resnet8")
    found = fxq.doctor(torch.export.export(net, (x,)))
    assert found.ok and found.forecasts[0].share > 0.9


def test_an_onnx_file_is_linted(tmp_path: Path) -> None:
    net, x = build("tiny_resnet8")
    m = fxq.compile(net, "int8", calibration=[x], progress=False)
    path = m.lower().save(tmp_path / "m.onnx")
    found = fxq.doctor(path, target=["onnxruntime", "sm86"])
    assert [n for n, _ in found.lints] == ["onnxruntime", "sm86"] and found.lints[0][1] == lint(path)
    assert not found.ok and found.stops[0].startswith("sm86: ")  # a file for ONNX Runtime is none for TensorRT
    text = str(found)
    assert "written by fxq" in text and "QuantizeLinear" in text and "inputs    x [batch, 3, 32, 32]" in text
    every = fxq.doctor(path, target="all")
    assert every.ok and [n for n, _ in every.lints] == list(TARGETS)
    with pytest.raises(TargetError, match="there are no lint rules for mine"):
        fxq.doctor(path, target=replace(targets.get("onnxruntime"), name="mine"))
    assert fxq.doctor(path).ok and json.loads(json.dumps(found.to_json()))["lints"]["sm86"]["ok"] is False


def test_a_forecast_without_macs() -> None:
    assert Forecast("t", "s").share == 0.0 and schemes.get("float").name == fxq.doctor(nn.ReLU(), torch.randn(2, 3), scheme="float").forecasts[0].scheme
