"""Numbers of table entries as digits of large integers: what a file holds of a weight with more than 16 different values.

``E = sum_i digit_i * base^i`` in an INT32 element; ``Div`` by the powers, ``Mod`` by the base and ``Gather`` from the table give the weight back. No table of
digits is needed, so that small nets gain as well. Bits a number: 4.57 up to a base of 21, 5.33 up to 35, 6.4 up to 73. INT64 would hold some bases closer
(33 alike, 257 in 9.14 instead of 10.67 bits), but OpenVINO 2026 computes it in 32 bits: the weights would be wrong without a word.

ONNX Runtime 1.31 folds it when it loads the file (a weight of 512x512x3x3 with 33 values on one thread: 50 ms; from bytes 36, plain float32 13).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
CHUNK = 1 << 20  # elements that are packed at a time


@dataclass(frozen=True)
class Wide:
    """A way to hold numbers below ``base``.

    Attributes:
        base: how many different ones.
    """

    base: int

    @cached_property
    def digits(self) -> int:
        """Numbers in an element."""
        count = 0
        while self.base ** (count + 1) <= 1 << 31:
            count += 1
        return count

    @property
    def width(self) -> float:
        """Bytes a number."""
        return 4 / self.digits

    @property
    def bits(self) -> int:
        """Of a number, rounded up, for names."""
        return math.ceil(math.log2(self.base))

    @property
    def powers(self) -> Array:
        """Place values of the digits."""
        return np.array([self.base**i for i in range(self.digits)], np.int32)


def pack(numbers: Array, form: Wide) -> Array:
    """Elements ``[ceil(size / digits), 1]`` that hold the numbers (any shape, integers in ``[0, base)``); int32; missing digits of the last one are 0."""
    flat, d = numbers.reshape(-1), form.digits
    out = np.zeros(-(-flat.size // d), np.int32)
    for begin in range(0, out.size, CHUNK):
        part = flat[begin * d : (begin + CHUNK) * d]
        for place, power in enumerate(form.powers):
            digit = part[place::d]
            out[begin : begin + digit.size] += digit.astype(np.int32) * power
    return out[:, None]


def unpack(elements: Array, form: Wide, count: int) -> Array:
    """The first ``count`` numbers of what :func:`pack` gave."""
    numbers: Array = (elements // form.powers % form.base).reshape(-1)[:count]
    return numbers


def expansion(name: str, size: int, form: Wide) -> tuple[list[TensorProto], list[NodeProto], str]:
    """Initializers (the first one, the elements, still empty), nodes, and the tensor of ``size`` numbers that they end in.

    Args:
        name: of the layer's weight, ``<path>/weight``.
    """
    powers, base, last = f"tables/powers{form.base}", f"tables/base{form.base}", f"{name}_digits"
    tensors = [
        TensorProto(name=f"{name}_packed", data_type=TensorProto.INT32, dims=[-(-size // form.digits), 1]),
        numpy_helper.from_array(form.powers, powers), numpy_helper.from_array(np.array(form.base, np.int32), base),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Div", [f"{name}_packed", powers], [f"{name}_quotients"], name=f"{name}_quotients"),
        helper.make_node("Mod", [f"{name}_quotients", base], [last], name=last),
    ]
    if size % form.digits:
        constants = (("tables/all", -1), ("tables/from", 0), (f"{name}_count", size))
        tensors += [numpy_helper.from_array(np.array([v], np.int64), k) for k, v in constants]
        nodes += [
            helper.make_node("Reshape", [last, "tables/all"], [f"{name}_flat"], name=f"{name}_flat"),
            helper.make_node("Slice", [f"{name}_flat", "tables/from", f"{name}_count"], [f"{name}_cut"], name=f"{name}_cut"),
        ]
        last = f"{name}_cut"
    return tensors, nodes, last
