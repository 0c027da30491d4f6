"""Capture: a float module to a GraphModule, on a copy; symbolic, concrete, exported, in parts, or a clear error."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxq import exported, parts, weight_masks
from fxq.concrete import ConcreteTracer, OneBatchOnly
from fxq.errors import FxqError, TraceError
from fxq.tracers import SymbolicTracer, fault_of, first_line, input_names, quiet, timm_leaves, trace

RUNGS = ("symbolic", "concrete", "export", "submodules")
"""The ladder, in order."""

Leaves = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Captured:
    """What capture found.

    Attributes:
        gm: the model as one graph; ``None`` when only parts of it could be captured.
        rung: ``symbolic``, ``concrete``, ``export`` or ``submodules``.
        specialised: what the graph is specialised to, one line each, with file and line where known.
        root: a copy of the model in eval mode, which shares its parameters with ``gm`` and the parts; for the submodules rung
            the model whose parts can be replaced.
        parts: of the submodules rung: module path -> (graph, example inputs of its first call).
        notes: why earlier rungs failed, one line each with file and line where known.
    """

    gm: GraphModule | None
    rung: str
    specialised: tuple[str, ...]
    root: nn.Module
    parts: dict[str, tuple[GraphModule, tuple[Any, ...]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class _Unequal(RuntimeError):
    """The captured graph does not compute what the model computes."""


def refuse_programs(model: nn.Module) -> None:
    """Raises:
    FxqError: the model is a net on bits, or has one inside (tracing it would end the process).
    """
    program: Any = sys.modules.get("fxq.bitwise.program")  # it is there if a program is
    for name, m in model.named_modules() if program is not None else ():
        if isinstance(m, program.BitProgram):
            way_out = "Pass the float model that it was made from, or fxq.load(path, run=False)"
            raise FxqError("a BitProgram is compiled already", where=name or type(m).__name__, way_out=way_out)


def capture(
    model: nn.Module | ExportedProgram,
    example: tuple[Any, ...],
    *,
    leaf_modules: Sequence[type[nn.Module]] = (),
    rungs: Sequence[str] = RUNGS,
    check: bool = True,
) -> Captured:
    """Capture ``model`` as a graph that equals it bit for bit.

    The rungs are tried in order: ``torch.fx`` tracing; tracing with values from the example for control flow that depends on
    shapes; non-strict ``torch.export``; the traceable submodules of a model that cannot be traced as a whole. A graph has one
    placeholder per example input; further arguments of ``forward`` keep their defaults. Weight masks (:func:`fxq.sparsity.sparsify`) are written into the
    weights, which training keeps at 0.

    Args:
        model: any module; it is copied, not changed, and captured in eval mode. A GraphModule or an ExportedProgram is taken as it is.
        example: positional example inputs on the model's device: tensors, or lists of tensors. Dimension 0 is the batch.
        leaf_modules: module types that stay whole.
        rungs: which rungs to try.
        check: compare with the model at two batch sizes (at most 2 samples). Off: nothing is known about other batch sizes.

    Raises:
        TraceError: with file, line and expression of what cannot be traced, every rung's reason, and the way out.
        FxqError: for a net on bits.
    """
    unknown = [r for r in rungs if r not in RUNGS]
    if unknown:
        raise TraceError(f"unknown rung {unknown[0]!r}", way_out=f"The rungs are {', '.join(RUNGS)}")
    root = copied(exported.program_module(model) if isinstance(model, ExportedProgram) else model)
    refuse_programs(root)
    leaves = tuple(leaf_modules)
    marks = weight_masks.baked(root)
    if isinstance(root, GraphModule):
        given = _given(root, example, check)
        assert given.gm is not None
        given.gm.meta.update(marks)
        return given
    whole: dict[str, Callable[[], Iterator[tuple[GraphModule, tuple[str, ...]]]]] = {
        "symbolic": lambda: _symbolic(root, example, leaves),
        "concrete": lambda: _concrete(root, example, leaves),
        "export": lambda: iter([_exported(root, example)]),
    }
    notes: list[str] = []
    faults: list[tuple[str | None, str]] = []
    for rung in (r for r in rungs if r != "submodules"):
        try:
            with quiet():
                gm, specialised = _first_equal(whole[rung](), root, example, check)
        except Exception as e:
            where, what = fault_of(e)
            faults.append((where, what))
            notes.append(f"{rung}: {where}: {what}" if where else f"{rung}: {what}")
            continue
        gm.meta.update(marks)
        return Captured(gm, rung, specialised, root, notes=tuple(notes))
    if "submodules" in rungs:
        found = _in_parts(root, example, leaves, notes)
        if found is not None:
            return found
    raise _error(faults, notes)


def copied(model: nn.Module, *, share: bool = False) -> nn.Module:
    """Deep copy in eval mode; with ``share`` the copy's parameters and buffers are the model's own.

    Raises:
        TraceError: when the model cannot be copied.
    """
    kept = {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {}
    try:
        return copy.deepcopy(model, kept).eval()
    except Exception as e:
        raise TraceError(
            f"the model cannot be copied: {first_line(e)}",
            where=type(model).__name__,
            way_out="Detach tensors that the model keeps from a forward pass (remove old-style weight_norm), "
            "and take out hooks and attributes that cannot be copied",
        ) from e


def _error(faults: list[tuple[str | None, str]], notes: list[str]) -> TraceError:
    # The concrete tracer comes furthest: what stops it is the model's own problem, not only that of symbolic values.
    where, what = next((f for f in [*faults[1:2], *faults] if f[0]), faults[0] if faults else (None, "no rung was asked for"))
    return TraceError(
        f"cannot be traced: {what}",
        where=where,
        way_out="Keep the module around it whole with leaf_modules=[...], or move the data-dependent part out of forward. Tried: "
        + "; ".join(notes),
    )


def _first_equal(
    made: Iterator[tuple[GraphModule, tuple[str, ...]]], root: nn.Module, example: tuple[Any, ...], check: bool
) -> tuple[GraphModule, tuple[str, ...]]:
    """First of a rung's graphs that computes what the model computes, and what it is specialised to."""
    failed: Exception | None = None
    while True:
        try:
            gm, specialised = next(made)
        except StopIteration:
            assert failed is not None, "a rung gave neither a graph nor an error"
            raise failed from None
        if not check:
            return gm, specialised
        try:
            return gm, (*specialised, *compared(gm, root, example, bool(specialised)))
        except _Unequal as e:
            failed = e


def _symbolic(root: nn.Module, example: tuple[Any, ...], leaves: Leaves) -> Iterator[tuple[GraphModule, tuple[str, ...]]]:
    yield trace(SymbolicTracer(example, leaves), copied(root, share=True)), ()


def _concrete(root: nn.Module, example: tuple[Any, ...], leaves: Leaves) -> Iterator[tuple[GraphModule, tuple[str, ...]]]:
    """With a symbolic batch; then with buffers as values too; then at the example's batch; last with timm's leaves."""
    more, functions = timm_leaves(root)
    kinds: list[tuple[Leaves, tuple[Callable[..., Any], ...]]] = [(leaves, ())]
    if more:
        kinds.append(((*leaves, *more), functions))
    best: tuple[GraphModule, tuple[str, ...]] | None = None
    failed: Exception | None = None
    for whole, calls in kinds:
        static: tuple[str, ...] = ()
        for options in ({}, {"buffers": True}, {"vary": False}):
            tracer = ConcreteTracer(example, whole, calls, **options)
            try:
                gm = trace(tracer, copied(root, share=True))
            except Exception as e:
                if failed is None or isinstance(failed, OneBatchOnly):
                    failed = e
                if isinstance(e, OneBatchOnly):
                    static = static or (f"batch size: {e}",)
                continue
            if not tracer.batch_places and tracer.vary:
                yield gm, tracer.specialised
            best = best or (gm, (*(static if not tracer.vary else ()), *tracer.specialised))
        if best is not None:
            yield best
    if failed is not None:
        raise failed


def _exported(root: nn.Module, example: tuple[Any, ...]) -> tuple[GraphModule, tuple[str, ...]]:
    gm, specialised = exported.export(copied(root, share=True), example)
    return gm, (specialised,)


def _given(root: GraphModule, example: tuple[Any, ...], check: bool) -> Captured:
    """A graph is taken as it is; only its calling convention is made positional."""
    try:
        gm = exported.plain(copied(root, share=True), example, _given_names(root, example))  # type: ignore[arg-type]
        specialised = compared(gm, root, example, False) if check else ()
    except Exception as e:
        where, what = fault_of(e)
        raise TraceError(f"the graph cannot be used: {what}", where=where, way_out="Pass the module that it was made from") from e
    return Captured(gm, "symbolic", specialised, root)


def _given_names(root: GraphModule, example: tuple[Any, ...]) -> list[str]:
    info = getattr(root.graph._codegen, "pytree_info", None)
    return list(info.orig_args)[: len(example)] if info is not None else input_names(root, len(example))


def _in_parts(root: nn.Module, example: tuple[Any, ...], leaves: Leaves, notes: list[str]) -> Captured | None:
    def one(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[GraphModule, tuple[str, ...]]:
        found = capture(module, inputs, leaf_modules=leaves, rungs=("symbolic", "concrete"))
        assert found.gm is not None
        return found.gm, found.specialised

    try:
        with quiet():
            found = parts.find(root, example, one, same)
    except Exception as e:
        where, what = fault_of(e)
        notes.append(f"submodules: {where}: {what}" if where else f"submodules: {what}")
        return None
    if not found:
        notes.append("submodules: no submodule with a convolution or a linear layer can be captured")
        return None
    specialised = tuple(f"{path}: {line}" for path, part in found.items() for line in part.specialised)
    return Captured(None, "submodules", specialised, root, {path: (p.gm, p.example) for path, p in found.items()}, tuple(notes))


def compared(gm: GraphModule, root: nn.Module, example: tuple[Any, ...], known: bool) -> tuple[str, ...]:
    """Compare graph and model on at most 2 samples and at a second batch size.

    Returns:
        What the comparison at the second batch size tells about the graph, one line each.

    Raises:
        RuntimeError: when the outputs differ on the example.
    """
    batch = batch_of(example)
    few = example if batch <= 2 else resized(example, 2)
    try:
        fault = _fault(gm, root, few)
    except _ModelFails:
        few = example
        fault = _fault(gm, root, few)
    if fault is not None:
        if few is not example and _fault(gm, root, example) is None:
            return (f"batch size {batch}: at {batch_of(few)} {fault}",)
        raise _Unequal(fault)
    if batch == 0:
        return ()
    second = resized(example, 1 if batch_of(few) > 1 else 2)
    try:
        fault = _fault(gm, root, second)
    except _ModelFails as e:
        return (f"batch size {batch}: the model itself fails at {batch_of(second)} ({e})",)
    return () if fault is None else (f"batch size {batch_of(few)}: at {batch_of(second)} {fault}",)


class _ModelFails(RuntimeError):
    """The float model itself does not run."""


def _fault(gm: GraphModule, root: nn.Module, inputs: tuple[Any, ...]) -> str | None:
    try:
        want = run(root, inputs)
    except Exception as e:
        raise _ModelFails(fault_of(e)[1]) from e
    try:
        got = run(gm, inputs)
    except Exception as e:
        return f"the graph fails: {fault_of(e)[1]}"
    return None if same(want, got) else "the graph's output differs from the model's"


def run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Output for copies of ``inputs`` (a model may write into them), with the random numbers of seed 0."""
    fresh = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    devices = sorted({x.device.index or 0 for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices), quiet():
        torch.manual_seed(0)
        return module(*fresh)


def batch_of(example: tuple[Any, ...]) -> int:
    """Size of dimension 0 of the first tensor; 0 without one."""
    sizes = [x.shape[0] for x in torch.utils._pytree.tree_leaves(example) if isinstance(x, Tensor) and x.ndim]
    return sizes[0] if sizes else 0


def resized(example: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    """``example`` with ``n`` samples, repeated from the first where there are fewer."""
    batch = batch_of(example)

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] != batch:
            return x
        return x[:n] if n <= batch else torch.cat([x] * -(-n // batch))[:n]

    out: tuple[Any, ...] = torch.utils._pytree.tree_map(one, example)
    return out


def same(a: Any, b: Any) -> bool:
    """Bit for bit the same tensors, numbers and structure (NaN equals NaN in the same place; kinds of containers may differ)."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool(((a == b) | (a != a) & (b != b)).all())
    if dataclasses.is_dataclass(a) and not isinstance(a, (type, dict)):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
