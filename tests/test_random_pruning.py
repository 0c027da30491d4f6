"""Random small nets: the cut graph computes what the masked one computes, in float64, and the cut net runs in integers."""

import pytest
import torch

import fxq
from fxq import pruning
from fxq.errors import PassError
from fxq.graph import finish
from fxq.snapshot import distance
from tests.pruning_nets import canonical, randomised
from tests.test_random_graphs import RandomNet

GRAPHS, PER_TEST, INT8 = 120, 20, 5
CRITERIA = ("l2", "random", "group-l2", "l1")


@pytest.mark.parametrize("first", range(0, GRAPHS, PER_TEST))
def test_random_graphs_compute_what_their_masks_say(first):
    cut = 0
    for seed in range(first, first + PER_TEST):
        torch.manual_seed(seed)
        gm = canonical(randomised(RandomNet(seed), seed), torch.randn(2, 3, 16, 16))
        how = pruning.Prune(ratio=(0.3, 0.5, 0.6)[seed % 3], by=CRITERIA[seed % 4], scope="layer" if seed % 2 else "global", multiple_of=1)
        try:
            plan = pruning.plan(gm, how, 1)
        except PassError as e:
            assert "nothing can be cut" in str(e) or "larger than every layer" in str(e), f"seed {seed}: {e}"
            continue
        masked = plan.masked()
        pruning.apply(plan)
        finish(gm)
        x = torch.randn(3, 3, 16, 16).double()
        with torch.no_grad():
            assert distance(masked(x), gm(x)) < 1e-11, f"seed {seed}"
        cut += sum(int((~k).sum()) for k in plan.kept)
    assert cut > PER_TEST


@pytest.mark.parametrize("first", range(0, 30, INT8))
def test_random_cut_nets_run_in_integers(first):
    for seed in range(first, first + INT8):
        torch.manual_seed(seed)
        net, data = RandomNet(seed).eval(), torch.randn(4, 3, 16, 16)
        try:
            m = fxq.compile(net, calibration=[data], prune=fxq.Prune(ratio=0.4, by="random", seed=seed, multiple_of=1), progress=False)
        except PassError as e:
            assert "nothing can be cut" in str(e) or "larger than every layer" in str(e), f"seed {seed}: {e}"
            continue
        proof = m.verify(m.lower().data, [torch.randn(3, 3, 16, 16)])
        assert proof.ok, f"seed {seed}: {proof}"
