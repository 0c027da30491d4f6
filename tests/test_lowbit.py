"""Low-bit arithmetic: the golden vectors of the papers' formulas, gradients by autograd of a smooth twin or by hand, thresholds exhaustively."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fxq import lowbit
from fxq.errors import SchemeError

A = [[0.3, -0.2], [-0.5, 0.9]]
B = [[0.6, 0.2], [0.1, 0.9]]
X = torch.tensor([-1.5, -1, -0.3, 0, 0.5, 1, 2])


def weight(rows: list[list[float]]) -> Tensor:
    """Shape 1x2x1x2."""
    return torch.tensor(rows).reshape(1, 2, 1, 2).requires_grad_()


def grads(y: Tensor, x: Tensor, g: list[float]) -> list[float]:
    y.backward(torch.tensor(g).reshape(y.shape))
    assert x.grad is not None
    return x.grad.reshape(-1).tolist()


def near(values: list[float]) -> object:
    return pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(
    ("ste", "want"),
    [
        ("saturate", [0, 0, 1, 1, 1, 0, 0]), ("identity", [1] * 7), ("soft", [0, 0, 0.7, 1, 0.5, 0, 0]), ("approx", [0, 0, 1.4, 2, 1, 0, 0]),
        ("tanh", [0.180707, 0.419974, 0.915137, 1, 0.786448, 0.419974, 0.070651]),
    ],
)  # fmt: skip
def test_sign_and_its_gradients(ste: str, want: list[float]) -> None:
    x = X.clone().requires_grad_()
    y = lowbit.sign(x, ste)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert grads(y, x, [1] * 7) == near(want)


def test_tanh_anneals_and_unknown_names_are_refused() -> None:
    assert float(lowbit.ste_mask(torch.zeros(1), "tanh", 5.0)) == 5.0
    assert float(lowbit.ste_mask(torch.ones(1), "tanh", 5.0)) < 1e-3
    with pytest.raises(SchemeError, match="unknown straight-through estimator 'satturate'. did you mean 'saturate'"):
        lowbit.sign(X, "satturate")


def test_bits_for_and() -> None:
    assert lowbit.bits01(X).tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_binary_weight() -> None:
    g = [1.0, 2, 3, -1]
    w = weight(A)
    y = lowbit.binary_weight(w)
    assert y.reshape(-1).tolist() == near([0.475, -0.475, -0.475, 0.475])
    assert grads(y, w, g) == near([-0.775, 2.2, 2.675, -1.725])
    w = weight(B)
    y = lowbit.binary_weight(w)
    assert float(y.detach().max()) == pytest.approx(0.45) and grads(y, w, g) == near([1.7, 2.15, 2.6, 0.8])
    codes, alpha = lowbit.binary_codes(weight(A))
    assert codes.reshape(-1).tolist() == [1, -1, -1, 1] and float(alpha) == pytest.approx(0.475)
    assert lowbit.binary_weight(weight(A), scaled=False).reshape(-1).tolist() == [1, -1, -1, 1]


def test_centring_is_a_function() -> None:
    g = [1.0, 2, 3, -1]
    w = weight(A)
    before = w.detach().clone()
    assert grads(lowbit.binary_weight(lowbit.centred(w)), w, g) == near([-1.725, 1.9625, 1.725, -1.9625])
    w = weight(B)
    c = lowbit.centred(w)
    assert c.reshape(-1).tolist() == near([0.25, -0.35, -0.25, 0.35])
    inner = c.detach().requires_grad_()
    assert grads(lowbit.binary_weight(inner), inner, g) == near([-0.95, 1.85, 2.15, -1.55])
    assert torch.equal(weight(A), before)
    depthwise = torch.tensor([[[[0.5, -2.0]]]])
    assert lowbit.centred(depthwise).reshape(-1).tolist() == [0.5, -1.0], "a single input channel is not centred"


def test_masked_weight_gradient() -> None:
    w = torch.tensor([[0.5, -2.0]], requires_grad=True)
    assert grads(lowbit.binary_weight(w, scaled=False, masked=True), w, [3, 4]) == [3, 0]


def test_ternary_weight() -> None:
    w = weight(A)
    y = lowbit.ternary_weight(w)
    assert float(lowbit.ternary_threshold(w)) == pytest.approx(0.3325)
    assert y.reshape(-1).tolist() == near([0, 0, -0.7, 0.7]) and grads(y, w, [1, 2, 3, -1]) == near([0.7, 1.4, 4.1, -2.7])
    zero = torch.zeros(2, 3, requires_grad=True)
    y = lowbit.ternary_weight(zero)
    assert y.tolist() == [[0, 0, 0]] * 2 and all(v == v for v in grads(y, zero, [1] * 6))
    assert int(lowbit.ternary_codes(weight(A), exact=True)[0].abs().sum()) == 2


def test_the_exact_ternary_search_has_the_least_error() -> None:
    w = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    codes, alpha = lowbit.ternary_codes(w, exact=True)
    mine = (w - codes * alpha[:, None]).square().sum(1)
    for row in range(5):
        order = w[row].abs().sort(descending=True).values
        best = min(float(w[row].square().sum() - order[:k].sum() ** 2 / k) for k in range(1, 10))
        assert float(mine[row]) == pytest.approx(best, abs=1e-5)


def test_ternary_activation() -> None:
    x = torch.tensor([-1.5, -0.5, -0.1, 0, 0.3, 0.8], requires_grad=True)
    delta = lowbit.TBN_RATIO * x.detach().abs().mean()
    assert float(delta) == pytest.approx(0.213333, abs=1e-6)
    y = lowbit.ternary(x, delta)
    assert y.tolist() == [-1, -1, 0, 0, 1, 1] and grads(y, x, [1] * 6) == [0, 1, 1, 1, 1, 1]


def test_dorefa_weight() -> None:
    w = torch.tensor([-1, -0.2, 0, 0.3, 0.8], requires_grad=True)
    y = lowbit.dorefa_weight(w, 2, compat=True)
    assert y.tolist() == near([-1, -1 / 3, 1 / 3, 1 / 3, 1])
    assert ((lowbit.dorefa_levels(w, 2) + 3) / 2).tolist() == [0, 1, 2, 2, 3]
    assert grads(y, w, [1, 2, 3, -1, 0.5]) == near([-0.25635, 2.523767, 3.939106, -1.201607, 0.36703])
    scaled = (torch.tensor([-1, -0.2, 0, 0.3, 0.8]) * 0.5).requires_grad_()
    assert float(lowbit.dorefa_weight(scaled, 2).detach().abs().max()) == pytest.approx(0.5), "the scale of the weight is kept"
    zero = torch.zeros(3, requires_grad=True)
    assert lowbit.dorefa_weight(zero, 2).tolist() == [0, 0, 0] and lowbit.dorefa_levels(zero, 2).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_dorefa_codes_and_step_are_the_weight(bits: int) -> None:
    w = torch.randn(64, generator=torch.Generator().manual_seed(bits))
    codes, step = lowbit.dorefa_levels(w, bits), lowbit.dorefa_scale(w, bits)
    assert torch.equal(codes * step, lowbit.dorefa_weight(w, bits))
    assert bool((codes.remainder(2) == 1).all()) and int(codes.abs().max()) == 2**bits - 1


def test_dorefa_activation() -> None:
    values, g = [-1.0, 1, 4, 9, 12], [1.0, 2, 3, -1, 1]
    x = torch.tensor(values, requires_grad=True)
    y = lowbit.dorefa_activation(x, 2)
    assert y.tolist() == near([0, 0, 1 / 3, 1, 1]) and grads(y, x, g) == near([0, 0.2, 0.3, -0.1, 0])
    x, clip = torch.tensor(values, requires_grad=True), torch.tensor(10.0, requires_grad=True)
    y = lowbit.clipped(x, clip, 2)
    assert y.tolist() == near([0, 0, 10 / 3, 10, 10]) and grads(y, x, g) == near([0, 2, 3, -1, 0]) and float(clip.grad) == 1  # type: ignore[arg-type]


def test_clipping_of_signed_values() -> None:
    x, clip = torch.tensor([-3.0, -1, 0.4, 3], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = lowbit.clipped(x, clip, 2, signed=True)
    assert y.tolist() == [-2, -0.0, 0, 2] and grads(y, x, [1, 2, 3, 5]) == [0, 2, 3, 0] and float(clip.grad) == 4  # type: ignore[arg-type]


def test_learned_step() -> None:
    x, s = torch.tensor([0.3, -0.6, 3.9, -9], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    each = []
    for i in range(4):
        y = lowbit.learned_step(x, s, -8, 7, factor=1.0)
        (ds,) = torch.autograd.grad(y[i], s, retain_graph=True)
        each.append(float(ds))
    assert y.tolist() == [0.5, -0.5, 3.5, -4] and each == pytest.approx([0.4, 0.2, 7, -8], abs=1e-6)
    assert grads(y, x, [1] * 4) == [1, 1, 0, 0]
    x.grad = s.grad = None
    lowbit.learned_step(x, s, -8, 7).sum().backward()
    assert float(s.grad) == pytest.approx((0.4 + 0.2 + 7 - 8) / (4 * 7) ** 0.5, abs=1e-6)  # type: ignore[arg-type]
    assert float(lowbit.lsq_start(torch.tensor([1.0, -3.0]), 4)) == 2.0


def test_learned_step_against_finite_differences() -> None:
    """Where no code changes, the step's gradient is that of ``q s``; the straight-through part ``-v`` stands for the gradient through the rounding."""
    g = torch.Generator().manual_seed(0)
    x, s = torch.randn(64, generator=g, dtype=torch.float64) * 3, torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    up = torch.randn(64, generator=g, dtype=torch.float64)
    (lowbit.learned_step(x, s, -4, 3, factor=1.0) * up).sum().backward()
    v = x / s.detach()
    smooth = s.detach().clone().requires_grad_()
    codes = torch.round(v).clamp(-4, 3)
    inside = (v > -4) & (v < 3)
    twin = torch.where(inside, codes * smooth - v * smooth + x, codes * smooth)  # d/ds: q - v inside, q outside
    (twin * up).sum().backward()
    assert float(s.grad) == pytest.approx(float(smooth.grad), rel=1e-9)  # type: ignore[arg-type]


def test_learned_step_per_channel_and_offset() -> None:
    x = torch.tensor([[0.3, -0.6], [3.9, -9]])
    s = torch.tensor([0.5, 1.0], requires_grad=True)
    y = lowbit.learned_step(x, s, -8, 7, axis=0, factor=1.0)
    assert y.tolist() == [[0.5, -0.5], [4, -8]]
    y.sum().backward()
    assert s.grad.tolist() == near([0.4 + 0.2, 0.1 - 8])  # type: ignore[union-attr]
    step, offset = torch.tensor(0.5, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    y = lowbit.learned_offset(torch.tensor([-3.0, 0.0, 0.6, 9.0]), step, offset, 0, 15)
    assert y.tolist() == [-1, 0, 0.5, 6.5]
    y.sum().backward()
    assert float(offset.grad) == pytest.approx(2 / (4 * 15) ** 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("gamma", "want", "direction"), [(1, -2, 1), (-1, -6, -1), (0, -float("inf"), 1)])
def test_sign_threshold(gamma: float, want: float, direction: float) -> None:
    one = lambda v: torch.tensor([v], dtype=torch.float64)  # noqa: E731
    t, d = lowbit.sign_threshold(one(0.5), one(0.0), one(gamma), one(1.0), one(1.0), one(2.0))
    assert float(t) == want and float(d) == direction


def test_sign_thresholds_are_exact() -> None:
    """All integers d, gammas of every sign, alpha 0, ties: against rational arithmetic."""
    quarter = [Fraction(i, 4) for i in (-6, -2, 0, 1, 4)]
    cases = list(itertools.product((Fraction(0), Fraction(1, 2), Fraction(3, 4)), quarter, quarter, quarter, quarter, (Fraction(1, 2), Fraction(2))))
    v = [torch.tensor([float(c[i]) for c in cases], dtype=torch.float64) for i in range(6)]
    threshold, direction = lowbit.sign_threshold(*v)
    for d in range(-9, 10):
        got = (direction * d >= threshold).tolist()
        for (alpha, bias, gamma, beta, mean, sigma), g in zip(cases, got, strict=True):
            assert g == (gamma * (alpha * d + bias - mean) / sigma + beta >= 0), (alpha, bias, gamma, beta, mean, sigma, d)
