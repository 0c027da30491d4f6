"""Which kernel runs each step of the reference, and what form it wants its operands in: packed bits, 8-bit codes or float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import kernels, numerics
from fxq.backends.reference import Reference, Step
from fxq.bitwise import code_modules, int8_layers, layers, modules, thresholds
from fxq.bitwise.pools import is_pool
from fxq.graph import kind, module_of, shape
from fxq.modules import WEIGHTED, IndexSelect
from fxq.spec import QParams


class Form(NamedTuple):
    """How a value is held: ``bits`` with channels along ``axis``, ``codes`` or ``float``."""

    kind: str
    axis: int = 0


RANKS: dict[type[nn.Module], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2}
CODES, FLOAT = Form("codes"), Form("float")


@dataclass(frozen=True, eq=False)
class Choice:
    """How a step runs.

    Attributes:
        form: of the result.
        reads: operands (nodes of the converted graph) and the forms that they are read in.
        make: maker of the module; without one the result is the operand itself.
        pools: max pools of the (float) operand in front of the module; steps share them.
    """

    form: Form
    reads: list[tuple[Node, Form]]
    make: Callable[[], nn.Module] | None
    pools: tuple[code_modules.FloatMaxPool, ...] = ()


@dataclass(eq=False)
class Chooser:
    """Goes through a converted graph from its end, so that every step knows how its result is read.

    Attributes:
        ref: the reference of the graph.
        wants: forms in which the value of a node is read.
        choices: by the node that gives a step's result.
        turned: nodes whose channels are moved, because a shuffle behind them is taken into the rows of the layer: which channel stands where.
        bits: the layers that run on bits, by step name; reasons: why the others do not.
    """

    ref: Reference
    wants: dict[Node, set[Form]] = field(default_factory=dict)
    choices: dict[Node, Choice] = field(default_factory=dict)
    turned: dict[Node, Tensor] = field(default_factory=dict)
    bits: dict[str, modules.BitConv] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    _layers: dict[Node, layers.BitLayer | str] = field(default_factory=dict)

    @property
    def gm(self) -> GraphModule:
        return self.ref.gm

    def run(self) -> None:
        """Choose for every step whose result is read."""
        for n in reversed(self.gm.graph.nodes):
            step = self.ref.by_result.get(n)
            if step is not None and n in self.wants:
                self.choices[n] = choice = self._choose(step, self.wants[n])
                for operand, form in choice.reads:
                    self.wants.setdefault(operand, set()).add(form)
            elif n.op == "output" or (n in self.ref.islands and n in self.wants):
                for operand in n.all_input_nodes:
                    self.wants.setdefault(operand, set()).add(FLOAT)

    # ------------------------------------------------------------ what a step may know

    def grid(self, n: Node) -> QParams:
        """Grid of a ``fake_quantize`` node as its readers see it."""
        fq: Any = module_of(self.gm, n)
        return fq.qparams  # type: ignore[no-any-return]

    def out(self, step: Step) -> QParams | None:
        """Grid that a step rounds to."""
        fq: Any = None if step.gives_float else module_of(self.gm, step.result)
        return None if fq is None else fq.rounding

    def channels(self, n: Node, axis: int) -> int:
        """Channels of a packed value."""
        return len(self.turned[n]) if n in self.turned else shape(n)[axis]

    def layer(self, step: Step) -> layers.BitLayer | str:
        """The step's layer on bits, or why it is none."""
        if step.result not in self._layers:
            assert isinstance(step.operands[0], Node)
            found = layers.bit_layer(step.module, self.grid(step.operands[0]))
            out = self.out(step)
            if isinstance(found, layers.BitLayer) and layers.epilogue(found, out) is None:
                found = f"its output is on the grid {out.spec if out is not None else None}"
            self._layers[step.result] = found
        return self._layers[step.result]

    # ------------------------------------------------------------ the choice

    def _choose(self, step: Step, wants: set[Form]) -> Choice:
        axes = [f.axis for f in wants if f.kind == "bits"]
        out = self.out(step)
        axis = min(axes) if axes and out is not None and layers.is_bits(out) else None
        if step.kind in ("conv", "linear"):
            found = self.layer(step)
            if isinstance(found, layers.BitLayer):
                return self._bit_layer(step, found)
            self.reasons[step.path] = found
        elif step.kind == "quantize":
            return self._quantize(step, axis)
        elif step.kind in WEIGHTED or step.kind == "matmul":
            self.reasons[step.path] = f"there is no bit kernel for {step.kind}"
        else:
            special: Any = getattr(self, f"_{step.kind}", None)
            chosen: Choice | None = None if special is None else special(step, axis)
            if chosen is None:
                chosen = self._pointwise(step, axis) or self._mover(step)
            if chosen is not None:
                return chosen
        return self._exactly(step)

    def _mover(self, step: Step) -> Choice | None:
        """On codes of one grid."""
        if step.kind not in (*kernels.MOVERS, "split") or not self._same(step):
            return None
        sources = [a for a in step.operands if isinstance(a, Node)]
        floats = step.kind in ("max_pool", "resize", "pad")
        fill = int(numerics.quantize(torch.zeros(()), self.grid(sources[0]))) if step.kind == "pad" else None
        index = step.index if step.kind == "split" else None
        return Choice(CODES, [(a, CODES) for a in sources], lambda: code_modules.Mover(copy.deepcopy(step.module).eval(), floats, fill, index))

    def _exactly(self, step: Step) -> Choice:
        """On codes: weighted layers by the runtime's kernel or by float32 sums of integers, everything else as the reference runs it."""
        if step.kind in ("conv", "linear") and isinstance(step.operands[0], Node) and layers.is_sound(step.module):
            source, grid, out = step.operands[0], self.grid(step.operands[0]), self.out(step)
            parts = code_modules.parts_of(step.module, grid)
            if int8_layers.takes(step.module, grid, out):
                return Choice(FLOAT if step.gives_float else CODES, [(source, CODES)], _maker(int8_layers.Int8Layer, step.module, grid, out))
            if parts is not None:
                made = _maker(code_modules.IntegerLayer, step.module, grid, out, parts)
                return Choice(FLOAT if step.gives_float else CODES, [(source, CODES)], made)
        return Choice(FLOAT if step.gives_float else CODES, [(n, CODES) for n in step.operands if isinstance(n, Node)], lambda: self._codes_op(step))

    def _codes_op(self, step: Step) -> code_modules.CodesOp:
        inputs = [self.grid(a) if isinstance(a, Node) else a for a in step.operands]
        rank = len(step.core.meta["shape"]) if step.kind in kernels.BINARY else 0
        module = nn.Identity() if step.kind == "requantize" else copy.deepcopy(step.module).eval()
        return code_modules.CodesOp(step.kind, module, inputs, self.out(step), rank, step.index)

    def _bit_layer(self, step: Step, layer: layers.BitLayer) -> Choice:
        source = step.operands[0]
        assert isinstance(source, Node)
        axis = len(shape(source)) - 1 if layer.linear else 1
        if layer.linear:
            flat = self._flattened(source)
            if flat is not None:
                source, axis = flat, 1
                sizes = (*shape(source)[2:], 1)[:2] if len(shape(source)) == 4 else (1, shape(source)[2])
                layer = layer.behind_flatten(*sizes)
        if step.result in self.turned:
            layer = layer.selected(self.turned[step.result])
        end = layers.epilogue(layer, self.out(step))
        assert end is not None

        def make() -> nn.Module:
            self.bits[step.path] = made = modules.BitConv(layer, end)
            return made

        axis_out = len(shape(step.result)) - 1 if layer.linear else 1
        form = {"codes": CODES, "float": FLOAT}.get(end.kind, Form("bits", axis_out))
        return Choice(form, [(source, Form("bits", axis))], make)

    def _flattened(self, n: Node) -> Node | None:
        """What a ``fake_quantize`` node flattens from ``[B, C, H, W]`` to ``[B, C H W]`` on one grid, more than one place a channel."""
        step = self.ref.by_result.get(n)
        if step is None or step.kind != "reshape" or not isinstance(step.operands[0], Node):
            return None
        source = step.operands[0]
        before, after = shape(source), shape(n)
        fits = len(before) in (3, 4) and len(after) == 2 and before[0] == after[0] and before[1] != after[1]
        return source if fits and self._same(step) and not any(source.meta["dynamic"][1:]) else None

    def _same(self, step: Step) -> bool:
        """The operands are on the grid of the result."""
        out = self.out(step)
        return out is not None and all(isinstance(a, Node) and self.grid(a).same_grid(out) for a in step.operands)

    def _quantize(self, step: Step, axis: int | None) -> Choice:
        """A float value onto a grid. The ReLUs and max pools in front of it are monotone as it is: pools come first, channels last; ReLUs go into it."""
        source, out = step.operands[0], self.out(step)
        assert isinstance(source, Node) and out is not None
        pools: list[code_modules.FloatMaxPool] = []
        relu = False
        while layers.is_code(out.spec) and out.scale.ndim == 0 and self._pulled(source):
            relu |= kind(self.gm, source) == "relu"
            pools += [code_modules.FloatMaxPool(module_of(self.gm, source), 2)] if kind(self.gm, source) == "max_pool" else []
            source = source.all_input_nodes[0]
        if axis is None:
            return Choice(CODES, [(source, FLOAT)], _maker(code_modules.Quantize, out, relu), tuple(reversed(pools)))
        cut = thresholds.of_floats(lambda v: numerics.quantize(v.relu() if relu else v, out))
        return Choice(Form("bits", axis), [(source, FLOAT)], self._pack(step.result, cut, axis), tuple(reversed(pools)))

    def _pack(self, n: Node, cut: thresholds.Cut, axis: int) -> Callable[[], nn.Module]:
        """Maker of what packs the value of ``n``."""
        return _maker(modules.Pack, cut, layers.PLANES[self.grid(n).spec.kind], shape(n)[axis], axis, len(shape(n)))

    def _pulled(self, n: Node) -> bool:
        """A float ReLU, or max pool over rows and columns, whose values are only rounded to 8 bits or less."""
        module = _module(self.gm, n)
        if n not in self.ref.islands or type(module) not in (nn.ReLU, nn.MaxPool2d) or len(shape(n)) != 4 or n.kwargs:
            return False
        if type(module) is nn.MaxPool2d and not is_pool(module):
            return False
        for u in n.users:
            step = self.ref.by_result.get(u)
            if step is not None:
                fq: Any = module_of(self.gm, u)
                if step.kind != "quantize" or not layers.is_code(fq.spec) or fq.scale.ndim:
                    return False
            elif not self._pulled(u):
                return False
        return True

    # ------------------------------------------------------------ steps on codes and bits; None: no kernel of their own

    def _max_pool(self, step: Step, axis: int | None) -> Choice | None:
        source = step.operands[0]
        assert isinstance(source, Node)
        rank = RANKS.get(type(step.module))
        if rank is None or len(shape(source)) != rank + 2 or not self._same(step) or not is_pool(step.module):
            return None
        if axis == 1:
            channels = self.channels(step.result, 1)
            return Choice(Form("bits", 1), [(source, Form("bits", 1))], _maker(modules.BitMaxPool, step.module, rank, channels))
        codes = rank == 2 and layers.is_code(self.grid(source).spec)
        return Choice(CODES, [(source, CODES)], _maker(code_modules.CodeMaxPool, step.module, 2)) if codes else None

    def _reshape(self, step: Step, axis: int | None) -> Choice | None:
        source = step.operands[0]
        assert isinstance(source, Node)
        before, after = shape(source), shape(step.result)
        pixel = len(before) in (3, 4) and before[:2] == after and all(s == 1 for s in before[2:])
        if axis == 1 and pixel and self._same(step):
            return Choice(Form("bits", 1), [(source, Form("bits", 1))], modules.Squeeze)
        return None

    def _index_select(self, step: Step, axis: int | None) -> Choice | None:
        source, module = step.operands[0], step.module
        assert isinstance(source, Node) and isinstance(module, IndexSelect)
        if axis is None or module.dim % len(shape(source)) != axis or not self._same(step):
            return None
        if module.indices.ndim != 1 or not len(module.indices) or not 0 <= int(module.indices.min()) <= int(module.indices.max()) < shape(source)[axis]:
            return None
        form = Form("bits", axis)
        way = self._way_to_layer(source, axis)
        if way is not None:
            self.turned.update(dict.fromkeys(way, module.indices))
            return Choice(form, [(source, form)], None)
        return Choice(form, [(source, form)], _maker(modules.BitSelect, shape(source)[axis], module.indices))

    def _way_to_layer(self, n: Node, axis: int) -> list[Node] | None:
        """The steps from ``n`` back to a layer on bits of one group, when nobody else reads any of them: max pools do not mix channels."""
        way: list[Node] = []
        while True:
            step = self.ref.by_result.get(n)
            if step is None or n in self.wants or n in self.turned or not self._reads_once(n):
                return None
            way.append(n)
            if step.kind in ("conv", "linear"):
                out, layer = self.out(step), self.layer(step)
                fits = out is not None and layers.is_bits(out) and isinstance(layer, layers.BitLayer) and layer.groups == 1
                return way if fits and axis == (len(shape(n)) - 1 if step.kind == "linear" else 1) else None
            if step.kind != "max_pool" or axis != 1 or not self._same(step) or type(step.module) not in RANKS or not is_pool(step.module):
                return None
            assert isinstance(step.operands[0], Node)
            n = step.operands[0]

    def _reads_once(self, n: Node) -> bool:
        return len(n.users) == 1

    def _cat(self, step: Step, axis: int | None) -> Choice | None:
        module: Any = step.module
        if axis is None or module.dim % len(shape(step.result)) != axis or not self._same(step):
            return None
        sources = [a for a in step.operands if isinstance(a, Node)]
        return Choice(Form("bits", axis), [(a, Form("bits", axis)) for a in sources], _maker(modules.BitCat, [shape(a)[axis] for a in sources]))

    def _add(self, step: Step, axis: int | None) -> Choice | None:
        out = self.out(step)
        assert out is not None
        a, b = step.operands
        if not isinstance(a, Node) or not isinstance(b, Node):
            return None
        grids = [self.grid(a), self.grid(b), out]
        fits = all(q.spec.kind == "affine" and q.spec.dtype == torch.uint8 and q.scale.ndim == 0 for q in grids)
        if not fits or shape(a) != shape(b) or a.meta["dynamic"] != b.meta["dynamic"]:
            return None
        return Choice(CODES, [(a, CODES), (b, CODES)], lambda: code_modules.CodeAdd(self._codes_op(step), *grids))

    def _global_avg_pool(self, step: Step, axis: int | None) -> Choice | None:
        source, out = step.operands[0], self.out(step)
        assert isinstance(source, Node) and out is not None
        qp = self.grid(source)
        if not layers.is_code(qp.spec) or qp.scale.ndim or out.scale.ndim or out.spec.kind == "binary":
            return None
        return Choice(CODES, [(source, CODES)], lambda: code_modules.GlobalPool(self._codes_op(step), qp, out))

    def _pointwise(self, step: Step, axis: int | None) -> Choice | None:
        """A function of one code as a table, or as thresholds."""
        sources = [a for a in step.operands if isinstance(a, Node)]
        known = ("requantize", "relu", "leaky_relu", "sigmoid", "hardsigmoid", *kernels.BINARY)
        out = self.out(step)
        if len(sources) != 1 or step.kind not in known or out is None or not layers.is_code(out.spec) or out.scale.ndim:
            return None
        qp = self.grid(sources[0])
        # With one element an image the runtime may add in another order: see `kernels.first_is_scalar`.
        if not layers.is_code(qp.spec) or qp.scale.ndim or all(s == 1 for s in shape(sources[0])[1:]):
            return None
        codes = self._table(step, qp)
        cut = thresholds.of_codes(codes, qp.spec.qmin) if axis is not None else None
        if cut is not None and axis is not None:
            return Choice(Form("bits", axis), [(sources[0], CODES)], self._pack(step.result, cut, axis))
        return Choice(CODES, [(sources[0], CODES)], _maker(code_modules.CodeTable, codes, qp.spec.qmin))

    def _table(self, step: Step, qp: QParams) -> Tensor:
        """The step's results for all codes of the grid ``qp``."""
        rank = max(1, len(step.core.meta["shape"]))
        every = torch.arange(qp.spec.qmin, qp.spec.qmax + 1).to(qp.spec.dtype)
        result: Tensor = self._codes_op(step)(every.reshape([1] * (rank - 1) + [-1]))
        return result.reshape(-1)


def _maker(cls: Any, *args: Any) -> Callable[[], nn.Module]:
    return lambda: cls(*args)


def _module(gm: GraphModule, n: Node) -> nn.Module | None:
    return module_of(gm, n) if n.op == "call_module" else None

