"""The subcommand ``fxq times``: what the layers of a model take on this machine in float32, in int8 and on bits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fxq.errors import InputError


def add(commands: Any) -> None:
    """Add ``times`` to the subcommands of ``fxq``."""
    p = commands.add_parser("times", help="what each layer takes here in float32, in int8 and on bits", description=run.__doc__)
    p.add_argument("source", metavar="MODEL", help="torchvision:NAME, timm:NAME, package.module:callable, file.py:callable, file.pt2 or file.fxq")
    p.add_argument("--input", action="append", default=[], metavar="SHAPE", help="like 1,3,224,224; once per input; its number of samples counts")
    p.add_argument("--threads", type=int, default=1, help="of each run (1)")
    p.add_argument("--activations", default="binary", choices=("binary", "ternary"), help="of a float model, on bits")
    p.add_argument("--weights", default="binary", choices=("binary", "ternary"), help="of a float model, on bits")
    p.add_argument("--json", action="store_true", help="print the times as JSON, to choose by on another machine (fxq.compile(..., times=))")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> int:
    """Measure every weighted layer of a model in float32, in int8 and on bits, in turns, on this machine. Exit code 0, or 2: your mistake."""
    from fxq import sources
    from fxq.cli_doctor import default_inputs
    from fxq.compiled import CompiledModel
    from fxq.layer_timing import layer_times

    model: Any
    if a.source.endswith(".fxq"):
        from fxq.modelfile import load

        if not Path(a.source).exists():
            raise InputError("there is no such file", where=a.source)
        model = load(a.source)
    else:
        model = sources.model_from(a.source)
    if a.input:
        example: Any = sources.example_from(a.input)
    else:
        given = None if a.source.endswith(".fxq") else default_inputs(a.source, model)
        example = None if given is None else tuple(x[:1] for x in given)
    if example is None and not isinstance(model, CompiledModel):
        raise InputError("the shapes are not known", where=a.source, way_out="Give --input 1,3,224,224, once per input")
    found = layer_times(model, example, threads=a.threads, activations=a.activations, weights=a.weights)
    print(json.dumps(found.to_json(), indent=1) if a.json else found)
    return 0
