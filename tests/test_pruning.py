"""The request: criteria, budgets, multiples, kept layers, constants, bad input; and the way through compile, lower, verify, save, load, train."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import pruning
from fxq.costs import total
from fxq.errors import CalibrationError, PassError
from fxq.graph import module_of
from fxq.snapshot import distance
from fxq.zoo.cifar_resnet import resnet20
from fxq.zoo.nin import nin_gc
from tests.pruning_nets import CASES, Residual, canonical, randomised

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def net(seed=0):
    return randomised(Residual(), seed)


def small_input():
    return CASES["residual"].input()


def kept(p):
    return {g.name: np.flatnonzero(g.kept).tolist() for g in p.prune_report.groups}


def pruned(model, x=None, **how):
    how = {"multiple_of": 1, **how}
    return fxq.prune(model, fxq.Prune(**how), example=small_input() if x is None else x, progress=False)


# Criteria


class Chain(nn.Module):
    """Two convolutions with batch norms, of 4 and 2 channels."""

    def __init__(self, gammas=((0.9, 0.1, 0.5, 0.3), (0.2, 0.05))):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 3, 1)
        self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(2)
        with torch.no_grad():
            for bn, g in zip((self.na, self.nb), gammas, strict=True):
                bn.weight.copy_(torch.tensor(g))

    def forward(self, x):
        return self.head(F.relu(self.nb(self.b(F.relu(self.na(self.a(x)))))))


def test_gammas_select_the_golden_channels():
    assert kept(pruned(Chain(), ratio=0.5, by="bn-gamma")) == {"a": [0, 2], "b": [0]}


def test_equal_gammas_spread_over_the_layers_and_say_so():
    p = pruned(Chain(((1.0,) * 4, (1.0,) * 2)), ratio=0.5, by="bn-gamma")
    assert kept(p) == {"a": [0, 1], "b": [0]}
    assert "all scores are equal" in str(p.history)
    assert "all scores are equal" not in str(pruned(Chain(), ratio=0.5, by="bn-gamma").history)


@pytest.mark.parametrize(("by", "p"), [("l1", 1), ("l2", 2)])
def test_norms_rank_filters(by, p):
    model = net()
    want = model.a.weight.detach().flatten(1).norm(p, 1).argsort(descending=True)[:6].sort().values.tolist()
    assert kept(pruned(model, ratio=0.5, by=by, scope="layer"))["a"] == want


def test_group_norm_counts_what_reads_a_channel_too():
    model = net()
    with torch.no_grad():
        model.a.weight[3] *= 1e-3
        model.b.weight[:, 3] *= 1e6
    assert 3 not in kept(pruned(model, ratio=0.5, by="l2", scope="layer"))["a"]
    assert 3 in kept(pruned(model, ratio=0.5, by="group-l2", scope="layer"))["a"]


def test_taylor_keeps_what_the_loss_needs():
    model = net()
    with torch.no_grad():
        model.b.weight[:, [1, 5]] = 0  # the loss does not feel these channels, however large their filters are
        model.a.weight[[1, 5]] *= 100
    data = [(small_input(), torch.tensor([0, 1]))]
    found = kept(pruned(model, ratio=0.2, by="taylor", scope="layer", data=data, loss=F.cross_entropy))["a"]
    assert 1 not in found and 5 not in found


def test_taylor_is_the_squared_first_order_change():
    model = net()
    gm = canonical(model, small_input())
    x, y = small_input().double(), torch.tensor([3, 1])
    plan = pruning.plan(gm, pruning.Prune(ratio=0.5, by="taylor", scope="layer", loss=F.cross_entropy), 1, [(x, y)], 1)
    w = model.double().a.weight
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), [w])
    want = (grad * w).flatten(1).sum(1).square()
    at = [g.name for g in plan.groups.groups].index("a")
    np.testing.assert_allclose(plan.scores[at], want.detach().numpy(), rtol=1e-9)


def test_taylor_without_labels_uses_the_calibration_data_and_leaves_it_to_be_read():
    m = fxq.compile(net(), calibration=[small_input()] * 3, prune=fxq.Prune(ratio=0.3, by="taylor", multiple_of=1), progress=False)
    assert m.prune_report is not None and m.float_ops == []


def test_random_is_seeded():
    a, b, c = (kept(pruned(net(), ratio=0.5, by="random", seed=s)) for s in (1, 1, 2))
    assert a == b != c


def test_the_model_is_not_changed():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    pruned(model, ratio=0.5, by="taylor", data=[(small_input(), torch.tensor([0, 1]))])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# Amounts


@pytest.mark.parametrize("what", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_budgets_hold_and_are_used(what, scope):
    p = pruned(resnet20().eval(), X, scope=scope, by="l2", **{what: 0.5})
    before, after = total(p.prune_report.before), total(p.prune_report.after)
    share = getattr(after, what) / getattr(before, what)
    assert 0.44 < share <= 0.5


def test_bytes_are_those_of_the_scheme():
    data = [small_input()]
    for scheme in ("iao_w8a8", "float"):
        m = fxq.compile(net(), scheme, calibration=data, prune=fxq.Prune(bytes=0.5, multiple_of=1), progress=False)
        left = total(m.prune_report.after).parameters / total(m.prune_report.before).parameters
        assert 0.3 < left < (0.5 if scheme == "float" else 0.48)  # biases have 4 bytes each in both: weights must go further in int8


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_widths_are_multiples(n):
    p = pruned(nin_gc().eval(), X, ratio=0.45, by="l2", multiple_of=n)
    for g in p.prune_report.groups:
        assert g.after % n == 0 and n <= g.after <= g.before
    assert any(g.after < g.before for g in p.prune_report.groups)


def test_the_default_multiple_is_the_targets():
    p = fxq.prune(nin_gc().eval(), fxq.Prune(ratio=0.45), example=X, progress=False)
    assert all(g.after % 16 == 0 for g in p.prune_report.groups)
    q = fxq.prune(nin_gc().eval(), fxq.Prune(ratio=0.45), example=X, target="sm86", progress=False)
    assert all(g.after % 32 == 0 for g in q.prune_report.groups)


def test_heads_are_cut_whole():
    case = CASES["packed"]
    p = pruned(randomised(case.net()), case.input(), ratio=0.5, by="l2", scope="layer")
    qkv, out = p.graph_module.get_submodule("qkv"), p.graph_module.get_submodule("out")
    assert (qkv.out_features, out.in_features) == (24, 8)  # 2 of 4 heads of width 4, three times


def test_no_weight_of_the_whole_model_is_left_behind():
    case = CASES["language"]
    p = pruned(randomised(case.net()), case.input(), ratio=0.5, scope="layer")
    assert {tuple(v.shape) for n, v in p.named_parameters() if "attention" in n} == {(24, 8), (24,), (8, 8), (8,)}
    assert sum(v.numel() for v in p.parameters()) == total(p.prune_report.after).parameters


def test_layers_stay_on_request():
    model = net()
    for keep in ("a", ["a"], nn.Conv2d, [1], -3):
        p = pruned(model, ratio=0.5, keep=keep) if keep is not nn.Conv2d else None
        if p is None:
            with pytest.raises(PassError, match="nothing can be cut"):
                pruned(model, ratio=0.5, keep=keep)
            continue
        assert p.graph_module.get_submodule("a").out_channels == 12
        assert dict(p.prune_report.left)["a"].startswith("is kept on request")


def test_ratios_of_their_own_and_floors_and_caps():
    p = pruned(net(), ratio=0.25, scope="layer", ratios={"a": 0.75})
    assert {g.name: g.after for g in p.prune_report.groups} == {"stem": 6, "a": 3}
    p = pruned(net(), ratio=0.5, scope="layer", at_least={"a": 0.75}, at_most={"stem": 2})
    assert {g.name: g.after for g in p.prune_report.groups} == {"stem": 2, "a": 9}
    p = pruned(net(), ratio=0.8, scope="layer", at_least=5)
    assert {g.name: g.after for g in p.prune_report.groups} == {"stem": 5, "a": 5}


# Constants of cut channels


class Constant(nn.Module):
    """A cut channel gives relu(beta) = 0.3, which a 1x1 convolution of weight 2 makes 0.6."""

    def __init__(self, padding=0, bias=True):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1, padding=padding, bias=bias)
        with torch.no_grad():
            self.bn.weight.copy_(torch.tensor([1.0, 0.0]))
            self.bn.bias.copy_(torch.tensor([0.1, 0.3]))
            self.b.weight.fill_(2.0)
            if bias:
                self.b.bias.fill_(1.0)

    def forward(self, x):
        return self.b(F.relu(self.bn(self.a(x))))


def test_constants_go_into_the_next_bias():
    model = Constant().eval()
    p = pruned(model, ratio=0.5, by="bn-gamma")
    assert p.graph_module.get_submodule("b").bias.item() == pytest.approx(1.6)
    assert p.prune_report.absorbed == 1
    assert distance(model(small_input()), p(small_input())) < 1e-6  # gamma is 0: nothing was lost at all


def test_a_layer_without_bias_gets_one():
    model = Constant(bias=False).eval()
    p = pruned(model, ratio=0.5, by="bn-gamma")
    assert p.graph_module.get_submodule("b").bias.item() == pytest.approx(0.6)


def test_padding_drops_the_constant_and_absorb_can_be_off():
    padded = pruned(Constant(padding=1).eval(), ratio=0.5, by="bn-gamma")
    off = pruned(Constant().eval(), ratio=0.5, by="bn-gamma", absorb=False)
    for p in (padded, off):
        assert p.graph_module.get_submodule("b").bias.item() == 1.0 and p.prune_report.absorbed == 0
        assert distance(p.masked()(small_input()), p(small_input())) < 1e-6


def test_constants_move_the_running_mean_of_a_batch_norm_behind():
    case = CASES["sequence"]
    model = randomised(case.net())
    p = pruned(model, case.input(), ratio=0.5, by="bn-gamma", scope="layer", keep="b")
    assert p.graph_module.get_submodule("b").bias is None
    assert not torch.equal(p.graph_module.get_submodule("nb").running_mean, model.nb.running_mean)
    assert distance(p.masked()(case.input()), p(case.input())) < 1e-5


# The whole way


def test_the_pruned_model_compiles_to_integers_that_the_runtime_computes_exactly():
    data = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    m = fxq.compile(randomised(resnet20()), calibration=data, prune=fxq.Prune(macs=0.5, multiple_of=8), progress=False)
    assert m.float_ops == []
    assert m.verify(m.lower(), data).ok
    names = [s.name for s in m.history]
    assert names.index("propagate-shapes") < names.index("prune-channels") < names.index("fold-bn")
    assert m.history["prune-channels"].moved > 0 and "[*,16," in m.history.diff("prune-channels")
    assert any(s.node == "linear" and "output of the model" in s.why for s in m.history["prune-channels"].skips)


def test_prune_fine_tune_quantize():
    torch.manual_seed(0)
    model, x, y = net(), torch.randn(64, 3, 6, 6), torch.randint(0, 5, (64,))
    p = pruned(model, ratio=0.5, scope="layer")
    before = copy.deepcopy(p.masked().state_dict())
    p.train()
    assert p.graph_module.get_submodule("bn").training
    mean = p.graph_module.get_submodule("bn").running_mean.clone()
    losses, opt = [], torch.optim.SGD(p.parameters(), 0.05)
    for _ in range(20):
        opt.zero_grad()
        loss = F.cross_entropy(p(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(mean, p.graph_module.get_submodule("bn").running_mean)
    p.eval()
    assert all(torch.equal(v, before[k]) for k, v in p.masked().state_dict().items())  # training does not reach the masked graph
    m = fxq.compile(p, calibration=[x], progress=False)
    assert m.verify(m.lower(), [x]).ok and m.float_ops == []
    assert distance(p(x), m(x)) < 0.1
    assert module_of(m.graph_module, next(n for n in m.graph_module.graph.nodes if n.target == "a")).op.out_channels == 6


@pytest.mark.parametrize("scheme", ["iao_w8a8", "dorefa_w4a4"])
def test_pruned_models_train_quantized(scheme):
    data = [small_input()]
    m = fxq.compile(net(), scheme, calibration=data, mode="qat", prune=fxq.Prune(ratio=0.5, multiple_of=1), progress=False)
    m.train()
    m(small_input()).square().sum().backward()
    assert m.prune_report is not None and all(p.grad is not None for p in m.parameters() if p.requires_grad)
    c = m.eval().convert()
    assert c.verify(c.lower(), data).ok


def test_files_keep_pruned_models(tmp_path):
    p = pruned(net(), ratio=0.5)
    fxq.save(p, tmp_path / "p.fxq")
    again = fxq.load(tmp_path / "p.fxq")
    assert type(again) is type(p)
    assert torch.equal(again(small_input()), p(small_input()))
    m = fxq.compile(again, calibration=[small_input()], progress=False)
    assert m.verify(m.lower(), [small_input()]).ok
    with pytest.raises(fxq.FxqError, match="not kept in a file"):
        again.masked()


def test_a_pruned_model_can_be_pruned_again():
    p = pruned(net(), ratio=0.25, scope="layer")
    q = pruned(p, ratio=0.5, scope="layer")
    assert q.graph_module.get_submodule("a").out_channels == 5  # 12 -> 9 -> 5
    assert distance(q.masked()(small_input()), q(small_input())) < 1e-5


def test_the_report_is_whole(tmp_path):
    m = fxq.compile(net(), calibration=[small_input()], prune=fxq.Prune(ratio=0.5, multiple_of=1), progress=False)
    text, data = str(m.prune_report), m.prune_report.to_json()
    assert "stem" in text and "left whole" in text and "head: is an output of the model" in text
    assert json.loads(json.dumps(data)) == data
    assert "<svg" in m.prune_report.to_html() and "█" in m.prune_report.plot()
    p = pruned(net(), ratio=0.5)
    assert total(p.prune_report.after).parameters == sum(v.numel() for v in p.parameters())


def test_sensitivity_of_each_group_alone():
    model = net()
    with torch.no_grad():
        model.b.weight.mul_(1e-3)  # what `a` gives hardly matters
    seen = []
    found = fxq.sensitivity(model, [small_input()], ratios=(0.25, 0.5), metric=lambda g: seen.append(g) or float(len(seen)))
    assert [(r.group, r.units, r.cut) for r in found.rows] == [("stem", 8, 2), ("stem", 8, 4), ("a", 12, 3), ("a", 12, 6)]
    stem, _, a, more = (r.sqnr for r in found.rows)
    assert stem + 20 < a and more < a
    assert [r.metric for r in found.rows] == [1, 2, 3, 4]
    p = pruned(model, ratio=0.0, scope="layer", ratios={"a": 0.5})
    y = model(small_input()).double()
    want = 10 * torch.log10(y.square().sum() / (y - p(small_input()).double()).square().sum())
    assert more == pytest.approx(want.item(), abs=0.01)


def test_sensitivity_needs_data():
    with pytest.raises(CalibrationError, match="empty"):
        fxq.sensitivity(net(), [])
