"""What a runtime will execute in integers, predicted from a Q/DQ file alone (:func:`lint`), and what ONNX Runtime did (:func:`runtime_report`)."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, overload

import onnx

from fxq import lint_trt
from fxq.errors import ArtifactError, TargetError, nearest
from fxq.lint_clips import absorb_clips
from fxq.lint_graph import BYTES, DQ, FLOATS, Net, Op, Q
from fxq.lint_rules import KERNELS, ON_CODES, Blocked, fuse, fuse_dynamic, match
from fxq.lint_steps import BEFORE, drop_dq_q, signed_to_unsigned
from fxq.lint_trt_report import TrtReport
from fxq.lowering import contents

TARGETS = {"onnxruntime": "ONNX Runtime, CPU provider, all optimizations", **lint_trt.SUMMARIES}
GONE = "gone"
TYPED_LIKE_INPUT = {*ON_CODES, "Clip", "Pad"}
BLOCKED = "_nchwc"
CLIPS = ("Relu", "Clip")  # they vanish: into a kernel or into a Q, which cannot be told apart afterwards
Source = bytes | str | os.PathLike[str] | onnx.ModelProto


@dataclass(frozen=True)
class OpReport:
    """How one node of the file runs.

    Attributes:
        node: its name, or its first output's when it has none.
        op: operator type.
        runs: ``int8``, ``float``, or ``gone`` (removed or merged; only in :func:`runtime_report`).
        kernel: operator that does the work, e.g. ``QLinearConv``.
        why: for ``float``, the rule that blocked the integer kernel.
    """

    node: str
    op: str
    runs: str
    kernel: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.op} {self.node}: {self.runs}" + (f", {self.why}" if self.why else f" ({self.kernel})")


@dataclass(frozen=True)
class LintReport:
    """How each compute node runs, and how many Q and DQ nodes are left after optimization."""

    ops: tuple[OpReport, ...]
    q_left: int
    dq_left: int

    def counts(self) -> dict[str, tuple[int, int]]:
        """Operator type -> (nodes in int8, nodes in float)."""
        tally = Counter((o.op, o.runs) for o in self.ops)
        types = dict.fromkeys(o.op for o in self.ops)
        return {t: (tally[t, "int8"], tally[t, "float"]) for t in types}

    def __str__(self) -> str:
        parts = [f"{op.lower()} {i}/{i + f} int8" for op, (i, f) in self.counts().items() if i + f]
        head = ", ".join([*parts, f"{self.q_left} Q + {self.dq_left} DQ left"])
        return "\n".join([head, *(f"  {o}" for o in self.ops if o.runs == "float")])

    def to_json(self) -> str:
        """The report as a JSON object."""
        body = {"ops": [asdict(o) for o in self.ops], "q_left": self.q_left, "dq_left": self.dq_left, "counts": self.counts()}
        return json.dumps(body, indent=1)


@overload
def lint(model: Source, target: Literal["onnxruntime"] = "onnxruntime") -> LintReport: ...
@overload
def lint(model: Source, target: str) -> LintReport | TrtReport: ...
def lint(model: Source, target: str = "onnxruntime") -> LintReport | TrtReport:
    """Predict how the target executes a Q/DQ file; reads the file only, runs nothing.

    Not predicted for ONNX Runtime: Q/DQ pairs that the runtime's last step, which lays integer convs out channels-last, adds around the Transposes
    it moves into float islands (seen where a float operation reads what an integer conv gives; it never changes what fuses).

    Args:
        model: bytes, path or ModelProto of any ONNX file with Q/DQ nodes.
        target: ``onnxruntime``, ``tensorrt``, or TensorRT on one compute capability: ``sm75`` (which is refused for int8), ``sm80``, ``sm86``, ...

    Returns:
        For TensorRT a report with findings (:class:`fxq.lint_trt_report.TrtReport`).

    Raises:
        TargetError: for an unknown target; the nearest one is offered.
        ArtifactError: when the file cannot be read.
    """
    if target not in TARGETS:
        raise TargetError(f"no lint rules for target {target!r}", way_out=nearest(target, TARGETS))
    proto = load(model)
    if target in lint_trt.CAPABILITIES:
        return lint_trt.check(proto, target, folder=os.path.dirname(model) if isinstance(model, (str, os.PathLike)) else None)
    net = Net(proto)
    nodes = compute_nodes(net)
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
    return LintReport(ops, sum(op.is_q for op in net), sum(op.is_dq for op in net))


def load(model: Source) -> onnx.ModelProto:
    """ModelProto of bytes, a path or itself.

    Raises:
        ArtifactError: when it is no ONNX file.
    """
    if isinstance(model, onnx.ModelProto):
        return model
    data, where = contents(model)
    try:
        proto = onnx.load_from_string(data)
    except Exception as e:  # the decoder's own error type
        raise ArtifactError("is not a whole ONNX file", where=where, way_out="Lower the model again") from e
    if not proto.graph.node:
        raise ArtifactError("holds no ONNX graph", where=where, way_out="Give an .onnx file")
    return proto


def compute_nodes(net: Net) -> dict[int, OpReport]:
    """Nodes of the file that compute with values: position -> name and type. Q, DQ, constants and shape arithmetic are none."""
    constant = set(net.const_names)
    nodes: dict[int, OpReport] = {}
    for op in net:
        given = [name for name in op.inputs if name]
        if given and all(name in constant for name in given):
            constant.update(op.outputs)
            continue
        kinds = {net.types.get(name, 0) for name in (*given, *op.outputs) if name not in constant}
        if op.is_q or op.is_dq or op.op in ("Shape", "Size", "Identity", "Dropout") or not kinds & {0, *FLOATS, *BYTES}:
            continue
        nodes[op.origins[0]] = OpReport(op.name or op.outputs[0], op.op, "float", op.op)
    return nodes


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
    proto.CopyFrom(load(model))
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


def agrees(predicted: LintReport, actual: LintReport) -> list[str]:
    """Differences between a prediction and what the runtime did; nodes that the runtime removed or merged are not compared."""
    truth = {o.node: o for o in actual.ops}
    lines = []
    for o in predicted.ops:
        real = truth.get(o.node)
        if real is None:
            lines.append(f"{o}: not in the runtime's report")
        elif real.runs != GONE and (o.runs != real.runs or (o.runs == "int8" and o.kernel != real.kernel and o.op not in CLIPS)):
            lines.append(f"predicted {o}; the runtime: {real.runs} ({real.kernel})")
    for what, a, b in (("QuantizeLinear", predicted.q_left, actual.q_left), ("DequantizeLinear", predicted.dq_left, actual.dq_left)):
        if a != b:
            lines.append(f"{what} left: predicted {a}, the runtime has {b}")
    return lines
