"""8-bit layers through ONNX Runtime's kernel: the reference's numbers."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxq import kernels, numerics
from fxq.bitwise import int8_layers
from fxq.bitwise.int8_layers import Int8Layer, takes
from fxq.convolutions import ChannelAffine2d, padded
from fxq.kernels import Codes
from fxq.modules import Quantized
from fxq.schemes import S8N
from fxq.spec import QParams, QuantSpec

U8 = QuantSpec.parse("u8/pt")
X, OUT = QParams(U8, torch.tensor(0.02), torch.tensor(117, dtype=torch.int32)), QParams(U8, torch.tensor(0.03), torch.tensor(9, dtype=torch.int32))


def layer(op: Any, seed: int = 0) -> Quantized:
    torch.manual_seed(seed)
    op.weight.data = torch.randn(op.weight.shape)
    grid = numerics.choose_qparams(op.weight.flatten(1).amin(1), op.weight.flatten(1).amax(1), S8N)
    return Quantized(op, grid, None if op.bias is None else numerics.bias_qparams(X, grid))


OPS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 7)),
    "strided": (lambda: nn.Conv2d(3, 8, 7, 2, 3, bias=False), (1, 3, 32, 32)),
    "grouped, dilated": (lambda: nn.Conv2d(8, 12, (3, 2), (1, 2), (2, 1), (2, 1), groups=4), (2, 8, 11, 9)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (1, 16, 8, 8)),
    "uneven": (lambda: padded(nn.Conv2d(4, 5, 2), (0, 1, 1, 0)), (1, 4, 6, 6)),
    "same": (lambda: nn.Conv2d(4, 5, (3, 5), padding="same"), (1, 4, 6, 6)),
    "1d": (lambda: nn.Conv1d(6, 7, 3, 2, 1), (2, 6, 15)),
    "3d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (1, 3, 4, 5, 6)),
    "linear": (lambda: nn.Linear(40, 11), (3, 40)),
    "linear, 3 dimensions": (lambda: nn.Linear(40, 11, bias=False), (2, 5, 40)),
}


@pytest.mark.parametrize("name", OPS)
def test_the_numbers_are_the_reference_s(name: str) -> None:
    make, size = OPS[name]
    module = layer(make())
    x = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert takes(module, X, OUT)
    made = Int8Layer(module, X, OUT)
    want = kernels.weighted(module, [Codes(x, X)], OUT)
    for given in (x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x):
        found = made(given)
        assert found.dtype == torch.uint8 and torch.equal(found, want)
    assert found.ndim != 4 or found.is_contiguous(memory_format=torch.channels_last)
    assert len(want.unique()) > 10, "not all saturated"
    if isinstance(module.op, nn.Linear):
        assert takes(module, X, None)
        assert torch.equal(Int8Layer(module, X, None)(x), kernels.float_output(module, [Codes(x, X)]))
    else:
        assert not takes(module, X, None)
    assert torch.equal(made(x[:0]), want[:0])


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = layer(nn.Conv2d(4, 4, 3))
    narrow = QParams(QuantSpec.parse("u4/pt"), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
    signed = QParams(QuantSpec.parse("s8/pt"), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
    binary = QParams(QuantSpec.parse("b1/pt"), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
    assert takes(conv, X, OUT) and takes(conv, narrow, OUT)
    for x, out in ((X, narrow), (X, signed), (signed, OUT), (binary, OUT), (X, binary)):
        assert not takes(conv, x, out)
    assert not takes(nn.Conv2d(4, 4, 3), X, OUT) and not takes(layer(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), X, OUT)
    each = QParams(QuantSpec.parse("u8/pc1"), torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int32))
    blocks = QParams(QuantSpec.parse("s8/pb2x0"), torch.full((2, 4), 0.1), torch.zeros(2, 4, dtype=torch.int32))
    affine = layer(nn.Conv2d(4, 4, 1, groups=4))
    assert takes(affine, X, OUT)
    affine.op.__class__ = ChannelAffine2d
    assert not takes(affine, X, OUT)
    assert not takes(conv, each, OUT) and not takes(conv, X, each) and not takes(Quantized(nn.Linear(4, 4), blocks, None), X, OUT)
    odd = layer(nn.Linear(4, 4))
    odd.weight_grid.zero_point += 3
    assert not takes(odd, X, OUT)
    monkeypatch.setattr(int8_layers, "sums_are_exact", lambda: False)
    assert not takes(conv, X, OUT)


def test_sums_that_may_leave_int32_are_the_reference_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's sum would wrap: the products and the bias each fit, together they do not."""
    module = layer(nn.Linear(64, 1))
    module.op.weight.data = torch.ones(1, 64)
    module.weight_grid.scale.fill_(1 / 127)
    room = (1 << 31) - 64 * 127 * (255 - 117)
    x = torch.full((1, 64), 255, dtype=torch.uint8)
    for bias, fits in ((room - 1, True), (room, False), (-room, False)):
        monkeypatch.setattr(module, "bias_codes", lambda bias=bias: torch.tensor([bias], dtype=torch.int32))
        assert takes(module, X, OUT) == takes(module, X, None) == fits
        if bias > 0:
            same = torch.equal(Int8Layer(module, X, OUT)(x), kernels.weighted(module, [Codes(x, X)], OUT))
            assert same == fits, "the bound is the runtime's"


def test_sessions_die_with_their_layer_and_know_the_threads() -> None:
    made = Int8Layer(layer(nn.Conv2d(4, 4, 3)), X, OUT)
    x = torch.zeros(1, 4, 5, 5, dtype=torch.uint8)
    key = id(made.weight)
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            one = made(x)
    finally:
        torch.set_num_threads(before)
    assert {k for k in int8_layers._sessions if k[0] == key} == {(key, 1, os.getpid()), (key, 2, os.getpid())}
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), one) and id(twin.weight) != key
    del made
    gc.collect()
    assert not {k for k in int8_layers._sessions if k[0] == key}


def test_a_forked_process_has_sessions_of_its_own() -> None:
    """The threads of the parent's are not there: its session would wait for them for ever, when it runs and when it ends.

    Torch's own parallel loops wait so too: the input is one that needs no copy.
    """
    code = """
import os, signal, torch
from torch import nn
from tests.bitwise.test_int8_layers import OUT, X, Int8Layer, layer
torch.set_num_threads(2)
made, x = Int8Layer(layer(nn.Conv2d(64, 64, 3, padding=1)), X, OUT), torch.randint(0, 256, (4, 28, 28, 64), dtype=torch.uint8).movedim(-1, 1)
want = made(x).numpy()
child = os.fork()
if child == 0:
    signal.alarm(20)
    same = (made(x).numpy() == want).all()
    del made
    os._exit(0 if same else 3)
assert os.waitpid(child, 0)[1] == 0
assert (made(x).numpy() == want).all()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_operator_is_sound() -> None:
    for name in ("grouped, dilated", "linear, 3 dimensions"):
        make, size = OPS[name]
        m = Int8Layer(layer(make()), X, OUT)
        x = torch.zeros(size, dtype=torch.uint8)
        args = (x, m.weight, m.bias, m.scale, m.window, m.zeros, m.scales)
        torch.library.opcheck(int8_layers.int8_layer.op, args, test_utils=("test_schema", "test_faketensor"))
