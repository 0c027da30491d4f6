"""The grid as data: text form, codes, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.errors import SchemeError
from fxq.spec import QParams, QuantSpec

TEXTS = ["u8/pt", "s8n/pc0", "s8a/pc0", "s4n/pc1", "t2/pc0", "b1/pc0", "u8y/pt", "c5/pt", "s8na/pt", "u1/pt", "s32n/pc0", "u16/pt"]
TEXTS += ["s4/pb128x1", "s4n/pb32x0", "f8/pt", "f8/pc0"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_form_round_trips(text: str) -> None:
    assert str(QuantSpec.parse(text)) == text


@given(st.integers(2, 32), st.booleans(), st.booleans(), st.booleans(), st.none() | st.integers(0, 4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_affine_grid_round_trips(bits: int, signed: bool, narrow: bool, symmetric: bool, axis: int | None) -> None:
    spec = QuantSpec(bits, signed, narrow and signed, symmetric, axis)
    assert QuantSpec.parse(str(spec)) == spec
    assert spec.qmax - spec.qmin == (1 << bits) - 1 - spec.narrow


@pytest.mark.parametrize(("text", "qmin", "qmax", "dtype"), [
    ("u8/pt", 0, 255, torch.uint8), ("s8/pt", -128, 127, torch.int8), ("s8n/pc0", -127, 127, torch.int8), ("s4n/pc0", -7, 7, torch.int8),
    ("u4/pt", 0, 15, torch.uint8), ("u1/pt", 0, 1, torch.uint8), ("b1/pc0", -1, 1, torch.int8), ("t2/pc0", -1, 1, torch.int8),
    ("s16/pt", -(2**15), 2**15 - 1, torch.int16), ("u16/pt", 0, 2**16 - 1, torch.int32), ("s32n/pt", 1 - 2**31, 2**31 - 1, torch.int32),
    ("s4/pb64x1", -8, 7, torch.int8), ("f8/pc0", -448, 448, torch.float8_e4m3fn),
])  # fmt: skip
def test_codes(text: str, qmin: int, qmax: int, dtype: torch.dtype) -> None:
    spec = QuantSpec.parse(text)
    assert (spec.qmin, spec.qmax, spec.dtype) == (qmin, qmax, dtype)
    info = torch.finfo(spec.dtype) if spec.dtype.is_floating_point else torch.iinfo(spec.dtype)
    assert info.min <= qmin and qmax <= info.max


def test_per_tensor_keeps_the_codes() -> None:
    assert str(QuantSpec.parse("s8n/pc0").per_tensor()) == "s8n/pt" and str(QuantSpec.parse("s4/pb64x1").per_tensor()) == "s4/pt"


@pytest.mark.parametrize(("arguments", "fact"), [
    ((0, False), "0 bits does not exist"), ((33, True), "33 bits does not exist"), ((8, False, True), "narrow grid must be signed"),
    ((8, True, False, False, None, "fuzzy"), "unknown kind of grid 'fuzzy'"), ((1, True, True), "no positive code"),
    ((1, True, False, True), "no positive code"), ((8, False, False, True, None, "float8"), "a float8 grid is 8 bits, signed and symmetric"),
    ((4, True, False, True, None, "affine", 64), "at least 2 elements and an axis"), ((4, True, False, True, 1, "affine", 1), "at least 2 elements"),
])  # fmt: skip
def test_grids_that_do_not_exist(arguments: tuple[object, ...], fact: str) -> None:
    with pytest.raises(SchemeError, match=fact):
        QuantSpec(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["x9", "u8", "u8/pc", "s8n", "8/pt", "u8/pt ", "", "u8n/pt"])
def test_text_that_is_no_grid(text: str) -> None:
    with pytest.raises(SchemeError, match="Write it like|must be signed"):
        QuantSpec.parse(text)


def params(text: str, scale: object, zero: object, dtype: torch.dtype = torch.float32, kind: torch.dtype = torch.int32) -> QParams:
    return QParams(QuantSpec.parse(text), torch.tensor(scale, dtype=dtype), torch.tensor(zero, dtype=kind))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 1e-42])
def test_bad_scales_are_refused(scale: float) -> None:
    with pytest.raises(SchemeError, match="not finite, not positive or denormal"):
        params("u8/pt", scale, 0)


def test_parameters_that_do_not_fit_the_grid() -> None:
    with pytest.raises(SchemeError, match=r"outside \[0, 255\]"):
        params("u8/pt", 1.0, 256)
    with pytest.raises(SchemeError, match=r"outside \[-127, 127\]"):
        params("s8n/pc0", [1.0, 1.0], [0, -128])
    with pytest.raises(SchemeError, match="float32 and int32 of one shape"):
        params("s8n/pc0", [1.0, 1.0], [0])
    with pytest.raises(SchemeError, match="float32 and int32 of one shape"):
        params("u8/pt", 1.0, 0, torch.float64)
    with pytest.raises(SchemeError, match="float32 and int32 of one shape"):
        params("u8/pt", 1.0, 0, kind=torch.int64)
    with pytest.raises(SchemeError, match=r"shape \[\] does not fit the grid s8n/pc0"):
        params("s8n/pc0", 1.0, 0)
    with pytest.raises(SchemeError, match=r"shape \[1\] does not fit the grid u8/pt"):
        params("u8/pt", [1.0], [0])


def test_range_text_and_equality() -> None:
    a, b = params("u8/pt", 0.5, 10), params("u8/pt", 0.5, 10)
    assert a.range == (-5.0, 122.5) and str(a) == "u8/pt scale 0.5 zp 10"
    assert a.same_grid(b) and not a.same_grid(params("u8/pt", 0.5, 11)) and not a.same_grid(params("u8/pt", 0.25, 10))
    assert not a.same_grid(params("u8y/pt", 0.5, 10))
    channels = params("s8n/pc0", [0.5, 0.25], [0, 0])
    assert channels.range == (-63.5, 63.5) and str(channels) == "s8n/pc0 scale[2] 0.25..0.5"
    assert not channels.same_grid(params("s8n/pc0", [0.5], [0]))
