"""A converted graph as one that runs on bits: every step of the reference becomes kernels on packed values, codes or floats, with the reference's numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxq import graph as g
from fxq.backends.reference import Reference
from fxq.bitwise import code_modules, layers, modules
from fxq.bitwise.choices import CODES, FLOAT, Chooser, Form
from fxq.bitwise.thresholds import Cut


@dataclass(frozen=True, eq=False)
class Value:
    """Where the result of a step of the reference is found in a lowered graph.

    Attributes:
        node: its name.
        form: how it is held.
        channels: of packed values.
        planes: bit planes of packed values.
        order: which channel of the reference stands at each place, where a shuffle was taken into the layer in front of it, or ``None``.
    """

    node: str
    form: Form
    channels: int = 0
    planes: int = 0
    order: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Lowered:
    """What lowering gives.

    Attributes:
        graph_module: the lowered graph. Packed values are int64; ``node.meta["step"]`` names the reference's step, ``node.meta["form"]`` how it is held.
        values: the results of the reference's steps, by the step's name; a step that vanished into another has none.
        layers: paths of the layers that run on bits. reasons: why other weighted layers do not, by path.
    """

    graph_module: GraphModule
    values: dict[str, Value]
    layers: dict[str, modules.BitConv]
    reasons: dict[str, str]


def lower_graph(gm: GraphModule) -> GraphModule:
    """The lowered graph of a converted one; ``gm`` is left as it is.

    Args:
        gm: a converted graph (docs/architecture.md).

    Returns:
        A graph of the same inputs and outputs with the numbers of :class:`fxq.backends.reference.Reference`. It runs on the CPU.
    """
    return lower(gm).graph_module


def lower(gm: GraphModule) -> Lowered:
    """:func:`lower_graph` with what was found on the way."""
    ref = Reference(gm)
    chooser = Chooser(ref)
    chooser.run()
    return _Writer(chooser).write()


class _Writer:
    """Writes the lowered graph: nodes in the order of the converted one."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser, self.gm = chooser, chooser.gm
        self.out = GraphModule(nn.Module(), Graph(), "BitGraph").eval()
        self.graph = self.out.graph
        self.made: dict[tuple[Node, Form], Node] = {}
        self.pooled: dict[tuple[Node, Any], Node] = {}
        self.values: dict[str, Value] = {}

    def write(self) -> Lowered:
        ref = self.chooser.ref
        for n in self.gm.graph.nodes:
            step = ref.by_result.get(n)
            if step is not None:
                if n in self.chooser.choices:
                    self._step(n, step.name)
            elif n.op in ("placeholder", "output") or n in self.chooser.wants:
                self.made[n, FLOAT] = self._copied(n)
        g.finish(self.out)
        # Placeholders, outputs and islands keep their shapes; what holds packed words has none of the converted graph's.
        return Lowered(self.out, self.values, self.chooser.bits, {**self._float_layers(), **self.chooser.reasons})

    def _float_layers(self) -> dict[str, str]:
        found = {}
        for n in self.chooser.ref.islands:
            if g.kind(self.gm, n) in ("conv", "conv_transpose", "linear", "embedding"):
                found[str(n.target)] = str(n.meta.get("float_why", "it reads a float value, or its result has no grid"))
        return found

    def _step(self, n: Node, name: str) -> None:
        choice = self.chooser.choices[n]
        args = [self._value(operand, form) for operand, form in choice.reads]
        for pool in choice.pools:
            key = args[0], pool.key
            if key not in self.pooled:
                self.pooled[key] = self._call(f"{name}_pooled", pool, args)
            args = [self.pooled[key]]
        node = args[0]
        if choice.make is not None:
            node = self._call(name, choice.make(), args)
            node.meta.update(step=name, form=str(choice.form.kind))
            if choice.form.kind != "bits":
                g.copy_shape(n, node)
        self.made[n, choice.form] = node
        self._note(n, name, node, choice.form)

    def _note(self, n: Node, name: str, node: Node, form: Form) -> None:
        if form.kind == "bits":
            planes = layers.PLANES[self.chooser.grid(n).spec.kind]
            self.values[name] = Value(node.name, form, self.chooser.channels(n, form.axis), planes, self.chooser.turned.get(n))
        else:
            self.values[name] = Value(node.name, form)

    def _call(self, path: str, module: nn.Module, args: list[Node]) -> Node:
        module.eval()
        return self.graph.call_module(g.add_module(self.out, path, module), tuple(args))

    def _value(self, n: Node, form: Form) -> Node:
        """The node that holds the value of ``n`` in a form; made from another form where nobody made it yet."""
        found = self.made.get((n, form))
        if found is not None:
            return found
        held = next(f for (node, f) in self.made if node is n)
        if held.kind == "bits" and (n, CODES) not in self.made:
            module = modules.Unpack(self.chooser.channels(n, held.axis), held.axis)
            self.made[n, CODES] = node = self._call(f"{n.target}_codes", module, [self.made[n, held]])
            g.copy_shape(n, node)
        return self.made[n, CODES] if form == CODES else self._value_from_codes(n, form)

    def _value_from_codes(self, n: Node, form: Form) -> Node:
        qp = self.chooser.grid(n)
        if form.kind == "float":
            module: nn.Module = code_modules.Real(qp)
        else:
            channels, rank = self.chooser.channels(n, form.axis), len(g.shape(n))
            module = modules.Pack(Cut(-1, 1), layers.PLANES[qp.spec.kind], channels, form.axis, rank)
        node = self._call(f"{n.target}_{'real' if form.kind == 'float' else 'bits'}", module, [self.made[n, CODES]])
        if form.kind == "float":
            g.copy_shape(n, node)
        self.made[n, form] = node
        return node

    def _copied(self, n: Node) -> Node:
        """A placeholder, an output, a constant or a float island."""

        def real(a: Node) -> Node:
            return self._value(a, FLOAT)

        args, kwargs = map_arg(n.args, real), map_arg(n.kwargs, real)
        target: Any = n.target
        if n.op == "call_module":
            target = g.add_module(self.out, str(n.target), copy.deepcopy(g.module_of(self.gm, n)).eval())
        elif n.op == "get_attr":
            target = g.free_path(self.out, str(n.target).replace(".", "_"))
            self.out.register_buffer(target, copy.deepcopy(g.attr(self.gm, n)).detach())
        node = self.graph.create_node(n.op, target, args, kwargs, name=n.name, type_expr=n.type)
        for key in ("shape", "dynamic", "dtype", "nn_module_stack", "float_why"):
            if key in n.meta:
                node.meta[key] = n.meta[key]
        return node
