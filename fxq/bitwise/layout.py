"""The one packed layout of all engines: activations as planes of 64-bit words, weights in blocks of output channels, tables of the borders.

Activations: uint64 ``[P, B, H, W, words]``, ``words = ceil(C / 64)``; channel ``c`` is bit ``c % 64`` of word ``c // 64``. Binary (``P = 1``):
plane 0 is ``x = +1``. Ternary (``P = 2``): plane 0 is ``x = +1``, plane 1 is ``x != 0`` and holds plane 0. Spare bits are 0.

Dot products on bits: XNOR-Net (arXiv 1603.05279), section 3.2, and TBN (ECCV 2018), with a table that makes zero padding exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fxq.bitwise.bits import WORD, Array, Pair, pack_bits, popcount, unpack_bits, words_of
from fxq.bitwise.checks import check_conv, check_pack, check_packed, check_window, pool_size
from fxq.errors import FxqError

__all__ = [
    "AddConstants", "Array", "Borders", "Epilogue", "Layer", "Pair", "as_padding", "borders", "check_conv", "check_pack", "check_packed", "codes_epilogue",
    "float_epilogue", "int32_epilogue", "pack_bits", "pack_layer", "pool_size", "popcount", "sign_epilogue", "tap_sums", "ternary_epilogue", "unpack_bits",
    "words_of",
]  # fmt: skip

LANES, TAIL = 32, 8
"""Output channels of a block of weights, and of the blocks that hold the rest."""

INT32 = np.iinfo(np.int32)
LINE = 8
"""Words of a line of the cache."""
CHUNK = 1 << 21
"""Elements of a temporary array that functions of numpy may make at once."""


# ---------------------------------------------------------------- weights


@dataclass(frozen=True, eq=False)
class Layer:
    """Packed weights of a convolution or linear layer (kernel 1x1).

    Raises an :class:`FxqError` for numbers that contradict each other, so that no kernel ever reads beside an array.

    Attributes:
        words: uint64, all blocks one behind the other.
        blocks: int64 ``[n, 5]``, a row a block: first output channel, lanes, first word of the input, words, offset in ``words``.
            Of tap ``t``, word ``w`` and plane ``p`` it holds ``words[offset + ((p * taps + t) * words + w) * lanes + lane]``; plane 0 is
            ``weight = +1``, plane 1 (of a masked layer) ``weight != 0``. Taps and words as of ``steps``.
        channels, outputs: input and output channels.
        groups: of channels.
        kernel, stride, dilation: rows, columns.
        padding: zeros on top, at the bottom, left, right.
        masked: has plane 1: ternary weights, or groups that share the words of a block.
        cache: what engines derive from it.
    """

    words: Array
    blocks: Array
    channels: int
    outputs: int
    groups: int = 1
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    masked: bool = False
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_window(self.kernel, self.stride, self.dilation, self.padding)
        _check_blocks(self)

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def gathered(self) -> bool:
        """Groups that do not end with a word: their kernels read, for each output position, words in which the bits of all taps of a group stand one behind
        the other (:func:`group_words` of them), as if the layer had one tap. Otherwise they would share words, which a mask would have to sort out."""
        return gathers(self.channels // self.groups, self.outputs // self.groups, self.groups)

    @property
    def steps(self) -> tuple[int, int]:
        """Taps of the blocks and words of each position that they read: those of the input, or (``gathered``) one and the groups' words."""
        if self.gathered:
            return 1, self.groups * group_words(self.channels // self.groups, self.taps)
        return self.taps, words_of(self.channels)

    @property
    def lanes(self) -> int:
        """Output channels with those that fill up the last block: the length of all tables."""
        return int(self.blocks[-1, 0] + self.blocks[-1, 1])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return int(self.words.nbytes)

    def out_size(self, h: int, w: int) -> Pair:
        """Rows and columns of the output.

        Raises:
            FxqError: when the kernel is larger than the padded input.
        """
        (kh, kw), (sy, sx), (top, bottom, left, right), (dy, dx) = self.kernel, self.stride, self.padding, self.dilation
        oh, ow = (h + top + bottom - dy * (kh - 1) - 1) // sy + 1, (w + left + right - dx * (kw - 1) - 1) // sx + 1
        if oh < min(h, 1) or ow < min(w, 1):  # no rows of a linear layer give none
            raise FxqError(f"a kernel of {kh}x{kw} does not fit into an input of {h}x{w}", way_out="Pass larger inputs")
        return oh, ow


def group_words(per_group: int, taps: int) -> int:
    """Words of one group of a gathered layer."""
    return words_of(per_group * taps)


def gathers(per_group: int, outputs: int, groups: int) -> bool:
    """Whether groups of ``per_group`` inputs and ``outputs`` outputs are gathered; takes half the bytes of shared words at most."""
    return groups > 1 and per_group % WORD != 0 and outputs % TAIL == 0


def _check_blocks(layer: Layer) -> None:
    """Raises:
    FxqError: when the blocks do not lie in the words, or are not those of the layer's channels.
    """
    flat, rows = layer.words, layer.blocks
    fine = flat.dtype == np.uint64 and flat.ndim == 1 and flat.flags.c_contiguous and rows.dtype == np.int64 and rows.ndim == 2 and rows.shape[1] == 5
    fine = fine and len(rows) > 0 and 1 <= layer.groups <= layer.channels and layer.channels % layer.groups == 0 and layer.outputs % layer.groups == 0
    expected, offset, planes = 0, 0, 2 if layer.masked else 1
    taps, in_words = layer.steps if fine else (0, 0)
    for n0, lanes, word0, words, start in rows.tolist() if fine else ():
        fine = fine and n0 == expected and lanes in (LANES, TAIL) and word0 >= 0 and words >= 1 and word0 + words <= in_words and start == offset
        expected, offset = expected + lanes, offset + planes * taps * words * lanes
    if not fine or offset != len(flat) or not 0 <= expected - layer.outputs < TAIL:
        raise FxqError("packed weights contradict their table of blocks", way_out="Pack the layer with fxq.bitwise.layout.pack_layer")


def as_padding(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right from one number, ``(rows, columns)`` or all four."""
    if isinstance(padding, int):
        return (padding,) * 4
    p = tuple(int(v) for v in padding)
    if len(p) == 2:
        return p[0], p[0], p[1], p[1]
    if len(p) != 4:
        raise FxqError(f"{len(p)} numbers are no padding", way_out="Give one, (rows, columns) or (top, bottom, left, right)")
    return p


def _pair(v: int | Sequence[int]) -> Pair:
    return (v, v) if isinstance(v, int) else (int(v[0]), int(v[1]))


def pack_layer(
    codes: Array,
    *,
    groups: int = 1,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Layer:
    """Pack the weights of a layer.

    Args:
        codes: int8 ``[N, C / groups, kh, kw]`` (linear: ``[N, C]``) of -1, 0 and 1.
        groups, stride, padding, dilation: as of a convolution; a padding is one number, rows and columns, or top, bottom, left, right.

    Raises:
        FxqError: for other codes or shapes.
    """
    if codes.ndim == 2:
        codes = codes[:, :, None, None]
    if codes.ndim != 4 or 0 in codes.shape or groups < 1 or codes.shape[0] % groups:
        raise FxqError(f"weights of shape {list(codes.shape)} in {groups} groups cannot be packed", way_out="Pass [N, C / groups, rows, columns]")
    if codes.min() < -1 or codes.max() > 1:
        raise FxqError("weights hold other codes than -1, 0 and 1", way_out="Leave the layer in int8 or float")
    gathered = gathers(codes.shape[1], codes.shape[0] // groups, groups)
    plan, masked = _blocks(codes, groups, gathered)
    masked = masked or bool((codes == 0).any())
    parts, rows, offset = [], [], 0
    for place in plan:
        block = _block(codes, groups, place, masked, gathered)
        parts.append(block.reshape(-1))
        rows.append((*place, offset))
        offset += block.size
    kernel = (codes.shape[2], codes.shape[3])
    return Layer(
        aligned(parts), np.array(rows, np.int64), codes.shape[1] * groups, codes.shape[0], groups, kernel,
        _pair(stride), as_padding(padding), _pair(dilation), masked,
    )  # fmt: skip


def aligned(parts: Sequence[Array]) -> Array:
    """Arrays of words one behind the other in memory that begins with a line of the cache: a vector then never lies in two of them."""
    size = sum(len(p) for p in parts)
    memory = np.empty(size + LINE, np.uint64)
    start = -memory.ctypes.data // 8 % LINE
    return np.concatenate(parts, out=memory[start : start + size])


def _blocks(codes: Array, groups: int, gathered: bool) -> tuple[list[tuple[int, int, int, int]], bool]:
    """First channel, lanes, first word and words of each block, and whether groups must be masked."""
    n, per_group, kh, kw = codes.shape
    outs, stored = n // groups, group_words(per_group, kh * kw) * WORD if gathered else per_group
    whole = gathered or per_group % WORD == 0 and outs % TAIL == 0
    parts = [(g * outs, outs) for g in range(groups)] if groups == 1 or whole else [(0, n)]
    plan = []
    for start, count in parts:
        full = count // LANES
        sizes = [LANES] * full + [TAIL] * -(-(count - full * LANES) // TAIL)
        n0 = start
        for lanes in sizes:
            first, last = n0 // outs, (min(n0 + lanes, n) - 1) // outs
            word0 = first * stored // WORD
            plan.append((n0, lanes, word0, words_of((last + 1) * stored) - word0))
            n0 += lanes
    return plan, groups > 1 and not whole


def _block(codes: Array, groups: int, place: tuple[int, int, int, int], masked: bool, gathered: bool) -> Array:
    """Words ``[planes, taps, words, lanes]`` of one block."""
    n0, lanes, word0, words = place
    n, per_group, kh, kw = codes.shape
    taps = kh * kw
    spread = np.zeros((lanes, 1 if gathered else taps, words * WORD), np.int8)
    for lane in range(min(lanes, n - n0)):
        mine = codes[n0 + lane].reshape(per_group, taps).T
        if gathered:
            spread[lane, 0, : mine.size] = mine.reshape(-1)
        else:
            at = (n0 + lane) // (n // groups) * per_group - word0 * WORD
            spread[lane, :, at : at + per_group] = mine
    planes = [spread > 0, spread != 0] if masked else [spread > 0]
    return np.stack([pack_bits(p).transpose(1, 2, 0) for p in planes])


# ---------------------------------------------------------------- borders


@dataclass(frozen=True, eq=False)
class Borders:
    """What binary activations must add to ``-2 * popcount(...)``; a pixel's row of ``base`` is ``rows[y] + columns[x]``.

    Attributes:
        base: int32 ``[classes, lanes]``: the weights that are not 0, plus the sum of those that lie on padding (its bits read as -1).
        rows, columns: int32 ``[OH]``, ``[OW]``.
    """

    base: Array
    rows: Array
    columns: Array


def _missing(size: int, out: int, k: int, stride: int, before: int, dilation: int) -> tuple[Array, Array]:
    """The sets of kernel positions that lie on padding, and which of them each output position has."""
    pos = np.arange(out)[:, None] * stride - before + np.arange(k)[None] * dilation
    sets, index = np.unique((pos < 0) | (pos >= size), axis=0, return_inverse=True)
    return sets, index.reshape(-1)


def tap_sums(layer: Layer) -> tuple[Array, Array]:
    """Sum of the weights of each tap, int32 ``[lanes, kh, kw]``, and how many are not 0, int32 ``[lanes]``; read from the packed words."""
    per_group = layer.channels // layer.groups
    sums, count = np.zeros((layer.lanes, layer.taps), np.int32), np.zeros(layer.lanes, np.int32)
    taps, _ = layer.steps
    for n0, lanes, _, words, offset in layer.blocks.tolist():
        size = taps * words * lanes
        planes = [layer.words[at : at + size].reshape(taps, words, lanes) for at in range(offset, offset + size * (1 + layer.masked), size)]
        if layer.gathered:
            bits = [unpack_bits(p[0].T, layer.taps * per_group).reshape(lanes, layer.taps, per_group).sum(2, dtype=np.int32) for p in planes]
        else:
            bits = [popcount(p).sum(1, dtype=np.int32).T for p in planes]
        some = bits[1] if layer.masked else np.full_like(bits[0], per_group)
        sums[n0 : n0 + lanes], count[n0 : n0 + lanes] = 2 * bits[0] - some, some.sum(1)
    return sums.reshape(layer.lanes, *layer.kernel), count


def borders(layer: Layer, h: int, w: int) -> Borders:
    """The tables for inputs of ``h`` rows and ``w`` columns; the last one is kept."""
    key, found = layer.cache.get("borders", (None, None))
    if key == (h, w) and found is not None:
        return found  # type: ignore[no-any-return]
    (oh, ow), (top, _, left, _) = layer.out_size(h, w), layer.padding
    my, ry = _missing(h, oh, layer.kernel[0], layer.stride[0], top, layer.dilation[0])
    mx, rx = _missing(w, ow, layer.kernel[1], layer.stride[1], left, layer.dilation[1])
    sums, count = tap_sums(layer)
    base = np.empty((len(my), len(mx), layer.lanes), np.int32)
    for i, y in enumerate(my):
        for j, x in enumerate(mx):
            base[i, j] = count + sums[:, y[:, None] | x[None]].sum(1)
    made = Borders(base.reshape(-1, layer.lanes), (ry * len(mx)).astype(np.int32), rx.astype(np.int32))
    layer.cache["borders"] = ((h, w), made)
    return made


# ---------------------------------------------------------------- epilogues


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of the integer dot product of an output channel. Arrays have ``Layer.lanes`` elements; make it with the functions below.

    Attributes:
        kind: ``sign``: bit ``dot >= hi``, packed in one plane. ``ternary``: planes ``dot >= hi`` and ``dot >= hi or dot <= lo``.
            ``int32``: ``acc = mult * dot + bias``. ``float``: ``float32(acc) * scale``. ``codes``: that, clipped to ``[least, most]``, rounded to
            even, plus ``zero`` (:func:`fxq.numerics.requantize`).
        hi, lo, mult, bias: int32. scale: float32.
        least, most, zero: of ``codes``, in units of its grid.
        signed: codes are int8, otherwise uint8.
    """

    kind: str
    hi: Array | None = None
    lo: Array | None = None
    mult: Array | None = None
    bias: Array | None = None
    scale: Array | None = None
    least: float = 0.0
    most: float = 0.0
    zero: float = 0.0
    signed: bool = False
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def planes(self) -> int:
        """Planes of a packed result, 0 for any other."""
        return {"sign": 1, "ternary": 2}.get(self.kind, 0)


def _filled(layer: Layer, v: Any, dtype: Any, fill: float) -> Array:
    """``v`` (a number or one an output channel) with ``fill`` in the spare lanes; integers are clipped to int32."""
    a = np.asarray(v)
    if a.ndim > 1 or a.ndim == 1 and a.shape[0] not in (1, layer.outputs):
        raise FxqError(f"a table of shape {list(a.shape)} does not fit {layer.outputs} output channels", way_out="Pass one number a channel")
    out = np.full(layer.lanes, fill, dtype)
    out[: layer.outputs] = np.clip(a, INT32.min, INT32.max) if dtype == np.int32 else a
    return out


def sign_epilogue(layer: Layer, hi: Any) -> Epilogue:
    """Bits ``dot >= hi``, integers (clipped to int32: no dot product reaches its ends)."""
    return Epilogue("sign", _filled(layer, hi, np.int32, INT32.max))


def ternary_epilogue(layer: Layer, lo: Any, hi: Any) -> Epilogue:
    """``+1`` where ``dot >= hi``, ``-1`` where ``dot <= lo`` (and not ``>= hi``), else 0."""
    return Epilogue("ternary", _filled(layer, hi, np.int32, INT32.max), _filled(layer, lo, np.int32, INT32.min))


def int32_epilogue(layer: Layer, mult: Any = 1, bias: Any = 0) -> Epilogue:
    """``mult * dot + bias``, int32."""
    return Epilogue("int32", mult=_filled(layer, mult, np.int32, 0), bias=_filled(layer, bias, np.int32, 0))


def float_epilogue(layer: Layer, mult: Any, bias: Any, scale: Any) -> Epilogue:
    """``float32(mult * dot + bias) * scale``, float32."""
    sums = int32_epilogue(layer, mult, bias)
    return Epilogue("float", mult=sums.mult, bias=sums.bias, scale=_filled(layer, scale, np.float32, 0))


def codes_epilogue(layer: Layer, mult: Any, bias: Any, scale: Any, *, qmin: int, qmax: int, zero: int) -> Epilogue:
    """Codes of a grid: ``rne(clip(float32(mult * dot + bias) * scale, qmin - zero, qmax - zero)) + zero``; int8 where ``qmin < 0``, else uint8."""
    f = float_epilogue(layer, mult, bias, scale)
    return Epilogue("codes", None, None, f.mult, f.bias, f.scale, float(qmin - zero), float(qmax - zero), float(zero), qmin < 0)


@dataclass(frozen=True)
class AddConstants:
    """Constants of the integer add of codes: ``rne(fma(ra, a, fma(rb, b, fixed)))`` clipped to ``[least, most]`` (:func:`fxq.kernels.add`).

    Attributes:
        ra, rb, fixed: float32 values.
        least, most: codes, 0 to 255.
    """

    ra: float
    rb: float
    fixed: float
    least: int = 0
    most: int = 255
