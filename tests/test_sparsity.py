"""The slimming penalty: gradients and steps by hand, exact zeros, which gammas it touches, its view."""

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fxq
from fxq.errors import FxqError
from fxq.slimming import THRESHOLDS
from fxq.sparsity import SlimmingPenalty
from fxq.trainable import TrainableModel
from tests.test_training import X, net

ROOT = Path(__file__).resolve().parents[1]


class Norms(nn.Module):
    """Batch norms whose gammas are given."""

    def __init__(self, *gammas: list[float]) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm1d(len(g)) for g in gammas)
        with torch.no_grad():
            for bn, g in zip(self.bns, gammas, strict=True):
                bn.weight.copy_(torch.tensor(g))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        for bn in self.bns:
            x = bn(x)
        return x


def gamma(model: nn.Module, i: int = 0) -> Tensor:
    return model.bns[i].weight  # type: ignore[index, return-value]


# Formulas


def test_subgradient() -> None:
    """Section 3 of the paper, algorithms.md section 7: ``grad += s sgn(gamma)``, nothing at 0."""
    model = Norms([0.5, -0.2, 0.0])
    penalty = SlimmingPenalty(model, 0.1, only=["bns.0"])
    gamma(model).grad = torch.tensor([1.0, 1.0, 1.0])
    penalty.add_gradient()
    assert gamma(model).grad.tolist() == pytest.approx([1.1, 0.9, 1.0])  # type: ignore[union-attr]
    gamma(model).grad = None
    penalty.add_gradient()
    assert gamma(model).grad.tolist() == pytest.approx([0.1, -0.1, 0.0])  # type: ignore[union-attr]


def test_as_a_term_of_the_loss_it_is_the_same() -> None:
    model = Norms([0.5, -0.2, 0.0], [3.0, -1.0, 0.5])
    penalty = SlimmingPenalty(model, 0.1, only=["bns.0", "bns.1"])
    x = torch.randn(6, 3)
    term = penalty()
    assert float(term.detach()) == pytest.approx(0.1 * 5.2)
    (model(x).square().sum() + term).backward()
    with_term = [g.grad for g in penalty.gammas.values()]
    model.zero_grad()
    model(x).square().sum().backward()
    penalty.add_gradient()
    for a, g in zip(with_term, penalty.gammas.values(), strict=True):
        assert torch.allclose(a, g.grad)  # type: ignore[arg-type]


def test_shrinking() -> None:
    """algorithms.md section 7: ``gamma <- sgn(gamma) max(|gamma| - lr s, 0)``."""
    model = Norms([0.5, -0.05, 0.08, -0.3, 0.0])
    SlimmingPenalty(model, 1.0, form="proximal", only=["bns.0"]).shrink(0.1)
    assert gamma(model).tolist() == pytest.approx([0.4, 0, 0, -0.2, 0]) and int((gamma(model) == 0).sum()) == 3


def test_the_rate_is_that_of_each_group() -> None:
    model = Norms([0.5], [0.5], [0.5])
    groups = [{"params": [gamma(model, 0)], "lr": 0.1}, {"params": [gamma(model, 1)], "lr": torch.tensor(0.2)}, {"params": [gamma(model, 2)]}]
    optimizer = torch.optim.SGD(groups, lr=0.3)
    SlimmingPenalty(model, 1.0, form="proximal", only=["bns.0", "bns.1"]).step(optimizer)
    assert [float(gamma(model, i).detach()) for i in range(3)] == pytest.approx([0.4, 0.3, 0.5]), "the third is under no penalty"


@pytest.mark.parametrize("form", ["subgradient", "proximal"])
def test_step_is_the_optimizers_with_the_penalty(form: str) -> None:
    """With plain SGD one step moves gamma by ``lr (grad + s sgn(gamma))`` in both forms, unless it gets past 0."""
    model = Norms([0.5, -0.4, 1e-4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gamma(model).grad = torch.tensor([1.0, 1.0, 0.0])
    SlimmingPenalty(model, 0.1, form=form, only=["bns.0"]).step(optimizer)
    want = [0.5 - 0.1 - 0.01, -0.4 - 0.1 + 0.01, 0.0 if form == "proximal" else 1e-4 - 0.01]
    assert gamma(model).tolist() == pytest.approx(want)


def test_gammas_that_do_not_train_stay() -> None:
    model = Norms([0.5], [0.5])
    gamma(model, 0).requires_grad_(False)
    penalty = SlimmingPenalty(model, 1.0, form="proximal", only=["bns.0", "bns.1"])
    penalty.add_gradient()
    penalty.shrink(torch.optim.SGD([gamma(model, 1)], lr=0.1))
    assert gamma(model, 0).grad is None and float(gamma(model, 0).detach()) == 0.5 and float(gamma(model, 1).detach()) == pytest.approx(0.4)


# Training


def trained(form: str | None, steps: int = 40) -> tuple[Any, SlimmingPenalty]:
    """``bn_a`` and ``bn_up`` are under the penalty, ``bn_b`` is not; the head does not train."""
    model = net().train()
    for p in model.fc.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = SlimmingPenalty(model, 0.5 if form else 0.0, form=form or "proximal", only=["bn_a", "bn_up"])
    target = model(X).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(X), target).backward()
        penalty.step(optimizer)
    return model, penalty


def test_proximal_gammas_reach_0_exactly_and_others_do_not() -> None:
    proximal, sub, plain = (trained(f)[0] for f in ("proximal", "subgradient", None))
    assert int((proximal.bn_up.weight == 0).sum()) >= 4
    assert int((sub.bn_up.weight == 0).sum()) == 0
    assert float(sub.bn_up.weight.detach().abs().median()) < 0.06 < float(plain.bn_up.weight.detach().abs().median())
    for model in (proximal, sub, plain):
        assert not bool((model.bn_b.weight.abs() < 1e-3).any())


def trainable() -> TrainableModel:
    q = fxq.compile(net(), "iao_w8a8", mode="qat", calibration=X, progress=False)
    assert isinstance(q, TrainableModel)
    return q


def test_a_trainable_model_has_the_float_models_names() -> None:
    """Its batch norms lie inside its layers, which have other paths."""
    q = trainable()
    assert "root.a.bn" in dict(q.named_modules())
    for model in (q, copy.deepcopy(q)):
        penalty = SlimmingPenalty(model, 1e3, form="proximal", only=["bn_a"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model.train()(X).square().mean().backward()
        penalty.step(optimizer)
        layers = dict(model.named_modules())
        assert not bool(layers["root.a.bn"].weight.any()) and bool(layers["root.b.bn"].weight.all())  # type: ignore[operator, union-attr]
        assert bool((model.convert()(X) == model.eval()(X)).all())


def test_a_loaded_model_has_its_own_names(tmp_path: Any) -> None:
    fxq.save(trainable(), tmp_path / "q.fxq")
    penalty = SlimmingPenalty(fxq.load(tmp_path / "q.fxq"), only=["a.bn"])
    assert len(penalty.gammas["a.bn"]) == 8


class Ends(nn.Module):
    """The last batch norm gives the output; one tied channel by channel to the input; one without a gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.b, self.plain = nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3, affine=False)
        self.c, self.tied = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.d, self.last = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tied(self.c(self.plain(self.b(F.relu(self.inner(self.a(x)))))))
        return self.last(self.d(y + x[:, :, 1:-1, 1:-1]))  # type: ignore[no-any-return]


def test_only_gammas_that_can_be_pruned() -> None:
    """Checklist row 32: the last batch norm stays the same."""
    model = Ends().train()
    x, before = torch.randn(4, 3, 6, 6), {k: v.clone() for k, v in model.state_dict().items()}
    penalty = SlimmingPenalty(model, 1.0, form="proximal", example=x)
    assert list(penalty.gammas) == ["inner"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training, "finding them changes nothing"
    penalty.shrink(0.25)
    assert model.inner.weight.tolist() == [0.75] * 6 and model.last.weight.tolist() == [1.0] * 5 and model.tied.weight.tolist() == [1.0] * 3


def test_the_first_forward_is_the_example() -> None:
    model = Ends()
    penalty = SlimmingPenalty(model, 1.0)
    for _ in range(2):
        model(torch.randn(4, 3, 6, 6))
    assert list(penalty.gammas) == ["inner"] and not model._forward_pre_hooks


def test_a_penalty_that_is_gone_leaves_the_model_alone() -> None:
    model = Ends()
    SlimmingPenalty(model, 1.0)
    for m in (copy.deepcopy(model), model):
        m(torch.randn(4, 3, 6, 6))
        assert not m._forward_pre_hooks


def test_in_a_trainable_and_in_a_pruned_model(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 6, 6)
    q = fxq.compile(Ends().eval(), "iao_w8a8", mode="qat", calibration=x, progress=False)
    assert list(SlimmingPenalty(q, example=x).gammas) == ["inner"]
    pruned = fxq.prune(Ends().eval(), fxq.Prune(ratio=0.5, multiple_of=1), example=x, progress=False)
    fxq.save(pruned, tmp_path / "p.fxq")
    for model in (pruned, fxq.load(tmp_path / "p.fxq")):
        found = SlimmingPenalty(model, example=x).gammas
        assert list(found) == ["inner"] and len(found["inner"]) == 4, "of 6"


def test_wrapped_models() -> None:
    model = net()
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert SlimmingPenalty(wrapped, only="bn_a").gammas["bn_a"] is model.bn_a.weight  # type: ignore[arg-type]


# View


def test_json() -> None:
    model = Norms([0.0, 0.5e-3, -0.05, 1.0], [-0.5, 0.0, 0.0, 2.0])
    data = SlimmingPenalty(model, 1e-3, only=["bns.0", "bns.1"]).to_json()
    assert (data["channels"], data["zeros"], data["s"], data["form"], data["top"]) == (8, 3, 1e-3, "subgradient", 2.0)
    assert data["below"] == {"0.0001": 3 / 8, "0.001": 4 / 8, "0.01": 4 / 8, "0.1": 5 / 8} and len(THRESHOLDS) == 4
    assert data["quantiles"]["0"] == 0 and data["quantiles"]["1"] == 2.0 and data["quantiles"]["0.5"] == pytest.approx((0.5e-3 + 0.05) / 2)
    assert data["histogram"] == [5, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert data["layers"][0] == {"layer": "bns.0", "channels": 4, "zeros": 1, "median": pytest.approx(0.5e-3), "max": 1.0,
                                 "histogram": [3, 0, 0, 0, 0, 1, 0, 0, 0, 0]}  # fmt: skip


def test_view() -> None:
    lines = SlimmingPenalty(Norms([0.0, 0.5e-3, -0.05, 1.0], [-0.5, 0.0, 0.0, 2.0]), 1e-3, only=["bns.0", "bns.1"]).view(width=10).splitlines()
    assert lines[0] == "|gamma| of 8 channels behind 2 batch norms, s = 0.001, subgradient"
    assert lines[1] == "share at 0: 0.375, below 0.0001: 0.375, below 0.001: 0.500, below 0.01: 0.500, below 0.1: 0.625"
    assert lines[3] == "  0.0000  ██████████  5" and lines[5] == "  0.4000  ██          1"
    assert lines[-2].split()[:5] == ["bns.0", "4", "1", "0.0005", "1"] and lines[-2].endswith("  █    ▃    ")


def test_all_zero_and_all_equal() -> None:
    for g in ([0.0, 0.0], [1.0, 1.0]):
        penalty = SlimmingPenalty(Norms(g), only=["bns.0"])
        assert sum(penalty.to_json()["histogram"]) == 2 and penalty.view()


def test_live_view_follows_the_training() -> None:
    model, out = Norms([0.5, -0.25]), io.StringIO()
    penalty = SlimmingPenalty(model, 1.0, form="proximal", only=["bns.0"])
    with penalty.live(Console(file=out, force_terminal=True, width=120), refresh_per_second=0.1) as live:
        live.refresh()
        penalty.shrink(0.3)
        live.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    shares = re.findall(r"share at 0: ([0-9.]+)", text)
    assert shares[0] == "0.000" and shares[-1] == "0.500"


# Bad input


def _optimizer_without() -> None:
    model = Norms([0.5], [0.5])
    SlimmingPenalty(model, form="proximal", only=["bns.1"]).step(torch.optim.SGD([gamma(model, 0)], lr=0.1))


@pytest.mark.parametrize(("call", "said"), [
    (lambda: SlimmingPenalty(Norms([1.0]), form="proximl", only=["bns.0"]), "unknown form 'proximl'. did you mean 'proximal'?"),
    (lambda: SlimmingPenalty(Norms([1.0]), -1.0, only=["bns.0"]), "strength -1.0 is not in [0, infinity)"),
    (lambda: SlimmingPenalty(Norms([1.0]), float("nan"), only=["bns.0"]), "strength nan is not in"),
    (lambda: SlimmingPenalty(Norms([1.0]), only=["bns.1"]), "bns.1: it is no batch norm with a gamma. did you mean 'bns.0'?"),
    (lambda: SlimmingPenalty(Norms([1.0]), only=[]), "no batch norm is under the penalty"),
    (lambda: SlimmingPenalty(nn.Linear(3, 3), only=["x"]), "Linear: the model has no batch norm with a gamma. Prune by 'l2', 'l1' or 'taylor'"),
    (lambda: SlimmingPenalty(nn.BatchNorm2d(3, affine=False)), "no batch norm with a gamma"),
    (lambda: SlimmingPenalty(Norms([1.0])).add_gradient(), "what can be pruned is not known yet. Give example= or only="),
    (lambda: SlimmingPenalty(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), example=torch.randn(2, 3, 4, 4)),
     "Sequential: no channels behind a batch norm can be cut"),
    (_optimizer_without, "bns.1: the optimizer does not hold its gamma. Give the optimizer model.parameters()"),
])  # fmt: skip
def test_refused(call: Any, said: str) -> None:
    with pytest.raises(FxqError) as e:
        call()
    assert said in str(e.value) and e.value.way_out


def test_the_page_is_true(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The code of docs/sparsity.md runs."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/sparsity.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, "docs/sparsity.md", "exec"), names)
    assert names["masks"].density() == pytest.approx(0.1, abs=1e-4) and (tmp_path / "sparse.onnx").exists()
    assert len(names["penalty"].gammas) == 19
    assert "|gamma| of" in capsys.readouterr().out
