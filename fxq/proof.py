"""Proof: run the artifact in ONNX Runtime and compare it with the integer reference, end to end and node by node.

Node by node means with the runtime's own inputs: the fused graph runs with every integer tensor visible, each kernel of the reference gets
the codes that the runtime had there, and its result is compared with the runtime's. A difference is thus found where it arises.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from fxq import modules as m
from fxq import numerics
from fxq.backends.onnx_codes import read_grid
from fxq.backends.onnx_half import on_half_grids
from fxq.backends.onnxruntime import session
from fxq.backends.reference import Reference, Step, value_name
from fxq.errors import ArtifactError
from fxq.exposed import Exposed, constant
from fxq.graph import input_names as graph_inputs
from fxq.graph import kind, module_of
from fxq.kernels import Codes
from fxq.lowering import Artifact, contents
from fxq.snapshot import flat
from fxq.spec import QParams
from fxq.verdict import BOUND, FLIPS, HALF_BOUND, Difference, OutputProof, Proof

__all__ = ["Difference", "OutputProof", "Proof", "load", "verify"]

EXACT = ("reshape", "permute", "slice", "split", "getitem", "cat", "index_select", "expand", "relu", "max_pool", "pad", "attr")
TINY = torch.finfo(torch.float32).tiny
FOREIGN = "This file belongs to another model; lower this one and verify that file"


def load(artifact: str | os.PathLike[str] | bytes | Artifact) -> onnx.ModelProto:
    """Parse an ONNX file.

    Raises:
        ArtifactError: when it cannot be read or is damaged.
    """
    data, where = contents(artifact)
    try:
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
    except Exception as e:
        raise ArtifactError(f"not a whole ONNX file: {(str(e) or type(e).__name__).splitlines()[0]}", where=where, way_out="Lower the model again") from e
    return model


@dataclass
class _Ledger:
    """What was compared so far."""

    exposed: Exposed
    model: onnx.ModelProto
    reference: Reference
    bound: float = BOUND
    count: dict[str, int] = field(default_factory=lambda: dict(elements=0, differ=0, hidden=0, hidden_differ=0, batches=0))
    greatest: float = 0.0
    compared: set[str] = field(default_factory=set)
    ties: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, OutputProof] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        everything = self.bound > BOUND  # in float16 even an input is rounded before it meets its grid
        self.inexact = set(self.reference.gm.graph.nodes) if everything else inexact(self.reference)  # values that float arithmetic may move

    def observe(self, step: Step, value: Any) -> Any:
        """Compare one step's result with the runtime's; go on with the runtime's."""
        if step not in self.exposed.tensors:
            return None
        got = _like(self.exposed.get(step), value, step)
        ours, theirs = (_comparable(value.codes), _comparable(got.codes)) if isinstance(value, Codes) else (value, got)
        wrong = unequal(ours, theirs)
        self.compared.add(step.name)
        self.count["hidden"] += ours.numel()
        if not bool(wrong.any()):
            return got
        if step.kind == "quantize" and step.core in self.inexact:
            ties = wrong & near_half_step(self.reference.rounding, ours, theirs, _quantizer(self.reference, step).rounding, self.bound)
            self.ties[step.name] = self.ties.get(step.name, 0) + int(ties.sum())
            wrong = wrong & ~ties
        differ = int(wrong.sum())
        if differ:
            self.count["hidden_differ"] += differ
            greatest = gap(ours, theirs, wrong)
            self.differences.setdefault(step.name, Difference(step.path, step.name, ours.numel(), differ, greatest, self.cause(step)))
        return got

    def output(self, name: str, want: Tensor, got: Any) -> None:
        """An output behind float operations, from the runtime's own codes: a wrong float operation shows here."""
        theirs, o = torch.from_numpy(got), self.outputs[name]
        if o.exact or want.shape != theirs.shape:
            return
        wrong = unequal(want, theirs)
        if want.is_floating_point():
            error = relative(want, theirs, wrong)
            self.outputs[name] = replace(o, error=max(o.error, error))
            bad = error > self.bound or bool((wrong & (torch.isnan(want) | torch.isnan(theirs))).any())
        else:
            bad = float(wrong.to(torch.float64).mean()) > FLIPS
        if bad:
            cause = f"{_island_text(self.reference)} gives another result than the file"
            self.differences.setdefault(name, Difference(name, name, want.numel(), int(wrong.sum()), gap(want, theirs, wrong), cause))

    def end_to_end(self, names: Sequence[str], exact: Sequence[bool], want: Sequence[Tensor], got: Sequence[Any], scales: Sequence[float]) -> None:
        """Compare the outputs of the model."""
        if len(want) != len(got):
            raise ArtifactError(f"it has {len(got)} outputs, the graph {len(want)}", way_out=FOREIGN)
        for i, (name, a, value) in enumerate(zip(names, want, got, strict=True)):
            b = torch.from_numpy(value)
            if a.shape != b.shape:
                raise ArtifactError(f"output {i} has shape {list(b.shape)}, the graph's {list(a.shape)}", way_out=FOREIGN)
            wrong = unequal(a, b)
            differ = int(wrong.sum())
            self.count["elements"] += a.numel()
            self.count["differ"] += differ
            self.greatest = max(self.greatest, gap(a, b, wrong) / scales[i])
            o = self.outputs.setdefault(name, OutputProof(name, exact[i]))
            drift = max(o.drift, relative(a, b, wrong))
            self.outputs[name] = replace(o, elements=o.elements + a.numel(), differ=o.differ + differ, drift=drift)

    def cause(self, step: Step) -> str:
        """The likeliest reason, from what the file and the fused graph hold."""
        name, path, module = step.name, step.path, step.module
        if not step.gives_float and not self._same_grid(name, read_grid(self.reference.gm, step.result)):
            return "the file has another grid there"
        if isinstance(module, m.Quantized):
            for part, codes in (("weight_q", module.weight_codes()), ("bias_q", module.bias_codes())):
                if codes is not None and not self._same(f"{path}/{part}", codes):
                    return f"the file holds another {part.removesuffix('_q')}"
        before = [self.reference.by_result.get(a) for a in step.operands if isinstance(a, Node)]
        lost = any(b is not None and b.kind == "requantize" and b not in self.exposed.tensors for b in before)
        if lost or self.exposed.tensors[step] in self.exposed.merged:
            return "the runtime merged two grids in a row (a value whose only reader rounds it again) into one"
        if step.kind not in ("quantize", "requantize") and self.exposed.rounds_float(step):
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
        have = constant(self.model, name)
        return have is None or bool(np.array_equal(have.astype(np.float64), want.detach().cpu().numpy().astype(np.float64)))


def _quantizer(reference: Reference, step: Step) -> m.FakeQuantize:
    fq = module_of(reference.gm, step.result)
    assert isinstance(fq, m.FakeQuantize)
    return fq


def _island_text(reference: Reference, node: Node | None = None) -> str:
    if node is not None:
        return f"the float operation {value_name(node)} before it"
    return "a float operation (" + ", ".join(reference.float_nodes[:3]) + ")"


def inexact(reference: Reference) -> set[Node]:
    """Nodes whose values depend on float arithmetic; movers, ReLU and max-pool only hand values on."""
    islands, found = set(reference.islands), set()
    for n in reference.gm.graph.nodes:
        own = n in islands and kind(reference.gm, n) not in EXACT
        if own or any(a in found for a in n.all_input_nodes):
            found.add(n)
    return found


def near_half_step(value: Tensor, ours: Tensor, theirs: Tensor, qp: QParams, bound: float) -> Tensor:
    """Where two codes are one step apart because ``value`` lies next to the half step between them."""
    a, b, v = ours.to(torch.float64), theirs.to(torch.float64), value.to(torch.float64)
    if qp.spec.kind == "binary":  # its only border is 0
        return v.abs() <= bound * v.abs().max()
    if qp.spec.kind == "float8":  # its steps are not alike: the other code must be what a value within the bound rounds to
        ends = [numerics.quantize(v + side * bound * v.abs().max(), qp).to(torch.float64) for side in (-1, 1)]
        return (ends[0] <= b) & (b <= ends[1])
    allowed = bound * v.abs().max() / qp.scale.to(torch.float64)
    steps = v / qp.scale.to(torch.float64) + qp.zero_point
    return ((a - b).abs() == 1) & ((steps - (a + b) / 2).abs() <= allowed)


def _like(got: Any, value: Any, step: Step) -> Any:
    """The runtime's tensor in the form of the reference's value.

    Raises:
        ArtifactError: when the shapes do not fit.
    """
    t = torch.from_numpy(got)
    if isinstance(value, Codes) and value.qp.spec.kind == "float8":  # the runtime hands its bits out as bytes
        t = t.view(torch.float8_e4m3fn)
    ours = value.codes if isinstance(value, Codes) else value
    if t.numel() != ours.numel():
        raise ArtifactError(f"the tensor has shape {list(t.shape)}, the graph {list(ours.shape)}", where=step.name, way_out=FOREIGN)
    t = t.reshape(ours.shape)
    if not isinstance(value, Codes):
        return t
    if t.dtype == torch.uint8 and value.qp.spec.qmin < 0:  # the runtime rewrites s8 as u8
        t = (t.to(torch.int32) + value.qp.spec.qmin).to(value.qp.spec.dtype)
    return Codes(t, value.qp)


def _comparable(codes: Tensor) -> Tensor:
    """torch compares no 8-bit floats."""
    return codes.to(torch.float32) if codes.dtype == torch.float8_e4m3fn else codes


def unequal(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ; NaN is equal to NaN."""
    return ~((a == b) | (torch.isnan(a) & torch.isnan(b))) if a.is_floating_point() else a != b


def gap(a: Tensor, b: Tensor, wrong: Tensor) -> float:
    """Greatest difference of those in ``wrong``."""
    return float((a[wrong].to(torch.float64) - b[wrong].to(torch.float64)).abs().max()) if bool(wrong.any()) else 0.0


def relative(a: Tensor, b: Tensor, wrong: Tensor) -> float:
    """Greatest difference relative to the greatest finite magnitude of ``b``."""
    top = float(torch.nan_to_num(b.to(torch.float64), posinf=0.0, neginf=0.0).abs().max()) if b.numel() else 0.0
    return gap(a, b, wrong) / max(top, TINY)


def verify(
    gm: GraphModule,
    artifact: str | os.PathLike[str] | bytes | Artifact,
    data: Iterable[Any],
    *,
    input_names: Sequence[str] | None = None,
    fused: bool = True,
) -> Proof:
    """Compare the artifact with the integer reference on the same inputs.

    Args:
        gm: a converted graph.
        artifact: path or bytes of its ONNX file, or the artifact that ``lower`` gave.
        data: batches: tuples of positional inputs, or single tensors. One batch is in memory at a time.
        input_names: names of the file's inputs in the graph's order; default: the graph's placeholders.
        fused: the file's Q/DQ nodes fuse to integer kernels in ONNX Runtime. Otherwise (a file for TensorRT) it runs as it is written,
            optimizations off, and is compared with the simulator: each quantized tensor given the runtime's own inputs.

    Raises:
        ArtifactError: damaged or foreign file, or inputs that do not fit it.

    Weight-only matrix products run in float32 here (see :func:`fxq.backends.onnxruntime.session`).
    """
    model = load(artifact)
    raw = model.SerializeToString()
    half = any(p.key == "fxq.float" and p.value == "float16" for p in model.metadata_props)
    gm = on_half_grids(gm) if half else gm
    full, reference = session(raw, "all" if fused else "off", float_matmul=True), Reference(gm, fused)
    names = list(input_names or graph_inputs(gm))
    outputs = [o.name for o in full.get_outputs()]
    _require_own(model, reference, names, [i.name for i in full.get_inputs()])
    exposed = Exposed(raw, reference.steps, _outputs(reference.gm, outputs), "extended" if fused else "off")
    ledger = _Ledger(exposed, model, reference, HALF_BOUND if half else BOUND)
    nodes = output_nodes(reference.gm)
    whole = len(nodes) == len(outputs)
    exact = [n not in ledger.inexact for n in nodes] if whole else [not ledger.inexact] * len(outputs)
    scales = [_scale(reference.gm, n) for n in nodes] if whole else [1.0] * len(outputs)
    for item in data:
        batch = tree_map(Tensor.cpu, tuple(item) if isinstance(item, (tuple, list)) else (item,))
        feed = _feed(names, batch)
        try:
            got, inner = full.run(outputs, feed), exposed.start(feed)
        except Exception as e:
            raise ArtifactError(f"the runtime refuses the inputs: {str(e).splitlines()[0]}", way_out="Check the shapes of the data") from e
        ledger.end_to_end(outputs, exact, flat(reference(*batch)), got, scales)
        forced = flat(reference.walk(batch, ledger.observe))
        for name, want, value in zip(outputs, forced, inner, strict=True):
            ledger.output(name, want, value)
        ledger.count["batches"] += 1
    return _proof(ledger)


def _proof(ledger: _Ledger) -> Proof:
    reference = ledger.reference
    for o in ledger.outputs.values():
        if o.exact and o.differ and not ledger.differences:
            cause = "every node is equal by itself: the runtime optimizes the whole file otherwise than the graph that was inspected"
            ledger.differences[o.name] = Difference(o.name, o.name, o.elements, o.differ, ledger.greatest, cause)
    order = {s.name: i for i, s in enumerate(reference.steps)}
    ties = {name: n for name, n in ledger.ties.items() if n}
    return Proof(
        nodes=len(ledger.compared), bound=ledger.bound, what="integer nodes" if reference.fused else "quantized tensors",
        planned=len(reference.steps), greatest=ledger.greatest, float_nodes=tuple(reference.float_nodes),
        ties=sum(ties.values()), tie_nodes=tuple(ties.items()), outputs=tuple(ledger.outputs.values()),
        missing=tuple(s.name for s in reference.steps if s.name not in ledger.compared),
        differences=tuple(sorted(ledger.differences.values(), key=lambda d: order.get(d.tensor, len(order)))), **ledger.count,
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


def _feed(names: list[str], batch: tuple[Any, ...]) -> dict[str, Any]:
    batch = tuple(tree_leaves(batch))
    if len(names) != len(batch):
        raise ArtifactError(f"a batch has {len(batch)} inputs, the file {len(names)}", way_out="Give one tensor for each of " + ", ".join(names))
    return {n: x.numpy() for n, x in zip(names, batch, strict=True)}


def output_nodes(gm: GraphModule) -> list[Node]:
    """The nodes whose values the graph gives."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return [n for n in torch.utils._pytree.tree_leaves(output.args[0]) if isinstance(n, Node)]


def _outputs(gm: GraphModule, names: list[str]) -> dict[Node, str]:
    """Node -> the file's output that shows its value."""
    nodes = output_nodes(gm)
    return dict(zip(nodes, names, strict=True)) if len(nodes) == len(names) else {}


def _scale(gm: GraphModule, n: Node) -> float:
    return float(module_of(gm, n).scale) if kind(gm, n) == "fake_quantize" else 1.0  # type: ignore[arg-type]
