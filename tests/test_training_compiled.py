"""``torch.compile`` of a model in training: the same numbers as in eager mode, one graph, no recompiles, the same errors."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import schemes
from fxq.errors import CalibrationError
from fxq.trainable import TrainableModel
from tests.distributed_worker import X, batch, state, steps


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


class Small(nn.Module):
    """Little to compile: a residual block and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.bn_b, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(x)))
        return self.fc(F.relu(x + self.bn_b(self.b(x))).mean((2, 3)))  # type: ignore[no-any-return]


def small(name: Any) -> TrainableModel:
    torch.manual_seed(0)
    made = fxq.compile(Small().eval(), name, mode="qat", example=X[:2], progress=False)
    assert isinstance(made, TrainableModel)
    return made


PARTITIONED = "aot_eager_decomp_partition"
"""As inductor, with operations that a backward computes anew instead of keeping their results, but no C++ compiler."""


@pytest.mark.parametrize("name", ["iao_w8a8", "iao_w4a4_lsq", "dorefa_w4a4", "xnor_w1a1"])
def test_a_compiled_model_trains_as_in_eager_mode(name: str, fresh_compiler: None) -> None:
    """From the first batch on, which decides where grids begin; one graph, and none is compiled after the second step."""
    q = small(name).train()
    plain, compiled = copy.deepcopy(q), torch.compile(q, backend=PARTITIONED)
    for step in range(4):
        if step == 2:
            torch.compiler.set_stance("fail_on_recompile")
        x, y = batch(step, 0, 1, False)
        found = []
        for module, model in ((compiled, q), (plain, plain)):
            model.zero_grad()
            out = module(x)
            F.cross_entropy(out, y).backward()
            found.append((out.detach(), {k: p.grad for k, p in model.named_parameters()}))
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(1e-2 * p.grad)  # type: ignore[operator]
        (a, mine), (b, theirs) = found
        top = max(float(g.abs().max()) for g in theirs.values())  # type: ignore[union-attr]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert max(float((mine[k] - g).abs().max()) for k, g in theirs.items()) < 1e-4 * top  # type: ignore[operator]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for (k, u), (_, v) in zip(state(q).items(), state(plain).items(), strict=True):
        torch.testing.assert_close(u, v, rtol=1e-4, atol=1e-5, msg=k)
    torch.compiler.set_stance("default")
    q.freeze().train()
    with torch.no_grad():
        assert torch.equal(compiled(X), q(X)) and torch.equal(q.convert()(X), q.eval()(X))


def test_a_smaller_last_batch_is_compiled_once(fresh_compiler: None) -> None:
    q = small("iao_w4a4_lsq").train()
    plain, compiled = copy.deepcopy(q), torch.compile(q, backend="eager")
    for count, rows in enumerate((8, 8, 5, 8, 6, 7)):
        if count == 3:
            torch.compiler.set_stance("fail_on_recompile")
        x = batch(count, 0, 1, False)[0][:rows]
        assert torch.equal(compiled(x), plain(x)) and len(x) == rows


def test_a_compiled_model_says_where_numbers_exploded(fresh_compiler: None) -> None:
    q = small("iao_w8a8").train()
    compiled = torch.compile(q, backend="eager")
    steps(compiled, q, 0, 2, 0, 1, False)
    before = {k: v for k, v in state(q).items() if k.endswith(("own.scale", "own.zero_point", "observer.lo", "observer.hi"))}
    bad = X.clone()
    bad[0, 0, 0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="^x: the value holds NaN or infinity. Look at the inputs"):
        compiled(bad)
    assert len(before) > 10 and torch.equal(before["root.x_q.own.scale"], state(q)["root.x_q.own.scale"]), "the grid is as it was"
    q = small("iao_w8a8").train()
    compiled = torch.compile(q, backend="eager")
    steps(compiled, q, 0, 2, 0, 1, False)
    with torch.no_grad():
        q.get_submodule("root.b.op").weight.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="^b: the weight is NaN or infinite"):
        compiled(X)


def test_compiled_with_statistics_that_stay_autocast_and_averaged_ranges(fresh_compiler: None) -> None:
    q = small(replace(schemes.get("iao_w8a8"), name="ema_weights", weight_observer="ema")).train().freeze_batch_norm(after=2)
    plain, compiled = copy.deepcopy(q), torch.compile(q, backend=PARTITIONED)
    for step in range(4):
        x, y = batch(step, 0, 1, False)
        with torch.autocast("cpu", torch.bfloat16):
            a, b = compiled(x), plain(x)
        F.cross_entropy(a.float(), y).backward()
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    assert q.batch_norm_frozen and plain.batch_norm_frozen
