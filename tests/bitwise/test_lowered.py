"""Nets lowered to bits: every value of every step equals the integer reference, bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import schemes
from fxq.bitwise import modules
from fxq.bitwise.lowered import lower, lower_graph
from fxq.bitwise.program import BitProgram
from fxq.compiled import CompiledModel
from tests.bit_checks import differing
from tests.bit_nets import SCHEMES, BitNet, batches, compiled, randomized
from tests.lowbit_nets import qat, steps

KINDS = {"xnor_w1a1": "binary x binary", "twn_wta1": "ternary x binary", "tbn_w1at": "binary x ternary", "twn_wtat": "ternary x ternary"}


def made(net: nn.Module, scheme: Any = "xnor_w1a1", side: int = 12, seed: int = 0) -> CompiledModel:
    data = list(batches(side=side, seed=seed))
    return fxq.compile(randomized(net, seed), SCHEMES.get(scheme, scheme), calibration=data, progress=False)


def images(batch: int = 2, side: int = 12, seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def kinds(gm: torch.fx.GraphModule) -> list[str]:
    return [type(m).__name__ for m in gm.modules()]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_value_equals_the_reference(scheme: str) -> None:
    m = compiled(scheme)
    program = BitProgram(m.graph_module)
    for x in (images(3), images(1, seed=6), images(2, side=17)):
        assert differing(m.graph_module, x, program=program) == []
    assert {r.kind for r in program.report().layers} == {KINDS.get(scheme, "binary x binary")}
    assert {"stem_q", "pool_signed_q", "b_q", "d_q"} <= set(program.values(images()))


@pytest.mark.parametrize("width", [5, 64, 70, 130])
def test_odd_and_whole_words(width: int) -> None:
    m = made(BitNet(width), "xnor_w1a1" if width % 2 else "tbn_w1at")
    assert differing(m.graph_module, images()) == []


@pytest.mark.parametrize("order", ["C-B-A-P", "B-A-C-P"])
@pytest.mark.parametrize("scheme", ["xnor_w1a1", "tbn_w1at"])
def test_orders_of_batch_norm_activation_and_pool(scheme: str, order: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 20, 3), nn.Conv2d(20, 24, 3, padding=1, bias=False), nn.Conv2d(24, 24, 3, bias=False)
            self.bn_b, self.bn_c, self.fc = nn.BatchNorm2d(24), nn.BatchNorm2d(24), nn.Conv2d(24, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.a(x)), 3, 2, 1)
            x = F.max_pool2d(F.relu(self.bn_b(self.b(x))), 2)
            return self.fc(F.relu(self.bn_c(self.c(x))))  # type: ignore[no-any-return]

    chosen = replace(SCHEMES[scheme], name=f"{scheme}_{order}", order=order)
    assert differing(made(Pooled(), chosen, side=20).graph_module, images(side=20)) == []


def test_the_local_mean_of_the_input() -> None:
    m = made(BitNet(8), schemes.get("xnor_w1a1_k"))
    assert differing(m.graph_module, images()) == []


class Tail(nn.Module):
    """A convolution whose output is flattened into a linear layer."""

    def __init__(self, pool: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveMaxPool2d(1) if pool == 12 else nn.MaxPool2d(pool)
        self.fc1, self.bn1, self.fc2, self.fc3 = nn.Linear(6 * (12 // pool) ** 2, 70, bias=False), nn.BatchNorm1d(70), nn.Linear(70, 70), nn.Linear(70, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.b(F.relu(self.a(x)))))).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.bn1(self.fc1(x))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("scheme", "pool"), [("xnor_w1a1", 2), ("tbn_w1at", 4), ("twn_wta1", 12)])
def test_flatten_into_a_linear_layer(scheme: str, pool: int) -> None:
    m = made(Tail(pool), scheme)
    found = lower(m.graph_module)
    assert differing(m.graph_module, images()) == []
    assert found.layers["fc1"].shape == ((70, 6, 12 // pool, 12 // pool) if pool < 12 else (70, 6, 1, 1))
    assert "Unpack" not in kinds(found.graph_module)


def test_mlp_and_leading_dimensions() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b, self.last = nn.Linear(12, 40), nn.Linear(40, 33), nn.Linear(33, 66), nn.Linear(66, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.b(F.relu(self.a(F.relu(self.first(x)))))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    for shape in ((4, 12), (4, 5, 12), (2, 3, 5, 12)):
        m = fxq.compile(Mlp().eval(), "xnor_w1a1", calibration=torch.randn(shape), progress=False)
        assert len(lower(m.graph_module).layers) == 2
        assert differing(m.graph_module, torch.randn(shape)) == []


@pytest.mark.parametrize("scheme", ["xnor_w1a1", "twn_wtat"])
def test_one_dimension(scheme: str) -> None:
    class Signal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(3, 12, 5), nn.Conv1d(12, 70, 3, 2, 1, groups=2), nn.Conv1d(70, 20, 3, dilation=2, padding=2)
            self.bn, self.fc, self.last = nn.BatchNorm1d(70), nn.Linear(20, 30), nn.Linear(30, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool1d(F.relu(self.bn(self.b(F.relu(self.a(x))))), 3, 2, 1)
            return self.last(F.relu(self.fc(F.relu(self.c(x)).transpose(1, 2))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    m = fxq.compile(randomized(Signal()), SCHEMES[scheme], calibration=torch.randn(4, 3, 40), progress=False)
    found = lower(m.graph_module)
    assert {"b", "c"} <= set(found.layers) and "BitMaxPool" in kinds(found.graph_module)
    for length in (40, 53):
        assert differing(m.graph_module, torch.randn(2, 3, length)) == []


class Shuffled(nn.Module):
    """A channel shuffle behind a max pool, a concatenation of odd parts, a split."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 30, 3), nn.Conv2d(30, 36, 3, padding=1, groups=groups), nn.Conv2d(36, 30, 3, padding=1, groups=groups)
        self.d, self.last = nn.Conv2d(66, 20, 1), nn.Conv2d(10, 4, 1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(n) for n in (36, 30))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.max_pool2d(F.relu(self.bns[0](self.b(x))), 2)
        n, c, h, w = x.shape
        x = x.reshape(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = torch.cat([F.relu(self.bns[1](self.c(x))), x], 1)
        a, b = F.relu(self.d(x)).chunk(2, 1)
        return self.last(a * b)  # type: ignore[no-any-return]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scheme", ["xnor_w1a1", "tbn_w1at"])
def test_shuffles_concatenations_and_splits(scheme: str, groups: int) -> None:
    m = made(Shuffled(groups), scheme)
    assert differing(m.graph_module, images()) == []
    names = kinds(lower_graph(m.graph_module))
    assert "BitCat" in names and ("BitSelect" in names) == (groups > 1), "rows of a layer of one group stand in any order"


@pytest.mark.parametrize("first", [True, False])
def test_a_shuffle_stays_where_its_input_has_another_reader(first: bool) -> None:
    """The other reader stands in front of the shuffle, or behind it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 24, 3), nn.Conv2d(24, 16, 1), nn.Conv2d(24, 16, 1, groups=2)
            self.bn, self.last = nn.BatchNorm2d(24), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(self.bn(self.b(F.relu(self.a(x)))))
            y = F.relu(self.c(x)) if first else x
            n, c, h, w = x.shape
            z = F.relu(self.d(x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))
            return self.last(y if first else F.relu(self.c(x))), self.last(z)

    m = made(Two())
    program = BitProgram(m.graph_module)
    assert differing(m.graph_module, images(), program=program) == [] and len(program.layer_names) == 3
    assert "BitSelect" in kinds(program.graph_module)


@pytest.mark.parametrize(("groups", "taken"), [(1, True), (2, False)])
def test_a_shuffle_goes_into_the_layer_in_front_of_it(groups: int, taken: bool) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 72, 3, groups=groups), nn.Conv2d(72, 16, 1, groups=2), nn.Conv2d(16, 4, 1)
            self.bn = nn.BatchNorm2d(72)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.bn(self.b(F.relu(self.a(x))))), 3, 2, 1)
            n, c, h, w = x.shape
            x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            return self.last(F.relu(self.c(x)))  # type: ignore[no-any-return]

    m = made(Chain())
    program = BitProgram(m.graph_module)
    assert differing(m.graph_module, images(), program=program) == []
    assert ("BitSelect" not in kinds(program.graph_module)) == taken
    assert {"b_q", "c_q"} <= set(program.values(images())), "values are shown in the reference's order"


def test_grids_behind_float_pools_share_them() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16)
            self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
            self.fc = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 3, 2, 1)
            return self.fc(F.relu(self.c(F.relu(x + self.b(F.relu(self.a(x)))))))  # type: ignore[no-any-return]

    for scheme in ("xnor_w1a1", "tbn_w1at"):
        m = made(Stem(), scheme, side=33)
        gm = lower_graph(m.graph_module)
        assert "MaxPool2d" not in kinds(gm) and kinds(gm).count("ReLU") <= 1, "the one in front of the last, float layer"
        x = images(side=33)
        x[:, :, :9] = 0.0
        assert differing(m.graph_module, x) == [] and kinds(gm).count("FloatMaxPool") == 1, "both grids read one pool"


def test_channels_of_constant_sign_and_empty_rows() -> None:
    net = BitNet(12)
    with torch.no_grad():
        for conv in (net.a, net.b, net.c):
            conv.weight[1] = 0.0
        net.bn_a.weight[1], net.bn_a.weight[2], net.bn_b.weight[3] = 1.0, 0.0, -1.0
    for scheme in SCHEMES:
        torch.manual_seed(1)
        m = made(net, scheme)
        assert differing(m.graph_module, images()) == []


@pytest.mark.parametrize("scheme", ["xnor_w1a1", "bnn_w1a1", "tbn_w1at", "twn_wta1", "xnor_w1a1_k"])
def test_a_trained_model_gives_the_numbers_of_its_training_graph(scheme: str) -> None:
    torch.manual_seed(0)
    q = qat(scheme)
    steps(q, 3)
    q.eval()
    m = q.convert()
    x = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        wanted = q(x)
    program = BitProgram(m.graph_module)
    assert differing(m.graph_module, x, program=program) == []
    assert torch.allclose(program(x), wanted, rtol=1e-5, atol=1e-5)


def test_the_graph_it_came_from_is_left_alone() -> None:
    m = compiled()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    text = str(m.graph_module.graph)
    gm = lower_graph(m.graph_module)
    gm.graph.lint()
    shared = {id(t) for t in (*m.parameters(), *m.buffers())} & {id(t) for t in (*gm.parameters(), *gm.buffers())}
    assert not shared and str(m.graph_module.graph) == text
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert all(n.meta["step"] == n.target for n in gm.graph.nodes if isinstance(n.target, str) and n.target.endswith("_q"))
    layer = next(x for x in gm.modules() if isinstance(x, modules.BitConv))
    assert not list(layer.parameters()) and all(b.dtype in (torch.int64, torch.int32, torch.float32) for b in layer.buffers())
