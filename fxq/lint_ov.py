"""What OpenVINO's CPU plugin will execute in integers, predicted from a Q/DQ file alone (rules learned from OpenVINO 2026.4.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx

from fxq.lint_graph import BODIES, BYTES, INSIDE, Net, Op
from fxq.lint_ov_rules import (
    AFFINE,
    FUSED,
    KERNEL,
    MOVERS,
    ROUNDING,
    SAME,
    SUMMED,
    SUMS,
    VIEWS,
    WEIGHTS_ONLY,
    Codes,
    blocked_layer,
    blocked_product,
    codes_of,
    fixed_by_grid,
    form_of,
    moves_codes,
    shares_bias,
    weight_of,
    weight_only,
)  # fmt: skip
from fxq.lint_report import LintReport, OpReport, compute_nodes, label

TARGET = "openvino"
SUMMARY = "OpenVINO, CPU plugin"


@dataclass(frozen=True)
class Host:
    """An integer layer that can still take what follows it.

    Attributes:
        kind: its type.
        node: position in the file of its first node.
        integer: it multiplies codes; one in float takes what follows as well.
    """

    kind: str
    node: int
    integer: bool = True


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    Attributes:
        codes: grid of the codes behind it.
        host: the layer that gives it and can take more.
        rounded: it was rounded to a grid whose zero point is not 0: its dequantization stands between the layer and what follows.
        root: the tensor of codes that it was read from, through what moves codes.
        paired: it comes from a DequantizeLinear behind a layer.
        view: what stands between the layer and it: ``transpose``, ``reshape`` or nothing.
        joined: it is a concatenation whose Q moves in front of it.
        apart: its inputs were rounded one by one and not on dimension 1: the dequantization stays in front of what follows.
    """

    codes: Codes | None = None
    host: Host | None = None
    rounded: bool = False
    root: str = ""
    paired: bool = False
    view: str = ""
    joined: bool = False
    apart: bool = False


class Walk:
    """One pass over the nodes in the order of the file."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.nodes = compute_nodes(net)
        self.rows: dict[int, OpReport] = {}
        self.values: dict[str, Value] = {}
        self.constant = set(net.const_names)
        self.seen: dict[tuple[object, ...], str] = {}
        self.same: dict[str, str] = {}
        self.left: list[tuple[str, str]] = []
        self.static = all(None not in shape for name, shape in net.shapes.items() if name not in net.const_names)
        self.active = any(op.is_q for op in net)

    def run(self) -> LintReport:
        """The prediction for the whole file."""
        for op in self.net:
            given = [name for name in op.inputs if name]
            if given and all(name in self.constant for name in given):
                self.constant.update(op.outputs)
            elif op.is_q:
                self._quantize(op)
            elif op.is_dq:
                self._dequantize(op)
            elif op.op in SAME:
                self.values[op.outputs[0]] = self.value(op.inputs[0])
            elif op.origins[0] in self.nodes and op.origins[0] not in self.rows:
                self._compute(op)
        ops = tuple(self.rows.get(index, node) for index, node in self.nodes.items())
        return LintReport(ops, len(self.left), 0, tuple(self.left))

    def value(self, name: str) -> Value:
        """What is known of a tensor."""
        return self.values.get(name, Value(root=name))

    def alone(self, name: str) -> bool:
        """One node reads it."""
        return name not in self.net.outputs and name not in self.net.captured and len(self.net.readers(name)) == 1

    def _quantize(self, op: Op) -> None:
        name, codes = op.inputs[0], codes_of(self.net, op)
        value = self.value(name)
        out = Value(codes, root=op.outputs[0])
        seen = self.seen.setdefault((self.same.get(name, name), *_grid(self.net, op)), op.outputs[0])
        if seen != op.outputs[0]:
            self.values[op.outputs[0]] = replace(self.value(seen), host=None)
            return
        twins = [user for user, _ in self.net.readers(name) if user.is_q and _grid(self.net, user) == _grid(self.net, op)]
        sole = len(twins) == len(self.net.readers(name)) and name not in self.net.outputs
        if value.host is not None and value.host.integer and not value.rounded and sole and value.view != "reshape":
            out = replace(out, host=value.host if not value.view else None)
        elif not (value.codes is not None and codes is not None and value.codes.grid == codes.grid and codes.zero == 0):
            maker = self.net.maker.get(name)
            self.left.append((label(op), f"{maker.op} {label(maker)} gives its input and does not take it" if maker else "it rounds an input of the graph"))
        self.values[op.outputs[0]] = replace(out, apart=value.apart, joined=value.joined)

    def _dequantize(self, op: Op) -> None:
        source = self.value(op.inputs[0])
        codes = codes_of(self.net, op) if self.active and not source.apart else None
        host = source.host if self.alone(op.inputs[0]) else None
        rounded = codes is None or codes.zero != 0
        self.values[op.outputs[0]] = Value(codes, host, rounded, source.root or op.inputs[0], host is not None, joined=source.joined)

    def _compute(self, op: Op) -> None:
        if op.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            self._weighted(op)
        elif op.op in MOVERS or op.op in SUMS:
            self._moved(op)
        elif op.op == "Concat":
            self._concat(op)
        else:
            self._pointwise(op)

    def integer(self, op: Op, kernel: str, value: Value) -> None:
        """The node runs in an integer layer; its outputs are ``value``."""
        self._row(op, "int8", kernel)
        for name in op.outputs:
            self.values[name] = value if value.root else replace(value, root=name)

    def floating(self, op: Op, why: str) -> None:
        """The node runs in float."""
        self._row(op, "float", op.op, why)

    def _row(self, op: Op, runs: str, kernel: str, why: str = "") -> None:
        index = op.origins[0]
        if index in self.nodes:
            self.rows[index] = replace(self.nodes[index], runs=runs, kernel=kernel, why=why)

    def _weighted(self, op: Op) -> None:
        left, right = self.value(op.inputs[0]), self.value(op.inputs[1])
        if op.inputs[1] not in self.constant:
            if op.op not in ("Gemm", "MatMul"):
                return self.floating(op, "its weight is no constant")
            why = blocked_product(left.codes, right.codes)
            return self.floating(op, why) if why else self.integer(op, "MatMul", Value(host=Host("MatMul", op.origins[0])))
        weight = weight_of(self.net, op.inputs[1], self.constant)
        why = blocked_layer(op, left.codes, weight)
        if not why:
            return self.integer(op, KERNEL[op.op], Value(host=self._host(op, left)))
        if op.op in ("Gemm", "MatMul") and weight_only(weight):
            return self.integer(op, WEIGHTS_ONLY, Value(host=Host(WEIGHTS_ONLY, op.origins[0])))
        self.values[op.outputs[0]] = Value(host=Host(KERNEL[op.op], op.origins[0], integer=False) if op.op != "ConvTranspose" else None, root=op.outputs[0])
        return self.floating(op, why)

    def _host(self, op: Op, given: Value) -> Host | None:
        """What takes no bias takes nothing behind it: a product on four dimensions (the zero point of its input becomes a bias), a layer with a shared bias."""
        shape = self.net.shapes.get(op.outputs[0], ())
        if op.op == "MatMul" and len(shape) > 3 and given.codes is not None and given.codes.zero != 0:
            return None
        if shares_bias(self.net, op):
            return None
        return Host(KERNEL[op.op], op.origins[0])

    def _moved(self, op: Op) -> None:
        twin = (op.op, *(self.same.get(name, self.net.key(name)) for name in op.inputs), str(sorted(op.attrs.items())))
        self.same[op.outputs[0]] = self.seen.setdefault(twin, op.outputs[0])
        value = self.value(op.inputs[0])
        if value.codes is None:
            if op.op == "Transpose" and self.alone(op.outputs[0]) and self.net.edges(op)[0][0].is_q:
                host = value.host if self.alone(op.inputs[0]) and not value.rounded else None
                return self.integer(op, KERNEL[op.op], Value(host=host, root=op.outputs[0], view="transpose"))
            if op.op in VIEWS and value.host is not None and not value.rounded and self.alone(op.inputs[0]):
                view = "transpose" if op.op == "Transpose" and value.view != "reshape" else "reshape"
                self.values[op.outputs[0]] = Value(host=value.host, root=op.outputs[0], view=view)
            return self.floating(op, "its input does not come from 8-bit codes")
        if op.op in SUMS:
            return self.integer(op, KERNEL[op.op], Value(host=Host("Reduce", op.origins[0])))
        if why := moves_codes(self.net, op, value.codes):
            return self.floating(op, why)
        host = Host(KERNEL[op.op], op.origins[0]) if op.op in ROUNDING else None
        rounded = op.op == "Resize" and value.codes.zero != 0
        return self.integer(op, KERNEL[op.op], Value(value.codes, host, rounded, value.root))

    def _concat(self, op: Op) -> None:
        """Codes of one grid, codes of several (which no layer behind can take), or what a Q behind rounds: it moves in front of it."""
        edges = self.net.edges(op)
        rounds = self.alone(op.outputs[0]) and edges[0][0].is_q
        codes = [self.value(name).codes for name in op.inputs]
        bare = next((name for name, c in zip(op.inputs, codes, strict=True) if c is None), None)
        if bare is not None and not rounds:
            return self.floating(op, f"{bare} does not come from 8-bit codes, and no QuantizeLinear alone reads it")
        first = codes[0]
        if rounds and (host := self._taken_in_front(op, edges[0][0])) is not None:
            return self.integer(op, KERNEL[op.op], Value(host=host, view="transpose", apart=self._one_by_one(op)))
        if bare is not None or first is None:
            return self.integer(op, KERNEL[op.op], Value(apart=self._one_by_one(op), joined=rounds))
        if self._one_by_one(op):
            return self.integer(op, KERNEL[op.op], Value(apart=True))
        one = len({c.grid for c in codes if c is not None}) == 1
        return self.integer(op, KERNEL[op.op], Value(first if one else Codes(first.kind, None, None), joined=rounds))

    def _taken_in_front(self, op: Op, q: Op) -> Host | None:
        """A layer that gives an input and takes the Q behind the concatenation, when the other inputs come from such layers too, or are on its grid."""
        hosts, grid = [], codes_of(self.net, q)
        for name in op.inputs:
            value = self.value(name)
            if value.host is not None and value.host.integer and not value.rounded and not value.view and self.alone(name):
                hosts.append(value.host)
            elif value.codes is None or grid is None or value.codes.grid != grid.grid or grid.zero != 0:
                return None
        return hosts[0] if hosts else None

    def _one_by_one(self, op: Op) -> bool:
        """The inputs of a concatenation keep their grids, equal or not: it is along another dimension than the channels', of known size."""
        shape = self.net.shapes.get(op.outputs[0], ())
        axis = int(op.attrs["axis"]) % (len(shape) or 1)
        return bool(shape) and axis != 1 and shape[axis] is not None

    def _pointwise(self, op: Op) -> None:
        form = form_of(self.net, op)
        if form is not None:
            leaf, chain = form
            host = self.value(leaf)
            if host.host is not None and not host.rounded and not host.view:
                for part in chain:
                    self._inside(part, host.host, Value(host=host.host))
                return None
        if op.inputs and self.net.types.get(op.inputs[0], 0) in BYTES:
            return self._on_codes(op)
        value = self.value(op.inputs[0])
        folds = op.op == "BatchNormalization" or (op.op in AFFINE and bool(set(op.inputs) & self.constant))
        if value.joined and value.rounded and folds:
            return self.floating(op, "OpenVINO 2026.4.1 crashes on such a constant behind a Concat that is rounded to a grid whose zero point is not 0")
        if value.codes is not None and value.host is None and fixed_by_grid(op, value.codes) and not self._half(op.inputs[0]):
            return self.integer(op, op.op, value)
        if op.op in SUMMED and len(op.inputs) == 2 and not set(op.inputs) & self.constant:
            return self._sum(op)
        if op.op in AFFINE:
            return self._affine(op)
        if op.op not in FUSED:
            return self.floating(op, INSIDE if op.op in BODIES else "OpenVINO computes it in float")
        return self._follow(op, op.inputs[0], value)

    def _on_codes(self, op: Op) -> None:
        """Clip between Q and DQ."""
        value = self.value(op.inputs[0])
        if op.op == "Clip" and value.host is not None and self.alone(op.inputs[0]):
            return self.integer(op, value.host.kind, value)
        self.floating(op, "OpenVINO computes it in float")
        self.values[op.outputs[0]] = replace(value, host=None)
        return None

    def _follow(self, op: Op, name: str, value: Value) -> None:
        if value.host is None:
            return self.floating(op, "no integer layer gives its input: it is a pointwise layer of its own, computed in float")
        if not self.alone(name):
            return self.floating(op, "other nodes read its input: it is a pointwise layer of its own, computed in float")
        if value.rounded and op.op != "Clip":
            return self.floating(op, "its input is rounded to a grid whose zero point is not 0: it is a pointwise layer of its own, computed in float")
        out = Value(host=value.host, rounded=value.rounded, codes=value.codes if value.rounded else None, view=value.view)
        return self._inside(op, value.host, out)

    def _inside(self, op: Op, host: Host, out: Value) -> None:
        """The node becomes a part of a layer."""
        if host.integer:
            return self.integer(op, host.kind, out)
        self.floating(op, f"the {host.kind} that it becomes a part of runs in float")
        self.values[op.outputs[0]] = replace(out, root=op.outputs[0])
        return None

    def _half(self, name: str) -> bool:
        """Its file calls the value float16 (or of another float type than float32)."""
        return self.net.types.get(name, 0) not in (0, onnx.TensorProto.FLOAT)

    def _affine(self, op: Op) -> None:
        """With a constant that is one number, or one a channel."""
        names = [name for name in op.inputs if name not in self.constant]
        other = next((name for name in op.inputs if name in self.constant), None)
        if other is None or len(names) != 1:
            return self.floating(op, "OpenVINO computes it in float, in a pointwise layer of its own")
        shape = self.net.shapes.get(other, ())
        if int(np.prod([s or 1 for s in shape])) not in (1, *(s for s in shape if s)):
            return self.floating(op, "its constant differs along more than one dimension: it is a pointwise layer of its own, computed in float")
        value = self.value(names[0])
        if value.host is not None and value.host.kind == WEIGHTS_ONLY and self._half(names[0]):
            return self.floating(op, "its values are float16, behind a product whose weight alone is in codes: it is a pointwise layer of its own")
        if value.view and shape and int(np.prod([s or 1 for s in shape])) != 1:
            return self.floating(op, "its constant is not one number, and its input was moved: it is a pointwise layer of its own, computed in float")
        return self._follow(op, names[0], value)

    def _sum(self, op: Op) -> None:
        """A convolution takes the sum of what it gives and another value of the same shape."""
        values = [self.value(name) for name in op.inputs]
        a, b = (self.net.shapes.get(name) for name in op.inputs)
        if a != b:
            return self.floating(op, "it stretches one of its inputs: it is a pointwise layer of its own, computed in float")
        for slot, (name, value) in enumerate(zip(op.inputs, values, strict=True)):
            other = values[1 - slot]
            if value.host is None or value.view or value.host.kind != "Convolution" or not self.alone(name) or (op.op == "Sub" and slot):
                continue
            if self.static and not (value.paired or other.paired):
                continue
            if not self._free(op, op.inputs[1 - slot], value.host):
                continue
            return self._inside(op, value.host, Value(host=value.host))
        return self.floating(op, "no convolution that only it reads can write its result over the other input: it is a pointwise layer of its own, in float")

    def _free(self, op: Op, peer: str, host: Host) -> bool:
        """The convolution writes the sum over the other value: all that read it must be done before the convolution starts."""
        maker = self.net.maker.get(peer)
        names = {peer}
        if maker is not None and maker.is_dq:
            names |= {name for user, _ in self.net.readers(maker.inputs[0]) for name in user.outputs}
        if names & self.net.outputs:
            return False
        others = {user.origins[0] for name in names for user, _ in self.net.readers(name)} - {op.origins[0]}
        return others <= self._before(host.node)

    def _before(self, index: int) -> set[int]:
        """Positions of the nodes that must run before a node."""
        found: set[int] = set()
        names = [name for op in self.net.ops if op.origins[0] == index for name in op.inputs]
        while names:
            maker = self.net.maker.get(names.pop())
            if maker is not None and maker.origins[0] not in found:
                found.add(maker.origins[0])
                names += maker.inputs
        return found


def _grid(net: Net, op: Op) -> tuple[object, ...]:
    codes = codes_of(net, op)
    return (codes.grid,) if codes is not None and codes.grid is not None else tuple(op.inputs[1:])


def check(net: Net) -> LintReport:
    """Predict how OpenVINO's CPU plugin executes the nodes of a file.

    Pointwise operations count as ``int8`` when they are a part of an integer layer's kernel, and as ``float`` in layers of their own, which convert codes to
    float32 and back. ``q_left`` counts Q nodes that are computed beside the integer layers, ``dq_left`` DQ nodes whose value a float computation or an
    output of the graph reads.
    """
    walk = Walk(net)
    report = walk.run()
    runs = dict(zip(walk.nodes, report.ops, strict=True))
    left = []
    for op in net:
        if op.is_dq and op.outputs[0] not in walk.constant:
            reader = float_reader(net, op, runs)
            if reader:
                left.append((label(op), reader))
    return replace(report, dq_left=len(left), left=(*report.left, *left))


def float_reader(net: Net, dq: Op, runs: dict[int, OpReport]) -> str:
    """What keeps a DQ: a node in float that reads it, or the graph's output; empty for none."""
    for user, _ in net.edges(dq):
        row = runs.get(user.origins[0])
        if row is not None and row.runs == "float":
            return f"{row.op} {row.node}, which runs in float, reads it"
    return "its value is an output of the graph" if net.is_output(dq) else ""
