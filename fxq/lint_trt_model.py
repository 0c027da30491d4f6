"""What TensorRT does not take of a graph as a whole: operators, types, names, what reads quantized constants, and Q/DQ pairs that bring nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto

from fxq.lint_trt_flow import operand
from fxq.lint_trt_fold import MOVES
from fxq.lint_trt_graph import ONNX_DOMAINS, Graph, Node
from fxq.lint_trt_ops import FP4, FP8, INT4, INT8, WEIGHTED, type_name
from fxq.lint_trt_report import ERROR, WARNING, Finding

INTEGER_OPS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
NO_IMPORTER = frozenset(
    """
    AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress ConcatFromSequence CumProd DFT DeformConv
    Det ImageDecoder MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement
    RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss
    SplitToSequence StringConcat StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique
    """.split()
)
"""Operators of ONNX that the parser of TensorRT-RTX 1.7.1 does not know (``OnnxParser.supports_operator``)."""
CONTRIB = frozenset(
    "GroupQueryAttention MultiHeadAttention QMoE RotaryEmbedding SimplifiedLayerNormalization SkipSimplifiedLayerNormalization MatMulNBits".split()
)
"""Operators of ONNX Runtime's own domain that this parser knows; full TensorRT's does not."""
OPTIMIZED = ("FusedConv", "FusedGemm", "FusedMatMul", "NhwcFusedConv", "NhwcMaxPool", "QGemm", "BiasGelu", "FastGelu", "SkipLayerNormalization", "QuickGelu")
"""Written by ONNX Runtime's optimizer."""
NO_TYPE = (
    "UINT16 INT16 UINT32 UINT64 STRING COMPLEX64 COMPLEX128 FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ UINT4 UINT2 INT2 FLOAT8E8M0 FLOAT6E2M3 FLOAT6E3M2".split()
)
"""Element types that the parser does not import, also in constants that nobody reads."""
ACTIVATIONS = ("BatchNormalization", "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Elu", "Gelu", "Add")


SHUFFLES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Shape", "Identity")
"""What may move FP8 and 4-bit codes."""
KNOWN = set(TensorProto.DataType.keys())
"""Element types of the installed onnx."""


def operators(graph: Graph, model: onnx.ModelProto) -> Iterator[Finding]:
    """Operators that the parser does not know."""
    local = {(f.domain, f.name) for f in model.functions}
    for node in graph:
        if (node.domain, node.op) in local:
            continue
        if node.op in INTEGER_OPS:
            fact = f"{node.op} computes on codes: TensorRT takes QuantizeLinear and DequantizeLinear around float operators only"
            yield Finding(ERROR, "integer-op", node.name, fact, "Export the model in Q/DQ form")
        elif node.domain in ONNX_DOMAINS:
            if node.op in NO_IMPORTER:
                yield Finding(ERROR, "operator", node.name, f"TensorRT's parser does not know {node.op}", "Write it with other operators, or as a plugin")
            elif node.op == "MaxPool" and (any(d != 1 for d in node.attrs.get("dilations") or ()) or len([o for o in node.outputs if o]) > 1):
                yield Finding(ERROR, "operator", node.name, "TensorRT's MaxPool has no dilations and no second output", "Write it with other operators")
        elif node.op in OPTIMIZED or node.op.startswith(("QLinear", "Nhwc", "Fused")):
            fact = f"{node.domain}::{node.op} was written by ONNX Runtime's optimizer"
            yield Finding(ERROR, "optimized", node.name, fact, "Give the file as it was before ONNX Runtime optimized it")
        elif node.op in CONTRIB:
            yield from _contrib(graph, node)
        elif onnx.defs.has(node.op):
            if not (node.is_q or node.is_dq):
                fact = f"TensorRT's parser ignores the domain {node.domain!r} and takes it for ONNX's own {node.op}"
                yield Finding(WARNING, "domain", node.name, fact, "Rename the operator if it is another one")
        else:
            yield Finding(ERROR, "domain", node.name, f"TensorRT does not know {node.domain}::{node.op}", "Write it with ONNX's operators, or as a plugin")


def _contrib(graph: Graph, node: Node) -> Iterator[Finding]:
    if node.op == "MatMulNBits" and graph.dtype(node.input(0)) not in (0, TensorProto.FLOAT16):
        way_out = "Write INT4 weights with DequantizeLinear and block_size"
        yield Finding(ERROR, "operator", node.name, "MatMulNBits is taken with float16 activations only", way_out)
    else:
        yield Finding(WARNING, "operator", node.name, f"{node.domain}::{node.op} is known to TensorRT-RTX only", "Write it with ONNX's operators")


def types(model: onnx.ModelProto) -> Iterator[Finding]:
    """Element types that cannot be imported, wherever they stand."""
    missing = {TensorProto.DataType.Value(n): n for n in NO_TYPE if n in KNOWN}
    way_out = "Use types that TensorRT has: float, INT8, INT4, FP8 E4M3, FP4, INT32, INT64, BOOL"
    for graph in graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_type in missing:
                yield Finding(ERROR, "type", tensor.name, f"the initializer is {missing[tensor.data_type]}, which TensorRT does not import", way_out)
        for value in graph.input:
            if value.type.tensor_type.elem_type in missing:
                yield Finding(ERROR, "type", value.name, f"the input is {missing[value.type.tensor_type.elem_type]}, which TensorRT does not import", way_out)
        for node in graph.node:
            kinds = [a.i for a in node.attribute if a.name == "to" and node.op_type == "Cast"]
            kinds += [a.t.data_type for a in node.attribute if a.name == "value" and node.op_type == "Constant"]
            for kind in kinds:
                if kind in missing:
                    yield Finding(ERROR, "type", node.name or node.output[0], f"{node.op_type} makes {missing[kind]}, which TensorRT does not import", way_out)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for a in node.attribute:
            for body in ([a.g] if a.HasField("g") else []) + list(a.graphs):
                yield from graphs(body)


def functions(model: onnx.ModelProto) -> Iterator[Finding]:
    """Local functions that hold Q/DQ nodes: every call repeats their names, and the parser takes no name twice."""
    holds = {(f.domain, f.name) for f in model.functions if any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in f.node)}
    nodes: list[Any] = [n for g in graphs(model.graph) for n in g.node] + [n for f in model.functions for n in f.node]
    calls = Counter((n.domain, n.op_type) for n in nodes)
    for key in sorted(holds):
        if calls[key] > 1:
            fact = f"the function holds QuantizeLinear or DequantizeLinear and is called {calls[key]} times: their names clash"
            yield Finding(ERROR, "duplicate-name", "::".join(key), fact, "Inline the function (--fix does)")


def names(graph: Graph) -> Iterator[Finding]:
    """Q and DQ nodes of one name, in all graphs together. A node without a name is called by its first output."""
    named = [(n.proto.name or f"node_of_{next(iter(n.outputs), '')}", n) for scope in graph.all() for n in scope if n.is_q or n.is_dq]
    for name, count in Counter(name for name, _ in named).items():
        if count > 1:
            yield Finding(ERROR, "duplicate-name", name, f"{count} QuantizeLinear or DequantizeLinear nodes have this name", "Give each its own (--fix does)")


def constants(graph: Graph) -> Iterator[Finding]:
    """Quantized constants go straight into a DequantizeLinear."""
    quantized = (INT8, INT4, FP8, FP4)
    for name in [n for n, t in graph.tensors.items() if t.data_type in quantized]:
        for node, slot in graph.users.get(name, ()):
            if node.is_dq and slot == 0 or (node.is_q or node.is_dq) and slot == 2 or node.op in INTEGER_OPS or node.domain not in ONNX_DOMAINS:
                continue
            if all((user.is_q or user.is_dq) and at == 2 for out in node.outputs for user, at in graph.users.get(out, ())) and node.output in graph.users:
                continue
            fix = "Fold it (--fix does)" if node.op in MOVES else "Dequantize the constant first"
            fact = f"{node.op} reads the quantized constant {name}, which only DequantizeLinear may read"
            yield Finding(ERROR, "constant", node.name, fact, fix)
        if name in graph.outputs and graph.outer is None:
            yield Finding(ERROR, "constant", name, "a quantized constant is an output of the graph", "Dequantize it first")
    for name in dict.fromkeys([*(v.name for v in graph.inputs), *graph.maker]):
        if graph.dtype(name) in (INT4, FP8, FP4) and not graph.constant(name):
            for node, _ in graph.users.get(name, ()):
                if not node.is_dq and node.op not in SHUFFLES:
                    fact = f"{node.op} reads {type_name(graph.dtype(name))} codes, which only DequantizeLinear may read"
                    yield Finding(ERROR, "constant", node.name, fact, "Dequantize them first")


def placement(graph: Graph) -> Iterator[Finding]:
    """Q/DQ pairs that cost time and bring nothing."""
    for node in graph:
        given = graph.maker.get(node.input(0))
        if node.op == "AveragePool" and operand(graph, node.input(0)).dq is not None:
            way_out = "Leave it between float values, or use GlobalAveragePool, which fuses"
            yield Finding(WARNING, "average-pool", node.name, "AveragePool runs in float between its Q/DQ pairs", way_out)
        elif node.op in ("LSTM", "GRU", "RNN") and operand(graph, node.input(2)).dq is not None:
            fact = f"the recurrence of {node.op} runs in float though its weights are quantized"
            yield Finding(WARNING, "recurrent", node.name, fact, "Leave the recurrent weights in float")
        elif node.op in ACTIVATIONS and given is not None and given.is_dq:
            yield from _round_trips(graph, node)


def _round_trips(graph: Graph, node: Node) -> Iterator[Finding]:
    """A Q/DQ pair between a convolution or product and what would fuse with it."""
    for name in node.inputs if node.op == "Add" else node.inputs[:1]:
        dq = graph.maker.get(name)
        q = graph.maker.get(dq.input(0)) if dq is not None and dq.is_dq else None
        source = graph.maker.get(q.input(0)) if q is not None and q.is_q else None
        if source is None or dq is None or q is None or source.op not in WEIGHTED or len(graph.users.get(source.output, ())) > 1:
            continue
        if any((other := graph.maker.get(i)) is not None and other.op in WEIGHTED for i in node.inputs):
            continue  # that one fuses, this one is the skip connection
        if len(graph.users.get(dq.output, ())) == 1:
            where = "only the other input of the Add" if node.op == "Add" else f"what {node.op} gives"
            fact = f"stands between {source.op} {source.name} and {node.op} {node.name}: it keeps them apart and its rounding stays"
            yield Finding(WARNING, "round-trip", q.name, fact, f"Leave it out and quantize {where}")
