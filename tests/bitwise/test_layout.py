"""The packed layout against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.bitwise import layout
from fxq.errors import FxqError


def weight(layer: layout.Layer, n: int, c: int, tap: int) -> int:
    """One weight read from the packed words as the docstring of ``Layer.blocks`` says."""
    per_group = layer.channels // layer.groups
    for n0, lanes, word0, words, offset in layer.blocks.tolist():
        if n0 <= n < n0 + lanes:
            bit, taps = c - word0 * 64, layer.taps
            if layer.gathered:
                bit, tap, taps = tap * per_group + c % per_group, 0, 1
                assert word0 == c // per_group * words
            bits = [int(layer.words[offset + ((p * taps + tap) * words + bit // 64) * lanes + n - n0]) >> bit % 64 & 1 for p in range(1 + layer.masked)]
            return 2 * bits[0] - (bits[1] if layer.masked else 1)
    raise AssertionError("no block holds it")


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 5, 40, 64, 130]), st.sampled_from([1, 7, 8, 33, 72]), st.booleans()
)  # fmt: skip
def test_every_weight_lies_where_the_layout_says(seed: int, groups: int, per_group: int, outs: int, ternary: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (outs * groups, per_group, 2, 3)
    w = (rng.integers(-1, 2, shape) if ternary else rng.choice([-1, 1], shape)).astype(np.int8)
    layer = layout.pack_layer(w, groups=groups)
    assert layer.masked or not (w == 0).any()
    assert layer.gathered == (groups > 1 and per_group % 64 != 0 and outs % 8 == 0)
    for n, c, tap in zip(*(rng.integers(0, top, 30).tolist() for top in (shape[0], per_group, 6)), strict=True):
        assert weight(layer, n, n // outs * per_group + c, tap) == w[n, c].reshape(-1)[tap]
    sums, count = layout.tap_sums(layer)
    assert (sums[: layer.outputs] == w.sum(1)).all() and (count[: layer.outputs] == (w != 0).sum((1, 2, 3))).all()


def test_a_binary_weight_takes_one_bit() -> None:
    layer = layout.pack_layer(np.ones((256, 256, 3, 3), np.int8))
    assert layer.nbytes == 256 * 256 * 9 // 8 and not layer.masked
    assert layer.blocks[:, 1].tolist() == [32] * 8
    assert layout.pack_layer(np.ones((50, 64), np.int8)).blocks[:, 1].tolist() == [32, 8, 8, 8]


def test_whole_groups_need_no_mask_and_read_their_words_only() -> None:
    layer = layout.pack_layer(np.ones((80, 128, 1, 1), np.int8), groups=2)
    assert not layer.masked
    assert layer.blocks[:, :4].tolist() == [[0, 32, 0, 2], [32, 8, 0, 2], [40, 32, 2, 2], [72, 8, 2, 2]]
    assert layout.pack_layer(np.ones((81, 128, 1, 1), np.int8), groups=3).masked


def test_small_groups_lie_in_words_of_their_own() -> None:
    layer = layout.pack_layer(np.ones((512, 16, 3, 3), np.int8), groups=16)
    assert layer.gathered and not layer.masked
    assert layer.nbytes == 512 * 3 * 8  # 144 bits of a filter in three words
    assert layer.blocks[:3, :4].tolist() == [[0, 32, 0, 3], [32, 32, 3, 3], [64, 32, 6, 3]]
    assert layout.pack_layer(np.ones((16, 1, 3, 3), np.int8), groups=16).masked  # one output a group is not worth words of its own


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200))
def test_bits_come_back(seed: int, channels: int) -> None:
    bits = np.random.default_rng(seed).random((3, channels)) < 0.5
    words = layout.pack_bits(bits)
    assert words.dtype == np.uint64 and words.shape == (3, layout.words_of(channels))
    assert all(int(words[i, c // 64]) >> c % 64 & 1 == bits[i, c] for i in range(3) for c in range(channels))
    assert int(layout.popcount(words).sum()) == bits.sum()
    assert (layout.unpack_bits(words, channels) == bits).all()


def test_popcount_of_numpy_1(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).integers(0, 2**64, (5, 7), np.uint64)
    new = layout.popcount(words)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert (layout.popcount(words) == new).all() and layout.popcount(words).dtype == np.uint8


def test_borders_are_kept_for_one_size_and_made_anew_for_another() -> None:
    layer = layout.pack_layer(np.ones((8, 64, 3, 3), np.int8), padding=1)
    first = layout.borders(layer, 6, 6)
    assert layout.borders(layer, 6, 6) is first
    other = layout.borders(layer, 6, 9)
    assert len(other.columns) == 9 and len(first.columns) == 6
    assert first.base.shape == (9, 8)
    at = first.rows[0] + first.columns[0]
    assert (first.base[at] == 64 * 9 + 64 * 5).all()  # a corner misses five taps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layout.pack_layer(np.full((2, 3), 2, np.int8)), "other codes than -1, 0 and 1"),
        (lambda: layout.pack_layer(np.ones(3, np.int8)), r"shape \[3\] in 1 groups cannot be packed"),
        (lambda: layout.pack_layer(np.ones((3, 4), np.int8), groups=2), "in 2 groups cannot be packed"),
        (lambda: layout.pack_layer(np.ones((3, 4), np.int8), padding=(1, 2, 3)), "3 numbers are no padding"),
        (lambda: layout.pack_layer(np.ones((3, 4, 3, 3), np.int8)).out_size(2, 5), "kernel of 3x3 does not fit into an input of 2x5"),
        (lambda: layout.sign_epilogue(layout.pack_layer(np.ones((3, 4), np.int8)), np.zeros(4)), r"table of shape \[4\] does not fit 3 output channels"),
        (lambda: layout.check_packed(np.zeros((1, 1, 1, 1, 1), np.int64)), r"int64 \[1, 1, 1, 1, 1\] is not packed"),
        (lambda: layout.check_packed(np.zeros((3, 1, 1, 1, 1), np.uint64)), r"uint64 \[3, 1, 1, 1, 1\] is not packed"),
        (lambda: layout.check_packed(np.zeros((1, 1, 1, 1, 2), np.uint64), 64), "2 words do not hold 64 channels"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(FxqError, match=message):
        call()
