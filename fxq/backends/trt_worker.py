"""The child process that parses an ONNX file and builds a TensorRT engine.

A script, run by path: it imports neither fxq nor torch, so that it starts quickly, and a crash of TensorRT's parser takes only this process down. Its only
argument is the request, a JSON file. Beside it stand ``model.onnx`` and, afterwards, ``log.jsonl`` (every message of TensorRT, written at once so that it
outlives a crash), ``result.json``, ``engine.bin`` and ``timing.bin``. Progress goes to stdout as JSON lines. One code path for TensorRT 10.12 and later,
TensorRT 11 and TensorRT-RTX: strongly typed networks, no precision flags, no calibrators.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Send = Callable[[str, int, int | None], None]

TABLE = "Layers:"
"""How TensorRT-RTX starts the verbose message that lists an engine's layers."""
CACHE_MAGIC = b"ptrt"
"""How a timing cache starts."""
CACHE_DAMAGED = "Failed to deserialize timing cache"
"""What TensorRT warns when it drops a timing cache."""


ASK, FIXED_ADDRESSES = 0xFFFFFFFF, 0x0040000
"""Arguments of Linux's ``personality``: the present one, and ADDR_NO_RANDOMIZE."""


AGAIN = "again"
SETTLED = 0.01
"""Seconds in which a thread has taken its memory and sleeps: before the builder takes its own, at addresses that must not depend on who is first."""


class Refusal(Exception):
    """What the parent turns into an error: ``stage``, ``fact`` and, where known, ``node`` and ``op``."""

    def __init__(self, stage: str, fact: str = "", **more: Any) -> None:
        super().__init__(fact)
        self.record = {"stage": stage, "fact": fact, **more}


def logger(trt: Any, path: Path) -> Any:
    """A logger that writes every message to ``path`` and keeps them in ``messages``, as ``(severity, text)``."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []
            self.file = path.open("w", encoding="utf-8")

        def log(self, severity: Any, text: str) -> None:
            entry = (str(severity.name), text)
            self.messages.append(entry)
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()

    return Log()


def monitor(trt: Any, send: Send) -> Any:
    """A progress monitor that reports phases and their steps."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            send(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            send(phase, step + 1, self.steps.get(phase))
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def parsed(trt: Any, builder: Any, log: Any, path: Path) -> tuple[Any, Any]:
    """``(network, parser)`` of an ONNX file; both must be kept referenced until the build is over."""
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED  # 1 in TensorRT 10.16, 0 in 11.4 and RTX
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        found = []
        for i in range(parser.num_errors):
            error = parser.get_error(i)
            found.append({"node": error.node_name(), "op": error.node_operator(), "fact": error.desc(), "code": error.code().name})
        raise Refusal("parse", problems(log), errors=found)
    return network, parser


def configured(trt: Any, builder: Any, log: Any, request: dict[str, Any]) -> Any:
    """The builder's configuration: profile, capability and options of the request."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["capability"] is not None and hasattr(trt, "ComputeCapability"):
        known = trt.ComputeCapability.__members__
        member = known.get(request["capability"].upper())
        config.num_compute_capabilities = 1
        if member is None or not config.set_compute_capability(member, 0):
            raise Refusal("capability", known=[name.lower() for name in known if name.startswith("SM")])
    if request["level"] is not None:
        config.builder_optimization_level = request["level"]
    if request["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    if request["sparsity"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["profiles"].items():
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise Refusal("profile", problems(log))
    return config


def problems(log: Any, since: int = 0) -> str:
    """TensorRT's error messages."""
    return "\n".join(text for severity, text in log.messages[since:] if severity in ("ERROR", "INTERNAL_ERROR"))


def read_cache(trt: Any, config: Any, log: Any, path: str) -> Any:
    """A timing cache from a file; on TensorRT-RTX, where it has no effect, only the file's form is checked."""
    data = Path(path).read_bytes() if os.path.exists(path) else b""
    if data and (not data.startswith(CACHE_MAGIC) or len(data) < 16 or len(data) < int.from_bytes(data[8:16], "little")):
        raise Refusal("cache", "it is damaged or no timing cache")
    if hasattr(trt, "ComputeCapability"):
        data = b""
    seen = len(log.messages)
    cache = config.create_timing_cache(data)
    if cache is None or any(CACHE_DAMAGED in text for _, text in log.messages[seen:]):
        raise Refusal("cache", "TensorRT cannot read it")
    return cache


def use_cache(trt: Any, config: Any, log: Any, path: str) -> None:
    """Start the build from the measurements in ``path``."""
    if not config.set_timing_cache(read_cache(trt, config, log, path), False):
        raise Refusal("cache", "it was made by another version of TensorRT or on another GPU")


def merged_cache(trt: Any, config: Any, log: Any, path: str) -> bytes | None:
    """The build's measurements and those that ``path`` holds by now; ``None`` when the file stays as it is."""
    if hasattr(trt, "ComputeCapability") and os.path.exists(path):
        return None
    cache = config.get_timing_cache()
    cache.combine(read_cache(trt, config, log, path), False)
    return bytes(cache.serialize())


def layer_table(trt: Any, log: Any, blob: Any) -> tuple[str, str]:
    """``(form, text)``: the table of TensorRT-RTX's log, or the engine inspector's JSON of full TensorRT."""
    for severity, text in reversed(log.messages):
        if severity == "VERBOSE" and text.startswith(TABLE):
            return "log", text
    if not hasattr(trt, "ComputeCapability"):
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(blob)
        if engine is not None:
            inspector = engine.create_engine_inspector()
            return "inspector", inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    raise Refusal("table")


def build(trt: Any, request: dict[str, Any], folder: Path, send: Send) -> dict[str, Any]:
    """Build and write the engine; the result that goes to ``result.json``."""
    if request["capability"] not in (None, request["device"]) and not hasattr(trt, "ComputeCapability"):
        raise Refusal("device", device=request["device"])
    log = logger(trt, folder / "log.jsonl")
    try:
        builder = trt.Builder(log)
    except TypeError as e:  # the factory of the binding returned no object
        raise Refusal("start", problems(log) or str(e)) from e
    send("Parsing the ONNX file", 0, None)
    network, parser = parsed(trt, builder, log, folder / "model.onnx")
    config = configured(trt, builder, log, request)
    progress = monitor(trt, send)
    config.progress_monitor = progress
    path = request["timing_cache"]
    if path is not None:
        use_cache(trt, config, log, path)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        raise Refusal("build", problems(log), names=[layer.name for layer in layers])
    del parser
    form, table = layer_table(trt, log, blob)
    if path is not None:
        cache = merged_cache(trt, config, log, path)
        if cache is not None:
            (folder / "timing.bin").write_bytes(cache)
    (folder / "engine.bin").write_bytes(blob)
    return {"form": form, "table": table}


def protocol() -> Send:
    """Take stdout for the progress lines; what TensorRT prints there itself goes to stderr from now on."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return lambda what, done, total: print(json.dumps([what, done, total]), file=lines, flush=True)


def die_with_parent() -> None:
    """Stop at once when the parent is gone: it holds the other end of stdin."""
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        while os.read(0, 64):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    waiting.wait()
    time.sleep(SETTLED)


def steady() -> None:
    """Let the builder's threads run in the same order, with memory at the same addresses, every time: its internal names depend on both.

    One processor, on which no thread is preempted because another wakes up (SCHED_BATCH); for root in the real-time class, in which none is
    preempted at all, as long as a processor stays free of such builds. Then a new start without address randomization. Where the system does
    not allow this, engines of big nets can differ from build to build, in these names only as far as it was seen.
    """
    if sys.argv[2:] == [AGAIN] or not hasattr(os, "sched_setaffinity"):
        return
    *others, last = sorted(os.sched_getaffinity(0))
    mine = next((cpu for cpu in others if claimed(cpu)), last)
    os.sched_setaffinity(0, {mine})
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if mine != last:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    with contextlib.suppress(AttributeError):  # a C library without personality
        personality = ctypes.CDLL(None).personality
        if personality(personality(ASK) | FIXED_ADDRESSES) != -1:
            os.execv(sys.executable, [*sys.orig_argv, AGAIN])


def claimed(cpu: int) -> bool:
    """Take a processor for this process's life; False when another build has it. A name in Linux's abstract space is free again when its owner ends."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0fxq-engine-build-{cpu}")
    except OSError:
        claim.close()
        return False
    claim.set_inheritable(True)
    claim.detach()
    return True


def main() -> None:
    """Do what the request says."""
    steady()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    send = protocol()
    die_with_parent()
    file = Path(sys.argv[1])
    request = json.loads(file.read_text(encoding="utf-8"))
    sys.path.append(request["path"])
    trt = importlib.import_module(request["package"])
    result: dict[str, Any] = {"version": trt.__version__}
    try:
        result |= build(trt, request, file.parent, send)
    except Refusal as e:
        result["error"] = e.record
    (file.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)  # no teardown: there is nothing left to do that could fail


if __name__ == "__main__":
    main()
