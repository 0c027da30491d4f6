"""Shared and pruned weights where models and requests are odd: tied layers, parts, requests that make no sense, failures half-way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.errors import FxqError, PassError, SchemeError
from fxq.shared import MOST, SharedWeight, shared
from fxq.trainable import TrainableModel
from fxq.weight_levels import GRID, levels

G = torch.Generator().manual_seed(4)
X = torch.randn(4, 4, 8, 8, generator=G)


def norm(channels: int, first: float) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    with torch.no_grad():
        bn.weight[0] = first
    return bn


class Tied(nn.Module):
    """Two layers with one weight and batch norms of their own."""

    def __init__(self, layer: type[nn.Module] = nn.Conv2d, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (layer(4, 4, 3, padding=1, groups=groups) for _ in range(2))  # type: ignore[call-arg]
        self.na, self.nb = norm(4, -2.0), norm(4, 3.0)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.nb(self.b(torch.relu(self.na(self.a(x))))))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()


def trainable(scheme: str = "deepcomp_w3", **options: Any) -> TrainableModel:
    made = fxq.compile(net(), scheme, calibration=[X], mode="qat", progress=False, **options)
    assert isinstance(made, TrainableModel)
    return made


@pytest.mark.parametrize("scheme", ["float", "iao_w8a8", "iao_w8a8_sym"])
@pytest.mark.parametrize(("layer", "groups"), [(nn.Conv2d, 1), (nn.Conv2d, 2), (nn.ConvTranspose2d, 1), (nn.ConvTranspose2d, 2)])
def test_tied_layers_keep_their_own_batch_norms(layer: type[nn.Module], groups: int, scheme: str, tmp_path: Path) -> None:
    """With as many values as weights nothing is lost, in float; integer archives hold a book for each layer."""
    model = Tied(layer, groups).eval()
    target = "tensorrt" if scheme.endswith("sym") else "onnxruntime"
    bits = 8 if scheme == "float" else 5
    m = fxq.compile(model, scheme, calibration=[X], share=fxq.Share(bits), target=target, progress=False)
    with torch.inference_mode():
        assert float((m(X) - model(X)).norm() / model(X).norm()) < (1e-5 if scheme == "float" else 0.1)
        m.lower("archive").save(tmp_path / "m.fxq")
        assert torch.equal(fxq.load(tmp_path / "m.fxq")(X), m(X))


@pytest.mark.parametrize("scheme", ["deepcomp_w3", "iao_w8a8"])
def test_a_failed_share_weights_changes_nothing(scheme: str) -> None:
    q = trainable(scheme, share=fxq.Share(3))
    last: Any = next(p for p in q.parameters() if p.shape == (5, 8))
    with torch.no_grad():
        last[0, 0] = torch.nan
    before, names = [type(m) for m in q.modules()], [n for n, _ in q.named_parameters()]
    with pytest.raises(PassError, match="share-weights / 7"):
        q.share_weights()
    assert [type(m) for m in q.modules()] == before and [n for n, _ in q.named_parameters()] == names
    assert not q.shares_weights and all(s.name != "share-weights" for s in q.history)
    with torch.no_grad():
        last[0, 0] = 0.5
    assert q.share_weights().shares_weights


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ({"init": "linear", "rate": 0.1}, "rate"), ({"layers": [3]}, "layers"), ({"layers": {3: 2}}, "layers"), ({"layers": None}, "layers"),
    ],
)  # fmt: skip
def test_requests_to_share_that_make_no_sense(given: dict[str, Any], fact: str) -> None:
    with pytest.raises(SchemeError, match=fact) as e:
        fxq.Share(3, **given)
    assert e.value.way_out


@pytest.mark.parametrize("mode", ["ptq", "qat"])
def test_a_pattern_of_share_that_names_no_layer(mode: str) -> None:
    with pytest.raises(PassError, match="'77'.*names no layer"):
        fxq.compile(net(), "float", example=X, share=fxq.Share(3, layers={"7": 2, "77": 2}), mode=mode, progress=False)


@pytest.mark.parametrize(("name", "given", "error"), [("share", 5, SchemeError), ("prune", 0.5, PassError), ("prune", fxq.Share(3), PassError)])
def test_arguments_of_another_type(name: str, given: Any, error: type[FxqError]) -> None:
    with pytest.raises(error, match=name) as e:
        fxq.compile(net(), "float", example=X, progress=False, **{name: given})
    assert e.value.way_out


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ({"sparsity": 0.5, "keep": ["nosuch"]}, "'nosuch' of keep= names no layer"), ({"sparsity": {}}, "no layer"), ({"sparsity": {3: 0.5}}, "pattern"),
        ({"sparsity": 0.5, "ratios": {"0": 0.5}}, "ratios"), ({"sparsity": 0.5, "scope": "layer"}, "scope"), ({"sparsity": 0.5, "by": "taylor"}, "by"),
        ({"sparsity": 0.5, "at_least": 0.1}, "at_least"), ({"ratio": 0.5, "sparsity_scope": "layer"}, "sparsity_scope"),
    ],
)  # fmt: skip
def test_requests_to_prune_that_would_do_nothing(given: dict[str, Any], fact: str) -> None:
    with pytest.raises(PassError, match=fact) as e:
        fxq.compile(net(), "float", example=X, prune=fxq.Prune(**given), progress=False)
    assert e.value.way_out


def test_a_ratio_that_cannot_be_reached() -> None:
    q = trainable(prune=fxq.Prune(sparsity={"0": 0.5, "3": 0.0}))
    before = q.densities
    with pytest.raises(FxqError, match="at most"):
        q.prune_weights(0.9)
    assert q.densities == before
    q.prune_weights(0.3)


def test_sensitivity_cuts_what_was_asked_for() -> None:
    wide = nn.Sequential(nn.Conv2d(4, 40, 3), nn.ReLU(), nn.Conv2d(40, 40, 3)).eval()
    m = fxq.compile(wide, "float", example=X, prune=fxq.Prune(sparsity=0.997, sparsity_scope="sensitivity"), progress=False)
    sizes = {"0": 40 * 4 * 9, "2": 40 * 40 * 9}
    assert sum(round((1 - m.densities[k]) * n) for k, n in sizes.items()) == pytest.approx(0.997 * sum(sizes.values()), abs=2)
    with pytest.raises(FxqError, match="leaves"):
        levels([[0.1] * len(GRID)] * 2, [10, 10], 0.97)


class Out(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net(), kind

    def forward(self, x: Tensor) -> Any:
        y = self.net(x)
        if self.kind == "integers":
            return y.argmax(1)
        if self.kind == "infinite":
            return y.masked_fill(y > 0, float("-inf"))
        return {"a": y, "b": [y.argmax(1), y * 2]}


def test_sensitivity_of_odd_outputs() -> None:
    how = fxq.Prune(sparsity=0.6, sparsity_scope="sensitivity")
    with pytest.raises(PassError, match="no floating output"):
        fxq.compile(Out("integers").eval(), "float", example=X, prune=how, progress=False)
    several = fxq.compile(Out("several").eval(), "float", example=X, prune=how, progress=False).densities
    plain = fxq.compile(net(), "float", example=X, prune=how, progress=False).densities
    assert list(several.values()) == pytest.approx(list(plain.values()))
    masked = fxq.compile(Out("infinite").eval(), "float", example=X, prune=how, progress=False).densities
    assert masked["net.7"] > masked["net.3"]


def test_sensitivity_cuts_tied_layers_together() -> None:
    """One weight at two places: what both do to the output counts."""
    from fxq.graph import walk
    from fxq.weight_levels import measured

    model = Tied().eval()
    gm = fxq.compile(model, "float", example=X, prune=fxq.Prune(sparsity=0.0), progress=False).history.graph("propagate-shapes")
    nodes = [n for n, _ in walk(gm, "conv")]
    weight = model.a.weight.detach()
    both, one = (measured(gm, [some], [weight.abs()], (X,))[0] for some in (nodes, nodes[:1]))
    assert all(b != o for b, o in zip(both, one, strict=True))
    with torch.no_grad():
        want = model(X)
        small = weight.abs().reshape(-1).kthvalue(int(0.5 * weight.numel())).values
        model.a.weight.masked_fill_(weight.abs() <= small, 0.0)
        error = float((model(X) - want).double().square().sum() / want.double().square().sum())
    assert both[GRID.index(0.5)] == pytest.approx(error, rel=1e-3)


class Parts(nn.Module):
    """Only its parts can be captured."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.fc = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.enc(x).mean((2, 3))
        return self.fc(y) if float(y.sum()) > -1e9 else y  # type: ignore[no-any-return]


def test_patterns_of_models_in_parts() -> None:
    how = fxq.Prune(sparsity={"enc.2": 0.5, "fc.*": 0.75, "e*.0": 0.25, "*": 0.9})
    m = fxq.compile(Parts().eval(), "float", example=X, prune=how, share=fxq.Share(4, layers={"enc.2": 2, "fc": 1}), progress=False)
    assert sorted(m.parts) == ["enc", "fc"]
    kept = {f"{path}.{k}": v for path, part in m.parts.items() for k, v in part.densities.items()}
    assert kept == {"enc.0": pytest.approx(0.75), "enc.2": pytest.approx(0.5), "fc.0": pytest.approx(0.25), "fc.2": pytest.approx(0.25)}
    sizes = {f"{path}.{k}": len(x.book) for path, part in m.parts.items() for k, x in part.graph_module.named_modules() if isinstance(x, SharedWeight)}
    assert sizes == {"enc.0": 16, "enc.2": 4, "fc.0": 2, "fc.2": 2}
    for options in ({"prune": fxq.Prune(sparsity={"enc.2": 0.5, "2": 0.9})}, {"share": fxq.Share(4, layers={"enc.2": 2, "2": 3})}):
        with pytest.raises(PassError, match="'2'.*names no layer"):
            fxq.compile(Parts().eval(), "float", example=X, progress=False, **options)


def test_state_dicts_from_before_sharing_say_so() -> None:
    plain, sharing = trainable(), trainable().share_weights()
    with pytest.raises(FxqError, match="share codebooks"):
        plain.load_state_dict(sharing.state_dict())
    with pytest.raises(FxqError, match="share no codebooks"):
        sharing.load_state_dict(plain.state_dict())


def test_codes_without_an_entry_are_not_loaded() -> None:
    m, other = (fxq.compile(net(), "deepcomp_w3", example=X, progress=False) for _ in range(2))
    state = m.state_dict()
    key = next(k for k in state if k.endswith("codes"))
    state[key] = torch.full_like(state[key], 200)
    with pytest.raises(RuntimeError, match="outside"):
        other.load_state_dict(state)
    assert torch.isfinite(other(X)).all()


def test_weights_of_float64_share_no_codebooks() -> None:
    q = trainable()
    q.double()
    with pytest.raises(PassError, match="float64"):
        q.share_weights()
    q.float()
    q.share_weights().double()
    assert q.eval()(X.double()).dtype == torch.float64


def test_the_largest_codebook() -> None:
    n = MOST
    op = nn.Linear(n + 1, 1, bias=False)
    layer = shared(op, torch.arange(n + 1).reshape(1, -1), torch.arange(1.0, n + 1))
    assert torch.equal(layer.weight.reshape(-1), torch.arange(n + 1.0))  # type: ignore[operator]
    with pytest.raises(ValueError):
        shared(op, torch.zeros(1, n + 1, dtype=torch.int64), torch.ones(n + 1))


def test_schemes_are_hashable() -> None:
    a, b = fxq.Share(3, layers={"a": 2}), fxq.Share(3, layers={"a": 2})
    assert a == b and hash(a) == hash(b) and len({fxq.schemes.get("deepcomp_w5"), fxq.schemes.get("deepcomp_w5")}) == 1


@pytest.mark.parametrize("first", [0.0, 0.3])
def test_sensitive_layers_are_cut_later(first: float) -> None:
    """A layer of which little is cut at first gives weights as well when more is asked for; the order of the layers stays."""
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(20.0)  # type: ignore[operator]
    q: Any = fxq.compile(model, "deepcomp_w3", example=X, prune=fxq.Prune(sparsity=first, sparsity_scope="sensitivity"), mode="qat", progress=False)
    sizes = {"0": 288, "3": 576, "7": 40}
    for ratio in (first, 0.5, 0.9, 0.97):
        before = q.densities
        q.prune_weights(ratio)
        assert sum((1 - q.densities[k]) * n for k, n in sizes.items()) == pytest.approx(ratio * sum(sizes.values()), abs=4)
        assert all(q.densities[k] <= before[k] for k in sizes)
        if ratio == 0.5:
            assert len({round(d, 2) for d in q.densities.values()}) > 1, "each layer has a share of its own"


def test_nan_in_a_masked_weight_is_named() -> None:
    q = trainable(prune=fxq.Prune(sparsity=0.0))
    weight: Any = next(p for p in q.parameters() if p.shape == (5, 8))
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(FxqError, match="prune_weights / 7"):
        q.prune_weights(0.5)


def test_checkpoints_with_other_numbers_of_values() -> None:
    """A layer without any value, and more values than uint8 counts."""
    empty, wide = nn.Sequential(nn.Linear(30, 30)), nn.Sequential(nn.Linear(30, 30))
    nn.init.zeros_(empty[0].weight)  # type: ignore[arg-type]
    x = torch.randn(2, 30, generator=G)
    models = [fxq.compile(m.eval(), "float", example=x, share=fxq.Share(b), progress=False) for m, b in ((empty, 3), (wide, 3), (wide, 10))]
    with torch.inference_mode():
        outputs = [m(x) for m in models]
    states = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in m.state_dict().items()} for m in models]
    for into in models:
        for state, y in zip(states, outputs, strict=True):
            into.load_state_dict(state)
            assert torch.equal(into(x), y)


@pytest.mark.parametrize("scheme", ["deepcomp_w3", "iao_w8a8"])
def test_frozen_weights_give_frozen_codebooks(scheme: str) -> None:
    model = net()
    model[3].weight.requires_grad_(False)  # type: ignore[union-attr]
    q: Any = fxq.compile(model, scheme, calibration=[X], share=fxq.Share(3), mode="qat", progress=False)
    q.share_weights()
    for made in (q, q.eval().convert()):
        wanted = {n.split(".")[1]: p.requires_grad for n, p in made.named_parameters() if n.endswith("book")}
        assert wanted == {"0": True, "3": False, "7": True}


@pytest.mark.parametrize("given", [{"k": 2.5}, {"k": True}, {"k": "2"}, {"k": 2, "rate": "a"}, {"k": 2, "bins": 7.5}])
def test_codebooks_of_no_number(given: dict[str, Any]) -> None:
    from fxq import kmeans

    with pytest.raises(FxqError):
        kmeans.codebook(torch.randn(10), **given)
