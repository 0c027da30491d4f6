"""The integer reference: a converted graph on codes, equal to what ONNX Runtime's fused kernels give.

Integer nodes run the kernels of :mod:`fxq.kernels`. Everything else is a *float island*: its torch module on dequantized float32
values. Islands are not exact bit for bit (``exp``, ``erf`` and the order of sums differ by runtime); ``Reference.float_nodes`` lists them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from fxq import kernels, numerics
from fxq.errors import FxqError
from fxq.graph import attr, kind, module_of
from fxq.kernels import Codes
from fxq.spec import QParams


@dataclass(frozen=True, eq=False)
class Step:
    """One fused kernel of the artifact.

    Attributes:
        name: tensor of the file that holds the result: the fake-quantizer's path, or the float value's name.
        kind: kind of the core node; ``quantize`` for a plain QuantizeLinear, ``requantize`` for a change of grids.
        core: the node that the kernel stands for.
        result: the node whose value it gives: the ``fake_quantize`` node, or the core itself (float output).
        operands: nodes on grids and Python scalars, in the kernel's order; of ``quantize`` the float node.
        module: the module that the kernel reads its constants from.
        split, index: for a part of a split, that node and which part.
    """

    name: str
    kind: str
    core: Node
    result: Node
    operands: tuple[Node | float, ...]
    module: nn.Module
    split: Node | None = None
    index: int = 0

    @property
    def gives_float(self) -> bool:
        """The result has no grid."""
        return self.result is self.core

    @property
    def path(self) -> str:
        """Module path, or the node's name."""
        return value_name(self.core)


def value_name(node: Node) -> str:
    """Name of a node's float value in the file: its module path or its own name."""
    return str(node.target) if node.op in ("call_module", "get_attr", "placeholder") else node.name


def plan(gm: GraphModule, fused: bool = True) -> list[Step]:
    """The fused kernels of a converted graph, in order: one for each fake-quantizer and each integer node with float output.

    With ``fused=False`` only the fake-quantizers: every operation runs in float between its Q/DQ nodes.
    """
    steps: list[Step] = []
    for n in gm.graph.nodes:
        k = kind(gm, n)
        if k == "fake_quantize":
            steps.append(_rounded(gm, n, fused))
        elif fused and k in kernels.FLOAT_OUTPUT and kernels.is_integer(gm, n) and not any(_is_grid(gm, u) for u in n.users):
            steps.append(Step(value_name(n), k, n, n, tuple(n.args), module_of(gm, n)))
    return steps


def _rounded(gm: GraphModule, fq: Node, fused: bool) -> Step:
    source, module, name = fq.all_input_nodes[0], module_of(gm, fq), str(fq.target)
    k = kind(gm, source)
    if k == "fake_quantize":
        return Step(name, "requantize", source, fq, (source,), module)
    if fused and len(source.users) == 1 and _runs_on_codes(gm, source, module):
        if k == "getitem":
            split, index = source.args
            assert isinstance(split, Node) and isinstance(index, int)
            return Step(name, "split", source, fq, tuple(split.args), module_of(gm, split), split, index)  # type: ignore[arg-type]
        operands = kernels.operand_order(source) if k in kernels.BINARY else tuple(source.args)
        return Step(name, k, source, fq, operands, module_of(gm, source))  # type: ignore[arg-type]
    return Step(name, "quantize", source, fq, (source,), module)


def _runs_on_codes(gm: GraphModule, source: Node, fq: Any) -> bool:
    """A kernel gives the codes of ``fq``: of a binary grid only those that sum or move."""
    if not kernels.is_integer(gm, source):
        return False
    return fq.spec.kind != "binary" or kernels.gives_sign(gm, source) or kind(gm, source) in kernels.MOVERS


def _is_grid(gm: GraphModule, n: Any) -> bool:
    return isinstance(n, Node) and kind(gm, n) == "fake_quantize"


Observe = Callable[[Step, Any], Any]


class Reference:
    """Runs a converted graph on codes, on the CPU.

    Args:
        gm: a converted graph.
        fused: integer nodes run integer kernels, as ONNX Runtime's; otherwise everything between two fake-quantizers runs in
            float: what a Q/DQ file says word for word, and what can be said of a runtime whose kernels are not known here (TensorRT).

    Attributes:
        steps: the fused kernels, see :func:`plan`; ``by_result`` finds them by the node whose value they give.
        islands: the nodes that run in float; ``float_nodes``: their names.
        rounding: while ``observe`` sees a ``quantize`` step, the float value that it rounds.
    """

    def __init__(self, gm: GraphModule, fused: bool = True) -> None:
        on_cpu = all(t.device.type == "cpu" for t in [*gm.parameters(), *gm.buffers()])
        self.gm = gm if on_cpu else copy.deepcopy(gm).cpu()
        self.fused = fused
        self.steps = plan(self.gm, fused)
        self.by_result = {s.result: s for s in self.steps}
        self._inside = self._fused_nodes()
        self._free = self._last_reads()
        quiet = ("input", "output", "attr", "fake_quantize")
        self.islands = [n for n in self.gm.graph.nodes if n not in self._inside and n not in self.by_result and kind(self.gm, n) not in quiet]
        self.float_nodes = [value_name(n) for n in self.islands]
        self.rounding: Any = None

    def _fused_nodes(self) -> set[Node]:
        inside = {s.core for s in self.steps if s.kind not in ("quantize", "requantize") and not s.gives_float}
        inside |= {n for n in self.gm.graph.nodes if kind(self.gm, n) == "split" and n.users and all(u in inside for u in n.users)}
        return inside

    def __call__(self, *inputs: Any) -> Any:
        """Outputs of the model, its structure, as dequantized float32 tensors."""
        return self.walk(inputs)

    def run(self, *inputs: Any, watch: set[str] | None = None) -> dict[str, Tensor]:
        """Codes of the fake-quantizers by path (float results by name); only those in ``watch`` when it is given."""
        seen: dict[str, Tensor] = {}

        def observe(step: Step, value: Any) -> None:
            if watch is None or step.name in watch:
                seen[step.name] = value.codes if isinstance(value, Codes) else value

        self.walk(inputs, observe)
        return seen

    def walk(self, inputs: tuple[Any, ...], observe: Observe | None = None) -> Any:
        """Run the graph; ``observe(step, value)`` sees every step's result and may return another value to go on with.

        Raises:
            FxqError: for another number of inputs than the graph takes, or something that is no tensor.
        """
        env: dict[Node, Any] = {}
        wanted = sum(n.op == "placeholder" for n in self.gm.graph.nodes)
        if len(inputs) != wanted or not all(isinstance(x, Tensor) for x in tree_leaves(inputs)):
            kinds = ", ".join(type(x).__name__ for x in inputs) or "none"
            raise FxqError(f"the model takes {wanted} inputs, given are {kinds}", way_out="Pass tensors, one for each input of the model")
        given = iter(inputs)
        with torch.inference_mode():
            for n in self.gm.graph.nodes:
                if n in self._inside:
                    continue
                step = self.by_result.get(n)
                if step is not None:
                    value = self._kernel(step, env)
                    other = observe(step, value) if observe is not None else None
                    self.rounding = None
                    env[n] = value if other is None else other
                elif n.op == "placeholder":
                    env[n] = tree_map(Tensor.cpu, next(given))
                elif n.op == "output":
                    return tree_map(_real, plain(map_arg(n.args[0], env.__getitem__)))
                else:
                    env[n] = self._float(n, env)
                for dead in self._free.get(n, ()):
                    del env[dead]
        raise AssertionError("a graph without output")

    def _last_reads(self) -> dict[Node, list[Node]]:
        """Reader -> values that nobody reads after it. A fused core reads nothing in its own place; its step's result does."""
        last: dict[Node, Node] = {}
        for n in self.gm.graph.nodes:
            step = self.by_result.get(n)
            reads = [] if n in self._inside else n.all_input_nodes if step is None else [a for a in step.operands if isinstance(a, Node)]
            last.update(dict.fromkeys(reads, n))
        free: dict[Node, list[Node]] = {}
        for value, reader in last.items():
            free.setdefault(reader, []).append(value)
        return free

    def _kernel(self, step: Step, env: dict[Node, Any]) -> Any:
        if step.gives_float:
            return kernels.float_output(step.module, [env[a] for a in step.operands])  # type: ignore[index]
        fq: Any = module_of(self.gm, step.result)
        return Codes(self._codes(step, env, fq.rounding), fq.qparams)

    def _codes(self, step: Step, env: dict[Node, Any], qp: QParams) -> Tensor:
        """The step's codes, rounded onto the grid ``qp``."""
        if step.kind in ("quantize", "requantize"):
            value = env[step.operands[0]]  # type: ignore[index]
            self.rounding = value
            return value.onto(qp) if isinstance(value, Codes) else numerics.quantize(value, qp)
        rank = len(step.core.meta["shape"]) if step.kind in kernels.BINARY else 0
        xs = [env[a] if isinstance(a, Node) else kernels.constant(a, qp, rank) for a in step.operands]
        if step.kind == "split":
            return kernels.part(step.module, step.index, xs[0], qp)
        return kernels.KERNELS[step.kind](step.module, xs, qp)

    def _float(self, n: Node, env: dict[Node, Any]) -> Any:
        """A float island's node, in torch on dequantized values."""
        if n.op == "get_attr":
            return attr(self.gm, n)
        args, kwargs = (tree_map(_real, map_arg(v, env.__getitem__)) for v in (n.args, n.kwargs))
        if n.op == "call_module":
            return module_of(self.gm, n)(*args, **kwargs)
        if n.op == "call_method":
            return getattr(args[0], str(n.target))(*args[1:], **kwargs)
        return n.target(*args, **kwargs)  # type: ignore[operator]


def plain(v: Any) -> Any:
    """Ordinary lists and dicts for those of a graph, which cannot be changed."""
    if isinstance(v, dict):
        return {k: plain(x) for k, x in v.items()}
    if type(v) is tuple:
        return tuple(plain(x) for x in v)
    return [plain(x) for x in v] if isinstance(v, list) else v


def _real(v: Any) -> Any:
    return v.real() if isinstance(v, Codes) else v
