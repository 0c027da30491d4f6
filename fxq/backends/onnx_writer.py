"""What every ONNX emitter works with: nodes, initializers and the tensor name of each FX node."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.backends.onnx_half import half_scale
from fxq.backends.onnx_packed import Stored, as_nibbles, filled
from fxq.backends.onnx_wide import Wide
from fxq.graph import attr, kind, module_of, shape
from fxq.modules import FakeQuantize
from fxq.spec import QParams
from fxq.targets import Target

TYPES = {
    torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32, torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8, torch.uint8: TensorProto.UINT8, torch.bool: TensorProto.BOOL,
}  # fmt: skip
SHARE_FROM = 4096  # bytes: smaller initializers keep their own speaking name


class Writer:
    """Collects ONNX nodes and initializers; knows the tensor name of each FX node.

    Args:
        gm: a converted graph.
        target: runtime of the file.
        reserved: names of the graph's inputs and outputs, which no inner tensor may take.
        half: the file's float tensors will be float16, so that its scales must be float16 numbers.
    """

    def __init__(self, gm: GraphModule, target: Target, reserved: Iterable[str] = (), half: bool = False) -> None:
        self.gm, self.target, self.half = gm, target, half
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.names: dict[Node, str] = {}
        self.stored: dict[str, Stored] = {}  # name of a weight -> its low-bit form; others are int8
        self.shared: dict[str, Stored | Wide | str] = {}  # name of a float weight that is shared -> its form; others are written as they are
        self.looked_up: list[tuple[str, Any]] = []  # shared weights that are in the file
        self.nodes_on_codes: set[Node] = set()  # movers that wrote their fake_quantize node's codes themselves
        self._outs: dict[Node, str] = {}
        self._taken = set(reserved)
        self._alias: dict[str, str] = {}
        self._large: dict[Any, list[tuple[str, np.ndarray[Any, Any]]]] = {}
        self._late: dict[Node, Callable[[], str]] = {}
        self._expanded: dict[Any, list[tuple[str, np.ndarray[Any, Any]]]] = {}

    def op(self, op: str, inputs: list[str], output: str, **attrs: Any) -> str:
        """Append a node with one output, named like it; returns the output's name."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attrs))
        return output

    def multi(self, op: str, inputs: list[str], outputs: list[str], name: str, **attrs: Any) -> None:
        """Append a node with several outputs."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attrs))

    def const(self, name: str, value: Any) -> str:
        """An initializer from an array or tensor; equal large ones are stored once. Returns its name."""
        if name in self.initializers:
            return name
        if name in self._alias:
            return self._alias[name]
        if isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn:
            raw = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            self.initializers[name] = TensorProto(name=name, data_type=TensorProto.FLOAT8E4M3FN, dims=list(value.shape), raw_data=raw)
            return name
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.nbytes >= SHARE_FROM:
            twins = self._large.setdefault((array.dtype.str, array.shape, array.reshape(-1)[:16].tobytes()), [])
            for other, kept in twins:
                if array is kept or np.array_equal(array, kept):
                    self._alias[name] = other
                    return other
            twins.append((name, array))
        self.initializers[name] = numpy_helper.from_array(array, name)  # keeps rank 0
        return name

    def ints(self, name: str, values: Iterable[int]) -> str:
        """An int64 vector initializer (axes, sizes, pads)."""
        return self.const(name, np.array(list(values), np.int64))

    def int4(self, name: str, codes: Tensor) -> str:
        """A packed INT4 initializer of codes in [-8, 7]; returns its name."""
        self.initializers[name] = as_nibbles(name, codes.detach().cpu().numpy())
        return name

    def weight(self, name: str, codes: Tensor) -> str:
        """The integer tensor ``<name>_q`` of a weight, in the form that :attr:`stored` names; equal ones are expanded once. Returns its name."""
        stored = self.stored.get(name)
        if stored is None:
            return self.const(f"{name}_q", codes)
        array = codes.detach().cpu().contiguous().numpy()
        twins = self._expanded.setdefault((stored, array.shape), [])
        for other, kept in twins:
            if np.array_equal(array, kept):
                return other
        twins.append((f"{name}_q", array))
        tensors, nodes = filled(name, array, stored, self._table(stored))
        self.initializers |= {t.name: t for t in tensors}
        self.nodes += nodes
        return f"{name}_q"

    def _table(self, stored: Stored) -> str:
        """Initializer with the table of a form; stored once."""
        if stored.form is None:
            return ""
        array, wish = stored.table, f"tables/{stored.form.bits}bit"
        names = (wish if i == 0 else f"{wish}_{i}" for i in itertools.count())
        name = next(n for n in names if n not in self.initializers or np.array_equal(numpy_helper.to_array(self.initializers[n]), array))
        return self.const(name, array)

    def on_grid(self, name: str, qp: QParams) -> QParams:
        """The grid as the file can hold it."""
        return QParams(qp.spec, half_scale(qp.scale, name), qp.zero_point) if self.half else qp

    def grid(self, name: str, qp: QParams) -> tuple[str, str]:
        """Initializers of a grid's scale and zero point."""
        qp = self.on_grid(name, qp)
        zero = qp.zero_point.to(torch.int32 if qp.spec.bits > 16 else qp.spec.dtype)
        return self.const(f"{name}_scale", qp.scale), self.const(f"{name}_zero", zero)

    def out(self, node: Node) -> str:
        """Tensor name of a node's float value: module path or node name, made free of the graph's input and output names."""
        if node not in self._outs:
            name = str(node.target) if node.op in ("call_module", "get_attr") else node.name
            while name in self._taken:
                name += "_"
            self._taken.add(name)
            self._outs[node] = name
        return self._outs[node]

    def later(self, node: Node, make: Callable[[], str]) -> None:
        """``make`` writes the node's float value when the first reader asks for it."""
        self._late[node] = make

    def name(self, node: Node) -> str:
        """Tensor name of a node's float value."""
        if node not in self.names:
            self.names[node] = self._late.pop(node)()
        return self.names[node]

    def input(self, node: Node, i: int = 0) -> str:
        """Tensor name of the node's ``i``-th tensor input."""
        return self.name(node.all_input_nodes[i])

    def codes(self, node: Node) -> str:
        """Name of the integer tensor of a ``fake_quantize`` node."""
        return str(node.target)

    def operand(self, node: Node, a: Any, i: int) -> str:
        """A tensor argument, or a Python scalar (rounded to a grid of its own when the node is integer)."""
        if isinstance(a, Node):
            return self.name(a)
        out = self.out(node)
        if not node.meta.get("integer"):
            return self.const(f"{out}/scalar{i}", torch.tensor(a, dtype=node.meta.get("dtype", torch.float32)))
        value, user = torch.tensor(float(a)), rounder(self.gm, node)
        assert user is not None
        grid = numerics.constant_qparams(value, quantizer(self.gm, user).spec)
        s, z = self.grid(f"{out}/scalar{i}", grid)
        codes = numerics.quantize(value, grid).reshape([1] * len(shape(node)))  # full rank: the runtime rounds alike in every layout
        return self.op("DequantizeLinear", [self.const(f"{out}/scalar{i}_q", codes), s, z], f"{out}/scalar{i}/dq")

    def sizes(self, node: Node, source: Node) -> str:
        """A shape tensor of ``node``'s sizes with -1 for the batch-dependent one; leading sizes of ``source`` when there are several."""
        out = self.out(node)
        if sum(node.meta["dynamic"]) <= 1:
            return self.ints(f"{out}/shape", (-1 if d else s for s, d in zip(shape(node), node.meta["dynamic"], strict=True)))
        head = self.op("Shape", [self.name(source)], f"{out}/head", start=0, end=-1)
        return self.op("Concat", [head, self.ints(f"{out}/last", [shape(node)[-1]])], f"{out}/shape", axis=0)


def rounder(gm: GraphModule, node: Node) -> Node | None:
    """The ``fake_quantize`` node behind ``node``, or ``None``."""
    return next((u for u in node.users if kind(gm, u) == "fake_quantize"), None)


def quantizer(gm: GraphModule, node: Node) -> FakeQuantize:
    """Module of a ``fake_quantize`` node."""
    fq = module_of(gm, node)
    assert isinstance(fq, FakeQuantize)
    return fq


def constant(gm: GraphModule, node: Node) -> Tensor:
    """Tensor of a ``get_attr`` node."""
    value = attr(gm, node)
    assert isinstance(value, Tensor), node.format_node()
    return value


Emitter = Callable[[Writer, Node, nn.Module], str]
