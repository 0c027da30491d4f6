"""Broken copies of models: what a fuzzer feeds to the lint."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto

TYPES = [t for name, t in TensorProto.DataType.items() if name != "UNDEFINED"]
OPS = ("Relu", "Transpose", "Reshape", "Concat", "Conv", "MatMul", "Gemm", "ConvTranspose", "QuantizeLinear", "DequantizeLinear", "Mul", "Pad", "Slice", "If",
       "Constant", "ConstantOfShape", "Einsum", "ReduceMax", "Cast", "Split", "LSTM", "Sum", "MaxPool", "Gather", "Squeeze", "QLinearConv")  # fmt: skip


def tensors(model: onnx.ModelProto) -> list[str]:
    names = [t.name for t in model.graph.initializer] + [v.name for v in model.graph.input] + [o for n in model.graph.node for o in n.output]
    return names or ["x"]


def some(r: random.Random, parts: Any) -> Any:
    return r.choice(list(parts)) if len(parts) else None


def retype(r: random.Random, m: onnx.ModelProto) -> None:
    if (t := some(r, m.graph.initializer)) is not None:
        t.data_type = r.choice(TYPES)


def resize(r: random.Random, m: onnx.ModelProto) -> None:
    if (t := some(r, m.graph.initializer)) is not None:
        dims = list(t.dims)
        change = r.choice(("drop", "add", "set", "swap"))
        if change == "add":
            dims.insert(r.randint(0, len(dims)), r.choice((0, 1, 2, 16)))
        elif dims and change == "drop":
            dims.pop(r.randrange(len(dims)))
        elif dims and change == "set":
            dims[r.randrange(len(dims))] = r.choice((-1, 0, 1, 3, 16, 1 << 40))
        else:
            dims.reverse()
        del t.dims[:]
        t.dims.extend(dims)


def corrupt(r: random.Random, m: onnx.ModelProto) -> None:
    if (t := some(r, m.graph.initializer)) is not None and t.raw_data:
        data = bytearray(t.raw_data)
        data[r.randrange(len(data))] = r.choice((0, 127, 128, 255))
        t.raw_data = bytes(data[: r.choice((len(data), len(data), len(data) // 2))])


def externalize(r: random.Random, m: onnx.ModelProto) -> None:
    if (t := some(r, m.graph.initializer)) is not None and t.raw_data:
        onnx.external_data_helper.set_external_data(t, "nowhere.bin")
        t.ClearField("raw_data")


def drop_attribute(r: random.Random, m: onnx.ModelProto) -> None:
    node = some(r, [n for n in m.graph.node if n.attribute])
    if node is not None:
        node.attribute.pop(r.randrange(len(node.attribute)))


def add_attribute(r: random.Random, m: onnx.ModelProto) -> None:
    if (node := some(r, m.graph.node)) is not None:
        name = r.choice(("axis", "block_size", "output_dtype", "perm", "to", "axes", "transB", "mode", "equation", "value", "dilations"))
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        value = r.choice((-9, -1, 0, 1, 2, 7, 1000, 0.5, "x", "ab->ba", [0], [1, 0], [5, 5, 5], [0.5]))
        node.attribute.append(onnx.helper.make_attribute(name, value))


def rewire(r: random.Random, m: onnx.ModelProto) -> None:
    node = some(r, [n for n in m.graph.node if n.input])
    if node is not None:
        node.input[r.randrange(len(node.input))] = r.choice((*tensors(m), "", "missing"))


def cut_input(r: random.Random, m: onnx.ModelProto) -> None:
    node = some(r, [n for n in m.graph.node if n.input])
    if node is not None:
        node.input.pop(r.randrange(len(node.input)))


def cut_output(r: random.Random, m: onnx.ModelProto) -> None:
    node = some(r, [n for n in m.graph.node if n.output])
    if node is not None:
        node.output.pop(r.randrange(len(node.output)))


def drop_node(r: random.Random, m: onnx.ModelProto) -> None:
    if m.graph.node:
        m.graph.node.pop(r.randrange(len(m.graph.node)))


def repeat_node(r: random.Random, m: onnx.ModelProto) -> None:
    if (node := some(r, m.graph.node)) is not None:
        m.graph.node.insert(r.randint(0, len(m.graph.node)), node)


def rename_op(r: random.Random, m: onnx.ModelProto) -> None:
    if (node := some(r, m.graph.node)) is not None:
        node.op_type = r.choice(OPS)
        node.domain = r.choice(("", "", "ai.onnx", "com.microsoft", "fxq"))


def forget_shapes(r: random.Random, m: onnx.ModelProto) -> None:
    for value in m.graph.input:
        if r.random() < 0.5:
            value.type.tensor_type.ClearField("shape")


def reversion(r: random.Random, m: onnx.ModelProto) -> None:
    if m.opset_import:
        m.opset_import[0].version = r.choice((1, 9, 10, 12, 13, 18, 19, 21, 23, 25, 99))


def leave(r: random.Random, m: onnx.ModelProto) -> None:
    """A tensor leaves the graph as well."""
    m.graph.output.append(onnx.helper.make_tensor_value_info(r.choice(tensors(m)), TensorProto.FLOAT, None))


MUTATIONS: tuple[Callable[[random.Random, onnx.ModelProto], None], ...] = (
    retype, resize, corrupt, externalize, drop_attribute, add_attribute, rewire, cut_input, cut_output, drop_node, repeat_node, rename_op, forget_shapes,
    reversion, leave,
)  # fmt: skip


def mutant(model: onnx.ModelProto, seed: int, changes: int) -> onnx.ModelProto:
    """A copy with random faults."""
    r = random.Random(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for _ in range(changes):
        r.choice(MUTATIONS)(r, copy)
    return copy
