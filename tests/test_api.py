"""compile() and CompiledModel: what they take, what they give back, and what they leave alone."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxq
from fxq.errors import CalibrationError, FxqError, LoweringError, TargetError
from fxq.training import Normed


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()  # fmt: skip


def data(n: int = 8, *sizes: int) -> Tensor:
    return torch.randn(n, *(sizes or (3, 10, 10)), generator=torch.Generator().manual_seed(1))


class Layers(nn.Module):
    """Two convolutions and a way to use them."""

    def __init__(self, use: Callable[["Layers", Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.w, self.p = nn.Parameter(torch.randn(3, 3, 3, 3)), nn.Parameter(torch.randn(1, 3, 1, 1))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def tied(use: Callable[[Layers, Tensor], Any]) -> Layers:
    m = Layers(use)
    m.b = nn.Conv2d(3, 3, 3, padding=1)
    m.b.weight = m.a.weight
    return m


def dict_out(m: Layers, x: Tensor) -> dict[str, Tensor]:
    y = m.a(x)
    return {"y": y, "z": m.b(y)}


def nested(m: Layers, x: Tensor) -> dict[str, Any]:
    y = F.relu(m.a(x))
    return {"a": (y, [m.b(y)]), "b": y}


def twice(m: Layers, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.b(m.a(x))
    return y, y


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "dict": lambda: Layers(dict_out),
    "list": lambda: Layers(lambda m, x: [m.a(x), m.b(x)]),
    "nested, an output read inside": lambda: Layers(nested),
    "the same tensor twice": lambda: Layers(twice),
    "an input returned": lambda: Layers(lambda m, x: (x, m.b(m.a(x)))),
    "a parameter used": lambda: Layers(lambda m, x: F.conv2d(x, m.w, padding=1) * m.p + m.p),
    "a parameter returned": lambda: Layers(lambda m, x: (m.a(x), m.p)),
    "a tied weight": lambda: tied(lambda m, x: m.b(F.relu(m.a(x)))),
    "a module called twice": lambda: Layers(lambda m, x: m.a(F.relu(m.a(x)))),
    "nothing to quantize": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
    "one ReLU": nn.ReLU,
    "empty": nn.Sequential,
    "identity": nn.Identity,
    "instance norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
    "bn of the batch": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 4, 1)),
    "bn without affine": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 4, 1)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()),
    "data parallel": lambda: nn.DataParallel(net()),
    "torch.compile": lambda: torch.compile(net()),  # type: ignore[dict-item,return-value]
    "channels last": lambda: net().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_models_of_every_shape(case: str) -> None:
    torch.manual_seed(0)
    model = SHAPES[case]().eval()
    m = fxq.compile(model, calibration=data())
    proof = m.verify(m.lower(), data(3))
    assert proof.ok and proof.hidden_differ == 0, str(proof)
    plain = model._orig_mod if case == "torch.compile" else model
    want, got, exact = plain(data(3)), m(data(3)), m.reference(data(3))  # type: ignore[operator]
    for other in (got, exact):
        assert type(other) is type(want)
        for a, b in zip(tree_leaves(want), tree_leaves(other), strict=True):
            assert a.shape == b.shape and float(((a - b).norm() / a.norm()).detach()) < 0.1


def test_one_and_three_spatial_dimensions_and_tokens() -> None:
    torch.manual_seed(0)
    cases: list[tuple[nn.Module, Tensor]] = [
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)), data(4, 3, 10)),
        (nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)), data(2, 3, 6, 6, 6)),
        (nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 20)), torch.arange(24).reshape(4, 6) % 20),
        (nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8)), (torch.arange(24).reshape(4, 6) % 20).to(torch.int32)),
    ]  # fmt: skip
    for model, x in cases:
        m = fxq.compile(model.eval(), calibration=[x])
        proof = m.verify(m.lower(), [x])
        assert proof.ok and proof.nodes > 1, str(proof)


def test_train_mode_is_kept_and_the_result_is_evals() -> None:
    model = net()
    model[1].running_mean.uniform_(-1, 1)  # type: ignore[operator,union-attr]
    want = fxq.compile(model, calibration=data())(data())
    training = copy.deepcopy(model).train()
    training[2].eval()
    m = fxq.compile(training, calibration=data())
    assert torch.equal(m(data()), want) and not m.training
    assert training.training and training[1].training and not training[2].training


def test_compiling_twice_gives_the_same_and_changes_nothing() -> None:
    model = net().train()
    model[0].weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    calls: list[int] = []
    model[0].register_forward_hook(lambda *a: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = fxq.compile(model, calibration=data()), fxq.compile(model, calibration=data())
    assert first.lower().data == second.lower().data
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and list(model.state_dict()) == list(before)
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7 and all(p.grad is None for p in model.parameters())
    assert model.training and len(model[0]._forward_hooks) == 1
    assert not any(p is q for p in model.parameters() for q in first.parameters())


def test_the_compiled_model_shares_nothing_with_its_copy() -> None:
    m = fxq.compile(net(), calibration=data())
    want = m.reference(data())
    twin = copy.deepcopy(m)
    assert torch.equal(twin.reference(data()), want) and torch.equal(twin(data()), m(data()))
    assert twin.verify(twin.lower(), data()).ok and [op.name for op in twin.history] == [op.name for op in m.history]
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert torch.equal(m.reference(data()), want) and not torch.equal(twin.reference(data()), want)


def test_the_state_goes_into_the_same_model_compiled_again() -> None:
    m, other = fxq.compile(net(), calibration=data()), fxq.compile(net(), calibration=data() * 3)
    assert other.lower().data != m.lower().data
    other.load_state_dict(m.state_dict())
    assert other.lower().data == m.lower().data and torch.equal(other.reference(data()), m.reference(data()))


def test_pickling_is_refused_with_the_way_out() -> None:
    with pytest.raises(FxqError, match=r"cannot be pickled.*Save m.lower\(\), or m.state_dict\(\)"):
        pickle.dumps(fxq.compile(net(), calibration=data()))


def test_moving_and_modes_change_no_number() -> None:
    m = fxq.compile(net(), calibration=data())
    want, exact = m(data()), m.reference(data())
    assert torch.equal(m.to("cpu")(data()), want) and torch.equal(m.train()(data()), want) and torch.equal(m.eval().reference(data()), exact)


def test_the_reference_follows_the_model() -> None:
    m = fxq.compile(net(), calibration=data())
    want = m.reference(data())
    first = m._reference
    assert torch.equal(m.reference(data()), want) and m._reference is first
    assert torch.equal(m.to("cpu").reference(data()), want) and m._reference is not first  # a move makes it anew
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(0.5)
    assert not torch.equal(m.reference(data()), want) and m.verify(m.lower(), data()).ok


def test_skip_takes_one_pattern_or_many() -> None:
    for skip in ("3", ["3"], ("3", "0")):
        m = fxq.compile(net(), calibration=data(), skip=skip)
        assert "3" in {op.node for op in m.float_ops} and m.verify(m.lower(), data()).ok
    m = fxq.compile(net(), calibration=data(), skip="nothing.*")
    assert m.float_ops == [] and ("nothing.*", "this pattern of skip= matches no layer") in {(s.node, s.why) for s in m.history["annotate"].skips}


def test_progress_names_what_is_done() -> None:
    seen: list[tuple[str, int, int | None]] = []
    fxq.compile(net(), calibration=[data()] * 3, progress=lambda *a: seen.append(a))
    counts = Counter(what for what, _, _ in seen)
    assert ("calibrate", 3, 3) in seen and counts["fold-bn"] == 1


class Detector(nn.Module):
    """A loop over data-dependent results around a net that can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.backbone(x)
        return [p[p > p.mean()] for p in y if float(p.sum()) != 1.25]


def test_a_model_captured_in_parts() -> None:
    torch.manual_seed(0)
    model = Detector().eval()
    m = fxq.compile(model, calibration=data())
    with torch.no_grad():
        assert list(m.parts) == ["backbone"] and len(m(data())) == 8 == len(copy.deepcopy(m)(data()))
    part = m.parts["backbone"]
    assert part.verify(part.lower(), data(2)).exact
    for call in (m.lower, lambda: m.verify(b"", data()), lambda: m.reference(data()), lambda: m.float_ops):
        with pytest.raises(LoweringError, match=r"captured in 1 parts and has no single graph. Use one part, m.parts\[path\]; the paths are backbone"):
            call()  # type: ignore[operator]


def test_a_model_captured_in_parts_is_pruned_part_by_part() -> None:
    torch.manual_seed(0)
    model = TwoStages().eval()
    how = fxq.Prune(ratio=0.5, multiple_of=1, keep="head.*")
    m = fxq.compile(model, calibration=data(), prune=how)
    report = m.parts["backbone"].prune_report
    assert report is not None and [(g.before, g.after) for g in report.groups] == [(4, 2)]
    assert m.parts["head"].prune_report is None and "nothing can be cut" in str(m.history)
    assert m.parts["backbone"].verify(m.parts["backbone"].lower(), data(2)).exact
    kept = fxq.compile(model, calibration=data(), prune=fxq.Prune(ratio=0.5, multiple_of=1, keep=["backbone.0", "head.*"]))
    assert kept.parts["backbone"].prune_report is None


@pytest.mark.parametrize("scheme", ["twn_wta8", "deepcomp_w3"])
def test_parts_of_schemes_that_train_are_deployed_ones(scheme: str) -> None:
    torch.manual_seed(0)
    m = fxq.compile(TwoStages().eval(), scheme, calibration=data(), prune=fxq.Prune(sparsity=0.5, sparsity_scope="layer"), progress=False)
    for part in m.parts.values():
        assert not any(isinstance(layer, Normed) for layer in part.modules()) and part.history.snapshots[-1].name == "convert-trained"
        assert all(d <= 0.7 for d in part.densities.values())
    assert m.parts["backbone"].verify(m.parts["backbone"].lower(), data(2)).ok


class TwoStages(Detector):
    """A second stage that sees only the samples whose first value is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.backbone(x)
        return [self.head(y[x[:, 0, 0, 0] > 0])] if float(y.detach().sum()) != 1.25 else []


def test_a_part_that_no_calibration_data_reaches() -> None:
    torch.manual_seed(0)
    model, never = TwoStages().eval(), -data().abs()
    with pytest.raises(CalibrationError, match=r"head / .*no calibration data reached it. Give data on which the model uses this part, or keep it float with"):
        fxq.compile(model, calibration=never)
    m = fxq.compile(model, calibration=never, skip="head.*")
    assert m.parts["head"].float_ops != [] and m(never)[0].shape[0] == 0


def test_lowering_for_another_target() -> None:
    m = fxq.compile(net(), calibration=data())
    with pytest.raises(TargetError, match="unknown target 'tensorrt9'"):
        m.lower("onnx-qdq", "tensorrt9")
    assert m.lower("onnx-qdq", "onnxruntime").data == m.lower().data
