"""Q/DQ for TensorRT: at the inputs of weighted layers, at the skip of a residual sum, on one grid around a concatenation; nowhere else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq import modules as m
from fxq.graph import grids, kind
from fxq.passes.annotate import Annotate
from fxq.passes.share_qparams import ShareQParams
from fxq.verify import INVARIANTS
from tests.helpers import canonical, context

X = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(i: int = 16, o: int = 16, k: int = 3, **kw: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)


def annotated(model: nn.Module, *inputs: Tensor, scheme: str = "iao_w8a8_sym", target: str = "sm86", skip: tuple[str, ...] = ()) -> GraphModule:
    gm, ctx = canonical(model, *inputs), context(*inputs, scheme=scheme, target=target)
    ctx.float_nodes = skip
    Annotate().run(gm, ctx)
    ShareQParams().run(gm, ctx)
    assert list(INVARIANTS["annotated"](gm)) == []
    return gm


def edges(gm: GraphModule) -> set[tuple[str, str]]:
    """(producer, reader) of every value that is read in codes."""
    return {(source, n.name) for n in gm.graph.nodes for source in n.meta["reads_codes"]}


def integers(gm: GraphModule) -> set[str]:
    return {n.name for n in gm.graph.nodes if n.meta.get("integer")}


class Residual(nn.Module):
    """A residual block with a convolution in the shortcut that stands behind the branch in the graph."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.stem, self.relu0, self.a, self.relu1, self.b = conv(), nn.ReLU(), conv(), nn.ReLU(), conv()
        self.short = conv(k=1) if shortcut else None
        self.add, self.relu2, self.c = m.Add(), nn.ReLU(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu0(self.stem(x))
        y = self.b(self.relu1(self.a(x)))
        return self.c(self.relu2(self.add(y, x if self.short is None else self.short(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("shortcut", [False, True])
def test_the_skip_is_quantized_and_the_branch_is_not(shortcut: bool) -> None:
    gm = annotated(Residual(shortcut), X)
    skip = "short" if shortcut else "relu0"
    between = {("relu0", "short")} if shortcut else set()
    assert edges(gm) == {("x", "stem"), ("relu0", "a"), ("relu1", "b"), (skip, "add"), ("relu2", "c"), *between}
    assert integers(gm) == {"stem", "a", "b", "c", *(("short",) if shortcut else ())}
    assert not any("grid" in n.meta for n in gm.graph.nodes if n.name in ("stem", "a", "b", "c", "add")), "what a layer gives stays float"
    assert "fused into the kernel before it" in next(n for n in gm.graph.nodes if n.name == "relu0").meta["float_why"]


class Sum(nn.Module):
    """A sum of two values of which none is a convolution of its own."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.act, self.add = branch, nn.ReLU(), m.Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.act(self.branch(x)), x)  # type: ignore[no-any-return]


def test_a_sum_without_a_convolution_before_it_stays_float() -> None:
    assert edges(annotated(Sum(conv()), X)) == {("x", "branch")}


def test_a_broadcast_skip_is_not_read_in_codes() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.pool, self.add = conv(), m.GlobalAvgPool(), m.Add()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(self.a(x), self.pool(x))  # type: ignore[no-any-return]

    assert edges(annotated(Bias(), X)) == {("x", "a")}


class Concat(nn.Module):
    """Two branches, joined; the first branch is also read alone."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.a, self.ra, self.b, self.rb, self.alone = conv(), nn.ReLU(), conv(), nn.ReLU(), conv()
        self.cat, self.c, self.tail = m.Cat(1), conv(32), tail

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.ra(self.a(x)), self.rb(self.b(x))
        y = self.cat(a, b)
        return self.c(y), self.tail(self.alone(a))


def test_a_concatenation_has_one_scale() -> None:
    gm = annotated(Concat(nn.Softplus()), X)
    assert {("ra", "cat"), ("rb", "cat"), ("cat", "c"), ("ra", "alone")} <= edges(gm) and "cat" in integers(gm)
    assert {n.meta["grid"] for n in gm.graph.nodes if n.name in ("ra", "rb", "cat")} == {"ra"} and set(grids(gm)) == {"x", "ra"}


def test_a_concatenation_that_float_reads_too_keeps_its_inputs() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.cat, self.c, self.tail = conv(), conv(), m.Cat(1), conv(32), nn.Softplus()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.cat(self.a(x), self.b(x))
            return self.c(y), self.tail(y)

    gm = annotated(Both(), X)
    assert edges(gm) == {("x", "a"), ("x", "b"), ("cat", "c")} and "cat" not in integers(gm)


@pytest.mark.parametrize(
    ("layer", "shape", "why"),
    [
        (lambda: nn.Sequential(nn.ReLU(), conv(8, 32)), (2, 8, 8, 8), "a convolution with 8 channels on one side is faster in float (from 16 on integers pay)"),
        (lambda: nn.Sequential(nn.ReLU(), conv(32, 8)), (2, 32, 8, 8), "a convolution with 8 channels on one side"),
        (lambda: nn.Linear(64, 10), (2, 64), "a linear layer with 10 features on one side"),
        (lambda: nn.ConvTranspose2d(16, 16, 2), (2, 16, 8, 8), "TensorRT runs transposed convolutions in float"),
        (lambda: nn.Softmax(1), (2, 16), "softmax stays float: its sums need the range"),
        (lambda: nn.MaxPool2d(2), (2, 16, 8, 8), "it only moves values: TensorRT moves the Q behind it to its front"),
        (lambda: nn.Conv1d(16, 16, 3), (16, 8), "its input has no batch dimension"),
    ],
)
def test_what_stays_float_says_why(layer: Callable[[], nn.Module], shape: tuple[int, ...], why: str) -> None:
    gm = annotated(nn.Sequential(layer()), torch.randn(*shape))
    last = next(n for n in reversed(gm.graph.nodes) if n.op == "call_module")
    assert last.meta["float_why"].startswith(why) and not edges(gm)


@pytest.mark.parametrize(("scheme", "target", "first"), [("iao_w8a8_sym", "sm86", True), ("fp8_w8a8", "sm89", False)])
def test_the_first_convolution_may_have_three_channels_in_int8(scheme: str, target: str, first: bool) -> None:
    gm = annotated(nn.Sequential(conv(3, 16), nn.ReLU(), conv()), torch.randn(2, 3, 8, 8), scheme=scheme, target=target)
    assert integers(gm) == ({"_0", "_2"} if first else {"_2"})


def test_products_of_activations() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.softmax, self.attend = m.MatMul(), nn.Softmax(-1), m.MatMul()

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attend(self.softmax(self.scores(q, k)), v)  # type: ignore[no-any-return]

    q, k, v = torch.randn(2, 4, 20, 16), torch.randn(2, 4, 16, 20), torch.randn(2, 4, 20, 16)
    assert edges(annotated(Attend(), q, k, v)) == {("q", "scores"), ("k", "scores"), ("softmax", "attend"), ("v", "attend")}
    small = annotated(Attend(), q[..., :8], k[..., :8, :], v)
    assert edges(small) == {("softmax", "attend"), ("v", "attend")}
    assert "less than 16 along K or N" in next(n for n in small.graph.nodes if n.name == "scores").meta["float_why"]


def test_skip_leaves_a_layer_and_its_edges_alone() -> None:
    gm = annotated(Residual(False), X, skip=("b", "add"))
    assert edges(gm) == {("x", "stem"), ("relu0", "a"), ("relu2", "c")}
    assert next(n for n in gm.graph.nodes if n.name == "b").meta["float_why"] == "left float on request (b)"


def test_float_readers_see_the_float_value_in_the_converted_graph() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.relu, self.b, self.soft = conv(), nn.ReLU(), conv(), nn.Softplus()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.relu(self.a(x))
            return self.b(y), self.soft(y)

    torch.manual_seed(0)
    compiled = fxq.compile(Both().eval(), "int8", calibration=X, target="sm86", progress=False)
    gm = compiled.graph_module
    readers = {str(n.target): [kind(gm, a) for a in n.all_input_nodes] for n in gm.graph.nodes if n.op == "call_module"}
    assert readers["b"] == ["fake_quantize"] and readers["soft"] == ["relu"] and readers["relu"] == ["conv"]
    reference = [t for t in compiled.reference(X)]
    assert all(torch.allclose(a, b) for a, b in zip(reference, compiled(X), strict=True)), "for TensorRT both are float between rounded values"
