"""What a wheel and a source archive hold, and that nothing called ``passes`` or ``backends`` can be imported."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys, setuptools.build_meta as b; out = sys.argv[1]; b.build_wheel(out); b.build_sdist(out)"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a wheel and a source archive, built from a copy of the tree without network and without isolation."""
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "fxq", copy / "fxq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("passes", "backends"):
        (copy / name).symlink_to(f"fxq/{name}")
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def source_files() -> set[str]:
    return {str(p.relative_to(ROOT)) for p in (ROOT / "fxq").rglob("*.py")}


def page_files() -> set[str]:
    """Style and scripts of the HTML report."""
    found = {str(p.relative_to(ROOT)) for p in (ROOT / "fxq/report").iterdir() if p.suffix in (".css", ".js")}
    assert {"fxq/report/page.css", "fxq/report/page.js"} <= found
    return found


def test_the_wheel_holds_fxq_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert {n.split("/")[0] for n in names} == {"fxq"}
    assert {n for n in names if n.endswith(".py")} == source_files()
    assert {"fxq/py.typed", *page_files()} <= set(names)


def test_the_wheel_states_its_command_licence_and_extras(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        text = {n.split("/")[1]: z.read(n).decode() for n in z.namelist() if ".dist-info/" in n and n.count("/") == 1}
    assert "fxq-lower = fxq.cli:main" in text["entry_points.txt"]
    assert text["top_level.txt"].split() == ["fxq"]
    assert "License-Expression: Apache-2.0" in text["METADATA"]
    extras = {line.split(": ")[1] for line in text["METADATA"].splitlines() if line.startswith("Provides-Extra")}
    assert extras == {"tensorrt", "archive", "bitwise", "bench", "demo", "report", "dev"}


def test_the_source_archive_holds_the_same_files(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as t:
        names = {n.split("/", 1)[1] for n in t.getnames() if "/" in n}
    assert {n for n in names if n.startswith("fxq/") and n.endswith(".py")} == source_files()
    assert {"fxq/py.typed", "pyproject.toml", "README.md", "LICENSE", *page_files()} <= names


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_the_folders_at_the_root_are_links_that_cannot_be_imported(name: str) -> None:
    assert (ROOT / name).is_symlink() and (ROOT / name).resolve() == ROOT / "fxq" / name
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"ImportError: import fxq.{name}, not {name}" in done.stderr


def test_the_lock_pins_everything_and_names_no_host() -> None:
    lines = [line for line in (ROOT / "requirements-dev.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "/" not in line and "+" not in line and not line.startswith("-") for line in lines)
    names = {line.split("==")[0].lower() for line in lines}
    assert {"torch", "torchvision", "onnx", "onnxruntime", "pytest", "ruff", "mypy", "scikit-image", "scikit-learn"} <= names


def test_the_version_is_said_once() -> None:
    import fxq

    assert f'version = "{fxq.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {fxq.__version__}" in (ROOT / "CHANGELOG.md").read_text()
