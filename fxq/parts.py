"""The traceable submodules of a model that cannot be traced as a whole (detectors): graphs inside the float model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

MakeGraph = Callable[[nn.Module, tuple[Any, ...]], tuple[GraphModule, tuple[str, ...]]]
Same = Callable[[Any, Any], bool]


@dataclass(frozen=True)
class Part:
    """One captured submodule: its graph, the inputs of its first call, and what the graph is specialised to."""

    gm: GraphModule
    example: tuple[Any, ...]
    specialised: tuple[str, ...]


def find(root: nn.Module, example: tuple[Any, ...], make: MakeGraph, same: Same) -> dict[str, Part]:
    """Largest submodules that ``make`` captures, by module path, in the order of ``named_modules``.

    The float model runs on the example with hooks that record what each submodule is called with. A submodule that cannot be
    captured, or whose graph does not fit one of its calls, is entered. Each part holds a convolution or a linear layer.

    Raises:
        Exception: what the model itself raises on the example.
    """
    found: dict[str, Part] = {}
    frontier = _children(root, "")
    while frontier:
        calls = _record(root, example, frontier)
        following: list[str] = []
        for path in frontier:
            module = root.get_submodule(path)
            part = _part(module, calls[path], make, same)
            if part is None:
                following += _children(module, path)
            else:
                found[path] = part
        frontier = following
    return _replaceable(root, example, found, same)


def _children(module: nn.Module, path: str) -> list[str]:
    """Paths of the direct submodules that compute with weights."""
    prefix = f"{path}." if path else ""
    return [prefix + name for name, child in module.named_children() if any(isinstance(m, (_ConvNd, nn.Linear)) for m in child.modules())]


def _record(root: nn.Module, example: tuple[Any, ...], paths: list[str]) -> dict[str, list[tuple[Any, ...] | None]]:
    """Positional inputs of every call of the given submodules; ``None`` for a call that has none."""
    calls: dict[str, list[tuple[Any, ...] | None]] = {p: [] for p in paths}

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[path].append(_positional(module, args, kwargs))

        return note

    handles = [root.get_submodule(p).register_forward_pre_hook(hook(p), with_kwargs=True, prepend=True) for p in paths]
    try:
        with torch.no_grad():
            root(*_cloned(example))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _positional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The call's inputs, copied (the model may write into them later), keywords put in their places."""
    if kwargs:
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError:
            return None
        if bound.kwargs:
            return None
        args = bound.args
    taken: tuple[Any, ...] = _cloned(args)
    return taken


def _cloned(value: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)


def _part(module: nn.Module, calls: list[tuple[Any, ...] | None], make: MakeGraph, same: Same) -> Part | None:
    """The submodule as a graph that is right for every recorded call; ``None`` when there is none."""
    if not calls or any(c is None for c in calls):
        return None
    inputs = [c for c in calls if c is not None]
    try:
        gm, specialised = make(module, inputs[0])
        with torch.no_grad():
            fits = all(same(module(*_cloned(x)), gm(*_cloned(x))) for x in inputs[1:])
    except Exception:
        return None
    return Part(gm, inputs[0], specialised) if fits else None


def replace(root: nn.Module, graphs: dict[str, nn.Module]) -> nn.Module:
    """Copy of ``root`` (sharing its parameters) with the submodules at the given paths replaced."""
    kept: dict[int, Any] = {id(t): t for t in (*root.parameters(), *root.buffers())}
    out = copy.deepcopy(root, kept)
    for path, gm in graphs.items():
        out.set_submodule(path, gm)
    return out.eval()


def _replaceable(root: nn.Module, example: tuple[Any, ...], found: dict[str, Part], same: Same) -> dict[str, Part]:
    """Those parts with which the whole model still gives the same output (it may read more of a module than its output)."""

    def holds(graphs: dict[str, Part]) -> bool:
        try:
            with torch.no_grad():
                return same(want, replace(root, {p: part.gm for p, part in graphs.items()})(*_cloned(example)))
        except Exception:
            return False

    if not found:
        return found
    with torch.no_grad():
        want = root(*_cloned(example))
    return found if holds(found) else {p: part for p, part in found.items() if holds({p: part})}
