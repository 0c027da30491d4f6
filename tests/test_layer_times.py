"""Times of layers: what is measured is the layer that is meant, and what is said of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import layer_runs
from fxq.costs import layer_costs
from fxq.errors import FxqError, PassError, SchemeError
from fxq.layer_runs import Time, Times
from fxq.layer_shapes import BITS, CODES, FLOAT, TRITS, Form, LayerShape, layers_of, no_bits, plain_module, shape_of
from fxq.layer_table import LayerTime, LayerTimes
from fxq.prunable import canonical_graph
from tests.lowbit_nets import X, net

SMALL = {
    "3x3": LayerShape("conv", 1, 8, 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (6, 5)),
    "strided": LayerShape("conv", 2, 6, 8, (3, 2), (2, 1), (1, 0, 1, 0), (1, 2), (7, 9)),
    "grouped": LayerShape("conv", 1, 8, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (6, 6), 4),
    "uneven": LayerShape("conv", 1, 5, 7, (2, 2), (1, 1), (0, 0, 1, 1), (1, 1), (5, 5)),
    "1d": LayerShape("conv", 2, 6, 8, (3,), (2,), (1, 1), (1,), (11,)),
    "linear": LayerShape("linear", 3, 70, 11),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_runs, "BUDGET", 0.005)
    monkeypatch.setattr(layer_runs, "_CACHE", {})


def signs(shape: LayerShape, ternary_weights: bool, planes: int) -> Tensor:
    """The dot products of the layer on bits, from torch's float convolution."""
    side = (shape.batch, shape.inputs, *shape.size) if shape.kernel else (shape.batch, shape.inputs)
    x = torch.from_numpy(layer_runs.numbers(*side)) if shape.kernel else torch.from_numpy(layer_runs.numbers(1, shape.inputs, shape.batch)[0].T.copy())
    x = torch.where(x >= 0, 1.0, -1.0) if planes == 1 else torch.where(x >= 0.4, 1.0, torch.where(x <= -0.4, -1.0, 0.0))
    w = torch.from_numpy(layer_runs.bit_codes(shape, ternary_weights)).float()
    if not shape.kernel:
        return x @ w.T
    n = len(shape.kernel)
    pads = [p for i in reversed(range(n)) for p in (shape.pads[i], shape.pads[n + i])]
    conv: Any = (F.conv1d, F.conv2d)[n - 1]
    return conv(F.pad(x, pads), w, None, shape.stride, 0, shape.dilation, shape.groups)  # type: ignore[no-any-return]


@pytest.mark.parametrize("weights", ["binary", "ternary"])
@pytest.mark.parametrize("activations", ["binary", "ternary"])
@pytest.mark.parametrize("name", SMALL)
def test_the_layer_on_bits_is_the_one_that_is_meant(name: str, activations: str, weights: str) -> None:
    shape, planes = SMALL[name], 1 if activations == "binary" else 2
    runs = layer_runs.bit_runs(shape, Form(activations, weights, FLOAT, FLOAT), 1)
    want = signs(shape, weights == "ternary", planes)
    want = want if want.ndim == 2 else want.movedim(1, -1)
    for run in runs.values():
        found = torch.from_numpy(run())
        assert found.dtype == torch.float32 and torch.equal(found.reshape(want.shape), want * np.float32(0.02))


@pytest.mark.parametrize("gives", [BITS, TRITS, CODES, FLOAT])
@pytest.mark.parametrize("reads", [BITS, CODES, FLOAT])
def test_every_form_runs(reads: str, gives: str) -> None:
    shape = SMALL["3x3"]
    run = layer_runs.bit_runs(shape, Form("binary", "binary", reads, gives), 1)["bits"]()
    kinds = {BITS: (np.uint64, (1, 1, 6, 5, 1)), TRITS: (np.uint64, (2, 1, 6, 5, 1)), CODES: (np.uint8, (1, 6, 5, 16)), FLOAT: (np.float32, (1, 6, 5, 16))}
    assert (run.dtype, run.shape) == kinds[gives]


@pytest.mark.parametrize("name", [*SMALL, "transposed"])
def test_float_runs_are_the_layer(name: str) -> None:
    transposed = LayerShape("conv_transpose", 1, 4, 6, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), (5, 4), 2, (1, 1))
    shape = transposed if name == "transposed" else SMALL[name]
    model, x = layer_runs.onnx_float_layer(shape)
    layer: Any = plain_module(shape)
    op = layer[-1] if isinstance(layer, nn.Sequential) else layer
    op.weight.data, op.bias.data = torch.from_numpy(layer_runs.numbers(*shape.weight)), torch.zeros(shape.outputs)
    found = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert found.shape[2:] == shape.out_size
    assert torch.allclose(torch.from_numpy(found), layer(torch.from_numpy(x)), atol=1e-4)
    assert layer_runs.torch_run(shape)().shape == found.shape == layer_runs.torch_run(shape, channels_last=True)().shape


@pytest.mark.parametrize("name", SMALL)
def test_int8_runs_are_the_layer(name: str) -> None:
    shape = SMALL[name]
    model, x = layer_runs.onnx_int8_layer(shape)
    found = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    w = torch.from_numpy(np.random.default_rng(layer_runs.SEED).integers(-127, 128, shape.weight, np.int8)).double()
    real = torch.from_numpy(x).double() - 128
    n = len(shape.kernel)
    if n:
        pads = [p for i in reversed(range(n)) for p in (shape.pads[i], shape.pads[n + i])]
        conv: Any = (F.conv1d, F.conv2d)[n - 1]
        sums = conv(F.pad(real.movedim(-1, 1), pads), w, None, shape.stride, 0, shape.dilation, shape.groups).movedim(1, -1)
    else:
        sums = real @ w.T
    want = (sums * (0.02 * 0.01 / 0.05)).round().add(128).clamp(0, 255)
    assert found.dtype == np.uint8 and (torch.from_numpy(found).double() - want).abs().max() <= 1  # ties of float32
    assert (torch.from_numpy(found).double() != want).double().mean() < 0.05


class Layers(nn.Module):
    """Weighted layers of all kinds, each on its own input size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, 2, padding=1)
        self.b = nn.Conv2d(6, 6, (3, 2), padding="same", dilation=(2, 1), groups=3)
        self.c = nn.ConvTranspose2d(6, 4, 3, 2, output_padding=1)
        self.d = nn.Conv1d(4, 5, 3, padding=1)
        self.e = nn.Conv2d(5, 5, 3, padding=1, padding_mode="circular")
        self.f = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(self.c(self.b(self.a(x).relu())).flatten(2))
        return self.f(self.e(x.unsqueeze(-1)).squeeze(-1).mT)  # type: ignore[no-any-return]


def test_shapes_are_those_of_the_graph() -> None:
    gm = canonical_graph(Layers().eval(), (torch.randn(2, 3, 8, 8),), "")
    nodes = layers_of(gm)
    shapes = {str(n.target): shape_of(gm, n) for n in nodes}
    for n in nodes:
        size = n.meta["shape"]
        out = shapes[str(n.target)]
        assert (out.out_size if out.kernel else ()) == (tuple(size[2:]) if out.kernel else ())
    macs = {c.path: c.macs for c in layer_costs(gm)}
    assert {k: s.macs for k, s in shapes.items()} == {k: 2 * macs[k] for k in shapes}
    assert shape_of(gm, nodes[-1], 1).batch * 2 == shapes["f"].batch and shape_of(gm, nodes[0], 5).batch == 5
    assert [str(n.target) for n in nodes if no_bits(gm.get_submodule(str(n.target)))] == ["c", "e"]
    assert "circular" in str(no_bits(gm.get_submodule("e")))
    assert [LayerShape.from_json(json.loads(json.dumps(s.to_json()))) for s in shapes.values()] == list(shapes.values())


def test_a_float_net() -> None:
    found = fxq.layer_times(net(), X[:1])
    by = {t.path: t for t in found.layers}
    assert list(by) == ["a", "b", "c", "up", "d", "fc"]
    assert {k: (t.form.reads, t.form.gives) for k, t in by.items()} == {
        "a": (FLOAT, CODES), "b": (CODES, BITS), "c": (BITS, CODES), "up": (CODES, CODES), "d": (CODES, BITS), "fc": (BITS, FLOAT),
    }  # fmt: skip
    up = by["up"]
    assert up.times.bits is up.times.packed is up.times.int8 is None and up.fastest == "float32" and "transposed" in up.why
    assert all(t.runs == "float32" and t.times.float32.us > 0 for t in found.layers)
    assert all(t.times.bits is not None and t.times.packed is not None and t.times.int8 is not None for k, t in by.items() if k != "up")
    text = str(found)
    assert "up: a transposed convolution has no kernel on bits" in text and "float32/bits" in text and "processor time of one thread" in text
    assert LayerTimes.from_json(json.dumps(found.to_json())) == found
    assert found.machine["engine"].startswith(("numba", "numpy")) and set(found.machine) == {"cpu", "torch", "onnxruntime", "engine"}


def test_a_compiled_net_is_measured_as_it_is() -> None:
    m = fxq.compile(net(), "tbn_w1at", calibration=X, progress=False)
    by = {t.path: t for t in fxq.layer_times(m).layers}
    assert {k: t.runs for k, t in by.items()} == {"a": "float32", "b": "bits", "c": "bits", "up": "float32", "d": "bits", "fc": "float32"}
    assert (by["b"].form.activations, by["b"].form.weights) == ("ternary", "binary")
    assert by["a"].shape.batch == 1
    eight = fxq.layer_times(fxq.compile(net(), calibration=X, progress=False))
    assert {t.runs for t in eight.layers if t.path != "up"} == {"int8"}


def test_other_forms_and_threads() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    found = fxq.layer_times(model, torch.randn(2, 64), threads=2, activations="ternary", weights="ternary")
    assert [str(t.form) for t in found.layers] == ["ternary x ternary, float to trits", "ternary x ternary, trits to float"]
    assert found.threads == 2 and "wall time of 2 threads" in str(found) and [t.shape.batch for t in found.layers] == [2, 2]


def test_equal_shapes_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LayerShape] = []

    def fake(shape: LayerShape, *_: Any) -> Times:
        seen.append(shape)
        return Times(Time(3.0, 0.0), "torch", Time(2.0, 0.0), Time(1.0, 0.5), Time(1.5, 0.0))

    monkeypatch.setattr(layer_runs, "_measure", fake)
    same = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)), nn.Linear(16, 8))
    found = fxq.layer_times(same, torch.randn(1, 16))
    assert len(found.layers) == 5 and len(seen) == 3  # the first reads float, the last gives it
    fxq.layer_times(same, torch.randn(1, 16))
    assert len(seen) == 3
    assert {t.fastest for t in found.layers} == {"bits"} and found.layers[0].spread == 0.5
    assert " 3.00 " in str(found) and " 1.50 " in str(found) and " 2.00 " in str(found)


def test_runs_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(layer_runs, "time", SimpleNamespace(perf_counter=lambda: clock["wall"], thread_time=lambda: clock["cpu"]))

    def run(name: str, wall: float, cpu: float) -> Any:
        def passes() -> None:
            order.append(name)
            clock["wall"] += wall
            clock["cpu"] += cpu

        return passes

    runs = {"a": run("a", 0.002, 0.001), "b": run("b", 0.004, 0.003)}
    found = layer_runs.timed(runs, threads=2, budget=0.03)
    assert (found["a"].us, found["b"].us) == (pytest.approx(2000), pytest.approx(4000))
    timed = order[2 * layer_runs.WARMUP :]
    assert timed == ["a", "a", "b", "b"] * (len(timed) // 4) and len(timed) >= 4 * layer_runs.LEAST, "each call behind one that warms the caches"
    alone = layer_runs.timed(runs, threads=1, budget=0.01)
    assert (alone["a"].us, alone["b"].us) == (pytest.approx(1000), pytest.approx(3000)), "processor time of one thread"


def test_torch_has_the_threads_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs, and its own again afterwards, also behind an error."""
    before, seen, real = torch.get_num_threads(), [], layer_runs.timed

    def timed(runs: Any, threads: int) -> Any:
        seen.append((threads, torch.get_num_threads()))
        if threads == before + 2:
            raise RuntimeError("stop")
        return real(runs, threads)

    monkeypatch.setattr(layer_runs, "timed", timed)
    layer_runs.measured(SMALL["linear"], Form(), before + 1)
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="stop"):
        layer_runs.measured(SMALL["linear"], Form(), before + 2)
    assert torch.get_num_threads() == before and seen == [(before + 1, before + 1), (before + 2, before + 2)]


def test_measuring_leaves_the_seeds_alone() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    layer_runs.measured(SMALL["3x3"], Form())
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]


def test_what_cannot_be_measured() -> None:
    m = fxq.compile(net(), "xnor_w1a1", calibration=X, progress=False)
    for call, error, text in (
        (lambda: fxq.layer_times(net()), PassError, "the shapes are not known"),
        (lambda: fxq.layer_times(m, X), PassError, "a compiled model has its shapes"),
        (lambda: fxq.layer_times(net(), X, threads=0), PassError, "0 threads run nothing"),
        (lambda: fxq.layer_times(net(), X, threads=1.5), PassError, "1.5 threads run nothing"),  # type: ignore[arg-type]
        (lambda: fxq.layer_times(net(), X, activations="u8"), PassError, "activations='u8' have no kernel on bits"),
        (lambda: fxq.layer_times(nn.ReLU(), X), PassError, "no weighted layer"),
        (lambda: fxq.layer_times(3, X), FxqError, "expected a module, got int"),  # type: ignore[arg-type]
        (lambda: LayerTimes.from_json("[]"), SchemeError, "these are no layer times"),
        (lambda: LayerTimes.from_json({"layers": [{"path": "a"}], "threads": 1, "machine": {}}), SchemeError, "these are no layer times"),
        (lambda: LayerTimes((), 1).find(SMALL["3x3"], Form()), SchemeError, "the given times have no layer 8->16 3x3 @6x5"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("threads",), v) for v in (0, 1.5, "2", True, float("inf"), None)
    ] + [
        (("layers",), v) for v in ({}, None, "abc", [3])
    ] + [
        (("layers", 0, "path"), 3), (("layers", 0, "why"), 3), (("layers", 0, "runs"), "fast"), (("layers", 0, "shape", "kind"), "pool"),
        (("layers", 0, "shape", "inputs"), "3"), (("layers", 0, "shape", "inputs"), 0), (("layers", 0, "shape", "batch"), True),
        (("layers", 0, "shape", "kernel"), 3), (("layers", 0, "shape", "kernel"), [3]), (("layers", 0, "shape", "kernel"), [[3], 3]),
        (("layers", 0, "shape", "pads"), [1, 1, 1, -1]), (("layers", 0, "shape", "stride"), {}), (("layers", 0, "shape", "more"), 1),
        (("layers", 0, "form", "weights"), "u8"), (("layers", 0, "form", "reads"), "u8"), (("layers", 0, "form", "gives"), []),
        (("layers", 0, "times", "float32"), None), (("layers", 0, "times", "bits"), "fast"), (("layers", 0, "times", "float_by"), 3),
        (("layers", 0, "times", "int8", "us"), "5"), (("layers", 0, "times", "int8", "us"), float("nan")), (("layers", 0, "times", "int8", "us"), -1.0),
        (("layers", 0, "times", "int8", "us"), float("inf")), (("layers", 0, "times", "int8", "spread"), None),
    ],
)  # fmt: skip
def test_hostile_times_are_refused(place: tuple[Any, ...], value: Any) -> None:
    one = LayerTime("a", SMALL["3x3"], Form(), "float32", Times(Time(3.0, 0.1), "torch", Time(2.0, 0.1), Time(1.0, 0.1), Time(1.5, 0.1)))
    plain = json.loads(json.dumps(LayerTimes((one,)).to_json()))
    assert LayerTimes.from_json(plain).layers == (one,)
    at = plain
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(SchemeError, match="these are no layer times: "):
        LayerTimes.from_json(plain)
    with pytest.raises(SchemeError, match="these are no layer times: "):
        LayerTimes.from_json(json.dumps(plain))


def test_text_that_is_no_times() -> None:
    for text in ("", "null", "[" * 100_000, '{"threads": 1' + "0" * 5000 + "}"):
        with pytest.raises(SchemeError, match="these are no layer times: "):
            LayerTimes.from_json(text)


def test_a_clock_that_stands_still_divides_by_nothing() -> None:
    """The processor time of some systems has steps of milliseconds."""
    still = layer_runs._time([0.0] * 5)
    text = str(LayerTimes((LayerTime("a", SMALL["3x3"], Form(), "float32", Times(still, "torch", still, still, still)),)))
    assert still.us == 0 and " 0.0 " in text


def test_a_model_in_training_is_measured_as_it_will_be_converted() -> None:
    q = fxq.compile(net(), "xnor_w1a1", mode="qat", calibration=X, progress=False)
    before = {k: v.clone() for k, v in q.train().named_parameters()}
    found = {t.path: t.runs for t in fxq.layer_times(q).layers}
    assert found == {"a": "float32", "b": "bits", "c": "bits", "up": "float32", "d": "bits", "fc": "float32"}
    assert q.training and all(torch.equal(v, before[k]) for k, v in q.named_parameters()) and q.layer_times is None


def test_the_cache_knows_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(layer_runs, "_measure", lambda *a: calls.append(a) or Times(Time(1, 0), "torch"))
    for name in ("numba", "numpy", "numba"):
        found = layer_runs.engines.Engine(name, "generic", layer_runs.engines.NUMPY.kernels)
        monkeypatch.setattr(layer_runs.engines, "engine", lambda found=found: found)
        layer_runs.measured(SMALL["3x3"], Form())
    assert len(calls) == 2
    layer_runs.measured(SMALL["3x3"], Form(), 2)
    layer_runs.measured(SMALL["3x3"], Form(), 1, has_bits=False)
    assert len(calls) == 4


def test_times_are_found_by_shape_and_rather_by_form() -> None:
    forms = Form(reads=FLOAT), Form(), Form("ternary")
    some = LayerTimes(tuple(LayerTime(str(i), SMALL["3x3"], f, "float32", Times(Time(3.0, 0.1), "torch")) for i, f in enumerate(forms)))
    shape = SMALL["3x3"].with_batch(7)
    assert [some.find(shape, f).path for f in (*forms, Form(gives=CODES))] == ["0", "1", "2", "0"]


@pytest.mark.parametrize("best", layer_runs.FLOATS)
def test_float32_is_the_best_of_all(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_runs, "timed", lambda runs, threads: {k: Time(1.0 if k == best else 2.0, 0.0) for k in runs})
    found = layer_runs.measured(SMALL["3x3"], Form())
    assert (found.float32.us, found.float_by) == (1.0, best) and found.int8 is not None and found.bits is not None and found.packed is not None


def test_a_net_on_bits() -> None:
    from fxq.bitwise.program import BitProgram

    m = fxq.compile(net(), "tbn_w1at", calibration=X, int8=["fc"], progress=False)
    program, want = BitProgram(m.graph_module), {t.path: t for t in fxq.layer_times(m).layers}
    found = {t.path: t for t in fxq.layer_times(program, X[:1]).layers}
    assert {k: t.runs for k, t in found.items()} == {"a": "float32", "b": "bits", "c": "bits", "up": "float32", "d": "bits", "fc": "int8"}
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in want.items()}
    assert {k: t.form for k, t in found.items() if t.runs == "bits"} == {k: t.form for k, t in want.items() if t.runs == "bits"}
    assert fxq.layer_times(program, X[:3]).layers[1].shape.batch == 3
    with pytest.raises(PassError, match="the shapes are not known"):
        fxq.layer_times(program)


class Flat(nn.Module):
    """Convolutions over one and two dimensions, a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(4, 64, 3), nn.Conv1d(64, 32, 3, 2, 1), nn.Linear(32 * 7, 24)
        self.d = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x)))).flatten(1)
        return self.d(F.relu(self.c(x)))  # type: ignore[no-any-return]


def test_shapes_of_a_net_on_bits_over_one_dimension() -> None:
    from fxq.bitwise.program import BitProgram

    torch.manual_seed(0)
    m = fxq.compile(Flat().eval(), "xnor_w1a1", calibration=torch.randn(8, 4, 16), progress=False)
    found = {t.path: t for t in fxq.layer_times(BitProgram(m.graph_module), torch.randn(2, 4, 16)).layers}
    assert {k: (t.runs, str(t.shape)) for k, t in found.items()} == {
        "a": ("float32", "4->64 3 @16 batch 2"), "b": ("bits", "64->32 3 @14 stride 2 batch 2"), "c": ("bits", "224->24 batch 2"),
        "d": ("float32", "24->3 batch 2"),
    }  # fmt: skip
