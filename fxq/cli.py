"""``fxq-lower``: compile a model from the command line. Exit code 2 and one line for a user's mistake, never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fxq import cli_debug, cli_engine, cli_prune
from fxq.errors import ArtifactError, FxqError, InputError
from fxq.progress import ProgressBar

if TYPE_CHECKING:
    from fxq.api import CompiledModel
    from fxq.lowering import Artifact

LISTS = ("schemes", "passes", "backends", "targets")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message, way_out="See fxq-lower --help")


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return value


def parser() -> argparse.ArgumentParser:
    """The options of ``fxq-lower``."""
    p = _Parser("fxq-lower", description="Compile a PyTorch model into a quantized artifact and prove it.")
    p.add_argument("source", nargs="?", help="torchvision:NAME, timm:NAME, package.module:callable, file.py:callable or file.pt2")
    p.add_argument("--weights", metavar="FILE", help=".safetensors or a torch state dict; loaded strictly")
    p.add_argument("--input", action="append", default=[], metavar="SHAPE", help="like 1,3,224,224 or 1,16:int64; once per input")
    p.add_argument("--calibration", metavar="PATH", help="folder of images, .npy or .npz")
    p.add_argument("--calibration-batches", type=_count, metavar="N", help="use at most N batches")
    p.add_argument("--batch-size", type=_count, default=8, metavar="N")
    p.add_argument("--scheme", default="int8", help="see --list schemes; int8, the default, is the int8 that the target runs best")
    p.add_argument("--target", help="see --list targets (default: onnxruntime; with --to tensorrt or bitwise: that)")
    p.add_argument("--observer", help="override the scheme's activation observer")
    p.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="layers that stay float (fnmatch on the module path)")
    p.add_argument("--int8", action="append", default=[], metavar="PATTERN", help="layers that a low-bit scheme keeps in 8 bits")
    p.add_argument("--times", metavar="FILE", help="for the scheme auto-lowbit: times to choose by, as fxq times --json printed them")
    p.add_argument("--portable", action="store_true", help="weights that give the same numbers on x86 CPUs with and without VNNI")
    p.add_argument("--to", default="onnx-qdq", metavar="BACKEND")
    p.add_argument("-o", "--output", metavar="FILE")
    p.add_argument("--save-model", metavar="FILE", help="save the compiled model itself, for fxq.load")
    p.add_argument("--force", action="store_true", help="replace an existing file")
    p.add_argument("--verify", action="store_true", help="run the file and compare it with the integer reference")
    p.add_argument("--report", metavar="FILE", help="history, graph, histograms, costs and verification as one HTML page")
    p.add_argument("--report-json", metavar="FILE", help="history, bytes and verification as JSON")
    p.add_argument("--print-after", action="append", default=[], metavar="PASS", help="print the graph after this pass")
    p.add_argument("--print-diff", action="append", default=[], metavar="PASS", help="print what this pass changed")
    p.add_argument("--list", choices=LISTS, help="list what there is, and stop")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    cli_prune.add_options(p)
    cli_debug.add_options(p)
    cli_engine.add_options(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        return run(parser().parse_args(argv), shlex.join(["fxq-lower", *(sys.argv[1:] if argv is None else argv)]))
    except (FxqError, OSError) as e:
        if os.environ.get("FXQ_DEBUG", "") not in ("", "0"):
            raise
        print("fxq-lower: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxq-lower: stopped", file=sys.stderr)
        return 130


def run(a: argparse.Namespace, command: str = "") -> int:
    """Do what the options say; ``command`` is the command line, for the report."""
    if a.list:
        print("\n".join(listing(a.list)))
        return 0
    if not a.source:
        raise InputError("no model is given", way_out="For example torchvision:resnet18; see fxq-lower --help")
    output = _check_output(a)
    from fxq import api, sources
    from fxq.pipeline import no_progress

    cli_engine.require_consistent(a)
    how, share, budget = cli_prune.request(a), cli_prune.share(a), cli_debug.budget(a)
    times = cli_debug.times(a)
    target = a.target or (a.to if a.to in ("tensorrt", "bitwise") else "onnxruntime")

    model = sources.model_from(a.source)
    if a.weights:
        sources.load_weights(model, Path(a.weights))
    example = sources.example_from(a.input) or None
    shape = tuple(example[0].shape) if example else None
    data = list(sources.calibration_from(Path(a.calibration), a.source, shape, a.batch_size)) if a.calibration else None
    with nullcontext(False) if a.quiet else ProgressBar(lines=True) as progress:
        m = api.compile(
            model, a.scheme, calibration=data, example=example, target=target, skip=tuple(a.skip), observer=a.observer,
            batches=a.calibration_batches, portable=a.portable, progress=progress, prune=how, share=share, numbers=bool(a.report) or a.numbers, budget=budget,
            int8=tuple(a.int8), times=times,
        )  # fmt: skip
        artifact = m.lower(a.to, **cli_engine.lowering_options(a, m, progress or no_progress))
    _show(a, m, artifact)
    report: dict[str, Any] = {"source": a.source, "scheme": m.scheme.name, "history": m.history.to_json(), **artifact.info}
    if m.prune_report is not None:
        report["pruning"] = m.prune_report.to_json()
    report["float_ops"] = [str(op) for op in m.float_ops]
    debug, code, text = cli_debug.run(a, m, data)
    report.update({k: v.to_json() for k, v in debug.items()})
    if text:
        _say(a, text)
    proof = None
    if a.verify:
        proof = m.verify(artifact.data, data if data is not None else [example], limit=4)
        report["verify"] = proof.to_json()
        _say(a, str(proof))
        code = code if proof.ok else 1
    if output is not None:
        artifact.save(output, force=a.force)
        _say(a, f"{output}: {output.stat().st_size:,} bytes")
    if a.save_model:
        from fxq.modelfile import save

        _say(a, f"{save(m, a.save_model, force=a.force)}: the model, for fxq.load")
    if a.calibration_cache:
        _say(a, cli_engine.save_cache(a, m))
    if a.report:
        page = m.report(a.report, data, proof=proof, title=a.source, command=command, force=a.force, **debug)
        _say(a, f"{page}: {page.stat().st_size:,} bytes, to be opened in a browser")
    if a.report_json:
        from fxq.lowering import Artifact as File

        File("report", (json.dumps(report, indent=1, default=str) + "\n").encode()).save(a.report_json, force=a.force)
    return code


def _check_output(a: argparse.Namespace) -> Path | None:
    """Refuse an output that cannot be written before the work starts."""
    for name in filter(None, (a.output, a.report, a.report_json, a.save_model, a.calibration_cache)):
        path = Path(name)
        if path.is_dir():
            raise ArtifactError("it is a folder", where=name, way_out="Give the name of a file")
        if path.exists() and not a.force:
            raise ArtifactError("the file exists", where=name, way_out="Add --force or choose another name")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise ArtifactError("its folder does not exist or is not writable", where=name, way_out="Make the folder first")
    seen: dict[str, str] = {}
    page = ("page", a.report)
    for what, name in (("model", a.output), page, ("report", a.report_json), ("saved model", a.save_model), ("calibration cache", a.calibration_cache)):
        if name and seen.setdefault(os.path.realpath(name), what) != what:
            raise ArtifactError(f"the {seen[os.path.realpath(name)]} and the {what} would be the same file", where=name, way_out="Give each its own name")
    return Path(a.output) if a.output else None


def _show(a: argparse.Namespace, m: CompiledModel, artifact: Artifact) -> None:
    for name in a.print_after:
        print(m.history[name].text)
    for name in a.print_diff:
        print(m.history.diff(name) or f"{name} changed nothing")
    if not a.quiet and not a.print_after and not a.print_diff:
        print(m.history)
        if m.prune_report is not None:
            print(m.prune_report)
        for op in m.float_ops:
            print(f"float: {op}")
    if artifact.backend == "tensorrt" and (a.dry_run or not a.quiet):
        print(cli_engine.plan_text(a, artifact))  # type: ignore[arg-type]
    if artifact.backend == "archive" and not a.quiet:
        print(artifact.info["table"])
    if artifact.backend == "bitwise" and not a.quiet:
        print(artifact.info["summary"], artifact.info["table"].splitlines()[-1], sep="\n")


def _say(a: argparse.Namespace, text: str) -> None:
    if not a.quiet:
        print(text)


def listing(what: str) -> list[str]:
    """Lines of ``--list``."""
    from fxq import api, schemes, targets

    if what == "schemes":
        return [f"{n:<18} {schemes.get(n).summary}" for n in schemes.names()]
    if what == "targets":
        return [f"{n:<18} {targets.get(n).summary}" for n in targets.names()]
    if what == "backends":
        return [f"{n:<18} {text}" for n, text in api.BACKENDS.items()]
    from fxq.pruning import Prune

    passes = api.pipeline_for(schemes.get("deepcomp_w5"), how=Prune(ratio=0.5, sparsity=0.5)).passes
    return [f"{p.name:<18} {(type(p).__doc__ or '').strip().splitlines()[0]}" for p in passes]


if __name__ == "__main__":
    sys.exit(main())
