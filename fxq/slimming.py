"""Sparse training: a penalty on the gammas of batch norms, so that channels can be cut afterwards.

Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming" (arXiv 1708.06519), section 3: ``loss + s sum |gamma|``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxq.admission import unwrapped
from fxq.compiled import CompiledModel
from fxq.errors import FxqError, nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

FORMS = ("subgradient", "proximal")
THRESHOLDS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Magnitudes below which :meth:`SlimmingPenalty.view` counts channels."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
BINS = 10
SPARKS = " ▁▂▃▄▅▆▇█"


class SlimmingPenalty:
    """The penalty ``s sum |gamma|`` on the gammas that can be pruned; :meth:`step` takes the place of ``optimizer.step()`` in your loop.

    ``loss.backward(); penalty.step(optimizer)``, whatever the form. What :meth:`step` is made of can be called by itself (with a gradient scaler, an
    accelerator): :meth:`add_gradient` between ``backward()`` and the optimizer's step, or :meth:`shrink` behind that step; or ``loss + penalty()``.

    Args:
        model: a module, one behind ``DistributedDataParallel`` or ``torch.compile``, or a :class:`~fxq.trainable.TrainableModel`. Each process of a
            distributed training does the same.
        s: strength of the penalty, per channel (1e-4 to 1e-3).
        form: ``subgradient``, as in the paper: ``s sgn(gamma)`` is added to the gradient, gammas go near 0. ``proximal``: behind the step
            ``gamma <- sgn(gamma) max(|gamma| - lr s, 0)``, gammas reach 0 exactly.
        example: one batch of inputs (a tensor or a tuple), on which fxq finds the batch norms whose channels can be cut. Without it, and without
            ``only``, the model's next forward gives it.
        only: paths of the batch norms, instead.

    Raises:
        FxqError: for an unknown form, a negative or infinite ``s``, a model without batch norms that have a gamma, and unknown paths.
    """

    def __init__(self, model: nn.Module, s: float = 1e-4, *, form: str = "subgradient", example: Any = None, only: Iterable[str] | None = None) -> None:
        if form not in FORMS:
            raise FxqError(f"unknown form {form!r}", way_out=nearest(str(form), FORMS))
        if not 0 <= s < float("inf"):
            raise FxqError(f"strength {s} is not in [0, infinity)", way_out="Give s=1e-4")
        self.s, self.form = float(s), form
        self._model = unwrapped(model)
        self._known = _batch_norms(self._model)
        if not self._known:
            way_out = "Prune by 'l2', 'l1' or 'taylor', which need no sparse training"
            raise FxqError("the model has no batch norm with a gamma", where=type(self._model).__name__, way_out=way_out)
        self._gammas: dict[str, Tensor] | None = None
        self._example: tuple[Any, ...] | None = None
        if only is not None:
            self._gammas = self._chosen([only] if isinstance(only, str) else only)
        elif example is not None:
            self._gammas = self._prunable(example)
        else:
            _once(self._model, weakref.ref(self))

    @property
    def gammas(self) -> dict[str, Tensor]:
        """Path of the batch norm (as in the float model) -> its gamma, ``[C]``: the ones under the penalty.

        Raises:
            FxqError: when they are not known yet, or none can be pruned.
        """
        if self._gammas is None:
            if self._example is None:
                raise FxqError("what can be pruned is not known yet", way_out="Give example= or only=, or run the model once before")
            self._gammas, self._example = self._prunable(self._example), None
        return self._gammas

    def _chosen(self, paths: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(dict.fromkeys(paths))
        for path in wanted:
            if path not in self._known:
                raise FxqError("it is no batch norm with a gamma", where=path or "(the model)", way_out=nearest(path, self._known))
        if not wanted:
            raise FxqError("no batch norm is under the penalty", way_out="Give the paths of those whose channels you will cut")
        return {path: self._known[path] for path in wanted}

    def _prunable(self, example: Any) -> dict[str, Tensor]:
        from fxq.prunable import prunable_batch_norms

        net = self._model
        if isinstance(net, CompiledModel):
            net = net.captured.root if _names(net) else net.root
        found = prunable_batch_norms(net, example)
        if not found & set(self._known):
            way_out = "Prune by 'l2', 'l1' or 'taylor', or name batch norms with only="
            raise FxqError("no channels behind a batch norm can be cut", where=type(net).__name__, way_out=way_out)
        return {path: gamma for path, gamma in self._known.items() if path in found}

    def __call__(self) -> Tensor:
        """``s sum |gamma|``, rank 0, differentiable (0 at 0): a term of the loss."""
        return self.s * torch.stack([g.abs().sum() for g in self.gammas.values()]).sum()

    def step(self, optimizer: Optimizer) -> None:
        """One step of the optimizer with the penalty in its form."""
        if self.form == "subgradient":
            self.add_gradient()
            optimizer.step()
            return
        optimizer.step()
        self.shrink(optimizer)

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add ``s sgn(gamma)`` (0 at 0) to the gradients; behind ``backward()``, and behind ``unscale_`` of a gradient scaler."""
        for g in self.gammas.values():
            if g.requires_grad:
                more = self.s * torch.sign(g)
                g.grad = more if g.grad is None else g.grad.add_(more)

    @torch.no_grad()
    def shrink(self, lr: float | Optimizer) -> None:
        """``gamma <- sgn(gamma) max(|gamma| - lr s, 0)``, behind the optimizer's step.

        Args:
            lr: the learning rate, or the optimizer, of which each gamma's parameter group gives it.

        Raises:
            FxqError: when the optimizer does not hold a gamma.
        """
        rates: dict[int, float] = {}
        if isinstance(lr, Optimizer):
            rates = {id(p): float(group["lr"]) for group in lr.param_groups for p in group["params"]}
        for path, g in self.gammas.items():
            if not g.requires_grad:
                continue
            if isinstance(lr, Optimizer) and id(g) not in rates:
                raise FxqError("the optimizer does not hold its gamma", where=path, way_out="Give the optimizer model.parameters(), or name others with only=")
            by = (rates[id(g)] if isinstance(lr, Optimizer) else float(lr)) * self.s
            g.copy_(torch.sign(g) * (g.abs() - by).clamp(min=0))

    def to_json(self) -> dict[str, Any]:
        """The distribution of ``|gamma|`` as plain values: shares, quantiles, a histogram, a line for each layer."""
        rows = {path: g.detach().abs().double().cpu() for path, g in self.gammas.items()}
        every = torch.cat(list(rows.values()))
        top = float(every.max()) or 1.0
        layers = [{"layer": path, "channels": len(r), "zeros": int((r == 0).sum()), "median": float(r.median()), "max": float(r.max()),
                   "histogram": torch.histc(r, BINS, 0, top).int().tolist()} for path, r in rows.items()]  # fmt: skip
        return {
            "s": self.s, "form": self.form, "channels": len(every), "zeros": int((every == 0).sum()),
            "below": {f"{t:g}": float((every < t).double().mean()) for t in THRESHOLDS},
            "quantiles": {f"{q:g}": float(torch.quantile(every, q)) for q in QUANTILES},
            "top": top, "histogram": torch.histc(every, BINS, 0, top).int().tolist(), "layers": layers,
        }  # fmt: skip

    def view(self, width: int = 40) -> str:
        """The distribution of ``|gamma|`` as text; ``width``: of the longest bar, in characters."""
        d = self.to_json()
        lines = [f"|gamma| of {d['channels']} channels behind {len(d['layers'])} batch norms, s = {self.s:g}, {self.form}"]
        lines.append(f"share at 0: {d['zeros'] / d['channels']:.3f}, " + ", ".join(f"below {t}: {share:.3f}" for t, share in d["below"].items()))
        lines.append("quantiles: " + ", ".join(f"{float(q):.0%} {v:.4g}" for q, v in d["quantiles"].items()))
        most = max(d["histogram"])
        for i, n in enumerate(d["histogram"]):
            lines.append(f"{d['top'] * i / BINS:8.4f}  {'█' * round(width * n / most):<{width}}  {n}")
        wide = max(len(r["layer"]) for r in d["layers"])
        lines.append(f"{'layer':<{wide}}  channels  at 0  {'median':>9}  {'max':>9}  0 .. {d['top']:.4g}")
        for r in d["layers"]:
            lines.append(f"{r['layer']:<{wide}}  {r['channels']:8}  {r['zeros']:4}  {r['median']:9.4g}  {r['max']:9.4g}  {_sparks(r['histogram'])}")
        return "\n".join(lines)

    def live(self, console: Console | None = None, refresh_per_second: float = 2.0) -> Live:
        """A context in whose body :meth:`view` stands on the terminal and follows the training (without a terminal it is printed at the end)."""
        from rich.live import Live
        from rich.text import Text

        self.gammas  # noqa: B018  (what is not known is an error here, not in the thread that draws)
        return Live(get_renderable=lambda: Text(self.view()), console=console, refresh_per_second=refresh_per_second)


def _sparks(counts: list[int]) -> str:
    most = max(counts)
    return "".join(SPARKS[-(-n * (len(SPARKS) - 1) // most)] for n in counts)


def _names(model: CompiledModel) -> dict[int, str]:
    """Identity of each gamma -> the path of its batch norm in the float model that this one was made from, as far as both share it."""
    own = {id(p) for p in model.parameters()}
    norms = [(path, m) for path, m in model.captured.root.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {id(m.weight): path for path, m in norms if id(m.weight) in own}


def _batch_norms(model: nn.Module) -> dict[str, Tensor]:
    """Path -> gamma of each batch norm that has one; of a trainable model the paths in the float model, of a pruned one those in its graph."""
    compiled = isinstance(model, CompiledModel)
    names = _names(model) if isinstance(model, CompiledModel) else {}
    found: dict[str, Tensor] = {}
    for path, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and isinstance(m.weight, nn.Parameter):
            found[names.get(id(m.weight), path.removeprefix("root.") if compiled else path)] = m.weight
    return found


def _once(model: nn.Module, penalty: weakref.ref[SlimmingPenalty]) -> None:
    """Let the model's next forward with positional inputs give the penalty its example."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            return
        module._forward_pre_hooks.pop(handle.id, None)  # that of a copy as well
        here = penalty()
        if here is not None:
            here._example = tuple(x.detach()[:2] if isinstance(x, Tensor) and x.ndim else x for x in args)

    handle = model.register_forward_pre_hook(hook)
