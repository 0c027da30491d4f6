"""One emitter per kind of node: from a canonical module to ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq import numerics
from fxq.graph import data_inputs, kind, module_of, shape
from fxq.spec import QParams

HARD_SIGMOID_SHIFT, HARD_SIGMOID_WIDTH = 3.0, 6.0


class Writer:
    """Collects ONNX nodes and initializers; knows the tensor name of each FX node."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.names: dict[Node, str] = {}

    def op(self, op: str, inputs: list[str], output: str, **attrs: Any) -> str:
        """Append a node with one output; returns the output's name."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}:{op}", **attrs))
        return output

    def const(self, name: str, value: Any) -> str:
        """An initializer from an array or tensor (kept if the name exists)."""
        if name not in self.initializers:
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            self.initializers[name] = numpy_helper.from_array(array, name)  # keeps rank 0
        return name

    def int4(self, name: str, codes: Tensor) -> str:
        """A packed INT4 initializer, cast to int8: constant folding expands it before the runtime fuses Q/DQ."""
        flat = codes.detach().cpu().numpy().reshape(-1).astype(np.uint8) & 0xF
        if flat.size % 2:
            flat = np.append(flat, np.uint8(0))
        packed = (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
        t = TensorProto(name=f"{name}4", data_type=TensorProto.INT4, dims=list(codes.shape), raw_data=packed.tobytes())
        self.initializers[t.name] = t
        return self.op("Cast", [t.name], name, to=TensorProto.INT8)

    def grid(self, name: str, qp: QParams) -> tuple[str, str]:
        """Initializers of a grid's scale and zero point."""
        zero = qp.zero_point.to(torch.int32 if qp.spec.bits > 16 else qp.spec.dtype)
        return self.const(f"{name}_scale", qp.scale), self.const(f"{name}_zero", zero)

    def name(self, node: Node) -> str:
        """Tensor name of a node's float value."""
        return self.names[node]

    def operand(self, node: Node, a: Any, i: int) -> str:
        """A tensor argument, or a Python scalar (rounded to a grid of its own when the node is integer)."""
        if isinstance(a, Node):
            return self.name(a)
        out = out_name(node)
        value = torch.tensor(float(a))
        if not node.meta.get("integer"):
            return self.const(f"{out}/scalar{i}", value)
        (fq,) = (u for u in node.users if kind(self.gm, u) == "fake_quantize")
        qp = numerics.choose_qparams(value, value, module_of(self.gm, fq).spec)  # type: ignore[arg-type]
        s, z = self.grid(f"{out}/scalar{i}", qp)
        return self.op("DequantizeLinear", [self.const(f"{out}/scalar{i}_q", numerics.quantize(value, qp)), s, z], f"{out}/scalar{i}/dq")


def out_name(node: Node) -> str:
    """Name of a node's float value: module path or node name."""
    return str(node.target) if node.op == "call_module" else node.name


Emitter = Callable[[Writer, Node, nn.Module], str]


def simple(op: str, **attrs: Any) -> Emitter:
    """An operation with the node's tensor inputs and constant attributes."""

    def emit(w: Writer, node: Node, module: nn.Module) -> str:
        inputs = [w.operand(node, a, i) for i, a in enumerate(node.args)]
        return w.op(op, inputs, out_name(node), **attrs)

    return emit


def weighted(w: Writer, node: Node, module: nn.Module) -> str:
    """Conv, transposed conv, linear; integer weights through DequantizeLinear, int32 bias with scale s_a*s_w."""
    out, x = out_name(node), w.name(data_inputs(node)[0])
    op: Any = module.op if isinstance(module, m.Quantized) else module
    if isinstance(module, m.Quantized):
        weight, bias = _integer_weight(w, out, module), _bias(w, out, module)
    else:
        weight = w.const(f"{out}/weight", op.weight)
        bias = None if op.bias is None else w.const(f"{out}/bias", op.bias)
    rest = [] if bias is None else [bias]
    if isinstance(op, nn.Linear):
        return _linear(w, node, x, weight, rest)
    attrs: dict[str, Any] = dict(strides=op.stride, dilations=op.dilation, group=op.groups, kernel_shape=op.kernel_size)
    if isinstance(op, nn.modules.conv._ConvTransposeNd):
        attrs.update(pads=[*op.padding, *op.padding], output_padding=op.output_padding)
        return w.op("ConvTranspose", [x, weight, *rest], out, **attrs)
    pads = m.conv_pads(op)
    return w.op("Conv", [x, weight, *rest], out, pads=[b for b, _ in pads] + [e for _, e in pads], **attrs)


def _integer_weight(w: Writer, out: str, module: m.Quantized) -> str:
    qp, codes = module.weight_grid.qparams, module.weight_codes()
    s, z = w.grid(f"{out}/weight", qp)
    q = w.int4(f"{out}/weight_q", codes) if qp.spec.bits <= 4 else w.const(f"{out}/weight_q", codes)
    axis = {} if qp.spec.axis is None else {"axis": qp.spec.axis}
    return w.op("DequantizeLinear", [q, s, z], f"{out}/weight/dq", **axis)


def _bias(w: Writer, out: str, module: m.Quantized) -> str | None:
    codes = module.bias_codes()
    if codes is None:
        b: Any = module.op.bias
        return None if b is None else w.const(f"{out}/bias", b)
    assert module.bias_grid is not None
    qp = module.bias_grid.qparams
    s, z = w.grid(f"{out}/bias", qp)
    axis = {} if qp.spec.axis is None else {"axis": 0}
    return w.op("DequantizeLinear", [w.const(f"{out}/bias_q", codes), s, z], f"{out}/bias/dq", **axis)


def _linear(w: Writer, node: Node, x: str, weight: str, bias: list[str]) -> str:
    out, source = out_name(node), data_inputs(node)[0]
    if len(shape(source)) == 2:
        return w.op("Gemm", [x, weight, *bias], out, transB=1)
    x = w.op("Reshape", [x, w.const(f"{out}/rows", np.array([-1, shape(source)[-1]], np.int64))], f"{out}/2d")
    y = w.op("Gemm", [x, weight, *bias], f"{out}/gemm", transB=1)
    return w.op("Reshape", [y, w.const(f"{out}/shape", _sizes(node))], out)


def _sizes(node: Node) -> np.ndarray[Any, Any]:
    """The node's sizes with -1 for the batch-dependent one."""
    return np.array([-1 if d else s for s, d in zip(shape(node), node.meta["dynamic"], strict=True)], np.int64)


def reshape(w: Writer, node: Node, module: Any) -> str:
    sizes = np.array([0 if s is None else s for s in module.shape], np.int64)
    return w.op("Reshape", [w.name(data_inputs(node)[0]), w.const(f"{out_name(node)}/shape", sizes)], out_name(node))


def pool(w: Writer, node: Node, module: nn.Module) -> str:
    p: Any = module
    n = len(shape(node)) - 2

    def each(v: Any) -> list[int]:
        return list(v) if isinstance(v, (tuple, list)) else [v] * n

    attrs: dict[str, Any] = dict(kernel_shape=each(p.kernel_size), strides=each(p.stride), pads=each(p.padding) * 2, ceil_mode=int(p.ceil_mode))
    if isinstance(p, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
        return w.op("MaxPool", [w.name(data_inputs(node)[0])], out_name(node), dilations=each(p.dilation), **attrs)
    return w.op("AveragePool", [w.name(data_inputs(node)[0])], out_name(node), count_include_pad=int(p.count_include_pad), **attrs)


def adaptive_avg_pool(w: Writer, node: Node, module: Any) -> str:
    """Windows of different sizes: a matrix product with the constant pooling matrix over the flattened plane."""
    out, x = out_name(node), data_inputs(node)[0]
    sizes, wanted = shape(x)[2:], shape(node)[2:]
    cells = int(np.prod(sizes))
    matrix = module(torch.eye(cells).reshape(cells, 1, *sizes)).reshape(cells, -1)
    flat = w.op("Reshape", [w.name(x), w.const(f"{out}/flat", np.array([0, 0, cells], np.int64))], f"{out}/plane")
    y = w.op("MatMul", [flat, w.const(f"{out}/matrix", matrix)], f"{out}/pooled")
    return w.op("Reshape", [y, w.const(f"{out}/shape", np.array([0, 0, *wanted], np.int64))], out)


def cut(w: Writer, node: Node, module: Any) -> str:
    out, s = out_name(node), module.slices
    cols = [np.array(c, np.int64) for c in zip(*[(b, 2**62 if e is None else e, d, k) for d, b, e, k in s], strict=True)]
    names = [w.const(f"{out}/{k}", c) for k, c in zip(("starts", "ends", "axes", "steps"), cols, strict=True)]
    return w.op("Slice", [w.name(data_inputs(node)[0]), *names], out)


def split(w: Writer, node: Node, module: nn.Module) -> str:
    s: Any = module
    out = out_name(node)
    outputs = [f"{out}/{i}" for i in range(len(s.sizes))]
    sizes = w.const(f"{out}/sizes", np.array(s.sizes, np.int64))
    w.nodes.append(helper.make_node("Split", [w.name(data_inputs(node)[0]), sizes], outputs, name=f"{out}:Split", axis=s.dim))
    return out


def pad(w: Writer, node: Node, module: nn.Module) -> str:
    p: Any = module
    n = len(shape(node))
    full = [*p.pads, *([0] * (2 * n - len(p.pads)))]
    begin, end = [full[2 * (n - 1 - d)] for d in range(n)], [full[2 * (n - 1 - d) + 1] for d in range(n)]
    pads = w.const(f"{out_name(node)}/pads", np.array(begin + end, np.int64))
    value = w.const(f"{out_name(node)}/value", np.float32(p.value))
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[p.mode]
    return w.op("Pad", [w.name(data_inputs(node)[0]), pads, value], out_name(node), mode=mode)


def resize(w: Writer, node: Node, module: nn.Module) -> str:
    r: Any = module
    out, x = out_name(node), data_inputs(node)[0]
    mode = {"nearest": "nearest", "nearest-exact": "nearest", "bilinear": "linear", "trilinear": "linear", "linear": "linear", "bicubic": "cubic"}[r.mode]
    if mode == "nearest":
        how: dict[str, Any] = {"coordinate_transformation_mode": "asymmetric" if r.mode == "nearest" else "half_pixel"}
        how["nearest_mode"] = "floor" if r.mode == "nearest" else "round_prefer_ceil"
    else:
        how = {"coordinate_transformation_mode": "align_corners" if r.align_corners else "half_pixel"}
        if mode == "cubic":
            how["cubic_coeff_a"] = -0.75
    # All four scales: ONNX Runtime's layout optimizer mishandles the `axes` attribute, and `sizes` would fix the batch.
    scale = r.scale or [_ratio(i, o) for i, o in zip(shape(x)[2:], shape(node)[2:], strict=True)]
    scales = w.const(f"{out}/scales", np.array([1, 1, *scale], np.float32))
    return w.op("Resize", [w.name(x), "", scales], out, mode=mode, **how)


def _ratio(size: int, wanted: int) -> np.float32:
    """The least float32 scale at or above ``wanted / size`` whose product, rounded down, gives ``wanted``."""
    ratio = np.float32(wanted / size)
    while int(np.floor(np.float32(size) * ratio)) < wanted:
        ratio = np.nextafter(ratio, np.float32(np.inf))
    return ratio


def batch_norm(w: Writer, node: Node, module: nn.Module) -> str:
    b: Any = module
    out, ones = out_name(node), torch.ones_like(b.running_mean)
    parts = {"weight": b.weight if b.affine else ones, "bias": b.bias if b.affine else ones * 0, "mean": b.running_mean, "var": b.running_var}
    names = [w.const(f"{out}/{k}", v) for k, v in parts.items()]
    return w.op("BatchNormalization", [w.name(data_inputs(node)[0]), *names], out, epsilon=b.eps)


def layer_norm(w: Writer, node: Node, module: nn.Module) -> str:
    n: Any = module
    out, k = out_name(node), len(n.normalized_shape)
    names = [w.const(f"{out}/weight", n.weight if n.weight is not None else torch.ones(n.normalized_shape))]
    if n.bias is not None:
        names.append(w.const(f"{out}/bias", n.bias))
    return w.op("LayerNormalization", [w.name(data_inputs(node)[0]), *names], out, axis=-k, epsilon=n.eps)


def clamp(w: Writer, node: Node, module: nn.Module) -> str:
    out, c = out_name(node), module
    ends = ["" if v is None else w.const(f"{out}/{k}", np.float32(v)) for k, v in (("lo", c.lo), ("hi", c.hi))]  # type: ignore[arg-type]
    return w.op("Clip", [w.name(data_inputs(node)[0]), *ends], out)


def mean(w: Writer, node: Node, module: nn.Module) -> str:
    axes = w.const(f"{out_name(node)}/axes", np.array(module.dims, np.int64))
    return w.op("ReduceMean", [w.name(data_inputs(node)[0]), axes], out_name(node), keepdims=int(module.keepdim))  # type: ignore[arg-type]


def relu(w: Writer, node: Node, module: nn.Module) -> str:
    """An integer ReLU that no grid absorbed runs as a leaky ReLU of slope 0, a table in ONNX Runtime."""
    x = w.name(data_inputs(node)[0])
    return w.op("LeakyRelu", [x], out_name(node), alpha=0.0) if node.meta.get("integer") else w.op("Relu", [x], out_name(node))


def hardsigmoid(w: Writer, node: Node, module: nn.Module) -> str:
    """Integer: x + 3 saturated on [0, 6] (``fake_quantize`` writes that grid); float: the op of that name."""
    out, x = out_name(node), w.name(data_inputs(node)[0])
    if not node.meta.get("integer"):
        return w.op("HardSigmoid", [x], out, alpha=1 / HARD_SIGMOID_WIDTH, beta=0.5)
    return w.op("Add", [x, w.operand(node, HARD_SIGMOID_SHIFT, 0)], out)


def attribute(name: str, op: str, field: str) -> Emitter:
    def emit(w: Writer, node: Node, module: nn.Module) -> str:
        return w.op(op, [w.name(n) for n in data_inputs(node)], out_name(node), **{name: getattr(module, field)})

    return emit


def silu(w: Writer, node: Node, module: nn.Module) -> str:
    out, x = out_name(node), w.name(data_inputs(node)[0])
    return w.op("Mul", [x, w.op("Sigmoid", [x], f"{out}/gate")], out)


def gelu(w: Writer, node: Node, module: nn.Module) -> str:
    return w.op("Gelu", [w.name(data_inputs(node)[0])], out_name(node), approximate=module.approximate)


def softmax(w: Writer, node: Node, module: nn.Module) -> str:
    return w.op("Softmax", [w.name(data_inputs(node)[0])], out_name(node), axis=module.dim % len(shape(node)))  # type: ignore[operator]


EMITTERS: dict[str, Emitter] = {
    **dict.fromkeys(m.WEIGHTED, weighted), "add": simple("Add"), "sub": simple("Sub"), "mul": simple("Mul"), "div": simple("Div"),
    "matmul": simple("MatMul"), "sigmoid": simple("Sigmoid"), "tanh": simple("Tanh"), "hardswish": simple("HardSwish"),
    "global_avg_pool": simple("GlobalAveragePool"), "cat": attribute("axis", "Concat", "dim"), "permute": attribute("perm", "Transpose", "dims"),
    "reshape": reshape, "max_pool": pool, "avg_pool": pool, "adaptive_avg_pool": adaptive_avg_pool, "slice": cut, "split": split, "pad": pad, "resize": resize,
    "batch_norm": batch_norm, "layer_norm": layer_norm, "clamp": clamp, "mean": mean, "relu": relu, "hardsigmoid": hardsigmoid, "silu": silu,
    "gelu": gelu, "softmax": softmax, "leaky_relu": attribute("alpha", "LeakyRelu", "negative_slope"),
}  # fmt: skip

