"""Requests of pruning that make no sense, or do not fit the model: each says what is wrong, where, and the way out."""

import pytest
import torch

import fxq
from fxq import pruning
from fxq.errors import CalibrationError, PassError
from tests.pruning_nets import CASES, Residual, canonical, randomised


def net():
    return randomised(Residual())


def small_input():
    return CASES["residual"].input()


def pruned(model, x=None, **how):
    return fxq.prune(model, fxq.Prune(**{"multiple_of": 1, **how}), example=small_input() if x is None else x, progress=False)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, "nothing says how much.*ratio="),
        ({"ratio": 0.5, "macs": 0.5}, "ratio and macs both"),
        ({"ratio": 1.0}, "would empty every layer"),
        ({"ratio": -0.1}, "no share"),
        ({"macs": 0.0}, "no share of what may stay"),
        ({"macs": 1.5}, "no share"),
        ({"ratio": 0.5, "by": "l3"}, "unknown word 'l3'.*did you mean"),
        ({"ratio": 0.5, "scope": "layers"}, "did you mean 'layer'"),
        ({"ratio": 0.5, "multiple_of": 0}, "multiple_of=0"),
        ({"ratio": 0.5, "ratios": {"a": 1.0}}, "'a'"),
    ],
)
def test_requests_that_make_no_sense(how, says):
    with pytest.raises(PassError, match=says):
        fxq.Prune(**how)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"ratio": 0.95}, "would empty a layer.*at most"),
        ({"ratio": 0.5, "multiple_of": 64}, "64"),
        ({"ratio": 0.5, "keep": "nothing.*"}, "'nothing.*' of keep= names no layer"),
        ({"ratio": 0.5, "keep": "a", "ratios": {"a": 0.5}}, "a: keep= and ratios= both name it"),
        ({"ratio": 0.5, "ratios": {"zzz": 0.5}}, "names no layer"),
        ({"ratio": 0.5, "ratios": {"head": 0.5}}, "head: ratios= names it, but its outputs stay: is an output"),
        ({"ratio": 0.5, "ratios": {"stem": 0.5, "b": 0.25}}, "stem: its layers go together"),
        ({"ratio": 0.5, "at_least": 1.5}, "at_least=1.5"),
        ({"ratio": 0.5, "at_least": 8, "at_most": 4}, "floor"),
        ({"ratio": 0.5, "by": "taylor"}, "needs data"),
        ({"macs": 0.001}, "smallest net.*more than the budget"),
    ],
)
def test_requests_that_do_not_fit_the_model(how, says):
    how = {"multiple_of": 1, **how}
    with pytest.raises((PassError, CalibrationError), match=says):
        gm = canonical(net(), small_input())
        request = fxq.Prune(**how)
        pruning.plan(gm, request, request.multiple_of)


def test_gammas_need_batch_norms():
    case = CASES["gated"]
    with pytest.raises(PassError, match="no batch norm.*by='l2'"):
        pruned(case.net(), case.input(), ratio=0.5, by="bn-gamma")
    p = pruned(net(), ratio=0.5, by="bn-gamma")
    assert "by='l2' does" in dict(p.prune_report.left)["a"]


def test_weights_that_are_not_finite_are_named():
    model = net()
    model.a.weight.data[0, 0] = float("inf")
    gm = canonical(net(), small_input())
    gm.get_submodule("a").weight.data[0, 0] = float("nan")
    with pytest.raises(PassError, match="a: its weights are not finite"):
        pruning.plan(gm, fxq.Prune(ratio=0.5), 1)


def test_a_loss_must_be_a_finite_number():
    with pytest.raises(CalibrationError, match="finite scalar"):
        pruned(net(), ratio=0.5, by="taylor", data=[(small_input(), torch.tensor([0, 1]))], loss=lambda y, t: y)


def test_shapes_must_be_known():
    with pytest.raises(CalibrationError, match="example="):
        fxq.prune(net(), fxq.Prune(ratio=0.5), progress=False)
