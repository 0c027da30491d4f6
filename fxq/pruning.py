"""Structured pruning: what the user asks for, which units stay, and the cut.

``Prune`` is the request. :func:`plan` chooses units on a canonical graph and changes nothing, :func:`apply` cuts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq import budget, importance
from fxq.channels import Labels, layer_labels
from fxq.cutting import Cutter
from fxq.dead_channels import Constants, Reading, added
from fxq.errors import PassError, nearest
from fxq.graph import kind, module_of, swap_module
from fxq.groups import Group, Groups, find
from fxq.masking import masked
from fxq.modules import WEIGHTED
from fxq.selection import Pool, select, within
from fxq.selectors import Selector, fits, inside, matches

WHERE = "prune-channels"
SCOPES = ("global", "layer")
SPARSITY_SCOPES = ("global", "layer", "sensitivity")
CHANNELS_ONLY = ("multiple_of", "by", "scope", "ratios", "at_least", "at_most", "data", "loss")
"""Fields that say nothing about single weights."""
Limit = float | int | Mapping[str, float | int]
"""A share of a layer's units (a float up to 1) or their number (an int), for all layers or by pattern."""


@dataclass(frozen=True, eq=False)
class Prune:
    """What to cut: whole channels, single weights, or both.

    At most one of the first four says how many channels:

    Attributes:
        ratio: share of the units to cut, in [0, 1): over all groups together, or of each with ``scope="layer"``.
        macs, parameters, bytes: share of the model's multiply-accumulates, parameters or bytes (of weights in the scheme's bits) that may stay, in (0, 1].
        sparsity: share of the single weights that become 0, by magnitude, [0, 1): of all layers, or pattern of module paths -> share of these layers (others
            stay whole). The masks hold in training (``mode="qat"``), where ``prune_weights`` cuts more.
        sparsity_scope: ``global``: the least weights of all layers together; ``layer``: the same share of each; ``sensitivity``: as much of each as keeps the
            output nearest (:mod:`fxq.weight_levels`), measured on the first inputs (of all processes). A ``sparsity`` of 0 fixes the parts alone.
        multiple_of: widths are multiples of it (nearest, at least once; narrower layers stay whole). None: what the target's kernels like
            (:attr:`fxq.targets.Target.channel_multiple`).
        by: criterion, one of :data:`fxq.importance.CRITERIA`.
        scope: ``global`` ranks the units of all layers together, ``layer`` those of each layer.
        keep: layers whose outputs stay whole: patterns of module paths, module types, numbers of weighted layers (0 the first, -1 the last).
        ratios: pattern -> a ratio of its own for these layers.
        at_least, at_most: floor and cap of what stays of each layer; shares (floats) or numbers of units (ints), or a mapping from patterns to them.
        absorb: constants that cut channels emit go into the next layer's bias where that is exact.
        seed: of ``by="random"``.
        data: batches for ``by="taylor"`` (inputs, then labels); default: the first calibration batches.
        loss: ``loss(output, *labels)`` for ``by="taylor"``.
        batches: at most so many batches for ``by="taylor"``.
        must: a request that cannot be met is an error; otherwise the graph stays whole (parts of a model that is captured in parts).

    Raises:
        PassError: for fields that make no sense, or contradict each other.
    """

    ratio: float | None = None
    macs: float | None = None
    parameters: float | None = None
    bytes: float | None = None
    sparsity: float | Mapping[str, float] | None = None
    sparsity_scope: str = "global"
    multiple_of: int | None = None
    by: str = "l2"
    scope: str = "global"
    keep: Selector | Sequence[Selector] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    at_least: Limit = 1
    at_most: Limit = 1.0
    absorb: bool = True
    seed: int = 0
    data: Iterable[Any] | None = None
    loss: importance.Loss | None = None
    batches: int = 16
    must: bool = True

    def __post_init__(self) -> None:
        given = [n for n in ("ratio", *budget.COSTS) if getattr(self, n) is not None]
        if len(given) != 1 and not (self.sparsity is not None and not given):
            fact = f"{' and '.join(given)} both say how much to cut" if given else "nothing says how much to cut"
            raise PassError(fact, where=WHERE, way_out="Give one of ratio=, macs=, parameters=, bytes=, or sparsity=")
        self._check_sparsity()
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise PassError(f"ratio {self.ratio:g} would empty every layer" if self.ratio >= 1 else f"ratio {self.ratio} is no share", where=WHERE,
                            way_out="Cut a share in [0, 1), such as 0.5")  # fmt: skip
        for name in given:
            if name != "ratio" and not 0 < (value := getattr(self, name)) <= 1:
                raise PassError(f"{name}={value} is no share of what may stay", where=WHERE, way_out=f"For half of it {name}=0.5")
        for pattern, value in self.ratios.items():
            if not 0 <= value < 1:
                raise PassError(f"ratio {value} of {pattern!r} would empty it or is no share", where=WHERE, way_out="Cut a share in [0, 1)")
        for word, known in ((self.by, importance.CRITERIA), (self.scope, SCOPES)):
            if word not in known:
                raise PassError(f"unknown word {word!r}", where=WHERE, way_out=nearest(str(word), known))
        if self.multiple_of is not None and (not isinstance(self.multiple_of, int) or self.multiple_of < 1):
            raise PassError(f"multiple_of={self.multiple_of} is no number from 1 on", where=WHERE, way_out="Use 1, 8, 16 or 32")

    def _check_sparsity(self) -> None:
        if self.sparsity is None and self.sparsity_scope != "global":
            raise PassError("sparsity_scope= is of single weights", where="prune-weights", way_out="Add sparsity=0.9, or use scope= for channels")
        odd = [n for n in CHANNELS_ONLY if getattr(self, n) != Prune.__dataclass_fields__[n].default and getattr(self, n) != {}]
        if odd and not self.cuts_channels:
            way_out = "For single weights there are sparsity_scope= and sparsity={pattern: share}; channels need ratio= or macs="
            raise PassError(f"{odd[0]}= is of channels, and none are cut", where="prune-weights", way_out=way_out)
        if isinstance(self.sparsity, Mapping) and not (self.sparsity and all(isinstance(k, str) for k in self.sparsity)):
            way_out = "Give a dict such as {'features.*': 0.6}, or one share for all"
            raise PassError(f"sparsity={dict(self.sparsity)!r} names no layer by a pattern of its path", where="prune-weights", way_out=way_out)
        if self.sparsity_scope not in SPARSITY_SCOPES:
            raise PassError(f"unknown word {self.sparsity_scope!r}", where="prune-weights", way_out=nearest(str(self.sparsity_scope), SPARSITY_SCOPES))
        for value in () if self.sparsity is None else self.sparsity.values() if isinstance(self.sparsity, Mapping) else (self.sparsity,):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                way_out = "Give the share of the weights that become 0, such as 0.9"
                raise PassError(f"sparsity {value!r} is not in [0, 1)", where="prune-weights", way_out=way_out)

    @property
    def cuts_channels(self) -> bool:
        """It asks for channels, not for single weights alone."""
        return any(getattr(self, n) is not None for n in ("ratio", *budget.COSTS))

    def inside(self, path: str, names: Sequence[str]) -> Prune | None:
        """The request for one part of a model: what names layers of other parts is left out; ``None`` when nothing is left.

        Args:
            path: of the part. names: module paths inside it.
        """
        inner = {p: p.removeprefix(f"{path}.") for p in (*self.ratios, *(s for s in self.selectors if isinstance(s, str)))}
        here = {p: i for p, i in inner.items() if any(fits(n, i) and fits(f"{path}.{n}", p) for n in names)}
        keep = [here.get(s) if isinstance(s, str) else s for s in self.selectors if not isinstance(s, str) or s in here]
        sparsity = self.sparsity
        if isinstance(sparsity, Mapping):
            sparsity = inside(sparsity, path, names) or None
            if sparsity is None and not self.cuts_channels:
                return None
        ratios = {here[p]: v for p, v in self.ratios.items() if p in here}
        return replace(self, keep=[k for k in keep if k is not None], ratios=ratios, sparsity=sparsity, must=False)

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """``keep`` as a tuple."""
        return tuple(self.keep) if isinstance(self.keep, Sequence) and not isinstance(self.keep, str) else (self.keep,)


@dataclass
class Plan:
    """Units that stay, and everything that follows from it.

    Attributes:
        groups: of the uncut graph.
        keep: bool ``[units]``.
        kept: bool ``[n]`` for each group, in its units' order.
        scores: float64 ``[n]`` for each group.
        readings: layers that read cut channels, and the constants that they absorb.
        share: what stays of MACs (by the labels), in [0, 1].
        judged, pools: groups that the criterion ranks, and their limits.
        flat: all scores are equal: the criterion says nothing, and the cut is spread evenly.
    """

    groups: Groups
    keep: Labels
    kept: list[Labels]
    scores: list[Labels]
    readings: list[Reading]
    share: float
    judged: list[Group]
    pools: list[Pool]
    flat: bool = False

    @property
    def labels(self) -> Labels:
        """bool ``[labels]``: which labels stay."""
        found: Labels = self.keep[self.groups.unit]
        return found

    def masked(self) -> GraphModule:
        """The uncut graph with masks: it computes what the cut one computes. Only before :func:`apply`."""
        return masked(self.groups.channels, self.labels, self.readings)


def plan(
    gm: GraphModule, how: Prune, multiple: int, data: Iterable[tuple[Any, ...]] = (), inputs: int = 1, bits: Callable[[Node], int] | None = None,
    groups: Groups | None = None,
) -> Plan:  # fmt: skip
    """Choose the units that stay; ``gm`` is not changed.

    Args:
        gm: canonical, with shapes. multiple: of the widths.
        data: batches for ``taylor``. inputs: how many of a batch are the model's inputs.
        bits: of a layer's weight, for a budget of bytes. groups: of this graph, where they are known already.

    Raises:
        PassError: what cannot be: a request that empties a layer, contradicts itself or has no effect; with the way out.
    """
    named = _Named(gm, how)
    g = groups or find(gm, named.kept)
    named.check(g)
    if not g.groups:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(g.left.items())[:3])
        raise PassError(f"nothing can be cut ({reasons or 'no layer gives channels'})", where=WHERE, way_out="Take layers out of keep=, or do not prune")
    value = importance.scores(g, how.by, seed=how.seed, data=data, inputs=inputs, loss=how.loss)
    pooled = _judged(g, value, how)
    reserved = _reserved(g, value)
    pools = [_pool(x, value, reserved, named, how, multiple) for x in pooled]
    keep = g.all_kept()

    def with_units(chosen: Sequence[Labels]) -> Labels:
        out = keep.copy()
        for x, kept in zip(pooled, chosen, strict=True):
            out[x.units] = kept
        return out

    macs = budget.budget(g, "macs")
    if how.ratio is not None:
        chosen = select(pools, how.ratio, how.scope)
    else:
        what = next(n for n in budget.COSTS if getattr(how, n) is not None)
        cost = macs if what == "macs" else budget.budget(g, what, bits)
        whole = cost.cost(keep)
        if whole <= 0:
            raise PassError(f"the model has no {what} to save", where=WHERE, way_out="Use ratio=")
        chosen = within(pools, lambda kept: cost.cost(with_units(kept)) / whole, getattr(how, what), how.scope)
    keep = with_units(chosen)
    readings = Constants(g.channels, keep[g.unit]).readings()
    if not how.absorb:
        none = np.empty(0, np.int64)
        readings = [Reading(r.node, none, np.empty(0), r.dropped + len(r.places)) for r in readings]
    kept = [keep[x.units] for x in g.groups]
    flat = len({float(v) for p in pools for v in p.scores}) == 1
    return Plan(g, keep, kept, [value[x.units] for x in g.groups], readings, budget.share(macs, keep), pooled, pools, flat)


class _Named:
    """Layers that the user names.

    Attributes:
        kept: layers of ``keep=``, and why.
    """

    def __init__(self, gm: GraphModule, how: Prune) -> None:
        self.gm, self.how = gm, how
        nodes = [n for n in gm.graph.nodes if n.op == "call_module"]
        self.layers = [n for n in nodes if kind(gm, n) in WEIGHTED]
        self.kept: dict[Node, str] = {}
        for selector in how.selectors:
            hits = [n for n in nodes if matches(gm, n, selector, self.layers)]
            if not hits:
                names = [str(n.target) for n in self.layers]
                raise PassError(f"{selector!r} of keep= names no layer", where=WHERE, way_out=nearest(str(selector), names))
            self.kept.update({n: f"is kept on request ({selector.__name__ if isinstance(selector, type) else selector})" for n in hits})
        for pattern in how.ratios:
            hits = [n for n in self.layers if matches(gm, n, pattern, self.layers)]
            if not hits:
                raise PassError(f"{pattern!r} of ratios= names no layer", where=WHERE, way_out=nearest(pattern, [str(n.target) for n in self.layers]))
            both = next((n for n in hits if n in self.kept), None)
            if both is not None:
                raise PassError(f"keep= and ratios= both name it ({pattern!r})", where=f"{WHERE} / {both.target}", way_out="Take it out of one of them")

    def check(self, g: Groups) -> None:
        """Refuse ratios of their own for layers whose outputs must stay.

        Raises:
            PassError: naming the layer and what keeps it.
        """
        free = {n for x in g.groups for n, _ in x.givers}
        for pattern in self.how.ratios:
            hits = [n for n in self.layers if matches(self.gm, n, pattern, self.layers)]
            stays = next((g.left[str(n.target)] for n in hits if str(n.target) in g.left), None)
            if stays is not None and not free & set(hits):
                way_out = "Only layers whose channels other layers of the model read can be cut"
                raise PassError(f"ratios= names it, but its outputs stay: {stays}", where=f"{WHERE} / {hits[0].target}", way_out=way_out)

    def ratio(self, group: Group) -> float | None:
        """The group's own ratio."""
        found = {v for p, v in self.how.ratios.items() for n, _ in group.givers if matches(self.gm, n, p, self.layers)}
        if len(found) > 1:
            fact = f"its layers go together but have the ratios {', '.join(f'{v:g}' for v in sorted(found))}"
            raise PassError(fact, where=f"{WHERE} / {group.name}", way_out="Give the layers of one group one ratio")
        return found.pop() if found else None

    def limit(self, group: Group, limit: Limit, name: str) -> int | None:
        """Floor or cap of a group in units."""
        if isinstance(limit, Mapping):
            found = [v for p, v in limit.items() for n, _ in group.givers if matches(self.gm, n, p, self.layers)]
            if not found:
                return None
            limit = max(found) if name == "at_least" else min(found)
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit <= 0 or (isinstance(limit, float) and limit > 1):
            raise PassError(f"{name}={limit!r} is neither a share (a float up to 1) nor a number of units (an int)", where=WHERE, way_out="Such as 0.1 or 8")
        n = len(group.units)
        exact = limit * n
        if isinstance(limit, int):
            return min(limit, n)
        return math.ceil(exact - 1e-9) if name == "at_least" else max(1, math.floor(exact + 1e-9))


def _judged(g: Groups, value: Labels, how: Prune) -> list[Group]:
    """Groups that the criterion says something about; the others stay, with the reason."""
    found = []
    for x in g.groups:
        if bool(np.isnan(value[x.units]).any()):
            why = "the loss does not depend on it" if how.by == "taylor" else "has no batch norm behind it"
            g.left[x.name] = f"{why}, so by={how.by!r} says nothing about it; by='l2' does"
        else:
            found.append(x)
    if not found:
        what = "loss that depends" if how.by == "taylor" else "batch norm"
        raise PassError(f"by={how.by!r} finds no {what} on channels that can be cut", where=WHERE, way_out="Use by='l2' (or 'l1', 'taylor' with data)")
    return found


def _reserved(g: Groups, value: Labels) -> Labels:
    """bool ``[units]``: the best unit of every dimension of every value, so that none becomes empty."""
    keep = np.zeros(g.count, bool)
    rank = np.where(np.isnan(value), np.inf, value)
    inside = np.zeros(g.count, bool)
    for x in g.groups:
        inside[x.units] = True
    seen: set[int] = set()
    for node in g.channels.gm.graph.nodes:
        for labels in _arrays(g.channels.dims[node]):
            if id(labels) in seen:
                continue
            seen.add(id(labels))
            units = g.unit[labels]
            if bool(inside[units].all()):
                keep[units[np.argmax(rank[units])]] = True
    return keep


def _arrays(dims: Any) -> Iterable[Labels]:
    if isinstance(dims, np.ndarray):
        yield dims
    elif dims is not None:
        for d in dims:
            yield from _arrays(d)


def _pool(x: Group, value: Labels, reserved: Labels, named: _Named, how: Prune, multiple: int) -> Pool:
    least, most = named.limit(x, how.at_least, "at_least") or 1, named.limit(x, how.at_most, "at_most")
    own = reserved[x.units]
    return Pool(x.name, value[x.units], x.cells, x.step(multiple), least, None if most in (None, len(x.units)) else most, own, named.ratio(x), x.columns)


def apply(p: Plan) -> int:
    """Cut the graph of ``p`` in place, then let the readers' biases take the constants over.

    Returns:
        Number of nodes that changed; the shapes in the nodes' meta are those of the cut graph.
    """
    gm = p.groups.channels.gm
    shifts = {r.node: added(module_of(gm, r.node), r, kind(gm, r.node)) for r in p.readings if len(r.places)}
    given = {node: _kept_outputs(p, node) for node in shifts}
    changed = Cutter(p.groups.channels, p.labels).run()
    for node, shift in shifts.items():
        places = given[node]
        _absorb(gm, node, shift if places is None else shift[torch.from_numpy(places).to(shift.device)])
    return changed


def _kept_outputs(p: Plan, node: Node) -> Labels | None:
    labels = layer_labels(p.groups.channels, node, module_of(p.groups.channels.gm, node))[1]
    return None if labels is None else np.flatnonzero(p.labels[labels])


def _absorb(gm: GraphModule, node: Node, shift: torch.Tensor) -> None:
    """Into the running mean of the batch norm behind a layer without bias; else into the bias, which may be new."""
    old: Any = module_of(gm, node)
    users = list(node.users)
    follower = users[0] if len(users) == 1 and kind(gm, users[0]) == "batch_norm" else None
    if old.bias is None and follower is not None and module_of(gm, follower).running_mean is not None:
        bn: Any = module_of(gm, follower)
        new = _own(bn)
        new._buffers["running_mean"] = (bn.running_mean.double() - shift.to(bn.running_mean.device)).to(bn.running_mean.dtype)
        swap_module(gm, follower, new)
        return
    new = _own(old)
    bias = shift if old.bias is None else old.bias.detach().double() + shift
    new._parameters["bias"] = nn.Parameter(bias.to(old.weight.dtype), old.weight.requires_grad)
    swap_module(gm, node, new)


def _own(module: Any) -> Any:
    """A copy with tables of its own."""
    new = copy.copy(module)
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    return new
