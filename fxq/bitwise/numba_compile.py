"""Kernels as C functions, and their cache on disk. Imported only where numba is."""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, types
from numba.extending import overload

Array = np.ndarray[Any, Any]
SIGNATURE = types.void(types.int64)
SOURCES = ("vectors", "tiles", "code_tiles", "numba_compile", "numba_conv", "numba_codes", "numba_kernels")
"""Files that kernels consist of."""


def _slow_address(a: Array) -> int:
    return int(a.__array_interface__["data"][0])


def _fast_address(a: Array) -> int:
    """What numpy's C structure holds behind the object's head: ten times as fast as asking for the interface."""
    return ctypes.c_void_p.from_address(id(a) + object.__basicsize__).value or 0


_SAMPLE = np.arange(3)
address: Callable[[Array], int] = _fast_address if sys.implementation.name == "cpython" and _fast_address(_SAMPLE) == _slow_address(_SAMPLE) else _slow_address


class Kernel:
    """A compiled function of one int64, usually the address of a description. numba keeps it on disk where a folder can be written.

    Attributes:
        function: to call it (without the interpreter's lock).
        address: of its machine code.
    """

    def __init__(self, make: Callable[[bool], Any]) -> None:
        try:
            self._compiled = make(True)
        except (RuntimeError, OSError):  # no folder for the cache
            self._compiled = make(False)
        self.function, self.address = self._compiled.ctypes, self._compiled.address


def source_digest() -> int:
    """Of the files that the kernels consist of: part of the key of numba's cache, which itself looks at one file only."""
    here = Path(__file__).parent
    text = b"".join((here / f"{name}.py").read_bytes() for name in SOURCES)
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "little")


DIGEST = source_digest()  # now, not when something is compiled: the files may change while the process lives
_COMPILE = threading.Lock()
KERNELS: dict[Any, Kernel] = {}


def compiled(key: Any, make: Callable[[int], Callable[[Any], None]]) -> Kernel:
    """The kernel called ``key``; the first time it is compiled from the function that ``make`` gives (which reads its argument, the digest)."""
    found = KERNELS.get(key)
    if found is None:
        with _COMPILE:
            found = KERNELS.get(key)
            if found is None:
                found = KERNELS[key] = Kernel(lambda cached: cfunc(SIGNATURE, cache=cached, error_model="numpy")(make(DIGEST)))
    return found


OPTIONS: Any = {"error_model": "numpy", "nogil": True}


def helper(code: Any) -> Any:
    """A function that kernels call: compiled once for int64 operands (``njit`` would do it again for every constant that is passed)."""

    def choose(*operands: Any) -> Any:
        return code

    choose.__signature__ = signature(code)  # type: ignore[attr-defined]
    overload(code, jit_options=OPTIONS)(choose)
    return code
