"""Calibration data: any iterable of tensors, tuples or dicts, as tuples of positional inputs on the model's device."""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fxq.errors import CalibrationError


class Batches:
    """Normalised batches; iterate once. ``example`` is the first one.

    Args:
        data: a tensor ``[N, ...]``, or an iterable of tensors, arrays, tuples (labels behind the inputs are dropped) or dicts by
            parameter name.
        model: tells the parameters of ``forward``, the device and the number of inputs.
        limit: at most so many batches.
        what: the data's name in messages.
        spare: an ``example`` for data without a batch (which one process of several may have).
        labels: what stands behind a tuple's inputs is kept.

    Raises:
        CalibrationError: no data, ragged batches, NaN or infinity, missing inputs.
    """

    def __init__(self, data: Any, model: nn.Module, limit: int | None = None, what: str = "calibration data", spare: Any = None, labels: bool = False) -> None:
        if isinstance(data, (str, bytes, os.PathLike, Mapping)):
            way_out = "Put it into a list: [data]" if isinstance(data, Mapping) else "Pass tensors or a DataLoader (fxq-lower reads folders)"
            raise CalibrationError(f"{what} of type {type(data).__name__} gives no batches", way_out=way_out)
        if limit is not None and limit < 1:
            raise CalibrationError(f"{limit} batches are no data", way_out="Read at least 1 batch")
        if isinstance(data, (torch.Tensor, np.ndarray)):
            data = _split(data if isinstance(data, torch.Tensor) else _array(data, 0))
        self.labels, self.limit, self._length = labels, limit, operator.length_hint(data, 0)
        params = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = [p.name for p in params if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        if named:
            way_out = "Wrap the model in a module that takes it by position"
            raise CalibrationError(f"forward takes {named[0]!r} by keyword only", where=type(model).__name__, way_out=way_out)
        params = [p for p in params if p.kind is not p.KEYWORD_ONLY]
        self.names = [p.name for p in params if p.kind is not p.VAR_POSITIONAL]
        required = [p for p in params if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
        self.count = max(1, len(required)) if self.names else 1
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        try:
            source = iter(data)
        except TypeError as e:
            raise CalibrationError(f"{what} of type {type(data).__name__} cannot be iterated", way_out="Pass tensors or a DataLoader") from e
        try:
            first = next(source)
        except StopIteration:
            if spare is None:
                raise CalibrationError(f"the {what} is empty", way_out="Check the loader's data set and sampler") from None
            self.example, self._rest = self._inputs(spare, 0), chain([], source)
            return
        self.example = self._inputs(first, 0)
        self._rest = chain([first], source)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for i, item in enumerate(self._rest):
            if self.limit is not None and i >= self.limit:
                return
            batch = self._inputs(item, i)
            self._alike(batch, i)
            yield batch

    def peek(self, n: int) -> list[tuple[Any, ...]]:
        """The first ``n`` batches, which stay to be read."""
        taken = list(islice(self._rest, n if self.limit is None else min(n, self.limit)))
        self._rest = chain(taken, self._rest)
        return [self._inputs(item, i) for i, item in enumerate(taken)]

    def _alike(self, batch: tuple[Any, ...], i: int) -> None:
        """Refuse what does not look like the first batch, but for the number of samples."""
        if len(batch) != len(self.example):
            raise CalibrationError(f"batch {i} has {len(batch)} inputs, the first one {len(self.example)}", way_out="Yield the same inputs in all batches")
        for x, e in zip(tree_leaves(batch), tree_leaves(self.example), strict=False):
            if x.shape[1:] != e.shape[1:] or x.ndim != e.ndim:
                raise CalibrationError(f"batch {i} has shape {list(x.shape)}, the first one {list(e.shape)}", way_out="Resize or crop to one size")
            if x.dtype != e.dtype:
                raise CalibrationError(f"batch {i} is {x.dtype}, the first one {e.dtype}", way_out="Yield one type")

    def __length_hint__(self) -> int:
        """Number of batches, 0 when it is not known before they have been read."""
        return self._length if self.limit is None else min(self._length, self.limit)

    def _inputs(self, item: Any, i: int) -> tuple[Any, ...]:
        if isinstance(item, Mapping):
            missing = [n for n in self.names[: self.count] if n not in item]
            if missing:
                raise CalibrationError(f"batch {i} has no input {missing[0]!r}", way_out="Its keys are " + ", ".join(map(str, item)))
            values = [item[n] for n in self.names if n in item]
        else:
            values = list(item)[: None if self.labels else self.count] if isinstance(item, (tuple, list)) else [item]
        if len(values) < self.count:
            raise CalibrationError(f"batch {i} has {len(values)} inputs, the model takes {self.count}", way_out="Yield tuples of all inputs")
        return tuple(self._tensor(v, i) for v in values)

    def _tensor(self, v: Any, i: int) -> Any:
        if isinstance(v, (list, tuple)):
            return [self._tensor(x, i) for x in v]
        if isinstance(v, np.ndarray):
            v = _array(v, i)
        if not isinstance(v, torch.Tensor):
            raise CalibrationError(f"batch {i} holds a {type(v).__name__}", way_out="Yield tensors, arrays, tuples or dicts of them")
        if v.numel() == 0:
            raise CalibrationError(f"batch {i} is empty: it has shape {list(v.shape)}", way_out="Leave empty batches out")
        if v.device.type == "meta":
            raise CalibrationError(f"batch {i} has no data (device meta)", way_out="Give real tensors")
        v = v.detach().to(self.device, torch.float32) if v.is_floating_point() else v.to(self.device)
        if v.is_floating_point() and not bool(torch.isfinite(v).all()):
            raise CalibrationError(f"batch {i} holds NaN or infinity", way_out="Clean the data")
        return v


def _array(v: np.ndarray[Any, Any], i: int) -> torch.Tensor:
    try:
        return torch.from_numpy(v)
    except TypeError as e:
        raise CalibrationError(f"batch {i} holds an array of {v.dtype}", way_out="Give arrays of numbers") from e


def _split(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if v.ndim == 0:
        raise CalibrationError("one number has no batches", way_out="Pass a tensor [N, ...]")
    return torch.split(v, 32)
