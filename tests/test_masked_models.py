"""Masked models through fxq: capture, both modes, every layer in training, files, and the pattern in the ONNX file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from onnx import numpy_helper
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fxq
from fxq import numerics, zoo
from fxq.compiled import CompiledModel
from fxq.errors import ArtifactError, SchemeError
from fxq.graph import module_of, walk
from fxq.modules import WEIGHTED, Quantized
from fxq.sparsity import masks_of, sparsify
from fxq.tensorrt import EngineArtifact
from fxq.trainable import TrainableModel
from fxq.training import FloatLayer, Normed, TrainedLayer
from fxq.training_lowbit import EstimatedLayer
from tests.test_training import X, net

SCHEMES = ("iao_w8a8", "iao_w8a8_asymw", "iao_w8a8_plain", "iao_w4a4", "iao_w4a4_lsq", "twn_wta8")


def masked_net(ratio: float = 0.6, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A net whose gammas have both signs, with the mask of each layer."""
    made = net()
    return made, {w.name.removesuffix(".weight"): w.own.mask.clone() for w in sparsify(made, ratio, **options)}


def steps(q: TrainableModel, count: int = 3) -> TrainableModel:
    """Weight decay and momentum of Adam: what is not held at 0 leaves it."""
    optimizer = torch.optim.AdamW(q.parameters(), lr=0.02, weight_decay=0.3)
    q.train()
    for i in range(count):
        optimizer.zero_grad()
        q(X + i).square().mean().backward()
        optimizer.step()
    return q


def values(m: CompiledModel) -> dict[str, Tensor]:
    """Weight of each layer, less the zero point where it has codes."""
    out = {}
    for node, _ in walk(m.graph_module, *WEIGHTED):
        layer: Any = module_of(m.graph_module, node)
        if isinstance(layer, Quantized):
            spec, zero = layer.weight_grid.spec, layer.weight_grid.zero_point
            codes = layer.weight_codes().int()
            out[str(node.target)] = codes - (numerics.along(zero, spec.axis, codes.ndim) if spec.axis is not None and zero.ndim else zero)
        else:
            out[str(node.target)] = layer.weight.detach()
    return out


def holds(m: CompiledModel, masks: dict[str, Tensor]) -> bool:
    """0 wherever it is masked, something else in every layer."""
    found = values(m)
    return set(masks) == set(found) and all(not bool(v[~masks[k]].any()) and bool(v[masks[k]].any()) for k, v in found.items())


def qat(model: nn.Module, scheme: str = "iao_w8a8", **options: Any) -> TrainableModel:
    made = fxq.compile(model, scheme, mode="qat", calibration=X, progress=False, **options)
    assert isinstance(made, TrainableModel)
    return made


@pytest.mark.parametrize("scheme", ["iao_w8a8", "iao_w8a8_asymw", "iao_w4a8", "dynamic_w8", "weight_only_w4", "float"])
def test_post_training(scheme: str) -> None:
    """iao_w4a8 feeds rounding errors on to other weights: not to masked ones."""
    model, masks = masked_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    m = fxq.compile(model, scheme, calibration=X, progress=False)
    assert holds(m, masks)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(v, before[k]) for k, v in after.items()), "the user's model is as it was"
    assert masks_of(model).density() == pytest.approx(0.4, abs=1e-3) and torch.equal(model(X), model(X))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_masks_hold_in_training(scheme: str) -> None:
    model, masks = masked_net()
    q = qat(model, scheme)
    with torch.no_grad():
        for path, mask in masks.items():
            q.get_submodule(f"root.{path}").op.weight.add_(0.5 * ~mask)  # type: ignore[operator, union-attr]
    steps(q)
    assert {type(m) for m in q.modules() if isinstance(m, Normed)} <= {TrainedLayer, EstimatedLayer, FloatLayer}
    d = q.convert()
    assert holds(d, masks)
    q.freeze()
    steps(q)
    d = q.convert()
    assert holds(d, masks) and torch.equal(d(X), q.eval()(X)) and torch.equal(d(X), q.train()(X))


def test_what_training_computes_is_masked() -> None:
    """In each mode and phase the output is that of the masked weights: changing a masked parameter changes nothing."""
    model, masks = masked_net()
    for scheme in ("iao_w8a8", "iao_w4a4_lsq", "twn_wta8"):
        q = steps(qat(model, scheme), 1)
        other = copy.deepcopy(q)
        with torch.no_grad():
            for path, mask in masks.items():
                other.get_submodule(f"root.{path}").op.weight.add_(7.0 * ~mask)  # type: ignore[operator, union-attr]
        for phase in ("qat", "qaft"):
            if phase == "qaft":
                q.freeze()
                other.freeze()
            assert torch.equal(copy.deepcopy(q).train()(X), copy.deepcopy(other).train()(X)), (scheme, phase)
            assert torch.equal(q.eval()(X), other.eval()(X)), (scheme, phase)
            q.zero_grad()
            q(X).square().mean().backward()
            for path, mask in masks.items():
                grad = q.get_submodule(f"root.{path}").op.weight.grad  # type: ignore[union-attr]
                assert not bool(grad[~mask].any()) and bool(grad[mask].any()), (scheme, phase, path)


def test_layers_without_masks_train_freely() -> None:
    """Also where their weight is 0 to begin with; and without masks in the model zeros mean nothing."""
    for masked in (True, False):
        model = net()
        with torch.no_grad():
            model.fc.weight.zero_()
            model.b.weight[:, 0] = 0
        if masked:
            sparsify(model, 0.5, keep=["fc", "b"])
        q = steps(qat(model))
        assert not bool((q.get_submodule("root.fc").op.weight == 0).any())  # type: ignore[union-attr, operator]
        found = [p for p, m in q.named_modules() if isinstance(m, Normed) and m._buffers.get("weight_mask") is not None]
        assert found == (["root.a", "root.up"] if masked else [])
        assert bool(values(q.convert())["b"][:, 0].any())


def test_weights_that_are_0_but_not_masked_train() -> None:
    """A layer that starts at 0, as the last of a residual branch may, keeps its mask and nothing else."""
    model = net()
    with torch.no_grad():
        model.a.weight.zero_()
    masks = {w.name.removesuffix(".weight"): w.own.mask.clone() for w in sparsify(model, 0.5, scope="layer")}
    q = qat(model)
    assert torch.equal(q.get_submodule("root.a").weight_mask, masks["a"])  # type: ignore[arg-type]
    assert holds(steps(q).convert(), masks)


def test_float_layers_without_batch_norm_hold_their_masks() -> None:
    model, masks = masked_net()
    q = steps(qat(model, skip="fc"))
    assert isinstance(q.get_submodule("root.fc"), FloatLayer) and q.get_submodule("root.fc").bn is None
    assert holds(q.convert(), masks)


def test_gradual_pruning_in_front_of_it() -> None:
    model, _ = masked_net(0.3)
    masks_of(model).update(0.8)
    assert holds(steps(qat(model)).convert(), {w.name.removesuffix(".weight"): w.own.mask for w in masks_of(model)})


def test_checkpoints_and_copies() -> None:
    model, masks = masked_net()
    q = steps(qat(model), 1)
    fresh = qat(model)
    fresh.load_state_dict(q.state_dict())
    assert holds(steps(copy.deepcopy(q)).convert(), masks) and holds(steps(fresh).convert(), masks)
    assert sum(k.endswith("weight_mask") for k in q.state_dict()) == len(masks)


@pytest.mark.parametrize("scheme", ["iao_w8a8", "iao_w4a4_lsq"])
def test_files_hold_the_masks(scheme: str, tmp_path: Path) -> None:
    """The loaded model trains on as the first would have, and its deployed form keeps its zeros when it is saved and loaded."""
    model, masks = masked_net()
    q = steps(qat(model, scheme), 1)
    fxq.save(q, tmp_path / "q.fxq")
    again = fxq.load(tmp_path / "q.fxq")
    assert isinstance(again, TrainableModel)
    a, b = steps(q).convert(), steps(again).convert()
    assert holds(b, masks) and torch.equal(a(X), b(X))
    fxq.save(b, tmp_path / "b.fxq")
    assert holds(fxq.load(tmp_path / "b.fxq"), masks)


def test_one_compiled_graph() -> None:
    """torch.compile takes the float model and both kinds of layers in training as one graph, once, and trains the same weights."""
    model, _ = masked_net()
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(X), model(X), atol=1e-6)
    for scheme in ("iao_w8a8", "iao_w4a4_lsq"):
        q = steps(qat(model, scheme), 1)
        q.zero_grad()
        other, counter = copy.deepcopy(q), CompileCounter()
        compiled = torch.compile(q, backend=counter)
        for _ in range(3):
            compiled(X).square().mean().backward()
            other(X).square().mean().backward()
        assert counter.frame_count == 1
        assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(q.parameters(), other.parameters(), strict=True))  # type: ignore[arg-type]
    torch._dynamo.reset()


def test_a_masked_float_model_is_not_written(tmp_path: Path) -> None:
    model = fxq.compile(net(), "float", calibration=X, progress=False)
    masks = sparsify(model, 0.5)
    with pytest.raises(ArtifactError, match=r"^.*a: its weight is computed \(torch.nn.utils.parametrize\), .*Call remove\(\) of its masks"):
        fxq.save(model, tmp_path / "m.fxq")
    masks.remove()
    fxq.save(model, tmp_path / "m.fxq")
    assert torch.equal(fxq.load(tmp_path / "m.fxq")(X), model(X)) and int((model.get_parameter("root.a.weight") == 0).sum()) > 0


def test_files_from_before_there_were_masks(tmp_path: Path) -> None:
    """Their layers have no place for one."""
    q = qat(net())
    for m in q.modules():
        m._buffers.pop("weight_mask", None)
    fxq.save(q, tmp_path / "q.fxq")
    again = fxq.load(tmp_path / "q.fxq")
    assert isinstance(again, TrainableModel) and torch.equal(steps(again).convert()(X), steps(q).convert()(X))


@pytest.mark.parametrize("scheme", ["xnor_w1a1", "dorefa_w4a4", "bnn_w1a32"])
def test_codes_without_a_zero_are_refused(scheme: str) -> None:
    model, _ = masked_net()
    with pytest.raises(SchemeError, match=r"^b: its weight is masked, but weights of '.*' have no 0\. Take a scheme") as e:
        qat(model, scheme)
    assert "skip='b'" in str(e.value)
    model, masks = masked_net(keep=["b"])
    assert holds(steps(qat(model, scheme, skip=["a", "up", "fc"])).convert(), {**masks, "b": torch.ones(8, 4, 3, 3, dtype=torch.bool)})


class Functional(nn.Module):
    """Weights that functions read, a subclass, and control flow on values of shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.dense = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.a.weight, self.a.bias)).mean((2, 3))
        return self.dense(F.relu(F.linear(x, self.b.weight)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rung", ["symbolic", "concrete", "export"])
def test_functions_and_export(rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the modules are gone from the graph: zeros are what is left of the masks."""
    monkeypatch.setattr("fxq.api.capture", lambda *a, **k: fxq.capture(*a, rungs=[rung], **k))
    model = Functional()
    masks = [w.own.mask.clone() for w in sparsify(model, 0.6, keep="dense")]
    q = qat(model)
    assert q.captured.rung == rung
    found = [module_of(q.graph_module, n)._buffers.get("weight_mask") for n, _ in walk(q.graph_module, *WEIGHTED)]
    assert len(found) == 3 and found[2] is None
    after = list(values(steps(q).convert()).values())
    for got, w, mask in zip(found, after, masks, strict=False):
        assert got is not None and torch.equal(got, mask) and not bool(w[~mask].any()) and bool(w[mask].any())


def test_attention() -> None:
    """Its packed projection becomes one linear layer, or for TensorRT three."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(4, 5, 16)
    sparsify(model, pattern="2:4")
    for target in ("onnxruntime", "tensorrt"):
        m = fxq.compile(model, "int8", mode="qat", calibration=x, target=target, progress=False)
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.3)
        for _ in range(2):
            m.train()(x).square().mean().backward()
            optimizer.step()
        assert isinstance(m, TrainableModel)
        found = values(m.convert())
        assert len(found) >= 4
        for name, w in found.items():
            assert bool((w.reshape(-1, 4).ne(0).sum(1) <= 2).all()), (target, name)


def quads(data: bytes) -> dict[str, bool]:
    """Layer of an ONNX file -> are at most 2 of 4 neighbours along the input channels (dimension 1) of its weight not 0?"""
    out = {}
    for tensor in onnx.load_from_string(data).graph.initializer:
        name, w = tensor.name, torch.from_numpy(numpy_helper.to_array(tensor).copy())
        if name.endswith(("/weight_q", "/weight")) and w.ndim > 1:
            last = w.movedim(1, -1)
            out[name.rsplit("/", 1)[0]] = last.shape[-1] % 4 == 0 and bool((last.reshape(-1, 4).ne(0).sum(1) <= 2).all())
    return out


@pytest.mark.parametrize(("mode", "target"), [("ptq", "onnxruntime"), ("qat", "onnxruntime"), ("ptq", "tensorrt"), ("qat", "tensorrt")])
def test_the_pattern_is_whole_in_the_file(mode: str, target: str) -> None:
    torch.manual_seed(0)
    model, x = zoo.build("tiny_resnet8").eval(), torch.randn(4, 3, 32, 32)
    masks = sparsify(model, pattern="2:4")
    m = fxq.compile(model, "int8", mode=mode, calibration=x, target=target, progress=False)
    if isinstance(m, TrainableModel):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.3)
        m.train()(x).square().mean().backward()
        optimizer.step()
        m = m.convert()
    found = quads(m.lower("onnx-qdq").data)
    assert len(found) == len(masks) + 1 and [n for n, whole in found.items() if not whole] == ["stem.conv"]
    assert list(masks.skipped) == ["stem.weight"]


def test_an_engine_with_sparse_kernels() -> None:
    """TensorRT-RTX takes the flag without a GPU; the engine is of the same size."""
    torch.manual_seed(0)
    model, x = zoo.build("tiny_resnet8").eval(), torch.randn(4, 3, 32, 32)
    sparsify(model, pattern="2:4")
    m = fxq.compile(model, "int8", calibration=x, target="tensorrt", progress=False)
    sparse, dense = (m.lower("tensorrt", sparsity=s, package="tensorrt_rtx", target="sm86", level=0) for s in (True, False))
    assert isinstance(sparse, EngineArtifact) and sparse.checks and not sparse.mismatches
    assert quads(sparse.onnx)["stages.0.conv1.conv"] and len(sparse.data) == len(dense.data)


def test_an_exported_program_has_the_zeros() -> None:
    """What it does not say is that they were masks."""
    model, masks = masked_net()
    program = torch.export.export(model, (X,))
    found = list(values(fxq.compile(program, "iao_w8a8", calibration=X, progress=False)).values())
    assert len(found) == len(masks) and all(not bool(v[~k].any()) for v, k in zip(found, masks.values(), strict=True))
    q = fxq.compile(program, "iao_w8a8", mode="qat", calibration=X, progress=False)
    assert not any(m._buffers.get("weight_mask") is not None for m in q.modules())


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_channel_shuffles_leave_the_pattern_alone(target: str) -> None:
    """For ONNX Runtime they would vanish into the order of the weights' channels, where the weights have no pattern."""
    torch.manual_seed(0)
    model, x = torchvision.models.shufflenet_v2_x0_5(weights=None).eval(), torch.randn(2, 3, 64, 64)
    masks = sparsify(model, pattern="2:4")
    m = fxq.compile(model, "int8", calibration=x, target=target, progress=False)
    assert {f"{n}.weight" for n, whole in quads(m.lower("onnx-qdq").data).items() if not whole} == set(masks.skipped)
    said = [s.why for s in m.history["legalize"].skips if s.node == "shuffle"]
    assert said == (["the pattern 2:4 of the weights needs their channels in this order"] if target == "onnxruntime" else [])


def test_pruned_and_sparse(tmp_path: Path) -> None:
    """Channels first, then weights, then training in integers; zeros that were there before the cut are held as well."""
    model, _ = masked_net()
    pruned = fxq.prune(model, fxq.Prune(ratio=0.3, multiple_of=1), example=X, progress=False)
    assert pruned.masked()(X).shape == (8, 5)
    first = {p: m.weight.detach() != 0 for p, m in pruned.graph_module.named_modules() if hasattr(m, "weight_masked")}  # type: ignore[union-attr, operator]
    assert len(first) == 4
    assert holds(steps(qat(pruned)).convert(), first)
    fxq.save(pruned, tmp_path / "p.fxq")
    assert holds(steps(qat(fxq.load(tmp_path / "p.fxq"))).convert(), first)
    dense = fxq.prune(net(), fxq.Prune(ratio=0.3, multiple_of=1), example=X, progress=False)
    masks = {w.name.removeprefix("root.").removesuffix(".weight"): w.own.mask.clone() for w in sparsify(dense, 0.6)}
    assert holds(steps(qat(dense)).convert(), masks)
    assert holds(fxq.compile(dense, "iao_w8a8", calibration=X, progress=False), masks)
