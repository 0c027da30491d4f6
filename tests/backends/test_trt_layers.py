"""Layer tables of TensorRT-RTX's log and of the inspectors of TensorRT 10 and 11, read into one form."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fxq.backends.trt_builder import BuildOptions, build
from fxq.backends.trt_layers import Layer, TensorInfo, by_node, parse_inspector, parse_log, runs, table_text
from fxq.errors import EngineError

_spec: Any = importlib.util.spec_from_file_location("trt_models", Path(__file__).parent / "trt_models.py")
m: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(m)


def tensor(name: str, dims: str, dtype: str) -> str:
    return f"{{ Name: {name}, Dimensions: [{dims}], Strides: [1], StrideOrder: [0], Datatype: {dtype}, Format: (Linear) Row major linear format }}"


CONV = (
    f"Name: conv_myl0_2, LayerType: correlation, Inputs: [ {tensor('a', '-1,16,8,8', 'Int8')}], "
    f"Constants: [ {tensor('w', '16,16,3,3', 'Int8')}, {tensor('b', '', 'Float')}], Outputs: [ {tensor('y', '-1,16,8,8', 'Half')}], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: conv][ONNX Layer: x/dq]"
)
EMPTY = "Name: shape, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "
END = "\n\nI/O Tensors:\n Name: x, IOMode: Input\n"


def layer(kind: str, inputs: str, constants: str, outputs: str, onnx: str = "") -> Layer:
    """A layer by the types of its tensors."""
    parts = (tuple(TensorInfo(f"t{i}", (), d) for i, d in enumerate(text.split())) for text in (inputs, constants, outputs))
    a, b, c = parts
    return Layer(kind, kind, a, b, c, tuple(onnx.split()))


def test_rows_of_the_log() -> None:
    empty, conv = parse_log(f"Layers:\n{EMPTY}\n{CONV}{END}")
    assert empty == Layer("shape", "shape_call", (), (), (), ())
    assert conv == Layer(
        "conv_myl0_2",
        "correlation",
        (TensorInfo("a", (-1, 16, 8, 8), "int8"),),
        (TensorInfo("w", (16, 16, 3, 3), "int8"), TensorInfo("b", (), "fp32")),
        (TensorInfo("y", (-1, 16, 8, 8), "fp16"),),
        ("conv", "x/dq"),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Layers:\n",
        "Layers:" + END,
        "Engine Layer Information:\n" + CONV + END,
        "Layers:\n" + CONV.replace("LayerType", "Kind") + END,
        "Layers:\n" + CONV.replace("Datatype", "DataType") + END,
        "Layers:\n" + CONV.replace("Constants: [", "Weights: [") + END,
        "Layers:\n" + CONV.replace(", Metadata", ", Meta") + END,
        "Layers:\n" + CONV.replace("Dimensions: [16", "Dimensions: [?") + END,
    ],
)
def test_another_form_of_the_log_is_an_error(text: str) -> None:
    with pytest.raises(EngineError, match=r"has a form that fxq does not know: .*tensorrt-rtx==1.7.1.116"):
        parse_log(text)


def inspected(tensors: dict[str, Any]) -> dict[str, Any]:
    io = [{"Name": "a", "Location": "Device", "Dimensions": [1, 16, 8, 8], **tensors}]
    return {
        "Name": "conv + relu", "LayerType": "CaskConvolution", "Inputs": io, "Outputs": io, "ParameterType": "Convolution",
        "Weights": {"Type": "Int8", "Count": 2304}, "Bias": {"Type": "Float", "Count": 16}, "Metadata": "[ONNX Layer: conv]\x1f[ONNX Layer: relu]",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "rest"),
    [
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, {"Bindings": ["a"]}),
        ({"Format/Datatype": "Int8"}, {"Bindings": ["a"]}),
        ({"Format": "Thirty-two wide channel vectorized row major", "DataType": "Int8"}, {"I/O Tensors": [{"Name": "a"}]}),
        ({"Format": "kCHW32", "Datatype": "INT8"}, {"I/O Tensors": []}),
    ],
)
def test_inspector_of_10_and_11(tensors: dict[str, Any], rest: dict[str, Any]) -> None:
    (one,) = parse_inspector(json.dumps({"Layers": [inspected(tensors)], **rest}))
    info = TensorInfo("a", (1, 16, 8, 8), "int8")
    constants = (TensorInfo("Weights", (), "int8"), TensorInfo("Bias", (), "fp32"))
    assert one == Layer("conv + relu", "CaskConvolution", (info,), constants, (info,), ("conv", "relu"))
    assert runs(one) == "int8"


def test_names_and_weights_that_inspectors_give() -> None:
    row = inspected({"Datatype": "Int8"}) | {"Bias": {"Type": "Float", "Count": 0}, "Metadata": "[ONNX Layer: a#b]"}
    (one,) = parse_inspector(json.dumps({"Layers": [row]}).replace("a#b", "a\nb"))  # TensorRT does not escape line breaks
    assert [t.name for t in one.constants] == ["Weights"], "a bias without values is none"
    assert one.onnx == ("a\nb",)


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ("Row major linear FP32", "fp32"), ("Channel major FP16 format where channel % 8 == 0", "fp16"), ("Half", "fp16"), ("BFloat16", "bf16"),
        ("Row major linear FP8 format (kLINEAR)", "fp8"), ("Int4", "int4"), ("FP4E2M1", "fp4"), ("Row major linear INT64", "int64"), ("Bool", "bool"),
        ("Complex", "complex"),
    ],
)  # fmt: skip
def test_types_in_words(words: str, dtype: str) -> None:
    (one,) = parse_inspector(json.dumps({"Layers": [inspected({"Format/Datatype": words})]}))
    assert one.inputs[0].dtype == dtype


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": []}', '{"Layers": ["conv + relu"]}', '{"Layers": [{"LayerType": "x"}]}', "Layer(conv)"])
def test_another_form_of_the_inspector_is_an_error(text: str) -> None:
    with pytest.raises(EngineError, match="the engine inspector's text has a form that fxq does not know"):
        parse_inspector(text)


@pytest.mark.parametrize(
    ("one", "want"),
    [
        (layer("correlation", "int8", "int8 fp32 fp32", "fp32"), "int8"),
        (layer("correlation", "int8 fp32", "int8 fp32", "fp32"), "int8"),  # with the float summand of a residual block
        (layer("gemm", "int8 int8", "fp32", "fp32"), "int8"),
        (layer("gemm", "int8", "fp32", "fp32"), "int8"),  # a tensor with itself
        (layer("gemm", "int8 fp32", "fp32", "fp32"), "float"),
        (layer("gemm", "fp8", "fp8 fp32", "fp32"), "fp8"),
        (layer("gemm", "int4", "int4 fp32", "fp32"), "int4"),
        (layer("gemm", "fp32", "fp32", "fp32"), "float"),
        (layer("gemm", "fp16", "int4 fp16", "fp16"), "int4-weights"),
        (layer("runtime_fusion", "fp32", "fp32 int8", "fp32"), "int8-weights"),
        (layer("runtime_fusion", "int8", "fp32 int8", "fp32"), "int8-weights"),  # weight scales along the sum: unpacked into float
        (layer("runtime_fusion", "fp32", "fp32", "fp32"), "float"),
        (layer("CaskConvolution", "int8", "int8 fp32", "int8"), "int8"),
        (layer("deconv", "fp32", "fp32", "fp32"), "float"),
        (layer("kgen", "fp32", "int8 fp32", "int8"), "float"),
        (layer("kgen", "int8", "fp32", "fp32"), "float"),
        (layer("kgen", "int8 fp32", "fp32", "int8"), "float"),
        (layer("kgen", "int8", "", "int8"), "int8"),  # fused attention
        (layer("maxpool", "int8", "fp32", "int8"), "int8"),
        (layer("shape_call", "", "", ""), "float"),
    ],
)
def test_how_a_layer_runs(one: Layer, want: str) -> None:
    assert runs(one) == want


def test_the_layer_of_a_node_is_the_one_that_multiplies() -> None:
    before, conv = layer("kgen", "fp32", "", "int8", "x/q conv"), layer("correlation", "int8", "int8", "fp32", "conv x/dq")
    after, last = layer("kgen", "fp32", "", "fp32", "conv relu"), layer("kgen", "fp32", "", "fp32", "relu")
    assert by_node([before, conv, after, last]) == {"conv": conv, "x/dq": conv, "x/q": before, "relu": after}


def test_table_for_the_eye() -> None:
    table = table_text(build(m.conv_relu(4), BuildOptions("sm86", package="tensorrt_rtx")).layers)
    assert table.splitlines() == [
        "runs   kind         types                     ONNX nodes",
        "float  kgen         fp32 * fp32 -> int8       x/q",
        "int8   correlation  int8 * int8 fp32 -> fp32  conv, x/dq, w",
        "float  kgen         fp32 * fp32 -> fp32       conv, relu",
    ]
    assert table_text([layer("shape_call", "", "", "")]).splitlines()[1] == "float  shape_call  - -> -"
