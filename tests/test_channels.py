"""Which channels go together, and that a cut graph computes what the masked one computes, on one small net a coupling."""

import copy

import pytest
import torch

from fxq import pruning
from fxq.budget import budget
from fxq.channel_reshape import blocks
from fxq.costs import layer_costs, total
from fxq.graph import finish, shape
from fxq.groups import find
from fxq.shapes import propagate
from fxq.snapshot import distance
from tests.pruning_nets import CASES, canonical, randomised

EXACT = 1e-12


def cut(gm, how, multiple=1):
    """``(masked graph, cut graph, plan)`` of a float64 graph, which is cut in place."""
    plan = pruning.plan(gm, how, multiple)
    masked = plan.masked()
    pruning.apply(plan)
    finish(gm)
    return masked, gm, plan


@pytest.mark.parametrize("name", CASES)
def test_groups_are_what_a_reader_finds(name):
    case = CASES[name]
    found = find(canonical(case.net(), case.input()))
    assert tuple((len(g.units), g.givers[0][1]) for g in found.groups) == case.groups
    assert list(found.left) == ["head"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CASES)
def test_the_cut_graph_computes_what_the_masked_one_computes(name, seed):
    case = CASES[name]
    torch.manual_seed(seed)
    gm = canonical(randomised(case.net(), seed), case.input())
    x = case.input(seed + 1)
    x = x if case.tokens else x.double()
    whole = copy.deepcopy(gm)
    ratio = (0.3, 0.5, 0.25, 0.6)[seed]
    masked, small, plan = cut(gm, pruning.Prune(ratio=ratio, multiple_of=1, by="random", seed=seed, scope="layer"))
    noted = {n.name: n.meta.get("shape") for n in small.graph.nodes if n.op != "output"}
    propagate(small, (x,))
    assert noted == {n.name: n.meta.get("shape") for n in small.graph.nodes if n.op != "output"}
    assert not all(k.all() for k in plan.kept)
    assert distance(masked(x), small(x)) < EXACT
    assert distance(whole(x), small(x)) > 1e-6  # something was cut that mattered
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("name", CASES)
def test_planned_costs_are_those_of_the_cut_graph(name):
    case = CASES[name]
    gm = canonical(randomised(case.net()), case.input())
    before = total(layer_costs(gm))
    plan = pruning.plan(gm, pruning.Prune(ratio=0.5, multiple_of=1, by="random", scope="layer", absorb=False), 1)
    planned = {what: [budget(plan.groups, what).cost(keep) for keep in (plan.groups.all_kept(), plan.keep)] for what in ("parameters", "bytes")}
    pruning.apply(plan)
    after = total(layer_costs(gm))
    assert plan.share == pytest.approx(after.macs / before.macs, rel=1e-9)
    for what, costs in planned.items():
        assert costs == pytest.approx([getattr(before, what), getattr(after, what)], rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_graph_can_be_cut_to_one_channel_each(name):
    case = CASES[name]
    gm = canonical(randomised(case.net()), case.input())
    x = case.input(3)
    x = x if case.tokens else x.double()
    masked, small, plan = cut(gm, pruning.Prune(ratio=0.99, multiple_of=1, by="random", scope="layer"))
    assert all(k.any() for k in plan.kept)
    assert distance(masked(x), small(x)) < EXACT


class Mixing(torch.nn.Module):
    """What a linear layer gives along the last dimension, mixed there by an operation that keeps channels (dimension 1) apart."""

    def __init__(self, mix):
        super().__init__()
        self.up, self.mix, self.down = torch.nn.Linear(6, 8), mix, torch.nn.Linear(8, 5)

    def forward(self, x):
        y = self.mix(self.up(x))
        return self.down(y if y.shape[-1] == 8 else y.expand(-1, -1, 8))


@pytest.mark.parametrize(
    "mix", [torch.nn.InstanceNorm1d(4, affine=True), torch.nn.GroupNorm(2, 4), torch.nn.AdaptiveAvgPool1d(1), torch.nn.Upsample(8, mode="linear")], ids=str
)
def test_what_is_mixed_outside_of_the_channels_stays(mix):
    found = find(canonical(Mixing(mix), torch.randn(2, 4, 6)))
    assert not found.groups and "space" in found.left["up"]


def test_norms_and_slopes_of_another_dimension_do_not_stand_in_the_way():
    """Batch norm and PReLU over dimension 1, a cut along the last one: each element by itself, and no constant is made up."""
    net = Mixing(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.PReLU(4)))
    gm = canonical(randomised(net), torch.randn(2, 4, 6))
    masked, small, plan = cut(gm, pruning.Prune(ratio=0.5, multiple_of=1, by="random", scope="layer"))
    x = torch.randn(2, 4, 6).double()
    assert [int(k.sum()) for k in plan.kept] == [4] and distance(masked(x), small(x)) < EXACT


def test_tied_weights_stay_tied():
    case = CASES["language"]
    gm = canonical(randomised(case.net()), case.input())
    _, small, _ = cut(gm, pruning.Prune(ratio=0.5, multiple_of=1, by="random", scope="layer"))
    assert small.get_submodule("tokens").weight is small.get_submodule("head").weight
    assert small.get_submodule("tokens").embedding_dim == small.get_submodule("head").in_features == 8


def test_a_module_that_runs_twice_keeps_one_weight():
    case = CASES["twice"]
    gm = canonical(randomised(case.net()), case.input())
    _, small, _ = cut(gm, pruning.Prune(ratio=0.5, multiple_of=1, by="random", scope="layer"))
    weights = {id(m.weight) for n, m in small.named_modules() if n.startswith("again")}
    assert len(weights) == 1 and small.get_submodule("again").weight.shape == (4, 4, 3, 3)


def test_grouped_convolutions_keep_equal_numbers_in_each_group():
    case = CASES["shuffled"]
    gm = canonical(randomised(case.net()), case.input())
    _, small, plan = cut(gm, pruning.Prune(ratio=0.45, multiple_of=1, by="l2", scope="layer"))
    b, c = small.get_submodule("b"), small.get_submodule("c")
    assert (b.groups, c.groups) == (4, 3)
    assert b.in_channels % 4 == 0 and b.out_channels % 12 == 0 and c.out_channels % 3 == 0  # 12: lcm of the groups around the shuffle
    group = next(g for g in plan.groups.groups if g.name == "b")
    assert group.columns is not None and (group.cells.max(), group.columns.max()) == (3, 2)


def test_reasons_name_what_stays():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1), torch.nn.Linear(4, 4))

        def forward(self, x):
            y = self.a(x) + x  # meets the model's input
            z = torch.cumsum(self.b(y), 1)  # mixes channels in a way of its own
            return self.d(self.c(z).softmax(1).mean((2, 3)))

    found = find(canonical(Net(), torch.randn(2, 3, 4, 4)))
    assert not found.groups
    assert "fixed" in found.left["a"] and "add" in found.left["a"]
    assert "cumsum" in found.left["b"]
    assert "softmax" in found.left["c"]
    assert found.left["d"] == "is an output of the model"


@pytest.mark.parametrize(
    ("source", "target", "want"),
    [
        ((1, 512, 1, 1), (1, 512), [([0], [0]), ([1], [1]), ([2, 3], [])]),
        ((4, 6, 5), (24, 5), [([0, 1], [0]), ([2], [1])]),
        ((2, 96), (2, 3, 4, 8), [([0], [0]), ([1], [1, 2, 3])]),
        ((2, 8, 8, 96), (2, 4, 2, 4, 2, 96), [([0], [0]), ([1], [1, 2]), ([2], [3, 4]), ([3], [5])]),
        ((1, 12, 7), (12, 7), [([0, 1], [0]), ([2], [1])]),
    ],
)
def test_blocks_of_a_reshape(source, target, want):
    assert list(blocks(source, target)) == want


def test_a_batch_of_one_is_a_batch():
    case = CASES["flattened"]
    found = find(canonical(case.net(), case.input()[:1]))
    assert [len(g.units) for g in found.groups] == [8, 12]


def test_shapes_of_the_graph_are_read_not_run():
    """Labels come from the shapes in the nodes' meta; the walk runs nothing."""
    case = CASES["residual"]
    gm = canonical(case.net(), case.input())
    gm.get_submodule("a").forward = None
    assert [len(g.units) for g in find(gm).groups] == [8, 12]
    assert all(shape(n) for n in gm.graph.nodes if n.op == "call_module")
