"""Low-bit schemes: trained, frozen, deployed and proven; batch norms in thresholds; layers, policies and resumption."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import lowbit, schemes
from fxq.errors import CalibrationError, FxqError, SchemeError
from fxq.estimators import estimator
from fxq.graph import kind, module_of, walk
from fxq.modules import BoxMean, Quantized
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.passes.replace_activations import ReplaceActivations
from fxq.trackers import Clip, LearnedStep, Sign, TrackedFakeQuantize, Tracker
from fxq.trainable import TrainableModel
from fxq.training_lowbit import EstimatedLayer
from tests.helpers import canonical, context

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TRAINED = [n for n in schemes.names() if schemes.get(n).trains or schemes.get(n).batch_norm == "plain"]
MORE = ["dorefa_w3a5", "dorefa_w8a8", "dorefa_w2a32", "dorefa_w5a2_lsq", "iao_w2a2", "iao_w3a6_lsq", "iao_w4a4_plain"]


class Net(nn.Module):
    """Conv-BN-ReLU blocks, a residual sum, grouped and depthwise convs, a max pool, a transposed conv, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.c, self.bn_c = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.up, self.bn_up = nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8)
        self.d, self.bn_d, self.fc = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(x)))
        y = F.max_pool2d(F.relu(self.bn_b(self.b(x))), 3, 1, 1)
        x = F.relu(x + self.bn_c(self.c(y)))
        x = F.relu(self.bn_up(self.up(x)))
        return self.fc(F.relu(self.bn_d(self.d(x.mean((2, 3))))))  # type: ignore[no-any-return]


def trained(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Batch norms with statistics of data and gammas of both signs."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(x + 0.1)
        g = torch.Generator().manual_seed(seed)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.copy_(torch.rand(m.weight.shape, generator=g) * 3 - 1.5)
                m.bias.copy_(torch.rand(m.bias.shape, generator=g) - 0.5)
    return model.eval()


def net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net(), X)


def qat(scheme: Any, model: nn.Module | None = None, x: Tensor = X, **options: Any) -> TrainableModel:
    made = fxq.compile(net() if model is None else model, scheme, mode="qat", calibration=x, progress=False, **options)
    assert isinstance(made, TrainableModel)
    return made


def steps(q: nn.Module, count: int, lr: float = 1e-2, seed: int = 1, x: Tensor = X) -> list[float]:
    g, losses = torch.Generator().manual_seed(seed), []
    opt = torch.optim.SGD(q.parameters(), lr=lr)
    for _ in range(count):
        opt.zero_grad()
        out = q(torch.randn(x.shape, generator=g))
        loss = F.cross_entropy(out, torch.randint(0, out.shape[1], (len(out),), generator=g))
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", [*TRAINED, *MORE])
def test_train_freeze_train_deploy(name: str) -> None:
    q = qat(name).train()
    assert all(0 < v < 50 for v in steps(q, 3))
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


class Signs(nn.Module):
    """Two convs with batch norms between signs, a max pool in front of the second sign, a linear layer behind the third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.bn_b = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(x)))
        x = F.relu(F.max_pool2d(self.bn_b(self.b(x)), 2))
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


def test_batch_norms_fold_into_signs_exactly() -> None:
    """Dyadic parameters, so that float64 computes the batch norm without rounding: ties, gammas of every sign and alpha 0 included."""
    torch.manual_seed(3)
    model = Signs().eval()
    g = torch.Generator().manual_seed(3)

    def dyadic(shape: Any, least: int, most: int) -> Tensor:
        return torch.randint(least, most, shape, generator=g) / 4

    with torch.no_grad():
        for conv, bn in ((model.a, model.bn_a), (model.b, model.bn_b)):
            conv.weight.copy_(torch.where(torch.rand(conv.weight.shape, generator=g) < 0.5, 0.5, -0.5))
            conv.weight[3] = 0
            if conv.bias is not None:
                conv.bias.copy_(dyadic(conv.bias.shape, -8, 8))
            bn.weight.copy_(dyadic(bn.weight.shape, -4, 5))
            bn.weight[:2] = 0
            bn.bias.copy_(dyadic(bn.bias.shape, -6, 7))
            bn.bias[0], bn.bias[1] = 0, -0.5
            assert bn.running_mean is not None and bn.running_var is not None
            bn.running_mean.copy_(dyadic(bn.running_mean.shape, -10, 11))
            bn.running_var.copy_(torch.tensor([0.25, 1, 4, 16])[torch.randint(0, 4, bn.running_var.shape, generator=g)])
            bn.eps = 0.0
    scheme = replace(schemes.get("xnor_w1a1"), name="signs", float_layers=())
    x = torch.randn(32, 4, 8, 8, generator=g)
    q = fxq.compile(model, scheme, mode="qat", calibration=x, progress=False)
    wanted: dict[str, Tensor] = {}
    y = lowbit.sgn0(x.double())
    for conv, bn, name in ((model.a, model.bn_a, "a"), (model.b, model.bn_b, "b")):
        codes, alpha = lowbit.binary_codes(conv.weight.double())
        v = F.conv2d(y, codes * alpha[:, None, None, None], None if conv.bias is None else conv.bias.double(), padding=1)
        assert bn.running_mean is not None and bn.running_var is not None
        shape = (1, -1, 1, 1)
        mean, sigma = bn.running_mean.double().reshape(shape), bn.running_var.double().sqrt().reshape(shape)
        v = (v - mean) / sigma * bn.weight.double().reshape(shape) + bn.bias.double().reshape(shape)
        assert int((v == 0).sum()) > 50, "there are ties"
        y = wanted[name] = lowbit.sgn0(v)
        y = F.max_pool2d(y, 2) if name == "b" else y
    m = q.convert()
    for what in (q, m):
        seen: dict[str, Tensor] = {}

        class Watch(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                out = super().run_node(n)
                seen[str(n.target)] = out  # noqa: B023
                return out

        with torch.no_grad():
            Watch(what.graph_module).run(x)
        assert torch.equal(seen["a_q"].double(), wanted["a"])
        pooled = next(v for k, v in seen.items() if "max_pool" in k and v.shape == y.shape)
        assert torch.equal(lowbit.sgn0(pooled.double()), y)
    with torch.no_grad():
        assert torch.allclose(m.reference(x), m(x), atol=1e-6) and m.verify(m.lower(), x).ok


def test_relus_give_way_to_signs() -> None:
    """Modules and functions, through pools; the shortcut keeps its ReLU."""
    q = qat("xnor_w1a1")
    gm = q.graph_module
    layers = [n for n, _ in walk(gm, "conv", "linear") if isinstance(module_of(gm, n), EstimatedLayer)]
    reads = {str(n.target): str(n.all_input_nodes[0].all_input_nodes[0].target) for n in layers}
    assert reads["b"] == "a" and "max_pool" in reads["c"]
    pool = next(n for n, _ in walk(gm, "max_pool"))
    assert str(pool.all_input_nodes[0].all_input_nodes[0].target) == "b"
    relus = [str(n.all_input_nodes[0].target) for n, _ in walk(gm, "relu")]
    assert relus.count("a") == 1, "the residual sum still reads the ReLU of the first layer"
    x = torch.randn(8, 3, 12, 12)
    with torch.no_grad():
        sign = gm.get_submodule(reads["b"] + "_q")
        assert set(sign(x).unique().tolist()) == {-1.0, 1.0}


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.bn, self.pool, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(F.relu(self.bn(self.conv(self.first(x))))))  # type: ignore[no-any-return]


class PoolFirst(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.pool(self.conv(self.first(x))))))  # type: ignore[no-any-return]


def order(gm: torch.fx.GraphModule) -> list[str]:
    return [k for n, k in walk(gm) if k in ("conv", "batch_norm", "relu", "max_pool")]


def ready(model: nn.Module) -> torch.fx.GraphModule:
    gm, ctx = canonical(model.eval(), X), context(X)
    Canonicalize().run(gm, ctx)
    PropagateShapes().run(gm, ctx)
    return gm


def test_order_of_pools() -> None:
    for model, wanted in ((Pooled(), "B-A-C-P"), (PoolFirst(), "C-B-A-P")):
        gm, ctx = ready(model), context(X)
        ctx.scheme = replace(schemes.get("iao_w8a8"), name="ordered", order=wanted)
        assert ReplaceActivations().run(gm, ctx) == 1
        other = ready(PoolFirst() if wanted == "B-A-C-P" else Pooled())
        assert order(gm) == order(other) and [n.meta.get("shape") for n, _ in walk(gm)] == [n.meta.get("shape") for n, _ in walk(other)]
        gm.graph.lint()
        gm.recompile()
        twin = (PoolFirst if wanted == "B-A-C-P" else Pooled)().eval()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(gm(X), twin(X))
        assert ReplaceActivations().run(gm, ctx) == 0, "there is nothing left to move"


def float_layers(q: Any) -> set[str]:
    gm = q.graph_module
    return {str(n.target) for n, k in walk(gm, "conv", "linear", "conv_transpose") if not isinstance(module_of(gm, n), Quantized)}


def test_policy_by_role_name_type_and_number() -> None:
    assert float_layers(qat("xnor_w1a1")) == {"a", "up", "fc"}, "first, last, and what has no integer kernel"
    everything = replace(schemes.get("xnor_w1a1"), name="all", float_layers=())
    assert float_layers(qat(everything)) == {"up"}
    assert float_layers(qat(everything, skip="b")) == {"b", "up"}
    assert float_layers(qat(everything, skip=nn.Linear)) == {"d", "up", "fc"}
    assert float_layers(qat(everything, skip=[0, -1, "c"])) == {"a", "up", "fc", "c"}
    q = qat(everything, skip=99)
    assert any(s.node == "99" and "matches no layer" in s.why for s in q.history["annotate"].skips)


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.bn, self.fc = nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.b(F.relu(self.a(x))) + self.bn(self.down(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_policy_of_shortcuts_and_of_the_last_input() -> None:
    torch.manual_seed(0)
    scheme = replace(schemes.get("xnor_w1a1"), name="shortcuts", float_layers=("first", "last", "shortcut"))
    assert float_layers(qat(scheme, Shortcut().eval())) == {"first", "down", "fc"}
    last = replace(schemes.get("bnn_w1a1"), name="last", float_layers=("first",), int8_layers=("last_input",))
    q = qat(last, Shortcut().eval())
    grids = {str(n.target): module_of(q.graph_module, n.all_input_nodes[0]) for n, _ in walk(q.graph_module, "conv", "linear") if n.meta["integer"]}
    specs = {k: str(v.spec) for k, v in grids.items() if isinstance(v, TrackedFakeQuantize)}
    assert specs == {"a": "b1/pt", "b": "b1/pt", "down": "b1/pt", "fc": "u8/pt"}
    assert isinstance(q.graph_module.get_submodule("fc"), EstimatedLayer)


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


def test_the_sign_anneals() -> None:
    q = qat(replace(schemes.get("xnor_w1a1"), name="annealed", ste="tanh"))
    q.anneal(5.0)
    sharp = [float(m.tracker.sharpness) for m in q.modules() if isinstance(m, TrackedFakeQuantize) and isinstance(m.tracker, Sign)]
    assert sharp and set(sharp) == {5.0}
    with pytest.raises(FxqError, match="sharpness 0.0 is not positive"):
        q.anneal(0.0)
    with pytest.raises(FxqError, match="no sign of this model has the gradient 'tanh'"):
        qat("xnor_w1a1").anneal(2.0)


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


def test_centring_and_masks_leave_the_weight_alone() -> None:
    scheme = replace(schemes.get("xnor_w1a1"), name="centred", centre=True, masked=True, ste="approx")
    q = qat(scheme)
    before = {n: p.detach().clone() for n, p in q.named_parameters()}
    q.eval()(X)
    q.train()(X)
    assert all(torch.equal(p, before[n]) for n, p in q.named_parameters())
    depthwise = q.graph_module.get_submodule("c")
    assert isinstance(depthwise, EstimatedLayer) and float(depthwise.estimator(depthwise.op.weight).detach().abs().min()) > 0


def test_the_output_of_xnor_has_its_box_scale() -> None:
    q = qat("xnor_w1a1_k")
    boxes = [n for n, _ in walk(q.graph_module) if kind(q.graph_module, n) == "opaque" and "_k" in str(n.target)]
    assert len(boxes) == 3
    x = torch.tensor([[[[1.0, -2]], [[-3, -4]]]])
    conv = nn.Conv2d(2, 1, (1, 2), bias=False)
    assert float(BoxMean.of(conv)(x)) == 2.5
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[0.3, -0.2], [-0.5, 0.9]]).reshape(1, 2, 1, 2))
        y = F.conv2d(lowbit.sgn0(x), lowbit.binary_weight(conv.weight)) * BoxMean.of(conv)(x)
    assert float(y) == pytest.approx(2.375)
