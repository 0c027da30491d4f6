"""Which inner loop of rANS runs: numba's where it is installed and the tensor is worth loading it, plain Python for few lanes, else numpy.

All give the same bytes.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from typing import Any

import numpy as np

from fxq.archive import decoder

Array = np.ndarray[Any, Any]
WORTH, FEW = 1 << 20, 40
"""Symbols from which on numba is loaded; lanes below which numpy's calls cost more than Python's loop."""


@cache
def _load() -> Any:
    try:
        kernels = importlib.import_module("fxq.archive.rans_numba")
        one = np.zeros(1, np.uint8)
        kernels.decode(one[:0], np.full(1, decoder.LOW, np.uint32), np.full(256, 256, np.uint32), 8, np.zeros(256, np.uint8), one[:0])
    except ModuleNotFoundError as e:
        if e.name != "numba":
            raise
        return None
    except Exception as e:  # whatever a broken numba or LLVM raises
        warnings.warn(f"numba does not work here, archives are read and written by numpy: {type(e).__name__}: {e}", RuntimeWarning, stacklevel=3)
        return None
    return kernels


def kernels(size: int) -> Any:
    """The compiled loops for ``size`` symbols, or None. ``FXQ_NUMBA=0`` switches them off."""
    if os.environ.get("FXQ_NUMBA") == "0" or (size < WORTH and not _load.cache_info().currsize):
        return None
    return _load()


def loop(words: Array, x: Array, slots: Array, bits: int, values: Array, out: Array) -> int:
    """As :func:`fxq.archive.decoder.lockstep`."""
    compiled = kernels(out.size)
    if compiled is not None:
        return int(compiled.decode(words, x, slots, bits, values, out))
    return (one_by_one if len(x) < FEW else decoder.lockstep)(words, x, slots, bits, values, out)


def one_by_one(words: Array, x: Array, slots: Array, bits: int, values: Array, out: Array) -> int:
    """As :func:`fxq.archive.decoder.lockstep`, one symbol after the other."""
    w, state, table, lanes, pos, mask = words.view("<u2").tolist(), x.tolist(), slots.tolist(), len(x), 0, (1 << bits) - 1
    block = lanes * max(1, decoder.BLOCK // lanes)
    for start in range(0, out.size, block):
        found = []
        for i in range(min(block, out.size - start)):
            v = state[i % lanes]
            found.append(v & mask)
            entry = table[v & mask]
            v = (entry & 0xFFFF) * (v >> bits) + (entry >> 16)
            if v < decoder.LOW:
                decoder.need(pos < len(w), "its words are cut off")
                v, pos = v << 16 | w[pos], pos + 1
            state[i % lanes] = v
        out[start : start + len(found)] = values[found]
    x[:] = state
    return pos


decoder.LOOP = loop
