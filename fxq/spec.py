"""The grid as data: :class:`QuantSpec` says which codes exist, :class:`QParams` where they lie on the real line."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxq.errors import SchemeError

_LETTER = {"binary": "b", "ternary": "t", "codebook": "c", "float8": "f"}
_KIND = {v: k for k, v in _LETTER.items()}
_TEXT = re.compile(r"([usbtcf])(\d+)(n?)([ay]?)/(?:pt|pc(\d+)|pb(\d+)x(\d+))")
FLOAT8_MAX = 448
"""Greatest number of the 8-bit float E4M3FN (Micikevicius et al. 2022, arXiv 2209.05433, table 1)."""


@dataclass(frozen=True)
class QuantSpec:
    """Which integer codes a tensor may take.

    Text form ``<letter><bits>[n][a|y]/<pt|pcAXIS|pbBLOCKxAXIS>``: ``u8/pt`` is unsigned 8 bit, asymmetric, per tensor;
    ``s8n/pc0`` is signed 8 bit narrow ([-127, 127]), symmetric, per channel along axis 0; ``s4/pb128x1`` has a scale for each 128
    elements in a row along axis 1. Signed grids are symmetric and unsigned ones asymmetric unless marked ``a`` (asymmetric) or ``y``
    (symmetric). ``b``, ``t``, ``c`` are binary, ternary and codebook grids, ``f8`` the 8-bit float E4M3FN, whose codes are numbers.

    Attributes:
        bits: width of a code, 1 to 16 (32 for biases).
        signed: two's complement codes instead of unsigned ones.
        narrow: leave out the most negative code, so that the range is symmetric around 0.
        symmetric: the zero point is 0.
        axis: channel axis with a scale of its own per index, or ``None`` for one scale.
        kind: ``affine``, ``binary``, ``ternary``, ``codebook`` or ``float8``.
        block: so many elements in a row along ``axis`` share a scale, or ``None``.

    Raises:
        SchemeError: for a combination that no code set has.
    """

    bits: int
    signed: bool
    narrow: bool = False
    symmetric: bool = False
    axis: int | None = None
    kind: str = "affine"
    block: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 32:
            raise SchemeError(f"a grid of {self.bits} bits does not exist", way_out="Use 1 to 32 bits")
        if self.kind not in ("affine", *_LETTER):
            raise SchemeError(f"unknown kind of grid {self.kind!r}", way_out="Use affine, binary, ternary, codebook or float8")
        if self.kind == "float8" and (self.bits, self.signed, self.narrow, self.symmetric) != (8, True, False, True):
            raise SchemeError("a float8 grid is 8 bits, signed and symmetric", way_out="Write it 'f8/pt' or 'f8/pc0'")
        if self.block is not None and (self.block < 2 or self.axis is None):
            raise SchemeError("blocks of a grid have at least 2 elements and an axis", way_out="Write it like 's4/pb128x1'")
        if self.narrow and not self.signed:
            raise SchemeError("a narrow grid must be signed", way_out="Drop narrow=True or set signed=True")
        if self.kind == "affine" and (self.qmax == self.qmin or (self.symmetric and self.qmax == 0)):
            raise SchemeError("a signed grid of 1 bit has no positive code", way_out="Use 2 bits, or kind='binary'")

    @property
    def qmin(self) -> int:
        """Least code."""
        if self.kind == "float8":
            return -FLOAT8_MAX
        if self.kind in ("binary", "ternary"):
            return -1
        return (-(1 << (self.bits - 1)) + int(self.narrow)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Greatest code."""
        if self.kind == "float8":
            return FLOAT8_MAX
        if self.kind in ("binary", "ternary"):
            return 1
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Smallest torch integer type that holds every code; of ``float8`` ``torch.float8_e4m3fn``."""
        if self.kind == "float8":
            return torch.float8_e4m3fn
        if self.bits <= 8:
            return torch.int8 if self.qmin < 0 else torch.uint8
        return torch.int16 if self.bits <= 16 and self.qmin < 0 else torch.int32

    def per_tensor(self) -> QuantSpec:
        """The same codes with one scale for the whole tensor."""
        return replace(self, axis=None, block=None)

    def __str__(self) -> str:
        letter = _LETTER.get(self.kind) or ("s" if self.signed else "u")
        odd = "" if self.symmetric == self.signed or self.kind != "affine" else ("y" if self.symmetric else "a")
        place = "pt" if self.axis is None else f"pc{self.axis}" if self.block is None else f"pb{self.block}x{self.axis}"
        return f"{letter}{self.bits}{'n' if self.narrow else ''}{odd}/{place}"

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Inverse of ``str(spec)``.

        Raises:
            SchemeError: when ``text`` is not a grid.
        """
        m = _TEXT.fullmatch(text)
        if m is None:
            raise SchemeError(f"{text!r} is not a grid", way_out="Write it like 'u8/pt', 's8n/pc0', 's4a/pc0' or 's4/pb128x1'")
        letter, bits, narrow, odd, channel, block, along = m.groups()
        axis = channel if block is None else along
        kind = _KIND.get(letter, "affine")
        signed = letter != "u"
        symmetric = (signed or kind != "affine") if not odd else odd == "y"
        return cls(int(bits), signed, bool(narrow), symmetric, None if axis is None else int(axis), kind, None if block is None else int(block))


@dataclass(frozen=True, eq=False)
class QParams:
    """A grid on the real line: ``real = (code - zero_point) * scale``.

    Attributes:
        spec: the codes.
        scale: float32, rank 0 (per tensor), ``[C]`` (per channel along ``spec.axis``) or, in blocks, of the tensor's rank with
            ``spec.axis`` shorter by the block; finite, > 0, not denormal.
        zero_point: int32 of the same shape, inside ``[qmin, qmax]``.

    Raises:
        SchemeError: when scale or zero point break these rules.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        s, z = self.scale, self.zero_point
        tiny = torch.finfo(torch.float32).tiny
        if s.dtype != torch.float32 or z.dtype != torch.int32 or s.shape != z.shape:
            raise SchemeError(
                f"scale {s.dtype}{list(s.shape)} and zero point {z.dtype}{list(z.shape)} must be float32 and int32 of one shape",
                way_out="A compiled model stays float32; call m.float()",
            )
        if (s.ndim != 0) != (self.spec.axis is not None) or (s.ndim > 1) != (self.spec.block is not None):
            raise SchemeError(f"a scale of shape {list(s.shape)} does not fit the grid {self.spec}")
        if torch.compiler.is_compiling():
            return  # numbers are not known while a graph is compiled
        if not bool(torch.isfinite(s).all()) or bool((s < tiny).any()):
            raise SchemeError(f"a scale of the grid {self.spec} is not finite, not positive or denormal")
        if bool((z < self.spec.qmin).any()) or bool((z > self.spec.qmax).any()):
            raise SchemeError(f"a zero point lies outside [{self.spec.qmin}, {self.spec.qmax}]")

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest real value that the grid holds (over all channels)."""
        lo = (self.spec.qmin - self.zero_point) * self.scale
        hi = (self.spec.qmax - self.zero_point) * self.scale
        return float(lo.min()), float(hi.max())

    def same_grid(self, other: QParams) -> bool:
        """True when both put every code on the same real value."""
        return (
            self.spec == other.spec
            and self.scale.shape == other.scale.shape
            and bool((self.scale == other.scale).all())
            and bool((self.zero_point == other.zero_point).all())
        )

    def __str__(self) -> str:
        if self.scale.ndim:
            return f"{self.spec} scale[{self.scale.numel()}] {float(self.scale.min()):.4g}..{float(self.scale.max()):.4g}"
        return f"{self.spec} scale {float(self.scale):.6g} zp {int(self.zero_point)}"
