"""A stand-in for the full TensorRT package: the names that fxq uses, no ComputeCapability, and an engine that computes ``y = a + 2 b`` on the host.

``$TRT_FAKE`` makes it misbehave: ``no-import``, ``no-builder``, ``abort`` and ``exit`` (while parsing), ``sleep`` and ``broken`` (while
building), ``no-parse``, ``bad-profile``, ``no-table``, ``no-run``, ``int4-output``, ``fixed``.
``$TRT_FAKE_PID`` is a file that takes the number of the building process, ``$TRT_FAKE_RACE`` a timing cache that another build writes meanwhile.
"""

import ctypes
import enum
import json
import os
import sys
import time
from pathlib import Path

MODE = os.environ.get("TRT_FAKE", "")
if any(Path(folder, "trt_worker.py").exists() for folder in sys.path):
    raise ImportError("the backends' own folder is on the path: their names would hide packages")
if MODE == "no-import":
    raise ImportError("libnvinfer.so.10: cannot open shared object file")

__version__ = "10.16.1.11"
print("a banner on stdout")


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
BuilderFlag = enum.Enum("BuilderFlag", "SPARSE_WEIGHTS")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
DataType = enum.Enum("DataType", "FLOAT INT4")
Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
ErrorCode = enum.Enum("ErrorCode", "INVALID_NODE")


class ILogger:
    Severity = Severity

    def log(self, severity, text):
        raise NotImplementedError


class IProgressMonitor:
    pass


class ParserError:
    def code(self):
        return ErrorCode.INVALID_NODE

    def desc(self):
        return "it does not like it"

    def node_name(self):
        return "node"

    def node_operator(self):
        return "Conv"


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self.logger = logger

    def parse_from_file(self, path):
        self.logger.log(Severity.INFO, "Parsing node: conv [Conv]")
        self.logger.log(Severity.ERROR, "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime")
        sys.stdout.write("not a line of the protocol\n")
        if MODE == "abort":
            os.abort()
        if MODE == "exit":
            os._exit(7)
        return MODE != "no-parse"

    def get_error(self, index):
        return ParserError()


class ITimingCache:
    def __init__(self, entries):
        self.entries = set(entries)

    def combine(self, other, ignore_mismatch):
        self.entries |= other.entries
        return True

    def serialize(self):
        body = json.dumps(sorted(self.entries)).encode()
        return b"ptrt" + bytes(4) + len(body).to_bytes(8, "little") + body


class IBuilderConfig:
    def __init__(self, logger):
        self.logger = logger
        self.profiling_verbosity = self.progress_monitor = self.builder_optimization_level = self.cache = None
        self.pools, self.flags = {}, []

    def create_timing_cache(self, data):
        try:
            return ITimingCache(json.loads(data[16:]) if data else [])
        except ValueError:
            self.logger.log(Severity.WARNING, "Failed to deserialize timing cache. Returning an empty timing cache.")
            return ITimingCache([])

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return "other GPU" not in cache.entries

    def get_timing_cache(self):
        return self.cache

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool] = size

    def set_flag(self, flag):
        self.flags.append(flag)

    def add_optimization_profile(self, profile):
        return -1 if MODE == "bad-profile" else 0


class IOptimizationProfile:
    def set_shape(self, name, least, best, greatest):
        pass


class ILayer:
    name = "conv"


class INetworkDefinition:
    num_layers = 1

    def get_layer(self, index):
        return ILayer()


class Builder:
    def __init__(self, logger):
        if MODE == "no-builder":
            logger.log(Severity.ERROR, "createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger
        if "TRT_FAKE_PID" in os.environ:
            Path(os.environ["TRT_FAKE_PID"]).write_text(str(os.getpid()))

    def create_network(self, flags):
        assert flags == 2, "strongly typed"
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig(self.logger)

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        assert config.profiling_verbosity is ProfilingVerbosity.DETAILED
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        assert monitor.step_complete("Building", 0)
        if MODE == "sleep":
            time.sleep(60)
        monitor.phase_finish("Building")
        if "TRT_FAKE_RACE" in os.environ:
            Path(os.environ["TRT_FAKE_RACE"]).write_bytes(ITimingCache(["of the other build"]).serialize())
        if MODE == "broken":
            raise RuntimeError("an exception of the binding")
        if config.cache is not None:
            config.cache.entries.add("conv 3x3")
        text = f"level {config.builder_optimization_level}, pools {config.pools.get(MemoryPoolType.WORKSPACE)}, flags {[f.name for f in config.flags]}"
        self.logger.log(Severity.WARNING, text)
        return b"fake engine"


class EngineInspector:
    def get_engine_information(self, form):
        assert form is LayerInformationFormat.JSON
        tensor = {"Name": "a", "Dimensions": [1, 16, 8, 8], "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}
        layer = {
            "Name": "conv", "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor],
            "Weights": {"Type": "Int8", "Count": 4}, "Metadata": "[ONNX Layer: conv]\x1f[ONNX Layer: relu]",
        }  # fmt: skip
        return json.dumps({"Layers": [layer], "Bindings": ["a"]})


class IExecutionContext:
    def __init__(self):
        self.shapes, self.addresses = {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        return self.shapes["a"]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream == 1234
        size = 1
        for n in self.shapes["a"]:
            size *= n
        a, b, y = (ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_float)) for name in "aby")
        for i in range(size):
            y[i] = a[i] + 2 * b[i]
        return MODE != "no-run"


class ICudaEngine:
    num_io_tensors = 3
    names = "aby"

    def create_engine_inspector(self):
        return EngineInspector()

    def create_execution_context(self):
        return IExecutionContext()

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.OUTPUT if name == "y" else TensorIOMode.INPUT

    def get_tensor_dtype(self, name):
        return DataType.INT4 if MODE == "int4-output" and name == "y" else DataType.FLOAT

    def get_tensor_shape(self, name):
        return (2, 3) if name == "b" and MODE == "fixed" else (-1, 3)

    def get_tensor_profile_shape(self, name, index):
        assert index == 0
        return [(1, 3), (2, 3), (4, 3)]


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, data):
        if data != b"fake engine" or MODE == "no-table":
            self.logger.log(Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag does not match)")
            return None
        return ICudaEngine()
