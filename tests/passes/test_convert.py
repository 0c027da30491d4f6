"""convert: quantized modules in, absorbed clamps out, and a fake-quantizer behind every value that has a grid."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fxq import modules as m
from fxq import numerics
from fxq.errors import CalibrationError
from fxq.graph import finish, grids
from fxq.passes.annotate import Annotate
from fxq.passes.convert import Convert
from fxq.verify import INVARIANTS
from tests.helpers import canonical, context

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool, self.flat, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), m.GlobalAvgPool(), m.Reshape((-1, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat(self.pool(self.relu(self.conv(x)))))


def converted(model: nn.Module, scheme: str = "iao_w8a8", lo: float = -1.0, hi: float = 1.0) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    gm, ctx = canonical(model, X), context(X, scheme=scheme)
    Annotate().run(gm, ctx)
    for name, grid in grids(gm).items():
        low = 0.0 if grid.clamp else lo
        grids(gm)[name] = replace(grid, qparams=numerics.choose_qparams(torch.tensor(low), torch.tensor(hi), grid.spec))
    Convert().run(gm, ctx)
    finish(gm)
    assert list(INVARIANTS["converted"](gm)) == []
    return gm


def test_writes() -> None:
    gm = converted(Net())
    assert [n.name for n in gm.graph.nodes] == ["x", "x_q", "conv", "conv_q", "pool", "pool_q", "flat", "flat_q", "fc", "output"]
    assert str(gm.get_submodule("conv_q").extra_repr()) == "u8/pt scale 0.00392157 zp 0"
    assert isinstance(gm.get_submodule("conv"), m.Quantized) and gm.get_submodule("conv").bias_grid is not None


def test_numbers() -> None:
    gm = converted(Net())
    conv = gm.get_submodule("conv")
    assert isinstance(conv, m.Quantized)
    xq = numerics.fake_quantize(X, gm.get_submodule("x_q").qparams)  # type: ignore[union-attr,arg-type]
    want = torch.relu(m.call_with(conv.op, xq, numerics.dequantize(conv.weight_codes(), conv.weight_grid.qparams), None) + _bias(conv))
    want = numerics.fake_quantize(want, gm.get_submodule("conv_q").qparams)  # type: ignore[union-attr,arg-type]
    got = torch.fx.Interpreter(gm)
    got.run(X)
    inner = torch.fx.GraphModule(gm, _until(gm, "conv_q"))
    assert torch.equal(inner(X), want)


def _bias(conv: m.Quantized) -> Tensor:
    codes, grid = conv.bias_codes(), conv.bias_grid
    assert codes is not None and grid is not None
    return (codes.to(torch.float32) * grid.scale).reshape(1, -1, 1, 1)


def _until(gm: torch.fx.GraphModule, name: str) -> torch.fx.Graph:
    graph, env = torch.fx.Graph(), {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        if node.name == name:
            graph.output(env[node])
            return graph
    raise AssertionError(name)


def test_weights_of_other_modules_are_not_touched() -> None:
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gm = converted(model)
    assert torch.equal(gm.get_submodule("conv").op.weight, before["conv.weight"])  # type: ignore[union-attr,arg-type]


def test_a_bias_that_would_overflow_widens_the_weight_grid() -> None:
    model = Net()
    with torch.no_grad():
        model.conv.weight.mul_(1e-6)
        model.conv.bias.fill_(1e3)  # type: ignore[union-attr]
    conv = converted(model).get_submodule("conv")
    codes = conv.bias_codes()  # type: ignore[operator]
    assert 0 < int(codes.abs().max()) < 2**31 - 1


def test_refuses_weights_that_are_not_finite() -> None:
    model = Net()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="fc: the weight holds NaN or infinity. Load finite weights"):
        converted(model)
