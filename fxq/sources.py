"""Where a model and its data come from on the command line: torchvision, timm, a callable, an exported program; folders and arrays."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fxq.errors import InputError, nearest

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model_from(source: str) -> Any:
    """The model that ``source`` names.

    Args:
        source: ``torchvision:NAME``, ``timm:NAME``, ``package.module:callable``, ``file.py:callable`` or ``file.pt2``. A callable without arguments
            that returns a module, or a module itself.

    Raises:
        InputError: when there is no such model.
    """
    if source.endswith(".pt2"):
        return _exported(Path(source))
    origin, _, name = source.rpartition(":")
    if not origin or not name:
        raise InputError(f"{source!r} is not a model source", way_out="Use torchvision:NAME, timm:NAME, package.module:callable, file.py:callable or file.pt2")
    if origin == "torchvision":
        return _torchvision(name)
    if origin == "timm":
        return _timm(name)
    module = _file(Path(origin)) if origin.endswith(".py") else _module(origin)
    if not hasattr(module, name):
        raise InputError(f"{origin} has no {name!r}", way_out=nearest(name, [n for n in vars(module) if not n.startswith("_")]))
    made = getattr(module, name)
    model = made if isinstance(made, nn.Module) else _called(made, source)
    if not isinstance(model, nn.Module):
        raise InputError(f"{source} gives a {type(model).__name__}, not a torch.nn.Module", way_out="Return the model")
    return model


def _called(made: Any, source: str, **options: Any) -> Any:
    """What a builder gives.

    Raises:
        InputError: when it is no function, or fails without arguments.
    """
    if not callable(made):
        raise InputError(f"{source} is a {type(made).__name__}", way_out="Name a function without arguments that returns the model")
    try:
        return made(**options)
    except Exception as e:
        way_out = "It has to return the model when it is called without arguments"
        raise InputError(f"{source} fails: {type(e).__name__}: {_line(e)}", way_out=way_out) from e


def _line(e: Exception) -> str:
    return (str(e).strip() or "no message").splitlines()[0]


def _exported(path: Path) -> Any:
    if not path.exists():
        raise InputError("there is no such file", where=str(path))
    try:
        return torch.export.load(path)
    except Exception as e:
        raise InputError(f"not an exported program: {_line(e)}", where=str(path), way_out="Write it with torch.export.save") from e


def _torchvision(name: str) -> nn.Module:
    import inspect

    try:
        import torchvision
    except ImportError as e:
        raise InputError("torchvision is not installed", way_out="pip install torchvision") from e
    if name not in torchvision.models.list_models():
        raise InputError(f"torchvision has no model {name!r}", way_out=nearest(name, torchvision.models.list_models()))
    builder = torchvision.models.get_model_builder(name)
    extra: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    if name in ("googlenet", "inception_v3"):
        extra["init_weights"] = True
    model: nn.Module = _called(builder, f"torchvision:{name}", weights=None, **extra)
    return model


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as e:
        raise InputError("timm is not installed", way_out="pip install timm") from e
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}", way_out=nearest(name, timm.list_models()))
    model: nn.Module = _called(functools.partial(timm.create_model, name), f"timm:{name}", pretrained=False)
    return model


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"cannot import {name}: {e}", way_out="Check PYTHONPATH and the spelling") from e
    except Exception as e:
        raise InputError(f"{name} fails when it is imported: {type(e).__name__}: {_line(e)}") from e


def _file(path: Path) -> Any:
    if not path.exists():
        raise InputError("there is no such file", where=str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError("not a Python file", where=str(path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise InputError(f"fails when it is read: {type(e).__name__}: {e}", where=str(path)) from e
    return module


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict strictly, from ``.safetensors`` or a ``weights_only`` torch file.

    Raises:
        InputError: when the file cannot be read or does not fit the model.
    """
    if not path.exists():
        raise InputError("there is no such file", where=str(path))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise InputError(f"cannot be read: {_line(e)}", where=str(path), way_out="Give a .safetensors file or a torch state dict") from e
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise InputError(f"it holds a {type(state).__name__}", where=str(path), way_out="Give a state dict (torch.save(model.state_dict(), path))")
    if not isinstance(model, nn.Module):
        raise InputError("an exported program holds its own weights", where=str(path), way_out="Leave --weights out")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as e:
        raise InputError(" ".join(str(e).split())[:300], where=str(path), way_out="These weights belong to another model") from e


def parse_shape(text: str) -> tuple[tuple[int, ...], torch.dtype]:
    """``1,3,224,224`` or ``1,16:int64`` -> sizes and dtype.

    Raises:
        InputError: when it is not a shape.
    """
    m = re.fullmatch(r"(\d+(?:,\d+)*)(?::(float32|int64|int32|bool))?", text)
    if m is None or "0" in m[1].split(","):
        raise InputError(f"{text!r} is not a shape", way_out="Write it like 1,3,224,224 or 1,16:int64")
    return tuple(int(v) for v in m[1].split(",")), getattr(torch, m[2] or "float32")


def example_from(shapes: list[str]) -> tuple[torch.Tensor, ...]:
    """Seeded random inputs of the given shapes."""
    g = torch.Generator().manual_seed(0)
    out = []
    for text in shapes:
        sizes, dtype = parse_shape(text)
        out.append(torch.randn(sizes, generator=g) if dtype == torch.float32 else torch.zeros(sizes, dtype=dtype))
    return tuple(out)


def calibration_from(path: Path, source: str, size: tuple[int, ...] | None, batch: int) -> Iterator[Any]:
    """Batches from an image folder, ``.npy`` (one input) or ``.npz`` (inputs by name).

    Args:
        path: folder or file.
        source: the model source; image folders use the transforms of torchvision's weights when it names a torchvision model.
        size: ``--input``'s shape, for the crop of image folders.
        batch: images in a batch.

    Raises:
        InputError: when there is nothing usable.
    """
    if not path.exists():
        raise InputError("there is no such calibration file or folder", where=str(path))
    if path.is_dir():
        return _images(path, source, size, batch)
    try:
        with path.open("rb") as file:  # numpy leaves a damaged .npz open
            data = np.load(file, allow_pickle=False)
            arrays = {"": data} if isinstance(data, np.ndarray) else {k: data[k] for k in data.files}
        parts = {k: torch.from_numpy(v).split(batch) for k, v in arrays.items()}  # type: ignore[no-untyped-call]
    except Exception as e:  # numpy has no class of its own for a damaged file
        raise InputError(f"cannot be read: {_line(e)}", where=str(path), way_out="Give a folder of images, or a .npy or .npz file of numbers") from e
    lengths = {k: len(v) for k, v in arrays.items()}
    if not lengths or len(set(lengths.values())) > 1 or not all(lengths.values()):
        raise InputError(f"its arrays have lengths {lengths}", where=str(path), way_out="Give one sample of each input in each row")
    if "" in parts:
        return iter(parts[""])
    return (dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True))


def _images(folder: Path, source: str, size: tuple[int, ...] | None, batch: int) -> Iterator[torch.Tensor]:
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    if not files:
        raise InputError("the folder holds no images", where=str(folder), way_out="It may hold " + ", ".join(IMAGES))
    transform = _transform(source, size)

    def read() -> Iterator[torch.Tensor]:
        for i in range(0, len(files), batch):
            made = []
            for file in files[i : i + batch]:
                try:
                    with Image.open(file) as image:
                        made.append(transform(image.convert("RGB")))
                except OSError as e:
                    raise InputError(f"not an image: {e}", where=str(file)) from e
            yield torch.stack(made)

    return read()


def _transform(source: str, size: tuple[int, ...] | None) -> Any:
    """The weights' own transforms for torchvision's nets, otherwise resize, centre crop and ImageNet's mean and deviation."""
    import torchvision
    from torchvision.transforms import v2

    origin, _, name = source.partition(":")
    if origin == "torchvision" and size is None:
        weights = next(iter(torchvision.models.get_model_weights(name)), None)
        if weights is not None:
            return weights.transforms()
    height, width = (size[-2], size[-1]) if size is not None else (224, 224)
    return v2.Compose(
        [
            v2.Resize(round(max(height, width) / 0.875)), v2.CenterCrop((height, width)), v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ]
    )  # fmt: skip
