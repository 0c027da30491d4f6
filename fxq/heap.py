"""Garbage collection while many small objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def young() -> Iterator[None]:
    """Inside, full collections look only at objects made inside.

    Imported libraries hold millions of objects; looking at all of them takes a sixth of a second, several times a compilation.
    Where the caller has frozen objects (:func:`gc.freeze`), they stay as they are and nothing is done.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
