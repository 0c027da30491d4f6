"""The JSON of a graph without what repeats itself: for archives, whose index must be small beside a few kilobytes of weights.

Modules of one class share a template and hold what differs from it; a node holds what differs from the last one of its sort. Pure data, and exact:
:func:`full` gives back what :func:`slim` was given. Nothing depends on the defaults of a version of torch.

A tensor is named by a reference: ``/name`` (a record), ``/name:part`` (a part of it), or a number (a small tensor of the index). Where the record is called
like the module and its tensor, the reference is ``true``; ``:part`` is a part of the record of the module's weight.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from fxq.errors import ArtifactError

QUANTIZED = "fxq.modules.Quantized"
INSIDE = ("op", "weight_grid")
"""Children of a :data:`QUANTIZED` module that a user's name leaves out."""
GROUPS = {"parameters": (True, True), "buffers": (False, False)}
"""Where tensors of a module stand: are they parameters, do they have gradients."""
MOST = 1 << 21
"""Greatest number of values in the attributes of all modules, the meta of all nodes and the grids of a file, those that are left out as repeated included."""


def below(base: str, cls: str, name: str) -> str:
    """User-facing path of the child ``name`` of a module of the class ``cls`` whose own is ``base``."""
    return base if cls == QUANTIZED and name in INSIDE else f"{base}.{name}" if base else name


def slim(graph: dict[str, Any], refs: dict[str, str | int]) -> dict[str, Any]:
    """The compact form of what :meth:`fxq.graph_json.Writer.graph` gives.

    Args:
        graph: the JSON; it is not changed. Flags of training are left out: a graph from a file is in eval mode.
        refs: name of a tensor in the JSON -> its reference: ``/name``, ``/name:part`` or a number.

    Raises:
        ArtifactError: for a graph of more than :data:`MOST` values.
    """
    return _Slim(refs).graph(graph)


def full(graph: Any) -> dict[str, Any]:
    """Inverse of :func:`slim`; the tensors are named by their references.

    Raises:
        ArtifactError: for what :func:`slim` does not write, or a graph of more than :data:`MOST` values.
    """
    try:
        return _Full(graph).graph()
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise ArtifactError(f"its graph is damaged: {type(e).__name__}: {e}", way_out="Save the model again") from e


def _renamed(v: Any, to: Any) -> Any:
    """A value with every tensor entry replaced by ``to(entry)``."""
    if isinstance(v, list):
        return [_renamed(x, to) for x in v]
    if not isinstance(v, dict):
        return v
    if "tensor" in v:
        return to(v)
    for key in ("dict", "fields"):
        if isinstance(v.get(key), dict):
            return {**v, key: {k: _renamed(x, to) for k, x in v[key].items()}}
    return {k: _renamed(x, to) for k, x in v.items()}


class _Budget:
    """Counts the values of a graph: what is written once may stand in it a million times."""

    def __init__(self) -> None:
        self.left = MOST
        self.sizes: dict[int, tuple[int, Any]] = {}  # by id; the value is kept, so that no other takes its id

    def take(self, values: dict[str, Any]) -> None:
        """Count one for ``values`` and each value in them, at every depth."""
        self.left -= 1 + sum(map(self._size, values.values()))
        if self.left < 0:
            raise ArtifactError(f"its graph has more than {MOST:,} values", way_out="Take files from m.lower('archive'); split a larger model")

    def _size(self, v: Any) -> int:
        if not isinstance(v, (dict, list)):
            return 1
        if id(v) not in self.sizes:
            self.sizes[id(v)] = 1 + sum(map(self._size, v.values() if isinstance(v, dict) else v)), v
        return self.sizes[id(v)][0]


def _default_name(target: str) -> str:
    name = re.sub("[^0-9a-zA-Z_]+", "_", target)
    return f"_{name}" if name[:1].isdigit() else name


def _previous(node: dict[str, Any] | None) -> Any:
    return {"tuple": [] if node is None else [{"node": node["name"]}]}


class _Slim:
    def __init__(self, refs: dict[str, str | int]) -> None:
        self.refs = refs
        self.budget = _Budget()
        self.classes: dict[str, str] = {}
        self.flats: dict[str, tuple[int, dict[str, Any]]] = {}
        self.templates: list[tuple[str, tuple[str, ...]]] = []
        self.seen: list[dict[str, Counter[str]]] = []

    def graph(self, g: dict[str, Any]) -> dict[str, Any]:
        for name, m in g["modules"].items():
            self._collect(m, name, name, False)
        common = [{k: json.loads(c.most_common(1)[0][0]) for k, c in seen.items()} for seen in self.seen]
        modules = {name: self._module(m, name, common) for name, m in g["modules"].items()}
        out = {
            "name": g["name"], "templates": [{"class": cls, **(t and {"has": t})} for (cls, _), t in zip(self.templates, common, strict=True)],
            "modules": modules, "nodes": self._nodes(g["nodes"]), "grids": self._grids(g["grids"]),
            "tensors": {name: self._tensor(e, "", "", GROUPS["buffers"]) for name, e in g["tensors"].items()},
        }  # fmt: skip
        return {k: v for k, v in out.items() if v}

    def _collect(self, m: dict[str, Any], path: str, base: str, inside: bool) -> None:
        """Flatten a module and its children, and count the values of each template. ``inside`` a quantized layer there are templates of their own."""
        if "ref" in m:
            return
        cls = self.classes[path] = m["class"]
        flat = {f"a.{k}": _renamed(v, self._entry) for k, v in m["attributes"].items()}
        for group, flags in GROUPS.items():
            flat.update({f"{group[0]}.{k}": None if e is None else self._tensor(e, base, k, flags) for k, e in m[group].items()})
        if m["fleeting"]:
            flat["fleeting"] = m["fleeting"]
        self.budget.take(flat)
        key = (cls, (str(inside), *flat))
        if key not in self.templates:
            self.templates.append(key)
            self.seen.append({k: Counter() for k in flat})
        i = self.templates.index(key)
        for k, v in flat.items():
            self.seen[i][k][json.dumps(v)] += 1
        self.flats[path] = i, flat
        for name, child in m["children"].items():
            if child is not None:
                self._collect(child, f"{path}.{name}", below(base, cls, name), cls == QUANTIZED)

    def _module(self, m: dict[str, Any] | None, path: str, common: list[dict[str, Any]]) -> Any:
        if m is None or "ref" in m:
            return m
        i, flat = self.flats[path]
        has = {k: v for k, v in flat.items() if json.dumps(v) != json.dumps(common[i][k])}
        inside = {name: self._module(child, f"{path}.{name}", common) for name, child in m["children"].items()}
        return {"is": i, **(has and {"has": has}), **(inside and {"of": inside})} if has or inside else i

    def _tensor(self, entry: dict[str, Any], base: str, name: str, flags: tuple[bool, bool]) -> Any:
        ref: Any = self.refs[entry["tensor"]]
        if base and ref == f"/{base}.{name}":
            ref = True
        elif base and isinstance(ref, str) and ref.startswith(f"/{base}.weight:"):
            ref = ref[len(f"/{base}.weight") :]
        own = entry["parameter"], entry["grad"]
        return ref if own == flags else [ref, *own]

    def _entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {"tensor": self.refs[entry["tensor"]], **{k: True for k in ("parameter", "grad") if entry[k]}}

    def _nodes(self, nodes: list[dict[str, Any]]) -> list[Any]:
        out: list[Any] = []
        last: dict[str, dict[str, Any]] = {}
        before = None
        for n in nodes:
            sort = _sort(n["op"], n["target"], self.classes)
            meta, old = {k: _renamed(v, self._entry) for k, v in n["meta"].items()}, last.get(sort, {})
            self.budget.take({**old, **meta})
            short: dict[str, Any] = {"to": n["target"]}
            if n["op"] != "call_module":
                short["op"] = n["op"]
            if n["name"] != _default_name(n["target"]):
                short["name"] = n["name"]
            args = _renamed(n["args"], self._entry)
            if args != _previous(before):
                short["args"] = args
            if n["kwargs"] != {"dict": {}}:
                short["kwargs"] = _renamed(n["kwargs"], self._entry)
            changed, gone = {k: v for k, v in meta.items() if k not in old or json.dumps(old[k]) != json.dumps(v)}, [k for k in old if k not in meta]
            short.update({**(changed and {"meta": changed}), **({"not": gone} if gone else {})})
            out.append(n["target"] if len(short) == 1 else short)
            last[sort], before = meta, n
        return out

    def _grids(self, grids: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        old: dict[str, Any] = {}
        for name, g in grids.items():
            fields = _renamed(g["fields"], self._entry)
            self.budget.take(fields)
            out[name] = {k: v for k, v in fields.items() if k not in old or json.dumps(old[k]) != json.dumps(v)}
            old = fields
        return out


def _sort(op: str, target: str, classes: dict[str, str]) -> str:
    return f"{op} {classes.get(target, '') if op == 'call_module' else target if op.startswith('call_') else ''}"


class _Full:
    def __init__(self, graph: dict[str, Any]) -> None:
        self.g = graph
        self.classes: dict[str, str] = {}
        self.budget = _Budget()

    def graph(self) -> dict[str, Any]:
        g = self.g
        modules = {name: self._module(m, name, name) for name, m in g.get("modules", {}).items()}
        own = {name: self._tensor(r, "", "", GROUPS["buffers"]) for name, r in g.get("tensors", {}).items()}
        return {"name": str(g.get("name", "")), "nodes": self._nodes(), "modules": modules, "tensors": own, "grids": self._grids(), "training": False}

    def _module(self, m: Any, path: str, base: str) -> Any:
        if m is None or isinstance(m, dict) and "ref" in m:
            return m
        m = {"is": m} if isinstance(m, int) else m
        template = self.g["templates"][m["is"]]
        flat, cls = {**template.get("has", {}), **m.get("has", {})}, template["class"]
        self.budget.take(flat)
        self.classes[path] = cls
        parts: dict[str, Any] = {"class": cls, "training": False}
        parts["attributes"] = {k[2:]: _renamed(v, self._entry) for k, v in flat.items() if k.startswith("a.")}
        for group, flags in GROUPS.items():
            mine = {k[2:]: v for k, v in flat.items() if k.startswith(f"{group[0]}.")}
            parts[group] = {k: None if v is None else self._tensor(v, base, k, flags) for k, v in mine.items()}
        parts["fleeting"] = flat.get("fleeting", [])
        parts["children"] = {name: self._module(c, f"{path}.{name}", below(base, cls, name)) for name, c in m.get("of", {}).items()}
        return parts

    def _tensor(self, v: Any, base: str, name: str, flags: tuple[bool, bool]) -> dict[str, Any]:
        ref, parameter, grad = v if isinstance(v, list) else (v, *flags)
        if ref is True:
            ref = f"/{base}.{name}"
        elif isinstance(ref, str) and ref.startswith(":"):
            ref = f"/{base}.weight{ref}"
        return self._entry({"tensor": ref, "parameter": parameter, "grad": grad})

    def _entry(self, e: dict[str, Any]) -> dict[str, Any]:
        ref = e["tensor"]
        if isinstance(ref, bool) or not isinstance(ref, (int, str)):
            raise ValueError(f"{ref!r} names no tensor")
        return {"tensor": ref, "parameter": bool(e.get("parameter", False)), "grad": bool(e.get("grad", False))}

    def _nodes(self) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        last: dict[str, dict[str, Any]] = {}
        for short in self.g["nodes"]:
            s: dict[str, Any] = {"to": short} if isinstance(short, str) else short
            op, target = str(s.get("op", "call_module")), str(s["to"])
            sort = _sort(op, target, self.classes)
            meta = {**last.get(sort, {}), **s.get("meta", {})}
            self.budget.take(meta)
            for k in s.get("not", ()):
                meta.pop(k)
            args = s["args"] if "args" in s else _previous(out[-1] if out else None)
            node = {"name": str(s.get("name", _default_name(target))), "op": op, "target": target, "args": args, "kwargs": s.get("kwargs", {"dict": {}})}
            out.append({**{k: _renamed(v, self._entry) for k, v in node.items()}, "meta": {k: _renamed(v, self._entry) for k, v in meta.items()}})
            last[sort] = meta
        return out

    def _grids(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        fields: dict[str, Any] = {}
        for name, changed in self.g.get("grids", {}).items():
            fields = {**fields, **changed}
            self.budget.take(fields)
            out[name] = {"data": "Grid", "fields": {k: _renamed(v, self._entry) for k, v in fields.items()}}
        return out
