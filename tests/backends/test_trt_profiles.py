"""Optimization profiles are checked against the file before anything is built."""

import importlib.util
from pathlib import Path
from typing import Any

import onnx
import pytest

from fxq.backends.trt_builder import BuildOptions, build
from fxq.backends.trt_profiles import Input, inputs, profiles
from fxq.errors import EngineError

_spec: Any = importlib.util.spec_from_file_location("trt_models", Path(__file__).parent / "trt_models.py")
m: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(m)

FOUND = {"x": Input((-1, 3, -1), ("N", "", "T")), "y": Input((-1, 4), ("N", "")), "z": Input((2, 5), ("", ""))}
X, Y = [(1, 3, 7), (2, 3, 8), (4, 3, 9)], [(1, 4), (1, 4), (2, 4)]


def test_inputs_of_a_file() -> None:
    assert inputs(m.two_inputs()) == {"a": Input((-1, 16, 32), ("N", "", "")), "b": Input((-1, 32, 16), ("N", "", ""))}
    model = m.loaded(m.conv_relu(4))
    model.graph.input.append(onnx.helper.make_tensor_value_info("c0", onnx.TensorProto.FLOAT, []))  # a constant that is listed as an input, as old files do
    assert set(inputs(model.SerializeToString())) == {"x"}
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    assert inputs(model.SerializeToString())["x"] == Input((-1, 16, 8, 8), ("",) * 4)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(EngineError, match="input 'x': its rank is unknown. Export the model with a shape"):
        inputs(model.SerializeToString())


def test_default_is_1_8_32_in_every_dynamic_dimension() -> None:
    assert profiles(FOUND, {}) == {"x": ((1, 3, 1), (8, 3, 8), (32, 3, 32)), "y": ((1, 4), (8, 4), (32, 4))}


def test_given_profiles_stay_as_they_are() -> None:
    assert profiles(FOUND, {"x": X, "y": Y}) == {"x": tuple(X), "y": tuple(Y)}
    assert profiles(FOUND, {"x": X, "y": Y, "z": [[2, 5]] * 3}) == {"x": tuple(X), "y": tuple(Y)}


@pytest.mark.parametrize(
    ("given", "where", "fact", "way_out"),
    [
        ({"xx": X}, "input 'xx'", "a profile is given for it, and the file has no such input", "did you mean 'x'?"),
        ({"x": X}, "input 'y'", "its shape -1x4 is dynamic and it has no profile", "Give least, best and greatest shapes for it too"),
        ({"x": X[:2], "y": Y}, "input 'x'", "a profile is three shapes", "Give least, best and greatest shapes"),
        ({"x": 3, "y": Y}, "input 'x'", "a profile is three shapes", "Give least, best and greatest shapes"),
        ({"x": X, "y": [(1,), (1, 4), (2, 4)]}, "input 'y'", "the profile's shape 1 has 1 dimensions, the input -1x4 has 2", "Give all sizes"),
        ({"x": X, "y": [(1, 5), (1, 5), (2, 5)]}, "input 'y'", "the profile's shape 1x5 changes fixed sizes of -1x4", "Change only sizes that are dynamic"),
        ({"x": X, "y": Y, "z": [(1, 5), (2, 5), (3, 5)]}, "input 'z'", "the profile's shape 1x5 changes fixed sizes of 2x5", "Change only sizes"),
        ({"x": X, "y": [(2, 4), (1, 4), (2, 4)]}, "input 'y'", "least 2x4 <= best 1x4 <= greatest 2x4 does not hold", "Put the three shapes in order"),
        ({"x": X, "y": [(1, 4), (3, 4), (2, 4)]}, "input 'y'", "least 1x4 <= best 3x4 <= greatest 2x4 does not hold", "Put the three shapes in order"),
        ({"x": X, "y": [(0, 4), (1, 4), (2, 4)]}, "input 'y'", "the profile's shape 0x4 does not consist of positive numbers", "Give positive integers"),
        ({"x": X, "y": [(True, 4), (1, 4), (2, 4)]}, "input 'y'", "does not consist of positive numbers", "Give positive integers"),
        ({"x": X, "y": [(1.0, 4), (1, 4), (2, 4)]}, "input 'y'", "does not consist of positive numbers", "Give positive integers"),
        ({"x": X, "y": [(5, 4), (5, 4), (6, 4)]}, "input 'y'", "'N' goes from 5 to 6, that of input 'x' from 1 to 4", "give them ranges that meet"),
        ({"x": [(3, 3, 7), (3, 3, 8), (4, 3, 9)], "y": Y}, "input 'y'", "'N' goes from 1 to 2, that of input 'x' from 3 to 4", "give them ranges that meet"),
    ],
)
def test_profiles_that_do_not_fit(given: Any, where: str, fact: str, way_out: str) -> None:
    with pytest.raises(EngineError) as e:
        profiles(FOUND, given)
    assert e.value.where == where
    assert fact in e.value.fact
    assert e.value.way_out is not None and way_out in e.value.way_out


def test_dimensions_without_a_name_are_free() -> None:
    found = {"a": Input((-1,), ("",)), "b": Input((-1,), ("",))}
    assert profiles(found, {"a": [(1,), (1,), (2,)], "b": [(3,), (3,), (4,)]}) == {"a": ((1,), (1,), (2,)), "b": ((3,), (3,), (4,))}


def test_ranges_of_one_name_that_meet_are_built_and_others_tensorrt_refuses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    meet = {"a": [(1, 16, 32), (2, 16, 32), (4, 16, 32)], "b": [(4, 32, 16), (4, 32, 16), (8, 32, 16)]}
    options = BuildOptions("sm86", meet, package="tensorrt_rtx")
    assert set(build(m.two_inputs(), options).profiles) == {"a", "b"}
    apart = BuildOptions("sm86", meet | {"b": [(5, 32, 16), (5, 32, 16), (8, 32, 16)]}, package="tensorrt_rtx")
    with pytest.raises(EngineError, match="input 'b': its dimension 'N' goes from 5 to 8"):
        build(m.two_inputs(), apart)
    monkeypatch.setattr("fxq.backends.trt_profiles._agree", lambda *_: None)
    with pytest.raises(EngineError, match="contradictory IOptimizationProfile"):
        build(m.two_inputs(), apart)


def test_no_profile_reaches_tensorrt_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a child was started"))
    with pytest.raises(EngineError, match="input 'x': least"):
        build(m.conv_relu(), BuildOptions("sm86", {"x": [(2, 16, 8, 8), (1, 16, 8, 8), (4, 16, 8, 8)]}, package="tensorrt_rtx"))
