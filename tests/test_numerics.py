"""Golden vectors of the affine grid, and codes against ONNX Runtime's QuantizeLinear."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq import numerics
from fxq.errors import CalibrationError
from fxq.spec import QParams, QuantSpec

U8, S8N = QuantSpec.parse("u8/pt"), QuantSpec.parse("s8n/pt")


def grid(spec: QuantSpec, s: float, z: int = 0) -> QParams:
    return QParams(spec, torch.tensor(s, dtype=torch.float32), torch.tensor(z, dtype=torch.int32))


@pytest.mark.parametrize(
    ("lo", "hi", "x", "codes"),
    [(-1, 4, [-1, 0, 1, 4], [0, 51, 102, 255]), (2, 4, [0, 2, 4], [0, 127, 255]), (-4, -2, [-4, -2, 0], [0, 128, 255])],
)
def test_unsigned_vectors(lo: float, hi: float, x: list[float], codes: list[int]) -> None:
    qp = numerics.choose_qparams(torch.tensor(float(lo)), torch.tensor(float(hi)), U8)
    assert numerics.quantize(torch.tensor(x, dtype=torch.float32), qp).tolist() == codes


def test_round_half_to_even_then_zero_point() -> None:
    assert numerics.quantize(torch.tensor([0.5, 1.5, 2.5]), grid(U8, 1.0, 1)).tolist() == [1, 3, 3]
    assert numerics.quantize(torch.tensor([-127, 62.5, 63.5, -0.5, 0.49999997]), grid(S8N, 1.0)).tolist() == [-127, 62, 64, 0, 0]


def test_narrow_per_channel() -> None:
    w = torch.tensor([[1, -2], [0.5, 0.25]])
    qp = numerics.choose_qparams(w.amin(1), w.amax(1), QuantSpec.parse("s8n/pc0"))
    assert numerics.quantize(w, qp).tolist() == [[64, -127], [127, 64]]


def test_gradient_mask_includes_the_bounds() -> None:
    x = torch.tensor([-4.5, -4.25, -4, 0.25, 0.75, 3.5, 3.7, 3.75], requires_grad=True)
    y = numerics.fake_quantize(x, grid(QuantSpec.parse("s4/pt"), 0.5))
    y.sum().backward()
    assert (y / 0.5).tolist() == [-8, -8, -8, 0, 2, 7, 7, 7]
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_constant_zero_dead_channel_and_nan() -> None:
    assert float(numerics.choose_qparams(torch.tensor(0.0), torch.tensor(0.0), U8).scale) == 1.0
    w = torch.tensor([0.0, 2.0, 1.0])
    assert numerics.choose_qparams(-w, w, QuantSpec.parse("s8n/pc0")).scale[0] == torch.tensor(2.0) / 127
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        numerics.choose_qparams(torch.tensor(float("nan")), torch.tensor(1.0), U8)


@given(st.floats(-(2.0**99), 2.0**99, width=32), st.floats(-(2.0**99), 2.0**99, width=32))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_zero_is_a_code(a: float, b: float) -> None:
    qp = numerics.choose_qparams(torch.tensor(min(a, b)), torch.tensor(max(a, b)), U8)
    assert int(numerics.quantize(torch.tensor(0.0), qp)) == int(qp.zero_point)


def _runtime(scale: float, zero: int) -> ort.InferenceSession:
    h = onnx.helper
    graph = h.make_graph(
        [h.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])],
        "g",
        [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])],
        [h.make_tensor_value_info("y", onnx.TensorProto.UINT8, ["n"])],
        [onnx.numpy_helper.from_array(np.array(scale, np.float32), "s"), onnx.numpy_helper.from_array(np.array(zero, np.uint8), "z")],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_codes_equal_onnxruntime_with_planted_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scale, zero = np.float32(10 ** rng.uniform(-4, 1)), int(rng.integers(256))
        x = rng.normal(0, 100 * scale, 20000).astype(np.float32)
        ties = ((rng.integers(-200, 200, 4000) + 0.5) * scale).astype(np.float32)
        x = np.concatenate([x, ties])
        want = _runtime(float(scale), zero).run(None, {"x": x})[0]
        got = numerics.quantize(torch.from_numpy(x), grid(U8, float(scale), zero)).numpy()
        assert int((got != want).sum()) == 0
