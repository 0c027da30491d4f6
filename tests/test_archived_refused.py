"""Archives whose index asks for what no file may have, damaged ones and foreign ones: always one error, with file, fact and way out."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq import archived
from fxq.archive import encoder
from fxq.compiled import CompiledModel
from fxq.errors import ArchiveError
from tests.test_archived import same


def remade(m: CompiledModel, edit: Callable[[Any], Any], path: Path) -> Path:
    """The archive of a model with an edited index; its checksum is right."""
    made = archived.to_items(m)
    head = json.loads(json.dumps(made.head))
    edit(head)
    path.write_bytes(encoder.write(made.items(), head, version=fxq.__version__)[0])
    return path


SEQ = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 40, 1)).eval()


@pytest.fixture(scope="module")
def small() -> CompiledModel:
    torch.manual_seed(0)
    return fxq.compile(copy.deepcopy(SEQ), calibration=torch.randn(2, 3, 8, 8), progress=False)


def product(head: Any) -> Any:
    (entry,) = (e for e in head["small"] if isinstance(e, dict) and "product" in e)
    return entry


def listed(head: Any) -> Any:
    return next(e for e in head["small"] if isinstance(e, list))


def many(head: Any) -> None:
    head["small"].append(["U8", [1 << 20], "00"])
    head["graph"].update(tensors={f"x{i}": len(head["small"]) - 1 for i in range(200)})


HOSTILE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda h: h.update(kind="trainable"), "a model of the unknown kind 'trainable'. Update fxq"),
    (lambda h: h.update(target="nowhere"), "unknown target"),
    (lambda h: h.pop("scheme"), "its graph is damaged: KeyError"),
    (lambda h: h["scheme"].update(name=5), "."),
    (lambda h: h["scheme"].update(method="evil"), "unknown method"),
    (lambda h: h["scheme"].update(evil=1), "."),
    (lambda h: h.pop("graph"), "KeyError"),
    (lambda h: h.update(graph=[]), "damaged"),
    (lambda h: h["graph"]["templates"][0].update({"class": "subprocess.Popen"}), "the class 'subprocess.Popen', which no file may hold"),
    (lambda h: h["graph"]["templates"].clear(), "its graph is damaged: IndexError"),
    (lambda h: h["graph"]["templates"][0].setdefault("has", {}).update({"a.forward": 1}), "sets the attribute 'forward'"),
    (lambda h: h["graph"]["nodes"].append({"to": "os.system", "op": "call_function"}), "which no file may hold"),
    (lambda h: h["graph"]["nodes"].insert(0, {"to": "x=print(1)", "op": "placeholder", "name": "y"}), "is no name"),
    (lambda h: h["graph"]["nodes"].append({"to": "0", "args": {"node": "nowhere"}}), "damaged"),
    (lambda h: h["graph"]["nodes"].insert(1, {"not": ["shape"], "to": "0"}), "damaged"),
    (lambda h: h["graph"].update(grids={"x": {"spec": 1}}), "."),
    (lambda h: h["graph"].update(tensors={"x": "/nowhere"}), "it names the tensor '/nowhere', which is not there"),
    (lambda h: h["graph"].update(tensors={"x": "/0.weight:evil"}), "it names the tensor '/0.weight:evil'"),
    (lambda h: h["graph"].update(tensors={"x": "/0.bias:symbols"}), "is stored raw: it has neither table nor symbols"),
    (lambda h: h["graph"].update(tensors={"x": "/0.weight:zero"}), "it has no zero"),
    (lambda h: h["graph"].update(tensors={"x": 99}), "it names the small tensor 99, which is not there"),
    (lambda h: h["graph"].update(tensors={"x": -1}), "it names the small tensor -1"),
    (lambda h: h["graph"].update(tensors={"x": {"a": 1}}), "names no tensor"),
    (lambda h: product(h).update(product=[h["small"].index(product(h)), 0]), "it names the small tensor"),
    (lambda h: product(h).update(product=["/0.weight", "/2.bias"]), "the factors of the small tensor .* do not fit"),
    (lambda h: product(h).update(product=[0]), "damaged"),
    (lambda h: listed(h).__setitem__(0, "F99"), "KeyError"),
    (lambda h: listed(h).__setitem__(1, [1 << 21]), "does not fit its shape"),
    (lambda h: listed(h).__setitem__(1, [-1]), "does not fit its shape"),
    (lambda h: listed(h).__setitem__(1, [3]), "."),
    (lambda h: listed(h).__setitem__(2, "zz"), "ValueError"),
    (lambda h: many(h), "need more memory than its size"),
]


@pytest.mark.parametrize(("edit", "text"), HOSTILE)
def test_an_index_that_wants_more_is_refused(small: CompiledModel, edit: Callable[[Any], Any], text: str, tmp_path: Path) -> None:
    path = remade(small, edit, tmp_path / "m.fxq")
    with pytest.raises(ArchiveError, match=text) as e:
        fxq.load(path)
    assert str(path) in str(e.value) and len(str(e.value).splitlines()) == 1 and e.value.way_out


def test_templates_do_not_multiply(small: CompiledModel, tmp_path: Path) -> None:
    def edit(head: Any) -> None:
        g = head["graph"]
        g["templates"].append({"class": "torch.nn.modules.activation.ReLU", "has": {f"a.x{i}": 0 for i in range(2000)}})
        g["modules"].update({f"m{i}": len(g["templates"]) - 1 for i in range(2000)})

    with pytest.raises(ArchiveError, match="its graph has more than 2,097,152 values"):
        fxq.load(remade(small, edit, tmp_path / "m.fxq"))


def test_it_is_untouched_otherwise(small: CompiledModel, tmp_path: Path) -> None:
    path = remade(small, lambda h: None, tmp_path / "m.fxq")
    assert path.read_bytes() == small.lower("archive").data and same(small, fxq.load(path), torch.randn(2, 3, 8, 8))


def test_damaged_and_foreign_files(small: CompiledModel, tmp_path: Path) -> None:
    path = small.lower("archive").save(tmp_path / "m.fxq")
    raw = path.read_bytes()
    saved = fxq.save(small, tmp_path / "saved.fxq")
    assert same(small, fxq.load(saved), torch.randn(2, 3, 8, 8))
    (tmp_path / "short.fxq").write_bytes(raw[:-3])
    flipped = bytearray(raw)
    flipped[-20] ^= 1
    (tmp_path / "flipped.fxq").write_bytes(flipped)
    newer = raw.replace(b'"version":"1"', b'"version":"2"')
    (tmp_path / "newer.fxq").write_bytes(newer)
    (tmp_path / "zero.fxq").write_bytes(b"")
    for name, text in (("short", "size"), ("flipped", "the checksum is wrong"), ("newer", "has version '2', this fxq reads 1. Update fxq")):
        for read in (fxq.load, fxq.load_state_dict):
            with pytest.raises(ArchiveError, match=rf"{name}.fxq: .*{text}"):
                read(tmp_path / f"{name}.fxq")
    for name in ("zero", "missing", "saved"):
        with pytest.raises(ArchiveError, match=rf"{name}.fxq"):
            fxq.load_state_dict(tmp_path / f"{name}.fxq")
