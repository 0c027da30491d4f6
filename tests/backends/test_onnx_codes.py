"""Narrow activation grids in the file: ONNX Runtime gives every code of the integer reference, and fuses as it does with 8 bits."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq import kernels
from fxq import modules as m
from fxq.backends.onnx_qdq import OnnxQdq
from fxq.backends.reference import Reference
from fxq.errors import LoweringError
from fxq.graph import module_of
from fxq.lint import agrees, lint, optimize, runtime_report
from fxq.modules import FakeQuantize, Quantized
from fxq.numerics import bias_qparams
from fxq.proof import verify
from fxq.schemes import get as scheme
from fxq.spec import QParams, QuantSpec
from fxq.targets import get as target
from tests.backends.test_reference import runs
from tests.converted import converted, fq, onnx_bytes
from tests.lowbit_graphs import LEVELS, NARROW, Conv, Movers, Residual, Tokens, low, low_bit, measure, random_conv, set_codes, with_grid

NETS: dict[str, tuple[Any, tuple[int, ...], dict[str, int]]] = {
    "conv": (lambda s: Conv(s, padding=1), (2, 3, 9, 8), {"QLinearConv": 2}),
    "residual": (lambda s: Residual(s, pool=False), (2, 3, 12, 12), {"QLinearConv": 5, "QLinearGlobalAveragePool": 1}),
    "pool": (Residual, (2, 3, 12, 12), {"QLinearConv": 5, "NhwcMaxPool": 1, "QLinearGlobalAveragePool": 1}),
    "movers": (Movers, (2, 3, 9, 9), {"QLinearConv": 2, "QGemm": 1, "QLinearConcat": 1, "NhwcMaxPool": 1, "Resize": 1, "Pad": 1, "Slice": 1, "Gather": 1}),
    "linear": (Tokens, (4, 32), {"QGemm": 3}),
    "linear 3d": (Tokens, (4, 3, 32), {"QGemm": 3}),
}


def rand(*sizes: int, seed: int = 3) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def stored(data: bytes) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer}


def flat(v: Any) -> list[Tensor]:
    return list(v) if isinstance(v, tuple) else [v]


@pytest.mark.parametrize(("spec", "name"), [(s, n) for s in NARROW for n in NETS if n == "conv" or s not in ("u3/pt", "s4/pt", "s8n/pt")])
def test_every_code_of_a_narrow_grid_equals_the_reference(spec: str, name: str) -> None:
    make, sizes, kernel = NETS[name]
    gm = low(make(spec), rand(*sizes))
    data = onnx_bytes(gm)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    x = rand(*sizes, seed=5)
    proof = verify(gm, data, [x, rand(*sizes)])
    assert proof.exact and proof.missing == () and proof.nodes == proof.planned and proof.float_nodes == ()
    for ours, simulated in zip(flat(Reference(gm)(x)), flat(gm(x)), strict=True):
        torch.testing.assert_close(ours, simulated)
    ops = Counter(n.op_type for n in optimize(onnx.load_from_string(data)).graph.node)
    assert {k: ops[k] for k in kernel} == kernel and not {"Conv", "FusedConv", "Gemm", "MatMul", "Where"} & set(ops)
    report = lint(data)
    assert agrees(report, runtime_report(data)) == [] and all(o.runs == "int8" or o.op == "Reshape" for o in report.ops)


@pytest.mark.parametrize("first", range(0, 32, 8))
def test_random_convolutions(first: int) -> None:
    for seed in range(first, first + 8):
        options, sizes = random_conv(seed)
        spec, levels = NARROW[seed % len(NARROW)], list(LEVELS)[seed % 4]
        x = rand(*sizes, seed=seed)
        gm = low(Conv(spec, ("u8/pt", "u4/pt", "t2/pt")[seed % 3], **options), x, levels=levels)
        data = onnx_bytes(gm)
        assert verify(gm, data, [x]).exact, (seed, spec, options)
        first_run, *others = runs(data, x)
        assert all(np.array_equal(a, b) for run in others for a, b in zip(first_run, run, strict=True))


@pytest.mark.parametrize("spec", NARROW)
def test_codes_count_from_0_in_bytes_and_end_at_the_top(spec: str) -> None:
    gm = low(Conv(spec), rand(2, 3, 9, 8))
    q = QuantSpec.parse(spec)
    model = onnx.load_from_string(onnx_bytes(gm))
    held = stored(model.SerializeToString())
    assert held["a_q_zero"].dtype == np.uint8 and int(held["a_q_zero"]) == int(gm.get_submodule("a_q").zero_point) - q.qmin  # type: ignore[operator]
    assert (held["a_q_top"].dtype, int(held["a_q_top"])) == (np.uint8, q.qmax - q.qmin)
    made = {o: n for n in model.graph.node for o in n.output}
    assert [made[t].op_type for t in ("a_q/wide", "a_q", "a_q/dq")] == ["QuantizeLinear", "Clip", "DequantizeLinear"]
    model.graph.output.extend([onnx.helper.make_tensor_value_info("a_q", onnx.TensorProto.UINT8, None)])
    (_, codes), *_ = runs(model.SerializeToString(), 4 * rand(2, 3, 9, 8))
    values = set(np.unique(codes).tolist())
    assert values == ({0, 2} if q.kind == "binary" else set(range(q.qmax - q.qmin + 1)) if q.bits < 8 else values) and max(values) == q.qmax - q.qmin


@pytest.mark.parametrize("spec", ["u8/pt", "s8/pt"])
def test_grids_that_use_their_bits_in_full_are_written_as_ever(spec: str) -> None:
    model = onnx.load_from_string(onnx_bytes(low(Conv(spec, spec), rand(2, 3, 9, 8))))
    assert "Clip" not in {n.op_type for n in model.graph.node}
    assert stored(model.SerializeToString())["a_q_zero"].dtype == (np.uint8 if spec == "u8/pt" else np.int8)


class Pointwise(nn.Module):
    """Sums, products and tables that are rounded onto a narrow grid."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.x_q, self.stem, self.stem_q = fq(), nn.Conv2d(3, 8, 3, padding=1), fq()
        self.add, self.add_q, self.mul, self.mul_q = m.Add(), fq(spec=spec), m.Mul(), fq(spec=spec)
        self.sigmoid, self.sigmoid_q, self.leaky, self.leaky_q = nn.Sigmoid(), fq(spec=spec), nn.LeakyReLU(0.1), fq(spec=spec)
        self.relu, self.relu_q, self.mean, self.mean_q = nn.ReLU(), fq(spec=spec), m.GlobalAvgPool(), fq(spec=spec)
        self.cat, self.cat_q, self.head, self.head_q = m.Cat(1), fq(spec=spec), nn.Conv2d(40, 6, 1), fq()
        self.shift, self.shift_q = m.Add(), fq(spec=spec)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem_q(self.stem(self.x_q(x)))
        a, b = self.add_q(self.add(y, y)), self.mul_q(self.mul(y, y))
        c, d, e = self.sigmoid_q(self.sigmoid(y)), self.leaky_q(self.leaky(a)), self.relu_q(self.relu(y))
        z = self.cat_q(self.cat(a, b, c, d, e))
        return self.head_q(self.head(z)), self.mean_q(self.mean(self.shift_q(self.shift(b, -0.4))))


@pytest.mark.parametrize("spec", NARROW)
def test_sums_products_and_tables_onto_narrow_grids(spec: str) -> None:
    x = rand(2, 3, 9, 8)
    gm = low(Pointwise(spec), x)
    data = onnx_bytes(gm)
    proof = verify(gm, data, [x, rand(2, 3, 9, 8, seed=8)])
    assert proof.ok and proof.hidden_differ == 0 and proof.nodes == proof.planned
    assert agrees(lint(data), runtime_report(data)) == []
    kernel = {o.op: o.runs for o in lint(data).ops if o.op in ("Add", "Mul", "Sigmoid", "LeakyRelu", "Where")}
    if spec == "b1/pt":  # a sign of a float value: a sum of codes may be 0
        assert kernel == {"Add": "float", "Mul": "float", "Sigmoid": "float", "LeakyRelu": "float", "Where": "float"}
    else:
        assert proof.exact and set(kernel.values()) == {"int8"} and len(kernel) == 4


# ---- a step of its own


class Stepped(nn.Module):
    """Grids behind a convolution, behind another grid and behind a float operation."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.x_q, self.a, self.a_q = fq(), nn.Conv2d(3, 8, 3, padding=1), fq(spec=spec)
        self.b, self.b_q, self.again = nn.Conv2d(8, 8, 3, padding=1), fq(), fq(spec=spec)
        self.c, self.tanh, self.tanh_q, self.d, self.d_q = nn.Conv2d(8, 8, 1), nn.Tanh(), fq(spec=spec), nn.Conv2d(8, 4, 1), fq()
        self.pool, self.pool_q, self.c_q = nn.MaxPool2d(2), fq(self.a_q, spec), fq()

    def forward(self, x: Tensor) -> Tensor:
        y = self.b_q(self.b(self.pool_q(self.pool(self.a_q(self.a(self.x_q(x)))))))
        y = self.c_q(self.c(self.again(y)))
        out: Tensor = self.d_q(self.d(self.tanh_q(self.tanh(y))))
        return out


@pytest.mark.parametrize("spec", ["t2/pt", "u4/pt", "s4n/pt", "u8/pt"])
def test_values_are_rounded_with_the_step_and_read_with_the_scale(spec: str) -> None:
    x = rand(2, 3, 10, 8)
    gm = low(Stepped(spec), x)
    for name, scale, step in (("a_q", 1.0, 0.3), ("again", 0.5, 0.07), ("tanh_q", 0.25, 0.11)):
        with_grid(gm, name, spec, scale, step)
    gm.pool_q.__dict__["like"] = gm.a_q  # its values are those that a_q gave: no step
    measure(low_bit(gm, "ternary"), x)
    data = onnx_bytes(gm)
    held = stored(data)
    assert held["a_q_scale"] == 1 and held["a_q/wide_scale"] == np.float32(0.3) and held["again/wide_scale"] == np.float32(0.07)
    y = rand(2, 3, 10, 8, seed=9)
    proof = verify(gm, data, [x, y])
    assert proof.ok and proof.hidden_differ == 0 and proof.nodes == proof.planned and agrees(lint(data), runtime_report(data)) == []
    torch.testing.assert_close(Reference(gm)(y), gm(y))
    codes = Reference(gm).run(y)["a_q"]
    assert len(codes.unique()) > 2


# ---- signs


def sign_layers(gm: GraphModule) -> list[Any]:
    return [module_of(gm, n) for n in gm.graph.nodes if kernels.gives_sign(gm, n)]


def test_the_sign_of_a_sum_whatever_the_scales_are() -> None:
    """Scales of channels from denormal products to 1e30, and huge sums: nothing over- or underflows."""
    x = rand(2, 3, 9, 8)
    gm = low(Conv("b1/pt", padding=1), x)
    for layer in sign_layers(gm):
        codes, bias, n = layer.weight_codes(), layer.bias_codes(), layer.op.weight.shape[0]
        scale = torch.logspace(-37.9, 30, n).to(torch.float32)
        qp = QParams(layer.weight_grid.spec, scale, torch.zeros(n, dtype=torch.int32))
        layer.weight_grid = FakeQuantize(qp)
        set_codes(layer, codes)
        source: Any = gm.get_submodule("x_q" if layer.op.in_channels == 3 else "a_q")
        grid = bias_qparams(source.qparams, qp)
        layer.bias_grid = FakeQuantize(grid)
        large = torch.full_like(bias, 2**30 + 1)
        layer.op.bias.data = (torch.where(torch.arange(n) % 3 == 2, large, bias).to(torch.float64) * grid.scale).to(torch.float32)
    assert len(sign_layers(gm)) == 2
    data = onnx_bytes(gm)
    assert verify(gm, data, [x, 3 * rand(2, 3, 9, 8, seed=4)]).exact
    assert stored(data)["a/weight_scale"].shape == () and len(np.unique(Reference(gm).run(x)["b_q"])) == 2


class FloatSign(nn.Module):
    """The sign of the input, and of a value that another layer reads in float; a dequantized one; a max pool of signs."""

    def __init__(self) -> None:
        super().__init__()
        self.x_q, self.pool, self.pool_q = fq(spec="b1/pt"), nn.MaxPool2d(3, 1, 1), fq(spec="b1/pt")
        self.a, self.a_q, self.norm, self.norm_q = nn.Conv2d(3, 6, 3, padding=1), fq(), nn.BatchNorm2d(6), fq(spec="b1/pt")
        self.b, self.b_q = nn.Conv2d(6, 4, 3, padding=1), fq()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.a_q(self.a(self.pool_q(self.pool(self.x_q(x))))))
        return self.b_q(self.b(self.norm_q(y))), y


def test_the_sign_of_a_float_value() -> None:
    x = rand(2, 3, 9, 8)
    gm = low(FloatSign(), x)
    data = onnx_bytes(gm)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.nan, torch.inf, -torch.inf])
    y = x.clone()
    y[0, 0, 0, :7] = special
    assert verify(gm, data, [x, y]).hidden_differ == 0
    codes = Reference(gm).run(y)["x_q"][0, 0, 0, :7]
    assert codes.tolist() == [1, 1, 1, -1, -1, 1, -1] and torch.equal(codes, torch.where(special >= 0, 1, -1))
    report = lint(data)
    assert agrees(report, runtime_report(data)) == []
    assert Counter(o.op for o in report.ops if o.runs == "float") == {"GreaterOrEqual": 2, "Where": 2, "BatchNormalization": 1}
    assert [o.runs for o in report.ops if o.op == "MaxPool"] == ["int8"]


@pytest.mark.parametrize(("spec", "step"), [("b1/pt", None), ("t2/pt", 0.9), ("u4/pt", 0.2)])
def test_a_code_that_float_arithmetic_may_flip_is_a_tie_only_next_to_its_border(spec: str, step: float | None) -> None:
    """Of a sign 0; of a grid with a step of its own the half step, not half the scale."""
    x = rand(8, 3, 72, 72)
    gm = low(nn.Sequential(nn.BatchNorm2d(3), fq(spec=spec), nn.Conv2d(3, 4, 1), fq()), x)
    if step is not None:
        measure(with_grid(gm, "1", spec, 1.0, step), x)
    model = onnx.load_from_string(onnx_bytes(gm))
    (bias,) = (t for t in model.graph.initializer if t.name == "0/bias")
    for shift, tie in ((2e-4, True), (0.3, False)):
        bias.CopyFrom(numpy_helper.from_array(np.full(3, shift, np.float32), "0/bias"))
        proof = verify(gm, model.SerializeToString(), [x])
        assert proof.ok == tie and (proof.first == "0") != tie and (proof.ties > 0 or not tie)


@pytest.mark.parametrize("pad", [True, False])
def test_padding_with_0_gives_the_code_of_0(pad: bool) -> None:
    """In front of a sign 0 is +1, as in the simulator; a convolution's own padding is 0."""
    x = rand(2, 3, 6, 5)
    layers = [m.Pad((1, 1, 1, 1)), fq(spec="b1/pt")] if pad else []
    gm = low(nn.Sequential(fq(spec="b1/pt"), *layers, nn.Conv2d(3, 4, 3, padding=0 if pad else 1), fq()), x)
    assert verify(gm, onnx_bytes(gm), [x]).exact
    torch.testing.assert_close(Reference(gm)(x), gm(x))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("spec", ["b1/pt", "s4/pt"])
def test_padding_with_the_images_own_values(spec: str, mode: str) -> None:
    x = rand(2, 3, 6, 5)
    gm = low(Conv(spec, padding=1, padding_mode=mode), x)
    assert verify(gm, onnx_bytes(gm), [x]).exact
    torch.testing.assert_close(Reference(gm)(x), gm(x))


# ---- a sum that can be 0


def tiny_layer(weight: list[list[int]], bias: list[int] | None, spec: str = "b1/pt") -> tuple[Quantized, QParams]:
    x = QParams(QuantSpec.parse(spec), torch.tensor(0.5), torch.tensor(0, dtype=torch.int32))
    op = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    qp = QParams(QuantSpec.parse("s8n/pc0"), torch.full((len(weight),), 0.25), torch.zeros(len(weight), dtype=torch.int32))
    layer = Quantized(op, qp, None if bias is None else bias_qparams(x, qp))
    set_codes(layer, torch.tensor(weight))
    if bias is not None:
        op.bias.data = torch.tensor(bias) * 0.125
    return layer, x


@pytest.mark.parametrize(("weight", "bias", "zero"), [
    ([[64, -64]], [1], False), ([[64, -64]], [64], True), ([[64, -64]], [0], True), ([[64, -64]], None, True), ([[64, -64]], [1000], False),
    ([[0, 0]], [0], True), ([[0, 0]], [5], False), ([[3, 5]], [1], True), ([[64, -64], [64, 64]], [1, 128], True), ([[1, 2]], [-4], False),
])  # fmt: skip
def test_which_sums_can_be_0(weight: list[list[int]], bias: list[int] | None, zero: bool) -> None:
    assert kernels.can_vanish(*tiny_layer(weight, bias)) is zero


def test_a_sum_that_is_said_never_to_be_0_never_is() -> None:
    rng = np.random.default_rng(0)
    never = 0
    for _ in range(200):
        spec = ("b1/pt", "t2/pt", "u2/pt", "s4/pt")[int(rng.integers(4))]
        step = int(rng.choice([1, 2, 3, 16]))
        layer, x = tiny_layer((rng.integers(-4, 5, (1, 2)) * step).tolist(), rng.integers(-40, 41, 1).tolist(), spec)
        bias, codes = layer.bias_codes(), range(x.spec.qmin, x.spec.qmax + 1)
        assert bias is not None
        a, b = layer.weight_codes()[0].tolist()
        sums = {a * u + b * v + int(bias) for u, v in itertools.product(codes, repeat=2)}
        if not kernels.can_vanish(layer, x):
            never += 1
            assert 0 not in sums
    assert never > 40


def test_a_sum_that_can_be_0_is_refused() -> None:
    gm = low(Conv("b1/pt"), rand(2, 3, 9, 8))
    layer: Any = module_of(gm, next(n for n in gm.graph.nodes if n.target == "b"))
    layer.op.bias.data.zero_()
    with pytest.raises(LoweringError, match="b: its integer sum can be 0.*multiple of its weights' codes") as e:
        OnnxQdq().lower(gm, scheme("iao_w8a8"), target("onnxruntime"))
    assert [i.node for i in e.value.issues] == ["b"]


# ---- what the proof says of damaged files


@pytest.mark.parametrize(("name", "value", "cause"), [
    ("a_q_top", np.uint8(3), "otherwise on this CPU"), ("a_q_scale", np.float32(9), "another grid"), ("a_q_zero", np.uint8(2), "another grid"),
])  # fmt: skip
def test_a_wrong_end_or_grid_is_found(name: str, value: Any, cause: str) -> None:
    x = rand(2, 3, 9, 8)
    gm = low(Conv("u4/pt"), x)
    model = onnx.load_from_string(onnx_bytes(gm))
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))
    proof = verify(gm, model.SerializeToString(), [x])
    assert not proof.ok and proof.first in ("a", "b") and cause in proof.differences[0].cause


class Halves(nn.Module):
    """A product of two readers of one value: with signed grids the runtime leaves it in float."""

    def __init__(self) -> None:
        super().__init__()
        s = "s8/pt"
        self.x_q, self.a, self.a_q, self.b, self.b_q = fq(spec=s), nn.Conv2d(3, 3, 1), fq(spec=s), nn.Conv2d(3, 3, 1), fq(spec=s)
        self.mul, self.mul_q = m.Mul(), fq(spec="u4/pt")

    def forward(self, x: Tensor) -> Tensor:
        y = self.a_q(self.a(self.x_q(x)))
        out: Tensor = self.mul_q(self.mul(self.b_q(self.b(y)), y))
        return out


def test_an_operation_that_runs_in_float_in_front_of_a_narrow_grid_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rand(2, 3, 24, 24)
    gm = low(Halves(), x, levels="int8")
    monkeypatch.setitem(kernels.KERNELS, "mul", lambda module, xs, qp: (1 + kernels.mul(module, xs, qp)).clamp(max=15))  # the product is exact in float
    proof = verify(gm, onnx_bytes(gm), [x])
    assert {d.node: d.cause for d in proof.differences}["mul"] == "the runtime did not fuse it: between its Q/DQ nodes it runs in float"


def test_hand_made_graphs_are_low_bit() -> None:
    gm = low_bit(converted(Conv("u4/pt"), rand(2, 3, 9, 8)), "dorefa2")
    layer: Any = module_of(gm, next(n for n in gm.graph.nodes if n.target == "b"))
    assert layer.weight_codes().unique().tolist() == [-96, -32, 32, 96]
