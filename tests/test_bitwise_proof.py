"""The proof of a file that runs on packed bits: what differs is found where it arises, a tie drowns nothing, another model is not proven."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.bitwise.program import BitProgram
from fxq.compiled import CompiledModel
from fxq.errors import ArtifactError
from tests.bit_nets import BitNet, Wide, batches, compiled

X = next(batches(1, seed=5))


@pytest.fixture(scope="module")
def small() -> CompiledModel:
    return compiled("xnor_w1a1")


@pytest.fixture(scope="module")
def saved(small: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.lower("bitwise").save(tmp_path_factory.mktemp("bits") / "net.fxq")


def test_verify_takes_what_save_and_lower_give(small: CompiledModel, saved: Path) -> None:
    artifact = small.lower("bitwise")
    for given in (saved, str(saved), artifact, artifact.data):
        proof = small.verify(given, [X])
        assert proof.ok and proof.batches == 1 and proof.hidden_differ == 0 and proof.first is None
    assert small.verify(saved, [X, X], limit=1).batches == 1
    assert "operations run in float: " in str(proof) and "proven: " in str(proof)
    assert json.loads(json.dumps(proof.to_json()))["ok"]


class Several(nn.Module):
    """Outputs in a dict and a tuple: float behind bits, codes, float before bits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = BitNet(16)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = torch.relu(self.net.bn(self.net.stem(x)))
        z = torch.relu(self.net.bn_a(self.net.a(y)))
        return {"all": self.net(x), "some": (z.mean((2, 3)), y)}


def test_every_output_is_compared(tmp_path: Path) -> None:
    m = compiled("tbn_w1at", Several())
    path = m.lower("bitwise").save(tmp_path / "net.fxq")
    got, want = fxq.load(path)(X), m.reference(X)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    proof = m.verify(path, [X])
    assert proof.ok and len(proof.outputs) == 3 and proof.elements == sum(t.numel() for t in (want["all"], *want["some"])), str(proof)


def test_an_output_is_exact_where_nothing_in_front_is_float(small: CompiledModel, saved: Path) -> None:
    assert [o.exact for o in small.verify(saved, [X]).outputs] == [False]
    whole = compiled("xnor_w1a1", int8=[0, "fc1", -1])
    proof = whole.verify(whole.lower("bitwise"), [X])
    assert proof.ok and [o.exact for o in proof.outputs] == [True] and proof.differ == 0 and not proof.float_nodes, str(proof)


def test_another_model_is_not_proven(small: CompiledModel, saved: Path) -> None:
    with pytest.raises(ArtifactError, match="it holds another graph. This file belongs to another model"):
        compiled("xnor_w1a1", Wide(32)).verify(saved, [X])
    other = compiled("xnor_w1a1", seed=1)
    proof = other.verify(saved, [X])
    assert not proof.ok and proof.first is not None and "not proven" in str(proof)


def test_a_wrong_code_is_found_where_it_arises(small: CompiledModel, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = BitProgram.values
    step = next(n for n in fxq.load(saved).values(X) if n.startswith("b"))

    def values(self: BitProgram, *inputs: Any) -> dict[str, torch.Tensor]:
        found = dict(real(self, *inputs))
        found[step] = found[step].clone()
        found[step].view(-1)[0] = -found[step].view(-1)[0] if found[step].dtype == torch.int8 else found[step].view(-1)[0] ^ 1
        return found

    monkeypatch.setattr(BitProgram, "values", values)
    proof = small.verify(saved, [X])
    assert not proof.ok and proof.differences[0].tensor == step and proof.differences[0].differ == 1
    assert proof.hidden_differ == sum(d.differ for d in proof.differences) >= 1


def test_a_wrong_float_is_found_where_it_arises(small: CompiledModel, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = BitProgram.values
    step = next(n for n, v in fxq.load(saved).values(X).items() if v.is_floating_point())

    def values(self: BitProgram, *inputs: Any) -> dict[str, torch.Tensor]:
        found = dict(real(self, *inputs))
        return {**found, step: found[step] * torch.where(torch.arange(found[step].shape[-1]) == 3, by, 1.0)}

    monkeypatch.setattr(BitProgram, "values", values)
    for by, ok in ((1 + 1e-7, True), (1.5, False), (float("nan"), False)):
        proof = small.verify(saved, [X])
        assert not proof.differences if ok else proof.differences[0].tensor == step and proof.differences[0].cause == "a float result is out of the bound", by
        assert ok or not proof.ok and 1 <= proof.hidden_differ <= len(X)
        assert ok or proof.differences[-1].tensor == proof.outputs[0].name, "the reference goes on from the program's own value"


def test_a_wrong_output_is_found(small: CompiledModel, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = BitProgram.forward
    for change in (lambda y: y * 1.5, lambda y: y + float("nan")):
        monkeypatch.setattr(BitProgram, "forward", lambda self, *x, change=change: change(real(self, *x)))
        proof = small.verify(saved, [X])
        assert not proof.ok and proof.hidden_differ == 0 and [d.tensor for d in proof.differences] == [proof.outputs[0].name]
    for other in (lambda y: (y, y), lambda y: y[:, :2]):
        monkeypatch.setattr(BitProgram, "forward", lambda self, *x, other=other: other(real(self, *x)))
        with pytest.raises(ArtifactError, match="This file belongs to another model"):
            small.verify(saved, [X])


def test_a_value_of_another_shape_or_type_is_a_difference(small: CompiledModel, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = BitProgram.values
    step = next(n for n in fxq.load(saved).values(X) if n.startswith("b"))
    for change in (lambda v: v[:1], lambda v: v.to(torch.int32)):
        monkeypatch.setattr(BitProgram, "values", lambda self, *x, change=change: {k: change(v) if k == step else v for k, v in real(self, *x).items()})
        proof = small.verify(saved, [X])
        assert not proof.ok and proof.differences[0].tensor == step and proof.differences[0].cause.startswith("the program gives ["), str(proof)


def test_a_sign_next_to_zero_is_a_tie_and_drowns_nothing(small: CompiledModel, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float stem of another machine may give another sign where its value is next to 0."""
    stem = small.graph_module.get_submodule("stem")
    real, bias = type(stem).forward, next(t for n, t in stem.named_parameters() if n == "bias")
    y = real(stem, X).detach()
    near = y.abs().flatten().argmin()
    channel = int(near) // y[0, 0].numel() % y.shape[1]
    shift = float(y.flatten()[near]) * 2
    program = fxq.load(saved)
    moved = next(p for n, p in program.named_parameters() if p.shape == bias.shape and torch.equal(p, bias))
    assert 0 < abs(shift) < 1e-2 and 0 <= channel < len(moved)
    monkeypatch.setattr("fxq.bit_proof.BitProgram", lambda gm: program)
    monkeypatch.setattr("fxq.bit_proof.BOUND", 1e-2)
    with torch.no_grad():
        moved[channel] -= shift
    proof = small.verify(saved, [X])
    assert proof.ties >= 1 and proof.hidden_differ == 0 and proof.tie_nodes[0][0].startswith("stem"), str(proof)
