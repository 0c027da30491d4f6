"""share-weights: what the graph then holds, what it computes, what keeps its weights and why."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import schemes
from fxq.errors import PassError, SchemeError
from fxq.modules import Quantized
from fxq.shared import SharedConv2d, SharedLinear, SharedWeight

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Conv and batch norm with a gamma below 0, grouped and transposed convs, linear."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 2, groups=groups)
        self.bnc, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.a(x)))
        y = torch.relu(self.bnc(self.c(torch.relu(self.b(y)))))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


def net(groups: int = 2) -> Net:
    torch.manual_seed(0)
    model = Net(groups).eval()
    with torch.no_grad():
        for bn in (model.bn, model.bnc):
            bn.weight.copy_(torch.linspace(-1.5, 1.5, len(bn.weight)) + 0.1)
            bn.bias.normal_()
            bn.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def compiled(scheme: Any = "deepcomp_w4", model: nn.Module | None = None, **options: Any) -> fxq.CompiledModel:
    return fxq.compile(model or net(), scheme, calibration=[X], progress=False, **options)


def layers(m: fxq.CompiledModel) -> dict[str, Any]:
    return {path: layer for path, layer in m.graph_module.named_modules() if isinstance(layer, SharedWeight)}


def test_what_it_writes() -> None:
    m = compiled()
    found = layers(m)
    assert list(found) == ["a", "b", "c", "fc"]
    assert isinstance(found["a"], SharedConv2d) and isinstance(found["fc"], SharedLinear)
    assert all(len(layer.book) <= 16 and int(layer.codes.max()) <= 16 and int(layer.codes.min()) >= 1 for layer in found.values())
    assert found["a"].rows is not None and found["b"].rows is None  # the factors of the batch norm
    assert found["c"].rows is None  # of a grouped transposed conv the factors lie along no single axis: they are in the weight
    assert m.history["share-weights"].rewrites == 4
    diff = m.history.diff("share-weights").splitlines()
    assert "+%a = conv(%x) <a> {16 shared values} [*,8,10,10] float" in diff and sum(line.startswith("+%") for line in diff) == 4


@pytest.mark.parametrize("groups", [1, 2])
def test_with_enough_values_nothing_moves(groups: int) -> None:
    model = net(groups)
    m = compiled(model=model, share=fxq.Share(12))
    assert torch.allclose(m(X), model(X), atol=1e-5)


def test_each_weight_becomes_its_nearest_value() -> None:
    model = net()
    layer = layers(compiled(model=model))["b"]
    w, book = model.b.weight.detach(), layer.book.detach()
    nearest = (w.reshape(-1, 1) - book).abs().min(1).values
    assert torch.equal((w - layer.weight.detach()).abs().reshape(-1), nearest)


def test_bits_by_kind_and_by_pattern() -> None:
    found = layers(compiled("deepcomp_w3_fc2"))
    assert [len(layer.book) for layer in found.values()] == [8, 8, 8, 4]
    found = layers(compiled(share=fxq.Share(3, 2, layers={"b": 1, "fc": 4})))
    assert [len(layer.book) for layer in found.values()] == [8, 2, 8, 16]
    assert fxq.Scheme("x", "float", share=fxq.Share(8, 5)).share == schemes.get("deepcomp_w8_fc5").share


@pytest.mark.parametrize("init", ["optimal", "linear", "quantile", "density"])
def test_starts(init: str) -> None:
    model = net()
    got = compiled(model=model, share=fxq.Share(3, init=init))
    best = compiled(model=model, share=fxq.Share(3))
    for path in ("b", "fc"):  # which have no batch norm: the others are clustered without theirs
        layer = layers(got)[path]
        w = layers(compiled(model=model, share=fxq.Share(12)))[path].weight.detach()
        assert float((w - layers(best)[path].weight.detach()).square().sum()) <= float((w - layer.weight.detach()).square().sum()) * (1 + 1e-5)


def test_rate_takes_fewer_values_for_more_error() -> None:
    model = net()
    loose, exact = layers(compiled(model=model, share=fxq.Share(4, rate=0.3))), layers(compiled(model=model))
    assert sum(len(x.book) for x in loose.values()) < sum(len(x.book) for x in exact.values())


def test_skipped_layers_keep_their_weights() -> None:
    model = net()
    m = compiled(model=model, skip=["b", "fc"])
    assert list(layers(m)) == ["a", "c"]
    assert torch.equal(m.graph_module.get_submodule("b").weight, model.b.weight)  # type: ignore[arg-type]
    assert {s.node: s.why for s in m.history["share-weights"].skips} == {"b": "left float on request (b)", "fc": "left float on request (fc)"}
    integers = compiled("iao_w8a8", model=model, skip=["b"], share=fxq.Share(4))
    assert "b" not in layers(integers) and len(layers(integers)) == 3


def test_zeros_have_their_own_code() -> None:
    m = compiled(prune=fxq.Prune(sparsity=0.5, sparsity_scope="layer"))
    for layer in layers(m).values():
        assert torch.equal(layer.codes == 0, layer.weight == 0) and float((layer.codes == 0).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_integers_share_an_integer_codebook() -> None:
    m = compiled("iao_w8a8", model=net(1), share=fxq.Share(4), prune=fxq.Prune(sparsity=0.5, sparsity_scope="layer"))
    quantized = {path: q for path, q in m.graph_module.named_modules() if isinstance(q, Quantized)}
    assert list(quantized) == ["a", "b", "fc"]
    assert isinstance(m.graph_module.get_submodule("c"), SharedWeight)  # ONNX Runtime has no integer transposed conv: a float codebook
    for q in quantized.values():
        op: Any = q.op
        assert isinstance(op, SharedWeight) and "rows" in dict(op.named_buffers())
        assert torch.equal(op.book, op.book.round()) and float(op.book.detach().abs().max()) == 127
        rows = op.rows.sign().reshape([-1 if d == op.axis else 1 for d in range(op.codes.ndim)])
        assert torch.equal(q.weight_codes().float(), op.table.detach()[op.codes.long()] * rows)
    assert bool((quantized["a"].op.rows < 0).any())  # type: ignore[operator]
    proof = m.verify(m.lower(), [X])
    assert proof.ok, str(proof)


@pytest.mark.parametrize("scheme", ["iao_w8a8_sym", "iao_w8a8_pt", "iao_w8a8_asymw", "weight_only_w8", "iao_w8a8_lsq", "iao_w6a8", "float"])
def test_schemes_that_can_share(scheme: str) -> None:
    m = compiled(scheme, model=net(1), share=fxq.Share(4))
    assert len(layers(m)) == 4
    with torch.inference_mode():
        gap = float((m(X) - net(1)(X)).norm() / net(1)(X).norm())
    assert gap < 0.5


@pytest.mark.parametrize(
    ("scheme", "bits", "fact"),
    [
        ("xnor_w1a1", 5, "adds nothing"), ("twn_wta8", 2, "adds nothing"), ("dorefa_w4a4", 3, "adds nothing"), ("iao_w4a4", 5, "adds nothing"),
        ("dynamic_w8", 5, "cannot share"), ("weight_only_w4", 3, "cannot share"), ("fp8_w8a8", 5, "cannot share"), ("iao_w8a8", 8, "adds nothing"),
    ],
)  # fmt: skip
def test_schemes_that_cannot(scheme: str, bits: int, fact: str) -> None:
    with pytest.raises(SchemeError, match=fact) as e:
        fxq.compile(net(), scheme, calibration=[X], share=fxq.Share(bits), target="sm89" if scheme == "fp8_w8a8" else "onnxruntime", progress=False)
    assert e.value.way_out


@pytest.mark.parametrize(
    "given",
    [{"bits": 0}, {"bits": 13}, {"bits": 2.5}, {"linear_bits": True}, {"layers": {"a": 99}}, {"init": "best"}, {"rate": -1}, {"rate": float("nan")}],
)
def test_requests_that_make_no_sense(given: dict[str, Any]) -> None:
    with pytest.raises(SchemeError):
        fxq.Share(**given)


def test_nan_is_named() -> None:
    model = net()
    q = fxq.compile(model, "deepcomp_w4", example=X, mode="qat", progress=False)
    with torch.no_grad():
        q.graph_module.get_submodule("b").weight[0, 0, 0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(PassError, match="share-weights / b: the weight holds NaN"):
        q.share_weights()  # type: ignore[attr-defined]
