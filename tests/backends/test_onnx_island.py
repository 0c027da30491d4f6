"""Float islands, and what cannot be written."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq import modules as m
from fxq import schemes, targets
from fxq.backends import onnx_island
from fxq.backends.onnx_qdq import OnnxQdq
from fxq.errors import LoweringError

_spec: Any = importlib.util.spec_from_file_location("onnx_tools", Path(__file__).parents[1] / "onnx_tools.py")
t: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(t)
lower, same, rand, h = t.lower, t.same, t.rand, t.h


class Foreign(nn.Module):
    """Operations that have no canonical form: einsum, roll, masked_fill, a GRU, a sort, sizes taken from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.rnn = nn.Linear(6, 6), nn.GRU(6, 6, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.proj(x)
        scores = torch.einsum("bij,bkj->bik", y, y).masked_fill(mask, -1.0)
        turned = torch.roll(y, 2, 1).reshape(x.size(0), -1)
        out, last = self.rnn(y)
        return scores, self.proj(out) + last.transpose(0, 1), torch.cumsum(turned, 1) > 0


def test_islands_equal_torch_for_two_batch_sizes() -> None:
    torch.manual_seed(0)
    x, mask = rand(2, 5, 6), rand(2, 5, 5) > 0
    artifact = same(Foreign(), x, mask)
    assert sum(len(i) for i in artifact.info["islands"]) >= 6 and {"Einsum", "GRU"} <= set(artifact.info["ops"])


def test_an_island_does_not_swallow_a_path_through_fxq_nodes() -> None:
    class Diamond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            a = torch.cumsum(x, 1)
            return torch.cumsum(torch.cumsum(a, 1).sub(self.act(a)), 0)

    artifact = same(Diamond(), rand(2, 6))
    assert artifact.info["islands"] == [["cumsum", "cumsum_1"], ["sub", "cumsum_2"]]


class Expm1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = m.Unary("expm1")

    def forward(self, x: Tensor) -> Any:
        return self.op(x)


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        a = torch.cumsum(x, 1)
        return torch.flip(a, [1]).view(self.act(a).size(0), 3, 2)


def test_a_size_counts_as_a_path() -> None:
    """The view takes its size behind the module, which takes the first region's value: two regions or a cycle."""
    artifact = same(Sized(), rand(2, 6))
    assert artifact.info["islands"] == [["cumsum", "flip"], ["view"]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bij,jk->bik", torch.roll(x, 1, 1), self.w)


def test_equal_blocks_share_one_export(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = onnx_island._run_exporter
    monkeypatch.setattr(onnx_island, "_run_exporter", lambda *a: calls.append(1) or real(*a))
    torch.manual_seed(0)
    artifact = same(nn.Sequential(Block(), nn.Tanh(), Block(), nn.Tanh(), Block()), rand(2, 5, 6))
    assert len(calls) == 1 and len(artifact.info["islands"]) == 3


def test_forms_that_an_emitter_refuses_become_islands() -> None:
    artifact = same(Expm1(), rand(2, 6))
    assert artifact.info["islands"] == [["op"]]


class Eigen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


def test_what_nobody_can_write_is_an_issue() -> None:
    gm = h.canonical(Eigen(), rand(2, 3, 3))
    with pytest.raises(LoweringError, match="linalg_eigvalsh: fxq has no ONNX form of linalg_eigvalsh; torch's exporter refuses it"):
        OnnxQdq().lower(gm, schemes.get("float"), targets.get("onnxruntime"))


def test_a_tuple_output_and_a_name_used_twice_are_issues() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"a_b": x, "a": {"b": x}, "all": torch.sort(x)}

    gm = h.canonical(Twice(), rand(2, 3))
    issues = [str(i) for i in OnnxQdq().check(gm, schemes.get("float"), targets.get("onnxruntime"))]
    assert issues == [
        "sort: sort gives a tuple that is used as a whole. Replace the operation in the model",
        "all: this output is not a tensor with an ONNX type. Return its tensors one by one",
        "a_b: two outputs have this name. Give the model's outputs different keys",
    ]


def test_files_over_two_gib_are_refused() -> None:
    gm = h.canonical(nn.Sequential(nn.Linear(4, 4)), rand(2, 4))
    gm.get_submodule("0").weight = nn.Parameter(torch.zeros(1).expand(2**15, 2**15))
    issues = OnnxQdq().check(gm, schemes.get("float"), targets.get("onnxruntime"))
    assert [str(i) for i in issues] == ["file: the weights take 4.0 GiB, an ONNX file holds 2. Quantize more layers, or split the model"]
