"""Repairs an ONNX file for TensorRT where that leaves every number as it is, and says what it did and what it left."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from fxq import lint_trt_codes, lint_trt_scales
from fxq.errors import TargetError, nearest
from fxq.lint_trt import CAPABILITIES
from fxq.lint_trt_edit import Editor
from fxq.lint_trt_graph import Graph, inlined
from fxq.lint_trt_model import functions

STEPS: tuple[Callable[[Editor, Graph], None], ...] = (
    lint_trt_codes.fold_constants, lint_trt_codes.float_biases, lint_trt_codes.signed_constants, lint_trt_codes.signed_activations,
    lint_trt_scales.constants, lint_trt_scales.scalars, lint_trt_scales.written_axes, lint_trt_scales.counted_zeros, lint_trt_scales.equal_scales,
    lint_trt_codes.dead_channels, lint_trt_codes.round_trips,
)  # fmt: skip
"""In order: each sees what the ones before it wrote."""


def fix(model: onnx.ModelProto, target: str = "tensorrt") -> tuple[onnx.ModelProto, list[str]]:
    """Repair what can be repaired without changing any number.

    Done: constants folded that stand before their DequantizeLinear; int32 biases in float; uint8 codes as int8 where the reals are the same; zero points and
    crashing scale expressions as initializers; scales of shape [1] as scalars; axes written; equal scales as one; dead channels; Q behind DQ of the same grid;
    names of nodes made unique, local functions that are called twice inlined.

    Args:
        model: of any tool; it is not changed.
        target: one of :data:`fxq.lint_trt.CAPABILITIES`.

    Returns:
        The repaired model, and what was done, line by line; lines that begin with ``not repaired`` say what was left and why. The model itself, when there
        is nothing to do.

    Raises:
        TargetError: for an unknown target.
    """
    if target not in CAPABILITIES:
        raise TargetError(f"no repairs for target {target!r}", way_out=nearest(target, CAPABILITIES))
    clash = bool([*functions(model)])
    copy = onnx.ModelProto()
    copy.CopyFrom(inlined(model))
    edit = Editor(copy)
    unique_names(edit)
    for step in STEPS:
        for graph in edit.scopes():
            step(edit, graph)
    edit.sweep()
    left = [f"not repaired: {line}" for line in dict.fromkeys(edit.left)]
    if not edit.done and not clash:
        return model, left
    calls = ["local functions put in place of their calls"] if model.functions else []
    return copy, [*calls, *edit.done, *left]


def unique_names(edit: Editor) -> None:
    """A name of its own for every node of all graphs; the parser calls a Q or DQ without one by its output."""
    seen: set[str] = set()
    for graph in edit.scopes():
        for node in graph:
            name = node.proto.name or (f"node_of_{next(iter(node.outputs), '')}" if node.is_q or node.is_dq else "")
            if name in seen:
                node.proto.name = edit.fresh(name)
                edit.done.append(f"{name}: renamed {node.proto.name}, the name was used twice")
            seen |= {node.proto.name or name} - {""}
