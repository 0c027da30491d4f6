"""Sparsity: weights that are cut by magnitude (:func:`sparsify`), and batch norms whose gammas are trained towards 0 (:class:`SlimmingPenalty`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxq.errors import FxqError, nearest
from fxq.modules import Wrapper
from fxq.selectors import fits
from fxq.slimming import SlimmingPenalty
from fxq.weight_masks import (
    LAYERS,
    MaskedWeight,
    WeightMask,
    WeightMasks,
    cubic_ratio,
    input_dim,
    magnitude_masks,
    magnitude_of,
    masks_of,
    parametrizations,
    pattern_mask,
    require_ratio,
)

__all__ = ["SlimmingPenalty", "WeightMask", "WeightMasks", "cubic_ratio", "masks_of", "sparsify"]

SCOPES = ("global", "layer")
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
WRAPPED = (nn.DataParallel, nn.parallel.DistributedDataParallel)
Keep = str | type[nn.Module] | int


def sparsify(
    model: nn.Module, ratio: float | None = None, *, pattern: str | None = None, scope: str = "global", keep: Keep | Sequence[Keep] = ()
) -> WeightMasks:
    """Mask the least weights of a model's conv, transposed conv, linear and attention layers, by magnitude.

    The layers' weights become parametrized (``torch.nn.utils.parametrize``, :class:`WeightMask`): whatever an optimizer does to the parameter, the weight
    is 0 where it is masked. Copies, ``state_dict`` (of a model that was sparsified in the same way) and ``DistributedDataParallel`` hold the masks.

    Args:
        model: changed in place; parameters stay the same objects.
        ratio: share that is cut, [0, 1): exactly ``floor(ratio n)`` weights, of equal ones those that come last; each layer keeps its greatest weight.
        pattern: ``N:M`` (``2:4`` for sparse tensor cores), instead of a ratio: of M neighbours along the input channels the N greatest are kept.
        scope: ``global``: the least of all layers; ``layer``: the least of each.
        keep: what gets no mask: patterns (``fnmatch``) of module paths, module types, numbers of layers in the order of ``named_modules()`` (-1 the last).

    Raises:
        FxqError: for a ratio, pattern or scope that does not exist, for ``keep`` that matches nothing, for models without such layers, compiled models,
            models that have masks already, weights with NaN or without data, and when no layer fits the pattern.
    """
    parsed = _require_options(ratio, pattern, scope)
    _require_plain(model)
    found, skipped = _candidates(model, keep)
    if parsed is not None:
        for w in list(found):
            why = _misfit(w, *parsed)
            if why is not None:
                found.remove(w)
                skipped[w.name] = why
    if not found:
        first = "; ".join(f"{n}: {why}" for n, why in list(skipped.items())[:3])
        raise FxqError(f"no weight can be masked ({first})", way_out="Keep fewer layers" if parsed is None else "Give a ratio instead of a pattern")
    magnitudes = [magnitude_of(_tensor(w), w.name) for w in found]
    if parsed is not None:
        masks = [pattern_mask(m, *parsed, w.dim) for m, w in zip(magnitudes, found, strict=True)]
    else:
        assert ratio is not None
        masks = magnitude_masks(magnitudes, ratio) if scope == "global" else [magnitude_masks([m], ratio)[0] for m in magnitudes]
    for w, mask in zip(found, masks, strict=True):
        for layer, tensor in w.places:
            parametrize.register_parametrization(layer, tensor, WeightMask(mask.clone(), scope, pattern))
    return WeightMasks(found, skipped)


def _require_options(ratio: float | None, pattern: str | None, scope: str) -> tuple[int, int] | None:
    """``(N, M)`` of a pattern."""
    if scope not in SCOPES:
        raise FxqError(f"unknown scope {scope!r}", way_out=nearest(str(scope), SCOPES))
    if (ratio is None) == (pattern is None):
        raise FxqError("give a ratio or a pattern, one of them", way_out="sparsify(model, 0.9), or sparsify(model, pattern='2:4')")
    if pattern is None:
        assert ratio is not None
        require_ratio(ratio)
        return None
    n, colon, m = str(pattern).partition(":")
    if not colon or not n.isdecimal() or not m.isdecimal() or not 0 < int(n) < int(m):
        raise FxqError(f"unknown pattern {pattern!r}", way_out="Give 'N:M' with 0 < N < M, such as '2:4'")
    return int(n), int(m)


def _require_plain(model: nn.Module) -> None:
    if isinstance(model, WRAPPED) or hasattr(model, "_orig_mod"):
        raise FxqError("the model is wrapped", where=type(model).__name__, way_out="Sparsify the model first, then wrap or compile it")
    for path, m in model.named_modules():
        if isinstance(m, Wrapper):
            raise FxqError("the layer is quantized", where=path, way_out="Sparsify the float model, then compile it: the masks hold in training")
        if parametrize.is_parametrized(m) and any(isinstance(p, WeightMask) for chain in parametrizations(m).values() for p in chain):
            raise FxqError("the layer has a mask", where=path, way_out="Call update() of its masks (fxq.sparsity.masks_of), or remove()")


def _candidates(model: nn.Module, keep: Keep | Sequence[Keep]) -> tuple[list[MaskedWeight], dict[str, str]]:
    """Weights that can have a mask, and why others cannot."""
    layers: list[tuple[str, nn.Module]] = [(path, m) for path, m in model.named_modules() if isinstance(m, LAYERS)]
    if not layers:
        raise FxqError("the model has no conv or linear layer", where=type(model).__name__, way_out="Pass the module that holds them")
    wanted = _kept(layers, (keep,) if isinstance(keep, (str, int, type)) else tuple(keep))
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, m in model.named_modules():
        for tensor, p in m._parameters.items():
            if p is not None:
                holders.setdefault(id(p), []).append((path, m, tensor))
    found: list[MaskedWeight] = []
    skipped: dict[str, str] = {}
    seen: set[int] = set()
    for path, m in layers:
        for tensor in _tensors(m):
            name, p = f"{path}.{tensor}".lstrip("."), m._parameters.get(tensor)
            if path in wanted:
                skipped[name] = f"kept on request ({wanted[path]})"
            elif p is None:
                skipped[name] = "its weight is computed from other parameters"
            elif id(p) not in seen:
                seen.add(id(p))
                other = next((h for h, n, t in holders[id(p)] if h in wanted or not isinstance(n, LAYERS) or t not in _tensors(n)), None)
                if other is not None:
                    skipped[name] = f"it is shared with {other}, which gets no mask"
                else:
                    found.append(MaskedWeight(name, tuple((n, t) for _, n, t in holders[id(p)]), input_dim(m)))
    return found, skipped


def _kept(layers: list[tuple[str, nn.Module]], keep: tuple[Keep, ...]) -> dict[str, str]:
    """Path of each layer that is kept -> what matched it."""
    wanted: dict[str, str] = {}
    for k in keep:
        if isinstance(k, str):
            hits = [path for path, _ in layers if fits(path, k)]
        elif isinstance(k, type):
            hits = [path for path, m in layers if isinstance(m, k)]
        else:
            hits = [layers[k][0]] if -len(layers) <= k < len(layers) else []
        said = k.__name__ if isinstance(k, type) else str(k)
        if not hits:
            near = nearest(k, (path for path, _ in layers)) if isinstance(k, str) else f"there are {len(layers)} conv and linear layers"
            raise FxqError(f"keep={said!r} matches no layer", way_out=near)
        wanted.update({path: said for path in hits if path not in wanted})
    return wanted


def _tensors(layer: nn.Module) -> tuple[str, ...]:
    if not isinstance(layer, nn.MultiheadAttention):
        return ("weight",)
    return tuple(t for t in ATTENTION if layer._parameters.get(t) is not None)


def _tensor(w: MaskedWeight) -> Tensor:
    layer, tensor = w.places[0]
    found = layer._parameters[tensor]
    assert found is not None
    return found


def _misfit(w: MaskedWeight, n: int, m: int) -> str | None:
    """Why groups of ``m`` input channels do not fit a weight."""
    layer: Any = w.places[0][0]
    groups = getattr(layer, "groups", 1)
    width = _tensor(w).shape[w.dim] // (groups if w.dim == 0 else 1)
    if width % m == 0:
        return None
    return f"its {width} input channels{' per group' if groups > 1 else ''} are no multiple of {m}"
