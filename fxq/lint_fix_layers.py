"""Of the repairs for ONNX Runtime: operations that another operation does on codes, and biases."""

from __future__ import annotations

import numpy as np
import onnx

from fxq.lint_trt_edit import Editor, grid, stays
from fxq.lint_trt_graph import DQ, Array, Graph, Node, numbers
from fxq.spec import QuantSpec

ONE = QuantSpec.parse("s8n/pt").qmax
"""Code that stands for a channel's whole factor."""
INT32_MAX = np.iinfo(np.int32).max


def means(edit: Editor, graph: Graph) -> None:
    """ReduceMean of ``[N, C, ...]`` over all positions becomes GlobalAveragePool, which has an integer kernel; Squeeze takes the ones away."""
    for node in graph:
        if node.op != "ReduceMean" or not _between_grids(graph, node):
            continue
        rank = len(graph.shape(node.input(0)) or ())
        axes = graph.value(node.input(1)) if node.input(1) else np.asarray(node.attrs.get("axes") or [], np.int64)
        if rank < 3 or axes is None or sorted(int(a) % rank for a in axes.reshape(-1)) != list(range(2, rank)):
            edit.left.append(f"ReduceMean {node.name}: it is no mean over all positions of a channel")
            continue
        keeps = bool(node.attrs.get("keepdims", 1))
        if node.input(1):
            edit.replaced.add(node.input(1))
        node.proto.op_type = "GlobalAveragePool"
        del node.proto.input[1:]
        del node.proto.attribute[:]
        if not keeps:
            _squeeze(edit, graph, node, list(range(2, rank)))
        edit.done.append(f"ReduceMean {node.name}: written as GlobalAveragePool (equal but for the order of the float sum)")


def _squeeze(edit: Editor, graph: Graph, node: Node, axes: list[int]) -> None:
    out, inner = node.output, edit.fresh(f"{node.output}_mean")
    node.proto.output[0] = inner
    name = edit.fresh(f"{node.name}_squeeze")
    if graph.opset >= 13:
        given = edit.constant(graph, np.asarray(axes, np.int64), f"{name}_axes")
        _insert(graph, node, onnx.helper.make_node("Squeeze", [inner, given], [out], name=name), after=True)
    else:
        _insert(graph, node, onnx.helper.make_node("Squeeze", [inner], [out], name=name, axes=axes), after=True)


def batch_norms(edit: Editor, graph: Graph) -> None:
    """A batch norm between grids becomes a 1x1 depthwise Conv: its factor as one code a channel, its shift as an int32 bias."""
    for node in graph:
        if node.op != "BatchNormalization" or not _between_grids(graph, node):
            continue
        x = graph.maker[node.input(0)]
        found, rank = grid(graph, x), len(graph.shape(node.input(0)) or ())
        given = [graph.value(node.input(i)) for i in range(1, 5)]
        if found is None or found[0].size != 1 or found[0].dtype != np.float32 or rank < 3 or any(v is None for v in given):
            edit.left.append(f"BatchNormalization {node.name}: its parameters or the grid in front of it are no constants in float32")
            continue
        gamma, beta, mean, var = (numbers(v) for v in given)
        factor = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
        weight_scale = (np.abs(factor) / ONE).astype(np.float32)
        bias = _codes(beta - mean * factor, np.float32(found[0].reshape(-1)[0]), weight_scale)
        if bias is None or np.any(weight_scale < np.finfo(np.float32).tiny):
            edit.left.append(f"BatchNormalization {node.name}: a channel has the factor 0, or a shift beyond int32")
            continue
        codes = (np.sign(factor) * ONE).astype(np.int8).reshape(-1, *[1] * (rank - 1))
        weight = _dequantized(edit, graph, node, "weight", codes, weight_scale)
        shift = _dequantized(edit, graph, node, "bias", bias[0], bias[1])
        node.proto.op_type = "Conv"
        del node.proto.attribute[:]
        edit.replaced.update(node.inputs[1:])
        del node.proto.input[1:]
        node.proto.input.extend([weight, shift])
        edit.write_attribute(node, "group", len(factor))
        edit.write_attribute(node, "kernel_shape", [1] * (rank - 2))
        edit.done.append(f"BatchNormalization {node.name}: written as a depthwise Conv (moves its values by at most {bias[2]:.2g}, the rounding of its shift)")


def biases(edit: Editor, graph: Graph) -> None:
    """Float biases of products of codes that give float become int32 on the grid input scale times weight scale: then Gemm, or MatMul and Add, is one QGemm."""
    for node in graph:
        product, slot = _biased(graph, node)
        if product is None:
            continue
        x, w = graph.maker.get(product.input(0)), graph.maker.get(product.input(1))
        value = graph.value(node.input(slot))
        grids = [grid(graph, n) if n is not None and n.is_dq else None for n in (x, w)]
        if value is None or value.ndim != 1 or value.dtype != np.float32 or grids[0] is None or grids[1] is None:
            continue
        if any(g is not None and g[0].dtype != np.float32 for g in grids):
            continue
        if grids[0][0].size != 1 or grids[1][0].size not in (1, value.size) or float(node.attrs.get("alpha", 1.0)) != 1.0:
            continue
        reals = numbers(value) * float(node.attrs.get("beta", 1.0))
        scale = grids[1][0].reshape(-1) if grids[1][0].size > 1 else grids[1][0].reshape(())
        found = _codes(reals, np.float32(grids[0][0].reshape(-1)[0]), scale.astype(np.float32))
        if found is None:
            edit.left.append(f"{node.op} {node.name}: its bias does not fit int32 steps of input scale times weight scale")
            continue
        edit.read_from(node, slot, _dequantized(edit, graph, node, "bias", found[0], found[1]))
        if node.op == "Gemm":
            edit.write_attribute(node, "beta", None)
        how = "exact" if found[2] == 0 else f"moves its outputs by at most {found[2]:.2g}, half a step of the bias's grid"
        edit.done.append(f"{node.op} {node.name}: float bias written as int32 ({how})")


def _biased(graph: Graph, node: Node) -> tuple[Node | None, int]:
    """The product whose constant bias ``node`` adds, and the input with the bias; only where no QuantizeLinear follows (there the runtime does it)."""
    if any(_reaches_q(graph, user) for user in graph.readers(node.output)):
        return None, 0
    if node.op == "Gemm" and node.input(2):
        return node, 2
    if node.op == "Add":
        for slot in (0, 1):
            product = graph.maker.get(node.input(1 - slot))
            if product is not None and product.op == "MatMul" and len(graph.users.get(product.output, ())) == 1 and not stays(graph, product.output):
                return product, slot
    return None, 0


def _reaches_q(graph: Graph, node: Node) -> bool:
    while node.op in ("Relu", "Clip"):
        readers = graph.readers(node.output)
        if len(readers) != 1:
            return False
        node = readers[0]
    return node.is_q


def _between_grids(graph: Graph, node: Node) -> bool:
    """A DequantizeLinear in front, one QuantizeLinear (with a clip before it or not) behind."""
    source, readers = graph.maker.get(node.input(0)), graph.readers(node.output)
    return source is not None and source.is_dq and len(readers) == 1 and _reaches_q(graph, readers[0]) and not stays(graph, node.output)


def _codes(reals: Array, x: np.float32, w: Array) -> tuple[Array, Array, float] | None:
    """int32 codes of a bias, their scale, and by how much the greatest of them moves; ``None`` when they do not fit."""
    scale = np.asarray(x * w, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint(reals / scale.astype(np.float64))
    if not np.all(np.isfinite(steps)) or np.any(np.abs(steps) > INT32_MAX):
        return None
    moved = steps.astype(np.float32) * scale - reals.astype(np.float32)
    return steps.astype(np.int32), scale, float(np.abs(moved).max(initial=0.0))


def _dequantized(edit: Editor, graph: Graph, node: Node, part: str, codes: Array, scale: Array) -> str:
    """Constant codes behind a DequantizeLinear of their own, in front of ``node``; the name of its output."""
    base = f"{node.name}_{part}"
    names = [edit.constant(graph, v, f"{base}_{what}") for what, v in (("codes", codes), ("scale", scale), ("zero", np.zeros(scale.shape, codes.dtype)))]
    out, name = edit.fresh(base), edit.fresh(f"{base}_dequantize")
    made = onnx.helper.make_node(DQ, names, [out], name=name)
    if scale.ndim:
        made.attribute.append(onnx.helper.make_attribute("axis", 0))
    _insert(graph, node, made)
    return out


def _insert(graph: Graph, at: Node, proto: onnx.NodeProto, after: bool = False) -> None:
    place = next(i for i, p in enumerate(graph.proto.node) if p is at.proto)
    graph.proto.node.insert(place + after, proto)
