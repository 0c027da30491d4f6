"""Targets: data about runtimes."""

from dataclasses import replace

import pytest

from fxq import schemes, targets
from fxq.errors import TargetError
from fxq.modules import KINDS
from fxq.spec import QuantSpec


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
