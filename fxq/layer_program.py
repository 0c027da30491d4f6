"""The weighted layers of a net on bits: their shapes and forms, seen on one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from fxq.bitwise import ops
from fxq.bitwise.code_modules import CodesOp, IntegerLayer
from fxq.bitwise.int8_layers import Int8Layer
from fxq.bitwise.modules import BitConv, Pack
from fxq.bitwise.program import BitProgram
from fxq.layer_runs import Times, measured
from fxq.layer_shapes import BITS, CODES, FLOAT, TRITS, Form, LayerShape, module_shape, no_bits
from fxq.layer_table import BITS as ON_BITS
from fxq.layer_table import FLOAT32, INT8, LayerTime
from fxq.modules import Wrapper, kind_of

GIVES = {"sign": BITS, "ternary": TRITS, "codes": CODES, "float": FLOAT}
WEIGHTED = ("conv", "conv_transpose", "linear")


def program_times(
    program: BitProgram, inputs: tuple[Any, ...], threads: int, measure: Callable[[LayerShape, Form, int, bool], Times] = measured
) -> tuple[LayerTime, ...]:
    """Measure the weighted layers of a program, in the order of its graph.

    Args:
        program: the net; it runs once on ``inputs``, whose sizes count. threads: of each run. measure: how to come to times.
    """
    gm = program.graph_module
    seen: dict[str, Tensor] = {}
    nodes: list[tuple[Node, nn.Module]] = [(n, gm.get_submodule(str(n.target))) for n in gm.graph.nodes if n.op == "call_module"]

    def keep(name: str) -> Any:
        return lambda _module, args: seen.__setitem__(name, args[0])

    hooks = [module.register_forward_pre_hook(keep(n.name)) for n, module in nodes]
    try:
        program(*inputs)
    finally:
        for h in hooks:
            h.remove()
    names = program.layer_names
    found = []
    for n, module in nodes:
        layer = _layer(n, module, seen, dict(nodes))
        if layer is not None:
            shape, form, runs, why = layer
            found.append(LayerTime(names.get(str(n.target), str(n.target).removesuffix("_q")), shape, form, runs, measure(shape, form, threads, not why), why))
    return tuple(found)


def _layer(n: Node, module: nn.Module, seen: dict[str, Tensor], nodes: dict[Node, nn.Module]) -> tuple[LayerShape, Form, str, str] | None:
    """Shape, form, how it runs, and why it could not run on bits; ``None`` for what is no weighted layer."""
    x = seen[n.name]
    if isinstance(module, BitConv):
        before = n.all_input_nodes[0]
        packed = TRITS if x.shape[0] == 2 else BITS
        reads = packed if not isinstance(nodes.get(before), Pack) else FLOAT if seen[before.name].is_floating_point() else CODES
        weights, activations = module.kind.split(" x ")
        return _bit_shape(module, x), Form(activations, weights, reads, GIVES[module.gives]), ON_BITS, ""
    if isinstance(module, Int8Layer):
        shape = _int8_shape(module, x)
        return shape, Form("binary", "binary", CODES, CODES), INT8, "" if len(shape.kernel) < 3 else "a convolution over 3 dimensions has no kernel on bits"
    op: Any = module.op if isinstance(module, IntegerLayer) else module.module if isinstance(module, CodesOp) else module
    runs = FLOAT32 if op is module else INT8
    op = op.op if isinstance(op, Wrapper) else op
    if kind_of(op) not in WEIGHTED:
        return None
    return module_shape(op, x.shape), Form("binary", "binary", FLOAT if runs == FLOAT32 else CODES, CODES), runs, no_bits(op) or ""


def _bit_shape(module: BitConv, x: Tensor) -> LayerShape:
    mode, channels, outputs, groups, kh, kw, sy, sx, top, bottom, left, right, dy, dx, _ = module.geometry
    if mode in (ops.LINEAR, ops.FLATTEN):
        return LayerShape("linear", math.prod(x.shape[1:-1]) // (kh * kw), channels * kh * kw, outputs)
    if mode == ops.CONV1D:
        return LayerShape("conv", x.shape[1], channels, outputs, (kw,), (sx,), (left, right), (dx,), (x.shape[2],), groups)
    size = (x.shape[2], x.shape[3])
    return LayerShape("conv", x.shape[1], channels, outputs, (kh, kw), (sy, sx), (top, left, bottom, right), (dy, dx), size, groups)


def _int8_shape(module: Int8Layer, x: Tensor) -> LayerShape:
    weight, n = module.weight, module.weight.ndim - 2
    if not n:
        return LayerShape("linear", math.prod(x.shape[:-1]), weight.shape[1], weight.shape[0])
    groups, rest = module.window[0], module.window[1:]
    return LayerShape(
        "conv", x.shape[0], weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), tuple(rest[:n]), tuple(rest[n : 3 * n]),
        tuple(rest[3 * n :]), tuple(x.shape[2:]), groups,
    )  # fmt: skip
