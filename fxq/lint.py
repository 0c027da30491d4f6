"""What a runtime will execute in integers, predicted from a Q/DQ file alone (:func:`lint`), and what ONNX Runtime did (:func:`runtime_report`)."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, overload

import onnx
from onnx import external_data_helper

from fxq import lint_ov, lint_trt, targets
from fxq.errors import ArtifactError, TargetError, nearest
from fxq.lint_clips import absorb_clips
from fxq.lint_graph import BYTES, DQ, Net, Op, Q
from fxq.lint_report import CLIPS, GONE, LintReport, OpReport, agrees, compute_nodes, label
from fxq.lint_rules import KERNELS, ON_CODES, Blocked, fuse, fuse_dynamic, match
from fxq.lint_steps import BEFORE, FIRST, drop_dq_q, signed_to_unsigned
from fxq.lint_trt_graph import inlined
from fxq.lint_trt_report import TrtReport
from fxq.lint_whole import refusing, require_whole
from fxq.lowering import contents

TARGETS = {"onnxruntime": "ONNX Runtime, CPU provider, all optimizations", lint_ov.TARGET: lint_ov.SUMMARY, **lint_trt.SUMMARIES}
__all__ = ["GONE", "TARGETS", "LintReport", "OpReport", "agrees", "compute_nodes", "lint", "load", "optimize", "runtime_report"]
TYPED_LIKE_INPUT = {*ON_CODES, "Clip", "Pad"}
BLOCKED = "_nchwc"
SMALL = 1 << 20
"""Elements of the largest tensor beside the file that is read: scales and zero points are small."""
Source = bytes | str | os.PathLike[str] | onnx.ModelProto


def rules_of(target: str) -> str:
    """Name in :data:`TARGETS` of the rules that the files of a target of fxq's are linted with; any other name as it is."""
    return targets.get(target).lint_name if target not in TARGETS and target in targets.names() else target


@overload
def lint(model: Source, target: Literal["onnxruntime", "openvino"] = "onnxruntime") -> LintReport: ...
@overload
def lint(model: Source, target: str) -> LintReport | TrtReport: ...
def lint(model: Source, target: str = "onnxruntime") -> LintReport | TrtReport:
    """Predict how the target executes a Q/DQ file; reads the file only, runs nothing.

    Not predicted for ONNX Runtime: Q/DQ pairs that the runtime's last step, which lays integer convs out channels-last, adds around the Transposes
    it moves into float islands (seen where a float operation reads what an integer conv gives; it never changes what fuses).

    Args:
        model: bytes, path or ModelProto of any ONNX file with Q/DQ nodes.
        target: ``onnxruntime``, ``openvino``, ``tensorrt``, or TensorRT on one compute capability: ``sm75`` (refused for int8), ``sm80``, ...

    Returns:
        For TensorRT a report with findings (:class:`fxq.lint_trt_report.TrtReport`).

    Raises:
        TargetError: for an unknown target; the nearest one is offered.
        ArtifactError: when the file cannot be read, or scales that are stored beside it; when it is no valid graph.
    """
    target = rules_of(target)
    if target not in TARGETS:
        raise TargetError(f"no lint rules for target {target!r}", way_out=nearest(target, TARGETS))
    proto = load(model)
    if target in lint_trt.CAPABILITIES:
        return lint_trt.check(proto, target, folder=os.path.dirname(model) if isinstance(model, (str, os.PathLike)) else None)
    _read_beside(proto, model)
    where = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    with refusing(proto, where):
        net = Net(inlined(proto))
        return lint_ov.check(net) if target == lint_ov.TARGET else _onnxruntime(net)


def _onnxruntime(net: Net) -> LintReport:
    nodes = compute_nodes(net)
    for step in FIRST:
        step(net)
    net.until_stable(BEFORE)
    net.until_stable((absorb_clips,))
    signed_to_unsigned(net)
    for op in net:
        if op.is_q or op.is_dq:
            continue
        try:
            fuse(net, op, match(net, op))
        except Blocked as reason:
            op.why = str(reason)
    fuse_dynamic(net)
    drop_dq_q(net)
    carriers = {index: op for op in sorted(net.ops, key=lambda op: op.alive) for index in op.origins if op.alive or op.is_q}
    ops = tuple(_predicted(net, index, op, carriers.get(index)) for index, op in nodes.items() if index in carriers)
    return LintReport(ops, sum(op.is_q for op in net), sum(op.is_dq for op in net), tuple(_left(net)))


def _read_beside(proto: onnx.ModelProto, model: Source) -> None:
    """Read scales and zero points that are stored in another file."""
    beside = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL and math.prod(t.dims) <= SMALL]
    where = "" if isinstance(model, (bytes, onnx.ModelProto)) else os.fspath(model)
    for tensor in beside:
        try:
            external_data_helper.load_external_data_for_tensor(tensor, os.path.dirname(where))
        except (OSError, ValueError, onnx.checker.ValidationError) as e:
            fact = f"its weights cannot be read: {str(e).rstrip('.')}"
            raise ArtifactError(fact, where=where or None, way_out="Put their files beside the model, and give its path") from e
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _left(net: Net) -> Iterator[tuple[str, str]]:
    """Q and DQ nodes that no kernel took, each with what keeps it."""
    for op in net:
        if op.is_q:
            maker = net.maker.get(op.inputs[0])
            yield label(op), f"it reads {_who(net, maker)}".rstrip(",") if maker is not None else "it rounds an input of the graph"
        elif op.is_dq:
            readers = [user for user, _ in net.edges(op)]
            plain = next((user for user in readers if not user.kernel), None)
            yield label(op), f"{_who(net, plain)} reads it" if plain is not None else "its value is an output of the graph"


def _who(net: Net, op: Op) -> str:
    return f"{op.op} {label(op)}" + ("" if op.kernel or _on_codes(net, op) else ", which runs in float,")


def load(model: Source) -> onnx.ModelProto:
    """ModelProto of bytes, a path or itself.

    Raises:
        ArtifactError: when it is no ONNX file, or its nodes are no graph (:func:`fxq.lint_whole.require_whole`).
    """
    if isinstance(model, onnx.ModelProto):
        require_whole(model)
        return model
    data, where = contents(model)
    try:
        proto = onnx.load_from_string(data)
    except Exception as e:  # the decoder's own error type
        raise ArtifactError("is not a whole ONNX file", where=where, way_out="Lower the model again") from e
    if not proto.graph.node:
        raise ArtifactError("holds no ONNX graph", where=where, way_out="Give an .onnx file")
    require_whole(proto, where)
    return proto


def load_whole(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """ModelProto of a path, with the weights that are stored beside it.

    Raises:
        ArtifactError: when it is no ONNX file (:func:`load`), or its weights are not there.
    """
    proto = load(path)
    try:
        external_data_helper.load_external_data_for_model(proto, os.path.dirname(os.fspath(path)))
    except (OSError, ValueError, onnx.checker.ValidationError) as e:
        raise ArtifactError(f"its weights cannot be read: {str(e).rstrip('.')}", where=os.fspath(path), way_out="Put their files beside the model") from e
    return proto


def _predicted(net: Net, index: int, node: OpReport, carrier: Op | None) -> OpReport:
    if carrier is None or carrier.is_q:
        return OpReport(node.node, node.op, "int8", Q)
    kernel = carrier.kernel or (carrier.op if carrier.op in KERNELS or _on_codes(net, carrier) else "")
    if kernel:
        return OpReport(node.node, node.op, "int8", kernel)
    return OpReport(node.node, node.op, "float", carrier.op, carrier.why)


def _on_codes(net: Net, op: Op) -> bool:
    return bool(op.inputs) and net.types.get(op.inputs[0], 0) in BYTES


def runtime_report(model: Source) -> LintReport:
    """What ONNX Runtime makes of the file: it is loaded and its optimized graph classified.

    Raises:
        ArtifactError: when the file cannot be read or the runtime refuses it.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(inlined(load(model)))
    nodes = compute_nodes(Net(proto))
    for index, node in enumerate(proto.graph.node):
        node.name = f"fxq{index}_"
    optimized = optimize(proto)
    found: dict[int, onnx.NodeProto] = {}
    for node in optimized.graph.node:
        for hit in re.findall(r"fxq(\d+)_", node.name):
            found.setdefault(int(hit), node)
        if node.name.endswith(BLOCKED):
            _in_blocks(proto, node, found)
    types = _types_of(optimized)
    ops = tuple(_actual(proto, index, node, found, types) for index, node in nodes.items())
    tally = Counter(n.op_type for n in optimized.graph.node)
    return LintReport(ops, tally[Q], tally[DQ])


def _in_blocks(proto: onnx.ModelProto, node: onnx.NodeProto, found: dict[int, onnx.NodeProto]) -> None:
    """Float convolutions in the runtime's blocked layout are named like the tensor that they give: their own or that of the activation inside."""
    made = {o: i for i, n in enumerate(proto.graph.node) for o in n.output}
    index = made.get(node.name.removesuffix(BLOCKED))
    while index is not None:
        found.setdefault(index, node)
        origin = proto.graph.node[index]
        index = made.get(origin.input[0]) if origin.op_type in CLIPS else None


def optimize(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that ONNX Runtime's CPU provider executes, all optimizations on."""
    from fxq.backends.onnxruntime import session

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(proto.SerializeToString(), save_optimized=path)
        return onnx.load(path)


def _types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element types in an optimized graph: it carries none, and inference knows too little of the runtime's own operators."""
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input} | {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        first = types.get(node.input[0], 0) if node.input else 0
        if node.op_type == Q:
            kind = types.get(node.input[2], onnx.TensorProto.UINT8) if len(node.input) > 2 else onnx.TensorProto.UINT8
        elif node.op_type in ("QLinearConcat", "Where"):
            kind = types.get(node.input[1], 0)
        elif node.op_type == "QGemm":
            kind = first if len(node.input) > 8 and node.input[8] else onnx.TensorProto.FLOAT
        elif node.op_type.startswith("QLinear") or node.op_type.removeprefix("Nhwc") in TYPED_LIKE_INPUT:
            kind = first
        else:
            kind = onnx.TensorProto.FLOAT
        types.update(dict.fromkeys(node.output, kind))
    return types


def _actual(proto: onnx.ModelProto, index: int, node: OpReport, found: dict[int, onnx.NodeProto], types: dict[str, int]) -> OpReport:
    hit = found.get(index)
    if hit is None and node.op in CLIPS:
        return _absorbed(proto, index, node, found, types)
    if hit is None:
        return OpReport(node.node, node.op, GONE, "")
    return OpReport(node.node, node.op, "int8" if _integer(hit, types) else "float", hit.op_type.removeprefix("Nhwc"))


def _integer(node: onnx.NodeProto, types: dict[str, int]) -> bool:
    return node.op_type in KERNELS or (bool(node.input) and types.get(node.input[0], 0) in BYTES)


def _absorbed(proto: onnx.ModelProto, index: int, node: OpReport, found: dict[int, onnx.NodeProto], types: dict[str, int]) -> OpReport:
    """A clip that the runtime removed: into the integer kernel or the float activation in front of it, or into the Q behind it."""
    clip = proto.graph.node[index]
    before: int | None = index
    while before is not None and before not in found and proto.graph.node[before].op_type in CLIPS:
        source = proto.graph.node[before].input[0]
        before = next((i for i, n in enumerate(proto.graph.node) if source in n.output), None)
    host = found.get(before) if before is not None else None
    if host is not None and _integer(host, types):
        return OpReport(node.node, node.op, "int8", Q if host.op_type == DQ else host.op_type.removeprefix("Nhwc"))
    if host is not None and any(a.name == "activation" for a in host.attribute):
        return OpReport(node.node, node.op, "float", host.op_type)
    readers = {n.op_type for n in proto.graph.node if clip.output[0] in n.input}
    return OpReport(node.node, node.op, "int8" if readers == {Q} else GONE, Q if readers == {Q} else "")
