"""Broken Q/DQ graphs never crash the lint, and repairs never make the list of findings longer."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fxq.lint_trt import CAPABILITIES, check
from fxq.lint_trt_fix import fix
from tests.trt_zoo.mutants import MUTATIONS, mutant
from tests.trt_zoo.zoo import ALL

NAMES = sorted(ALL)


@pytest.mark.parametrize("part", range(2))
@settings(max_examples=300, deadline=None, derandomize=True)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 1 << 32), changes=st.integers(1, 5), target=st.sampled_from([*CAPABILITIES]))
def test_mutants(part: int, name: str, seed: int, changes: int, target: str) -> None:
    model = mutant(ALL[name].make(), seed + part, changes)
    before = check(model, target)
    assert json.loads(before.to_json())["ok"] == before.ok and str(before)
    assert all(f.node and f.fact and f.way_out for f in before.findings)
    fixed, notes = fix(model, target)
    assert all(isinstance(n, str) for n in notes)
    assert len(check(fixed, target).findings) <= len(before.findings)


def test_every_mutation_changes_something() -> None:
    """A mutation that does nothing would make the test above weak."""
    import random

    import onnx

    still = {m.__name__ for m in MUTATIONS}
    for name in ("cnn opset 17", "scale by Mul", "int4 blocks of 64", "through Pad with 0"):
        for seed in range(20):
            for mutation in MUTATIONS:
                model = ALL[name].make()
                copy = onnx.ModelProto()
                copy.CopyFrom(model)
                mutation(random.Random(seed), copy)
                if copy != model:
                    still.discard(mutation.__name__)
    assert still == set()
