"""Calibration data: every form that loaders give becomes tuples of positional inputs; what differs from the first batch is refused."""

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxq.calibration import Batches
from fxq.errors import CalibrationError

X = torch.arange(24.0).reshape(4, 6)
LABEL = torch.zeros(4)


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out: Tensor = self.a(x)
        return out if scale is None else out * scale


class Two(One):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.a(x + y)
        return out


class Many(One):
    def forward(self, *xs: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.a(xs[0])
        return out


class Optional(One):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        out: Tensor = self.a(x) * scale
        return out


def generator() -> Iterator[Tensor]:
    yield X
    yield X[:1]


FORMS: dict[str, tuple[Any, list[int]]] = {
    "tensor": (X, [4]),
    "big tensor": (X.repeat(20, 1), [32, 32, 16]),
    "array": (X.numpy(), [4]),
    "tensors": ([X, X[:3]], [4, 3]),
    "arrays": ([X.numpy()], [4]),
    "generator": (generator(), [4, 1]),
    "labels behind": ([(X, LABEL)], [4]),
    "lists of input and label": ([[X, LABEL]], [4]),
    "dicts": ([{"label": LABEL, "x": X}], [4]),
    "loader": (DataLoader(TensorDataset(X, LABEL), batch_size=3), [3, 1]),
    "float64": ([X.double()], [4]),
    "half": ([X.half()], [4]),
    "batch of one": ([X[:1], X[1:2]], [1, 1]),
    "with gradient": ([X.clone().requires_grad_()], [4]),
    "not contiguous": ([X.reshape(6, 4).t()], [4]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", [One, Many, Optional])
def test_forms_of_data(form: str, model: type[nn.Module]) -> None:
    if form in ("dicts",) and model is Many:
        form = "tensors"  # *xs has no names
    data, sizes = FORMS[form]
    if form == "generator":
        data = generator()
    batches = list(Batches(data, model()))
    assert [len(b[0]) for b in batches] == sizes and all(len(b) == 1 for b in batches)
    assert all(b[0].dtype == torch.float32 and not b[0].requires_grad for b in batches)


def test_values_are_kept_and_integers_stay_integers() -> None:
    assert torch.equal(next(iter(Batches([X.double()], One())))[0], X)
    tokens = torch.tensor([[1, 2]])
    (batch,) = Batches([tokens.to(torch.int32)], nn.Embedding(5, 4))
    assert batch[0].dtype == torch.int32 and torch.equal(batch[0].long(), tokens)


def test_two_inputs_by_place_and_by_name() -> None:
    for data in ([(X, X + 1, LABEL)], [{"y": X + 1, "x": X, "label": LABEL}]):
        ((x, y),) = Batches(data, Two())
        assert torch.equal(x, X) and torch.equal(y, X + 1)


def test_an_optional_input_is_taken_by_name_only() -> None:
    ((x, scale),) = Batches([{"x": X, "scale": torch.tensor(2.0)}], One())
    assert float(scale) == 2.0 and torch.equal(x, X)
    assert len(next(iter(Batches([(X, torch.tensor(2.0))], One())))) == 1


def test_an_input_may_be_a_list_of_tensors() -> None:
    (batch,) = Batches([([X, X + 1],)], One())
    assert len(batch) == 1 and torch.equal(batch[0][1], X + 1)
    with pytest.raises(CalibrationError, match=r"batch 1 has shape \[4, 5\], the first one \[4, 6\]"):
        list(Batches([([X, X],), ([X, X[:, :5]],)], One()))


def test_the_example_is_the_first_batch_and_nothing_is_read_twice() -> None:
    read: list[int] = []

    def source() -> Iterator[Tensor]:
        for i in range(5):
            read.append(i)
            yield X + i

    data = Batches(source(), One(), limit=3)
    assert read == [0] and torch.equal(data.example[0], X)
    assert [float(b[0][0, 0]) for b in data] == [0.0, 1.0, 2.0] and read[:3] == [0, 1, 2]
    assert operator.length_hint(Batches([X] * 7, One())) == 7 and operator.length_hint(Batches([X] * 7, One(), limit=3)) == 3
    assert operator.length_hint(Batches(generator(), One())) == 0


def test_data_follows_the_models_device() -> None:
    assert Batches([X], One()).device == torch.device("cpu") and Batches([X], nn.ReLU()).device == torch.device("cpu")
    assert next(iter(Batches([X], One())))[0].device.type == "cpu"


@pytest.mark.parametrize(("data", "text"), [
    ([{"x": X}, {"x": X, "scale": LABEL}], "batch 1 has 2 inputs, the first one 1"),
    ([X, X.long()], "batch 1 is torch.int64, the first one torch.float32"),
    ([X, X.reshape(4, 6, 1)], r"batch 1 has shape \[4, 6, 1\], the first one \[4, 6\]"),
    ([X, X[:, :5]], r"batch 1 has shape \[4, 5\].*Resize or crop"),
    ([X, X / 0], "batch 1 holds NaN or infinity"),
    ([X, "x"], "batch 1 holds a str"),
    ([X, ()], "batch 1 has 0 inputs, the model takes 1"),
    ([X, {}], "batch 1 has no input 'x'"),
])  # fmt: skip
def test_later_batches_that_differ(data: list[Any], text: str) -> None:
    batches = Batches(data, One())
    with pytest.raises(CalibrationError, match=text):
        list(batches)


def test_the_name_of_the_data_in_messages() -> None:
    with pytest.raises(CalibrationError, match="the data to verify with is empty"):
        Batches([], One(), what="data to verify with")
    with pytest.raises(CalibrationError, match="array of object"):
        Batches(np.array([None]), One())
