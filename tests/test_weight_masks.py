"""Weight masks on plain modules: which weights are cut, and that nothing a training does brings them back."""

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fxq import sparsity
from fxq.sparsity import cubic_ratio, masks_of, sparsify
from fxq.weight_masks import magnitude_masks, pattern_mask

ROOT = Path(__file__).resolve().parents[1]
X = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Convolutions (one grouped), a transposed one, a linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.bn = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.up = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ConvTranspose2d(8, 8, 2, 2)
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.b(F.relu(self.bn(self.a(x)))))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {p: m.weight.detach() for p, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))}


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {p: w == 0 for p, w in weights(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for i in range(steps):
        optimizer.zero_grad()
        model(X + i).square().mean().backward()
        optimizer.step()


def mask(values: list[float], ratio: float) -> list[float]:
    w = torch.tensor(values)
    return (w * magnitude_masks([w.abs()], ratio)[0]).tolist()


# Which weights are cut


def test_the_least_are_cut() -> None:
    """algorithms.md, section 8, stage 1."""
    assert mask([0.1, -0.5, 0.2, -0.05, 0.3], 0.6) == pytest.approx([0, -0.5, 0, 0, 0.3])


def test_of_equal_ones_the_first_stay() -> None:
    assert mask([1.0, -1.0, 1.0, 1.0, 2.0, -1.0], 0.5) == [1, -1, 0, 0, 2, 0]


@pytest.mark.parametrize(("ratio", "n", "cut"), [(0.29, 100, 29), (0.7, 10, 7), (0.999, 10, 9), (0.0, 10, 0), (0.9, 15, 13), (0.05, 10, 0)])
def test_exactly_the_floor_is_cut(ratio: float, n: int, cut: int) -> None:
    """Also where the product is a little less in binary (0.29 * 100) and where all are equal."""
    for w in (torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.1, torch.ones(n)):
        assert int((~magnitude_masks([w], ratio)[0]).sum()) == cut


def test_global_takes_the_least_of_all_but_leaves_each_layer_its_greatest() -> None:
    big, small = torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([[0.1, 0.3], [0.2, 0.05]])
    a, b = magnitude_masks([big, small], 0.5)
    assert a.tolist() == [False, True, True, True] and b.tolist() == [[False, True], [False, False]]


def test_half_precision_and_float64_side_by_side() -> None:
    close = torch.tensor([1.0, 1.0 + 2**-40], dtype=torch.float64)
    a, b = magnitude_masks([torch.tensor([2.0, 3.0], dtype=torch.float16), torch.cat([close, close[:1] * 9])], 0.2)
    assert a.tolist() == [True, True] and b.tolist() == [False, True, True], "in float32 the last of the two would go"


def test_pattern_keeps_the_greatest_of_neighbours() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0], [4.0, 0.0, 0.0, 0.0, 0.0, 9.0, 8.0, 7.0]])
    assert pattern_mask(rows, 2, 4, 1).int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 1, 0]]
    assert torch.equal(pattern_mask(rows.t(), 2, 4, 0), pattern_mask(rows, 2, 4, 1).t())


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8)])
def test_pattern_along_input_channels(n: int, m: int) -> None:
    net = nn.Sequential(nn.Conv2d(16, 6, 3, groups=2), nn.Linear(32, 5), nn.ConvTranspose2d(16, 6, 3))
    before = [net[i].weight.detach().clone() for i in range(3)]
    masks = sparsify(net, pattern=f"{n}:{m}")
    assert masks.density() == n / m and masks.pattern == f"{n}:{m}"
    for i, dim in enumerate((1, 1, 0)):
        w = net[i].weight.detach()
        assert isinstance(w, Tensor) and isinstance(before[i], Tensor)
        groups, old = (v.movedim(dim, -1).reshape(-1, m) for v in (w, before[i]))
        assert bool(((groups != 0).sum(1) == n).all())
        assert bool((torch.where(groups == 0, old.abs(), 0.0).amax(1) <= torch.where(groups != 0, old.abs(), 9.0).amin(1)).all())


def test_layers_that_do_not_fit_a_pattern_are_named() -> None:
    up = nn.ConvTranspose2d(8, 8, 2, groups=4)
    masks = sparsify(nn.ModuleDict({"rgb": nn.Conv2d(3, 8, 3), "depth": nn.Conv2d(8, 8, 3, groups=8), "up": up, "fc": nn.Linear(8, 5)}), pattern="2:4")
    assert [w.name for w in masks] == ["fc.weight"]
    assert masks.skipped == {"rgb.weight": "its 3 input channels are no multiple of 4", "depth.weight": "its 1 input channels per group are no multiple of 4",
                             "up.weight": "its 2 input channels per group are no multiple of 4"}  # fmt: skip


def test_scope_layer_cuts_the_share_of_each() -> None:
    net = Net()
    with torch.no_grad():
        net.a.weight.mul_(1e4)
    each, whole = copy.deepcopy(net), copy.deepcopy(net)
    rows = {w.name: (w.total - w.kept, w.total) for w in sparsify(each, 0.5, scope="layer")}
    assert all(cut == total // 2 for cut, total in rows.values())
    masks = sparsify(whole, 0.5)
    assert int(sum(z.sum() for z in zeros(whole).values())) == sum(t for _, t in rows.values()) // 2
    assert next(iter(masks)).kept == next(iter(masks)).total, "the layer with the great weights is left alone"


@pytest.mark.parametrize(("keep", "left"), [
    ("fc", ["fc"]), (["a", "fc"], ["a", "fc"]), ("[ab]", ["a", "b"]), (nn.Linear, ["fc"]), (0, ["a"]), (-1, ["fc"]), ([nn.ConvTranspose2d, 1], ["b", "up"]),
])  # fmt: skip
def test_what_is_kept(keep: Any, left: list[str]) -> None:
    net = Net()
    masks = sparsify(net, 0.5, keep=keep)
    assert [p for p, z in zeros(net).items() if not bool(z.any())] == left
    assert list(masks.skipped) == [f"{p}.weight" for p in left] and all("kept on request" in why for why in masks.skipped.values())


class Tied(nn.Module):
    """Two layers share a weight; one shares that of an embedding; one computes its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.words, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.two.weight, self.out.weight = self.one.weight, self.words.weight
        self.normed = weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.normed(self.two(F.relu(self.one(self.words(x))))))  # type: ignore[no-any-return]


def test_shared_and_computed_weights() -> None:
    net = Tied()
    masks = sparsify(net, 0.5)
    assert [w.name for w in masks] == ["one.weight"] and masks.density() == 0.5
    assert masks.skipped["normed.weight"] == "its weight is computed from other parameters"
    assert masks.skipped["out.weight"] == "it is shared with words, which gets no mask"
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        net(torch.arange(12)).square().mean().backward()
        optimizer.step()
    assert torch.equal(net.one.weight, net.two.weight) and int((net.two.weight == 0).sum()) == 32
    assert len(masks_of(copy.deepcopy(net))) == 1
    masks.update(0.75)
    assert torch.equal(net.one.weight, net.two.weight) and int((net.two.weight == 0).sum()) == 48
    masks.remove()
    assert net.one.weight is net.two.weight and int((net.one.weight == 0).sum()) == 48


def test_attention_in_all_its_forms() -> None:
    torch.manual_seed(0)
    packed, apart = nn.MultiheadAttention(8, 2, batch_first=True), nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
    x, kv = torch.randn(2, 3, 8), torch.randn(2, 3, 4)
    assert [w.name for w in sparsify(packed, pattern="2:4")] == ["in_proj_weight", "out_proj.weight"]
    assert [w.name for w in sparsify(apart, 0.5)] == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    w = packed.in_proj_weight.detach()
    assert int((w == 0).sum()) == w.numel() // 2
    want = [m(x, k, k)[0] for m, k in ((packed, x), (apart, kv))]
    for m in (packed, apart):
        masks_of(m).remove()
        assert type(m) is nn.MultiheadAttention
    for m, k, y in ((packed, x, want[0]), (apart, kv, want[1])):
        assert torch.equal(m(x, k, k)[0], y)


# What survives


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_survive_optimizers_that_are_under_way(name: str) -> None:
    """State that was gathered before goes on moving the parameter; the weight stays 0."""
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer)
    before = list(net.parameters())
    masks = sparsify(net, 0.6)
    assert {id(p) for p in net.parameters()} == {id(p) for p in before}, "the optimizer holds the parameters"
    cut, start = zeros(net), {k: w.clone() for k, w in weights(net).items()}
    hidden = {w.name: w.original.detach().clone() for w in masks}
    train(net, optimizer)
    assert same(zeros(net), cut)
    assert all(not torch.equal(w, start[k]) for k, w in weights(net).items()), "what is left trains"
    assert all(bool((w.original != hidden[w.name])[~w.own.mask].any()) for w in masks), "without the masks they would have come back"


def test_no_gradient_where_it_is_cut() -> None:
    net = Net()
    masks = sparsify(net, 0.5)
    net(X).square().mean().backward()
    for w in masks:
        grad = w.original.grad
        assert grad is not None and not bool(grad[~w.own.mask].any()) and bool(grad[w.own.mask].any())


def test_copies_have_masks_of_their_own() -> None:
    net = Net()
    sparsify(net, 0.5)
    other = copy.deepcopy(net)
    want = zeros(net)
    masks_of(other).update(0.8)
    train(other, torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.1))
    assert same(zeros(net), want) and masks_of(other).density() == pytest.approx(0.2, abs=2e-3)
    masks_of(other).remove()
    assert same(zeros(net), want) and torch.equal(net(X), net(X)), "the copy's class is its own affair"
    assert type(other.a) is nn.Conv2d and type(net.a) is not nn.Conv2d


def test_state_dict() -> None:
    net, other = Net(0), Net(1)
    sparsify(net, 0.5)
    sparsify(other, 0.9)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(weights(net), weights(other))
    train(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert same(zeros(other), zeros(net))


RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fxq.sparsity import SlimmingPenalty, masks_of, sparsify
from tests.test_weight_masks import Net, X, zeros
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
net = Net(rank)
sparsify(net, 0.5 + rank / 5)
ddp = DistributedDataParallel(net)
assert abs(masks_of(net).density() - 0.5) < 1e-3, "rank 0's masks"
cut, optimizer = zeros(net), torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
penalty = SlimmingPenalty(ddp, 0.1, form="proximal", only=["bn"])
for _ in range(3):
    optimizer.zero_grad()
    ddp(X[rank::2]).square().mean().backward()
    penalty.step(optimizer)
assert all(torch.equal(a, cut[k]) for k, a in zeros(net).items())
torch.save({**net.state_dict(), "gammas": penalty.gammas["bn"].detach()}, sys.argv[3])
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    outs = [tmp_path / f"{r}.pt" for r in range(2)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", RANK, str(tmp_path / "store")]
    running = [subprocess.Popen([*command, str(r), str(outs[r])], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for p in running:
        _, said = p.communicate(timeout=120)
        assert p.returncode == 0, said
    a, b = (torch.load(o, weights_only=True) for o in outs)
    assert all(torch.equal(v, b[k]) for k, v in a.items() if not k.startswith("bn.running")) and len(a) > 10


# Gradual pruning, taking out


def test_cubic_schedule() -> None:
    """arXiv 1710.01878, equation 1."""
    at = [cubic_ratio(s, begin=100, end=200, final=0.8) for s in (0, 100, 150, 200, 500)]
    assert at == pytest.approx([0, 0, 0.7, 0.8, 0.8])
    assert cubic_ratio(1, begin=0, end=2, final=0.9, initial=0.5) == pytest.approx(0.9 - 0.4 / 8)


@pytest.mark.parametrize("scope", sparsity.SCOPES)
def test_update_cuts_more_and_never_less(scope: str) -> None:
    net = Net()
    masks = sparsify(net, 0.2, scope=scope)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    cut = zeros(net)
    for step in (2, 4, 6, 8):
        train(net, optimizer, 1)
        masks.update(cubic_ratio(step, begin=0, end=8, final=0.9, initial=0.2))
        now = zeros(net)
        assert all(bool((now[k] | ~z).all()) for k, z in cut.items()), "what was cut stays cut"
        cut = now
    total = sum(w.total for w in masks)
    if scope == "global":
        assert sum(w.kept for w in masks) == total - total * 9 // 10
    else:
        assert all(w.kept == w.total - w.total * 9 // 10 for w in masks)


def test_remove_writes_the_zeros_into_the_same_parameters() -> None:
    net = Net()
    own = dict(net.named_parameters())
    masks = sparsify(net, 0.5)
    cut, out = zeros(net), net.eval()(X)
    masks.remove()
    assert all(own[k] is p for k, p in net.named_parameters()) and set(own) == {k for k, _ in net.named_parameters()}
    assert type(net.a) is nn.Conv2d and same(zeros(net), cut) and torch.equal(net(X), out)
    sparsify(net, 0.7)
    assert masks_of(net).density() == pytest.approx(0.3, abs=1e-3), "they can be put on again"


def test_table_and_json() -> None:
    net = Net()
    masks = sparsify(net, 0.5, keep="fc")
    data, text = masks.to_json(), str(masks)
    assert data["density"] == masks.density() and data["scope"] == "global" and data["pattern"] is None
    assert [r["weight"] for r in data["weights"]] == ["a.weight", "b.weight", "up.weight"]
    assert data["weights"][0] == {"weight": "a.weight", "shape": [8, 4, 3, 3], "kept": int((net.a.weight != 0).sum()), "total": 288,
                                  "density": int((net.a.weight != 0).sum()) / 288}  # fmt: skip
    assert [line.split()[0] for line in text.splitlines()] == ["weight", "a.weight", "b.weight", "up.weight", "all", "fc.weight:"]
    assert text.splitlines()[4].split()[1:] == ["416", "832", "0.5000"]
