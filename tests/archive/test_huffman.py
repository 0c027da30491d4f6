"""Canonical Huffman codes with relative indices: golden vectors, lengths, and all that a reader refuses."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.archive import decoder, huffman
from fxq.archive.decoder import Record
from fxq.errors import ArchiveError

Array = np.ndarray[Any, Any]
QUICK = settings(derandomize=True, deadline=None, max_examples=50, database=None)


def coded(symbols: Array, entries: int) -> tuple[bytes, Record, huffman.Plan]:
    """Blob without a table, its record, its plan."""
    plan = huffman.plan(symbols, np.bincount(symbols, minlength=entries))
    blob = b"".join(huffman.encode(symbols, plan))
    assert len(blob) == plan.size
    return blob, Record("w", "U16", symbols.shape, "huffman", len(blob), 0, entries=entries, bits=plan.bits, count=plan.items), plan


def decoded(blob: bytes, r: Record) -> Array:
    out = np.empty(r.shape, np.uint16)
    decoder.huffman(np.frombuffer(blob, np.uint8), r, np.arange(r.entries, dtype=np.uint16), out)
    return out


def test_golden_lengths() -> None:
    lengths = huffman.code_lengths(np.array([5, 2, 1, 1]))
    assert lengths.tolist() == [1, 2, 3, 3] and int(lengths @ [5, 2, 1, 1]) == 15
    assert huffman.codes(lengths).tolist() == [0b0, 0b10, 0b110, 0b111]


def test_golden_gaps() -> None:
    symbols = np.zeros(20, np.uint8)
    symbols[[1, 4, 15]] = [1, 2, 3]
    (gaps, values), *more = huffman.pairs(symbols, 3)
    assert not more and gaps.tolist() == [1, 2, 7, 2] and values.tolist() == [1, 2, 0, 3]


def test_a_gap_of_just_the_largest_is_no_filler() -> None:
    symbols = np.zeros(20, np.uint8)
    symbols[[7, 16]] = 1
    gaps, values = next(huffman.pairs(symbols, 3))
    assert gaps.tolist() == [7, 7, 0] and values.tolist() == [1, 0, 1]


@QUICK
@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=300))
def test_lengths_are_a_whole_code(counts: list[int]) -> None:
    c = np.array(counts)
    lengths = huffman.code_lengths(c)
    assert np.array_equal(lengths > 0, c > 0) and lengths.max() <= 15
    used = int((c > 0).sum())
    if used > 1:
        assert (2.0 ** -lengths[lengths > 0].astype(float)).sum() == 1
    else:
        assert lengths.sum() == used


def test_long_codes_are_shortened() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    free, limited = (huffman.code_lengths(np.array(fibonacci), n) for n in (60, 15))
    assert free.max() == 39 and limited.max() <= 15 and (2.0 ** -limited.astype(float)).sum() == 1


@QUICK
@given(st.integers(0, 1 << 32), st.integers(1, 6000), st.sampled_from([0.0, 0.002, 0.1, 0.5, 1.0]), st.sampled_from([2, 33, 256, 1000]))
def test_round_trip(seed: int, n: int, density: float, k: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = (rng.integers(1, k, n) * (rng.random(n) < density)).astype(np.uint16)
    blob, r, _ = coded(symbols, k)
    assert np.array_equal(decoded(blob, r), symbols)


def test_many_groups_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "GROUP", 3)
    monkeypatch.setattr(huffman, "CHUNK", 5000)
    rng = np.random.default_rng(0)
    for n in (7 * 1024, 7 * 1024 + 1, 6 * 1024, 3 * 1024 + 5):
        symbols = rng.integers(1, 9, n).astype(np.uint8)  # a pair each
        blob, r, plan = coded(symbols, 9)
        assert plan.items == n and np.array_equal(decoded(blob, r), symbols)


def test_the_index_of_the_smallest_file_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, taken = np.random.default_rng(0), set()
    for density, k in ((1.0, 33), (0.1, 2), (0.01, 33)):
        symbols = (rng.integers(1, k, 200_000) * (rng.random(200_000) < density)).astype(np.uint8)
        best, sizes = coded(symbols, k)[2], {}
        for bits in huffman.GAPS:
            with monkeypatch.context() as m:
                m.setattr(huffman, "GAPS", (bits,))
                sizes[bits] = len(coded(symbols, k)[0])
        assert best.size == sizes[best.bits] == min(sizes.values())
        taken.add(best.bits)
    assert taken == {4, 5, 8}


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_an_error_or_other_symbols_never_a_crash(seed: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = (rng.integers(1, 33, 5000) * (rng.random(5000) < 0.2)).astype(np.uint8)
    blob, r, _ = coded(symbols, 33)
    damaged = bytearray(blob)
    damaged[int(rng.integers(0, len(blob)))] ^= 1 << int(rng.integers(0, 8))
    try:
        with decoder.inside("here"):
            found = decoded(bytes(damaged), r)
    except ArchiveError:
        return
    assert found.shape == symbols.shape and found.max() < 33


def test_refusals() -> None:
    symbols = np.array([0, 0, 1, 2, 0, 3, 1, 1], np.uint8)
    blob, r, plan = coded(symbols, 4)
    head = (4 + (1 << plan.bits) + 1) // 2
    with pytest.raises(ArchiveError, match="do not fill its segments"):
        decoded(blob[:head], r)
    with pytest.raises(ArchiveError, match="ValueError"), decoder.inside("w"):
        decoded(blob[: head + 1], r)
    with pytest.raises(ArchiveError, match="do not fill its segments"):
        decoded(blob + b"\0", r)
    with pytest.raises(ArchiveError, match="code lengths do not add up"):
        decoded(bytes([blob[0] ^ 1]) + blob[1:], r)
    short = Record(**{**vars(r), "shape": (4,)})
    with pytest.raises(ArchiveError, match="IndexError"), decoder.inside("w"):
        decoded(blob, short)
    with pytest.raises(ArchiveError, match="does not end where it should"):
        decoded(blob, Record(**{**vars(r), "count": r.count - 1}))
