"""Each float emitter of the ONNX writer against torch, on two batch sizes."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq import modules as m
from fxq.backends.onnx_qdq import EMITTERS
from fxq.convolutions import padded

_spec: Any = importlib.util.spec_from_file_location("onnx_tools", Path(__file__).parents[1] / "onnx_tools.py")
t: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(t)
lower, same, rand, h = t.lower, t.same, t.rand, t.h


class One(nn.Module):
    """A single canonical module on one or two inputs, or with a scalar."""

    def __init__(self, op: nn.Module, *scalars: Any, first: bool = False) -> None:
        super().__init__()
        self.op, self.scalars, self.first = op, scalars, first


class On1(One):
    def forward(self, x: Tensor) -> Any:
        return self.op(*self.scalars, x) if self.first else self.op(x, *self.scalars)


class On2(One):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.op(a, b)


IMAGE, LINE, CUBE, ROWS, TOKENS = (2, 4, 9, 7), (2, 4, 11), (2, 4, 5, 6, 4), (2, 6), (2, 5, 6)
UNARY: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3, 2, "valid"), LINE),
    (nn.Conv1d(4, 6, 4, padding="same", dilation=2), LINE),
    (nn.Conv2d(4, 6, 3, 2, (1, 0), groups=2), IMAGE),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False), IMAGE),
    (nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular"), IMAGE),
    (nn.Conv2d(4, 4, 3, padding=(2, 0), padding_mode="replicate"), IMAGE),
    (nn.Conv3d(4, 2, 3, dilation=(1, 2, 1), padding=1), CUBE),
    (padded(nn.Conv2d(4, 6, 3, 2), (0, 1, 2, 0)), IMAGE),
    (padded(nn.Conv1d(4, 6, 3), (2, 1)), LINE),
    (padded(nn.Conv3d(4, 2, 3), (0, 1, 1, 2, 2, 0)), CUBE),
    (nn.ConvTranspose1d(4, 3, 3, 2, 1, 1), LINE),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), IMAGE),
    (nn.ConvTranspose3d(4, 2, 2, 2, bias=False), CUBE),
    (nn.Linear(6, 3), ROWS),
    (nn.Linear(6, 3, bias=False), TOKENS),
    (nn.Linear(7, 3), IMAGE),
    (nn.BatchNorm1d(6), ROWS),
    (nn.BatchNorm1d(4), LINE),
    (nn.BatchNorm2d(4, affine=False), IMAGE),
    (nn.BatchNorm3d(4), CUBE),
    (nn.BatchNorm1d(6, track_running_stats=False), ROWS),
    (nn.LayerNorm(6), TOKENS),
    (nn.LayerNorm((9, 7), bias=False), IMAGE),
    (nn.LayerNorm(6, elementwise_affine=False), TOKENS),
    (nn.GroupNorm(2, 4), IMAGE),
    (nn.GroupNorm(2, 6, affine=False), ROWS),
    (nn.GroupNorm(2, 4), LINE),
    (nn.InstanceNorm1d(4), LINE),
    (nn.InstanceNorm2d(4, affine=True), IMAGE),
    (nn.InstanceNorm3d(4), CUBE),
    (nn.InstanceNorm2d(4, track_running_stats=True), IMAGE),
    (nn.ReLU(), ROWS),
    (m.Clamp(0.0, 6.0), ROWS),
    (m.Clamp(None, 0.3), ROWS),
    (m.Clamp(-0.2, None), ROWS),
    (nn.LeakyReLU(0.2), ROWS),
    (nn.PReLU(), IMAGE),
    (nn.PReLU(4), IMAGE),
    (nn.PReLU(6), ROWS),
    (nn.ELU(0.7), ROWS),
    (nn.SELU(), ROWS),
    (nn.Sigmoid(), ROWS),
    (nn.Hardsigmoid(), ROWS),
    (nn.Hardswish(), ROWS),
    (nn.SiLU(), ROWS),
    (nn.Mish(), ROWS),
    (nn.Tanh(), ROWS),
    (nn.GELU(), ROWS),
    (nn.GELU("tanh"), ROWS),
    (nn.Softplus(), ROWS),
    (nn.Softplus(2.5, 4), ROWS),
    (nn.Softmax(-1), TOKENS),
    (nn.Softmax(1), TOKENS),
    (nn.LogSoftmax(1), ROWS),
    (nn.MaxPool1d(3, 2), LINE),
    (nn.MaxPool2d(3, 2, 1), IMAGE),
    (nn.MaxPool2d(3, 2, ceil_mode=True), IMAGE),
    (nn.MaxPool2d(3, 2, 1, dilation=2), IMAGE),
    (nn.MaxPool2d(2, 2, ceil_mode=True), IMAGE),
    (nn.MaxPool3d(2), CUBE),
    (nn.AvgPool1d(3, 2, 1), LINE),
    (nn.AvgPool2d(3, 2, 1), IMAGE),
    (nn.AvgPool3d(2), CUBE),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    (nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), IMAGE),
    (nn.AvgPool2d(4, 3, 1, True, True), IMAGE),
    (nn.AvgPool2d(3, 2, (1, 0), count_include_pad=False), IMAGE),
    (nn.AvgPool2d(3, 2, 1, divisor_override=5), IMAGE),
    (nn.AvgPool2d(2, 2, 0, True, True, 3), IMAGE),
    (nn.AdaptiveAvgPool1d(3), LINE),
    (nn.AdaptiveAvgPool2d((2, None)), IMAGE),
    (nn.AdaptiveAvgPool2d(12), IMAGE),
    (nn.AdaptiveAvgPool3d((2, 4, 3)), CUBE),
    (nn.AdaptiveMaxPool2d((4, 3)), IMAGE),
    (nn.AdaptiveMaxPool2d((12, 1)), IMAGE),
    (nn.PixelShuffle(2), (2, 8, 3, 5)),
    (m.Reshape((None, -1, 7)), IMAGE),
    (m.Reshape((-1, 252)), IMAGE),
    (m.Expand((-1, 3, 6)), (2, 1, 6)),
    (m.Permute((0, 2, 3, 1)), IMAGE),
    (m.Slice([(1, 1, 3, 1), (2, 0, None, 2)]), IMAGE),
    (m.Slice([]), IMAGE),
    (m.IndexSelect(1, [3, 0, 2, 1]), IMAGE),
    (m.Pad((1, 2)), IMAGE),
    (m.Pad((1, 2, 0, 3), "constant", -1.5), IMAGE),
    (m.Pad((0, 0, 0, 0, 2, 2)), IMAGE),
    (m.Pad((-1, 2)), IMAGE),
    (m.Pad((1, 2, 3, 0), "reflect"), IMAGE),
    (m.Pad((1, 2, 3, 0), "replicate"), IMAGE),
    (m.Pad((1, 2, 3, 0), "circular"), IMAGE),
    (m.Mean((2, 3)), IMAGE),
    (m.Mean((1,), True), TOKENS),
    (m.Sum((1, 2)), TOKENS),
    (m.GlobalAvgPool(), IMAGE),
    (m.GlobalAvgPool(), LINE),
    *[
        (m.Unary(fn), ROWS)
        for fn in ("abs", "ceil", "cos", "erf", "exp", "floor", "neg", "reciprocal", "round", "sign", "sin", "square", "sqrt", "rsqrt", "log", "isnan")
    ],
    (m.Power(2.0), ROWS),
    (m.Power(3), ROWS),
    (m.Power(0.5), ROWS),
]
RESIZES = [
    m.Resize(None, (2.0, 2.0), "nearest"),
    m.Resize((13, 5), None, "nearest"),
    m.Resize((20, 3), None, "nearest-exact"),
    m.Resize(None, (1.7, 0.6), "nearest"),
    m.Resize((18, 14), None, "bilinear", False),
    m.Resize((13, 5), None, "bilinear", True),
    m.Resize(None, (1.7, 2.0), "bilinear", False),
    m.Resize((4, 3), None, "bilinear", False),
    m.Resize((18, 14), None, "bicubic", False),
    m.Resize((18, 14), None, "bicubic", True),
]


@pytest.mark.parametrize("op,sizes", UNARY, ids=lambda v: str(v).replace(" ", "") if isinstance(v, nn.Module) else "x".join(map(str, v)))
def test_float_form_equals_torch(op: nn.Module, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    same(On1(op), rand(*sizes))


@pytest.mark.parametrize("op", RESIZES, ids=str)
def test_resize_equals_torch(op: nn.Module) -> None:
    same(On1(op), rand(*IMAGE))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_picks_torchs_neighbours_for_any_size(mode: str) -> None:
    """Among them sizes where the runtime's own float32 arithmetic picks others (6 -> 10 and 14, 16 by 1.2): these become Gathers."""
    ops = Counter[str]()
    for size, wanted in [(6, 10), (6, 14), (6, 5), (6, 7), (2, 82), (7, 14), (9, 4), (13, 29), (11, 11), (5, 64), (38, 61), (20, 33)]:
        ops.update(same(On1(m.Resize((wanted, size), None, mode)), rand(1, 2, size, wanted)).info["ops"])
    for size, scale in [(16, 1.2), (16, 2.3), (17, 0.3), (17, 0.6), (18, 2.9), (18, 2.4), (7, 3.0), (12, 0.5)]:
        ops.update(same(On1(m.Resize(None, (scale, 1.0), mode)), rand(1, 2, size, 3)).info["ops"])
    assert ops["Gather"] > 0 and ops["Resize"] > 0


def test_resize_of_other_ranks() -> None:
    same(On1(m.Resize((17,), None, "linear", False)), rand(*LINE))
    same(On1(m.Resize((7, 9, 8), None, "trilinear", True)), rand(*CUBE))
    same(On1(m.Resize((7, 9, 8), None, "nearest")), rand(*CUBE))


@pytest.mark.parametrize("op", [m.Add(), m.Sub(), m.Mul(), m.Div()], ids=str)
def test_arithmetic_with_tensors_and_scalars(op: nn.Module) -> None:
    same(On2(op), rand(2, 4, 5, 6), rand(2, 1, 5, 1))
    same(On1(op, 3), rand(2, 6))
    same(On1(op, 0.7, first=True), rand(2, 6))


def test_matrix_products_concat_embedding() -> None:
    same(On2(m.MatMul()), rand(2, 3, 4, 5), rand(2, 3, 5, 6))
    same(On2(m.Cat(1)), rand(2, 3, 4), rand(2, 5, 4))
    same(On1(nn.Embedding(10, 4, padding_idx=0)), torch.tensor([[1, 0, 9], [2, 2, 3]]))
    same(On1(m.Add(), 3), torch.tensor([[1, 2], [3, 4]]))


def test_every_kind_has_an_emitter() -> None:
    kinds = set(m.KINDS.values()) - {"fake_quantize"}
    assert kinds <= set(EMITTERS)
    tested = {m.kind_of(op) for op, _ in UNARY} | {"resize", "add", "sub", "mul", "div", "matmul", "cat", "embedding", "split"}
    assert kinds <= tested
