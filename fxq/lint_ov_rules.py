"""How OpenVINO's CPU plugin executes operations of a Q/DQ file, as data, and the check of one weighted node (learned from OpenVINO 2026.4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from fxq.lint_graph import BYTES, Net, Op, has

KERNEL: Mapping[str, str] = {
    "Conv": "Convolution", "ConvTranspose": "Deconvolution", "Gemm": "FullyConnected", "MatMul": "FullyConnected",
    "MaxPool": "Pooling", "AveragePool": "Pooling", "GlobalMaxPool": "Reduce", "GlobalAveragePool": "Reduce", "ReduceMean": "Reduce", "ReduceSum": "Reduce",
    "ReduceMax": "Reduce", "ReduceMin": "Reduce", "Reshape": "Reshape", "Flatten": "Reshape", "Squeeze": "Reshape", "Unsqueeze": "Reshape",
    "Slice": "StridedSlice", "Split": "Split", "Gather": "Gather", "Expand": "Broadcast", "Transpose": "Transpose", "Concat": "Concatenation",
    "DepthToSpace": "DepthToSpace", "SpaceToDepth": "SpaceToDepth", "Resize": "Interpolate", "Pad": "Pad",
}  # fmt: skip
"""Operator of the file -> type of the layer that executes it."""
MOVERS = frozenset(
    {
        "MaxPool", "AveragePool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand",
        "Transpose", "DepthToSpace", "SpaceToDepth", "Resize", "Pad",
    }
)  # fmt: skip
"""They take codes and give codes of the same grid."""
SUMS = frozenset({"GlobalAveragePool", "ReduceMean", "ReduceSum"})
"""They take codes and give floats."""
ROUNDING = frozenset({"AveragePool", "Resize"})
"""Movers that take the Q behind them into their kernel."""
VIEWS = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
"""An activation behind them is computed in front of them."""
SAME = frozenset({"Identity", "Dropout"})
FUSED = frozenset(
    {
        "Relu", "Sigmoid", "Tanh", "LeakyRelu", "PRelu", "Gelu", "HardSwish", "Elu", "Softplus", "Mish", "Sqrt", "Abs", "Neg", "Round", "Clip",
        "BatchNormalization",
    }
)  # fmt: skip
"""Pointwise operations that become a part of the kernel in front of them."""
AFFINE = frozenset({"Add", "Sub", "Mul", "Div"})
"""The same, with a constant."""
SUMMED = frozenset({"Add", "Sub"})
"""With another value: a part of a convolution."""
POINTWISE = frozenset({"Eltwise", "Subgraph", "FakeQuantize", "Convert"})
"""Layers that convert codes to float32, compute, and round again in one pass."""
WEIGHTED = frozenset({"Convolution", "FullyConnected", "MatMul", "Deconvolution"})
LAYERS: Mapping[str, frozenset[str]] = {
    "Conv": frozenset({"Convolution"}), "ConvTranspose": frozenset({"Deconvolution"}),
    "Gemm": frozenset({"FullyConnected", "MatMul"}), "MatMul": frozenset({"FullyConnected", "MatMul"}),
}  # fmt: skip
WEIGHTS_ONLY = "FullyConnected, weights"
"""A product whose weight alone is in codes: the kernel unpacks it."""
BITS = ("u8", "i8", "u4", "i4")
FORMS = frozenset(
    {
        "Mul(Sigmoid(x),x)",
        "Div(Mul(Clip(Add(3,x),0,6),x),6)", "Mul(Div(Clip(Add(3,x),0,6),6),x)", "Mul(0.1667,Mul(Clip(Add(3,x),0,6),x))",
        "Mul(0.5,Mul(Add(1,Erf(Div(x,1.414))),x))", "Mul(Add(1,Erf(Div(x,1.414))),Mul(0.5,x))", "Mul(Mul(0.5,x),Add(1,Erf(Div(x,1.414))))",
        "Mul(0.5,Mul(Add(1,Erf(Mul(0.7071,x))),x))", "Mul(Add(1,Erf(Mul(0.7071,x))),Mul(0.5,x))",
    }
)  # fmt: skip
"""Activations written as several operations (SiLU, hard swish, GELU) that OpenVINO makes one of."""
CENTRE = 128


@dataclass(frozen=True)
class Codes:
    """Grid of the codes that stand behind a value.

    Attributes:
        kind: element type, of 8 bits.
        zero: zero point; ``None`` when there are several.
        grid: equal for equal grids; ``None`` when the tensor has several (per channel, or a concatenation).
    """

    kind: int
    zero: int | None
    grid: object


def codes_of(net: Net, op: Op) -> Codes | None:
    """Grid of a Q or DQ; ``None`` when its codes have not 8 bits."""
    kind = net.codes(op)
    if kind not in BYTES:
        return None
    zero = net.array(op.inputs[2]) if has(op, 2) else np.zeros(1)
    scale = net.array(op.inputs[1])
    if scale is None or zero is None or np.unique(scale).size != 1 or np.unique(zero).size != 1:
        return Codes(kind, None if zero is None or np.unique(zero).size != 1 else int(zero.reshape(-1)[0]), None)
    point = int(zero.reshape(-1)[0])
    return Codes(kind, point, (kind, point, float(scale.reshape(-1)[0])))


@dataclass(frozen=True)
class Weight:
    """Codes of a constant weight.

    Attributes:
        kind: element type.
        zeros: all its zero points are 0.
        moved: it has a scale per channel and is reshaped behind its DequantizeLinear.
    """

    kind: int
    zeros: bool
    moved: bool = False


def weight_of(net: Net, name: str, constant: set[str]) -> Weight | None:
    """Codes of a constant that a DequantizeLinear gives, straight or moved; ``None`` for one in float, or no constant."""
    moved = False
    while name in constant:
        op = net.maker.get(name)
        if op is None:
            return None
        if op.is_dq:
            zero = net.array(op.inputs[2]) if has(op, 2) else None
            scale = net.array(op.inputs[1])
            return Weight(net.codes(op), zero is None or not np.any(zero), moved and (scale is None or scale.size > 1))
        moved = moved or op.op != "Transpose"
        name = next((n for n in op.inputs if net.types.get(n, 0) == onnx.TensorProto.FLOAT and n in constant), "")
    return None


def weight_only(weight: Weight | None) -> bool:
    """A product takes it as it is, whatever comes in."""
    return weight is not None and (weight.kind not in BYTES or weight.kind == onnx.TensorProto.INT8 or not weight.zeros)


def blocked_layer(op: Op, given: Codes | None, weight: Weight | None) -> str:
    """Why a convolution or product with a constant weight does not multiply codes with codes; empty when it does."""
    if given is None:
        return "its input does not come from 8-bit codes"
    if given.grid is None:
        return "the codes of its input have more than one grid (per channel, or a concatenation of different grids)"
    if weight is None:
        return "its weight does not come from a DequantizeLinear"
    if weight.kind not in BYTES:
        return f"its weight is {onnx.TensorProto.DataType.Name(weight.kind).lower()}; OpenVINO multiplies codes of 8 bits"
    if not weight.zeros:
        return "its weight has a zero point that is not 0"
    if weight.kind == onnx.TensorProto.UINT8:
        return "its weight is uint8; OpenVINO has kernels for int8 weights, and refuses a file with such a convolution"
    if weight.moved:
        return "its weight is reshaped behind a DequantizeLinear with a scale per channel"
    if op.op == "ConvTranspose" and given.zero != 0:
        return f"the zero point of its input is {given.zero}; transposed convolutions take 0"
    return ""


def blocked_product(left: Codes | None, right: Codes | None) -> str:
    """Why a product of two activations runs in float; empty when it does not."""
    if left is None or right is None:
        return f"input {0 if left is None else 1} does not come from 8-bit codes"
    if left.grid is None or right.grid is None:
        return f"the codes of input {0 if left.grid is None else 1} have more than one grid"
    if left.zero != 0:
        return f"the zero point of input 0 is {left.zero}; products of two activations take 0"
    if right.zero != (0 if right.kind == onnx.TensorProto.INT8 else CENTRE):
        return f"the zero point of input 1 is {right.zero}; products of two activations take a signed grid with the zero point in its centre"
    return ""


def moves_codes(net: Net, op: Op, given: Codes) -> str:
    """Why an operation of :data:`MOVERS` does not move codes; empty when it does."""
    if op.op == "Resize" and op.attrs.get("mode", b"nearest") != b"nearest":
        return "only nearest Resize moves codes; others compute in float"
    if op.op != "Pad" or op.attrs.get("mode", b"constant") != b"constant":
        return ""
    value = net.scalar(op.inputs[2]) if has(op, 2) else 0.0
    if value != 0:
        return "it pads with a number that is not 0"
    pads = net.value(op.inputs[1]) if has(op, 1) else np.asarray(op.attrs.get("pads", ()))
    if given.zero == 0 or (pads is not None and np.count_nonzero(pads.reshape(2, -1).any(0)) < 2) or _into_conv(net, op):
        return ""
    return f"it pads two dimensions with 0, and the grid's zero point is {given.zero}"


def _into_conv(net: Net, op: Op) -> bool:
    """The padding becomes the convolution's own."""
    reader = net.only_reader(op)
    return reader is not None and reader.op == "Conv"


def fixed_by_grid(op: Op, given: Codes) -> bool:
    """A Relu of codes that cannot be below 0."""
    return op.op == "Relu" and given.zero == (0 if given.kind == onnx.TensorProto.UINT8 else -CENTRE)


def source_grid(net: Net, name: str) -> object:
    """Grid of the DQ that a tensor comes from, through what moves codes; ``None`` for others."""
    for _ in range(64):
        op = net.maker.get(name)
        if op is None:
            return None
        if op.is_dq:
            codes = codes_of(net, op)
            return codes.grid if codes else None
        if op.op not in MOVERS and op.op not in (*SAME, "Relu", "Clip", "Concat"):
            return None
        name = op.inputs[0]
    return None


def shares_bias(net: Net, op: Op) -> bool:
    """Another node reads the same bias codes; OpenVINO adds such a bias in a layer of its own."""
    if op.op != "Conv" or not has(op, 2):
        return False
    dq = net.maker.get(op.inputs[2])
    if dq is None or not dq.is_dq:
        return len(net.readers(op.inputs[2])) > 1 and any(None in shape for name, shape in net.shapes.items() if name not in net.const_names)
    codes = net.array(dq.inputs[0])
    if codes is not None and not np.any(codes):  # nothing is added
        return False
    return sum(len(net.edges(user)) for user, _ in net.readers(dq.inputs[0]) if user.inputs == dq.inputs) > 1


def form_of(net: Net, op: Op) -> tuple[str, list[Op]] | None:
    """The tensor that a chain of operations ending in ``op`` is one of :data:`FORMS` of, and the chain."""
    if op.op not in ("Mul", "Div"):
        return None
    for leaf in _above(net, op, 6):
        chain: dict[int, Op] = {}
        text = _text(net, op, leaf, chain, 6)
        if text not in FORMS:
            continue
        inside = set(map(id, chain.values()))
        names = [leaf, *(name for o in chain.values() if o is not op for name in o.outputs)]
        if all(name not in net.outputs and all(id(user) in inside for user, _ in net.readers(name)) for name in names):
            return leaf, list(chain.values())
    return None


def _above(net: Net, op: Op, depth: int) -> list[str]:
    names = [n for n in op.inputs if n and n not in net.const_names]
    more = [m for n in names if depth and (maker := net.maker.get(n)) is not None for m in _above(net, maker, depth - 1)]
    return list(dict.fromkeys([*names, *more]))


def _text(net: Net, op: Op, leaf: str, chain: dict[int, Op], depth: int) -> str:
    chain[id(op)] = op
    parts = []
    for name in op.inputs:
        number, maker = net.scalar(name), net.maker.get(name)
        if name == leaf:
            parts.append("x")
        elif number is not None:
            parts.append(f"{number:.4g}")
        elif maker is not None and depth:
            parts.append(_text(net, maker, leaf, chain, depth - 1))
        else:
            return ""
    if op.op == "Clip" and not parts[1:]:
        parts += [f"{op.attrs[key]:.4g}" for key in ("min", "max") if key in op.attrs]
    if op.op in ("Add", "Mul"):
        parts.sort()
    return f"{op.op}({','.join(parts)})"
