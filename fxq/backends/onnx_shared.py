"""Float layers with shared weights in the file: numbers of codebook entries, and ``Gather`` from the codebook.

ONNX Runtime folds this into a float32 weight when it loads the file: the layer runs as one with an ordinary weight. The file holds the numbers in the smallest
of: packed digits (up to 16 different values, ``onnx_packed``; their tables are shared by all layers of the file), digits of large integers
(``onnx_wide``), bytes; or the weight itself where that is smaller. Weights of 0 take their place among the numbers: nothing is sparse in ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fxq.backends import onnx_wide
from fxq.backends.onnx_packed import Stored, choose
from fxq.backends.onnx_wide import Wide
from fxq.backends.onnx_writer import Writer
from fxq.shared import SharedWeight

Array = np.ndarray[Any, Any]
FEW = 16  # numbers that onnx_packed holds
BYTES = 256


@dataclass(frozen=True)
class Numbers:
    """A shared weight as the file takes it.

    Attributes:
        at: integers, shape of the weight: places in ``table``.
        table: float32, the values in use, each one different: 0 and entries of the codebook.
        rows: float32, a factor that broadcasts over the weight, or ``None``.
    """

    at: Array
    table: Array
    rows: Array | None

    @staticmethod
    def of(layer: SharedWeight) -> Numbers:
        """Of a layer; entries that no weight uses are left out, equal ones are one."""
        values = layer.table.detach().float().cpu().numpy()
        codes = layer.codes.cpu().numpy().astype(np.int32)
        used = np.bincount(codes.reshape(-1), minlength=len(values)) > 0
        table = np.unique(values[used])
        place = np.searchsorted(table, values).astype(np.uint16)
        along = [-1 if d == layer.axis else 1 for d in range(codes.ndim)]
        return Numbers(place[codes], table, None if layer.rows is None else layer.rows.detach().float().cpu().reshape(along).numpy())

    def same(self, other: Numbers) -> bool:
        """Is it the same weight?"""
        rows = (self.rows is None) == (other.rows is None) and (self.rows is None or np.array_equal(self.rows, other.rows))  # type: ignore[arg-type]
        return rows and np.array_equal(self.table, other.table) and np.array_equal(self.at, other.at)


Form = Stored | Wide | str
"""``"bytes"``, digits of large integers, or what ``onnx_packed`` holds."""


def forms(layers: Mapping[str, SharedWeight]) -> dict[str, Form]:
    """The form of each weight for which the file is smallest; those that are not in the answer are best written as they are.

    Args:
        layers: name ``<path>/weight`` -> layer.
    """
    found: dict[str, Form] = {}
    few: dict[str, Array] = {}
    for name, layer in layers.items():
        numbers = Numbers.of(layer)
        if len(numbers.table) <= FEW:
            few[name] = numbers.at.astype(np.int8)
        ways: list[Form] = ["bytes"] if len(numbers.table) <= BYTES else []
        ways += [Wide(max(len(numbers.table), 2))]
        sizes = {way: _bytes(name, numbers, way) for way in ways}
        best = min(ways, key=lambda way: sizes[way])
        if sizes[best] < 4 * numbers.at.size + len(name):
            found[name] = best
    packed = {name: stored for name, stored in choose(few).items() if name in found}
    return found | packed


def _bytes(name: str, numbers: Numbers, form: Form) -> int:
    """Bytes of the file for a weight whose form is not a :class:`Stored`."""
    tensors, nodes = _expanded(name, numbers, form, f"{name}_q", filled=False)
    held = math.ceil(numbers.at.size * (form.width if isinstance(form, Wide) else 1))
    return held + sum(int(t.ByteSize()) for t in tensors) + sum(int(n.ByteSize()) for n in nodes)


def _expanded(name: str, numbers: Numbers, form: Form, source: str, filled: bool = True) -> tuple[list[TensorProto], list[NodeProto]]:
    """Initializers and nodes that end in the float tensor ``name``; ``source``: integer tensor of the places, unless they are wide."""
    tensors, nodes, index = _indices(name, numbers, form, source, filled)
    flat, scaled = isinstance(form, Wide), numbers.rows is not None
    looked = f"{name}/looked" if flat or scaled else name
    tensors.append(numpy_helper.from_array(numbers.table, f"{name}/book"))
    nodes.append(helper.make_node("Gather", [f"{name}/book", index], [looked], name=looked))
    if flat:
        shaped = f"{name}/shaped" if scaled else name
        tensors.append(numpy_helper.from_array(np.array(numbers.at.shape, np.int64), f"{name}_shape"))
        nodes.append(helper.make_node("Reshape", [looked, f"{name}_shape"], [shaped], name=shaped))
        looked = shaped
    if numbers.rows is not None:
        tensors.append(numpy_helper.from_array(numbers.rows, f"{name}/rows"))
        nodes.append(helper.make_node("Mul", [looked, f"{name}/rows"], [name], name=name))
    return tensors, nodes


def _indices(name: str, numbers: Numbers, form: Form, source: str, filled: bool) -> tuple[list[TensorProto], list[NodeProto], str]:
    """Initializers, nodes and the tensor of places in the table."""
    if isinstance(form, Wide):
        tensors, nodes, last = onnx_wide.expansion(name, numbers.at.size, form)
        if filled:
            tensors[0].raw_data = onnx_wide.pack(numbers.at, form).tobytes()
        return tensors, nodes, last
    tensors = []
    if form == "bytes":
        raw = numbers.at.astype(np.uint8).tobytes() if filled else b""
        tensors = [TensorProto(name=source, data_type=TensorProto.UINT8, dims=numbers.at.shape, raw_data=raw)]
    return tensors, [helper.make_node("Cast", [source], [f"{name}/index"], name=f"{name}/index", to=TensorProto.INT32)], f"{name}/index"


def shared_weight(w: Writer, name: str, layer: SharedWeight) -> str:
    """Write the float weight ``name`` of a layer in the form that ``w.shared`` names; the same weight of several layers is written once.

    Returns:
        Name of its tensor.
    """
    form = w.shared.get(name)
    if form is None:
        return w.const(name, layer.weight)
    numbers = Numbers.of(layer)
    for other, kept in w.looked_up:
        if numbers.same(kept):
            return other
    w.looked_up.append((name, numbers))
    source = f"{name}_q"
    if isinstance(form, Stored):
        w.stored[name] = form
        source = w.weight(name, torch.from_numpy(numbers.at.astype(np.int8)))
    tensors, nodes = _expanded(name, numbers, form, source)
    w.initializers |= {t.name: t for t in tensors}
    w.nodes += nodes
    return name
