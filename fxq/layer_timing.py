"""What each layer of a model takes on this machine in float32, in int8 and on bits: :func:`layer_times`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxq import admission
from fxq.calibration import Batches
from fxq.compiled import CompiledModel
from fxq.errors import FxqError, PassError
from fxq.layer_shapes import Form
from fxq.layer_table import LayerTimes, about, times_of
from fxq.prunable import canonical_graph
from fxq.pruned import PrunedModel
from fxq.trainable import TrainableModel

KINDS = ("binary", "ternary")


def layer_times(model: nn.Module, example: Any = None, *, threads: int = 1, activations: str = "binary", weights: str = "binary") -> LayerTimes:
    """Measure every weighted layer in float32, in int8 and on bits, in turns, on this machine.

    Each layer is measured by itself, with random values of its shape: float32 by the best of torch (NCHW and channels last) and ONNX Runtime, int8 by
    ONNX Runtime's kernel with codes in and out, bits by fxq's kernels. On bits it stands twice: as it runs inside the net (packed values in; or codes,
    which are packed first; results as the next layers read them), and alone, with packing of float32 values and a float32 result. Equal shapes are
    measured once in a process. With one thread times are processor time, which other processes disturb less; with more, wall time.

    Args:
        model: a float module, with ``example``; or a :class:`~fxq.compiled.CompiledModel`, whose layers are measured with the grids that they have
            (one in training as :meth:`~fxq.trainable.TrainableModel.convert` gives it); or a net on bits (:class:`~fxq.bitwise.program.BitProgram`,
            what ``fxq.load`` gives of a ``net.fxq``), with ``example``. None is changed.
            A float net is measured as if all its layers were binary (or as ``activations`` and ``weights`` say).
        example: one batch of inputs (a tensor or a tuple): its sizes count, and its number of samples. Without it, one sample of what the model
            was compiled with.
        threads: of each run.
        activations, weights: ``binary`` or ``ternary``, for a float model.

    Raises:
        PassError: no example for a float model, bad numbers, or a kind of values that does not exist.
        TraceError: the model cannot be captured as one graph.
    """
    if type(threads) is not int or threads < 1:
        raise PassError(f"{threads} threads run nothing", where="layer_times", way_out="Give threads=1 or more")
    for name, kind in (("activations", activations), ("weights", weights)):
        if kind not in KINDS:
            raise PassError(f"{name}={kind!r} have no kernel on bits", where="layer_times", way_out="Use 'binary' or 'ternary'")
    from fxq.bitwise.program import BitProgram

    if isinstance(model, BitProgram):
        from fxq.layer_program import program_times

        layers = program_times(model, _inputs(example, model), threads)
    else:
        gm, samples = _graph(model, example)
        layers = times_of(gm, samples=samples, threads=threads, like=Form(activations, weights))
    if not layers:
        raise PassError("the model has no weighted layer", where="layer_times", way_out="Give a model with convolutions or linear layers")
    return LayerTimes(layers, threads, about())


def _inputs(example: Any, net: nn.Module) -> tuple[Any, ...]:
    if example is None:
        raise PassError("the shapes are not known", where="layer_times", way_out="Pass example= with one batch of inputs")
    return Batches([example], net).example


def _graph(model: Any, example: Any) -> tuple[GraphModule, int]:
    """A canonical graph with shapes, and the number of samples."""
    net = admission.unwrapped(model)
    net = net.root if isinstance(net, PrunedModel) else net
    if isinstance(net, TrainableModel):
        net = net.convert()
    if isinstance(net, CompiledModel):
        if example is not None:
            raise PassError("a compiled model has its shapes", where="layer_times", way_out="Leave example= out, or give the float model")
        return net.graph_module, 1
    if not isinstance(net, nn.Module):
        raise FxqError(f"expected a module, got {type(net).__name__}", way_out="Pass a float model with example=, or a compiled one")
    admission.check_model(net)
    inputs = _inputs(example, net)
    first = next((x for x in inputs if isinstance(x, torch.Tensor) and x.ndim), None)
    gm = canonical_graph(net, inputs, "Measure its parts one by one")
    return gm, 1 if first is None else len(first)
