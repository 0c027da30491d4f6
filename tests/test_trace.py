"""The capture ladder on tiny models: every rung, what each records, and what the user is told when nothing works."""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq.errors import TraceError
from fxq.trace import Captured, capture, run, same


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def equal(found: Captured, model: nn.Module, *inputs: Any) -> bool:
    assert found.gm is not None
    return same(run(copy.deepcopy(model).eval(), inputs), run(found.gm, inputs))


def ops(found: Captured) -> list[str]:
    assert found.gm is not None
    return [str(getattr(n.target, "__name__", n.target)) for n in found.gm.graph.nodes if n.op not in ("placeholder", "output")]


class Plain(nn.Module):
    """A shared module, a reused functional, inline relu, ``+``, ``cat``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, a: Tensor, scale: float = 2.0, other: Tensor | None = None) -> Tensor:
        b = self.act(self.conv(self.act(self.conv(a))))
        c = F.relu(self.body(b) + b)
        if other is not None:
            c = c + other
        return torch.cat([c, F.relu(a)], 1).mul(scale)


def test_symbolic_sees_shared_modules_functionals_and_inline_operations() -> None:
    model = Plain()
    found = capture(model, (x(),))
    assert (found.rung, found.specialised, found.notes) == ("symbolic", (), ())
    assert ops(found) == ["conv", "act", "conv", "act", "body.0", "body.1", "add", "relu", "relu", "cat", "mul"]
    assert equal(found, model, x(5, 3, 10, 6, seed=1))


def test_defaults_are_no_inputs_and_every_given_input_is_one() -> None:
    one, three = capture(Plain(), (x(),)), capture(Plain(), (x(), 3.0, x(seed=2)))
    assert one.gm is not None and three.gm is not None
    assert [n.target for n in one.gm.graph.nodes if n.op == "placeholder"] == ["a"]
    assert [n.target for n in three.gm.graph.nodes if n.op == "placeholder"] == ["a", "scale", "other"]


def test_module_paths_are_kept() -> None:
    gm = capture(Plain(), (x(),)).gm
    assert gm is not None
    last = next(n for n in gm.graph.nodes if n.target == "body.1")
    assert [path for path, _ in last.meta["nn_module_stack"].values()] == ["body", "body.1"]


class Many(nn.Module):
    def forward(self, *xs: Tensor, key: str = "sum") -> dict[str, Any]:
        return {key: xs[0] + xs[1], "parts": (xs[0], [xs[1]])}


def test_variadic_inputs_and_nested_outputs() -> None:
    for rungs in (("symbolic",), ("concrete",)):
        found = capture(Many(), (x(), x(seed=1)), rungs=rungs)
        assert equal(found, Many(), x(3, 2), x(3, 2, seed=1))


def test_a_single_layer_stays_a_layer() -> None:
    model = nn.Conv2d(3, 4, 3)
    found = capture(model, (x(),))
    assert ops(found) == ["conv2d"] and equal(found, model, x(4, 3, 9, 9))


class Same(nn.Module):
    """TensorFlow's SAME padding: computes with heights and widths, and keeps the batch in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2), nn.Linear(64, 5)

    def forward(self, a: Tensor) -> Tensor:
        batch, _, *sizes = a.shape
        pad = [max((math.ceil(s / 2) - 1) * 2 + 3 - s, 0) for s in sizes]
        if any(pad):
            a = F.pad(a, [pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2])
        y = self.conv(a).view(batch, -1)
        return self.head(y) + torch.zeros(batch, 1, device=a.device)


def test_shape_arithmetic_is_concrete_and_the_batch_symbolic() -> None:
    model = Same()
    found = capture(model, (x(),))
    assert found.rung == "concrete" and ops(found) == ["getattr", "getitem", "pad", "conv", "view", "head", "zeros", "add"]
    (note,) = found.specialised
    assert note.startswith("input sizes batchx3x8x8: used first at ") and "test_trace.py:" in note and "a.shape" in note
    assert "test_trace.py:" in found.notes[0] and found.notes[0].startswith("symbolic: ")
    for n in (1, 2, 7):
        assert equal(found, model, x(n, 3, 8, 8, seed=n))


class PerSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, a: Tensor) -> Tensor:
        return torch.stack([self.fc(a[i]) for i in range(a.shape[0])])


def test_a_loop_over_the_batch_is_specialised_and_says_where() -> None:
    found = capture(PerSample(), (x(2, 4),), rungs=("concrete",))
    assert equal(found, PerSample(), x(2, 4)) is False or found.gm is not None
    assert len(found.specialised) == 2
    assert found.specialised[0].startswith("batch size: 2 is used at ") and "range(a.shape[0])" in found.specialised[0]
    assert found.specialised[1] == "batch size 2: at 1 the graph fails: index 1 is out of bounds for dimension 0 with size 1"


def test_a_model_for_one_batch_size_only() -> None:
    class Hard(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return a.view(2, 12) * (2.0 if a.shape[1] > 5 else 1.0)

    found = capture(Hard(), (x(2, 12),))
    assert found.rung == "concrete" and equal(found, Hard(), x(2, 12, seed=3))
    assert "fails at another one" in found.specialised[0] and "a.view(2, 12)" in found.specialised[0]
    assert found.specialised[-1].startswith("batch size 2: the model itself fails at 1 (")


def test_a_buffer_sized_by_the_batch() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("token", x(1, 1, 4))

        def forward(self, a: Tensor) -> Tensor:
            assert isinstance(a, Tensor) and isinstance(a.shape[0], int) and len(a.shape) == a.ndim
            return torch.cat([self.token.expand(a.shape[0], -1, -1), a], 1)

    found = capture(Token(), (x(2, 3, 4),))
    assert found.rung == "concrete" and found.specialised == ()
    assert equal(found, Token(), x(5, 3, 4))


class Items(nn.Module):
    """Assignment to a part of a tensor, a dict of tensors, a size compared with another."""

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        y = a * 2
        y[:, :1] = b[:, :1]
        named = {"y": y, "z": y + 1} if a.shape == b.shape else {}
        return {k: v.relu() for k, v in named.items()}


def test_item_assignment_and_shape_comparison() -> None:
    found = capture(Items(), (x(), x(seed=1)))
    assert found.rung == "concrete" and found.specialised == () and equal(found, Items(), x(5, 3, 2, 2), x(5, 3, 2, 2, seed=1))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, a: Tensor) -> Tensor:
        y = a + 1
        z = self.act(y)
        y.mul_(3)
        F.relu6(y, inplace=True)
        return y - z


def test_in_place_operations_become_values() -> None:
    model = InPlace()
    found = capture(model, (x(),))
    assert found.rung == "symbolic" and ops(found) == ["add", "act", "mul", "relu6", "sub"]
    assert equal(found, model, x(4, 2))
    relu6 = next(n for n in found.gm.graph.nodes if n.target is F.relu6)  # type: ignore[union-attr]
    assert True not in (*relu6.args, *relu6.kwargs.values())
    chain = capture(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.ReLU6(inplace=True)), (x(),))
    assert chain.rung == "symbolic" and not any(getattr(m, "inplace", False) for m in chain.gm.modules())  # type: ignore[union-attr]


class Overwritten(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        y = a + 1
        y.mul_(3)
        F.relu_(y)
        return y


def test_a_tensor_changed_in_place_is_read_after_the_change() -> None:
    found = capture(Overwritten(), (x(),), rungs=("symbolic",))
    assert ops(found)[:2] == ["add", "mul"] and equal(found, Overwritten(), x(3, 1, 2, 2))


class View(nn.Module):
    """A view is changed, the base is read: only functionalisation by torch.export sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, a: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.fc(a)
        y[:, :2].add_(1)
        return y, {"twice": (y * 2).to(torch.float64)}


def test_export_rung_keeps_outputs_and_the_batch() -> None:
    model = View()
    found = capture(model, (x(3, 4),))
    assert found.rung == "export" and [n.split(":")[0] for n in found.notes] == ["symbolic", "concrete"]
    assert "differs" in found.notes[0]
    assert found.specialised == ("input sizes batchx4: torch.export, dynamic batch",)
    assert equal(found, model, x(7, 4)) and not any("assert" in o or "guard" in o for o in ops(found))
    static = capture(model, (x(1, 4),), rungs=("export",))
    assert static.specialised[0] == "input sizes 1x4: torch.export, static" and equal(static, model, x(1, 4))


class ByData(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a * 2 if a.sum() > 0 else a


def test_a_decision_on_data_names_file_line_expression_rungs_and_the_way_out() -> None:
    with pytest.raises(TraceError) as e:
        capture(ByData(), (x(),))
    line = ByData.forward.__code__.co_firstlineno + 1
    assert e.value.where == f"{__file__}:{line}"
    assert e.value.fact == "cannot be traced: `a.sum() > 0`: the result depends on the values of a tensor"
    text = str(e.value)
    assert "leaf_modules=[...]" in text and "\n" not in text
    for rung in ("symbolic: ", "concrete: ", "export: ", "submodules: "):
        assert rung in text


def test_a_leaf_type_is_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), ByData())
    found = capture(model, (x(2, 8),), leaf_modules=[ByData])
    assert found.rung == "symbolic" and ops(found) == ["0", "1"]


class Detector(nn.Module):
    """Data-dependent selection around a backbone, a head that loops over a list, and a stack called at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.inner = Head(), Picky()
        self.unused = nn.Linear(2, 2)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        maps = [self.backbone(torch.stack(images))]
        maps.append(F.max_pool2d(maps[0], 2))
        scores = self.head(maps=maps)
        return [self.inner(level=s)[s > 0].sort().values for s in scores]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.conv(m).flatten(1) for m in maps]


class Picky(nn.Module):
    """Not traceable itself; its layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, level: Tensor) -> Tensor:
        if level.abs().max() > 1e6:
            raise ValueError("diverged")
        return self.mix(level[:, None])[:, 0]


def images(n: int = 2) -> list[Tensor]:
    return [x(3, 8, 8, seed=i) for i in range(n)]


def test_submodules_of_a_model_that_cannot_be_traced() -> None:
    model = Detector()
    found = capture(model, (images(),))
    assert found.gm is None and found.rung == "submodules"
    assert list(found.parts) == ["backbone", "head", "inner.mix"]
    assert found.parts["backbone"][1][0].shape == (2, 3, 8, 8) and len(found.parts["head"][1][0]) == 2
    want = run(model.eval(), (images(3),))
    for path, (gm, _) in found.parts.items():
        found.root.set_submodule(path, gm)
    assert same(want, run(found.root, (images(3),))) and all(isinstance(found.root.get_submodule(p), GraphModule) for p in found.parts)


def test_a_part_that_the_model_reads_more_of_is_left_alone() -> None:
    class Reads(Detector):
        def forward(self, images: list[Tensor]) -> list[Tensor]:
            assert len(self.head.conv.weight) == 2 and isinstance(self.head, Head)
            return super().forward(images)

    found = capture(Reads(), (images(),))
    assert list(found.parts) == ["backbone", "inner.mix"]


def state(model: nn.Module) -> str:
    h = hashlib.sha256()
    for name, t in model.state_dict().items():
        h.update(name.encode() + t.numpy().tobytes())
    for name, m in model.named_modules():
        h.update(f"{name} {m.training} {len(m._forward_hooks)} {len(m._forward_pre_hooks)} {sorted(map(str, vars(m)))}".encode())
        h.update(str(getattr(m, "inplace", "")).encode())
    return h.hexdigest()


@pytest.mark.parametrize("rung", ["symbolic", "concrete", "export", "submodules"])
def test_the_users_model_is_not_touched(rung: str) -> None:
    model = Detector().train() if rung == "submodules" else Plain().train()
    inputs = images() if rung == "submodules" else x()
    before, given = state(model), copy.deepcopy(inputs)
    found = capture(model, (inputs,), rungs=(rung,))
    assert found.rung == rung and not found.root.training
    assert state(model) == before and same(inputs, given)
    mine = {p.data_ptr() for p in model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in found.root.parameters())


def test_double_and_half_precision() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = Same().to(dtype)
        for rung in ("concrete", "export"):
            found = capture(model, (x().to(dtype),), rungs=(rung,))
            assert equal(found, model, x(2, 3, 8, 8, seed=4).to(dtype)), (dtype, rung)


def test_graphs_and_exported_programs_are_taken_as_they_are() -> None:
    model = Plain().eval()
    gm = capture(model, (x(),)).gm
    assert gm is not None
    again = capture(gm, (x(),))
    assert again.rung == "symbolic" and again.gm is not gm and equal(again, model, x(5, 3, 4, 4))
    program = torch.export.export(View(), (x(3, 4),), strict=False)
    found = capture(program, (x(3, 4),))
    assert found.gm is not None and set(run(found.gm, (x(3, 4),))[1]) == {"twice"}
    assert [n.op for n in found.gm.graph.nodes].count("placeholder") == 1


def test_what_cannot_be_copied_says_so() -> None:
    model = Plain()
    model.cache = model.conv(x())
    with pytest.raises(TraceError, match="Plain: the model cannot be copied.*Detach tensors"):
        capture(model, (x(),))


def test_wrong_inputs_and_rungs() -> None:
    with pytest.raises(TraceError, match="forward takes 1 positional inputs, the example has 2"):
        capture(ByData(), (x(), x()), rungs=("symbolic",))
    with pytest.raises(TraceError, match="unknown rung 'magic'. The rungs are symbolic"):
        capture(Plain(), (x(),), rungs=("magic",))
    with pytest.raises(TraceError, match="no rung was asked for"):
        capture(Plain(), (x(),), rungs=())


def test_an_unequal_graph_fails_its_rung_unless_checks_are_off() -> None:
    found = capture(View(), (x(3, 4),), rungs=("symbolic",), check=False)
    assert not equal(found, View(), x(3, 4)) and found.specialised == ()


def test_same_is_strict_and_takes_nan() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert same({"a": (nan, 1)}, {"a": [nan.clone(), 1]})
    assert not same(nan, torch.tensor([float("nan"), 1.0]))
    assert not same(nan, nan.double()) and not same(nan, nan[:1]) and not same([nan], [nan, nan])
    assert not same({"a": nan}, {"b": nan}) and not same(nan, None)


def test_random_operations_are_compared_with_one_seed() -> None:
    class Noise(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return F.dropout(a, 0.5)

    before = torch.random.get_rng_state()
    assert capture(Noise(), (x(),)).rung == "symbolic"
    assert torch.equal(before, torch.random.get_rng_state())
