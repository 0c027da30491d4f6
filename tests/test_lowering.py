"""The backend's contract: everything is checked before anything is written, all findings are told, a file is whole or absent."""

import os
import stat
from pathlib import Path

import pytest
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from fxq import schemes, targets
from fxq.errors import ArtifactError, LoweringError
from fxq.lowering import Artifact, Issue, Lowering
from fxq.schemes import Scheme
from fxq.targets import Target


class Counting(Lowering):
    """Finds as many faults as it is told to, and notes what it was given."""

    name = "counting"

    def __init__(self, faults: int = 0) -> None:
        self.faults, self.calls = faults, list[tuple[str, int]]()

    def check(self, gm: GraphModule, scheme: Scheme, target: Target) -> list[Issue]:
        self.calls.append(("check", target.opset))
        return [Issue(f"node{i}", f"fact {i}", "Way out") for i in range(self.faults)]

    def emit(self, gm: GraphModule, scheme: Scheme, target: Target) -> Artifact:
        self.calls.append(("emit", target.opset))
        return Artifact(self.name, b"bytes", {"n": 1})


def graph() -> GraphModule:
    return symbolic_trace(nn.Sequential(nn.ReLU()))


def test_a_clean_graph_is_checked_then_emitted() -> None:
    backend = Counting()
    artifact = backend.lower(graph(), schemes.get("iao_w8a8"), targets.get("onnxruntime"))
    assert artifact.data == b"bytes" and [c[0] for c in backend.calls] == ["check", "emit"]


@pytest.mark.parametrize(("faults", "text"), [(1, "node0: fact 0. Way out"), (3, "node0: fact 0 (and 2 more). Way out")])
def test_findings_stop_it_and_all_of_them_are_told(faults: int, text: str) -> None:
    backend = Counting(faults)
    with pytest.raises(LoweringError) as info:
        backend.lower(graph(), schemes.get("iao_w8a8"), targets.get("onnxruntime"))
    assert str(info.value) == text and [c[0] for c in backend.calls] == ["check"]
    assert [str(i) for i in info.value.issues] == [f"node{i}: fact {i}. Way out" for i in range(faults)]


def test_save_writes_whole_files_with_ordinary_permissions(tmp_path: Path) -> None:
    path = Artifact("b", b"abc").save(tmp_path / "m.onnx")
    assert path.read_bytes() == b"abc" and os.listdir(tmp_path) == ["m.onnx"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    with pytest.raises(ArtifactError, match="the file exists"):
        Artifact("b", b"new").save(path)
    assert Artifact("b", b"new").save(str(path), force=True).read_bytes() == b"new"


def test_save_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="the file exists"):
        Artifact("b", b"abc").save(tmp_path / "dangling")
    assert not (tmp_path / "nowhere").exists() and sorted(os.listdir(tmp_path)) == ["dangling"]


def test_artifacts_are_values() -> None:
    assert Artifact("b", b"abc") == Artifact("b", b"abc") and Artifact("b", b"abc") != Artifact("b", b"abd")
    assert Artifact("b", b"").info == {}
