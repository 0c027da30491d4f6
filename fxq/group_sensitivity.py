"""Sensitivity: what each group does to the output when it alone is cut, measured on masks, without cutting anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxq import admission, pruning, targets
from fxq.calibration import Batches
from fxq.dead_channels import Constants
from fxq.errors import CalibrationError
from fxq.masking import masked
from fxq.prunable import canonical_graph
from fxq.prune_report import Sensitivity, SensitivityRow
from fxq.selection import select
from fxq.snapshot import flat


def sensitivity(
    model: nn.Module,
    data: Any,
    *,
    ratios: Sequence[float] = (0.5,),
    how: pruning.Prune | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    batches: int = 8,
) -> Sensitivity:
    """Cut each group alone, by each of ``ratios``, and measure.

    Args:
        model: float module; it is not changed.
        data: batches like calibration data, labels behind the inputs (``by="taylor"`` uses them).
        ratios: shares to cut.
        how: criterion, multiple, floors, kept layers; its ratio or budget is not used. Default: ``l2``, multiples of 1.
        metric: ``metric(net) -> number`` (accuracy, ...) of the float graph with that group masked; without it only the SQNR is measured.
        batches: at most so many batches.

    Returns:
        A row for each group and ratio: SQNR of the output in dB (``10 log10(sum y^2 / sum (y - y_cut)^2)``), and the metric.

    Raises:
        TraceError, CalibrationError, PassError: as :func:`fxq.prune`.
    """
    how = replace(how or pruning.Prune(ratio=0.5, multiple_of=1), ratio=0.0, macs=None, parameters=None, bytes=None)
    net = admission.unwrapped(model)
    admission.check_model(net)
    read = list(Batches(data, net, limit=batches, what="data for the sensitivity", labels=True))
    if not read:
        raise CalibrationError("the data for the sensitivity is empty", way_out="Give a few batches")
    inputs = Batches([read[0]], net).count
    gm = canonical_graph(net, read[0][:inputs], "Measure its parts one by one")
    with torch.inference_mode():
        want = [flat(gm(*b[:inputs])) for b in read]
    base = pruning.plan(gm, how, how.multiple_of or targets.get("onnxruntime").channel_multiple, read, inputs)
    rows = []
    for pool, group in zip(base.pools, base.judged, strict=True):
        for ratio in ratios:
            keep = base.groups.all_kept()
            keep[group.units] = select([replace(pool, ratio=None)], ratio, "layer")[0]
            labels = keep[base.groups.unit]
            cut = masked(base.groups.channels, labels, Constants(base.groups.channels, labels).readings())
            value = None if metric is None else float(metric(cut))
            rows.append(SensitivityRow(group.name, len(group.units), int((~keep[group.units]).sum()), _sqnr(cut, read, inputs, want), value))
    return Sensitivity(tuple(rows))


def _sqnr(net: nn.Module, read: list[tuple[Any, ...]], inputs: int, want: list[list[Tensor]]) -> float:
    """dB; infinite where nothing differs."""
    signal = noise = 0.0
    with torch.inference_mode():
        for batch, right in zip(read, want, strict=True):
            for a, b in zip(right, flat(net(*batch[:inputs])), strict=True):
                signal += float(a.double().square().sum())
                noise += float((a.double() - b.double()).square().sum())
    return 10 * math.log10(signal / noise) if noise and signal else math.inf


