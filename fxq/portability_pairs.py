"""Sums of two products in 16 bits: what x86 CPUs without VNNI compute of unsigned activations times signed weights.

There ``vpmaddubsw`` (``pmaddubsw``) multiplies unsigned by signed bytes and adds neighbours, saturated to int16; only the pair sums are added in 32 bits.
Neighbours are two weights of one filter in a row, the channels innermost: ``(kernel position, channel)`` flattened, the first with the second, the third with
the fourth. Convolutions with one input and one output channel a group (depthwise) run a kernel that does not pair.

Source: ONNX Runtime, ``core/mlas/lib/convsym.cpp``, ``x86_64/QgemmU8X8KernelAvx2.S`` and ``core/providers/cpu/quantization/qlinearconv.cc``;
equal bit for bit to that code run on an emulated AVX2 CPU (``docs/portability.md``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.graph import data_inputs, grids
from fxq.modules import Quantized
from fxq.spec import QuantSpec

MOST = QuantSpec.parse("u8/pt").qmax
"""Greatest code of an unsigned byte."""
LEAST_SUM, GREATEST_SUM = torch.iinfo(torch.int16).min, torch.iinfo(torch.int16).max


def depthwise(shape: tuple[int, ...], groups: int) -> bool:
    """A convolution with weights ``[O, C, ...]`` whose groups have one input and one output channel: its products are not paired."""
    return len(shape) > 2 and shape[1] == 1 and shape[0] == groups


def paired(codes: Tensor) -> Tensor:
    """Neighbours in the order of the kernels.

    Args:
        codes: weights ``[O, C, ...]`` of a convolution (C channels of one group) or ``[O, K]`` of a matrix product, any dtype.

    Returns:
        ``[O, P, 2]``; where the number of weights is odd, the last one's neighbour is 0.
    """
    flat = codes.movedim(1, -1).flatten(1)
    even: Tensor = torch.nn.functional.pad(flat, (0, flat.shape[1] % 2))
    return even.reshape(len(even), -1, 2) if even.numel() else even.reshape(len(even), 0, 2)


def unpaired(pairs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`paired`: weights of ``shape`` again."""
    last = (shape[0], *shape[2:], shape[1])
    return pairs.flatten(1)[:, : torch.Size(last[1:]).numel()].reshape(last).movedim(-1, 1)


def worst(pairs: Tensor, most: int = MOST) -> int:
    """The sum of two products farthest from 0 that any pair ``[O, P, 2]`` of integer weights can give for activation codes from 0 to ``most``."""
    wide = pairs.to(torch.int64)
    sums = torch.cat([wide.clamp(max=0).sum(-1).flatten(), wide.clamp(min=0).sum(-1).flatten()]) * most
    return int(sums[sums.abs().argmax()]) if sums.numel() else 0


def limits(most: int = MOST) -> tuple[int, int]:
    """Least and greatest sum of two weights of one sign that is safe for activation codes from 0 to ``most``: (-128, 128) for bytes."""
    return -(-LEAST_SUM // most), GREATEST_SUM // most


def unsafe(first: Tensor, second: Tensor, most: int = MOST) -> Tensor:
    """Pairs of integer weights whose sum of products can leave int16 for activation codes from 0 to ``most``: bool.

    Weights of two signs are always safe: each product alone fits.
    """
    bottom, top = limits(most)
    together, one_sign = first + second, (first >= 0) == (second >= 0)
    return one_sign & ((together < bottom) | (together > top))


def made_safe(first: Tensor, second: Tensor, reals: tuple[Tensor, Tensor], wrong: Tensor, most: int = MOST) -> None:
    """Move unsafe pairs, in place, to the safe integers nearest to ``reals`` on the edge.

    Both weights of an unsafe pair have one sign and move towards 0 by the same amount, half of what their sum is too large, rounded.

    Args:
        first, second: integer weights, float, of one shape.
        reals: what they were rounded from, in steps of their grid and inside of it.
        wrong: which are unsafe.
        most: greatest activation code.
    """
    bottom, top = limits(most)
    a, b = reals[0][wrong], reals[1][wrong]
    limit = torch.where(a + b > 0, float(top), float(bottom))
    edge = torch.round(a - (a + b - limit) / 2)
    first[wrong], second[wrong] = edge, limit - edge


def greatest_code(gm: GraphModule, node: Node, layer: Quantized) -> int | None:
    """Greatest activation code, as an unsigned byte, that a layer's products are made of; ``None`` when nothing is added in pairs.

    That is so for weights that are not constant signed bytes, for depthwise convolutions and for layers that read no codes.
    """
    spec, weight = layer.weight_grid.spec, layer.op.weight
    assert isinstance(weight, Tensor)
    if spec.bits > 8 or spec.qmin >= 0 or depthwise(tuple(weight.shape), int(getattr(layer.op, "groups", 1))):
        return None
    if layer.dynamic is not None:
        return MOST
    name = data_inputs(node)[0].meta.get("grid") if node.meta.get("integer") else None
    source = None if name is None else grids(gm)[name].qparams
    return None if source is None else source.spec.qmax - source.spec.qmin


def at_risk(layer: Quantized, most: int) -> Tensor:
    """Pairs of a layer's weights whose sum can saturate for activation codes up to ``most``: bool ``[O, P]``."""
    pairs = paired(layer.weight_codes().to(torch.float32))
    return unsafe(pairs[..., 0], pairs[..., 1], most)
