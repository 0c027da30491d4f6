"""Random small nets on low-bit schemes: ONNX Runtime's file equals the integer reference, element by element, and the linter knows what it fuses."""

import pytest
import torch

import fxq
from fxq import schemes
from fxq.lint import agrees, lint, runtime_report
from tests.test_random_graphs import RandomNet

SCHEMES = (
    "bnn_w1a1", "xnor_w1a1", "xnor_w1a1_k", "twn_wta8", "twn_wta1", "tbn_w1at", "iao_w4a4", "iao_w4a4_lsq", "iao_w3a2", "dorefa_w2a2", "dorefa_w4a4",
    "dorefa_w4a4_compat", "dorefa_w7a3", "xnor_w1a32", "twn_wta32",
)  # fmt: skip
PER_TEST = 5
TURNS = "left: predicted"  # Q/DQ pairs around Transposes, which the linter does not predict


@pytest.mark.parametrize("first", range(0, len(SCHEMES), PER_TEST))
def test_random_graphs_equal_the_reference(first: int) -> None:
    compared = 0
    for seed in range(first, first + PER_TEST):
        torch.manual_seed(seed)
        net, name = RandomNet(seed).eval(), SCHEMES[seed % len(SCHEMES)]
        m = fxq.compile(net, name, calibration=[torch.randn(4, 3, 16, 16)])
        data = m.lower().data
        proof = m.verify(data, [torch.randn(3, 3, 16, 16)])
        assert proof.ok and proof.missing == (), f"seed {seed}, {name}: {proof}"
        assert [d for d in agrees(lint(data), runtime_report(data)) if TURNS not in d] == [], f"seed {seed}, {name}"
        compared += proof.nodes
    assert compared > 8 * PER_TEST


def test_every_low_bit_scheme_is_among_them() -> None:
    known = {n for n in schemes.names() if schemes.get(n).trains and schemes.get(n).share is None}
    assert {n.removesuffix("_pact").removesuffix("_lsq").removesuffix("_plain") for n in known} <= {*SCHEMES, "iao_w8a8", "bnn_w1a32", "auto-lowbit"}
