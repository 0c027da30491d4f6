"""The symbolic tracer, what every traced graph is tidied to, and where in the user's code a trace failed."""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.node import map_arg

from fxq.modules import Op

_SKIP = tuple(str(Path(p).parent) for p in (str(torch.__file__), __file__))


class SymbolicTracer(Tracer):
    """``torch.fx`` tracing with torch.nn layers, fxq's operations and the given types kept whole.

    Every example input gives exactly one placeholder; further arguments keep the defaults of ``forward``. A list or tuple
    among the inputs is one placeholder whose items are read with ``getitem``.

    Args:
        example: positional example inputs; only their structure is used.
        leaves: module types that stay whole.
        functions: Python functions that stay whole (found in the globals of the traced code).
    """

    def __init__(
        self, example: tuple[Any, ...], leaves: tuple[type[nn.Module], ...] = (), functions: tuple[Callable[..., Any], ...] = ()
    ) -> None:
        super().__init__(autowrap_functions=functions)
        self.example, self.leaves = example, leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*self.leaves, Op)) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Python itself binds ``*args`` and the defaults: only the inputs that are given become placeholders."""
        names = input_names(self.root, len(self.example))
        proxies = [self.open_input(self.new_input(n, x), x) for n, x in zip(names, self.example, strict=True)]
        # An instance may carry a forward of its own, which the class's function would bypass.
        return lambda root, *args: root.forward(*args), [self.root, *proxies]

    def new_input(self, name: str, value: Any) -> Proxy:
        """Placeholder for one example input."""
        return self.create_proxy("placeholder", name, (), {})

    def open_input(self, proxy: Any, value: Any) -> Any:
        """A list input as a Python list of proxies, so that loops over it unroll."""
        if isinstance(value, (list, tuple)):
            return type(value)([self.open_input(proxy[i], v) for i, v in enumerate(value)])
        return proxy


def input_names(module: nn.Module, n: int) -> list[str]:
    """Names of the first ``n`` positional inputs of ``module.forward``.

    Raises:
        TypeError: when ``forward`` does not take ``n`` positional inputs.
    """
    names: list[str] = []
    for p in inspect.signature(module.forward).parameters.values():
        if p.kind == p.VAR_POSITIONAL:
            names += [f"{p.name}_{i}" for i in range(n - len(names))]
        elif p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            names.append(p.name)
    if len(names) < n:
        raise TypeError(f"forward takes {len(names)} positional inputs, the example has {n}")
    return names[:n]


def trace(tracer: SymbolicTracer, root: nn.Module) -> GraphModule:
    """Run ``tracer`` over ``root`` (which the graph will share parameters with) and tidy the graph."""
    if tracer.is_leaf_module(root, ""):
        holder = nn.Module()
        holder.add_module(type(root).__name__.lower(), root)
        graph = Graph()
        names = input_names(root, len(tracer.example))
        graph.output(graph.call_module(type(root).__name__.lower(), tuple(graph.placeholder(n) for n in names)))
        return tidy(GraphModule(holder, graph, type(root).__name__))
    with torch.no_grad():
        graph = tracer.trace(root)
    return tidy(GraphModule(root, graph, type(root).__name__))


def tidy(gm: GraphModule) -> GraphModule:
    """In-place operations become values, dead nodes and unused modules go, eval mode.

    A later reader of a tensor that was changed in place reads the result of that operation. What this does not cover (a
    view changed in place, the base read afterwards) changes the output, and the comparison with eager finds it.
    """
    first: dict[Node, Node] = {}
    newest: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        node.args = map_arg(node.args, lambda n: newest.get(first.get(n, n), n))
        node.kwargs = map_arg(node.kwargs, lambda n: newest.get(first.get(n, n), n))
        if _inplace(gm, node):
            first[node] = first.get(node.args[0], node.args[0])
            newest[first[node]] = node
    gm.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return gm.eval()


def _inplace(gm: GraphModule, node: Node) -> bool:
    """Does ``node`` change its first argument? If so it becomes the operation that does not, where there is one."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    target: Any = node.target
    if node.op == "call_method":
        found = target.endswith("_") and not target.startswith("__")
        if found and hasattr(Tensor, target[:-1]):
            node.target = target[:-1]
        return bool(found)
    if node.op == "call_module":
        module: Any = gm.get_submodule(target)
        found = getattr(module, "inplace", False) is True
        if found:
            module.inplace = False
        return found
    return node.op == "call_function" and (_inplace_name(node) or _inplace_option(node))


def _inplace_name(node: Node) -> bool:
    """``torch.relu_`` and the like."""
    target: Any = node.target
    name = getattr(target, "__name__", "")
    if not name.endswith("_") or getattr(torch, name, None) is not target:
        return False
    functional: Any = getattr(torch, name[:-1], target)
    node.target = functional
    return True


def _inplace_option(node: Node) -> bool:
    """``F.relu(x, inplace=True)`` and the like."""
    target: Any = node.target
    if getattr(target, "__module__", "") != "torch.nn.functional" or not inspect.isfunction(target):
        return False
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    except TypeError:
        return False
    if bound.arguments.get("inplace") is not True:
        return False
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
    return True


def fault_of(e: BaseException) -> tuple[str | None, str]:
    """``file:line`` and expression of the user's code that raised ``e`` (``None`` when torch raised alone), and the message."""
    message = first_line(e)
    for frame in reversed(traceback.extract_tb(e.__traceback__)):
        if _is_user(frame.filename):
            return f"{frame.filename}:{frame.lineno}", f"`{_expression(frame)}`: {message}"
    return None, message


_LONG = 160
_PLAIN = {
    "DataDependentOutputException": "the result depends on the values of a tensor",
    "DynamicOutputShapeException": "the size of the result depends on the values of a tensor",
}


def first_line(e: BaseException) -> str:
    """The message of ``e`` in one short line."""
    lines = str(e).strip().splitlines()
    line = _PLAIN.get(type(e).__name__) or (lines[0].strip() if lines else type(e).__name__)
    return line if len(line) <= _LONG else line[:_LONG] + " ..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch logs and prints whole graphs when a rung fails; the ladder reports failures itself."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def here() -> str:
    """``file:line: `source``` of the user's code that is being traced right now."""
    for frame in _frames():
        if _is_user(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}: `{linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()}`"
    return "torch"


def _frames() -> Iterator[Any]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_user(filename: str) -> bool:
    return not filename.startswith("<") and not any(filename.startswith(p + "/") or filename.startswith(p + "\\") for p in _SKIP)


def _expression(frame: traceback.FrameSummary) -> str:
    """The part of the line that was being evaluated where Python knows it, otherwise the line."""
    whole = (frame.line or "").strip()
    start, end = getattr(frame, "colno", None), getattr(frame, "end_colno", None)
    if start is None or end is None or getattr(frame, "end_lineno", frame.lineno) != frame.lineno:
        return whole
    raw = linecache.getline(frame.filename, frame.lineno or 0).encode()
    return raw[start:end].decode(errors="replace").strip() or whole


def timm_leaves(root: nn.Module) -> tuple[tuple[type[nn.Module], ...], tuple[Callable[..., Any], ...]]:
    """Module types and functions that timm asks to keep whole; empty unless ``root`` holds timm's modules."""
    fx = sys.modules.get("timm.layers")
    if fx is None or not any(type(m).__module__.split(".")[0] == "timm" for m in root.modules()):
        return (), ()
    modules: Sequence[type[nn.Module]] = fx.get_notrace_modules()
    functions: Sequence[Callable[..., Any]] = fx.get_notrace_functions()
    return tuple(modules), tuple(f for f in functions if callable(f))
