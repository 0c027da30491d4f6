"""Interleaved rANS: golden vectors, the precision of frequencies, and three inner loops that read and write the same bytes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.archive import decoder, fast, rans, rans_numba
from fxq.errors import ArchiveError

Array = np.ndarray[Any, Any]
LOOPS = {"numpy": decoder.lockstep, "python": fast.one_by_one, "numba": rans_numba.decode}
QUICK = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def slots(freq: Array, bits: int) -> tuple[Array, Array]:
    """Symbol of each slot, and the slots as the inner loops take them."""
    symbol = np.repeat(np.arange(len(freq)), freq)
    return symbol, (freq[symbol] | (np.arange(1 << bits) - (np.cumsum(freq) - freq)[symbol]) << 16).astype(np.uint32)


def decode(name: str, words: Array, state: Array, freq: Array, bits: int, size: int, dtype: Any = np.uint16) -> tuple[Array, int, Array]:
    symbol, table = slots(freq, bits)
    x, out = state.copy(), np.zeros(size, dtype)
    used = LOOPS[name](np.frombuffer(words.tobytes(), np.uint8), x, table, bits, symbol.astype(dtype), out)
    return out, used, x


def test_golden_vector() -> None:
    freq = np.array([3000, 1000, 96])
    symbols = np.array([0, 1, 2, 2, 2, 1, 2, 2, 0, 2, 1, 2], np.uint8)
    words, state = rans.encode(symbols, freq, 2, 12)
    assert words.tolist() == [20440, 24480]
    assert state.tolist() == [598221, 55803021]
    for name in LOOPS:
        out, used, x = decode(name, words, state, freq, 12, 12)
        assert out.tolist() == symbols.tolist() and used == 2 and x.tolist() == [1 << 16] * 2


@st.composite
def streams(draw: st.DrawFn) -> tuple[Array, Array, int, int]:
    """Symbols, frequencies, precision, lanes."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    k, n = draw(st.integers(1, 300)), draw(st.integers(1, 4000))
    p = rng.dirichlet(np.full(k, draw(st.sampled_from([0.02, 0.3, 5.0]))))
    symbols = rng.choice(k, n, p=p).astype(draw(st.sampled_from([np.uint8, np.uint16])) if k <= 256 else np.uint16)
    bits = draw(st.integers(9, 15))
    return symbols, rans.frequencies(np.bincount(symbols, minlength=k), bits), bits, draw(st.sampled_from([1, 2, 3, 7, 64, 1000, 5000]))


@QUICK
@given(streams())
def test_all_loops_read_and_write_the_same(made: tuple[Array, Array, int, int]) -> None:
    symbols, freq, bits, lanes = made
    f = np.maximum(freq, 1).astype(np.float64)
    tables = np.stack([1 / f, (1 << bits) - f, np.cumsum(freq) - freq, f * 2.0 ** (32 - bits)])
    written = []
    for write in (rans.lockstep, rans.one_by_one, rans_numba.encode):
        x = np.full(lanes, float(1 << 16))
        words = np.concatenate([*write(symbols, x, tables)[::-1], np.empty(0, np.uint16)])
        written.append((words.tolist(), x.tolist()))
    assert written[0] == written[1] == written[2]
    words, state = np.array(written[0][0], np.uint16), np.array(written[0][1]).astype(np.uint32)
    for name in LOOPS:
        out, used, x = decode(name, words, state, freq, bits, len(symbols))
        assert np.array_equal(out, symbols) and used == len(words) and np.all(x == 1 << 16)


@QUICK
@given(streams(), st.integers(0, 1 << 32))
def test_damaged_words_end_inside_the_arrays_and_alike(made: tuple[Array, Array, int, int], seed: int) -> None:
    """Words that are missing or wrong: each loop stops, and none says that all is well where another does not."""
    symbols, freq, bits, lanes = made
    rng = np.random.default_rng(seed)
    words, state = rans.encode(symbols, freq, lanes, bits)
    words = rng.integers(0, 1 << 16, len(words), dtype=np.uint16)[: rng.integers(0, len(words) + 1)]
    state = rng.integers(1 << 16, 1 << 32, len(state), dtype=np.uint32)
    found = []
    for name in LOOPS:
        try:
            out, used, x = decode(name, words, state, freq, bits, len(symbols))
            found.append((used == len(words), out.tolist(), x.tolist()) if used <= len(words) else "cut off")
        except ArchiveError:
            found.append("cut off")
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "f8", "?"])
def test_numba_writes_every_width(dtype: str) -> None:
    rng = np.random.default_rng(1)
    symbols = rng.integers(0, 2, 5000).astype(np.uint8)
    freq = rans.frequencies(np.bincount(symbols), 12)
    words, state = rans.encode(symbols, freq, 64, 12)
    for name in ("numpy", "numba"):
        assert np.array_equal(decode(name, words, state, freq, 12, 5000, np.dtype(dtype))[0], symbols.astype(dtype))


def test_numba_refuses_tables_that_could_be_read_past() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rans_numba.decode(np.zeros(0, np.uint8), np.full(1, 1 << 16, np.uint32), np.zeros(255, np.uint32), 8, np.zeros(256, np.uint8), np.zeros(1, np.uint8))


def test_numba_stops_before_the_word_that_is_missing() -> None:
    freq, one = np.array([1, 255]), np.uint16(0)
    symbol, table = slots(freq, 8)
    x = np.full(3, 1 << 16, np.uint32)  # each lane has symbol 0, and needs a word after it
    locked = [rans_numba._locked(a) for a in (np.full(2, one), (table & 0xFFFF).astype(np.uint16), (table >> 16).astype(np.uint16), symbol.astype(np.uint8))]
    words, low, high, values = locked
    assert rans_numba._decode(words, x, low, high, 8, values, np.zeros(3, np.uint8)) == -1


def test_frequencies_that_do_not_add_up_are_refused() -> None:
    blob = np.frombuffer(rans.varints(np.array([100, 100])) + np.array([1 << 16], "<u4").tobytes(), np.uint8)
    r = decoder.Record("w", "U8", (0,), "rans", len(blob), 0, entries=2, bits=8, count=1)
    with pytest.raises(ArchiveError, match="frequencies, states and words do not fit"):
        decoder.rans(blob, r, np.arange(2, dtype=np.uint8), np.zeros(0, np.uint8))


@QUICK
@given(st.integers(0, 1 << 32), st.integers(1, 400), st.integers(9, 15))
def test_frequencies_add_up_and_lose_little(seed: int, k: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.geometric(0.5, k) * rng.integers(0, 2, k) * 10 ** rng.integers(0, 6, k)
    if (counts > 0).sum() == 0:
        counts[0] = 1
    freq = rans.frequencies(counts, bits)
    assert freq.sum() == 1 << bits and np.array_equal(freq > 0, counts > 0)
    used = int((counts > 0).sum())
    slack = counts.sum() * (used / ((1 << bits) - used)) * 1.5  # each symbol is at most one slot off, and rare ones take theirs from the others
    assert rans.coded_bits(counts, freq, bits) <= rans.entropy(counts) + slack


def test_frequencies_of_nothing_and_of_too_many() -> None:
    assert rans.frequencies(np.zeros(3), 8).tolist() == [256, 0, 0]
    with pytest.raises(ValueError, match="257 symbols do not fit"):
        rans.frequencies(np.ones(257), 8)
    assert rans.frequencies(np.ones(1 << 15), 15).tolist() == [1] * (1 << 15)


def test_precision_follows_the_alphabet() -> None:
    even, skewed = rans.choose(np.full(32, 1000)), rans.choose(np.array([10**8] + [3] * 30))
    assert even[1] == 8 and skewed[1] > even[1]
    assert all(rans.coded_bits(c, f, b) / 8 <= size for c, (f, b, size) in ((np.full(32, 1000), even), (np.array([10**8] + [3] * 30), skewed)))


def test_lanes_follow_the_length() -> None:
    assert rans.lanes_for(0, 0) == rans.lanes_for(100, 3.0) == rans.lanes_for(1 << 16, 0) == 1
    assert rans.lanes_for((1 << 16) + 1, 0) == 2
    assert rans.lanes_for(1 << 20, 131072.0) == 256
    for size, payload in ((10**5, 1e4), (10**8, 5e6), (10**9, 0.0)):
        lanes = rans.lanes_for(size, payload)
        assert lanes * rans.STEPS >= size and (2 * lanes <= 0.006 * payload or lanes == -(-size // rans.STEPS))
    assert rans.lanes_for(1 << 32, 0.0) <= 1 << 16


def test_numba_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast.kernels(fast.WORTH) is rans_numba
    monkeypatch.setenv("FXQ_NUMBA", "0")
    assert fast.kernels(fast.WORTH) is None


def test_a_broken_numba_gives_one_warning_and_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("no libllvm")

    monkeypatch.setattr(fast.importlib, "import_module", broken)
    fast._load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="numba does not work here.*no libllvm"):
            assert fast.kernels(fast.WORTH) is None
        assert fast.kernels(fast.WORTH) is None  # and no second warning, which would be an error
    finally:
        fast._load.cache_clear()


def test_no_numba_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(fast.importlib, "import_module", missing)
    fast._load.cache_clear()
    try:
        assert fast.kernels(fast.WORTH) is None
    finally:
        fast._load.cache_clear()
