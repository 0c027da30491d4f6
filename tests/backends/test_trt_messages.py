"""TensorRT's messages, made readable."""

import json
from pathlib import Path

import pytest

from fxq.backends.trt_messages import clean, crash, last_lines, quiet, read_log

CUDA = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/checkMacros.cpp:250 (cudaError 35: old driver))"
STREAM = "[cudaResources.cpp::ScopedCudaStream::25] Error Code 1: Cuda Runtime (In ScopedCudaStream at /_src/cudaResources.cpp:25 (cudaError 35: old))"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (
            f"Invalid Node - D_14\nITensor::getDimensions: Error Code 4: API Usage Error (D_14: input has type Int32. In checkType at /_src/b.cpp:456)\n{CUDA}",
            "D_14: input has type Int32",
        ),
        ("Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported.", "Non-zero zero point is not supported"),
        ("Assertion failed: a->getType() == nvinfer1::DataType::kHALF: input tensor A must be FP16.", "input tensor A must be FP16"),
        ('creator && "Plugin not found, are the plugin name and namespace correct?"', "Plugin not found, are the plugin name and namespace correct?"),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for sm86. In compileGraph at /_src/c.cpp:2012)",
            "Cannot compile for sm86",
        ),
        ("WeightsContext.cpp:519: Found unsupported datatype (5) when importing: c2", "Found unsupported datatype (5) when importing: c2"),
        (f"{STREAM}\n{CUDA}", "it gives no reason"),
        ("", "it gives no reason"),
        ("two lines\n\nof text", "two lines of text"),
    ],
)
def test_what_stands_around_a_message_goes(text: str, want: str) -> None:
    assert clean(text) == want


def test_quiet_keeps_all_other_lines() -> None:
    assert quiet(f"one\n{CUDA}\n\n{STREAM}\n two") == "one\n two"


def test_a_log_that_a_crash_has_cut(tmp_path: Path) -> None:
    assert read_log(tmp_path) == [] and last_lines(tmp_path) == ""
    lines = [json.dumps(["VERBOSE", f"step {i}\nmore"]) for i in range(5)] + [json.dumps(["ERROR", CUDA]), '["VERBOSE", "ste']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert read_log(tmp_path) == [("VERBOSE", f"step {i}\nmore") for i in range(5)]
    assert last_lines(tmp_path) == "; its last messages: step 2 | step 3 | step 4"
    (tmp_path / "stderr.txt").write_text("")
    assert crash(tmp_path, "tensorrt_rtx", -11).fact == "tensorrt_rtx crashed (signal SIGSEGV); its last messages: step 2 | step 3 | step 4"
