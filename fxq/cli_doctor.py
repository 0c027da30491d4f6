"""The subcommand ``fxq doctor``: its options, the inputs of models that bring none."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fxq.errors import InputError

IMAGE = 224
CLIPS = {"mc3_18": 8, "r2plus1d_18": 8, "r3d_18": 8, "s3d": 16}
"""Frames of torchvision's video models; the others take 16."""


def add(commands: Any) -> None:
    """Add ``doctor`` to the subcommands of ``fxq``."""
    p = commands.add_parser("doctor", help="what will run in integers, what stands in the way, what is installed", description=run.__doc__)
    p.add_argument(
        "source", nargs="?", metavar="MODEL",
        help="torchvision:NAME, timm:NAME, package.module:callable, file.py:callable, file.pt2 or file.onnx; without it the machine alone",
    )  # fmt: skip
    p.add_argument("--weights", metavar="FILE", help=".safetensors or a torch state dict; loaded strictly")
    p.add_argument("--input", action="append", default=[], metavar="SHAPE", help="like 1,3,224,224 or 1,16:int64; once per input")
    p.add_argument("--target", action="append", metavar="NAME", help="onnxruntime (default), one of fxq-lower --list targets, or all; once per target")
    p.add_argument("--scheme", default="int8", help="see fxq-lower --list schemes; int8, the default, is the int8 that the target runs best")
    p.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> int:
    """Say before any quantization what will run in integers and what stands in the way. Exit code 0: nothing does, 1: something does, 2: your mistake."""
    from fxq import sources
    from fxq.diagnosis import doctor

    wanted = a.target or ["onnxruntime"]
    if a.source is None and (a.weights or a.input):
        raise InputError("no model is given", way_out="For example torchvision:resnet18")
    if a.source is None or a.source.endswith(".onnx"):
        if a.weights or a.input:
            raise InputError("an ONNX file holds its own weights and shapes", where=a.source, way_out="Leave --weights and --input out")
        found = doctor(a.source, target=wanted)
    else:
        model = sources.model_from(a.source)
        if a.weights:
            sources.load_weights(model, Path(a.weights))
        example = sources.example_from(a.input) if a.input else default_inputs(a.source, model)
        found = doctor(model, example, target=wanted, scheme=a.scheme, name=a.source)
    print(json.dumps(found.to_json(), indent=1) if a.json else found)
    return 0 if found.ok else 1


def default_inputs(source: str, model: Any) -> tuple[Any, ...] | None:
    """Seeded inputs of two samples for torchvision's and timm's models, at the size of their weights' transforms; None for other sources."""
    import torch

    origin, _, name = source.partition(":")
    g = torch.Generator().manual_seed(0)
    if origin == "timm":
        sizes = tuple(model.pretrained_cfg.get("input_size") or (3, IMAGE, IMAGE))
        return (torch.randn(2, *sizes, generator=g),)
    if origin != "torchvision":
        return None
    family = type(model).__module__.split(".")[2:3]
    if family == ["detection"]:
        return ([torch.rand(3, 320, 320, generator=g) for _ in range(2)],)
    if family == ["optical_flow"]:
        return tuple(torch.rand(2, 3, 128, 128, generator=g) for _ in range(2))
    side = _side(name, model)
    if family == ["video"]:
        return (torch.randn(2, 3, CLIPS.get(name, 16), side, side, generator=g),)
    return (torch.randn(2, 3, side, side, generator=g),)


def _side(name: str, model: Any) -> int:
    """The model's own image size, else the crop of its weights' transforms (named only: nothing is loaded)."""
    import torchvision

    own = getattr(model, "image_size", None)
    if isinstance(own, int):
        return own
    for weights in torchvision.models.get_model_weights(name):
        crop = getattr(weights.transforms(), "crop_size", None)
        if crop:
            return int(crop[-1])
    return IMAGE
