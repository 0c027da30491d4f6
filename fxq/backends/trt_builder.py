"""TensorRT engines from ONNX bytes, on machines with and without a GPU, in a child process (``trt_worker``) that may crash alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from fxq.backends import trt_layers
from fxq.backends.trt_layers import Layer
from fxq.backends.trt_messages import clean, crash, last_lines, read_log, refusal
from fxq.backends.trt_profiles import Profile, inputs, profiles
from fxq.errors import ArtifactError, EngineError
from fxq.lowering import Artifact
from fxq.pipeline import Progress, no_progress

WORKER = Path(__file__).with_name("trt_worker.py")
FULL, RTX = "tensorrt", "tensorrt_rtx"
TRIES = 5
"""Builds after which a reproducible one is given up."""
KEPT = ("CUDA", "NV", "TRT", "LD_", "PATH", "HOME", "TMP", "TEMP", "SYSTEMROOT")
"""How the names of variables begin that the child process gets."""
STEADY = {"PYTHONHASHSEED": "0", "PYTHONMALLOC": "malloc", "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TOP_PAD_": str(1 << 26)}
"""Memory that the builder's threads take lies at addresses that do not depend on who asks first: its internal names follow from them."""
INSTALL = 'Install it: pip install "fxq[tensorrt]"'


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine.

    Attributes:
        capability: the GPU's compute capability, ``sm75``, ``sm80``, ``sm86``, ``sm89``, ``sm120`` or ``sm121``. ``None``: TensorRT-RTX builds for all of
            8.0, 8.6, 8.9 and 12.x, full TensorRT for this machine's GPU, the only one it can build for.
        profiles: input -> its (least, best, greatest) shapes. Empty: 1, 8 and 32 in every dynamic dimension.
        timing_cache: file of kernel measurements, read when it is there and written afterwards. TensorRT-RTX measures nothing: there it has no effect.
        package: ``tensorrt`` or ``tensorrt_rtx``. ``None``: full TensorRT where it is installed and there is a GPU, otherwise TensorRT-RTX.
        level: the builder's optimization level, 0 to 5; ``None`` for TensorRT's default.
        workspace: most bytes of GPU memory that a kernel may use beside its tensors; ``None`` for all.
        sparsity: use 2:4 sparse kernels where the weights allow it.
        timeout: seconds after which a build is given up; ``None`` for never.
        reproducible: build until two builds give the same bytes (nearly always the first two), for archives that compare engines.
    """

    capability: str | None = None
    profiles: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    timing_cache: str | os.PathLike[str] | None = None
    package: str | None = None
    level: int | None = None
    workspace: int | None = None
    sparsity: bool = False
    timeout: float | None = None
    reproducible: bool = False


@dataclass(frozen=True)
class Built:
    """A finished engine.

    Attributes:
        engine: the serialized engine.
        layers: after fusion, in order of execution.
        log: TensorRT's messages as ``(severity, text)``, without the layer table and without the noise of machines that have no GPU.
        seconds: wall-clock time of the whole call, the child process included.
        package: ``tensorrt`` or ``tensorrt_rtx``.
        version: of the package.
        profiles: least, best and greatest shape of every dynamic input, as built; empty when nothing is dynamic.
    """

    engine: bytes
    layers: tuple[Layer, ...]
    log: tuple[tuple[str, str], ...]
    seconds: float
    package: str
    version: str
    profiles: dict[str, Profile]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What TensorRT warned of, each warning once."""
        return tuple(dict.fromkeys(clean(text) for severity, text in self.log if severity == "WARNING"))


def installed(package: str) -> str | None:
    """Version of an installed package, found without importing it; ``None`` when it is not there."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:  # a folder that happens to have this name has no origin
        return None
    name = package.replace("_", "-")
    for distribution in (name, f"{name}-cu13", f"{name}-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "of unknown version"


def available() -> str | None:
    """``"tensorrt_rtx 1.7.1.116"``: the package that builds engines here and its version, or ``None``. Nothing is imported."""
    for package in (FULL, RTX):
        version = installed(package)
        if version is not None and (package != FULL or torch.cuda.is_available()):
            return f"{package} {version}"
    return None


def chosen(package: str | None) -> str:
    """The package to use: the one asked for, or the best of this machine.

    Raises:
        EngineError: when it is not installed.
    """
    if package is None:
        found = available()
        if found is None:
            raise EngineError("no TensorRT is installed", way_out=INSTALL)
        return found.split()[0]
    if installed(package) is None:
        raise EngineError(f"the package {package!r} is not installed", way_out=INSTALL)
    return package


def build(onnx_bytes: bytes, options: BuildOptions | None = None, progress: Progress = no_progress) -> Built:
    """Build an engine. May be called from several threads.

    The same input gives the same bytes, but for internal names of big nets once in some dozens of builds; ``reproducible`` is for those.

    Args:
        onnx_bytes: the ONNX file, with its weights inside.
        options: how; the defaults build a portable engine.
        progress: called with phase, steps done and number of steps. An exception that it raises cancels the build and leaves nothing behind; so does
            ``KeyboardInterrupt``.

    Raises:
        EngineError: when the package is missing, a profile does not fit the file, TensorRT refuses the graph (with its node and text), its process crashes or
            takes too long, or the timing cache cannot be used.
    """
    options = options or BuildOptions()
    if not options.reproducible:
        return _build(onnx_bytes, options, progress)
    start, seen = time.perf_counter(), set()
    for _ in range(TRIES):
        built = _build(onnx_bytes, options, progress)
        if built.engine in seen:
            return replace(built, seconds=time.perf_counter() - start)
        seen.add(built.engine)
    raise EngineError(f"no two of {TRIES} builds gave the same bytes", way_out="Build on a machine that does less at the same time, or without reproducible")


def _build(onnx_bytes: bytes, options: BuildOptions, progress: Progress) -> Built:
    start = time.perf_counter()
    package = chosen(options.package)
    request = _request(package, options)
    request["profiles"] = built_for = profiles(inputs(onnx_bytes), options.profiles)
    with tempfile.TemporaryDirectory(prefix="fxq-") as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(onnx_bytes)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        result = _run(folder, package, options.timeout, progress)
        version = result["version"]
        if "error" in result:
            raise refusal(result["error"], f"{package} {version}", request)
        parse = trt_layers.parse_log if result["form"] == "log" else trt_layers.parse_inspector
        layers = parse(result["table"])
        if options.timing_cache is not None:
            _save_cache(folder / "timing.bin", options.timing_cache)
        log = tuple(m for m in read_log(folder) if not m[1].startswith("Layers:"))
        engine = (folder / "engine.bin").read_bytes()
    return Built(engine, layers, log, time.perf_counter() - start, package, version, built_for)


def _request(package: str, options: BuildOptions) -> dict[str, Any]:
    """What the child is asked for.

    Raises:
        EngineError: for options that no package takes.
    """
    capability, level, workspace, timeout = options.capability, options.level, options.workspace, options.timeout
    if capability is not None and not re.fullmatch(r"sm\d+", str(capability)):
        raise EngineError(f"{capability!r} is no compute capability", way_out="Write it like sm86, or leave it out for a portable engine")
    if level is not None and level not in range(6):
        raise EngineError(f"optimization level {level!r} does not exist", way_out="Choose 0 to 5")
    if workspace is not None and not (isinstance(workspace, int) and workspace > 0):
        raise EngineError(f"a workspace of {workspace!r} bytes is not possible", way_out="Give a positive number of bytes, or None for all memory")
    if timeout is not None and not timeout > 0:
        raise EngineError(f"a timeout of {timeout!r} s is not possible", way_out="Give a positive number of seconds, or None to wait")
    device = "sm{}{}".format(*torch.cuda.get_device_capability(0)) if torch.cuda.is_available() else None
    cache = None if options.timing_cache is None else _cache_path(Path(options.timing_cache))
    return {
        "package": package, "path": _folder(package), "capability": capability, "device": device, "level": level,
        "workspace": workspace, "sparsity": options.sparsity, "timing_cache": cache,
    }  # fmt: skip


def _folder(package: str) -> str:
    """The folder that a package is imported from."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, "asked for before"
    origin = Path(spec.origin)
    return str(origin.parent.parent if spec.submodule_search_locations else origin.parent)


def _environment() -> dict[str, str]:
    """Of the child: what TensorRT and the loader of libraries read, and nothing whose length would move its memory."""
    return {**{k: v for k, v in os.environ.items() if k.startswith(KEPT)}, **STEADY}


def _cache_path(path: Path) -> str:
    """A timing cache that can be read and written, before the work of a build is spent."""
    if path.is_dir():
        raise EngineError("the timing cache is a folder", where=str(path), way_out="Give the name of a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.exists() and not os.access(path, os.R_OK):
        raise EngineError("the timing cache cannot be read and written there", where=str(path), way_out="Check that the folder exists and is writable")
    return str(path.absolute())


def _save_cache(source: Path, target: str | os.PathLike[str]) -> None:
    if source.exists():
        try:
            Artifact("tensorrt", source.read_bytes()).save(target, force=True)
        except ArtifactError as e:
            raise EngineError(f"the timing cache {e.fact}", where=e.where, way_out=e.way_out) from e


# ---- the child -----------------------------------------------------------------------------------------------------------------


def _run(folder: Path, package: str, timeout: float | None, progress: Progress) -> dict[str, Any]:
    """Let a child build; its result."""
    deadline = None if timeout is None else time.monotonic() + timeout
    with _child(folder) as (child, lines):
        while True:
            try:
                line = lines.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                fact = f"{package} did not finish in {timeout:g} s{last_lines(folder)}"
                raise EngineError(fact, way_out="Allow more time, or build a smaller part of the model") from None
            if line is None:
                break
            progress(*json.loads(line))
        code = child.wait()
    if code != 0:
        raise crash(folder, package, code)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


@contextlib.contextmanager
def _child(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], queue.SimpleQueue[bytes | None]]]:
    """The worker's process, and the lines that it prints, ``None`` at their end. It is gone when the block is left, however that happens."""
    command = [sys.executable, "-P", "-W", "ignore", str(WORKER), str(folder / "request.json")]
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with (folder / "stderr.txt").open("wb") as errors:
        # A session of its own: Linux then weighs it as one against other programs, and their load does not change the order of its threads.
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment(), start_new_session=True)
    assert child.stdin is not None and child.stdout is not None
    reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    try:
        reader.start()
        yield child, lines
    finally:
        child.kill()
        child.wait()
        reader.join()
        child.stdin.close()
        child.stdout.close()


def _read(pipe: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put(None)
