"""Real engines, built on this machine: what comes out, what is refused, and why."""

import dataclasses
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fxq.backends import trt_builder
from fxq.backends.trt_builder import BuildOptions, available, build, chosen, installed
from fxq.backends.trt_layers import by_node, runs
from fxq.errors import EngineError

_spec: Any = importlib.util.spec_from_file_location("trt_models", Path(__file__).parent / "trt_models.py")
m: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(m)

RTX = "tensorrt_rtx"
SM86, SM89 = BuildOptions("sm86", package=RTX), BuildOptions("sm89", package=RTX)


def how(data: bytes, options: BuildOptions = SM86) -> dict[str, str]:
    """ONNX node -> how it runs, of a built engine."""
    return {node: runs(layer) for node, layer in by_node(build(data, options).layers).items()}


@pytest.mark.parametrize(
    ("model", "options", "want"),
    [
        ("conv_relu", SM86, {"conv": "int8"}),
        ("two_inputs", SM86, {"product": "int8"}),
        ("attention", SM86, {"qk": "int8", "pv": "int8"}),
        ("float_linear", SM86, {"encoder.layers.0.mlp/matmul": "float"}),
        ("fp8_matmul", SM89, {"product": "fp8"}),
        ("int4_matmul", SM86, {"product": "int4-weights"}),
        ("conv_relu", BuildOptions(package=RTX), {"conv": "int8"}),
        ("conv_relu", BuildOptions("sm75", package=RTX), {"conv": "float"}),
    ],
)
def test_how_layers_run(model: str, options: BuildOptions, want: dict[str, str]) -> None:
    got = how(getattr(m, model)(), options)
    assert {k: got[k] for k in want} == want


def test_what_a_build_gives() -> None:
    seen: list[tuple[str, int, int | None]] = []
    built = build(m.conv_relu(), SM86, lambda *step: seen.append(step))
    assert built.engine[:4] == b"vtrt"
    assert (built.package, built.version) == (RTX, installed(RTX))
    assert built.profiles == {"x": ((1, 16, 8, 8), (8, 16, 8, 8), (32, 16, 8, 8))}
    assert 0 < built.seconds < 60
    assert not any("catchCudaError" in text or text.startswith("Layers:") for _, text in built.log)
    assert ("VERBOSE", "Parsing node: conv [Conv]") in built.log
    assert built.warnings == ()
    phases = {what: (done, total) for what, done, total in seen}
    assert phases["Parsing the ONNX file"] == (0, None)
    assert {"Building engine", "Optimizing graph"} <= set(phases)
    assert all(done <= total for _, done, total in seen if total is not None)
    assert max(done for what, done, _ in seen if what == "Optimizing graph") == phases["Optimizing graph"][1]


def test_the_same_bytes_each_time_and_from_two_threads() -> None:
    """Of a net whose parts the builder compiles in threads: without ``trt_worker.steady`` about every second build differs."""
    data = m.squeeze(6)
    with ThreadPoolExecutor(2) as pool:
        engines = list(pool.map(lambda _: build(data, SM86).engine, range(8)))
    assert set(engines) == {engines[0]}
    assert build(data, SM89).engine != engines[0]


def test_options_reach_the_builder() -> None:
    data = m.conv_relu()
    shapes = ((2, 16, 8, 8), (3, 16, 8, 8), (4, 16, 8, 8))
    options = BuildOptions("sm86", {"x": shapes}, package=RTX, level=1, workspace=1 << 30, sparsity=True)
    given = build(data, options)
    assert given.profiles == {"x": shapes}
    for change in ({"profiles": {"x": (shapes[0], shapes[0], shapes[2])}}, {"capability": "sm89"}):
        assert build(data, dataclasses.replace(options, **change)).engine != given.engine, change
    assert build(m.conv_relu(4), SM86).profiles == {}


@pytest.mark.parametrize(
    ("data", "options", "where", "text"),
    [
        (m.conv_relu(zero=3), SM86, "x/q", "refuses QuantizeLinear: Non-zero zero point is not supported"),
        (m.unsupported(), SM86, "odd", "refuses NonMaxFrobenius: Plugin not found"),
        (m.matmul_integer(), SM86, "integers", r"refuses MatMulInteger: the operator is not supported \(UNSUPPORTED_NODE\). Run fxq lint"),
        (m.odd_int4(), SM86, "odd/w", "cannot build it: .*Sub-byte quantization with odd tensor volume is not supported. Run fxq lint"),
        (m.int16_input(), SM86, "initializer 'c1'", r"Found unsupported datatype \(5\) when importing initializer: c1"),
        (m.fp8_matmul(), SM86, None, "HW-specific datatypes: fp8_e4m3. Choose a compute capability that has this type: FP8 from sm89"),
        (m.conv_relu(), BuildOptions("sm90", package=RTX), None, "does not build for sm90. It builds for sm75, sm80, sm86, sm89, sm120, sm121"),
        (m.conv_relu(), BuildOptions("ampere", package=RTX), None, "'ampere' is no compute capability. Write it like sm86"),
        (m.conv_relu(), BuildOptions("sm86", package="tensorrt_xrt"), None, r"'tensorrt_xrt' is not installed. Install it: pip install \"fxq\[tensorrt\]\""),
        (m.conv_relu(), BuildOptions(package=RTX, level=6), None, "optimization level 6 does not exist. Choose 0 to 5"),
        (m.conv_relu(), BuildOptions(package=RTX, workspace=0), None, "a workspace of 0 bytes is not possible"),
        (m.conv_relu(), BuildOptions(package=RTX, timeout=0), None, "a timeout of 0 s is not possible"),
        (m.conv_relu(), BuildOptions("sm86", package=RTX, workspace=1024), None, "no tactics to implement .* within workspace limit.*Allow more workspace"),
        (b"no model", SM86, None, "the bytes are no ONNX model"),
        (b"", SM86, None, "the ONNX model has no outputs"),
    ],
)
def test_what_is_refused(data: bytes, options: BuildOptions, where: str | None, text: str) -> None:
    with pytest.raises(EngineError, match=text) as e:
        build(data, options)
    assert e.value.where == where
    assert e.value.way_out
    assert not any(noise in str(e.value) for noise in ("catchCudaError", "/_src/", ".cpp:"))


def test_several_findings_are_counted() -> None:
    g = m.Graph()
    x = g.input("x", 2, 3)
    data = g.bytes(g.node("Odd", [x], "one"), g.node("Even", [x], "two"))
    with pytest.raises(EngineError, match=r"one: .* refuses Odd: .* \(and 1 more\)"):
        build(data, SM86)


def test_warnings_are_given_once() -> None:
    g = m.Graph()
    data = g.bytes(g.qdq(g.input("x", 2, 3), 0.1, m.T.UINT8))
    (warning,) = build(data, SM86).warnings
    assert warning.startswith("TensorRT supports QuantizeLinear/DequantizeLinear with UINT8 zero_point only on DLA")


def test_the_package_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"tensorrt": None, RTX: "1.7.1.116"}
    monkeypatch.setattr(trt_builder, "installed", found.get)
    gpu = False
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert available() == "tensorrt_rtx 1.7.1.116"
    found["tensorrt"] = "11.4.0.106"
    assert available() == "tensorrt_rtx 1.7.1.116", "full TensorRT needs a GPU"
    gpu = True
    assert available() == "tensorrt 11.4.0.106"
    assert chosen(None) == "tensorrt"
    found.clear()
    assert available() is None
    with pytest.raises(EngineError, match=r"no TensorRT is installed. Install it: pip install \"fxq\[tensorrt\]\""):
        chosen(None)


def test_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed(RTX) == "1.7.1.116"
    assert installed("no_such_package") is None
    assert installed("") is None
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "only_a_folder").mkdir()
    assert installed("only_a_folder") is None
    (tmp_path / "only_a_file.py").write_text("raise SystemExit('imported')\n")
    assert installed("only_a_file") == "of unknown version"


def test_timing_cache_of_rtx_is_written_once_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    options = BuildOptions("sm86", timing_cache=file, package=RTX)
    engine = build(m.conv_relu(), options).engine
    written = file.read_bytes()
    assert written[:4] == b"ptrt"
    assert list(tmp_path.iterdir()) == [file]
    file.write_bytes(written + b"kept")
    assert build(m.conv_relu(), options).engine == engine == build(m.conv_relu(), SM86).engine
    assert file.read_bytes() == written + b"kept"
    for damaged in (b"junk", b"junk" + written[4:], written[:10], written[:-40]):
        file.write_bytes(damaged)
        with pytest.raises(EngineError, match=r"timing.cache: the timing cache cannot be used: it is damaged or no timing cache. Delete it"):
            build(m.conv_relu(), options)
        assert file.read_bytes() == damaged


def test_timing_cache_in_an_impossible_place(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the timing cache is a folder"):
        build(m.conv_relu(), BuildOptions(timing_cache=tmp_path))
    with pytest.raises(EngineError, match="no/timing: the timing cache cannot be read and written there"):
        build(m.conv_relu(), BuildOptions(timing_cache=str(tmp_path / "no" / "timing")))


ODD = ["a]b, Name: c", "layer1.0.conv1/q]", "x, LayerType: kgen, Inputs: []", "[ONNX Layer: conv]", "two\nlines } ], Outputs: ["]


def test_odd_node_names_lead_back_to_the_nodes() -> None:
    layers = build(m.conv_relu(rename=ODD), SM86).layers
    nodes = by_node(layers)
    assert set(nodes) == set(ODD)
    assert runs(nodes["[ONNX Layer: conv]"]) == "int8"
    assert nodes["[ONNX Layer: conv]"].kind == "correlation"
    assert nodes["two\nlines } ], Outputs: ["] is not nodes["[ONNX Layer: conv]"]


@pytest.mark.parametrize("name", ["layer1.0/x", "x, Dimensions: [1", "{ Name: x", "x], Constants: ["])
def test_odd_input_names(name: str) -> None:
    layers = build(m.conv_relu(x=name), SM86).layers
    assert name in {t.name for layer in layers for t in layer.inputs}
    assert runs(by_node(layers)["conv"]) == "int8"


def test_nodes_without_a_name() -> None:
    assert how(m.conv_relu(rename=[""] * 5))["node_of_t3"] == "int8"


def test_a_reproducible_build_is_one_that_came_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = build(m.conv_relu(), SM86)
    engines = iter([b"a", b"b", b"c", b"b"])
    monkeypatch.setattr(trt_builder, "_build", lambda data, options, progress: dataclasses.replace(real, engine=next(engines)))
    assert build(m.conv_relu(), dataclasses.replace(SM86, reproducible=True)).engine == b"b"
    engines = iter([b"1", b"2", b"3", b"4", b"5", b"6"])
    with pytest.raises(EngineError, match="no two of 5 builds gave the same bytes"):
        build(m.conv_relu(), dataclasses.replace(SM86, reproducible=True))
