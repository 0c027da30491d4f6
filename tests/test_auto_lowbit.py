"""The scheme auto-lowbit by given times, layers that the user keeps in 8 bits, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import auto_lowbit, layer_runs, layer_table, schemes
from fxq.errors import LoweringError, PassError, SchemeError
from fxq.layer_runs import Time, Times
from fxq.layer_shapes import Form, LayerShape, layers_of
from fxq.layer_table import LayerTime, LayerTimes
from fxq.prunable import canonical_graph
from tests.lowbit_nets import X, net, qat, steps

OTHER = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(5))


def given(faster: dict[str, str], model: nn.Module | None = None, x: Tensor = X) -> LayerTimes:
    """Times by which each named layer is fastest in the named way; the others are fastest on bits."""
    us = {"bits": (9.0, 5.0, 1.0), "int8": (9.0, 1.0, 5.0), "float32": (1.0, 5.0, 9.0)}

    def fake(shape: LayerShape, form: Form, threads: int, has_bits: bool) -> Times:
        return Times(Time(9, 0), "torch", None if shape.kind == "conv_transpose" else Time(5, 0), Time(1, 0) if has_bits else None)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(layer_table, "measured", fake)
        found = fxq.layer_times(net() if model is None else model, x[:1])

    def changed(t: LayerTime) -> LayerTime:
        float_us, int8, bits = us[faster.get(t.path, "bits")]
        return replace(t, times=replace(t.times, float32=Time(float_us, 0.0), int8=t.times.int8 and Time(int8, 0.0), bits=t.times.bits and Time(bits, 0.0)))

    return replace(found, layers=tuple(map(changed, found.layers)), machine={"cpu": "a test"})


def kinds(m: fxq.CompiledModel) -> dict[str, str]:
    """Module path -> how the compiled graph computes each layer."""
    return {t.path: t.runs for t in layer_table.times_of(m.graph_module, measure=lambda *_: Times(Time(1, 0), "torch"))}


def compiled(faster: dict[str, str], **options: Any) -> fxq.CompiledModel:
    return fxq.compile(net(), "auto-lowbit", calibration=X, times=given(faster), progress=False, **options)


def test_the_faster_way_is_taken() -> None:
    m = compiled({"b": "int8", "a": "float32"})
    assert kinds(m) == {"a": "float32", "b": "int8", "c": "bits", "up": "float32", "d": "bits", "fc": "int8"}
    notes = {s.node: s.why for s in m.history["choose-layers"].skips}
    assert notes == {
        "a": "float: float32 1 us, int8 5 us", "b": "int8: bits 5 us, int8 1 us", "c": "binary: bits 1 us, int8 5 us",
        "up": "as the scheme has it: there is no kernel in int8 or on bits (8->8 2x2 @12x12 stride 2x2 transposed)", "d": "binary: bits 1 us, int8 5 us",
        "fc": "int8: float32 9 us, int8 5 us",
    }  # fmt: skip
    assert m.history["choose-layers"].rewrites == 2 and "left alone: b: int8: bits 5 us" in str(m.history)
    assert m.layer_times is not None and m.layer_times.machine == {"cpu": "a test"}
    assert [t.path for t in m.layer_times.layers] == ["a", "b", "c", "up", "d", "fc"]


def test_a_choice_can_be_repeated_without_times() -> None:
    chosen = compiled({"b": "int8"})
    again = fxq.compile(net(), "xnor_w1a1", calibration=X, int8=["b", "a", -1], progress=False)
    assert again.history["convert-trained"].text == chosen.history["convert-trained"].text
    assert torch.equal(again.reference(OTHER), chosen.reference(OTHER)) and again.layer_times is None
    twice = compiled({"b": "int8"})
    assert torch.equal(twice.reference(OTHER), chosen.reference(OTHER))


def test_processes_take_the_choice_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first, mine = given({"b": "int8"}), given({"c": "int8"})
    sent: list[Any] = []

    def gather(value: Any) -> list[Any]:
        sent.append(value)
        return [json.loads(json.dumps([t.to_json() for t in first.layers])), value]

    monkeypatch.setattr(auto_lowbit, "distributed", SimpleNamespace(world=lambda: 2, gather=gather))
    gm = canonical_graph(net(), (X,), "")
    found = auto_lowbit.asker(schemes.get("auto-lowbit"), mine)(gm, {n: "bits" for n in layers_of(gm)})
    assert {path for path, (way, _) in found.items() if way == "int8"} == {"b"} and gm.meta[auto_lowbit.TIMES].layers == first.layers
    assert sent == [[t.to_json() for t in mine.layers]]


def test_where_int8_wins_everywhere_the_refusal_says_so() -> None:
    m = compiled({k: "int8" for k in "abcd"})
    assert set(kinds(m).values()) == {"int8", "float32"} and m.verify(m.lower(), OTHER).ok
    with pytest.raises(LoweringError, match="no layer runs on bits") as e:
        m.lower("bitwise")
    assert e.value.way_out == "'auto-lowbit' found int8 faster for them here (m.layer_times): lower it to onnx-qdq, or compile it with xnor_w1a1"


@pytest.mark.parametrize("faster", [{}, {"b": "int8"}, {"c": "int8", "a": "int8"}, {"b": "int8", "c": "int8", "d": "int8"}])
def test_the_files_are_proven(faster: dict[str, str]) -> None:
    m = compiled(faster)
    proof = m.verify(m.lower(), [X, OTHER])
    assert proof.ok and proof.hidden_differ == 0 and proof.nodes >= 5, str(proof)  # type: ignore[union-attr]
    if "bits" in kinds(m).values():
        from fxq.bitwise.program import BitProgram

        program = BitProgram(m.graph_module)
        assert {r.name for r in program.report().layers} == {k for k, v in kinds(m).items() if v == "bits"}
        assert torch.equal(program(OTHER), m.reference(OTHER))


def test_training() -> None:
    q = qat("auto-lowbit", times=given({"b": "int8"}))
    assert q.layer_times is not None
    losses = steps(q.train(), 4)
    assert all(0 < v < 50 for v in losses)
    m = q.eval().convert()
    assert kinds(m)["b"] == "int8" and kinds(m)["c"] == "bits" and m.layer_times is q.layer_times
    with torch.no_grad():
        assert torch.equal(m(OTHER), q(OTHER))
    assert m.verify(m.lower(), OTHER).ok


def test_int8_layers_of_other_schemes() -> None:
    m = fxq.compile(net(), "tbn_w1at", calibration=X, int8="b", progress=False)
    assert kinds(m) == {"a": "float32", "b": "int8", "c": "bits", "up": "float32", "d": "bits", "fc": "float32"}
    assert m.verify(m.lower(), OTHER).ok
    all8 = fxq.compile(net(), "twn_wta1", calibration=X, int8=[nn.Conv2d, nn.Linear], progress=False)
    assert set(kinds(all8).values()) == {"int8", "float32"} and all8.verify(all8.lower(), OTHER).ok
    four = fxq.compile(net(), "dorefa_w4a4", calibration=X, int8="a", progress=False)
    assert kinds(four)["a"] == "int8" and four.verify(four.lower(), OTHER).ok


def test_named_layers_are_not_asked_for() -> None:
    m = compiled({"b": "int8", "c": "int8"}, skip="c", int8="d")
    assert kinds(m) == {"a": "int8", "b": "int8", "c": "float32", "up": "float32", "d": "int8", "fc": "int8"}
    assert {s.node for s in m.history["choose-layers"].skips} == {"a", "b", "up", "fc"}
    odd = fxq.compile(net(), "xnor_w1a1", calibration=X, int8=["nothing", 99], progress=False)
    notes = [(s.node, s.why) for s in odd.history["annotate"].skips]
    assert notes == [("nothing", "this pattern of int8= matches no layer"), ("99", "this pattern of int8= matches no layer")]


class Twice(nn.Module):
    """One layer on two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.end = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(F.relu(self.stem(x))))
        return self.end(F.relu(self.a(F.max_pool2d(y, 2))).mean((2, 3)))  # type: ignore[no-any-return]


def test_each_call_of_a_layer_is_a_layer() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), X
    times = given({"a_1": "int8"}, model)
    assert [t.path for t in times.layers] == ["stem", "a", "a_1", "end"] and times.layers[1].shape != times.layers[2].shape
    m = fxq.compile(model, "auto-lowbit", calibration=x, times=times, progress=False)
    assert kinds(m) == {"stem": "int8", "a": "bits", "a_1": "int8", "end": "int8"} and m.verify(m.lower(), OTHER).ok


def test_a_layer_without_bits_becomes_int8() -> None:
    layer = given({}).layers[1]
    odd = replace(layer, times=replace(layer.times, bits=None), why="no kernel")
    assert auto_lowbit.chosen((odd,), {"b": "bits"}) == {"b": ("int8", "int8: no kernel; int8 5 us")}


def test_without_times_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_runs, "BUDGET", 0.005)
    monkeypatch.setattr(layer_runs, "_CACHE", {})
    m = fxq.compile(net(), "auto-lowbit", calibration=X, progress=False)
    assert m.layer_times is not None and m.layer_times.machine["engine"].startswith(("numba", "numpy"))
    by = {t.path: t for t in m.layer_times.layers}
    assert all(t.shape.batch == 1 and t.times.float32.us > 0 for t in by.values())
    for path, way in kinds(m).items():
        t = by[path].times
        if path in ("b", "c", "d"):
            assert t.bits is not None and t.int8 is not None and way == ("bits" if t.bits.us < t.int8.us else "int8")
    again = fxq.compile(net(), "auto-lowbit", calibration=X, times=m.layer_times, progress=False)
    assert torch.equal(again.reference(OTHER), m.reference(OTHER))


def test_ternary_activations_are_asked_for_as_such() -> None:
    mine = replace(schemes.get("tbn_w1at"), name="auto-tbn", auto=True)
    m = fxq.compile(net(), mine, calibration=X, times=given({"b": "int8"}), progress=False)
    assert m.layer_times is not None and {t.form.activations for t in m.layer_times.layers} == {"ternary"}
    assert kinds(m)["b"] == "int8" and kinds(m)["c"] == "bits" and m.verify(m.lower(), OTHER).ok


class Parts(nn.Module):
    """It can only be captured in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = net(), net()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x if float(x.sum().item()) > 0 else -x) + self.two(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("named", "which"), [("two", ["two"]), ("t*", ["two"]), ("two.*", ["two"]), ("*", ["one", "two"]), ("one.b", [])])
def test_a_part_is_named_as_a_whole(named: str, which: list[str]) -> None:
    m = fxq.compile(Parts().eval(), "xnor_w1a1", calibration=X, int8=named, progress=False)
    found = {path: {k for k, way in kinds(part).items() if way == "int8"} for path, part in m.parts.items()}
    assert [path for path in m.parts if {"a", "b", "c", "d", "fc"} <= found[path]] == which
    assert named != "one.b" or found == {"one": {"b"}, "two": set()}


def test_what_makes_no_sense() -> None:
    one = LayerTimes(given({}).layers[:1])
    for options, error, text in (
        ({"scheme": "auto-lowbit", "times": one}, SchemeError, "the given times have no layer 8->8 3x3 @12x12 groups 2"),
        ({"scheme": "auto-lowbit", "times": "fast"}, SchemeError, "times= is str, not LayerTimes"),
        ({"scheme": "xnor_w1a1", "times": one}, SchemeError, "times= is what 'auto-lowbit' chooses by, the scheme is 'xnor_w1a1'"),
        ({"scheme": "xnor_w1a1", "int8": None}, PassError, "None names no layers"),
        ({"scheme": "xnor_w1a1", "int8": ["b", 1.5]}, PassError, "1.5 names no layers"),
        ({"scheme": "xnor_w1a1", "skip": None}, PassError, "None names no layers"),
        ({"scheme": "iao_w8a8", "int8": "b"}, SchemeError, "'iao_w8a8' is int8 already"),
        ({"scheme": "xnor_w1a32", "int8": "b"}, SchemeError, "'xnor_w1a32' is weight-only"),
        ({"scheme": "auto-lowbit", "budget": fxq.Budget(bytes=0.5)}, SchemeError, "bits are chosen after training"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            fxq.compile(net(), calibration=X, progress=False, **options)  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="has nothing that runs on bits to choose"):
        replace(schemes.get("iao_w8a8"), name="mine", auto=True)
    with pytest.raises(PassError, match="the shapes are not known"):
        fxq.layer_times(net())
