"""Low-bit schemes: trained, frozen, deployed and proven; batch norms in thresholds; layers, policies and resumption."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import schemes
from fxq.errors import CalibrationError, FxqError, SchemeError
from fxq.estimators import estimator
from fxq.trackers import Clip, LearnedStep, Sign, TrackedFakeQuantize, Tracker
from fxq.trainable import TrainableModel
from fxq.training_lowbit import EstimatedLayer
from tests.lowbit_nets import X, net, qat, steps, trained

TRAINED = [n for n in schemes.names() if schemes.get(n).trains or schemes.get(n).batch_norm == "plain"]
MORE = ["dorefa_w3a5", "dorefa_w8a8", "dorefa_w2a32", "dorefa_w5a2_lsq", "iao_w2a2", "iao_w3a6_lsq", "iao_w4a4_plain"]


@pytest.mark.parametrize("name", [*TRAINED, *MORE])
def test_train_freeze_train_deploy(name: str) -> None:
    q = qat(name).train()
    assert all(0 < v < 50 for v in steps(q, 3))
    if q.scheme.share is not None:
        q.share_weights()
    q.eval()
    with torch.no_grad():
        assert torch.equal(q.convert()(X), q(X)), "eval mode is what would be deployed"
    q.freeze().train()
    ends = ("scale", "zero_point", "running_mean", "fixed", "step")
    grids = {k: v.clone() for k, v in q.state_dict().items() if isinstance(v, Tensor) and k.endswith(ends)}
    steps(q, 2, 1e-4)
    assert all(torch.equal(v, q.state_dict()[k]) for k, v in grids.items() if "weight_grid" not in k), "frozen grids and statistics stay"
    with torch.no_grad():
        out = q(X)
        assert torch.equal(q.eval()(X), out), "frozen: training and eval mode are one"
        deployed = q.convert()
        assert torch.equal(deployed(X), out)
    proof = deployed.verify(deployed.lower(), X)
    assert proof.ok and proof.hidden_differ == 0, str(proof)


LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...], Any]] = {
    "conv1d": (nn.Conv1d, (4, 6, 9), dict(kernel_size=3, padding=1)), "conv3d": (nn.Conv3d, (4, 6, 5, 5, 5), dict(kernel_size=3, padding=1)),
    "strided": (nn.Conv2d, (4, 6, 9, 9), dict(kernel_size=3, stride=2, dilation=2, padding=2)),
    "grouped": (nn.Conv2d, (4, 6, 9, 9), dict(kernel_size=3, groups=3)),
    "depthwise": (nn.Conv2d, (4, 6, 9, 9), dict(kernel_size=3, groups=6)), "transposed": (nn.ConvTranspose2d, (4, 6, 5, 5), dict(kernel_size=2, stride=2)),
    "transposed1d": (nn.ConvTranspose1d, (4, 6, 5), dict(kernel_size=3)), "linear": (nn.Linear, (4, 6), {}),
}  # fmt: skip
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["xnor_w1a1", "xnor_w1a32", "twn_wta32", "twn_wta8", "tbn_w1at", "dorefa_w2a2", "iao_w4a4_lsq"])
def test_every_kind_of_layer(name: str, layer: str) -> None:
    cls, size, options = LAYERS[layer]
    torch.manual_seed(1)
    x = torch.randn(size)
    norm, again = NORMS[len(size)], {**options, "padding": 1} if "kernel_size" in options else {}
    model = trained(nn.Sequential(norm(6), cls(6, 12, **options), norm(12), nn.ReLU(), cls(12, 6, **again)), x)
    scheme = replace(schemes.get(name), name="all", float_layers=(), int8_layers=())
    q = qat(scheme, model, x).train()
    y = q(x)
    y.square().mean().backward()
    layers = [m for m in q.modules() if isinstance(m, EstimatedLayer)]
    assert len(layers) == (2 if cls is not nn.ConvTranspose2d and cls is not nn.ConvTranspose1d or scheme.method == "weight-only" else 0)
    for m in layers:
        assert m.op.weight.grad is not None and float(m.op.weight.grad.abs().sum()) > 0  # type: ignore[union-attr, operator]
        codes = m.converted().weight_codes()
        assert codes.float().abs().max() > 0 and (name[:4] != "xnor" or len(codes.unique()) == 2), "depthwise weights are not wiped out"
    q.eval()
    with torch.no_grad():
        deployed = q.convert()
        assert torch.equal(deployed(x), q(x))
    assert deployed.verify(deployed.lower(), x).ok


def test_int8_layers_hold_8_bits() -> None:
    q = qat("iao_w4a4_lsq")
    widths = {n: q.graph_module.get_submodule(n).weight_grid.spec.bits for n in ("a", "b", "fc")}  # type: ignore[union-attr]
    assert widths["a"] == widths["fc"] == 8 and not isinstance(q.graph_module.get_submodule("a"), EstimatedLayer)
    m = q.convert()
    assert len(m.graph_module.get_submodule("b").weight_codes().unique()) <= 15  # type: ignore[operator]


def test_what_each_scheme_learns() -> None:
    def kinds(name: str) -> set[type[Tracker]]:
        return {type(m.tracker) for m in qat(name).modules() if isinstance(m, TrackedFakeQuantize)}

    assert kinds("iao_w4a4_lsq") == {Tracker, LearnedStep} and kinds("dorefa_w2a2") == {Tracker, Clip} and kinds("xnor_w1a1") == {Tracker, Sign}
    trackers = [m.tracker for m in qat("iao_w4a4_lsq").modules() if isinstance(m, TrackedFakeQuantize) and isinstance(m.tracker, LearnedStep)]
    assert {(t.clamp is None, t.learned_offset is None) for t in trackers} == {(False, True), (True, False)}, "behind ReLUs no offset is learned"
    assert "clip" in {n.rpartition(".")[2] for n, _ in qat("dorefa_w4a4_pact").named_parameters()}
    assert "clip" not in {n.rpartition(".")[2] for n, _ in qat("dorefa_w4a4").named_parameters()}


def test_learned_values_move_and_signed_inputs_are_clipped_on_both_sides() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for name in ("dorefa_w4a4_pact", "iao_w4a4_lsq"):
        q = qat(name, model.eval()).train()
        before = {n: p.detach().clone() for n, p in q.named_parameters() if n.rpartition(".")[2] in ("clip", "learned_step", "learned_offset")}
        assert before
        steps(q, 2, 0.5)
        assert all(not torch.equal(p, before[n]) for n, p in q.named_parameters() if n in before), name
        if name == "dorefa_w4a4_pact":
            assert any(str(m.spec) == "s4n/pt" for m in q.modules() if isinstance(m, TrackedFakeQuantize))
        m = q.eval().convert()
        with torch.no_grad():
            assert torch.equal(m(X), q(X))
        assert m.verify(m.lower(), X).ok


def test_without_rounding_it_is_convolution_and_batch_norm() -> None:
    """The batch norm's own arithmetic in training: outputs, gradients and statistics of an exactly representable weight in float64."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 4, 3, bias=True).double(), nn.BatchNorm2d(4).double()
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-7, 8, conv.weight.shape) / 8)
        conv.weight[:, 0, 0, 0] = 7 / 8
    scheme = schemes.get("iao_w4a4_plain")
    ref = nn.Sequential(nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double())
    ref[0].load_state_dict(conv.state_dict())
    layer = EstimatedLayer(conv, bn, estimator(replace(scheme, weight_observer="minmax"), "conv", conv.weight), None).train()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    got, want = layer(x), ref.train()(x)
    assert torch.allclose(got, want, atol=1e-6)
    got.square().sum().backward()
    want.square().sum().backward()
    for a, b in ((conv.weight, ref[0].weight), (bn.weight, ref[1].weight), (bn.bias, ref[1].bias)):
        assert a.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(bn.running_var, ref[1].running_var)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dorefa_w2a2", "dorefa_w4a4_pact", "iao_w4a4_lsq", "xnor_w1a1", "tbn_w1at", "twn_wta32"])
def test_a_resumed_run_equals_an_uninterrupted_one(name: str) -> None:
    whole = qat(name).train()
    steps(whole, 2, seed=1)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    steps(whole, 2, seed=2)
    file.seek(0)
    again = qat(name).train()
    again.load_state_dict(torch.load(file, weights_only=True))
    steps(again, 2, seed=2)
    for (key, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert a == b if isinstance(a, dict) else torch.equal(a, b), key
    whole.freeze()
    frozen = qat(name)
    frozen.load_state_dict(whole.state_dict())
    with torch.no_grad():
        assert frozen.phase == "qaft" and torch.equal(frozen.train()(X), whole.train()(X))


def test_bad_input() -> None:
    with pytest.raises(FxqError, match="the checkpoint is of scheme 'xnor_w1a1', the model of 'bnn_w1a1'"):
        qat("bnn_w1a1").load_state_dict(qat("xnor_w1a1").state_dict())
    q = qat("dorefa_w2a2").train()
    with torch.no_grad():
        q.get_submodule("root.b.op").weight.fill_(torch.inf)  # type: ignore[operator, union-attr]
    with pytest.raises(CalibrationError, match="^b: the weight is NaN or infinite. Lower the learning rate"):
        q(X)
    q = qat("iao_w4a4_lsq").train()
    with torch.no_grad():
        q.get_submodule("root.b.estimator").learned_step.fill_(torch.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(CalibrationError, match="^b: a learned step is NaN or infinite"):
        q(X)
    for fields, text in (
        ({"ste": "satturate"}, "the unknown ste 'satturate'. did you mean 'saturate'"), ({"weights": "binary"}, "unknown weights 'binary'"),
        ({"stream": None}, "has sign activations but no stream"), ({"float_layers": ("middle",)}, "unknown float_layers 'middle'"),
        ({"clip": 0.0}, "clips at 0.0"),
        ({"order": "P-A"}, "unknown order 'P-A'"),
    ):  # fmt: skip
        with pytest.raises(SchemeError, match=text):
            replace(schemes.get("xnor_w1a1"), **fields)  # type: ignore[arg-type]
    for name in ("dorefa_w1a1", "dorefa_w9a2", "iao_w4a4_lsq_pact", "iao_w4a4_lsq_lsq", "dorefa_w4a4_plain", "iao_w4a32", "dorefa_w2a32_pact"):
        with pytest.raises(SchemeError, match="unknown scheme"):
            schemes.get(name)
    with pytest.raises(SchemeError, match="target 'tensorrt' does not take activation grids"):
        qat("xnor_w1a1", target="tensorrt")


def test_from_data_or_from_the_first_batch() -> None:
    for name in ("iao_w4a4_lsq", "tbn_w1at", "dorefa_w2a2"):
        q = fxq.compile(net(), name, mode="qat", example=X, progress=False)
        assert isinstance(q, TrainableModel)
        with pytest.raises(FxqError, match="before any data"):
            q.convert()
        q.train()(X)
        q.convert()
    q = fxq.compile(net(), "dorefa_w2a2", mode="qat", example=X, progress=False)
    clips = [float(m.tracker.clip) for m in q.modules() if isinstance(m, TrackedFakeQuantize) and isinstance(m.tracker, Clip)]
    assert set(clips) == {10.0}
