"""The calibration cache: golden vectors, names of the float file, refusals."""

import struct

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import fxq
from fxq.backends.trt_cache import CalibrationCache
from fxq.errors import LoweringError, TargetError

X = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        return self.b(self.relu(self.a(output)))  # type: ignore[no-any-return]


def test_a_line_is_a_tensor_of_the_float_file_and_its_scale() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    m = fxq.compile(net, "int8", calibration=X, target="tensorrt", progress=False)
    artifact = m.lower("trt-calibration-cache")
    head, *lines = artifact.data.decode().splitlines()
    assert head == "TRT-8601-EntropyCalibration2" and artifact.info["scales"] == len(lines) == 2
    scales = {name: struct.unpack(">f", bytes.fromhex(text))[0] for name, text in (line.split(": ") for line in lines)}
    gm = m.graph_module
    modules = {str(n.target).removesuffix("_q"): gm.get_submodule(str(n.target)) for n in gm.graph.nodes if str(n.target).endswith("_q")}
    assert scales == {name: float(q.scale) for name, q in modules.items()}, "amax / 127, in float32, unrounded"
    plain = fxq.compile(net, "float", example=X, target="tensorrt", progress=False).lower("onnx")
    graph = onnx.load_from_string(plain.data).graph
    assert set(scales) <= {i.name for i in graph.input} | {o for n in graph.node for o in n.output}


def test_the_golden_vector() -> None:
    assert struct.pack(">f", np.float32(0.020792)).hex()[:5] == "3caa5"
    assert struct.unpack(">f", bytes.fromhex("3caa54fc"))[0] == pytest.approx(0.020792, abs=5e-7)


@pytest.mark.parametrize(("version", "number"), [("8.6.1", 8601), ("8.0.3", 8003), ("8.6.1.6", 8601), ("10.3.0", 100300), ("10.11.0", 101100)])
def test_the_header_names_the_version(version: str, number: int) -> None:
    assert CalibrationCache(version).number == number


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("10.12.0", "TensorRT 10.12.0 reads no calibration cache, versions 8.0 to 10.11 do"),
        ("7.2.3", "reads no calibration cache"),
        ("eight", "'eight' is no version"),
    ],
)
def test_versions_without_calibrators_are_refused(version: str, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        CalibrationCache(version)


@pytest.mark.parametrize(("scheme", "text"), [("iao_w8a8", "its grid is not symmetric int8"), ("weight_only_w8", "has no calibrated activations")])
def test_other_grids_are_refused(scheme: str, text: str) -> None:
    m = fxq.compile(Net().eval(), scheme, calibration=X, progress=False)
    with pytest.raises(LoweringError, match=text):
        m.lower("trt-calibration-cache")
