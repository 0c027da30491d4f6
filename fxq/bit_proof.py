"""Proof of a file that runs on packed bits: its program against the integer reference of the model that was lowered, node by node and end to end.

Node by node means with the program's own inputs: its codes at every step go into the reference, whose next steps are computed from them. So a difference
is found where it arises, and a sign that a float operation turned next to 0 (a tie) makes no other node differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from fxq.archive_graph import FOREIGN, own_graph
from fxq.backends.reference import Reference, Step, value_name
from fxq.bitwise.program import BitProgram
from fxq.errors import ArtifactError, LoweringError
from fxq.graph import module_of
from fxq.kernels import Codes
from fxq.proof import gap, inexact, near_half_step, output_nodes, relative, unequal
from fxq.snapshot import flat
from fxq.verdict import Difference, OutputProof, Proof

BOUND = 1e-5
"""Greatest allowed difference of a float result, relative to the greatest magnitude in the tensor."""


def verify(gm: GraphModule, data: bytes, where: str, batches: Iterable[tuple[Any, ...]]) -> Proof:
    """Read the file, run it, and compare each step's result with the reference's: codes bit for bit, float results within :data:`BOUND`.

    Args:
        gm: the converted graph that was lowered.
        data: the file. where: its name for errors. batches: tuples of positional inputs.

    Raises:
        ArtifactError: when the file is damaged, holds another graph, or nothing that runs on bits.
    """
    try:
        program = BitProgram(own_graph(gm, data, where))
    except LoweringError as e:
        raise ArtifactError(f"it is to run bitwise, but {e.fact}", where=f"{where}: {e.where}" if e.where else where, way_out="Lower the model again") from e
    ledger = _Ledger(Reference(gm))
    for batch in batches:
        inputs = tuple(tree_map(lambda v: v.cpu().clone() if isinstance(v, Tensor) else v, batch))
        ledger.add(program, inputs)
    return ledger.proof()


@dataclass
class _Ledger:
    """What was compared so far."""

    reference: Reference
    values: dict[str, Tensor] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=lambda: dict(elements=0, differ=0, hidden=0, hidden_differ=0, batches=0))
    greatest: float = 0.0
    compared: set[str] = field(default_factory=set)
    ties: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, OutputProof] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inexact = inexact(self.reference)  # values that float arithmetic may move

    def add(self, program: BitProgram, inputs: tuple[Any, ...]) -> None:
        """Run a batch."""
        with torch.inference_mode():
            got = flat(program(*inputs))
            self.values = program.values(*inputs)
        wanted, forced = flat(self.reference(*inputs)), flat(self.reference.walk(inputs, self.observe))
        if len(got) != len(wanted):
            raise ArtifactError(f"it has {len(got)} outputs, the graph {len(wanted)}", way_out=FOREIGN)
        nodes = output_nodes(self.reference.gm)
        whole = len(nodes) == len(wanted)  # otherwise some outputs are constants, or collections that a node gives
        for i, (want, near, value) in enumerate(zip(wanted, forced, got, strict=True)):
            exact = nodes[i] not in self.inexact if whole else not self.inexact
            self.output(value_name(nodes[i]) if whole else f"output {i}", exact, want, near, value)
        self.count["batches"] += 1

    def observe(self, step: Step, value: Any) -> Any:
        """Compare one step's result with the program's; go on with the program's."""
        got = self.values.get(step.name)
        if got is None:
            return None
        ours = value.codes if isinstance(value, Codes) else value
        self.compared.add(step.name)
        self.count["hidden"] += ours.numel()
        if got.shape != ours.shape or got.dtype != ours.dtype:
            self.differs(step, ours, ours.numel(), 0.0, f"the program gives {list(got.shape)}, {got.dtype}, the reference {list(ours.shape)}, {ours.dtype}")
            return None
        wrong = unequal(ours, got)
        if not isinstance(value, Codes):
            if relative(ours, got, wrong) > BOUND or bool((wrong & (torch.isnan(ours) | torch.isnan(got))).any()):
                self.differs(step, ours, int(wrong.sum()), gap(ours, got, wrong), "a float result is out of the bound")
            return got
        if step.kind == "quantize" and step.core in self.inexact and isinstance(self.reference.rounding, Tensor) and bool(wrong.any()):
            fq: Any = module_of(self.reference.gm, step.result)
            near = wrong & near_half_step(self.reference.rounding, ours, got, fq.rounding, BOUND)
            self.ties[step.name] = self.ties.get(step.name, 0) + int(near.sum())
            wrong = wrong & ~near
        if bool(wrong.any()):
            cause = "it rounds a float value otherwise" if step.kind == "quantize" else f"the {step.kind} gives other codes"
            self.differs(step, ours, int(wrong.sum()), gap(ours, got, wrong), cause)
        return Codes(got, value.qp)

    def differs(self, step: Step, ours: Tensor, count: int, greatest: float, cause: str) -> None:
        """Note a difference; of several batches the first stays."""
        self.count["hidden_differ"] += count
        self.differences.setdefault(step.name, Difference(step.path, step.name, ours.numel(), count, greatest, cause))

    def output(self, name: str, exact: bool, want: Tensor, near: Tensor, got: Tensor) -> None:
        """An output, beside the reference's end to end (``want``) and from the program's own codes (``near``)."""
        if want.shape != got.shape:
            raise ArtifactError(f"the output {name} has shape {list(got.shape)}, the graph's {list(want.shape)}", way_out=FOREIGN)
        wrong, off = unequal(want, got), unequal(near, got)
        self.count["elements"] += want.numel()
        self.count["differ"] += int(wrong.sum())
        self.greatest = max(self.greatest, gap(want, got, wrong))
        o = self.outputs.setdefault(name, OutputProof(name, exact))
        error = max(o.error, relative(near, got, off))
        drift = max(o.drift, relative(want, got, wrong))
        self.outputs[name] = replace(o, elements=o.elements + want.numel(), differ=o.differ + int(wrong.sum()), drift=drift, error=error)
        if error > BOUND or bool((off & (torch.isnan(near) | torch.isnan(got))).any()):
            cause = "the output differs from the reference's, given the program's own codes"
            self.differences.setdefault(name, Difference(name, name, want.numel(), int(off.sum()), gap(near, got, off), cause))

    def proof(self) -> Proof:
        """What all batches say."""
        r = self.reference
        order = {s.name: i for i, s in enumerate(r.steps)}
        ties = {name: n for name, n in self.ties.items() if n}
        return Proof(
            nodes=len(self.compared), planned=len(r.steps), what="integer nodes", bound=BOUND, greatest=self.greatest, float_nodes=tuple(r.float_nodes),
            ties=sum(ties.values()), tie_nodes=tuple(ties.items()), outputs=tuple(self.outputs.values()),
            missing=tuple(s.name for s in r.steps if s.name not in self.compared),
            differences=tuple(sorted(self.differences.values(), key=lambda d: order.get(d.tensor, len(order)))), **self.count,
        )  # fmt: skip
