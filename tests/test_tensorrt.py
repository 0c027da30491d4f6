"""Engines from models: built here, each operation beside the builder's layer, the ONNX file beside the simulator; what goes wrong says so."""

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import modules as m
from fxq import tensorrt
from fxq.backends.trt_layers import Layer, TensorInfo
from fxq.engine_proof import EngineProof, GpuRun
from fxq.errors import ArtifactError, EngineError, LoweringError, SchemeError, TargetError
from fxq.tensorrt import EngineArtifact, EngineOptions, TensorRT

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block, a transposed convolution (float), a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.fc = nn.ConvTranspose2d(16, 16, 2, 2), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        return self.fc(self.up(x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def compiled() -> fxq.CompiledModel:
    torch.manual_seed(0)
    return fxq.compile(Net().eval(), "int8", calibration=X, target="sm86", progress=False)


@pytest.fixture(scope="module")
def engine(compiled: fxq.CompiledModel) -> EngineArtifact:
    made = compiled.lower("tensorrt")
    assert isinstance(made, EngineArtifact)
    return made


def test_every_operation_runs_as_planned(engine: EngineArtifact) -> None:
    plans = {c.path: (c.planned, c.built) for c in engine.checks}
    assert plans == {"stem": ("int8", "int8"), "a": ("int8", "int8"), "b": ("int8", "int8"), "up": ("float", "float"), "fc": ("int8", "int8")}
    assert engine.mismatches == () and engine.data[:4] == b"vtrt"
    assert next(c.why for c in engine.checks if c.path == "up") == "TensorRT runs transposed convolutions in float"
    text = engine.table()
    assert "4 of 4 quantized operations run as planned; 1 stay float" in text and "correlation" in text
    assert engine.info["profiles"] == {"x": ((1, 3, 16, 16), (8, 3, 16, 16), (32, 3, 16, 16))} and engine.info["capability"] == 86


def test_a_second_build_gives_the_same_bytes(compiled: fxq.CompiledModel, engine: EngineArtifact) -> None:
    again = compiled.lower("tensorrt")
    assert again.data == engine.data
    assert compiled.lower("tensorrt", target="sm89").data != engine.data, "another capability is another engine"


def test_a_portable_engine_is_for_all_capabilities(compiled: fxq.CompiledModel, engine: EngineArtifact) -> None:
    portable = compiled.lower("tensorrt", target="portable")
    assert portable.info["capability"] is None and portable.info["mismatches"] == [] and portable.data != engine.data
    assert compiled.lower("tensorrt", target="tensorrt").data == portable.data


def test_verify_says_what_is_proven(compiled: fxq.CompiledModel, engine: EngineArtifact, tmp_path: Path) -> None:
    path = engine.save(tmp_path / "m.engine")
    proof = compiled.verify(path, [X])
    assert isinstance(proof, EngineProof) and proof.ok and proof.onnx.ok and proof.onnx.hidden_differ == 0 and proof.onnx.nodes == proof.onnx.planned == 4
    assert str(proof).splitlines()[0] == "4 of 4 quantized operations run as planned in the engine"
    if torch.cuda.is_available():
        assert proof.gpu is not None and proof.gpu.finite and proof.gpu.rms < 0.1 and "median" in str(proof)
    else:
        assert proof.gpu is None and "there is no CUDA device here" in proof.not_run and str(proof).splitlines()[-1].startswith("not run: ")
    assert proof.to_json()["ok"] is True and len(proof.to_json()["checks"]) == 5


def test_an_unknown_engine_cannot_be_verified(compiled: fxq.CompiledModel, engine: EngineArtifact) -> None:
    with pytest.raises(ArtifactError, match="this engine was not made by this model here.*Lower the model again"):
        compiled.verify(engine.data[:-1], [X])
    assert isinstance(copy.deepcopy(compiled).verify(engine.data, [X]), EngineProof), "a copy knows it"


def wrong(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The table with the layer of ``a`` in float."""
    fp32 = (TensorInfo("t", (1,), "fp32"),)
    return tuple(Layer(x.name, x.kind, fp32, fp32, fp32, x.onnx) if "a" in x.onnx and x.weighted else x for x in layers)


def test_a_layer_that_runs_otherwise_is_a_warning_or_an_error(compiled: fxq.CompiledModel, engine: EngineArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tensorrt.compare
    monkeypatch.setattr(tensorrt, "compare", lambda gm, scheme, layers: real(gm, scheme, wrong(layers)))
    with pytest.warns(UserWarning, match="a: planned int8, but the builder runs it in float"):
        bad = compiled.lower("tensorrt")
    assert isinstance(bad, EngineArtifact) and [str(c) for c in bad.mismatches] == ["a (conv): planned int8, built float"]
    assert "not as planned: a (conv): planned int8, built float" in bad.table() and "3 of 4 quantized" in bad.table()
    proof = compiled.verify(bad, [X])
    assert not proof.ok and isinstance(proof, EngineProof) and proof.mismatches == bad.mismatches
    with pytest.raises(EngineError, match="^a: planned int8, but the builder runs it in float. Leave it float with skip="):
        compiled.lower("tensorrt", strict=True)
    lost = real(compiled.graph_module, compiled.scheme, [x for x in engine.layers if "b" not in x.onnx])
    assert [(c.path, c.built) for c in lost if not c.ok] == [("b", "absent")]


def test_float16_between_the_quantized_layers(compiled: fxq.CompiledModel) -> None:
    made = compiled.lower("tensorrt", float_dtype="fp16", strict=True)
    assert isinstance(made, EngineArtifact)
    file = onnx.load_from_string(made.onnx)
    types = {t.data_type for t in file.graph.initializer if t.name.endswith(("_scale", "bias"))}
    assert types == {onnx.TensorProto.FLOAT16} and file.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    proof = compiled.verify(made, [X])
    assert proof.ok and isinstance(proof, EngineProof) and proof.onnx.bound == 1e-2 and proof.onnx.outputs[0].error < 5e-3
    assert any(t.dtype == "fp16" for layer in made.layers for t in (*layer.inputs, *layer.outputs, *layer.constants))


def test_profiles_and_progress(compiled: fxq.CompiledModel) -> None:
    shapes, seen = ((2, 3, 16, 16), (4, 3, 16, 16), (6, 3, 16, 16)), []
    made = compiled.lower("tensorrt", profiles={"x": shapes}, progress=lambda what, done, total: seen.append(what))
    assert made.info["profiles"] == {"x": shapes} and len(set(seen)) > 2
    with pytest.raises(EngineError, match="input 'y'"):
        compiled.lower("tensorrt", profiles={"y": shapes})


def test_cancelling_leaves_nothing(compiled: fxq.CompiledModel) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled.lower("tensorrt", progress=stop)


def test_options_targets_and_schemes_that_do_not_fit(compiled: fxq.CompiledModel) -> None:
    with pytest.raises(TargetError, match="backend 'tensorrt' has no option 'profile'. did you mean 'profiles'"):
        compiled.lower("tensorrt", profile={})
    with pytest.raises(TargetError, match="backend 'onnx-qdq' has no option 'strict'"):
        compiled.lower("onnx-qdq", strict=True)
    with pytest.raises(TargetError, match="unknown float type 'bf16'. Use fp32 or fp16"):
        compiled.lower("tensorrt", float_dtype="bf16")
    with pytest.raises(SchemeError, match="target 'sm75' does not take activation grids of s8/pt"):
        compiled.lower("tensorrt", target="sm75")
    with pytest.raises(TargetError, match="the model was compiled for 'sm86', not 'onnxruntime'"):
        compiled.lower("onnx-qdq", target="onnxruntime")
    other = fxq.compile(Net().eval(), "iao_w8a8", calibration=X, progress=False)
    with pytest.raises(TargetError, match="compiled for 'onnxruntime', not 'sm86'. Compile it with target='sm86', scheme='int8'"):
        other.lower("tensorrt", target="sm86")
    with pytest.raises(LoweringError, match="the graph is placed for 'onnxruntime'. Compile it with target='tensorrt'"):
        other.lower("tensorrt")
    with pytest.raises(LoweringError, match="computes float16 slower"):
        other.lower("onnx-qdq", float_dtype="fp16")


@pytest.mark.parametrize(("scheme", "target", "planned"), [("fp8_w8a8", "sm89", "fp8"), ("weight_only_w4", "sm86", "int4-weights"), ("float", "sm80", "float")])
def test_other_schemes(scheme: str, target: str, planned: str) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.relu, self.b, self.mix = nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 32), m.MatMul()

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.relu(self.a(x)))
            return self.mix(y, y.transpose(-1, -2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(4, 20, 256)
    compiled = fxq.compile(model, scheme, calibration=x, target=target, progress=False)
    made = compiled.lower("tensorrt", strict=True)
    assert isinstance(made, EngineArtifact)
    assert {c.path: (c.planned, c.built) for c in made.checks if c.kind == "linear"} == {"a": (planned, planned), "b": (planned, planned)}
    assert compiled.verify(made, x).ok
    assert float(((compiled(x) - model(x)).norm() / model(x).norm()).detach()) < (1e-5 if scheme == "float" else 0.2)


def test_fp8_and_int4_files_name_their_types() -> None:
    x = torch.randn(4, 256)
    model = nn.Sequential(nn.Linear(256, 64)).eval()
    int4 = onnx.load_from_string(fxq.compile(model, "weight_only_w4_b64", example=x, target="tensorrt", progress=False).lower().data)
    weight = next(t for t in int4.graph.initializer if t.data_type == onnx.TensorProto.INT4)
    dq = next(n for n in int4.graph.node if n.op_type == "DequantizeLinear")
    assert list(weight.dims) == [256, 64] and {a.name: a.i for a in dq.attribute} == {"axis": 0, "block_size": 64} and int4.opset_import[0].version == 21
    fp8 = onnx.load_from_string(fxq.compile(model, "fp8_w8a8", calibration=x, target="sm120", progress=False).lower().data)
    kinds = {t.name.rpartition("_")[2]: t.data_type for t in fp8.graph.initializer}
    assert kinds["q"] == kinds["zero"] == onnx.TensorProto.FLOAT8E4M3FN and fp8.opset_import[0].version == 19


def test_the_gpu_run_compares_with_the_simulator(compiled: fxq.CompiledModel, engine: EngineArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, data: bytes, package: str | None) -> None:
            assert data == engine.data and package == "tensorrt_rtx"

        def run(self, feed: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"output": compiled(feed["x"]).detach() * 1.01}

        def latency(self, feed: dict[str, Tensor]) -> Any:
            from fxq.backends.trt_engine import Latency

            return Latency(1.0, 0.9, 1.1, 100)

    from fxq import engine_proof

    monkeypatch.setattr(engine_proof, "Engine", Fake)
    monkeypatch.setattr(engine_proof, "require_gpu", lambda: None)
    proof = compiled.verify(engine, [X, X[:2]])
    assert isinstance(proof, EngineProof) and isinstance(proof.gpu, GpuRun) and proof.ok
    assert (proof.gpu.batches, proof.gpu.elements) == (2, 6 * 24)
    assert proof.gpu.drift == pytest.approx(0.01, rel=1e-3) and proof.gpu.rms == pytest.approx(0.01, rel=1e-3)
    assert "rms difference 0.01" in str(proof) and "median 1 ms" in str(proof)
    monkeypatch.setattr(Fake, "run", lambda self, feed: {"output": torch.full_like(compiled(feed["x"]), torch.nan)})
    assert not compiled.verify(engine, [X]).ok


def test_options_reach_the_builder() -> None:
    o = EngineOptions(level=3, workspace=5, sparsity=True, timeout=7.0, package="tensorrt_rtx").for_capability(86)
    assert (o.capability, o.level, o.workspace, o.sparsity, o.timeout, o.package) == ("sm86", 3, 5, True, 7.0, "tensorrt_rtx")
    assert EngineOptions().for_capability(None).capability is None and TensorRT().options == EngineOptions()
