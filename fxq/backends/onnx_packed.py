"""Low-bit weights in the file: the smallest of 1 bit, 5 trits a byte, 2 bits, 4 bits a weight, or plain int8.

The file holds digits, packed into the elements of one integer tensor, and a table that spreads an element over its weights' codes:
``Cast(int32) -> Gather(table) -> (Slice) -> Reshape``. ONNX Runtime folds these constants into an int8 weight when it loads the file, before it fuses
Q/DQ: such a layer runs as fast as an int8 one. A table is stored once for all weights with the same set of codes.

Elements are bytes (``UINT8``) or half bytes (``UINT4``): both hold the same raw bytes, the table of half bytes is smaller (64 bytes instead of 2048 for
1 bit) and a little slower to expand (512x512x3x3: 8.6 instead of 5.7 ms; int8 2.7). Bytes are taken where the table is small beside what they hold.

Measured against the alternatives on a weight of 512x512x3x3, loaded by ONNX Runtime 1.31 on one thread: INT4 -> Cast 4.9 ms, a table of 4-bit digits 13.5; INT2
-> Cast 4.6 ms, a table of 2-bit digits 8.5; all run at the speed of int8. INT4 is used where the codes allow it. INT2 is not: it needs opset 25 and IR
version 13, which few runtimes load, and holds only the codes -2 to 1.

A weight with more than 16 different codes is packed when its layer shares weights, as digits of large integers (``onnx_wide``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fxq.backends import onnx_wide
from fxq.backends.onnx_wide import Wide

Array = np.ndarray[Any, Any]
NIBBLE = (-8, 7)
MANY = 73  # more different codes take a byte each
CHUNK = 1 << 22
SMALL_TABLE = 64  # a table of bytes is taken where it is at most this part of what it expands


@dataclass(frozen=True)
class Form:
    """A way to hold codes.

    Attributes:
        bits: rounded up, for names.
        base: how many different codes a digit tells apart.
        digits: of one element.
        element: bits of one element, 8 or 4.
    """

    bits: int
    base: int
    digits: int
    element: int

    @property
    def entries(self) -> int:
        """Rows of the table."""
        return int(self.base**self.digits)

    @property
    def halves(self) -> Form:
        """The same raw bytes seen as half bytes; only where an element divides evenly."""
        return Form(self.bits, self.base, self.digits // 2, 4)

    @property
    def divides(self) -> bool:
        """A byte is two half bytes with half of the digits each."""
        return self.entries == 256


BIT, TRIT, CRUMB, HALF = Form(1, 2, 8, 8), Form(2, 3, 5, 8), Form(2, 4, 4, 8), Form(4, 16, 2, 8)
FORMS = (BIT, TRIT, CRUMB, HALF)


def levels(codes: Array, most: int = HALF.base) -> tuple[int, ...]:
    """The different codes of an int8 array, ascending; ``()`` when there are more than ``most``."""
    flat, found = codes.reshape(-1), np.zeros(256, bool)
    for begin in range(0, flat.size, CHUNK):
        found |= np.bincount(flat[begin : begin + CHUNK].astype(np.int16) + 128, minlength=256) > 0
        if found.sum() > most:
            return ()
    return tuple(int(v) - 128 for v in np.flatnonzero(found))


def numbers(codes: Array, values: Sequence[int]) -> Array:
    """Place of each code (int8, any shape) among ``values`` (ascending, at most 255), flat, uint8.

    Raises:
        ValueError: when a code is not in ``values``.
    """
    lookup = np.full(256, 255, np.uint8)
    lookup[np.array(values) + 128] = np.arange(len(values))
    digits: Array = lookup[codes.reshape(-1).view(np.uint8) ^ 128]
    if (digits == 255).any():
        raise ValueError("a code is not among the values")
    return digits


def pack(codes: Array, values: Sequence[int], form: Form) -> Array:
    """Bytes that hold the codes, least digit first; missing digits of the last byte are 0.

    Args:
        codes: int8 of any shape, each one of ``values``.
        values: the different codes, ascending, at most ``form.base``.
        form: one with elements of 8 bits.

    Returns:
        uint8 ``[ceil(codes.size / form.digits)]``.

    Raises:
        ValueError: when a code is not in ``values``.
    """
    digits = numbers(codes, values)
    packed = np.zeros(-(-digits.size // form.digits), np.uint8)
    for place in range(form.digits):
        part = digits[place :: form.digits]
        packed[: part.size] += part * np.uint8(form.base**place)
    return packed


def table(values: Sequence[int], form: Form) -> Array:
    """int8 ``[form.entries, form.digits]``: the codes that each element stands for. Digits beyond the values repeat the last one."""
    digits = np.arange(form.entries)[:, None] // form.base ** np.arange(form.digits) % form.base
    rows: Array = np.array(values, np.int8)[digits.clip(max=len(values) - 1)]
    return rows


def unpack(packed: Array, values: Sequence[int], form: Form, count: int) -> Array:
    """The first ``count`` codes (int8) of what :func:`pack` gave; ``form`` may be its ``halves``."""
    elements = packed if form.element == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(-1)
    return table(values, form)[elements].reshape(-1)[:count]


@dataclass(frozen=True)
class Stored:
    """How the file holds a weight.

    Attributes:
        form: ``None`` for INT4 -> Cast; a :class:`~fxq.backends.onnx_wide.Wide` for more than 16 codes.
        values: the codes of its table, ascending; all of the weight's are among them.
    """

    form: Form | Wide | None
    values: tuple[int, ...]

    @property
    def raw(self) -> Form:
        """The form whose bytes the file holds, of up to 16 codes."""
        assert not isinstance(self.form, Wide)
        return HALF if self.form is None else self.form if self.form.element == 8 else next(f for f in FORMS if f.divides and f.base == self.form.base)

    @property
    def width(self) -> float:
        """Bytes a weight, without the table."""
        return self.form.width if isinstance(self.form, Wide) else 1 / self.raw.digits

    @property
    def table(self) -> Array:
        """int8: the codes of each element, or of each number."""
        assert self.form is not None
        return np.array(self.values, np.int8) if isinstance(self.form, Wide) else table(self.values, self.form)

    @property
    def table_bytes(self) -> int:
        """Size of its table."""
        if isinstance(self.form, Wide):
            return len(self.values)
        return 0 if self.form is None else self.form.entries * self.form.digits


def as_nibbles(name: str, codes: Array) -> TensorProto:
    """A packed INT4 tensor of codes in [-8, 7]."""
    flat = codes.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return TensorProto(name=name, data_type=TensorProto.INT4, dims=codes.shape, raw_data=(flat[0::2] | (flat[1::2] << 4)).tobytes())


def expansion(name: str, shape: tuple[int, ...], stored: Stored, table_name: str) -> tuple[list[TensorProto], list[NodeProto]]:
    """Initializers (the first one still empty) and nodes that end in the int8 tensor ``<name>_q``.

    Args:
        name: of the layer's weight, ``<path>/weight``.
        shape: of the weight.
        stored: how the file holds it.
        table_name: initializer with its table.
    """
    out, form, size = f"{name}_q", stored.form, math.prod(shape)
    if form is None:
        return [as_nibbles(f"{name}_q4", np.zeros(0))], [helper.make_node("Cast", [f"{name}_q4"], [out], name=out, to=TensorProto.INT8)]
    if isinstance(form, Wide):
        tensors, nodes, last = onnx_wide.expansion(name, size, form)
        tensors.append(numpy_helper.from_array(np.array(shape, np.int64), f"{name}_shape"))
        nodes.append(helper.make_node("Gather", [table_name, last], [f"{name}_codes"], name=f"{name}_codes"))
        nodes.append(helper.make_node("Reshape", [f"{name}_codes", f"{name}_shape"], [out], name=out))
        return tensors, nodes
    kind = TensorProto.UINT8 if form.element == 8 else TensorProto.UINT4
    tensors = [
        TensorProto(name=f"{name}_packed", data_type=kind, dims=[-(-size // form.digits)]), numpy_helper.from_array(np.array(shape, np.int64), f"{name}_shape"),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Cast", [f"{name}_packed"], [f"{name}_index"], name=f"{name}_index", to=TensorProto.INT32),
        helper.make_node("Gather", [table_name, f"{name}_index"], [f"{name}_codes"], name=f"{name}_codes"),
    ]
    last = f"{name}_codes"
    if size % form.digits:
        tensors += [numpy_helper.from_array(np.array([v], np.int64), f"{name}_{k}") for k, v in (("all", -1), ("from", 0), ("count", size))]
        nodes += [
            helper.make_node("Reshape", [last, f"{name}_all"], [f"{name}_flat"], name=f"{name}_flat"),
            helper.make_node("Slice", [f"{name}_flat", f"{name}_from", f"{name}_count"], [f"{name}_cut"], name=f"{name}_cut"),
        ]
        last = f"{name}_cut"
    nodes.append(helper.make_node("Reshape", [last, f"{name}_shape"], [out], name=out))
    return tensors, nodes


def filled(name: str, codes: Array, stored: Stored, table_name: str) -> tuple[list[TensorProto], list[NodeProto]]:
    """:func:`expansion` with the codes (int8, of the weight's shape) in it."""
    tensors, nodes = expansion(name, codes.shape, stored, table_name)
    if stored.form is None:
        tensors[0] = as_nibbles(tensors[0].name, codes)
    elif isinstance(stored.form, Wide):
        tensors[0].raw_data = onnx_wide.pack(numbers(codes, stored.values), stored.form).tobytes()
    else:
        packed = pack(codes, stored.values, stored.raw)
        tensors[0].raw_data = packed[: -(-tensors[0].dims[0] * stored.form.element // 8)].tobytes()
    return tensors, nodes


def _saved(name: str, codes: Array, stored: Stored) -> int:
    """Bytes that the file gets smaller by, without the table."""
    tensors, nodes = expansion(name, codes.shape, stored, "tables/1bit")
    held = math.ceil(codes.size * stored.width) + sum(t.ByteSize() for t in tensors) + sum(n.ByteSize() for n in nodes)
    return int(codes.size + len(name) - held)


def choose(weights: Mapping[str, Array], many: Collection[str] = ()) -> dict[str, Stored]:
    """How to hold each weight so that the file is smallest, tables included; weights that are not in the answer are best held as int8.

    A weight takes the most compact form whose table pays: the form's users together save more bytes than the table costs.

    Args:
        weights: name ``<path>/weight`` -> int8 codes.
        many: those that may be packed with more than 16 different codes.
    """
    found = {name: values for name, codes in weights.items() if (values := levels(codes))}
    fits = {name: NIBBLE[0] <= values[0] and values[-1] <= NIBBLE[1] for name, values in found.items()}
    left, chosen = dict(found), dict[str, Stored]()
    for form in FORMS:  # the most compact one first
        here = {name: values for name, values in left.items() if len(values) <= form.base}
        groups: dict[tuple[int, ...] | None, list[str]] = {}
        for name, values in here.items():
            wide = max((v for v in here.values() if set(values) <= set(v)), key=len)
            groups.setdefault(None if form is HALF and fits[name] else wide, []).append(name)
        for shared, names in groups.items():
            good = [n for n in names if _saved(n, weights[n], Stored(form if shared else None, shared or found[n])) > 0]
            kept = Stored(_element(form, sum(weights[n].size for n in good)) if shared else None, shared or ())
            if sum(_saved(n, weights[n], kept) for n in good) > kept.table_bytes:
                chosen |= {n: replace(kept, values=shared or found[n]) for n in good}
        left = {name: values for name, values in left.items() if name not in chosen}
    for name in many:
        if name not in found and (values := levels(weights[name], MANY)):
            stored = Stored(Wide(len(values)), values)
            if _saved(name, weights[name], stored) > stored.table_bytes:
                chosen[name] = stored
    return chosen


def _element(form: Form, count: int) -> Form:
    """Bytes or half bytes for that many weights in all."""
    return form if not form.divides or form.entries * form.digits * SMALL_TABLE <= count // form.digits else form.halves
