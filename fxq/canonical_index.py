"""Canonical forms of slices and constant indices: ``x[...]``, gathers, flips, rolls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq import modules as m
from fxq.canonical import At, Form, NoForm, is_number, known, name_of, to_reshape
from fxq.graph import shape


def narrow(at: At) -> None:
    """``narrow(dim, start, length)``, aten ``slice(dim, start, end, step)``, ``select(dim, index)``."""
    x, name = at.tensor(), name_of(at.node)
    dim = int(at.arg(1, "dim", 0)) % len(shape(x))
    if name == "slice":
        start, stop, step = at.arg(2, "start", None), at.arg(3, "end", None), at.arg(4, "step", 1)
        if start in (0, None) and (stop is None or stop >= 2**62) and step == 1:
            at.become(x)
            return
    elif name == "select":
        start = int(at.arg(2, "index"))
        start, step = start % shape(x)[dim], 1
        stop = start + 1
    else:
        start, step = int(at.arg(2, "start")), 1
        start += shape(x)[dim] if start < 0 else 0
        stop = start + int(at.arg(3, "length"))
    if x.meta["dynamic"][dim]:
        raise NoForm("along the batch")
    cut = (dim, *slice(start, stop, step).indices(shape(x)[dim]))
    if name == "select":
        to_reshape(at, at.new("slice", m.Slice([cut]), x))
    else:
        at.put("slice", m.Slice([cut]), x)


def index(at: At) -> None:
    """``x[...]`` with integers, slices, ``None``, and at most one constant tensor or list of integers."""
    x = at.tensor()
    given = at.node.args[1]
    items = list(given) if isinstance(given, tuple) else [given]
    n = len(shape(x))
    used = sum(i is not None and i is not Ellipsis for i in items)
    where = next((k for k, i in enumerate(items) if i is Ellipsis), None)
    if where is not None:
        items[where : where + 1] = [slice(None)] * (n - used)
    items = [i for i in items if i is not None]
    cuts: list[tuple[int, int, int | None, int]] = []
    gathers: list[tuple[int, Any]] = []
    for dim, raw in enumerate(items):
        item = known(raw)
        if isinstance(raw, slice):
            item = slice(*(known(v) for v in (raw.start, raw.stop, raw.step)))
        if isinstance(item, slice) and (item.step is None or item.step > 0):
            start, stop, step = item.indices(shape(x)[dim])
            if (start, stop, step) != (0, shape(x)[dim], 1) or item.stop is not None and x.meta["dynamic"][dim]:
                cuts.append((dim, start, stop, step))
        elif is_number(item):
            cuts.append((dim, item % shape(x)[dim], item % shape(x)[dim] + 1, 1))
        else:
            gathers.append((dim, _indices(at, item, shape(x)[dim])))
    if any(x.meta["dynamic"][d] for d in (*(c[0] for c in cuts), *(g[0] for g in gathers))):
        raise NoForm("along the batch")
    if len(gathers) > 1 or (gathers and any(is_number(known(i)) for i in items if not isinstance(i, slice))):
        raise NoForm("indexed by several tensors")
    if cuts:
        x = at.new("slice", m.Slice(cuts), x)
    for dim, picks in gathers:
        x = at.new("index_select", m.IndexSelect(dim, picks.reshape(-1)), x)
    to_reshape(at, x)


def assignment(at: At) -> None:
    """``x`` with ``x[slices] = value``: the pieces around the slices and the value, concatenated."""
    x, value, index = at.tensor(), at.tensor(2, "value"), at.node.args[1]
    given: Any = index if isinstance(index, tuple) else (index,)
    items: list[Any] = [slice(*(known(v) for v in (i.start, i.stop, i.step))) if isinstance(i, slice) else i for i in given]
    if Ellipsis in items:
        where = items.index(Ellipsis)
        items[where : where + 1] = [slice(None)] * (len(shape(x)) - len(items) + 1)
    if not all(isinstance(i, slice) and i.step in (None, 1) for i in items):
        raise NoForm("assigned to more than slices")
    cuts = [(d, *i.indices(shape(x)[d])[:2]) for d, i in enumerate(items) if i != slice(None)]
    region = list(shape(x))
    for d, start, stop in cuts:
        region[d] = stop - start
    if any(x.meta["dynamic"][d] for d, _, _ in cuts) or tuple(region) != shape(value) or x.meta["dtype"] != value.meta["dtype"]:
        raise NoForm("along the batch, or a value of another shape")
    at.become(_written(at, x, cuts, value))


def _written(at: At, x: Node, cuts: list[tuple[int, int, int]], value: Node) -> Node:
    if not cuts:
        return value
    (d, start, stop), rest = cuts[0], cuts[1:]
    inner = _written(at, at.new("slice", m.Slice([(d, start, stop, 1)]), x), rest, value) if rest else value
    before = [at.new("slice", m.Slice([(d, 0, start, 1)]), x)] if start > 0 else []
    after = [at.new("slice", m.Slice([(d, stop, shape(x)[d], 1)]), x)] if stop < shape(x)[d] else []
    return at.new("cat", m.Cat(d), *before, inner, *after) if before or after else inner


def _indices(at: At, item: Any, size: int) -> Tensor:
    """Constant indices as non-negative int64."""
    if isinstance(item, list) and all(is_number(v) for v in item):
        picks = torch.tensor(item, dtype=torch.int64)
    else:
        picks = at.value(item, "index").detach().cpu()
    if picks.dtype == torch.bool:
        if picks.ndim != 1:
            raise NoForm("indexed by a mask")
        picks = picks.nonzero().reshape(-1)
    picks = picks.to(torch.int64)
    return torch.where(picks < 0, picks + size, picks)


def aten_index(at: At) -> None:
    """``aten.index.Tensor(x, [None, indices])`` with one constant index."""
    x, given = at.tensor(), at.node.args[1]
    found = [(d, i) for d, i in enumerate(given) if i is not None]  # type: ignore[arg-type]
    if len(found) != 1 or x.meta["dynamic"][found[0][0]]:
        raise NoForm("not indexed by one constant tensor")
    dim, item = found[0]
    to_reshape(at, at.new("index_select", m.IndexSelect(dim, _indices(at, item, shape(x)[dim]).reshape(-1)), x))


def index_select(at: At) -> None:
    x = at.tensor()
    dim, picks = int(at.arg(1, "dim")) % len(shape(x)), at.arg(2, "index")
    if x.meta["dynamic"][dim]:
        raise NoForm("along the batch")
    at.put("index_select", m.IndexSelect(dim, _indices(at, picks, shape(x)[dim])), x)


def _along(at: At, x: Node, picks: dict[int, Tensor]) -> None:
    """Replace the node by constant selections along dimensions; whatever keeps its order is left out."""
    todo = [(d, p) for d, p in picks.items() if not torch.equal(p, torch.arange(shape(x)[d]))]
    if any(x.meta["dynamic"][d] for d, _ in todo):
        raise NoForm("along the batch")
    for dim, p in todo:
        x = at.new("index_select", m.IndexSelect(dim, p), x)
    at.become(x)


def flip(at: At) -> None:
    x = at.tensor()
    dims = [int(d) % len(shape(x)) for d in at.rest(1, "dims")]
    _along(at, x, {d: torch.arange(shape(x)[d]).flip(0) for d in dims})


def roll(at: At) -> None:
    x, shifts, dims = at.tensor(), at.arg(1, "shifts"), at.arg(2, "dims", ())
    shifts, dims = (list(v) if isinstance(v, (tuple, list)) else [v] for v in (shifts, dims))
    if not dims or len(dims) != len(shifts):
        raise NoForm("rolls the flattened tensor")
    picks: dict[int, Tensor] = {}
    for shift, d in zip(shifts, dims, strict=True):
        dim = int(d) % len(shape(x))
        picks[dim] = picks.get(dim, torch.arange(shape(x)[dim])).roll(int(shift))
    _along(at, x, picks)


INDEX: dict[str, Form] = {
    **dict.fromkeys(("narrow", "slice", "select"), narrow), "getitem": index, "index": aten_index, "index_select": index_select,
    "flip": flip, "roll": roll, "set_item": assignment,
}  # fmt: skip
