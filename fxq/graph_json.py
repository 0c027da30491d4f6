"""A graph of fxq as JSON and named tensors, and back: no pickle, no user code.

Modules are written as class, plain attributes, tensors and children; only classes of ``torch.nn`` and fxq are taken, only tensor functions of torch, its
``aten`` operators and Python's ``operator`` as targets of nodes. Reading runs no constructor and calls nothing that the file names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from fxq import graph_json_rules as rules
from fxq.errors import ArtifactError
from fxq.graph import Grid
from fxq.graph_json_rules import INNER, META
from fxq.modules import Unary
from fxq.schemes import Scheme
from fxq.shared import SharedWeight
from fxq.sharing import Share
from fxq.spec import QParams, QuantSpec

DATA: dict[str, type] = {"Grid": Grid, "Scheme": Scheme, "Share": Share}
"""Data classes that a file may hold."""
ARGUMENTS = ("tuple", "dict", "node", "float", "device", "dtype", "memory_format", "slice", "ellipsis")
"""Values of more than one kind that the arguments of a node may hold: torch writes their ``repr`` into the source of ``forward``."""


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
        made = {"name": type(gm).__name__, "nodes": nodes, "modules": root, "tensors": own, "grids": grids, "training": gm.training}
        rules.check_size(made)
        return made

    def _node(self, n: Node) -> dict[str, Any]:
        where = n.name
        target = n.target if isinstance(n.target, str) else rules.function_name(n.target, where)
        if n.op == "call_method":
            rules.check_method(n.target)
        rules.check_node(n.op, target, n.args, n.kwargs, where)
        meta = {k: self.value(n.meta[k], f"{where}.{k}") for k in META if k in n.meta}
        return {"name": n.name, "op": n.op, "target": target, "args": self.value(n.args, where), "kwargs": self.value(n.kwargs, where), "meta": meta}

    def _module(self, m: nn.Module, path: str) -> dict[str, Any]:
        if self._paths.get(id(m), path) != path:
            return {"ref": self._paths[id(m)]}
        name = f"{type(m).__module__}.{type(m).__qualname__}"
        if is_parametrized(m):
            way_out = "Call remove() of its masks (fxq.sparsity.masks_of), or torch.nn.utils.parametrize.remove_parametrizations"
            raise ArtifactError("its weight is computed (torch.nn.utils.parametrize), which a file does not hold", where=path, way_out=way_out)
        if rules.class_named(name) is not type(m):
            raise ArtifactError(
                f"{name} is no class of torch.nn or fxq, so a file cannot hold it", where=path, way_out="Capture it too (leave it out of leaf_modules)"
            )
        for k in (*m._parameters, *m._buffers, *m._modules):
            rules.check_part(k, path, type(m))
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
        self._paths: dict[nn.Module, int] = {}
        self._nodes: dict[str, Node] = {}
        self._later: list[tuple[nn.Module, str, str, Any]] = []

    def graph(self, data: Any) -> GraphModule:
        """Inverse of :meth:`Writer.graph`. Nothing of the graph is run.

        Raises:
            ArtifactError: for anything that :class:`Writer` does not write.
        """
        rules.check_size(data)
        try:
            return self._graph(data)
        except ArtifactError:
            raise
        except Exception as e:  # whatever a file causes in torch, its message is about the file
            raise ArtifactError(f"its graph is damaged: {type(e).__name__}: {e}", way_out="Save the model again") from e

    def _graph(self, data: Any) -> GraphModule:
        root = nn.Module()
        for name, child in data["modules"].items():
            rules.check_part(name, "the model", GraphModule)
            root.add_module(name, self._module(child, name, 1))
        if sum(self._paths[m] for m in root._modules.values() if m is not None) > rules.PATHS:
            raise rules.refuse(f"it has more than {rules.PATHS} paths to modules")
        for name, entry in data["tensors"].items():
            rules.check_part(name, "the model", GraphModule)
            self._put(root, name, entry)
        self._attributes()
        graph = self._read_nodes(data["nodes"])
        name = str(data["name"])
        if not name.isidentifier():
            raise rules.refuse(f"the graph is called {ascii(name)[:60]}, which is no name")
        for op, target in {(n.op, str(n.target)) for n in graph.nodes if n.op in ("call_module", "get_attr")}:
            rules.check_target(root, op, target)
        gm = GraphModule(root, graph, name)
        gm._modules.clear()  # it sorts them by use; optimizers count parameters in the order of the saved model
        gm._modules.update(root._modules)
        gm.meta["grids"] = self._grids(data["grids"], graph)
        training = {path: m.training for path, m in self._modules.items()}
        for path, module in gm.named_modules():
            module.training = training.get(path, module.training)
        gm.training = bool(data["training"])
        return gm

    def _read_nodes(self, nodes: Any) -> Graph:
        if not isinstance(nodes, list) or len(nodes) > rules.NODES:
            raise rules.refuse(f"it has no list of nodes, or one of more than {rules.NODES}")
        graph = Graph()
        for n in nodes:
            name, op, args, kwargs = n["name"], n["op"], self._argument(n["args"]), self._argument(n["kwargs"])
            rules.check_node(op, n["target"], args, kwargs, name)
            if op == "call_method":
                rules.check_method(n["target"])
            target = n["target"] if op != "call_function" else rules.function_named(n["target"])
            node = graph.create_node(op, target, args, kwargs, name=name)
            if node.name != name:
                raise ArtifactError(f"two nodes are called {name!r}", way_out="Save the model again")
            node.meta.update({k: rules.check_meta(k, self.value(v), name) for k, v in n["meta"].items() if k in META})
            self._nodes[name] = node
        graph.lint()
        return graph

    def _grids(self, data: Any, graph: Graph) -> dict[str, Grid]:
        made = {k: self.value(v) for k, v in data.items()}
        for k, grid in made.items():
            if not isinstance(grid, Grid):
                raise rules.refuse("it is no grid", k)
        for node in graph.nodes:
            for key in ("grid", "narrow"):
                if node.meta.get(key) is not None and node.meta[key] not in made:
                    raise rules.refuse("it names a grid that is not there", node.name)
        return made

    def _module(self, entry: Any, path: str, level: int) -> nn.Module:
        if "ref" in entry:
            known = self._modules.get(entry["ref"])
            if known is None or known not in self._paths:
                raise rules.refuse("it stands for a module that is not there, or holds it", path)
            return known
        cls = rules.class_named(entry["class"])
        if cls is None:
            raise rules.refuse(f"it names the class {ascii(entry['class'])[:80]}, which no file may hold", path)
        if level > rules.MODULE_LEVELS:
            raise rules.refuse(f"its modules are nested more than {rules.MODULE_LEVELS} levels deep")
        module: nn.Module = cls.__new__(cls)
        nn.Module.__init__(module)
        self._modules[path] = module
        tensors, children, fleeting = {**entry["parameters"], **entry["buffers"]}, entry["children"], frozenset(entry["fleeting"])
        if len(tensors) + len(children) != len(entry["parameters"]) + len(entry["buffers"]) + len(children.keys() - tensors.keys()):
            raise rules.refuse("two of its tensors and modules have one name", path)
        for name, v in entry["attributes"].items():
            rules.check_attribute(cls, name, {*tensors, *children}, path)
            self._later.append((module, path, name, v))
        for name, v in tensors.items():
            rules.check_part(name, path, cls)
            if v is None and name in entry["parameters"]:
                module.register_parameter(name, None)
            elif v is None:
                module.register_buffer(name, None)
            else:
                self._put(module, name, v, name not in fleeting)
        paths = 1
        for name, child in children.items():
            rules.check_part(name, path, cls)
            made = None if child is None else self._module(child, f"{path}.{name}", level + 1)
            module._modules[name] = made
            paths += 0 if made is None else self._paths[made]
        self._paths[module] = paths
        module.training = bool(entry["training"])
        return module

    def _attributes(self) -> None:
        """What modules hold beside tensors and children: last, because it may stand for any of the modules."""
        for module, path, name, v in self._later:
            value = self.value(v)
            rules.check_type(type(module), name, value, path)
            vars(module)[name] = value
        for path, module in self._modules.items():
            if isinstance(module, Unary) and (rules.function_named(f"torch.{module.fn}") is None or "." in module.fn):
                raise rules.refuse("its function is none of torch", path)
            if isinstance(module, SharedWeight):
                _check_codes(module, path)
            module.extra_repr()

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
        if isinstance(self._made[key], nn.Parameter) != bool(entry["parameter"]):
            raise rules.refuse("it is a parameter in one place and none in another", str(key))
        return self._made[key]

    def _argument(self, v: Any) -> Any:
        """A node's argument: plain values and nodes, nothing whose ``repr`` a file could choose."""
        stack = [v]
        while stack:
            x = stack.pop()
            if isinstance(x, list):
                stack += x
            elif isinstance(x, dict):
                ((what, inner),) = x.items()
                if what not in ARGUMENTS:
                    raise rules.refuse(f"an argument of a node is a {ascii(what)[:40]}")
                stack += inner.values() if what == "dict" else inner if what in ("tuple", "slice") else ()
        return self.value(v)

    def value(self, v: Any) -> Any:
        """Inverse of :meth:`Writer.value`.

        Raises:
            ArtifactError, KeyError, TypeError, ValueError: for what is none.
        """
        if isinstance(v, list):
            return [self.value(x) for x in v]
        if not isinstance(v, dict):
            return v
        if "tensor" in v:
            return self._tensor(v)
        if "data" in v:
            return rules.fitting(DATA[v["data"]], {k: self.value(x) for k, x in v["fields"].items()})
        ((what, inner),) = v.items()
        make: dict[str, Callable[[], Any]] = {
            "tuple": lambda: tuple(self.value(x) for x in _items(inner)), "dict": lambda: {k: self.value(x) for k, x in inner.items()},
            "node": lambda: self._nodes[inner], "module": lambda: self._modules[inner], "float": lambda: _FLOATS[inner], "device": lambda: torch.device(inner),
            "dtype": lambda: rules.constant(inner, torch.dtype), "memory_format": lambda: rules.constant(inner, torch.memory_format),
            "slice": lambda: slice(*(self.value(x) for x in _items(inner))), "ellipsis": lambda: Ellipsis, "spec": lambda: QuantSpec.parse(inner),
            "qparams": lambda: QParams(QuantSpec.parse(inner[0]), self._tensor(inner[1]), self._tensor(inner[2])),
        }  # fmt: skip
        return make[what]()


_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _items(v: Any) -> list[Any]:
    if not isinstance(v, list):
        raise rules.refuse(f"it holds a {type(v).__name__} where a list belongs")
    return v


def _check_codes(layer: SharedWeight, path: str) -> None:
    """Every code of a shared weight has an entry in its codebook."""
    codes, book = layer.codes, layer.book
    if codes.dtype not in (torch.uint8, torch.int16) or book.ndim != 1 or not book.is_floating_point():
        raise rules.refuse(f"its codes are {codes.dtype} and its codebook is {book.dtype} of rank {book.ndim}", path)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > len(book)):
        raise rules.refuse(f"a code has no entry in the codebook of {len(book)} values", path)
