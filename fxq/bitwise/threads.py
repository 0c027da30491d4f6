"""Run one compiled kernel in several threads. Kernels take their work from a common counter, so any number of threads may turn up.

torch's own OpenMP threads run it where they are found (Linux): they are awake between two layers, a start costs a few microseconds, and no second pool
competes with torch's. Elsewhere threads of Python do; compiled kernels run without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

_LOCK = threading.Lock()
_POOL: list[Any] = [None, 0, 0]  # executor, workers, process


def _loaded_openmp() -> list[str]:
    """GNU OpenMP libraries of this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line})


@cache
def openmp(process: int) -> Any:
    """``GOMP_parallel(function, data, threads, flags)`` of GNU's OpenMP for the process in which it is first asked for; ``None`` elsewhere."""
    for path in [*_loaded_openmp(), "libgomp.so.1"]:
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return function
    return None


_STARTED = os.getpid()


def parallel(function: Callable[[int], Any], address: int, description: int, threads: int) -> None:
    """Run ``function(description)``, compiled at ``address``, in ``threads`` threads, and wait for all. In a forked child in this one only."""
    if os.getpid() != _STARTED:  # the parent's OpenMP threads are not here
        function(description)
        return
    run = openmp(_STARTED)
    if run is not None:
        run(address, description, threads, 0)
        return
    futures = [_workers(threads - 1).submit(function, description) for _ in range(threads - 1)]
    function(description)
    for f in futures:
        f.result()


def _workers(count: int) -> ThreadPoolExecutor:
    with _LOCK:
        if _POOL[1] < count:
            _POOL[:2] = [ThreadPoolExecutor(count, "fxq-bitwise"), count]
        return _POOL[0]  # type: ignore[no-any-return]
