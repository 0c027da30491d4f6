"""Random layers and values for the tests of the kernels, and sums by definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fxq.bitwise import layout
from fxq.bitwise.layout import Layer


@dataclass
class Case:
    """A layer with unpacked and packed input."""

    layer: Layer
    weights: Any
    codes: Any
    packed: Any
    rng: Any

    def dots(self) -> Any:
        """int64 ``[B, OH, OW, N]``, by definition."""
        return direct(self.codes, self.weights, self.layer)


def pack_codes(codes: Any, planes: int) -> Any:
    """[B, H, W, C] of -1, 0, 1 -> packed."""
    bits = [codes > 0, codes != 0][:planes]
    return np.stack([layout.pack_bits(b) for b in bits])


def direct(codes: Any, w: Any, layer: Layer) -> Any:
    """Convolution of [B, H, W, C] by its definition, in int64."""
    top, bottom, left, right = layer.padding
    x = np.pad(codes.astype(np.int64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    oh, ow = layer.out_size(*codes.shape[1:3])
    n, per_group, kh, kw = w.shape
    out = np.zeros((len(codes), oh, ow, n), np.int64)
    for o in range(n):
        c0 = o // (n // layer.groups) * per_group
        for i in range(kh):
            for j in range(kw):
                y, z = i * layer.dilation[0], j * layer.dilation[1]
                part = x[:, y : y + (oh - 1) * layer.stride[0] + 1 : layer.stride[0], z : z + (ow - 1) * layer.stride[1] + 1 : layer.stride[1]]
                out[..., o] += part[..., c0 : c0 + per_group] @ w[o, :, i, j].astype(np.int64)
    return out


@st.composite
def cases(draw: Any) -> Case:
    """Layers of any geometry, binary or ternary on either side."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    per_group = draw(st.sampled_from([1, 3, 5, 31, 64, 70, 128, 130] if groups == 1 else [1, 2, 5, 8, 16, 32, 33, 64, 70]))
    outs = draw(st.sampled_from([1, 2, 5, 8, 33, 40, 70] if groups == 1 else [1, 3, 8, 16, 40]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 2), (5, 5), (7, 7), (1, 3), (4, 3)]))
    stride, dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    padding = draw(st.one_of(st.integers(0, 3), st.tuples(*[st.integers(0, 3)] * 4)))
    ternary_w, ternary_a = draw(st.booleans()), draw(st.booleans())
    p = layout.as_padding(padding)
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - p[2 * i] - p[2 * i + 1]) for i in (0, 1)]
    size = [v + draw(st.integers(0, 8)) for v in least]
    w = rng.integers(-1, 2, (outs * groups, per_group, *kernel)) if ternary_w else rng.choice([-1, 1], (outs * groups, per_group, *kernel))
    shape = (draw(st.integers(1, 3)), *size, per_group * groups)
    codes = rng.integers(-1, 2, shape) if ternary_a else rng.choice([-1, 1], shape)
    layer = layout.pack_layer(w.astype(np.int8), groups=groups, stride=stride, padding=padding, dilation=dilation)
    return Case(layer, w, codes.astype(np.int8), pack_codes(codes, 1 + ternary_a), rng)


def fixed_case(seed: int, n: int, c: int, kernel: int, size: int, *, ternary_w: bool = False, ternary_a: bool = False, batch: int = 1, **geometry: Any) -> Case:
    """A layer of the given sizes."""
    rng = np.random.default_rng(seed)
    draw = lambda ternary, shape: rng.integers(-1, 2, shape).astype(np.int8) if ternary else rng.choice(np.array([-1, 1], np.int8), shape)  # noqa: E731
    w = draw(ternary_w, (n, c // geometry.get("groups", 1), kernel, kernel))
    codes = draw(ternary_a, (batch, size, size, c))
    return Case(layout.pack_layer(w, **geometry), w, codes, pack_codes(codes, 1 + ternary_a), rng)


def epilogues(case: Case) -> dict[str, tuple[layout.Epilogue, Any]]:
    """Every kind of epilogue with random constants, and what it must give of the direct sums (unpacked codes of packed ones)."""
    layer, rng, dots = case.layer, case.rng, case.dots()
    n, top = layer.outputs, int(abs(dots).max())
    hi, lo = rng.integers(-top, top + 1, n), rng.integers(-top, top + 1, n)
    hi[rng.random(n) < 0.1], lo[rng.random(n) < 0.1] = 2**40, -(2**40)  # plus and minus infinity
    hi[rng.random(n) < 0.1], lo[rng.random(n) < 0.1] = -(2**40), 2**40
    mult, bias, scale = rng.integers(-3, 4, n), rng.integers(-99, 99, n), rng.normal(0, 0.7, n).astype(np.float32)
    acc = mult * dots + bias
    real = acc.astype(np.float32) * scale
    plus = dots >= hi
    u8 = (np.rint(np.clip(real, np.float32(-37), np.float32(218))) + np.float32(37)).astype(np.uint8)
    s8 = (np.rint(np.clip(real, np.float32(-127), np.float32(127)))).astype(np.int8)
    return {
        "sign": (layout.sign_epilogue(layer, hi), np.where(plus, 1, -1).astype(np.int8)),
        "ternary": (layout.ternary_epilogue(layer, lo, hi), np.where(plus, 1, np.where(dots <= lo, -1, 0)).astype(np.int8)),
        "int32": (layout.int32_epilogue(layer, mult, bias), acc.astype(np.int32)),
        "float": (layout.float_epilogue(layer, mult, bias, scale), real),
        "u8": (layout.codes_epilogue(layer, mult, bias, scale, qmin=0, qmax=255, zero=37), u8),
        "s8": (layout.codes_epilogue(layer, mult, bias, scale, qmin=-127, qmax=127, zero=0), s8),
    }
