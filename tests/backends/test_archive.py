"""The lowering to an archive: what it refuses, that it writes the same bytes twice, what its report says of them."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import archive_report, shared, targets
from fxq.archive.decoder import Archive
from fxq.archive.encoder import Stat
from fxq.backends.archive import ArchiveBackend
from fxq.compiled import CompiledModel
from fxq.errors import LoweringError, TargetError
from fxq.modules import Quantized
from tests.lowbit_nets import Net, X, trained


def compiled(name: str = "iao_w8a8") -> CompiledModel:
    torch.manual_seed(0)
    return fxq.compile(trained(Net(), X).eval(), name, calibration=X, progress=False)


def test_what_no_archive_holds_is_named() -> None:
    m = compiled("float")
    with pytest.raises(LoweringError, match="unknown coding 'rns'. did you mean 'rans'"):
        m.lower("archive", coding="rns")
    with pytest.raises(TargetError, match="backend 'archive' has no option 'codin'. did you mean 'coding'"):
        m.lower("archive", codin="rans")
    m.graph_module.get_submodule("fc").register_buffer("odd", torch.ones(2).to(torch.float8_e5m2))
    with pytest.raises(LoweringError, match=r"fc.odd: an archive holds no tensor of type torch.float8_e5m2, torch.strided. Convert it to float32") as e:
        ArchiveBackend().lower(m.graph_module, m.scheme, m.target)
    assert len(e.value.issues) == 1


def test_a_target_of_your_own_is_registered_first() -> None:
    mine = replace(targets.get("onnxruntime"), name="mine")
    m = fxq.compile(Net().eval(), "float", example=X, target=mine, progress=False)
    with pytest.raises(LoweringError, match="the target 'mine' is not registered. Give it a name of its own"):
        m.lower("archive")


def test_a_codebook_that_is_too_large_is_named() -> None:
    m = compiled("float")
    layer = nn.Linear(8, 5000)
    codes = torch.randint(0, shared.MOST + 1, layer.weight.shape)
    large = shared.shared(layer, codes, torch.randn(shared.MOST))
    m.graph_module.set_submodule("fc", large)
    with Archive(m.lower("archive").data) as archive:
        assert archive.by_name["fc.weight"].entries == shared.MOST + 1 == 1 << 15
    large.book = nn.Parameter(torch.randn(shared.MOST + 1))
    with pytest.raises(LoweringError, match=r"fc: a codebook of 32,768 entries is too large, the greatest has 32,767. Share weights with fewer bits"):
        m.lower("archive")


def test_the_user_class_of_a_leaf_is_refused() -> None:
    class Mine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if float(x.sum()) > 0 else x

    m = fxq.compile(nn.Sequential(nn.Linear(4, 4), Mine()).eval(), "float", example=torch.randn(2, 4), leaf_modules=(Mine,), progress=False)
    with pytest.raises(LoweringError, match="is no class of torch.nn or fxq, so a file cannot hold it"):
        m.lower("archive")


CODE = """
import hashlib, torch, fxq
from tests.lowbit_nets import Net, X, trained
torch.manual_seed(0)
m = fxq.compile(trained(Net(), X).eval(), "deepcomp_w5", calibration=X, progress=False)
print(hashlib.sha256(m.lower("archive").data).hexdigest())
"""


def test_the_same_model_gives_the_same_bytes() -> None:
    m = compiled("deepcomp_w5")
    before = str(m.graph_module.graph)
    first = m.lower("archive").data
    assert first == m.lower("archive").data == m.train().lower("archive").data and str(m.graph_module.graph) == before
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, env=env, cwd=Path(__file__).parents[2])
    assert run.stdout.strip() == hashlib.sha256(first).hexdigest(), run.stderr


@pytest.mark.parametrize("name", ["iao_w8a8", "iao_w8a8_asymw", "iao_w8a8_pt", "twn_wta8", "deepcomp_w5"])
def test_numpy_alone_reads_the_weights(name: str) -> None:
    m = compiled(name)
    seen = 0
    with Archive(m.lower("archive").data) as archive:
        for path, q in m.graph_module.named_modules():
            if isinstance(q, Quantized) and isinstance(q.op.weight, Tensor) or isinstance(q, shared.SharedWeight) and not path.endswith(".op"):
                weight = (q.weight_grid(q.op.weight) if isinstance(q, Quantized) else q.dense()).detach().numpy()
                found = archive.dense(archive.by_name[f"{path}.weight"])
                assert np.array_equal(found, weight), path
                assert isinstance(q, Quantized) or found.tobytes() == weight.tobytes(), path
                seen += 1
    assert seen >= 4


def test_float_layers_that_no_node_runs_are_left_out() -> None:
    torch.manual_seed(0)
    m = fxq.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), calibration=X, progress=False)
    extra = nn.Conv2d(64, 64, 3)
    data = m.lower("archive").data
    m.graph_module.add_module("left", extra)
    assert m.lower("archive").data == data


def test_the_report_adds_up() -> None:
    m = compiled("deepcomp_w5")
    artifact = m.lower("archive")
    info = artifact.info["archive"]
    assert info["total"]["file"] == len(artifact.data) == artifact.info["bytes"]["total"]
    assert info["total"]["coded"] + info["total"]["overhead"] + info["total"]["index"] + info["total"]["header"] == len(artifact.data)
    for r in info["rows"]:
        assert r["dense"] >= r["pruned"] >= r["shared"] and r["file"] == r["coded"] + r["overhead"], r
        assert r["coding"] == "raw" or r["bound"] <= 1.02 * r["coded"] + 4 * 64, r
    assert info["ratio"] == info["total"]["dense"] / len(artifact.data)
    table = artifact.info["table"].splitlines()
    assert table[0].split() == "tensor coding values not 0 dense pruned shared coded overhead entropy".split()
    for said in (f"{len(artifact.data):,} bytes in the file", "encoded at ", "decoded at ", "% above the entropy"):
        assert said in table[-1]


def stat(**changes: object) -> Stat:
    fields = {"name": "w", "shape": (100, 10), "coding": "rans", "dense": 4000, "kept": 100, "symbols": 1000, "entropy_bits": 900.0}
    return Stat(**{**fields, "payload": 115, "tables": 80, "states": 16, "role": "conv", "entries": 33, **changes})  # type: ignore[arg-type]


def test_stages_by_hand() -> None:
    r = archive_report.row(stat())
    assert (r.dense, r.pruned, r.shared, r.coded, r.overhead, r.file, r.bound) == (4000, 500, 100 * 13 // 8 + 1 + 80, 115, 96, 211, 112.5)
    assert archive_report.row(stat(role="linear")).pruned == -(-100 * 37 // 8)  # the paper's 5 bits
    assert archive_report.row(stat(kept=1000)).pruned == 4000  # nothing is 0: no index
    full = archive_report.row(stat(kept=1000, entries=32))
    assert full.shared == 1000 * 5 // 8 + 80
    raw = archive_report.row(stat(coding="raw", entries=0, tables=0, states=0, payload=4000, kept=1000))
    assert (raw.pruned, raw.shared, raw.coded, raw.overhead) == (4000, 4000, 4000, 0)
    assert archive_report.row(stat(dense=1000, role="codes", kept=1000)).dense == 4000
    nothing = archive_report.row(stat(dense=0, kept=0, symbols=0, shape=(0,), coding="raw", payload=0, tables=0, states=0, entries=0, entropy_bits=0.0))
    assert nothing.dense == nothing.pruned == nothing.file == 0 and "-" in str(archive_report.ArchiveReport((nothing,), 10, 10))
