"""Constant folding in numpy of what stands between an ONNX file's constants and its scales, zero points and codes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

Array = np.ndarray[Any, Any]
Given = Sequence[Array | None]
LARGEST = 1 << 20
"""Elements of a constant that is made by folding."""
Fold = Callable[[list[Array], Mapping[str, Any]], Any]


def _cast(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    return given[0].astype(helper.tensor_dtype_to_np_dtype(int(attrs["to"])))


def _reshape(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    sizes = [int(n) for n in given[1]]
    if not attrs.get("allowzero"):
        sizes = [given[0].shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return given[0].reshape(sizes)


def _flatten(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    axis = int(attrs.get("axis", 1))
    rows = int(np.prod(given[0].shape[: axis if axis >= 0 else axis + given[0].ndim], dtype=np.int64))
    return given[0].reshape(rows, -1)


def _axes(given: list[Array], attrs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Axes of an attribute (before opset 13 or 18) or of the second input."""
    if "axes" in attrs:
        return tuple(int(n) for n in attrs["axes"])
    return tuple(int(n) for n in given[1].reshape(-1)) if len(given) > 1 else None


def _squeeze(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    return np.squeeze(given[0], _axes(given, attrs))


def _unsqueeze(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    axes = _axes(given, attrs)
    return np.expand_dims(given[0], axes if axes is not None else ())


def _transpose(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    return np.transpose(given[0], attrs.get("perm"))


def _slice(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    if "starts" in attrs:
        starts, ends, axes, steps = attrs["starts"], attrs["ends"], attrs.get("axes"), None
    else:
        starts, ends = given[1], given[2]
        axes, steps = (given[i] if len(given) > i else None for i in (3, 4))
    index = [slice(None)] * given[0].ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        step = int(steps[i]) if steps is not None else 1
        low = int(end) < -(1 << 30) and step < 0
        index[int(axes[i]) if axes is not None else i] = slice(int(start), None if low else int(end), step)
    return given[0][tuple(index)]


def _filled(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    tensor = attrs.get("value")
    value = onnx.numpy_helper.to_array(tensor).reshape(-1)[0] if tensor is not None else np.float32(0)
    sizes = [int(n) for n in given[0]]
    if np.prod(sizes, dtype=np.float64) > LARGEST:
        raise ValueError("too large")
    return np.full(sizes, value)


def _concat(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    return np.concatenate(given, int(attrs["axis"]))


def _gather(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    return np.take(given[0], given[1].astype(np.int64), int(attrs.get("axis", 0)))


def _reduce(kind: Callable[..., Any]) -> Fold:
    def run(given: list[Array], attrs: Mapping[str, Any]) -> Array:
        return np.asarray(kind(given[0], axis=_axes(given, attrs), keepdims=bool(attrs.get("keepdims", 1))))

    return run


def _dequantized(given: list[Array], attrs: Mapping[str, Any]) -> Array:
    codes = given[0].astype(np.float32)
    if len(given) > 2 and np.any(given[2].astype(np.float32)):
        codes = codes - given[2].astype(np.float32)
    if given[1].ndim == 0 or given[1].size == 1:
        return codes * given[1].reshape(()).astype(np.float32)
    raise ValueError("per channel")


def _unary(kind: Callable[[Array], Any]) -> Fold:
    return lambda given, attrs: kind(given[0])


def _binary(kind: Callable[[Array, Array], Any]) -> Fold:
    return lambda given, attrs: kind(given[0], given[1]).astype(given[0].dtype)


FOLDS: dict[str, Fold] = {
    "Identity": _unary(np.asarray), "Neg": _unary(np.negative), "Abs": _unary(np.abs), "Exp": _unary(np.exp), "Log": _unary(np.log), "Sqrt": _unary(np.sqrt),
    "Reciprocal": _unary(np.reciprocal), "Add": _binary(np.add), "Sub": _binary(np.subtract), "Mul": _binary(np.multiply),
    "Div": _binary(lambda a, b: a / b if a.dtype.kind == "f" else a // b), "Pow": _binary(np.power), "Max": _binary(np.maximum), "Min": _binary(np.minimum),
    "ReduceMax": _reduce(np.max), "ReduceMin": _reduce(np.min), "ReduceMean": _reduce(np.mean), "ReduceSum": _reduce(np.sum),
    "Cast": _cast, "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Transpose": _transpose, "Slice": _slice,
    "ConstantOfShape": _filled, "Concat": _concat, "Gather": _gather, "DequantizeLinear": _dequantized,
}  # fmt: skip
"""Operator -> its value on arrays."""

MOVES = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Concat", "Gather")
"""Those of them that only move elements, so that they may stand between codes and their DequantizeLinear."""


def fold(op: str, given: Given, attrs: Mapping[str, Any]) -> Array | None:
    """Value of an operator on constant inputs; ``None`` where the inputs do not fit it.

    Args:
        op: one of :data:`FOLDS`.
        given: its inputs, ``None`` for those left out at the end.
        attrs: its attributes.
    """
    arrays = list(given)
    while arrays and arrays[-1] is None:
        arrays.pop()
    present = [a for a in arrays if a is not None]
    if len(present) != len(arrays) or not present and op != "ConstantOfShape":
        return None
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(FOLDS[op](present, attrs))
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, ZeroDivisionError, MemoryError):
        return None
