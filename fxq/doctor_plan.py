"""What a target will execute in integers, told from the model alone: the passes up to the placement of grids, no data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

from torch.fx import GraphModule, Node

from fxq import doctor_health
from fxq.api import pipeline_for
from fxq.compiled import FloatOp
from fxq.costs import layer_costs
from fxq.doctor_health import Finding
from fxq.errors import FxqError
from fxq.graph import float_module, walk
from fxq.modules import WEIGHTED
from fxq.pipeline import PassContext, Pipeline
from fxq.schemes import Scheme
from fxq.snapshot import History
from fxq.spec import QuantSpec
from fxq.targets import Target
from fxq.trace import Captured, copied, resized

FLOAT_BYTES = 4
"""Of a float weight, a scale, an int32 bias."""


@dataclass(frozen=True)
class OpForecast:
    """How one operation of the compiled graph will run.

    Attributes:
        node: module path, or node name of what is no module.
        kind: canonical kind.
        runs: ``int`` or ``float``.
        why: for ``float``, the reason; ``absorbed`` for a ReLU or clamp that vanishes into its producer's grid.
        macs: multiply-accumulates of one sample.
        part: module path of the part, of a model that is captured in parts.
    """

    node: str
    kind: str
    runs: str
    why: str
    macs: int
    part: str = ""


@dataclass(frozen=True)
class Forecast:
    """One target and scheme.

    Attributes:
        target, scheme: their names.
        stop: why this model cannot be compiled for it, None when it can.
        ops: every operation, in the order of the graph.
        bytes_before: of all parameters in float32; ``bytes_after``: with the scheme's weights, their scales and biases.
        rewrites: what ``legalize`` makes: ``(kinds that went, kinds that came)`` with their numbers.
        folded: batch norms and constant affine maps that went into layers.
        unfolded: ``(node, reason)`` of those that stay.
        findings: about this scheme's grids and the model's weights.
    """

    target: str
    scheme: str
    stop: str | None = None
    ops: tuple[OpForecast, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    rewrites: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    folded: int = 0
    unfolded: tuple[tuple[str, str], ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def float_ops(self) -> list[FloatOp]:
        """As ``CompiledModel.float_ops`` will be after a compilation."""
        return [FloatOp(o.node, o.kind, o.why) for o in self.ops if o.runs == "float"]

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates of one sample: in integers, all."""
        return sum(o.macs for o in self.ops if o.runs == "int"), sum(o.macs for o in self.ops)

    @property
    def share(self) -> float:
        """Share of the multiply-accumulates in integers, 0 to 1; 0 for a model without any."""
        integer, whole = self.macs
        return integer / whole if whole else 0.0

    def grouped(self) -> list[tuple[str, str, int, str]]:
        """``(kind, reason, count, first node)`` of the float operations, the most frequent first."""
        tally = Counter((o.kind, o.why) for o in self.ops if o.runs == "float")
        first = {(o.kind, o.why): o.node for o in reversed(self.ops)}
        return [(k, why, n, first[k, why]) for (k, why), n in tally.most_common()]

    def lines(self) -> list[str]:
        """The forecast as text, its first line a heading."""
        if self.stop is not None:
            return [f"{self.target}, {self.scheme}: cannot be compiled: {self.stop}"]
        (part, whole), before, after = self.macs, self.bytes_before / 1e6, self.bytes_after / 1e6
        share = "all" if part == whole else f"{min(self.share, 0.999):.1%}"  # 99.97 % is not all
        head = f"{share} of {whole / 1e6:,.1f} M MACs in integers, weights {before:.2f} -> {after:.2f} MB"
        integer = Counter(o.kind for o in self.ops if o.runs == "int")
        lines = [f"{self.target}, {self.scheme}: {head}"]
        lines.append("  integer   " + (", ".join(f"{k} {n}" for k, n in integer.most_common()) or "nothing"))
        lines += [f"  float     {k} {n}: {why}" + (f" ({node})" if n == 1 else f" ({node}, ...)") for k, why, n, node in self.grouped()]
        gone, made = self.rewrites
        if gone or made:
            lines.append(f"  rewritten {_kinds(gone) or 'nothing'} -> {_kinds(made) or 'nothing'}")
        if self.folded or self.unfolded:
            lines.append(f"  folded    {self.folded} batch norms and constant maps into layers")
        lines += [f"  stays     {node}: {why}" for node, why in self.unfolded]
        return [*lines, *(f"  {f}" for f in self.findings)]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        return {**asdict(self), "macs_int": self.macs[0], "macs": self.macs[1], "share": self.share}


def _kinds(tally: dict[str, int]) -> str:
    return ", ".join(f"{k} {n}" for k, n in tally.items())


def refused(target: Target, scheme: str | Scheme) -> Forecast | None:
    """Says why a target does not take a scheme; None when it does."""
    try:
        target.scheme(scheme)
    except FxqError as e:
        return Forecast(target.name, scheme if isinstance(scheme, str) else scheme.name, stop=str(e))
    return None


def forecast(captured: Captured, example: tuple[Any, ...], target: Target, scheme: Scheme) -> Forecast:
    """Run the passes up to the placement of grids on a copy of the captured graph, or of each captured part.

    Args:
        captured: what :func:`fxq.trace.capture` found; it is not changed.
        example: the positional inputs that it was captured with.
        target, scheme: which fit each other.
    """
    whole = captured.gm is not None
    parts = {"": (captured.gm, example)} if captured.gm is not None else captured.parts
    made = []
    for path, (gm, inputs) in parts.items():
        assert gm is not None
        fixed = bool(captured.specialised) or not whole
        try:
            made.append(_one(gm, inputs, target, scheme, path, fixed))
        except FxqError as e:
            return Forecast(target.name, scheme.name, stop=f"{path}: {e}" if path else str(e))
    return made[0] if whole else _joined(made)


def _one(gm: GraphModule, example: tuple[Any, ...], target: Target, scheme: Scheme, part: str, fixed: bool) -> Forecast:
    gm = copied(gm, share=True)  # type: ignore[assignment]
    ctx = PassContext(scheme, target, example, train=scheme.trains)
    ctx.probe = example if fixed else resized(example, 1)
    passes = tuple(takewhile(lambda p: p.name != "calibrate", pipeline_for(scheme).passes))
    kinds: dict[str, Counter[str]] = {}
    history = History()

    def after(name: str, _: History) -> None:
        kinds[name] = Counter(k for _, k in walk(gm) if k not in ("attr", "input", "output"))

    Pipeline(passes).run(gm, ctx, history, after=after)
    before, behind = kinds["fold-bn"], kinds["legalize"]
    fold = history["fold-bn"]
    return Forecast(
        target.name, scheme.name, None, _ops(gm, part), *_bytes(gm, scheme), (dict(before - behind), dict(behind - before)), fold.rewrites,
        tuple((s.node, s.why) for s in fold.skips), tuple(doctor_health.of_weights(gm, scheme.weight)),
    )  # fmt: skip


def _ops(gm: GraphModule, part: str) -> tuple[OpForecast, ...]:
    macs = {c.path: c.macs for c in layer_costs(gm)}
    found = []
    for node, k in walk(gm):
        if node.op in ("placeholder", "output", "get_attr") or not ("integer" in node.meta or "float_why" in node.meta):
            continue
        name = str(node.target) if node.op == "call_module" else node.name
        why = node.meta.get("float_why", "absorbed" if node.meta.get("absorbed") else "")
        found.append(OpForecast(name, k, "float" if node.meta.get("float_why") else "int", why, macs.get(str(node.target), 0), part))
    return tuple(found)


def _bytes(gm: GraphModule, scheme: Scheme) -> tuple[int, int]:
    """Bytes of all parameters that the graph reads: as float32, and on the scheme's grids."""
    before, saved = sum(c.bytes for c in layer_costs(gm)), 0
    seen: set[int] = set()
    for node, k in walk(gm, *WEIGHTED):
        weight: Any = getattr(float_module(gm, node), "weight")  # noqa: B009
        if id(weight) in seen or not (node.meta.get("integer") or "weight_spec" in node.meta):
            continue
        seen.add(id(weight))
        saved += weight.numel() * FLOAT_BYTES - _packed(node, k, weight, scheme)
    return before, before - saved


def _packed(node: Node, k: str, weight: Any, scheme: Scheme) -> int:
    """Bytes of the codes and scales of a weight."""
    spec = QuantSpec.parse(node.meta["weight_spec"]) if "weight_spec" in node.meta else scheme.weight_spec(k)
    scales = 1 if spec.axis is None else int(weight.shape[spec.axis])
    if spec.block is not None:
        scales = math.ceil(weight.numel() / spec.block)
    return math.ceil(int(weight.numel()) * spec.bits / 8) + scales * FLOAT_BYTES


def _joined(parts: Sequence[Forecast]) -> Forecast:
    """The parts of one model together."""
    gone, made = Counter[str](), Counter[str]()
    for p in parts:
        gone.update(p.rewrites[0])
        made.update(p.rewrites[1])
    findings = tuple(f for p in parts for f in p.findings)
    return Forecast(
        parts[0].target, parts[0].scheme, None, tuple(o for p in parts for o in p.ops), sum(p.bytes_before for p in parts), sum(p.bytes_after for p in parts),
        (dict(gone), dict(made)), sum(p.folded for p in parts), tuple(u for p in parts for u in p.unfolded), findings,
    )  # fmt: skip
