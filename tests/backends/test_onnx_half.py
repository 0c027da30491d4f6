"""float16 between the Q/DQ nodes: scales that float16 holds, the codes chosen for them, and what does not fit."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import fxq
from fxq.backends.onnx_half import LEAST, half_scale
from fxq.errors import LoweringError

X = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions, a norm and a linear layer on three dimensions, which is written as MatMul."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(16, 32, 3)
        self.norm, self.fc, self.gelu = nn.LayerNorm(32), nn.Linear(32, 16), nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.relu(self.a(x))).flatten(2).transpose(1, 2)
        return self.gelu(self.fc(self.norm(y)))  # type: ignore[no-any-return]


def compiled(seed: int = 0) -> fxq.CompiledModel:
    torch.manual_seed(seed)
    return fxq.compile(Net().eval(), "int8", calibration=X, target="sm86", progress=False)


def test_scales_are_float16_numbers_that_are_not_below() -> None:
    s = torch.tensor([0.1, 1.0, 3e-8, 2049.0])
    h = half_scale(s, "w")
    assert h.tolist() == [float(np.nextafter(np.float16(0.1), np.float16(1))), 1.0, float(np.float16(6e-8)), 2050.0] and bool((h >= s).all())
    with pytest.raises(LoweringError, match="w: its scale 7e.04 is beyond float16"):
        half_scale(torch.tensor(7e4), "w")


def test_the_file_is_float16_inside_and_float32_outside() -> None:
    m = compiled()
    whole, half = (onnx.load_from_string(m.lower(float_dtype=d).data) for d in ("fp32", "fp16"))
    onnx.checker.check_model(half, full_check=True)
    assert [v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)] == [onnx.TensorProto.FLOAT] * 2
    floats = {t.data_type for t in half.graph.initializer if t.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)}
    assert floats == {onnx.TensorProto.FLOAT16}
    a, b = ({t.name: numpy_helper.to_array(t) for t in model.graph.initializer} for model in (whole, half))
    moved = int((a["b/weight_q"] != b["b/weight_q"]).sum())
    assert np.array_equal(b["b/weight_scale"], half_scale(torch.from_numpy(a["b/weight_scale"].copy()), "").numpy().astype(np.float16))
    assert abs(b["b/weight_q"].astype(int) - a["b/weight_q"]).max() <= 1 and moved < a["b/weight_q"].size / 20, "codes follow the rounded scale"


def test_the_file_computes_what_the_simulator_does_on_its_grids() -> None:
    m = compiled()
    proof = m.verify(m.lower(float_dtype="fp16"), [X, X[:3] * 1.3])
    assert proof.ok and proof.bound == 1e-2  # type: ignore[union-attr]
    strict = m.verify(m.lower(), [X])
    assert strict.ok and strict.bound == 1e-4  # type: ignore[union-attr]


def test_what_float16_cannot_hold_is_refused_with_its_name() -> None:
    m = compiled()
    fq = m.graph_module.get_submodule("relu_q")
    assert isinstance(fq.scale, Tensor)
    kept, fq.scale = fq.scale, torch.tensor(LEAST / 2)
    with pytest.raises(LoweringError, match=r"^relu_q: its scale 7.63e-06 is not one that float16 can divide by"):
        m.lower(float_dtype="fp16")
    assert m.lower().data, "in float32 it is fine"
    fq.scale = kept
    with torch.no_grad():
        m.graph_module.get_submodule("b.op").bias[3] = 1e5  # type: ignore[index]
    with pytest.raises(LoweringError, match=r"^b/bias: a constant of 1e\+05 is beyond float16. Keep this file in float32"):
        m.lower(float_dtype="fp16")
