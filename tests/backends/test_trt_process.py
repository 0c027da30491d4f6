"""The child process: full TensorRT's way through it (with a stand-in), its refusals, its crashes, its end."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from fxq.backends.trt_builder import WORKER, BuildOptions, Built, build
from fxq.backends.trt_layers import runs
from fxq.errors import EngineError

HERE = Path(__file__).parent
_spec: Any = importlib.util.spec_from_file_location("trt_models", HERE / "trt_models.py")
m: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(m)

FAKE = "trt_fake"


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in can be imported by children; temporary files go to ``tmp_path / "temporary"``; the child's number to ``tmp_path / "pid"``."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("TRT_FAKE_PID", str(tmp_path / "pid"))
    return tmp_path


def failing(mode: str, monkeypatch: pytest.MonkeyPatch, options: BuildOptions | None = None) -> EngineError:
    """The error of a build with a stand-in that misbehaves."""
    monkeypatch.setenv("TRT_FAKE", mode)
    with pytest.raises(EngineError) as e:
        build(m.conv_relu(), options or BuildOptions(package=FAKE))
    return e.value


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked for its exit code counts as ended."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def nothing_left(folder: Path) -> bool:
    return gone(int((folder / "pid").read_text())) and not list((folder / "temporary").iterdir())


def test_full_tensorrt_gives_the_inspectors_layers(fake: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    built: Built = build(m.conv_relu(), BuildOptions(package=FAKE, level=2, workspace=77, sparsity=True), lambda *step: seen.append(step))
    assert (built.engine, built.package, built.version) == (b"fake engine", FAKE, "10.16.1.11")
    (layer,) = built.layers
    assert (layer.kind, layer.onnx, runs(layer)) == ("CaskConvolution", ("conv", "relu"), "int8")
    assert seen == [("Parsing the ONNX file", 0, None), ("Building", 0, 2), ("Building", 1, 2)]
    assert built.warnings == ("level 2, pools 77, flags ['SPARSE_WEIGHTS']",)
    assert [text for _, text in built.log] == ["Parsing node: conv [Conv]", *built.warnings]
    assert nothing_left(fake)


def test_without_options_the_builder_keeps_its_defaults() -> None:
    assert build(m.conv_relu(), BuildOptions(package=FAKE)).warnings == ("level None, pools None, flags []",)


def test_full_tensorrt_builds_for_this_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = False
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (8, 6))
    error = failing("", monkeypatch, BuildOptions("sm86", package=FAKE))
    assert "trt_fake 10.16.1.11 builds only for the GPU of the machine that it runs on, and there is none here, not for sm86" in str(error)
    gpu = True
    error = failing("", monkeypatch, BuildOptions("sm89", package=FAKE))
    assert "builds only for this machine's GPU, sm86, not for sm89. Build on such a machine, or with package='tensorrt_rtx'" in str(error)
    assert build(m.conv_relu(), BuildOptions("sm86", package=FAKE)).engine == b"fake engine"


@pytest.mark.parametrize(
    ("mode", "fact", "way_out"),
    [
        ("no-import", "trt_fake cannot be used here: ImportError: libnvinfer.so.10: cannot open shared object file", "tensorrt-rtx==1.7.1.116"),
        ("broken", "trt_fake cannot be used here: RuntimeError: an exception of the binding", "tensorrt-rtx==1.7.1.116"),
        ("no-builder", "trt_fake 10.16.1.11 does not start: CUDA initialization failure with error: 35", "Check the GPU and its driver"),
        ("no-parse", "trt_fake 10.16.1.11 refuses Conv: it does not like it", "Run fxq lint FILE.onnx --target tensorrt"),
        ("bad-profile", "trt_fake 10.16.1.11 refuses the profile: it gives no reason", "Give other shapes"),
        ("no-table", "trt_fake 10.16.1.11 gave no layer table, so nothing shows what runs in integers", "tensorrt-rtx==1.7.1.116"),
        ("abort", "trt_fake crashed (signal SIGABRT); its last messages: Parsing node: conv [Conv]", "Run fxq lint FILE.onnx --target tensorrt"),
        ("exit", "trt_fake crashed (exit code 7); its last messages: Parsing node: conv [Conv]", "Run fxq lint FILE.onnx --target tensorrt"),
    ],
)
def test_misbehaviour(mode: str, fact: str, way_out: str, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = failing(mode, monkeypatch)
    assert fact == error.fact
    assert error.way_out is not None and way_out in error.way_out
    assert not list((fake / "temporary").iterdir())


def test_a_build_that_takes_too_long(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    error = failing("sleep", monkeypatch, BuildOptions(package=FAKE, timeout=1.5))
    assert error.fact == "trt_fake did not finish in 1.5 s; its last messages: Parsing node: conv [Conv]"
    assert 1.5 <= time.monotonic() - start < 10
    assert nothing_left(fake)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError, ValueError])
def test_an_exception_of_the_callback_cancels(kind: type[BaseException], fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_FAKE", "sleep")
    cache = fake / "timing"

    def stop(what: str, done: int, total: int | None) -> None:
        if (what, done) == ("Building", 1):
            raise kind("enough")

    start = time.monotonic()
    with pytest.raises(kind, match="enough"):
        build(m.conv_relu(), BuildOptions(package=FAKE, timing_cache=cache), stop)
    assert time.monotonic() - start < 10
    assert nothing_left(fake)
    assert not cache.exists()


def test_killed_by_the_system(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_FAKE", "sleep")

    def kill(what: str, done: int, total: int | None) -> None:
        if what == "Building" and done == 1:
            os.kill(int((fake / "pid").read_text()), 9)

    with pytest.raises(EngineError, match="trt_fake was killed by the system, most likely for want of memory; its last messages: Parsing.*Free memory"):
        build(m.conv_relu(), BuildOptions(package=FAKE), kill)


def test_the_child_ends_with_its_parent(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_FAKE", "sleep")
    request = {
        "package": FAKE, "path": str(HERE), "capability": None, "device": None, "level": None, "workspace": None, "sparsity": False, "timing_cache": None,
        "profiles": {},
    }  # fmt: skip
    (fake / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-P", str(WORKER), str(fake / "request.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdin is not None and child.stdout is not None
        assert [json.loads(child.stdout.readline()) for _ in range(3)][-1] == ["Building", 1, 2]
        child.stdin.close()  # what the system does when the parent dies
        assert child.wait(10) == 1


def test_timing_cache_is_read_merged_and_written(fake: Path) -> None:
    cache = fake / "timing"
    options = BuildOptions(package=FAKE, timing_cache=str(cache))
    build(m.conv_relu(), options)
    assert entries(cache) == ["conv 3x3"]
    body = json.dumps(["gemm"]).encode()
    cache.write_bytes(b"ptrt" + bytes(4) + len(body).to_bytes(8, "little") + body)
    build(m.conv_relu(), options)
    assert entries(cache) == ["conv 3x3", "gemm"]


def test_timing_cache_that_another_build_writes_meanwhile(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fake / "timing"
    monkeypatch.setenv("TRT_FAKE_RACE", str(cache))
    build(m.conv_relu(), BuildOptions(package=FAKE, timing_cache=cache))
    assert entries(cache) == ["conv 3x3", "of the other build"]


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"ptrt" + bytes(12) + b"[1", "TensorRT cannot read it"),
        (b"ptrt" + bytes(12) + b'["other GPU"]', "it was made by another version of TensorRT or on another GPU"),
        (b"nothing", "it is damaged or no timing cache"),
    ],
)
def test_unusable_timing_cache(data: bytes, fact: str, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fake / "timing"
    cache.write_bytes(data)
    error = failing("", monkeypatch, BuildOptions(package=FAKE, timing_cache=cache))
    assert error.fact == f"the timing cache cannot be used: {fact}"
    assert error.where == str(cache)
    assert cache.read_bytes() == data


def entries(path: Path) -> list[str]:
    found: list[str] = json.loads(path.read_bytes()[16:])
    return found
