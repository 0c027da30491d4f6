"""Two gloo processes with half of each batch against one process with the whole batches."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxq import distributed, numerics
from fxq.errors import FxqError
from fxq.spec import QuantSpec
from tests import distributed_worker as worker

ROOT = Path(__file__).resolve().parents[1]
GRIDS = ("scale", "zero_point", "step", "learned_step", "learned_offset", "clip", "hi", "lo")
STATISTICS = ("running_mean", "running_var")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What both processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "error", "-m", "tests.distributed_worker", str(folder / "store")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    outs = [folder / f"rank{r}.pt" for r in range(2)]
    running = [subprocess.Popen([*command, str(r), "2", str(outs[r])], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for r in range(2)]
    try:
        for p in running:
            _, said = p.communicate(timeout=300)
            assert p.returncode == 0, said
    finally:
        for p in running:
            p.kill()
    yield [torch.load(out, weights_only=True) for out in outs]


def far(a: Tensor, b: Tensor) -> float:
    """Greatest difference relative to the greatest magnitude."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) if a.numel() else 0.0


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items())


@pytest.mark.parametrize(("name", "tolerance"), [("iao_w8a8", 5e-6), ("iao_w4a4_lsq", 1e-12), ("xnor_w1a1", 1e-12), ("tbn_w1at", 1e-12)])
def test_two_processes_train_as_one(ranks: list[dict[str, Any]], name: str, tolerance: float) -> None:
    """Weights, batch norm statistics and grids after three steps of DDP. Observers measure in float32; so does all of iao_w8a8, where a last bit may
    move an activation to the next code."""
    double = tolerance < 1e-9
    one, two = worker.train(name, double, 0, 1), [r[f"train {name}"] for r in ranks]
    assert equal(two[0]["trained"], two[1]["trained"]) and equal(two[0]["frozen"], two[1]["frozen"])
    assert two[0]["file"] == two[1]["file"], "both deploy the same bytes"
    seen = set()
    for key, want in one["trained"].items():
        kind = key.rsplit(".", 1)[-1]
        observed = ".observer." in key or (kind in ("scale", "step", "fixed") and name != "iao_w4a4_lsq")
        assert far(two[0]["trained"][key], want) <= (1e-6 if observed else tolerance), key
        seen.add(kind)
    assert {"weight", "scale", *STATISTICS} <= seen and (name != "iao_w4a4_lsq" or "learned_step" in seen)
    assert not equal(one["trained"], worker.state(worker.qat(name, double))), "it trained"


def test_buffers_need_no_broadcast(ranks: list[dict[str, Any]]) -> None:
    for r in ranks:
        assert equal(r["no broadcast"]["trained"], r["train xnor_w1a1"]["trained"])


def test_one_process_goes_on_where_two_were(ranks: list[dict[str, Any]]) -> None:
    one = worker.resumed(ranks[0]["train iao_w8a8"]["checkpoint"], 0, 1)
    for key, want in one.items():
        assert far(ranks[0]["resumed"][key], want) <= 1e-6 and torch.equal(ranks[0]["resumed"][key], ranks[1]["resumed"][key]), key


@pytest.mark.parametrize("how", ["range", "lsq", "pact", "ternary"])
def test_the_grid_is_that_of_the_joined_batch(ranks: list[dict[str, Any]], how: str) -> None:
    """Bit for bit where the range or a clip decides; a mean of float32 numbers depends on their order."""
    one = worker.tracked(how, 0, 1)
    for step, want in enumerate(one):
        a, b = ranks[0][f"tracker {how}"][step], ranks[1][f"tracker {how}"][step]
        assert torch.equal(a, b)
        assert torch.equal(a, want) if how in ("range", "pact") else far(a, want) < 3e-7
    assert how in ("lsq", "pact") or not torch.equal(one[0], one[1])


@pytest.mark.parametrize("name", worker.OBSERVED)
def test_calibration_merges_the_observers(ranks: list[dict[str, Any]], name: str) -> None:
    """Three batches on one rank, one on the other."""
    two = [r[f"calibrated {name}"] for r in ranks]
    assert equal(two[0], two[1])
    one = worker.calibrated(name, worker.batches())
    far_off = {k for k, v in one.items() if k.endswith("scale") and "weight" not in k and "bias" not in k and not torch.equal(v, two[0][k])}
    if name == "minmax":
        assert not far_off and equal(one, two[0])
    elif name == "ema":
        a, b = (worker.moving(s) for s in (worker.batches()[:3], worker.batches()[3:]))
        a.merge(b)
        assert torch.equal(two[0]["root.x_q.scale"], numerics.choose_qparams(*a.range(), QuantSpec.parse("u8/pt")).scale)
    else:
        assert all(far(two[0][k], one[k]) < 0.03 for k in far_off)


def test_a_process_without_batches_takes_the_others_grids(ranks: list[dict[str, Any]]) -> None:
    one = worker.calibrated("minmax", worker.batches())
    assert all(equal(r["calibrated by one"], one) for r in ranks)


def test_corrected_biases_agree(ranks: list[dict[str, Any]]) -> None:
    assert equal(ranks[0]["corrected"], ranks[1]["corrected"])


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("input", "CalibrationError: x: the value holds NaN or infinity in another process", "CalibrationError: x: the value holds NaN or infinity. Look"),
        ("weight", "CalibrationError: a parameter or statistic of another process is NaN or infinite. Lower", "CalibrationError: b: the weight is NaN"),
        ("calibration", "FxqError: the process of rank 1 failed: batch 1 holds NaN or infinity", "CalibrationError: batch 1 holds NaN or infinity"),
        ("no data", "FxqError: the process of rank 1 failed: the calibration data is empty", "CalibrationError: the calibration data is empty"),
        ("two nets", "CalibrationError: calibrate: the process of rank 1 calibrates another model", "CalibrationError: calibrate: the process of rank 0"),
    ],
)
def test_an_error_of_one_process_stops_all(ranks: list[dict[str, Any]], what: str, first: str, second: str) -> None:
    assert ranks[0]["errors"][what].startswith(first) and ranks[1]["errors"][what].startswith(second)


def test_alone_waits_for_nobody(ranks: list[dict[str, Any]]) -> None:
    scales = [float(r["alone"].split()[2]) for r in ranks]
    assert scales[1] == pytest.approx(2 * scales[0], rel=1e-4)


@pytest.mark.parametrize("sizes", ["uneven", "empty"])
def test_processes_may_have_batches_of_different_sizes(ranks: list[dict[str, Any]], sizes: str) -> None:
    one = worker.uneven(0, 1, (8,))
    for r in ranks:
        for key, want in one.items():
            if key.endswith((*STATISTICS, *GRIDS)):
                assert far(r[sizes][key], want) < (1e-12 if key.endswith(STATISTICS) else 1e-6), key


def test_batch_norms_apart(ranks: list[dict[str, Any]]) -> None:
    """``sync_batch_norm = False`` is plain DDP; ranges agree all the same."""
    a, b = (r["apart"] for r in ranks)
    assert not torch.equal(a["root.a.bn.running_mean"], b["root.a.bn.running_mean"])
    assert torch.equal(a["root.a_q.own.scale"], b["root.a_q.own.scale"])


def test_compiled_in_ddp(ranks: list[dict[str, Any]]) -> None:
    for compiled, plain in (r["compiled"] for r in ranks):
        assert all(far(v, plain[k]) < 1e-5 for k, v in compiled.items())
    assert equal(ranks[0]["compiled"][0], ranks[1]["compiled"][0])


def test_one_process_sends_nothing() -> None:
    v = torch.randn(5)
    assert distributed.world() == 1 and distributed.gather(3) == [3]
    assert torch.equal(distributed.mean(v), v.mean()) and torch.equal(distributed.total(v), v.double())
    lo, hi = distributed.extremes(v.min(), v.max())
    assert float(lo) == float(v.min()) and float(hi) == float(v.max()) and bool(distributed.any_of(torch.tensor(True)))
    bn = nn.BatchNorm1d(5)
    assert torch.equal(distributed.batch_norm(bn, torch.ones(3, 5)), torch.zeros(3, 5))
    with pytest.raises(FxqError, match="mine"), distributed.meeting():
        raise FxqError("mine")


def test_processes_cut_alike(ranks: list[dict[str, Any]]) -> None:
    """Taylor's criterion takes the gradients of all processes: both keep the channels that one process with all the data keeps."""
    one, two = worker.cut(worker.batches()), [r["cut"] for r in ranks]
    assert equal(two[0], two[1]) and equal(two[0], one)
    assert not equal(worker.cut(worker.batches()[3:]), one), "half of the data would cut something else"


@pytest.mark.parametrize(("name", "scope"), worker.SHARED)
def test_masks_and_codebooks_are_those_of_all(ranks: list[dict[str, Any]], name: str, scope: str) -> None:
    one, two = (r[f"shared {name} {scope}"] for r in ranks)
    assert equal(one, two)
    masks = [{k: v for k, v in worker.sparse(name, scope, rank).state_dict().items() if k.endswith("weight_mask")} for rank in (0, 1)]
    assert len(masks[0]) == 5 and equal(*masks) == (scope == "global"), "by themselves they would cut something else"
