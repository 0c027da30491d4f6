"""Float16 for everything between the Q/DQ nodes of a file: what TensorRT takes instead of a precision flag."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.fx import GraphModule

from fxq.errors import LoweringError
from fxq.modules import FakeQuantize

KEPT = ("Range", "CumSum", "NonMaxSuppression", "RoiAlign", "TopK", "RandomUniformLike", "Upsample")
"""Operations that stay float32 between casts: their float16 forms are missing or count in it."""
TOP = float(np.finfo(np.float16).max)
LEAST = 1 / TOP
"""Least scale of an activation: TensorRT multiplies by its reciprocal, in float16."""
CODE_BITS = 8  # wider grids are those of biases
WAY_OUT = "Keep this file in float32 (--float-dtype fp32)"


def half_scale(scale: Tensor, where: str) -> Tensor:
    """The least float16 numbers that are not below the scales, as float32: a range never gets narrower.

    Raises:
        LoweringError: for a scale beyond float16.
    """
    if float(scale.max()) > TOP:
        raise LoweringError(f"its scale {float(scale.max()):.3g} is beyond float16", where=where, way_out=WAY_OUT)
    near = scale.detach().cpu().numpy().astype(np.float16)
    up = np.nextafter(near, np.float16(np.inf))
    return torch.from_numpy(np.where(near.astype(np.float32) < scale.cpu().numpy(), up, near).astype(np.float32)).to(scale.device)


def on_half_grids(gm: GraphModule) -> GraphModule:
    """A copy of a converted graph whose scales are those of the float16 file."""
    gm = copy.deepcopy(gm)
    for path, module in gm.named_modules():
        if isinstance(module, FakeQuantize) and module.spec.bits <= CODE_BITS:
            module.scale = half_scale(module.scale, path)
    return gm


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float16 inside; its inputs and outputs keep their types.

    Raises:
        LoweringError: when a constant is beyond float16; it names the tensor.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for t in model.graph.initializer:
        if t.data_type == onnx.TensorProto.FLOAT:
            values = np.abs(numpy_helper.to_array(t))
            top = float(values.max()) if values.size else 0.0
            if np.isfinite(top) and top > TOP:
                raise LoweringError(f"a constant of {top:.3g} is beyond float16", where=t.name, way_out=WAY_OUT)
    half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, op_block_list=list(KEPT), max_finite_val=TOP)
    first = [n for n in half.graph.node if n.op_type == "Cast" and n.input[0] in {i.name for i in half.graph.input}]
    rest = [n for n in half.graph.node if n not in first]
    del half.graph.node[:], half.graph.value_info[:]
    half.graph.node.extend([*first, *rest])
    return half
