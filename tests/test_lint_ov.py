"""The linter's prediction against the model that OpenVINO's CPU plugin executes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto

import fxq
from fxq.errors import ArtifactError
from fxq.lint import LintReport, agrees, lint
from fxq.lint_ov_runtime import report
from tests import lint_zoo as zoo

APART = {  # what OpenVINO's report does not show: a Relu or constant that vanishes with the DQ that it reads, a removed Where, Q and DQ in one layer
    "pointwise Relu {'out': 'u8z', 'after': 'Relu'}", "chains batch_norm", "chains where", "readers Squeeze qq", "chains moved_weight",
}  # fmt: skip


def no_counts(lines: list[str]) -> list[str]:
    return [line for line in lines if "left: predicted" not in line]


def cases() -> Iterator[tuple[str, Callable[[], onnx.ModelProto]]]:
    """The zoo of the lint for ONNX Runtime, without what differs in the operator's version only."""
    for group, build in zoo.GROUPS.items():
        for name, case in build():
            if "opset" not in name and group not in ("biases",):
                yield f"{group} {name}", case


@pytest.mark.parametrize("part", range(3))
def test_prediction_agrees_with_the_runtime(part: int) -> None:
    seen = 0
    for name, build in list(cases())[part::8]:
        if name == "convs u8 weight":
            continue
        model = build()
        differ = agrees(lint(model, "openvino"), report(model))
        assert (no_counts(differ) if name in APART else differ) == [], name
        seen += 1
    assert seen > 50


def graph(build: Callable[[Any], Any]) -> onnx.ModelProto:
    g = zoo.Graph(21)
    made = build(g)
    model: onnx.ModelProto = g.model(*(made if isinstance(made, tuple) else (made,)))
    return model


def conv(g: Any, x: str, seed: int = 0, **options: Any) -> str:
    return str(g.op("Conv", x, g.weight(4, 4, 1, 1, seed=seed, **options), g.bias(4)))


def image(g: Any, batch: Any = "N") -> str:
    return str(g.input(batch, 4, 6, 6))


def weight_with_zero(g: Any) -> str:
    codes = g.const(np.ones((4, 4, 1, 1), np.int8))
    return str(g.op("DequantizeLinear", codes, g.const(np.float32(0.01)), g.const(np.int8(3))))


def per_channel(g: Any) -> str:
    grid = g.const(np.arange(1, 5, dtype=np.float32)), g.const(np.zeros(4, np.uint8))
    return str(g.op("DequantizeLinear", g.op("QuantizeLinear", image(g), *grid, axis=1), *grid, axis=1))


def attention(left: str, right: str) -> Callable[[Any], Any]:
    return lambda g: g.op("MatMul", g.qdq(g.input("N", 3, 4, 8), left), g.qdq(g.input("N", 3, 8, 5), right))


def residual(extra: str = "", batch: Any = "N", q: bool = True) -> Callable[[Any], Any]:
    def build(g: Any) -> tuple[str, ...]:
        x = g.qdq(conv(g, g.qdq(image(g, batch)), 9))
        y = conv(g, g.qdq(conv(g, x, 1)), 2)
        total = g.op("Exp", g.op("Add", g.qdq(y) if q else y, x if q else image(g, batch)))
        return (total, g.op("Exp", conv(g, x, 4))) if extra == "later" else (total, g.op("Exp", x)) if extra == "float" else (total,)

    return build


def own_input(g: Any) -> str:
    x = g.qdq(conv(g, g.qdq(image(g)), 9))
    return str(g.op("Exp", g.op("Add", g.qdq(conv(g, x, 1)), x)))


def joined(axis: int, scale: float = 0.1, q: bool = True) -> Callable[[Any], Any]:
    def build(g: Any) -> str:
        y = g.op("Concat", g.qdq(g.input(2, 4, 6, 8)), g.qdq(g.input(2, 4, 6, 8), scale=scale), axis=axis)
        return str(g.op("Softmax", g.op("Reshape", g.qdq(y) if q else y, g.const(zoo.ints(-1, 8)))))

    return build


def pad(grid: str, *pads: int, value: float = 0.0) -> Callable[[Any], Any]:
    return lambda g: g.op("Exp", g.op("Pad", g.qdq(image(g), grid), g.const(zoo.ints(*pads)), g.const(np.float32(value))))


def silu(g: Any) -> str:
    y = conv(g, g.qdq(image(g)))
    return str(g.op("Softmax", g.op("Mul", y, g.op("Sigmoid", y))))


def behind_view(kind: str, **attrs: Any) -> Callable[[Any], Any]:
    return lambda g: g.op("Softmax", g.op(kind, g.op("Transpose", conv(g, g.qdq(image(g))), perm=[0, 2, 3, 1]), **attrs))


def low_bits(g: Any) -> str:
    return str(g.op("Exp", g.op("MatMul", g.input(2, 64), g.op("DequantizeLinear", g.nibbles(TensorProto.INT4, 64, 8), g.const(np.float32(0.1))))))


def after(grid: str, kind: str) -> Callable[[Any], Any]:
    return lambda g: g.op("Softmax", g.op(kind, g.qdq(conv(g, g.qdq(image(g))), grid)))


RULES: list[tuple[str, Callable[[Any], Any], str, str, str]] = [
    ("weight zero point", lambda g: g.op("Exp", g.op("Conv", g.qdq(image(g)), weight_with_zero(g))), "Conv", "float", "a zero point that is not 0"),
    ("grid per channel", lambda g: g.op("Exp", conv(g, per_channel(g))), "Conv", "float", "more than one grid"),
    ("float input", lambda g: g.qdq(conv(g, image(g))), "Conv", "float", "does not come from 8-bit codes"),
    ("no Q at all", lambda g: conv(g, image(g)), "Conv", "float", "does not come from 8-bit codes"),
    ("transposed u8", lambda g: g.op("Exp", g.op("ConvTranspose", g.qdq(image(g)), g.weight(4, 4, 2, 2, axis=1))), "ConvTranspose", "float", "take 0"),
    ("transposed s8", lambda g: g.op("Exp", g.op("ConvTranspose", g.qdq(image(g), "s8"), g.weight(4, 4, 2, 2, axis=1))), "ConvTranspose", "int8", ""),
    ("attention s8", attention("s8", "s8"), "MatMul", "int8", ""),
    ("attention u8z u8c", attention("u8z", "u8c"), "MatMul", "int8", ""),
    ("attention u8c s8", attention("u8c", "s8"), "MatMul", "float", "the zero point of input 0 is 128"),
    ("attention s8 u8", attention("s8", "u8"), "MatMul", "float", "the zero point of input 1 is 100"),
    ("residual", residual(), "Add", "int8", ""),
    ("residual read later", residual("later"), "Add", "float", "can write its result over the other input"),
    ("residual read in float", residual("float"), "Add", "float", "can write its result over the other input"),
    ("residual without Q", residual(q=False), "Add", "int8", ""),
    ("residual without Q, fixed sizes", residual(batch=1, q=False), "Add", "float", "can write its result over the other input"),
    ("residual of its own input", own_input, "Add", "float", "can write its result over the other input"),
    ("concat of channels", joined(1), "Reshape", "int8", ""),
    ("concat of rows", joined(2), "Reshape", "float", "does not come from 8-bit codes"),
    ("concat of columns, no Q", joined(3, q=False), "Reshape", "float", "does not come from 8-bit codes"),
    ("pad", pad("u8", 0, 0, 1, 1, 0, 0, 1, 1), "Pad", "float", "it pads two dimensions with 0, and the grid's zero point is 100"),
    ("pad one dimension", pad("u8", 0, 0, 1, 0, 0, 0, 1, 0), "Pad", "int8", ""),
    ("pad zero point 0", pad("u8z", 0, 0, 1, 1, 0, 0, 1, 1), "Pad", "int8", ""),
    ("pad with 1", pad("u8z", 0, 0, 1, 1, 0, 0, 1, 1, value=1.0), "Pad", "float", "a number that is not 0"),
    ("silu", silu, "Mul", "int8", ""),
    ("activation behind a transpose", behind_view("Gelu"), "Gelu", "int8", ""),
    ("weights alone", low_bits, "MatMul", "int8", ""),
    ("Q with zero point, Sigmoid", after("u8", "Sigmoid"), "Sigmoid", "float", "a grid whose zero point is not 0"),
    ("Q without zero point, Sigmoid", after("s8", "Sigmoid"), "Sigmoid", "int8", ""),
    ("Erf", after("s8", "Erf"), "Erf", "float", "OpenVINO computes it in float"),
]


@pytest.mark.parametrize(("build", "op", "runs", "why"), [r[1:] for r in RULES], ids=[r[0] for r in RULES])
def test_rule(build: Callable[[Any], Any], op: str, runs: str, why: str) -> None:
    model = graph(build)
    predicted = lint(model, "openvino")
    assert no_counts(agrees(predicted, report(model))) == []
    hit = [o for o in predicted.ops if o.op == op][-1]
    assert hit.runs == runs and why in hit.why


def test_refused_by_the_runtime_is_not_called_integer() -> None:
    model = zoo.conv(dtype=np.uint8)
    [o] = [o for o in lint(model, "openvino").ops if o.op == "Conv"]
    assert o.runs == "float" and "refuses a file with such a convolution" in o.why
    with pytest.raises(ArtifactError, match="OpenVINO refuses it"):
        report(model)


def test_crash_of_the_runtime_is_named() -> None:
    """Not run here: OpenVINO 2026.4.1 ends the process with a segmentation fault when it compiles this file."""

    def build(g: Any, scale: Any, kind: str, grid: str) -> str:
        y = g.qdq(g.op("Concat", *(g.qdq(conv(g, g.qdq(image(g)), seed)) for seed in (0, 1)), axis=1), grid)
        return str(g.qdq(g.op("Relu", g.op(kind, y, *([g.const(scale)] if kind == "Mul" else []))), "u8z"))

    def why(*options: Any) -> str:
        return next(o.why for o in lint(graph(lambda g: build(g, *options)), "openvino").ops if o.op in ("Mul", "Sigmoid"))

    assert "OpenVINO 2026.4.1 crashes" in why(np.float32(3), "Mul", "u8")
    assert "crashes" not in why(np.float32(3), "Mul", "s8") + why(None, "Sigmoid", "u8")


def test_report_as_text_and_json() -> None:
    predicted: Any = lint(zoo.unary("Sigmoid"), "openvino")
    assert isinstance(predicted, LintReport)
    body = json.loads(predicted.to_json())
    assert body["counts"] == {"Sigmoid": [0, 1]} and body["q_left"] == 2 and len(body["left"]) == 4
    assert body["left"][0] == {"node": "n5", "why": "it rounds an input of the graph"}
    assert str(predicted).startswith("sigmoid 0/1 int8, 2 Q + 2 DQ left\n  Sigmoid n11: float, no integer layer gives its input")
    assert predicted.leftovers().splitlines()[2] == "  left: n9, Sigmoid n11, which runs in float, reads it"


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_weights_beside_the_file(target: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(zoo.conv(), path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    assert lint(path, target) == lint(zoo.conv(), target)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match="its weights cannot be read"):
        lint(path, target)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_own_artifacts(name: str) -> None:
    torch.manual_seed(0)
    m = fxq.compile(torchvision.models.get_model(name, weights=None).eval(), calibration=torch.randn(2, 3, 64, 64))
    predicted: Any = m.lint("openvino")
    assert agrees(predicted, report(onnx.load_model_from_string(m.lower().data))) == []
    assert all(floats == 0 for op, (_, floats) in predicted.counts().items() if op not in ("Add", "Mul"))


@pytest.mark.parametrize("step", [0, 1])
def test_a_shared_bias_is_added_in_a_layer_of_its_own_unless_it_is_zero(step: int) -> None:
    """Deep nets with large values: biases that round to 0 are one constant in the file, and nothing is added."""

    def build(g: Any) -> str:
        bias = g.op("DequantizeLinear", g.const(np.arange(4, dtype=np.int32) * step), g.const(np.full(4, 0.001, np.float32)), axis=0)
        x = g.qdq(conv(g, g.qdq(image(g)), 9))
        y = g.qdq(g.op("Conv", x, g.weight(4, 4, 1, 1, seed=1), bias))
        return str(g.op("Exp", g.op("Add", g.qdq(g.op("Conv", y, g.weight(4, 4, 1, 1, seed=2), bias)), x)))

    model = graph(build)
    predicted = lint(model, "openvino")
    assert agrees(predicted, report(model)) == []
    assert predicted.counts()["Add"] == ((0, 1) if step else (1, 0))
