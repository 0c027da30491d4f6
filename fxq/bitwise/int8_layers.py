"""8-bit layers of a net on bits: ONNX Runtime's integer kernel of the single layer, whose numbers are the reference's, over torch's own memory.

Sums of u8 x s8 products are exact only where the processor adds them in 32 bits (VNNI, AMX, Arm); elsewhere the layer stays what it was
(``docs/portability.md``).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fxq.bitwise import operators
from fxq.convolutions import CHANNEL_AFFINE, conv_pads
from fxq.doctor_machine import EXACT, machine
from fxq.modules import Quantized
from fxq.spec import QParams, QuantSpec

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]
U8_MAX = QuantSpec.parse("u8/pt").qmax

_sessions: dict[tuple[int, int, int], tuple[Any, Any]] = {}
"""By the identity of a layer's weight, the number of threads and the process: a weak reference to the weight, and the session."""


def layer_model(weight: Array, tables: dict[str, Array], window: Sequence[int], float_output: bool = False) -> onnx.ModelProto:
    """A model of one integer layer on u8 codes, channels last: input ``x``, output ``y``.

    Args:
        weight: int8 ``[N, C / groups, *kernel]``, of a linear layer ``[N, K]``.
        tables: ``xs``, ``xz``, ``ws`` (float32 ``[N]``), ``b`` (int32 ``[N]``), ``ys``, ``yz``: scales and zero points of input and output, and the bias.
        window: groups, strides, begin and end pads, dilations; of a linear layer empty.
        float_output: of a linear layer: float32 without ``ys`` and ``yz``.
    """
    from onnx import TensorProto, helper, numpy_helper

    n = weight.ndim - 2
    parts = {**tables, "wz": np.zeros(len(weight), np.int8), "w": weight if n else np.ascontiguousarray(weight.T)}
    if n:
        groups, rest = window[0], list(window[1:])
        options: dict[str, Any] = {
            "group": groups,
            "strides": rest[:n],
            "pads": rest[n : 3 * n],
            "dilations": rest[3 * n :],
            "kernel_shape": list(weight.shape[2:]),
        }
        names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"]
        node = helper.make_node("QLinearConv", names, ["y"], domain="com.microsoft", channels_last=1, **options)
    else:
        names = ["x", "xs", "xz", "w", "ws", "wz", "b", *([] if float_output else ["ys", "yz"])]
        node = helper.make_node("QGemm", names, ["y"], domain="com.microsoft")
    stored = [numpy_helper.from_array(np.asarray(parts[k]), k) for k in names[1:]]
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [None] * (n + 2))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT if float_output else TensorProto.UINT8, None)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "layer", [x], [y], stored), opset_imports=opsets, ir_version=8)


def layer_session(model: onnx.ModelProto, threads: int) -> Any:
    """A session whose threads do not spin between runs: others compute there."""
    import onnxruntime as ort

    o = ort.SessionOptions()
    o.intra_op_num_threads, o.inter_op_num_threads, o.log_severity_level = threads, 1, 4
    o.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model.SerializeToString(), o, providers=["CPUExecutionProvider"])


def _session(weight: Tensor, bias: Tensor, scale: Tensor, window: Sequence[int], zeros: Sequence[int], scales: Sequence[float], threads: int) -> Any:
    key = id(weight), threads, os.getpid()
    found = _sessions.get(key)
    if found is not None and found[0]() is weight:
        return found[1]
    tables: dict[str, Any] = {"xs": np.float32(scales[0]), "xz": np.uint8(zeros[0]), "ws": scale.numpy(), "b": bias.numpy()}
    if len(scales) > 1:
        tables |= {"ys": np.float32(scales[1]), "yz": np.uint8(zeros[1])}
    made = layer_session(layer_model(weight.numpy(), tables, window, len(scales) == 1), threads)
    _sessions[key] = weakref.ref(weight, lambda _: _forget(key)), made
    return made


def _forget(key: tuple[int, int, int]) -> None:
    """Let a session go, unless it is that of the process that this one was forked from: its threads are not here to end."""
    if key[2] == os.getpid():
        _sessions.pop(key, None)


@operators.Operator
def int8_layer(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, window: Sequence[int], zeros: Sequence[int], scales: Sequence[float]) -> Tensor:
    """An integer layer on u8 codes.

    Args:
        x: uint8 codes in torch's shape, of a convolution channels last in memory (others are copied).
        weight, bias, scale: int8, int32 ``[N]``, float32 ``[N]``. window: of :func:`layer_model`.
        zeros, scales: of the input and the output; without the second scale a linear layer gives float32.

    Returns:
        uint8 codes, channels last in memory, or float32.
    """
    n = weight.ndim - 2
    values = (x.movedim(1, -1) if n else x.reshape(-1, x.shape[-1])).contiguous()
    sizes = _out_sizes(values.shape[1:-1], weight.shape[2:], window) if n else []
    out = torch.empty([len(values), *sizes, len(weight)], dtype=torch.uint8 if len(scales) > 1 else torch.float32)
    if out.numel() and values.numel():
        session = _session(weight, bias, scale, window, zeros, scales, torch.get_num_threads())
        bound = session.io_binding()
        bound.bind_input("x", "cpu", 0, np.uint8, list(values.shape), values.data_ptr())
        bound.bind_output("y", "cpu", 0, np.uint8 if len(scales) > 1 else np.float32, list(out.shape), out.data_ptr())
        session.run_with_iobinding(bound)
    return out.movedim(-1, 1) if n else out.reshape(*x.shape[:-1], len(weight))


@operators.meta(int8_layer)
def _(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, window: Sequence[int], zeros: Sequence[int], scales: Sequence[float]) -> Tensor:
    n = weight.ndim - 2
    dtype = torch.uint8 if len(scales) > 1 else torch.float32
    if not n:
        return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    return x.new_empty(x.shape[0], *_out_sizes(x.shape[2:], weight.shape[2:], window), weight.shape[0], dtype=dtype).movedim(-1, 1)


def _out_sizes(sizes: Sequence[int], kernel: Sequence[int], window: Sequence[int]) -> list[int]:
    n, rest = len(kernel), window[1:]
    stride, begin, end, dilation = (rest[i * n : (i + 1) * n] for i in range(4))
    return [(sizes[i] + begin[i] + end[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(n)]


class Int8Layer(nn.Module):
    """A conv or linear layer on u8 codes through ONNX Runtime's kernel."""

    weight: Tensor
    bias: Tensor
    scale: Tensor

    def __init__(self, module: Quantized, x: QParams, out: QParams | None) -> None:
        super().__init__()
        op: Any = module.op
        codes, bias = module.weight_codes().contiguous(), module.bias_codes()
        self.register_buffer("weight", codes)
        self.register_buffer("bias", torch.zeros(len(codes), dtype=torch.int32) if bias is None else bias.to(torch.int32).clone())
        self.register_buffer("scale", module.weight_grid.scale.detach().expand(len(codes)).clone())
        self.window: list[int] = []
        if not isinstance(op, nn.Linear):
            pads = conv_pads(op)
            self.window = [op.groups, *op.stride, *(b for b, _ in pads), *(e for _, e in pads), *op.dilation]
        self.zeros = [int(x.zero_point), *([] if out is None else [int(out.zero_point)])]
        self.scales = [float(x.scale), *([] if out is None else [float(out.scale)])]

    def forward(self, x: Tensor) -> Tensor:
        return int8_layer(x, self.weight, self.bias, self.scale, self.window, self.zeros, self.scales)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, gives {'codes' if len(self.scales) > 1 else 'float'}"


@cache
def sums_are_exact() -> bool:
    """This processor adds products of bytes in 32 bits."""
    flags = machine().flags
    return flags is not None and any(f in EXACT for f in flags)


def takes(module: nn.Module, x: QParams, out: QParams | None) -> bool:
    """Can :class:`Int8Layer` run the layer here, with the reference's numbers?

    Args:
        module: what an integer ``conv`` or ``linear`` step runs. x: grid of its input. out: grid that it rounds to; ``None``: it gives float.
    """
    if not isinstance(module, Quantized) or not sums_are_exact():
        return False
    op: Any = module.op
    plain = isinstance(op, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) and not isinstance(op, CHANNEL_AFFINE)
    wq = module.weight_grid.qparams
    if not plain or getattr(op, "padding_mode", "zeros") != "zeros" or wq.spec.axis not in (None, 0) or wq.spec.block is not None:
        return False
    whole = wq.spec.dtype == torch.int8 and wq.spec.kind != "float8" and not bool(wq.zero_point.any())
    return whole and _is_byte(x) and _gives(out, op) and _in_int32(module, x)


def _in_int32(module: Quantized, x: QParams) -> bool:
    """No sum with its bias leaves int32, where the runtime's would wrap."""
    bias, reach = module.bias_codes(), max(int(x.zero_point) - x.spec.qmin, x.spec.qmax - int(x.zero_point))
    sums = reach * module.weight_codes().to(torch.int64).abs().flatten(1).sum(1)
    return int((sums if bias is None else sums + bias.to(torch.int64).abs()).max()) < 1 << 31


def _is_byte(qp: QParams) -> bool:
    """Unsigned codes of 8 bits or less with one scale."""
    return qp.spec.kind == "affine" and qp.spec.dtype == torch.uint8 and qp.spec.qmin == 0 and qp.scale.ndim == 0


def _gives(out: QParams | None, op: nn.Module) -> bool:
    return isinstance(op, nn.Linear) if out is None else _is_byte(out) and out.spec.qmax == U8_MAX
