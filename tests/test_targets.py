"""Targets: data about runtimes."""

from dataclasses import replace

import pytest

from fxq import schemes, targets
from fxq.errors import SchemeError, TargetError
from fxq.modules import KINDS
from fxq.spec import QuantSpec
from fxq.targets import Target


def test_names() -> None:
    assert targets.names()[0] == "onnxruntime" and targets.get("onnxruntime").summary
    with pytest.raises(TargetError, match="unknown target 'onnxrt'. did you mean 'onnxruntime'"):
        targets.get("onnxrt")
    with pytest.raises(TargetError, match="a target is a name or a Target, not 3. known: onnxruntime"):
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


@pytest.mark.parametrize("scheme", schemes.names())
def test_every_builtin_scheme_runs_on_onnx_runtime(scheme: str) -> None:
    targets.get("onnxruntime").require(schemes.get(scheme))


def test_the_opset_of_signed_activations() -> None:
    t = targets.get("onnxruntime")
    assert t.for_scheme(schemes.get("iao_w8a8")) is t and t.for_scheme(schemes.get("float")) is t
    assert t.for_scheme(schemes.get("iao_w8a8_sym")) == replace(t, opset=20)
    four = replace(schemes.get("iao_w8a8_sym"), name="iao_w4a8_sym", weight=QuantSpec.parse("s4n/pc0"))
    with pytest.raises(SchemeError, match=r"does not take weights of s4n/pc0 with activations of s8/pt \(scheme 'iao_w4a8_sym'\). Use u8/pt activations"):
        t.require(four)
    assert replace(t, opset=19).for_scheme(schemes.get("iao_w8a8_sym")).opset == 19
    assert Target("none", "takes nothing").for_scheme(schemes.get("iao_w8a8_sym")).opset == 21
