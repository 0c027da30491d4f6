"""Lowering to packed bits: an archive that :func:`fxq.load` gives back as a :class:`~fxq.bitwise.program.BitProgram` (``docs/bitwise.md``)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch.fx import GraphModule

from fxq.backends.archive import ArchiveBackend
from fxq.bitwise.lowered import lower
from fxq.bitwise.program import BitProgram, BitReport
from fxq.errors import LoweringError
from fxq.lowering import Artifact, Issue
from fxq.schemes import Scheme
from fxq.targets import Target

WAY_OUT = "Compile it with a scheme of binary or ternary weights and inputs: xnor_w1a1, bnn_w1a1, twn_wta1 or tbn_w1at"

FASTER = "found int8 faster for them here (m.layer_times): lower it to onnx-qdq, or compile it with xnor_w1a1"


class BitwiseBackend(ArchiveBackend):
    """A graph with binary and ternary layers. The file is an archive of the same graph; weights are packed when it is loaded.

    Args:
        coding: as of :class:`~fxq.backends.archive.ArchiveBackend`.
    """

    name: ClassVar[str] = "bitwise"
    run: ClassVar[str] = "bitwise"

    def __init__(self, coding: str = "auto") -> None:
        super().__init__(coding)
        self._found: tuple[GraphModule, BitReport] | None = None

    def check(self, gm: GraphModule, scheme: Scheme, target: Target) -> list[Issue]:
        """What an archive does not hold, a graph that was placed for another runtime, and one without a layer that can run on bits.

        Layers that stay in int8 or float are no issue: they stand in the report, with the reason.
        """
        if not target.fused:
            return [Issue("target", f"the graph is placed for {target.name!r}", "Compile it with target='bitwise' and a scheme such as xnor_w1a1")]
        issues = super().check(gm, scheme, target)
        if not issues:
            try:
                self._found = gm, BitProgram(gm).report()
            except LoweringError as e:
                way_out = f"{scheme.name!r} {FASTER}" if scheme.auto else WAY_OUT
                issues = _why_not(gm, way_out) or [Issue("model", e.fact, way_out)]
        return issues

    def emit(self, gm: GraphModule, scheme: Scheme, target: Target) -> Artifact:
        """The file's bytes; ``info`` has what the archive's has, ``bitwise`` (the program's report) and ``summary`` (the same as text)."""
        assert self._found is not None and self._found[0] is gm, "check comes first"
        report, self._found = self._found[1], None
        made = super().emit(gm, scheme, target)
        return replace(made, info={**made.info, "bitwise": report.to_json(), "summary": str(report)})


def _why_not(gm: GraphModule, way_out: str) -> list[Issue]:
    """Why each weighted layer does not run on bits; those that are float because of their place in the net come last."""
    order = {str(n.target): i for i, n in enumerate(gm.graph.nodes)}
    reasons = lower(gm).reasons.items()
    found = sorted(reasons, key=lambda r: (r[1].startswith("the scheme leaves the"), order.get(r[0], len(order))))
    return [Issue(path, f"no layer runs on bits; of this one: {why}", way_out) for path, why in found]
