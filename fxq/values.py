"""Every value of a graph on one batch, and what a node gives for given inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

Look = Callable[[Node, Any], Any]
"""``look(node, value)``; a value other than None takes the place of the node's."""


class Watched(Interpreter):
    """Runs a graph, frees what is read for the last time, and shows every value to ``look``."""

    def __init__(self, gm: GraphModule, look: Look) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.look = look

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        other = self.look(n, value)
        return value if other is None else other


def watch(gm: GraphModule, batch: tuple[Any, ...], look: Look) -> Any:
    """Run ``gm`` on a batch without gradients; the model's output."""
    with torch.inference_mode():
        return Watched(gm, look).run(*batch)


def values(gm: GraphModule, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """Node name -> its float tensor on the batch; nodes of other values, and the output, are left out."""
    found: dict[str, Tensor] = {}

    def keep(node: Node, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and node.op != "output":
            found[node.name] = value

    watch(gm, batch, keep)
    return found
