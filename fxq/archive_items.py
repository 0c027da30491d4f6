"""A compiled graph as what an archive holds: records of tensors, small tensors, the graph's JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq import numerics
from fxq.archive.encoder import Factored, Plain
from fxq.errors import LoweringError
from fxq.graph import kind, module_of
from fxq.graph_json import Writer
from fxq.graph_slim import below, slim
from fxq.modules import FakeQuantize, Quantized, kind_of
from fxq.schemes import Scheme
from fxq.shared import SharedWeight
from fxq.spec import QParams
from fxq.targets import Target

Array = np.ndarray[Any, Any]
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16",
    torch.uint16: "U16", torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
"""Types of tensors that an archive holds, by its names."""
SMALL = 256
"""Bytes up to which a tensor that is no layer's own stands in the index."""
ENTRIES = 1 << 15
"""Greatest number of entries of a record's table."""
PARTS = ("symbols", "book", "scale", "zero")
"""Parts of a record that a reference can name behind its colon."""
INSIDE_SHARED = ("codes", "book", "rows")
MARKS = ("weight_masked", "mask_scope", "mask_level", "mask_kept")
"""What pruning notes on layers for passes to come: of no use behind the last one, and a mask has the size of a weight."""


@dataclass
class Plan:
    """What an archive of a graph holds.

    Attributes:
        head: JSON of scheme, target, graph and small tensors.
        codes: records of integer codes, which stand for float32 weights.
        sources: record -> what makes it: a tensor, a layer with a shared weight, or a quantized layer.

    A record of a layer's tensor has the user's name of it; one that begins with ``@`` is of a grid. ``weights`` of the head leads from names of tensors that
    have no record of their own (the second of two tied layers, weights in blocks) to their references.
    """

    head: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Tensor | SharedWeight | Quantized] = field(default_factory=dict)
    codes: set[str] = field(default_factory=set)

    def items(self) -> Iterator[Factored | Plain]:
        """The records, made one by one."""
        for name, source in self.sources.items():
            role = "codes" if name in self.codes else ""
            if isinstance(source, Tensor):
                yield plain(name, source, role)
            else:
                yield _shared(name, source) if isinstance(source, SharedWeight) else _quantized(name, source)


def plain(name: str, t: Tensor, role: str = "") -> Plain:
    """A tensor as it is; bfloat16 as its bits. ``role`` is for reports.

    Raises:
        LoweringError: for a type that no archive holds.
    """
    if t.dtype not in DTYPES or t.layout != torch.strided:
        raise LoweringError(f"an archive holds no tensor of type {t.dtype}, {t.layout}", where=name, way_out="Convert it to float32 or an integer type")
    flat = t.detach().cpu().contiguous()
    return Plain(name, (flat.view(torch.uint16) if t.dtype == torch.bfloat16 else flat).numpy(), dtype=DTYPES[t.dtype], role=role)


def plan(gm: GraphModule, scheme: Scheme, target: Target, factored: bool = True) -> Plan:
    """What to write for a compiled graph.

    Args:
        factored: weights that have codes are written as codes and a table; otherwise every tensor as it is.

    Raises:
        ArtifactError: for modules or values that no file may hold. LoweringError: for types that no archive holds.
    """
    return _Planner(gm).plan(scheme, target, factored)


def require_writable(gm: GraphModule) -> None:
    """Refuse modules and values that no file may hold, before any work.

    Raises:
        ArtifactError: naming the module or node.
    """
    _References().graph(gm)


class _References(Writer):
    """The JSON, with the graph's own tensors instead of copies. ``trained``: names of those that are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: set[str] = set()

    def _tensor(self, t: Tensor, name: str) -> dict[str, Any]:
        key = self._names.setdefault(id(t), name)
        self.tensors.setdefault(key, t.detach())
        self.trained |= {key} if isinstance(t, nn.Parameter) else set()
        return {"tensor": key, "parameter": isinstance(t, nn.Parameter), "grad": t.requires_grad}

    def key(self, t: Tensor | None) -> str:
        """Name under which the JSON asks for ``t``; empty when it does not."""
        return self._names.get(id(t), "")


class _Planner:
    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.w, self.out = gm, _References(), Plan()
        self.live = {id(m) for n in gm.graph.nodes if n.op == "call_module" for m in module_of(gm, n).modules()}
        self.read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
        self.json = _needed(gm, self.w.graph(gm), self.live, self.read)
        self.keys = set(_keys(self.json))
        self.refs: dict[str, str | int] = {}
        self.small: list[Any] = []
        self.index: dict[str, int] = {}
        self.bases = _bases(gm)
        self.weights: dict[str, str | int] = {}

    def plan(self, scheme: Scheme, target: Target, factored: bool) -> Plan:
        users = _users(self.gm, self.live)
        for path, m in self.gm.named_modules():
            if factored and id(m) in self.live and isinstance(m, SharedWeight):
                self._place_shared(path, m)
            elif factored and id(m) in self.live and isinstance(m, Quantized) and isinstance(m.op.weight, nn.Parameter):
                self._place_quantized(path, m, users[id(m.op.weight)])
            if not isinstance(m, FakeQuantize):
                self._place_all(path, m, factored)
        self._place_products()
        for key, t in self.w.tensors.items():
            if key in self.keys and key not in self.refs:
                self.refs[key] = self._inner(key, t)
        fields = {f.name: self.w.value(getattr(scheme, f.name), f.name) for f in dataclasses.fields(scheme) if getattr(scheme, f.name) != f.default}
        kept = "compiled" if any("integer" in n.meta for n in self.gm.graph.nodes) else "pruned"  # what compile() gives is annotated
        head = {"kind": kept, "scheme": fields, "target": target.name, "graph": slim(self.json, self.refs), "small": self.small, "weights": self.weights}
        self.out.head = {k: v for k, v in head.items() if v}
        return self.out

    def _record(self, wish: str, source: Tensor | SharedWeight | Quantized) -> str:
        """Add a record; its reference."""
        if isinstance(source, Tensor) and source.dtype not in DTYPES:
            plain(wish, source)
        wish = f"{wish}#" if wish.rpartition(":")[2] in PARTS else wish
        name, n = wish, 0
        while name in self.out.sources:
            n += 1
            name = f"{wish}#{n}"
        self.out.sources[name] = source
        return f"/{name}"

    def _place_all(self, path: str, m: nn.Module, factored: bool) -> None:
        """The tensors that a module of the user's holds itself, where a node runs it or reads them."""
        for name, t in [*m._parameters.items(), *m._buffers.items()]:
            inner = isinstance(m, SharedWeight) and name in INSIDE_SHARED
            if t is not None and not inner and (id(m) in self.live or f"{path}.{name}".lstrip(".") in self.read):
                self._place_own(f"{self.bases[path]}.{name}" if path else name, t)
        if isinstance(m, SharedWeight) and id(m) in self.live and not factored:
            if self.w.key(m.codes) not in self.refs:  # a record, so that layers with one weight have one again
                self.refs[self.w.key(m.codes)] = self._record(f"@{self.w.key(m.codes)}", m.codes)
            parts = [None if t is None else self._known(t) for t in (m.codes, m.book, m.rows)]
            self.weights[f"{self.bases[path]}.weight"] = self._entry({"table": [*parts, m.axis]})

    def _place_own(self, name: str, t: Tensor) -> None:
        """A tensor of a layer, which may be another's as well."""
        ref = self.refs.get(self.w.key(t))
        if ref is None:
            ref = self.refs[self.w.key(t)] = self._record(name, t)
        if ref != f"/{name}":
            self.weights[name] = ref

    def _place_shared(self, path: str, m: SharedWeight) -> None:
        name, codes, book = f"{self.bases[path]}.weight", self.w.key(m.codes), self.w.key(m.book)
        if codes in self.refs:  # a second layer with the same weight
            rows = None if m.rows is None else self._known(m.rows)
            self.weights[name] = self._entry({"table": [self.refs[codes], self._known(m.book), rows, m.axis]})  # integer layers have books of their own
            return
        ref = self._record(name, m)
        self.refs[codes], self.refs[book] = f"{ref}:symbols", f"{ref}:book"
        if m.rows is not None:
            self.refs[self.w.key(m.rows)] = f"{ref}:scale"
        if ref != f"/{name}":
            self.weights[name] = ref
        q = self.gm.get_submodule(path.rpartition(".")[0]) if path.endswith(".op") else None
        if isinstance(q, Quantized) and m.rows is not None and torch.equal(q.weight_grid.scale, m.rows):
            self.refs[self.w.key(q.weight_grid.scale)] = f"{ref}:scale"

    def _place_quantized(self, path: str, q: Quantized, users: list[Quantized | None]) -> None:
        qp, key = q.weight_grid.qparams, self.w.key(q.op.weight)  # type: ignore[arg-type]
        alone = all(u is not None and u.weight_grid.qparams.same_grid(qp) for u in users)
        if key in self.refs or not alone or not _codable(q):
            return
        base = self.bases[path]
        if qp.spec.block is not None:
            codes, scale = self._record(f"@{base}.weight", q.weight_codes()), self._record(f"@{base}.scale", qp.scale)
            self.out.codes.add(str(codes)[1:])
            zero = self._record(f"@{base}.zero", qp.zero_point) if bool((qp.zero_point != 0).any()) else None
            self.refs[key] = self.weights[f"{base}.weight"] = self._entry({"blocks": [codes, scale, zero, str(qp.spec)]})
            self.refs[self.w.key(qp.scale)] = scale
            return
        ref = self._record(f"{base}.weight", q)
        self.refs[key] = ref
        if qp.scale.ndim:
            self.refs[self.w.key(qp.scale)] = f"{ref}:scale"
        if qp.scale.ndim and bool((qp.zero_point != 0).any()):
            self.refs[self.w.key(qp.zero_point)] = f"{ref}:zero"

    def _place_products(self) -> None:
        """Scales of int32 biases, which are products of two others."""
        for node in self.gm.graph.nodes:
            q = module_of(self.gm, node) if node.op == "call_module" else None
            if not isinstance(q, Quantized) or q.bias_grid is None or self.w.key(q.bias_grid.scale) in self.refs or q.bias_grid.scale.numel() * 4 <= SMALL // 8:
                continue
            source = node.all_input_nodes[0]
            fq = module_of(self.gm, source) if kind(self.gm, source) == "fake_quantize" else None
            if isinstance(fq, FakeQuantize) and torch.equal(numerics.bias_qparams(fq.qparams, q.weight_grid.qparams).scale, q.bias_grid.scale):
                factors = [self._known(fq.scale), self._known(q.weight_grid.scale)]
                self.refs[self.w.key(q.bias_grid.scale)] = self._entry({"product": factors})

    def _known(self, t: Tensor) -> str | int:
        key = self.w.key(t)
        if key not in self.refs:
            self.refs[key] = self._inner(key, t)
        return self.refs[key]

    def _inner(self, key: str, t: Tensor) -> str | int:
        """Reference of a tensor that is no layer's own."""
        if t.dtype not in DTYPES:
            plain(key, t)
        array = plain(key, t).array
        raw, first = array.tobytes(), array.reshape(-1)[:1].tobytes()
        own = key if key in self.w.trained else ""
        if raw == first * array.size and array.size <= 1 << 20:
            return self._entry([DTYPES[t.dtype], list(t.shape), first.hex()], own)
        return self._entry([DTYPES[t.dtype], list(t.shape), raw.hex()], own) if len(raw) <= SMALL else self._record(f"@{key}", t)

    def _entry(self, entry: Any, own: str = "") -> int:
        """Number of a small tensor; equal ones are one, but for parameters: those would be trained as one, so ``own`` tells them apart."""
        i = self.index.setdefault(f"{own}{entry!r}", len(self.small))
        if i == len(self.small):
            self.small.append(entry)
        return i


def _bases(gm: GraphModule) -> dict[str, str]:
    """Module path -> path for the user: without the ``op`` inside quantized layers."""
    bases, classes = {"": ""}, {"": ""}
    for path, m in gm.named_modules():
        if path:
            parent, _, name = path.rpartition(".")
            classes[path] = f"{type(m).__module__}.{type(m).__qualname__}"
            bases[path] = below(bases[parent], classes[parent], name)
    return bases


def _needed(gm: GraphModule, graph: dict[str, Any], live: set[int], read: set[str]) -> dict[str, Any]:
    """The JSON without modules and tensors that no node runs or reads (float layers that a rewrite replaced); what holds others is a bare ``Module``."""

    done = any("integer" in n.meta for n in gm.graph.nodes)

    def whole(entry: Any) -> Any:
        if not done or entry is None or "ref" in entry:
            return entry
        plain = {k: v for k, v in entry["attributes"].items() if k not in MARKS}
        return {**entry, "attributes": plain, "children": {name: whole(c) for name, c in entry["children"].items()}}

    def kept(entry: dict[str, Any] | None, path: str) -> dict[str, Any] | None:
        if entry is None or id(gm.get_submodule(path)) in live or "ref" in entry:
            return whole(entry) if entry is not None and id(gm.get_submodule(path)) in live else None
        children = {name: c for name, child in entry["children"].items() if (c := kept(child, f"{path}.{name}")) is not None}
        own = {g: {k: t for k, t in entry[g].items() if f"{path}.{k}" in read} for g in ("parameters", "buffers")}
        if not children and not any(own.values()):
            return None
        fleeting = [k for k in entry["fleeting"] if k in own["buffers"]]
        return {"class": "torch.nn.modules.module.Module", "training": False, "attributes": {}, **own, "fleeting": fleeting, "children": children}

    modules = {name: c for name, child in graph["modules"].items() if (c := kept(child, name)) is not None}
    return {**graph, "modules": modules, "tensors": {k: t for k, t in graph["tensors"].items() if k in read}}


def _keys(v: Any) -> Iterator[str]:
    """Names of the tensors that a value of the JSON asks for."""
    if isinstance(v, dict) and isinstance(v.get("tensor"), str) and "parameter" in v:
        yield v["tensor"]
    elif isinstance(v, (dict, list)):
        for x in v.values() if isinstance(v, dict) else v:
            yield from _keys(x)


def _users(gm: GraphModule, live: set[int]) -> dict[int, list[Quantized | None]]:
    """Parameter (its id) -> the quantized layers that it is the weight of; ``None`` for any other user."""
    found: dict[int, list[Quantized | None]] = {}
    ops = {id(m.op): m for m in gm.modules() if isinstance(m, Quantized)}
    for m in filter(lambda m: id(m) in live or m is gm, gm.modules()):
        for name, p in m._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append(ops.get(id(m)) if name == "weight" else None)
    return found


def _codable(q: Quantized) -> bool:
    """The weight is what its codes say: the codes follow from ``(code - zero) * scale``, so that the float weight need not be kept."""
    grid = q.weight_grid
    if not grid.quantizing or grid.step is not None or (grid.spec.bits > 8 and grid.spec.kind != "float8"):
        return False
    codes = q.weight_codes()
    real = numerics.dequantize(codes, grid.qparams)
    again = numerics.quantize(real, grid.qparams)
    raw = (torch.uint8,) if codes.element_size() == 1 else ()
    return bool(torch.isfinite(real).all()) and torch.equal(again.view(*raw), codes.view(*raw))


def _axis(qp: QParams, ndim: int) -> int:
    return -1 if qp.spec.axis is None else qp.spec.axis % ndim


def _numpy(t: Tensor | None) -> Array | None:
    return None if t is None else t.detach().cpu().contiguous().numpy().reshape(-1)


def _shared(name: str, m: SharedWeight) -> Factored:
    table = m.table.detach().cpu().numpy()
    ints = table.astype(np.int8) if m.rows is not None and bool((np.abs(table) <= 127).all()) else None
    if ints is not None and ints.astype(np.float32).tobytes() == table.tobytes():  # the codes of an integer grid
        table = ints
    codes = m.codes.cpu().contiguous().numpy()
    codes = codes if codes.dtype == np.uint8 else codes.view(np.uint16)
    return Factored(name, codes, table, "F32", _numpy(m.rows), None, m.axis, role=kind_of(m))


def _quantized(name: str, q: Quantized) -> Factored:
    qp, codes = q.weight_grid.qparams, q.weight_codes().cpu().contiguous()
    raw = codes.view(torch.uint8).numpy().tobytes()
    count = np.zeros(256, np.int64)
    for start in range(0, len(raw), 1 << 20):
        count += np.bincount(np.frombuffer(raw, np.uint8, min(1 << 20, len(raw) - start), start), minlength=256)
    used = np.flatnonzero(count).astype(np.uint8)
    real = torch.from_numpy(used).view(codes.dtype)
    table = (real.float() if qp.spec.kind == "float8" else real).numpy()
    order = np.argsort(table, kind="stable")
    symbol = np.zeros(256, np.uint8)
    symbol[used[order]] = np.arange(len(used))
    symbols = np.frombuffer(raw.translate(symbol.tobytes()), np.uint8).reshape(codes.shape)
    zero = _numpy(qp.zero_point) if bool((qp.zero_point != 0).any()) else None
    return Factored(name, symbols, table[order], "F32", _numpy(qp.scale), zero, _axis(qp, codes.ndim), role=kind_of(q))

