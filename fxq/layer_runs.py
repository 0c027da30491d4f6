"""One layer of a given shape in float32, in int8 and on bits, ready to run; and its times, measured in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxq.bitwise import engine as engines
from fxq.bitwise import layout
from fxq.bitwise.int8_layers import layer_model, layer_session
from fxq.layer_shapes import BITS, CODES, FLOAT, TRITS, Form, LayerShape, plain_module

if TYPE_CHECKING:
    import onnx

Run = Callable[[], Any]
Array = np.ndarray[Any, Any]
SEED = 0
WARMUP = 3


@dataclass(frozen=True)
class Time:
    """Median of repeated runs.

    Attributes:
        us: microseconds.
        spread: distance of the quartiles over the median.
    """

    us: float
    spread: float

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Time:
        """The time of ``dataclasses.asdict``.

        Raises:
            TypeError, ValueError: for anything else.
        """
        made = cls(**plain)
        if not all(type(v) in (int, float) and 0 <= v < math.inf for v in (made.us, made.spread)):
            raise ValueError("no such time")
        return made


def numbers(*shape: int) -> Array:
    """Seeded normal float32 values."""
    return np.random.default_rng(SEED).standard_normal(shape, np.float32)


def torch_run(shape: LayerShape, channels_last: bool = False) -> Run:
    """The layer in torch, float32, with a bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layer = plain_module(shape).eval()
    x = torch.from_numpy(_float_input(shape))
    if channels_last and x.ndim == 4:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    def run() -> Any:
        with torch.inference_mode():
            return layer(x)

    return run


def _float_input(shape: LayerShape) -> Array:
    return numbers(shape.batch, shape.inputs, *shape.size)


def onnx_float_run(shape: LayerShape, threads: int) -> Run:
    """The layer in ONNX Runtime, float32 NCHW in and out, with a bias."""
    return _session_run(*onnx_float_layer(shape), threads)


def onnx_float_layer(shape: LayerShape) -> tuple[onnx.ModelProto, Array]:
    """The model of :func:`onnx_float_run`, and its input."""
    from onnx import TensorProto, helper, numpy_helper

    w, bias = numbers(*shape.weight), np.zeros(shape.outputs, np.float32)
    stored = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(bias, "b")]
    if shape.kind == "linear":
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    else:
        more: dict[str, Any] = {"output_padding": shape.output_padding} if shape.output_padding else {}
        node = helper.make_node("ConvTranspose" if shape.kind == "conv_transpose" else "Conv", ["x", "w", "b"], ["y"], **_window(shape), **more)
    x = _float_input(shape)
    graph = helper.make_graph(
        [node], "layer", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], stored
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), x


def onnx_int8_run(shape: LayerShape, threads: int) -> Run | None:
    """The layer in ONNX Runtime's integer kernel as it runs inside a net: u8 codes in and out, channels last, s8 weights by channel, an int32 bias.

    Returns:
        ``None`` for a transposed convolution, for which there is no such kernel.
    """
    return None if shape.kind == "conv_transpose" else _session_run(*onnx_int8_layer(shape), threads)


def onnx_int8_layer(shape: LayerShape) -> tuple[onnx.ModelProto, Array]:
    """The model of :func:`onnx_int8_run`, and its input."""
    rng, ones = np.random.default_rng(SEED), np.ones(shape.outputs, np.float32)
    weight = rng.integers(-127, 128, shape.weight, np.int8)
    tables: dict[str, Any] = {
        "xs": np.float32(0.02), "xz": np.uint8(128), "ws": ones * np.float32(0.01), "b": np.zeros(shape.outputs, np.int32), "ys": np.float32(0.05),
        "yz": np.uint8(128),
    }  # fmt: skip
    window = [shape.groups, *shape.stride, *shape.pads, *shape.dilation] if shape.kernel else []
    return layer_model(weight, tables, window), rng.integers(0, 256, (shape.batch, *shape.size, shape.inputs), np.uint8)


def _window(shape: LayerShape) -> dict[str, Any]:
    return {"kernel_shape": shape.kernel, "strides": shape.stride, "pads": shape.pads, "dilations": shape.dilation, "group": shape.groups}


def _session_run(model: onnx.ModelProto, x: Array, threads: int) -> Run:
    import onnxruntime as ort

    session = layer_session(model, threads)
    bound = session.io_binding()
    bound.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    bound.bind_output("y")
    return lambda: session.run_with_iobinding(bound)


def bit_runs(shape: LayerShape, form: Form, threads: int, engine: engines.Engine | None = None) -> dict[str, Run]:
    """The layer on bits: ``bits`` in the given form, as inside a net; ``packed`` alone: float32 NCHW values, which it packs, to float32, channels last."""
    engine, layer = engine or engines.engine(), bit_weights(shape, form.weights == "ternary")
    planes, size = 2 if form.activations == "ternary" else 1, _area(shape)
    values = numbers(size[0], shape.inputs, size[1] * size[2])
    alone = layout.float_epilogue(layer, 1, 0, np.float32(0.02))
    inside = {
        BITS: layout.sign_epilogue(layer, 0), TRITS: layout.ternary_epilogue(layer, -9, 9), FLOAT: alone,
        CODES: layout.codes_epilogue(layer, 1, 0, np.float32(0.5), qmin=0, qmax=255, zero=128),
    }[form.gives]  # fmt: skip

    def packed(x: Array, lo: float, hi: float, channels_last: bool) -> Array:
        return engine.pack(x, lo, hi, planes, channels_last, threads).reshape(planes, *size, -1)

    bits = packed(values, *BOUNDS[planes], False)
    codes = np.ascontiguousarray(np.clip(np.rint(values * 40 + 128), 0, 255).astype(np.uint8).transpose(0, 2, 1))
    run: Run = {
        BITS: lambda: engine.conv(bits, layer, inside, threads),
        CODES: lambda: engine.conv(packed(codes, *CODE_BOUNDS[planes], True), layer, inside, threads),
        FLOAT: lambda: engine.conv(packed(values, *BOUNDS[planes], False), layer, inside, threads),
    }[BITS if form.reads == TRITS else form.reads]
    return {"bits": run, "packed": lambda: engine.conv(packed(values, *BOUNDS[planes], False), layer, alone, threads)}


BOUNDS = {1: (0.0, 0.0), 2: (-0.4, 0.4)}
"""Thresholds of a sign and of a ternary activation (TBN's 0.4 times the mean of ``|x|``, about), by planes."""
CODE_BOUNDS = {1: (127, 128), 2: (112, 144)}


def bit_codes(shape: LayerShape, ternary: bool = False) -> Array:
    """Random weights of -1 and 1, or of -1, 0 and 1; int8."""
    rng = np.random.default_rng(SEED)
    return rng.integers(-1, 2, shape.weight).astype(np.int8) if ternary else rng.choice(np.array([-1, 1], np.int8), shape.weight)


def bit_weights(shape: LayerShape, ternary: bool = False) -> layout.Layer:
    """Packed weights of a convolution over one or two dimensions or of a linear layer."""
    codes = bit_codes(shape, ternary)
    if not shape.kernel:
        return layout.pack_layer(codes)
    if len(shape.kernel) == 2:
        top, left, bottom, right = shape.pads
        return layout.pack_layer(codes, groups=shape.groups, stride=shape.stride, padding=(top, bottom, left, right), dilation=shape.dilation)
    (stride,), (dilation,) = shape.stride, shape.dilation
    return layout.pack_layer(codes[:, :, None], groups=shape.groups, stride=(1, stride), padding=(0, 0, *shape.pads), dilation=(1, dilation))


def _area(shape: LayerShape) -> tuple[int, int, int]:
    """Batch, rows and columns of what the kernel on bits reads; rows of a linear layer are columns."""
    if not shape.kernel:
        return 1, 1, shape.batch
    return (shape.batch, *(shape.size if len(shape.size) == 2 else (1, *shape.size)))  # type: ignore[return-value]


BUDGET = 0.3
"""Seconds that the runs of one layer may take, about; at least :data:`LEAST` rounds are made."""
LEAST, MOST = 5, 61


def timed(runs: dict[str, Run], threads: int = 1, budget: float | None = None) -> dict[str, Time]:
    """Median of each run, taken in turns so that the machine's noise hits all alike: processor time of one thread, wall time of several.

    In each turn a run is called once more first, so that its caches are as warm as behind the layer that makes its input.
    """
    budget = BUDGET if budget is None else budget
    clock = time.thread_time if threads == 1 else time.perf_counter
    for run in runs.values():
        for _ in range(WARMUP):
            run()
    start = time.perf_counter()
    found: dict[str, list[float]] = {k: [] for k in runs}
    while len(next(iter(found.values()))) < MOST:
        for k, run in runs.items():
            run()
            begin = clock()
            run()
            found[k].append(clock() - begin)
        if time.perf_counter() - start > budget and len(next(iter(found.values()))) >= LEAST:
            break
    return {k: _time(v) for k, v in found.items()}


def _time(seconds: list[float]) -> Time:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return Time(1e6 * middle, (high - low) / middle if middle else 0.0)


@dataclass(frozen=True)
class Times:
    """What one layer takes.

    Attributes:
        float32: the best of torch and ONNX Runtime, whose name is ``float_by``.
        int8: ONNX Runtime's kernel on 8-bit codes; ``None`` where it has none.
        bits: the kernel on bits as it runs inside a net, in the form that was asked for; ``None`` where there is none.
        packed: the same layer alone: packing of float32 NCHW values, kernel, float32 result (channels last in memory).
    """

    float32: Time
    float_by: str
    int8: Time | None = None
    bits: Time | None = None
    packed: Time | None = None

    def all(self) -> list[Time]:
        """Those that were measured."""
        return [t for t in (self.float32, self.int8, self.bits, self.packed) if t is not None]


_CACHE: dict[tuple[LayerShape, Form, int, bool, str], Times] = {}
FLOATS = ("torch", "torch channels_last", "ONNX Runtime")


def measured(shape: LayerShape, form: Form, threads: int = 1, has_bits: bool = True) -> Times:
    """The times of a layer on this machine; measured once in a process.

    Args:
        shape: of the layer, with its batch. form: how it computes on bits. threads: of each run.
        has_bits: it has a form on bits.
    """
    key = shape, form, threads, has_bits, engines.engine().name
    if key not in _CACHE:
        _CACHE[key] = _measure(shape, form, threads, has_bits)
    return _CACHE[key]


def _measure(shape: LayerShape, form: Form, threads: int, has_bits: bool) -> Times:
    runs: dict[str, Run] = {"torch": torch_run(shape), "ONNX Runtime": onnx_float_run(shape, threads)}
    if len(shape.size) == 2:
        runs["torch channels_last"] = torch_run(shape, channels_last=True)
    int8 = onnx_int8_run(shape, threads)
    if int8 is not None:
        runs["int8"] = int8
    if has_bits:
        runs |= bit_runs(shape, form, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = timed(runs, threads)
    finally:
        torch.set_num_threads(before)
    best = min((k for k in FLOATS if k in found), key=lambda k: found[k].us)
    return Times(found[best], best, found.get("int8"), found.get("bits"), found.get("packed"))
