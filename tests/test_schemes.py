"""Schemes: data, checked when they are made; and every built-in one goes the whole street or is refused clearly."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import graph, schemes, targets
from fxq.errors import SchemeError
from fxq.schemes import Scheme
from fxq.spec import QuantSpec

U8, S8N = QuantSpec.parse("u8/pt"), QuantSpec.parse("s8n/pc0")


class Cnn(nn.Module):
    """Conv, depthwise conv, BN, ReLU, ReLU6, add, cat, pools and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.dw, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.pw, self.head = nn.Conv2d(8, 8, 1), nn.Linear(16, 5)
        for b in (self.bn, self.bn2):
            for t, (lo, hi) in zip((b.running_mean, b.running_var, b.weight, b.bias), ((-0.5, 0.5), (0.5, 2), (0.5, 1.5), (-0.5, 0.5)), strict=True):
                nn.init.uniform_(t, lo, hi)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu6(self.bn2(self.dw(x)))
        x = F.relu(x + self.pw(y))
        out: Tensor = self.head(F.adaptive_avg_pool2d(F.max_pool2d(torch.cat([x, y], 1), 2), 1).flatten(1))
        return out


class Block(nn.Module):
    """A patch embedding and one transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.n1, self.n2 = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj, self.up, self.down, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        t = self.patch(x).flatten(2).transpose(1, 2)
        b, n, c = t.shape
        q, k, v = self.qkv(self.n1(t)).reshape(b, n, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        a = torch.softmax(q @ k.transpose(-2, -1) * 8**-0.5, -1) @ v
        t = t + self.proj(a.transpose(1, 2).reshape(b, n, c))
        t = t + self.down(F.gelu(self.up(self.n2(t))))
        out: Tensor = self.head(t.mean(1))
        return out


def taken(target: str) -> list[str]:
    """Names of the schemes that a target takes."""
    names = []
    for name in schemes.names():
        with contextlib.suppress(SchemeError):
            names.append(targets.get(target).scheme(name).name)
    return names


@pytest.mark.parametrize("net", [Cnn, Block])
@pytest.mark.parametrize("name", taken("onnxruntime"))
def test_every_scheme_ends_in_a_proof(name: str, net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = net().eval(), torch.randn(16, 3, 16, 16)
    m = fxq.compile(model, name, calibration=x)
    proof = m.verify(m.lower(), torch.randn(5, 3, 16, 16))
    assert proof.ok and proof.hidden_differ == 0 and not proof.missing, str(proof)
    static = schemes.get(name).method == "static"
    assert (proof.nodes == proof.planned > (8 if not schemes.get(name).trains else 3 if name == "xnor_w1a1_k" else 6)) if static else proof.planned == 0
    if schemes.get(name).trains:  # untrained its numbers mean little
        return
    if static and net is Cnn:
        symmetric = name.startswith("iao_w8a8_sym")  # such a grid does not end at 0, so it cannot absorb a clamp
        assert proof.exact and [o.node for o in m.float_ops] == ["relu6"] * symmetric
    lint = m.lint()
    gemms = [line for line in str(lint).splitlines() if "Gemm" in line or "Conv" in line]
    assert (gemms == []) == static, str(lint)
    error = float(((m(x) - model(x)).norm() / model(x).norm()).detach())
    assert error < (1e-5 if name == "float" else 0.25 if name in ("iao_w4a8", "iao_w4a4") else 0.1)


def test_who_takes_which_scheme() -> None:
    ort = set(schemes.names()) - {"fp8_w8a8"}
    floats = {"float", "deepcomp_w5", "deepcomp_w8_fc5"}
    sm86 = {*floats, "iao_w8a8_sym", "iao_w8a8_sym_pt", "weight_only_w4", "weight_only_w4_b64"}
    assert set(taken("onnxruntime")) == ort
    assert set(taken("sm86")) == set(taken("tensorrt")) == set(taken("sm80")) == sm86
    assert set(taken("sm89")) == set(taken("sm121")) == {*sm86, "fp8_w8a8"} and set(taken("sm75")) == floats


@pytest.mark.parametrize("net", [Cnn, Block])
@pytest.mark.parametrize("name", taken("sm89"))
def test_every_scheme_for_tensorrt_is_what_the_simulator_says(name: str, net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = net().eval(), torch.randn(16, 3, 16, 16)
    m = fxq.compile(model, name, calibration=x, target=replace(targets.get("sm89"), least_channels=1))
    proof = m.verify(m.lower(), torch.randn(5, 3, 16, 16))
    assert proof.ok and not proof.missing and proof.nodes == proof.planned, str(proof)
    assert (proof.nodes > 3) == (schemes.get(name).method == "static")
    error = float(((m(x) - model(x)).norm() / model(x).norm()).detach())
    assert error < (1e-5 if name == "float" else 0.1)


def test_signed_grids_are_stored_as_unsigned_codes() -> None:
    torch.manual_seed(0)
    m = fxq.compile(Cnn().eval(), "iao_w8a8_sym", calibration=torch.randn(8, 3, 16, 16))
    grids = {str(g.qparams.spec): int(g.qparams.zero_point) for g in graph.grids(m.graph_module).values() if g.qparams is not None}
    assert grids == {"u8/pt": 128}
    assert m.lint().counts()["Conv"][1] == 0


def test_a_user_registers_a_scheme_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "_TABLE", dict(schemes._TABLE))
    mine = schemes.register(Scheme("mine_w8a8", "static", S8N, U8, activation_observer="minmax"))
    assert schemes.get("mine_w8a8") is mine and schemes.get(mine) is mine and schemes.names()[-1] == "mine_w8a8"
    torch.manual_seed(0)
    m = fxq.compile(Cnn().eval(), "mine_w8a8", calibration=torch.randn(8, 3, 16, 16))
    assert m.verify(m.lower(), torch.randn(2, 3, 16, 16)).ok
    assert schemes.register(mine) is mine  # the same again is no mistake
    with pytest.raises(SchemeError, match="a scheme called 'mine_w8a8' exists already"):
        schemes.register(replace(mine, activation_observer="mse"))


@pytest.mark.parametrize(("change", "text"), [
    ({"method": "statick"}, "the unknown method 'statick'. Use one of float, static, dynamic, weight-only"),
    ({"activation_observer": "mimax"}, "the unknown observer 'mimax'. did you mean 'minmax'?"),
    ({"weight_observer": "max"}, "the unknown observer 'max'"),
    ({"weight_rounding": "up"}, "the unknown rounding 'up'. Use nearest or feedback"),
    ({"weight": None}, "quantizes nothing: it has no weight grid"),
    ({"activation": None}, "is static but has no activation grid"),
])  # fmt: skip
def test_schemes_that_make_no_sense(change: dict[str, object], text: str) -> None:
    with pytest.raises(SchemeError) as info:
        replace(Scheme("mine", "static", S8N, U8), **change)  # type: ignore[arg-type]
    assert text in str(info.value)


def test_names() -> None:
    with pytest.raises(SchemeError, match="unknown scheme 'xyzzy'. known: auto-lowbit, bnn_w1a1, bnn_w1a32, "):
        schemes.get("xyzzy")
    with pytest.raises(SchemeError, match="a scheme is a name or a Scheme, not None"):
        schemes.get(None)  # type: ignore[arg-type]
    assert all(schemes.get(n).summary for n in schemes.names())


def test_weight_grids_follow_the_layer() -> None:
    s = schemes.get("iao_w8a8")
    assert [str(s.weight_spec(k)) for k in ("conv", "linear", "conv_transpose")] == ["s8n/pc0", "s8n/pc0", "s8n/pc1"]
    assert str(schemes.get("iao_w8a8_pt").weight_spec("conv_transpose")) == "s8n/pt"
    assert schemes.get("iao_w4a8").reconstructs and not s.reconstructs


def test_the_target_refuses_grids_that_it_does_not_take() -> None:
    odd = Scheme("odd_w8a16", "static", S8N, QuantSpec.parse("u16/pt"))
    way_out = "Use scheme='int8', which is 'iao_w8a8' here. It takes u8/pt, s8/pt"
    with pytest.raises(SchemeError, match=rf"target 'onnxruntime' does not take activation grids of u16/pt \(scheme 'odd_w8a16'\). {way_out}"):
        targets.get("onnxruntime").require(odd)
    with pytest.raises(SchemeError, match="does not take weight grids of s2n/pc0"):
        fxq.compile(Cnn(), Scheme("odd_w2a8", "static", QuantSpec.parse("s2n/pc0"), U8), calibration=torch.randn(2, 3, 16, 16))
