"""The entry of structured pruning in float: :func:`prune`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from fxq import admission, distributed, schemes, targets
from fxq.calibration import Batches
from fxq.compiled import CompiledModel
from fxq.errors import CalibrationError, FxqError, PassError, TraceError
from fxq.exported import program_module
from fxq.heap import young
from fxq.masking import apart
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.passes.prune_channels import PruneChannels
from fxq.pipeline import PassContext, Pipeline, Progress, no_progress
from fxq.progress import ProgressBar
from fxq.pruned import PrunedModel
from fxq.pruning import Prune
from fxq.snapshot import History, take
from fxq.targets import Target
from fxq.trace import capture, resized


@young()
def prune(
    model: nn.Module | torch.export.ExportedProgram,
    how: Prune,
    *,
    example: Any = None,
    data: Any = None,
    target: str | Target = "onnxruntime",
    leaf_modules: Sequence[type[nn.Module]] = (),
    progress: Progress | bool = True,
) -> PrunedModel:
    """Capture ``model`` (a copy) and cut channels; the batch norms stay, so that the result trains on. ``compile`` quantizes it.

    Args:
        model: float32 module or exported program; it is not changed.
        how: what to cut.
        example: one batch of inputs (a tensor or a tuple); not needed with ``data``.
        data: for ``by="taylor"``: batches of inputs, labels behind them (or give them in ``how``).
        target: whose kernels the default multiple of widths is for.
        leaf_modules: module types that capture keeps whole.
        progress: as in :func:`compile`.

    With several processes (``torch.distributed``) all of them call it; ``taylor`` takes the data of all, so they cut alike.

    Raises:
        TraceError, CalibrationError, PassError: with node, fact and way out.
    """
    if how.sparsity is not None:
        way_out = "Use fxq.sparsity.sparsify(model, ...), or fxq.compile(..., prune=fxq.Prune(sparsity=...), mode='qat'), whose masks hold in training"
        raise PassError("single weights of a float model need masks to stay 0", where="prune-weights", way_out=way_out)
    tgt = targets.get(target)
    net = admission.unwrapped(program_module(model) if isinstance(model, torch.export.ExportedProgram) else model)
    if isinstance(net, CompiledModel) and not isinstance(net, PrunedModel):
        raise FxqError("the model is compiled already", way_out="Pass the float model that it was made from")
    net = net.root if isinstance(net, PrunedModel) else net
    admission.check_model(net)
    if data is None and example is None:
        raise CalibrationError("the shapes are not known", way_out="Pass example= with one batch of inputs, or data=")
    if data is not None and iter(data) is data:  # read once only
        data = list(islice(data, how.batches))
    if data is not None and how.data is None:
        how = replace(how, data=data)
    batches = Batches([example] if example is not None else data, net)
    few = tuple(x[:2] if isinstance(x, torch.Tensor) and x.ndim else x for x in batches.example)
    start = time.perf_counter()
    captured = capture(net, few, leaf_modules=tuple(leaf_modules))
    if captured.gm is None:
        raise TraceError(f"the model can only be captured in parts ({', '.join(captured.parts)})", way_out="Prune its parts one by one, or compile with prune=")
    history = History([take(captured.gm, "trace", ms=(time.perf_counter() - start) * 1e3)])
    with nullcontext(progress) if callable(progress) else ProgressBar() if progress else nullcontext(no_progress) as report:
        ctx = PassContext(schemes.get("float"), tgt, few, batches, progress=report, probe=resized(few, 1) if not captured.specialised else few)
        with distributed.meeting(how.by == "taylor"):
            Pipeline((Canonicalize(), PropagateShapes(), PruneChannels(how))).run(captured.gm, ctx, history)
    pruned = PrunedModel(captured.gm, captured, history, ctx.scheme, tgt)
    uncut = captured.gm.meta.pop("masked")
    apart(uncut, captured.gm)  # training of the cut model does not reach it
    pruned.uncut, pruned.prune_report = (uncut,), captured.gm.meta.pop("prune_report")
    return pruned
