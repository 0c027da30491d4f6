"""The TensorRT lint on its zoo: what it finds and says, without TensorRT. Whether it is right is in test_lint_trt_agreement."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from fxq import lint_trt_model, lint_trt_ops
from fxq.errors import ArtifactError, TargetError
from fxq.lint import LintReport, lint
from fxq.lint_trt import CAPABILITIES, check
from fxq.lint_trt_report import SHOWN, Finding, TrtReport
from tests.trt_zoo.net import CONV, Net, act, conv, product, weight
from tests.trt_zoo.zoo import ALL, GROUPS


@pytest.mark.parametrize("group", GROUPS)
def test_findings_of_every_model(group: str) -> None:
    found = {name: {f.code for f in check(one.make(), one.target).findings} for name, one in GROUPS[group].items()}
    assert found == {name: set(one.codes) for name, one in GROUPS[group].items()}


def test_the_zoo_has_every_rule() -> None:
    seen = {code for one in ALL.values() for code in one.codes}
    assert set(lint_trt_ops.WAYS) - {"capability"} <= seen
    assert {"uint8", "missing-zero-point", "int32-bias", "code-type", "zero-point", "scale-value", "scale-count", "scale-type", "scale-expression"} <= seen
    assert {"block", "odd-4bit", "int4-block-size", "opset", "integer-op", "operator", "domain", "optimized", "type", "constant", "duplicate-name"} <= seen
    assert {"average-pool", "recurrent", "round-trip", "input-type", "fp4-activation"} <= seen


def report(name: str, target: str = "") -> TrtReport:
    return check(ALL[name].make(), target or ALL[name].target)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cnn uint8, 128", "error [uint8] QuantizeLinear4: its codes are uint8: TensorRT takes them as int8 or rejects them (zero point 128)."),
        ("no zero point", "error [missing-zero-point] QuantizeLinear3: has no zero point: ONNX says that its codes are uint8, TensorRT takes them as int8"),
        ("cnn zero point 5", "error [zero-point] QuantizeLinear4: its zero point is 5: TensorRT is symmetric only. Calibrate symmetrically"),
        ("cnn int32 bias", "error [int32-bias] DequantizeLinear18: dequantizes int32 codes. Write the bias in float (--fix does)"),
        ("scale NaN", "error [scale-value] QuantizeLinear4: its scale is nan. Calibrate with finite data"),
        ("weight scale 0", "error [scale-value] DequantizeLinear13: its scale is 0 in 1 of 16 channels, and must be above 0. Use any positive scale (dead"),
        ("scale denormal", "its scale 1.00053e-42 is a denormal number: its reciprocal overflows"),
        ("scale [1]", "warning [scale-rank] conv: Conv runs in float: the scale of DequantizeLinear8 has the shape [1]. Write the scale as a scalar of rank 0"),
        ("weights axis not written", "lie along axis 1, the output channels along axis 0 (its axis is not written: ONNX takes 1). Give the weights one scale"),
        ("weights axis not written, 8 of 16", "it has 8 scales for the 16 channels of axis 1 (the axis is not written: ONNX takes 1)"),
        ("stopped by Relu", "Conv runs in float: Relu Relu10 stands between input 0 and its DequantizeLinear. Put QuantizeLinear and DequantizeLinear behind"),
        ("conv weights only", "Conv runs in float: only its weights are quantized, input 0 is float. Quantize its input too, or leave the weights in float"),
        ("matmul weights only", "input 0 is float: they stay small in memory, the product is float"),
        ("w4a8 blocks", "MatMul has block scales (DequantizeLinear13) on quantized operands: the builder rejects it or applies them as if each column had one"),
        ("int8 by fp8", "error [mixed-types] mm: MatMul multiplies INT8 activations and FP8 weights, which has no kernel"),
        ("codes, Transpose", "error [constant] Transpose11: Transpose reads the quantized constant c9, which only DequantizeLinear may read. Fold it"),
        ("FusedConv", "com.microsoft::FusedConv was written by ONNX Runtime's optimizer. Give the file as it was before ONNX Runtime optimized it"),
        ("custom operator", "error [domain] foreign: TensorRT does not know fxq::BinaryMatMul"),
        ("function called twice", "error [duplicate-name] fxq::FakeQuant: the function holds QuantizeLinear or DequantizeLinear and is called 2 times"),
        ("residual, both quantized", "stands between Conv conv2 and Add Add42: it keeps them apart and its rounding stays. Leave it out and quantize only the"),
        ("int4 blocks of 32", "its blocks hold 32 elements: TensorRT-RTX builds that, full TensorRT takes 64 and 128 only"),
    ],
)
def test_a_finding_names_node_fact_and_way_out(name: str, text: str) -> None:
    assert text in "\n".join(map(str, report(name).findings))


@pytest.mark.parametrize(
    ("name", "runs", "why"),
    [
        ("cnn opset 17", ["int8", "int8"], ""),
        ("int4 blocks of 64", ["int4-weights"], ""),
        ("fp8 conv", ["fp8"], ""),
        ("int8, then fp8", ["int8", "fp8"], ""),
        ("conv float", ["float"], "neither input is quantized"),
        ("transposed conv", ["float"], "transposed convolutions have no integer kernel"),
        ("if around", ["float", "float"], "input 0 comes from outside the subgraph, where a DequantizeLinear does not reach it"),
        ("scale from the value", ["float"], "input 0 is dequantized by DequantizeLinear13 with a scale that is computed at run time"),
        ("int4 one block", ["float"], "INT4 weights in one block are unpacked before it"),
        ("nvfp4", ["float"], "FP4 weights are unpacked before it"),
        ("per column activations", ["float"], "the activations have one scale per channel (DequantizeLinear8)"),
    ],
)
def test_how_operations_run_and_why(name: str, runs: list[str], why: str) -> None:
    ops = report(name).ops
    assert [o.runs for o in ops] == runs
    assert {o.why for o in ops} == {why}


def test_capabilities() -> None:
    def errors(name: str, target: str) -> set[str]:
        return {f.code for f in report(name, target).errors}

    assert all(errors("matmul", target) == (set() if target != "sm75" else {"capability"}) for target in CAPABILITIES)
    assert {t for t in CAPABILITIES if errors("fp8", t)} == {"sm75", "sm80", "sm86"}
    assert {t for t in CAPABILITIES if errors("nvfp4", t)} == {"sm75", "sm80", "sm86", "sm89"}
    assert {t for t in CAPABILITIES if errors("int4 blocks of 64", t)} == {"sm75"}
    [finding] = [f for f in report("fp8", "sm86").errors if f.node.startswith("Quantize")]
    assert finding.fact == "FP8 needs compute capability 8.9, the target has 8.6"
    assert report("matmul", "sm75").ops[0].why == "compute capability 7.5 has no INT8 (input 0)"


def test_report_as_text_and_json() -> None:
    found = report("cnn int32 bias")
    assert str(found).splitlines()[0] == "sm86: 1 error, 0 warnings, conv 1 int8, gemm 1 int8"
    body = json.loads(found.to_json())
    assert (body["ok"], body["target"], body["counts"]) == (False, "sm86", {"Conv": {"int8": 1}, "Gemm": {"int8": 1}})
    assert body["findings"][0]["code"] == "int32-bias" and body["ops"][0] == {"node": "conv1", "op": "Conv", "runs": "int8", "why": ""}
    many = TrtReport("sm86", tuple(Finding("error", "uint8", f"n{i}", "fact", "way out") for i in range(SHOWN + 3)), ())
    assert str(many).count("fact") == SHOWN and "[uint8] ... and 3 more" in str(many)
    assert not many.ok and TrtReport("sm86", (Finding("warning", "opset", "n", "fact", "way out"),), ()).ok


def test_errors_come_first_and_dynamic_inputs_are_named() -> None:
    found = report("int4 odd")
    assert [f.level for f in found.findings] == ["error", "warning"]
    dynamic = report("conv dynamic sizes")
    assert dynamic.dynamic == ("x [N, 16, H, W]",) and "input x [N, 16, H, W] is dynamic: the build needs a profile" in str(dynamic)
    assert report("matmul").dynamic == ()


def test_takes_bytes_paths_and_models(tmp_path: Path) -> None:
    model = ALL["scale [1]"].make()
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    texts = {str(lint(source, "sm86")) for source in (model, path, str(path), model.SerializeToString())}
    assert len(texts) == 1 and "scale-rank" in texts.pop()
    assert isinstance(lint(model), LintReport)


def test_what_cannot_be_linted(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    for source in (tmp_path / "missing.onnx", tmp_path / "broken.onnx", b"", tmp_path):
        with pytest.raises(ArtifactError):
            lint(source, "tensorrt")
    with pytest.raises(TargetError, match="did you mean 'sm89'"):
        lint(ALL["matmul"].make(), "sm87")


def with_external_scales(folder: Path) -> Path:
    """Weights and scales in a file beside the model."""
    model = conv(act(0.0), weight(*CONV))()
    external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    path = folder / "m.onnx"
    onnx.save(model, path)
    return path


def test_external_data_present_and_absent(tmp_path: Path) -> None:
    path = with_external_scales(tmp_path)
    here = lint(path, "sm86")
    assert isinstance(here, TrtReport)
    assert {f.code for f in here.findings} == {"scale-value"}
    (tmp_path / "weights.bin").unlink()
    gone = lint(path, "sm86")
    assert isinstance(gone, TrtReport)
    assert {f.code for f in gone.findings} == {"not-checked"} and gone.ok and gone.ops[0].runs == "int8"


def test_models_without_shapes() -> None:
    model = conv()()
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    assert check(model, "sm86").findings == () and check(model, "sm86").ops[0].runs == "int8"


def test_the_model_is_not_changed() -> None:
    model = ALL["function called twice"].make()
    before = model.SerializeToString()
    check(model, "sm86")
    assert model.SerializeToString() == before


def test_unsorted_and_empty_graphs() -> None:
    model = conv()()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert check(model, "sm86").ops[0].op == "Conv"
    assert check(onnx.ModelProto(), "sm86").findings == ()


def test_the_way_back_through_a_long_chain_ends() -> None:
    g = Net()
    y = g.qdq(g.input(4, 64))
    for _ in range(500):
        y = g.op("Identity", y)
    found = check(g.model(g.op("MatMul", y, weight(64, 32, axis=1)(g))), "sm86")
    assert found.ops[0].runs == "float"


def test_joins_in_joins_are_followed_once() -> None:
    g = Net()
    y = g.qdq(g.input(4, 64))
    for _ in range(40):
        y = g.op("Max", y, y)
    assert check(g.model(g.op("MatMul", y, weight(64, 32, axis=1)(g))), "sm86").ops[0].runs == "int8"


def test_parser_tables_name_operators_and_types_of_onnx() -> None:
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    missing = lint_trt_model.NO_IMPORTER - known
    assert missing <= {"BitCast", "CumProd", "SwiGLU"}  # newer than the oldest onnx that fxq takes
    assert not set(lint_trt_model.CONTRIB) & lint_trt_model.NO_IMPORTER
    assert all(hasattr(TensorProto, name) for name in ("UINT16", "INT16", "UINT4", "FLOAT8E5M2")) and len(lint_trt_model.NO_TYPE) > 10


def test_scale_of_two_levels_is_read_through_its_dequantizer() -> None:
    g = Net(23)
    s = g.dq(g.const(np.zeros((4, 32)), TensorProto.FLOAT8E4M3FN), np.float32(0.02), zero=None)
    w = g.op("DequantizeLinear", g.codes((64, 32), TensorProto.FLOAT4E2M1), s, axis=0, block_size=16)
    found = check(g.model(g.op("MatMul", g.input(4, 64), w)), "sm120")
    assert {f.code for f in found.errors} == {"scale-value"}


def test_sparse_constants() -> None:
    model = product()()
    values, at = numpy_helper.from_array(np.ones(1, np.float32), "sparse"), numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [4]))
    assert check(model, "sm86").findings == ()


@pytest.mark.parametrize(
    ("name", "op", "attribute", "value"),
    [
        ("no zero point", "QuantizeLinear", "output_dtype", "int8"), ("weights axis -4", "DequantizeLinear", "axis", [0]),
        ("matmul turned", "Transpose", "perm", 1),
        ("through Cast to float", "Cast", "to", "float"), ("through Einsum transpose", "Einsum", "equation", [1]), ("gemm transB", "Gemm", "transB", "yes"),
        ("max pool", "MaxPool", "dilations", 2), ("through Pad reflecting", "Pad", "mode", 0), ("int4 blocks of 64", "DequantizeLinear", "block_size", [64]),
        ("scale by Cast", "Cast", "to", [1.5]), ("codes, Transpose", "Transpose", "perm", [9, 9]),
    ],
)  # fmt: skip
def test_attributes_of_another_kind_are_as_if_not_there(name: str, op: str, attribute: str, value: object) -> None:
    model = ALL[name].make()
    for node in model.graph.node:
        if node.op_type == op:
            kept = [a for a in node.attribute if a.name != attribute]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(attribute, value)])
    found = check(model, ALL[name].target)
    assert all(op.runs for op in found.ops) and str(found)


def test_needs_neither_torch_nor_tensorrt() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'tensorrt', 'tensorrt_rtx', 'onnxruntime')));"
        "import onnx; from fxq.lint_trt_fix import fix; from fxq.lint_trt import check; print(fix(onnx.ModelProto())[1], check(onnx.ModelProto()))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout == "[] tensorrt: 0 errors, 0 warnings\n"
