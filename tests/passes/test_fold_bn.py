"""fold-bn: what it writes, what it computes, what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq import folding
from fxq import modules as m
from fxq.convolutions import padded
from fxq.graph import kind
from fxq.passes.fold_bn import FoldBN
from fxq.verify import INVARIANTS
from tests import helpers as h


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seq(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return h.randomize(nn.Sequential(*layers))


def check(model: nn.Module, *inputs: Tensor, left: int = 0, folds: int = 1, tolerance: float = 1e-5) -> Any:
    """Fold; the numbers stay; ``left`` batch norms and constants stay. Returns the graph and the history."""
    for layer in model.modules():  # fresh parameters of another size than the defaults
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) and layer.bias is not None:
            nn.init.uniform_(layer.bias, -1, 1)
    model.eval()
    want = model(*inputs)
    gm = h.canonical(copy.deepcopy(model), *inputs)
    history = h.run_pass(FoldBN(), gm, h.context(*inputs))
    assert history["fold-bn"].rewrites == folds
    assert h.moved(gm, want, *inputs) < tolerance
    assert sum(kind(gm, n) in ("batch_norm", *folding.ARITHMETIC) for n in gm.graph.nodes) == left
    return gm, history


def test_writes() -> None:
    x = rand(2, 3, 8, 8)
    _, history = check(seq(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), x)
    assert history.diff("fold-bn").splitlines()[2:] == [
        "@@ -1,5 +1,4 @@",
        " %input_1 = input() [*,3,8,8]",
        "-%_0 = conv(%input_1) <0> {3, 4, kernel_size=(3, 3), stride=(1, 1), bias=False} [*,4,6,6]",
        "-%_1 = batch_norm(%_0) <1> {4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True} [*,4,6,6]",
        "-%_2 = relu(%_1) <2> [*,4,6,6]",
        "+%_0 = conv(%input_1) <0> {3, 4, kernel_size=(3, 3), stride=(1, 1)} [*,4,6,6]",
        "+%_2 = relu(%_0) <2> [*,4,6,6]",
        " %output = output(%_2)",
    ]


def test_golden_numbers() -> None:
    """W=2, b=1, gamma=0.5, beta=0.1, mu=0.2, sigma=0.5 give 2 and 0.9."""
    conv, bn = nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1, eps=0.0)
    with torch.no_grad():
        values = {conv.weight: 2.0, conv.bias: 1.0, bn.weight: 0.5, bn.bias: 0.1, bn.running_mean: 0.2, bn.running_var: 0.25}
        for t, v in values.items():
            t.fill_(v)  # type: ignore[union-attr]
    new = folding.fold_back(conv, *folding.bn_affine(bn))
    assert new.weight.item() == 2.0 and new.bias.item() == pytest.approx(0.9, abs=1e-7)  # type: ignore[union-attr,operator]
    assert conv.weight.item() == 2.0 and conv.bias.item() == 1.0  # type: ignore[union-attr]


LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d-no-bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv2d-grouped-dilated": (nn.Conv2d(4, 6, 3, 2, 2, dilation=2, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "depthwise-multiplier": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    "same-reflect": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "no-affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, (1, 3, 2)), nn.BatchNorm3d(3), (2, 2, 4, 5, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, 2), nn.BatchNorm1d(6), (2, 4, 5)),
    "transposed2d-grouped": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed3d-no-bias": (nn.ConvTranspose3d(2, 6, 2, groups=2, bias=False), nn.BatchNorm3d(6), (2, 2, 3, 3, 3)),
    "padded": (padded(nn.Conv2d(4, 6, 3), (0, 1, 2, 0)), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), (4, 5)),
    "one-channel": (nn.Linear(5, 7), nn.BatchNorm1d(1), (4, 1, 5)),
    "two-norms": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), nn.BatchNorm2d(6), (2, 4, 9, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_numbers(name: str) -> None:
    layer, bn, size = copy.deepcopy(LAYERS[name])
    gm, _ = check(seq(layer, bn), rand(*size), folds=2 if name == "two-norms" else 1)
    assert not any(t.requires_grad is False for t in gm.parameters())


class Through(nn.Module):
    """Linear on [N, L, C], then a batch norm on the channels moved by a permute or a reshape."""

    def __init__(self, how: nn.Module, features: int) -> None:
        super().__init__()
        self.fc, self.how, self.bn = nn.Linear(5, 6), how, nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.how(self.fc(x)))


@pytest.mark.parametrize("how", [m.Permute((0, 2, 1)), m.Reshape((-1, 6))])
def test_channels_are_followed(how: nn.Module) -> None:
    check(h.randomize(Through(how, 6)), rand(2, 3, 5))


def test_conv_then_flat_space() -> None:
    check(seq(nn.Conv2d(3, 4, 3), m.Reshape((-1, 4, 36)), nn.BatchNorm1d(4)), rand(2, 3, 8, 8))


class Scaled(nn.Module):
    """Conv, then constants: a layer scale, a term, a scalar factor, ``1 - x``, a division."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(3, 4, 3, bias=False), nn.Parameter(rand(4, 1, 1))
        self.register_buffer("beta", rand(1, 4, 1, 1))
        self.mul, self.add, self.twice, self.sub, self.div = m.Mul(), m.Add(), m.Mul(), m.Sub(), m.Div()

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(self.beta, self.mul(self.conv(x), self.gamma))
        return self.div(self.sub(1, self.twice(x, 2.0)), 3)


def test_constants_fold() -> None:
    gm, _ = check(Scaled(), rand(2, 3, 6, 6), folds=5)
    assert [kind(gm, n) for n in gm.graph.nodes] == ["input", "conv", "output"]


class NextScaled(nn.Module):
    """ConvNeXt's tail: linear on channels-last, permute, layer scale; and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.b, self.gamma = m.Permute((0, 2, 3, 1)), nn.Linear(4, 4), m.Permute((0, 3, 1, 2)), nn.Parameter(rand(4, 1, 1))
        self.mul, self.add = m.Mul(), m.Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.mul(self.gamma, self.b(self.fc(self.a(x)))), x)


def test_layer_scale_behind_a_permute() -> None:
    check(NextScaled(), rand(2, 4, 5, 5), left=1)


@pytest.mark.parametrize(
    ("layers", "size"),
    [
        ((nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 8, 8)),
        ((nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False)), (2, 4, 8, 8)),
        ((nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")), (2, 4, 8, 8)),
        ((nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 6)), (5, 4)),
        ((nn.ReLU(), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 6)), (5, 4)),
    ],
)
def test_folds_ahead_without_zero_padding(layers: tuple[nn.Module, ...], size: tuple[int, ...]) -> None:
    check(seq(*copy.deepcopy(layers)), rand(*size), folds=sum(isinstance(v, nn.modules.batchnorm._BatchNorm) for v in layers))


def test_two_norms_become_one() -> None:
    _, history = check(seq(nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.ReLU()), rand(2, 4, 3, 3), left=1)
    assert set(h.skips(history, "fold-bn")) == {"_1"}


class Factor(nn.Module):
    """A pure factor folds ahead even into a padding conv: zero stays zero."""

    def __init__(self) -> None:
        super().__init__()
        self.mul, self.conv = m.Mul(), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.mul(x, 0.25))


def test_factor_ahead_of_a_padding_conv() -> None:
    check(Factor(), rand(2, 3, 6, 6))


def test_shared_weights_of_another_call_stay() -> None:
    net = seq(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    net[3].weight = net[0].weight  # type: ignore[index]
    x = rand(2, 4, 5, 5)
    gm = h.canonical(net, x)
    shared = net[0].weight.clone()  # type: ignore[index]
    history = h.run_pass(FoldBN(), gm, h.context(x))
    assert history["fold-bn"].rewrites == 1
    assert torch.equal(gm.get_submodule("3").weight, shared)
    assert not torch.equal(gm.get_submodule("0").weight, shared)


class TwoUsers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.add = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), m.Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.add(x, self.bn(x))


class BothOut(TwoUsers):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.conv(x)
        return x, self.bn(x)


def hooked() -> nn.Module:
    net = seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net[0].register_forward_hook(lambda module, args, out: out * 2)  # type: ignore[index]
    return net


IMAGE = (2, 3, 6, 6)
REFUSED: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "two-users": (TwoUsers, IMAGE, "conv, before it, has 2 users"),
    "also-output": (BothOut, IMAGE, "conv, before it, has 2 users"),
    "pre-activation": (
        lambda: seq(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)),
        IMAGE,
        "before it, but input; no conv or linear layer follows directly, but relu",
    ),
    "border": (lambda: seq(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), IMAGE, "pads with zeros, which its shift does not reach"),
    "batch-statistics": (
        lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
        "no running statistics",
    ),
    "other-axis": (lambda: seq(nn.Linear(5, 6), nn.BatchNorm1d(3)), (2, 3, 5), "along axis 1, but _0 gives its channels on axis 2"),
    "mixed": (
        lambda: seq(nn.Conv2d(3, 4, 3), m.Reshape((-1, 8, 18)), nn.BatchNorm1d(8)),
        (2, 3, 8, 8),
        "mixes its channels with other axes",
    ),
    "hooks": (hooked, IMAGE, "_0 has forward hooks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    make, size, why = REFUSED[name]
    x = rand(*size)
    gm = h.canonical(h.randomize(make()), x)
    history = h.run_pass(FoldBN(), gm, h.context(x))
    assert history["fold-bn"].rewrites == 0 and history["fold-bn"].moved is None
    assert history.diff("fold-bn") == ""
    (reason,) = h.skips(history, "fold-bn").values()
    assert why in reason


class Constants(nn.Module):
    """Constants that no layer can take: two axes, more than the channel, a division by x."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.conv3 = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.register_buffer("grid", rand(4, 4, 4))
        self.register_buffer("row", rand(4))
        self.a, self.b, self.c = m.Mul(), m.Add(), m.Div()
        self.cat = m.Cat(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.cat(self.a(self.conv(x), self.grid), self.b(self.conv2(x), self.row), self.c(1.0, self.conv3(x)))


def test_constants_that_stay() -> None:
    _, history = check(Constants(), rand(2, 3, 6, 6), folds=0, left=3)
    assert history["fold-bn"].skips == ()


def test_invariant_sees_a_chain() -> None:
    x = rand(2, 3, 6, 6)
    gm = h.canonical(seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    assert [(n.name, f) for n, f in INVARIANTS["bn-folded"](gm)] == [("_1", "it can be folded into _0")]
