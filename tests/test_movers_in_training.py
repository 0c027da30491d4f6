"""Operations that move codes (a max pool between an activation and its layer): values and gradients pass, nothing is rounded twice."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.trackers import TrackedFakeQuantize


def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(3):
        layers += [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *([nn.MaxPool2d(2)] if i else [])]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1)).eval()


def images(n: int = 4) -> Tensor:
    return 10 * torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))


SCHEMES = ["bnn_w1a1", "tbn_w1at", "dorefa_w4a4_compat", "dorefa_w4a4_pact", "iao_w4a4_lsq", "dorefa_w2a2"]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_pool_keeps_the_values_of_its_grid(name: str) -> None:
    for m in (fxq.compile(net(), name, calibration=images()), fxq.compile(net(), name, mode="qat", calibration=images()).eval()):
        values: dict[str, Tensor] = {}

        class Watch(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Tensor:
                out: Tensor = super().run_node(n)
                values[str(n.target)] = out  # noqa: B023
                return out

        with torch.no_grad():
            Watch(m.graph_module).run(images())
        pools = [n for n in m.graph_module.graph.nodes if n.op == "call_module" and isinstance(m.graph_module.get_submodule(n.target), nn.MaxPool2d)]
        assert len(pools) == 2
        for n in pools:
            before, after = values[str(n.target)], values[f"{n.target}_q"]
            torch.testing.assert_close(after, before, rtol=0, atol=0)
            assert len(after.unique()) > 1


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_pass_a_pool_once(name: str) -> None:
    q = fxq.compile(net(), name, mode="qat", calibration=images())
    moves = [m for m in q.graph_module.modules() if isinstance(m, TrackedFakeQuantize) and m.moves]
    assert len(moves) == 2
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    for m in moves:
        (g,) = torch.autograd.grad(m(x).sum(), x)
        assert torch.equal(g, torch.ones_like(x))
    q.train()
    q(images()).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for n, p in q.named_parameters() if n.endswith("weight") and p.ndim == 4)


@pytest.mark.parametrize("name", SCHEMES)
def test_trained_nets_with_pools_convert_and_verify(name: str) -> None:
    q = fxq.compile(net(), name, mode="qat", calibration=images())
    q.train()
    q(images()).square().sum().backward()
    q.freeze()
    m = q.convert()
    torch.testing.assert_close(m(images()), q(images()), rtol=0, atol=0)
    assert m.verify(m.lower().data, images(2)).ok
    assert [o.runs for o in m.lint().ops if o.op == "MaxPool"] == ["int8", "int8"]
