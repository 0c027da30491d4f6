"""Layers with shared weights: values, gradients summed for each entry, zeros that stay, every kind of layer."""

import copy

import pytest
import torch
from torch import nn

from fxq.convolutions import padded
from fxq.shared import SHARED, SharedWeight, lookup, plain, rebuilt, shared

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False), (2, 4, 9, 9)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "linear": (nn.Linear(7, 5), (3, 7)),
    "padded1d": (padded(nn.Conv1d(4, 6, 3), (1, 0)), (2, 4, 9)),
    "padded2d": (padded(nn.Conv2d(4, 6, 3), (0, 1, 0, 1)), (2, 4, 9, 9)),
    "padded3d": (padded(nn.Conv3d(2, 3, 2), (0, 1, 0, 1, 1, 0)), (1, 2, 4, 4, 4)),
}


def made(name: str, entries: int = 6, rows: bool = True) -> tuple[SharedWeight, nn.Module, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    op, size = LAYERS[name]
    codes = torch.randint(0, entries + 1, op.weight.shape, generator=g)  # type: ignore[arg-type]
    axis = 1 if "transposed" in name else 0
    factor = torch.randn(op.weight.shape[axis], generator=g) if rows else None  # type: ignore[index]
    return shared(op, codes, torch.randn(entries, generator=g), factor), op, torch.randn(size, generator=g)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_what_the_plain_layer_computes(name: str, rows: bool) -> None:
    layer, op, x = made(name, rows=rows)
    want = copy.deepcopy(op)
    w = torch.cat([torch.zeros(1), layer.book.detach()])[layer.codes.long()]
    if layer.rows is not None:
        w = w * layer.rows.detach().reshape([-1 if d == layer.axis else 1 for d in range(w.ndim)])
    want.weight = nn.Parameter(w)
    assert torch.equal(layer(x), want(x)) and torch.equal(layer.weight, w)
    assert torch.equal(plain(layer)(x), want(x)) and type(plain(layer)) is type(op)
    assert layer.bias is op.bias and "weight" not in layer.state_dict()


def test_every_type_has_a_test() -> None:
    assert {type(op) for op, _ in LAYERS.values()} == set(SHARED)


def test_gradients_are_summed_for_each_entry() -> None:
    """Section 3.3 of arXiv 1510.00149; the vector of algorithms.md, section 8."""
    table = torch.zeros(3, requires_grad=True)
    lookup(table, torch.tensor([0, 0, 1, 1, 2])).backward(torch.tensor([1.0, 2.0, 3.0, -1.0, 0.5]))
    assert table.grad is not None and table.grad.tolist() == [3, 2, 0.5]


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_autograd(name: str) -> None:
    layer, _, x = made(name)
    layer(x).square().sum().backward()
    book, rows = layer.book.detach().requires_grad_(), layer.rows.detach().requires_grad_()  # type: ignore[union-attr]
    table = torch.cat([torch.zeros(1), book])
    w = table[layer.codes.long()] * rows.reshape([-1 if d == layer.axis else 1 for d in range(layer.codes.ndim)])
    other = plain(layer)
    torch.func.functional_call(other, {"weight": w}, (x,)).square().sum().backward()
    assert torch.allclose(layer.book.grad, book.grad, rtol=1e-4, atol=1e-5) and torch.allclose(layer.rows.grad, rows.grad, rtol=1e-4, atol=1e-5)  # type: ignore


def test_zeros_stay_zero_whatever_the_optimizer_does() -> None:
    layer, _, x = made("conv2d")
    before, zeros = layer.codes.clone(), layer.weight.detach() == 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert bool(zeros.any()) and torch.equal(layer.weight.detach() == 0, zeros) and torch.equal(layer.codes, before)


def test_more_than_255_values_take_16_bits() -> None:
    op = nn.Linear(40, 20)
    codes = torch.arange(800).reshape(20, 40) % 301
    layer = shared(op, codes, torch.arange(1.0, 301.0))
    assert layer.codes.dtype == torch.int16 and torch.equal(layer.weight.detach(), codes.float())
    assert shared(op, codes.clamp(max=255), torch.arange(255.0)).codes.dtype == torch.uint8


def test_rebuilt_keeps_the_codes() -> None:
    layer, _, _ = made("conv2d")
    rows, bias = torch.full((6,), 2.0), torch.ones(6)
    new = rebuilt(layer, torch.arange(6.0), rows, bias, train_rows=False)
    assert new.codes is layer.codes and "rows" in dict(new.named_buffers()) and new.bias.tolist() == [1] * 6  # type: ignore
    assert torch.equal(new.weight, torch.cat([torch.zeros(1), torch.arange(6.0)])[layer.codes.long()] * 2)
    assert rebuilt(layer, None, None, None).book is layer.book


def test_a_state_with_another_number_of_values_loads() -> None:
    few, many = made("conv2d", 4)[0], made("conv2d", 6)[0]
    few.load_state_dict(many.state_dict())
    assert torch.equal(few.weight, many.weight) and len(few.book) == 6


def test_what_does_not_fit_is_refused() -> None:
    op = nn.Linear(3, 2)
    for codes, book, rows in (
        (torch.full((2, 3), 5), torch.zeros(4), None), (torch.full((2, 3), -1), torch.zeros(4), None), (torch.zeros(3, 2), torch.zeros(4), None),
        (torch.zeros(2, 3), torch.zeros(4, 1), None), (torch.zeros(2, 3), torch.zeros(4), torch.zeros(3)), (torch.zeros(2, 3), torch.zeros(1 << 16), None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"do not fit|outside"):
            shared(op, codes, book, rows)
    with pytest.raises(KeyError):
        shared(nn.Bilinear(2, 2, 2), torch.zeros(2, 2, 2), torch.zeros(3))
