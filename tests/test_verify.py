"""Invariants: each holds for legal graphs, and names the node and the fault where it does not."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq import graph
from fxq.graph import Grid, module_of, swap_module, walk
from fxq.modules import Quantized
from fxq.spec import QuantSpec
from fxq.verify import INVARIANTS
from tests.helpers import canonical

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.bn(self.conv(x)))  # type: ignore[no-any-return]


def faults(name: str, gm: GraphModule) -> list[tuple[str, str]]:
    return [(node.name, fault) for node, fault in INVARIANTS[name](gm)]


def compiled(portable: bool = False) -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    return fxq.compile(model, calibration=X, portable=portable).graph_module


@pytest.mark.parametrize("name", [n for n in INVARIANTS])
def test_they_hold_after_compilation(name: str) -> None:
    assert faults(name, compiled(name == "portable")) == []


def test_dropout_and_modules_that_are_called_twice_are_not_canonical() -> None:
    gm = canonical(Shared(), X)
    assert faults("canonical", gm) == [("drop", "Dropout is left")]
    conv = next(n for n in gm.graph.nodes if n.name == "conv")
    with gm.graph.inserting_after(conv):
        again = gm.graph.call_module("conv", (conv,))
    assert ("conv_1", "module conv is called by conv as well") in faults("canonical", gm)
    assert faults("shapes-known", gm) == [(again.name, "its shape is not known")]


def test_a_batch_norm_that_could_be_folded() -> None:
    gm = canonical(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), X)
    assert faults("bn-folded", gm) == [("_1", "it can be folded into _0")]
    assert faults("bn-folded", canonical(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()), X)) == []  # nothing to fold it into


def test_nodes_without_a_decision_and_grids_that_do_not_exist() -> None:
    gm = canonical(nn.Sequential(nn.Conv2d(3, 4, 1)), X)
    assert faults("annotated", gm) == [("_0", "neither integer nor float with a reason")]
    node = next(n for n in gm.graph.nodes if n.name == "_0")
    node.meta.update(integer=True, grid="mine")
    assert faults("annotated", gm) == [("_0", "its grid 'mine' does not exist")]
    graph.grids(gm)["mine"] = Grid(QuantSpec.parse("u8/pt"))
    assert faults("annotated", gm) == [] and faults("calibrated", gm) == [("_0", "its grid 'mine' has no scale")]
    node.meta.update(integer=False, float_why="because")
    assert faults("annotated", gm) == []


def test_an_integer_layer_with_a_float_weight() -> None:
    gm = compiled()
    node = next(n for n, _ in walk(gm, "conv"))
    layer = module_of(gm, node)
    assert isinstance(layer, Quantized)
    swap_module(gm, node, layer.op)
    assert faults("converted", gm) == [(node.name, "an integer layer has a float weight")]
