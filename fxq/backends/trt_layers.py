"""Which layers an engine has and in which type they run: TensorRT-RTX's log table and full TensorRT's inspector, in one form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxq.backends.trt_messages import TESTED
from fxq.errors import EngineError

WEIGHTED = ("correlation", "gemm", "deconv", "runtime_fusion", "conv", "matrix")
"""Parts of the kinds that multiply by weights or by each other: convolutions and matrix products, by their names in RTX and in TensorRT 10 and 11."""

_DTYPES = {
    "float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16", "int8": "int8", "fp8": "fp8",
    "int4": "int4", "fp4e2m1": "fp4", "fp4": "fp4", "int32": "int32", "int64": "int64", "bool": "bool", "uint8": "uint8", "e8m0": "e8m0",
}  # fmt: skip
"""Names of types in tables and inspectors, in lower case."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a layer.

    Attributes:
        name: in the engine; graph inputs and outputs keep the names of the ONNX file.
        dims: sizes, -1 where they are dynamic; empty where the table has none.
        dtype: ``fp32``, ``fp16``, ``bf16``, ``int8``, ``fp8``, ``int4``, ``fp4``, ``int32``, ``int64``, ``bool``, ``uint8``.
    """

    name: str
    dims: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Layer:
    """A layer of an engine, after fusion.

    Attributes:
        name: in the engine.
        kind: TensorRT's word: ``correlation`` (convolution), ``gemm``, ``deconv``, ``runtime_fusion`` (product with 4-bit weights), ``kgen`` (pointwise), ...
        inputs, constants, outputs: its tensors. Full TensorRT gives weights as types without sizes.
        onnx: names of the ONNX nodes that went into it. A node without a name is called ``node_of_<its output>`` by the parser.
    """

    name: str
    kind: str
    inputs: tuple[TensorInfo, ...]
    constants: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    onnx: tuple[str, ...]

    @property
    def weighted(self) -> bool:
        """Whether it is a convolution or a matrix product; attention fused into one kernel is one (``_gemm_mha_v2``)."""
        return any(word in self.kind.lower() for word in WEIGHTED) or self.name.startswith("_gemm_")


_HEAD = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?=\[ \{ Name: |\[\], Constants: \[)", re.DOTALL)
_TENSOR = re.compile(
    r"(?:\[|,) \{ Name: (?P<name>(?:(?!, Datatype: ).)*?), Dimensions: \[(?P<dims>[-\d,]*)\], Strides: \[[-\d,]*\], StrideOrder: \[[-\d,]*\], "
    r"Datatype: (?P<dtype>\w+), Format: [^}]* \}",
    re.DOTALL,
)
_TAIL = re.compile(r"TacticName: .*?, StreamId: -?\d+(?:, \w+: [^,]*)*?, Metadata: ?(?P<metadata>.*)", re.DOTALL)
_NODE = "[ONNX Layer: "
_BETWEEN = re.compile(r"\]\x1f?(?=\[ONNX Layer: )")


def parse_log(text: str) -> tuple[Layer, ...]:
    """Layers of the verbose message that starts ``Layers:`` (TensorRT-RTX 1.7).

    Raises:
        EngineError: for a text of another form.
    """
    head, _, body = text.partition("\n")
    body = body.rpartition("\nI/O Tensors:")[0]
    rows = re.split(r"\n(?=Name: )", body.rstrip("\n")) if body.strip() else []
    if head.strip() != "Layers:" or not rows:
        raise _foreign("the layer table", text)
    return tuple(_row(row) for row in rows)


def _row(text: str) -> Layer:
    """A line of the table. Names may hold any character, so it is read from left to right, tensor by tensor."""
    head = _HEAD.match(text)
    if head is None:
        raise _foreign("a row of the layer table", text)
    at, parts = head.end(), []
    for follows in (", Constants: ", ", Outputs: ", ", "):
        tensors: list[TensorInfo] = []
        while found := _TENSOR.match(text, at):
            tensors.append(TensorInfo(found["name"], _dims(found["dims"]), _dtype(found["dtype"])))
            at = found.end()
        end = ("]" if tensors else "[]") + follows
        if not text.startswith(end, at):
            raise _foreign("a row of the layer table", text)
        at += len(end)
        parts.append(tuple(tensors))
    tail = _TAIL.fullmatch(text, at)
    if tail is None:
        raise _foreign("a row of the layer table", text)
    return Layer(head["name"], head["kind"], parts[0], parts[1], parts[2], _nodes(tail["metadata"]))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _dtype(text: str) -> str:
    """The type in a word or in a sentence such as ``Channel major FP16 format where channel % 8 == 0``."""
    words = re.findall(r"\w+", text.lower())
    return next((_DTYPES[w] for w in words if w in _DTYPES), text.lower())


def _nodes(metadata: str) -> tuple[str, ...]:
    """Names in ``[ONNX Layer: a][ONNX Layer: b]``. A name may hold brackets, though not the sequence that starts the next one."""
    parts = _BETWEEN.split(metadata.strip().removesuffix("]"))
    return tuple(dict.fromkeys(p.removeprefix(_NODE) for p in parts if p.startswith(_NODE)))


def parse_inspector(json_text: str) -> tuple[Layer, ...]:
    """Layers of the engine inspector's JSON at detailed verbosity (TensorRT 10.12 and later, 11).

    Raises:
        EngineError: when it is no such JSON, or holds names only.
    """
    try:
        rows = json.loads(json_text, strict=False)["Layers"]
    except (ValueError, KeyError, TypeError) as e:
        raise _foreign("the engine inspector's text", json_text) from e
    if not rows or not all(isinstance(row, dict) and "Name" in row for row in rows):
        raise _foreign("the engine inspector's text", json_text)
    return tuple(_inspected(row) for row in rows)


def _inspected(row: Mapping[str, Any]) -> Layer:
    constants = [_info(t) for t in row.get("Constants", ())]
    for part in ("Weights", "Bias"):
        weights = row.get(part)
        if isinstance(weights, dict) and weights.get("Count"):
            constants.append(TensorInfo(part, (), _dtype(str(weights.get("Type", "")))))
    inputs, outputs = (tuple(_info(t) for t in row.get(part, ())) for part in ("Inputs", "Outputs"))
    return Layer(row["Name"], row.get("LayerType", ""), inputs, tuple(constants), outputs, _nodes(row.get("Metadata", "")))


def _info(tensor: Mapping[str, Any]) -> TensorInfo:
    keys = {key.lower(): value for key, value in tensor.items()}
    text = keys.get("datatype") or keys.get("format/datatype") or ""
    return TensorInfo(tensor.get("Name", ""), tuple(keys.get("dimensions", ())), _dtype(str(text)))


def _foreign(what: str, text: str) -> EngineError:
    line = next((line for line in text.splitlines() if line.strip()), "")
    return EngineError(f"{what} has a form that fxq does not know: {line[:200]!r}", way_out=TESTED)


def runs(layer: Layer) -> str:
    """How a layer computes: ``int8``, ``fp8``, ``fp4``, ``int4`` (both operands), ``int8-weights``, ``fp8-weights``, ``int4-weights``, ``fp4-weights``
    (unpacked into float), or ``float``.

    A convolution or product runs in integers when all that it multiplies is int8; the float constants of its epilogue (scales, bias) do not count. A
    ``runtime_fusion`` unpacks into float whatever it reads. Any other layer counts as integer when it reads and writes int8 only.
    """
    inputs, constants, outputs = ({t.dtype for t in part} for part in (layer.inputs, layer.constants, layer.outputs))
    for dtype in ("int8", "fp8", "fp4", "int4"):
        if layer.weighted and layer.kind != "runtime_fusion":
            if dtype in inputs and (dtype in constants or inputs == {dtype}):
                return dtype
        elif inputs == outputs == {dtype}:
            return dtype
    if layer.weighted:
        packed = [dtype for dtype in ("int4", "fp4", "int8", "fp8") if dtype in constants]
        if packed:
            return f"{packed[0]}-weights"
    return "float"


def by_node(layers: Iterable[Layer]) -> dict[str, Layer]:
    """ONNX node name -> the layer that computes it.

    The name of a node can stand in several layers (the epilogue of a convolution is a layer of its own): convolutions and products go first, then the
    order of execution.
    """
    found: dict[str, Layer] = {}
    for layer in sorted(layers, key=lambda one: not one.weighted):
        for node in layer.onnx:
            found.setdefault(node, layer)
    return found


def table_text(layers: Sequence[Layer]) -> str:
    """A table for the eye: how each layer runs, its kind, its types in (with those of its constants) and out, its ONNX nodes."""
    rows = [("runs", "kind", "types", "ONNX nodes")]
    for layer in layers:
        inputs, constants, outputs = (" ".join(dict.fromkeys(t.dtype for t in part)) or "-" for part in (layer.inputs, layer.constants, layer.outputs))
        rows.append((runs(layer), layer.kind, f"{inputs} * {constants} -> {outputs}" if layer.constants else f"{inputs} -> {outputs}", ", ".join(layer.onnx)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows)
