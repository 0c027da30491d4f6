"""The TensorRT lint against the real builder: every model of the zoo is built with TensorRT-RTX, on any machine.

Models without an error are put side by side into few networks, because starting the builder takes longer than building; the others are built alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest
from onnx import compose

from fxq.backends.trt_builder import BuildOptions, Built, build
from fxq.backends.trt_layers import Layer, by_node, runs
from fxq.errors import EngineError
from fxq.lint import lint
from fxq.lint_trt_report import TrtOp, TrtReport
from tests.trt_zoo.zoo import ALL

BLOCKS = "one int8 (fp8) product over all of K whose output is multiplied by as many scales as there are blocks: other numbers"
NO_ZERO = "ONNX says uint8, the builder takes int8: values above 127 steps saturate"
STRICTER = {
    "cnn uint8, 0": "the builder warns and takes the codes as int8: values above 127 steps saturate",
    "no zero point": NO_ZERO,
    "no zero point, conv": NO_ZERO,
    "float weights, no zero point": NO_ZERO,
    "zero point of DQ is uint8": "ONNX wants one type on both sides; the builder warns and goes on",
    "scale infinite": "every code is 0 and every result NaN",
    "scale denormal": "the builder multiplies by the reciprocal, which is infinite",
    "weight scale denormal": "the builder multiplies by the reciprocal, which is infinite",
    "scale by Mul is 0": "the builder checks scales of initializers only",
    "scale fp64": "ONNX wants the type of the data; the builder converts",
    "w4a8 blocks": BLOCKS,
    "w8a8 blocks": BLOCKS,
    "w8a8 blocks of columns": BLOCKS,
    "w8a8 one block of columns": BLOCKS,
    "fp8 blocks": BLOCKS,
}
"""Errors of the lint that the builder does not have, and why they are errors all the same. Nothing else may differ."""

TARGETS = ("sm86", "sm89", "sm120")
NOT_ON_SM86 = ("fp8", "fp8 conv", "nvfp4", "int8, then fp8")
"""Of the models for newer targets, those that are also built for sm86; the others fail there for the same reason."""
LARGEST = 40
"""Models in one network."""


@functools.cache
def model(name: str) -> onnx.ModelProto:
    return ALL[name].make()


@functools.cache
def report(name: str, target: str) -> TrtReport:
    found = lint(model(name), target)
    assert isinstance(found, TrtReport)
    return found


def names(target: str) -> list[str]:
    return [n for n, one in ALL.items() if one.target == target or target == "sm86" and n in NOT_ON_SM86 or target == "sm120" and one.target == "sm89"]


def built(proto: onnx.ModelProto, target: str) -> Built | str:
    """The engine, or what the builder says."""
    try:
        return build(proto.SerializeToString(), BuildOptions(capability=target))
    except EngineError as e:
        return str(e)


def alone(target: str) -> dict[str, Built | str]:
    """Models with an error, each built for itself."""
    chosen = [n for n in names(target) if not report(n, target).ok]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(chosen, pool.map(lambda n: built(model(n), target), chosen), strict=True))


def groups(target: str) -> Iterator[list[str]]:
    """Models without an error that can stand in one network: of one opset, without functions, branches, other domains and nameless nodes."""
    by_form: dict[tuple[object, ...], list[str]] = {}
    for name in names(target):
        if report(name, target).ok:
            proto = model(name)
            named = all(n.name and n.op_type != "If" for n in proto.graph.node)
            plain = named and len(proto.opset_import) == 1 and not proto.functions
            form = (proto.opset_import[0].version, proto.ir_version) if plain else (name,)
            by_form.setdefault(form, []).append(name)
    for group in by_form.values():
        for start in range(0, len(group), LARGEST):
            yield group[start : start + LARGEST]


def side_by_side(group: list[str]) -> onnx.ModelProto:
    """One network of several: names begin with the model's number."""
    if len(group) == 1:
        return model(group[0])
    whole = onnx.ModelProto()
    whole.CopyFrom(model(group[0]))
    whole.graph.Clear()
    whole.graph.name = "zoo"
    for i, name in enumerate(group):
        part = compose.add_prefix(model(name), f"{i}/")
        for field in ("node", "input", "output", "initializer", "value_info"):
            getattr(whole.graph, field).extend(getattr(part.graph, field))
    return whole


def layer_of(layers: dict[str, Layer], node: str, prefix: str) -> Layer | None:
    """The layer of a node: by its name, by its output's, or by the name that the parser gives nodes of subgraphs."""
    wanted = {prefix + node, f"node_of_{prefix}{node}"}
    return next((layer for name, layer in layers.items() if name.split(" | ")[0] in wanted), None)


def said(op: TrtOp, layer: Layer | None) -> str:
    """How the builder's table says that an operation runs, in the lint's words."""
    if layer is None:
        return "float"
    found = runs(layer)
    if found in ("int4", "int4-weights") or not layer.weighted and any(t.dtype == "int4" for t in layer.constants):
        return "int4-weights"
    return found if found in ("int8", "fp8") else "float"


def differences(layers: Iterable[Layer], name: str, target: str, prefix: str = "") -> list[str]:
    table = by_node(layers)
    truth = {op.node: said(op, layer_of(table, op.node, prefix)) for op in report(name, target).ops}
    return [f"{name}: lint says {op}; the builder: {truth[op.node]}" for op in report(name, target).ops if op.runs != truth[op.node]]


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_lint_lets_through_is_built_and_runs_as_predicted(target: str) -> None:
    seen, found = 0, []
    for group in groups(target):
        proto = side_by_side(group)
        one = built(proto, target)
        if isinstance(one, str):
            culprits = {name: text for name in group if isinstance(text := built(model(name), target), str)}
            pytest.fail(f"the lint let through what the builder rejects: {culprits or {tuple(group): one}}")
        for i, name in enumerate(group):
            found += differences(one.layers, name, target, f"{i}/" if len(group) > 1 else "")
            seen += len(report(name, target).ops)
    assert found == []
    assert seen >= 15


@pytest.mark.parametrize("target", TARGETS)
def test_errors_are_rejections_or_explained(target: str) -> None:
    strict = {name: one for name, one in alone(target).items() if isinstance(one, Built)}
    assert set(strict) == set(STRICTER) & set(names(target))
    assert [line for name, one in strict.items() for line in differences(one.layers, name, target)] == []


def test_every_explanation_is_of_a_model() -> None:
    assert set(STRICTER) | set(NOT_ON_SM86) <= set(ALL)
    assert all(STRICTER.values())
