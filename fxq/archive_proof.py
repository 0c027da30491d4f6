"""Proof of an archive: the model that it holds computes the same bits as the one that was lowered, node by node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from fxq.archive_graph import own_graph


@dataclass(frozen=True)
class ArchiveProof:
    """What was compared, bit for bit. ``print(proof)`` says it in words.

    Attributes:
        batches: batches that were run. nodes: of the graph. elements: of the results of all nodes. differ: how many of them differ.
        first: node where the first difference arose, or None.
    """

    batches: int
    nodes: int
    elements: int
    differ: int
    first: str | None = None

    @property
    def ok(self) -> bool:
        """Something was compared, and all of it is the same."""
        return self.batches > 0 and self.elements > 0 and self.differ == 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        wrong = f"NOT the same: first at {self.first}" if self.differ else "nothing was compared"
        said = "the archive computes the same bits as the model" if self.ok else wrong
        return f"{self.differ:,} of {self.elements:,} elements differ ({self.nodes} nodes, batches: {self.batches}); {said}"


def verify(gm: GraphModule, data: bytes, where: str, batches: Iterable[tuple[Any, ...]]) -> ArchiveProof:
    """Read the archive and run its graph beside ``gm``, both in eval mode with the same random numbers, on the CPU.

    Args:
        data: the archive. where: its name for errors. batches: tuples of positional inputs.

    Raises:
        ArtifactError: when the file is damaged, or its graph is another one.
    """
    again = own_graph(gm, data, where)
    modes = [(m, m.training) for m in gm.modules()]
    try:
        gm.eval()
        return _compare(gm, again, batches)
    finally:
        for m, training in modes:
            m.training = training


def _compare(gm: GraphModule, again: GraphModule, batches: Iterable[tuple[Any, ...]]) -> ArchiveProof:
    count, elements, differ, first = 0, 0, 0, None
    for batch in batches:
        ours, theirs = _values(gm, batch), _values(again, batch)
        for name, value in ours.items():
            for a, b in zip_longest(tree_leaves(value), tree_leaves(theirs[name])):
                n, wrong = _unequal(a, b)
                elements, differ = elements + n, differ + wrong
                first = name if wrong and first is None else first
        count += 1
    return ArchiveProof(count, len(gm.graph.nodes), elements, differ, first)


def _values(gm: GraphModule, batch: tuple[Any, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            found[n.name] = value = super().run_node(n)
            return value

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Recorder(gm, garbage_collect_values=False).run(*(v.cpu().clone() if isinstance(v, Tensor) else v for v in batch))
    return found


def _unequal(a: Any, b: Any) -> tuple[int, int]:
    """Elements, and how many differ in any bit."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 1, int(type(a) is not type(b) or repr(a) != repr(b))
    if a.dtype != b.dtype or a.shape != b.shape:
        return a.numel(), max(1, a.numel())
    x, y = (t.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8) for t in (a, b))
    return a.numel(), int((x != y).any(1).sum())
