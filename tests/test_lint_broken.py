"""Files that are no valid graph: one clear line, never a traceback, never a hang; files of other tools in forms of their own."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fxq
from fxq.command import main
from fxq.errors import ArtifactError
from fxq.lint import agrees, lint, runtime_report
from fxq.lint_fix import fix
from fxq.lint_ov_runtime import report
from fxq.lint_whole import refusing
from fxq.portability_lint import check
from tests.lint_zoo import GROUPS, conv
from tests.trt_zoo.mutants import mutant
from tests.trt_zoo.zoo import ALL

LOOKS: dict[str, Callable[[Any], Any]] = {"onnxruntime": lint, "openvino": lambda m: lint(m, "openvino"), "fix": fix, "portable": check}


def relu(*edges: tuple[str, str]) -> onnx.ModelProto:
    """Relu nodes from tensor to tensor; ``x`` is the input."""
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in edges]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in ("x", "y")]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def short_scale() -> onnx.ModelProto:
    model = conv()
    next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT).raw_data = b"123"
    return model


def no_inputs() -> onnx.ModelProto:
    model = conv()
    for node in model.graph.node:
        del node.input[1:]
    return model


BROKEN: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "ring": (lambda: relu(("x", "y"), ("a", "b"), ("b", "a")), "its nodes wait for each other in a ring: "),
    "itself": (lambda: relu(("x", "y"), ("z", "z")), "its nodes wait for each other in a ring: z"),
    "missing": (lambda: relu(("x", "z"), ("gone", "y")), "the Relu node 'y' reads the tensor 'gone', which nothing gives"),
    "twice": (lambda: relu(("x", "y"), ("x", "y")), "the tensor 'y' is made by two nodes"),
    "scale": (short_scale, "it is no valid ONNX model: TensorProto"),
    "inputs": (no_inputs, "it is no valid ONNX model: Node"),
}


@pytest.mark.parametrize("options", ["", "--target openvino", "--portable", "--fix"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name: str, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, message = BROKEN[name]
    file = tmp_path / "broken.onnx"
    onnx.save(build(), file)
    assert main(["lint", str(file), *options.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and f"broken.onnx: {message}" in err and ".." not in err


@pytest.mark.parametrize("look", LOOKS)
def test_mutants_are_read_or_refused(look: str) -> None:
    """What the checker takes is never refused by accident: an exception over a valid model goes through and fails here."""
    refused = 0
    for seed in range(120):
        r = random.Random(seed)
        model = mutant(ALL[r.choice(sorted(ALL))].make(), seed, r.randint(1, 3))
        try:
            LOOKS[look](model)
        except ArtifactError as e:
            refused += 1
            assert e.way_out
    assert 0 < refused < 120


def test_our_own_faults_are_not_the_file_s() -> None:
    with pytest.raises(KeyError), refusing(conv()):
        raise KeyError("ours")


def test_weights_beside_a_broken_model_are_not_blamed() -> None:
    model = conv()
    weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    onnx.external_data_helper.set_external_data(weight, "nowhere.bin")
    weight.ClearField("raw_data")
    with pytest.raises(KeyError), refusing(model):
        raise KeyError("ours")


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float16, scales and all."""
    model.opset_import[0].version, model.ir_version = max(21, model.opset_import[0].version), max(10, model.ir_version)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def halves(part: int, parts: int, *more: str) -> list[tuple[str, onnx.ModelProto]]:
    groups = ("convs", "gemms", "matmuls", "pointwise", "movers", "binaries", *more)
    cases = [(f"{group} {name}", build) for group in groups for name, build in GROUPS[group]() if "opset" not in name and "Resize" not in name]
    return [(name, half(build())) for name, build in cases[part::parts]]


def test_float16_files_run_as_predicted_in_onnxruntime() -> None:
    kinds = set()
    for name, model in halves(1, 6, "chains"):
        found = lint(model)
        assert agrees(found, runtime_report(model)) == [], name
        kinds |= {o.runs for o in found.ops}
    assert kinds == {"int8", "float"}


def test_float16_concat_is_said_to_be_refused() -> None:
    model = half(dict(GROUPS["joins"]())["concat different"]())
    assert "may refuse the file" in next(o.why for o in lint(model).ops if o.op == "Concat")
    with pytest.raises(ArtifactError, match="cannot load it"):
        runtime_report(model)


def test_repairs_of_float16_files_load() -> None:
    cases = [("chains", "batch_norm"), ("matmuls", "(2, 3, 8) {'add': 'codes', 'middle': False, 'q': False}"), ("readers", "Squeeze qtd")]
    for group, name in cases:
        model = half(dict(GROUPS[group]())[name]())
        fixed, _ = fix(model)
        assert runtime_report(model) and runtime_report(fixed), name


def test_float16_files_run_as_predicted_in_openvino() -> None:
    for name, model in halves(3, 12):
        if name not in ("convs u8 weight",):
            assert agrees(lint(model, "openvino"), report(model)) == [], name


def called() -> onnx.ModelProto:
    """A quantized convolution as a function of the model's own, and a call of it."""
    model = conv()
    graph = model.graph
    given = [v.name for v in graph.input] + [t.name for t in graph.initializer]
    function = helper.make_function("own", "Layer", given, [o.name for o in graph.output], graph.node, [model.opset_import[0]])
    call = helper.make_node("Layer", given, [o.name for o in graph.output], domain="own", name="call")
    whole = helper.make_graph([call], "calls", graph.input, graph.output, graph.initializer)
    imports = [model.opset_import[0], helper.make_opsetid("own", 1)]
    return helper.make_model(whole, functions=[function], opset_imports=imports, ir_version=model.ir_version)


def test_functions_are_looked_into(tmp_path: Path) -> None:
    model = called()
    found = lint(model)
    assert found.counts() == {"Conv": (1, 0)} and agrees(found, runtime_report(model)) == []
    found = lint(model, "openvino")
    assert found.counts() == {"Conv": (1, 0)} and agrees(found, report(model)) == []
    onnx.save(model, tmp_path / "called.onnx")
    assert "quantized 2 QuantizeLinear, 4 DequantizeLinear" in str(fxq.doctor(tmp_path / "called.onnx"))


def test_what_an_if_holds_is_said_to_be_unknown() -> None:
    inner = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    bodies = [helper.make_graph([helper.make_node(op, ["x"], ["inner"])], op, [], [inner]) for op in ("Relu", "Abs")]
    node = helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy")
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    model = helper.make_model(helper.make_graph([node], "g", [x, c], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for target in ("onnxruntime", "openvino"):
        assert "are not looked at" in lint(model, target).ops[0].why


def test_weights_beside_a_file_in_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(conv(), tmp_path / "net.onnx", save_as_external_data=True, size_threshold=0, location="net.bin")
    assert main(["lint", str(tmp_path / "net.onnx"), "--portable"]) == 0
    assert "of 1 integer operations can saturate" in capsys.readouterr().out
