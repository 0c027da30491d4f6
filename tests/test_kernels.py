"""Each integer kernel against ONNX Runtime's fused operator, on random grids: 0 elements may differ."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fxq import kernels, numerics
from fxq import modules as m
from fxq.errors import FxqError
from fxq.kernels import Codes
from fxq.numerics import bias_qparams
from fxq.spec import QParams, QuantSpec

U8, S8 = QuantSpec.parse("u8/pt"), QuantSpec.parse("s8/pt")
TYPES = {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8, torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
Rng = np.random.Generator


def fused(
    op: str,
    order: Sequence[str],
    feeds: dict[str, Tensor],
    constants: dict[str, Tensor],
    out: torch.dtype,
    threads: int = 1,
    domain: str = "com.microsoft",
    **attrs: Any,
) -> Tensor:
    """Output of one fused operator; ``order`` names its inputs ("" leaves one out)."""
    graph = helper.make_graph(
        [helper.make_node(op, list(order), ["y"], domain=domain, **attrs)],
        "g",
        [helper.make_tensor_value_info(k, TYPES[v.dtype], list(v.shape)) for k, v in feeds.items()],
        [helper.make_tensor_value_info("y", TYPES[out], None)],
        [numpy_helper.from_array(v.numpy(), k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y: Tensor = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in feeds.items()})[0])
    return y


def grid(rng: Rng, scale: float | None = None, spec: QuantSpec = U8) -> QParams:
    s = 10 ** rng.uniform(-3, 0) if scale is None else scale
    z = rng.integers(spec.qmin, spec.qmax + 1)
    return QParams(spec, torch.tensor(s, dtype=torch.float32), torch.tensor(z, dtype=torch.int32))


def zero(qp: QParams) -> Tensor:
    return qp.zero_point.to(qp.spec.dtype)


def random_codes(rng: Rng, qp: QParams, *shape: int) -> Codes:
    return Codes(torch.from_numpy(rng.integers(qp.spec.qmin, qp.spec.qmax + 1, shape)).to(qp.spec.dtype), qp)


def every_code(qp: QParams, *shape: int) -> Codes:
    return Codes(torch.arange(qp.spec.qmin, qp.spec.qmax + 1).to(qp.spec.dtype).reshape(shape), qp)


def binary(op: str, a: Codes, b: Codes, qp: QParams, threads: int = 1) -> Tensor:
    constants = dict(sa=a.qp.scale, za=zero(a.qp), sb=b.qp.scale, zb=zero(b.qp), sc=qp.scale, zc=zero(qp))
    return fused(op, ["a", "sa", "za", "b", "sb", "zb", "sc", "zc"], {"a": a.codes, "b": b.codes}, constants, qp.spec.dtype, threads)


# All pairs of codes; which operand the runtime's broadcaster takes as the scalar decides the order of roundings.
PAIRS = [((256, 1), (1, 256)), ((1, 256), (256, 1)), ((256, 1, 1), (1, 256, 1)), ((1, 256, 1), (256, 1, 1))]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_add_on_all_pairs_of_codes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for i in range(30):
        x, y = every_code(grid(rng), *a), every_code(grid(rng), *b)
        out = grid(rng, float(x.qp.scale + y.qp.scale) * rng.uniform(0.05, 1.2))
        assert torch.equal(kernels.add(nn.Identity(), [x, y], out), binary("QLinearAdd", x, y, out, 1 + i % 2))


@pytest.mark.parametrize(("a", "b", "first"), [
    ((256, 1, 1), (), True), ((256, 1, 1), (1,), True), ((256, 1, 1), (1, 1, 1), False), ((256,), (), False), ((), (256,), True),
    ((4, 64), (1,), False), ((1,), (4, 64), True), ((4, 64), (4, 1), False), ((4, 1), (4, 64), True), ((1, 1), (1, 1), True),
])  # fmt: skip
def test_add_takes_a_scalar_operand_last(a: tuple[int, ...], b: tuple[int, ...], first: bool) -> None:
    assert kernels.first_is_scalar(a, b) is first
    rng = np.random.default_rng(1)
    for _ in range(40):
        x, y = random_codes(rng, grid(rng), *a), random_codes(rng, grid(rng), *b)
        out = grid(rng, float(x.qp.scale + y.qp.scale) * rng.uniform(0.02, 1.2))
        assert torch.equal(kernels.add(nn.Identity(), [x, y], out), binary("QLinearAdd", x, y, out))


def test_the_order_of_an_add_is_observable(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operands in the written order some codes differ from the runtime's: the tests above can tell."""
    monkeypatch.setattr(kernels, "first_is_scalar", lambda a, b: False)
    rng = np.random.default_rng(0)
    off = 0
    for _ in range(30):
        x, y = every_code(grid(rng), 256, 1), every_code(grid(rng), 1, 256)
        out = grid(rng, float(x.qp.scale + y.qp.scale) * rng.uniform(0.05, 1.2))
        off += int((kernels.add(nn.Identity(), [x, y], out) != binary("QLinearAdd", x, y, out)).sum())
    assert off > 0


@pytest.mark.parametrize(("a", "b"), [PAIRS[0], PAIRS[1]])
def test_mul_on_all_pairs_of_codes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    for i in range(30):
        x, y = every_code(grid(rng), *a), every_code(grid(rng), *b)
        out = grid(rng, float(x.qp.scale * y.qp.scale) * rng.uniform(20, 400))
        assert torch.equal(kernels.mul(nn.Identity(), [x, y], out), binary("QLinearMul", x, y, out, 1 + i % 2))


@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_signed_grids_run_as_unsigned_ones(op: str) -> None:
    """The runtime turns s8 into u8 before it fuses: same reals, the roundings of the unsigned grid."""
    rng = np.random.default_rng(3)
    kernel = kernels.KERNELS[op.removeprefix("QLinear").lower()]
    for _ in range(20):
        x, y = every_code(grid(rng, spec=S8), 256, 1), every_code(grid(rng, spec=S8), 1, 256)
        wide = float(x.qp.scale + y.qp.scale) if op == "QLinearAdd" else float(x.qp.scale * y.qp.scale) * 150
        out = grid(rng, wide * rng.uniform(0.3, 1.2), S8)
        want = binary(op, kernels.in_bytes(x), kernels.in_bytes(y), numerics.in_bytes(out)).to(torch.int32) + S8.qmin
        assert torch.equal(kernel(nn.Identity(), [x, y], out).to(torch.int32), want)


@pytest.mark.parametrize("spec", [U8, S8])
def test_tables_on_all_codes(spec: QuantSpec) -> None:
    rng = np.random.default_rng(4)
    for i in range(150):
        x = every_code(grid(rng, spec=spec), 256)
        out = grid(rng, 1 / spec.qmax if i % 2 else None, spec)
        constants = dict(sx=x.qp.scale, zx=zero(x.qp), sy=out.scale, zy=zero(out))
        order = ["x", "sx", "zx", "sy", "zy"]
        got = fused("QLinearSigmoid", order, {"x": x.codes}, constants, spec.dtype)
        assert torch.equal(kernels.sigmoid(nn.Sigmoid(), [x], out), got)
        module = nn.LeakyReLU(float(rng.uniform(0, 0.5)) if i % 3 else 0.0)
        got = fused("QLinearLeakyRelu", order, {"x": x.codes}, constants, spec.dtype, alpha=module.negative_slope)
        assert torch.equal(kernels.leaky_relu(module, [x], out), got)


def test_concat_on_own_grids() -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        a, b, out = random_codes(rng, grid(rng), 2, 5, 7), random_codes(rng, grid(rng), 2, 5, 7), grid(rng)
        a = Codes(a.codes, out) if rng.random() < 0.3 else a
        constants = dict(sa=a.qp.scale, za=zero(a.qp), sb=b.qp.scale, zb=zero(b.qp), sy=out.scale, zy=zero(out))
        got = fused("QLinearConcat", ["sy", "zy", "a", "sa", "za", "b", "sb", "zb"], {"a": a.codes, "b": b.codes}, constants, torch.uint8, axis=1)
        assert torch.equal(kernels.cat(m.Cat(1), [a, b], out), got)


@pytest.mark.parametrize("last", [0, 1])
def test_global_average_pool(last: int) -> None:
    rng = np.random.default_rng(6)
    for _ in range(60):
        size = [int(v) for v in rng.integers(1, 20, 2)]
        x = random_codes(rng, grid(rng), 2, 6, *size)
        out = grid(rng, float(x.qp.scale) * rng.uniform(0.05, 1.0))
        constants = dict(sx=x.qp.scale, zx=zero(x.qp), sy=out.scale, zy=zero(out))
        feed = x.codes.movedim(1, -1).contiguous() if last else x.codes
        got = fused("QLinearGlobalAveragePool", ["x", "sx", "zx", "sy", "zy"], {"x": feed}, constants, torch.uint8, channels_last=last)
        assert torch.equal(kernels.global_avg_pool(nn.Identity(), [x], out), got.movedim(-1, 1) if last else got)


def quantized(rng: Rng, op: nn.Module, a: QParams, spec: str = "s8n/pc0") -> m.Quantized:
    """``op`` with random weights that use all codes, and a bias of the size of the sums."""
    w: Any = op.weight
    b: Any = op.bias
    s = QuantSpec.parse(spec)
    scale = torch.as_tensor(10 ** rng.uniform(-3, -1, () if s.axis is None else w.shape[s.axis]), dtype=torch.float32)
    qp = QParams(s, scale, torch.zeros_like(scale, dtype=torch.int32))
    with torch.no_grad():
        along = scale.reshape([-1] + [1] * (w.ndim - 1)) if scale.ndim else scale
        w.copy_(torch.from_numpy(rng.integers(-127, 128, w.shape)).float() * along)
        if b is not None:
            b.copy_(torch.from_numpy(rng.normal(0, 1, b.shape)).float() * float(a.scale) * scale * 3000)
    return m.Quantized(op, qp, bias_qparams(a, qp))


def weight_constants(module: m.Quantized, x: QParams, out: QParams | None) -> dict[str, Tensor]:
    qp, bias = module.weight_grid.qparams, module.bias_codes()
    parts = dict(sx=x.scale, zx=zero(x), w=module.weight_codes(), sw=qp.scale, zw=qp.zero_point.to(torch.int8))
    if out is not None:
        parts |= dict(sy=out.scale, zy=zero(out))
    return parts if bias is None else parts | dict(b=bias)


CONVS: list[tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv2d, dict(in_channels=3, out_channels=8, kernel_size=3, stride=2, padding=1), (2, 3, 11, 9)),
    (nn.Conv2d, dict(in_channels=16, out_channels=24, kernel_size=1), (2, 16, 5, 5)),
    (nn.Conv2d, dict(in_channels=8, out_channels=8, kernel_size=3, padding=1, groups=8), (2, 8, 9, 9)),
    (nn.Conv2d, dict(in_channels=8, out_channels=12, kernel_size=(1, 3), padding=(0, 2), dilation=(1, 2), groups=2), (1, 8, 6, 6)),
    (nn.Conv2d, dict(in_channels=600, out_channels=4, kernel_size=3), (1, 600, 4, 4)),
    (nn.Conv1d, dict(in_channels=6, out_channels=7, kernel_size=5, padding=2, bias=False), (2, 6, 20)),
    (nn.Conv3d, dict(in_channels=3, out_channels=5, kernel_size=3, padding=1), (1, 3, 4, 5, 6)),
]


@pytest.mark.parametrize("case", range(len(CONVS)))
def test_conv(case: int) -> None:
    cls, options, shape = CONVS[case]
    rng = np.random.default_rng(7 + case)
    for i in range(12):
        x = random_codes(rng, grid(rng), *shape)
        module = quantized(rng, cls(**options), x.qp, "s8n/pt" if i % 3 == 2 else "s8n/pc0")
        acc, scale = kernels.accumulate(module, x)
        out = grid(rng, float((acc * scale).abs().max()) / rng.uniform(60, 200))
        op: Any = module.op
        attrs = dict(pads=[*op.padding, *op.padding], strides=op.stride, dilations=op.dilation, group=op.groups)
        order = ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy", *(["b"] if op.bias is not None else [])]
        got = fused("QLinearConv", order, {"x": x.codes}, weight_constants(module, x.qp, out), torch.uint8, 1 + i % 2, "", **attrs)
        assert torch.equal(kernels.weighted(module, [x], out), got)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [7, 64, 2048])
def test_linear_with_quantized_and_float_output(width: int, bias: bool) -> None:
    rng = np.random.default_rng(width)
    for i in range(12):
        x = random_codes(rng, grid(rng), 5, width)
        module = quantized(rng, nn.Linear(width, 13, bias=bias), x.qp, "s8n/pt" if i % 3 == 2 else "s8n/pc0")
        acc, scale = kernels.accumulate(module, x)
        out = grid(rng, float((acc * scale).abs().max()) / rng.uniform(60, 200))
        rest = "b" if bias else ""
        order = ["x", "sx", "zx", "w", "sw", "zw", rest]
        got = fused("QGemm", [*order, "sy", "zy"], {"x": x.codes}, weight_constants(module, x.qp, out), torch.uint8, 1 + i % 2, transB=1)
        assert torch.equal(kernels.weighted(module, [x], out), got)
        got = fused("QGemm", order, {"x": x.codes}, weight_constants(module, x.qp, None), torch.float32, 1 + i % 2, transB=1)
        assert torch.equal(kernels.float_output(module, [x]), got)


@pytest.mark.parametrize("depth", [5, 64, 600])
def test_matmul_with_quantized_and_float_output(depth: int) -> None:
    rng = np.random.default_rng(depth)
    for i in range(12):
        a, b = random_codes(rng, grid(rng), 2, 3, 6, depth), random_codes(rng, grid(rng), 2, 3, depth, 7)
        acc, scale = kernels.products(a, b)
        out = grid(rng, float((acc * scale).abs().max()) / rng.uniform(60, 200))
        feeds = {"a": a.codes, "b": b.codes}
        constants = dict(sa=a.qp.scale, za=zero(a.qp), sb=b.qp.scale, zb=zero(b.qp))
        order = ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"]
        got = fused("QLinearMatMul", order, feeds, constants | dict(sy=out.scale, zy=zero(out)), torch.uint8, 1 + i % 2, "")
        assert torch.equal(kernels.matmul(m.MatMul(), [a, b], out), got)
        got = fused("MatMulIntegerToFloat", ["a", "b", "sa", "sb", "za", "zb"], feeds, constants, torch.float32, 1 + i % 2)
        assert torch.equal(kernels.float_output(m.MatMul(), [a, b]), got)


def test_movers_keep_codes() -> None:
    rng = np.random.default_rng(8)
    x = random_codes(rng, grid(rng), 2, 4, 6, 6)
    assert torch.equal(kernels.move(nn.MaxPool2d(3, 2, 1), [x], x.qp), torch.nn.functional.max_pool2d(x.codes.float(), 3, 2, 1).to(torch.uint8))
    assert torch.equal(kernels.move(m.Permute((0, 2, 3, 1)), [x], x.qp), x.codes.permute(0, 2, 3, 1))
    assert torch.equal(kernels.move(m.Resize(None, (2.0, 2.0), "nearest"), [x], x.qp), x.codes.repeat_interleave(2, 2).repeat_interleave(2, 3))
    padded = kernels.pad(m.Pad((1, 0)), [x], x.qp)
    assert bool((padded[..., 0] == zero(x.qp)).all()) and torch.equal(padded[..., 1:], x.codes)
    assert torch.equal(kernels.pad(m.Pad((1, 0), "replicate"), [Codes(x.codes[0], x.qp)], x.qp)[..., 0], x.codes[0][..., 0])
    assert torch.equal(kernels.part(m.Split((1, 3), 1), 1, x, x.qp), x.codes[:, 1:])
    wider = grid(rng)
    assert torch.equal(kernels.move(m.Slice(((1, 1, None, 2),)), [x], wider), Codes(x.codes[:, 1::2], x.qp).onto(wider))


def test_int32_overflow_is_refused() -> None:
    op = nn.Linear(70000, 1, bias=False)
    qp = QParams(QuantSpec.parse("s8n/pt"), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
    nn.init.constant_(op.weight, 127.0)
    x = Codes(torch.zeros(1, 70000, dtype=torch.uint8), QParams(U8, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)))
    with pytest.raises(FxqError, match="beyond int32"):
        kernels.accumulate(m.Quantized(op, qp), x)


def test_reduced_matmul_precision_does_not_reach_the_sums() -> None:
    rng = np.random.default_rng(9)
    x = random_codes(rng, grid(rng), 4, 200)
    module = quantized(rng, nn.Linear(200, 30), x.qp)
    want, _ = kernels.accumulate(module, x)
    torch.set_float32_matmul_precision("medium")
    try:
        got, _ = kernels.accumulate(module, x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got, want)
