"""What :func:`fxq.compile` lets in: models that can be quantized as they are, and data that they run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from fxq.errors import CalibrationError, FxqError, PassError, SchemeError, TargetError
from fxq.schemes import Scheme
from fxq.sharing import Share
from fxq.targets import Target
from fxq.trace import copied, refuse_programs, run
from fxq.tracers import fault_of


def unwrapped(model: Any) -> Any:
    """The module behind ``torch.compile`` and ``nn.DataParallel``; anything else as it is."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    return model


def check_model(model: Any) -> None:
    """Refuse what would give wrong or half-finished artifacts, before any work.

    Raises:
        FxqError: not a module, a TorchScript module, a BitProgram, weights without data or on several devices.
        SchemeError: weights of another float type than float32.
        CalibrationError: NaN or infinity in a weight or buffer.
    """
    if not isinstance(model, nn.Module):
        raise FxqError(f"expected a torch.nn.Module, got {_name(model)}", way_out="Pass the model itself, not its class, output or state dict")
    if isinstance(model, torch.jit.ScriptModule):
        raise FxqError("TorchScript has no Python code to capture", where=type(model).__name__, way_out="Pass the model that it was made from")
    refuse_programs(model)
    home: tuple[str, torch.device] | None = None
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(p):
            raise FxqError("the tensor has no shape yet (a lazy module)", where=name, way_out="Run the model once before compiling")
        if p.device.type == "meta":
            raise FxqError("the tensor has no data (device meta)", where=name, way_out="Load the weights before compiling")
        if home is not None and p.device != home[1]:
            raise FxqError(f"the tensor is on {p.device}, {home[0]} on {home[1]}", where=name, way_out="Move the model to one device")
        home = home or (name, p.device)
        if (p.is_floating_point() or p.is_complex()) and p.dtype != torch.float32:
            raise SchemeError(f"the weights are {p.dtype}, fxq compiles float32 models", where=name, way_out="Pass model.float()")
        if p.is_floating_point() and not _finite(p):
            raise CalibrationError("the tensor holds NaN or infinity", where=name, way_out="Load finite weights")


def require_portable(scheme: Scheme, target: Target, mode: str = "") -> None:
    """Refuse ``portable=True`` where it would mean nothing or, in a ``mode`` of ``fxq.compile``, come too early.

    Raises:
        TargetError: the target does not run on CPUs.
        SchemeError: a scheme without products of integer codes, or one that is trained first.
    """
    if not target.fused:
        raise TargetError(f"target {target.name!r} adds products of integers in 32 bits: its files are portable", way_out="Leave portable out")
    if scheme.method not in ("static", "dynamic"):
        raise SchemeError(f"the scheme {scheme.name!r} is {scheme.method}: it multiplies no integers", way_out="Use an int8 scheme, or leave portable out")
    if mode == "qat" or mode and scheme.trains:
        way_out = "Leave portable out, train, then call fxq.portability.portable(q.convert())"
        raise SchemeError(f"weights of the scheme {scheme.name!r} are made portable after training", way_out=way_out)


def _finite(p: Tensor) -> bool:
    """The sum is quick and tells nearly always; it alone may overflow."""
    with torch.no_grad():
        return bool(torch.isfinite(p.sum())) or bool(torch.isfinite(p).all())


def _name(model: Any) -> str:
    return f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__


def require_runs(model: nn.Module, few: tuple[Any, ...], whole: tuple[Any, ...], cause: Exception) -> None:
    """Tell a model that cannot be captured from data that the float model itself cannot take.

    Args:
        model: the user's model; a copy of it is run.
        few: the first two samples of the first batch.
        whole: the first batch.
        cause: why capture failed.

    Raises:
        CalibrationError: when the model does not run on ``few``.
    """
    root = copied(model)
    given = _described(whole)
    for inputs in (whole, few):
        try:
            run(root, inputs)
        except Exception as e:
            where, what = fault_of(e)
            if inputs is whole:
                raise CalibrationError(f"the model does not run on {given}: {what}", where=where, way_out=_way_out(whole)) from cause
            raise CalibrationError(
                f"the model runs on {given}, but not on the first 2 along dimension 0, which has to be the batch: {what}",
                where=where,
                way_out="Give batches (x.unsqueeze(0), or a DataLoader), not single samples",
            ) from cause


def _described(inputs: tuple[Any, ...]) -> str:
    tensors = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    return ("inputs of " if len(tensors) > 1 else "an input of ") + " and ".join(tensors)


def _way_out(inputs: tuple[Any, ...]) -> str:
    odd = [x.dtype for x in tree_leaves(inputs) if isinstance(x, Tensor) and not x.is_floating_point()]
    if odd and odd[0] in (torch.uint8, torch.bool):
        return "Convert the data to float and normalise it as in training"
    return "Give the tensors that forward takes; dimension 0 is the batch"


def require_budget(scheme: Scheme, mode: str) -> None:
    """Refuse a budget where bits cannot be chosen layer by layer.

    Raises:
        SchemeError: the scheme has no integer weights with a range, or is trained.
    """
    if mode == "qat" or scheme.trains:
        raise SchemeError("bits are chosen after training", way_out="Leave mode='qat' out, or choose a scheme with fewer bits for all layers")
    if scheme.method != "static" or scheme.weight is None or scheme.weight.kind != "affine" or scheme.weight.block is not None:
        raise SchemeError(f"the scheme {scheme.name!r} has no integer weights whose bits can be chosen", way_out="Use scheme='iao_w8a8'")


def require_lowbit(scheme: Scheme, int8: bool, times: bool) -> None:
    """Refuse ``int8=`` and ``times=`` where they would mean nothing.

    Raises:
        SchemeError: naming the argument.
    """
    if int8 and (scheme.method != "static" or scheme.stream is None):
        fact = "is int8 already" if scheme.method == "static" else f"is {scheme.method}"
        way_out = "Leave int8= out, or use a scheme like xnor_w1a1"
        raise SchemeError(f"int8= keeps layers of a low-bit scheme in 8 bits, {scheme.name!r} {fact}", way_out=way_out)
    if times and not scheme.auto:
        raise SchemeError(f"times= is what 'auto-lowbit' chooses by, the scheme is {scheme.name!r}", way_out="Use scheme='auto-lowbit', or leave times= out")


def check_requests(prune: Any, share: Any) -> None:
    """Refuse requests of another type.

    Raises:
        PassError, SchemeError: naming the argument.
    """
    if prune is not None:
        from fxq.pruning import Prune

        if not isinstance(prune, Prune):
            raise PassError(f"prune= is {_name(prune)}, not a Prune", way_out="Give prune=fxq.Prune(ratio=0.5), or fxq.Prune(sparsity=0.9)")
    if share is not None and not isinstance(share, Share):
        raise SchemeError(f"share= is {_name(share)}, not a Share", way_out="Give share=fxq.Share(bits=5)")
