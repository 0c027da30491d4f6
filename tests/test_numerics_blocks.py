"""Grids with a scale for each block of a weight, and grids of 8-bit floats: vectors, properties, codes against ONNX Runtime's QuantizeLinear."""

import numpy as np
import onnxruntime as ort
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fxq import numerics
from fxq.spec import QuantSpec
from fxq.weight_ranges import weight_range
from tests.test_numerics import choose, f32, finite, grid, quick

F8 = QuantSpec.parse("f8/pt")


def test_blocks_have_a_scale_each() -> None:
    spec = QuantSpec.parse("s4/pb2x1")
    w = torch.tensor([[7.0, -3.5, 0.7, 0.1], [1.4, 0.0, -70.0, 35.0]])
    lo, hi = weight_range(w, spec)
    qp = numerics.choose_qparams(lo, hi, spec)
    assert torch.allclose(qp.scale, torch.tensor([[1.0, 0.1], [0.2, 10.0]])) and qp.scale.shape == (2, 2)
    assert numerics.quantize(w, qp).tolist() == [[7, -4, 7, 1], [7, 0, -7, 4]], "half to even"
    assert torch.equal(numerics.dequantize(numerics.quantize(w, qp), qp), numerics.fake_quantize(w, qp))
    along = QuantSpec.parse("s4/pb2x0")
    turned = numerics.choose_qparams(*weight_range(w.T.contiguous(), along), along)
    assert torch.equal(turned.scale, qp.scale.T)


def test_blocks_at_the_least_error_are_those_of_single_rows() -> None:
    spec, w = QuantSpec.parse("s4/pb16x1"), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    _, hi = weight_range(w, spec, "mse")
    rows = weight_range(w.reshape(6, 16), QuantSpec.parse("s4/pc0"), "mse")[1]
    assert torch.equal(hi.reshape(-1), rows)


def test_float8_codes_are_the_nearest_numbers_of_the_type() -> None:
    qp = grid(F8, 0.5)
    x = f32(0, 0.25, -0.53, 8.4, 8.6, 1000, -1000)
    assert numerics.dequantize(numerics.quantize(x, qp), qp).tolist() == [0, 0.25, -0.5, 8, 9, 224, -224]
    assert float(choose(-3, 2, F8).scale) == np.float32(3) / np.float32(448)


@given(st.lists(finite, min_size=1, max_size=30), st.floats(1e-3, 1e3))
@quick
def test_float8_equals_onnx_runtime(values: list[float], scale: float) -> None:
    x, qp = f32(*values), grid(F8, scale)
    y = numerics.quantize(x, qp).view(torch.uint8).numpy()
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    init = [helper.make_tensor("s", TensorProto.FLOAT, [], [float(qp.scale)]), zero]
    info = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(values)])], [helper.make_tensor_value_info("y", TensorProto.FLOAT8E4M3FN, [len(values)])]
    model = helper.make_model(helper.make_graph([node], "g", *info, init), opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    (got,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    same = (y == np.asarray(got).view(np.uint8)) | ((y & 0x7F == 0) & (np.asarray(got).view(np.uint8) & 0x7F == 0))
    assert same.all(), (values, scale)


def test_the_gradient_of_a_float8_grid_passes_where_nothing_saturates() -> None:
    x = f32(-300, -224, -1, 0, 224, 225).requires_grad_()
    numerics.fake_quantize(x, grid(F8, 0.5)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_the_search_of_an_observer_rounds_float8_alike() -> None:
    x, s = torch.linspace(-400, 400, 101), torch.tensor(0.7)
    assert torch.equal(numerics.rounded(x, s, torch.zeros(()), F8), numerics.fake_quantize(x, grid(F8, 0.7)))
