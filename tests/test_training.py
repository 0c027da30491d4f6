"""Quantization-aware training: equal to the float net where nothing is rounded, deployed bit for bit when frozen, exact when resumed."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import numerics, targets
from fxq.errors import CalibrationError, FxqError, LoweringError, SchemeError
from fxq.graph import walk
from fxq.spec import QParams, QuantSpec
from fxq.trackers import TrackedFakeQuantize
from fxq.trainable import TrainableModel
from fxq.training import FloatLayer, TrainedLayer

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """conv-BN-ReLU, a residual sum, a grouped conv with bias and BN, a transposed conv with BN, concat, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.up, self.bn_up = nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(x)))
        x = F.relu(x + self.bn_b(self.b(x)))
        x = F.relu(self.bn_up(self.up(x)))
        return self.fc(self.drop(x.mean((2, 3))))  # type: ignore[no-any-return]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net()
    with torch.no_grad():
        for _ in range(3):
            made(torch.randn(8, 3, 12, 12))
        for m in made.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(-1.5, 1.5)
                m.bias.uniform_(-0.5, 0.5)
    return made.eval()


def qat(scheme: str = "iao_w8a8", calibrated: bool = True, **options: object) -> TrainableModel:
    data = {"calibration": X} if calibrated else {"example": X}
    made = fxq.compile(net(), scheme, mode="qat", progress=False, **data, **options)  # type: ignore[arg-type]
    assert isinstance(made, TrainableModel)
    return made


def steps(q: nn.Module, count: int, lr: float = 1e-2, seed: int = 1) -> list[float]:
    g, losses = torch.Generator().manual_seed(seed), []
    opt = torch.optim.SGD(q.parameters(), lr=lr)
    for _ in range(count):
        x, y = torch.randn(8, 3, 12, 12, generator=g), torch.randint(0, 5, (8,), generator=g)
        opt.zero_grad()
        loss = F.cross_entropy(q(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        *((s, "onnxruntime") for s in ("iao_w8a8", "iao_w8a8_sym", "iao_w8a8_pt", "iao_w8a8_asymw", "iao_w4a8")),
        ("iao_w8a8_sym", "sm86"), ("iao_w8a8_sym_pt", "tensorrt"), ("fp8_w8a8", "sm89"),
    ],
)  # fmt: skip
def test_train_freeze_train_deploy(scheme: str, target: str) -> None:
    if target != "onnxruntime":
        target = replace(targets.get(target), least_channels=1)  # type: ignore[assignment]
    q = qat(scheme, target=target).train()
    losses = steps(q, 4)
    assert all(0 < v < 10 for v in losses)
    q.eval()
    with torch.no_grad():
        assert torch.equal(q.convert()(X), q(X)), "eval mode is what would be deployed"
    q.freeze().train()
    steps(q, 3, 1e-3)
    with torch.no_grad():
        trained = q(X)
        assert torch.equal(q.eval()(X), trained), "frozen: training and eval mode are one"
        deployed = q.convert()
        assert torch.equal(deployed(X), trained)
    proof = deployed.verify(deployed.lower(), X)
    assert proof.ok, str(proof)


def test_the_start_is_the_post_training_model() -> None:
    plain = fxq.compile(net(), "iao_w8a8", calibration=X, progress=False)
    with torch.no_grad():
        assert torch.equal(qat()(X), plain(X))


def off(q: TrainableModel) -> None:
    """Nothing is rounded: activations pass, weights in 32 bits on a range that holds them."""
    for m in q.modules():
        if isinstance(m, TrackedFakeQuantize):
            m.quantizing = False
        if isinstance(m, TrainedLayer):
            m.grids = lambda weight, bias: (None, None)  # type: ignore[method-assign, assignment, return-value]


def test_without_rounding_it_trains_as_conv_and_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients and running statistics in float64 (arXiv 1806.08342, section 3.2)."""
    q, ref = qat().double().train(), net().double().train()
    ref.drop.eval()
    for tracker in (m.tracker for m in q.modules() if isinstance(m, TrackedFakeQuantize)):
        tracker.frozen = True
    off(q)
    monkeypatch.setattr(numerics, "fake_quantize", lambda x, qp: x)
    x = torch.randn(8, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got, want = q(x), ref(x)
    assert torch.allclose(got, want, atol=1e-12)
    got.square().sum().backward()
    want.square().sum().backward()
    layers = {str(n.target): q.graph_module.get_submodule(str(n.target)) for n, _ in walk(q.graph_module, "conv", "conv_transpose", "linear")}
    for name, bn in (("a", "bn_a"), ("b", "bn_b"), ("up", "bn_up"), ("fc", None)):
        layer = layers[name]
        assert isinstance(layer, FloatLayer if name == "up" else TrainedLayer) and (layer.bn is None) == (bn is None)
        mine = [layer.op.weight, layer.op.bias, *([layer.bn.weight, layer.bn.bias] if bn and layer.bn is not None else [])]
        theirs = [getattr(ref, name).weight, getattr(ref, name).bias, *([getattr(ref, bn).weight, getattr(ref, bn).bias] if bn else [])]
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.allclose(a.grad, b.grad, atol=1e-9, rtol=1e-9), name  # type: ignore[union-attr, arg-type]
        if bn and layer.bn is not None:
            assert torch.allclose(layer.bn.running_mean, getattr(ref, bn).running_mean) and torch.allclose(layer.bn.running_var, getattr(ref, bn).running_var)  # type: ignore[arg-type]


def test_a_channel_with_gamma_zero_trains() -> None:
    model = net()
    with torch.no_grad():
        model.bn_a.weight[2] = 0
    q = fxq.compile(model, "iao_w8a8", calibration=X, mode="qat", progress=False).train()
    assert all(v == v for v in steps(q, 3))
    layer = q.get_submodule("root.a")
    assert isinstance(layer, TrainedLayer) and layer.bn is not None and float(layer.bn.weight.detach()[2]) != 0  # type: ignore[operator, index]


def test_ranges_follow_the_moving_average() -> None:
    """First batch sets it, then r <- 0.9 r + 0.1 batch; values that share a grid count once a batch."""
    q = qat(calibrated=False).train()
    grid = q.get_submodule("root.x_q")
    assert isinstance(grid, TrackedFakeQuantize) and not bool(grid.tracker.observer.has_data)
    for lo, hi, want in ((-1, 2, (-1, 2)), (-3, 6, (-1.2, 2.4))):
        x = torch.zeros(8, 3, 12, 12)
        x[0, 0, 0, 0], x[0, 0, 0, 1] = lo, hi
        q(x)
        assert [float(v) for v in grid.tracker.observer.range()] == pytest.approx(want)
    assert float(grid.tracker.scale) == pytest.approx(3.6 / 255)
    q.eval()
    q(torch.full((8, 3, 12, 12), 100.0))
    assert float(grid.tracker.scale) == pytest.approx(3.6 / 255), "eval mode observes nothing"


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    whole = qat(calibrated=False).train()
    steps(whole, 2, seed=1)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    steps(whole, 2, seed=2)
    file.seek(0)
    again = qat(calibrated=False).train()
    again.load_state_dict(torch.load(file, weights_only=True))
    steps(again, 2, seed=2)
    for (name, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert a == b if isinstance(a, dict) else torch.equal(a, b), name
    whole.freeze()
    frozen = qat(calibrated=False)
    frozen.load_state_dict(whole.state_dict())
    with torch.no_grad():
        assert frozen.phase == "qaft" and torch.equal(frozen.train()(X), whole.train()(X)) and torch.equal(frozen.convert()(X), whole.convert()(X))


def test_a_copy_trains_by_itself() -> None:
    q = qat().train()
    twin = copy.deepcopy(q)
    before = {k: v.clone() for k, v in q.state_dict().items() if isinstance(v, Tensor)}
    steps(twin, 2)
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items() if isinstance(v, Tensor))
    assert not torch.equal(twin.state_dict()["root.a.op.weight"], before["root.a.op.weight"])


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda q: q.convert(), FxqError, "convert\\(\\) before any data: this grid has no range yet. Run a batch in training mode first"),
        (lambda q: q.freeze(), FxqError, "freeze\\(\\) before any data"),
        (lambda q: q.lower(), LoweringError, "the model is in training. Call convert\\(\\)"),
        (lambda q: (q(X), q.freeze(), q.freeze()), FxqError, "the model is frozen already"),
        (lambda q: q.load_state_dict(qat("iao_w8a8_sym").state_dict()), FxqError, "the checkpoint is of scheme 'iao_w8a8_sym', the model of 'iao_w8a8'"),
    ],
)
def test_what_cannot_be_done_says_so(act: Callable[[TrainableModel], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        act(qat(calibrated=False).train())


def test_an_exploded_weight_and_input_are_errors() -> None:
    q = qat().train()
    with torch.no_grad():
        q.get_submodule("root.b.op").weight.fill_(torch.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(CalibrationError, match="^b: the weight is NaN or infinite. Lower the learning rate"):
        q(X)
    with pytest.raises(CalibrationError, match="^x: the value holds NaN or infinity"):
        qat().train()(X * torch.inf)


def test_schemes_and_modes_that_do_not_train() -> None:
    with pytest.raises(SchemeError, match="the scheme 'weight_only_w8' is weight-only: it has no grids to train"):
        fxq.compile(net(), "weight_only_w8", example=X, mode="qat", progress=False)
    with pytest.raises(SchemeError, match="unknown mode 'qta'. did you mean 'qat'"):
        fxq.compile(net(), "iao_w8a8", calibration=X, mode="qta", progress=False)


def test_the_grid_of_a_signed_scheme_starts_where_calibration_left_it() -> None:
    plain = fxq.compile(net(), "iao_w8a8_sym", calibration=X, progress=False)
    q = qat("iao_w8a8_sym")
    mine, theirs = q.get_submodule("root.x_q"), plain.get_submodule("root.x_q")
    assert isinstance(mine, TrackedFakeQuantize) and str(mine.spec) == "s8/pt" and torch.equal(mine.tracker.scale, theirs.scale)
    assert QParams(QuantSpec.parse("s8/pt"), mine.tracker.scale, mine.tracker.zero_point).same_grid(mine.qparams)
    q.train()
    with torch.no_grad():
        q.get_submodule("root.x_q")(torch.tensor([-1.0, 1.0]))
    assert int(mine.tracker.zero_point) == 0


def test_moving_average_of_the_weights_range() -> None:
    scheme = replace(fxq.schemes.get("iao_w8a8"), name="averaged", weight_observer="ema")
    q = fxq.compile(net(), scheme, mode="qat", calibration=X, progress=False).train()
    layer = q.get_submodule("root.fc")
    assert isinstance(layer, TrainedLayer)
    weight: Tensor = layer.op.weight  # type: ignore[assignment]
    q(X)
    first = layer.weight_ends.clone()  # type: ignore[operator, union-attr]
    assert torch.equal(first[1], weight.detach().amax(1))
    with torch.no_grad():
        weight.mul_(2)
    q(X)
    assert torch.allclose(layer.weight_ends, first * 1.1)  # type: ignore[arg-type]
    q.eval()(X)
    assert torch.allclose(layer.weight_ends, first * 1.1)  # type: ignore[arg-type]
    again = fxq.compile(net(), scheme, mode="qat", calibration=X, progress=False)
    again.load_state_dict(q.state_dict())
    with torch.no_grad():
        assert torch.equal(again(X), q(X)) and torch.equal(q.convert()(X), q(X))  # type: ignore[operator]
    steps(q.train(), 2)
    q.freeze().train()  # type: ignore[operator]
    with torch.no_grad():
        assert torch.equal(q(X), q.eval()(X))
