"""The operators ``torch.ops.fxq.*``: their results, and what they say of shapes, strides and types before they run."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq import numerics
from fxq.bitwise import layers, layout, numpy_kernels, ops
from fxq.bitwise.code_modules import Quantize
from fxq.bitwise.modules import BitConv
from fxq.errors import FxqError
from fxq.spec import QParams, QuantSpec

CHECKS = ("test_schema", "test_faketensor")
seldom = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def codes(*shape: int, planes: int = 1, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([-1, 1] if planes == 1 else [-1, 0, 1], dtype=torch.int8)
    return values[torch.randint(0, len(values), shape, generator=g)]


def packed(x: Tensor, planes: int, axis: int) -> Tensor:
    out: Tensor = ops.pack(x, -1, 1, planes, axis)
    return out


def layer(linear: bool, rank: int, kind: str, planes: int = 1) -> BitConv:
    w = codes(70, 66, *([3, 3] if rank == 2 else [1, 3] if rank else [1, 1]), planes=2)
    ones = torch.ones(70, dtype=torch.int64)
    pads = (0, 0, 0, 0) if linear else (1, 1, 1, 1) if rank == 2 else (0, 0, 1, 1)
    made = layers.BitLayer(w, ones, 0 * ones, (w != 0).flatten(1).sum(1), torch.ones(70) / 8, 1, (1, 1), (1, 1), pads, linear, rank, planes)
    zero = torch.zeros(70, dtype=torch.int32)
    end = layers.Epilogue(kind, zero - 3, zero + 3, zero + 1, zero, made.scale, -128, 127, 0)
    if kind in ("sign", "ternary"):
        return BitConv(made, layers.Epilogue(kind, end.lo, end.hi))
    return BitConv(made, end)


@pytest.mark.parametrize("kind", ["sign", "ternary", "codes", "float"])
@pytest.mark.parametrize(("linear", "rank", "shape"), [(False, 2, (2, 66, 5, 4)), (False, 1, (2, 66, 7)), (True, 0, (4, 66)), (True, 0, (2, 3, 66))])
def test_what_layers_say_of_their_results(linear: bool, rank: int, shape: tuple[int, ...], kind: str) -> None:
    m, axis = layer(linear, rank, kind), len(shape) - 1 if linear else 1
    x = packed(codes(*shape), 1, axis)
    args = (x, m.words, m.blocks, m.geometry, m.gives, [m.get_buffer(f"table_{i}") for i in range(m.count)], m.numbers)
    torch.library.opcheck(ops.bit_conv.op, args, test_utils=CHECKS)  # type: ignore[arg-type]
    y = m(x)
    real, w = codes(*shape).float(), codes(70, 66, *([3, 3] if rank == 2 else [1, 3] if rank else [1, 1]), planes=2).float()
    dot = F.linear(real, w[:, :, 0, 0]) if linear else F.conv2d(real, w, padding=1) if rank == 2 else F.conv1d(real, w[:, :, 0], padding=1)
    if kind in ("sign", "ternary"):
        found = ops.unpack(y, 70, axis).to(torch.float32)
        assert torch.equal(found, torch.where(dot >= 3, 1.0, -1.0 if kind == "sign" else torch.where(dot <= -3, -1.0, 0.0)))
    else:
        assert torch.equal(y.float(), dot / 8 if kind == "float" else torch.round(dot / 8).clamp(-128, 127)) and y.shape == dot.shape


def test_a_flattened_layer() -> None:
    m = layer(True, 2, "float")
    x = codes(2, 66, 3, 3)
    w = codes(70, 66, 3, 3, planes=2).float()
    assert torch.equal(m(packed(x, 1, 1)), F.linear(x.float().flatten(1), w.flatten(1)) / 8)


@seldom
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(1, 140), st.integers(1, 2), st.booleans(), st.sampled_from(["plain", "last", "odd"]))
def test_pack_and_unpack(sizes: list[int], channels: int, planes: int, last: bool, memory: str) -> None:
    shape = [sizes[0], channels, *sizes[1:]] if not last else [*sizes, channels]
    axis = len(shape) - 1 if last else 1
    x = codes(*shape, planes=planes)
    for dtype in (torch.float32, torch.int8):
        v = x.to(dtype)
        v = v.movedim(1, -1).contiguous().movedim(-1, 1) if memory == "last" else v.transpose(0, -1).contiguous().transpose(0, -1) if memory == "odd" else v
        bits = packed(v, planes, axis)
        assert list(bits.shape) == [planes, *[s for d, s in enumerate(shape) if d != axis], layout.words_of(channels)]
        assert torch.equal(ops.unpack(bits, channels, axis), x)
    torch.library.opcheck(ops.pack.op, (x, -1, 1, planes, axis), test_utils=CHECKS)  # type: ignore[arg-type]
    torch.library.opcheck(ops.unpack.op, (bits, channels, axis), test_utils=CHECKS)  # type: ignore[arg-type]


@seldom
@given(st.tuples(*[st.integers(2, 9)] * 2, *[st.integers(1, 3)] * 2, *[st.integers(1, 2)] * 3), st.booleans(), st.data())
def test_max_pools(numbers: tuple[int, ...], ceil: bool, data: Any) -> None:
    h, w, kh, kw, s, d, planes = numbers
    p = [data.draw(st.integers(0, k // 2)) for k in (kh, kw)]
    if h + 2 * p[0] < d * (kh - 1) + 1 or w + 2 * p[1] < d * (kw - 1) + 1:
        return
    x = codes(2, 5, h, w, planes=planes)
    wanted = F.max_pool2d(x.float(), (kh, kw), s, p, d, ceil)
    window = ([kh, kw], [s, s], p, [d, d], ceil)
    on_bits = ops.bit_max_pool(packed(x, planes, 1), 5, *window)
    assert torch.equal(ops.unpack(on_bits, 5, 1).float(), wanted)
    for dtype in (torch.int8, torch.uint8):
        shifted = (x + (0 if dtype == torch.int8 else 1)).to(dtype)
        found = ops.code_max_pool(shifted, *window)
        assert torch.equal(found.float() - (0 if dtype == torch.int8 else 1), wanted)
    for v in (x.float(), x.float().contiguous(memory_format=torch.channels_last)):
        assert torch.equal(ops.float_max_pool(v, *window), wanted)
    torch.library.opcheck(ops.float_max_pool.op, (x.float(), *window), test_utils=CHECKS)  # type: ignore[arg-type]
    torch.library.opcheck(ops.bit_max_pool.op, (packed(x, planes, 1), 5, *window), test_utils=CHECKS)  # type: ignore[arg-type]
    torch.library.opcheck(ops.code_max_pool.op, (x, *window), test_utils=CHECKS)  # type: ignore[arg-type]


@seldom
@given(st.lists(st.integers(1, 150), min_size=1, max_size=4), st.integers(1, 2), st.integers(0, 99))
def test_channels_move_and_join(counts: list[int], planes: int, seed: int) -> None:
    xs = [codes(2, c, 2, 3, planes=planes, seed=seed + i) for i, c in enumerate(counts)]
    bits, total = [packed(x, planes, 1) for x in xs], sum(counts)
    joined = ops.bit_cat(bits, counts)
    assert torch.equal(joined, packed(torch.cat(xs, 1), planes, 1))
    indices = torch.randint(0, total, (total + 3,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ops.bit_select(joined, total, indices), packed(torch.cat(xs, 1)[:, indices], planes, 1))
    torch.library.opcheck(ops.bit_cat.op, (bits, counts), test_utils=CHECKS)  # type: ignore[arg-type]
    torch.library.opcheck(ops.bit_select.op, (joined, total, indices), test_utils=CHECKS)  # type: ignore[arg-type]


def test_adds_and_tables_in_any_memory_order() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (2, 5, 3, 4), generator=g, dtype=torch.uint8) for _ in range(2))
    last = b.contiguous(memory_format=torch.channels_last)
    wanted = ops.code_add(a, b, 0.5, 0.25, 3.0, 200)
    assert int(wanted.max()) <= 200 and torch.equal(wanted, ops.code_add(a, last, 0.5, 0.25, 3.0, 200))
    assert torch.equal(wanted.double(), torch.round(0.5 * a.double() + 0.25 * b.double() + 3).clamp(0, 200))
    values = torch.randperm(256, generator=g).to(torch.uint8)
    for x in (a, last, a[0, 0]):
        assert torch.equal(ops.code_table(x, values), values[x.long()])
        torch.library.opcheck(ops.code_table.op, (x, values), test_utils=CHECKS)  # type: ignore[arg-type]
    torch.library.opcheck(ops.code_add.op, (a, last, 0.5, 0.25, 3.0, 200), test_utils=CHECKS)  # type: ignore[arg-type]


def test_layers_do_not_share_what_is_kept_of_them() -> None:
    first, x = layer(False, 2, "float"), packed(codes(1, 66, 4, 4), 1, 1)
    before = first(x)
    kept = len(ops._made)
    other = layer(False, 2, "float")
    other.table_2 = other.table_2 * 2  # type: ignore[assignment, operator]
    assert torch.equal(other(x), 2 * before) and len(ops._made) == kept + 1
    other.table_0 = other.table_0 * 3  # type: ignore[assignment, operator]
    assert torch.equal(other(x), 6 * before), "a new table is seen"
    del other
    assert len(ops._made) == kept and torch.equal(first(x), before)




def test_adds_in_float32_only_where_all_pairs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxq.bitwise import numba_add

    g = np.random.default_rng(0)
    a, b = np.repeat(np.arange(256, dtype=np.uint8), 256), np.tile(np.arange(256, dtype=np.uint8), 256)
    exact = 0
    for _ in range(20):
        c = layout.AddConstants(*(float(np.float32(v)) for v in (*g.uniform(0.1, 1.2, 2), g.uniform(-200, 100))), 0, int(g.integers(15, 256)))
        exact += numba_add.is_exact(c)
        assert np.array_equal(numba_add.add(a, b, c), numpy_kernels.add(a, b, c)) == numba_add.is_exact(c)
        assert np.array_equal(ops.code_add(torch.from_numpy(a), torch.from_numpy(b), c.ra, c.rb, c.fixed, c.most).numpy(), numpy_kernels.add(a, b, c))
    assert exact >= 15, "float32 is enough as a rule"
    wrong = layout.AddConstants(0.5, 0.25, 1.0, 0, 255)
    monkeypatch.setattr(numba_add, "add", lambda x, y, c: numpy_kernels.add(x, y, c) ^ np.uint8(1))
    assert not numba_add.is_exact(wrong)


@pytest.mark.parametrize("channels", [64, 128, 192, 320, 70])
def test_regular_shuffles(channels: int) -> None:
    x = codes(2, channels, 3, 3, planes=2)
    bits = packed(x, 2, 1)
    for groups in (g for g in (2, 3, 4, 5, 7, 8, 16, 32) if channels % g == 0):
        shuffled = torch.arange(channels).reshape(groups, -1).T.reshape(-1)
        for indices in (shuffled, torch.argsort(shuffled), shuffled.flip(0)):
            assert torch.equal(ops.bit_select(bits, channels, indices), packed(x[:, indices], 2, 1)), groups


def test_wrong_channels_are_refused() -> None:
    bits = packed(codes(1, 70, 2, 2), 1, 1)
    for channels, indices in ((70, [0, 70]), (70, [-1, 0]), (130, [0])):
        with pytest.raises(FxqError, match="channels"):
            ops.bit_select(bits, channels, torch.tensor(indices))
    with pytest.raises(FxqError, match="do not join 10 channels"):
        ops.bit_cat([bits, bits], [70, 10])
    with pytest.raises(FxqError, match="does not fit"):
        ops.float_max_pool(torch.zeros(1, 2, 1, 1), [3, 3], [1, 1], [0, 0], [1, 1], False)


@pytest.mark.parametrize(("spec", "zero"), [("u8/pt", 0), ("u8/pt", 7), ("s8/pt", 0), ("t2/pt", 0), ("b1/pt", 0)])
def test_codes_behind_a_relu(spec: str, zero: int) -> None:
    """Only an unsigned grid whose least value is 0 clips what is negative by itself."""
    qp = QParams(QuantSpec.parse(spec), torch.tensor(0.25), torch.tensor(zero, dtype=torch.int32))
    x = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Quantize(qp, relu=True)(x), numerics.quantize(x.relu(), qp))


@pytest.mark.parametrize("numba", ["1", "0"])
def test_operators_hold_sizes_and_types_before_they_touch_memory(numba: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQ_NUMBA", numba)
    u8, floats, window = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, 4, 4), ([2, 2], [1, 1], [0, 0], [1, 1], False)
    op: Any = torch.ops.fxq
    calls: list[Any] = [
        lambda: op.code_add(u8, u8[:1], 1.0, 1.0, 0.0, 255),
        lambda: op.code_add(u8.float(), u8.float(), 1.0, 1.0, 0.0, 255),
        lambda: op.code_table(u8, u8.reshape(-1)[:3]),
        lambda: op.code_table(u8, torch.zeros(256)),
        lambda: op.code_real(u8, torch.zeros(3)),
        lambda: op.code_real(u8, torch.zeros(256).double()),
        lambda: op.code_real(u8.float(), torch.zeros(256)),
        lambda: op.float_max_pool(floats.double(), *window),
        lambda: op.float_max_pool(floats[0], *window),
    ]
    calls += [lambda k=k, v=v: op.float_max_pool(floats, *window[:k], v, *window[k + 1 :]) for k, v in ((0, [0, 2]), (1, [0, 1]), (2, [-1, 0]), (2, [2, 2]))]
    for i, call in enumerate(calls):
        with pytest.raises(FxqError):
            pytest.fail(f"call {i} gave {call().shape}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("shape", [(2, 70, 5, 7), (1, 3, 1, 1), (0, 4, 2, 2), (1, 130, 4, 4)])
def test_real_values_of_codes_lie_in_torchs_order(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8).view(dtype)
    values = torch.randn(256, generator=torch.Generator().manual_seed(4))
    wanted = values[x.view(torch.uint8).long()]
    for given_ in (x, x.contiguous(memory_format=torch.channels_last)):
        y = ops.code_real(given_, values)
        assert torch.equal(y, wanted) and y.is_contiguous()
        torch.library.opcheck(ops.code_real.op, (given_, values), test_utils=CHECKS)  # type: ignore[arg-type]
