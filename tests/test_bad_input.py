"""What a user gets wrong: the message says the node, the fact and the way out, the model is as before, and no half-written file stays.

Also inputs that look wrong but are valid (dead channels, constant activations, outliers, denormals): compiled, lowered and proven.
"""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import fxq
from fxq.errors import ArtifactError, CalibrationError, FxqError, LoweringError, PassError, SchemeError, TargetError, TraceError
from fxq.lowering import Artifact

Make = Callable[[], Any]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )  # fmt: skip


def data(n: int = 8, *sizes: int) -> Tensor:
    return torch.randn(n, *(sizes or (3, 12, 12)), generator=torch.Generator().manual_seed(1))


def changed(change: Callable[[nn.Sequential], Any]) -> nn.Sequential:
    model = net()
    with torch.no_grad():
        change(model)
    return model


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Log(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.log(self.a(x)))
        return out


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(y)
        return out


class ByKeyword(nn.Module):
    def forward(self, *, x: Tensor) -> Tensor:
        return x


class Old(nn.Module):
    """Keeps a tensor of a forward pass, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.kept = self.a.weight * 2

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x)
        return out


def fire() -> Iterator[Tensor]:
    yield data()
    raise ValueError("disk on fire")


REFUSED: dict[str, tuple[type[FxqError], str, Make, Make]] = {
    # calibration data
    "none": (CalibrationError, r"the scheme 'iao_w8a8' needs calibration data\. Pass calibration=", net, lambda: None),
    "empty": (CalibrationError, r"the calibration data is empty\. Check the loader", net, list),
    "empty tensor": (CalibrationError, r"batch 0 is empty: it has shape \[0, 3, 12, 12\]", net, lambda: [data()[:0], data()]),
    "later empty": (CalibrationError, "batch 1 is empty", net, lambda: [data(), data()[:0]]),
    "ragged": (CalibrationError, r"batch 1 has shape \[8, 3, 6, 12\], the first one \[8, 3, 12, 12\]\. Resize", net, lambda: [data(), data()[:, :, :6]]),
    "another rank": (CalibrationError, r"batch 1 has shape \[3, 12, 12\]", net, lambda: [data(), data()[0]]),
    "another type": (CalibrationError, r"batch 1 is torch.uint8, the first one torch.float32", net, lambda: [data(), data().to(torch.uint8)]),
    "nan": (CalibrationError, r"batch 1 holds NaN or infinity\. Clean the data", net, lambda: [data(), data() * float("nan")]),
    "infinity": (CalibrationError, "batch 0 holds NaN or infinity", net, lambda: [data() / 0.0]),
    "float64 infinity": (CalibrationError, "batch 0 holds NaN or infinity", net, lambda: [data().double() * 1e300]),
    "images": (CalibrationError, r"does not run on an input of uint8 \[8, 3, 12, 12\].*Convert the data to float", net, lambda: data().to(torch.uint8)),
    "booleans": (CalibrationError, "an input of bool .*Convert the data to float", net, lambda: [data() > 0]),
    "complex": (CalibrationError, "does not run on an input of complex64", net, lambda: [data() + 0j]),
    "channels": (CalibrationError, r"an input of float32 \[8, 2, 12, 12\].*dimension 0 is the batch", net, lambda: data()[:, :2]),
    "single images": (CalibrationError, r"an input of float32 \[3, 12, 12\].*dimension 0 is the batch", net, lambda: list(data())),
    "no batch": (CalibrationError, r"not on the first 2 along dimension 0.*x.unsqueeze\(0\)", lambda: nn.Conv2d(3, 4, 3), lambda: list(data())),
    "one number": (CalibrationError, "one number has no batches", net, lambda: torch.tensor(1.0)),
    "a number": (CalibrationError, "type int cannot be iterated", net, lambda: 5),
    "a path": (CalibrationError, "type str gives no batches", net, lambda: "images/"),
    "a dict": (CalibrationError, r"type dict gives no batches\. Put it into a list", net, lambda: {"input": data()}),
    "strings": (CalibrationError, "batch 0 holds a str", net, lambda: ["a.png"]),
    "objects": (CalibrationError, "batch 0 holds a NoneType", net, lambda: [None]),
    "text array": (CalibrationError, "batch 0 holds an array of <U1", net, lambda: [np.array(["a"])]),
    "other key": (CalibrationError, r"batch 0 has no input 'input'\. Its keys are image, label", net, lambda: [{"image": data(), "label": torch.zeros(8)}]),
    "one of two": (CalibrationError, "batch 0 has 1 inputs, the model takes 2", TwoInputs, lambda: [data()]),
    "no data on it": (CalibrationError, r"batch 0 has no data \(device meta\)", net, lambda: [data().to("meta")]),
    "token": (CalibrationError, r"int64 \[4, 6\].*index out of range", lambda: nn.Embedding(5, 4), lambda: [torch.full((4, 6), 9)]),
    # models
    "branch": (TraceError, r"test_bad_input.py:\d+: cannot be traced: .*x.sum\(\) > 0.*leaf_modules", Branch, data),
    "keyword": (CalibrationError, r"ByKeyword: forward takes 'x' by keyword only\. Wrap", ByKeyword, data),
    "double": (SchemeError, r"0.weight: the weights are torch.float64, .*Pass model.float\(\)", lambda: net().double(), data),
    "half": (SchemeError, r"0.weight: the weights are torch.float16", lambda: net().half(), data),
    "bfloat16": (SchemeError, r"0.weight: the weights are torch.bfloat16", lambda: net().bfloat16(), data),
    "one double layer": (SchemeError, r"3.weight: the weights are torch.float64", lambda: changed(lambda m: m[3].double()), data),
    "nan weight": (CalibrationError, "3.weight: the tensor holds NaN or infinity", lambda: changed(lambda m: m[3].weight[0].fill_(float("nan"))), data),
    "infinite bn": (CalibrationError, "1.running_var: the tensor holds NaN", lambda: changed(lambda m: m[1].running_var.fill_(float("inf"))), data),
    "negative bn": (CalibrationError, "calibrate / .*batch 0: the value holds NaN", lambda: changed(lambda m: m[1].running_var.fill_(-1.0)), data),
    "nan inside": (CalibrationError, "calibrate / log.*, batch 0: the value holds NaN or infinity", Log, data),
    "overflow inside": (CalibrationError, "calibrate / .*the value holds NaN or infinity", net, lambda: data() * 3e37),
    "meta": (FxqError, r"0.weight: the tensor has no data \(device meta\)\. Load the weights", lambda: net().to("meta"), data),
    "another device": (FxqError, r"3.weight: the tensor has no data", lambda: changed(lambda m: m[3].to("meta")), data),
    "lazy": (FxqError, "0.weight: the tensor has no shape yet", lambda: nn.Sequential(nn.LazyConv2d(4, 3)), data),
    "a list": (FxqError, "expected a torch.nn.Module, got list", lambda: [net()], data),
    "a class": (FxqError, "got the class ReLU", lambda: nn.ReLU, data),
    "a state dict": (FxqError, r"got OrderedDict\. Pass the model itself", lambda: net().state_dict(), data),
    "cannot be copied": (TraceError, "Old: the model cannot be copied", Old, lambda: data(4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused_and_the_model_is_as_before(case: str) -> None:
    error, text, make, calibration = REFUSED[case]
    model = make()
    before = _state(model)
    with pytest.raises(error, match=f"(?s){text}") as info:
        fxq.compile(model, calibration=calibration())
    assert info.value.fact and (info.value.way_out or info.value.where)
    assert "\n" not in info.value.fact
    assert _state(model) == before


def _state(model: Any) -> Any:
    """What compiling must not change: values, gradients' switches, mode and hooks."""
    if not isinstance(model, nn.Module) or any(torch.nn.parameter.is_lazy(p) for p in model.parameters()):
        return None
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    return [(n, id(t), t.requires_grad, "" if t.is_meta else t.detach().float().numpy().tobytes(), t.grad is None) for n, t in tensors], hooks


def test_an_error_of_the_users_loader_comes_through() -> None:
    model = net().train()
    before = _state(model)
    with pytest.raises(ValueError, match="disk on fire"):
        fxq.compile(model, calibration=fire())
    assert _state(model) == before


def test_torchscript_and_compiled_models_are_refused() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        scripted = torch.jit.trace(net().eval(), data())  # type: ignore[no-untyped-call]
    with pytest.raises(FxqError, match=r"TorchScript has no Python code to capture\. Pass the model that it was made from"):
        fxq.compile(scripted, calibration=data())
    m = fxq.compile(net(), calibration=data())
    with pytest.raises(FxqError, match=r"the model is compiled already\. Pass the float model"):
        fxq.compile(m, calibration=data())


NAMES = [
    (SchemeError, "unknown scheme 'iao_w8a'. did you mean 'iao_w8a8'", {"scheme": "iao_w8a"}),
    (SchemeError, "a scheme is a name or a Scheme, not 3. known: auto-lowbit", {"scheme": 3}),
    (TargetError, "unknown target 'onnxrutime'. did you mean 'onnxruntime'", {"target": "onnxrutime"}),
    (TargetError, "a target is a name or a Target, not None. known: bitwise", {"target": None}),
    (SchemeError, "unknown observer 'mimax'. did you mean 'minmax'", {"observer": "mimax"}),
    (CalibrationError, "0 batches are no data", {"batches": 0}),
    (CalibrationError, "the shapes are not known. Pass example=", {"scheme": "weight_only_w8", "calibration": None}),
    (CalibrationError, "batch 0 holds a int", {"scheme": "weight_only_w8", "calibration": None, "example": (1, 3, 12, 12)}),
]


@pytest.mark.parametrize(("error", "text", "options"), NAMES)
def test_mistyped_names_and_options(error: type[FxqError], text: str, options: dict[str, Any]) -> None:
    with pytest.raises(error) as info:
        fxq.compile(net(), **{"calibration": data(), **options})
    assert text in str(info.value)


def test_mistyped_names_of_a_compiled_model() -> None:
    m = fxq.compile(net(), calibration=data())
    for error, text, call in (
        (TargetError, "unknown backend 'onnx-qd'. did you mean 'onnx-qdq'", lambda: m.lower("onnx-qd")),
        (TargetError, "unknown target 'onnxrun'", lambda: m.lower("onnx-qdq", "onnxrun")),
        (TargetError, "did you mean 'onnxruntime'", lambda: m.lint("onnxruntim")),
        (PassError, "no pass called 'fold' ran. did you mean 'fold-bn'", lambda: m.history.diff("fold")),
        (FxqError, "the model takes 1 inputs, given are none", lambda: m.reference()),
        (FxqError, "the model takes 1 inputs, given are Tensor, Tensor", lambda: m.reference(data(), data())),
        (FxqError, "given are ndarray", lambda: m.reference(data().numpy())),
    ):
        with pytest.raises(error) as info:  # type: ignore[call-overload]
            call()  # type: ignore[no-untyped-call]
        assert text in str(info.value)


def test_a_model_that_went_wrong_after_compiling_is_not_lowered() -> None:
    m = fxq.compile(net(), calibration=data())
    bad = copy.deepcopy(m)
    with torch.no_grad():
        next(bad.parameters()).fill_(float("nan"))
    with pytest.raises(CalibrationError, match="0.op.weight: the tensor holds NaN"):
        bad.lower()
    with pytest.raises(SchemeError, match=r"0.op.weight: the weights are torch.float16.*float\(\)"):
        copy.deepcopy(m).half().lower()
    with pytest.raises(SchemeError, match=r"compiled model stays float32; call m.float\(\)"):
        copy.deepcopy(m).half().reference(data())


def test_an_operation_without_an_onnx_form_is_refused_by_name() -> None:
    model = nn.LSTM(4, 4, batch_first=True)
    with pytest.raises((LoweringError, TraceError), match="(?i)lstm"):
        fxq.compile(model, calibration=[data(2, 5, 4)]).lower()


# ---------------------------------------------------------------- odd, but valid

VALID: dict[str, tuple[Make, Make]] = {
    "a dead channel": (lambda: changed(lambda m: (m[0].weight[2].zero_(), m[0].bias[2].zero_())), data),
    "a dead layer": (lambda: changed(lambda m: (m[3].weight.zero_(), m[3].bias.zero_())), data),
    "all weights zero": (lambda: changed(lambda m: [p.zero_() for p in m.parameters()]), data),
    "denormal weights": (lambda: changed(lambda m: [p.mul_(1e-41) for p in m.parameters()]), data),
    "huge weights": (lambda: changed(lambda m: m[0].weight.mul_(1e30)), data),
    "constant zero": (net, lambda: torch.zeros(4, 3, 12, 12)),
    "constant one": (net, lambda: torch.ones(4, 3, 12, 12)),
    "constant negative": (net, lambda: torch.full((4, 3, 12, 12), -7.0)),
    "constant denormal": (net, lambda: torch.full((4, 3, 12, 12), 1e-41)),
    "an outlier": (net, lambda: torch.where(torch.arange(12) == 3, 1e30, data())),
    "only positive": (net, lambda: data().abs() + 1),
    "zero variance": (lambda: changed(lambda m: m[1].running_var.zero_()), data),
}


@pytest.mark.parametrize("scheme", ["iao_w8a8", "iao_w8a8_asymw", "iao_w4a8"])
@pytest.mark.parametrize("case", VALID)
def test_odd_values_compile_and_are_proven(case: str, scheme: str) -> None:
    make, calibration = VALID[case]
    m = fxq.compile(make(), scheme, calibration=calibration())
    artifact = m.lower()
    scales = [numpy_helper.to_array(t) for t in onnx.load_from_string(artifact.data).graph.initializer if t.name.endswith("_scale")]
    assert len(scales) > 5 and all(np.isfinite(s).all() and (s >= np.finfo(np.float32).tiny).all() for s in scales)
    for x in (calibration(), data(3)):
        proof = m.verify(artifact, x)
        assert proof.ok and proof.differ == 0 and proof.hidden_differ == 0, str(proof)
    assert bool(torch.isfinite(m(data())).all())


def test_weights_whose_inputs_have_no_usable_moments_are_rounded_to_nearest_with_a_reason() -> None:
    make, calibration = VALID["an outlier"]
    m = fxq.compile(make(), "iao_w4a8", calibration=calibration())
    reasons = [s.why for s in m.history["round-weights"].skips]
    assert reasons and all(why.endswith("the weights are rounded to nearest") for why in reasons)


# ---------------------------------------------------------------- files


def test_files_that_cannot_be_written_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact("onnx-qdq", b"x" * 100)
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("there", r"the file exists\. Pass force=True \(--force\)"), ("folder", r"folder: it is a folder\. Give the name"), ("", "it is a folder"),
        ("no/m.onnx", r"cannot write: No such file.*Check that the folder exists"), ("there/m.onnx", "cannot write"), ("a\0b", "cannot write"),
        ("a" * 300, "cannot write: File name too long"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=text):
            artifact.save(name)
    with pytest.raises(ArtifactError, match="it is a folder"):
        artifact.save("folder", force=True)
    assert sorted(os.listdir()) == ["folder", "there"] and Path("there").read_bytes() == b"mine"
    assert artifact.save("there", force=True).read_bytes() == artifact.data
    assert artifact.save("plain.onnx").read_bytes() == artifact.data  # a path without a folder


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file_and_no_temporary_one(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fail(fd: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ArtifactError):
        Artifact("onnx-qdq", b"new").save(path, force=True)
    assert os.listdir(tmp_path) == ["m.onnx"] and path.read_bytes() == b"old"


def test_files_that_cannot_be_verified(tmp_path: Path) -> None:
    m = fxq.compile(net(), calibration=data())
    raw = m.lower().data
    for i, (content, text) in enumerate([
        (raw[:700], "not a whole ONNX file.*Lower the model again"), (raw[:-1], "not a whole ONNX file"), (b"", "not a whole ONNX file"),
        (b"hello", "not a whole ONNX file"),
    ]):  # fmt: skip
        path = tmp_path / f"{i}.onnx"
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{i}.onnx: {text}"):
            m.verify(path, data())
    with pytest.raises(ArtifactError, match=r"no.onnx: cannot be read: No such file or directory\. Check the path"):
        m.verify(tmp_path / "no.onnx", data())
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        m.verify(tmp_path, data())
    other = fxq.compile(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), calibration=data())
    with pytest.raises(ArtifactError, match="belongs to another model; lower this one"):
        m.verify(other.lower(), data())


def test_the_same_architecture_with_other_weights_is_found() -> None:
    m = fxq.compile(net(), calibration=data())
    other = fxq.compile(changed(lambda model: model[3].weight.mul_(-1)), calibration=data())
    proof = m.verify(other.lower(), data())
    assert not proof.ok and proof.first is not None and str(proof).splitlines()[-1].startswith("not proven: the first node that differs is 3: ")


def test_data_that_does_not_fit_the_file() -> None:
    m = fxq.compile(net(), calibration=data())
    artifact = m.lower()
    for x, text in (
        (data()[:, :2], "the runtime refuses the inputs.*Check the shapes"), (data(2, 3, 9, 9), "the runtime refuses the inputs"),
        ([], "the data to verify with is empty"), (data()[:0], "the data to verify with is empty|batch 0 is empty"), (None, "cannot be iterated"),
        (data() * float("nan"), "holds NaN or infinity"),
    ):  # fmt: skip
        with pytest.raises((ArtifactError, CalibrationError), match=text):
            m.verify(artifact, x)
    for n in (1, 5):
        assert m.verify(artifact, data(n)).ok  # another batch size than in calibration


def test_functional_use_of_interpolate_with_an_odd_size_is_still_proven() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.relu(self.a(x))
            return y, F.interpolate(self.b(y), size=(17, 23), mode="bilinear", align_corners=False)

    torch.manual_seed(0)
    m = fxq.compile(Up().eval(), calibration=data())
    proof = m.verify(m.lower(), data(4))
    assert proof.ok and [o.exact for o in proof.outputs] == [True, False] and proof.outputs[0].differ == 0
    assert "1 output behind float operations" in str(proof)
