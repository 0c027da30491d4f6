"""What this machine and its software can do for quantized models: processor, GPU, compiler, memory, packages."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

X86 = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX-512 VNNI", "avx_vnni_int8": "AVX-VNNI-INT8", "amx_int8": "AMX int8",
}  # fmt: skip
ARM = {"asimd": "NEON", "asimddp": "dot product", "i8mm": "i8mm", "sve": "SVE", "sve2": "SVE2", "sme": "SME"}
"""Flags of ``/proc/cpuinfo`` that integer kernels ask for, by name."""
EXACT = ("avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")
"""Flags with which u8*s8 products are summed in 32 bits."""
COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True)
class Machine:
    """The machine.

    Attributes:
        system: operating system and its release.
        cpu: name of the processor, ``unknown`` where the system does not tell.
        cores: logical processors.
        flags: of :data:`X86` or :data:`ARM`, those that the processor has; None where the system does not tell.
        memory: bytes, None where the system does not tell.
        gpus: ``name, compute capability 8.6`` of each CUDA device.
        compiler: path of a C++ compiler, or None.
    """

    system: str
    cpu: str
    cores: int
    flags: tuple[str, ...] | None
    memory: int | None
    gpus: tuple[str, ...]
    compiler: str | None

    @property
    def int8(self) -> str:
        """What the processor means for integer kernels: speed, and whether sums can saturate."""
        if self.flags is None:
            return "unknown: the system does not tell the processor's flags"
        if any(f in EXACT for f in self.flags):
            have = ", ".join({**X86, **ARM}[f] for f in self.flags if f in EXACT)
            return f"fast and exact: {have} adds products of 8-bit integers in 32 bits"
        if "avx2" in self.flags:
            return (
                "no VNNI: int8 gains less, and pairs of u8*s8 products are added in 16 bits, which can saturate: the same file may give other numbers here. "
                "Compile with portable=True for grids that cannot saturate"
            )
        return "no instructions for products of 8-bit integers: int8 saves memory, not much time"

    def lines(self) -> list[str]:
        """The machine as text."""
        names = {**X86, **ARM}
        flags = "unknown" if self.flags is None else ", ".join(names[f] for f in self.flags) or "none of " + ", ".join(names.values())
        memory = "unknown" if self.memory is None else f"{self.memory / 2**30:.1f} GiB"
        return [
            f"system    {self.system}", f"cpu       {self.cpu}, {self.cores} cores; {flags}", f"int8      {self.int8}", f"memory    {memory}",
            f"gpu       {'; '.join(self.gpus) or 'none that CUDA knows'}", f"compiler  {self.compiler or 'none'}",
        ]  # fmt: skip


def machine(cpuinfo: str | os.PathLike[str] = "/proc/cpuinfo") -> Machine:
    """This machine.

    Args:
        cpuinfo: the file in which Linux tells its processors' names and flags.
    """
    try:
        text = Path(cpuinfo).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    name, flags = processor(text)
    if flags is None and platform.system() == "Darwin" and platform.machine() == "arm64":
        name, flags = "Apple silicon", ("asimd", "asimddp")  # all of its chips have both
    return Machine(
        f"{platform.system()} {platform.release()}, {platform.machine()}", name or platform.processor() or "unknown", os.cpu_count() or 1, flags, _memory(),
        _gpus(), next((path for c in COMPILERS if (path := shutil.which(c))), None),
    )  # fmt: skip


def processor(cpuinfo: str) -> tuple[str, tuple[str, ...] | None]:
    """Name and integer flags of the first processor.

    Args:
        cpuinfo: text of ``/proc/cpuinfo``.

    Returns:
        The name (empty when there is none) and the known flags in their usual order, or None when there are no flags in the text.
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    told = fields.get("flags", fields.get("features"))
    names = X86 if "flags" in fields else ARM
    return fields.get("model name", ""), None if told is None else tuple(f for f in names if f in told.split())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor} (target sm{major}{minor})")
    return tuple(found)


@dataclass(frozen=True)
class Need:
    """A package that fxq uses.

    Attributes:
        name: its name for pip.
        what: what it is for.
        install: what ``pip install`` takes to bring it.
        least: the least version that works, empty for any.
        proven: the version that fxq's tests run with, empty when they run without it.
        core: fxq does not work without it.
    """

    name: str
    what: str
    install: str
    least: str = ""
    proven: str = ""
    core: bool = False


NEEDS = (
    Need("torch", "models, FX", "fxq", "2.6", "2.14.1", True),
    Need("numpy", "arrays", "fxq", "", "2.4.6", True),
    Need("onnx", "ONNX files", "fxq", "1.17", "1.23.2", True),
    Need("onnxscript", "torch's exporter, for float islands", "fxq", "", "0.7.2", True),
    Need("onnxruntime", "runs and proves ONNX files", "fxq", "1.20", "1.31.1", True),
    Need("torchvision", "models torchvision:NAME, image folders", "fxq", "", "0.29.1", True),
    Need("safetensors", "weight files", "fxq", "", "0.8.0", True),
    Need("rich", "the progress bar", "fxq", "", "15.0.0", True),
    Need("tensorrt-rtx", "TensorRT engines, built on any machine", "fxq[tensorrt]", "1.7.1", "1.7.1.116"),
    Need("tensorrt", "TensorRT engines, built and run on this machine's GPU", "tensorrt"),
    Need("openvino", "runs files in OpenVINO", "openvino", "", "2026.4.1"),
    Need("numba", "compiled bitwise kernels", "fxq[bitwise]"),
    Need("timm", "models timm:NAME", "timm"),
    Need("matplotlib", "charts in reports", "fxq[report]", "", "3.11.2"),
    Need("fast-sugiyama", "the layout of graphs in reports", "fxq[report]", "0.5", "0.5.3"),
)
"""What is looked for, in the order that it is shown."""


@dataclass(frozen=True)
class Package:
    """A package on this machine.

    Attributes:
        name, what: as in :class:`Need`.
        version: the installed version, None when it is missing.
        state: ``proven``, ``fine`` (new enough), ``old``, ``missing``.
        note: what follows, with the pip line where one helps; empty when nothing does.
        core: fxq does not work without it.
    """

    name: str
    what: str
    version: str | None
    state: str
    note: str
    core: bool

    @property
    def bad(self) -> bool:
        """It would stop a compilation."""
        return self.core and self.state in ("old", "missing")


def packages(version_of: Callable[[str], str] = metadata.version) -> list[Package]:
    """The packages of :data:`NEEDS` as they are installed; none is imported.

    Args:
        version_of: gives the version of a package, or raises ``PackageNotFoundError``.
    """
    return [_package(need, version_of) for need in NEEDS]


def _package(need: Need, version_of: Callable[[str], str]) -> Package:
    try:
        version = version_of(need.name)
    except metadata.PackageNotFoundError:
        return Package(need.name, need.what, None, "missing", f"pip install {need.install}", need.core)
    if need.least and numbers(version) < numbers(need.least):
        note = f"fxq needs {need.least} or newer: pip install -U {need.name}"
        return Package(need.name, need.what, version, "old", note, need.core)
    if need.proven and numbers(version)[:3] != numbers(need.proven)[:3]:
        return Package(need.name, need.what, version, "fine", f"fxq is proven with {need.proven}", need.core)
    return Package(need.name, need.what, version, "proven" if need.proven else "fine", "", need.core)


def numbers(version: str) -> tuple[int, ...]:
    """``2.14.1+cpu`` -> ``(2, 14, 1)``."""
    return tuple(int(v) for v in re.findall(r"\d+", version.split("+")[0]))
