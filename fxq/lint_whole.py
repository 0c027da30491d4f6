"""Is a file a graph at all: what every lint asks before it reads one, and what is said of a file that trips one up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter

import onnx
from onnx import TensorProto

from fxq.errors import ArtifactError, FxqError

REWRITE = "Repair what writes it; onnx.checker.check_model names its faults as well"


def require_whole(model: onnx.ModelProto, where: str | None = None) -> None:
    """Every tensor that a node reads is given once, and no node waits for itself.

    Raises:
        ArtifactError: with the node and the tensor.
    """
    graph = model.graph
    makers: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if makers.setdefault(name, index) != index:
                raise ArtifactError(f"the tensor {name!r} is made by two nodes", where=where, way_out=REWRITE)
    given = {v.name for v in (*graph.input, *graph.initializer)} | {t.values.name for t in graph.sparse_initializer}
    for node in graph.node:
        for name in filter(None, node.input):
            if name not in makers and name not in given:
                fact = f"the {node.op_type} node {node.name or next(iter(node.output), '')!r} reads the tensor {name!r}, which nothing gives"
                raise ArtifactError(fact, where=where, way_out=REWRITE)
    try:
        TopologicalSorter({i: {makers[name] for name in node.input if name in makers} for i, node in enumerate(graph.node)}).prepare()
    except CycleError as e:
        ring = ", ".join(dict.fromkeys(graph.node[i].output[0] for i in e.args[1]))
        raise ArtifactError(f"its nodes wait for each other in a ring: {ring}", where=where, way_out=REWRITE) from e


@contextmanager
def refusing(model: onnx.ModelProto, where: str | None = None) -> Iterator[None]:
    """An exception over a model that ONNX's own checker refuses is the model's fault, and becomes one line; any other goes on.

    Raises:
        ArtifactError: with what the checker says.
    """
    try:
        yield
    except FxqError:
        raise
    except Exception as e:
        fault = invalid(model)
        if not fault:
            raise
        raise ArtifactError(f"it is no valid ONNX model: {fault}", where=where, way_out=REWRITE) from e


@contextmanager
def named(where: str | None) -> Iterator[None]:
    """An :class:`ArtifactError` that names no file gets the name of this one."""
    try:
        yield
    except ArtifactError as e:
        if e.where or not where:
            raise
        raise ArtifactError(e.fact, where=where, way_out=e.way_out) from e


def invalid(model: onnx.ModelProto) -> str:
    """What ONNX's checks of nodes and tensors, and its strict inference, say against a model; empty for nothing.

    The checks of whole models ask for more than runtimes do, such as shapes of all outputs. Weights that are stored beside a model are taken as they are.
    """
    lean = onnx.ModelProto()
    lean.CopyFrom(model)
    known = {v.name for v in lean.graph.input}
    for tensor in [t for t in lean.graph.initializer if t.data_location == TensorProto.EXTERNAL]:
        if tensor.name not in known:
            lean.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        lean.graph.initializer.remove(tensor)
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = lean.ir_version, {o.domain: o.version for o in lean.opset_import}
    try:
        for tensor in lean.graph.initializer:
            onnx.checker.check_tensor(tensor, context)
            onnx.numpy_helper.to_array(tensor)
        for node in lean.graph.node:
            onnx.checker.check_node(node, context)
        onnx.shape_inference.infer_shapes(lean, strict_mode=True, data_prop=True)
    except Exception as e:  # the checker's, the inference's and protobuf's own types
        return " ".join(str(e).split()).partition(" ==>")[0][:300].rstrip(".")
    return ""
