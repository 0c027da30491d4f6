"""Run one compiled kernel in several threads. Kernels take their work from a common counter, so any number of threads may turn up.

torch's own OpenMP threads run it where they are found (Linux): they are awake between two layers, a start costs a few microseconds, and no second pool
competes with torch's. Elsewhere threads of Python do: compiled kernels run without the interpreter's lock. Imported only where numba is.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from fxq.bitwise.numba_compile import Array, Kernel, address

_FORKED: list[int] = []


def _loaded_openmp() -> list[str]:
    """GNU OpenMP libraries of this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line})


@cache
def openmp() -> Any:
    """``GOMP_parallel(function, data, threads, flags)`` of GNU's OpenMP, torch's if torch is there; ``None`` where there is none."""
    for path in [*_loaded_openmp(), "libgomp.so.1"]:
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return function
    return None


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "fxq-bitwise")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _FORKED.append(os.getpid()))


def run(job: Kernel, description: Array, threads: int) -> None:
    """Run a kernel on a description (int64) in up to ``threads`` threads and wait for all; in a forked child, which lacks the parent's threads, in one."""
    at = address(description)
    if threads <= 1 or _FORKED:
        job.function(at)
        return
    parallel = openmp()
    if parallel is not None:
        parallel(job.address, at, threads, 0)
        return
    helpers = [_workers(threads - 1).submit(job.function, at) for _ in range(threads - 1)]
    job.function(at)
    for h in helpers:
        if not h.cancel():
            h.result()
