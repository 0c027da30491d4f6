"""Shared weights in ONNX files: every weight comes back, the file is small, runtimes fold it all and run layers as they run ordinary ones."""

import copy
import json
from collections import Counter
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq.backends import onnx_packed, onnx_qdq, onnx_shared, onnx_wide
from fxq.backends.onnx_wide import Wide
from fxq.backends.onnxruntime import run, session
from fxq.compiled import CompiledModel
from fxq.errors import LoweringError
from fxq.exposed import constant
from fxq.graph import kind, module_of, swap_module
from fxq.lint import agrees, lint, optimize, runtime_report
from fxq.modules import WEIGHTED
from fxq.shared import SharedWeight, plain, shared
from tests.test_shared import LAYERS

FOLDED = {"Gather", "Cast", "Mul", "Div", "Mod", "Slice", "DequantizeLinear"}
ENTRIES = {1: "1", 2: "trits", 3: "crumbs", 15: "half bytes", 31: "32", 32: "33", 60: "61", 255: "bytes", 256: "257"}


def rand(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


# ---- digits of large integers


def test_golden_digits() -> None:
    assert onnx_wide.pack(np.array([[1, 2], [3, 32]]), Wide(33)).tolist() == [[1 + 2 * 33 + 3 * 33**2 + 32 * 33**3]]
    assert [(b, Wide(b).digits) for b in (2, 21, 22, 35, 36, 73, 74, 257)] == [(2, 31), (21, 7), (22, 6), (35, 6), (36, 5), (73, 5), (74, 4), (257, 3)]
    assert Wide(33).width * 8 == pytest.approx(16 / 3) and Wide(33).bits == 6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 40_000), st.integers(1, 70), st.integers(0, 99))
def test_digits_come_back(base: int, count: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, base, count)
    numbers[-1] = base - 1
    packed = onnx_wide.pack(numbers, Wide(base))
    assert packed.dtype == np.int32 and packed.min() >= 0 and packed.shape == (-(-count // Wide(base).digits), 1)
    assert np.array_equal(onnx_wide.unpack(packed, Wide(base), count), numbers)


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (7, 5, 3), (1, 1), (3, 11)])
@pytest.mark.parametrize("base", [17, 33, 65, 73])
def test_int8_weights_expand_to_their_codes(base: int, shape: tuple[int, ...]) -> None:
    """In ONNX Runtime and in onnx's reference implementation."""
    rng = np.random.default_rng(base)
    values = tuple(sorted(int(v) for v in rng.choice(255, base, False) - 127))
    codes = rng.choice(np.array(values, np.int8), shape)
    stored = onnx_packed.Stored(Wide(base), values)
    tensors, nodes = onnx_packed.filled("w", codes, stored, "tables/x")
    tensors.append(numpy_helper.from_array(stored.table, "tables/x"))
    graph = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("w_q", TensorProto.INT8, shape)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    for got in (session(model.SerializeToString()).run(None, {})[0], ReferenceEvaluator(model).run(None, {})[0]):
        assert got.dtype == np.int8 and np.array_equal(got, codes)


def test_int8_weights_are_packed_only_where_they_share() -> None:
    rng = np.random.default_rng(0)
    weights = {f"{n}/weight": rng.integers(0, n, 20_000).astype(np.int8) for n in (33, 73, 74)}
    assert onnx_packed.choose(weights) == {}
    assert {n: s.form for n, s in onnx_packed.choose(weights, list(weights)).items()} == {"33/weight": Wide(33), "73/weight": Wide(73)}
    assert onnx_packed.choose({"a/weight": weights["33/weight"][:1000]}, ["a/weight"]) == {}, "the nodes take more than it saves"


# ---- float layers


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def clustered(op: nn.Module, entries: int, rows: bool, seed: int = 0) -> SharedWeight:
    """The layer with codes of random entries, each one used, and zeros."""
    g = torch.Generator().manual_seed(seed)
    size: Any = op.weight.shape
    codes = torch.randint(0, entries + 1, size, generator=g).reshape(-1)
    codes[: entries + 1] = torch.arange(entries + 1)[: len(codes)]
    axis = 1 if "Transpose" in type(op).__name__ else 0
    factor = torch.randn(size[axis], generator=g) if rows else None
    return shared(op, codes.reshape(size), torch.randn(entries, generator=g).sort().values * 0.05, factor)


def floating(model: nn.Module, x: Tensor, entries: int | None, rows: bool = True, target: str = "onnxruntime") -> CompiledModel:
    """A float graph whose layers share weights; ``None``: ordinary ones with the values of 32 entries."""
    m = fxq.compile(model.eval(), "float", example=x, progress=False, target=target)
    for i, node in enumerate([n for n in m.graph_module.graph.nodes if kind(m.graph_module, n) in WEIGHTED]):
        layer = clustered(module_of(m.graph_module, node), entries or 32, rows, i)  # type: ignore[arg-type]
        swap_module(m.graph_module, node, layer if entries else plain(layer))
    m.graph_module.recompile()
    return m


def written(m: CompiledModel) -> onnx.ModelProto:
    model = onnx.load_from_string(m.lower("onnx").data)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_runs_as_with_a_plain_weight(name: str, rows: bool) -> None:
    op, size = LAYERS[name]
    wide: dict[str, Any] = {"in_channels": 12, "out_channels": 48}
    if isinstance(op, nn.Linear):
        op, x = nn.Linear(60, 80), rand(3, 60)
    else:
        new: Any = copy.deepcopy(op)
        new.in_channels, new.out_channels = wide["in_channels"], wide["out_channels"]
        across = (12, 48 // new.groups) if "Transpose" in type(op).__name__ else (48, 12 // new.groups)
        new.weight = nn.Parameter(rand(*across, *new.kernel_size))
        new.bias = None if op.bias is None else nn.Parameter(rand(48))  # type: ignore[union-attr]
        op, x = new, rand(size[0], 12, *size[2:])
    m = floating(Net(op), x, 32, rows)
    model = written(m)
    ((path, layer),) = [(p, v) for p, v in m.graph_module.named_modules() if isinstance(v, SharedWeight)]
    assert "Gather" in {n.op_type for n in model.graph.node}
    weight = constant(model, f"{path}/weight")
    assert weight is not None and np.array_equal(weight, layer.weight.detach().numpy())
    got = run(session(model.SerializeToString()), {"x": x})[0]
    assert np.allclose(got, m(x).detach().numpy(), atol=1e-5, rtol=1e-5)
    assert not FOLDED & {n.op_type for n in optimize(model).graph.node}


@pytest.mark.parametrize("entries", ENTRIES, ids=ENTRIES.values())
def test_every_size_of_codebook(entries: int) -> None:
    """Weights to the bit, in ONNX Runtime, OpenVINO and onnx's reference; the runtime's graph is that of plain weights."""
    x = rand(2, 32, 6, 5)
    net = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 12, 40))
    m = floating(net, x, entries, rows=entries != 60)
    model = written(m)
    outputs = m(x).detach().numpy()
    for path in ("0", "3"):
        layer: Any = m.graph_module.get_submodule(path)
        assert np.array_equal(constant(model, f"{path}/weight"), layer.weight.detach().numpy())  # type: ignore[arg-type]
    runtimes = [run(session(model.SerializeToString()), {"input": x})[0], ReferenceEvaluator(model).run(None, {"input": x.numpy()})[0]]
    core = openvino.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    runtimes.append(core.compile_model(core.read_model(model.SerializeToString()), "CPU", config)([x.numpy()])[0])
    assert all(np.abs(y - outputs).max() < 2e-6 * np.abs(outputs).max() for y in runtimes)
    ordinary = optimize(written(floating(net, x, None)))
    assert Counter(n.op_type for n in optimize(model).graph.node) == Counter(n.op_type for n in ordinary.graph.node)
    most = {1: 1.2, 2: 2.0, 3: 2.3, 15: 4.3, 31: 5.6, 32: 5.6, 60: 6.6, 255: 8.5, 256: 11.3}[entries]
    held = sum(t.ByteSize() for t in model.graph.initializer if "bias" not in t.name) * 8
    assert held / sum(m.graph_module.get_submodule(p).codes.numel() for p in ("0", "3")) < most  # type: ignore[operator,union-attr]


def test_a_small_weight_is_written_as_it_is() -> None:
    model = written(floating(Net(nn.Conv2d(3, 4, 3)), rand(1, 3, 5, 5), 5))
    assert {n.op_type for n in model.graph.node} == {"Conv", "Identity"}


def test_the_estimate_is_what_the_file_takes() -> None:
    for entries, form in ((20, Wide(21)), (200, "bytes")):
        layer = clustered(nn.Linear(70, 90), entries, True)
        numbers = onnx_shared.Numbers.of(layer)
        assert onnx_shared.forms({"a/weight": layer}) == {"a/weight": form}
        tensors, nodes = onnx_shared._expanded("a/weight", numbers, form, "a/weight_q")
        real = sum(t.ByteSize() for t in tensors) + sum(n.ByteSize() for n in nodes)
        assert abs(real - onnx_shared._bytes("a/weight", numbers, form)) < 10


def test_entries_that_nothing_uses_take_no_room() -> None:
    layer = shared(nn.Linear(40, 50), torch.arange(2000).reshape(50, 40) % 3 * 100, torch.arange(300.0))
    numbers = onnx_shared.Numbers.of(layer)
    assert numbers.table.tolist() == [0, 99, 199] and numbers.at.max() == 2
    assert onnx_shared.forms({"a/weight": layer})["a/weight"].raw.base in (3, 4)  # type: ignore[union-attr]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(x)))
        return out


@pytest.mark.parametrize("entries", [7, 32])
def test_the_same_weight_is_held_once(entries: int) -> None:
    m = floating(Twice(), rand(3, 64), entries)
    a: Any = m.graph_module.get_submodule("a")
    node = next(n for n in m.graph_module.graph.nodes if n.target == "b")
    swap_module(m.graph_module, node, shared(plain(m.graph_module.get_submodule("b")), a.codes, a.book, a.rows))  # type: ignore[arg-type]
    m.graph_module.recompile()
    model = written(m)
    assert sum(t.name.endswith(("_packed", "_q4")) for t in model.graph.initializer) == 1
    assert np.allclose(run(session(model.SerializeToString()), {"x": rand(3, 64)})[0], m(rand(3, 64)).detach().numpy(), atol=1e-4)


# ---- whole models


class Small(nn.Module):
    """Batch norms with negative factors, a transposed conv, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.n2 = nn.Conv2d(16, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.t, self.f = nn.ConvTranspose2d(48, 16, 2, stride=2), nn.Linear(16 * 64, 40)
        for n in (self.n1, self.n2):
            nn.init.uniform_(n.weight, -1, 1)
            n.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n2(self.b(torch.relu(self.n1(self.a(x))))))
        out: Tensor = self.f(nn.functional.avg_pool2d(torch.relu(self.t(x)), 2).flatten(1))
        return out


X = rand(4, 3, 8, 8, seed=9)


def compiled(scheme: str, target: str = "onnxruntime", bits: int | None = None) -> CompiledModel:
    share = None if bits is None else fxq.Share(bits=bits)
    made = fxq.compile(Small().eval(), scheme, calibration=X, target=target, prune=fxq.Prune(sparsity=0.5), share=share, progress=False)
    assert isinstance(made, CompiledModel)
    return made


@pytest.mark.parametrize(("scheme", "bits"), [("deepcomp_w5", None), ("iao_w8a8", 5), ("iao_w8a8", 3), ("weight_only_w8", 5)])
def test_models_are_proven(scheme: str, bits: int | None) -> None:
    """Lint says what the runtime does, every integer is equal, no weight is unread."""
    m = compiled(scheme, bits=bits)
    data = m.lower("onnx").data
    model = onnx.load_from_string(data)
    assert {"Gather", "Mod"} <= {n.op_type for n in model.graph.node} or bits == 3
    assert any(t.name.endswith(("_packed", "_q4")) for t in model.graph.initializer)
    proof = m.verify(data, X)
    assert proof.ok and (proof.exact or not scheme.startswith("iao") or "t" in {o.node for o in m.float_ops})  # type: ignore[union-attr]
    assert agrees(lint(data), runtime_report(data)) == []
    ops = Counter(n.op_type for n in optimize(model).graph.node)
    assert not (FOLDED - {"DequantizeLinear"}) & set(ops)
    assert ops["QLinearConv"] == (2 if scheme.startswith("iao") else 0)
    pairs = m.lint(portable=True)
    assert pairs.unread == () and len(pairs.findings) + pairs.safe == (3 if scheme.startswith("iao") else 0)


def test_integer_codes_turn_their_sign_with_the_batch_norm() -> None:
    m = compiled("iao_w8a8", bits=4)
    layer: Any = m.graph_module.get_submodule("b")
    codes = layer.weight_codes()
    assert codes.min() >= -127 and codes.min() < 0 < codes.max() and 17 < len(codes.unique()) <= 33
    model = onnx.load_from_string(m.lower("onnx").data)
    assert "b/weight_packed" in {t.name for t in model.graph.initializer}
    assert np.array_equal(constant(model, "b/weight_q"), codes.numpy())  # type: ignore[arg-type]


def test_another_weight_in_the_file_is_seen() -> None:
    m = compiled("iao_w8a8", bits=5)
    model = onnx.load_from_string(m.lower("onnx").data)
    packed = next(t for t in model.graph.initializer if t.name == "b/weight_packed")
    numbers = numpy_helper.to_array(packed).copy()
    numbers[7:90] = numbers[8:91]
    packed.CopyFrom(numpy_helper.from_array(numbers, packed.name))
    proof = m.verify(model.SerializeToString(), X)
    assert not proof.ok and "b" in str(proof)


@pytest.mark.parametrize(("scheme", "bits"), [("deepcomp_w5", None), ("deepcomp_w8_fc5", None), ("int8", 5)])
def test_tensorrt_gets_plain_weights(scheme: str, bits: int | None) -> None:
    m = compiled(scheme, "tensorrt", bits)
    model = onnx.load_from_string(m.lower("onnx").data)
    assert not {"Gather", "Mod", "Cast", "Div"} & {n.op_type for n in model.graph.node}
    held = {t.name: (t.data_type, tuple(t.dims)) for t in model.graph.initializer}
    layer: Any = m.graph_module.get_submodule("b")
    if bits is None:
        assert held["b/weight"] == (TensorProto.FLOAT, (48, 16, 3, 3))
    else:
        assert held["b/weight_q"] == (TensorProto.INT8, (48, 16, 3, 3)) and np.array_equal(constant(model, "b/weight_q"), layer.weight_codes().numpy())  # type: ignore[arg-type]
    report = m.lint()
    assert report.ok and not [f for f in getattr(report, "findings", ()) if getattr(f, "severity", "") == "error"]


def test_tensorrt_builds_it() -> None:
    assert compiled("int8", "tensorrt", 5).lower("tensorrt").data.startswith(b"vtrt")


def test_size_is_counted_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are no parameters: a float layer counts 4 bytes a weight for TensorRT, and as packed for ONNX Runtime."""
    x = rand(2, 256)
    limit = 256 * 512 * 2
    monkeypatch.setattr(onnx_qdq, "MAX_BYTES", limit)
    net = Net(nn.Linear(256, 512))
    assert len(floating(net, x, 32).lower("onnx").data) < limit
    m = floating(net, x, 32, target="tensorrt")
    (issue,) = onnx_qdq.OnnxQdq().check(m.graph_module, m.scheme, m.target)
    assert "GiB" in issue.fact
    with pytest.raises(LoweringError, match="GiB"):
        m.lower("onnx")


@pytest.mark.parametrize(("scheme", "bits"), [("deepcomp_w5", None), ("iao_w8a8", 5)])
def test_the_debugger_takes_shared_layers(scheme: str, bits: int | None, tmp_path: Any) -> None:
    m = compiled(scheme, bits=bits)
    m.report(tmp_path / "report.html", X)
    assert "SharedConv2d" in str(m.graph_module)
    assert "nothing wrong" in str(m.bisect(X)), "pruning moves numbers on purpose"
    assert m.sensitivity(X) is not None
    part = m.with_float("b")
    assert isinstance(part.graph_module, GraphModule) and part.verify(part.lower("onnx"), X).ok
    assert {o.kind for o in m.float_ops} >= {"conv_transpose"}
    assert json.loads(m.lint().to_json())
