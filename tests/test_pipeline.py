"""Pipeline, history, invariants: order is checked first, tolerances are measured, each state is recorded."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fxq import api, schemes
from fxq.errors import PassError
from fxq.graph import module_of, swap_module
from fxq.passes.fold_bn import FoldBN
from fxq.pipeline import Pass, PassContext, Pipeline
from fxq.snapshot import History, distance
from tests.helpers import canonical, context, run_pass

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Double(Pass):
    """Doubles a conv's weights: moves the output."""

    name: ClassVar[str] = "double"
    tolerance: ClassVar[float | None] = 1e-3
    factor: float = 2.0

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        node = next(n for n in gm.graph.nodes if n.op == "call_module")
        old = module_of(gm, node)
        new = nn.Conv2d(3, 4, 1)
        new.weight, new.bias = nn.Parameter(old.weight.detach() * self.factor), old.bias  # type: ignore[operator,union-attr,assignment]
        swap_module(gm, node, new)
        return 1


def test_a_pass_that_moves_the_output_too_far_is_named() -> None:
    gm = canonical(nn.Sequential(nn.Conv2d(3, 4, 1)), X)
    with pytest.raises(PassError, match=r"double: moved the output by .* more than its tolerance 1e-03"):
        Pipeline((Double(),)).run(gm, context(X), History())


def test_a_small_move_is_measured_and_recorded() -> None:
    history = run_pass(Double(factor=1.0001), canonical(nn.Sequential(nn.Conv2d(3, 4, 1)), X), context(X))
    moved = history["double"].moved
    assert moved is not None and 0 < moved < 1e-3 and f"{moved:.2e}" in str(history)


def test_order_is_checked_before_anything_runs() -> None:
    with pytest.raises(PassError, match="fold-bn: needs canonical, shapes-known, which no earlier pass ensures"):
        Pipeline((FoldBN(),))
    for name in schemes.names():
        assert api.pipeline_for(schemes.get(name)).passes[0].name == "canonicalize"


@dataclass(frozen=True)
class Liar(Pass):
    """Promises folded batch norms and does nothing."""

    name: ClassVar[str] = "liar"
    ensures: ClassVar[tuple[str, ...]] = ("bn-folded",)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        return 0


def test_a_broken_promise_names_pass_node_and_fact() -> None:
    gm = canonical(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), X)
    with pytest.raises(PassError, match="liar / _1: bn-folded does not hold: it can be folded into _0"):
        Pipeline((Liar(),)).run(gm, context(X), History())


def test_debug_and_dump(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FXQ_DEBUG", "1")
    monkeypatch.setenv("FXQ_DUMP", str(tmp_path / "dump"))
    monkeypatch.setenv("FXQ_VERIFY", "1")
    api.compile(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), calibration=X)
    assert "fxq: calibrate:" in capsys.readouterr().err
    files = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert files[0] == "01-canonicalize.txt" and files[-1].endswith("convert.txt")
    assert "fake_quantize" in (tmp_path / "dump" / files[-1]).read_text()


def test_history_offers_the_nearest_pass_and_plain_data() -> None:
    m = api.compile(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "float", example=X)
    with pytest.raises(PassError, match="did you mean 'fold-bn'"):
        m.history.diff("fold")
    assert m.history.to_json()[0]["name"] == "trace" and m.history.diff("annotate").startswith("--- before annotate")


def test_distance_treats_nan_in_the_same_place_as_equal() -> None:
    a = torch.tensor([1.0, float("nan"), float("inf")])
    assert distance(a, a.clone()) == 0
    assert distance(a, torch.tensor([1.0, 2.0, float("inf")])) == float("inf")
    assert distance({"y": torch.ones(2)}, {"y": torch.tensor([1.0, 1.5])}) == 0.5
