"""A loaded archive holds the very layers, parameters, flags and annotations of the model that was written; its proof; files that ask for more than they are."""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import archived, graph_slim
from fxq.archive import encoder
from fxq.archive_items import MARKS
from fxq.compiled import CompiledModel
from fxq.errors import ArchiveError, ArtifactError
from fxq.graph_json_rules import INNER, META
from fxq.shared import SharedWeight
from tests.test_archived import bits
from tests.test_random_graphs import RandomNet


def plain(v: Any) -> Any:
    if isinstance(v, Tensor):
        return str(v.dtype), tuple(v.shape), v.requires_grad, isinstance(v, nn.Parameter), bits(v)
    if isinstance(v, (tuple, list)):
        return type(v).__name__, [plain(x) for x in v]
    return {k: plain(x) for k, x in v.items()} if isinstance(v, dict) else "module" if isinstance(v, nn.Module) else repr(v)


def layers(m: CompiledModel) -> dict[str, nn.Module]:
    found = {}
    for n in m.graph_module.graph.nodes:
        if n.op == "call_module":
            found.update(m.graph_module.get_submodule(str(n.target)).named_modules(prefix=str(n.target)))
    return found


def ties(m: CompiledModel) -> list[list[int]]:
    """Which parameters and codes are one object."""
    seen: dict[int, int] = {}
    tensors = ([*x._parameters.values(), *(b for k, b in x._buffers.items() if k == "codes")] for x in layers(m).values())
    return [[seen.setdefault(id(t), len(seen)) for t in some if t is not None] for some in tensors]


def described(m: CompiledModel) -> Any:
    """All that a loaded model must have of the original; weights of quantized layers count by their shape, they are what their codes say."""
    found: dict[str, Any] = {}
    for path, x in layers(m).items():
        attributes = {k: plain(v) for k, v in vars(x).items() if k not in INNER and k not in MARKS}
        parameters = [(k, None if p is None else (p.shape, p.requires_grad) if k == "weight" else plain(p)) for k, p in x._parameters.items()]
        found[path] = type(x), x.training, attributes, parameters, plain(x._buffers), list(x._modules), x._non_persistent_buffers_set
    nodes = [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs), {k: plain(n.meta[k]) for k in META if k in n.meta}) for n in m.graph_module.graph.nodes]
    return found, nodes, ties(m), repr(m.graph_module.meta["grids"]), m.graph_module.training


def check(m: CompiledModel, x: Tensor, path: Path, coding: str = "auto") -> CompiledModel:
    artifact = m.eval().lower("archive", coding=coding)
    again = fxq.load(artifact.save(path / "m.fxq", force=True))
    assert os.path.getsize(path / "m.fxq") == artifact.info["archive"]["total"]["file"]
    assert described(again) == described(m)
    assert again.lower("archive", coding=coding).data == artifact.data
    with torch.no_grad():
        assert plain(again(x)) == plain(m(x))
    return again


SOME: list[tuple[str, dict[str, Any]]] = [
    ("iao_w8a8", {}), ("deepcomp_w5", {}), ("float", {}), ("weight_only_w8", {"share": fxq.Share(3)}), ("iao_w8a8", {"portable": True}), ("xnor_w1a1", {}),
    ("deepcomp_w5", {"prune": fxq.Prune(sparsity=0.6)}), ("weight_only_w4_b32", {"skip": (0,)}), ("iao_w8a8", {"share": fxq.Share(4)}),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(9))
def test_random_nets_come_back_whole(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    x, (name, options) = torch.randn(2, 3, 16, 16), SOME[seed]
    m = fxq.compile(RandomNet(seed).eval(), name, calibration=x, progress=False, **options)
    check(m, x, tmp_path, encoder.CODINGS[seed % 4])


class Shared(nn.Module):
    """One module called twice behind other batch norms, another one with the same weight, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.e, self.frozen = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.e.weight = self.c.weight
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.one, self.two):
            nn.init.uniform_(norm.weight, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(self.two(self.e(F.relu(self.c(F.relu(self.one(self.c(x))))))))
        return y


class Equal(nn.Module):
    """Two layers that are not one but have the same few values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            for k, layer in enumerate((self.a, self.b)):
                layer.weight.copy_((torch.arange(64).reshape(8, 8) * (k + 1)) % 3 - 1.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return y


@pytest.mark.parametrize("coding", ["auto", "raw"])
@pytest.mark.parametrize("options", [{"name": "deepcomp_w5"}, {"name": "iao_w8a8", "share": fxq.Share(4)}])
@pytest.mark.parametrize(("build", "size"), [(Shared, (1, 4, 6, 6)), (Equal, (2, 8))])
def test_what_was_one_parameter_is_one_and_what_was_two_are_two(
    build: type[nn.Module], size: tuple[int, ...], options: dict[str, Any], coding: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(size)
    m = fxq.compile(build().eval(), options["name"], calibration=x, progress=False, share=options.get("share"))
    again = check(m, x, tmp_path, coding)
    books = [q.book for q in layers(again).values() if isinstance(q, SharedWeight)]
    assert len(books) > 1 and len({id(b) for b in books}) == len({id(q.book) for q in layers(m).values() if isinstance(q, SharedWeight)})


@pytest.fixture(scope="module")
def pair() -> tuple[CompiledModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    return fxq.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), calibration=x, progress=False), x


def test_an_archive_is_proven_bit_for_bit(pair: tuple[CompiledModel, Tensor], tmp_path: Path) -> None:
    m, x = pair
    artifact = m.lower("archive")
    proof = m.verify(artifact, [x, x])
    assert proof.ok and proof.batches == 2 and proof.differ == 0 and proof.elements > 2 * x.numel() and "same bits" in str(proof)
    assert m.verify(artifact.save(tmp_path / "m.fxq"), x).to_json()["ok"]
    made = archived.to_items(m)
    items = [encoder.Plain(i.name, i.array + 1, i.dtype, i.role) if i.name == "2.bias" and isinstance(i, encoder.Plain) else i for i in made.items()]
    moved = m.verify(encoder.write(items, made.head)[0], x)
    assert not moved.ok and moved.first == next(n.name for n in m.graph_module.graph.nodes if n.target == "2") and "NOT the same" in str(moved)
    m.graph_module.get_submodule("0").train()
    modes = [q.training for q in m.modules()]
    assert m.verify(artifact, x).ok and [q.training for q in m.modules()] == modes and any(modes)
    m.eval()
    other = fxq.compile(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), calibration=x, progress=False)
    with pytest.raises(ArtifactError, match="it holds another graph. This file belongs to another model"):
        other.verify(artifact, x)
    with pytest.raises(ArchiveError, match="cut off|do not fit"):
        m.verify(artifact.data[:-9], x)


def test_a_model_in_train_mode_is_proven_in_eval_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    m = fxq.compile(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LeakyReLU()).eval(), "float", example=x, progress=False)
    convs = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)).eval()
    p = fxq.prune(convs, fxq.Prune(ratio=0.5, multiple_of=1), progress=False, example=torch.randn(2, 3, 4, 4))
    for model, data in ((m, x), (p, torch.randn(2, 3, 4, 4))):
        artifact = model.lower("archive")
        model.train()
        assert model.verify(artifact, data).ok


def written(path: Path, graph: Any, small: Any = (), items: Any = ()) -> Path:
    head = {"kind": "compiled", "scheme": {"name": "float"}, "target": "onnxruntime", "graph": {"name": "m", **graph}, "small": list(small)}
    path.write_bytes(encoder.write(items, head)[0])
    return path


LONG = [0] * 20000
IDENTITY = {"class": "torch.nn.modules.linear.Identity", "has": {"a.x": LONG}}
GRAPHS = {
    "meta": {"nodes": [{"to": f"x{i}", "op": "placeholder", **({} if i else {"meta": {"shape": LONG}})} for i in range(500)]},
    "attributes": {"templates": [IDENTITY], "modules": {f"m{i}": 0 for i in range(500)}, "nodes": []},
    "grids": {"nodes": [], "grids": {f"g{i}": {} if i else {"bounds": LONG} for i in range(500)}},
}


@pytest.mark.parametrize("what", GRAPHS)
def test_what_is_written_once_is_counted_as_often_as_it_stands_there(what: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.fxq", GRAPHS[what])
    assert path.stat().st_size < 20000
    with pytest.raises(ArchiveError, match="its graph has more than 2,097,152 values"):
        fxq.load(path)


def test_a_graph_that_could_not_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch, pair: tuple[CompiledModel, Tensor]) -> None:
    monkeypatch.setattr(graph_slim, "MOST", 40)
    with pytest.raises(ArtifactError, match="its graph has more than 40 values"):
        archived.to_items(pair[0])


BLOCKS = [["I8", [1, 1], "00"], ["F32", [1, 1], "00000000"], ["I32", [1 << 16, 1], "00000000"], {"blocks": [0, 1, 2, "s4/pb32x1"]}]
ASKED: list[tuple[Any, Any, str]] = [
    ([["F32", [1] + [(1 << 62) + 1] * 20000, "00000000"]], 0, "the small tensor 0 does not fit its shape"),
    ([["F32", [1] * 33, "00000000"]], 0, "the small tensor 0 does not fit its shape"),
    ([["F64", [1], "00" * 8], {"table": ["/w", 0, None, 0]}], 1, "the codes of the small tensor 1 do not fit its table"),
    ([["F32", [1], "00" * 4], {"table": ["/w", 0, None, 0]}], 1, "need more memory than its size explains"),
    (BLOCKS, 3, "the zeros of the small tensor 3 do not fit"),
]


@pytest.mark.parametrize(("small", "ref", "text"), ASKED)
def test_small_tensors_are_refused_before_they_are_made(small: Any, ref: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [encoder.Plain("w", torch.zeros(1 << 25, dtype=torch.uint8).numpy())] if "/w" in json.dumps(small) else []
    path = written(tmp_path / "m.fxq", {"nodes": [], "tensors": {"t": ref}}, small, items)
    monkeypatch.setattr("fxq.archive_graph.lookup", lambda *_: pytest.fail("it was made"))
    with pytest.raises(ArchiveError, match=text):
        fxq.load(path)


def test_a_blob_that_is_asked_for_again_and_again_counts_again_and_again(tmp_path: Path) -> None:
    w = encoder.Factored("w", torch.randint(0, 250, (1 << 20,), dtype=torch.uint8).numpy(), torch.arange(250.0).numpy(), scale=torch.ones(1).numpy())
    path = written(tmp_path / "m.fxq", {"nodes": [], "tensors": {f"t{i}": "/w:scale" for i in range(99)}}, items=[w])
    with pytest.raises(ArchiveError, match="need more memory than its size explains"):
        fxq.load(path, max_bytes=20 << 20)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (fxq.load, fxq.load_state_dict, archived.inspect):
        with pytest.raises(ArtifactError, match="pipe"):
            read(tmp_path / "pipe")


def test_many_modules_load_in_linear_time(pair: tuple[CompiledModel, Tensor], tmp_path: Path) -> None:
    """Every module's mode is set once: the dictionary of them is made once, not for each."""
    def calls(n: int) -> int:
        made, seen = archived.to_items(pair[0]), [0]
        head = copy.deepcopy(made.head)
        head["graph"]["templates"].append({"class": "torch.nn.modules.linear.Identity"})
        head["graph"]["modules"].update({f"m{i}": len(head["graph"]["templates"]) - 1 for i in range(n)})
        (tmp_path / "m.fxq").write_bytes(encoder.write(made.items(), json.loads(json.dumps(head)))[0])
        sys.setprofile(lambda frame, event, arg: seen.__setitem__(0, seen[0] + (event == "call")))
        try:
            fxq.load(tmp_path / "m.fxq")
        finally:
            sys.setprofile(None)
        return seen[0]

    few, some, many = calls(10), calls(500), calls(2000)
    assert many - few < 5 * (some - few)
