"""calibrate: the text it writes, the numbers it computes, the reasons it refuses."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from fxq import numerics, schemes
from fxq.calibration import Batches
from fxq.errors import CalibrationError
from fxq.graph import grids
from fxq.modules import Add, Cat, Clamp, GlobalAvgPool, Mul, Reshape, Split
from fxq.observers import Observer, make
from fxq.passes.annotate import Annotate
from fxq.passes.calibrate import Calibrate, _in_place
from fxq.passes.share_qparams import ShareQParams
from fxq.pipeline import PassContext
from fxq.verify import INVARIANTS
from tests.helpers import canonical, context


class Net(nn.Module):
    """ReLU and ReLU6 absorbed, residual add of both, max-pool, concat, dead channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.b, self.relu6 = nn.Conv2d(4, 4, 1), Clamp(0.0, 6.0)
        self.add, self.pool, self.cat = Add(), nn.MaxPool2d(2), Cat(1)
        self.c = nn.Conv2d(4, 4, 1)
        self.mean, self.flat, self.head = GlobalAvgPool(), Reshape((None, -1)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.a(x))
        y = self.pool(self.add(y, self.relu6(self.b(y))))
        y = self.cat(y, self.c(y))
        return self.head(self.flat(self.mean(y)))


def net() -> Net:
    torch.manual_seed(0)
    m = Net().eval()
    with torch.no_grad():
        m.b.weight.mul_(20)
        m.a.weight[1] = 0
        m.a.bias[1] = -1.0
    return m


def batches(count: int = 3, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=g) * (scale + i) for i in range(count)]


def annotated(model: nn.Module, data: Any, scheme: str = "iao_w8a8") -> tuple[GraphModule, PassContext]:
    feed = Batches(data, model)
    ctx = context(*feed.example, scheme=scheme)
    ctx.calibration = feed
    gm = canonical(model, *feed.example)
    Annotate().run(gm, ctx)
    ShareQParams().run(gm, ctx)
    return gm, ctx


def values(gm: GraphModule, xs: list[Tensor]) -> dict[str, list[Tensor]]:
    """Every value of every grid, batch by batch: the second opinion."""
    out: dict[str, list[Tensor]] = {name: [] for name in grids(gm)}
    for x in xs:
        r = Interpreter(gm, garbage_collect_values=False)
        with torch.no_grad():
            r.run(x.contiguous(memory_format=torch.channels_last))  # the layout in which calibrate runs: other sums, other last bits
        for node, v in r.env.items():
            if "grid" in node.meta:
                out[node.meta["grid"]].append(v)  # in graph order: the members of one batch follow each other
    return out


def test_text_every_grid_has_its_parameters() -> None:
    gm, ctx = annotated(net(), batches())
    assert Calibrate(observer="minmax").run(gm, ctx) == 5
    assert list(INVARIANTS["calibrated"](gm)) == []
    text = {name: str(g) for name, g in grids(gm).items()}
    assert text == EXPECTED


@pytest.mark.parametrize("scheme", ["iao_w8a8", "iao_w8a8_sym"])
def test_min_max_covers_the_values_of_all_members(scheme: str) -> None:
    gm, ctx = annotated(net(), batches(), scheme)
    seen = values(gm, batches())
    Calibrate(observer="minmax").run(gm, ctx)
    for name, g in grids(gm).items():
        lo, hi = (f(torch.stack([f(v) for v in seen[name]])) for f in (torch.min, torch.max))
        if g.clamp is not None:
            lo = torch.tensor(g.clamp[0])
        want = numerics.choose_qparams(lo, hi, schemes.get(scheme).activation or g.spec)
        if want.spec.signed:  # onnxruntime takes unsigned codes only
            want = numerics.unsigned(want)
            assert int(want.zero_point) == 128 and numerics.unsigned(want).same_grid(want)
        assert g.qparams is not None and g.qparams.same_grid(want) and g.spec == want.spec, name


def test_moving_average_updates_once_a_batch_however_many_values_share_the_grid() -> None:
    gm, ctx = annotated(net(), batches())
    assert [n.name for n in gm.graph.nodes if n.meta.get("grid") == "add"] == ["add", "pool", "c", "cat"]
    seen = values(gm, batches())
    Calibrate(observer="ema").run(gm, ctx)
    for name, g in grids(gm).items():
        per_batch = len(seen[name]) // 3
        o = make("ema", g.spec)
        for i in range(3):
            o.observe(torch.cat([v.reshape(-1) for v in seen[name][i * per_batch : (i + 1) * per_batch]]))
        lo, hi = o.range()
        if g.clamp is not None:
            lo, hi = torch.tensor(g.clamp[0]), hi.clamp(max=g.clamp[1] or math.inf)
        assert g.qparams is not None and g.qparams.same_grid(numerics.choose_qparams(lo, hi, g.spec)), name


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse", "entropy"])
def test_absorbed_clamps_start_at_exactly_zero_and_end_at_or_below_six(observer: str) -> None:
    gm, ctx = annotated(net(), batches(scale=5.0))
    Calibrate(observer=observer).run(gm, ctx)
    relu, relu6 = grids(gm)["relu"].qparams, grids(gm)["relu6"].qparams
    assert relu is not None and relu6 is not None
    assert int(relu.zero_point) == relu.spec.qmin == int(relu6.zero_point)
    assert relu.range[0] == 0.0 and relu.range[1] > 1.0
    assert 5.5 < relu6.range[1] <= 6.0 + 1e-6


def test_the_scheme_names_the_observer_and_the_option_overrides_it() -> None:
    data = [torch.ones(1, 3, 8, 8), torch.full((1, 3, 8, 8), 9.0)]
    tops = []
    for option in (None, "minmax"):
        gm, ctx = annotated(net(), data)
        Calibrate(observer=option).run(gm, ctx)
        q = grids(gm)["x"].qparams
        assert q is not None
        tops.append(q.range[1])
    assert ctx.scheme.activation_observer == "ema" and tops == pytest.approx([1.8, 9.0])


def test_no_parameter_and_no_buffer_changes_and_progress_counts() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    gm, ctx = annotated(model, batches())
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    calls: list[tuple[str, int, int | None]] = []
    ctx.progress = lambda *a: calls.append(a)
    assert Calibrate().run(gm, ctx) > 0 and not gm.training
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items()) and len(before) == len(gm.state_dict())
    assert calls == [("calibrate", i, 3) for i in (1, 2, 3)]


def test_a_stream_without_a_length_and_a_limit() -> None:
    def stream() -> Iterator[Tensor]:
        yield from batches()

    gm, ctx = annotated(net(), stream())
    calls: list[int | None] = []
    ctx.progress = lambda what, done, total: calls.append(total)
    Calibrate().run(gm, ctx)
    assert calls == [None] * 3


class Constants(nn.Module):
    """A buffer as an operand; both halves of a split."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.add, self.split, self.cat, self.last = nn.Conv2d(2, 4, 1), Add(), Split((2, 2), 1), Cat(1), nn.Conv2d(4, 2, 1)
        self.register_buffer("offset", torch.tensor([[[[-3.0]], [[0.5]], [[2.0]], [[7.0]]]]))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(self.add(self.conv(x), self.offset))
        return self.last(self.cat(b, a))


def test_a_constant_is_observed_once_and_split_parts_take_their_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    count: dict[int, int] = {}
    real = Observer.observe

    def counting(self: Observer, x: Tensor, part: bool = False) -> None:
        count[x.numel()] = count.get(x.numel(), 0) + 1
        real(self, x, part)

    monkeypatch.setattr(Observer, "observe", counting)
    gm, ctx = annotated(Constants(), [torch.randn(5, 2, 3, 3) for _ in range(4)])
    Calibrate(observer="minmax").run(gm, ctx)
    q = grids(gm)["offset"].qparams
    assert q is not None and q.range == pytest.approx((-3.0, 7.0), abs=q.scale.item())
    assert count[4] == 1
    parts = [n for n in gm.graph.nodes if "getitem" in n.name]
    assert len(parts) == 2 and all(grids(gm)[n.meta["grid"]].qparams is not None for n in parts)
    assert count[5 * 2 * 3 * 3] == 4 + 4, "the input and the last conv; parts of the split hold nothing new"


def test_a_constant_activation_and_a_dead_net_work() -> None:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    gm, ctx = annotated(model, [torch.full((1, 3, 8, 8), 2.5)] * 2)
    Calibrate().run(gm, ctx)
    q = grids(gm)["add"].qparams
    assert q is not None and float(q.scale) == 1.0 and int(q.zero_point) == 0
    x = grids(gm)["x"].qparams
    assert x is not None and float(numerics.fake_quantize(torch.tensor(2.5), x)) == pytest.approx(2.5)


def test_fixed_and_known_grids_are_left_alone() -> None:
    gm, ctx = annotated(net(), batches())
    Calibrate().run(gm, ctx)
    before = dict(grids(gm))
    assert Calibrate().run(gm, ctx) == 0 and grids(gm) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_name_the_node_and_the_batch(bad: float) -> None:
    model = net()
    with torch.no_grad():
        model.c.bias[2] = bad
    gm, ctx = annotated(model, batches())
    with pytest.raises(CalibrationError, match=r"^calibrate / c, batch 0: the value holds NaN or infinity\. Look at"):
        Calibrate().run(gm, ctx)


def test_overflow_in_a_later_batch_names_that_batch() -> None:
    gm, ctx = annotated(net(), [*batches(2), torch.full((1, 3, 8, 8), 3e38)])
    with pytest.raises(CalibrationError, match=r"^calibrate / (c|relu6|mean), batch 2: "):  # where float32 overflows first depends on the CPU's order of sums
        Calibrate().run(gm, ctx)


def test_a_batch_that_the_graph_cannot_run_names_node_and_batch() -> None:
    gm, ctx = annotated(net(), batches())
    ctx.calibration = [(batches()[0],), (torch.randn(2, 5, 8, 8),)]
    with pytest.raises(CalibrationError, match=r"^calibrate / a, batch 1: the float forward failed: .*channels"):
        Calibrate().run(gm, ctx)


@pytest.mark.parametrize(("data", "fact"), [(None, "there is no calibration data"), ([], "no calibration data reached it")])
def test_no_data_is_refused(data: Any, fact: str) -> None:
    gm, ctx = annotated(net(), batches())
    ctx.calibration = data
    with pytest.raises(CalibrationError, match=fact):
        Calibrate().run(gm, ctx)


KEPT = [("iao_w8a8", 1 << 22, 0), ("iao_w4a8", 1 << 22, 3), ("iao_w4a8", 1600, 2), ("iao_w4a8", 1, 1)]


@pytest.mark.parametrize(("scheme", "keep", "kept"), KEPT)
def test_first_batches_are_kept_within_the_bound_where_the_scheme_needs_them(scheme: str, keep: int, kept: int) -> None:
    gm, ctx = annotated(net(), batches(), scheme)
    Calibrate(keep=keep).run(gm, ctx)
    assert len(ctx.kept) == kept and all(torch.equal(k[0], b) for k, b in zip(ctx.kept, batches(), strict=False))


EXPECTED = {
    "x": "u8/pt scale 0.0735434 zp 133",
    "relu": "u8/pt scale 0.0268588 zp 0",
    "relu6": "u8/pt scale 0.0235294 zp 0",
    "add": "u8/pt scale 0.0549199 zp 70",
    "mean": "u8/pt scale 0.0300703 zp 51",
}


class Reused(nn.Module):
    """Values that may be overwritten beside values that are read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.one, self.two, self.gate, self.mul, self.add, self.end = nn.ReLU(), nn.ReLU(), nn.Sigmoid(), Mul(), Add(), Add()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.one(y)
        w = self.add(z, self.b(z))
        v = self.mul(w, self.gate(w))
        return self.last(self.end(self.two(self.c(v)), y))


def test_overwriting_changes_no_value_that_is_seen() -> None:
    torch.manual_seed(0)
    gm, ctx = annotated(Reused().eval(), batches())
    overwritten = {n.name for n in gm.graph.nodes if n.op == "call_module" and _in_place(gm, n) is not None}
    assert overwritten == {"add", "mul", "two"}
    seen = values(gm, batches())
    Calibrate(observer="minmax").run(gm, ctx)
    for name, g in grids(gm).items():
        if g.fixed is not None:
            continue
        lo, hi = (f(torch.stack([f(v) for v in seen[name]])) for f in (torch.min, torch.max))
        if g.clamp is not None:
            lo = torch.tensor(g.clamp[0])
        assert g.qparams is not None and g.qparams.same_grid(numerics.choose_qparams(lo, hi, g.spec)), name
