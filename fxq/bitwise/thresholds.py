"""Thresholds between a number and a code of a binary or ternary grid, found from the reference's own arithmetic: exact by construction.

Every function from a sum, a code or a float to the code that is looked at here is monotone, so each of its codes begins at one number, which
bisection finds. Source of the idea: Courbariaux et al. 2016 (arXiv 1602.02830), section 1.5; Umuroglu et al. 2017 (arXiv 1612.07119), section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

INT32 = 2**31 - 1
_TOP = 0x7F800000
"""Bits of the float32 infinity: floats between both infinities are the integers ``-_TOP.._TOP``, in order."""


@dataclass(frozen=True)
class Cut:
    """Where a value becomes -1, 0 or 1: 1 where ``x >= hi``, -1 where ``x <= lo`` and ``x < hi``, otherwise 0.

    Attributes:
        lo, hi: Python numbers of one kind, int or float; of a binary grid ``lo`` does not matter: what is not 1 is -1.
    """

    lo: float
    hi: float


def least(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The least integer of ``[low, high]`` for which a monotone property holds, element by element; ``high + 1`` where it never does.

    Args:
        holds: integers, int64, to bools, both in the shape of ``low``; what holds for one holds for every greater one.
        low, high: int64 of one shape, ``low <= high + 1``.
    """
    low, high = low.clone(), high + 1
    while bool((low < high).any()):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        searching, yes = low < high, holds(middle)
        high = torch.where(searching & yes, middle, high)
        low = torch.where(searching & ~yes, middle + 1, low)
    return low


def of_sums(code: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """``(lo, hi)``, int32, of dot products in ``[low, high]``: the code is 1 from ``hi`` on and -1 up to ``lo``.

    Args:
        code: dot products, int64 ``[C]``, to codes -1, 0, 1; monotone.
        low, high: int64 ``[C]``, what the dot products can be.
    """
    hi = least(lambda d: code(d) >= 1, low, high)
    lo = least(lambda d: code(d) >= 0, low, high) - 1
    return lo.clamp(-INT32, INT32).to(torch.int32), hi.clamp(-INT32, INT32).to(torch.int32)


def of_codes(codes: Tensor, first: int) -> Cut | None:
    """Thresholds on codes ``first``, ``first + 1``, ... whose results on a binary or ternary grid are ``codes``; ``None`` when these are not monotone."""
    values = codes.to(torch.int64)
    if bool((values[1:] < values[:-1]).any()):
        return None
    below, at_most_zero = int((values <= -1).sum()), int((values <= 0).sum())
    return Cut(first + below - 1, first + at_most_zero)


def float_of(order: Tensor) -> Tensor:
    """The float32 number at place ``order`` (int64): 0 is 0.0, 1 the least denormal, ``-_TOP`` the negative infinity."""
    bits = order.abs().to(torch.int32).view(torch.float32)
    return torch.where(order < 0, -bits, bits)


def of_floats(code: Callable[[Tensor], Tensor]) -> Cut:
    """Thresholds of floats, the infinities included; 0.0 and -0.0 are one number.

    Args:
        code: float32 tensor to codes -1, 0, 1; monotone.
    """
    low, high = torch.tensor([-_TOP]), torch.tensor([_TOP])
    hi = least(lambda i: code(float_of(i)) >= 1, low, high)
    lo = least(lambda i: code(float_of(i)) >= 0, low, high) - 1
    # "Never" is NaN: no comparison with it is true.
    never = torch.tensor([torch.nan])
    top = torch.where(hi > _TOP, never, float_of(hi.clamp(-_TOP, _TOP)))
    bottom = torch.where(lo < -_TOP, never, float_of(lo.clamp(-_TOP, _TOP)))
    return Cut(float(bottom), float(top))
