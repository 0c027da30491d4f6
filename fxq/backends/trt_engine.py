"""Running a TensorRT engine on a GPU: results and latency."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxq.backends.trt_builder import FULL, RTX, chosen, installed
from fxq.backends.trt_messages import clean
from fxq.errors import EngineError, nearest

_DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT8": torch.int8, "INT32": torch.int32, "INT64": torch.int64,
    "BOOL": torch.bool, "UINT8": torch.uint8, "FP8": torch.float8_e4m3fn,
}  # fmt: skip
"""TensorRT's types that a tensor of torch can have."""
DEVICE = "cuda"
_CUDA: Any = torch.cuda


@dataclass(frozen=True)
class Latency:
    """How long one run takes on the GPU, in milliseconds, without copies from and to the host.

    Attributes:
        median_ms, p10_ms, p90_ms: of the runs.
        runs: how many were measured.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


@dataclass(frozen=True)
class Port:
    """An input or output of an engine: its type, its sizes (-1: dynamic) and, for inputs, the least and greatest shape that it was built for."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    least: tuple[int, ...] = ()
    greatest: tuple[int, ...] = ()


def require_gpu() -> None:
    """Nothing, on a machine that can run engines.

    Raises:
        EngineError: when there is no CUDA device that torch can use.
    """
    if not torch.cuda.is_available():
        way_out = "Copy it to a machine with an NVIDIA GPU of its compute capability, with a torch for CUDA"
        raise EngineError("there is no CUDA device here: an engine can be built on this machine but not run", way_out=way_out)


class Engine:
    """A deserialized engine on the current CUDA device. To be used by one thread at a time.

    Args:
        data: the serialized engine, such as ``Built.engine``.
        package: the package that built it, ``tensorrt`` or ``tensorrt_rtx``. ``None``: whichever is installed and can read it.

    Attributes:
        inputs, outputs: name -> :class:`Port`, in the engine's order.

    Raises:
        EngineError: without a CUDA device, without the package, or when TensorRT cannot read the engine (another version, another GPU, damaged bytes).
    """

    def __init__(self, data: bytes, package: str | None = None) -> None:
        require_gpu()
        packages = [chosen(package)] if package else [p for p in (FULL, RTX) if installed(p)] or [chosen(None)]
        self._log: list[str] = []
        loaded = next((found for p in packages if (found := self._load(p, data)) is not None), None)
        if loaded is None:
            fact = f"{' and '.join(packages)} cannot read the engine: {self._said()}"
            raise EngineError(fact, way_out="Run it with the version that built it, on a GPU that it was built for")
        self.trt, self.runtime, self.engine = loaded
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise EngineError(f"no execution context can be made: {self._said()}", way_out="Free GPU memory, or build for this GPU")
        self.stream = _CUDA.Stream()
        self.inputs: dict[str, Port] = {}
        self.outputs: dict[str, Port] = {}
        for i in range(self.engine.num_io_tensors):
            self._add_port(self.engine.get_tensor_name(i))

    def _load(self, package: str, data: bytes) -> tuple[Any, Any, Any] | None:
        """The module, its runtime and the engine, or ``None`` when it cannot read the bytes."""
        try:
            trt = importlib.import_module(package)
        except (ImportError, OSError) as e:
            self._log.append(str(e))
            return None
        runtime = trt.Runtime(_logger(trt, self._log))
        engine = runtime.deserialize_cuda_engine(data)
        return None if engine is None else (trt, runtime, engine)

    def _add_port(self, name: str) -> None:
        trt, engine = self.trt, self.engine
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise EngineError(f"its type {kind} is no type of torch", where=f"tensor {name!r}", way_out="Give the model inputs and outputs of float or int8")
        sizes = tuple(engine.get_tensor_shape(name))
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            least = greatest = sizes
            if -1 in sizes:
                least, _, greatest = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
            self.inputs[name] = Port(_DTYPES[kind], sizes, least, greatest)
        else:
            self.outputs[name] = Port(_DTYPES[kind], sizes)

    def _said(self) -> str:
        return clean("\n".join(self._log))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, on the GPU.

        Args:
            inputs: by name, of the engine's types; tensors of the host are copied to the GPU.

        Raises:
            EngineError: when names, types or shapes do not fit the engine, or the run fails.
        """
        results, _held = self._bind(inputs)
        self._execute()
        self.stream.synchronize()
        return results

    def latency(self, inputs: Mapping[str, Tensor], warmup: int = 10, runs: int = 100) -> Latency:
        """Time of single runs, one after the other, between CUDA events.

        Args:
            inputs: as for :meth:`run`.
            warmup: runs before the first measured one.
            runs: measured runs.

        Raises:
            EngineError: as :meth:`run`, and for less than one run.
        """
        if runs < 1 or warmup < 0:
            raise EngineError(f"{runs} runs after {warmup} cannot be measured", way_out="Measure at least one run")
        _results, _held = self._bind(inputs)
        for _ in range(warmup):
            self._execute()
        self.stream.synchronize()
        marks = [(_CUDA.Event(enable_timing=True), _CUDA.Event(enable_timing=True)) for _ in range(runs)]
        for start, end in marks:
            start.record(self.stream)
            self._execute()
            end.record(self.stream)
        self.stream.synchronize()
        times = torch.tensor([start.elapsed_time(end) for start, end in marks], dtype=torch.float64)
        p10, median, p90 = torch.quantile(times, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return Latency(median, p10, p90, runs)

    def _bind(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Shapes and addresses of all tensors: the outputs, and the inputs, which must live until the run is over."""
        self._log.clear()
        context, device = self.context, torch.device(DEVICE, _CUDA.current_device())
        for name in inputs:
            if name not in self.inputs:
                raise EngineError("the engine has no such input", where=f"input {name!r}", way_out=nearest(str(name), self.inputs))
        self.stream.wait_stream(_CUDA.current_stream())  # what computes the inputs comes first
        held = []
        with _CUDA.stream(self.stream):
            for name, port in self.inputs.items():
                if name not in inputs:
                    raise EngineError("it is missing", where=f"input {name!r}", way_out=f"Give all inputs: {', '.join(self.inputs)}")
                value = _fitting(name, inputs[name], port).to(device).contiguous()
                if not context.set_input_shape(name, tuple(value.shape)) or not context.set_tensor_address(name, value.data_ptr()):
                    raise EngineError(f"TensorRT refuses its shape {list(value.shape)}: {self._said()}", where=f"input {name!r}", way_out="Check the shape")
                held.append(value)
            results = {}
            for name, port in self.outputs.items():
                shape = tuple(context.get_tensor_shape(name))
                if min(shape, default=0) < 0:
                    way_out = "fxq runs only engines whose output shapes follow from the input shapes"
                    raise EngineError(f"its shape {list(shape)} depends on the data", where=f"output {name!r}", way_out=way_out)
                results[name] = torch.empty(shape, dtype=port.dtype, device=device)
                if not context.set_tensor_address(name, results[name].data_ptr()):
                    raise EngineError(f"TensorRT refuses its memory: {self._said()}", where=f"output {name!r}", way_out="Check the shapes of the inputs")
        return results, held

    def _execute(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise EngineError(f"the run failed: {self._said()}", way_out="Check the shapes of the inputs and the GPU's free memory")


def _logger(trt: Any, errors: list[str]) -> Any:
    """A logger that keeps error messages."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                errors.append(text)

    return Log()


def _fitting(name: str, value: Tensor, port: Port) -> Tensor:
    """An input whose type and shape the engine takes."""
    where = f"input {name!r}"
    if value.dtype != port.dtype:
        raise EngineError(f"its type is {value.dtype}, the engine takes {port.dtype}", where=where, way_out=f"Pass x.to({port.dtype})")
    if value.dim() != len(port.sizes) or not _between(port.least, value.shape, port.greatest):
        fact = f"its shape is {list(value.shape)}, the engine takes {list(port.least)} to {list(port.greatest)}"
        raise EngineError(fact, where=where, way_out="Pass such a shape, or build with another profile")
    return value


def _between(least: Sequence[int], sizes: Sequence[int], greatest: Sequence[int]) -> bool:
    return all(a <= n <= b for a, n, b in zip(least, sizes, greatest, strict=True))
