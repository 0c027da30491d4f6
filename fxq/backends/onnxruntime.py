"""ONNX Runtime sessions: open a file or bytes at an optimization level, run it, and say clearly what is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from fxq.errors import ArtifactError, nearest
from fxq.lowering import contents

LEVELS = ("all", "extended", "basic", "off")
QUIET = 4  # only fatal messages of the runtime reach the terminal; faults are raised


def session(
    model: bytes | str | os.PathLike[str],
    level: str = "all",
    *,
    threads: int | None = None,
    save_optimized: str | os.PathLike[str] | None = None,
    float_matmul: bool = False,
) -> ort.InferenceSession:
    """A CPU session of an ONNX file or its bytes.

    Args:
        model: path or bytes.
        level: graph optimization: ``all``, ``extended`` (no layout changes: what to read the fused graph from), ``basic`` or ``off``.
        threads: of one operator; ``None`` leaves it to the runtime.
        save_optimized: file that takes the optimized model.
        float_matmul: weight-only matrix products in float32. By default the runtime rounds their activations to 8 bits as well (MatMulNBits,
            accuracy level 4): faster, 1 to 3 % off.

    Raises:
        ArtifactError: for an unknown level, an unreadable, truncated or foreign file, or a graph that the runtime refuses.
    """
    if level not in LEVELS:
        raise ArtifactError(f"unknown optimization level {level!r}", way_out=nearest(level, LEVELS))
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    table = {"all": levels.ORT_ENABLE_ALL, "extended": levels.ORT_ENABLE_EXTENDED, "basic": levels.ORT_ENABLE_BASIC, "off": levels.ORT_DISABLE_ALL}
    options.graph_optimization_level = table[level]
    options.log_severity_level = QUIET
    if threads is not None:
        options.intra_op_num_threads = threads
    if save_optimized is not None:
        options.optimized_model_filepath = os.fspath(save_optimized)
    if float_matmul:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    data, where = contents(model)
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise ArtifactError(f"ONNX Runtime cannot load it: {_line(e)}", where=where, way_out="It is truncated or no ONNX file; lower the model again") from e


def run(opened: ort.InferenceSession, feed: Mapping[str, Any], outputs: list[str] | None = None) -> list[np.ndarray[Any, Any]]:
    """Outputs of a session as arrays; tensors of torch are taken as they are.

    Args:
        opened: from :func:`session`.
        feed: input name -> array or tensor.
        outputs: names to compute, in order; ``None`` for all.

    Raises:
        ArtifactError: when names, types or shapes do not fit the file.
    """
    wanted = {i.name: i for i in opened.get_inputs()}
    if set(feed) != set(wanted):
        raise ArtifactError(f"the file's inputs are {', '.join(wanted)}, given are {', '.join(feed)}", way_out="Pass each input by its name")
    arrays = {name: value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value) for name, value in feed.items()}
    for name, array in arrays.items():
        sizes = wanted[name].shape
        if len(sizes) != array.ndim or any(isinstance(s, int) and s != have for s, have in zip(sizes, array.shape, strict=True)):
            raise ArtifactError(f"input {name!r} has shape {list(array.shape)}, the file takes {sizes}", way_out="Check the shapes of the data")
    try:
        results: list[np.ndarray[Any, Any]] = opened.run(outputs, arrays)
    except Exception as e:
        raise ArtifactError(f"the runtime refuses the inputs: {_line(e)}", way_out="Check types and shapes of the data") from e
    return results


def _line(e: Exception) -> str:
    lines = [line for line in str(e).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(e).__name__
