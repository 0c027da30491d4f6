"""``fxq inspect`` and ``fxq-lower --to archive``: what is said of an archive, from its index alone."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fxq
from fxq import archive_proof, archived, cli
from fxq.archive import decoder, encoder
from fxq.command import main

NET = """
from torch import nn


def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    torch.manual_seed(0)
    return tmp_path


def lower(*more: str) -> int:
    return cli.main(["net.py:build", "--input", "1,3,8,8", "--scheme", "deepcomp_w5", "--to", "archive", "-o", "m.fxq", *more])


def test_lower_prints_the_stages(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lower("--report-json", "r.json") == 0
    out = capsys.readouterr().out
    size = os.path.getsize("m.fxq")
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("tensor ") and "pruned" in line)
    assert [line.split()[0] for line in lines[head + 2 : head + 6]] == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert f"{size:,} bytes in the file" in out and "times smaller than dense" in out and "MB/s" in out
    report = json.loads(Path("r.json").read_text())["archive"]
    assert report["total"]["file"] == size and report["rows"][0]["name"] == "0.weight"
    assert lower("--quiet", "--force") == 0 and capsys.readouterr().out == ""


def test_inspect_shows_what_is_inside(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lower("--quiet")
    assert main(["inspect", "m.fxq"]) == 0
    out = capsys.readouterr().out
    size = os.path.getsize("m.fxq")
    assert out.startswith(f"m.fxq: model (compiled), scheme deepcomp_w5, target onnxruntime, 6 nodes; archive version 1, written by fxq {fxq.__version__}\n")
    row = next(line.split() for line in out.splitlines() if line.startswith("4.weight"))
    assert row[1] == "F32" and row[2] in ("rans", "huffman") and row[3:5] == ["10x288", "33"]
    assert f"{size:,} bytes, of them" in out
    assert main(["inspect", "m.fxq", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["file"], body["size"], body["fxq"], body["format"], body["kind"], body["scheme"]) == (
        "m.fxq", size, fxq.__version__, 1, "compiled", "deepcomp_w5",
    )  # fmt: skip
    assert body["overhead"] + sum(r["bytes"] for r in body["records"]) == size and body["ratio"] == body["dense_bytes"] / size
    (weight,) = (r for r in body["records"] if r["name"] == "4.weight")
    assert weight["shape"] == [10, 288] and weight["dense_bytes"] == 4 * 2880 and weight["bits_per_value"] == 8 * weight["bytes"] / 2880
    assert float(row[5]) == pytest.approx(weight["bits_per_value"], abs=0.01)


def test_inspect_decodes_nothing(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lower("--quiet")
    main(["inspect", "m.fxq"])
    whole = capsys.readouterr().out
    raw = bytearray(Path("m.fxq").read_bytes())
    start = len(raw) - sum(r.bytes for r in archived.inspect("m.fxq").records)
    raw[start:] = bytes(len(raw) - start)  # the payload of every tensor is gone
    Path("m.fxq").write_bytes(raw)

    def never(*_: object) -> None:
        raise AssertionError("a tensor was decoded")

    for name in ("rans", "huffman"):
        monkeypatch.setattr(decoder, name, never)
    monkeypatch.setattr(decoder.Archive, "_get", never)
    assert main(["inspect", "m.fxq"]) == 0 and capsys.readouterr().out == whole
    monkeypatch.undo()
    assert cli.main(["--list", "backends"]) == 0 and "archive " in capsys.readouterr().out
    with pytest.raises(fxq.FxqError, match="the checksum is wrong"):
        fxq.load_state_dict(here / "m.fxq")


def test_plain_tensors_and_odd_shapes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fxq.save_state_dict({"a": torch.zeros(()), "e": torch.empty(0, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, "t.fxq")
    assert main(["inspect", "t.fxq"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("t.fxq: plain tensors; archive version 1") and "BF16" in out
    assert main(["inspect", "t.fxq", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["kind"] == "" and [r["shape"] for r in body["records"]] == [[], [0, 3], [4]] and body["records"][1]["ratio"] is None


def test_names_of_a_file_reach_no_terminal_unseen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = {"kind": "\x1b[2J", "scheme": {"name": "a\nb"}, "target": "t" * 999}
    Path("odd.fxq").write_bytes(encoder.write([encoder.Plain("w\x1b[31m\n", np.ones(2, np.float32))], head, version="\r1")[0])
    assert main(["inspect", "odd.fxq"]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and out.count("\n") == 5 and "\\x1b[31m\\n" in out and "t" * 200 in out and "t" * 201 not in out


def test_a_file_that_says_more_than_it_holds_is_still_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    symbols = np.zeros((1 << 12, 1 << 12), np.uint8)
    Path("big.fxq").write_bytes(encoder.write([encoder.Factored("w", symbols, np.array([0.0, 1.0], np.float32))], None)[0])
    assert os.path.getsize("big.fxq") < 2000  # 64 MiB of zeros
    assert main(["inspect", "big.fxq"]) == 0 and "4096x4096" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect", "the following arguments are required: FILE.fxq. See fxq inspect --help"),
        ("inspect missing.fxq", "missing.fxq: cannot be read: No such file or directory"),
        ("inspect .", ".: cannot be read: Is a directory"),
        ("inspect net.py", "net.py: is no archive of fxq. Take files that fxq wrote as archives"),
        ("inspect empty.fxq", "empty.fxq: "),
        ("inspect model.fxq", "model.fxq: is no archive of fxq"),
        ("inspect newer.fxq", "newer.fxq: has version '2', this fxq reads 1. Update fxq"),
        ("inspect index.fxq", "index.fxq: the checksum of its index is wrong"),
        ("inspect cut.fxq", "cut.fxq: its header and its size do not fit"),
        ("inspect odd.fxq", "odd.fxq: "),
        ("inspect m.fxq --nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_and_hostile_files_are_one_line(here: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    fxq.save_state_dict({"a": torch.arange(100.0)}, "m.fxq")
    raw = Path("m.fxq").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    Path("empty.fxq").write_bytes(b"")
    Path("newer.fxq").write_bytes(raw.replace(b'"version":"1"', b'"version":"2"'))
    Path("index.fxq").write_bytes(raw[: 8 + length + 3] + bytes([raw[8 + length + 3] ^ 1]) + raw[8 + length + 4 :])
    Path("cut.fxq").write_bytes(raw[:-1])
    Path("odd.fxq").write_bytes(raw[:8] + b"[" * length + raw[8 + length :])
    if "model.fxq" in arguments:
        fxq.save(fxq.compile(torch.nn.Linear(2, 2).eval(), "float", example=torch.ones(1, 2), progress=False), "model.fxq")
    assert main(arguments.split()) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("fxq: ") and out.err.count("\n") == 1 and message in out.err


def test_lower_verifies_an_archive(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lower("--verify", "--report-json", "r.json") == 0
    assert "the archive computes the same bits as the model" in capsys.readouterr().out
    assert json.loads(Path("r.json").read_text())["verify"]["ok"]
    monkeypatch.setattr(archive_proof, "_unequal", lambda a, b: (1, 1))
    assert lower("--verify", "--force") == 1 and "NOT the same: first at " in capsys.readouterr().out
