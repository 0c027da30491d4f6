"""Proof: run the artifact in ONNX Runtime and compare it with the integer reference, end to end and node by node.

Node by node means with the runtime's own inputs: the fused graph runs with every integer tensor visible, each kernel of the reference gets
the codes that the runtime had there, and its result is compared with the runtime's. A difference is thus found where it arises.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import modules as m
from fxq.backends.onnxruntime import session
from fxq.backends.reference import Reference, Step, value_name
from fxq.errors import ArtifactError
from fxq.graph import kind, module_of
from fxq.kernels import Codes
from fxq.snapshot import flat
from fxq.spec import QParams

FOREIGN = "This file belongs to another model; lower this one and verify that file"
CHUNK_BYTES = 1 << 28
ISLAND_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Difference:
    """A node whose result differs although it was given the runtime's own inputs.

    Attributes:
        node: module path (or node name) of the operation; ``tensor``: its tensor in the file.
        elements, differ: how many there are, and how many differ.
        greatest: greatest difference, in steps of the grid (of a float result: absolute).
        cause: what the file and the fused graph say about it.
    """

    node: str
    tensor: str
    elements: int
    differ: int
    greatest: float
    cause: str

    def __str__(self) -> str:
        return f"{self.node}: {self.differ} of {self.elements} elements differ by up to {self.greatest:g}; {self.cause}"


@dataclass(frozen=True)
class Proof:
    """Result of :func:`verify`.

    Attributes:
        elements, differ: of the model's outputs, end to end (runtime fully optimized).
        greatest: greatest difference of an output, in steps of its grid (of a float output: absolute).
        nodes, planned: fused nodes that were compared with the runtime's own inputs, and those that the graph has.
        hidden, hidden_differ: elements of these nodes.
        ties: elements behind float islands that are one step off (sums and exponentials differ in the last bit by runtime).
        batches: batches that were run.
        float_nodes: operations that run in float, which no integer arithmetic can promise.
        missing: tensors of the plan that the runtime's optimizer renamed or removed.
        differences: nodes that differ, in the order of the graph (of the first batch in which they do).
    """

    elements: int
    differ: int
    greatest: float
    nodes: int
    planned: int
    hidden: int
    hidden_differ: int
    ties: int
    batches: int
    float_nodes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()

    @property
    def first(self) -> str | None:
        """Module path of the first node that differs."""
        return self.differences[0].node if self.differences else None

    @property
    def ok(self) -> bool:
        """Something was compared and nothing differs. Behind float islands, outputs may differ end to end (not node by node)."""
        compared = self.batches > 0 and self.elements > 0 and (self.nodes > 0 or self.planned == 0)
        return compared and not self.differences and (self.differ == 0 or bool(self.float_nodes))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ok": self.ok, "first": self.first}

    def __str__(self) -> str:
        lines = [
            f"{self.hidden_differ} of {self.hidden} elements differ ({self.nodes} nodes compared of {self.planned}, {self.batches} batches)",
            f"end to end {self.differ} of {self.elements} output elements differ" + (f" by up to {self.greatest:g}" if self.differ else ""),
        ]
        if self.ties:
            lines.append(f"{self.ties} elements behind float islands are one step off")
        if self.float_nodes:
            some = ", ".join(self.float_nodes[:3]) + (", ..." if len(self.float_nodes) > 3 else "")
            lines.append(f"{len(self.float_nodes)} operations run in float: {some}")
        if self.differences:
            lines.append(f"the first node that differs is {self.differences[0]}")
        return "; ".join(lines)


def load(artifact: str | os.PathLike[str] | bytes) -> onnx.ModelProto:
    """Parse an ONNX file.

    Raises:
        ArtifactError: when it cannot be read or is damaged.
    """
    where = "artifact" if isinstance(artifact, bytes) else str(artifact)
    try:
        data = artifact if isinstance(artifact, bytes) else Path(artifact).read_bytes()
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
    except OSError as e:
        raise ArtifactError(f"cannot be read: {e.strerror or e}", where=where, way_out="Check the path") from e
    except Exception as e:
        raise ArtifactError(f"not a whole ONNX file: {(str(e) or type(e).__name__).splitlines()[0]}", where=where, way_out="Lower the model again") from e
    return model


class _Exposed:
    """The fused graph with every tensor visible; results are fetched in chunks, so that big nets fit in memory."""

    def __init__(self, model: bytes, steps: Sequence[Step], outputs: dict[Node, str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "fused.onnx")
            session(model, "extended", save_optimized=path, float_matmul=True)
            fused = onnx.load(path)
        self.producer = {t: n.op_type for n in fused.graph.node for t in n.output if t}
        self.merged = {t for n in fused.graph.node for t in n.output if any(i.startswith("DoubleQDQRemoved_") for i in n.input)}
        self.outputs = [o.name for o in fused.graph.output]
        nodes = {n.name.split(":")[0]: list(n.output) for n in fused.graph.node}
        tensors = {s: t for s in steps if (t := self._tensor(s, outputs, nodes)) is not None}
        for t in dict.fromkeys(tensors.values()):
            if t not in self.outputs:
                fused.graph.output.append(onnx.ValueInfoProto(name=t))
        self.session = session(fused.SerializeToString(), "off", float_matmul=True)
        floats = {o.name for o in self.session.get_outputs() if o.type == "tensor(float)"}
        self.tensors = {s: t for s, t in tensors.items() if (t in floats) == s.gives_float}
        self._feed: dict[str, Any] = {}
        self._have: dict[str, Any] = {}

    def _tensor(self, s: Step, outputs: dict[Node, str], nodes: dict[str, list[str]]) -> str | None:
        """The tensor of a step: by its name, or as the output of the node that kept its name (the runtime renames what it turns from s8 to u8)."""
        wishes = [s.name, f"{s.name}/gemm", outputs.get(s.result, "")] if s.gives_float else [s.name]
        wishes += nodes.get(s.name, [])[:1]
        wishes += nodes.get(value_name(s.split or s.core), [])[s.index : s.index + 1]
        return next((w for w in wishes if w in self.producer), None)

    def start(self, feed: dict[str, Any]) -> list[Any]:
        """Begin a batch; returns the graph's outputs."""
        self._feed, self._have = feed, {}
        return list(self.session.run(self.outputs, feed))

    def get(self, s: Step) -> Any:
        """The runtime's value of a step of the running batch."""
        tensor = self.tensors[s]
        if tensor not in self._have:
            names = self._chunk(tensor)
            self._have = dict(zip(names, self.session.run(names, self._feed), strict=True))
        return self._have[tensor]

    def _chunk(self, first: str) -> list[str]:
        steps = list(self.tensors)
        start = next(i for i, s in enumerate(steps) if self.tensors[s] == first)
        names: list[str] = []
        budget = float(CHUNK_BYTES)
        for s in steps[start:]:
            shape, dynamic = s.result.meta.get("shape", ()), s.result.meta.get("dynamic", ())
            batch = max((len(x) for x in self._feed.values() if x.ndim), default=1)
            budget -= float(np.prod([batch if d else n for n, d in zip(shape, dynamic, strict=True)])) * (4 if s.gives_float else 1)
            if names and budget < 0:
                break
            names.append(self.tensors[s])
        return list(dict.fromkeys(names))


@dataclass
class _Ledger:
    """What was compared so far."""

    exposed: _Exposed
    initializers: dict[str, onnx.TensorProto]
    reference: Reference
    count: dict[str, int] = field(default_factory=lambda: dict(elements=0, differ=0, hidden=0, hidden_differ=0, ties=0, batches=0))
    greatest: float = 0.0
    compared: set[str] = field(default_factory=set)
    differences: dict[str, Difference] = field(default_factory=dict)

    def observe(self, step: Step, value: Any) -> Any:
        """Compare one step's result with the runtime's; go on with the runtime's."""
        if step not in self.exposed.tensors:
            return None
        got = _like(self.exposed.get(step), value, step)
        ours, theirs = (value.codes, got.codes) if isinstance(value, Codes) else (value, got)
        wrong = _unequal(ours, theirs)
        differ, greatest = int(wrong.sum()), _greatest(ours, theirs, wrong)
        self.compared.add(step.name)
        self.count["hidden"] += ours.numel()
        if differ and greatest <= 1 and _behind_island(self.reference.gm, step):
            self.count["ties"] += differ
        elif differ:
            self.count["hidden_differ"] += differ
            self.differences.setdefault(step.name, Difference(step.path, step.name, ours.numel(), differ, greatest, self.cause(step)))
        return got

    def outputs(self, name: str, want: Tensor, got: Any) -> None:
        """A float output computed from the runtime's own codes must be near the runtime's: a wrong float island shows here."""
        theirs = torch.from_numpy(got)
        if want.shape != theirs.shape or not want.is_floating_point():
            return
        wrong = _unequal(want, theirs)
        near = (want - theirs).abs() <= ISLAND_TOLERANCE * theirs.abs().max().clamp(min=1e-6)
        wrong &= ~near
        if bool(wrong.any()):
            cause = _island_text(self.reference) + " gives another result than the file"
            d = Difference(name, name, want.numel(), int(wrong.sum()), _greatest(want, theirs, wrong), cause)
            self.differences.setdefault(name, d)

    def cause(self, step: Step) -> str:
        """The likeliest reason, from what the file and the fused graph hold."""
        name, path, module = step.name, step.path, step.module
        if not step.gives_float:
            qp = module_of(self.reference.gm, step.result).qparams
            if not self._same_grid(name, qp):  # type: ignore[arg-type]
                return "the file has another grid there"
        if isinstance(module, m.Quantized):
            for part, codes in (("weight_q", module.weight_codes()), ("bias_q", module.bias_codes())):
                if codes is not None and not self._same(f"{path}/{part}", codes):
                    return f"the file holds another {part.removesuffix('_q')}"
        before = [self.reference.by_result.get(a) for a in step.operands if isinstance(a, Node)]
        lost = any(b is not None and b.kind == "requantize" and b not in self.exposed.tensors for b in before)
        if lost or self.exposed.tensors[step] in self.exposed.merged:
            return "the runtime merged two grids in a row (a value whose only reader rounds it again) into one"
        if step.kind not in ("quantize", "requantize") and self.exposed.producer[self.exposed.tensors[step]] == "QuantizeLinear":
            return "the runtime did not fuse it: between its Q/DQ nodes it runs in float"
        if step.kind == "quantize":
            source: Any = module_of(self.reference.gm, step.core) if step.core.op == "call_module" else None
            if isinstance(source, m.Quantized) and source.op.bias is not None and source.bias_grid is None:
                return "its bias is float, so it is not fused"
            return _island_text(self.reference, step.core)
        return "the runtime's kernel rounds or saturates otherwise on this CPU (u8*s8 sums saturate without VNNI)"

    def _same_grid(self, name: str, qp: QParams) -> bool:
        return self._same(f"{name}_scale", qp.scale) and self._same(f"{name}_zero", qp.zero_point)

    def _same(self, name: str, want: Tensor) -> bool:
        have = self.initializers.get(name)
        if have is None:
            return True
        return bool(np.array_equal(numpy_helper.to_array(have).astype(np.float64), want.detach().cpu().numpy().astype(np.float64)))


def _island_text(reference: Reference, node: Node | None = None) -> str:
    if node is not None:
        return f"the float operation {value_name(node)} before it"
    return "a float operation (" + ", ".join(reference.float_nodes[:3]) + ")"


def _behind_island(gm: GraphModule, step: Step) -> bool:
    return step.kind == "quantize" and kind(gm, step.core) not in ("input", "attr")


def _like(got: Any, value: Any, step: Step) -> Any:
    """The runtime's tensor in the form of the reference's value.

    Raises:
        ArtifactError: when the shapes do not fit.
    """
    t = torch.from_numpy(got)
    ours = value.codes if isinstance(value, Codes) else value
    if t.numel() != ours.numel():
        raise ArtifactError(f"the tensor has shape {list(t.shape)}, the graph {list(ours.shape)}", where=step.name, way_out=FOREIGN)
    t = t.reshape(ours.shape)
    if not isinstance(value, Codes):
        return t
    if t.dtype == torch.uint8 and value.qp.spec.qmin < 0:  # the runtime rewrites s8 as u8
        t = (t.to(torch.int32) + value.qp.spec.qmin).to(value.qp.spec.dtype)
    return Codes(t, value.qp)


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    return ~((a == b) | (torch.isnan(a) & torch.isnan(b))) if a.is_floating_point() else a != b


def _greatest(a: Tensor, b: Tensor, wrong: Tensor) -> float:
    return float((a[wrong].to(torch.float64) - b[wrong].to(torch.float64)).abs().max()) if bool(wrong.any()) else 0.0


def verify(
    gm: GraphModule,
    artifact: str | os.PathLike[str] | bytes,
    data: Iterable[Any],
    *,
    input_names: Sequence[str] | None = None,
) -> Proof:
    """Compare the artifact with the integer reference on the same inputs.

    Args:
        gm: a converted graph.
        artifact: path or bytes of its ONNX file.
        data: batches: tuples of positional inputs, or single tensors. One batch is in memory at a time.
        input_names: names of the file's inputs in the graph's order; default: the graph's placeholders.

    Raises:
        ArtifactError: damaged or foreign file, or inputs that do not fit it.

    Weight-only matrix products run in float32 here (see :func:`fxq.backends.onnxruntime.session`).
    """
    model = load(artifact)
    raw = model.SerializeToString()
    full, reference = session(raw, float_matmul=True), Reference(gm)
    names = list(input_names or [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"])
    outputs = [o.name for o in full.get_outputs()]
    _require_own(model, reference, names, [i.name for i in full.get_inputs()])
    exposed = _Exposed(raw, reference.steps, _outputs(gm, outputs))
    ledger = _Ledger(exposed, {t.name: t for t in model.graph.initializer}, reference)
    for item in data:
        batch = tuple(x.cpu() for x in (item if isinstance(item, (tuple, list)) else (item,)))
        feed = _feed(names, batch)
        try:
            got, inner = full.run(outputs, feed), exposed.start(feed)
        except Exception as e:
            raise ArtifactError(f"the runtime refuses the inputs: {str(e).splitlines()[0]}", way_out="Check the shapes of the data") from e
        _end_to_end(ledger, flat(reference(*batch)), got, [_scale(gm, n) for n in _output_nodes(gm)])
        forced = flat(reference.walk(batch, ledger.observe))
        for name, want, value in zip(outputs, forced, inner, strict=True):
            ledger.outputs(name, want, value)
        ledger.count["batches"] += 1
    missing = tuple(s.name for s in reference.steps if s.name not in ledger.compared)
    order = {s.name: i for i, s in enumerate(reference.steps)}
    differences = tuple(sorted(ledger.differences.values(), key=lambda d: order.get(d.tensor, len(order))))
    return Proof(
        nodes=len(ledger.compared), planned=len(reference.steps), greatest=ledger.greatest, float_nodes=tuple(reference.float_nodes),
        missing=missing, differences=differences, **ledger.count,
    )  # fmt: skip


def _require_own(model: onnx.ModelProto, reference: Reference, names: list[str], have: list[str]) -> None:
    """Refuse a file that was made from another model."""
    if names != have:
        raise ArtifactError(f"its inputs are {', '.join(have)}, the graph's {', '.join(names)}", way_out=FOREIGN)
    tensors = {t for n in model.graph.node for t in n.output}
    wanted = [s.name for s in reference.steps if not s.gives_float]
    lost = [w for w in wanted if w not in tensors]
    if wanted and len(lost) * 2 > len(wanted):
        raise ArtifactError(f"{len(lost)} of {len(wanted)} quantized tensors are not in it (the first is {lost[0]})", way_out=FOREIGN)


def _feed(names: list[str], batch: tuple[Tensor, ...]) -> dict[str, Any]:
    if len(names) != len(batch):
        raise ArtifactError(f"a batch has {len(batch)} inputs, the file {len(names)}", way_out="Give one tensor for each of " + ", ".join(names))
    return {n: x.numpy() for n, x in zip(names, batch, strict=True)}


def _output_nodes(gm: GraphModule) -> list[Node]:
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return [n for n in torch.utils._pytree.tree_leaves(output.args[0]) if isinstance(n, Node)]


def _outputs(gm: GraphModule, names: list[str]) -> dict[Node, str]:
    """Node -> the file's output that shows its value."""
    nodes = _output_nodes(gm)
    return dict(zip(nodes, names, strict=True)) if len(nodes) == len(names) else {}


def _scale(gm: GraphModule, n: Node) -> float:
    return float(module_of(gm, n).scale) if kind(gm, n) == "fake_quantize" else 1.0  # type: ignore[arg-type]


def _end_to_end(ledger: _Ledger, want: Sequence[Tensor], got: Sequence[Any], scales: Sequence[float]) -> None:
    if len(want) != len(got):
        raise ArtifactError(f"it has {len(got)} outputs, the graph {len(want)}", way_out=FOREIGN)
    for i, (a, value) in enumerate(zip(want, got, strict=True)):
        b = torch.from_numpy(value)
        if a.shape != b.shape:
            raise ArtifactError(f"output {i} has shape {list(b.shape)}, the graph's {list(a.shape)}", way_out=FOREIGN)
        wrong = _unequal(a, b)
        ledger.count["elements"] += a.numel()
        ledger.count["differ"] += int(wrong.sum())
        ledger.greatest = max(ledger.greatest, _greatest(a, b, wrong) / (scales[i] if len(scales) == len(want) else 1.0))
