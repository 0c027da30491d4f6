"""Inputs of a program that are not like the example: other channels, sizes, ranks and batches, wrapped tensors; state dicts and memory that moves."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import schemes
from fxq.bitwise import ops
from fxq.bitwise.program import BitProgram
from fxq.compiled import CompiledModel
from fxq.errors import FxqError
from tests.bit_checks import differing
from tests.bit_nets import batches, compiled, randomized

ALL_LOW = replace(schemes.get("xnor_w1a1"), name="all_low", float_layers=())


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return compiled()


def lowered(net: nn.Module, *shape: int) -> tuple[CompiledModel, BitProgram]:
    """With the first and last layer on bits too."""
    torch.manual_seed(0)
    m = fxq.compile(randomized(net), ALL_LOW, calibration=[torch.randn(shape)], progress=False)
    return m, BitProgram(m.graph_module)


def convolutions(*tail: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(13, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 7, 3, padding=1), *tail)


@pytest.mark.parametrize("shape", [(2, 12, 6, 6), (2, 14, 6, 6), (2, 64, 6, 6), (2, 65, 6, 6), (2, 1, 6, 6), (13, 6, 6), (2, 13, 36), (2, 13)])
def test_other_channels_than_the_examples_are_refused(shape: tuple[int, ...]) -> None:
    """One word holds 12, 13 and 14 channels."""
    _, program = lowered(convolutions(), 2, 13, 6, 6)
    with pytest.raises(FxqError, match="does not fit a layer of 13 channels"):
        program(torch.randn(shape))


@pytest.mark.parametrize("shape", [(4, 3, 69), (4, 3, 71), (2, 2, 70, 70), (70,)])
def test_other_features_of_a_linear_layer_are_refused(shape: tuple[int, ...]) -> None:
    _, program = lowered(nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 5)), 4, 3, 70)
    with pytest.raises(FxqError, match="does not fit a layer of 70 channels.*3 dimensions and the channels in dimension 2"):
        program(torch.randn(shape))


@pytest.mark.parametrize("side", [1, 4])
def test_other_sizes_in_front_of_a_flatten_are_refused(side: int) -> None:
    tail = [nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * side * side, 9), nn.ReLU(), nn.Linear(9, 4)]
    m, program = lowered(convolutions(*tail), 2, 13, side, side)
    assert differing(m.graph_module, torch.randn(3, 13, side, side), program=program) == []
    for size in ((side + 1, side), (2 * side, 2 * side), (side, side + 3)):
        with pytest.raises(FxqError, match="Pass inputs of the example's size"):
            program(torch.randn(2, 13, *size))


@pytest.mark.parametrize("numba", ["1", "0"])
@pytest.mark.parametrize("shape", [(0, 13, 6, 6), (0, 13, 9, 5)])
def test_batches_of_nothing(shape: tuple[int, ...], numba: str, model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQ_NUMBA", numba)
    m, program = lowered(convolutions(nn.BatchNorm2d(7), nn.MaxPool2d(2, 1, 1), nn.ReLU(), nn.Conv2d(7, 5, 3, padding=1)), 2, 13, 6, 6)
    assert differing(m.graph_module, torch.randn(shape), program=program) == []
    assert BitProgram(model.graph_module)(next(batches(1))[:0]).shape == (0, 5)
    m, program = lowered(nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 5)), 4, 3, 70)
    for lead in ((0, 3), (4, 0)):
        assert differing(m.graph_module, torch.randn(*lead, 70), program=program) == []


def test_wrapped_tensors_and_tracers_are_refused(model: CompiledModel) -> None:
    program, x = BitProgram(model.graph_module), next(batches(1))
    calls: list[Any] = [
        lambda: torch.vmap(lambda a: program(a[None])[0])(x),
        lambda: torch.func.jvp(program, (x,), (x,)),
        lambda: torch.func.grad(lambda a: program(a).sum())(x),
        lambda: torch.jit.trace(program, (x,)),
    ]
    for call in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            with pytest.raises(FxqError, match="a bit program takes plain tensors"):
                call()


def test_state_dicts_are_refused(model: CompiledModel) -> None:
    """Scales, borders and sessions are no tensors of the state dict: loading another would give wrong numbers."""
    program, other = (BitProgram(m.graph_module) for m in (model, compiled(seed=5)))
    x = next(batches(1))
    wanted = program(x)
    for module, state in ((program, other.state_dict()), (nn.Sequential(program), nn.Sequential(other).state_dict())):
        with pytest.raises(FxqError, match="a BitProgram cannot take a state dict.*fxq.load"):
            module.load_state_dict(state)
    assert torch.equal(program(x), wanted)


def test_memory_that_moves(model: CompiledModel) -> None:
    program, x = BitProgram(model.graph_module), next(batches(1))
    wanted = program(x)
    program.share_memory()
    held = [torch.full_like(b, -1) for _ in range(5) for b in program.buffers()]  # what was freed is written over
    assert held and torch.equal(program(x), wanted)


def test_resident_bytes_have_what_the_engine_keeps(model: CompiledModel) -> None:
    program = BitProgram(model.graph_module)
    own = sum(t.nbytes for t in (*program.parameters(), *program.buffers()))
    assert program.report().resident_bytes == own
    program(next(batches(1)))
    path = next(k for k, name in program.layer_names.items() if name == "a")
    a = program.graph_module.get_buffer(f"{path}.words")
    borders = 4 * 4 * 32  # int32, of 4 kinds of pixels (a first row or not, a first column or not), 32 lanes
    assert own + borders < program.report().resident_bytes < 2 * own and borders < ops.kept_bytes(a) < 3 * borders


@pytest.mark.parametrize(("kernel", "padding", "dilation", "rows"), [((2, 1), (1, 0), (4, 4), 3), ((2, 2), (1, 1), (4, 1), 3), ((2, 1), (1, 0), (9, 1), 8)])
def test_float_pools_whose_windows_see_no_row(kernel: Any, padding: Any, dilation: Any, rows: int) -> None:
    big: Tensor = torch.full((2, 4, 40, 5), 1e9)  # what lies behind the values in memory is greater
    x = big[:1, :1, :rows].copy_(torch.randn(1, 1, rows, 5))
    wanted = F.max_pool2d(x, kernel, 1, padding, dilation)
    got = ops.float_max_pool(x, list(kernel), [1, 1], list(padding), list(dilation), False)
    assert torch.equal(got, wanted) and bool((wanted == -torch.inf).any())
