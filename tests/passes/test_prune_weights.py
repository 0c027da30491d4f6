"""prune-weights: which weights become 0, what the graph then computes, what is refused."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.compressing import masked_layers
from fxq.errors import FxqError, PassError
from fxq.sparsity import sparsify
from fxq.weight_levels import GRID, levels

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()


def cut(how: Any, model: nn.Module | None = None, scheme: str = "float") -> fxq.CompiledModel:
    return fxq.compile(model or net(), scheme, example=X, prune=how, progress=False)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def test_the_least_of_each_layer_become_zero() -> None:
    """Section 8 of algorithms.md: of equal ones the last."""
    layer = nn.Linear(5, 1)
    layer.weight = nn.Parameter(torch.tensor([[0.1, -0.5, 0.2, -0.05, 0.3]]))
    m = fxq.compile(nn.Sequential(layer), "float", example=torch.randn(2, 5), prune=fxq.Prune(sparsity=0.6), progress=False)
    assert torch.equal(weights(m)[0], torch.tensor([[0, -0.5, 0, 0, 0.3]]))


@pytest.mark.parametrize("scope", ["global", "layer", "sensitivity"])
def test_so_many_are_cut_and_the_rest_stays(scope: str) -> None:
    model = net()
    m = cut(fxq.Prune(sparsity=0.7, sparsity_scope=scope), model)
    now, total = weights(m), sum(w.numel() for w in weights(model))
    zeros = sum(int((w == 0).sum()) for w in now)
    assert abs(zeros - 0.7 * total) <= len(now)
    assert "prune-weights" in str(m.history) and m.history["prune-weights"].rewrites == 3
    assert m.history.diff("prune-weights").count("of the weights kept") == 3
    if scope == "layer":
        assert all(d == pytest.approx(0.3, abs=0.03) for d in m.densities.values())
    masked = net()
    for new, layer in zip(now[1:], [masked[3], masked[7]], strict=True):  # the first has its batch norm folded in
        old: torch.Tensor = layer.weight  # type: ignore[assignment]
        assert torch.equal(new[new != 0], old[new != 0])
        with torch.no_grad():
            old[new == 0] = 0
    with torch.no_grad():
        masked[0].weight[now[0] == 0] = 0
    assert torch.allclose(m(X), masked(X), atol=1e-5)


def test_global_cuts_the_least_of_all() -> None:
    model = net()
    everything = torch.cat([w.abs().reshape(-1) for w in weights(model)])
    m = fxq.compile(model, "deepcomp_w5", example=X, prune=fxq.Prune(sparsity=0.5), mode="qat", progress=False)
    limit = everything.kthvalue(len(everything) // 2).values
    for (path, layer), old in zip(masked_layers(m.graph_module).items(), weights(model), strict=True):
        assert torch.equal(layer.mask, old.abs() > limit), path


def test_sensitive_layers_keep_more() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight.mul_(1e-3)  # type: ignore[operator]
        model[3].bias.zero_()  # type: ignore[operator]
        model[7].weight.mul_(0.1)  # type: ignore[operator]
    kept = cut(fxq.Prune(sparsity=0.6, sparsity_scope="sensitivity"), model).densities
    assert kept["3"] < kept["7"]  # by magnitude alone all of layer 3 would go, but here it matters less as well; layer 7 decides the output
    assert sum(k * w.numel() for k, w in zip(kept.values(), weights(model), strict=True)) == pytest.approx(0.4 * sum(w.numel() for w in weights(model)), abs=3)


def test_levels_take_the_cheapest_weights() -> None:
    cheap, dear = [0.0] * len(GRID), [1.0 * s for s in GRID]
    shares = levels([cheap, dear], [100, 100], 0.49)
    assert shares[0] == pytest.approx(0.98) and shares[1] == pytest.approx(0.0)
    assert levels([dear, dear], [100, 300], 0.5) == pytest.approx([0, 2 / 3], abs=0.01)  # a weight of the larger layer does less
    assert sum(levels([cheap, dear], [10, 1000], 0.9)[i] * n for i, n in enumerate((10, 1000))) == pytest.approx(909)


def test_patterns_have_shares_of_their_own() -> None:
    m = cut(fxq.Prune(sparsity={"0": 0.25, "7": 0.5}))
    assert m.densities == {"0": 0.75, "3": 1.0, "7": 0.5}
    assert [(s.node, s.why) for s in m.history["prune-weights"].skips] == [("_3", "its weights stay: no pattern of sparsity= names it")]


def test_kept_layers_stay_whole() -> None:
    m = cut(fxq.Prune(sparsity=0.5, keep=[0, "7"]))
    assert m.densities["0"] == m.densities["7"] == 1 and m.densities["3"] == 0.5


def test_masks_that_are_there_stay() -> None:
    model = net()
    sparsify(model, 0.8, scope="layer")
    zeros = {k: d for k, d in cut(fxq.Prune(sparsity=0.5, sparsity_scope="layer"), model).densities.items()}
    assert zeros == {k: pytest.approx(0.2, abs=0.03) for k in zeros}
    q = fxq.compile(model, "deepcomp_w5", example=X, prune=fxq.Prune(sparsity=0.0), mode="qat", progress=False)
    assert all(float(m.mask.double().mean()) == pytest.approx(0.2, abs=0.03) for m in masked_layers(q.graph_module).values())  # type: ignore


def test_layers_with_one_weight_have_one_mask() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    m = fxq.compile(Tied(), "float", example=torch.randn(2, 6), prune=fxq.Prune(sparsity=0.5), progress=False)
    a, b = weights(m)
    assert torch.equal(a, b) and int((a == 0).sum()) == 18 and m.history["prune-weights"].rewrites == 1


def test_channels_first_then_weights() -> None:
    m = cut(fxq.Prune(ratio=0.5, multiple_of=2, sparsity=0.5, sparsity_scope="layer"))
    assert weights(m)[1].shape[1] < 4 and m.prune_report is not None
    assert all(d == pytest.approx(0.5, abs=0.05) for d in m.densities.values())


@pytest.mark.parametrize(
    ("how", "fact"),
    [
        ({"sparsity": 1.0}, "not in"), ({"sparsity": -0.1}, "not in"), ({"sparsity": True}, "not in"), ({"sparsity": {"a": 2}}, "not in"), ({}, "nothing says"),
        ({"sparsity": 0.5, "sparsity_scope": "globl"}, "did you mean 'global'"), ({"sparsity": {"nowhere": 0.5}}, "names no layer"),
        ({"sparsity": 0.5, "keep": [0, 1, 2]}, "no weight can be cut"), ({"sparsity": 0.999}, "leaves"),
        ({"sparsity": 0.5, "macs": 0.5, "ratio": 0.1}, "both say"),
    ],
)  # fmt: skip
def test_refused(how: Mapping[str, Any], fact: str) -> None:
    with pytest.raises(PassError, match=fact) as e:
        cut(fxq.Prune(**how))
    assert e.value.way_out


def test_nan_is_named() -> None:
    model = net()
    with torch.no_grad():
        model[7].weight[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(FxqError, match="7"):
        cut(fxq.Prune(sparsity=0.5), model)
