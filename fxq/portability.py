"""One file, the same numbers on every x86 CPU: the integer reference as CPUs without VNNI compute it, and a compiled model that leaves nothing to saturate.

See :mod:`fxq.portability_pairs` for what such CPUs compute, and ``docs/portability.md``.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxq import admission, kernels
from fxq.backends.reference import Reference, Step
from fxq.calibration import Batches
from fxq.compiled import CompiledModel
from fxq.convolutions import conv_pads
from fxq.errors import SchemeError
from fxq.graph import module_of
from fxq.kernels import Codes
from fxq.modules import Quantized
from fxq.passes.make_portable import MakePortable
from fxq.pipeline import PassContext
from fxq.portability_pairs import GREATEST_SUM, LEAST_SUM, at_risk, greatest_code, paired, worst
from fxq.snapshot import take


@dataclass
class LayerPortability:
    """Pair sums of one integer layer.

    Attributes:
        layer: module path.
        channels, channels_at_risk: output channels; those with a pair that can saturate for some input.
        pairs, pairs_at_risk: pairs of weights, likewise.
        worst: the sum of two products farthest from 0 that the weights allow; int16 ends at 32767.
        greatest_code: greatest activation code that the data gave, as an unsigned byte.
        sums, saturated: pair sums that the data made the layer compute, and how many of them left int16.
        sqnr: of the layer's output with saturating sums against the one with exact sums on the same inputs, in dB; inf when equal.
    """

    layer: str
    channels: int
    channels_at_risk: int
    pairs: int
    pairs_at_risk: int
    worst: int
    greatest_code: int = 0
    sums: int = 0
    saturated: int = 0
    signal: float = field(default=0.0, repr=False)
    noise: float = field(default=0.0, repr=False)

    @property
    def sqnr(self) -> float:
        return _db(self.signal, self.noise)

    def __str__(self) -> str:
        head = f"{self.layer}: {self.pairs_at_risk} of {self.pairs} pairs, in {self.channels_at_risk} of {self.channels} channels, can saturate ({self.worst})"
        return head + (f"; on the data {self.saturated} of {self.sums} sums did, {self.sqnr:.1f} dB" if self.saturated else "; none did on the data")


@dataclass
class PortabilityReport:
    """What CPUs without VNNI compute of a model otherwise.

    Attributes:
        layers: every integer layer whose products are added in pairs.
        samples: so many samples were run.
        sqnr: of the model's outputs there against those of exact sums, in dB; inf when equal.
    """

    layers: list[LayerPortability]
    samples: int
    sqnr: float

    @property
    def ok(self) -> bool:
        """No pair of weights can saturate, whatever the input."""
        return not any(layer.pairs_at_risk for layer in self.layers)

    @property
    def saturated(self) -> int:
        """Pair sums that left int16 on the data."""
        return sum(layer.saturated for layer in self.layers)

    def __str__(self) -> str:
        risky = [layer for layer in self.layers if layer.pairs_at_risk]
        if not risky:
            return f"{len(self.layers)} integer layers, no pair of their weights can saturate: the same numbers on x86 CPUs with and without VNNI"
        total = sum(layer.sums for layer in self.layers)
        head = f"without VNNI {self.saturated} of {total} pair sums saturate on {self.samples} samples; the outputs then differ by {self.sqnr:.1f} dB"
        return "\n".join([head, *(f"  {layer}" for layer in risky)])

    def to_json(self) -> str:
        """The report as a JSON object; ``null`` stands for an SQNR without noise."""
        finite = {layer.layer: _finite(layer.sqnr) for layer in self.layers}
        rows = [{k: v for k, v in asdict(layer).items() if k not in ("signal", "noise")} | {"sqnr": finite[layer.layer]} for layer in self.layers]
        body = {"ok": self.ok, "samples": self.samples, "saturated": self.saturated, "sqnr": _finite(self.sqnr), "layers": rows}
        return json.dumps(body, indent=1)


class PairSums(Reference):
    """The integer reference with sums of two products saturated to int16: the numbers of the fused file on x86 CPUs without VNNI.

    Args:
        model: compiled for a runtime whose kernels are known here.

    Attributes:
        layers: what was seen so far, by module path.

    Raises:
        TargetError, SchemeError: for a target without such kernels, a scheme without grids for activations.
    """

    def __init__(self, model: CompiledModel) -> None:
        admission.require_portable(model.scheme, model.target)
        if model.scheme.method != "static":
            way_out = "m.lint(portable=True) tells what its weights allow"
            raise SchemeError(f"the scheme {model.scheme.name!r} rounds activations while it runs: there are no codes to check", way_out=way_out)
        super().__init__(model.graph_module)
        self.layers: dict[str, LayerPortability] = {}
        self._risks: dict[Node, Tensor] = {}
        for step in self.steps:
            layer = step.module
            most = greatest_code(self.gm, step.core, layer) if isinstance(layer, Quantized) and step.kind in ("conv", "linear") else None
            if isinstance(layer, Quantized) and most is not None:
                risk, pairs = at_risk(layer, most), paired(layer.weight_codes())
                self._risks[step.core] = risk
                self.layers[step.path] = LayerPortability(
                    step.path, len(risk), int(risk.any(1).sum()), risk.numel(), int(risk.sum()), worst(pairs, most)
                )  # fmt: skip

    def _kernel(self, step: Step, env: dict[Node, Any]) -> Any:
        if step.core not in self._risks or step.kind not in ("conv", "linear"):
            return super()._kernel(step, env)
        layer: Any = step.module
        x = env[step.operands[0]]  # type: ignore[index]
        acc, scale = kernels.accumulate(layer, x)
        bytes_ = kernels.in_bytes(x)
        lost, count = excess(layer.op, paired(layer.weight_codes()), self._risks[step.core], bytes_)
        self._record(step, bytes_, acc, lost, count)
        acc = acc - lost.movedim(0, -1 if isinstance(layer.op, nn.Linear) else 1)
        if step.gives_float:
            return acc.to(torch.float32) * scale
        fq: Any = module_of(self.gm, step.result)
        return Codes(kernels.requantized(acc, scale, fq.rounding), fq.qparams)

    def _record(self, step: Step, x: Codes, acc: Tensor, lost: Tensor, count: int) -> None:
        """Sums of squares, in units of the input's scale."""
        layer: Any = step.module
        seen, weight = self.layers[step.path], layer.weight_grid.scale.to(torch.float64)
        seen.sums += lost.numel() // max(1, seen.channels) * seen.pairs
        seen.saturated += count
        if x.codes.numel():
            seen.greatest_code = max(seen.greatest_code, int(x.codes.max()))
        weight = weight.reshape([-1] + [1] * (lost.ndim - 1)) if weight.ndim else weight
        seen.signal += float((acc.movedim(-1 if isinstance(layer.op, nn.Linear) else 1, 0) * weight).square().sum())
        seen.noise += float((lost * weight).square().sum()) if count else 0.0


def excess(op: Any, pairs: Tensor, risk: Tensor, x: Codes) -> tuple[Tensor, int]:
    """By how much exact sums are too large beside those whose pairs saturate, and how many pair sums saturate.

    Args:
        op: the conv or linear module, for its geometry.
        pairs: its integer weights ``[O, P, 2]``.
        risk: which pairs can saturate, bool ``[O, P]``; only those are computed.
        x: its input as unsigned bytes.

    Returns:
        int64 in the shape of the layer's output, channels first (``[O, ...]``), and the number of pair sums outside of int16.
    """
    column, size = _columns(op, x)
    lost, count = torch.zeros((len(pairs), *size), dtype=torch.int64), 0
    per_group = len(pairs) // int(getattr(op, "groups", 1))
    weights = pairs.to(torch.int32)
    for p in risk.any(0).nonzero().flatten().tolist():
        for g in range(len(pairs) // per_group):
            rows = risk[g * per_group : (g + 1) * per_group, p].nonzero().flatten() + g * per_group
            if not len(rows):
                continue
            first, second = column(2 * p, g), column(2 * p + 1, g)
            tops = torch.stack([first.max(), second.max()])
            for row in rows.tolist():
                w = weights[row, p]
                if LEAST_SUM <= int((tops * w).sum()) <= GREATEST_SUM:
                    continue
                exact = first * w[0] + second * w[1]
                over = exact - exact.clamp(LEAST_SUM, GREATEST_SUM)
                count += int(torch.count_nonzero(over))
                lost[row] += over
    return lost, count


def _columns(op: Any, x: Codes) -> tuple[Callable[[int, int], Tensor], tuple[int, ...]]:
    """``column(k, g)``: what weight ``k`` (channels innermost) of group ``g`` is multiplied with at every output position, int32; and the shape of that."""
    codes = x.codes.to(torch.int32)
    if isinstance(op, nn.Linear):
        size = tuple(codes.shape[:-1])
        return lambda k, g: codes[..., k] if k < codes.shape[-1] else torch.zeros(size, dtype=torch.int32), size
    pads = [p for pair in reversed(conv_pads(op)) for p in pair]
    codes = nn.functional.pad(codes, pads, value=int(x.qp.zero_point))
    taps, channels = tuple(op.weight.shape[2:]), int(op.weight.shape[1])
    spatial = zip(codes.shape[2:], taps, op.stride, op.dilation, strict=True)
    size = (len(codes), *((n - d * (t - 1) - 1) // s + 1 for n, t, s, d in spatial))

    def column(k: int, g: int) -> Tensor:
        tap, c = divmod(k, channels)
        if tap >= math.prod(taps):
            return torch.zeros(size, dtype=torch.int32)
        cut = codes[:, g * channels + c]
        for axis in reversed(range(len(taps))):
            tap, at = divmod(tap, taps[axis])
            start = at * op.dilation[axis]
            cut = cut.narrow(axis + 1, start, op.stride[axis] * (size[axis + 1] - 1) + 1)[(slice(None),) * (axis + 1) + (slice(None, None, op.stride[axis]),)]
        return cut

    return column, size


def check(model: CompiledModel, data: Any, *, limit: int | None = None) -> PortabilityReport:
    """Run a compiled model on data as x86 CPUs with and without VNNI compute it.

    Args:
        model: compiled for ONNX Runtime with activation grids.
        data: calibration-like data (any iterable of tensors, tuples, dicts).
        limit: at most so many batches.

    Raises:
        TargetError, SchemeError: see :class:`PairSums`.
        CalibrationError: data that the model does not take.
    """
    there = PairSums(model)
    here = Reference(there.gm)
    signal = noise = 0.0
    samples = 0
    for batch in Batches(data, there.gm, limit=limit, what="data to check with"):
        samples += next((len(v) for v in batch if isinstance(v, Tensor) and v.ndim), 1)
        for a, b in zip(tree_leaves(here(*batch)), tree_leaves(there(*batch)), strict=True):
            signal += float(a.to(torch.float64).square().sum())
            noise += float((a.to(torch.float64) - b.to(torch.float64)).square().sum())
    return PortabilityReport(list(there.layers.values()), samples, _db(signal, noise))


def portable(model: CompiledModel) -> CompiledModel:
    """A copy of a compiled model, for example of ``q.convert()`` after training, whose integer weights can saturate nowhere.

    Raises:
        TargetError, SchemeError: where that means nothing.
    """
    admission.require_portable(model.scheme, model.target)
    made = copy.deepcopy(model)
    gm = made.graph_module
    ctx = PassContext(made.scheme, made.target, ())
    step = MakePortable()
    rewrites = step.run(gm, ctx)
    made.history.snapshots.append(take(gm, step.name, rewrites=rewrites, skips=tuple(ctx.skips)))
    return made


def _db(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _finite(v: float) -> float | None:
    return v if math.isfinite(v) else None
