"""A graph of fxq as JSON and named tensors, and back: no pickle, no user code.

Modules are written as class, plain attributes, tensors and children; only classes of ``torch.nn`` and fxq are taken, only tensor functions of torch, its
``aten`` operators and Python's ``operator`` as targets of nodes. Reading runs no constructor and calls nothing that the file names.
"""

from __future__ import annotations

import dataclasses
import importlib
import keyword
import math
import operator
import re
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from fxq.errors import ArtifactError
from fxq.graph import Grid
from fxq.schemes import Scheme
from fxq.sharing import Share
from fxq.spec import QParams, QuantSpec

CLASSES = {
    "fxq.modules": ("Add", "Sub", "Mul", "Div", "MatMul", "Cat", "Reshape", "Expand", "Permute", "Slice", "IndexSelect", "Split", "Pad", "Resize",
                    "Mean", "Sum", "GlobalAvgPool", "Clamp", "Unary", "Power", "FakeQuantize", "Quantized"),
    "fxq.convolutions": ("PaddedConv1d", "PaddedConv2d", "PaddedConv3d", "ChannelAffine1d", "ChannelAffine2d", "ChannelAffine3d", "BoxMean"),
    "fxq.shared": ("SharedConv1d", "SharedConv2d", "SharedConv3d", "SharedConvTranspose1d", "SharedConvTranspose2d", "SharedConvTranspose3d", "SharedLinear",
                   "SharedPaddedConv1d", "SharedPaddedConv2d", "SharedPaddedConv3d"),
    "fxq.observers": ("Observer", "MovingAverage"),
    "fxq.trackers": ("MeanMagnitude", "Tracker", "LearnedStep", "Clip", "Sign", "Ternary", "TrackedFakeQuantize"),
    "fxq.estimators": ("SignEstimator", "TernaryEstimator", "DoReFaEstimator", "StepEstimator", "RangeEstimator"),
    "fxq.training": ("TrainedLayer", "FloatLayer", "FloatNorm"),
    "fxq.training_lowbit": ("EstimatedLayer",),
    "fxq.training_shared": ("SharedLayer",),
}  # fmt: skip
"""Classes of fxq that a file may hold."""
DATA: dict[str, type] = {"Grid": Grid, "Scheme": Scheme, "Share": Share}
OPERATORS = ("getitem", "add", "sub", "mul", "truediv", "floordiv", "neg", "pow", "matmul", "mod", "and_", "or_", "eq", "ne", "lt", "le", "gt", "ge", "invert")
META = ("shape", "dynamic", "dtype", "grid", "integer", "float_why", "reads_codes", "narrow", "int8_layer", "left")
"""What is kept of a node's meta."""
_PATH = re.compile(r"[^\"\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # what ends neither a quoted text nor a line
INNER = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


class Writer:
    """Collects the JSON and the tensors of one graph.

    Attributes:
        tensors: by name, contiguous copies on the CPU.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._paths: dict[int, str] = {}

    def graph(self, gm: GraphModule) -> dict[str, Any]:
        """The graph, its modules, its grids.

        Raises:
            ArtifactError: for a module, function or value that no file may hold, naming it.
        """
        self._paths = {id(m): path for path, m in reversed(list(gm.named_modules(remove_duplicate=False)))}
        nodes = [self._node(n) for n in gm.graph.nodes]
        root = {name: self._module(m, name) for name, m in gm._modules.items() if m is not None}
        own = {name: self._tensor(t, name) for name, t in [*gm._parameters.items(), *gm._buffers.items()] if t is not None}
        grids = {k: self.value(g, k) for k, g in gm.meta.get("grids", {}).items()}
        return {"name": type(gm).__name__, "nodes": nodes, "modules": root, "tensors": own, "grids": grids, "training": gm.training}

    def _node(self, n: Node) -> dict[str, Any]:
        where = n.name
        target = n.target if isinstance(n.target, str) else _function_name(n.target, where)
        if n.op == "call_method":
            _method(str(n.target))
        meta = {k: self.value(n.meta[k], f"{where}.{k}") for k in META if k in n.meta}
        return {"name": n.name, "op": n.op, "target": target, "args": self.value(n.args, where), "kwargs": self.value(n.kwargs, where), "meta": meta}

    def _module(self, m: nn.Module, path: str) -> dict[str, Any]:
        if self._paths.get(id(m), path) != path:
            return {"ref": self._paths[id(m)]}
        name = f"{type(m).__module__}.{type(m).__qualname__}"
        if is_parametrized(m):
            way_out = "Call remove() of its masks (fxq.sparsity.masks_of), or torch.nn.utils.parametrize.remove_parametrizations"
            raise ArtifactError("its weight is computed (torch.nn.utils.parametrize), which a file does not hold", where=path, way_out=way_out)
        if _class(name) is not type(m):
            raise ArtifactError(
                f"{name} is no class of torch.nn or fxq, so a file cannot hold it", where=path, way_out="Capture it too (leave it out of leaf_modules)"
            )
        plain = {k: self.value(v, f"{path}.{k}") for k, v in vars(m).items() if k not in INNER}
        return {
            "class": name, "training": m.training, "attributes": plain,
            "parameters": {k: None if t is None else self._tensor(t, f"{path}.{k}") for k, t in m._parameters.items()},
            "buffers": {k: None if t is None else self._tensor(t, f"{path}.{k}") for k, t in m._buffers.items()},
            "fleeting": sorted(m._non_persistent_buffers_set),
            "children": {k: None if c is None else self._module(c, f"{path}.{k}") for k, c in m._modules.items()},
        }  # fmt: skip

    def _tensor(self, t: Tensor, name: str) -> dict[str, Any]:
        key = self._names.setdefault(id(t), name)
        if key not in self.tensors:
            self.tensors[key] = t.detach().cpu().contiguous().clone()
        return {"tensor": key, "parameter": isinstance(t, nn.Parameter), "grad": t.requires_grad}

    def value(self, v: Any, where: str) -> Any:
        """A plain value as JSON."""
        if v is None or isinstance(v, (bool, int, str)):
            return v
        if isinstance(v, float):
            return v if math.isfinite(v) else {"float": repr(v)}
        if isinstance(v, (tuple, torch.Size)):
            return {"tuple": [self.value(x, where) for x in v]}
        if isinstance(v, list):
            return [self.value(x, where) for x in v]
        if isinstance(v, dict) and all(isinstance(k, str) for k in v):
            return {"dict": {k: self.value(x, where) for k, x in v.items()}}
        if isinstance(v, Node):
            return {"node": v.name}
        if isinstance(v, nn.Module) and id(v) in self._paths:
            return {"module": self._paths[id(v)]}
        if isinstance(v, Tensor):
            return self._tensor(v, f"{where}#{len(self.tensors)}")
        return self._rare(v, where)

    def _rare(self, v: Any, where: str) -> Any:
        if isinstance(v, (torch.dtype, torch.memory_format)):
            return {type(v).__name__: str(v).removeprefix("torch.")}
        if isinstance(v, torch.device):
            return {"device": str(v)}
        if isinstance(v, slice):
            return {"slice": [self.value(x, where) for x in (v.start, v.stop, v.step)]}
        if v is Ellipsis:
            return {"ellipsis": True}
        if isinstance(v, QuantSpec):
            return {"spec": str(v)}
        if isinstance(v, QParams):
            key = f"{where}#{len(self.tensors)}"
            return {"qparams": [str(v.spec), self._tensor(v.scale, key), self._tensor(v.zero_point, f"{key}+")]}
        if type(v).__name__ in DATA and dataclasses.is_dataclass(v):
            return {"data": type(v).__name__, "fields": {f.name: self.value(getattr(v, f.name), f"{where}.{f.name}") for f in dataclasses.fields(v)}}
        raise ArtifactError(f"a value of type {type(v).__name__} cannot be written", where=where, way_out="Keep numbers, texts and tensors in modules")


class Reader:
    """Makes the graph of a file's JSON and tensors.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self._made: dict[str, Tensor] = {}
        self._modules: dict[str, nn.Module] = {}
        self._nodes: dict[str, Node] = {}
        self._later: list[tuple[nn.Module, str, Any]] = []

    def graph(self, data: Any) -> GraphModule:
        """Inverse of :meth:`Writer.graph`.

        Raises:
            ArtifactError: for anything that :class:`Writer` does not write.
        """
        try:
            return self._graph(data)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, SyntaxError, AssertionError) as e:
            raise ArtifactError(f"its graph is damaged: {type(e).__name__}: {e}", way_out="Save the model again") from e

    def _graph(self, data: Any) -> GraphModule:
        root = nn.Module()
        for name, child in data["modules"].items():
            root.add_module(name, self._module(child, name))
        for name, entry in data["tensors"].items():
            self._put(root, name, entry)
        for module, name, v in self._later:
            vars(module)[name] = self.value(v)
        graph = Graph()
        for n in data["nodes"]:
            target = n["target"] if n["op"] != "call_function" else _function(n["target"])
            if n["op"] == "call_method":
                _method(target)
            kwargs = self.value(n["kwargs"])
            _writable(n["op"], target, kwargs, n["name"])
            node = graph.create_node(n["op"], target, self.value(n["args"]), kwargs, name=n["name"])
            if node.name != n["name"]:
                raise ArtifactError(f"two nodes are called {n['name']!r}", way_out="Save the model again")
            node.meta.update({k: self.value(v) for k, v in n["meta"].items() if k in META})
            self._nodes[n["name"]] = node
        graph.lint()
        gm = GraphModule(root, graph, str(data["name"]))
        gm._modules.clear()  # it sorts them by use; optimizers count parameters in the order of the saved model
        gm._modules.update(root._modules)
        gm.meta["grids"] = {k: self.value(v) for k, v in data["grids"].items()}
        for path, module in gm.named_modules():
            if path and path in self._training:
                module.training = self._training[path]
        gm.training = bool(data["training"])
        return gm

    @property
    def _training(self) -> dict[str, bool]:
        return {path: m.training for path, m in self._modules.items()}

    def _module(self, entry: Any, path: str) -> nn.Module:
        if "ref" in entry:
            return self._modules[entry["ref"]]
        cls = _class(entry["class"])
        if cls is None:
            raise ArtifactError(f"it names the class {entry['class']!r}, which no file may hold", where=path, way_out="Take files from fxq.save only")
        module: nn.Module = cls.__new__(cls)
        nn.Module.__init__(module)
        self._modules[path] = module
        for name, v in entry["attributes"].items():
            if not name.isidentifier() or name.startswith("__") or name in INNER or callable(getattr(cls, name, None)):
                raise ArtifactError(f"it sets the attribute {name!r}", where=path, way_out="Take files from fxq.save only")
            self._later.append((module, name, v))
        for name, v in {**entry["parameters"], **entry["buffers"]}.items():
            if v is None and name in entry["parameters"]:
                module.register_parameter(name, None)
            elif v is None:
                module.register_buffer(name, None)
            else:
                self._put(module, name, v, name not in entry["fleeting"])
        for name, child in entry["children"].items():
            module._modules[name] = None if child is None else self._module(child, f"{path}.{name}")
        module.training = bool(entry["training"])
        return module

    def _put(self, module: nn.Module, name: str, entry: Any, persistent: bool = True) -> None:
        t = self._tensor(entry)
        if isinstance(t, nn.Parameter):
            module.register_parameter(name, t)
        else:
            module.register_buffer(name, t, persistent=persistent)

    def _tensor(self, entry: Any) -> Tensor:
        key = entry["tensor"]
        if key not in self._made:
            t = self.tensors[key]
            self._made[key] = nn.Parameter(t, requires_grad=bool(entry["grad"])) if entry["parameter"] else t
        return self._made[key]

    def value(self, v: Any) -> Any:
        """Inverse of :meth:`Writer.value`."""
        if isinstance(v, list):
            return [self.value(x) for x in v]
        if not isinstance(v, dict):
            return v
        if "tensor" in v:
            return self._tensor(v)
        if "data" in v:
            return DATA[v["data"]](**{k: self.value(x) for k, x in v["fields"].items()})
        ((what, inner),) = v.items()
        make: dict[str, Callable[[], Any]] = {
            "tuple": lambda: tuple(self.value(x) for x in inner), "dict": lambda: {k: self.value(x) for k, x in inner.items()},
            "node": lambda: self._nodes[inner], "module": lambda: self._modules[inner], "float": lambda: float(inner), "device": lambda: torch.device(inner),
            "dtype": lambda: _constant(inner, torch.dtype), "memory_format": lambda: _constant(inner, torch.memory_format),
            "slice": lambda: slice(*(self.value(x) for x in inner)), "ellipsis": lambda: Ellipsis, "spec": lambda: QuantSpec.parse(inner),
            "qparams": lambda: QParams(QuantSpec.parse(inner[0]), self._tensor(inner[1]), self._tensor(inner[2])),
        }  # fmt: skip
        return make[what]()


def _constant(name: str, kind: type) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, kind):
        raise ArtifactError(f"{name!r} is no {kind.__name__}", way_out="Save the model again")
    return found


def _class(name: str) -> type[nn.Module] | None:
    """A class of torch.nn or of :data:`CLASSES` by its full name, or ``None``."""
    module, _, cls = name.rpartition(".")
    if module in CLASSES and cls in CLASSES[module]:
        found: Any = getattr(importlib.import_module(module), cls)
        return found  # type: ignore[no-any-return]
    if module.startswith("torch.nn.modules."):
        found = getattr(nn, cls, None)
        known = isinstance(found, type) and issubclass(found, nn.Module) and f"{found.__module__}.{found.__qualname__}" == name
        return found if known else None
    return None


def _function_name(fn: Any, where: str) -> str:
    if isinstance(fn, torch._ops.OpOverload):
        return f"torch.ops.{fn}"
    own = str(getattr(fn, "__name__", ""))
    if own in OPERATORS and getattr(operator, own) is fn:
        return f"operator.{own}"
    name = torch.overrides.resolve_name(fn)
    if name is None or _function(name) is not fn:
        raise ArtifactError(f"the function {own or fn!r} is no tensor function of torch", where=where, way_out="Write it with torch's functions")
    return str(name)


def _function(name: str) -> Any:
    """A function that a file may name."""
    parts = name.split(".")
    if parts[:1] == ["operator"] and len(parts) == 2 and parts[1] in OPERATORS:
        return getattr(operator, parts[1])
    if parts[:3] == ["torch", "ops", "aten"] and len(parts) == 5:
        return getattr(getattr(torch.ops.aten, parts[3]), parts[4])
    found: Any = torch
    if parts[0] == "torch" and all(p.isidentifier() and not p.startswith("__") for p in parts):
        for part in parts[1:]:
            found = getattr(found, part, None)
        if isinstance(found, Hashable) and found in torch.overrides.get_testing_overrides():
            return found
    raise ArtifactError(f"it names the function {name!r}, which no file may hold", way_out="Take files from fxq.save only")


def _writable(op: str, target: Any, kwargs: dict[str, Any], name: str) -> None:
    """Torch writes targets and names of arguments into the source of ``forward``, which it then runs: they must be names."""
    plain = not isinstance(target, str) or (target.isidentifier() if op in ("placeholder", "output") else _PATH.fullmatch(target) is not None)
    if not plain or (isinstance(target, str) and keyword.iskeyword(target)) or not all(k.isidentifier() and not keyword.iskeyword(k) for k in kwargs):
        raise ArtifactError("its target or an argument's name is no name", where=str(name), way_out="Take files from fxq.save only")


def _method(name: str) -> None:
    if name.startswith("__") or getattr(Tensor, name, None) not in torch.overrides.get_testing_overrides():
        raise ArtifactError(f"it names the method {name!r}, which is none of a tensor", way_out="Take files from fxq.save only")
