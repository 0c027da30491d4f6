"""Which kernels run: numba's where it is installed and wanted (``FXQ_NUMBA`` is not 0), otherwise numpy's."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from fxq.bitwise import numpy_kernels
from fxq.bitwise.layout import AddConstants, Epilogue, Layer, Pair

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Engine:
    """The kernels of one implementation, on numpy arrays. All engines give the same bits; arrays in memory order are read without a copy.

    Attributes:
        name: ``numba`` or ``numpy``.
        path: the instructions: ``AVX-512 VPOPCNTDQ``, ``AVX-512``, ``AVX2``, ``NEON`` or ``generic``.
        kernels: the module that holds them.
    """

    name: str
    path: str
    kernels: ModuleType

    def conv(self, x: Array, layer: Layer, epilogue: Epilogue, threads: int = 1) -> Array:
        """Convolution or matrix product of packed values.

        Args:
            x: uint64 ``[P, B, H, W, words]``; of a linear layer ``[P, 1, 1, rows, words]``.
            layer: :func:`fxq.bitwise.layout.pack_layer`.
            epilogue: what becomes of the dot products.
            threads: at most so many run.

        Returns:
            Packed uint64 ``[P', B, OH, OW, words']``, or int8, uint8, int32 or float32 ``[B, OH, OW, N]``.

        Raises:
            FxqError: when the arguments do not fit.
        """
        return self.kernels.conv(x, layer, epilogue, threads)  # type: ignore[no-any-return]

    def pack(self, x: Array, lo: float, hi: float, planes: int, channels_last: bool, threads: int = 1) -> Array:
        """Bits of values: plane 0 is ``x >= hi``, plane 1 (of two) ``x >= hi or x <= lo``. NaN reaches no bound.

        Args:
            x: float32, uint8 or int8 ``[B, C, S]``, with ``channels_last`` ``[B, S, C]``.
            lo, hi: thresholds; of float32 values they are rounded to float32.

        Returns:
            uint64 ``[planes, B, S, words]``.
        """
        return self.kernels.pack(x, lo, hi, planes, channels_last, threads)  # type: ignore[no-any-return]

    def unpack(self, packed: Array, channels: int, threads: int = 1) -> Array:
        """int8 ``[B, H, W, C]`` of -1 and 1 (one plane) or -1, 0 and 1 (two)."""
        return self.kernels.unpack(packed, channels, threads)  # type: ignore[no-any-return]

    def max_pool(
        self, packed: Array, channels: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), ceil_mode: bool = False, threads: int = 1
    ) -> Array:
        """Maximum over windows of packed values; padding takes no part, as in ``torch.nn.MaxPool2d``."""
        return self.kernels.max_pool(packed, channels, kernel, stride, padding, dilation, ceil_mode, threads)  # type: ignore[no-any-return]

    def add(self, a: Array, b: Array, constants: AddConstants, threads: int = 1) -> Array:
        """Sum of two arrays of uint8 codes of one shape as codes of a third grid, uint8."""
        return self.kernels.add(a, b, constants, threads)  # type: ignore[no-any-return]

    def table(self, x: Array, values: Array, threads: int = 1) -> Array:
        """``values[x]``: a pointwise function of uint8 codes, uint8 ``[256]``."""
        return self.kernels.table(x, values, threads)  # type: ignore[no-any-return]

    def code_pool(self, codes: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1), ceil_mode: bool = False, threads: int = 1) -> Array:
        """Maximum over windows of uint8 or int8 codes ``[B, H, W, C]``; padding takes no part."""
        return self.kernels.code_pool(codes, kernel, stride, padding, dilation, ceil_mode, threads)  # type: ignore[no-any-return]

    def quantize(self, x: Array, scale: float, zero: int, qmin: int, qmax: int, channels_last: bool, threads: int = 1) -> Array:
        """Codes of a grid per tensor, those of :func:`fxq.numerics.quantize`. NaN has no code.

        Args:
            x: float32 ``[B, C, S]``, with ``channels_last`` ``[B, S, C]``.

        Returns:
            ``[B, S, C]``, int8 where ``qmin < 0``, otherwise uint8.
        """
        return self.kernels.quantize(x, scale, zero, qmin, qmax, channels_last, threads)  # type: ignore[no-any-return]


NUMPY = Engine("numpy", "generic", numpy_kernels)


def engine() -> Engine:
    """The engine of this process, chosen at the first call.

    ``FXQ_NUMBA=0`` in the environment switches numba off. Where it is not installed, or does not work, one :class:`RuntimeWarning` says so.
    """
    return NUMPY if os.environ.get("FXQ_NUMBA", "1") == "0" else _compiled()


@cache
def _compiled() -> Engine:
    why = "on a big-endian machine"
    if sys.byteorder == "little":
        try:
            kernels = importlib.import_module("fxq.bitwise.numba_kernels")
            return Engine("numba", kernels.PATH, kernels)
        except ImportError as e:
            why = "without numba: pip install 'fxq[bitwise]'" if (e.name or "").split(".")[0] in ("numba", "llvmlite") else f"{e}"
        except Exception as e:  # whatever a broken numba or LLVM raises
            why = f"numba does not work here: {type(e).__name__}: {e}"
    warnings.warn(f"bitwise kernels run in numpy, many times slower ({why})", RuntimeWarning, stacklevel=3)
    return NUMPY
