"""fxq.save and fxq.load: the same model without the user's class, and files that want more than that are refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fxq
from fxq import Scheme, zoo
from fxq.compiled import CompiledModel
from fxq.errors import ArtifactError, LoweringError
from fxq.spec import QuantSpec
from fxq.trainable import TrainableModel

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return zoo.tiny_resnet8().eval()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(v, y[k]) if isinstance(v, Tensor) else v == y[k] for k, v in x.items())


def steps(q: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    opt = torch.optim.SGD(q.parameters(), lr=1e-2)
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(q(torch.randn(4, 3, 32, 32, generator=g)), torch.randint(0, 10, (4,), generator=g)).backward()
        opt.step()


NAMES = ["float", "iao_w8a8", "iao_w8a8_sym", "iao_w4a4_lsq", "dorefa_w2a2", "xnor_w1a1", "twn_wta32", "tbn_w1at", "dynamic_w8", "weight_only_w4"]


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_comes_back(name: str, tmp_path: Path) -> None:
    m = fxq.compile(net(), name, calibration=X, progress=False)
    again = fxq.load(fxq.save(m, tmp_path / "m.fxq"))
    with torch.no_grad():
        assert type(again) is CompiledModel and torch.equal(m(X), again(X)) and torch.equal(m.reference(X), again.reference(X))
    assert again.lower().data == m.lower().data and str(again.history) == str(m.history) and again.history.diff("fold-bn") == m.history.diff("fold-bn")
    assert same_state(m, again) and again.scheme == m.scheme and again.target == m.target and str(again.float_ops) == str(m.float_ops)
    assert again.verify(again.lower(), X).ok


@pytest.mark.parametrize("name", ["iao_w8a8", "iao_w8a8_lsq", "dorefa_w4a4_pact", "xnor_w1a1", "tbn_w1at", "iao_w8a8_plain"])
def test_training_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    q = fxq.compile(net(), name, mode="qat", calibration=X, progress=False).train()
    assert isinstance(q, TrainableModel)
    q.freeze_batch_norm(after=3)  # one step after the file is read
    steps(q, 1)
    again = fxq.load(fxq.save(q, tmp_path / "q.fxq"))
    assert isinstance(again, TrainableModel) and again.training and again.phase == "qat"
    for model in (q, again):
        steps(model, 2)
    assert same_state(q, again)
    assert q.batch_norm_frozen and again.batch_norm_frozen
    frozen = fxq.load(fxq.save(q.freeze(), tmp_path / "frozen.fxq"))
    for model in (q, frozen):
        steps(model, 3)
    assert isinstance(frozen, TrainableModel) and frozen.phase == "qaft" and same_state(q, frozen)
    with torch.no_grad():
        assert torch.equal(frozen.convert()(X), frozen(X))


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [torchvision.models.mobilenet_v3_small, torchvision.models.shufflenet_v2_x0_5, vit])
def test_nets_of_torchvision(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    m = fxq.compile(build().eval(), calibration=x, progress=False)
    again = fxq.load(fxq.save(m, tmp_path / "m.fxq"))
    with torch.no_grad():
        assert torch.equal(m(x), again(x))
    assert again.lower().data == m.lower().data


def test_another_process_needs_no_class(tmp_path: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x)) + 1  # type: ignore[no-any-return]

    x = torch.randn(4, 3)
    m = fxq.compile(Mine().eval(), calibration=x, progress=False)
    fxq.save(m, tmp_path / "m.fxq")
    torch.save({"x": x, "y": m(x).detach()}, tmp_path / "xy.pt")
    code = "import sys, torch, fxq; d = torch.load(sys.argv[2], weights_only=True); assert torch.equal(fxq.load(sys.argv[1])(d['x']), d['y'])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.fxq"), str(tmp_path / "xy.pt")], check=True, timeout=120)


def test_a_scheme_of_ones_own(tmp_path: Path) -> None:
    scheme = Scheme("mine", "static", QuantSpec.parse("s8n/pc0"), QuantSpec.parse("u8/pt"), summary="not registered")
    m = fxq.compile(net(), scheme, calibration=X, progress=False)
    assert fxq.load(fxq.save(m, tmp_path / "m.fxq")).scheme == scheme


def test_what_no_file_can_hold(tmp_path: Path) -> None:
    class Leaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    m = fxq.compile(nn.Sequential(nn.Conv2d(3, 4, 1), Leaf()), calibration=X, leaf_modules=(Leaf,), progress=False)
    with pytest.raises(ArtifactError, match="^1: tests.*Leaf is no class of torch.nn or fxq, so a file cannot hold it. Capture it too"):
        fxq.save(m, tmp_path / "m.fxq")
    with pytest.raises(ArtifactError, match="Conv2d is no compiled model"):
        fxq.save(nn.Conv2d(3, 4, 1), tmp_path / "m.fxq")  # type: ignore[arg-type]
    ok = fxq.compile(nn.Conv2d(3, 4, 1), calibration=X, progress=False)
    from dataclasses import replace

    ok.target = replace(ok.target, name="mine")
    with pytest.raises(LoweringError, match="the target 'mine' is not registered"):
        fxq.save(ok, tmp_path / "m.fxq")
    assert list(tmp_path.iterdir()) == []


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    with safe_open(path, "pt") as f:  # type: ignore[no-untyped-call]
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    head = json.loads(meta["model"])
    edit(head)
    out = path.with_name("edited.fxq")
    save_file(tensors, out, {**meta, "model": json.dumps(head)})
    return out


def module(head: dict[str, Any], name: str) -> Any:
    return head["graph"]["modules"][name]


def node(head: dict[str, Any]) -> Any:
    return head["graph"]["nodes"][1]


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda h: module(h, "0").update({"class": "subprocess.Popen"}), "the class 'subprocess.Popen', which no file may hold"),
        (lambda h: module(h, "0").update({"class": "torch.nn.modules.container.os"}), "which no file may hold"),
        (lambda h: module(h, "0").update({"class": "fxq.compiled.CompiledModel"}), "which no file may hold"),
        (lambda h: module(h, "0")["attributes"].update(forward=1), "sets the attribute 'forward'"),
        (lambda h: module(h, "0")["attributes"].update(__class__=1), "sets the attribute '__class__'"),
        (lambda h: module(h, "0")["attributes"].update(_forward_hooks={"dict": {}}), "sets the attribute '_forward_hooks'"),
        (lambda h: node(h).update(op="call_function", target="torch.load"), "the function 'torch.load', which no file may hold"),
        (lambda h: node(h).update(op="call_function", target="os.system"), "which no file may hold"),
        (lambda h: node(h).update(op="call_function", target="torch.os.system"), "which no file may hold"),
        (lambda h: node(h).update(op="call_method", target="__reduce_ex__"), "the method '__reduce_ex__'|graph is damaged"),
        (lambda h: node(h).update(op="call_method", target="numpy_"), "the method 'numpy_', which is none that computes on a tensor"),
        (lambda h: h["graph"]["nodes"][0].update(target="x=print(1)"), "its target 'x=print"),
        (lambda h: h["graph"]["nodes"][0].update(target="class"), "its target 'class' is no name"),
        (lambda h: node(h).update(kwargs={"dict": {"x=print(1), y": 1}}), "it has the argument 'x=print"),
        (lambda h: (h["graph"]["modules"].update({'0")(print(1),"': module(h, "0")}), node(h).update(target='0")(print(1),"')), "is no name of a module"),
        (lambda h: node(h).update(args={"eval": "1"}), "an argument of a node is a 'eval'"),
        (lambda h: node(h).update(target="nowhere"), "its graph is damaged|does not reference"),
        (lambda h: h["graph"]["nodes"].append(h["graph"]["nodes"][1]), "two nodes are called"),
        (lambda h: h.pop("scheme"), "its header is damaged"),
        (lambda h: h.update(version=99), "has version 99, this fxq reads up to 2. Update fxq"),
    ],
)  # fmt: skip
def test_files_that_want_more_are_refused(edit: Callable[[dict[str, Any]], None], text: str, tmp_path: Path) -> None:
    m = fxq.compile(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), "float", example=X, progress=False)
    path = edited(fxq.save(m, tmp_path / "m.fxq"), edit)
    with pytest.raises(ArtifactError, match=text):
        fxq.load(path)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    m = fxq.compile(nn.Conv2d(3, 4, 1).eval(), "float", example=X, progress=False)
    path = fxq.save(m, tmp_path / "m.fxq")
    with pytest.raises(ArtifactError, match="the file exists"):
        fxq.save(m, path)
    assert fxq.save(m, path, force=True) == path
    (tmp_path / "short.fxq").write_bytes(path.read_bytes()[:-3])
    save_file({"a": torch.ones(1)}, tmp_path / "other.fxq")
    for name, text in (("short", "cannot be read"), ("other", "is no model of fxq"), ("missing", "cannot be read")):
        with pytest.raises(ArtifactError, match=f"{name}.fxq: {text}"):
            fxq.load(tmp_path / f"{name}.fxq")


def test_a_file_of_version_1_comes_back(tmp_path: Path) -> None:
    m = fxq.compile(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), "float", example=X, progress=False)

    def older(head: dict[str, Any]) -> None:
        head["version"] = 1
        head["history"] = [[s.name, s.text, s.rewrites, s.nodes, s.ms, s.moved, [[k.node, k.why] for k in s.skips]] for s in m.history]

    again = fxq.load(edited(fxq.save(m, tmp_path / "m.fxq"), older))
    assert [s.text for s in again.history] == [s.text for s in m.history] and str(again.history) == str(m.history)
    assert [r.name for r in again.history["trace"].rows] == [r.name for r in m.history["trace"].rows]
