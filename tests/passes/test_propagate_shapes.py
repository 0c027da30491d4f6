"""propagate-shapes: what it notes, for one and for several outputs, and what it does where a second batch size fails."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from fxq import modules as m
from fxq.errors import PassError
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.pipeline import Pipeline
from fxq.shapes import propagate

_spec: Any = importlib.util.spec_from_file_location("helpers", Path(__file__).parents[1] / "helpers.py")
h: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(h)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.split, self.flat = nn.Conv2d(3, 4, 3), m.Split([1, 3], 1), m.Reshape((-1, 4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(self.conv(x)), self.conv
        return self.flat(a[1]) if b is not None else x


def notes(gm: GraphModule) -> dict[str, tuple[Any, Any, Any]]:
    return {n.name: (n.meta["shape"], n.meta["dynamic"], n.meta["dtype"]) for n in gm.graph.nodes if n.op != "output"}


def test_shapes_dtypes_and_what_follows_the_batch() -> None:
    x = torch.zeros(2, 3, 6, 6)
    gm = h.canonical(Net(), x)
    for node in gm.graph.nodes:
        node.meta.clear()
    assert PropagateShapes().run(gm, h.context(x)) == 0
    f, batch = torch.float32, (True, False, False, False)
    assert notes(gm) == {
        "x": ((2, 3, 6, 6), batch, f),
        "conv": ((2, 4, 4, 4), batch, f),
        "split": ([(2, 1, 4, 4), (2, 3, 4, 4)], [batch, batch], [f, f]),
        "getitem": ((2, 3, 4, 4), batch, f),
        "flat": ((24, 4), (True, False), f),
    }


def test_text_says_batch_by_a_star() -> None:
    x = torch.zeros(2, 3, 6, 6)
    gm = h.canonical(Net(), x)
    history = h.run_pass(PropagateShapes(), gm, h.context(x))
    assert history["propagate-shapes"].text.splitlines()[:2] == [
        "%x = input() [*,3,6,6]",
        "%conv = conv(%x) <conv> {3, 4, kernel_size=(3, 3), stride=(1, 1)} [*,4,4,4]",
    ]


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.shape[2] // 2, -1)


def test_numbers_are_values_and_have_no_shape() -> None:
    gm = symbolic_trace(Sizes())
    propagate(gm, (torch.zeros(3, 4, 6),))
    values = {n.name: (n.meta["value"], n.meta["dynamic"]) for n in gm.graph.nodes if "value" in n.meta}
    assert values == {"size": (3, True), "getattr_1": ((3, 4, 6), True), "getitem": (6, False), "floordiv": (3, False)}
    assert all(n.meta["shape"] is None for n in gm.graph.nodes if "value" in n.meta)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 12)


def test_a_graph_for_one_batch_size_is_specialised() -> None:
    gm = symbolic_trace(Fixed())
    propagate(gm, (torch.zeros(2, 3, 4),))
    assert [n.meta["dynamic"] for n in gm.graph.nodes if n.op != "output"] == [(False, False, False), (False, False)]


class Looks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x[0, 0].int().item() :]


def test_values_are_used_where_the_meta_device_has_none() -> None:
    gm = symbolic_trace(Looks())
    propagate(gm, (torch.ones(4, 3),))
    assert next(n for n in reversed(gm.graph.nodes) if n.op != "output").meta["shape"] == (3, 3)


def test_a_module_that_runs_twice_keeps_its_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    gm = h.canonical(model, torch.zeros(2, 4))
    assert torch.equal(model[0].weight, before) and gm.get_parameter("1.weight") is gm.get_parameter("0.weight")


def test_needs_a_canonical_graph() -> None:
    with pytest.raises(PassError, match="needs canonical"):
        Pipeline((PropagateShapes(),))


def test_a_graph_that_does_not_run_says_so() -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size 9"):
        propagate(symbolic_trace(Fixed()), (torch.zeros(3, 3),))
