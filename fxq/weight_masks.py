"""Unstructured magnitude pruning: masks on weights that survive training, on plain modules.

Sources: Han et al. 2016 (arXiv 1510.00149), section 2, for cutting by magnitude; Zhu & Gupta 2017 (arXiv 1710.01878), section 3, for the schedule;
Mishra et al. 2021 (arXiv 2104.08378), section 3, for N:M patterns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from fxq.errors import FxqError

MASKED = "weight_masks"
"""Key in the meta of a captured graph whose model had masks: True."""
PATTERN = "weight_pattern"
"""Key in its meta: the pattern of the masks, where they have one."""
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


class WeightMask(nn.Module):
    """Parametrization of a weight: 0 where it is masked, with no gradient there.

    Attributes:
        mask: bool buffer in the shape of the weight; False: cut.
        scope, pattern: as in :func:`sparsify`.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, scope: str = "global", pattern: str | None = None) -> None:
        super().__init__()
        self.scope, self.pattern = scope, pattern
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return masked(weight, self.mask)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the layer's weight is masked as well."""
        return weight


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight with 0 where ``mask`` (bool, its shape) is False; without a mask as it is."""
    return weight if mask is None else weight.masked_fill(~mask, 0.0)


@dataclass(frozen=True)
class MaskedWeight:
    """One weight with a mask.

    Attributes:
        name: path of the layer and name of the tensor.
        places: ``(layer, tensor name)``, more than one where layers share the weight.
        dim: of the input channels.
    """

    name: str
    places: tuple[tuple[nn.Module, str], ...]
    dim: int

    @property
    def masks(self) -> tuple[WeightMask, ...]:
        """The parametrization at each place, all with the same mask.

        Raises:
            FxqError: when it was removed.
        """
        for layer, tensor in self.places:
            if not parametrize.is_parametrized(layer, tensor):
                raise FxqError("its mask was removed", where=self.name, way_out="Call sparsify again")
        return tuple(next(p for p in parametrizations(layer)[tensor] if isinstance(p, WeightMask)) for layer, tensor in self.places)

    @property
    def own(self) -> WeightMask:
        """The first of :attr:`masks`."""
        return self.masks[0]

    @property
    def original(self) -> Tensor:
        """The parameter that the optimizer holds."""
        layer, tensor = self.places[0]
        found = parametrizations(layer)[tensor].original
        assert isinstance(found, Tensor)
        return found

    @property
    def kept(self) -> int:
        """Weights that are not cut."""
        return int(self.own.mask.sum())

    @property
    def total(self) -> int:
        """All weights."""
        return self.own.mask.numel()


class WeightMasks:
    """The masks of a model, from :func:`sparsify`, or found in a model with :func:`masks_of`.

    Attributes:
        weights: in the order of ``model.named_modules()``.
        skipped: weight -> why it has no mask (what :func:`sparsify` left alone).
    """

    def __init__(self, weights: Sequence[MaskedWeight], skipped: dict[str, str] | None = None) -> None:
        self.weights, self.skipped = tuple(weights), dict(skipped or {})

    def __iter__(self) -> Iterator[MaskedWeight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def pattern(self) -> str | None:
        """``N:M``, or ``None``."""
        return self.weights[0].own.pattern

    def density(self) -> float:
        """Share of the weights under masks that is left, 0 to 1."""
        return sum(w.kept for w in self) / sum(w.total for w in self)

    def update(self, ratio: float) -> None:
        """Cut more, by the magnitudes as they are now; what was cut stays cut. Parameters, and so the optimizer's state, stay the same objects.

        Raises:
            FxqError: for a ratio below that of now or outside [0, 1), for masks of a pattern, after :meth:`remove`, and for NaN in a weight.
        """
        require_ratio(ratio)
        if self.pattern is not None:
            raise FxqError(f"the pattern {self.pattern} says how much is cut", way_out="Call remove(), then sparsify with a ratio")
        magnitudes = [magnitude_of(w.original, w.name).masked_fill(~w.own.mask, -1.0) for w in self]
        together = [magnitudes] if self.weights[0].own.scope == "global" else [[m] for m in magnitudes]
        cut_now = [sum(int((m < 0).sum()) for m in part) for part in together]
        if any(cut_of(ratio, sum(m.numel() for m in part)) < now for part, now in zip(together, cut_now, strict=True)):
            raise FxqError(f"ratio {ratio} is below the share that is cut already", way_out=f"Give at least {1 - self.density():.4g}, or remove() the masks")
        masks = [m for part in together for m in magnitude_masks(part, ratio)]
        with torch.no_grad():
            for w, mask in zip(self, masks, strict=True):
                for own in w.masks:
                    own.mask.copy_(mask)

    def remove(self) -> None:
        """Write the zeros into the weights and take the masks out (and what else computes these weights); the parameters stay the same objects.

        Raises:
            FxqError: when they are gone already.
        """
        for layer in {layer: None for w in self for layer, _ in w.places if w.masks}:
            _bare(layer)

    def to_json(self) -> dict[str, Any]:
        """Density and every weight, as plain values."""
        rows = [{"weight": w.name, "shape": list(w.own.mask.shape), "kept": w.kept, "total": w.total, "density": w.kept / w.total} for w in self]
        return {"density": self.density(), "scope": self.weights[0].own.scope, "pattern": self.pattern, "weights": rows, "skipped": self.skipped}

    def __str__(self) -> str:
        """A table with a line for each weight."""
        wide = max(len(w.name) for w in self)
        lines = [f"{'weight':<{wide}}  {'kept':>10}  {'total':>10}  density"]
        lines += [f"{w.name:<{wide}}  {w.kept:>10}  {w.total:>10}  {w.kept / w.total:7.4f}" for w in self]
        kept, total = sum(w.kept for w in self), sum(w.total for w in self)
        lines.append(f"{'all':<{wide}}  {kept:>10}  {total:>10}  {kept / total:7.4f}")
        return "\n".join([*lines, *(f"{name}: no mask: {why}" for name, why in self.skipped.items())])


def masks_of(model: nn.Module) -> WeightMasks:
    """The masks of a model that is a copy of a sparsified one.

    Raises:
        FxqError: when it has none.
    """
    found: dict[int, MaskedWeight] = {}
    for path, layer in model.named_modules():
        for tensor, chain in parametrizations(layer).items() if parametrize.is_parametrized(layer) else ():
            if any(isinstance(p, WeightMask) for p in chain):
                old = found.get(id(chain.original))
                places = ((layer, tensor),) if old is None else (*old.places, (layer, tensor))
                found[id(chain.original)] = MaskedWeight(f"{path}.{tensor}".lstrip(".") if old is None else old.name, places, input_dim(layer))
    if not found:
        raise FxqError("the model has no masks", where=type(model).__name__, way_out="Call fxq.sparsity.sparsify first")
    return WeightMasks(list(found.values()))


def cubic_ratio(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Ratio of gradual pruning at a training step: ``final + (initial - final) (1 - (step - begin) / (end - begin))^3`` (arXiv 1710.01878, equation 1).

    Before ``begin`` it is ``initial``, from ``end`` on ``final``.

    Raises:
        FxqError: when ``end`` is not behind ``begin``, or a ratio is outside [0, 1) or falls.
    """
    require_ratio(final)
    require_ratio(initial)
    if end <= begin or final < initial:
        raise FxqError(f"from {initial} at step {begin} to {final} at step {end} nothing grows", way_out="Give end > begin and final >= initial")
    left = 1 - min(max(step - begin, 0), end - begin) / (end - begin)
    return final + (initial - final) * left**3


def magnitude_masks(magnitudes: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """Masks (bool) that cut exactly ``floor(ratio n)`` of the n elements, the least ones; of equal ones the last. Each tensor keeps its greatest.

    Raises:
        FxqError: when less is left than there are tensors.
    """
    total = sum(m.numel() for m in magnitudes)
    cut = cut_of(ratio, total)
    if total - cut < len(magnitudes):
        raise FxqError(f"ratio {ratio} leaves {total - cut} weights for {len(magnitudes)} layers", way_out="Give a smaller ratio")
    if not cut:
        return [torch.ones_like(m, dtype=torch.bool) for m in magnitudes]
    wide = torch.float64 if any(m.dtype == torch.float64 for m in magnitudes) else torch.float32
    rows = [m.detach().reshape(-1).to(magnitudes[0].device, wide, copy=True) for m in magnitudes]
    for row in rows:
        row[row.argmax()] = torch.inf
    flat = torch.cat(rows)
    least = flat.kthvalue(cut).values
    mask = flat >= least
    ties = (flat == least).nonzero().reshape(-1)
    mask[ties[len(ties) - (cut - int((~mask).sum())) :]] = False
    return [part.reshape(m.shape).to(m.device) for part, m in zip(torch.split(mask, [len(r) for r in rows]), magnitudes, strict=True)]


def pattern_mask(magnitude: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Mask (bool) that keeps the ``n`` greatest of each ``m`` neighbours along ``dim``; of equal ones the first."""
    last = magnitude.movedim(dim, -1)
    groups = last.reshape(*last.shape[:-1], -1, m)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return mask.reshape(last.shape).movedim(-1, dim).contiguous()


def baked(root: nn.Module) -> dict[str, Any]:
    """Write the masks of a model into its weights, in place; each conv, linear and attention layer then says in ``weight_masked`` whether it had one.

    Where a weight is 0 that is not masked, ``weight_masked`` is the mask itself.

    Returns:
        What the meta of a graph says of them; nothing when there were none, now or when an earlier capture wrote them.
    """
    try:
        masks = masks_of(root)
    except FxqError:
        return {MASKED: True} if any(getattr(m, "weight_masked", False) is not False for m in root.modules()) else {}
    found = {MASKED: True} if masks.pattern is None else {MASKED: True, PATTERN: masks.pattern}
    marks: dict[nn.Module, bool | Tensor] = {}
    for w in masks:
        more = bool(((w.original == 0) & w.own.mask).any())
        marks.update({layer: w.own.mask if more and tensor == "weight" else True for layer, tensor in w.places})
    for layer in marks:
        _bare(layer)
    for m in root.modules():
        if isinstance(m, LAYERS):
            vars(m)["weight_masked"] = marks.get(m, False)
    return found


def mask_of(layer: nn.Module, in_masked_model: bool) -> Tensor | None:
    """Mask (bool, shape of the weight) of a layer of a captured graph whose masks were baked in: where its weight is not 0. ``None``: it has none.

    A layer that a rewrite or a function call made has no mark of its own: every 0 of its weight counts, unless all are 0.
    """
    weight: Any = layer.weight
    mark = getattr(layer, "weight_masked", None)
    if not in_masked_model or mark is False or getattr(layer, "stands_in", False):
        return None
    mask: Tensor = weight.detach() != 0
    if isinstance(mark, Tensor) and mark.shape == mask.shape and not bool(mask[~mark.to(mask.device)].any()):
        return mark.to(mask.device)
    if mark is None and (bool(mask.all()) or not bool(mask.any())):
        return None
    return mask


def _bare(layer: nn.Module) -> None:
    """The layer as it was before it was parametrized, with the values of now in the same parameters.

    Unlike ``parametrize.remove_parametrizations`` it leaves the class alone, which copies of the layer share.
    """
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for tensor, chain in parametrizations(layer).items():
            value, own = getattr(layer, tensor), getattr(chain, "original", None)
            values[tensor] = own.copy_(value) if isinstance(own, Tensor) and own.shape == value.shape else nn.Parameter(value.clone())
    layer.__class__ = type(layer).__mro__[1]
    del layer._modules["parametrizations"]
    for tensor, t in values.items():
        if isinstance(t, nn.Parameter):
            layer.register_parameter(tensor, t)
        else:
            layer.register_buffer(tensor, t)


def parametrizations(layer: nn.Module) -> dict[str, ParametrizationList]:
    """Chains of a parametrized module, by tensor name."""
    return layer.parametrizations  # type: ignore[return-value]


def cut_of(ratio: float, total: int) -> int:
    """``floor(ratio total)`` of the ratio as it is written: 0.29 of 100 is 29."""
    return int(Fraction(repr(float(ratio))) * total)


def require_ratio(ratio: float) -> None:
    """Refuse what is no share below 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise FxqError(f"ratio {ratio!r} is not in [0, 1)", way_out="Give the share of the weights that is cut, such as 0.9")


def input_dim(layer: nn.Module) -> int:
    """Dimension of the input channels in the layer's weight."""
    return 0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1


def magnitude_of(weight: Tensor, name: str) -> Tensor:
    """Magnitudes of a weight; ``name`` for errors."""
    if is_lazy(weight) or weight.device.type == "meta":
        raise FxqError("the weight has no data yet", where=name, way_out="Run the model once (lazy modules), or load its weights")
    magnitude = weight.detach().abs()
    if bool(torch.isnan(magnitude).any()):
        raise FxqError("the weight holds NaN", where=name, way_out="Load finite weights")
    return magnitude
