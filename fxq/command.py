"""``fxq``: work on files from the command line. Exit code 2 and one line for a user's mistake, never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from fxq.errors import ArtifactError, FxqError, InputError

if TYPE_CHECKING:
    import onnx

    from fxq.lint import LintReport
    from fxq.lint_trt_report import TrtReport


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message, way_out=f"See {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The subcommands of ``fxq`` and their options."""
    p = _Parser("fxq", description="Look at models before quantization, and into archives; check and repair quantized ONNX files.")
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    lint = commands.add_parser("lint", help="what a runtime will run in integers, reject or compute otherwise", description=_lint.__doc__)
    lint.add_argument("file", metavar="FILE.onnx")
    lint.add_argument("--target", default="onnxruntime", metavar="NAME", help="onnxruntime (default), openvino, tensorrt, or a compute capability such as sm86")
    lint.add_argument("--fix", action="store_true", help="repair what can be repaired, for onnxruntime or TensorRT; without -o say only what would be done")
    lint.add_argument("--portable", action="store_true", help="instead: which products can saturate on x86 CPUs without VNNI, from the weights of the file")
    lint.add_argument("-o", "--output", metavar="OUT.onnx", help="the repaired file")
    lint.add_argument("--force", action="store_true", help="replace an existing file")
    lint.add_argument("--json", action="store_true", help="print the report as JSON")
    lint.add_argument("--strict", action="store_true", help="exit code 1 also for warnings and for operations in float")
    lint.set_defaults(run=_lint)
    from fxq import cli_doctor, cli_inspect, cli_times

    cli_doctor.add(commands)
    cli_inspect.add(commands)
    cli_times.add(commands)
    bisect = commands.add_parser("bisect", add_help=False, help="which pass, node and reason made a compiled model wrong; options as of fxq-lower")
    bisect.add_argument("rest", nargs=argparse.REMAINDER)
    bisect.set_defaults(run=_bisect)
    return p


def _bisect(a: argparse.Namespace) -> int:
    """Compile a model with the options of ``fxq-lower`` and bisect it. Exit code 0: nothing wrong, 1: faults found, 2: your mistake."""
    from fxq import cli

    return cli.run(cli.parser().parse_args([*a.rest, "--bisect"]), shlex.join(["fxq", "bisect", *a.rest]))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        a = parser().parse_args(argv)
        return int(a.run(a))
    except (FxqError, OSError) as e:
        if os.environ.get("FXQ_DEBUG", "") not in ("", "0"):
            raise
        print("fxq: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxq: stopped", file=sys.stderr)
        return 130


def _lint(a: argparse.Namespace) -> int:
    """Report what a runtime will run in integers, reject or compute otherwise. Exit code 0: nothing found, 1: errors found, 2: your mistake."""
    from fxq.lint import LintReport, lint
    from fxq.lint_whole import named

    _check_options(a)
    if a.portable:
        return _portable(a)
    notes: list[str] = []
    if a.fix:
        fixed, notes = _fixed(a)
        with named(a.file):
            report = lint(fixed, a.target)
        if a.output:
            _save(a, fixed)
    else:
        report = lint(a.file, a.target)
    if a.json:
        body = json.loads(report.to_json())
        print(json.dumps({"file": a.file, **({"output": a.output, "repairs": notes} if a.fix else {}), **body}, indent=1))
    else:
        left = report.leftovers() if isinstance(report, LintReport) else ""
        print("\n".join([*notes, str(report), *([left] if left else [])]))
    return _code(report, a.strict)


def _check_options(a: argparse.Namespace) -> None:
    from fxq.errors import TargetError, nearest
    from fxq.lint import TARGETS, rules_of

    a.target = rules_of(a.target)
    if a.target not in TARGETS:
        raise TargetError(f"no lint rules for target {a.target!r}", way_out=nearest(a.target, TARGETS))
    if a.fix and a.target == "openvino":
        raise InputError("--fix repairs for ONNX Runtime and TensorRT", way_out="Use --target onnxruntime, tensorrt, or one compute capability such as sm86")
    if a.portable and (a.fix or a.target != "onnxruntime"):
        raise InputError("--portable is a lint of its own, for CPUs", way_out="Leave --fix and --target out")
    if a.output and not a.fix:
        raise InputError("-o is the file that --fix writes", way_out="Add --fix, or leave -o out")
    if a.output and os.path.lexists(a.output) and not a.force:
        raise ArtifactError("the file exists", where=a.output, way_out="Add --force or choose another name")


def _fixed(a: argparse.Namespace) -> tuple[onnx.ModelProto, list[str]]:
    """The repaired model, its weights inside, and what was done.

    Raises:
        ArtifactError: when it is no whole ONNX file, or weights that are stored beside it are not there.
    """
    from fxq.lint import load_whole
    from fxq.lint_fix import fix as fix_onnxruntime
    from fxq.lint_trt_fix import fix
    from fxq.lint_whole import refusing

    model = load_whole(a.file)
    with refusing(model, a.file):
        return fix_onnxruntime(model) if a.target == "onnxruntime" else fix(model, a.target)


def _portable(a: argparse.Namespace) -> int:
    from fxq.portability_lint import check

    report = check(a.file)
    print(json.dumps({"file": a.file, **json.loads(report.to_json())}, indent=1) if a.json else report)
    return 1 if a.strict and not report.ok else 0


def _save(a: argparse.Namespace, model: onnx.ModelProto) -> None:
    from fxq.lowering import Artifact

    try:
        data = model.SerializeToString()
    except ValueError as e:  # protobuf's limit of 2 GB
        raise ArtifactError(f"cannot be written: {e}", where=a.output, way_out="Repair a part of the model, or the code that writes it") from e
    Artifact("onnx", data).save(a.output, force=a.force)


def _code(report: LintReport | TrtReport, strict: bool) -> int:
    from fxq.lint_trt_report import TrtReport

    if isinstance(report, TrtReport):
        return 1 if report.errors or strict and report.findings else 0
    return 1 if strict and any(o.runs == "float" for o in report.ops) else 0


if __name__ == "__main__":
    sys.exit(main())
