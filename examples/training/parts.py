"""What a run is put together from: the float net, its trainable form, the teacher, the optimizer, the learning rate, averaged weights."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import schemes, zoo
from fxq.errors import FxqError, InputError
from fxq.schemes import Scheme
from fxq.sparsity import cubic_ratio
from fxq.spec import QuantSpec
from training import data
from training.recipe import Optimizer, Recipe, Stage

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def weights_file(recipe: Recipe, out: Path) -> Path | None:
    """Where the weights of the start are: an earlier run in the same parent folder, ``$FXQ_DATA/models``, or a path; ``None`` for random ones.

    Raises:
        InputError: when there is no such file.
    """
    name = recipe.weights
    if not name:
        return None
    if "/" in name or Path(name).suffix:
        return Path(name)
    run, model = out.parent / name / f"{name}.safetensors", data.folder() / "models" / f"{name}.safetensors"
    found = next((p for p in (run, model) if p.exists()), None)
    if found is None:
        raise InputError(f"there are no weights {name!r}", where="weights", way_out=f"Neither {run} nor {model} exists: train that net first, or set FXQ_DATA")
    return found


def float_net(recipe: Recipe, out: Path) -> nn.Module:
    """The net of the recipe with the weights of the start, in eval mode."""
    torch.manual_seed(recipe.seed)
    return zoo.build(recipe.net, weights_file(recipe, out))


def scheme(recipe: Recipe) -> Scheme:
    """The scheme of the recipe with its ``[scheme_options]``: lists become tuples, texts in the place of a grid are read as one (``u8/pt``).

    Raises:
        SchemeError: for an unknown scheme or a field that it cannot have.
        InputError: for a value of another type than the field's.
    """
    made, hints = schemes.get(recipe.scheme), get_type_hints(Scheme)
    values: dict[str, Any] = {}
    for name, given in recipe.scheme_options.items():
        value = tuple(given) if isinstance(given, list) else float(given) if hints[name] is float and type(given) is int else given
        if QuantSpec in get_args(hints[name]) and isinstance(given, str):
            value = QuantSpec.parse(given)
        elif type(value) is not (get_origin(hints[name]) or hints[name]):
            kind = getattr(hints[name], "__name__", str(hints[name]))
            raise InputError(f"{name} is {given!r}", where="scheme_options", way_out=f"It is a {kind}")
        values[name] = value
    return dataclasses.replace(made, **values)


def trainable(recipe: Recipe, net: nn.Module, x: Tensor) -> nn.Module:
    """The module that is trained: a copy of the net for the scheme ``float``, else fxq's trainable model.

    Args:
        x: calibration inputs, or an example of the inputs where the recipe has no calibration.
    """
    made = scheme(recipe)
    if made.method == "float" and not made.trains:
        model = copy.deepcopy(net)
    else:
        given: dict[str, Any] = {"calibration": x.split(min(recipe.batch, len(x)))} if recipe.calibration else {"example": x}
        if any(s.sparsity for s in recipe.stages):
            given["prune"] = fxq.Prune(sparsity=0.0, sparsity_scope=recipe.sparsity_scope)
        model = fxq.compile(net, made, mode="qat", progress=False, **given, **recipe.fxq)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = recipe.bn_momentum
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model  # type: ignore[call-overload]


def sparsity(recipe: Recipe, stage: int, step: int, steps: int) -> float:
    """Share of the weights that are cut at a step of a stage.

    Args:
        step: from 0 on, in the stage; ``steps``: of an epoch.
    """
    now = recipe.stages[stage]
    before = max((s.sparsity for s in recipe.stages[:stage]), default=0.0)
    end = round(now.ramp * now.epochs * steps)
    if now.sparsity <= before or not end:
        return max(now.sparsity, before)
    return cubic_ratio(step, begin=0, end=end, final=now.sparsity, initial=before)


def teacher(recipe: Recipe, net: nn.Module, x: Tensor, out: Path) -> nn.Module:
    """The float net that teaches, with its batch norms folded."""
    if recipe.distill.net:
        net = float_net(dataclasses.replace(recipe, net=recipe.distill.net, weights=recipe.distill.weights), out)
    made = fxq.compile(net, "float", example=x[:2], progress=False).requires_grad_(False)
    return made.to(memory_format=torch.channels_last) if recipe.channels_last else made  # type: ignore[call-overload]


def optimizer(options: Optimizer, stage: Stage, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a stage: only weights of convolutions and linear layers decay."""
    heavy = {id(m.weight) for m in model.modules() if isinstance(m, WEIGHTED)}
    decay = options.weight_decay if stage.weight_decay < 0 else stage.weight_decay
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in heavy], "weight_decay": decay},
        {"params": [p for p in parameters if id(p) not in heavy], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if options.name == "sgd":
        nesterov = options.nesterov and options.momentum > 0
        return torch.optim.SGD(groups, lr=stage.lr, momentum=options.momentum, nesterov=nesterov)
    return (torch.optim.Adam if options.name == "adam" else torch.optim.AdamW)(groups, lr=stage.lr)


def rate(stage: Stage, step: int, steps: int) -> float:
    """Learning rate of a step of a stage.

    Args:
        step: from 0 on, in the stage; ``steps``: of an epoch.
    """
    warm = round(stage.warmup * steps)
    if step < warm:
        return stage.lr * (step + 1) / warm
    done = (step - warm) / max(stage.epochs * steps - warm, 1)
    if stage.schedule == "cosine":
        return stage.lr * (stage.final + (1 - stage.final) * 0.5 * (1 + math.cos(math.pi * done)))
    return stage.lr * 0.1 ** sum(done >= m for m in stage.milestones) if stage.schedule == "step" else stage.lr


def loss(recipe: Recipe, logits: Tensor, y: Tensor, soft: Tensor | None) -> Tensor:
    """Cross entropy, mixed with the distance to the teacher's softened distribution (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        logits, soft: float ``[n, classes]`` of the student and of the teacher, if there is one; ``y``: int64 ``[n]``.
    """
    hard = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
    if soft is None:
        return hard
    t, w = recipe.distill.temperature, recipe.distill.weight
    distance = F.kl_div(F.log_softmax(logits / t, 1), F.log_softmax(soft / t, 1), reduction="batchmean", log_target=True)
    return (1 - w) * hard + w * t * t * distance


class Ema:
    """Averages of a model's parameters and of the statistics of its batch norms; all other state stays the model's own.

    The first steps count more, ``min(decay, (1 + n) / (10 + n))``, so that a short run does not keep its start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in self._values(model).items()}

    @staticmethod
    def _values(model: nn.Module) -> dict[str, Tensor]:
        statistics = {k: b for k, b in model.named_buffers() if k.endswith(("running_mean", "running_var"))}
        return {**dict(model.named_parameters()), **statistics}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model as it is after a step."""
        d = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        for k, v in self._values(model).items():
            self.shadow[k].lerp_(v.detach(), 1 - d)

    @torch.no_grad()
    def into(self, model: nn.Module) -> nn.Module:
        """Write the averages into a model; returns it."""
        for k, v in self._values(model).items():
            v.copy_(self.shadow[k])
        return model


@contextmanager
def compile_errors(compiles: bool, where: str) -> Iterator[None]:
    """Say in one line that ``torch.compile`` cannot take a graph.

    Raises:
        FxqError: instead of what the compiler raises, forward or backward.
    """
    if not compiles:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise FxqError(f"torch.compile does not take this training graph: {reason}", where=where, way_out="Set compile = false") from e


def not_finite(model: nn.Module, x: Tensor) -> str:
    """The first place of a model that is NaN or infinite: a parameter, or the output of a layer on ``x``."""
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            return f"parameter {name} holds NaN or infinity"
    found: list[str] = []
    handles = []
    for name, m in model.named_modules():
        if name and not any(m.children()):

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                    found.append(name)

            handles.append(m.register_forward_hook(hook))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for h in handles:
            h.remove()
    return f"the output of layer {found[0]} is the first with NaN or infinity" if found else "its layers are finite, the loss overflows"
