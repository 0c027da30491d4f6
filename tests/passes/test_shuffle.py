"""The form ``shuffle``: channel shuffles vanish into the order of the weights around them."""

import copy
import dataclasses
import operator
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq import modules as m
from fxq.graph import kind
from fxq.passes.legalize import Legalize
from tests import helpers as h


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def interleave(channels: int, groups: int) -> list[int]:
    return torch.arange(channels).reshape(groups, -1).t().reshape(-1).tolist()


def only_shuffle(*inputs: Tensor) -> Any:
    ctx = h.context(*inputs)
    return dataclasses.replace(ctx, target=dataclasses.replace(ctx.target, forms=("shuffle",)))


def check(model: nn.Module, *inputs: Tensor, left: int = 0) -> tuple[Counter[str], Any]:
    """Run legalize; the numbers stay, ``left`` gathers stay. Returns how many nodes of each kind are left, and the history."""
    model = h.randomize(model)
    want = model(*inputs)
    before = copy.deepcopy(model.state_dict())
    gm = h.canonical(model, *inputs)
    gathers = sum(kind(gm, n) == "index_select" for n in gm.graph.nodes)
    history = h.run_pass(Legalize(), gm, only_shuffle(*inputs))
    assert h.moved(gm, want, *inputs) < 1e-6
    assert h.distance(want, model(*inputs)) == 0 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    kinds = Counter(kind(gm, n) for n in gm.graph.nodes)
    assert kinds["index_select"] == left
    assert history["legalize"].rewrites == gathers - left
    return kinds, history


class Unit(nn.Module):
    """A ShuffleNetV2 unit of stride 1: half of the channels pass, the other half is convolved; concat and shuffle."""

    def __init__(self, c: int, order: list[int]) -> None:
        super().__init__()
        self.split = m.Split([c // 2, c // 2], 1)
        self.a, self.r1, self.dw = nn.Conv2d(c // 2, c // 2, 1), nn.ReLU(), nn.Conv2d(c // 2, c // 2, 3, padding=1, groups=c // 2)
        self.b, self.r2, self.cat, self.shuffle = nn.Conv2d(c // 2, c // 2, 1), nn.ReLU(), m.Cat(1), m.IndexSelect(1, order)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.split(x)
        return self.shuffle(self.cat(parts[0], self.r2(self.b(self.dw(self.r1(self.a(parts[1])))))))


def net(units: int, order: list[int], *tail: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    c = len(order)
    return nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU(), m.IndexSelect(1, order), *(Unit(c, order) for _ in range(units)), *tail)


def head(c: int) -> list[nn.Module]:
    return [nn.MaxPool2d(2), m.GlobalAvgPool(), m.Reshape((-1, c)), nn.Linear(c, 5)]


def test_writes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), m.IndexSelect(1, [0, 2, 1, 3]), nn.ReLU(), nn.Conv2d(4, 2, 1))
    _, history = check(model, rand(2, 3, 5, 5))
    assert history["legalize"].text.splitlines() == [
        "%input_1 = input() [*,3,5,5]",
        "%_0 = conv(%input_1) <0> {3, 4, kernel_size=(1, 1), stride=(1, 1)} [*,4,5,5]",
        "%_2 = relu(%_0) <2> [*,4,5,5]",
        "%_3 = conv(%_2) <3> {4, 2, kernel_size=(1, 1), stride=(1, 1)} [*,2,5,5]",
        "%output = output(%_3)",
    ]


def test_units_need_one_split_a_value_and_one_cat_a_reader() -> None:
    kinds, _ = check(net(3, interleave(16, 2), *head(16)), rand(2, 3, 8, 8))
    assert kinds["split"] == 3 and kinds["cat"] == 3 and kinds["slice"] == 0


def test_even_and_odd_channels_need_an_order_of_the_producers() -> None:
    """The first half of the list holds every even channel: a producer puts them side by side."""
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    kinds, _ = check(net(3, order, *head(16)), rand(2, 3, 8, 8))
    assert kinds["split"] == 3 and kinds["cat"] == 3 and kinds["slice"] == 0


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_shufflenet_v1(groups: int) -> None:
    c = 24
    torch.manual_seed(0)
    block = [nn.Conv2d(c, c, 1, groups=groups), nn.BatchNorm2d(c), nn.PReLU(c), m.IndexSelect(1, interleave(c, groups))]
    model = nn.Sequential(*block, nn.Conv2d(c, 2 * c, 3, groups=c), nn.BatchNorm2d(2 * c), nn.Conv2d(2 * c, c, 1, groups=groups))
    with torch.no_grad():
        model[2].weight.uniform_(0, 1)  # type: ignore[union-attr,operator]
    kinds, _ = check(model, rand(2, c, 6, 6))
    assert kinds["cat"] == 1 and kinds["split"] == 1


class Passing(nn.Module):
    """Everything that hands an order on, between a random permutation and its readers."""

    def __init__(self) -> None:
        super().__init__()
        order = torch.randperm(8, generator=torch.Generator().manual_seed(5)).tolist()
        self.conv, self.mix = nn.Conv2d(3, 8, 3), m.IndexSelect(1, order)
        self.bn, self.prelu, self.pool, self.pad, self.resize = (
            nn.BatchNorm2d(8), nn.PReLU(8), nn.AvgPool2d(2, 1, 1), m.Pad((1, 0)), m.Resize((10, 7), None, "nearest"),
        )  # fmt: skip
        self.scale, self.cut, self.mean, self.fc = m.Mul(), m.Slice([(2, 0, 7, 2)]), m.Mean((2, 3)), nn.Linear(8, 4)
        self.flat, self.up, self.small = m.Reshape((-1, 8, 28)), nn.ConvTranspose1d(8, 4, 2), nn.Sigmoid()
        with torch.no_grad():
            self.prelu.weight.uniform_(0, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.resize(self.pad(self.pool(self.prelu(self.bn(self.mix(self.conv(x)))))))
        x = self.cut(self.scale(self.small(x), 3))
        return self.fc(self.mean(x)), self.up(self.flat(x))


def test_orders_are_handed_on() -> None:
    kinds, _ = check(Passing(), rand(2, 3, 6, 8))
    assert kinds["split"] == kinds["cat"] == kinds["slice"] - 1 == 0


class Features(nn.Module):
    """A backbone: the stage's output is also an output of the model."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.stage, self.pool, self.flat, self.fc = net(units, interleave(16, 2)), m.GlobalAvgPool(), m.Reshape((-1, 16)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stage(x)
        return x, self.fc(self.flat(self.pool(x)))


def test_an_output_is_gathered_once() -> None:
    kinds, _ = check(Features(3), rand(2, 3, 8, 8), left=1)
    assert kinds["output"] == 1


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.relu, self.add = nn.Conv2d(3, 8, 3), m.IndexSelect(1, interleave(8, 2)), nn.ReLU(), m.Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.add(x, self.relu(self.mix(x)))


def test_refuses_where_the_order_counts() -> None:
    _, history = check(Residual(), rand(2, 3, 6, 6), left=1)
    assert h.skips(history, "legalize") == {"mix": "what reads its channels needs them in this order"}


class Half(nn.Module):
    """One shuffle that an addition needs and one that a convolution takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Residual(), net(0, interleave(8, 4), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_refuses_one_and_takes_the_other() -> None:
    _, history = check(Half(), rand(2, 3, 6, 6), left=1)
    assert h.skips(history, "legalize") == {"first_mix": "first_relu needs its channels in this order"}


def test_refuses_too_many_pieces() -> None:
    """A grouped convolution cannot order its outputs over groups, so its reader's groups would take 64 pieces."""
    c = 64
    model = nn.Sequential(nn.Conv2d(c, c, 1, groups=8), m.IndexSelect(1, interleave(c, 8)), nn.Conv2d(c, c, 1, groups=8))
    _, history = check(model, rand(2, c, 3, 3), left=1)
    assert list(h.skips(history, "legalize")) == ["_1"]


def test_shared_axis_is_not_taken_for_channels() -> None:
    """Without a batch dimension axis 1 is no channel axis; a gather over it stays."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), m.IndexSelect(1, [2, 0, 1]), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    _, history = check(model, rand(3, 3, 3), left=1)
    assert len(history["legalize"].skips) == 1


@pytest.mark.parametrize("seed", range(12))
def test_random_routes(seed: int) -> None:
    """Random concatenations, gathers and splits between convolutions: the numbers stay, whatever is taken out."""
    g = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=g))

    graph = torch.fx.Graph()
    root = nn.Module()
    torch.manual_seed(seed)

    def call(module: nn.Module, *args: Any) -> Any:
        name = f"m{len(root._modules)}"
        root.add_module(name, module)
        return graph.call_module(name, args)

    values = [(call(nn.Conv2d(3, 8, 1), graph.placeholder("x")), 8)]
    for _ in range(14):
        (a, ca), (b, cb) = values[pick(len(values))], values[pick(len(values))]
        what = pick(6)
        if what == 0:
            values.append((call(m.Cat(1), a, b), ca + cb))
        elif what == 1:
            values.append((call(m.IndexSelect(1, torch.randperm(ca, generator=g)), a), ca))
        elif what == 2 and ca > 1:
            split = call(m.Split([ca // 2, ca - ca // 2], 1), a)
            values += [(graph.call_function(operator.getitem, (split, i)), n) for i, n in enumerate((ca // 2, ca - ca // 2))]
        elif what == 3:
            values.append((call(nn.Conv2d(ca, 2 * ca if ca < 8 else ca, 1, groups=ca), a), 2 * ca if ca < 8 else ca))
        elif what == 4:
            values.append((call((nn.ReLU(), nn.Tanh(), nn.BatchNorm2d(ca))[pick(3)], a), ca))
        else:
            values.append((call(nn.Conv2d(ca, 6, 1, groups=2 if ca % 2 == 0 and pick(2) else 1), a), 6))
    outputs = [call(nn.Conv2d(c, 2, 1), v) for v, c in values[-3:]] + ([values[-4][0]] if seed % 3 == 0 else [])
    graph.output(tuple(outputs))
    gm = h.randomize(torch.fx.GraphModule(root, graph))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    x = rand(2, 3, 4, 4)
    h.propagate(gm, (x,))
    want = gm(x)
    count = sum(kind(gm, n) == "index_select" for n in gm.graph.nodes)
    history = h.run_pass(Legalize(), gm, only_shuffle(x))
    assert h.moved(gm, want, x) < 1e-5
    assert sum(kind(gm, n) == "index_select" for n in gm.graph.nodes) <= count
    assert history["legalize"].moved is None or history["legalize"].moved < 1e-5
