"""Ways of training: batch norms whose statistics stay, autocast; and what is said when numbers explode."""

import copy
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fxq
from fxq import numerics, schemes
from fxq.errors import CalibrationError, FxqError
from fxq.trackers import TrackedFakeQuantize
from fxq.trainable import TrainableModel
from fxq.training import FloatLayer, FloatNorm, TrainedLayer
from fxq.training_lowbit import EstimatedLayer
from tests.distributed_worker import X, batch, net, qat, state, steps

MANY = ("iao_w8a8", "iao_w4a4_lsq", "dorefa_w4a4", "xnor_w1a1", "iao_w8a8_sym", "iao_w4a8", "iao_w8a8_lsq", "iao_w4a4_pact", "iao_w8a8_plain",
        "dorefa_w4a4_compat", "bnn_w1a1", "xnor_w1a1_k", "xnor_w1a32", "twn_wta1", "twn_wta8", "twn_wta32", "tbn_w1at")  # fmt: skip


def run(q: TrainableModel, first: int, count: int) -> None:
    steps(q, q, first, count, 0, 1, False)


def statistics(q: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in q.named_buffers() if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


def at(q: nn.Module, path: str) -> Any:
    return q.get_submodule(path)


# Statistics that stay


@pytest.mark.parametrize("name", ["iao_w8a8", "xnor_w1a1", "iao_w4a4_lsq"])
def test_statistics_stay_after_n_steps(name: str) -> None:
    q = qat(name).train().freeze_batch_norm(after=2)
    run(q, 0, 1)
    one = statistics(q)
    run(q, 1, 1)
    two, grids = statistics(q), {k: v for k, v in state(q).items() if "own.observer" in k or "learned_step" in k}
    assert not q.batch_norm_frozen and not any(torch.equal(one[k], two[k]) for k in one)
    run(q, 2, 2)
    assert q.batch_norm_frozen and same(two, statistics(q)) and int(q.steps) == 4
    assert not all(torch.equal(v, state(q)[k]) for k, v in grids.items()), "grids move on"
    q.eval()(X)
    assert int(q.steps) == 4, "only training forwards count"
    q.freeze().train()
    run(q, 4, 1)
    with torch.no_grad():
        assert torch.equal(q.convert()(X), q(X)) and same(two, statistics(q))


@pytest.mark.parametrize("saved", [1, 3])
def test_a_run_resumes_on_both_sides_of_that_step(saved: int, tmp_path: Path) -> None:
    whole = qat("iao_w8a8").train().freeze_batch_norm(after=2)
    run(whole, 0, saved)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    loaded = fxq.load(fxq.save(whole, tmp_path / "model.fxq"))
    run(whole, saved, 4 - saved)
    again = qat("iao_w8a8").train()
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert isinstance(loaded, TrainableModel)
    for q in (again, loaded):
        run(q, saved, 4 - saved)
        assert same(state(q), state(whole)) and q.batch_norm_frozen


def test_an_earlier_checkpoint_lets_them_move_again() -> None:
    q = qat("iao_w8a8").train().freeze_batch_norm(after=1)
    run(q, 0, 1)
    early = copy.deepcopy(q.state_dict())
    early["_extra_state"]["hold_at"] = None
    run(q, 1, 1)
    assert q.batch_norm_frozen
    q.load_state_dict(early)
    before = statistics(q)
    run(q, 1, 1)
    assert not q.batch_norm_frozen and not any(torch.equal(v, statistics(q)[k]) for k, v in before.items())


def test_a_checkpoint_without_a_count_begins_at_zero() -> None:
    old = qat("iao_w8a8").state_dict()
    del old["steps"], old["_extra_state"]["hold_at"]
    q = qat("iao_w8a8")
    q.load_state_dict(old)
    assert int(q.steps) == 0 and not q.batch_norm_frozen


def parameters(layer: Any) -> list[nn.Parameter | None]:
    return [layer.op.weight, layer.op.bias, *([layer.bn.weight, layer.bn.bias] if layer.bn is not None and layer.bn is not layer.op else [])]


def unrounded(q: TrainableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations pass, weights and biases keep their values."""
    monkeypatch.setattr(numerics, "fake_quantize", lambda x, qp: x)
    for m in q.modules():
        if isinstance(m, TrackedFakeQuantize):
            m.quantizing, m.tracker.frozen = False, True
        if isinstance(m, TrainedLayer):
            m.grids = lambda weight, bias: (None, bias)  # type: ignore[method-assign, assignment, return-value]


def test_held_it_trains_as_conv_and_a_batch_norm_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding, in float64: outputs and gradients of TrainedLayer, FloatLayer and FloatNorm."""
    model: Any = net()
    model.bn_d.eps = 0.0  # it becomes a layer of its own, whose factor float32 then holds exactly
    q, ref = fxq.compile(model, "iao_w8a8", mode="qat", calibration=X, skip=("c",), progress=False).double().train(), model.double()
    assert isinstance(q, TrainableModel)
    q.freeze_batch_norm()
    unrounded(q, monkeypatch)
    before, x = statistics(q), torch.randn(8, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got, want = q(x), ref(x)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    got.square().sum().backward()
    want.square().sum().backward()
    kinds = set()
    for name, bn in (("a", "bn_a"), ("b", "bn_b"), ("c", "bn_c"), ("bn_d", None), ("d", "bn_e"), ("fc", None)):
        layer, pairs = at(q, f"root.{name}"), [getattr(ref, name), *([getattr(ref, bn)] if bn else [])]
        kinds.add(type(layer))
        theirs = [p for m in pairs for p in (m.weight, m.bias)]
        for a, b in zip(parameters(layer), theirs, strict=True):
            if a is not None and b is not None:
                torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9)
    assert kinds >= {TrainedLayer, FloatLayer} and same(before, statistics(q))


def test_held_low_bit_layers_train_as_their_values_and_a_batch_norm_in_eval_mode() -> None:
    """In float64: EstimatedLayer and FloatNorm."""
    q, ref = fxq.compile(net(), "xnor_w1a32", mode="qat", example=X, progress=False).double().train(), net().double().eval()
    assert isinstance(q, TrainableModel)
    q.freeze_batch_norm()
    low = [n for n in ("a", "b", "c", "d", "fc") if isinstance(at(q, f"root.{n}"), EstimatedLayer)]
    assert low == ["b", "c", "d"] and isinstance(at(q, "root.bn_d"), FloatNorm)
    raw = {f"{n}.weight": getattr(ref, n).weight for n in low}
    values = {f"{n}.weight": at(q, f"root.{n}").estimator(raw[f"{n}.weight"]) for n in low}
    x = torch.randn(8, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before, got, want = statistics(q), q(x), functional_call(ref, values, (x,))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    got.square().sum().backward()
    want.square().sum().backward()
    for n, bn in (("a", "bn_a"), ("b", "bn_b"), ("c", "bn_c"), ("d", "bn_e")):
        torch.testing.assert_close(at(q, f"root.{n}.op").weight.grad, getattr(ref, n).weight.grad, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(at(q, f"root.{n}.bn").weight.grad, getattr(ref, bn).weight.grad, atol=1e-9, rtol=1e-9)
    assert same(before, statistics(q))


def test_held_training_mode_computes_what_eval_mode_does() -> None:
    q = qat("iao_w8a8").train()
    run(q, 0, 2)
    q.freeze_batch_norm()
    layer, x = at(q, "root.b"), torch.randn(8, 6, 10, 10)
    with torch.no_grad():
        trained, raw = q(X), layer(x)
        assert torch.equal(q.eval()(X), trained) and torch.equal(layer(x), raw), "the grids that the batch moved, the same statistics, int32 biases included"
        q.train()
        layer.bn.train()
        assert not torch.equal(layer(x), raw)


class Opaque(nn.Module):
    """Kept whole: its batch norm is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)  # type: ignore[no-any-return]


def test_a_batch_norm_inside_a_whole_module_stays_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Opaque(), nn.Conv2d(4, 4, 1)).eval()
    q = fxq.compile(model, "iao_w8a8", mode="qat", calibration=X, leaf_modules=[Opaque], progress=False).train()
    assert isinstance(q, TrainableModel)
    q(X)
    before = statistics(q.freeze_batch_norm().train())
    q(2 * X)
    assert len(before) == 3 and same(before, statistics(q))


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda q: q.freeze_batch_norm(-1), "-1 steps are in the past. Give 0 for at once"),
        (lambda q: q.freeze().freeze_batch_norm(), "the statistics are fixed already, by freeze\\(\\). Call freeze_batch_norm\\(\\) before freeze"),
    ],
)
def test_what_cannot_be_held(act: Callable[[TrainableModel], object], text: str) -> None:
    q = qat("iao_w8a8").train()
    q(X)
    with pytest.raises(FxqError, match=text):
        act(q)


# Autocast


@pytest.mark.parametrize("name", MANY)
def test_autocast(name: str) -> None:
    """bfloat16 on CPU, in QAT and QAFT: finite losses and gradients, float32 state, a step like the one without."""
    q = qat(name).train()
    for frozen in (False, True):
        if frozen:
            q.freeze().train()
        for step in range(2):
            x, y = batch(step, 0, 1, False)
            q.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = q(x)
                loss = F.cross_entropy(out.float(), y)
            assert out.dtype == torch.bfloat16
            loss.backward()
            trained = {k: p for k, p in q.named_parameters() if p.requires_grad}
            assert math.isfinite(float(loss.detach())) and all(bool(torch.isfinite(p.grad).all()) for p in trained.values())  # type: ignore[arg-type]
            assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained.values())  # type: ignore[union-attr]
            assert all(b.dtype in (torch.float32, torch.int32, torch.int64, torch.bool) for b in q.buffers())
    deployed = q.convert()
    with torch.no_grad():
        assert torch.equal(deployed(X), q.eval()(X)), "outside autocast the numbers are those of the deployed model"
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(q(X), deployed(X), atol=0.05)
            assert all(torch.equal(v, deployed.state_dict()[k]) for k, v in q.convert().state_dict().items()), "conversion knows no autocast"


def test_a_step_under_autocast_is_nearly_the_same() -> None:
    q, plain = qat("iao_w8a8").train(), qat("iao_w8a8").train()
    x, y = batch(0, 0, 1, False)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(q(x).float(), y).backward()
    F.cross_entropy(plain(x), y).backward()
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (q, plain))
    assert float(F.cosine_similarity(a, b, dim=0)) > 0.95
    grids = [(u, v) for (k, u), (_, v) in zip(state(q).items(), state(plain).items(), strict=True) if k.endswith("own.scale")]
    assert len(grids) > 5 and all(abs(float(u / v) - 1) < 0.02 for u, v in grids)


# Numbers that explode


@pytest.mark.parametrize(
    ("name", "path", "tensor", "text"),
    [
        ("iao_w8a8", "b.op", "weight", "^b: the weight is NaN or infinite. Lower the learning rate, or clip the gradients; load the last good checkpoint"),
        ("iao_w8a8", "b.op", "bias", "^b: the bias is"),
        ("iao_w8a8", "b.bn", "weight", "^b: the batch norm's weight is"),
        ("xnor_w1a1", "b.bn", "bias", "^b: the batch norm's bias is"),
        ("xnor_w1a1", "b.bn", "running_mean", "^b: the batch norm's mean is NaN or infinite: so was a value in front of it in the last batch"),
        ("xnor_w1a32", "a.bn", "running_var", "^a: the batch norm's variance is"),
        ("xnor_w1a32", "bn_d.op", "running_mean", "^bn_d: the batch norm's mean is"),
        ("dorefa_w4a4", "b.op", "weight", "^b: the weight is"),
        ("twn_wta8", "b.op", "weight", "^b: the weight is"),
        ("iao_w4a4", "b.op", "weight", "^b: the weight is"),
        ("iao_w4a4_lsq", "b.estimator", "learned_step", "^b: a learned step is"),
        ("iao_w4a4_lsq", "a_narrow_q.own", "learned_step", "^a_narrow: the learned step is"),
        ("iao_w4a4_lsq", "reshape_q.own", "learned_offset", "^reshape: the learned offset is"),
        ("iao_w4a4_pact", "a_narrow_q.own", "clip", "^a_narrow: the learned clip is"),
    ],
)
def test_what_exploded_is_named(name: str, path: str, tensor: str, text: str) -> None:
    q = qat(name).train()
    q(X)
    with torch.no_grad():
        getattr(at(q, f"root.{path}"), tensor).fill_(torch.inf if tensor == "weight" else torch.nan)
    for act in (lambda: q(X), lambda: q.eval()(X), q.freeze, q.convert, lambda: q.train()(X)):
        with pytest.raises(CalibrationError, match=text):
            act()
    assert q.explain_nan(X).startswith(text[1:20])


@pytest.mark.parametrize("name", ["iao_w8a8", "iao_w4a4_lsq", "iao_w4a4_pact", "dorefa_w4a4", "xnor_w1a1", "tbn_w1at"])
def test_an_exploded_batch_is_named_at_the_latest_in_the_next_step(name: str) -> None:
    """Grids found by their range say so at once; signs, clips and learned steps look at nothing, but batch norms remember."""
    q = qat(name).train()
    q(X)
    bad = X.clone()
    bad[3, 1, 2, 2] = torch.nan
    with pytest.raises(CalibrationError, match=r"^(x|a|relu\w*): (the value holds NaN|the batch norm's mean is NaN)"):
        q(bad)
        q(X)
    healthy = qat(name).train()
    healthy(X)
    assert healthy.explain_nan(bad) == "x: the input is the first that holds NaN or infinity"


def test_where_nan_begins_is_explained() -> None:
    q = qat("xnor_w1a32").train()
    q(X)
    before = state(q)
    assert q.explain_nan(X) == "all values are finite: the loss is what overflows"
    with torch.no_grad():
        at(q, "root.b.bn").weight.fill_(3e38)
    said = q.explain_nan(X)
    assert re.fullmatch(r"b: the output of this conv, whose inputs reach \d\.\d+, is the first that holds NaN or infinity", said)
    assert all(torch.equal(v, state(q)[k]) for k, v in before.items() if "bn" not in k and k != "steps") and int(q.steps) == 1, "a copy ran"


def test_schemes_with_int8_ends_autocast_too() -> None:
    made = replace(schemes.get("dorefa_w4a4"), name="dorefa_int8_ends", float_layers=(), int8_layers=("first", "last"))
    q = fxq.compile(net(), made, mode="qat", calibration=X, progress=False).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(torch.isfinite(q(X)).all())
