"""The options of ``fxq-lower`` for TensorRT."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fxq.errors import InputError

if TYPE_CHECKING:
    from fxq.api import CompiledModel
    from fxq.tensorrt import EngineArtifact

PROFILE = ("min", "opt", "max")


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the group to a parser."""
    g = p.add_argument_group("TensorRT", "for --to tensorrt; --target is the GPU's compute capability, sm80 to sm121, or tensorrt for all")
    for name, what in zip(PROFILE, ("least", "usual", "greatest"), strict=True):
        g.add_argument(f"--{name}", action="append", default=[], metavar="SHAPE", help=f"{what} shape of an input, once per input; all three or none")
    g.add_argument("--float-dtype", choices=("fp32", "fp16"), default="fp32", help="type of what is not quantized")
    g.add_argument("--timing-cache", metavar="FILE", help="read and write kernel timings (full TensorRT)")
    g.add_argument("--timeout", type=float, metavar="S", help="give the build up after so many seconds")
    g.add_argument("--reproducible", action="store_true", help="build until two builds give the same bytes")
    g.add_argument("--strict", action="store_true", help="an operation that the builder does not run as planned is an error")
    g.add_argument("--dry-run", action="store_true", help="build and print the layer plan, save nothing")
    g.add_argument("--calibration-cache", metavar="FILE", help="write the scales as a calibration cache for TensorRT 8 to 10.11 as well")
    g.add_argument("--trt-version", default="8.6.1", metavar="V", help="TensorRT that will read the calibration cache (default 8.6.1)")


def require_consistent(a: argparse.Namespace) -> None:
    """Refuse options that need another --to, before the work starts.

    Raises:
        InputError: naming the option.
    """
    if a.to != "tensorrt":
        for option in (*PROFILE, "timing_cache", "timeout", "reproducible", "strict", "dry_run"):
            if getattr(a, option):
                raise InputError(f"--{option.replace('_', '-')} is for engines", way_out="Add --to tensorrt")
    if a.float_dtype != "fp32" and a.to not in ("tensorrt", "onnx", "onnx-qdq"):
        raise InputError("--float-dtype is for ONNX files and engines", way_out="Leave it out, or add --to onnx-qdq")
    counts = {len(getattr(a, name)) for name in PROFILE}
    if len(counts) > 1:
        raise InputError("--min, --opt and --max belong together", way_out="Give all three, once per input")
    if a.dry_run and a.output:
        raise InputError("--dry-run saves nothing", way_out="Leave out -o, or --dry-run")


def lowering_options(a: argparse.Namespace, m: CompiledModel, progress: Any) -> dict[str, Any]:
    """Options of ``m.lower`` from those of the command line.

    Raises:
        InputError: for a shape that is none, or more shapes than inputs.
    """
    from fxq import sources
    from fxq.graph import input_names

    if a.to not in ("tensorrt", "onnx", "onnx-qdq"):
        return {}
    options: dict[str, Any] = {"float_dtype": a.float_dtype}
    if a.to != "tensorrt":
        return options
    shapes = [[sources.parse_shape(text)[0] for text in getattr(a, name)] for name in PROFILE]
    names = input_names(m.graph_module)
    if len(shapes[0]) > len(names):
        raise InputError(f"{len(shapes[0])} shapes are given, the model has the inputs {', '.join(names)}", way_out="Give --min, --opt, --max once per input")
    profiles = {name: tuple(s[i] for s in shapes) for i, name in enumerate(names[: len(shapes[0])])}
    same = {name: getattr(a, name) for name in ("timing_cache", "timeout", "reproducible", "strict")}
    return {**options, **same, "profiles": profiles, "progress": progress}


def plan_text(a: argparse.Namespace, artifact: EngineArtifact) -> str:
    """What to print about an engine: the whole plan for --dry-run, otherwise what differs and the sum."""
    info = artifact.info
    where = "all capabilities from 8.0 on" if info["capability"] is None else f"compute capability {info['capability'] // 10}.{info['capability'] % 10}"
    shapes = "; ".join(f"{name} {' '.join('x'.join(map(str, s)) for s in p)}" for name, p in info["profiles"].items())
    head = f"{info['package']} {info['version']}, {where}, {info['bytes']['total']:,} bytes in {info['seconds']:.1f} s" + (f"; {shapes}" if shapes else "")
    lines = artifact.table().splitlines()
    text = "\n".join(lines if a.dry_run else [line for line in lines if " quantized operations run " in line or line.startswith("not as planned")])
    return f"{text}\n{head}"


def save_cache(a: argparse.Namespace, m: CompiledModel) -> str:
    """Write the calibration cache; the line to print."""
    artifact = m.lower("trt-calibration-cache", version=a.trt_version)
    path = artifact.save(a.calibration_cache, force=a.force)
    return f"{path}: {artifact.info['scales']} scales"

