"""annotate and share-qparams: which nodes run in integers, where the grids lie, and why not."""

import pytest
import torch
from torch import Tensor, nn

from fxq import modules as m
from fxq.graph import grids
from fxq.passes.annotate import Annotate
from fxq.passes.share_qparams import ShareQParams
from fxq.pipeline import PassContext
from fxq.verify import INVARIANTS
from tests.helpers import canonical, context

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """conv-relu, residual add with relu, concat of two relus, split, a float tail."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu_a, self.b = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.add, self.relu, self.cat, self.split = m.Add(), nn.ReLU(), m.Cat(1), m.Split((4, 4), 1)
        self.c, self.tail = nn.Conv2d(4, 2, 1), nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu_a(self.a(x))
        y = self.relu(self.add(x, self.b(x)))
        parts = self.split(self.cat(x, y))
        return self.tail(self.c(parts[1]))


def annotated(model: nn.Module, *inputs: Tensor, scheme: str = "iao_w8a8", skip: tuple[str, ...] = ()) -> tuple[torch.fx.GraphModule, PassContext]:
    gm, ctx = canonical(model, *inputs), context(*inputs, scheme=scheme)
    ctx.float_nodes = skip
    Annotate().run(gm, ctx)
    assert list(INVARIANTS["annotated"](gm)) == []
    return gm, ctx


def marks(gm: torch.fx.GraphModule) -> dict[str, tuple[str, str | None]]:
    """Node -> (int or float, its grid)."""
    return {n.name: ("int" if n.meta.get("integer") else "float", n.meta.get("grid")) for n in gm.graph.nodes if n.op != "output"}


def test_places_grids_and_absorbs_relus() -> None:
    gm, ctx = annotated(Block(), X)
    assert marks(gm) == {
        "x": ("float", "x"), "a": ("int", None), "relu_a": ("int", "relu_a"), "b": ("int", "b"), "add": ("int", None), "relu": ("int", "relu"),
        "cat": ("int", "cat"), "split": ("int", None), "getitem": ("int", "getitem"), "c": ("int", "c"), "tail": ("float", None),
    }  # fmt: skip
    assert grids(gm)["relu"].clamp == (0.0, None) and grids(gm)["b"].clamp is None
    assert ShareQParams().run(gm, ctx) == 2
    assert {n: g for n, (_, g) in marks(gm).items() if g} == {
        "x": "x", "relu_a": "relu_a", "b": "b", "relu": "relu_a", "cat": "relu_a", "getitem": "relu_a", "c": "c",
    }  # fmt: skip
    assert set(grids(gm)) == {"x", "relu_a", "b", "c"}


def test_reasons_of_what_stays_float() -> None:
    gm, _ = annotated(Block(), X, skip=("b",))
    why = {n.name: n.meta["float_why"] for n in gm.graph.nodes if n.meta.get("float_why") and n.op != "output"}
    assert why["b"] == "left float on request (b)" and "no integer kernel for softplus" in why["tail"]
    assert "float stream" in why["add"]


class Stream(nn.Module):
    """Token stream: layer norm, linear, GELU, linear, residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down, self.add, self.head = nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), m.Add(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.add(x, self.down(self.act(self.up(self.norm(x))))))


def test_residual_stream_of_tokens_stays_float() -> None:
    gm, _ = annotated(Stream(), torch.randn(2, 5, 4))
    found = marks(gm)
    assert [found[n][0] for n in ("norm", "up", "act", "down", "add", "head")] == ["float", "int", "float", "int", "float", "int"]
    assert found["up"][1] is None and found["norm"][1] == "norm" and found["act"][1] == "act" and found["add"][1] == "add"


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b, self.cat, self.c = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(3, 4, 1), m.Cat(1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.cat(self.relu(self.a(x)), self.b(x)))


def test_a_relu_does_not_share_its_grid_with_a_signed_value() -> None:
    gm, ctx = annotated(Mixed(), X)
    ShareQParams().run(gm, ctx)
    assert {s.node: s.why for s in ctx.skips} == {"cat": "its inputs absorbed different clamps; it requantizes"}
    assert len({n.meta["grid"] for n in gm.graph.nodes if n.name in ("relu", "b", "cat")}) == 3


@pytest.mark.parametrize(("scheme", "integer", "weights"), [("float", [], []), ("dynamic_w8", ["fc"], ["fc"]), ("weight_only_w8", [], ["conv", "fc"])])
def test_schemes_without_activation_grids(scheme: str, integer: list[str], weights: list[str]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.flat, self.fc = nn.Conv2d(3, 4, 3), m.GlobalAvgPool(), m.Reshape((-1, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flat(self.pool(self.conv(x))))

    gm, _ = annotated(Net(), X, scheme=scheme)
    assert [n.name for n in gm.graph.nodes if n.meta.get("integer")] == integer
    assert [n.name for n in gm.graph.nodes if "weight_spec" in n.meta] == weights and not grids(gm)


def test_a_skip_pattern_without_a_match_is_told() -> None:
    _, ctx = annotated(Block(), X, skip=("nothing.*",))
    assert {s.node: s.why for s in ctx.skips} == {"nothing.*": "this pattern of skip= matches no layer"}


def test_a_signed_symmetric_grid_absorbs_no_relu() -> None:
    gm, _ = annotated(Block(), X, scheme="iao_w8a8_sym")
    assert marks(gm)["a"] == ("int", "a") and marks(gm)["relu_a"] == ("int", "relu_a")
