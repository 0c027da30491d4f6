"""Signs and where they stand: thresholds, ReLUs and pools, layers that stay float, the options of binary weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import lowbit, schemes
from fxq.convolutions import BoxMean
from fxq.errors import FxqError
from fxq.graph import kind, module_of, walk
from fxq.modules import Quantized
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.passes.replace_activations import ReplaceActivations
from fxq.trackers import Sign, TrackedFakeQuantize
from fxq.training_lowbit import EstimatedLayer
from tests.helpers import canonical, context
from tests.lowbit_nets import X, qat


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


def test_the_sign_anneals() -> None:
    q = qat(replace(schemes.get("xnor_w1a1"), name="annealed", ste="tanh"))
    q.anneal(5.0)
    sharp = [float(m.tracker.sharpness) for m in q.modules() if isinstance(m, TrackedFakeQuantize) and isinstance(m.tracker, Sign)]
    assert sharp and set(sharp) == {5.0}
    with pytest.raises(FxqError, match="sharpness 0.0 is not positive"):
        q.anneal(0.0)
    with pytest.raises(FxqError, match="no sign of this model has the gradient 'tanh'"):
        qat("xnor_w1a1").anneal(2.0)


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
