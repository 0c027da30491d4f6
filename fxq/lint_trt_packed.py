"""Projections that are packed into one product (queries, keys and values of attention): the builder takes them apart, and computes in float."""

from __future__ import annotations

from collections.abc import Iterator

from fxq.lint_trt_graph import Graph, Node

CUTS = ("Slice", "Split", "Gather")
PASSED = (*CUTS, "Add", "Mul", "Div", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "QuantizeLinear", "DequantizeLinear")
"""What may stand between the packed product and the product of two of its parts."""
LEAST = 3
"""Parts from which the builder takes the product apart (two stay whole)."""


def packed(graph: Graph, node: Node) -> bool:
    """Do two of three or more parts of this product's result, turned by a Transpose, meet in one MatMul?

    Seen with TensorRT-RTX 1.7.1, with one weight scale per output channel; with one scale in all the parts stay int8.
    """
    slots: dict[int, set[int]] = {}
    cuts: set[str] = set()
    turned = False
    for reader, slot in _reach(graph, node):
        if reader.op == "MatMul":
            slots.setdefault(id(reader), set()).add(slot)
        turned = turned or reader.op == "Transpose"
        if reader.op in CUTS:
            cuts.update(o for o in reader.outputs if o)
    return turned and len(cuts) >= LEAST and any(found == {0, 1} for found in slots.values())


def _reach(graph: Graph, node: Node) -> Iterator[tuple[Node, int]]:
    """``(reader, slot)`` of everything that the result flows into through operators that pass it on; products end it."""
    todo, seen = [o for o in node.outputs if o], set()
    while todo:
        name = todo.pop()
        for reader, slot in graph.users.get(name, ()):
            if (id(reader), slot) in seen:
                continue
            seen.add((id(reader), slot))
            yield reader, slot
            others = [i for i in reader.inputs if i and i != name]
            if reader.op in PASSED and all(graph.constant(i) for i in others):
                todo += [o for o in reader.outputs if o]
