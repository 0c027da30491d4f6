"""``m.lower("bitwise")``, ``fxq.load`` of it: what comes back computes the reference's codes; what cannot run, or is hostile, is refused."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq import archived, schemes
from fxq.archive import encoder
from fxq.archive.decoder import Archive
from fxq.bitwise.program import BitProgram
from fxq.compiled import CompiledModel
from fxq.errors import ArchiveError, ArtifactError, FxqError, LoweringError, TargetError
from tests.bit_nets import SCHEMES, BitNet, Wide, batches, compiled
from tests.test_archived_refused import HOSTILE

X = next(batches(1, seed=5))
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def small() -> CompiledModel:
    return compiled("xnor_w1a1")


@pytest.fixture(scope="module")
def saved(small: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.lower("bitwise").save(tmp_path_factory.mktemp("bits") / "net.fxq")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loaded_program_computes_the_codes_of_the_reference(scheme: str, tmp_path: Path) -> None:
    m = compiled(scheme, target="bitwise")
    program = fxq.load(m.lower("bitwise").save(tmp_path / "net.fxq"))
    assert type(program) is BitProgram and not program.training
    for side in (12, 9):
        for x in batches(side=side, seed=1):
            torch.testing.assert_close(program(x), m.reference(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(program(x), m(x).detach(), rtol=1e-5, atol=1e-5)
        proof = m.verify(tmp_path / "net.fxq", list(batches(side=side, seed=2)))
        assert proof.ok and proof.hidden_differ == 0 and proof.nodes > 6, str(proof)


def test_a_program_holds_no_wide_copy_of_a_packed_weight(saved: Path) -> None:
    program = fxq.load(saved)
    tensors = [t for t in [*program.parameters(), *program.buffers()] if t.numel() >= 26 * 26 * 25]
    assert tensors == [] and not any(isinstance(v, torch.fx.GraphModule) and "Quantized" in str(v) for v in program.modules())


def test_the_compiled_model_of_the_file_is_the_one_that_was_lowered(small: CompiledModel, saved: Path) -> None:
    again = fxq.load(saved, run=False)
    assert type(again) is CompiledModel and again.scheme == small.scheme and again.target == small.target
    assert again.lower("bitwise").data == saved.read_bytes() and again.lower().data == small.lower().data
    assert again.lower("archive").data == small.lower("archive").data


def test_the_file_is_the_archive_with_another_head(small: CompiledModel, saved: Path, tmp_path: Path) -> None:
    plain = small.lower("archive").save(tmp_path / "plain.fxq")
    with Archive(plain) as a, Archive(saved) as b:
        assert {**a.graph, "run": "bitwise"} == b.graph and [r.name for r in a.records] == [r.name for r in b.records]
    ours, theirs = fxq.load_state_dict(saved), fxq.load_state_dict(plain)
    assert list(ours) == list(theirs) and all(torch.equal(t, theirs[k]) for k, t in ours.items())
    assert {"stem.weight", "a.weight", "fc2.bias"} <= set(ours) and type(fxq.load(plain)) is CompiledModel
    assert archived.inspect(saved).run == "bitwise" and archived.inspect(plain).run == ""


def test_what_the_artifact_says(small: CompiledModel) -> None:
    made = small.lower("bitwise")
    assert made.backend == "bitwise" and made.info["bytes"]["total"] == len(made.data)
    text = made.info["summary"]
    for name in ("a", "b", "c", "d", "fc1"):
        assert any(line.split()[:1] == [name] for line in text.splitlines()), text
    assert "stem" in text and "the scheme leaves the first layer float" in text
    assert json.loads(json.dumps(made.info))["bitwise"]["layers"][0]["name"] == "a"
    assert small.lower("bitwise", coding="huffman").data != made.data


def test_binary_layers_are_28_times_smaller_in_file_and_memory(tmp_path: Path) -> None:
    path = compiled("xnor_w1a1", Wide(128)).lower("bitwise").save(tmp_path / "net.fxq")
    with Archive(path) as archive:
        for name in ("a.weight", "b.weight"):
            r = archive.by_name[name]
            assert r.shape == (128, 128, 3, 3) and r.dense_bytes == 4 * 128 * 128 * 9
            assert 28 * r.bytes <= r.dense_bytes, f"{name}: {r.dense_bytes / r.bytes:.2f}"
    report = fxq.load(path).report()
    assert [r.name for r in report.layers] == ["a", "b"] and all(r.float_bytes == 4 * 128 * 128 * 9 for r in report.layers)
    for r in report.layers:
        assert 28 * (r.packed_bytes + r.table_bytes) <= r.float_bytes, str(report)


def net8() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1)).eval()


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        ("iao_w8a8", "onnxruntime"), ("iao_w8a8", "bitwise"), ("xnor_w1a32", "bitwise"), ("twn_wta8", "bitwise"), ("dorefa_w2a2", "onnxruntime"),
        ("float", "bitwise"),
    ],
)  # fmt: skip
def test_nets_without_a_bit_layer_are_refused(scheme: str, target: str) -> None:
    m = fxq.compile(net8(), scheme, calibration=[X], target=target, progress=False)
    with pytest.raises(LoweringError) as e:
        m.lower("bitwise")
    assert e.value.issues[0].node == e.value.where and sorted(i.node for i in e.value.issues) == ["0", "2", "4"]
    assert e.value.where == ("0" if scheme in ("iao_w8a8", "twn_wta8", "float") else "2")
    assert str(e.value).startswith(f"{e.value.where}: no layer runs on bits; of this one: ") and "xnor_w1a1" in str(e.value.way_out)
    assert m.lower().backend == "onnx-qdq"


class Parts(nn.Module):
    """It can only be captured in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net8()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x if float(x.sum().item()) > 0 else -x)
        return out


def test_other_refusals(small: CompiledModel) -> None:
    trt = fxq.compile(net8(), "int8", calibration=[X], target="sm86", progress=False)
    with pytest.raises(LoweringError, match="target: the graph is placed for 'sm86'. Compile it with target='bitwise'"):
        trt.lower("bitwise")
    parts = fxq.compile(Parts(), "xnor_w1a1", calibration=[X], progress=False)
    with pytest.raises(LoweringError, match=r"was captured in 1 parts and has no single graph. Use one part, m.parts\[path\]"):
        parts.lower("bitwise")
    assert parts.parts["net"].lower("bitwise").backend == "bitwise"
    trained = fxq.compile(BitNet().eval(), "xnor_w1a1", mode="qat", calibration=[X], progress=False)
    with pytest.raises(FxqError, match="convert"):
        trained.lower("bitwise")
    with pytest.raises(TargetError, match="unknown backend 'bitwse'. did you mean 'bitwise'"):
        small.lower("bitwse")
    with pytest.raises(TargetError, match="backend 'bitwise' has no option 'threads'"):
        small.lower("bitwise", threads=2)


def test_a_program_is_no_model(saved: Path) -> None:
    """Tracing one would end the process, so it runs in another."""
    code = f"""
import torch, fxq
from fxq.errors import FxqError
program, x = fxq.load({str(saved)!r}), torch.zeros(2, 3, 12, 12)
around = torch.nn.Sequential(program)
for call in (
    lambda: fxq.compile(program, "xnor_w1a1", calibration=x, progress=False), lambda: fxq.compile(around, calibration=x, progress=False),
    lambda: fxq.prune(program, fxq.Prune(ratio=0.5), example=x), lambda: fxq.layer_times(around, x), lambda: fxq.capture(program, (x,)),
):
    try:
        call()
    except FxqError as e:
        print(e)
print(fxq.doctor(program, x))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    fact = "a BitProgram is compiled already. Pass the float model that it was made from, or fxq.load(path, run=False)"
    lines = done.stdout.splitlines()
    assert [line.endswith(fact) for line in lines[:5]] == [True] * 5 and "a BitProgram is compiled already" in "".join(lines[5:])


def test_a_program_is_no_artifact(small: CompiledModel, saved: Path) -> None:
    with pytest.raises(ArtifactError, match="BitProgram is no artifact. Give a path, bytes, or what lower"):
        small.verify(fxq.load(saved), [X])  # type: ignore[arg-type]


def test_lowering_leaves_the_model_as_it_was(small: CompiledModel) -> None:
    before = {k: v.clone() for k, v in small.state_dict().items()}
    text = str(small.graph_module.graph)
    first = small.lower("bitwise").data
    assert small.lower("bitwise").data == first and str(small.graph_module.graph) == text
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def remade(m: CompiledModel, edit: Callable[[Any], Any], path: Path, run: Any = "bitwise") -> Path:
    made = archived.to_items(m)
    head = json.loads(json.dumps(made.head))
    head["run"] = run
    edit(head)
    path.write_bytes(encoder.write(made.items(), head, version=fxq.__version__)[0])
    return path


def nothing(head: Any) -> None:
    """Leave it."""


@pytest.mark.parametrize("run", ["tensorrt", "", 5, None, ["bitwise"], {"bitwise": 1}, True])
def test_an_unknown_way_to_run_is_refused(small: CompiledModel, run: Any, tmp_path: Path) -> None:
    path = remade(small, nothing, tmp_path / "m.fxq", run)
    for read in (fxq.load, lambda p: fxq.load(p, run=False), lambda p: small.verify(p, X)):
        with pytest.raises(ArchiveError, match=r"m\.fxq: it is to run as .*, which is unknown\. Update fxq"):
            read(path)
    assert "a.weight" in fxq.load_state_dict(path)


@pytest.mark.parametrize("scheme", ["iao_w8a8", "xnor_w1a32"])
def test_a_file_that_cannot_run_as_it_says_is_refused(scheme: str, tmp_path: Path) -> None:
    m = fxq.compile(net8(), scheme, calibration=[X], progress=False)
    path = remade(m, nothing, tmp_path / "m.fxq")
    with pytest.raises(ArchiveError, match=r"m\.fxq: .*it is to run bitwise, but ") as e:
        fxq.load(path)
    assert e.value.way_out
    with pytest.raises(ArtifactError, match="it is to run bitwise, but "):
        m.verify(path, X)
    assert torch.equal(fxq.load(path, run=False)(X), m(X))


EDITS = [edit for edit, _ in HOSTILE if "product" not in edit.__code__.co_names]
"""Those of tests/test_archived_refused.py that do not count on its net having one product of scales."""


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_a_hostile_index_is_refused(small: CompiledModel, number: int, tmp_path: Path) -> None:
    assert len(EDITS) > 25
    path = remade(small, EDITS[number], tmp_path / "m.fxq")
    with pytest.raises(ArchiveError) as e:
        fxq.load(path)
    assert str(path) in str(e.value) and len(str(e.value).splitlines()) == 1 and e.value.way_out


def test_shapes_that_lie_cost_nothing(small: CompiledModel, tmp_path: Path) -> None:
    """Sizes that only the file's notes on shapes state make no tables, and the real input's are those that count."""

    def edit(head: Any) -> None:
        text, huge = json.dumps(head["graph"]["nodes"]), 1 << 40
        lies = re.sub(r'"shape": {"tuple": \[2, (\d+), \d+, \d+\]}', rf'"shape": {{"tuple": [{huge}, \1, {huge}, {huge}]}}', text)
        assert lies.count(str(huge)) > 20
        head["graph"]["nodes"] = json.loads(lies)

    program = fxq.load(remade(small, edit, tmp_path / "m.fxq"))
    assert type(program) is BitProgram and program.report().resident_bytes < 1 << 17
    torch.testing.assert_close(program(X), small.reference(X), rtol=1e-5, atol=1e-5)


def test_wrong_numbers_in_a_file_never_end_the_process() -> None:
    """Sizes, strides, groups, grids: refused, or an exception when it runs, or numbers; no kernel leaves its arrays."""
    done = subprocess.run([sys.executable, "-m", "tests.bit_fuzz", "0", "120"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert set(found) == {"refused", "ran", "raised"} and min(found["refused"], found["ran"]) > 20 and sum(found.values()) == 120, found


def test_damaged_files(saved: Path, tmp_path: Path) -> None:
    raw = bytearray(saved.read_bytes())
    raw[-20] ^= 1
    (tmp_path / "flipped.fxq").write_bytes(raw)
    (tmp_path / "short.fxq").write_bytes(raw[:-5])
    for name in ("flipped", "short", "missing"):
        with pytest.raises(ArtifactError, match=rf"{name}\.fxq"):
            fxq.load(tmp_path / f"{name}.fxq")


def test_importing_fxq_loads_none_of_it() -> None:
    code = "import sys, fxq, fxq.cli; fxq.compile, fxq.load, fxq.CompiledModel; print([m for m in sys.modules if m.startswith(('fxq.bitwise', 'numba'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_scheme_either_lowers_or_says_why() -> None:
    lowered = set()
    for name in schemes.names():
        s = schemes.get(name)
        if s.trains and s.share is None and s.method == "static":
            m = fxq.compile(net8(), name, calibration=[X], progress=False)
            try:
                lowered |= {name} if m.lower("bitwise").data else set()
            except LoweringError as e:
                assert e.way_out and e.where, name
    assert {"bnn_w1a1", "xnor_w1a1", "twn_wta1", "tbn_w1at"} <= lowered and not any(n.startswith(("iao", "dorefa_w4")) for n in lowered)
