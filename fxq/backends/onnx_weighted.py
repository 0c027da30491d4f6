"""Convolution, transposed convolution and linear layers: float, integer, dynamic and weight-only forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq import numerics
from fxq.backends.onnx_codes import read_grid, written_grid
from fxq.backends.onnx_packed import Stored, choose, levels
from fxq.backends.onnx_shared import forms, shared_weight
from fxq.backends.onnx_wide import Wide
from fxq.backends.onnx_writer import Writer, quantizer, rounder
from fxq.convolutions import conv_pads
from fxq.graph import kind, module_of, shape
from fxq.kernels import gives_sign
from fxq.shared import SharedWeight
from fxq.spec import QParams
from fxq.targets import Target

NIBBLE = 4  # bits that ONNX's INT4 holds
WEIGHT_ONLY_LEVELS = 4  # codes up to which a weight-only linear layer is expanded at load; with more it runs as MatMulNBits
BLOCK = 128  # weights of a column that share a scale in a weight-only layer
PAD_MODES = {"constant": "constant", "zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def low_bit_forms(gm: GraphModule, target: Target) -> dict[str, Stored]:
    """Module path -> form of each weight that takes less bytes than as int8; the runtime must fold constants before it fuses Q/DQ."""
    weights: dict[str, np.ndarray[Any, Any]] = {}
    many = []
    for node in gm.graph.nodes if target.fused else ():
        module = module_of(gm, node) if node.op == "call_module" else None
        if not isinstance(module, m.Quantized) or module.dynamic is not None or module.weight_grid.spec.dtype != torch.int8 or module.weight_grid.spec.block:
            continue
        codes = module.weight_codes().cpu().contiguous().numpy()
        few = len(levels(codes)) in range(1, WEIGHT_ONLY_LEVELS + 1)
        if node.meta.get("integer") or few or not isinstance(module.op, nn.Linear):
            weights[str(node.target)] = codes
            many += [f"{node.target}/weight"] if isinstance(module.op, SharedWeight) else []
    found = choose({f"{path}/weight": codes for path, codes in weights.items()}, many)
    return {path: found[f"{path}/weight"] for path in weights if f"{path}/weight" in found}


def shared_forms(gm: GraphModule, target: Target) -> dict[str, Stored | Wide | str]:
    """Module path -> form of each float layer with a shared weight that takes less bytes than its weight; the runtime must fold constants."""
    modules = {str(n.target): module_of(gm, n) for n in gm.graph.nodes if n.op == "call_module"} if target.fused else {}
    layers = {f"{path}/weight": module for path, module in modules.items() if isinstance(module, SharedWeight)}
    return {name.removesuffix("/weight"): form for name, form in forms(layers).items()}


def weighted(w: Writer, node: Node, module: nn.Module) -> str:
    """Emit a conv, transposed conv or linear node (a float module or a :class:`~fxq.modules.Quantized` one)."""
    if isinstance(module, m.Quantized):
        if module.dynamic is not None:
            return dynamic_linear(w, node, module)
        if not node.meta.get("integer"):
            return weight_only(w, node, module)
        if w.target.placement == "inputs" and isinstance(module.op, nn.Linear) and len(shape(node)) != 2:
            return _product(w, node, module)
        return _layer(w, node, module.op, _weight(w, node, module), _bias(w, node, module))
    op: Any = module
    name = f"{w.out(node)}/weight"
    weight = shared_weight(w, name, op) if isinstance(op, SharedWeight) else w.const(name, op.weight)
    y = _layer(w, node, op, weight, _float_bias(w, node, op))
    return _kept_float(w, node, y) if w.target.fused and kind(w.gm, node.all_input_nodes[0]) == "fake_quantize" else y


def _kept_float(w: Writer, node: Node, y: str) -> str:
    """A float layer between DequantizeLinear and QuantizeLinear: ONNX Runtime (1.31, WeightBiasQuantization) would quantize its weight unasked.

    ``max(y, lowest float)`` is ``y``; no optimizer takes it out.
    """
    seen, readers = set(), list(node.users)
    while readers:
        reader = readers.pop()
        if kind(w.gm, reader) == "fake_quantize":
            return w.op("Max", [y, w.const("lowest_float", torch.tensor(torch.finfo(torch.float32).min))], f"{w.out(node)}/float")
        if kind(w.gm, reader) in ("relu", "clamp", "leaky_relu") and reader not in seen:
            seen.add(reader)
            readers += reader.users
    return y


def _layer(w: Writer, node: Node, op: Any, weight: str, bias: list[str]) -> str:
    if isinstance(op, nn.Linear):
        return _linear(w, node, w.input(node), weight, bias)
    out = w.out(node)
    attrs: dict[str, Any] = dict(strides=op.stride, dilations=op.dilation, group=op.groups, kernel_shape=op.kernel_size)
    if isinstance(op, nn.modules.conv._ConvTransposeNd):
        attrs.update(pads=[*op.padding, *op.padding], output_padding=op.output_padding)
        return w.op("ConvTranspose", [w.input(node), weight, *bias], out, **attrs)
    pads = conv_pads(op)
    begin, end = [b for b, _ in pads], [e for _, e in pads]
    if op.padding_mode == "zeros":
        return w.op("Conv", [w.input(node), weight, *bias], out, pads=begin + end, **attrs)
    return w.op("Conv", [_padded(w, node, op.padding_mode, begin, end), weight, *bias], out, **attrs)


def _padded(w: Writer, node: Node, mode: str, begin: list[int], end: list[int]) -> str:
    """Input padded with its own values; on the codes when it has any, so that the conv still fuses."""
    out, source = w.out(node), node.all_input_nodes[0]
    pads = w.ints(f"{out}/pads", [0, 0, *begin, 0, 0, *end])
    if kind(w.gm, source) != "fake_quantize":
        return w.op("Pad", [w.name(source), pads], f"{out}/padded", mode=PAD_MODES[mode])
    if w.target.placement == "inputs":  # nothing may stand between Q and DQ: the padded values are rounded again, onto themselves
        return _pair(w, w.op("Pad", [w.name(source), pads], f"{out}/padded", mode=PAD_MODES[mode]), read_grid(w.gm, source))
    codes = w.op("Pad", [w.codes(source), pads], f"{out}/padded_q", mode=PAD_MODES[mode])
    return w.op("DequantizeLinear", [codes, *w.grid(w.codes(source), read_grid(w.gm, source))], f"{out}/padded/dq")


def _float_bias(w: Writer, node: Node, op: Any) -> list[str]:
    return [] if op.bias is None else [w.const(f"{w.out(node)}/bias", op.bias)]


def _weight(w: Writer, node: Node, module: m.Quantized) -> str:
    """Integer weight behind DequantizeLinear. Low-bit forms are expanded to int8 first: by constant folding, before the runtime fuses Q/DQ."""
    out = w.out(node)
    qp, codes = _coded(w, out, module)
    grid = unit(qp) if _is_sign(w, node) else qp
    s, z = w.grid(f"{out}/weight", grid)
    q = w.weight(f"{out}/weight", codes)
    axis = {} if grid.spec.axis is None else {"axis": grid.spec.axis}
    return w.op("DequantizeLinear", [q, s, z], f"{out}/weight/dq", **axis)


def _is_sign(w: Writer, node: Node) -> bool:
    """A sign does not depend on scales: the layer is written with weights of scale 1, so that no channel's scale can be too small to saturate."""
    return w.target.fused and gives_sign(w.gm, node)


def unit(qp: QParams) -> QParams:
    """The weight grid with scale 1: one for all channels unless their zero points differ."""
    if qp.zero_point.ndim and bool((qp.zero_point != qp.zero_point[0]).any()):
        return QParams(qp.spec, torch.ones_like(qp.scale), qp.zero_point)
    return QParams(qp.spec.per_tensor(), torch.tensor(1.0), qp.zero_point.reshape(-1)[0])


def _coded(w: Writer, out: str, module: m.Quantized) -> tuple[QParams, Tensor]:
    """The weight's grid as the file holds it, and the codes on it."""
    qp = w.on_grid(f"{out}/weight", module.weight_grid.qparams)
    weight: Any = module.op.weight
    return qp, numerics.quantize(weight.detach(), qp)


def _bias(w: Writer, node: Node, module: m.Quantized) -> list[str]:
    codes = module.bias_codes()
    if codes is None:
        return _float_bias(w, node, module.op)
    assert module.bias_grid is not None
    out, qp = w.out(node), module.bias_grid.qparams
    if _is_sign(w, node):
        qp = numerics.bias_qparams(quantizer(w.gm, node.all_input_nodes[0]).qparams, unit(module.weight_grid.qparams))
    axis = {} if qp.spec.axis is None else {"axis": 0}
    return [w.op("DequantizeLinear", [w.const(f"{out}/bias_q", codes), *w.grid(f"{out}/bias", qp)], f"{out}/bias/dq", **axis)]


def _linear(w: Writer, node: Node, x: str, weight: str, bias: list[str]) -> str:
    """Gemm; for more than two dimensions between two reshapes, which the runtime fuses to QGemm (MatMul + Add would stay float).

    The reshapes of an integer layer stand between Q/DQ of their own: the runtime can move Q and DQ over a reshape, but with int8 activations
    it writes an invalid graph then.
    """
    out, source = w.out(node), node.all_input_nodes[0]
    if len(shape(source)) == 2:
        return w.op("Gemm", [x, weight, *bias], out, transB=1)
    x = w.op("Reshape", [x, w.ints(f"{out}/rows", [-1, shape(source)[-1]])], f"{out}/2d")
    integer, after = bool(node.meta.get("integer")), rounder(w.gm, node)
    if integer:
        x = _pair(w, x, read_grid(w.gm, source))
    y = w.op("Gemm", [x, weight, *bias], f"{out}/gemm", transB=1)
    if integer and after is not None:
        y = _pair(w, y, written_grid(w.gm, after, w.target.fused))
    return w.op("Reshape", [y, w.sizes(node, source)], out)


def _product(w: Writer, node: Node, module: m.Quantized) -> str:
    """MatMul with the weight as [K, N] and Add: on more than two dimensions the form that TensorRT takes without reshapes."""
    out = w.out(node)
    qp, codes = _coded(w, out, module)
    s, z = w.grid(f"{out}/weight", qp)
    axis = {} if qp.spec.axis is None else {"axis": 1}
    weight = w.op("DequantizeLinear", [w.const(f"{out}/weight_q", codes.T), s, z], f"{out}/weight/dq", **axis)
    bias = _float_bias(w, node, module.op)
    y = w.op("MatMul", [w.input(node), weight], f"{out}/matmul" if bias else out)
    return w.op("Add", [y, *bias], out) if bias else y


def _pair(w: Writer, x: str, qp: QParams) -> str:
    """A Q/DQ pair behind the tensor ``x``."""
    s, z = w.grid(f"{x}_q", qp)
    return w.op("DequantizeLinear", [w.op("QuantizeLinear", [x, s, z], f"{x}_q"), s, z], f"{x}_q/dq")


def weight_only(w: Writer, node: Node, module: m.Quantized) -> str:
    """Integer weights, float arithmetic.

    A linear layer becomes DequantizeLinear([K, N]) -> MatMul -> Add, which ONNX Runtime turns into MatMulNBits.
    The weight of a conv, and of a linear layer with up to four different codes, is written as Cast -> Sub -> Mul: constant folding expands it once at
    load, where a DequantizeLinear would run on every call.
    """
    out, op = w.out(node), module.op
    if not isinstance(op, nn.Linear) or f"{out}/weight" in w.stored:
        return _layer(w, node, op, _folded(w, out, module), _float_bias(w, node, op))
    y = w.op("MatMul", [w.input(node), _columns(w, out, module)], out if op.bias is None else f"{out}/matmul")
    return y if op.bias is None else w.op("Add", [y, *_float_bias(w, node, op)], out)


def _columns(w: Writer, out: str, module: m.Quantized) -> str:
    """Weight [K, N] of a linear layer, dequantized in blocks of 128 rows where K allows (the runtime's fastest), else by column."""
    qp, codes = _coded(w, out, module)
    codes = codes.T.contiguous()
    k, n = codes.shape
    if qp.spec.block is not None:
        names = [w.int4(f"{out}/weight_q", codes), w.const(f"{out}/weight_scale", qp.scale.T.contiguous())]
        return w.op("DequantizeLinear", names, f"{out}/weight/dq", axis=0, block_size=qp.spec.block)
    blocks = k // BLOCK if k % BLOCK == 0 else 0
    sizes = (blocks, n) if blocks else (n,)
    small = qp.spec.bits <= NIBBLE and qp.spec.signed
    names = [w.int4(f"{out}/weight_q", codes) if small else w.const(f"{out}/weight_q", codes)]
    names.append(w.const(f"{out}/weight_scale", qp.scale.expand(sizes)))
    if bool((qp.zero_point != 0).any()):
        zero = qp.zero_point.expand(sizes).to(qp.spec.dtype)
        names.append(w.int4(f"{out}/weight_zero", zero) if small else w.const(f"{out}/weight_zero", zero))
    how = {"axis": 0, "block_size": BLOCK} if blocks else {"axis": 1}
    return w.op("DequantizeLinear", names, f"{out}/weight/dq", **how)


def _folded(w: Writer, out: str, module: m.Quantized) -> str:
    qp, codes = module.weight_grid.qparams, module.weight_codes()
    q = w.weight(f"{out}/weight", codes)
    real = w.op("Cast", [q], f"{out}/weight/float", to=TensorProto.FLOAT)
    along = [-1 if d == qp.spec.axis else 1 for d in range(codes.ndim)] if qp.spec.axis is not None else []
    if bool((qp.zero_point != 0).any()):
        real = w.op("Sub", [real, w.const(f"{out}/weight_zero", qp.zero_point.to(torch.float32).reshape(along))], f"{out}/weight/centred")
    return w.op("Mul", [real, w.const(f"{out}/weight_scale", qp.scale.reshape(along))], f"{out}/weight")


def dynamic_linear(w: Writer, node: Node, module: m.Quantized) -> str:
    """The input's range is measured at every call; ONNX Runtime fuses the chain to DynamicQuantizeMatMul."""
    out, qp, op = w.out(node), module.weight_grid.qparams, module.op
    x, s, z = f"{out}/input_q", f"{out}/input_scale", f"{out}/input_zero"
    w.multi("DynamicQuantizeLinear", [w.input(node)], [x, s, z], f"{out}/input")
    weight_scale, weight_zero = w.grid(f"{out}/weight", qp)
    q = w.const(f"{out}/weight_q", module.weight_codes().T)
    acc = w.op("MatMulInteger", [x, q, z, weight_zero], f"{out}/sums")
    real = w.op("Cast", [acc], f"{out}/float", to=TensorProto.FLOAT)
    scale = w.op("Mul", [s, weight_scale], f"{out}/scale")
    y = w.op("Mul", [real, scale], out if op.bias is None else f"{out}/matmul")
    return y if op.bias is None else w.op("Add", [y, *_float_bias(w, node, op)], out)
