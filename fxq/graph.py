"""Conventions on the FX graph, and the few helpers that passes and backends share. FX is the only IR of fxq.

Meta that fxq keeps on a node:

======================  =====================================================================================
``shape``               tuple of sizes at the example's batch; for a tuple-valued node a list of such tuples
``dynamic``             tuple of bools, same form: does this size follow the batch?
``dtype``               torch dtype of the value (list for a tuple-valued node)
``grid``                name of the grid that the node's value is rounded to (a key of ``grids(gm)``)
``integer``             True when the target executes this node in integers
``float_why``           why it does not, one line
``narrow``              name of the grid that a weighted layer reads its input on, where it is another than its input's
``int8_layer``          True for a layer that a low-bit scheme keeps in 8 bits
``reads_codes``         names of the inputs that the node reads rounded; where it is absent, integer nodes read
                        rounded values and give them
======================  =====================================================================================
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxq.modules import Quantized, kind_of
from fxq.spec import QParams, QuantSpec


@dataclass(frozen=True)
class Grid:
    """A grid that one or more values share.

    Attributes:
        spec: the codes.
        clamp: an absorbed activation clamp ``(lo, hi)``: the grid must start exactly at ``lo`` and end at or below ``hi``.
        fixed: parameters that follow from the operation, not from data (a sigmoid's or hard sigmoid's output).
        qparams: the calibrated parameters, ``None`` before ``calibrate``.
        how: how its parameters are found, one of :data:`fxq.schemes.ACTIVATIONS`.
        step: the scale that values are divided by, where it is another than the one the codes are multiplied by.
    """

    spec: QuantSpec
    clamp: tuple[float, float | None] | None = None
    fixed: QParams | None = None
    qparams: QParams | None = None
    how: str = "range"
    step: Tensor | None = None

    def __str__(self) -> str:
        return str(self.qparams or self.fixed or self.spec)


def grids(gm: GraphModule) -> dict[str, Grid]:
    """The graph's grids by name (stored in ``gm.meta``; survives copies of the graph)."""
    table: dict[str, Grid] = gm.meta.setdefault("grids", {})
    return table


def grid_of(gm: GraphModule, node: Node) -> Grid | None:
    """Grid that ``node``'s value is rounded to, or ``None`` when it stays float."""
    name = node.meta.get("grid")
    return None if name is None else grids(gm)[name]


def reads_codes(reader: Node, source: Node) -> bool:
    """Does ``reader`` see the value of ``source``, which has a grid, rounded onto it?"""
    if "reads_codes" in reader.meta:
        return source.name in reader.meta["reads_codes"]
    return bool(source.meta.get("integer") or reader.meta.get("integer"))


def module_of(gm: GraphModule, node: Node) -> nn.Module:
    """Module that a ``call_module`` node runs."""
    assert node.op == "call_module", node.format_node()
    return _module_at(gm, str(node.target))


def _module_at(gm: GraphModule, path: str) -> nn.Module:
    """``gm.get_submodule(path)`` without its checks, which are most of what a look at a graph costs."""
    module: Any = gm
    for part in path.split("."):
        module = module._modules[part]
    return module  # type: ignore[no-any-return]


def kind(gm: GraphModule, node: Node) -> str:
    """Canonical kind: those of :data:`fxq.modules.KINDS`, ``input``, ``output``, ``attr``, ``getitem`` or ``opaque``."""
    if node.op == "call_module":
        return kind_of(_module_at(gm, str(node.target)))
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "get_attr":
        return "attr"
    if node.target is operator.getitem:  # of a tensor it is an indexing that has no canonical form
        return "opaque" if isinstance(node.args[0], Node) and isinstance(node.args[0].meta.get("shape"), tuple) else "getitem"
    return "opaque"


def attr(gm: GraphModule, node: Node) -> Any:
    """Value of a ``get_attr`` node."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def float_module(gm: GraphModule, node: Node) -> nn.Module:
    """Module of the node; of a :class:`~fxq.modules.Quantized` one the float ``op`` inside."""
    module = module_of(gm, node)
    return module.op if isinstance(module, Quantized) else module


def data_inputs(node: Node) -> list[Node]:
    """Node arguments in order, positional ones first (a Python scalar is no node)."""
    return list(node.all_input_nodes)


def free_path(gm: GraphModule, wish: str) -> str:
    """``wish``, or ``wish_1``, ``wish_2``, ...: a module path that the graph does not use yet."""
    path, n = wish, 0
    while _has(gm, path):
        n += 1
        path = f"{wish}_{n}"
    return path


def _has(gm: GraphModule, path: str) -> bool:
    value: Any = gm
    for part in path.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def add_module(gm: GraphModule, wish: str, module: nn.Module) -> str:
    """Register ``module`` under a free path near ``wish`` and return that path."""
    module.train(gm.training)
    path = free_path(gm, wish)
    gm.add_submodule(path, module)
    return path


def insert_module(
    gm: GraphModule, after: Node, wish: str, module: nn.Module, args: Sequence[Any], *, like: Node | None = None
) -> Node:
    """New ``call_module`` node behind ``after``; its shape comes from ``like`` or is computed on meta tensors."""
    path = add_module(gm, wish, module)
    with gm.graph.inserting_after(after):
        node = gm.graph.call_module(path, tuple(args))
    if like is not None:
        copy_shape(like, node)
    else:
        infer_node(gm, node)
    if "nn_module_stack" in after.meta:
        node.meta["nn_module_stack"] = after.meta["nn_module_stack"]
    return node


def swap_module(gm: GraphModule, node: Node, module: nn.Module) -> None:
    """Let ``node`` run ``module``. A path that another node still uses is left alone."""
    module.train(gm.training)
    path = str(node.target)
    if any(n is not node and n.op == "call_module" and n.target == node.target for n in gm.graph.nodes):
        path = free_path(gm, path)
    gm.add_submodule(path, module)
    node.target = path


def erase(gm: GraphModule, node: Node, replacement: Node | None = None) -> None:
    """Take ``node`` out; its users read ``replacement`` (default: its first input)."""
    node.replace_all_uses_with(replacement or node.all_input_nodes[0])
    gm.graph.erase_node(node)


def copy_shape(src: Node, dst: Node) -> None:
    """Give ``dst`` the shape, batch-dependence and dtype of ``src``."""
    for key in ("shape", "dynamic", "dtype"):
        if key in src.meta:
            dst.meta[key] = src.meta[key]


def shape(node: Node) -> tuple[int, ...]:
    """Sizes of the node's tensor at the example's batch."""
    return tuple(node.meta["shape"])


def scope_name(node: Node, suffix: str) -> str:
    """``<module path the node was traced in>.<suffix>``: a speaking name for a new module."""
    stack = node.meta.get("nn_module_stack") or {}
    scope = ""
    for value in stack.values():
        path = value[0] if isinstance(value, tuple) else value
        scope = path if isinstance(path, str) else scope
    return f"{scope}.{suffix}" if scope else suffix


def walk(gm: GraphModule, *kinds: str) -> Iterator[tuple[Node, str]]:
    """``(node, kind)`` of a copy of the node list, in order; only the given kinds when there are any."""
    for node in list(gm.graph.nodes):
        k = kind(gm, node)
        if not kinds or k in kinds:
            yield node, k


def tree_shape(value: Any) -> Any:
    """Shape of a tensor as a tuple; of a tuple or list of tensors as a list; otherwise ``None``."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return [tree_shape(v) for v in value]
    if isinstance(value, dict):
        return {k: tree_shape(v) for k, v in value.items()}
    return None


def compare_shapes(a: Any, b: Any) -> Any:
    """``dynamic`` of a value from its shapes at two batch sizes."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else (True,) * len(a)
    if isinstance(a, list) and isinstance(b, list):
        return [compare_shapes(x, y) for x, y in zip(a, b, strict=True)]
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: compare_shapes(a[k], b[k]) for k in a}
    return None


def infer_node(gm: GraphModule, node: Node) -> None:
    """Shape of one new module node from its inputs' shapes, on meta tensors (two batch sizes)."""
    module = module_of(gm, node)
    seen: list[Any] = []
    dtype: Any = None
    meta = {k: v.to("meta") for k, v in [*module.named_parameters(), *module.named_buffers()]}
    for extra in (0, 1):

        def value(n: Node, extra: int = extra) -> Any:
            return _meta_value(n.meta["shape"], n.meta["dynamic"], n.meta["dtype"], extra)

        args = torch.fx.node.map_arg(node.args, value)
        with torch.no_grad():
            out = torch.func.functional_call(module, meta, args)
        seen.append(tree_shape(out))
        dtype = [v.dtype for v in out] if isinstance(out, (tuple, list)) else out.dtype
    node.meta.update(shape=seen[0], dynamic=compare_shapes(*seen), dtype=dtype)


def _meta_value(shape: Any, dynamic: Any, dtype: Any, extra: int) -> Any:
    if isinstance(shape, list):
        return tuple(_meta_value(s, d, t, extra) for s, d, t in zip(shape, dynamic, dtype, strict=True))
    # The first batch-dependent size grows in proportion; exact growth does not matter here, only whether it grows.
    return torch.empty([s * (1 + extra) if d else s for s, d in zip(shape, dynamic, strict=True)], dtype=dtype, device="meta")


def input_names(gm: GraphModule) -> list[str]:
    """Names of the graph's input tensors in order; a list ``x`` of tensors gives ``x_0``, ``x_1``, ..."""
    names: list[str] = []
    for n in gm.graph.nodes:
        if n.op == "placeholder":
            sizes = n.meta.get("shape")
            names += [f"{n.target}_{i}" for i in range(len(sizes))] if isinstance(sizes, list) else [str(n.target)]
    return names


def new_graph_module(root: nn.Module, graph: Graph, name: str) -> GraphModule:
    """GraphModule over ``graph`` in eval mode."""
    return GraphModule(root, graph, name).eval()


def structure(gm: GraphModule) -> list[Any]:
    """What the graph's code depends on: equal lists, equal code."""
    return [(n.name, n.op, n.target, n.args, n.kwargs) for n in gm.graph.nodes]


def finish(gm: GraphModule) -> None:
    """After rewriting: drop dead nodes and unused modules, check the graph, regenerate the code."""
    gm.graph.eliminate_dead_code(_impure)
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()


def _impure(node: Node) -> bool:
    return node.op in ("placeholder", "output")


Rewrite = Callable[[GraphModule, Node], bool]
