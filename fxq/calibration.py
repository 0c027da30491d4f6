"""Calibration data: any iterable of tensors, tuples or dicts, as tuples of positional inputs on the model's device."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from fxq.errors import CalibrationError


class Batches:
    """Normalised batches; iterate once. ``example`` is the first one.

    Args:
        data: a tensor ``[N, ...]``, or an iterable of tensors, arrays, tuples (labels behind the inputs are dropped) or dicts by
            parameter name.
        model: tells the parameters of ``forward``, the device and the number of inputs.
        limit: at most so many batches.

    Raises:
        CalibrationError: no data, ragged batches, NaN or infinity, missing inputs.
    """

    def __init__(self, data: Any, model: nn.Module, limit: int | None = None) -> None:
        if isinstance(data, (torch.Tensor, np.ndarray)):
            data = torch.split(torch.as_tensor(data), 32)
        self.limit, self._length = limit, operator.length_hint(data, 0)
        params = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
        self.names = [p.name for p in params if p.kind is not p.VAR_POSITIONAL]
        required = [p for p in params if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
        self.count = max(1, len(required)) if self.names else 1
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        try:
            source = iter(data)
        except TypeError as e:
            raise CalibrationError(f"calibration data of type {type(data).__name__} cannot be iterated", way_out="Pass tensors or a DataLoader") from e
        first = next(source, None)
        if first is None:
            raise CalibrationError("the calibration data is empty", way_out="Check the loader's data set and sampler")
        self.example = self._inputs(first, 0)
        self._rest = chain([first], source)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for i, item in enumerate(self._rest):
            if self.limit is not None and i >= self.limit:
                return
            batch = self._inputs(item, i)
            for x, e in zip(batch, self.example, strict=True):
                if isinstance(x, torch.Tensor) and x.shape[1:] != e.shape[1:]:
                    raise CalibrationError(
                        f"batch {i} has shape {list(x.shape)}, the first one {list(e.shape)}", way_out="Resize or crop to one size"
                    )
            yield batch

    def __length_hint__(self) -> int:
        """Number of batches, 0 when it is not known before they have been read."""
        return self._length if self.limit is None else min(self._length, self.limit)

    def _inputs(self, item: Any, i: int) -> tuple[Any, ...]:
        if isinstance(item, dict):
            missing = [n for n in self.names[: self.count] if n not in item]
            if missing:
                raise CalibrationError(f"batch {i} has no input {missing[0]!r}", way_out="Its keys are " + ", ".join(map(str, item)))
            values = [item[n] for n in self.names if n in item]
        else:
            values = list(item)[: self.count] if isinstance(item, (tuple, list)) else [item]
        if len(values) < self.count:
            raise CalibrationError(f"batch {i} has {len(values)} inputs, the model takes {self.count}", way_out="Yield tuples of all inputs")
        return tuple(self._tensor(v, i) for v in values)

    def _tensor(self, v: Any, i: int) -> Any:
        if isinstance(v, (list, tuple)):
            return [self._tensor(x, i) for x in v]
        if isinstance(v, np.ndarray):
            v = torch.from_numpy(v)
        if not isinstance(v, torch.Tensor):
            raise CalibrationError(f"batch {i} holds a {type(v).__name__}", way_out="Yield tensors, arrays, tuples or dicts of them")
        v = v.to(self.device, torch.float32) if v.is_floating_point() else v.to(self.device)
        if v.is_floating_point() and not bool(torch.isfinite(v).all()):
            raise CalibrationError(f"batch {i} holds NaN or infinity", way_out="Clean the data")
        return v
