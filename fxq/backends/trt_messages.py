"""What TensorRT says, made readable: its log without noise, its refusals and its crashes as errors."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxq.errors import EngineError

TESTED = 'Install the version that fxq was tested with: pip install "tensorrt-rtx==1.7.1.116"'
"""The way out where TensorRT-RTX does not behave as measured."""
LINT = "Run fxq lint FILE.onnx --target tensorrt: it says what TensorRT takes instead"
"""The way out where TensorRT does not take a graph."""
NOISE = ("catchCudaError", "cudaError 35:", "ScopedCudaStream")
"""In lines that TensorRT logs after other messages on a machine without a GPU; they mean nothing there."""

_WRAPPING = (
    (r"^Invalid Node - .*\n", ""),  # the node is named anyway
    (r" In \w+ at /\S*?(?=[\s)]|$)", ""),  # places in TensorRT's source
    (r"^\w+\.cpp:\d+: |\[\w+\.cpp:\d+: \w+\] ", ""),
    (r"^\[?[\w:.]+\]?: Error Code \d+: |^\[[\w:.]+\] Error Code \d+: ", ""),
    (r"In node -?\d+ with name: .*? and operator: .*? \(\w+\): ", ""),
    (r"Assertion failed: .*?: (?=[\w-]+ )", ""),
    (r"^\w+ && ", ""),
    (r"^[A-Z][\w ]* \((.*)\)$", r"\1"),  # API Usage Error (...)
)
"""What stands around the message in TensorRT's texts, and what stays of it."""


_WAYS_OUT = {
    "HW-specific datatypes": "Choose a compute capability that has this type: FP8 from sm89, FP4 from sm120",
    "within workspace limit": "Allow more workspace",
}
"""By words of the builder's messages."""


def quiet(text: str) -> str:
    """A message without its noise lines."""
    return "\n".join(line for line in text.splitlines() if line.strip() and not any(word in line for word in NOISE))


def clean(text: str) -> str:
    """A message on one line, without noise and without TensorRT's functions and source places."""
    text = quiet(text)
    for pattern, kept in _WRAPPING:
        text = re.sub(pattern, kept, text, flags=re.MULTILINE)
    return " ".join(text.split()).strip('".') or "it gives no reason"


def read_log(folder: Path) -> list[tuple[str, str]]:
    """The child's messages so far as ``(severity, text)``, without noise; a crash may have cut the last one."""
    found = []
    with contextlib.suppress(OSError), (folder / "log.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                severity, text = json.loads(line)
                text = quiet(text)
                if text:
                    found.append((severity, text))
    return found


def last_lines(folder: Path, count: int = 3) -> str:
    """The end of the log, for an error; empty when there is no log."""
    texts = [text.splitlines()[0][:200] for _, text in read_log(folder)[-count:]]
    return "; its last messages: " + " | ".join(texts) if texts else ""


def crash(folder: Path, package: str, code: int) -> EngineError:
    """What a child's unhappy end means.

    Args:
        folder: where it worked.
        package: that it used.
        code: of its exit; the negative number of a signal.
    """
    printed = (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace").strip()
    if code > 0 and "Traceback (most recent call last)" in printed:
        return EngineError(f"{package} cannot be used here: {printed.splitlines()[-1][:300]}", way_out=TESTED)
    how = f"exit code {code}"
    with contextlib.suppress(ValueError):
        how = f"signal {signal.Signals(-code).name}"
    if how == "signal SIGKILL":
        fact = f"{package} was killed by the system, most likely for want of memory{last_lines(folder)}"
        return EngineError(fact, way_out="Free memory, or build a smaller model")
    return EngineError(f"{package} crashed ({how}){last_lines(folder)}", way_out=LINT)


def refusal(error: Mapping[str, Any], package: str, request: Mapping[str, Any]) -> EngineError:
    """A refusal of the child as an error.

    Args:
        error: the record of ``trt_worker.Refusal``.
        package: name and version.
        request: what the child was asked for.
    """
    stage, fact = error["stage"], error["fact"]
    if stage == "parse":
        return _parse_error(error, package)
    if stage == "build":
        return _build_error(error, package)
    if stage == "capability":
        return EngineError(f"{package} does not build for {request['capability']}", way_out=f"It builds for {', '.join(error['known'])}")
    if stage == "device":
        gpu = f"this machine's GPU, {request['device']}" if request["device"] else "the GPU of the machine that it runs on, and there is none here"
        way_out = "Build on such a machine, or with package='tensorrt_rtx', which builds for any"
        return EngineError(f"{package} builds only for {gpu}, not for {request['capability']}", way_out=way_out)
    if stage == "cache":
        return EngineError(f"the timing cache cannot be used: {fact}", where=request["timing_cache"], way_out="Delete it, or name another file")
    if stage == "table":
        return EngineError(f"{package} gave no layer table, so nothing shows what runs in integers", way_out=TESTED)
    if stage == "profile":
        return EngineError(f"{package} refuses the profile: {clean(fact)}", way_out="Give other shapes")
    return EngineError(f"{package} does not start: {clean(fact)}", way_out="Check the GPU and its driver, or use package='tensorrt_rtx'")


def _parse_error(error: Mapping[str, Any], package: str) -> EngineError:
    """The parser's first finding: node, operator and TensorRT's text."""
    errors = error["errors"] or [{"op": "", "node": "", "fact": error["fact"], "code": ""}]
    first = errors[0]
    text = clean(first["fact"])
    where = first["node"] or None
    if text == "false":  # the condition that failed; there is no other text
        text = f"the operator is not supported ({first['code']})"
    weights = re.search(r"Failed to import initializer: (\S+)$", text)
    if weights and where is None:  # the reason stands in the log only
        where, text = f"initializer {weights[1]!r}", clean(error["fact"].partition("\n")[0])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return EngineError(f"{package} refuses {first['op'] or 'the file'}: {text}{more}", where=where, way_out=LINT)


def _build_error(error: Mapping[str, Any], package: str) -> EngineError:
    """The builder's messages, and the layer that they name."""
    text = clean(error["fact"])
    named = [name for name in error["names"] if name and re.search(rf"(?:^|[( ]){re.escape(name)}[:)]", text)]
    way_out = next((way for words, way in _WAYS_OUT.items() if words in text), LINT)
    return EngineError(f"{package} cannot build it: {text}", where=max(named, key=len, default=None), way_out=way_out)
