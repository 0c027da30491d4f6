"""A recipe: what is trained, how and how long, read from TOML. Unknown keys and wrong types are errors that name the key."""

from __future__ import annotations

import dataclasses
import inspect
import math
import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import fxq
from fxq.errors import InputError, nearest
from fxq.pruning import SPARSITY_SCOPES
from fxq.schemes import Scheme

RESERVED = ("model", "scheme", "calibration", "example", "mode", "progress", "batches")
"""Arguments of ``fxq.compile`` that the script sets itself."""
NAMING = ("name", "method", "summary")
"""Fields of a scheme that ``[scheme_options]`` does not change."""
FREE = ("max_seconds", "checkpoint_steps", "goal")
"""Keys that change nothing in what is trained: a run may be resumed with others."""


def key(default: Any, what: str, *, least: float | None = None, most: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of a recipe with its bounds (both allowed) and its line in docs/recipes.md; of a list the bounds are those of its elements."""
    return field(default=default, metadata=about(what, least, most, choices))


def about(what: str = "", least: float | None = None, most: float | None = None, choices: tuple[str, ...] = ()) -> dict[str, Any]:
    """Metadata of a field, see :func:`key`."""
    return {"what": what, "least": least, "most": most, "choices": choices}


@dataclass(frozen=True)
class Optimizer:
    """``[optimizer]``"""

    name: str = key("sgd", "`sgd`, `adam` (decay added to the gradient) or `adamw`", choices=("sgd", "adam", "adamw"))
    momentum: float = key(0.9, "of sgd", least=0, most=1)
    nesterov: bool = key(True, "of sgd")
    weight_decay: float = key(1e-4, "of the weights of convolutions and linear layers; biases, batch norms and learned scales have none", least=0)
    clip_norm: float = key(0.0, "greatest norm of the gradient; 0: any", least=0)


@dataclass(frozen=True)
class Distill:
    """``[distill]``"""

    weight: float = key(0.0, "share of the loss that comes from the float net with the weights of the start (arXiv 1503.02531); 0: none", least=0, most=1)
    temperature: float = key(4.0, "that softens both distributions", least=0.1)
    net: str = key("", "another net of `fxq.zoo` teaches; empty: the float net of the start")
    weights: str = key("", "its weights, as `weights`")


@dataclass(frozen=True)
class Stage:
    """``[[stages]]``"""

    phase: str = key(
        "train",
        "`train`: ranges and batch norms move; `share`: `share_weights()` first, codebooks train; `qaft`: `freeze()` first, grids and statistics stay",
        choices=("train", "share", "qaft"),
    )
    epochs: int = key(1, "passes over the training images", least=1)
    lr: float = key(0.01, "learning rate at its highest", least=0)
    schedule: str = key("cosine", "`cosine` to `final`, `step` or `constant`", choices=("cosine", "step", "constant"))
    final: float = key(0.0, "last learning rate of `cosine`, as a share of `lr`", least=0, most=1)
    milestones: list[float] = field(
        default_factory=lambda: [0.5, 0.75], metadata=about("of `step`: parts of the stage after which the rate is multiplied by 0.1", 0, 1)
    )
    warmup: float = key(0.0, "epochs in which the rate rises to `lr`", least=0)
    weight_decay: float = key(-1.0, "of this stage; -1: that of `[optimizer]`", least=-1)
    sparsity: float = key(
        0.0, "share of the weights that are cut by magnitude when `ramp` is over, more from step to step (arXiv 1710.01878); 0: none", least=0, most=0.999
    )
    ramp: float = key(0.7, "part of the stage in which `sparsity` grows", least=0, most=1)


@dataclass(frozen=True)
class Recipe:
    """The keys outside of tables, and the tables."""

    net: str = key("resnet20", "a net of `fxq.zoo`")
    weights: str = key("", "start: an earlier float run beside this one, a file in `$FXQ_DATA/models`, or a path of weights or a checkpoint; empty: random")
    scheme: str = key("iao_w8a8", "a scheme of fxq that trains, or `float`")
    seed: int = key(0, "of random weights, order and augmentation", least=0)
    threads: int = key(2, "of torch; another number may change the last bits", least=1)
    batch: int = key(128, "images in a step, of all processes together", least=2)
    augment: bool = key(True, "crops of the image padded by 4, and mirror images")
    normalisation: str = key("imagenet", "`imagenet`: `(x / 255 - mean) / std`; `raw`: 0 to 255", choices=("imagenet", "raw"))
    train_images: int = key(0, "use only so many training images; 0: all", least=0)
    validation: int = key(5000, "training images held out, the same number of each class", least=0)
    test_images: int = key(0, "use only so many test images; 0: all", least=0)
    calibration: int = key(512, "training images that set the first ranges; 0: the first batch does", least=0)
    label_smoothing: float = key(0.0, "share of the target that goes to all classes", least=0, most=1)
    ema: float = key(0.0, "decay of the average of the weights, which is validated and deployed; 0: none", least=0, most=1)
    sparsity_scope: str = key("global", "which weights `sparsity` cuts: the least of all, of each `layer`, or by `sensitivity`", choices=SPARSITY_SCOPES)
    bn_momentum: float = key(0.1, "share of a new batch in the running statistics", least=0, most=1)
    select: str = key("last", "which epoch of a stage is kept: the `last`, or the `best` on the validation images", choices=("last", "best"))
    channels_last: bool = key(False, "memory format")
    amp: bool = key(False, "bfloat16 where autocast takes it")
    compile: bool = key(False, "`torch.compile` the training graph")
    checkpoint_steps: int = key(100, "steps between checkpoints; each epoch ends with one", least=1)
    max_seconds: float = key(0.0, "stop with a checkpoint after so long; 0: never", least=0)
    goal: float = key(0.0, "test accuracy of the file that is meant, in percent; it is only reported", least=0, most=100)
    optimizer: Optimizer = field(default_factory=Optimizer, metadata=about())
    distill: Distill = field(default_factory=Distill, metadata=about())
    stages: list[Stage] = field(default_factory=list, metadata=about())
    scheme_options: dict[str, Any] = field(default_factory=dict, metadata=about())
    fxq: dict[str, Any] = field(default_factory=dict, metadata=about())

    def same(self) -> dict[str, Any]:
        """Everything that decides what is trained, flat, by dotted key."""
        return {k: v for k, v in flat(dataclasses.asdict(self)).items() if k not in FREE}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables and lists as one table of dotted keys."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()}


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first key in which two flat recipes differ, with both values; empty when they are the same."""
    for k in sorted({*a, *b}):
        if a.get(k) != b.get(k):
            return f"{k} is {b.get(k)!r}, was {a.get(k)!r}"
    return ""


def load(path: Path, changes: list[str] | None = None) -> Recipe:
    """The recipe of a file.

    Args:
        path: TOML.
        changes: ``key=value`` with dotted keys and TOML values (a text needs no quotes); a bare key of a stage is that of the first stage.

    Raises:
        InputError: for a file that is no TOML, an unknown key (the nearest one is offered) or a value of another type or out of bounds.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as e:
        raise InputError(f"cannot be read: {e.strerror}", where=str(path)) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"is no TOML: {e}", where=str(path)) from e
    for change in changes or []:
        apply(table, change)
    return build(table, path.name)


def build(table: dict[str, Any], where: str) -> Recipe:
    """The recipe of a table as :mod:`tomllib` gives it; see :func:`load`."""
    recipe: Recipe = _read(Recipe, table, where, "")
    if not recipe.stages:
        raise InputError("it has no stages", where=where, way_out="Add [[stages]] with phase, epochs and lr")
    phases = [s.phase for s in recipe.stages]
    if "qaft" in phases and (recipe.scheme == "float" or "train" in phases[phases.index("qaft") :]):
        way_out = "A float net has no grids to fix" if recipe.scheme == "float" else "Put the stages with phase = 'qaft' last"
        raise InputError("phase 'qaft' cannot stand there", where=f"{where}: stages", way_out=way_out)
    if "share" in phases and "train" in phases[phases.index("share") :]:
        raise InputError("phase 'share' cannot stand there", where=f"{where}: stages", way_out="Put the stages with phase = 'share' behind those that train")
    if recipe.scheme == "float" and any(s.sparsity for s in recipe.stages):
        raise InputError("a float net has no masks", where=f"{where}: stages", way_out="Use scheme = 'deepcomp_w5'")
    if any(s.sparsity and s.phase != "train" for s in recipe.stages):
        raise InputError("sparsity grows in stages with phase = 'train' only", where=f"{where}: stages", way_out="What is cut stays cut in later stages")
    arguments = [p for p in inspect.signature(fxq.compile).parameters if p not in RESERVED]
    for name in recipe.fxq:
        if name not in arguments:
            raise InputError(f"fxq.compile has no argument {name!r} for a recipe", where=f"{where}: fxq", way_out=nearest(name, arguments))
    options = [f.name for f in dataclasses.fields(Scheme) if f.name not in NAMING]
    for name in recipe.scheme_options:
        if name not in options:
            raise InputError(f"a scheme has no field {name!r} for a recipe", where=f"{where}: scheme_options", way_out=nearest(name, options))
    if recipe.distill.weight and not recipe.weights:
        raise InputError("distill needs a trained float net", where=f"{where}: distill.weight", way_out="Set weights, or distill.weight = 0")
    return recipe


def apply(table: dict[str, Any], change: str) -> None:
    """Write one ``key=value`` into a table, in place."""
    name, equals, text = change.partition("=")
    if not equals or not name.strip():
        raise InputError(f"{change!r} is no change", where="--set", way_out="Write --set key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    steps = name.strip().split(".")
    own, inner = ([f.name for f in dataclasses.fields(kind)] for kind in (Recipe, Stage))
    if len(steps) == 1 and steps[0] not in own:
        if steps[0] not in inner:
            raise InputError(f"unknown key {steps[0]!r}", where=f"--set {change}", way_out=nearest(steps[0], [*own, *inner]))
        steps = ["stages", "0", *steps]
    at: Any = table
    for step in steps[:-1]:
        at = _inner(at, step, name)
    if not isinstance(at, dict):
        raise InputError("it leads into no table", where=f"--set {name}", way_out="Keys of a stage are stages.N.key, from 0 on")
    at[steps[-1]] = value


def _inner(at: Any, step: str, name: str) -> Any:
    if isinstance(at, list) and step.isdigit() and int(step) < len(at):
        return at[int(step)]
    if isinstance(at, dict):
        return at.setdefault(step, {})
    raise InputError(f"there is no {step!r}", where=f"--set {name}", way_out="Keys of a stage are stages.N.key, from 0 on")


def _read(kind: Any, table: Any, where: str, prefix: str) -> Any:
    """A dataclass from a table."""
    if not isinstance(table, dict):
        raise InputError(f"{prefix.rstrip('.')} is {table!r}", where=where, way_out="It is a table of keys")
    known = {f.name: f for f in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    values = {}
    for name, value in table.items():
        if name not in known:
            raise InputError(f"unknown key '{prefix}{name}'", where=where, way_out=nearest(name, known))
        values[name] = _value(value, hints[name], known[name].metadata, where, prefix + name)
    return kind(**values)


def _value(value: Any, hint: Any, meta: types.MappingProxyType[str, Any], where: str, name: str) -> Any:
    """One value, checked."""
    if dataclasses.is_dataclass(hint):
        return _read(hint, value, where, name + ".")
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise InputError(f"{name} is {value!r}", where=where, way_out="It is a list")
        return [_value(v, get_args(hint)[0], meta, where, f"{name}.{i}") for i, v in enumerate(value)]
    plain = get_origin(hint) or hint
    if plain is float and type(value) is int:
        value = float(value)
    if type(value) is not plain:
        kinds = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a table of keys"}
        raise InputError(f"{name} is {value!r}", where=where, way_out=f"It is {kinds[plain]}")
    if meta["choices"] and value not in meta["choices"]:
        raise InputError(f"{name} is {value!r}", where=where, way_out=nearest(value, meta["choices"]))
    least, most = meta["least"], meta["most"]
    if least is not None and not (least <= value <= (math.inf if most is None else most) and math.isfinite(value)):
        bounds = f"at least {least}, and finite" if most is None else f"between {least} and {most}"
        raise InputError(f"{name} is {value!r}", where=where, way_out=f"It is {bounds}")
    return value
