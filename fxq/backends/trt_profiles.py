"""The shapes that an engine is built for: the inputs of an ONNX file and checked optimization profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from fxq.errors import EngineError, nearest

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]

DEFAULT_SIZES = (1, 8, 32)
"""Least, best and greatest size of a dynamic dimension when no profile is given."""


@dataclass(frozen=True)
class Input:
    """An input of an ONNX file: its sizes, -1 where they are dynamic, and the names of its dimensions, empty where they have none."""

    sizes: Shape
    names: tuple[str, ...]


def inputs(onnx_bytes: bytes) -> dict[str, Input]:
    """The inputs of an ONNX file, by name.

    Raises:
        EngineError: when it is no ONNX file, or an input has no rank.
    """
    way_out = "Give the bytes of an ONNX file, with its weights inside"
    try:
        graph = onnx.load_model_from_string(onnx_bytes).graph
    except Exception as e:  # the DecodeError of whichever protobuf is installed
        raise EngineError("the bytes are no ONNX model", way_out=way_out) from e
    if not graph.output:
        raise EngineError("the ONNX model has no outputs", way_out=way_out)
    constants = {t.name for t in graph.initializer}
    found = {}
    for value in graph.input:
        if value.name not in constants:
            if not value.type.tensor_type.HasField("shape"):
                way_out = "Export the model with a shape for each input; sizes may be dynamic"
                raise EngineError("its rank is unknown", where=f"input {value.name!r}", way_out=way_out)
            dims = value.type.tensor_type.shape.dim
            found[value.name] = Input(tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims), tuple(d.dim_param for d in dims))
    return found


def profiles(found: Mapping[str, Input], given: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Profile]:
    """Least, best and greatest shape of every dynamic input: as given, or :data:`DEFAULT_SIZES` in every dynamic dimension when nothing is given.

    Args:
        found: from :func:`inputs`.
        given: input -> three shapes.

    Raises:
        EngineError: for a profile that does not fit the file; it names the input.
    """
    for name in given:
        if name not in found:
            raise EngineError("a profile is given for it, and the file has no such input", where=f"input {name!r}", way_out=nearest(str(name), found))
    wanted = {}
    for name, one in found.items():
        dynamic = -1 in one.sizes
        if name in given:
            profile = _profile(name, one.sizes, given[name])
        elif dynamic and given:
            fact = f"its shape {_text(one.sizes)} is dynamic and it has no profile"
            raise EngineError(fact, where=f"input {name!r}", way_out="Give least, best and greatest shapes for it too")
        else:
            least, best, greatest = (tuple(n if size == -1 else size for size in one.sizes) for n in DEFAULT_SIZES)
            profile = (least, best, greatest)
        if dynamic:
            wanted[name] = profile
    _agree(found, wanted)
    return wanted


def _agree(found: Mapping[str, Input], wanted: Mapping[str, Profile]) -> None:
    """Dimensions of one name are one size at run time, so their ranges must meet."""
    seen: dict[str, tuple[str, int, int]] = {}
    for name, (least, _, greatest) in wanted.items():
        for size, dim, low, high in zip(found[name].sizes, found[name].names, least, greatest, strict=True):
            if size == -1 and dim:
                other, a, b = seen.setdefault(dim, (name, low, high))
                if max(a, low) > min(b, high):
                    fact = f"its dimension {dim!r} goes from {low} to {high}, that of input {other!r} from {a} to {b}"
                    raise EngineError(fact, where=f"input {name!r}", way_out="Dimensions of one name have one size: give them ranges that meet")


def _profile(name: str, sizes: Shape, shapes: Sequence[Sequence[int]]) -> Profile:
    """One checked profile."""
    where = f"input {name!r}"
    try:
        least, best, greatest = (tuple(shape) for shape in shapes)
    except (TypeError, ValueError):
        raise EngineError("a profile is three shapes", where=where, way_out="Give least, best and greatest shapes") from None
    for shape in (least, best, greatest):
        if len(shape) != len(sizes):
            fact = f"the profile's shape {_text(shape)} has {len(shape)} dimensions, the input {_text(sizes)} has {len(sizes)}"
            raise EngineError(fact, where=where, way_out="Give all sizes, the fixed ones too")
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
            fact = f"the profile's shape {_text(shape)} does not consist of positive numbers"
            raise EngineError(fact, where=where, way_out="Give positive integers")
        if any(size not in (-1, n) for size, n in zip(sizes, shape, strict=True)):
            fact = f"the profile's shape {_text(shape)} changes fixed sizes of {_text(sizes)}"
            raise EngineError(fact, where=where, way_out="Change only sizes that are dynamic (-1)")
    if not all(a <= b <= c for a, b, c in zip(least, best, greatest, strict=True)):
        fact = f"least {_text(least)} <= best {_text(best)} <= greatest {_text(greatest)} does not hold"
        raise EngineError(fact, where=where, way_out="Put the three shapes in order")
    return least, best, greatest


def _text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "scalar"
