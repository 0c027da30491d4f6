"""Plain functions compiled by numba, kept on disk where a folder can be written. Imported only where numba is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def jit(*fastmath: str) -> Callable[[Callable[..., None]], Any]:
    """A decorator: compile at the first call, run without the interpreter's lock, with those of LLVM's fast-math flags."""

    def compiled(fn: Callable[..., None]) -> Any:
        options: dict[str, Any] = {"nogil": True, "boundscheck": False, "fastmath": set(fastmath)}
        try:
            return njit(cache=True, **options)(fn)
        except RuntimeError:  # no folder for the cache
            return njit(**options)(fn)

    return compiled
