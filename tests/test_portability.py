"""Pair sums in 16 bits: equal to ONNX Runtime's kernels for CPUs without VNNI, found in models and files, gone with ``portable=True``."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import fxq
from fxq import portability, portability_lint
from fxq.errors import CalibrationError, SchemeError, TargetError
from fxq.kernels import Codes
from fxq.portability_pairs import GREATEST_SUM, LEAST_SUM, depthwise, limits, made_safe, paired, unpaired, unsafe, worst
from fxq.spec import QParams, QuantSpec

AVX2: dict[str, tuple[tuple[int, ...], list[int], list[int]]] = {
    "three channels": ((4, 3, 1, 3, 4), [158, 141, 147, 148, 143, 149, 142, 137, 133, 143, 138, 150, 145, 144, 146, 134],
                       [158, 143, 144, 154, 146, 156, 145, 144, 128, 137, 144, 150, 144, 146, 152, 138]),
    "groups": ((4, 8, 2, 1, 2), [154, 156, 154, 154, 140, 136, 139, 136, 118, 118, 112, 114, 134, 136, 135, 129],
               [154, 156, 154, 154, 140, 136, 139, 136, 118, 114, 111, 111, 134, 136, 135, 129]),
    "depthwise": ((4, 4, 4, 3, 4), [160, 159, 159, 149, 131, 133, 131, 130, 122, 120, 125, 122, 153, 151, 157, 157],
                  [160, 159, 159, 149, 131, 133, 131, 130, 122, 120, 125, 122, 153, 151, 157, 157]),
    "one position": ((16, 4, 1, 1, 1), [154, 135, 115, 139, 114, 128, 138, 130, 147, 143, 122, 126, 113, 155, 139, 114],
                     [154, 135, 114, 139, 114, 128, 138, 130, 147, 143, 122, 126, 113, 155, 139, 114]),
}  # fmt: skip
"""``(out, in, groups, kernel, size)``: codes that QLinearConv of ONNX Runtime 1.31.1 gives on an AVX2 CPU (as valgrind 3.19 emulates one), and here."""


def bytes_grid(zero: int = 0) -> QParams:
    return QParams(QuantSpec.parse("u8/pt"), torch.tensor(1.0), torch.tensor(zero, dtype=torch.int32))


def risk_of(codes: Tensor) -> tuple[Tensor, Tensor]:
    pairs = paired(codes.to(torch.int32))
    return pairs, unsafe(pairs[..., 0], pairs[..., 1])


@pytest.mark.parametrize("name", AVX2)
def test_emulation_equals_the_kernels_for_cpus_without_vnni(name: str) -> None:
    (out, channels, groups, k, size), there, here = AVX2[name]
    random = np.random.default_rng(7)
    w = torch.from_numpy(random.integers(-127, 128, (out, channels // groups, k, k)).astype(np.int8))
    x = torch.from_numpy(random.integers(128, 256, (1, channels, size, size)).astype(np.uint8))
    conv = nn.Conv2d(channels, out, k, groups=groups, bias=False)
    exact = nn.functional.conv2d(x.double() - 3, w.double(), groups=groups)
    if depthwise(tuple(w.shape), groups):
        lost = torch.zeros_like(exact)
    else:
        found, count = portability.excess(conv, *risk_of(w), Codes(x, bytes_grid(3)))
        lost = found.movedim(0, 1)
        assert count > 0
    for acc, wanted in ((exact - lost, there), (exact, here)):
        assert (torch.round(acc / 2048) + 128).clamp(0, 255).flatten().tolist() == wanted


def test_matrix_products_equal_those_kernels() -> None:
    random = np.random.default_rng(7)
    b = torch.from_numpy(random.integers(-127, 128, (7, 3)).astype(np.int8))
    a = torch.from_numpy(random.integers(128, 256, (2, 7)).astype(np.uint8))
    lost, _ = portability.excess(nn.Linear(7, 3), *risk_of(b.T), Codes(a, bytes_grid()))
    assert (a.long() @ b.long() - lost.T).tolist() == [[50321, -49018, 56461], [50199, -49758, 56398]]


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (nn.Conv2d(5, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False), (2, 5, 9, 8)),
        (nn.Conv1d(6, 4, 5, padding=2, groups=2, bias=False), (3, 6, 11)),
        (nn.Conv3d(3, 4, 2, stride=2, bias=False), (2, 3, 4, 6, 5)),
        (nn.Linear(9, 5, bias=False), (2, 3, 9)),
    ],
)
def test_every_position_is_multiplied_with_its_own_codes(op: Any, shape: tuple[int, ...]) -> None:
    """Columns times weights, pair by pair, sum up to the exact convolution when nothing is cut off."""
    g = torch.Generator().manual_seed(0)
    x = Codes(torch.randint(0, 256, shape, generator=g, dtype=torch.uint8), bytes_grid(7))
    w = torch.randint(-127, 128, op.weight.shape, generator=g)
    column, size = portability._columns(op, x)
    pairs, groups = paired(w), getattr(op, "groups", 1)
    rows = []
    for o in range(len(w)):
        total = torch.zeros(size, dtype=torch.int64)
        for p in range(pairs.shape[1]):
            total += column(2 * p, o * groups // len(w)) * pairs[o, p, 0] + column(2 * p + 1, o * groups // len(w)) * pairs[o, p, 1]
        rows.append(total)
    centred = x.codes.double() - 7
    exact = nn.functional.linear(centred, w.double()) if isinstance(op, nn.Linear) else op._conv_forward(centred, w.double(), None)
    offset = 7 * w.flatten(1).sum(1)
    axis = -1 if isinstance(op, nn.Linear) else 1
    assert torch.equal(torch.stack(rows) - offset.reshape([-1] + [1] * len(size)), exact.movedim(axis, 0).long())


@example(64, 64, 255)
@example(64, 65, 255)
@example(-64, -64, 255)
@example(-65, -64, 255)
@settings(max_examples=50, deadline=None)
@given(st.integers(-128, 127), st.integers(-128, 127), st.sampled_from([255, 200, 127, 15, 1]))
def test_unsafe_is_what_some_codes_saturate(a: int, b: int, most: int) -> None:
    first, second = torch.tensor([float(a)]), torch.tensor([float(b)])
    sums = [i * a + j * b for i in (0, most) for j in (0, most)]
    assert bool(unsafe(first, second, most)) == (min(sums) < LEAST_SUM or max(sums) > GREATEST_SUM)
    assert worst(torch.tensor([[[a, b]]]), most) in sums
    reals = (first + 0.4).clamp(-128, 127), (second - 0.4).clamp(-128, 127)
    made_safe(first, second, reals, unsafe(first, second, most), most)
    assert not bool(unsafe(first, second, most)) and min(int(first), int(second)) >= -128 and max(int(first), int(second)) <= 127
    assert abs(float(first) - a) <= 65 and abs(float(second) - b) <= 65 and limits(255) == (-128, 128)


def test_pairs_run_through_the_channels_first() -> None:
    w = torch.arange(2 * 3 * 1 * 2).reshape(2, 3, 1, 2)
    assert paired(w)[0].tolist() == [[0, 2], [4, 1], [3, 5]]
    odd = torch.arange(2 * 3 * 3).reshape(2, 3, 3)
    assert paired(odd).shape == (2, 5, 2) and paired(odd)[1, -1].tolist() == [17, 0]
    assert torch.equal(unpaired(paired(odd), (2, 3, 3)), odd) and torch.equal(unpaired(paired(w), (2, 3, 1, 2)), w)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 3, stride=2), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.b(nn.functional.relu(self.d(nn.functional.relu(self.a(x))))))
        return self.c(x.mean((2, 3)))


def case() -> tuple[nn.Module, Tensor]:
    """Weights of one sign and bright images, so that pairs do saturate."""
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.a.weight.copy_(net.a.weight.abs() * torch.tensor([1.0, -1.0]).repeat(4).reshape(8, 1, 1, 1))
    return net, torch.rand(24, 3, 16, 16) ** 0.2 * 2 - 0.2


def test_a_model_without_vnni_and_a_portable_one() -> None:
    net, data = case()
    m = fxq.compile(net, calibration=data.split(8), progress=False)
    report = portability.check(m, data.split(8))
    first = report.layers[0]
    assert [layer.layer for layer in report.layers] == ["a", "b", "c"], "the depthwise layer adds no pairs"
    assert not report.ok and report.samples == 24 and 0 < first.saturated < first.sums and first.greatest_code == 255 and 0 < first.sqnr < 60
    assert 0 < report.sqnr < 60 and first.sums == 24 * 16 * 16 * 8 * 14 and abs(first.worst) > GREATEST_SUM
    assert not torch.equal(portability.PairSums(m)(data), m.reference(data))
    assert "pair sums saturate on 24 samples" in str(report) and "  a: " in str(report)
    body = json.loads(report.to_json())
    assert body["saturated"] == report.saturated and body["layers"][0]["sqnr"] == first.sqnr and "noise" not in body["layers"][0]

    p = fxq.compile(net, calibration=data.split(8), progress=False, portable=True)
    safe = portability.check(p, data.split(8))
    assert safe.ok and safe.saturated == 0 and math.isinf(safe.sqnr) and json.loads(safe.to_json())["sqnr"] is None
    assert torch.equal(portability.PairSums(p)(data), p.reference(data)) and "no pair of their weights" in str(safe)
    assert p.verify(p.lower(), data.split(8)).ok
    assert p.lint(portable=True).ok and not m.lint(portable=True).ok


def test_the_lint_of_the_file_says_what_the_model_says() -> None:
    net, data = case()
    m = fxq.compile(net, calibration=data.split(8), progress=False)
    layers = portability.PairSums(m).layers.values()
    found = m.lint(portable=True)
    assert {f.node: (f.pairs, f.pairs_at_risk, f.channels_at_risk, f.worst) for f in found.findings} == {
        layer.layer: (layer.pairs, layer.pairs_at_risk, layer.channels_at_risk, layer.worst) for layer in layers if layer.pairs_at_risk
    }
    assert found.safe == sum(not layer.pairs_at_risk for layer in layers) + 1 and found.unread == ()  # the depthwise layer is safe as well
    assert "Conv a: " in str(found) and str(found).endswith(portability_lint.WAY_OUT) and json.loads(found.to_json())["findings"][0]["way_out"]


def product(op: str, w: Any, kind: int = TensorProto.UINT8, **attrs: Any) -> onnx.ModelProto:
    """One operation on codes as another tool's file has it."""
    tensors = {"w": w, "one": np.float32(1), "zero": np.uint8(0), "wz": np.zeros((), np.asarray(w).dtype)}
    names = {"QLinearConv": ["x", "one", "zero", "w", "one", "wz", "one", "zero"], "MatMulInteger": ["x", "w"], "ConvInteger": ["x", "w"],
             "QLinearMatMul": ["x", "one", "zero", "w", "one", "wz", "one", "zero"]}[op]  # fmt: skip
    init = [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items() if n in names]
    out = helper.make_tensor_value_info("y", TensorProto.INT32 if "Integer" in op else TensorProto.UINT8, None)
    x = helper.make_tensor_value_info("x", kind, [1, 4] if "MatMul" in op else [1, 4, 3, 3])
    graph = helper.make_graph([helper.make_node(op, names, ["y"], name="n", **attrs)], "g", [x], [out], init)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_files_of_other_tools() -> None:
    heavy = np.full((4, 4, 1, 1), 100, np.int8)
    (found,) = portability_lint.check(product("QLinearConv", heavy)).findings
    assert (found.channels, found.channels_at_risk, found.pairs, found.pairs_at_risk, found.worst, found.most) == (4, 4, 8, 8, 51000, 255)
    columns = np.array([[100, 1], [100, 100], [-100, 1], [1, 100]], np.int8)
    for op in ("MatMulInteger", "QLinearMatMul"):
        (found,) = portability_lint.check(product(op, columns)).findings
        assert (found.channels, found.channels_at_risk, found.pairs, found.pairs_at_risk, found.worst) == (2, 1, 4, 1, 51000)
    assert portability_lint.check(product("QLinearConv", heavy[:, :1], group=4)).ok, "depthwise"
    assert portability_lint.check(product("ConvInteger", heavy)).ok and portability_lint.check(product("ConvInteger", heavy)).safe == 0
    assert portability_lint.check(product("QLinearConv", np.full((4, 4, 1, 1), 200, np.uint8))).ok, "unsigned weights run another kernel"
    assert portability_lint.check(product("QLinearConv", np.full((4, 4, 1, 1), 64, np.int8))).ok, "7 bits"


def test_a_clip_of_the_codes_counts() -> None:
    model = product("QLinearConv", np.full((4, 4, 1, 1), 100, np.int8))
    clip = helper.make_node("Clip", ["x", "least", "most"], ["clipped"])
    model.graph.node.insert(0, clip)
    model.graph.node[1].input[0] = "clipped"
    model.graph.initializer.extend([numpy_helper.from_array(np.uint8(v), n) for n, v in (("least", 0), ("most", 150))])
    assert portability_lint.check(model).ok
    numbers = next(t for t in model.graph.initializer if t.name == "most")
    numbers.CopyFrom(numpy_helper.from_array(np.uint8(180), "most"))
    (found,) = portability_lint.check(model).findings
    assert found.most == 180 and found.worst == 36000


def test_weights_that_are_not_in_the_file() -> None:
    model = product("QLinearConv", np.full((4, 4, 1, 1), 100, np.int8))
    weight = next(t for t in model.graph.initializer if t.name == "w")
    model.graph.initializer.remove(weight)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.INT8, [4, 4, 1, 1]))
    report = portability_lint.check(model)
    assert report.unread == ("n",) and not report.ok and "no constant of the file" in str(report)


def test_a_model_after_training_is_made_portable() -> None:
    net, data = case()
    q = fxq.compile(net, calibration=data.split(8), progress=False, mode="qat")
    m = q.convert()
    p = portability.portable(m)
    assert not portability.check(m, data).ok and portability.check(p, data).ok
    assert [s.name for s in p.history][-1] == "make-portable" and p.history["make-portable"].rewrites > 0
    assert p.verify(p.lower(), data.split(8)).ok
    x = data[:4]
    assert torch.equal(m(x), q.convert()(x)), "the given model stays as it was"


def test_refusals() -> None:
    net, data = case()
    with pytest.raises(TargetError, match="adds products of integers in 32 bits"):
        fxq.compile(net, "int8", calibration=data, target="tensorrt", portable=True, progress=False)
    with pytest.raises(SchemeError, match="multiplies no integers"):
        fxq.compile(net, "weight_only_w8", example=data[:2], portable=True, progress=False)
    with pytest.raises(SchemeError, match="made portable after training"):
        fxq.compile(net, calibration=data, mode="qat", portable=True, progress=False)
    dynamic = fxq.compile(net, "dynamic_w8", example=data[:2], progress=False)
    with pytest.raises(SchemeError, match="rounds activations while it runs"):
        portability.check(dynamic, data)
    m = fxq.compile(net, calibration=data.split(8), progress=False)
    with pytest.raises(CalibrationError, match="the data to check with is empty"):
        portability.check(m, [])
