"""legalize: each form writes what it says, keeps the function, and says why it leaves a place alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fxq import modules as m
from fxq import targets
from fxq.convolutions import conv_pads
from fxq.errors import PassError
from fxq.passes.legalize import Legalize
from tests.helpers import canonical, context, moved, randomize, run_pass, skips


def legalized(model: nn.Module, *inputs: Tensor, scheme: str = "iao_w8a8") -> tuple[list[str], dict[str, str]]:
    """Kinds after the pass, and the skips; the output must not move."""
    torch.manual_seed(0)
    gm = canonical(randomize(model), *inputs)
    with torch.inference_mode():
        want = gm(*inputs)
    history = run_pass(Legalize(), gm, context(*inputs, scheme=scheme))
    assert moved(gm, want, *inputs) < 1e-5
    kinds = [line.split(" = ")[1].split("(")[0] for line in history["legalize"].text.splitlines()[1:-1]]
    return kinds, skips(history, "legalize")


X = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(3))
CONV = nn.Conv2d(3, 4, 3)


def test_writes() -> None:
    torch.manual_seed(0)
    gm = canonical(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Hardswish(), nn.MaxPool2d(2), nn.ReLU()), X)
    history = run_pass(Legalize(), gm, context(X))
    assert history["legalize"].text.splitlines() == [
        "%input_1 = input() [*,3,12,10]",
        "%_0 = conv(%input_1) <0> {3, 2, kernel_size=(1, 1), stride=(1, 1)} [*,2,12,10]",
        "%_1_gate = hardsigmoid(%_0) <1_gate> [*,2,12,10]",
        "%_1 = mul(%_0, %_1_gate) <1> [*,2,12,10]",
        "%_3_1 = relu(%_1) <3> [*,2,12,10]",
        "%_2 = max_pool(%_3_1) <2> {kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False} [*,2,6,5]",
        "%output = output(%_2)",
    ]


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), ["max_pool", "conv", "conv"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish()), ["conv", "hardsigmoid", "mul"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()), ["conv", "sigmoid", "mul"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)), ["conv", "conv"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 1, 1)), ["conv", "conv"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2, divisor_override=3)), ["conv", "conv"]),
        (nn.Sequential(m.Pad((1, 2, 0, 1)), nn.Conv2d(3, 4, 3, padding=1, stride=2)), ["conv"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU()), ["conv", "leaky_relu"]),
        (nn.Sequential(m.GlobalAvgPool(), nn.Conv2d(3, 4, 1), m.Resize((5, 6), None, "bilinear", False)), ["global_avg_pool", "conv", "resize"]),
    ],
)
def test_forms_keep_the_function(model: nn.Module, kinds: list[str]) -> None:
    assert legalized(model, X)[0] == kinds


def test_merged_pads_are_asymmetric_and_ordinary_where_they_can_be() -> None:
    gm = canonical(nn.Sequential(m.Pad((1, 2, 0, 1)), nn.Conv2d(3, 4, 3)), X)
    run_pass(Legalize(), gm, context(X))
    conv = next(mod for mod in gm.modules() if isinstance(mod, nn.Conv2d))
    assert conv_pads(conv) == ((0, 1), (1, 2))


@pytest.mark.parametrize(
    ("model", "node", "why"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, 1, count_include_pad=False)), "_1", "pad"),
        (nn.Sequential(m.Pad((1, 1, 1, 1)), nn.MaxPool2d(2), nn.Conv2d(3, 4, 1)), "_0", "conv"),
        (nn.Sequential(nn.GELU(), nn.SiLU(), nn.Conv2d(3, 4, 1)), "_1", "float"),
    ],
)
def test_refusals_have_a_reason(model: nn.Module, node: str, why: str) -> None:
    found = legalized(model, X)[1]
    assert node in found and why in found[node]


def test_float_schemes_get_only_the_forms_that_save_operations() -> None:
    model = nn.Sequential(m.Pad((1, 1, 1, 1)), nn.Conv2d(3, 4, 3), nn.Hardswish())
    assert legalized(model, X, scheme="weight_only_w8")[0] == ["conv", "hardswish"]


def test_unknown_forms_of_a_target_are_named() -> None:
    ctx = context(X)
    ctx.target = replace(targets.get("onnxruntime"), forms=("hardswich",))
    with pytest.raises(PassError, match="did you mean 'hardswish'"):
        Legalize().run(canonical(nn.Sequential(CONV), X), ctx)
