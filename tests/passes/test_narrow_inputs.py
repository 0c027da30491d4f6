"""narrow-inputs and replace-activations: which grids low-bit layers read, what they leave alone, and that the function stays."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq import schemes
from fxq.graph import finish, grids
from fxq.passes.annotate import Annotate
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.narrow_inputs import NarrowInputs
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.passes.replace_activations import ReplaceActivations
from fxq.passes.share_qparams import ShareQParams
from fxq.pipeline import PassContext
from fxq.snapshot import graph_text
from fxq.verify import INVARIANTS
from tests.helpers import canonical, context

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block: the sum is read by a conv and by the next sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.c, self.last = (nn.Conv2d(3 if i == 0 else 4, 4, 1) for i in range(5))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.last(self.pool(F.relu(self.c(x) + x)))  # type: ignore[no-any-return]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.pool = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.pool(F.relu(self.a(F.relu(self.first(x))))))  # type: ignore[no-any-return]


def prepared(model: nn.Module, name: str, **fields: object) -> tuple[torch.fx.GraphModule, PassContext]:
    gm, ctx = canonical(model.eval(), X), context(X)
    ctx.scheme = replace(schemes.get(name), name="test", **fields)  # type: ignore[arg-type]
    Canonicalize().run(gm, ctx)
    PropagateShapes().run(gm, ctx)
    return gm, ctx


def placed(model: nn.Module, name: str, **fields: object) -> torch.fx.GraphModule:
    gm, ctx = prepared(model, name, **fields)
    ReplaceActivations().run(gm, ctx)
    finish(gm)
    Annotate().run(gm, ctx)
    ShareQParams().run(gm, ctx)
    NarrowInputs().run(gm, ctx)
    assert list(INVARIANTS["annotated"](gm)) == []
    return gm


def marks(gm: torch.fx.GraphModule) -> dict[str, tuple[str, str]]:
    """Layer -> grid that it reads, and its codes."""
    found = {}
    for n in gm.graph.nodes:
        if n.op == "call_module" and n.meta.get("integer") and "conv" in type(gm.get_submodule(n.target)).__name__.lower():
            name = n.meta.get("narrow") or n.all_input_nodes[0].meta["grid"]
            found[str(n.target)] = (name, str(grids(gm)[name].spec))
    return found


def test_a_grid_that_only_low_bit_layers_read_is_narrow() -> None:
    gm = placed(Plain(), "iao_w4a4", int8_layers=("first",))
    assert marks(gm) == {"first": ("x", "u8/pt"), "a": ("relu", "u4/pt"), "b": ("relu_1", "u4/pt")}
    assert grids(gm)["relu_1"].clamp == (0.0, None), "the absorbed ReLU stays absorbed"
    pool = next(n for n in gm.graph.nodes if n.name == "pool")
    assert pool.meta["grid"] == "relu_1", "the pool hands the narrow codes on"


def test_a_value_that_others_read_too_has_both_grids() -> None:
    gm = placed(Block(), "iao_w4a4")
    found = marks(gm)
    assert found["a"] == ("relu/narrow", "u4/pt") and found["b"] == ("relu_1", "u4/pt") and found["c"][1] == "u4/pt" and found["c"][0].endswith("/narrow")
    assert found["first"][1] == found["last"][1] == "u8/pt", "the scheme keeps the ends in 8 bits"
    assert str(grids(gm)["relu"].spec) == "u8/pt" and grids(gm)["relu/narrow"].clamp == (0.0, None)


def test_the_grids_of_signs_are_fixed() -> None:
    gm = placed(Plain(), "xnor_w1a1", float_layers=("first",))
    assert marks(gm) == {"a": ("first", "b1/pt"), "b": ("a", "b1/pt")}
    assert all(g.fixed is not None and float(g.fixed.scale) == 1 and g.how == "sign" for g in grids(gm).values() if str(g.spec) == "b1/pt")
    lines = [line.split(" <")[0] for line in graph_text(gm).splitlines()]
    assert not any("relu" in line for line in lines)


def test_schemes_without_narrow_activations_are_left_alone() -> None:
    gm, ctx = prepared(Plain(), "iao_w8a8")
    Annotate().run(gm, ctx)
    before = {k: str(v) for k, v in grids(gm).items()}
    assert NarrowInputs().run(gm, ctx) == 0 and {k: str(v) for k, v in grids(gm).items()} == before


def test_replacing_activations_keeps_the_function_of_everything_else() -> None:
    """With identity in place of signs the rewired graph is the model without the bypassed ReLUs; other readers keep theirs."""
    gm, ctx = prepared(Block(), "xnor_w1a1")
    assert ReplaceActivations().run(gm, ctx) > 0
    gm.graph.lint()
    gm.recompile()
    get = {str(n.target): n for n in gm.graph.nodes if n.op == "call_module"}
    first, a = get["first"], get["a"]
    assert a.all_input_nodes == [first] and get["b"].all_input_nodes == [a]
    relus = [n for n in gm.graph.nodes if n.name.startswith("relu") and n.users]
    assert {r.all_input_nodes[0].name for r in relus} >= {"first"}, "the sums read rectified values"
    m: nn.Module = Block()
    m.load_state_dict({k: v for k, v in gm.state_dict().items() if k in m.state_dict()})
    with torch.no_grad():
        x1 = m.first(X)  # type: ignore[operator]
        s1 = F.relu(x1) + m.b(m.a(x1))  # type: ignore[operator]
        want = m.last(m.pool(F.relu(m.c(s1) + F.relu(s1))))  # type: ignore[operator]
        assert torch.allclose(gm(X), want, atol=1e-6)


def test_layers_that_stay_float_keep_their_relu() -> None:
    gm, ctx = prepared(Plain(), "xnor_w1a1", float_layers=("first", "last"))
    ctx.float_nodes = ("a",)
    assert ReplaceActivations().run(gm, ctx) == 0
