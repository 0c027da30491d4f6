"""Tracing with proxies that carry example values, for control flow that depends on shapes.

Every value is known at two batch sizes (on fake tensors: shapes, dtypes and devices without data). A number that is the
same at both is a constant of the graph, one that differs stays symbolic. So padding code may compute with heights and
widths while ``view(batch, -1)`` stays valid for every batch. Where Python itself needs a batch-dependent number (``if``,
``range``, ``int``) the example's is taken and the place is recorded. The values of tensors are never looked at: a decision
on them cannot be traced.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node, Proxy
from torch.fx.node import map_aggregate

from fxq.tracers import SymbolicTracer, first_line, here

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(NotImplemented))
_FACTORIES = ("arange", "zeros", "ones", "full", "empty", "linspace", "eye", "rand", "randn", "tensor")
_METHODS = ("repeat", "expand", "view", "reshape", "tile", "narrow", "new_zeros", "new_ones", "new_full", "new_empty", "__getitem__")
_RANK = ("dim", "ndim", "ndimension", "element_size", "itemsize")


class DataDependent(RuntimeError):
    """Python asked for the values of a tensor."""


class OneBatchOnly(RuntimeError):
    """The traced code runs at the example's batch size only."""


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """``x`` with ``x[index] = value``, as a new tensor."""
    out = x.clone()
    out[index] = value
    return out


class ConcreteProxy(Proxy):
    """A proxy that knows its value at the example's batch (``value``) and at another one (``other``)."""

    def __init__(self, node: Node, tracer: ConcreteTracer, value: Any, other: Any) -> None:
        super().__init__(node, tracer)
        self.value, self.other = value, other

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # isinstance(x, Tensor) and isinstance(n, int) in the traced code must hold.
        if isinstance(self.value, Tensor):
            return Tensor
        return type(self.value) if isinstance(self.value, (int, float)) else ConcreteProxy

    def __getattr__(self, k: str) -> Any:
        if k in ("node", "tracer", "value", "other"):
            raise AttributeError(k)
        held = getattr(self.value, k)
        if isinstance(self.value, dict) and k in ("items", "values", "keys"):
            return functools.partial(_dict_view, self, k)
        if callable(held) and not isinstance(held, Tensor):
            return functools.partial(self.tracer.create_proxy_of_method, k, self)  # type: ignore[attr-defined]
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def known(self) -> Any:
        """The example's value, for Python; recorded when it follows the batch.

        Raises:
            DataDependent: for a tensor, whose values tracing does not know.
        """
        if isinstance(self.value, Tensor):
            raise DataDependent("the result depends on the values of a tensor")
        if self.value != self.other:
            self.tracer.note_batch(self.value)  # type: ignore[attr-defined]
        return self.value

    def __bool__(self) -> bool:
        return bool(self.known())

    def __int__(self) -> int:
        return int(self.known())

    def __index__(self) -> int:
        if not isinstance(self.value, int):
            self.known()
            raise TypeError(f"{type(self.value).__name__} is no index")
        return int(self.known())

    def __float__(self) -> float:
        return float(self.known())

    def __len__(self) -> int:
        if len(self.value) != len(self.other):
            self.tracer.note_batch(len(self.value))  # type: ignore[attr-defined]
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(self.value)
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]

    def __contains__(self, item: Any) -> bool:
        return item in self.value if isinstance(self.value, dict) else any(bool(item == x) for x in self)

    def __setitem__(self, index: Any, value: Any) -> None:
        # The Python object stands for the changed tensor from here on.
        new = self.tracer.create_proxy("call_function", set_item, (self, index, value), {})
        self.node = new.node


def _dict_view(proxy: ConcreteProxy, which: str) -> list[Any]:
    keys = list(proxy.value)
    if which == "keys":
        return keys
    return [proxy[k] if which == "values" else (k, proxy[k]) for k in keys]  # type: ignore[index]


class ConcreteTracer(SymbolicTracer):
    """Traces with :class:`ConcreteProxy`.

    Args:
        example, leaves, functions: as in :class:`~fxq.tracers.SymbolicTracer`.
        vary: keep the batch symbolic; ``False`` makes every number a constant.
        buffers: buffers become proxies too (needed where the traced code sizes one by the batch).
    """

    def __init__(self, *args: Any, vary: bool = True, buffers: bool = False) -> None:
        super().__init__(*args)
        self.proxy_buffer_attributes = buffers
        self.vary, self.batch_places, self.size_place = vary, dict[str, int](), ""
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._evaluating = False
        sizes = [x.shape[0] for x in _tensors(self.example) if x.ndim]
        self.batch = sizes[0] if sizes else 0

    def note_batch(self, value: Any) -> None:
        """Python took a number that follows the batch."""
        self.batch_places.setdefault(here(), int(value))

    def trace(self, root: Any, concrete_args: Any = None) -> Any:
        with _recorded():
            return super().trace(root, concrete_args)

    def new_input(self, name: str, value: Any) -> Proxy:
        proxy = super().create_proxy("placeholder", name, (), {}, proxy_factory_fn=lambda n: Proxy(n, self))
        other = map_aggregate(value, lambda v: self._grown(v)) if self.vary else value
        return ConcreteProxy(proxy.node, self, self._faked(value), self._faked(other))

    def open_input(self, proxy: Any, value: Any) -> Any:
        plain = not isinstance(value, (Tensor, list, tuple))
        return value if plain else super().open_input(proxy, value)

    def _grown(self, v: Any) -> Any:
        """Example tensor at the other batch size; 3 more, so that halving or pairing shows as well."""
        if not isinstance(v, Tensor) or v.ndim == 0 or v.shape[0] != self.batch:
            return v
        return v.new_empty((v.shape[0] + 3, *v.shape[1:]))

    def _faked(self, value: Any) -> Any:
        return map_aggregate(value, lambda v: self.fake.from_tensor(v, static_shapes=True) if isinstance(v, Tensor) else v)

    def create_arg(self, a: Any) -> Any:
        # Before isinstance(a, Tensor), which holds for a proxy as well.
        return a.node if issubclass(type(a), Proxy) else super().create_arg(a)

    def create_proxy_of_method(self, name: str, proxy: ConcreteProxy, *args: Any, **kwargs: Any) -> Any:
        return self.create_proxy("call_method", name, (proxy, *args), kwargs)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: Any = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        if kind == "placeholder":
            return super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        value = self._run(kind, target, _pick(args, "value"), _pick(kwargs, "value"))
        other = value
        if self.vary:
            try:
                other = self._run(kind, target, _pick(args, "other"), _pick(kwargs, "other"))
            except Exception as e:
                raise OneBatchOnly(f"{here()} fails at another one: {first_line(e)}") from e
        if _plain(value) and _equal(value, other):
            self._note_size(value, args[1] if target is getattr else target)
            return value
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, lambda n: ConcreteProxy(n, self, value, other))

    def _note_size(self, value: Any, target: Any) -> None:
        """A number became a constant of the graph: with the sizes it depends on (a rank or a yes/no says little)."""
        number = isinstance(value, (int, float)) or (isinstance(value, tuple) and len(value) > 0)
        if number and not isinstance(value, bool) and target not in _RANK and not self.size_place:
            self.size_place = here()

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        self._evaluating = True
        try:
            with self.fake, torch.no_grad():
                if kind == "get_attr":
                    held: Any = functools.reduce(getattr, target.split("."), self.root)
                    return self._faked(held)
                if kind == "call_module":
                    return self.root.get_submodule(target)(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs)
        finally:
            self._evaluating = False

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    @property
    def specialised(self) -> tuple[str, ...]:
        """What the finished trace is specialised to."""
        found = [f"batch size: {n} is used at {place}" for place, n in self.batch_places.items()]
        if self.size_place:
            found.append(f"input sizes {', '.join(self._sizes(x) for x in _tensors(self.example))}: used first at {self.size_place}")
        return tuple(found)

    def _sizes(self, x: Tensor) -> str:
        return "x".join("batch" if self.vary and i == 0 and s == self.batch else str(s) for i, s in enumerate(x.shape))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _pick(value: Any, which: str) -> Any:
    """Arguments with every proxy replaced by what it carries."""
    if issubclass(type(value), ConcreteProxy):
        return getattr(value, which)
    if isinstance(value, slice):
        return slice(*(_pick(v, which) for v in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {k: _pick(v, which) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)([_pick(v, which) for v in value])
    return value


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_plain(v) for v in value)
    return isinstance(value, _PLAIN)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


@contextlib.contextmanager
def _recorded() -> Iterator[None]:
    """Let ``torch.zeros(batch, 3)`` and ``constant.expand(batch, -1)`` be recorded: no tensor in them dispatches to a proxy."""
    kept = {name: getattr(torch, name) for name in _FACTORIES}
    own = {name: vars(Tensor).get(name) for name in _METHODS}
    for name, f in kept.items():
        setattr(torch, name, _recording("call_function", f, f))
    for name in _METHODS:
        setattr(Tensor, name, _recording("call_method", name, getattr(Tensor, name)))
    try:
        yield
    finally:
        for name, f in kept.items():
            setattr(torch, name, f)
        for name, method in own.items():
            if method is None:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, method)


def _recording(kind: str, target: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        found: list[ConcreteProxy] = []
        _find(args, found)
        _find(kwargs, found)
        return found[0].tracer.create_proxy(kind, target, args, kwargs) if found else f(*args, **kwargs)

    return call


def _find(value: Any, found: list[ConcreteProxy]) -> None:
    if issubclass(type(value), ConcreteProxy):
        found.append(value)
    elif isinstance(value, slice):
        _find((value.start, value.stop, value.step), found)
    elif isinstance(value, (tuple, list)):
        for v in value:
            _find(v, found)
    elif isinstance(value, dict):
        for v in value.values():
            _find(v, found)
