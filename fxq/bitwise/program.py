"""A net that runs on bits: the lowered graph as a module, its report, and its values step by step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from fxq.bitwise import lowered, ops
from fxq.bitwise.engine import engine
from fxq.bitwise.lowered import Lowered, Value
from fxq.bitwise.runner import Runner
from fxq.errors import FxqError, LoweringError


@dataclass(frozen=True)
class BitLayerInfo:
    """A layer on bits.

    Attributes:
        name: its module path. kind: ``binary x ternary``: weights, activations. gives: ``sign``, ``ternary``, ``codes`` or ``float``.
        shape: of the weight. packed_bytes, table_bytes: of its packed weights and of its thresholds or multipliers. float_bytes: of the float32 weight.
    """

    name: str
    kind: str
    gives: str
    shape: tuple[int, ...]
    packed_bytes: int
    table_bytes: int
    float_bytes: int


@dataclass(frozen=True)
class FloatInfo:
    """A weighted layer that does not run on bits, and why."""

    name: str
    why: str
    bytes: int


@dataclass(frozen=True)
class BitReport:
    """How a :class:`BitProgram` runs.

    Attributes:
        engine: ``numba`` or ``numpy``. path: its instructions.
        layers: on bits. floats: weighted layers that stay float or int8.
        resident_bytes: what the program holds: packed weights, tables, float layers, and, once it has run, what the engine keeps of its layers
            (borders of zero padding, tables of shuffles). ONNX Runtime's copies of int8 weights are not counted.
    """

    engine: str
    path: str
    layers: tuple[BitLayerInfo, ...]
    floats: tuple[FloatInfo, ...]
    resident_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Packed weights of all layers."""
        return sum(r.packed_bytes for r in self.layers)

    @property
    def table_bytes(self) -> int:
        """Thresholds and multipliers of all layers."""
        return sum(r.table_bytes for r in self.layers)

    @property
    def float_bytes(self) -> int:
        """The float32 weights of the layers that run on bits; the program does not hold them."""
        return sum(r.float_bytes for r in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "packed_bytes": self.packed_bytes, "table_bytes": self.table_bytes, "float_bytes": self.float_bytes}

    def __str__(self) -> str:
        wide = max(len(name) for name in [*(r.name for r in self.layers), *(r.name for r in self.floats)])
        lines = [f"{len(self.layers)} layers on bits, engine {self.engine} ({self.path}), {self.resident_bytes:,} bytes resident"]
        for r in self.layers:
            smaller = f"{r.packed_bytes:,} + {r.table_bytes:,} bytes, float32 {r.float_bytes:,}"
            lines.append(f"  {r.name:<{wide}}  {r.kind}, {'x'.join(map(str, r.shape))}, gives {r.gives}: {smaller}")
        lines += [f"  {r.name:<{wide}}  not on bits: {r.why} ({r.bytes:,} bytes)" for r in self.floats]
        return "\n".join(lines)


class BitProgram(nn.Module):
    """A low-bit net on packed bits. Inference only, on the CPU: outputs have no gradient, whatever mode it is in.

    Its numbers are those of the integer reference of the model it was made from; it keeps nothing of that model. Threads: as many as
    ``torch.set_num_threads`` says.

    Args:
        gm: a converted graph, ``m.graph_module`` of a compiled model.

    Attributes:
        graph_module: the lowered FX graph.

    Raises:
        LoweringError: when no layer of the graph runs on bits.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__()
        found = lowered.lower(gm)
        if not found.layers:
            why = "; ".join(f"{k}: {v}" for k, v in list(found.reasons.items())[:3]) or "it has no weighted layers"
            raise LoweringError(f"no layer runs on bits ({why})", where="bitwise", way_out="Compile with a binary or ternary scheme, such as xnor_w1a1")
        self._adopt(found)

    def _adopt(self, found: Lowered) -> None:
        self.graph_module = found.graph_module
        self._values, self._reasons = found.values, found.reasons
        self._paths = {path: name for name, made in found.layers.items() for path, m in found.graph_module.named_modules() if m is made}
        self._inputs = sum(n.op == "placeholder" for n in self.graph_module.graph.nodes)
        self._runner: Runner | None = None
        super().train(False)

    def forward(self, *inputs: Any) -> Any:
        """Outputs of the model, its structure, float32.

        Raises:
            FxqError: for another number of inputs, what is no tensor, or tensors that are not on the CPU; inputs of other channels than the example's.
        """
        self._check(inputs)
        with torch.no_grad():
            if torch.compiler.is_compiling():
                return self.graph_module(*inputs)
            if self._runner is None:
                self._runner = Runner(self.graph_module)
            return self._runner(*inputs)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        leaves = inputs if all(isinstance(x, Tensor) for x in inputs) else tree_leaves(inputs)
        if len(inputs) != self._inputs or not all(isinstance(x, Tensor) for x in leaves):
            kinds = ", ".join(type(x).__name__ for x in inputs) or "none"
            raise FxqError(f"the model takes {self._inputs} inputs, given are {kinds}", way_out="Pass tensors, one for each input of the model")
        if torch.compiler.is_compiling():
            return
        if torch._C._get_tracing_state() is not None or any(map(torch._C._functorch.is_functorch_wrapped_tensor, leaves)):
            raise FxqError("a bit program takes plain tensors: no torch.jit, torch.func or vmap", way_out="Pass a batch; torch.compile and torch.export work")
        for x in leaves:
            if x.device.type != "cpu":
                raise FxqError(f"an input is on {x.device}; bits run on the CPU only", way_out="Pass x.cpu()")

    def values(self, *inputs: Any, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Codes of the reference's steps by name, in torch's shapes, and float results by theirs; steps that vanished into others are not there.

        Args:
            inputs: of the model.
            given: codes that replace the result of a step before the net goes on, by the step's name.

        Raises:
            FxqError: for a name in ``given`` that no step has.
        """
        self._check(inputs)
        given = dict(given or {})
        unknown = [name for name in given if name not in self._values]
        if unknown:
            raise FxqError(f"no value is called {unknown[0]!r}", way_out="program.values(x) names them")
        recorder = _Recorder(self.graph_module, {self._values[name].node: (self._values[name], codes) for name, codes in given.items()})
        with torch.no_grad():
            recorder.run(*inputs)
            shown = {name: _codes(v, recorder.seen[v.node]) for name, v in self._values.items() if v.node in recorder.seen}
        return {name: codes for name, codes in shown.items() if codes is not None}

    @property
    def layer_names(self) -> dict[str, str]:
        """Of each layer on bits its path in ``graph_module``, and the module path that it had in the model."""
        return dict(self._paths)

    def report(self) -> BitReport:
        """Engine, layers, bytes, and what does not run on bits."""
        e = engine()
        rows = []
        for path, name in self._paths.items():
            m: Any = self.graph_module.get_submodule(path)
            rows.append(BitLayerInfo(name, m.kind, m.gives, m.shape, m.packed_bytes, m.table_bytes, 4 * math.prod(m.shape)))
        floats = tuple(FloatInfo(name, why, self._bytes_of(name)) for name, why in self._reasons.items())
        kept = sum(map(ops.kept_bytes, self.graph_module.buffers()))
        return BitReport(e.name, e.path, tuple(rows), floats, _bytes(self.graph_module) + kept)

    def _bytes_of(self, name: str) -> int:
        held = dict(self.graph_module.named_modules())
        found = held.get(name, held.get(f"{name}_q"))
        return 0 if found is None else _bytes(found)

    def train(self, mode: bool = True) -> BitProgram:
        """Nothing: a program has one mode."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> BitProgram:
        """Raises:
        FxqError: for another device or type than the CPU and float32.
        """
        probe = fn(torch.zeros(1))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            fact = f"a bit program runs on the CPU in its own types, not as {probe.dtype} on {probe.device}"
            raise FxqError(fact, way_out="Lower the model to ONNX for a GPU")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Raises:
        FxqError: always: a program's numbers do not stand in its tensors alone.
        """
        raise FxqError("a BitProgram cannot take a state dict", way_out='Save m.lower("bitwise"), and load the file with fxq.load')

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FxqError("a BitProgram cannot be pickled", way_out='Save m.lower("bitwise"), and load the file with fxq.load')

    def __deepcopy__(self, memo: dict[int, Any]) -> BitProgram:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_runner"}, _runner=None)
        return new

    def extra_repr(self) -> str:
        return f"{len(self._paths)} layers on bits"


class _Recorder(Interpreter):
    """Runs the lowered graph and keeps every value; those of ``given`` are put in place of the computed ones."""

    def __init__(self, gm: GraphModule, given: dict[str, tuple[Value, Tensor]]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.given = given
        self.seen: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.given:
            value = _held(*self.given[n.name])
        self.seen[n.name] = value
        return value


def _held(v: Value, codes: Tensor) -> Tensor:
    """Codes as the graph holds them."""
    if v.form.kind != "bits":
        return codes.contiguous(memory_format=torch.channels_last) if codes.ndim == 4 and v.form.kind == "codes" else codes
    codes = codes if v.order is None else codes.index_select(v.form.axis, v.order)
    packed: Tensor = ops.pack(codes, -1, 1, v.planes, v.form.axis)
    return packed


def _codes(v: Value, held: Tensor) -> Tensor | None:
    """The value in torch's shape and order; ``None`` where a shuffle dropped channels of it."""
    if v.form.kind != "bits":
        return held.contiguous()
    codes: Tensor = ops.unpack(held, v.channels, v.form.axis)
    if v.order is not None:
        inverse = torch.argsort(v.order)
        if not torch.equal(v.order[inverse], torch.arange(len(inverse))):
            return None
        codes = codes.index_select(v.form.axis, inverse)
    return codes.contiguous()


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values())
