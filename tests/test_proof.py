"""The proof: what it says of a good file, and which node and cause it names for a bad one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq.exposed
from fxq import modules as m
from fxq.errors import ArtifactError
from fxq.lowering import Artifact
from fxq.modules import Quantized
from fxq.proof import Proof, verify
from tests.converted import converted, fq, onnx_bytes


class Chain(nn.Module):
    """Two convolutions; ``island`` puts a layer norm between them, ``again`` a second grid."""

    def __init__(self, spec: str = "u8/pt", *, island: bool = False, again: bool = False) -> None:
        super().__init__()
        self.x_q, self.a, self.a_q = fq(spec=spec), nn.Conv2d(3, 6, 3, padding=1), fq(spec=spec)
        self.b, self.b_q = nn.Conv2d(6, 4, 1), fq(spec=spec)
        self.norm, self.norm_q = (nn.LayerNorm(7), fq(spec=spec)) if island else (None, None)
        self.again = fq(spec=spec) if again else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a_q(self.a(self.x_q(x)))
        if self.norm is not None and self.norm_q is not None:
            y = self.norm_q(self.norm(y))
        if self.again is not None:
            y = self.again(y)
        out: Tensor = self.b_q(self.b(y))
        return out


class Halves(nn.Module):
    """An add of two readers of one value: with signed grids the runtime leaves it in float."""

    def __init__(self) -> None:
        super().__init__()
        s = "s8/pt"
        self.x_q, self.a, self.a_q, self.b, self.b_q = fq(spec=s), nn.Conv2d(3, 3, 1), fq(spec=s), nn.Conv2d(3, 3, 1), fq(spec=s)
        self.mul, self.mul_q = m.Mul(), fq(spec=s)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a_q(self.a(self.x_q(x)))
        out: Tensor = self.mul_q(self.mul(self.b_q(self.b(y)), y))
        return out


class Rounded(nn.Module):
    """Another model with the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = fq(), nn.ReLU(), fq()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.relu(self.first(x)))
        return out


def images(seed: int = 1, n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 7, generator=torch.Generator().manual_seed(seed))


def chain(**options: Any) -> GraphModule:
    torch.manual_seed(0)
    return converted(Chain(**options), images(0))


def changed(data: bytes, name: str, change: Callable[[Any], Any]) -> bytes:
    """The file with one initializer changed."""
    model = onnx.load_from_string(data)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    return model.SerializeToString()


def test_a_good_file() -> None:
    gm = chain()
    proof = verify(gm, onnx_bytes(gm), [images(1), (images(2),)])
    assert proof.ok and proof.first is None and (proof.nodes, proof.planned, proof.batches) == (3, 3, 2)
    hidden = 2 * 2 * (3 + 6 + 4) * 56
    assert str(proof).splitlines() == [
        f"0 of {hidden} elements differ (3 of 3 integer nodes compared, each given the runtime's own inputs; 2 batches)",
        "1 output: 0 of 896 elements differ end to end",
        "proven: every element is equal",
    ]
    assert proof.exact and proof.outputs[0].exact
    assert json.loads(json.dumps(proof.to_json()))["ok"] is True


def test_nothing_compared_is_no_proof() -> None:
    gm = chain()
    assert not verify(gm, onnx_bytes(gm), []).ok
    assert not Proof(10, 0, 0.0, 0, 3, 0, 0, 0, 1).ok


@pytest.mark.parametrize(("name", "change", "node", "cause"), [
    ("a_q_scale", lambda v: v * np.float32(1.01), "a", "the file has another grid there"),
    ("a_q_zero", lambda v: (v + 1).astype(v.dtype), "a", "the file has another grid there"),
    ("a/weight_q", lambda v: np.roll(v, 1, 0), "a", "the file holds another weight"),
    ("b/bias_q", lambda v: v + np.int32(100), "b", "the file holds another bias"),
])  # fmt: skip
def test_names_the_first_node_that_differs_and_why(name: str, change: Callable[[Any], Any], node: str, cause: str) -> None:
    gm = chain()
    proof = verify(gm, changed(onnx_bytes(gm), name, change), [images()])
    assert not proof.ok and proof.differ > 0 and proof.first == node
    assert proof.differences[0].cause == cause and proof.differences[0].differ > 0
    assert f"the first node that differs is {node}: {proof.differences[0].differ} of " in str(proof) and cause in str(proof)


def test_a_difference_is_found_where_it_arises_not_behind() -> None:
    gm = chain()
    proof = verify(gm, changed(onnx_bytes(gm), "a/weight_q", lambda v: np.roll(v, 1, 0)), [images()])
    assert [d.node for d in proof.differences] == ["a"]  # b got the runtime's own inputs and agrees


def test_an_op_that_the_runtime_leaves_in_float_is_named() -> None:
    torch.manual_seed(0)
    gm = converted(Halves(), images(0, 64))
    proof = verify(gm, onnx_bytes(gm), [images(3, 64)])
    assert not proof.ok and any("did not fuse it" in d.cause for d in proof.differences), str(proof)


def test_merged_grids_are_named() -> None:
    gm = chain(again=True)
    again: Any = gm.get_submodule("again")
    again.scale = again.scale * 1.7
    proof = verify(gm, onnx_bytes(gm), [images()])
    assert not proof.ok and "merged two grids" in proof.differences[0].cause
    assert proof.missing == ("again",) and proof.nodes == 3 and proof.planned == 4


def test_float_islands_are_stated_and_checked() -> None:
    gm = chain(island=True)
    data = onnx_bytes(gm)
    proof = verify(gm, data, [images()])
    assert proof.ok and proof.float_nodes == ("norm",) and "1 operation runs in float: norm" in str(proof)
    assert not proof.outputs[0].exact and "1 output behind float operations: 0 of 448" in str(proof)
    bad = verify(gm, changed(data, "norm/weight", lambda v: v * np.float32(1.1)), [images()])
    assert not bad.ok and bad.differences[0].cause == "the float operation norm before it" and "not proven: the first node" in str(bad)


def test_a_float_bias_is_the_cause() -> None:
    gm = chain()
    layer: Any = gm.get_submodule("b")
    gm.add_submodule("b", Quantized(layer.op, layer.weight_grid.qparams))
    data = changed(onnx_bytes(gm), "b/bias", lambda v: v + np.float32(0.5))
    proof = verify(gm, data, [images()])
    assert proof.first == "b" and proof.differences[0].cause == "its bias is float, so it is not fused"


class Tail(nn.Module):
    """One exact output, and one behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.x_q, self.a, self.a_q, self.norm = fq(), nn.Conv2d(3, 6, 1), fq(), nn.LayerNorm(7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a_q(self.a(self.x_q(x)))
        return y, self.norm(y)


def tail() -> GraphModule:
    torch.manual_seed(0)
    return converted(Tail(), images(0))


def test_outputs_behind_float_operations_are_judged_by_the_bound() -> None:
    gm = tail()
    data = onnx_bytes(gm)
    good = verify(gm, changed(data, "norm/bias", lambda v: v + np.float32(2e-5)), [images()])
    assert good.ok and not good.exact and [o.exact for o in good.outputs] == [True, False]
    assert 0 < good.outputs[1].error < good.bound == 1e-4 and good.outputs[0].differ == 0 < good.outputs[1].differ
    lines = str(good).splitlines()
    assert lines[1] == "1 output: 0 of 672 elements differ end to end"
    assert lines[2].startswith("1 output behind float operations: ") and lines[2].endswith("of it given the runtime's own codes (allowed: 0.0001)")
    assert lines[-1] == "proven: integer nodes are equal, outputs behind float operations are within the bound"
    bad = verify(gm, changed(data, "norm/bias", lambda v: v + np.float32(2e-3)), [images()])
    assert not bad.ok and bad.first == bad.outputs[1].name and bad.outputs[1].error > bad.bound
    assert "the float operation" not in bad.differences[0].cause and "gives another result than the file" in bad.differences[0].cause


def test_a_float_operation_elsewhere_does_not_excuse_an_exact_output() -> None:
    gm = tail()
    proof = verify(gm, onnx_bytes(gm), [images()])
    wrong = replace(proof, differ=1, outputs=(replace(proof.outputs[0], differ=1), proof.outputs[1]))
    assert proof.ok and not wrong.ok and wrong.verdict == "not proven: an output that no float operation precedes differs"


def test_ties_are_excused_only_next_to_the_half_step() -> None:
    gm = chain(island=True)
    data = onnx_bytes(gm)
    x = images(5, 40)
    near = verify(gm, changed(data, "norm/bias", lambda v: v + np.float32(2e-5)), [x])
    assert near.ok and near.ties > 0 and near.tie_nodes == (("norm_q", near.ties),) and near.hidden_differ == 0
    assert f"{near.ties} codes are one step off where a float result lies next to a half step: norm_q {near.ties}" in str(near)
    far = verify(gm, changed(data, "norm/bias", lambda v: v + np.float32(5e-3)), [x])
    assert not far.ok and far.first == "norm" and far.differences[0].greatest == 1  # one step off, but not next to a half step


def test_movers_alone_keep_an_output_exact() -> None:
    gm = converted(nn.Sequential(fq(), nn.Conv2d(3, 2, 1), fq(), nn.ReLU(), nn.MaxPool2d(2), nn.Tanh()), images(0))
    assert not verify(gm, onnx_bytes(gm), [images()]).outputs[0].exact
    gm = converted(nn.Sequential(fq(), nn.Conv2d(3, 2, 1), fq(), nn.ReLU(), nn.MaxPool2d(2)), images(0))
    assert verify(gm, onnx_bytes(gm), [images()]).outputs[0].exact


def test_an_artifact_is_taken_as_it_is() -> None:
    gm = chain()
    assert verify(gm, Artifact("onnx-qdq", onnx_bytes(gm)), [images()]).ok


def test_a_wrong_float_output_is_found() -> None:
    torch.manual_seed(0)
    gm = converted(nn.Sequential(nn.LayerNorm(7)), images(0))
    data = onnx_bytes(gm)
    assert verify(gm, data, [images()]).ok
    proof = verify(gm, changed(data, "0/weight", lambda v: v * np.float32(1.1)), [images()])
    assert not proof.ok and "gives another result than the file" in proof.differences[0].cause


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = chain()
    data = onnx_bytes(gm)
    want = verify(gm, data, [images()])
    monkeypatch.setattr(fxq.exposed, "CHUNK_BYTES", 1)
    assert verify(gm, data, [images()]) == want


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    gm = chain()
    data = onnx_bytes(gm)
    path = tmp_path / "m.onnx"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="m.onnx: .*Lower the model again"):
        verify(gm, path, [images()])
    with pytest.raises(ArtifactError, match="cannot be read"):
        verify(gm, tmp_path / "no.onnx", [images()])
    with pytest.raises(ArtifactError, match="its inputs are x, the graph's image"):
        verify(gm, data, [images()], input_names=["image"])
    with pytest.raises(ArtifactError, match="2 of 2 quantized tensors are not in it .*belongs to another model"):
        verify(converted(Rounded(), images(0)), data, [images()])
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="not a whole ONNX file"):
        verify(gm, path, [images()])


def test_outputs_and_shapes_of_another_model() -> None:
    gm = chain()
    wide = Chain()
    wide.b = nn.Conv2d(6, 5, 1)
    with pytest.raises(ArtifactError, match=r"output 0 has shape \[2, 5, 8, 7\], the graph's \[2, 4, 8, 7\].*belongs to another model"):
        verify(gm, onnx_bytes(converted(wide, images(0))), [images()])


def test_inputs_that_do_not_fit() -> None:
    gm = chain()
    data = onnx_bytes(gm)
    with pytest.raises(ArtifactError, match="Check the shapes of the data"):
        verify(gm, data, [torch.randn(2, 5, 8, 7)])
    with pytest.raises(ArtifactError, match="a batch has 2 inputs, the file 1"):
        verify(gm, data, [(images(), images())])
