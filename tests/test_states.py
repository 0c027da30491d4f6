"""Recorded graphs run again, share what a pass left alone, and say how far every value moved."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import fxq
from fxq.errors import PassError
from fxq.lineage import chain, counterparts
from fxq.moves import Moved, cosine, measure, sqnr
from fxq.snapshot import graph_text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.bn1.running_mean = torch.randn(8)
        self.bn1.running_var = torch.rand(8) + 0.1

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc((x + self.conv2(x)).mean((2, 3)))  # type: ignore[no-any-return]


def data() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=g) for _ in range(2)]


def compiled(**options: Any) -> fxq.CompiledModel:
    return fxq.compile(Net().eval(), "iao_w8a8", calibration=data(), progress=False, **options)


def test_every_graph_of_the_history_runs_again_as_it_was() -> None:
    m, x = compiled(), data()[0]
    want = Net().eval()(x)
    for s in m.history:
        gm = m.history.graph(s.name)
        assert graph_text(gm) == s.text
        close = torch.allclose(gm(x), want, rtol=1e-4, atol=1e-5)
        assert close == (s.name != "convert")
    assert torch.equal(m.history.graph("convert")(x), m(x))


def test_states_share_what_a_pass_left_alone() -> None:
    h = compiled().history
    first, folded, annotated, last = (h[n].state for n in ("canonicalize", "fold-bn", "annotate", "convert"))
    assert first is not None and folded is not None and annotated is not None and last is not None
    assert first.parts["conv2"] is folded.parts["conv2"] is last.parts["conv2"].op and first.parts["conv1"] is not folded.parts["conv1"]
    assert folded is h["legalize"].state and annotated is not folded


def test_a_released_history_keeps_its_texts() -> None:
    m = compiled()
    text, diff = m.history["fold-bn"].text, m.history.diff("fold-bn")
    m.history.release()
    assert m.history["fold-bn"].text == text and m.history.diff("fold-bn") == diff
    with pytest.raises(PassError, match="fold-bn: the graph itself was not kept. Compile the model again with states=True"):
        m.history.graph("fold-bn")
    assert all(s.state is None for s in compiled(states=False).history)


def test_a_copy_of_the_model_shares_its_history() -> None:
    m = compiled()
    assert copy.deepcopy(m).history.snapshots[3] is m.history.snapshots[3]


def test_numbers_of_every_pass() -> None:
    h = compiled(numbers=True).history
    assert not h["annotate"].numbers and not h["propagate-shapes"].numbers
    folded, converted = h["fold-bn"].numbers, h["convert"].numbers
    assert folded["conv1"].sqnr > 100, "it gives what its batch norm gave"
    assert converted["conv1_q"].steps is not None and 0.5 < converted["conv1_q"].steps < 4
    assert 15 < converted["conv1_q"].sqnr < 60 and converted["conv1_q"].cosine > 0.99
    assert "conv1_q" in h.numbers("convert") and h.numbers("annotate") == ""


def test_numbers_equal_what_the_two_graphs_give() -> None:
    m = compiled(numbers=True)
    before, now = m.history.graph("calibrate"), m
    x = m.history.example
    assert x is not None
    with torch.no_grad():
        a, b = before(*x), now(*x)
    last = next(iter(reversed([n for n in m.graph_module.graph.nodes if n.op == "call_module"])))
    noise = 10 * math.log10(float(a.double().square().sum() / (a.double() - b.double()).square().sum()))
    assert math.isclose(m.history["convert"].numbers[last.name].sqnr, noise, rel_tol=1e-6)


def test_the_history_as_json() -> None:
    body = json.loads(json.dumps(compiled(numbers=True).history.to_json(), allow_nan=False))
    assert [s["name"] for s in body][:2] == ["trace", "canonicalize"]
    conv = next(r for r in body[-1]["rows"] if r["name"] == "conv1_q")
    assert conv["kind"] == "fake_quantize" and conv["inputs"] == ["conv1"] and conv["codes"].startswith("u8") and conv["runs"] == "int"
    assert body[-1]["numbers"]["conv1_q"]["sqnr"] > 10


def graph(text: str) -> Graph:
    """``y=f(x)`` per line: a call_function node named ``y``."""
    g, made = Graph(), {}
    for line in text.split():
        name, reads = line.split("=")
        args = tuple(made[a] for a in reads.split(",") if a)
        made[name] = g.create_node("call_function", torch.relu, args, name=name) if args else g.placeholder(name)
    return g


def test_which_value_is_which() -> None:
    old = graph("x= conv=x bn=conv relu=bn add=relu,x end=add")
    assert counterparts(old, graph("x= conv=x relu=conv add=relu,x end=add"))["conv"] == "bn"
    new = graph("x= x_q=x conv=x_q conv_q=conv add=conv_q,x_q end=add")
    assert counterparts(old, new) == {"x": "x", "conv": "conv", "add": "add", "end": "end", "conv_q": "relu", "x_q": "x"}
    torn = counterparts(graph("x= a=x b=x f=a g=b"), graph("x= c=x f=c g=c"))
    assert torn == {"x": "x", "f": "f", "g": "g"}, "its readers disagree"
    assert chain([{"b": "a"}, {"c": "b", "d": "z"}]) == {"c": "a"}


def test_moves() -> None:
    a = torch.tensor([3.0, 4.0])
    assert sqnr(a, a) == math.inf and sqnr(a, a * 0.9) == pytest.approx(20) and sqnr(a, torch.ones(3)) == -math.inf
    assert sqnr(torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0])) == math.inf
    assert sqnr(a, torch.tensor([math.nan, 4.0])) == -math.inf and sqnr(torch.zeros(2), a) == -math.inf
    assert cosine(a, 2 * a) == pytest.approx(1) and cosine(a, -a) == pytest.approx(-1) and cosine(a, torch.zeros(2)) == 0
    got = measure(a, a + torch.tensor([0.0, 0.5]), torch.tensor(0.25), None)
    assert got.steps == 2 and got.total is None and got.sqnr == pytest.approx(10 * math.log10(25 / 0.25))
    assert Moved(math.inf, 1.0).to_json() == {"sqnr": None, "cosine": 1.0, "steps": None, "total": None, "reordered": False}


def test_a_graph_with_names_of_its_own_is_copied_as_it_is() -> None:
    g = graph("x= add_1=x add_7=add_1 add=add_7")
    g.output(next(n for n in g.nodes if n.name == "add"))
    gm = GraphModule(nn.Module(), g)
    from fxq.states import State

    assert [n.name for n in State.of(gm).build().graph.nodes] == ["x", "add_1", "add_7", "add", "output"]


def test_channels_in_another_order_are_put_back_before_they_are_compared() -> None:
    from fxq import zoo

    torch.manual_seed(0)
    net = zoo.nin_gc().eval()
    h = fxq.compile(net, "iao_w8a8", calibration=[torch.randn(2, 3, 32, 32)], progress=False, numbers=True).history
    moved = h["legalize"].numbers
    shuffled = [m for m in moved.values() if m.reordered]
    assert shuffled and all(m.sqnr > 60 for m in moved.values()) and "channels reordered" in h.numbers("legalize")
    a = torch.randn(2, 6, 4)
    back = measure(a, a[:, [3, 1, 0, 2, 5, 4]], None, None)
    assert back.reordered and back.sqnr == math.inf and back.cosine == pytest.approx(1)
    assert not measure(a, torch.randn(2, 6, 4), None, None).reordered


def test_a_node_under_another_name_keeps_its_value() -> None:
    h = compiled(numbers=True).history
    renamed = [n for n in h["canonicalize"].numbers if n not in {r.name for r in h["trace"].rows}]
    assert renamed, "the sum is a module now"
    assert all(h["convert"].numbers[n].total is not None for n in ("conv1_q", "conv2_q", *renamed) if n in h["convert"].numbers)
