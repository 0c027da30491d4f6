"""Non-strict ``torch.export`` as a plain graph: positional inputs, the model's output structure, no guards."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxq.tracers import input_names, tidy


def export(root: nn.Module, example: tuple[Any, ...]) -> tuple[GraphModule, str]:
    """Export ``root``; first with a dynamic batch, then with the example's.

    Returns:
        The graph and what it is specialised to (one line).

    Raises:
        Exception: whatever ``torch.export`` raises for the static batch.
    """
    sizes = [x.shape[0] for x in pytree.tree_leaves(example) if isinstance(x, Tensor) and x.ndim]
    names = input_names(root, len(example))
    whole = ", ".join("x".join(map(str, x.shape)) for x in pytree.tree_leaves(example) if isinstance(x, Tensor))
    shapes = ", ".join("x".join(["batch", *map(str, x.shape[1:])]) for x in pytree.tree_leaves(example) if isinstance(x, Tensor))
    with torch.no_grad():
        if sizes and sizes[0] > 1:
            batch = torch.export.Dim("batch")
            dims = pytree.tree_map(lambda x: {0: batch} if isinstance(x, Tensor) and x.ndim and len(x) == sizes[0] else None, example)
            try:
                program = torch.export.export(root, example, dynamic_shapes=tuple(dims), strict=False)
                return plain(program_module(program), example, names), f"input sizes {shapes}: torch.export, dynamic batch"
            except Exception:
                static = torch.export.export(root, example, strict=False)
        else:
            static = torch.export.export(root, example, strict=False)
        return plain(program_module(static), example, names), f"input sizes {whole}: torch.export, static"


def program_module(program: ExportedProgram) -> GraphModule:
    """The module of an exported program, without in-place operations and without guards on the inputs."""
    names = [str(n.target).split(".")[1] for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    if any(name.endswith("_") for name in names):
        program = program.run_decompositions({})
    module: GraphModule = program.module(check_guards=False)
    return module


def plain(gm: GraphModule, example: tuple[Any, ...], names: list[str]) -> GraphModule:
    """``gm`` with one placeholder per example input and the outputs in their structure; unused nodes, so all checks, are gone.

    A graph whose code generator does not flatten its inputs is only tidied.
    """
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None:
        return tidy(gm)
    graph = Graph()
    values: dict[Node, Any] = {}
    leaves: list[Any] = []
    for name, x in zip(names, example, strict=True):
        leaves += _open(graph, graph.placeholder(name), x)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if len(inputs) != len(leaves):
        raise TypeError(f"the graph takes {len(inputs)} inputs, the example has {len(leaves)}")
    values.update(zip(inputs, leaves, strict=True))
    for node in gm.graph.nodes:
        if node.op == "output":
            flat = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            out = torch.fx.node.map_arg(list(flat), lambda n: values[n])
            graph.output(pytree.tree_unflatten(out, info.out_spec) if info.out_spec is not None else node.args[0])
        elif node.op != "placeholder":
            values[node] = graph.node_copy(node, lambda n: values[n])
    return tidy(GraphModule(gm, graph, type(gm).__name__))


def _open(graph: Graph, node: Any, value: Any) -> list[Any]:
    """One node per leaf of an example input, in pytree order."""
    if not isinstance(value, (tuple, list)):
        return [node]
    return [leaf for i, v in enumerate(value) for leaf in _open(graph, graph.call_function(operator.getitem, (node, i)), v)]
