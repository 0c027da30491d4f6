"""share-qparams: one grid through what moves codes and over concatenations; the numbers it gives; the reasons why not."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import modules as m
from fxq.graph import grid_of, grids
from fxq.passes.annotate import Annotate
from fxq.passes.share_qparams import ShareQParams
from fxq.pipeline import PassContext
from tests.helpers import canonical, context

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Moved(nn.Module):
    """A convolution, an operation that only moves its codes, and a convolution that wants codes."""

    def __init__(self, move: nn.Module) -> None:
        super().__init__()
        self.a, self.move, self.b = nn.Conv2d(3, 4, 3, padding=1), move, nn.LazyConv2d(2, 1)
        self(X)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.move(self.a(x)))


class Joined(nn.Module):
    """Two branches and the input, concatenated."""

    def __init__(self, left: nn.Module, right: nn.Module, with_input: bool = False) -> None:
        super().__init__()
        self.a, self.left, self.b, self.right = nn.Conv2d(3, 4, 1), left, nn.Conv2d(3, 4, 1), right
        self.cat, self.last, self.with_input = m.Cat(1), nn.LazyConv2d(2, 1), with_input
        self(X)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.left(self.a(x)), self.right(self.b(x)), *([x] if self.with_input else [])]
        return self.last(self.cat(*parts))


def shared(model: nn.Module) -> tuple[torch.fx.GraphModule, PassContext, int]:
    gm, ctx = canonical(model.eval(), X), context(X)
    Annotate().run(gm, ctx)
    return gm, ctx, ShareQParams().run(gm, ctx)


MOVERS = [
    nn.MaxPool2d(2), m.Reshape((None, 4, 4, 16)), m.Permute((0, 1, 3, 2)), m.Slice([(2, 1, 5, 1)]), m.Pad((1, 1, 2, 0)),
    m.IndexSelect(1, [2, 0, 1, 3]), m.Resize(None, (2.0, 2.0), "nearest"),
]  # fmt: skip


@pytest.mark.parametrize("move", MOVERS, ids=lambda v: type(v).__name__)
def test_a_mover_takes_its_inputs_grid(move: nn.Module) -> None:
    torch.manual_seed(0)
    gm, _, joined = shared(Moved(move))
    assert joined == 1
    assert {n.name: n.meta["grid"] for n in gm.graph.nodes if "grid" in n.meta} == {"x": "x", "a": "a", "move": "a", "b": "b"}
    assert set(grids(gm)) == {"x", "a", "b"}


def test_a_concatenation_and_its_inputs_take_one_grid() -> None:
    torch.manual_seed(0)
    gm, _, joined = shared(Joined(nn.ReLU(), nn.ReLU()))
    assert joined == 1
    assert {n.name: n.meta["grid"] for n in gm.graph.nodes if "grid" in n.meta} == {
        "x": "x", "left": "left", "right": "left", "cat": "left", "last": "last",
    }  # fmt: skip
    assert grids(gm)["left"].clamp == (0.0, None)


KEPT = [move for move in MOVERS if not isinstance(move, (m.Pad, m.IndexSelect))]  # legalize gives these two to the convolutions


@pytest.mark.parametrize("move", KEPT, ids=lambda v: type(v).__name__)
def test_codes_are_moved_and_never_rounded_again(move: nn.Module) -> None:
    torch.manual_seed(0)
    model = fxq.compile(Moved(move).eval(), calibration=X)
    gm = model.graph_module
    before, after = (next(n for n in gm.graph.nodes if n.name == name) for name in ("a_q", "move_q"))
    one, other = grid_of(gm, before), grid_of(gm, after)
    assert one is not None and other is not None and one.qparams is not None and other.qparams is not None
    assert one.qparams.same_grid(other.qparams)
    proof = model.verify(model.lower(), 0.7 * X)
    assert proof.ok and proof.hidden_differ == 0
    counts = model.lint().counts()
    assert counts["Conv"][1] == 0


@pytest.mark.parametrize(("model", "why"), [
    (lambda: Joined(nn.ReLU(), nn.ReLU(), with_input=True), "an input of the model keeps its own grid"),
    (lambda: Joined(nn.ReLU(), nn.MaxPool2d(1)), "its inputs absorbed different clamps; it requantizes"),
    (lambda: Joined(nn.Hardsigmoid(), nn.Hardsigmoid()), "an input's grid follows from its operation; it requantizes"),
])  # fmt: skip
def test_refuses_with_a_reason(model: object, why: str) -> None:
    torch.manual_seed(0)
    gm, ctx, joined = shared(model())  # type: ignore[operator]
    assert [(s.node, s.why) for s in ctx.skips] == [("cat", why)]
    assert next(n for n in gm.graph.nodes if n.name == "cat").meta["grid"] == "cat"
    assert joined == (1 if "clamps" in why else 0)  # the max-pool's own
