"""The documentation is true: its code runs, its tables are the code's, its links lead somewhere."""

import ast
import json
import re
import shlex
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxq import cli, command, errors, schemes, targets
from fxq.archive.decoder import Archive
from fxq.archive.encoder import Factored, write

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def rows(page: str, head: str) -> list[list[str]]:
    """Cells of the table of a page whose header starts with ``head``, without backticks."""
    text = (ROOT / page).read_text()
    table = text[text.index(f"| {head} |") :].split("\n\n")[0]
    return [[c.strip().strip("`") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:] if line.startswith("|")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data that the pages speak of; schemes that a page registers are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(schemes, "_TABLE", dict(schemes._TABLE))
    rng = np.random.default_rng(0)
    np.save("calibration.npy", rng.normal(size=(8, 3, 32, 32)).astype(np.float32))
    Path("images").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), np.uint8)).save(f"images/{i}.png")
    return tmp_path


RUNNABLE = "quickstart schemes tensorrt training pruning doctor interop portability lint debugging compression archive shared_weights bitwise"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p}.md" for p in RUNNABLE.split())])
def test_python_blocks_run(page: str, here: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)
    assert "m" in names


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_commands_run(page: str, here: Path) -> None:
    lines = [line for block in blocks(page, "console") for line in block.splitlines() if line]
    assert len(lines) == 3
    for line in lines:
        prompt, program, *args = shlex.split(line)
        assert (prompt, program) == ("$", "fxq-lower")
        assert cli.main(args) == 0, line


def test_commands_of_the_pruning_page_run(here: Path) -> None:
    lines = [line for block in blocks("docs/pruning.md", "console") for line in block.splitlines() if line]
    assert [shlex.split(line)[1] for line in lines] == ["fxq-lower"] * 2
    for line in lines:
        assert cli.main(shlex.split(line)[2:]) == 0, line
    assert {"pruned.onnx", "pruned.fxq", "pruned_int8.onnx"} <= {p.name for p in here.iterdir()}


def test_commands_of_the_doctor_page_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks("docs/doctor.md", "console") for line in block.splitlines() if line]
    assert [shlex.split(line)[1:3] for line in lines] == [["fxq", "doctor"]] * 4
    for line in lines:
        assert command.main(shlex.split(line)[2:]) == 0 and "onnxruntime" in capsys.readouterr().out, line


def test_commands_of_the_debugging_page_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *lines = [shlex.split(line) for block in blocks("docs/debugging.md", "console") for line in block.splitlines() if line]
    assert first[1:3] == ["fxq", "bisect"] and command.main(first[2:]) == 0 and "nothing wrong" in capsys.readouterr().out
    assert [line[1] for line in lines] == ["fxq-lower"] * 2
    for line in lines:
        assert cli.main(line[2:]) == 0, line
    assert (here / "small.onnx").stat().st_size > 0


def test_commands_of_the_lint_page_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *lines = [shlex.split(line) for block in blocks("docs/lint.md", "console") for line in block.splitlines() if line]
    assert first[1] == "fxq-lower" and cli.main(first[2:]) == 0
    assert [line[1:3] for line in lines] == [["fxq", "lint"]] * 3
    for line in lines:
        assert command.main(line[2:]) == 0 and "int8" in capsys.readouterr().out, line


def test_commands_of_the_tensorrt_page_run(here: Path) -> None:
    lines = [line for block in blocks("docs/tensorrt.md", "console") for line in block.splitlines() if line]
    assert [shlex.split(line)[1] for line in lines] == ["fxq-lower"] * 3 + ["fxq"]
    for line in lines:
        _, program, *args = shlex.split(line)
        assert (cli.main(args) if program == "fxq-lower" else command.main(args)) == 0, line
    assert {"resnet18.engine", "resnet18.trt.onnx", "resnet18.cache"} <= {p.name for p in here.iterdir()}


def test_commands_of_the_archive_page_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *lines = [shlex.split(line) for block in blocks("docs/archive.md", "console") for line in block.splitlines() if line]
    assert first[1] == "fxq-lower" and cli.main(first[2:]) == 0 and "bytes in the file" in capsys.readouterr().out
    assert [line[1:3] for line in lines] == [["fxq", "inspect"]] * 2
    for line in lines:
        assert command.main(line[2:]) == 0 and "features.0.weight" in capsys.readouterr().out, line


def test_commands_of_the_bitwise_page_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = [shlex.split(line) for block in blocks("docs/bitwise.md", "console") for line in block.splitlines() if line]
    assert first[1] == "fxq-lower" and cli.main(first[2:]) == 0 and "proven: " in capsys.readouterr().out
    assert second[1:3] == ["fxq", "inspect"] and command.main(second[2:]) == 0 and "runs bitwise" in capsys.readouterr().out


def test_worked_examples_of_the_archive_page_decode() -> None:
    first, *indices = map(json.loads, blocks("docs/archive.md", "json"))
    files = [bytes.fromhex("".join(line.partition("#")[0] for line in block.splitlines())) for block in blocks("docs/archive.md", "hex")]
    assert len(files) == len(indices) == 2
    for raw, index in zip(files, indices, strict=True):
        with Archive(raw) as archive:
            (r,) = archive.records
            assert archive.dense(r).tolist() == first and archive.table(r).tolist() == [0, 3, -2] and archive.scale(r).tolist() == [0.5, 0.25, 1.0]
            start = 8 + int.from_bytes(raw[:8], "little")
            assert json.loads(zlib.decompress(raw[start : r.at])) == index and index["records"][0]["coding"] == r.coding
            item = Factored("w", archive.symbols(r), archive.table(r), "F32", archive.scale(r))
        again = write([item], None, coding=r.coding, version="0.1.0")[0]
        assert again[-r.bytes :] == raw[r.at :]  # what is written today, apart from the packing of the index
    assert [r["coding"] for index in indices for r in index["records"]] == ["rans", "huffman"]


def test_schemes_are_those_of_the_code() -> None:
    made = [[s.name, s.method, str(s.weight or ""), str(s.activation or ""), s.summary] for s in map(schemes.get, schemes.names())]
    assert rows("docs/schemes.md", "scheme") == made
    assert [r[0] for r in rows("docs/schemes.md", "observer")] == list(schemes.OBSERVERS)


def test_targets_are_those_of_the_code() -> None:
    text = (ROOT / "docs/targets.md").read_text()
    parts = {p.split("\n")[0]: p for p in text.split("\n## ")[1:]}
    for t in map(targets.get, targets.names()):
        part = parts[t.family]
        assert f"opset {t.opset}, IR {t.ir_version}," in part and (t.name == t.family or f"`{t.name}`" in part)


def test_errors_are_those_of_the_code() -> None:
    classes = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.FxqError)}
    assert {r[0] for r in rows("docs/errors.md", "error")} == classes


def test_messages_of_bad_input_stand_in_the_code() -> None:
    source = "\n".join(p.read_text() for p in (ROOT / "fxq").rglob("*.py"))
    table = (ROOT / "docs/errors.md").read_text().split("## Bad input")[1]
    quoted = [m for line in table.splitlines() if line.startswith("| ") for m in re.findall(r"`([^`]+)`", line.split(" | ")[-1])]
    parts = [p.strip() for m in quoted for p in m.split("...") if len(p.strip()) > 3]
    assert len(parts) > 30
    assert [p for p in parts if p not in source] == []


def street() -> tuple[tuple[str, ...], ...]:
    """The rows that ``test_imports.py`` holds the imports to."""
    tree = ast.parse((ROOT / "tests/test_imports.py").read_text())
    (value,) = (n.value for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.target.id == "STREET")
    assert value is not None
    rows: tuple[tuple[str, ...], ...] = ast.literal_eval(value)
    return rows


def test_architecture_names_every_file() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = {n for r in rows("docs/architecture.md", "files") for n in re.findall(r"[\w/]+", r[0])}
    there = {str(p.relative_to(ROOT / "fxq").with_suffix("")) for p in (ROOT / "fxq").rglob("*.py") if p.name != "__init__.py"}
    assert named == there
    drawn = [row.replace("/", "").split() for row in text.split("## Modules")[1].split("```\n")[1].splitlines()]
    assert [set(row) for row in reversed(drawn)] == [set(row) for row in street()]


def test_dependencies_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = re.compile(r"^[\w.\-\[\]]+")
    assert [r[0] for r in rows("docs/dependencies.md", "package")] == [name.match(d)[0] for d in project["dependencies"]]  # type: ignore[index]
    extras = {r[0]: r[1].split(", ") for r in rows("docs/dependencies.md", "extra")}
    assert extras == {k: [name.match(d)[0] for d in v] for k, v in project["optional-dependencies"].items()}  # type: ignore[index]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:benchmarks|docs|examples|tests|fxq)/[\w/]+\.(?:py|md))`", text):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists(), script
