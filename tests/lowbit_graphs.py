"""Converted graphs with narrow activation grids and low-bit weights, by hand."""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq import numerics
from fxq.graph import kind, module_of, swap_module
from fxq.modules import WEIGHTED, FakeQuantize, Quantized
from fxq.spec import QParams, QuantSpec
from tests.converted import converted, fq

NARROW = ("u4/pt", "u2/pt", "u3/pt", "s4/pt", "s4n/pt", "t2/pt", "b1/pt", "s8n/pt")
LEVELS = {  # kind of weights -> its codes
    "binary": [-64, 64], "ternary": [-64, 0, 64], "dorefa2": [-96, -32, 32, 96], "dorefa4": list(range(-120, 121, 16)),
    "int4": list(range(-7, 8)), "wide": [-127, -3, 0, 5, 127], "int8": list(range(-127, 128)),
}  # fmt: skip


def set_codes(module: Quantized, codes: Tensor) -> None:
    """Let the weight have these codes."""
    op: Any = module.op
    qp = module.weight_grid.qparams
    op.weight.data = numerics.dequantize(codes.to(torch.int8), qp)
    assert torch.equal(module.weight_codes().to(torch.int32), codes.to(torch.int32))


def low_bit(gm: GraphModule, levels: str = "binary", seed: int = 0, only: tuple[str, ...] = ()) -> GraphModule:
    """Give the quantized layers (those in ``only``, otherwise all) random weights of these codes, and odd biases."""
    rng = torch.Generator().manual_seed(seed)
    for n in gm.graph.nodes:
        if kind(gm, n) not in WEIGHTED or (only and str(n.target) not in only):
            continue
        layer: Any = module_of(gm, n)
        if not isinstance(layer, Quantized):
            continue
        table = torch.tensor(LEVELS[levels])
        set_codes(layer, table[torch.randint(0, len(table), layer.op.weight.shape, generator=rng)])
        if layer.bias_grid is not None:
            layer.op.bias.data = (layer.bias_codes() | 1).to(torch.float64).mul(layer.bias_grid.scale).to(torch.float32)
            assert bool((layer.bias_codes() % 2 == 1).all())
    return gm


def measure(gm: GraphModule, *inputs: Tensor, share: float = 0.6) -> GraphModule:
    """Measure the grids again (the layers changed), without a range for binary ones; ``share`` of the range is kept."""
    env: dict[Node, Any] = {}
    given = iter(inputs)
    with torch.no_grad():
        for n in gm.graph.nodes:
            args = torch.fx.node.map_arg(n.args, env.__getitem__)
            if n.op == "placeholder":
                env[n] = next(given)
            elif n.op == "get_attr":
                env[n] = getattr(gm, str(n.target))
            elif n.op == "call_function":
                env[n] = n.target(*args)
            elif n.op == "call_module":
                module: Any = module_of(gm, n)
                if isinstance(module, FakeQuantize) and module.step is None:
                    like = module.__dict__.get("like")
                    qp = like.qparams if like is not None else numerics.choose_qparams(args[0].min() * share, args[0].max() * share, module.spec)
                    module.scale, module.zero_point = qp.scale, qp.zero_point
                elif isinstance(module, Quantized) and module.bias_grid is not None:
                    _follow(gm, n, module)
                env[n] = module(*args)
    return gm


def _follow(gm: GraphModule, n: Node, module: Quantized) -> None:
    """The bias grid of the input's new scale, the bias codes as they were."""
    codes = module.bias_codes()
    source: Any = module_of(gm, n.all_input_nodes[0])
    assert codes is not None and module.bias_grid is not None
    grid = numerics.bias_qparams(source.qparams, module.weight_grid.qparams)
    module.bias_grid = FakeQuantize(grid)
    module.op.bias.data = (codes.to(torch.float64) * grid.scale).to(torch.float32)


class Conv(nn.Module):
    """Input on a grid, then two convolutions with a grid of the kind under test before and after the second."""

    def __init__(self, spec: str, first: str = "u8/pt", **options: Any) -> None:
        super().__init__()
        self.x_q, self.a, self.a_q = fq(spec=first), nn.Conv2d(3, options.get("in_channels", 8), 3, padding=1), fq(spec=spec)
        self.b, self.b_q = nn.Conv2d(**{"in_channels": 8, "out_channels": 7, "kernel_size": 3, **options}), fq(spec=spec)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b_q(self.b(self.a_q(self.a(self.x_q(x)))))
        return out


class Residual(nn.Module):
    """An 8-bit stream; the convolutions read it on a narrow grid of their own; a max pool and a shortcut on codes."""

    def __init__(self, spec: str, pool: bool = True) -> None:
        super().__init__()
        self.x_q, self.stem, self.stem_q = fq(), nn.Conv2d(3, 8, 3, padding=1), fq()
        self.a_in, self.a, self.a_q = fq(spec=spec), nn.Conv2d(8, 8, 3, padding=1), fq()
        self.add, self.add_q = m.Add(), fq()
        self.b_in = fq(spec=spec)
        self.pool, self.pool_q = (nn.MaxPool2d(2), fq(self.b_in, spec)) if pool else (None, None)
        self.b, self.b_q = nn.Conv2d(8, 16, 3, padding=1, stride=1 if pool else 2), fq()
        self.down, self.down_q, self.add2, self.add2_q = nn.Conv2d(8, 16, 1, 2), fq(), m.Add(), fq()
        self.mean, self.mean_q, self.fc = m.GlobalAvgPool(), fq(), nn.Conv2d(16, 5, 1)
        self.fc_q = fq()

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem_q(self.stem(self.x_q(x)))
        y = self.add_q(self.add(self.a_q(self.a(self.a_in(y))), y))
        z = self.b_in(y)
        if self.pool is not None and self.pool_q is not None:
            z = self.pool_q(self.pool(z))
        y = self.add2_q(self.add2(self.b_q(self.b(z)), self.down_q(self.down(y))))
        out: Tensor = self.fc_q(self.fc(self.mean_q(self.mean(y))))
        return out


class Movers(nn.Module):
    """Everything that only moves codes, on the narrow grid of the convolution before it."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.x_q, self.stem, self.stem_q = fq(), nn.Conv2d(3, 8, 3, padding=1), fq(spec=spec)
        s, q = spec, self.stem_q
        self.split, self.a_q, self.b_q = m.Split((3, 5), 1), fq(q, s), fq(q, s)
        self.cat, self.cat_q = m.Cat(1), fq(q, s)
        self.pool, self.pool_q = nn.MaxPool2d(3, 1, 1), fq(q, s)
        self.pad, self.pad_q = m.Pad((1, 0, 0, 1)), fq(q, s)
        self.pick, self.pick_q = m.IndexSelect(1, [1, 0, 3, 2, 5, 4, 7, 6]), fq(q, s)
        self.cut, self.cut_q = m.Slice(((2, 1, None, 1),)), fq(q, s)
        self.up, self.up_q = m.Resize(None, (2.0, 2.0), "nearest"), fq(q, s)
        self.turn, self.turn_q, self.flat, self.flat_q = m.Permute((0, 2, 3, 1)), fq(q, s), m.Reshape((None, -1)), fq(q, s)
        self.head, self.head_q = nn.Conv2d(8, 4, 1), fq(spec=s)
        self.fc = nn.Linear(18 * 20 * 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.split(self.stem_q(self.stem(self.x_q(x))))
        y = self.cat_q(self.cat(self.b_q(parts[1]), self.a_q(parts[0])))
        y = self.cut_q(self.cut(self.pick_q(self.pick(self.pad_q(self.pad(self.pool_q(self.pool(y))))))))
        y = self.up_q(self.up(y))
        return self.head_q(self.head(y)), self.fc(self.flat_q(self.flat(self.turn_q(self.turn(y)))))


class Tokens(nn.Module):
    """Linear layers on two or three dimensions, the last with a float output."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.x_q, self.a, self.a_q = fq(), nn.Linear(32, 24), fq(spec=spec)
        self.b, self.b_q, self.c = nn.Linear(24, 16), fq(spec=spec), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b_q(self.b(self.a_q(self.a(self.x_q(x))))))
        return out


def low(model: nn.Module, *inputs: Tensor, levels: str = "binary", floats: tuple[str, ...] = ()) -> GraphModule:
    """Convert ``model``, give its layers low-bit weights, measure its grids."""
    torch.manual_seed(0)
    return measure(low_bit(converted(model, *inputs, floats=floats), levels), *inputs)


def random_conv(seed: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Options of a convolution, and the sizes of its net's input."""
    rng = random.Random(seed)
    groups = rng.choice([1, 1, 2, 8])
    kernel = rng.choice([1, 2, 3, 3, 5])
    dilation = rng.choice([1, 1, 2])
    options = {
        "in_channels": 8 if groups > 1 else rng.choice([1, 5, 8, 19]), "out_channels": groups * rng.choice([1, 3, 5]), "kernel_size": kernel,
        "stride": rng.choice([1, 1, 2, 3]), "padding": rng.choice([0, 1, 2]), "dilation": dilation, "groups": groups,
    }  # fmt: skip
    return options, (2, 3, rng.choice([11, 12, 16]), rng.choice([11, 13]))


def with_grid(gm: GraphModule, name: str, spec: str, scale: float, step: float | None = None, zero: int = 0) -> GraphModule:
    """Put another grid in the place of the fake-quantizer ``name``."""
    (node,) = (n for n in gm.graph.nodes if n.op == "call_module" and n.target == name)
    qp = QParams(QuantSpec.parse(spec), torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))
    swap_module(gm, node, FakeQuantize(qp, name, None if step is None else torch.tensor(step)))
    return gm
