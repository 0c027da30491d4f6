"""The linter's prediction against what ONNX Runtime writes with ``optimized_model_filepath``."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from torch import nn

import fxq
from fxq.errors import ArtifactError, TargetError
from fxq.lint import LintReport, OpReport, agrees, lint, runtime_report
from tests import lint_zoo as zoo


@pytest.mark.parametrize("group", zoo.GROUPS)
def test_prediction_agrees_with_the_runtime(group: str) -> None:
    seen = 0
    for name, build in zoo.GROUPS[group]():
        model = build()
        assert agrees(lint(model), runtime_report(model)) == [], name
        seen += 1
    assert seen >= 2


def only(report: LintReport, op: str) -> OpReport:
    [hit] = [o for o in report.ops if o.op == op]
    return hit


def codes_out(grid: str, out: str) -> onnx.ModelProto:
    """A conv whose codes are the graph's output."""
    g = zoo.Graph()
    y = g.op("Conv", g.qdq(g.input(1, 4, 6, 6), grid), g.weight(4, 4, 1, 1))
    model: onnx.ModelProto = g.model(g.q(y, out), kind=onnx.TensorProto.INT8 if out[0] == "s" else onnx.TensorProto.UINT8)
    return model


@pytest.mark.parametrize("grids", [("u8", "u8"), ("u8", "s8"), ("s8", "s8")])
def test_codes_as_output(grids: tuple[str, str]) -> None:
    model = codes_out(*grids)
    assert agrees(lint(model), runtime_report(model)) == []
    assert only(lint(model), "Conv").runs == ("int8" if grids == ("u8", "u8") else "float")


@pytest.mark.parametrize(
    ("model", "op", "why"),
    [
        (zoo.conv("u8", "u8", after="relu"), "Conv", "the Relu behind it stays: the zero point 100 of its grid is not 0"),
        (zoo.conv("s8", "s8", after="relu"), "Conv", "the Relu behind it stays: the zero point 0 of its grid is not -128"),
        (zoo.conv(also="output only"), "Conv", "its output is a graph output"),
        (zoo.conv(also="tanh only"), "Conv", "its output has no QuantizeLinear, Tanh reads it"),
        (zoo.conv(also="tanh"), "Conv", "its output is read by QuantizeLinear and by Tanh"),
        (zoo.conv(also="grid"), "Conv", "its outputs are read by 2 QuantizeLinear instead of one each"),
        (zoo.conv(bias="float", also="output only"), "Conv", "its output is a graph output"),
        (codes_out("u8", "s8"), "Conv", "codes are uint8 in front of it and int8 behind it"),
        (zoo.gemm(zero=False), "Gemm", "the DequantizeLinear of input 1 has no explicit zero point"),
        (zoo.gemm(bias="float", q=False), "Gemm", "input 2 does not come from a DequantizeLinear"),
        (zoo.gemm(beta=2.0), "Gemm", "alpha and beta must be 1 when there is a bias"),
        (zoo.unary("HardSigmoid"), "HardSigmoid", "the operation has no integer kernel"),
        (zoo.unary("Flatten"), "Flatten", "the grids in front of it and behind it differ, or are not given as constant scale and zero point"),
        (zoo.binary("Add", const="float"), "Add", "input 1 does not come from a DequantizeLinear"),
        (dict(zoo.special_weights())["int4"](), "Conv", "input 1 is int4; only codes of 8 bits fuse (cast to int8 in front of the DequantizeLinear)"),
        (dict(zoo.biases())["per tensor off"](), "Conv", "the scale of its bias is not input scale times weight scale"),
    ],
)
def test_reason(model: onnx.ModelProto, op: str, why: str) -> None:
    assert (only(lint(model), op).runs, only(lint(model), op).why) == ("float", why)


def test_signed_codes_with_two_readers_stay_signed() -> None:
    report = lint(dict(zoo.chains())["fork s8"]())
    assert {o.why for o in report.ops if o.op == "Conv"} == {"its input is int8 and stays so: the runtime makes codes unsigned only if one node reads them"}


def test_kernels() -> None:
    kernel = {
        "QLinearConv": zoo.conv(), "QGemm": zoo.gemm(), "QLinearMatMul": zoo.matmul(), "MatMulIntegerToFloat": zoo.matmul(q=False),
        "MatMulNBits": zoo.matmul(weight_only=True, q=False), "QLinearAdd": zoo.binary("Add"), "QLinearSoftmax": zoo.unary("Softmax"),
        "MaxPool": zoo.unary("MaxPool", scales=(0.1, 0.1), kernel_shape=[2, 2]), "DynamicQuantizeMatMul": dict(zoo.dynamic())["DQ"](),
    }  # fmt: skip
    for name, model in kernel.items():
        assert lint(model).ops[-1].kernel == name and lint(model).ops[-1].runs == "int8"


def test_report_reads_well_and_as_json() -> None:
    report = lint(zoo.conv("u8", "u8", after="relu"))
    assert str(report) == (
        "conv 0/1 int8, relu 0/1 int8, 2 Q + 4 DQ left\n"
        "  Conv n20: float, the Relu behind it stays: the zero point 100 of its grid is not 0\n"
        "  Relu n22: float, the operation has no integer kernel"
    )
    assert str(lint(zoo.conv("u8", "u8z", after="relu"))) == "conv 1/1 int8, relu 1/1 int8, 1 Q + 1 DQ left"
    body = json.loads(report.to_json())
    assert body["counts"] == {"Conv": [0, 1], "Relu": [0, 1]} and body["q_left"] == 2 and body["ops"][0]["runs"] == "float"


def test_differences_are_named() -> None:
    right = lint(zoo.conv())
    wrong = LintReport((OpReport(right.ops[0].node, "Conv", "float", "Conv", "a guess"),), 7, right.dq_left)
    assert agrees(right, right) == []
    assert agrees(wrong, right) == [
        f"predicted Conv {right.ops[0].node}: float, a guess; the runtime: int8 (QLinearConv)", "QuantizeLinear left: predicted 7, the runtime has 1",
    ]  # fmt: skip
    assert agrees(right, LintReport((), 1, 1)) == [f"Conv {right.ops[0].node}: int8 (QLinearConv): not in the runtime's report"]


def compiled(name: str) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet announces another initialisation
        options = {"weights_backbone": None} if "deeplab" in name else {}
        net = torchvision.models.get_model(name, weights=None, **options).eval()
    return fxq.compile(net, calibration=torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18", (1, 0)), ("mobilenet_v3_small", (1, 0)), ("squeezenet1_1", (1, 1)), ("googlenet", (1, 0)), ("shufflenet_v2_x1_0", (1, 0)),
        ("efficientnet_b0", (1, 0)), ("densenet121", (1, 0)),
    ],
)  # fmt: skip
def test_own_artifacts_run_in_integers(name: str, left: tuple[int, int]) -> None:
    m = compiled(name)
    report = m.lint()
    assert agrees(report, runtime_report(m.lower().data)) == []
    assert (report.q_left, report.dq_left) == left and [o for o in report.ops if o.runs == "float"] == []


@pytest.mark.parametrize("name", ["convnext_tiny", "deeplabv3_mobilenet_v3_large"])
def test_own_artifacts_with_float_islands(name: str) -> None:
    m = compiled(name)
    report = m.lint("onnxruntime")
    assert agrees(report, runtime_report(m.lower().data)) == []
    assert all(report.counts().get(op, (0, 0))[1] == 0 for op in ("Conv", "Gemm"))
    assert {o.op for o in report.ops if o.runs == "float"} & {"Resize", "LayerNormalization"}


class Random:
    """Calibration data in the form that quantize_static reads."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.left = [{"x": draw.standard_normal((2, 3, 64, 64)).astype(np.float32)} for _ in range(2)]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_artifacts_of_quantize_static(name: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    CalibrationDataReader.register(Random)
    torch.manual_seed(0)
    net: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter that quantize_static's users know
        torch.onnx.export(net, (torch.randn(2, 3, 64, 64),), str(tmp_path / "float.onnx"), dynamo=False, input_names=["x"])
    for signed in (False, True):
        out = tmp_path / f"{signed}.onnx"
        kind = QuantType.QInt8 if signed else QuantType.QUInt8
        quantize_static(
            str(tmp_path / "float.onnx"), str(out), Random(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=kind, weight_type=QuantType.QInt8
        )
        report, truth = lint(out), runtime_report(out)
        differ = agrees(report, truth)
        if signed and name == "mobilenet_v3_small":  # the runtime's layout step adds Q/DQ around Transposes in float islands
            differ = [d for d in differ if "left: predicted" not in d]
        assert differ == []
        assert 0 < report.counts()["Conv"][1] < sum(report.counts()["Conv"])  # zero biases are shared there: their scale fits few convs


def test_users_mistakes(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="did you mean 'onnxruntime'"):
        lint(zoo.conv(), "onnxrutime")
    with pytest.raises(ArtifactError, match="cannot be read"):
        lint(tmp_path / "no.onnx")
    with pytest.raises(ArtifactError, match="no ONNX|not a whole ONNX file"):
        lint(zoo.conv().SerializeToString()[:200])
    with pytest.raises(ArtifactError, match="holds no ONNX graph"):
        lint(b"")


@pytest.mark.parametrize("mover", ["Reshape", "Transpose"])
@pytest.mark.parametrize("other", ["", "Shape", "Exp"])
def test_a_dq_that_others_read_too_still_passes_what_moves_codes(mover: str, other: str) -> None:
    """A group norm reads the shape of what it reshapes; each reader gets a DQ of its own before equal ones are merged."""
    g = zoo.Graph(21)
    value = g.qdq(g.op("Conv", g.qdq(g.input("N", 4, 6, 6)), g.weight(4, 4, 1, 1), g.bias(4)))
    moved = g.op("Reshape", value, g.const(zoo.ints(0, 2, -1))) if mover == "Reshape" else g.op("Transpose", value, perm=[0, 2, 3, 1])
    outputs = [g.op("Exp", moved)]
    if other:
        outputs.append(g.op("Cast", g.op("Shape", value), to=1) if other == "Shape" else g.op("Exp", value))
    model = g.model(*outputs)
    actual = runtime_report(model)
    assert agrees(lint(model), actual) == []
    assert mover != "Reshape" or [o.runs for o in actual.ops if o.op == "Reshape"] == ["int8"]


@pytest.mark.parametrize("one_constant", [False, True])
@pytest.mark.parametrize("codes", [False, True])
def test_two_equal_reshapes_of_one_value(one_constant: bool, codes: bool) -> None:
    """Two linear layers on one 3-d value: their shapes are constants of their own, which the runtime does not take for one."""
    g = zoo.Graph(21)
    value = g.qdq(g.op("Conv", g.qdq(g.input("N", 4, 6, 6)), g.weight(4, 4, 1, 1), g.bias(4)))
    shapes = [g.const(zoo.ints(-1, 6))] * 2 if one_constant else [g.const(zoo.ints(-1, 6)), g.const(zoo.ints(-1, 6))]
    moved = [g.op("Reshape", value, s) for s in shapes]
    model = g.model(*(g.op(kind, g.qdq(m) if codes else m) for kind, m in zip(("Exp", "Tanh"), moved, strict=True)))
    assert agrees(lint(model), runtime_report(model)) == []
