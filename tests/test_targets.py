"""Targets: data about runtimes."""

from dataclasses import replace

import pytest

from fxq import schemes, targets
from fxq.errors import SchemeError, TargetError
from fxq.modules import KINDS
from fxq.spec import QuantSpec


def test_names() -> None:
    assert targets.names()[0] == "onnxruntime" and targets.get("onnxruntime").summary
    with pytest.raises(TargetError, match="unknown target 'onnxrt'. did you mean 'onnxruntime'"):
        targets.get("onnxrt")
    with pytest.raises(TargetError, match="a target is a name or a Target, not 3. known: bitwise, onnxruntime"):
        targets.get(3)  # type: ignore[arg-type]


def test_a_user_registers_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_TABLE", dict(targets._TABLE))
    mine = targets.register(replace(targets.get("onnxruntime"), name="mine", opset=19))
    assert targets.get("mine") is mine and targets.get(mine) is mine and targets.register(mine) is mine
    with pytest.raises(TargetError, match="a target called 'mine' exists already. Choose another name"):
        targets.register(replace(mine, opset=20))


@pytest.mark.parametrize("name", targets.names())
def test_tables_are_consistent(name: str) -> None:
    t = targets.get(name)
    assert set(t.ops) <= {*KINDS.values(), "getitem"}
    assert set(t.share) <= set(t.ops) and all(rule.output in ("must", "may", "same") for rule in t.ops.values())
    for text in (*t.activations, *t.weights):
        assert str(QuantSpec.parse(text)) == text
    assert len(set(t.forms)) == len(t.forms)


@pytest.mark.parametrize("scheme", [n for n in schemes.names() if n != "fp8_w8a8"])
def test_every_builtin_scheme_runs_on_onnx_runtime(scheme: str) -> None:
    targets.get("onnxruntime").require(schemes.get(scheme))


@pytest.mark.parametrize(
    ("target", "scheme", "text"),
    [
        ("sm86", "iao_w8a8", "target 'sm86' does not take activation grids of u8/pt (scheme 'iao_w8a8'). Use scheme='int8', which is 'iao_w8a8_sym' here. "),
        ("tensorrt", "fp8_w8a8", "target 'tensorrt' does not take activation grids of f8/pt (scheme 'fp8_w8a8'). "),
        ("sm86", "fp8_w8a8", "target 'sm86' does not take activation grids of f8/pt"),
        ("sm86", "dynamic_w8", "target 'sm86' takes no ranges measured at run time (scheme 'dynamic_w8')"),
        ("sm86", "weight_only_w8", "target 'sm86' does not take weight grids of s8n/pc0 (scheme 'weight_only_w8')"),
        ("sm86", "weight_only_w4_b32", "target 'sm86' does not take weight grids of s4/pb32x1"),
        ("sm75", "int8", "target 'sm75' runs no int8. It runs no quantized activations; choose a compute capability from 8.0 on, or scheme='float'"),
        ("sm75", "iao_w8a8_sym", "target 'sm75' does not take activation grids of s8/pt"),
    ],
)
def test_tensorrt_refuses_what_it_does_not_run_in_integers(target: str, scheme: str, text: str) -> None:
    with pytest.raises(SchemeError) as e:
        targets.get(target).scheme(scheme)
    assert str(e.value).startswith(text)


def test_bitwise_is_onnx_runtime_by_another_name() -> None:
    t, ort = targets.get("bitwise"), targets.get("onnxruntime")
    assert t.family == t.lint_name == "onnxruntime" and t.fused
    assert replace(t, name=ort.name, summary=ort.summary, like="") == ort
    mine = replace(ort, name="mine")
    assert mine.family == mine.lint_name == "mine"


def test_int8_is_the_best_int8_of_the_target() -> None:
    assert targets.get("onnxruntime").scheme("int8").name == "iao_w8a8"
    assert all(targets.get(t).scheme("int8").name == "iao_w8a8_sym" for t in ("tensorrt", "sm80", "sm86", "sm89", "sm120", "sm121"))
    assert {targets.get(t).family for t in ("tensorrt", "sm75", "sm86")} == {"tensorrt"} and targets.get("onnxruntime").family == "onnxruntime"
