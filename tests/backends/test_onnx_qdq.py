"""The ONNX writer: names and metadata, and the integer forms as ONNX Runtime fuses them."""

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import modules as m
from fxq import schemes
from fxq.backends.onnxruntime import run, session
from fxq.lowering import Artifact
from fxq.spec import QuantSpec

_spec: Any = importlib.util.spec_from_file_location("onnx_tools", Path(__file__).parents[1] / "onnx_tools.py")
t: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(t)
lower, same, rand, h = t.lower, t.same, t.rand, t.h


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split, self.x = m.Split((1, 3), 1), nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        a, b = self.split(self.x(x))
        return {"out": a, "aux": {"deep": b}}


def test_names_types_and_metadata() -> None:
    artifact = lower(Parts(), rand(2, 4))
    model = onnx.load_from_string(artifact.data)
    assert [i.name for i in model.graph.input] == ["x"] and [o.name for o in model.graph.output] == ["out", "aux_deep"]
    assert [d.dim_param or d.dim_value for d in model.graph.output[1].type.tensor_type.shape.dim] == ["batch", 3]
    assert [(n.name, n.op_type) for n in model.graph.node] == [("x_", "Relu"), ("split", "Split"), ("out", "Identity"), ("aux_deep", "Identity")]
    assert (model.opset_import[0].version, model.ir_version, model.producer_name) == (21, 10, "fxq")
    assert {p.key: p.value for p in model.metadata_props} == {"fxq.scheme": "float", "fxq.target": "onnxruntime", "fxq.version": fxq.__version__}
    a, b = run(session(artifact.data), {"x": rand(3, 4)})
    np.testing.assert_array_equal(np.concatenate([a, b], 1), F.relu(rand(3, 4)).numpy())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_shared_weight_is_stored_once() -> None:
    model = onnx.load_from_string(same(Shared(), rand(2, 64)).data)
    assert [t.name for t in model.graph.initializer] == ["a/weight", "a/bias", "b/bias"]


# ---- integer forms: what ONNX Runtime makes of the file


def fused(data: bytes, folder: Path, level: str = "all") -> Counter[str]:
    """Operations of the optimized model, by type; the runtime's layout changes left out."""
    session(data, level, save_optimized=folder / "o.onnx")
    ops = Counter(n.op_type for n in onnx.load(folder / "o.onnx").graph.node)
    ops.pop("Transpose", None)
    return ops


def steps(net: nn.Module, x: Tensor, scheme: str | schemes.Scheme = "iao_w8a8") -> tuple[Artifact, float]:
    """Artifact of a compiled net, and its greatest distance from the simulator relative to the output's magnitude."""
    torch.manual_seed(0)
    c = fxq.compile(h.randomize(net), scheme, calibration=[x])
    artifact = c.lower()
    onnx.checker.check_model(onnx.load_from_string(artifact.data), full_check=True)
    opened = session(artifact.data, float_matmul=True)
    (got,) = run(opened, {opened.get_inputs()[0].name: x[:3]})
    with torch.no_grad():
        want = c(x[:3]).numpy()
    assert got.shape == want.shape
    return artifact, float(np.abs(got - want).max() / np.abs(want).max())


class Between(nn.Module):
    """conv, some function, conv."""

    def __init__(self, fn: Callable[[Tensor], Tensor], middle: int = 8, conv: Any = nn.Conv2d) -> None:
        super().__init__()
        self.fn, self.a, self.b = fn, conv(3, 8, 1), conv(middle, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fn(self.a(x)))


def swapped(parts: Any) -> Tensor:
    return torch.cat([parts[1], parts[0]], 1)


MOVERS: dict[str, tuple[nn.Module, dict[str, int]]] = {
    "max_pool": (Between(lambda y: F.max_pool2d(y, 2)), {"NhwcMaxPool": 1}),
    "slice channels": (Between(lambda y: y[:, 2:6], 4), {"Slice": 1}),
    "slice stride": (Between(lambda y: y[:, :, ::2, ::2]), {"Slice": 1}),
    "pad channels": (Between(lambda y: F.pad(y, (0, 0, 0, 0, 4, 4)), 16), {"Pad": 1}),
    "nearest": (Between(lambda y: F.interpolate(y, scale_factor=2)), {"Resize": 1}),
    "reshape": (Between(lambda y: y.reshape(-1, 8, 4, 64)), {"Reshape": 1}),
    "permute": (Between(lambda y: y.transpose(2, 3)), {}),
    "split": (Between(lambda y: swapped(y.split([2, 6], 1))), {"Split": 1, "QLinearConcat": 1}),
    "part of a split": (Between(lambda y: y.chunk(4, 1)[2], 2), {"Slice": 1}),
    "cat": (Between(lambda y: torch.cat([y, F.relu(y)], 1), 16), {"QLinearConcat": 1, "QLinearLeakyRelu": 1}),
    "global_avg_pool": (Between(lambda y: F.adaptive_avg_pool2d(y, 1)), {"QLinearGlobalAveragePool": 1}),
    "silu": (Between(F.silu), {"QLinearSigmoid": 1, "QLinearMul": 1}),
    "hardswish": (Between(F.hardswish), {"QLinearAdd": 1, "QLinearMul": 1}),
    "constants": (Between(lambda y: F.relu(y + 0.3) * y), {"QLinearAdd": 1, "QLinearMul": 1}),
}


@pytest.mark.parametrize("name", MOVERS)
def test_operation_between_convs_runs_in_integers(name: str, tmp_path: Path) -> None:
    net, extra = MOVERS[name]
    artifact, off = steps(net, rand(4, 3, 16, 16))
    assert fused(artifact.data, tmp_path) == {"QuantizeLinear": 1, "QLinearConv": 2, "DequantizeLinear": 1, **extra}
    assert off < 0.03


@pytest.mark.parametrize("conv,sizes", [(nn.Conv1d, (4, 3, 16)), (nn.Conv3d, (4, 3, 6, 6, 6))])
def test_convs_of_other_ranks_run_in_integers(conv: Any, sizes: tuple[int, ...], tmp_path: Path) -> None:
    artifact, off = steps(Between(F.relu, conv=conv), rand(*sizes))
    assert fused(artifact.data, tmp_path) == {"QuantizeLinear": 1, "QLinearConv": 2, "DequantizeLinear": 1} and off < 0.03


def test_padding_with_the_images_own_values_runs_on_codes(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"))
    artifact, off = steps(net, rand(4, 3, 8, 8))
    assert fused(artifact.data, tmp_path) == {"QuantizeLinear": 1, "QLinearConv": 2, "DequantizeLinear": 1, "Pad": 2} and off < 0.03


class Residual(nn.Module):
    """CIFAR ResNet with option-A shortcut: strided slice and zero channels; a 3-d linear layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.down, self.up = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.down(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.up(y)), 1).flatten(1))


@pytest.mark.parametrize("scheme", ["iao_w8a8", "iao_w8a8_pt", "iao_w8a8_asymw", "iao_w4a8"])
def test_a_residual_net_is_left_with_one_q(scheme: str, tmp_path: Path) -> None:
    artifact, off = steps(Residual(), rand(4, 3, 16, 16), scheme)
    want = {"QuantizeLinear": 1, "QLinearConv": 3, "Slice": 1, "Pad": 1, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "Reshape": 1, "QGemm": 1}
    ops = fused(artifact.data, tmp_path)
    assert {k: v for k, v in ops.items() if k not in ("Squeeze", "Flatten")} == want and off < 0.03
    assert artifact.info["float_ops"] == [] and artifact.info["islands"] == []


def test_int4_weights_take_half_the_bytes() -> None:
    sizes = {s: steps(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)), rand(4, 3, 8, 8), s)[0] for s in ("iao_w8a8", "iao_w4a8")}
    weights = {s: {t.name: t for t in onnx.load_from_string(a.data).graph.initializer} for s, a in sizes.items()}
    assert len(weights["iao_w4a8"]["1/weight_q4"].raw_data) * 2 == len(weights["iao_w8a8"]["1/weight_q"].raw_data) == 64 * 64 * 9


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(32, 64), nn.Linear(64, 32), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


@pytest.mark.parametrize("scheme", ["iao_w8a8", "iao_w4a8"])
@pytest.mark.parametrize("sizes", [(4, 32), (4, 5, 32), (4, 2, 3, 32)])
def test_linear_layers_run_as_qgemm(sizes: tuple[int, ...], scheme: str, tmp_path: Path) -> None:
    artifact, off = steps(Tokens(), rand(*sizes), scheme)
    ops = fused(artifact.data, tmp_path)
    assert ops["QGemm"] == 2 and not {"Gemm", "MatMul", "DequantizeLinear"} & set(ops) and ops["QuantizeLinear"] == 1 and off < 0.03


def test_signed_activations_in_three_dimensions_give_a_valid_optimized_model(tmp_path: Path) -> None:
    artifact, off = steps(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), rand(4, 5, 32), "iao_w8a8_sym")
    assert fused(artifact.data, tmp_path)["QGemm"] == 2 and off < 0.03
    session(tmp_path / "o.onnx", "off")


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Sigmoid(), nn.LeakyReLU(), nn.GELU(), nn.ReLU6()], ids=str)
@pytest.mark.parametrize("scheme,op", [("iao_w8a8", "QGemm"), ("dynamic_w8", "DynamicQuantizeMatMul"), ("weight_only_w8", "MatMulNBits")])
def test_a_float_activation_does_not_pull_a_linear_layer_into_float(act: nn.Module, scheme: str, op: str, tmp_path: Path) -> None:
    artifact, off = steps(nn.Sequential(nn.Linear(32, 16), act, nn.Softmax(-1)), rand(4, 32), scheme)
    ops = fused(artifact.data, tmp_path)
    assert ops[op] == 1 and not {"Gemm", "FusedGemm", "MatMul", "DequantizeLinear"} & set(ops) and off < 1e-4


def test_dynamic_linear_layers_fuse_and_equal_the_simulator(tmp_path: Path) -> None:
    artifact, off = steps(Tokens(), rand(4, 5, 32), "dynamic_w8")
    assert fused(artifact.data, tmp_path) == {"DynamicQuantizeMatMul": 2, "Max": 1} and off < 1e-5


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(256, 64), nn.Linear(64, 32), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


@pytest.mark.parametrize("sizes", [(4, 256), (4, 5, 256)])
@pytest.mark.parametrize("scheme", ["weight_only_w8", "weight_only_w4_here", "weight_only_w8a_here"])
def test_weight_only_linear_layers_become_matmulnbits(scheme: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    chosen = schemes.get(scheme) if "here" not in scheme else schemes.Scheme(scheme, "weight-only", QuantSpec.parse("s4n/pc0" if "w4" in scheme else "s8a/pc0"))
    artifact, off = steps(Wide(), rand(*sizes), chosen)
    ops = fused(artifact.data, tmp_path)
    assert (ops["MatMulNBits"], ops["DequantizeLinear"], ops["FusedGemm"], ops["Gemm"]) == (2, 0, 0, 0) and off < 1e-5
    stored = {t.name: list(t.dims) for t in onnx.load_from_string(artifact.data).graph.initializer}
    assert stored["a/weight_scale"] == [2, 64] and stored["b/weight_scale"] == [32]


def test_weight_only_convs_hold_bytes_and_compute_in_float(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.ConvTranspose2d(64, 16, 2, 2))
    artifact, off = steps(net, rand(4, 3, 8, 8), "weight_only_w8")
    assert off < 1e-5 and not {"DequantizeLinear", "Mul", "Cast"} & set(fused(artifact.data, tmp_path))
    assert {t.name: t.data_type for t in onnx.load_from_string(artifact.data).graph.initializer}["2/weight_q"] == onnx.TensorProto.INT8


def test_names_follow_the_modules() -> None:
    artifact, _ = steps(Residual(), rand(4, 3, 16, 16))
    model = onnx.load_from_string(artifact.data)
    made = {o: n.op_type for n in model.graph.node for o in n.output}
    assert {k: made[k] for k in ("x_q", "x_q/dq", "stem/weight/dq", "stem/bias/dq", "stem", "stem_q", "fc")} == {
        "x_q": "QuantizeLinear", "x_q/dq": "DequantizeLinear", "stem/weight/dq": "DequantizeLinear", "stem/bias/dq": "DequantizeLinear",
        "stem": "Conv", "stem_q": "QuantizeLinear", "fc": "Gemm",
    }  # fmt: skip
    stored = {t.name: t for t in model.graph.initializer}
    assert {"stem/weight_q", "stem/weight_scale", "stem/weight_zero", "stem/bias_q", "stem/bias_scale", "stem/bias_zero", "x_q_scale"} <= set(stored)
    assert stored["stem/bias_q"].data_type == onnx.TensorProto.INT32 and list(stored["x_q_scale"].dims) == []
    assert [n.name for n in model.graph.node] == [n.output[0] for n in model.graph.node]
    axes = {n.name: [a.i for a in n.attribute] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    assert axes["stem/weight/dq"] == axes["stem/bias/dq"] == [0] and axes["x_q/dq"] == []  # the runtime's fusion does not look, others do


class Pyramid(nn.Module):
    """As a detector's head: a list of maps in, a list out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.conv(x).relu() for x in xs]


def test_a_list_of_tensors_becomes_several_inputs() -> None:
    maps = [rand(2, 4, 8, 8), rand(2, 4, 5, 5)]
    model = fxq.compile(Pyramid().eval(), calibration=[(maps,)])
    artifact = model.lower()
    assert [i.name for i in onnx.load_from_string(artifact.data).graph.input] == ["xs_0", "xs_1"]
    proof = model.verify(artifact.data, [([rand(3, 4, 8, 8), rand(3, 4, 5, 5)],)])
    assert proof.ok and proof.differ == 0 and proof.elements == 3 * 6 * (64 + 25)


class Pair(nn.Module):
    """As RAFT: both images in one batch through the encoder, then apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = torch.chunk(self.conv(torch.cat([x, y])), 2)
        return self.last(a) + self.last(b)


def test_the_batch_can_be_cut_in_equal_parts() -> None:
    model = fxq.compile(Pair().eval(), calibration=[(rand(2, 3, 8, 8), 1 - rand(2, 3, 8, 8))])
    data = model.lower().data
    proof = model.verify(data, [(rand(3, 3, 8, 8), 1 - rand(3, 3, 8, 8))])
    assert proof.ok and proof.differ == 0 and proof.missing == ()
