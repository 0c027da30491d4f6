"""Float islands: operations without an emitter of fxq's own, written by torch's exporter and spliced into the graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxq.backends.onnx_writer import Writer
from fxq.graph import kind
from fxq.lowering import Issue

GROWTH = 3  # a batch of 1 is exported as 3: torch.export specialises sizes of 0 and 1


@dataclass(frozen=True)
class Island:
    """A connected region of foreign nodes.

    Attributes:
        nodes: its members, in order.
        inputs: tensor nodes that it reads.
        outputs: members that nodes outside read.
        model: torch's export of it, or ``None``.
        fault: why there is no export, or ``None``.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    model: onnx.ModelProto | None = None
    fault: Issue | None = None


def find(gm: GraphModule, foreign: Callable[[Node], bool], opset: int) -> list[Island]:
    """Group the foreign nodes of ``gm`` into regions without a path out and back in, and export each."""
    home: dict[Node, int] = {}
    members: dict[int, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "output" or not _is_tensors(node) or not foreign(node):
            continue
        region = next((home[d] for d in _sources(node) if d in home and not _returns(node, home[d], home, members)), len(members))
        home[node] = region
        members.setdefault(region, []).append(node)
    exports: dict[Any, onnx.ModelProto] = {}
    return [_export(gm, nodes, opset, exports) for nodes in members.values()]


def schedule(gm: GraphModule, islands: list[Island]) -> list[Node | Island]:
    """Nodes and islands in an order in which each stands behind what it reads; numbers and sizes live inside the islands."""
    home = {n: i for i in islands for n in i.nodes}
    done: set[int] = set()
    order: list[Node | Island] = []

    def visit(node: Node) -> None:
        unit: Node | Island = home.get(node, node)
        if id(unit) in done:
            return
        done.add(id(unit))
        for source in unit.inputs if isinstance(unit, Island) else _sources(node):
            visit(source)
        order.append(unit)

    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or _is_tensors(node):
            visit(node)
    return order


def splice(w: Writer, island: Island) -> None:
    """Copy the island's nodes and initializers under its name; ``w.names`` learns its outputs."""
    assert island.model is not None
    graph = island.model.graph
    prefix = f"{w.out(island.nodes[-1])}/island/"
    names = {i.name: w.name(n) for i, n in zip(graph.input, island.inputs, strict=True)}
    made = {o for n in graph.node for o in n.output}
    for o, node in zip(graph.output, island.outputs, strict=True):
        if o.name in made and o.name not in names:
            names[o.name] = w.out(node)
    for t in graph.initializer:
        names[t.name] = w.const(prefix + t.name, numpy_helper.to_array(t))
    for n in graph.node:
        w.nodes.append(_renamed(n, names, prefix))
    for o, node in zip(graph.output, island.outputs, strict=True):
        w.names[node] = names[o.name]


def _renamed(node: onnx.NodeProto, names: dict[str, str], prefix: str) -> onnx.NodeProto:
    new = onnx.NodeProto()
    new.CopyFrom(node)
    new.name = prefix + (node.name or node.output[0])
    del new.metadata_props[:]
    for field in (new.input, new.output):
        values = [n if n == "" else names.get(n, prefix + n) for n in field]
        del field[:]
        field.extend(values)
    for a in new.attribute:
        for sub in [a.g] if a.type == onnx.AttributeProto.GRAPH else list(a.graphs):
            for value in [*sub.input, *sub.output, *sub.initializer, *sub.value_info]:
                value.name = names.get(value.name, prefix + value.name)
            inner = [_renamed(n, names, prefix) for n in sub.node]
            del sub.node[:]
            sub.node.extend(inner)
    return new


def _is_tensors(node: Node) -> bool:
    """Is the value a tensor, or a tuple that holds one? (Numbers and sizes are neither.)"""
    return _has_tensor(node.meta.get("dtype"))


def _has_tensor(dtype: Any) -> bool:
    return any(_has_tensor(d) for d in dtype) if isinstance(dtype, (list, tuple)) else isinstance(dtype, torch.dtype)


def _sources(node: Node) -> Iterator[Node]:
    """Tensor nodes that ``node`` reads, through numbers and sizes computed from them."""
    for i in node.all_input_nodes:
        if i.op in ("placeholder", "get_attr") or _is_tensors(i):
            yield i
        else:
            yield from _sources(i)


def _returns(node: Node, region: int, home: dict[Node, int], members: dict[int, list[Node]]) -> bool:
    """Is there a path from ``region`` to ``node`` through nodes outside of it?"""
    todo = [d for d in _sources(node) if home.get(d) != region]
    seen: set[Node] = set()
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        unit = members[home[n]] if n in home else [n]
        for d in (d for m in unit for d in _sources(m)):
            if home.get(d) == region:
                return True
            todo.append(d)
    return False


def _export(gm: GraphModule, nodes: list[Node], opset: int, exports: dict[Any, onnx.ModelProto]) -> Island:
    """Constants are inputs of the export, so that blocks that differ in their weights only share it."""
    inside = set(nodes)
    needed = _closure(nodes, inside)
    known = set(needed)
    inputs = tuple(dict.fromkeys(i for n in needed for i in n.all_input_nodes if i not in known))
    outputs = tuple(n for n in nodes if _leaves(n, inside))
    bad = next((n for n in outputs if not isinstance(n.meta.get("shape"), tuple)), None)
    way_out = "Replace the operation in the model"
    if bad is not None:
        return Island(tuple(nodes), inputs, outputs, fault=Issue(bad.name, f"{_what(gm, bad)} gives a tuple that is used as a whole", way_out))
    key = _structure(needed, inputs, outputs)
    try:
        if key not in exports:
            exports[key] = _run_exporter(_cut_out(gm, needed, inputs, outputs), inputs, opset)
        fault = _unfit(exports[key], outputs, opset)
    except Exception as e:
        fault = f"torch's exporter refuses it: {_cause(e)}"
    if fault is None:
        return Island(tuple(nodes), inputs, outputs, exports[key])
    what = ", ".join(dict.fromkeys(_what(gm, n) for n in nodes))
    return Island(tuple(nodes), inputs, outputs, fault=Issue(nodes[0].name, f"fxq has no ONNX form of {what}; {fault}", way_out))


def _structure(needed: list[Node], inputs: tuple[Node, ...], outputs: tuple[Node, ...]) -> str:
    """Text that is equal for regions with equal operations, arguments and input types."""
    number = {n: f"%{i}" for i, n in enumerate([*inputs, *needed])}

    def text(a: Any) -> str:
        if isinstance(a, Node):
            return number[a]
        if isinstance(a, (tuple, list)):
            return f"[{', '.join(text(v) for v in a)}]"
        if isinstance(a, slice):
            return f"slice({text(a.start)}, {text(a.stop)}, {text(a.step)})"
        return f"{{{', '.join(f'{key}: {text(v)}' for key, v in a.items())}}}" if isinstance(a, dict) else repr(a)

    types = [(n.meta["shape"], n.meta["dynamic"], n.meta["dtype"]) for n in inputs]
    return repr(
        (
            types,
            [(n.op, str(n.target) if n.op != "call_function" else id(n.target), text(n.args), text(n.kwargs)) for n in needed],
            [number[n] for n in outputs],
        )
    )


def _closure(nodes: list[Node], inside: set[Node]) -> list[Node]:
    """The members and the numbers and sizes that they need, in graph order."""
    wanted, todo = set(inside), list(nodes)
    while todo:
        for i in todo.pop().all_input_nodes:
            if i not in wanted and i.op not in ("placeholder", "get_attr") and not _is_tensors(i):
                wanted.add(i)
                todo.append(i)
    return [n for n in nodes[0].graph.nodes if n in wanted]


def _leaves(node: Node, inside: set[Node]) -> bool:
    """Does a tensor consumer outside read the member? (Sizes taken from it outside are copied into the island that needs them.)"""
    todo, seen = list(node.users), set[Node]()
    while todo:
        u = todo.pop()
        if u in inside or u in seen:
            continue
        seen.add(u)
        if u.op == "output" or _is_tensors(u):
            return True
        todo.extend(u.users)
    return False


def _cut_out(gm: GraphModule, needed: list[Node], inputs: tuple[Node, ...], outputs: tuple[Node, ...]) -> GraphModule:
    graph = Graph()
    new: dict[Node, Node] = {n: graph.placeholder(f"input_{i}") for i, n in enumerate(inputs)}
    for node in needed:
        new[node] = graph.node_copy(node, lambda n: new[n])
    graph.output(tuple(new[n] for n in outputs))
    return GraphModule(gm, graph, "Island").eval()


def _example(node: Node) -> Tensor:
    grow = GROWTH if any(d and s == 1 for s, d in zip(node.meta["shape"], node.meta["dynamic"], strict=True)) else 1
    sizes = [s * grow if d else s for s, d in zip(node.meta["shape"], node.meta["dynamic"], strict=True)]
    return torch.zeros(sizes, dtype=node.meta["dtype"])


def _run_exporter(sub: GraphModule, inputs: tuple[Node, ...], opset: int) -> onnx.ModelProto:
    auto = torch.export.Dim.AUTO
    dims = tuple({d: auto for d, moves in enumerate(n.meta["dynamic"]) if moves} for n in inputs)
    noise = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript")
    levels = [log.level for log in noise]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for log in noise:
            log.setLevel(logging.CRITICAL)
        try:
            args = tuple(_example(n) for n in inputs)
            program = torch.onnx.export(sub, args, dynamo=True, opset_version=opset, verbose=False, dynamic_shapes=dims)
        finally:
            for log, level in zip(noise, levels, strict=True):
                log.setLevel(level)
    assert program is not None
    return program.model_proto


def _unfit(model: onnx.ModelProto, outputs: tuple[Node, ...], opset: int) -> str | None:
    """Why an export cannot be spliced in; ``None`` when it can."""
    versions = {o.domain: o.version for o in model.opset_import if o.domain not in ("", "ai.onnx")}
    foreign = sorted({n.domain for n in model.graph.node if n.domain not in ("", "ai.onnx")})
    if foreign or model.functions:
        return f"its export needs operations of {', '.join(foreign) or ', '.join(versions)}"
    if any(o.version != opset for o in model.opset_import if o.domain in ("", "ai.onnx")):
        return f"torch's exporter does not write opset {opset}"
    for o, node in zip(model.graph.output, outputs, strict=True):
        dims = o.type.tensor_type.shape.dim
        if len(dims) == len(node.meta["dynamic"]) and any(d and not s.dim_param for s, d in zip(dims, node.meta["dynamic"], strict=True)):
            return "its export is fixed to the example's batch size"
    return None


def _what(gm: GraphModule, node: Node) -> str:
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__ if kind(gm, node) == "opaque" else kind(gm, node)
    return str(getattr(node.target, "__name__", node.target))


def _cause(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    lines = [line for line in str(e).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(e).__name__
