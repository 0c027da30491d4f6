"""What an ONNX file stores and computes, read from the file alone: weights, their codes, bits and bytes, biases, multiply-accumulates."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
"""Operations with weights, and which input is the weight."""


@dataclass(frozen=True)
class Layer:
    """A convolution or product with a stored weight.

    Attributes:
        node, op: its name and type in the file; ``channels``: ``(input, output)`` of a convolution, features of a product.
        weights, biases: how many there are; ``macs``: for one input (batch 1).
        levels: different codes in its weight, 0 of a float weight; ``stored``: bytes of the codes, scales and tables; a tensor that several layers
            read counts in equal parts.
        scales: bytes of scales and zero points alone.
    """

    node: str
    op: str
    channels: tuple[int, int]
    weights: int
    biases: int
    macs: int
    levels: int
    stored: float
    scales: float

    @property
    def bits(self) -> int:
        """Width of a code, whole: 32 of floats, 1 for two levels, 2 for three or four, else 4 or 8."""
        return 32 if not self.levels else next(b for b in (1, 2, 4, 8, 16) if self.levels <= 2**b)

    @property
    def stored_bits(self) -> float:
        """Bits of the file for each weight, scales included."""
        return 8 * self.stored / self.weights

    @property
    def code_bits(self) -> float:
        """Bits of the file for each weight without scales: codes and tables."""
        return 8 * (self.stored - self.scales) / self.weights


class File:
    """An ONNX model: who makes each tensor, and what is stored."""

    def __init__(self, data: bytes) -> None:
        self.model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(data))
        graph = self.model.graph
        self.stored = {t.name: t for t in graph.initializer}
        self.maker = {o: n for n in graph.node for o in n.output}
        known = [*graph.value_info, *graph.input, *graph.output]
        self.shape = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in known}

    def above(self, name: str) -> dict[str, bool]:
        """Stored tensors that a constant is made of -> it is a scale or a zero point. Empty when the tensor depends on an input."""
        if name in self.stored:
            return {name: False}
        node = self.maker.get(name)
        if node is None:
            return {}
        if node.op_type == "Constant":
            return {}
        found: dict[str, bool] = {}
        for i, inner in enumerate(node.input):
            part = self.above(inner) if inner else {}
            if inner and not part and not self._constant(inner):
                return {}
            found.update({k: v or (node.op_type in ("DequantizeLinear", "Mul") and i > 0) for k, v in part.items()})
        return found

    def _constant(self, name: str) -> bool:
        return name in self.maker and self.maker[name].op_type == "Constant"

    def codes(self, name: str) -> str | None:
        """The integer tensor that a weight is made from, by DequantizeLinear or by Cast and Mul; ``None`` of a float weight."""
        while name in self.maker:
            node = self.maker[name]
            to_float = node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT
            if node.op_type == "DequantizeLinear" or to_float:
                return node.input[0]
            name = node.input[0] if node.input else ""
        return None

    def bytes(self, name: str) -> int:
        """Bytes of a stored tensor; two 4-bit codes are one byte."""
        t = self.stored[name]
        return len(t.raw_data) if t.raw_data else onnx.numpy_helper.to_array(t).nbytes

    def values(self, names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
        """Values of constant tensors: those that are stored, and those that nodes make of them, computed by ONNX Runtime without optimizations."""
        found = {n: onnx.numpy_helper.to_array(self.stored[n]) for n in names if n in self.stored}
        left = [n for n in names if n not in found]
        if not left:
            return found
        part = onnx.ModelProto()
        part.CopyFrom(self.model)
        needed, wanted = set(left), []
        for node in reversed(self.model.graph.node):
            if needed & set(node.output):
                wanted.insert(0, node)
                needed |= set(node.input)
        del part.graph.node[:], part.graph.input[:], part.graph.output[:], part.graph.value_info[:]
        part.graph.node.extend(wanted)
        part.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in left)
        options = ort.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 4
        session = ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return {**found, **dict(zip(left, session.run(left, {}), strict=True))}


def weight_count(file: File, node: onnx.NodeProto, codes: dict[str, np.ndarray[Any, Any]]) -> tuple[int, int, tuple[int, ...]]:
    """Number of weights and of levels, and the weight's shape."""
    name = node.input[1]
    source = file.codes(name)
    if source is not None and source in codes:
        shape = tuple(file.shape.get(name) or codes[source].shape)
        return math.prod(shape), len(np.unique(codes[source].astype(np.int32))), shape
    shape = tuple(file.shape.get(name) or file.stored[name].dims)
    return math.prod(shape), 0, shape


def macs(file: File, node: onnx.NodeProto, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one input: elements of the output (of a transposed convolution: of the input) times weights for each."""
    if node.op_type == "ConvTranspose":
        return math.prod(file.shape[node.input[0]][1:]) * math.prod(shape[1:])
    elements = math.prod(file.shape[node.output[0]][1:])
    if node.op_type == "Conv":
        return elements * math.prod(shape[1:])
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return elements * (shape[1] if transposed else shape[-2])


def layers(data: bytes) -> list[Layer]:
    """Every convolution and product with a stored weight, in order."""
    file = File(data)
    nodes = [(n, file.above(n.input[1])) for n in file.model.graph.node if n.op_type in WEIGHTED]
    nodes = [(n, above) for n, above in nodes if above]
    users = Counter(name for _, above in nodes for name in above)
    sources = [s for n, _ in nodes if (s := file.codes(n.input[1])) is not None]
    codes = file.values(sources)
    found = []
    for node, above in nodes:
        weights, levels, shape = weight_count(file, node, codes)
        bias = file.above(node.input[2]) if len(node.input) > 2 and node.input[2] else {}
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        channels = (shape[1] * groups, shape[0]) if node.op_type == "Conv" else (shape[0], shape[1] * groups)
        size = {name: file.bytes(name) / users[name] for name in above}
        biases = next((math.prod(file.stored[b].dims) for b, scale in bias.items() if not scale), 0)
        scales = sum(size[name] for name, scale in above.items() if scale)
        found.append(Layer(node.name, node.op_type, channels, weights, biases, macs(file, node, shape), levels, sum(size.values()), scales))
    return found


def stated_bytes(found: list[Layer]) -> float:
    """The size that the literature states of such a net: whole bits for each weight, 4 bytes for each bias, nothing for scales and the graph."""
    return sum(layer.weights * layer.bits / 8 + 4 * layer.biases for layer in found)
