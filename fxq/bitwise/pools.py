"""What max pools of packed values and of codes have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def rows_and_columns(v: Any, rank: int, fill: int) -> list[int]:
    given = [int(i) for i in v] if isinstance(v, Sequence) else [int(v)] * rank
    return [fill] * (2 - rank) + given


def is_pool(pool: Any) -> bool:
    """Its windows are such as torch takes."""
    ones = [rows_and_columns(v, 2, 1) for v in (pool.kernel_size, pool.stride, pool.dilation)]
    pads = rows_and_columns(pool.padding, 2, 0)
    return all(v >= 1 for numbers in ones for v in numbers) and all(0 <= 2 * p <= k for p, k in zip(pads, ones[0], strict=True))


class Pool(nn.Module):
    """Window numbers of a max pool, of rows and columns."""

    def __init__(self, pool: Any, rank: int) -> None:
        super().__init__()
        self.window = [rows_and_columns(v, rank, fill) for v, fill in ((pool.kernel_size, 1), (pool.stride, 1), (pool.padding, 0), (pool.dilation, 1))]
        self.ceil_mode = bool(pool.ceil_mode)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for pools of equal windows."""
        return (*map(tuple, self.window), self.ceil_mode)

    def extra_repr(self) -> str:
        k, s, p, d = self.window
        return f"kernel={k}, stride={s}, padding={p}, dilation={d}, ceil_mode={self.ceil_mode}"
