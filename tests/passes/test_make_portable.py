"""make-portable: the text it writes, the numbers it computes, what it leaves alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import numerics, verify
from fxq.graph import grids, module_of, walk
from fxq.modules import Quantized
from fxq.passes.make_portable import MakePortable, safest
from fxq.portability_pairs import at_risk, paired, unsafe
from fxq.spec import QParams, QuantSpec
from tests.helpers import context
from tests.test_portability import case


def layers(m: Any) -> dict[str, Quantized]:
    found = {str(n.target): module_of(m.graph_module, n) for n, _ in walk(m.graph_module, "conv", "linear")}
    return {k: v for k, v in found.items() if isinstance(v, Quantized)}


def grid(w: Tensor, text: str = "s8n/pc0") -> QParams:
    spec = QuantSpec.parse(text)
    rows = w.flatten(1) if spec.axis is not None else w.reshape(1, -1)
    lo, hi = rows.amin(1), rows.amax(1)
    return numerics.choose_qparams(lo, hi, spec) if spec.axis is not None else numerics.choose_qparams(lo[0], hi[0], spec)


def test_text_the_graph_stays_as_it_is_and_layers_are_swapped() -> None:
    net, data = case()
    plain = fxq.compile(net, calibration=data.split(8), progress=False)
    m = fxq.compile(net, calibration=data.split(8), progress=False, portable=True)
    assert [s.name for s in m.history][-2:] == ["convert", "make-portable"]
    before, after = layers(plain), layers(m)
    risky = [k for k, layer in before.items() if k != "d" and bool(at_risk(layer, 255).any())]
    assert risky and m.history["make-portable"].rewrites == len(risky)
    for name, layer in after.items():
        if name == "d":
            assert bool(at_risk(layer, 255).any()) and torch.equal(layer.weight_codes(), before[name].weight_codes()), "depthwise layers stay"
        else:
            assert not bool(at_risk(layer, 255).any())
        assert (layer.weight_grid.scale >= before[name].weight_grid.scale).all() and (layer.weight_grid.scale <= 2 * before[name].weight_grid.scale).all()
        source = next(n for n, _ in walk(m.graph_module, "conv", "linear") if n.target == name).all_input_nodes[0]
        bias = numerics.bias_qparams(grids(m.graph_module)[source.meta["grid"]].qparams, layer.weight_grid.qparams)  # type: ignore[arg-type]
        assert layer.bias_grid is not None and torch.equal(layer.bias_grid.scale, bias.scale)
    assert torch.equal(net.a.weight, case()[0].a.weight)


@pytest.mark.parametrize("text", ["s8n/pc0", "s8/pc0", "s8n/pt", "s8/pt"])
def test_numbers_are_safe_and_better_than_seven_bits(text: str) -> None:
    torch.manual_seed(1)
    w = torch.randn(16, 6, 3, 3)
    qp = grid(w, text)
    codes, scale = safest(w, qp, 255, [1 + i / 8 for i in range(9)])
    pairs = paired(codes.to(torch.float32))
    assert not bool(unsafe(pairs[..., 0], pairs[..., 1]).any()) and codes.shape == w.shape and codes.dtype == torch.int8 and scale.shape == qp.scale.shape
    new = QParams(qp.spec, scale, qp.zero_point)
    blanket = QParams(qp.spec, qp.scale * 2, qp.zero_point)
    error = (numerics.dequantize(codes, new) - w).square().sum()
    seven = (numerics.dequantize(numerics.quantize(w, blanket), blanket) - w).square().sum()
    best = (numerics.dequantize(numerics.quantize(w, qp), qp) - w).square().sum()
    assert best <= error < 0.8 * seven


def test_numbers_of_asymmetric_grids_are_safe() -> None:
    torch.manual_seed(1)
    w = torch.randn(16, 6, 3, 3) + 0.3
    qp = grid(w, "s8a/pt")
    codes, scale = safest(w, qp, 255, [1 + i / 8 for i in range(9)])
    pairs = paired(codes.to(torch.float32))
    real = numerics.dequantize(codes, QParams(qp.spec, scale, qp.zero_point))
    assert int(qp.zero_point) != 0 and not bool(unsafe(pairs[..., 0], pairs[..., 1]).any()) and float((real - w).abs().mean() / w.abs().mean()) < 0.05


def test_numbers_weights_that_keep_their_codes_keep_their_values() -> None:
    net, data = case()
    plain, m = (layers(fxq.compile(net, calibration=data.split(8), progress=False, portable=p)) for p in (False, True))
    for name, layer in m.items():
        weight: Any = layer.op.weight
        old: Any = plain[name].op.weight
        same = weight == old
        assert torch.equal(numerics.quantize(old, layer.weight_grid.qparams)[same], layer.weight_codes()[same])
        middle = numerics.dequantize(layer.weight_codes(), layer.weight_grid.qparams)
        assert torch.equal(weight[~same], middle[~same])


def test_leaves_alone_what_cannot_saturate() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1).expand(4, 2, 1, 1))
    data = torch.rand(8, 2, 4, 4)
    m = fxq.compile(net, calibration=data.split(4), progress=False)
    ctx = context(data)
    assert MakePortable().run(m.graph_module, ctx) == 0
    assert not list(verify.portable(m.graph_module))


def test_the_invariant_names_the_layer() -> None:
    net, data = case()
    m = fxq.compile(net, calibration=data.split(8), progress=False)
    faults = [(node.name, fault) for node, fault in verify.portable(m.graph_module)]
    assert faults[0][0] == "a" and faults[0][1].endswith("pairs of its weights can saturate")


def test_dynamic_and_per_tensor_schemes() -> None:
    net, data = case()
    m = fxq.compile(net, "dynamic_w8", example=data[:2], progress=False, portable=True)
    assert m.history["make-portable"].rewrites >= 1 and not list(verify.portable(m.graph_module)) and m.lint(portable=True).ok
