"""``benchmarks/bench_size.py``: counts and bytes come from the file, and are those that the literature states of NIN and NIN_GC."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxq
from fxq import schemes
from fxq.zoo import nin

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STATED = {"float": "2.3307", "iao_w8a8": "0.5958", "xnor_w1a1": "0.2038", "xnor_w1a32": "0.2038", "twn_wta1": "0.2724", "twn_wta32": "0.2724"}
"""MB of NIN_GC by the rule of the literature: algorithms.md, section 9."""


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_size")


@pytest.mark.parametrize("scheme", [s for s in STATED if s in schemes.names()])
def test_nin_gc(size: Any, scheme: str) -> None:
    """578,304 weights, 4,362 biases, 157.68 million multiply-accumulates and the stated sizes, from the file."""
    data = size.lowered("nin_gc", scheme)
    row = size.row(data)
    assert (row["weights"], row["biases"], row["MMAC"]) == (578_304, 4_362, "157.68")
    assert row["stated MB"] == STATED[scheme]
    assert float(row["file MB"]) == pytest.approx(len(data) / 1e6, abs=1e-4)
    least = {"xnor": 1.0, "twn_": 1.6}.get(scheme[:4])
    if least is not None:
        wide = float(row["most bits stored a weight, 128+ channels"])
        assert least < wide < 2 and row["bits"].split()[0] == row["bits"].split()[-1] == "32"


@pytest.mark.parametrize(("net", "weights", "mmac"), [("nin", 965_568, "222.49"), ("resnet20", 268_336, "40.55"), ("tiny_resnet8", 77_360, "12.50")])
def test_other_nets(size: Any, net: str, weights: int, mmac: str) -> None:
    row = size.row(size.lowered(net, "float"))
    assert (row["weights"], row["MMAC"]) == (weights, mmac) and set(row["bits"].split()) == {"32"}


def test_nin_as_the_tables_of_the_literature_count_it(size: Any) -> None:
    counts = importlib.import_module("onnx_counts")
    made = fxq.compile(nin(second=3).eval(), "float", example=torch.zeros(1, 3, 32, 32), progress=False)
    found = counts.layers(made.lower("onnx").data)
    assert sum(layer.weights for layer in found) == 670_656 and round(sum(layer.macs for layer in found) / 1e6) == 147


def model(nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray[Any, Any]], x: list[Any], y: list[Any]) -> bytes:
    tensors = [numpy_helper.from_array(v, k) for k, v in stored.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x), ("y", y))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def test_codes_are_counted_not_bytes(size: Any) -> None:
    """A convolution whose binary weight is two bits of a table; a product whose int8 weight has three levels; a float product behind them."""
    counts = importlib.import_module("onnx_counts")
    table = np.int8([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    stored = {
        "table": table, "packed": np.uint8([0, 3, 1, 2] * 3), "shape": np.int64([4, 1, 2, 3]), "scale": np.float32([1, 2, 3, 4]),
        "bias": np.zeros(4, np.float32),
        "flat": np.int64([0, -1]), "codes": np.int8([[-1, 0, 1]] * 12), "s": np.float32(0.5), "last": np.ones((5, 3), np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["packed"], ["index"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "index"], ["bits"]),
        helper.make_node("Reshape", ["bits", "shape"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w", "bias"], ["a"], name="conv", group=2),
        helper.make_node("Reshape", ["a", "flat"], ["b"]),
        helper.make_node("DequantizeLinear", ["codes", "s"], ["m"]),
        helper.make_node("MatMul", ["b", "m"], ["c"], name="product"),
        helper.make_node("Gemm", ["c", "last"], ["y"], name="last", transB=1),
    ]
    conv, product, last = counts.layers(model(nodes, stored, [1, 2, 4, 3], ["n", 5]))
    assert (conv.weights, conv.biases, conv.levels, conv.bits, conv.channels) == (24, 4, 2, 1, (2, 4))
    assert conv.macs == 4 * 3 * 1 * 6 and conv.stored == 8 + 12 + 32 + 16 and conv.scales == 16 and conv.code_bits == 8 * 52 / 24
    assert (product.weights, product.levels, product.bits, product.macs, product.stored) == (36, 3, 2, 36, 36 + 4)
    assert (last.weights, last.bits, last.macs, last.stored_bits) == (15, 32, 15, 32)
    assert counts.stated_bytes([conv, product, last]) == 24 / 8 + 16 + 36 / 4 + 60
