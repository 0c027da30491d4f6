"""Repairs for ONNX Runtime: outputs with optimizations off stay equal (or within the bound said), and the runtime then runs the node in integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fxq.backends.onnxruntime import run, session
from fxq.lint import lint, runtime_report
from fxq.lint_fix import fix
from tests.lint_zoo import GROUPS, Graph

Make = Callable[[], onnx.ModelProto]


def outputs(model: onnx.ModelProto, level: str = "off") -> list[Any]:
    opened = session(model.SerializeToString(), level)
    random = np.random.default_rng(1)
    return run(opened, {v.name: random.normal(0, 2, [n if isinstance(n, int) else 2 for n in v.shape]).astype(np.float32) for v in opened.get_inputs()})


def floats(model: onnx.ModelProto) -> list[str]:
    """Operators that the runtime runs in float."""
    return sorted(o.op for o in runtime_report(model).ops if o.runs == "float")


def conv(g: Graph, x: str, grid: str = "u8", seed: int = 0) -> str:
    return str(g.op("Conv", x, g.weight(8, 8, 3, 3, seed=seed), pads=[1, 1, 1, 1]))


def branch() -> onnx.ModelProto:
    """Signed codes that a conv and an Add read."""
    g = Graph()
    x = g.qdq(g.input(2, 8, 6, 6), "s8")
    a = g.q(g.op("Relu", conv(g, x)), "s8z", 0.05)
    y = g.op("Add", g.qdq(conv(g, g.dq(a, "s8z", 0.05), seed=1), "s8", 0.2), g.dq(a, "s8z", 0.05))
    return g.model(g.qdq(y, "s8", 0.2))


def constant_operand() -> onnx.ModelProto:
    g = Graph()
    c = g.op("DequantizeLinear", g.const(np.arange(-4, 4, dtype=np.int8).reshape(8, 1, 1)), *g.grid("s8", 0.1, True))
    return g.model(g.qdq(g.op("Add", g.qdq(g.input(2, 8, 6, 6)), c)))


def gemm_without_zero() -> onnx.ModelProto:
    g = Graph()
    w = g.weight(4, 8, zero=False)
    return g.model(g.op("Gemm", g.qdq(g.input(2, 8)), w, transB=1))


def clip_on(zero: int, kind: str = "Relu", behind: float = 0.1) -> Make:
    """conv, Q, DQ, clip, Q: the grid in front begins at ``zero``."""

    def make() -> onnx.ModelProto:
        g = Graph()
        grid = [g.const(np.float32(0.02)), g.const(np.uint8(zero))]
        y = g.op("DequantizeLinear", g.op("QuantizeLinear", conv(g, g.qdq(g.input(2, 8, 6, 6))), *grid), *grid)
        bounds = [g.const(np.float32(0)), g.const(np.float32(6))] if kind == "Clip" else []
        return g.model(g.qdq(g.op(kind, y, *bounds), "u8", behind))

    return make


def mean(keepdims: int, axes: tuple[int, ...] = (2, 3)) -> Make:
    def make() -> onnx.ModelProto:
        g = Graph()
        y = g.op("ReduceMean", g.qdq(conv(g, g.qdq(g.input(2, 8, 6, 6))), "u8", 0.05), axes=list(axes), keepdims=keepdims)
        return g.model(g.qdq(y, "u8", 0.05))

    return make


def batch_norm(zero_factor: bool = False) -> Make:
    def make() -> onnx.ModelProto:
        g = Graph()
        random = np.random.default_rng(3)
        gamma = random.uniform(-1, 1, 8).astype(np.float32)
        if zero_factor:
            gamma[2] = 0
        values = [gamma, random.normal(size=8), random.normal(size=8), random.uniform(0.5, 2, 8)]
        x = g.qdq(conv(g, g.qdq(g.input(2, 8, 6, 6))), "u8", 0.05)
        return g.model(g.qdq(g.op("BatchNormalization", x, *(g.const(np.asarray(v, np.float32)) for v in values)), "u8", 0.05))

    return make


def gemm_bias(beta: float = 1.0, whole: bool = False) -> Make:
    def make() -> onnx.ModelProto:
        g = Graph()
        w = g.weight(4, 8)
        values = np.array([0.5, -0.25, 0, 1], np.float32) * (8 if whole else 1.37)
        if whole:
            scale = numpy_helper.to_array(next(t for t in g.constants if t.name == g.nodes[-1].input[1])) * np.float32(0.1)
            values = (values * scale).astype(np.float32)
        attrs = {"beta": beta} if beta != 1.0 else {}
        return g.model(g.op("Gemm", g.qdq(g.input(2, 8)), w, g.const(values), transB=1, **attrs))

    return make


def linear_3d() -> onnx.ModelProto:
    g = Graph()
    product = g.op("MatMul", g.qdq(g.input(2, 5, 8)), g.weight(8, 4, axis=1))
    return g.model(g.op("Add", product, g.const(np.linspace(-1, 1, 4).astype(np.float32))))


REPAIRS: dict[str, tuple[Make, str, bool]] = {
    "branch": (branch, "int8 codes written as uint8", True), "constant operand": (constant_operand, "constant int8 codes written as uint8", True),
    "gemm without zero point": (gemm_without_zero, "zero point 0 written", True), "idle relu": (clip_on(0), "Relu", True),
    "idle clip": (clip_on(0, "Clip"), "Clip", True), "relu between grids": (clip_on(40), "LeakyRelu", True),
    "mean": (mean(1), "GlobalAveragePool", False), "mean without ones": (mean(0), "GlobalAveragePool", False),
    "batch norm": (batch_norm(), "depthwise Conv", False), "gemm bias": (gemm_bias(), "float bias written as int32", False),
    "gemm bias times beta": (gemm_bias(0.5), "float bias written as int32", False), "linear 3d": (linear_3d, "float bias written as int32", False),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRS)
def test_repairs_keep_the_numbers_and_the_runtime_runs_integers(name: str) -> None:
    make, what, exact = REPAIRS[name]
    model = make()
    before = floats(model)
    assert before
    fixed, lines = fix(model)
    done = [line for line in lines if what in line]
    assert done and all(("(exact)" in line) == exact for line in done)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(fixed, strict_mode=True), full_check=True)
    assert floats(fixed) == [] == [o.op for o in lint(fixed).ops if o.runs == "float"], lines
    for a, b in zip(outputs(model), outputs(fixed), strict=True):
        if exact:
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
        else:
            assert a.shape == b.shape and np.abs(a - b).max() <= (0.05 + 1e-6 if "bias" not in name and "linear" not in name else 1e-3) and np.ptp(a) > 0.2


def test_an_exact_bias_says_so_and_moves_nothing() -> None:
    model = gemm_bias(whole=True)()
    fixed, lines = fix(model)
    assert len(lines) == 1 and lines[0].endswith("float bias written as int32 (exact)")
    assert all(a.tobytes() == b.tobytes() for a, b in zip(outputs(model), outputs(fixed), strict=True))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (batch_norm(zero_factor=True), "a channel has the factor 0"),
        (mean(1, (1, 2, 3)), "it is no mean over all positions of a channel"),
    ],
)
def test_what_is_left_has_a_reason(make: Make, why: str) -> None:
    model = make()
    fixed, lines = fix(model)
    assert fixed is model and len(lines) == 1 and lines[0].startswith("not repaired: ") and why in lines[0]


def test_signed_codes_that_leave_the_graph_stay() -> None:
    g = Graph()
    q = g.q(g.input(2, 8), "s8")
    model = g.model(g.dq(q, "s8"), q)
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT8
    fixed, lines = fix(model)
    assert fixed is model and "leave the graph" in lines[0]


def test_a_clip_that_cuts_the_grid_stays() -> None:
    g = Graph()
    grid = [g.const(np.float32(0.1)), g.const(np.uint8(0))]
    y = g.op("DequantizeLinear", g.op("QuantizeLinear", g.input(2, 8), *grid), *grid)
    model = g.model(g.qdq(g.op("Clip", y, g.const(np.float32(0)), g.const(np.float32(6)))))
    assert fix(model)[0] is model


def test_a_good_file_is_given_back_and_the_given_one_is_not_changed() -> None:
    g = Graph()
    good = g.model(g.qdq(conv(g, g.qdq(g.input(2, 8, 6, 6)))))
    assert fix(good) == (good, [])
    model = branch()
    before = model.SerializeToString()
    fix(model)
    assert model.SerializeToString() == before


def test_old_files_squeeze_by_attribute() -> None:
    g = Graph(opset=11)
    y = g.op("ReduceMean", g.qdq(g.input(2, 8, 6, 6), "u8", 0.05), axes=[2, 3], keepdims=0)
    fixed, lines = fix(g.model(g.qdq(y, "u8", 0.05)))
    squeeze = next(n for n in fixed.graph.node if n.op_type == "Squeeze")
    assert len(squeeze.input) == 1 and helper.get_attribute_value(squeeze.attribute[0]) == [2, 3] and len(lines) == 1


def test_repairs_are_done_once_keep_what_else_is_in_the_file_and_never_cost_an_integer_node() -> None:
    repaired = 0
    for build in [build for cases in GROUPS.values() for _, build in cases()][::9]:
        model = build()
        model.doc_string, model.graph.doc_string = "of a tool", "a graph"
        model.metadata_props.add(key="author", value="tool")
        once, notes = fix(model)
        if once is model:
            continue
        repaired += 1
        again, left = fix(once)
        assert again is once and all(line.startswith("not repaired") for line in left), notes
        assert (once.doc_string, once.graph.doc_string, once.metadata_props[0].value) == ("of a tool", "a graph", "tool")
        assert once.graph.input == model.graph.input and once.graph.output == model.graph.output
        assert sum(o.runs == "float" for o in lint(once).ops) <= sum(o.runs == "float" for o in lint(model).ops)
        onnx.shape_inference.infer_shapes(once, strict_mode=True)
    assert repaired > 10
