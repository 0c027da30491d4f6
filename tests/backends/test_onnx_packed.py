"""Low-bit weights in the file: every code comes back, the file is smaller, and ONNX Runtime runs it as int8."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from fxq import numerics
from fxq.backends import onnx_packed as p
from fxq.backends.onnx_qdq import OnnxQdq
from fxq.backends.onnxruntime import run, session
from fxq.exposed import constant
from fxq.graph import kind, module_of, swap_module
from fxq.lint import agrees, lint, optimize, runtime_report
from fxq.modules import WEIGHTED, Quantized
from fxq.proof import verify
from fxq.schemes import get as scheme
from fxq.spec import QParams, QuantSpec
from fxq.targets import get as target
from tests.converted import converted, fq, onnx_bytes
from tests.lowbit_graphs import LEVELS, Conv, low, low_bit, set_codes

BITS = {"binary": 1.1, "ternary": 1.8, "dorefa2": 2.1, "dorefa4": 4.1, "int4": 4.1, "int8": 8.1}


def rand(*sizes: int, seed: int = 3) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def drawn(values: Any, *shape: int, seed: int = 0) -> Any:
    return np.array(values, np.int8)[np.random.default_rng(seed).integers(0, len(values), shape)]


def expanded(codes: Any, stored: p.Stored) -> tuple[onnx.ModelProto, int]:
    """A file of one weight, and how many bytes it takes without its table."""
    tensors, nodes = p.filled("w", codes, stored, "tables/x")
    size = sum(t.ByteSize() for t in tensors)
    if stored.form is not None:
        tensors.append(numpy_helper.from_array(p.table(stored.values, stored.form), "tables/x"))
    graph = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("w_q", TensorProto.INT8, codes.shape)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model, size


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pack_and_unpack_are_inverse(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(p.FORMS))
    values = sorted(data.draw(st.sets(st.integers(-128, 127), min_size=1, max_size=form.base)))
    codes = np.array(data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=70)), np.int8)
    packed = p.pack(codes, values, form)
    assert packed.dtype == np.uint8 and packed.shape == (-(-codes.size // form.digits),)
    assert np.array_equal(p.unpack(packed, values, form, codes.size), codes)
    if form.divides:
        assert np.array_equal(p.unpack(packed, values, form.halves, codes.size), codes)


@pytest.mark.parametrize("form", [*p.FORMS, *(f.halves for f in p.FORMS if f.divides), None], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (7, 5, 3), (1, 1), (3, 11), (2, 3, 1, 2, 5)])
def test_every_form_expands_to_the_codes(form: p.Form | None, shape: tuple[int, ...]) -> None:
    """In ONNX Runtime and in onnx's reference implementation."""
    values = tuple(range(-8, 8)) if form is None else tuple(sorted(np.random.default_rng(1).choice(256, form.base, False) - 128))
    codes = drawn(values, *shape)
    model, _ = expanded(codes, p.Stored(form, tuple(int(v) for v in values)))
    for got in (session(model.SerializeToString()).run(None, {})[0], ReferenceEvaluator(model).run(None, {})[0]):
        assert got.dtype == np.int8 and np.array_equal(got, codes)


def test_golden_bytes() -> None:
    assert p.pack(np.array([-64, 64, 64, -64, -64, -64, -64, 64, 64], np.int8), (-64, 64), p.BIT).tolist() == [0b10000110, 1]
    assert p.pack(np.array([-1, 0, 1, 1, 0, 1], np.int8), (-1, 0, 1), p.TRIT).tolist() == [0 + 1 * 3 + 2 * 9 + 2 * 27 + 1 * 81, 2]
    assert p.pack(np.array([-3, -1, 1, 3, 3], np.int8), (-3, -1, 1, 3), p.CRUMB).tolist() == [0b11100100, 3]
    assert p.table((-64, 64), p.BIT.halves)[5].tolist() == [64, -64, 64, -64]
    assert p.table((-1, 0, 1), p.TRIT)[5].tolist() == [1, 0, -1, -1, -1]
    with pytest.raises(ValueError, match="not among the values"):
        p.pack(np.array([3], np.int8), (-1, 1), p.BIT)


def test_levels() -> None:
    assert p.levels(np.array([[-128, 127], [5, 5]], np.int8)) == (-128, 5, 127)
    assert p.levels(np.arange(16, dtype=np.int8)) == tuple(range(16)) and p.levels(np.arange(17, dtype=np.int8)) == ()
    assert p.levels(np.zeros((0, 3), np.int8)) == ()
    late = np.zeros(p.CHUNK + 1, np.int8)
    late[-1] = 9
    assert p.levels(late) == (0, 9)


@pytest.mark.parametrize(("name", "form"), [
    ("binary", p.BIT), ("ternary", p.TRIT), ("dorefa2", p.CRUMB), ("dorefa4", p.HALF), ("int4", None), ("wide", p.HALF),
])  # fmt: skip
def test_the_form_follows_the_number_of_codes(name: str, form: p.Form | None) -> None:
    codes = drawn(LEVELS[name], 512, 300, 3, 3)
    stored = p.choose({"a/weight": codes})["a/weight"]
    assert stored == p.Stored(form, tuple(LEVELS[name]))
    _, size = expanded(codes, stored)
    assert size * 8 / codes.size < {"binary": 1.01, "ternary": 1.61, "dorefa2": 2.01}.get(name, 4.01)


def test_a_form_is_taken_only_when_the_file_gets_smaller() -> None:
    def stored(name: str, n: int, **more: Any) -> p.Stored | None:
        return p.choose({"a/weight": drawn(LEVELS[name], n), **more}).get("a/weight")

    assert stored("binary", 100) is None and stored("int8", 100_000) is None and stored("int4", 60) is None
    assert stored("binary", 600) == p.Stored(p.BIT.halves, (-64, 64)) and stored("binary", 2_000_000) == p.Stored(p.BIT, (-64, 64))
    assert stored("ternary", 1000) == p.Stored(p.CRUMB.halves, (-64, 0, 64)) and stored("ternary", 5000) == p.Stored(p.TRIT, (-64, 0, 64))
    more = {f"{i}/weight": drawn(LEVELS["ternary"], 1000) for i in range(9)}  # together their table pays
    assert stored("ternary", 1000, **more) == p.Stored(p.TRIT, (-64, 0, 64))
    assert stored("dorefa4", 300) is None and stored("dorefa4", 1000) == p.Stored(p.HALF.halves, tuple(LEVELS["dorefa4"]))


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("n", [300, 1000, 5000, 40_000])
def test_the_estimate_is_what_the_file_takes(name: str, n: int) -> None:
    codes = drawn(LEVELS[name], n)
    stored = p.choose({"w": codes}).get("w")
    plain = numpy_helper.from_array(codes, "w_q").ByteSize()
    if stored is not None:
        model, size = expanded(codes, stored)
        assert size + sum(node.ByteSize() for node in model.graph.node) + stored.table_bytes < plain
        assert abs(plain - size - sum(node.ByteSize() for node in model.graph.node) - p._saved("w", codes, stored)) < 40


def test_weights_with_a_part_of_the_codes_share_the_table() -> None:
    few = drawn(LEVELS["dorefa4"][3:], 20, 60, 3, 3)
    chosen = p.choose({"a/weight": drawn(LEVELS["dorefa4"], 128, 64, 3, 3), "b/weight": few})
    assert chosen["b/weight"] == chosen["a/weight"] == p.Stored(p.HALF, tuple(LEVELS["dorefa4"]))
    assert np.array_equal(constant(expanded(few, chosen["b/weight"])[0], "w_q"), few)


# ---- in whole files


class Two(nn.Module):
    """Two layers of 128 channels behind a small one."""

    def __init__(self, spec: str = "u4/pt") -> None:
        super().__init__()
        self.x_q, self.a, self.a_q = fq(), nn.Conv2d(3, 128, 1), fq(spec=spec)
        self.b, self.b_q = nn.Conv2d(128, 128, 3, padding=1), fq(spec=spec)
        self.c, self.c_q = nn.Conv2d(128, 128, 3, padding=1, bias=False), fq()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_q(self.c(self.b_q(self.b(self.a_q(self.a(self.x_q(x)))))))
        return out


@pytest.mark.parametrize(("name", "spec"), [*((n, "u4/pt") for n in BITS), *((n, "b1/pt") for n in ("binary", "ternary", "dorefa2", "dorefa4"))])
def test_bits_a_weight_in_the_file(name: str, spec: str) -> None:
    """With scales, zero points and tables; ONNX Runtime folds it all to the int8 kernels, and the proof holds."""
    x = rand(1, 3, 6, 5)
    gm = low(Two(spec), x, levels=name)
    data = onnx_bytes(gm)
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    size = sum(t.ByteSize() for t in model.graph.initializer if t.name.startswith(("b/weight", "c/weight", "tables/")))
    assert size * 8 / (2 * 128 * 128 * 9) <= BITS[name]
    assert len([t for t in model.graph.initializer if t.name.startswith("tables/")]) == (0 if name in ("int4", "int8") else 1)
    assert verify(gm, data, [x]).exact
    ops = Counter(n.op_type for n in optimize(model).graph.node)
    assert ops["QLinearConv"] == 3 and not {"Gather", "Cast", "Slice", "Reshape", "Conv"} & set(ops)
    assert agrees(lint(data), runtime_report(data)) == [] and {o.runs for o in lint(data).ops} == {"int8"}
    codes: Any = module_of(gm, next(n for n in gm.graph.nodes if n.target == "b"))
    assert np.array_equal(constant(model, "b/weight_q"), codes.weight_codes().numpy())


def test_random_layers_in_every_form() -> None:
    for i, name in enumerate(("binary", "ternary", "dorefa2", "dorefa4", "int4", "wide")):
        x = rand(2, 3, 9, 8)
        for options in ({"in_channels": 19, "out_channels": 35}, {"in_channels": 24, "out_channels": 42, "groups": 2, "stride": 2}):
            gm = low(Conv("u8/pt", **options, padding=1), x, levels=name)
            data = onnx_bytes(gm)
            assert any(n.output[0] == "b/weight_q" for n in onnx.load_from_string(data).graph.node), name
            assert verify(gm, data, [x, rand(2, 3, 9, 8, seed=i)]).exact


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.x_q, self.a, self.a_q, self.b, self.b_q = fq(), nn.Linear(64, 64), fq(), nn.Linear(64, 64), fq()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b_q(self.b(self.a_q(self.a(self.x_q(x)))))
        return out


def test_equal_weights_are_held_once() -> None:
    gm = low(Tied(), rand(4, 64))
    a, b = (module_of(gm, n) for n in gm.graph.nodes if n.target in ("a", "b"))
    assert isinstance(a, Quantized) and isinstance(b, Quantized)
    set_codes(b, a.weight_codes())
    data = onnx_bytes(gm)
    assert [t.name for t in onnx.load_from_string(data).graph.initializer if t.name.endswith("_packed")] == ["a/weight_packed"]
    assert verify(gm, data, [rand(4, 64)]).exact


def test_tables_of_different_codes_have_names_of_their_own() -> None:
    gm = low(Two(), rand(1, 3, 6, 5))
    layer: Any = module_of(gm, next(n for n in gm.graph.nodes if n.target == "b"))
    set_codes(layer, layer.weight_codes().to(torch.int32) // 2)
    model = onnx.load_from_string(onnx_bytes(gm))
    tables = {t.name: sorted(set(numpy_helper.to_array(t).reshape(-1).tolist())) for t in model.graph.initializer if t.name.startswith("tables/")}
    assert tables == {"tables/1bit": [-64, 64], "tables/1bit_1": [-32, 32]}
    assert verify(gm, model.SerializeToString(), [rand(1, 3, 6, 5)]).ok


def test_an_older_opset_is_raised_for_half_bytes() -> None:
    gm = low(Two(), rand(1, 3, 6, 5))
    old = replace(target("onnxruntime"), opset=17, ir_version=8)
    model = onnx.load_from_string(OnnxQdq().lower(gm, scheme("iao_w8a8"), old).data)
    assert (model.opset_import[0].version, model.ir_version) == (21, 10)
    plain = low(Two(), rand(1, 3, 6, 5), levels="int8")
    assert onnx.load_from_string(OnnxQdq().lower(plain, scheme("iao_w8a8"), old).data).opset_import[0].version == 17


def test_the_proof_names_another_weight_in_a_packed_file() -> None:
    x = rand(1, 3, 6, 5)
    gm = low(Two(), x)
    model = onnx.load_from_string(onnx_bytes(gm))
    (tensor,) = (t for t in model.graph.initializer if t.name == "b/weight_packed")
    tensor.raw_data = bytes(v ^ 255 for v in tensor.raw_data[:64]) + tensor.raw_data[64:]
    proof = verify(gm, model.SerializeToString(), [x])
    assert not proof.ok and (proof.first, proof.differences[0].cause) == ("b", "the file holds another weight")


# ---- float activations


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(16, 40, 3, 2, 1), (2, 16, 9, 8)),
    "grouped": (lambda: nn.Conv2d(32, 64, 3, padding=1, groups=2, bias=False), (2, 32, 9, 8)),
    "1d": (lambda: nn.Conv1d(24, 30, 5, dilation=2), (2, 24, 20)),
    "3d": (lambda: nn.Conv3d(8, 24, 3), (2, 8, 5, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(24, 20, 3, 2, 1, 1), (2, 24, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(24, 20, 7, groups=2), (2, 24, 9)),
    "linear": (lambda: nn.Linear(64, 48), (4, 64)),
    "linear 3d": (lambda: nn.Linear(65, 47, bias=False), (4, 3, 65)),
}


def weight_only(layer: nn.Module, x: Tensor, name: str) -> Any:
    """A net of one layer with float activations; one channel's weights are all the least code, one scale is the least normal number."""
    gm = converted(nn.Sequential(layer), x)
    (node,) = (n for n in gm.graph.nodes if kind(gm, n) in WEIGHTED)
    op: Any = module_of(gm, node)
    axis = 1 if "Transpose" in type(op).__name__ else 0
    n = op.weight.shape[axis]
    scale = torch.linspace(0.001, 0.1, n)
    scale[1] = torch.finfo(torch.float32).tiny
    node.meta["integer"] = False
    swap_module(gm, node, Quantized(op, QParams(QuantSpec.parse(f"s8n/pc{axis}"), scale, torch.zeros(n, dtype=torch.int32))))
    low_bit(gm, name)
    module: Any = module_of(gm, node)
    codes = module.weight_codes()
    codes.select(axis, 2).fill_(LEVELS[name][0])
    set_codes(module, codes)
    return gm


@pytest.mark.parametrize("name", ["binary", "ternary", "dorefa2"])
@pytest.mark.parametrize("layer", LAYERS)
def test_float_activations_with_low_bit_weights(layer: str, name: str) -> None:
    make, sizes = LAYERS[layer]
    torch.manual_seed(0)
    x = rand(*sizes)
    gm = weight_only(make(), x, name)
    data = onnx_bytes(gm)
    model = onnx.load_from_string(data)
    assert any(t.name == "0/weight_packed" for t in model.graph.initializer)
    (got,) = run(session(data), {"input": x} if "input" in {i.name for i in model.graph.input} else {model.graph.input[0].name: x})
    with torch.no_grad():
        want = gm(x)
    assert float((torch.from_numpy(got) - want).abs().max() / want.abs().max()) < 1e-6
    ops = {n.op_type for n in optimize(model).graph.node}
    assert not {"Gather", "Cast", "Mul", "DequantizeLinear", "MatMulNBits", "Slice"} & ops and ops & {"Conv", "ConvTranspose", "Gemm"}
    assert agrees(lint(data), runtime_report(data)) == []
    folded: Any = constant(model, "0/weight")
    layer_module: Any = module_of(gm, next(n for n in gm.graph.nodes if n.target == "0"))
    assert np.array_equal(folded, numerics.dequantize(layer_module.weight_codes(), layer_module.weight_grid.qparams).numpy())
    assert verify(gm, data, [x]).ok


def test_weight_only_layers_with_more_codes_stay_as_they_were() -> None:
    gm = weight_only(nn.Linear(128, 64), rand(4, 128), "int4")
    assert [o.kernel for o in lint(onnx_bytes(gm)).ops if o.op == "MatMul"] == ["MatMulNBits"]
