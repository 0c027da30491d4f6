"""Archives of models and of plain tensors: what comes back is what was written, bit for bit; what a hostile index asks for is refused."""

import hashlib
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
from torch import Tensor, nn

import fxq
from fxq import archived, graph_json, graph_slim, schemes, zoo
from fxq.archive import encoder
from fxq.archive.decoder import Archive
from fxq.compiled import CompiledModel
from fxq.errors import ArchiveError, ArtifactError, LoweringError
from fxq.modules import Quantized
from fxq.pruned import PrunedModel
from fxq.shared import SharedWeight
from tests.lowbit_nets import Net, X, trained

DATA = Path(__file__).parent / "data"
IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net(), X).eval()


def compiled(name: str = "iao_w8a8", **options: Any) -> CompiledModel:
    target = "sm89" if name.startswith("fp8") else "onnxruntime"
    return fxq.compile(net(), name, calibration=X, target=target, progress=False, **options)


def there_and_back(m: CompiledModel, path: Path, **options: Any) -> CompiledModel:
    return fxq.load(m.lower("archive", **options).save(path / "m.fxq", force=True))


def same(m: CompiledModel, again: CompiledModel, *x: Any) -> bool:
    with torch.no_grad():
        a, b = m.eval()(*x), again(*x)
    return bool(a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("name", schemes.names())
def test_every_scheme_comes_back(name: str, tmp_path: Path) -> None:
    m = compiled(name)
    again = there_and_back(m, tmp_path)
    assert type(again) is CompiledModel and not again.training and again.scheme == m.scheme and again.target == m.target
    assert same(m, again, X) and str(again.float_ops) == str(m.float_ops)
    assert again.lower("archive").data == m.lower("archive").data
    assert again.lower("onnx-qdq").data == m.lower("onnx-qdq").data
    assert [s.name for s in again.history] == ["load"] and again.history["load"].text == m.history.snapshots[-1].text


@pytest.mark.parametrize("coding", encoder.CODINGS)
@pytest.mark.parametrize("name", ["deepcomp_w5", "iao_w8a8", "weight_only_w8"])
def test_every_coding_gives_the_same_model(name: str, coding: str, tmp_path: Path) -> None:
    m = compiled(name)
    assert same(m, there_and_back(m, tmp_path, coding=coding), X)
    used = {r.coding for r in archived.inspect(tmp_path / "m.fxq").records}
    assert coding in used or coding == "auto"
    assert used <= {"raw"} if coding == "raw" else used <= {coding, "raw"} or coding == "auto"


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(image_size=64, patch_size=16, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=32)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("build", "name"), [(zoo.nin_gc, "iao_w8a8"), (vit, "weight_only_w4_b32")])
def test_larger_nets(build: Callable[[], nn.Module], name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = IMAGE if build is vit else IMAGE[..., :32, :32]
    m = fxq.compile(build().eval(), name, calibration=x, progress=False)
    again = there_and_back(m, tmp_path)
    assert same(m, again, x) and again.lower().data == m.lower().data and again.lower("archive").data == m.lower("archive").data


class Tied(nn.Module):
    """A layer that is called twice behind different batch norms, an embedding tied to the output layer, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.out = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.out.weight = self.emb.weight
        self.conv, self.one, self.two = nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        self.register_buffer("k", torch.arange(16.0) / 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.emb(x) * self.k
        y = F.relu(self.two(self.conv(F.relu(self.one(self.conv(y))))))
        return self.out(self.fc(F.relu(self.fc(y))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["float", "iao_w8a8", "weight_only_w8", "deepcomp_w5"])
def test_weights_that_were_one_are_one(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 40, (2, 5))
    plain = Tied()
    with torch.no_grad():
        for norm in (plain.one, plain.two):
            norm.weight.uniform_(0.5, 2)
    m = fxq.compile(plain.eval(), name, calibration=x, progress=False)
    again = there_and_back(m, tmp_path)
    assert same(m, again, x) and again.lower("archive").data == m.lower("archive").data
    live = {id(p) for n in m.graph_module.graph.nodes if n.op == "call_module" for p in m.graph_module.get_submodule(str(n.target)).parameters()}
    assert len({id(p) for p in again.parameters()}) == len(live)
    state = fxq.load_state_dict(tmp_path / "m.fxq")
    assert torch.equal(state["fc.weight"], state["fc_1.weight"]) and state["out.weight"].shape == state["emb.weight"].shape
    assert torch.equal(state["out.weight"], state["emb.weight"]) or name == "deepcomp_w5"  # the embedding keeps its weights


def test_a_weight_that_a_float_layer_reads_too_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    given[2].weight = given[0].weight
    x = torch.randn(4, 8)
    m = fxq.compile(given.eval(), "weight_only_w8", calibration=x, skip=("2",), progress=False)
    q = m.graph_module.get_submodule("0")
    m.graph_module.get_submodule("2").weight = q.op.weight
    again = there_and_back(m, tmp_path)
    assert same(m, again, x) and again.graph_module.get_submodule("2").weight is again.graph_module.get_submodule("0").op.weight


def test_the_names_are_those_of_the_layers(tmp_path: Path) -> None:
    m = compiled()
    state = fxq.load_state_dict(m.lower("archive").save(tmp_path / "m.fxq"))
    assert {"a.weight", "a.bias", "b.weight", "up.weight", "d.weight", "fc.weight", "fc.bias"} <= set(state)
    layers = {path: q for path, q in m.graph_module.named_modules() if isinstance(q, Quantized)}
    for path, q in layers.items():
        grid = q.weight_grid
        assert torch.equal(state[f"{path}.weight"], grid(q.op.weight).detach())
    assert not any(".op." in k or k.startswith("@") for k in state)
    assert {k.rpartition(".")[0] for k in state} == {*layers, "up"}


def test_block_weights_have_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    m = fxq.compile(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), "weight_only_w4_b32", example=torch.randn(2, 64), progress=False)
    artifact = m.lower("archive")
    state = fxq.load_state_dict(artifact.save(tmp_path / "m.fxq"))
    q = m.graph_module.get_submodule("0")
    assert isinstance(q, Quantized) and torch.equal(state["0.weight"], q.weight_grid(q.op.weight).detach())
    assert set(state) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    (row,) = (r for r in artifact.info["archive"]["rows"] if r["name"] == "@0.weight")
    assert row["dense"] == 4 * 64 * 8  # its codes stand for float32 weights


CODE = """
import sys, torch, fxq
d = torch.load(sys.argv[2], weights_only=True)
m = fxq.load(sys.argv[1])
assert torch.equal(m(d["x"]), d["y"]) and "mine" not in sys.modules
print(len(m.lower().data))
"""


def test_another_process_needs_no_class(tmp_path: Path) -> None:
    m = compiled("deepcomp_w5")
    m.lower("archive").save(tmp_path / "m.fxq")
    torch.save({"x": X, "y": m(X).detach()}, tmp_path / "xy.pt")
    run = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "m.fxq"), str(tmp_path / "xy.pt")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(m.lower().data)


def steps(m: nn.Module) -> None:
    g = torch.Generator().manual_seed(5)
    opt = torch.optim.Adam(m.parameters(), lr=1e-2)  # codebooks of integer layers are in units of their scales
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(m(X), torch.randint(0, 5, (len(X),), generator=g)).backward()
        opt.step()


@pytest.mark.parametrize("options", [{"name": "deepcomp_w5"}, {"name": "iao_w8a8", "share": fxq.Share(4)}])
def test_a_loaded_model_trains_on(options: dict[str, Any], tmp_path: Path) -> None:
    float_net = net()
    with torch.no_grad():
        for m in float_net.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                m.weight[m.weight.abs() < m.weight.abs().median()] = 0
    made = fxq.compile(float_net, options["name"], calibration=X, progress=False, share=options.get("share"))
    m, again = made, there_and_back(made, tmp_path)
    layers = [(p, q) for p, q in again.graph_module.named_modules() if isinstance(q, SharedWeight)]
    assert len(layers) == 6
    books, codes, weights = ([getattr(q, k).detach().clone() for _, q in layers] for k in ("book", "codes", "weight"))
    steps(again.train())
    steps(m.train())
    for (path, q), book, code, weight in zip(layers, books, codes, weights, strict=True):
        assert not torch.equal(q.book, book) and torch.equal(q.codes, code) and bool((q.codes == 0).any()), path
        assert torch.equal(q.weight == 0, weight == 0) and len(q.weight.unique()) <= len(weight.unique()) + 1, path
    assert same(m, again.eval(), X)  # as the one that was never written
    third = there_and_back(again, tmp_path)
    assert same(again, third, X)


def test_float_weights_of_integer_layers_train_on(tmp_path: Path) -> None:
    m = compiled()
    again = there_and_back(m, tmp_path)
    before = [p.detach().clone() for p in again.parameters()]
    steps(again.train())
    assert any(not torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))
    assert same(again.eval(), there_and_back(again, tmp_path), X)


def test_a_pruned_model_comes_back_and_compiles(tmp_path: Path) -> None:
    p = fxq.prune(net(), fxq.Prune(ratio=0.25, multiple_of=2), example=X, progress=False)
    again = there_and_back(p, tmp_path)
    assert type(again) is PrunedModel and same(p, again, X)
    assert any(isinstance(m, nn.BatchNorm2d) for m in again.modules())
    steps(again.train())
    m = fxq.compile(again.eval(), calibration=X, progress=False)
    assert same(m, there_and_back(m, tmp_path), X)
    assert "running_mean" in " ".join(fxq.load_state_dict(p.lower("archive").save(tmp_path / "p.fxq")))


def test_models_that_have_no_archive() -> None:
    q = fxq.compile(net(), mode="qat", calibration=X, progress=False)
    with pytest.raises(LoweringError, match=r"the model is in training. Call convert\(\)"):
        q.lower("archive")

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Any:
            y = self.inner(x)
            return [y.tolist()] if float(y.sum()) > -1e9 else y

    parts = fxq.compile(Branch().eval(), "float", example=torch.randn(2, 4), progress=False)
    with pytest.raises(LoweringError, match=r"captured in 1 parts and has no single graph. Use one part, m.parts\[path\]"):
        parts.lower("archive")


ALL = {
    "half": torch.randn(5, 7).half(), "bf16": torch.randn(3, 4, 5).bfloat16(), "double": torch.randn(9).double(), "bool": torch.rand(33) > 0.5,
    "long": torch.tensor([-(2**62), 0, 2**62]), "int": torch.tensor([[1], [-(2**31)]], dtype=torch.int32), "short": torch.arange(-9, 9, dtype=torch.int16),
    "byte": torch.arange(256, dtype=torch.uint8), "char": torch.arange(-128, 128, dtype=torch.int8), "ushort": torch.tensor([65535], dtype=torch.uint16),
    "uint": torch.tensor([2**32 - 1], dtype=torch.uint32), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5),
    "few": torch.randint(0, 3, (64, 64)).float(),
    "odd": torch.tensor([float("nan"), float("-nan"), 0.0, -0.0, float("inf"), 1e-45]), "ünï/cödé": torch.ones(2), "transposed": torch.randn(4, 6).T,
    "@x": torch.zeros(3), "a:scale": torch.ones(1), "long empty": torch.empty(0, dtype=torch.int64), "scalar bf16": torch.tensor(1.5, dtype=torch.bfloat16),
    "same": torch.full((50, 50), -0.0), "few bf16": torch.randint(0, 3, (64, 64)).bfloat16(),
}  # fmt: skip


def bits(t: Tensor) -> bytes:
    return bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) if t.numel() else b""


@pytest.mark.parametrize("coding", encoder.CODINGS)
def test_plain_tensors_keep_every_bit(coding: str, tmp_path: Path) -> None:
    path = fxq.save_state_dict(ALL, tmp_path / "t.fxq", coding=coding)
    again = fxq.load_state_dict(path)
    assert list(again) == list(ALL)
    for name, t in ALL.items():
        assert again[name].dtype == t.dtype and again[name].shape == t.shape and bits(again[name]) == bits(t), name
        again[name].fill_(1)  # it can be written to
    with pytest.raises(ArchiveError, match=r"t.fxq: it holds plain tensors, no model. Read them with fxq.load_state_dict"):
        fxq.load(path)


def test_tensors_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fxq.save_state_dict({str(i): torch.full((4,), float(i)) for i in range(5)}, tmp_path / "t.fxq")
    decoded: list[str] = []
    dense = Archive.dense
    monkeypatch.setattr(Archive, "dense", lambda self, r: (decoded.append(r.name), dense(self, r))[1])
    pairs = fxq.iter_state_dict(path)
    assert decoded == [] and next(pairs)[0] == "0" and decoded == ["0"]
    assert next(pairs)[0] == "1" and decoded == ["0", "1"]
    pairs.close()


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"a": 1}, "a: a value of type int is no tensor. Leave it out"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "an archive holds no tensor of type torch.complex64"),
        ({"a": torch.ones(2).to_sparse()}, "an archive holds no tensor of type torch.float32, torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "on meta"),
        ({"": torch.ones(2)}, "a tensor has no name"),
    ],
)
def test_what_is_no_tensor_is_refused(tensors: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=text):
        fxq.save_state_dict(tensors, tmp_path / "t.fxq")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = fxq.save_state_dict({"a": torch.ones(2)}, tmp_path / "t.fxq")
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="the file exists"):
        fxq.save_state_dict({"a": torch.zeros(2)}, path)
    assert path.read_bytes() == before
    assert fxq.load_state_dict(fxq.save_state_dict({"a": torch.zeros(2)}, path, force=True))["a"].tolist() == [0, 0]


def test_a_bound_on_memory(tmp_path: Path) -> None:
    m = compiled()
    path = m.lower("archive").save(tmp_path / "m.fxq")
    need = archived.inspect(path).dense
    for read in (fxq.load, fxq.load_state_dict):
        with pytest.raises(ArchiveError, match=r"m.fxq: .*bytes when decoded. Pass max_bytes= if you trust the file"):
            read(path, max_bytes=need - 1)
    with pytest.raises(ArchiveError, match="need more memory than its size explains. Pass max_bytes="):
        fxq.load(path, max_bytes=need)  # scales and zero points come to it
    assert same(m, fxq.load(path, max_bytes=2 * need), X)


def test_slim_is_exact() -> None:
    """Names of tensors become references, flags of training go; all else comes back."""

    def named(v: Any, refs: dict[str, str | int]) -> Any:
        if isinstance(v, dict) and v.get("tensor") in refs and "parameter" in v:
            return {**v, "tensor": refs[v["tensor"]]}
        if isinstance(v, dict):
            return {k: False if k == "training" else named(x, refs) for k, x in v.items()}
        return [named(x, refs) for x in v] if isinstance(v, list) else v

    for name in ("float", "iao_w8a8", "xnor_w1a1_k", "weight_only_w4"):
        w = graph_json.Writer()
        given = w.graph(compiled(name).graph_module)
        refs: dict[str, str | int] = {k: i if i % 3 == 0 else f"/{k}" for i, k in enumerate(w.tensors)}
        short = json.loads(json.dumps(graph_slim.slim(given, refs)))
        again = graph_slim.full(short)
        assert json.dumps(again, sort_keys=True) == json.dumps(named(given, refs), sort_keys=True)
        assert len(json.dumps(short)) < len(json.dumps(given)) / 2


GOLDEN = {
    "model": (
        "6999401696213cf1d116c4b26c80ebb2e40aef2d0d4673f6c810bf7f18d91884",
        "404a1009cb23b56c6dbc643b9e6cd5644c6b64a19a321d37c5a4f365e24b1982",
    ),
    "tensors": (
        "b39c0d9a8b7c97e355835bb03a806e123a690232922f5c38b9331cbbfec9c6d1",
        "331f5129269c88c4777dca02b96b57bb768bca2ace3a08e3b31a9f68cf51cc1e",
    ),
    "huffman": (
        "f1ed54c19477860c36892f42098356634209f6512e5a888a8a25709c1fb71d9b",
        "331f5129269c88c4777dca02b96b57bb768bca2ace3a08e3b31a9f68cf51cc1e",
    ),
}
"""Files of version 1: SHA-256 of the file, and of the names, types, shapes and bytes of its tensors. They never change; later versions of fxq read them."""


@pytest.mark.parametrize("name", GOLDEN)
def test_files_of_version_1_keep_loading(name: str) -> None:
    path = DATA / f"archive_v1_{name}.fxq"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN[name][0]
    state, found = fxq.load_state_dict(path), hashlib.sha256()
    for k, t in state.items():
        found.update(f"{k}{t.dtype}{tuple(t.shape)}".encode() + bits(t))
    assert found.hexdigest() == GOLDEN[name][1]
    assert archived.inspect(path).format == 1 and archived.inspect(path).fxq == "0.1.0"


def test_a_model_of_version_1_computes_what_it_did() -> None:
    m = fxq.load(DATA / "archive_v1_model.fxq")
    y = m(torch.linspace(-1, 1, 108).reshape(1, 3, 6, 6)).detach()
    expected = [0.09698, 0.04613, -0.02738, 0.01271, -0.07211, 0.12611, 0.07583, 0.10857, 0.02411, 0.12536]
    assert torch.allclose(y, torch.tensor([expected]), atol=2e-5)
    layer = m.graph_module.get_submodule("3").op
    assert isinstance(layer, SharedWeight) and len(layer.book) == 16 and 0.2 < float((layer.weight == 0).float().mean()) < 0.9
    assert [n.kind for n in m.history["load"].rows][-2:] == ["linear", "output"] and m.scheme.name == "iao_w8a8"
    assert m.verify(m.lower(), torch.ones(1, 3, 6, 6)).ok


def test_masks_are_no_part_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = net()
    with torch.no_grad():
        for m in given.modules():
            if isinstance(m, nn.Conv2d):
                m.weight[..., 0] = 0  # zeros that pruning did not make
    x = fxq.compile(given, "deepcomp_w5", example=X, prune=fxq.Prune(sparsity=0.05), progress=False)
    again = there_and_back(x, tmp_path)
    names = [r.name for r in archived.inspect(tmp_path / "m.fxq").records]
    assert same(x, again, X) and again.densities == x.densities and not any(n.startswith("@") for n in names)


def test_zoo_net_has_a_small_index(tmp_path: Path) -> None:
    torch.manual_seed(0)
    m = fxq.compile(zoo.resnet20().eval(), "deepcomp_w5", example=torch.randn(1, 3, 32, 32), progress=False)
    info = m.lower("archive").info
    assert info["bytes"]["index"] < 2000, info["bytes"]
