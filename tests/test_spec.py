import pytest
import torch

from fxq.errors import SchemeError
from fxq.spec import QParams, QuantSpec


@pytest.mark.parametrize("text", ["u8/pt", "s8n/pc0", "s8a/pc0", "s4n/pc1", "t2/pc0", "b1/pc0", "u8y/pt", "c5/pt"])
def test_text_form_round_trips(text: str) -> None:
    assert str(QuantSpec.parse(text)) == text


def test_codes() -> None:
    assert (QuantSpec.parse("s8n/pc0").qmin, QuantSpec.parse("s8n/pc0").qmax) == (-127, 127)
    assert (QuantSpec.parse("u8/pt").qmin, QuantSpec.parse("u8/pt").qmax) == (0, 255)


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan"), 1e-42])
def test_bad_scales_are_refused(scale: float) -> None:
    with pytest.raises(SchemeError, match="not finite"):
        QParams(QuantSpec.parse("u8/pt"), torch.tensor(scale), torch.tensor(0, dtype=torch.int32))


def test_unknown_text_names_the_way_out() -> None:
    with pytest.raises(SchemeError, match="Write it like"):
        QuantSpec.parse("x9")
