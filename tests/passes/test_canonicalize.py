"""canonicalize: what it writes (kinds and text), what it computes, what it leaves alone and why."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq.graph import kind
from fxq.passes.canonicalize import Canonicalize
from fxq.pipeline import Pipeline
from fxq.snapshot import History, take
from fxq.trace import capture
from fxq.verify import INVARIANTS

_spec: Any = importlib.util.spec_from_file_location("helpers", Path(__file__).parents[1] / "helpers.py")
h: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(h)


def rand(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


class Fn(nn.Module):
    """A function of the input, with a few constants."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        g = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(6, 4, generator=g))
        self.c = nn.Parameter(torch.randn(4, generator=g))
        self.k = nn.Parameter(torch.randn(8, 4, 3, 3, generator=g))
        self.register_buffer("mean", torch.rand(4, generator=g))
        self.register_buffer("pick", torch.tensor([2, 0, -1]))
        self.register_buffer("mask", torch.rand(5, 6, generator=g) > 0.5)

    def forward(self, *xs: Tensor) -> Any:
        return self.fn(self, *xs)


def rewritten(model: nn.Module, *inputs: Tensor, rungs: tuple[str, ...] = ("symbolic", "concrete")) -> tuple[GraphModule, History]:
    gm = capture(model.eval(), inputs, rungs=rungs).gm
    assert gm is not None
    history = History([take(gm, "before")])
    Pipeline((Canonicalize(),)).run(gm, h.context(*inputs), history)
    for name in ("canonical", "shapes-known"):
        assert list(INVARIANTS[name](gm)) == []
    return gm, history


def kinds(gm: GraphModule) -> str:
    return " ".join(k for k in (kind(gm, n) for n in gm.graph.nodes) if k not in ("input", "output", "getitem", "attr"))


def check(model: nn.Module, expected: str | None, *inputs: Tensor, rungs: tuple[str, ...] = ("symbolic", "concrete")) -> GraphModule:
    """Kinds as expected, the same numbers at the example's and at another batch size."""
    gm, _ = rewritten(model, *inputs, rungs=rungs)
    if expected is not None:
        assert kinds(gm) == expected
    for xs in (inputs, tuple(torch.cat([x, x * 0.5 + 0.1, x]) if x.is_floating_point() else torch.cat([x, x, x]) for x in inputs)):
        with torch.no_grad():
            want = model(*xs)
        assert h.moved(gm, want, *xs) < 2e-6
    return gm


IMAGE, TOKENS = (2, 4, 6, 6), (2, 5, 6)

FORMS: dict[str, tuple[Callable[..., Any], str, tuple[int, ...]]] = {
    "scalar-left": (lambda s, x: 2.0 - x, "sub", IMAGE),
    "rsub": (lambda s, x: torch.rsub(x, 1.5), "sub", IMAGE),
    "alpha": (lambda s, x: torch.add(x, x, alpha=2), "mul add", IMAGE),
    "scalar-over": (lambda s, x: 1.0 / (x.abs() + 1), "unary add div", IMAGE),
    "stack": (lambda s, x: torch.stack([x, x * 2], 1), "mul reshape reshape cat", IMAGE),
    "unbind": (lambda s, x: (lambda a: a[0] + a[3])(torch.unbind(x, 1)), "split reshape reshape add", IMAGE),
    "narrow": (lambda s, x: x.narrow(1, 1, 2), "slice", IMAGE),
    "select": (lambda s, x: x.select(1, -1), "slice reshape", IMAGE),
    "index-list": (lambda s, x: x[:, [3, 1]], "index_select", IMAGE),
    "index-tensor": (lambda s, x: x[:, s.pick], "index_select", IMAGE),
    "index-none": (lambda s, x: x[:, None, ..., 1:5:2], "slice reshape", IMAGE),
    "index-select": (lambda s, x: torch.index_select(x, 1, s.pick % 4), "index_select", IMAGE),
    "flip": (lambda s, x: x.flip(2, 3), "index_select index_select", IMAGE),
    "roll": (lambda s, x: torch.roll(x, (1, -2), (2, 3)), "index_select index_select", IMAGE),
    "expand": (lambda s, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 3), "global_avg_pool expand", IMAGE),
    "expand-as": (lambda s, x: x.mean(1, keepdim=True).expand_as(x), "mean expand", IMAGE),
    "repeat": (lambda s, x: x[:, :1].repeat(1, 3, 1, 2), "slice expand cat", IMAGE),
    "repeat-interleave": (lambda s, x: x.repeat_interleave(2, 1), "index_select", IMAGE),
    "transposed": (lambda s, x: x.mT, "permute", TOKENS),
    "movedim": (lambda s, x: torch.movedim(x, 1, -1), "permute", IMAGE),
    "sum": (lambda s, x: x.sum((1, 2)), "sum", IMAGE),
    "mean-of-space": (lambda s, x: x.mean((-1, -2)), "global_avg_pool reshape", IMAGE),
    "amax": (lambda s, x: x.amax((2, 3)), "max_pool reshape", IMAGE),
    "var": (lambda s, x: x.var(1, keepdim=True), "mean sub mul mean mul", IMAGE),
    "std-biased": (lambda s, x: x.std(1, unbiased=False), "mean sub mul mean unary", IMAGE),
    "pow": (lambda s, x: x**2 + x.square(), "power unary add", IMAGE),
    "functions": (lambda s, x: torch.erf(torch.rsqrt(x.exp()).log().neg().reciprocal()), "unary unary unary unary unary unary", IMAGE),
    "activations": (
        lambda s, x: F.elu(x, 0.5) + F.selu(x) + F.mish(x) + F.softplus(x, 2.0) + F.leaky_relu(x, 0.2),
        "elu selu add mish add softplus add leaky_relu add", IMAGE,
    ),
    "prelu": (lambda s, x: F.prelu(x, s.c), "prelu", IMAGE),
    "glu": (lambda s, x: F.glu(x, 1), "split sigmoid mul", IMAGE),
    "logsigmoid": (lambda s, x: F.logsigmoid(x), "unary softplus unary", IMAGE),
    "softmaxes": (lambda s, x: F.log_softmax(x, 1) + F.softmin(x, dim=1), "log_softmax unary softmax add", IMAGE),
    "group-norm": (lambda s, x: F.group_norm(x, 2, s.c), "group_norm", IMAGE),
    "instance-norm": (lambda s, x: F.instance_norm(x), "instance_norm", IMAGE),
    "batch-norm": (lambda s, x: F.batch_norm(x, s.mean, s.mean, s.c, None), "batch_norm", IMAGE),
    "torch-batch-norm": (lambda s, x: torch.batch_norm(x, s.c, s.c, s.mean, s.mean, False, 0.1, 1e-3, False), "batch_norm", IMAGE),
    "layer-norm": (lambda s, x: F.layer_norm(x, (6,)), "layer_norm", TOKENS),
    "normalize": (lambda s, x: F.normalize(x, dim=-1), "mul sum unary clamp div", TOKENS),
    "norm": (lambda s, x: torch.linalg.vector_norm(x, dim=1), "mul sum unary", TOKENS),
    "linear": (lambda s, x: F.linear(x.mT[:, :4].mT, s.w), "permute slice permute linear", TOKENS),
    "matmul": (lambda s, x: x @ s.w, "linear", TOKENS),
    "addmm": (lambda s, x: torch.addmm(s.c, x, s.w), "linear", (2, 6)),
    "baddbmm": (lambda s, x: torch.baddbmm(x @ x.mT, x, x.mT), "permute matmul permute matmul add", TOKENS),
    "einsum": (lambda s, x: torch.einsum("bic,bjc->bij", x, x), "permute matmul", TOKENS),
    "einsum-heads": (lambda s, x: torch.einsum("bchw,bcvw->bhvc", x, x), "permute matmul permute", IMAGE),
    "einsum-constant": (lambda s, x: torch.einsum("bchw,kc->bkhw", x, s.w.t()[:, :4][:4]), "permute reshape permute matmul reshape permute", IMAGE),
    "conv": (lambda s, x: F.conv2d(x, s.k, None, (2, 1), 1), "conv", IMAGE),
    "conv-transpose": (lambda s, x: F.conv_transpose2d(x, s.k.transpose(0, 1), s.mean.repeat(2), 2, 1, 1), "conv_transpose", IMAGE),
    "pools": (lambda s, x: F.max_pool1d(x, 2) + F.avg_pool1d(x, 2, padding=0), "max_pool avg_pool add", TOKENS),
    "pools-3d": (lambda s, x: F.max_pool3d(x, 2) + F.avg_pool3d(x, 2), "max_pool avg_pool add", (2, 3, 4, 4, 4)),
    "adaptive-1d": (lambda s, x: F.adaptive_avg_pool1d(x, 2) * F.adaptive_avg_pool1d(x, 1), "avg_pool global_avg_pool mul", TOKENS),
    "adaptive-max": (lambda s, x: F.adaptive_max_pool2d(x, (3, 2)), "max_pool", IMAGE),
    "resize": (lambda s, x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[-1] + 1)), "resize", IMAGE),
    "shuffle": (lambda s, x: x.view(x.size(0), 2, 2, 6, 6).transpose(1, 2).reshape(x.size(0), -1, 6, 6), "index_select", IMAGE),
    "channel-shuffle": (lambda s, x: F.channel_shuffle(x, 2), "index_select", IMAGE),
    "pixel-shuffle": (lambda s, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 3), "pixel_shuffle reshape permute reshape", IMAGE),
    "casts": (lambda s, x: x.float().to(torch.float32).type_as(x).contiguous() + 1, "add", IMAGE),
    "clamps": (lambda s, x: torch.clamp_min(F.hardtanh(x, -2, 2), 0).clip(max=1), "clamp clamp clamp", IMAGE),
    "pads": (lambda s, x: F.pad(F.pad(x, (1, 2, 0, 1), mode="reflect"), (-1, 0, 0, 1), value=2.0), "pad slice pad", IMAGE),
    "masked-fill": (lambda s, x: F.softmax(x.masked_fill(s.mask, -math.inf), 1).masked_fill(s.mask, 3.0), "add softmax mul add", TOKENS),
    "class-token": (lambda s, x: torch.cat([s.c[None, :, None, None].expand(x.shape[0], 4, 6, 2), x], 3), "pad add", IMAGE),
    "token-of-zeros": (lambda s, x: torch.cat([x, torch.zeros(x.shape[0], 1, 6)], 1), "pad add", TOKENS),
    "chunk-of-the-batch": (lambda s, x: torch.sub(*torch.cat([x, x + 1]).chunk(2)), "add cat split sub", IMAGE),
    "two-tokens": (lambda s, x: torch.cat([s.w[:, 0].expand(x.shape[0], 1, 6), x, s.w[:, 1:3].t().expand(x.shape[0], 2, 6)], 1), "pad add", TOKENS),
    "repeated": (lambda s, x: x * torch.ones(x.shape[0], 5, 1, device=x.device) + s.w[:5, :1].repeat(x.shape[0], 1, 1), "mul add", TOKENS),
    "constant-arithmetic": (lambda s, x: x * (s.mean + 1e-3).rsqrt().reshape(1, -1, 1, 1), "mul", IMAGE),
    "attention": (lambda s, x: F.scaled_dot_product_attention(x, x, x), "permute matmul mul softmax matmul", TOKENS),
    "causal": (lambda s, x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3), "permute matmul mul add softmax matmul", TOKENS),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_functions(name: str) -> None:
    fn, expected, size = FORMS[name]
    check(Fn(fn), expected, rand(*size))


class Attends(nn.Module):
    def __init__(self, mha: nn.MultiheadAttention, call: Callable[..., Any]) -> None:
        super().__init__()
        self.mha, self.call = mha, call
        self.register_buffer("mask", torch.rand(5, 5, generator=torch.Generator().manual_seed(2)) > 0.7)
        for bias in (mha.out_proj.bias, mha.in_proj_bias):
            if bias is not None:
                nn.init.normal_(bias)

    def forward(self, *xs: Tensor) -> Any:
        return self.call(self, *xs)


SELF = "linear split reshape permute reshape permute reshape permute matmul mul softmax matmul permute reshape linear"
CROSS = "linear linear linear reshape permute reshape permute reshape permute matmul mul softmax matmul permute reshape linear"


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_with_and_without_weights_and_mask(batch_first: bool) -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    x = rand(2, 5, 8) if batch_first else rand(5, 2, 8).transpose(0, 1).contiguous()

    def turned(x: Tensor) -> Tensor:
        return x if batch_first else x.transpose(0, 1)

    around = "" if batch_first else "permute "
    def call(s: Any, x: Tensor, **how: Any) -> Any:
        t = turned(x)
        return s.mha(t, t, t, **how)

    check(Attends(mha, lambda s, x: call(s, x)[0]), around + SELF, x)
    masked = Attends(mha, lambda s, x: call(s, x, attn_mask=s.mask, need_weights=False)[0])
    check(masked, around + SELF.replace("mul soft", "mul add soft"), x)
    weights = Attends(mha, lambda s, x: call(s, x)[1])
    assert kinds(check(weights, None, x)).endswith("softmax mean")
    both = Attends(mha, lambda s, x: call(s, x, average_attn_weights=False))
    assert "mean" not in kinds(check(both, None, x))


def test_cross_attention_with_other_widths() -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, kdim=6, vdim=7, batch_first=True, bias=False)
    check(Attends(mha, lambda s, q, k, v: s.mha(q, k, v)[0]), CROSS, rand(2, 5, 8), rand(2, 4, 6), rand(2, 4, 7))


def test_functional_attention_shares_no_weights_with_a_layer() -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2)

    def call(s: Any, x: Tensor) -> Any:
        t = x.transpose(0, 1)
        p = s.mha
        out = F.multi_head_attention_forward(
            t, t, t, 8, 2, p.in_proj_weight, p.in_proj_bias, None, None, False, 0.0, p.out_proj.weight, p.out_proj.bias, training=False
        )
        return out[0]

    gm = check(Attends(mha, call), "permute " + SELF, rand(2, 5, 8))
    assert any(p is mha.in_proj_weight or torch.equal(p, mha.in_proj_weight) for p in gm.parameters())


def test_encoder_layer_is_looked_into() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    gm = check(nn.Sequential(layer), None, rand(2, 5, 8))
    assert "opaque" not in kinds(gm) and kinds(gm).count("linear") == 4


def test_refused_attention() -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    gm, history = rewritten(Attends(mha, lambda s, x: s.mha(x, x, x)[0]), rand(2, 5, 8))
    assert kinds(gm) == "permute opaque permute"
    assert list(h.skips(history, "canonicalize").values()) == ["with added rows, a key padding mask or given keys"]


class Norm2d(nn.LayerNorm):
    """Over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Named(nn.Conv2d):
    """A conv with another name."""


class Same(nn.Conv2d):
    """TensorFlow's SAME padding, computed from the input's size (timm's Conv2dSame)."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, k, s in zip(reversed(x.shape[-2:]), reversed(self.kernel_size), reversed(self.stride), strict=True):
            total = max((math.ceil(size / s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class NormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


def _parametrised() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    torch.nn.utils.parametrizations.weight_norm(conv)
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(1.5)  # type: ignore[union-attr,operator]
    return conv


MODULES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "layer-norm-2d": (lambda: Norm2d(4), "permute layer_norm permute", IMAGE),
    "subclass": (lambda: Named(4, 6, 3), "conv", IMAGE),
    "same": (lambda: Same(4, 6, 3, 2), "pad conv", IMAGE),
    "norm-act": (lambda: NormAct(4), "batch_norm relu", IMAGE),
    "parametrised": (_parametrised, "conv", IMAGE),
    "spectral": (lambda: torch.nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)), "conv", IMAGE),
    "shuffle": (lambda: nn.ChannelShuffle(2), "index_select", IMAGE),
    "softmax2d": (lambda: nn.Softmax2d(), "softmax", IMAGE),
    "softmin": (lambda: nn.Softmin(1), "unary softmax", IMAGE),
    "glu": (lambda: nn.GLU(1), "split sigmoid mul", IMAGE),
    "tracked-instance": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), "batch_norm", IMAGE),
    "pads": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ReflectionPad2d((1, 0, 0, 1)), nn.ConstantPad1d(1, 2.0)), "pad pad pad", IMAGE),
    "upsample": (lambda: nn.Upsample(scale_factor=2), "resize", IMAGE),
    "upsample-1d": (lambda: nn.Upsample(size=9, mode="linear"), "resize", (2, 4, 6)),
    "adaptive-max": (lambda: nn.AdaptiveMaxPool2d(3), "max_pool", IMAGE),
    "whole-pool": (lambda: nn.AvgPool2d(6), "global_avg_pool", IMAGE),
    "clamp": (lambda: nn.ReLU6(), "clamp", IMAGE),
    "gone": (lambda: nn.Sequential(nn.Dropout(), nn.Conv2d(4, 6, 1), nn.Identity()), "conv", IMAGE),
    "celu": (lambda: nn.CELU(), "opaque", IMAGE),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    make, expected, size = MODULES[name]
    torch.manual_seed(0)
    model = h.randomize(nn.Sequential(make()))
    check(model, expected, rand(*size))


def test_a_frozen_batch_norm_leaf_becomes_one() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps = 1e-4
            for k in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(k, torch.rand(4, generator=torch.Generator().manual_seed(3)))

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + self.eps).rsqrt()  # type: ignore[operator]
            return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)  # type: ignore[operator]

    model = nn.Sequential(nn.ReLU(), FrozenBatchNorm2d()).eval()
    check(model, "relu mul add", rand(*IMAGE))
    gm = capture(model, (rand(*IMAGE),), leaf_modules=(FrozenBatchNorm2d,)).gm
    assert gm is not None
    Canonicalize().run(gm, h.context(rand(*IMAGE)))
    assert kinds(gm) == "relu batch_norm" and h.moved(gm, model(rand(*IMAGE)), rand(*IMAGE)) < 2e-6


@torch.fx.wrap
def windows(x: Tensor, weight: Tensor, size: list[int], shift: int) -> Tensor:
    """Shifted windows with a mask that is built from the input's size, in-place changes of slices, a padded size."""
    n, height, width, c = x.shape
    x = F.pad(x, (0, 0, 0, (size[1] - width % size[1]) % size[1]))
    if shift > 0:
        x = torch.roll(x, -shift, 1)
    mask = x.new_zeros((height, x.shape[2]))
    mask[:shift, :] = 1
    mask[:, -1:].zero_()
    y = x.view(n, height // size[0], size[0], -1, c) * mask.view(1, height // size[0], size[0], -1, 1)
    y[:, 1:] += F.linear(y[:, :1], weight)
    return y.reshape(n, height, -1, c)


def test_wrapped_function_is_looked_into() -> None:
    model = Fn(lambda s, x: windows(x, s.w[:4], [3, 4], 1)).eval()
    gm = check(model, None, rand(2, 6, 6, 4))
    assert "opaque" not in kinds(gm) and {"pad", "index_select", "mul", "linear", "cat"} <= set(kinds(gm).split())


@torch.fx.wrap
def undecided(x: Tensor) -> Tensor:
    return x * 2 if bool((x > 0).any()) else x


@torch.fx.wrap
def normalize(x: Tensor) -> Tensor:
    """Called like torch's, but another function."""
    return x + 1


def test_own_functions_do_not_go_by_torchs_names() -> None:
    check(Fn(lambda s, x: normalize(x)), "add", rand(*IMAGE))


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "data": (lambda s, x: undecided(x), "undecided cannot be traced: the result depends on the values of a tensor"),
    "cast": (lambda s, x: x.double(), "a cast from torch.float32 to torch.float64"),
    "sorted": (lambda s, x: x.cumsum(1) + 1, ""),
    "antialias": (lambda s, x: F.interpolate(x, 3, mode="bilinear", antialias=True), "antialias has no canonical form"),
    "dropout": (lambda s, x: F.dropout(x, 0.0, training=True), "it drops at random in eval mode as well"),
    "statistics": (lambda s, x: F.batch_norm(x, None, None, training=True), "it uses the batch's statistics"),
    "batch-flip": (lambda s, x: x.flip(0), "along the batch"),
    "batch-slice": (lambda s, x: x[1:], "along the batch"),
    "two-indices": (lambda s, x: x[:, s.pick, s.pick], "indexed by several tensors"),
    "flat-roll": (lambda s, x: x.roll(3), "rolls the flattened tensor"),
    "dot": (lambda s, x: x @ s.c[[0, 1, 2, 3, 0, 1]], "a product with a vector"),
    "mask": (lambda s, x: torch.where(x > 0, x, 0.0), "condition is not constant"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    fn, why = REFUSED[name]
    x = rand(*IMAGE)
    gm, history = rewritten(Fn(fn), x)
    assert "opaque" in kinds(gm)
    assert (why in h.skips(history, "canonicalize").values()) is bool(why)
    with torch.no_grad():
        assert h.moved(gm, Fn(fn).eval()(x), x) < 1e-6


def test_odd_arguments_leave_the_operation_alone() -> None:
    """A form never raises: what torch itself would refuse later stays in the graph."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.mul, (graph.call_function(torch.relu, (x,)), [1, 2])))
    gm = GraphModule(nn.Module(), graph)
    for node in gm.graph.nodes:
        if node.op != "output":
            node.meta.update(shape=(2, 3), dynamic=(True, False), dtype=torch.float32)
    from fxq.passes.canonicalize import _apply

    why: dict[Any, str] = {}
    done = [_apply(gm, node, why) for node in list(gm.graph.nodes)]
    assert done == [False, True, False, False] and list(why.values()) == ["an operand has another type than the result"]


def test_text() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[1] == 3, "three channels")
            y = self.conv(x)
            return self.drop(F.relu(self.conv(x)) + y).flatten(1)

    _, history = rewritten(Block(), rand(2, 3, 4, 4))
    assert history["canonicalize"].text.splitlines() == [
        "%x = input() [*,3,4,4]",
        "%conv = conv(%x) <conv> {3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)} [*,4,4,4]",
        "%conv_1 = conv(%x) <conv_1> {3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)} [*,4,4,4]",
        "%relu_1 = relu(%conv_1) <relu> [*,4,4,4]",
        "%add_1 = add(%relu_1, %conv) <add> [*,4,4,4]",
        "%reshape = reshape(%add_1) <reshape> {shape=(-1, 64)} [*,64]",
        "%output = output(%reshape)",
    ]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t"])
@pytest.mark.parametrize("rung", ["symbolic", "export"])
def test_torchvision(name: str, rung: str) -> None:
    import torchvision

    torch.manual_seed(0)
    model = h.randomize(torchvision.models.get_model(name, weights=None))
    gm, _ = rewritten(model, rand(2, 3, 32, 32), rungs=(rung,))
    assert "opaque" not in kinds(gm)
    x = rand(3, 3, 32, 32)
    with torch.no_grad():
        assert h.moved(gm, model(x), x) < 1e-5


def test_vision_transformer_keeps_its_weights() -> None:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    gm = check(model, None, rand(2, 3, 16, 16))
    assert "opaque" not in kinds(gm) and kinds(gm).count("linear") == 9 and kinds(gm).startswith("conv reshape permute pad add add layer_norm linear split")


def test_decomposed_export() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(self.bn(self.conv(x)), approximate="tanh")
            return F.softmax(self.fc(self.norm(y.flatten(2).transpose(1, 2))), -1)

    torch.manual_seed(0)
    model, x = h.randomize(Net()), rand(2, 3, 6, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).run_decompositions()
    gm = capture(program, (x,)).gm
    assert gm is not None
    Pipeline((Canonicalize(),)).run(gm, h.context(x), History([take(gm, "before")]))
    assert kinds(gm) == "conv batch_norm gelu reshape permute layer_norm linear softmax"
    x = rand(3, 3, 6, 6)
    with torch.no_grad():
        assert h.moved(gm, model(x), x) < 2e-6
