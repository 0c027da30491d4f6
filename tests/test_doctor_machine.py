"""Processors by their flags, packages by their versions: what is said of machines that are not this one."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from fxq.doctor_machine import NEEDS, Machine, machine, numbers, packages, processor

ROOT = Path(__file__).resolve().parents[1]
INTEL = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse2 avx2 {}\n\nprocessor\t: 1\nmodel name\t: Some CPU\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("text", "name", "flags", "words"),
    [
        (INTEL.format("avx512f avx512_vnni amx_int8"), "Some CPU", ("avx2", "avx512f", "avx512_vnni", "amx_int8"), "fast and exact: AVX-512 VNNI, AMX int8"),
        (INTEL.format("avx_vnni"), "Some CPU", ("avx2", "avx_vnni"), "fast and exact: AVX-VNNI adds"),
        (INTEL.format("avx512f"), "Some CPU", ("avx2", "avx512f"), "can saturate: the same file may give other numbers here. Compile with portable=True"),
        (INTEL.replace("avx2 ", "").format(""), "Some CPU", (), "no instructions for products of 8-bit integers"),
        (ARM.format("asimddp sve"), "", ("asimd", "asimddp", "sve"), "fast and exact: dot product"),
        (ARM.format(""), "", ("asimd",), "no instructions for products"),
        ("", "", None, "unknown: the system does not tell"),
    ],
)  # fmt: skip
def test_processors(text: str, name: str, flags: tuple[str, ...] | None, words: str, tmp_path: Path) -> None:
    assert processor(text) == (name, flags)
    (tmp_path / "cpuinfo").write_text(text)
    found = machine(tmp_path / "cpuinfo")
    assert found.flags == flags and words in found.int8 and words in "\n".join(found.lines())


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = machine(tmp_path / "missing")
    assert (found.flags, found.memory, found.compiler) == (None, None, None)
    text = "\n".join(found.lines())
    assert "memory    unknown" in text and "compiler  none" in text and "cores; unknown" in text


def test_apple_silicon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    found = machine(tmp_path / "missing")
    assert found.cpu == "Apple silicon" and found.int8.startswith("fast and exact: dot product")


def test_a_gpu_is_named_with_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: (8, 6))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: "A GPU")
    assert machine().gpus == ("A GPU, compute capability 8.6 (target sm86)",)


def test_this_machine() -> None:
    found = machine()
    assert isinstance(found, Machine) and found.cores >= 1 and len(found.lines()) == 6


def test_packages_by_version() -> None:
    have = {"torch": "2.5.1+cpu", "onnx": "1.23.2", "onnxruntime": "1.40.0", "numpy": "2.4.6"}

    def version(name: str) -> str:
        if name not in have:
            raise importlib.metadata.PackageNotFoundError(name)
        return have[name]

    found = {p.name: p for p in packages(version)}
    assert (found["torch"].state, found["torch"].note, found["torch"].bad) == ("old", "fxq needs 2.6 or newer: pip install -U torch", True)
    assert (found["onnx"].state, found["onnx"].note) == ("proven", "")
    assert (found["onnxruntime"].state, found["onnxruntime"].note) == ("fine", "fxq is proven with 1.31.1")
    assert (found["tensorrt-rtx"].state, found["tensorrt-rtx"].note, found["tensorrt-rtx"].bad) == ("missing", "pip install fxq[tensorrt]", False)
    assert found["rich"].bad and found["rich"].note == "pip install fxq"


def test_versions_are_those_of_the_project() -> None:
    """The least versions stand in pyproject.toml, the proven ones in the lock; extras exist and bring the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = dict(line.replace("_", "-").split("==") for line in (ROOT / "requirements-dev.lock").read_text().splitlines() if "==" in line)
    for need in NEEDS:
        if need.proven:
            assert lock[need.name] == need.proven, need.name
        wanted = project["dependencies"] if need.install == "fxq" else project["optional-dependencies"].get(need.install[4:-1], [])
        if need.install.startswith("fxq"):
            least = f">={need.least}" if need.least else ""
            assert f"{need.name}{least}" in wanted, need.name
        assert need.core == (need.install == "fxq")
    assert {n.name for n in NEEDS if n.core} == {d.split(">")[0] for d in project["dependencies"]}


def test_numbers() -> None:
    assert numbers("2.14.1+cu130") == (2, 14, 1) and numbers("1.20.0rc1") > numbers("1.17")
