"""Deep Compression in training: masks that grow, codebooks that train, what is deployed, with batch norms, integers and low-bit schemes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.compressing import masked_layers
from fxq.errors import FxqError, LoweringError, SchemeError
from fxq.shared import SharedWeight
from fxq.sparsity import cubic_ratio
from fxq.trainable import TrainableModel
from tests.passes.test_share_weights import net

G = torch.Generator().manual_seed(2)
X, Y = torch.randn(32, 3, 12, 12, generator=G), torch.randint(0, 5, (32,), generator=G)


def trainable(scheme: Any = "deepcomp_w3", sparsity: Any = 0.0, **options: Any) -> TrainableModel:
    prune = options.pop("prune", fxq.Prune(sparsity=sparsity))
    m = fxq.compile(net(1), scheme, calibration=[X[:8]], prune=prune, mode="qat", progress=False, **options)
    assert isinstance(m, TrainableModel)
    return m


def train(m: nn.Module, steps: int = 3, decay: float = 1e-2) -> float:
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=decay)
    m.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(m(X), Y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def zeros(m: fxq.CompiledModel) -> float:
    kept = m.densities
    sizes = {k: masked_layers(m.graph_module)[k].op.weight.numel() for k in kept}  # type: ignore
    return 1 - sum(d * sizes[k] for k, d in kept.items()) / sum(sizes.values())


@pytest.mark.parametrize("scheme", ["deepcomp_w3", "iao_w8a8", "twn_wta8", "iao_w4a4_lsq"])
def test_masks_hold_and_grow(scheme: str) -> None:
    m = trainable(scheme)
    before = [id(p) for p in m.parameters()]
    masks: dict[str, Tensor] = {}
    for step in range(4):
        m.prune_weights(cubic_ratio(step, begin=0, end=3, final=0.8))
        train(m, 2)
        now = {k: layer.mask.clone() for k, layer in masked_layers(m.graph_module).items() if layer.mask is not None}
        assert all(not bool((now[k] & ~masks[k]).any()) for k in masks)  # what is cut stays cut
        masks = now
    assert sum(int((~x).sum()) for x in masks.values()) == int(0.8 * sum(x.numel() for x in masks.values()))
    assert [id(p) for p in m.parameters()] == before
    deployed = m.convert()
    for path, mask in masks.items():
        layer: Any = deployed.graph_module.get_submodule(path)
        weight = layer.op.weight if hasattr(layer, "op") else layer.weight
        assert bool((weight.detach()[~mask] == 0).all()), path


@pytest.mark.parametrize("scope", ["layer", "sensitivity"])
def test_scopes_hold_for_more(scope: str) -> None:
    m = trainable(prune=fxq.Prune(sparsity=0.4, sparsity_scope=scope))
    first = {k: 1 - d for k, d in m.densities.items()}
    m.prune_weights(0.6)
    assert zeros(m) == pytest.approx(0.6, abs=0.02)
    assert all(1 - d >= first[k] - 1e-9 for k, d in m.densities.items())
    free = [k for k, cut in first.items() if 0 < cut < 0.5]  # layers that reach no limit grow alike
    assert len({round((1 - m.densities[k]) / first[k], 1) for k in free}) <= 1


def test_what_cannot_be_cut() -> None:
    m = trainable(sparsity=0.5)
    with pytest.raises(FxqError, match="below the share that is cut already"):
        m.prune_weights(0.3)
    with pytest.raises(FxqError, match="is not in"):
        m.prune_weights(1.0)
    m.share_weights()
    with pytest.raises(FxqError, match="share codebooks already"):
        m.prune_weights(0.9)
    whole = fxq.compile(net(1), "deepcomp_w3", example=X[:2], mode="qat", progress=False)
    assert isinstance(whole, TrainableModel)
    with pytest.raises(FxqError, match="no weight has a mask"):
        whole.prune_weights(0.5)
    for scheme in ("xnor_w1a1", "dorefa_w4a4"):
        with pytest.raises(SchemeError, match="have no 0"):
            trainable(scheme, 0.5)


@pytest.mark.parametrize("scheme", ["deepcomp_w3", "iao_w8a8", "iao_w8a8_sym", "weight_only_w8", "iao_w8a8_lsq"])
def test_codebooks_train(scheme: str) -> None:
    """A step changes values, never which weights share one, and zeros stay zeros; train, eval and deployed agree where they must."""
    share = {} if scheme.startswith("deepcomp") else {"share": fxq.Share(3)}
    target = "tensorrt" if scheme.endswith("sym") else "onnxruntime"
    m = trainable(scheme, 0.5, target=target, **share)
    start = train(m, 4)
    m.share_weights()
    assert m.shares_weights and "share-weights" in str(m.history)
    layers = [x for x in m.modules() if isinstance(x, SharedWeight)]
    assert layers and all(len(x.book) <= 8 for x in layers)
    codes, books = [x.codes.clone() for x in layers], [x.book.detach().clone() for x in layers]
    assert train(m, 12) < start
    assert all(torch.equal(x.codes, c) and not torch.equal(x.book, b) for x, c, b in zip(layers, codes, books, strict=True))
    assert all(torch.equal(x.weight == 0, x.codes == 0) for x in layers)
    m.eval()
    with torch.inference_mode():
        simulated = m(X)
        deployed = m.convert()
        assert torch.equal(deployed(X), simulated)
        m.freeze().train()
        assert torch.equal(m(X), deployed(X))  # frozen: training computes what is deployed, bit for bit
    train(m, 2)
    assert not torch.equal(m.eval()(X), simulated)


def test_the_batch_norm_of_a_shared_layer_trains() -> None:
    m = trainable(sparsity=0.5)
    m.share_weights()
    bn: Any = next(x for x in m.modules() if isinstance(x, nn.BatchNorm2d))
    mean, gamma = bn.running_mean.clone(), bn.weight.detach().clone()
    train(m, 2)
    assert not torch.equal(bn.running_mean, mean) and not torch.equal(bn.weight, gamma)
    m.freeze()
    mean = bn.running_mean.clone()
    train(m, 2)
    assert torch.equal(bn.running_mean, mean)


def test_convert_shares_a_copy() -> None:
    m = trainable(sparsity=0.5)
    deployed = m.convert()
    assert not m.shares_weights and any(isinstance(x, SharedWeight) for x in deployed.modules())
    names = [s.name for s in deployed.history]
    assert names[-2:] == ["share-weights", "convert-trained"]
    ptq = fxq.compile(net(1), "deepcomp_w3", example=X[:8], prune=fxq.Prune(sparsity=0.5), progress=False)
    assert torch.equal(ptq(X), deployed(X))


def test_the_deployed_model_trains_on() -> None:
    """A deployed float model holds codebooks, factors and biases as parameters."""
    m = fxq.compile(net(1), "deepcomp_w3", example=X[:8], prune=fxq.Prune(sparsity=0.5), progress=False)
    layers = [x for x in m.modules() if isinstance(x, SharedWeight)]
    codes = [x.codes.clone() for x in layers]
    first = train(m, 1)
    assert train(m, 12) < first
    assert all(torch.equal(x.codes, c) and torch.equal(x.weight == 0, c == 0) for x, c in zip(layers, codes, strict=True))
    integers = fxq.compile(net(1), "iao_w8a8", calibration=[X[:8]], share=fxq.Share(3), progress=False)
    train(integers, 3, 0.0)
    q: Any = integers.graph_module.get_submodule("a")
    assert len(q.weight_codes()[0].unique()) <= 8 and q.op.rows.requires_grad is False
    assert integers.verify(integers.lower(), [X[:8]]).ok


def test_channels_weights_codebooks_and_integers_together() -> None:
    m = trainable("iao_w8a8", prune=fxq.Prune(ratio=0.4, multiple_of=2, sparsity=0.5), share=fxq.Share(4, 3))
    assert m.prune_report is not None and zeros(m) == pytest.approx(0.5, abs=0.02)
    train(m, 2)
    m.share_weights()
    train(m, 2)
    deployed = m.eval().convert()
    proof = deployed.verify(deployed.lower(), [X[:8]])
    assert proof.ok, str(proof)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("scheme", ["deepcomp_w3", "iao_w8a8"])
def test_saved_in_training_it_goes_on(scheme: str, shares: bool, tmp_path: Path) -> None:
    m = trainable(scheme, 0.5, share=fxq.Share(3))
    train(m, 2)
    if shares:
        m.share_weights()
    fxq.save(m, tmp_path / "m.fxqm")
    again = fxq.load(tmp_path / "m.fxqm")
    assert isinstance(again, TrainableModel) and again.shares_weights == shares and again.scheme == m.scheme
    assert train(again, 2) == train(m, 2)
    if not shares:
        again.prune_weights(0.7)
        m.prune_weights(0.7)
    assert torch.equal(again.eval().convert()(X), m.eval().convert()(X))


def test_state_dicts_go_over() -> None:
    """A checkpoint from after share_weights() loads into a model on which it was called."""
    m, other = trainable(sparsity=0.5), trainable(sparsity=0.5)
    train(m, 3)
    m.share_weights()
    train(m, 1)
    other.share_weights()
    other.load_state_dict(copy.deepcopy(m.state_dict()))
    assert torch.equal(other.eval()(X), m.eval()(X))


def test_refused() -> None:
    m = trainable(sparsity=0.5)
    with pytest.raises(LoweringError, match="in training"):
        m.lower("archive")
    m.share_weights()
    with pytest.raises(FxqError, match="share codebooks already"):
        m.share_weights()
    frozen = trainable().freeze()
    with pytest.raises(FxqError, match="frozen"):
        frozen.share_weights()
    plain = trainable("iao_w8a8")
    with pytest.raises(FxqError, match="shares no weights"):
        plain.share_weights()
    with pytest.raises(FxqError, match="need masks"):
        fxq.prune(net(1), fxq.Prune(sparsity=0.5), example=X[:2])


def test_what_sharing_costs_layer_by_layer() -> None:
    """The debugger switches shared weights back to those they were clustered from."""
    m = fxq.compile(net(1), "deepcomp_w2", example=X[:8], progress=False)
    whole = fxq.compile(net(1), "float", example=X[:8], progress=False)
    rows = m.sensitivity([X[:8]], per="layer").rows
    assert sorted(r.name for r in rows) == ["a", "b", "c", "fc"] and all(0 < r.alone < 60 for r in rows)
    with torch.inference_mode():
        assert torch.allclose(m.with_float("a", "b", "c", "fc")(X), whole(X), atol=1e-5)
        assert not torch.allclose(m.with_float("a")(X), m(X), atol=1e-3)
    assert "nothing wrong" in str(m.bisect("sqnr", [X[:8]]))
