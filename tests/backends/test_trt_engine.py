"""Running engines: for real where there is a GPU; everywhere, the order of the calls with a stand-in whose memory is the host's."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fxq.backends import trt_engine
from fxq.backends.onnxruntime import run, session
from fxq.backends.trt_builder import build
from fxq.backends.trt_engine import Engine, Latency, Port, require_gpu
from fxq.errors import EngineError

HERE = Path(__file__).parent
_spec: Any = importlib.util.spec_from_file_location("trt_models", HERE / "trt_models.py")
m: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(m)

FAKE = "trt_fake"
A, B = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[0.5, 0, -1], [1, 1, 1]])


def test_inference_on_a_gpu_or_a_clear_error_without() -> None:
    data = m.conv_relu()
    built = build(data)
    x = torch.randn(5, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    if torch.cuda.is_available():
        engine = Engine(built.engine, built.package)
        (got,) = engine.run({"x": x}).values()
        (want,) = run(session(data, "off"), {"x": x.numpy()})
        torch.testing.assert_close(got.cpu(), torch.from_numpy(want), atol=1e-3, rtol=1e-3)
        assert 0 < engine.latency({"x": x}, warmup=2, runs=5).median_ms < 1000
    else:
        with pytest.raises(EngineError, match="there is no CUDA device here: an engine can be built on this machine but not run. Copy it to a machine"):
            Engine(built.engine, built.package)
        with pytest.raises(EngineError, match="no CUDA device"):
            require_gpu()


class Stream:
    cuda_stream = 1234
    calls: list[str]

    def __init__(self) -> None:
        Stream.calls = []

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def wait_stream(self, other: str) -> None:
        self.calls.append(f"wait for {other}")


class Event:
    """Time goes by one millisecond with each event, and by ten after the sixth."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Stream) -> None:
        Stream.calls.append("event")
        Event.now += 1 if Event.now < 6 else 10
        self.at = Event.now

    def elapsed_time(self, end: "Event") -> float:
        return float(end.at - self.at)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in can be imported, and the host plays the GPU."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(trt_engine, "require_gpu", lambda: None)
    monkeypatch.setattr(trt_engine, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's stream")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    Event.now = 0
    yield
    sys.modules.pop(FAKE, None)


def opened(mode: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine of a stand-in that misbehaves."""
    sys.modules.pop(FAKE, None)
    monkeypatch.setenv("TRT_FAKE", mode)
    return Engine(b"fake engine", FAKE)


def test_a_run_binds_shapes_and_addresses(host: None) -> None:
    engine = Engine(b"fake engine", FAKE)
    assert engine.inputs == {name: Port(torch.float32, (-1, 3), (1, 3), (4, 3)) for name in "ab"}
    assert engine.outputs == {"y": Port(torch.float32, (-1, 3))}
    assert torch.equal(engine.run({"a": A, "b": B})["y"], A + 2 * B)
    assert Stream.calls == ["wait for the caller's stream", "synchronize"]
    assert torch.equal(engine.run({"b": B[:1], "a": A[1:]})["y"], A[1:] + 2 * B[:1])
    strided = A.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(engine.run({"a": strided, "b": B})["y"], A + 2 * B)


def test_results_of_an_earlier_run_stay(host: None) -> None:
    engine = Engine(b"fake engine", FAKE)
    first = engine.run({"a": A, "b": B})["y"]
    engine.run({"a": B, "b": A})
    assert torch.equal(first, A + 2 * B)


def test_latency_is_measured_between_events_after_the_warm_up(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(b"fake engine", FAKE)
    runs = []
    execute = engine._execute
    monkeypatch.setattr(engine, "_execute", lambda: (runs.append(len(Stream.calls)), execute()))
    assert engine.latency({"a": A, "b": B}, warmup=3, runs=5) == Latency(1.0, 1.0, 10.0, 5)
    assert Stream.calls == ["wait for the caller's stream", "synchronize", *["event"] * 10, "synchronize"]
    assert runs == [1, 1, 1, 3, 5, 7, 9, 11]
    for bad in ({"runs": 0}, {"warmup": -1}):
        with pytest.raises(EngineError, match="cannot be measured"):
            engine.latency({"a": A, "b": B}, **bad)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"a": A}, r"input 'b': it is missing. Give all inputs: a, b"),
        ({"a": A, "b": B, "bb": B}, r"input 'bb': the engine has no such input. did you mean 'b'\?"),
        ({"a": A.double(), "b": B}, r"input 'a': its type is torch.float64, the engine takes torch.float32. Pass x.to\(torch.float32\)"),
        ({"a": A, "b": torch.zeros(5, 3)}, r"input 'b': its shape is \[5, 3\], the engine takes \[1, 3\] to \[4, 3\]. Pass such a shape, or build"),
        ({"a": A[0], "b": B}, r"input 'a': its shape is \[3\], the engine takes \[1, 3\] to \[4, 3\]"),
        ({"a": A[:, :2], "b": B}, r"input 'a': its shape is \[2, 2\], the engine takes"),
    ],
)
def test_inputs_that_do_not_fit(inputs: dict[str, Any], text: str, host: None) -> None:
    with pytest.raises(EngineError, match=text):
        Engine(b"fake engine", FAKE).run(inputs)


def test_a_fixed_input_needs_no_profile(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened("fixed", monkeypatch)
    assert engine.inputs["b"] == Port(torch.float32, (2, 3), (2, 3), (2, 3))


def test_engines_that_cannot_be_read_or_run(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="trt_fake cannot read the engine: magic tag does not match. Run it with the version that built it"):
        Engine(b"another engine", FAKE)
    with pytest.raises(EngineError, match="tensor 'y': its type INT4 is no type of torch"):
        opened("int4-output", monkeypatch)
    engine = opened("no-run", monkeypatch)
    engine._log.append("an earlier error")
    with pytest.raises(EngineError, match="the run failed: it gives no reason. Check the shapes"):
        engine.run({"a": A, "b": B})
    with pytest.raises(EngineError, match=r"trt_fake cannot read the engine: libnvinfer.so.10: cannot open shared object file"):
        opened("no-import", monkeypatch)
    with pytest.raises(EngineError, match="'no_such_package' is not installed"):
        Engine(b"fake engine", "no_such_package")


@pytest.mark.parametrize(
    ("call", "result", "text"),
    [
        ("set_input_shape", False, r"input 'a': TensorRT refuses its shape \[2, 3\]"),
        ("set_tensor_address", False, r"input 'a': TensorRT refuses its shape"),
        ("get_tensor_shape", (-1, 3), r"output 'y': its shape \[-1, 3\] depends on the data"),
    ],
)
def test_calls_that_fail(call: str, result: Any, text: str, host: None) -> None:
    engine = Engine(b"fake engine", FAKE)
    setattr(engine.context, call, lambda *_: result)
    with pytest.raises(EngineError, match=text):
        engine.run({"a": A, "b": B})


def test_no_memory_for_a_context(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module(FAKE).ICudaEngine, "create_execution_context", lambda _self: None)
    with pytest.raises(EngineError, match="no execution context can be made: it gives no reason. Free GPU memory"):
        Engine(b"fake engine", FAKE)


def test_the_package_that_can_read_it_is_found(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_engine, "FULL", "no_such_package")
    monkeypatch.setattr(trt_engine, "RTX", FAKE)
    assert Engine(b"fake engine").trt.__name__ == FAKE
