"""What a proof says: the differences it found, what holds exactly, what within a bound, and the verdict.

Two kinds of results are told apart, because two kinds of promises can be kept:

- *Integer nodes* must be exactly equal, element by element, each given the runtime's own inputs. So must outputs that no float arithmetic precedes.
- *Float operations* (an island: a bilinear resize, softmax, layer norm, ...) run in the runtime's own float kernels, whose sums and
  exponentials differ in the last bits. What they give must agree within :data:`BOUND` of the greatest value of the tensor, again given the
  runtime's own inputs. Where such a value is rounded onto a grid, the code may be one step off only if the value lies within that
  bound of the half step: a tie, counted by name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fxq import tables_html

BOUND = 1e-4
"""Greatest allowed difference of a float operation's result, relative to the greatest magnitude in the tensor."""
HALF_BOUND = 1e-2
"""The same where the file computes in float16 between its Q/DQ nodes (11 bits, sums included)."""
FLIPS = 1e-3
"""Share of an integer output (an argmax, say) of float operations that may differ: where two floats are as good as equal."""


@dataclass(frozen=True)
class Difference:
    """A node whose result differs although it was given the runtime's own inputs.

    Attributes:
        node: module path (or node name) of the operation; ``tensor``: its tensor in the file.
        elements, differ: how many there are, and how many differ.
        greatest: greatest difference, in steps of the grid (of a float result: absolute).
        cause: what the file and the fused graph say about it.
    """

    node: str
    tensor: str
    elements: int
    differ: int
    greatest: float
    cause: str

    def __str__(self) -> str:
        return f"{self.node}: {self.differ} of {self.elements} elements differ by up to {self.greatest:g}; {self.cause}"


@dataclass(frozen=True)
class OutputProof:
    """One output of the model.

    Attributes:
        name: of the file's output.
        exact: no float arithmetic precedes it: it has to be equal end to end.
        elements, differ: end to end, the runtime fully optimized.
        drift: greatest difference end to end, relative to the output's greatest magnitude.
        error: the same with the runtime's own codes at the integer nodes: what :data:`BOUND` is for.
    """

    name: str
    exact: bool
    elements: int = 0
    differ: int = 0
    drift: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Proof:
    """Result of :func:`fxq.proof.verify`. ``print(proof)`` says it in words.

    Attributes:
        elements, differ: of the model's outputs, end to end (runtime fully optimized).
        greatest: greatest difference of an output, in steps of its grid (of a float output: absolute).
        nodes, planned: fused nodes that were compared with the runtime's own inputs, and those that the graph has.
        hidden, hidden_differ: elements of these nodes.
        ties: elements one step off where a float operation's result was rounded next to a half step; ``tie_nodes`` says how many where.
        batches: batches that were run.
        bound: what was allowed to float operations, see :data:`BOUND`.
        what: the ``nodes``: fused integer nodes, or quantized tensors of a file that does not fuse.
        outputs: each output, exact or within the bound.
        float_nodes: operations that run in float, which no integer arithmetic can promise.
        missing: tensors of the plan that the runtime's optimizer renamed or removed.
        differences: nodes that differ, in the order of the graph (of the first batch in which they do).
    """

    elements: int
    differ: int
    greatest: float
    nodes: int
    planned: int
    hidden: int
    hidden_differ: int
    ties: int
    batches: int
    bound: float = BOUND
    what: str = "integer nodes"
    outputs: tuple[OutputProof, ...] = ()
    tie_nodes: tuple[tuple[str, int], ...] = ()
    float_nodes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()

    @property
    def first(self) -> str | None:
        """Module path of the first node that differs."""
        return self.differences[0].node if self.differences else None

    @property
    def compared(self) -> bool:
        """Something was compared."""
        return self.batches > 0 and self.elements > 0 and (self.nodes > 0 or self.planned == 0)

    @property
    def ok(self) -> bool:
        """Integer nodes and the outputs without float arithmetic before them are exactly equal, everything else is within the bound."""
        return self.compared and not self.differences and not any(o.exact and o.differ for o in self.outputs)

    @property
    def exact(self) -> bool:
        """Every element of every node and output is equal."""
        return self.ok and self.differ == 0 and self.ties == 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ok": self.ok, "exact": self.exact, "first": self.first}

    def __str__(self) -> str:
        lines = [
            f"{self.hidden_differ} of {self.hidden} elements differ ({self.nodes} of {self.planned} {self.what} compared, "
            f"each given the runtime's own inputs; {_count(self.batches, 'batch', 'batches')})",
            *self._outputs(True), *self._outputs(False),
        ]  # fmt: skip
        if self.ties:
            where = ", ".join(f"{name} {n}" for name, n in self.tie_nodes[:3]) + (", ..." if len(self.tie_nodes) > 3 else "")
            lines.append(f"besides, {_count(self.ties, 'code is', 'codes are')} one step off where a float result lies next to a half step: {where}")
        if self.missing:
            lines.append(f"not seen in the fused graph: {_some(self.missing)}")
        if self.float_nodes:
            lines.append(f"{_count(len(self.float_nodes), 'operation runs', 'operations run')} in float: {_some(self.float_nodes)}")
        return "\n".join([*lines, self.verdict])

    def _repr_html_(self) -> str:
        return tables_html.of_proof(self)

    def _outputs(self, exact: bool) -> list[str]:
        some = [o for o in self.outputs if o.exact == exact]
        if not some:
            return []
        elements, differ = sum(o.elements for o in some), sum(o.differ for o in some)
        line = f"{_count(len(some), 'output', 'outputs')}" + ("" if exact else " behind float operations")
        line += f": {differ} of {elements} elements differ end to end"
        if differ:
            line += f", by up to {max(o.drift for o in some):.2g} of the greatest value"
        if not exact:
            line += f"; {max(o.error for o in some):.2g} of it given the runtime's own codes (allowed: {self.bound:g})"
        return [line]

    @property
    def verdict(self) -> str:
        """The last line of the text."""
        if not self.compared:
            return "not proven: nothing was compared"
        if self.differences:
            return f"not proven: the first node that differs is {self.differences[0]}"
        if not self.ok:
            return "not proven: an output that no float operation precedes differs"
        if self.exact:
            return "proven: every element is equal"
        return f"proven: {self.what} are equal{' but for these' if self.ties else ''}, outputs behind float operations are within the bound"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
