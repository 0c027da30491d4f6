"""Which products of a quantized ONNX file can saturate on x86 CPUs without VNNI, from the file alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto

from fxq.exposed import constant
from fxq.lint import Source, lint, load, load_whole
from fxq.lint_trt_graph import Graph, Node, inlined, read
from fxq.lint_whole import named
from fxq.portability_pairs import MOST, depthwise, paired, unsafe, worst

Array = np.ndarray[Any, Any]
ON_CODES = {"QLinearConv": 3, "QLinearMatMul": 3, "MatMulInteger": 1, "QGemm": 3}
"""Operations that stand for integer kernels themselves: the input that holds the weight's codes. ConvInteger multiplies in 16 bits and is none."""
BETWEEN = ("Conv", "Gemm", "MatMul")
"""Operations that the runtime fuses with the DequantizeLinear nodes in front of them."""
SIGNED = tuple(getattr(TensorProto, n) for n in ("INT8", "INT4", "INT2") if hasattr(TensorProto, n))
WAY_OUT = "Compile with portable=True, or quantize again with 7-bit weights (reduce_range)"


@dataclass(frozen=True)
class PairFinding:
    """An integer operation whose pair sums can leave int16.

    Attributes:
        node: its name, or its first output's.
        op: operator type.
        channels, channels_at_risk: output channels (of a matrix product: columns); those with a pair that can saturate.
        pairs, pairs_at_risk: pairs of weights, likewise.
        worst: the sum of two products farthest from 0 that the weights allow.
        most: greatest activation code; 255 unless a Clip in the file says less.
    """

    node: str
    op: str
    channels: int
    channels_at_risk: int
    pairs: int
    pairs_at_risk: int
    worst: int
    most: int = MOST

    @property
    def fact(self) -> str:
        """What is wrong."""
        where = f"{self.pairs_at_risk} of {self.pairs} pairs of weights, in {self.channels_at_risk} of {self.channels} output channels"
        return f"{where}, can leave 16 bits (up to {self.worst} for codes up to {self.most})"

    def __str__(self) -> str:
        return f"{self.op} {self.node}: {self.fact}"


@dataclass(frozen=True)
class PairReport:
    """What the weights of a file allow on CPUs without VNNI.

    Attributes:
        findings: operations that can saturate.
        safe: so many integer operations with signed weights cannot.
        unread: integer operations whose weight's codes are no constant of the file.
    """

    findings: tuple[PairFinding, ...]
    safe: int
    unread: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing can saturate, and every weight was seen."""
        return not self.findings and not self.unread

    def __str__(self) -> str:
        total = len(self.findings) + self.safe
        head = f"{len(self.findings)} of {total} integer operations can saturate on x86 CPUs without VNNI"
        unread = [f"{name}: the codes of its weight are no constant of the file" for name in self.unread]
        return "\n".join([head, *(f"  {line}" for line in (*self.findings, *unread)), *([WAY_OUT] if self.findings else [])])

    def to_json(self) -> str:
        """The report as a JSON object."""
        rows = [asdict(f) | {"fact": f.fact, "way_out": WAY_OUT} for f in self.findings]
        return json.dumps({"ok": self.ok, "safe": self.safe, "unread": self.unread, "findings": rows}, indent=1)


def check(model: Source) -> PairReport:
    """Find the integer operations whose pair sums can leave int16 for some input; reads the file only.

    Activation codes are taken to reach 255 unless a Clip in front of their DequantizeLinear ends them earlier. Weights of unsigned bytes are multiplied by
    another kernel, which does not saturate; products of two activations are as well.

    Args:
        model: bytes, path or ModelProto of any quantized ONNX file, with Q/DQ nodes or with integer operations.

    Raises:
        ArtifactError: when the file cannot be read.
    """
    file = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    proto = inlined(load(model) if file is None else load_whole(file))
    with named(file):
        integer = {o.node for o in lint(proto).ops if o.runs == "int8"}
    graph = read(proto)
    findings, safe, unread = [], 0, []
    for node, activation, weight in _products(graph, integer):
        if weight in graph.maker and not graph.constant(weight) or graph.dtype(weight) == TensorProto.UINT8:
            continue
        codes = _codes(graph, proto, weight)
        if codes is None or graph.dtype(weight) not in SIGNED:
            unread.append(node.name)
            continue
        found = _finding(graph, node, activation, codes)
        safe += found is None
        findings += [] if found is None else [found]
    return PairReport(tuple(findings), safe, tuple(unread))


def _codes(graph: Graph, proto: ModelProto, weight: str) -> Array | None:
    """The codes of a weight; packed ones are expanded by ONNX Runtime."""
    codes = graph.value(weight)
    if codes is None and weight in graph.maker:
        try:
            return constant(proto, weight)
        except Exception:  # of a file that the runtime refuses
            return None
    return codes


def _products(graph: Graph, integer: set[str]) -> Iterator[tuple[Node, str, str]]:
    """Operations that multiply codes: the node and the tensors of the activation's and the weight's codes."""
    for node in graph:
        if node.op in ON_CODES:
            yield node, node.input(0), node.input(ON_CODES[node.op])
        elif node.op in BETWEEN and node.name in integer:
            x, w = graph.maker.get(node.input(0)), graph.maker.get(node.input(1))
            if x is not None and x.is_dq:
                yield node, x.input(0), w.input(0) if w is not None and w.is_dq else node.input(1)


def _finding(graph: Graph, node: Node, activation: str, codes: Array) -> PairFinding | None:
    """What is wrong with the products of a node, ``None`` when nothing can saturate."""
    w = torch.from_numpy(np.array(codes, np.int32))
    if "Conv" in node.op:
        if w.ndim < 3 or depthwise(tuple(w.shape), int(node.attrs.get("group", 1))):
            return None
    elif w.ndim < 2:
        w = w.reshape(1, -1)
    elif not node.attrs.get("transB"):
        w = w.transpose(-1, -2)
    pairs = paired(w if "Conv" in node.op else w.reshape(-1, w.shape[-1]))
    most = _most(graph, activation)
    risk = unsafe(pairs[..., 0], pairs[..., 1], most)
    if not bool(risk.any()):
        return None
    return PairFinding(node.name, node.op, len(risk), int(risk.any(1).sum()), risk.numel(), int(risk.sum()), worst(pairs, most), most)


def _most(graph: Graph, activation: str) -> int:
    """Greatest code of an activation: 255, or where a Clip of its bytes ends."""
    clip = graph.maker.get(activation)
    top = graph.value(clip.input(2)) if clip is not None and clip.op == "Clip" and clip.input(2) else None
    return MOST if top is None or top.size != 1 or graph.dtype(activation) == TensorProto.INT8 else min(MOST, int(top.reshape(-1)[0]))
