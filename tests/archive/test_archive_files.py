"""The container: every dtype and shape comes back bit for bit, and sizes add up."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxq.archive import encoder, fast
from fxq.archive.decoder import DTYPES, Archive
from fxq.archive.encoder import Factored, Plain, write
from fxq.errors import ArchiveError

Array = np.ndarray[Any, Any]
QUICK = settings(derandomize=True, deadline=None, max_examples=80, database=None)
CODERS = st.sampled_from(["auto", "rans", "huffman"])
SHAPES = st.sampled_from([(), (0,), (1,), (3, 0, 2), (7,), (5, 3), (2, 3, 4, 5), (301,), (40, 50)])


def same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def bits(dtype: str, shape: tuple[int, ...], distinct: int, seed: int) -> Array:
    """Any bit patterns of a dtype: NaNs with payloads, -0.0, infinities."""
    rng, kind = np.random.default_rng(seed), np.dtype(DTYPES[dtype])
    if dtype == "BOOL":
        return rng.random(shape) < 0.3
    raw = rng.integers(0, 256, (distinct, kind.itemsize), dtype=np.uint8)
    values = np.concatenate([raw.reshape(-1).view(kind), np.array([0.0, -0.0, np.nan]).astype(kind) if kind.kind == "f" else np.zeros(1, kind)])
    return np.asarray(values[rng.integers(0, len(values), shape)])


@QUICK
@given(st.sampled_from(sorted(DTYPES)), SHAPES, st.sampled_from([1, 2, 5, 300]), st.integers(0, 1 << 32), st.sampled_from(encoder.CODINGS))
def test_plain_tensors_come_back_bit_for_bit(dtype: str, shape: tuple[int, ...], distinct: int, seed: int, coding: str) -> None:
    array = bits(dtype, shape, distinct, seed)
    file, (stat,), overhead = write([Plain("x", array, dtype=dtype)], coding=coding)
    assert len(file) == stat.total + overhead.total and stat.dense == array.nbytes
    with Archive(file) as archive:
        (r,) = archive.records
        assert (r.name, r.dtype, r.shape, r.dense_bytes, r.coding) == ("x", dtype, shape, array.nbytes, stat.coding)
        assert same(archive.dense(r), array)
        if coding == "auto":
            assert stat.total <= array.nbytes


@settings(QUICK, max_examples=50)
@given(SHAPES, st.sampled_from([1, 2, 33, 256, 257, 1 << 15]), st.integers(0, 1 << 32), CODERS, st.sampled_from([0.0, 0.1, 1.0]))
def test_factored_tensors_come_back(shape: tuple[int, ...], k: int, seed: int, coding: str, density: float) -> None:
    rng = np.random.default_rng(seed)
    symbols = (rng.integers(0, k, shape) * (rng.random(shape) < density)).astype(np.uint8 if k <= 256 else np.uint16)
    table = rng.integers(0, 1 << 32, k, dtype=np.uint32).view(np.float32)
    file, (stat,), overhead = write([Factored("w", np.asarray(symbols), table, role="conv")], coding=coding)
    assert len(file) == stat.total + overhead.total
    assert stat.role == "conv" and stat.entries == k and stat.symbols == symbols.size and stat.dense == 4 * symbols.size
    assert stat.kept == np.count_nonzero(table[symbols] != 0)
    with Archive(file) as archive:
        (r,) = archive.records
        assert same(archive.symbols(r), np.asarray(symbols)) and same(archive.table(r), table)
        assert archive.scale(r) is None and archive.zero(r) is None
        assert same(archive.dense(r), np.asarray(table[symbols]))


@QUICK
@given(st.integers(0, 1 << 32), st.sampled_from([0, 1, 2, -1, None]), st.booleans(), st.booleans(), st.sampled_from(["rans", "huffman"]))
def test_scale_and_zero_in_this_order(seed: int, axis: int | None, zeros: bool, one_zero: bool, coding: str) -> None:
    rng = np.random.default_rng(seed)
    symbols, table = rng.integers(0, 16, (3, 4, 5)).astype(np.uint8), np.arange(-8, 8, dtype=np.int8)
    count = 1 if axis is None else symbols.shape[axis]
    scale = rng.normal(size=count).astype(np.float32)
    zero = rng.integers(-200, 200, 1 if one_zero else count).astype(np.int32) if zeros else None
    file, _, _ = write([Factored("w", symbols, table, "F32", scale, zero, axis or 0)], coding=coding)
    with Archive(file) as archive:
        (r,) = archive.records
        assert r.axis == (-1 if axis is None else axis % 3) and r.table == "I8"
        along = [1, 1, 1]
        if axis is not None:
            along[axis] = -1
        expected = table[symbols].astype(np.float32)
        if zero is not None:
            wide = np.broadcast_to(zero, count)
            expected = expected - wide.astype(np.float32).reshape(along)
            assert same(archive.zero(r), np.array(wide))  # type: ignore[arg-type]
        assert same(archive.dense(r), expected * scale.reshape(along)) and same(archive.scale(r), scale)  # type: ignore[arg-type]


def test_values_of_one_symbol_cost_next_to_nothing() -> None:
    file, (a, b), _ = write([Plain("zeros", np.zeros((1000, 1000), np.float32)), Factored("w", np.full(70_000, 2, np.uint8), np.arange(3, dtype=np.float32))])
    assert a.total < 60 and b.total < 60 and a.entropy_bits == b.entropy_bits == 0 and (a.kept, b.kept) == (0, 70_000)
    with Archive(file) as archive:
        assert not archive.dense(archive.by_name["zeros"]).any() and (archive.dense(archive.by_name["w"]) == 2).all()


def test_many_floats_stay_raw_and_few_are_coded() -> None:
    rng = np.random.default_rng(0)
    many, few = rng.normal(size=100_000).astype(np.float32), rng.integers(0, 40, 100_000).astype(np.float32)
    late = np.concatenate([few, np.arange(1000, 1030, dtype=np.float32)])
    file, stats, _ = write([Plain("many", many), Plain("few", few), Plain("late", late), Plain("nan", np.full(500, np.nan))])
    assert [s.coding == "raw" for s in stats] == [True, False, False, False]
    assert stats[1].total < len(few) * np.log2(40) / 8 * 1.02
    with Archive(file) as archive:
        assert all(same(archive.dense(r), x) for r, x in zip(archive.records, (many, few, late, np.full(500, np.nan)), strict=True))


def test_size_is_within_two_percent_of_the_entropy() -> None:
    rng = np.random.default_rng(0)
    for density, k in ((0.1, 33), (0.04, 33), (0.35, 256), (1.0, 256)):
        n = 600_000
        p = np.exp(-(np.linspace(-3, 3, k - 1) ** 2) / 2)
        symbols = rng.choice(k, n, p=[1 - density, *(density * p / p.sum())]).astype(np.uint8)
        file, (stat,), _ = write([Factored("w", symbols, rng.normal(size=k).astype(np.float32))], coding="rans")
        assert stat.entropy_bits / 8 < len(file) - 4 * k < 1.02 * stat.entropy_bits / 8, (density, k)


def test_safetensors_opens_it(tmp_path: Path) -> None:
    from safetensors import safe_open

    file, stats, _ = write([Plain("x", np.arange(4.0)), Plain("y", np.zeros(3))], {"nodes": []}, version="1.2")
    (tmp_path / "m.fxq").write_bytes(file)
    with safe_open(tmp_path / "m.fxq", "np") as f:
        assert f.metadata()["format"] == "fxq-archive" and set(f.keys()) == {"index", "data"}
        assert f.get_tensor("data").nbytes == sum(s.total for s in stats)
        index = json.loads(zlib.decompress(f.get_tensor("index").tobytes()))
    assert index["graph"] == {"nodes": []} and [r["name"] for r in index["records"]] == ["x", "y"]
    with Archive(tmp_path / "m.fxq") as archive:
        assert archive.graph == {"nodes": []} and archive.version == "1.2" and archive.size == len(file)


def test_an_archive_of_nothing() -> None:
    file, stats, _ = write([])
    with Archive(file) as archive:
        assert archive.records == () and stats == [] and archive.graph is None


def test_tensors_are_written_one_at_a_time() -> None:
    alive: list[int] = []

    class Watched(np.ndarray[Any, Any]):
        def __del__(self) -> None:
            alive.remove(id(self))

    def items() -> Any:
        for i in range(4):
            array = np.zeros(1000).view(Watched)
            alive.append(id(array))
            yield Plain(f"t{i}", array)
            del array
            assert len(alive) <= 2

    write(items())
    assert alive == []


@pytest.mark.parametrize("numba", ["0", "1"])
def test_memory_stays_below_the_largest_tensor(numba: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setenv("FXQ_NUMBA", numba)
    fast.kernels(fast.WORTH)  # what numba itself takes is not of the tensor
    rng = np.random.default_rng(0)
    symbols = rng.choice(33, 1 << 22, p=[0.9] + [0.1 / 32] * 32).astype(np.uint8)
    for coding in ("rans", "huffman"):
        tracemalloc.start()
        file = write([Factored("w", symbols, np.arange(33, dtype=np.float32))], coding=coding)[0]
        wrote = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with Archive(file) as archive:
            tracemalloc.start()
            dense = archive.dense(archive.records[0])
            read = tracemalloc.get_traced_memory()[1] - dense.nbytes
            tracemalloc.stop()
        assert wrote < dense.nbytes and read < 0.5 * dense.nbytes, (coding, wrote, read)


@pytest.mark.parametrize(
    ("item", "coding", "fact"),
    [
        (Plain("", np.zeros(1)), "auto", "has no name"),
        (Plain("x", np.zeros(1, np.complex64)), "auto", "archives hold no complex64"),
        (Plain("x", np.zeros(1), dtype="BF16"), "auto", "archives hold no float64 as BF16"),
        (Plain("x", np.zeros(1)), "zip", "unknown coding 'zip'"),
        (Factored("w", np.zeros(3, np.uint8), np.zeros(2, np.float32)), "raw", "cannot be stored raw"),
        (Factored("w", np.full(3, 2, np.uint8), np.zeros(2, np.float32)), "auto", "symbol 2 has no entry in a table of 2"),
        (Factored("w", np.zeros(3, np.int64), np.zeros(2, np.float32)), "auto", "dtype or a length"),
        (Factored("w", np.zeros(3, np.uint8), np.zeros(0, np.float32)), "auto", "dtype or a length"),
        (Factored("w", np.zeros(3, np.uint16), np.zeros((1 << 15) + 1, np.float32)), "auto", "dtype or a length"),
        (Factored("w", np.zeros(3, np.uint8), np.zeros(2, np.int8)), "auto", "a table of I8 does not give F32"),
        (Factored("w", np.zeros(3, np.uint8), np.zeros(2, np.float32), zero=np.zeros(1, np.int32)), "auto", "does not give"),
        (Factored("w", np.zeros((3, 4), np.uint8), np.zeros(2, np.int8), scale=np.ones(4, np.float32)), "auto", "4 scales do not fit axis 0"),
    ],
)
def test_what_cannot_be_written(item: Any, coding: str, fact: str) -> None:
    with pytest.raises(ArchiveError, match=fact):
        write([item], coding=coding)


def test_names_and_graphs_that_cannot_be_written() -> None:
    with pytest.raises(ArchiveError, match="two tensors are called 'x'"):
        write([Plain("x", np.zeros(1)), Plain("x", np.zeros(1))])
    for graph in ({"a": float("nan")}, {"a": object()}, {(1, 2): 3}):
        with pytest.raises(ArchiveError, match="the graph is no JSON"):
            write([], graph)
