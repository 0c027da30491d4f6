"""The options of ``fxq-lower`` that look for what is wrong, and for what each layer needs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import InputError

if TYPE_CHECKING:
    from fxq.compiled import CompiledModel
    from fxq.layer_table import LayerTimes
    from fxq.mixed import Budget


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the group to a parser."""
    g = p.add_argument_group("debugging", "on the calibration data, or on the --input's random numbers where there is none")
    g.add_argument("--numbers", action="store_true", help="measure how far every value moves in every pass, and print it")
    g.add_argument("--bisect", action="store_true", help="name pass, node and reason where the compiled model is wrong; exit code 1 when there is one")
    g.add_argument("--metric", choices=("sqnr", "agreement"), default="sqnr", help="of --bisect: signal to noise in dB (default), or the same greatest output")
    g.add_argument("--tolerance", type=float, metavar="X", help="of --bisect: least SQNR in dB, or greatest drop (default: as good as the codes can be)")
    g.add_argument("--sensitivity", choices=("grid", "layer"), help="print what each grid or layer costs when it alone is quantized, and when all but it are")
    g.add_argument("--budget-bytes", type=_amount, metavar="X", help="bytes of the weights (1500000), or their share of the scheme's own (0.75): bits by layer")
    g.add_argument("--budget-bops", type=_amount, metavar="X", help="bit operations, or their share of the scheme's own")
    g.add_argument("--bits", default="4,8", metavar="LIST", help="of a budget: the bits a layer may have, 32 is float (default: 4,8)")


def _amount(text: str) -> float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from e


def budget(a: argparse.Namespace) -> Budget | None:
    """The budget that the options ask for.

    Raises:
        InputError: bits that are no list of numbers. SchemeError: both budgets, or bits that no layer can have.
    """
    if a.tolerance is not None and not a.bisect:
        raise InputError("--tolerance is for --bisect", way_out="Add --bisect, or leave --tolerance out")
    if a.budget_bytes is None and a.budget_bops is None:
        return None
    from fxq.mixed import Budget

    if not all(part.strip().isdecimal() for part in a.bits.split(",")):
        raise InputError(f"--bits {a.bits!r} is no list of numbers", way_out="Write --bits 4,8 or --bits 4,8,32")
    return Budget(a.budget_bytes, a.budget_bops, tuple(int(part) for part in a.bits.split(",")))


def times(a: argparse.Namespace) -> LayerTimes | None:
    """The times of ``--times``.

    Raises:
        InputError: no such file. SchemeError: it holds something else.
    """
    if a.times is None:
        return None
    from fxq.layer_table import LayerTimes

    try:
        return LayerTimes.from_json(Path(a.times).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise InputError("no file of times can be read there", where=a.times, way_out="Write it with fxq times MODEL --json") from e


def run(a: argparse.Namespace, m: CompiledModel, data: list[Any] | None) -> tuple[dict[str, Any], int, str]:
    """Do what the options ask for.

    Returns:
        Parts of the JSON report and of the page (``bisect``, ``sensitivity``), the exit code, the text to print.
    """
    found: dict[str, Any] = {}
    lines: list[str] = []
    code = 0
    if m.bit_plan is not None:
        lines.append(str(m.bit_plan))
    if m.layer_times is not None:
        found["layer_times"] = m.layer_times
        lines.append(str(m.layer_times))
    if a.numbers:
        for name in [s.name for s in m.history]:
            table = m.history.numbers(name)
            lines += [f"moved by {name}:", table] if table else []
    if a.sensitivity:
        found["sensitivity"] = m.sensitivity(data, per=a.sensitivity, limit=a.calibration_batches)
        lines.append(str(found["sensitivity"]))
    if a.bisect:
        found["bisect"] = verdict = m.bisect(a.metric, data, a.tolerance, limit=a.calibration_batches)
        lines.append(str(verdict))
        code = 0 if verdict.ok else 1
    return found, code, "\n".join(lines)
