"""Nothing in a file is believed: indices, records, blobs, headers that are wrong, cut off or flipped."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxq.archive import decoder, rans
from fxq.archive.decoder import Archive
from fxq.archive.encoder import Factored, Plain, write
from fxq.errors import ArchiveError

Array = np.ndarray[Any, Any]


def remade(file: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with another index, checksums right."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    n = header["index"]["shape"][0]
    index = json.loads(zlib.decompress(file[8 + length : 8 + length + n]))
    made = change(index)
    packed = zlib.compress(json.dumps(index if made is None else made).encode())
    return pack(packed, file[8 + length + n :])


def pack(packed: bytes, data: bytes, **meta: Any) -> bytes:
    n, m = len(packed), len(data)
    header = json.dumps({
        "__metadata__": {"format": "fxq-archive", "version": "1", "index": str(zlib.crc32(packed)), **meta},
        "index": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}, "data": {"dtype": "U8", "shape": [m], "data_offsets": [n, n + m]},
    }).encode()  # fmt: skip
    return len(header).to_bytes(8, "little") + header + packed + data


def example() -> bytes:
    rng = np.random.default_rng(0)
    symbols = (rng.integers(1, 9, (20, 30)) * (rng.random((20, 30)) < 0.3)).astype(np.uint8)
    table = np.arange(9, dtype=np.int8)
    coded = Factored("rans", symbols, table, "F32", np.ones(20, np.float32), np.ones(20, np.int32))
    file, stats, _ = write([coded, Plain("raw", rng.normal(size=10).astype(np.float32))], coding="rans")
    assert [s.coding for s in stats] == ["rans", "raw"]
    return file


def first(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["records"][0].update(fields)


def second(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["records"][1].update(fields)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda i: [], "TypeError|AttributeError"),
    "no records": (lambda i: i.pop("records") and None, "no index"),
    "records of a number": (lambda i: i.update(records=3), "no index"),
    "a record of a list": (lambda i: i.update(records=[[]]), "cannot be read"),
    "more keys": (lambda i: i.update(more=1), "no index"),
    "a graph of a list": (lambda i: i.update(graph=[]), "no index"),
    "too many records": (lambda i: i.update(records=[{}] * 65537), "no index, or too long"),
    "no name": (first(name=""), "empty or occurs twice"),
    "the same name": (first(name="raw"), "empty or occurs twice"),
    "a name of a number": (first(name=3), "wrong type"),
    "an unknown field": (first(more=3), "unknown fields"),
    "own place": (first(at=3), "unknown fields"),
    "an unknown coding": (first(coding="zip"), "unknown coding or dtype"),
    "an unknown dtype": (second(dtype="F8"), "unknown coding or dtype"),
    "an unknown table": (first(table="F8"), "unknown coding or dtype"),
    "no shape": (lambda i: i["records"][0].pop("shape") and None, "cannot be read"),
    "a negative shape": (first(shape=[-20, -30]), "impossible shape"),
    "a shape of truths": (first(shape=[True]), "impossible shape"),
    "a shape of floats": (first(shape=[20.0, 30]), "impossible shape"),
    "an absurd shape": (first(shape=[1 << 40, 1 << 40]), "impossible shape"),
    "an absurd empty shape": (first(shape=[1 << 60, 0]), "impossible shape"),
    "too many axes": (first(shape=[1] * 33), "impossible shape"),
    "a bomb by shape": (first(shape=[1 << 16, 1 << 14], count=1 << 16), "more than"),
    "many symbols in a lane": (first(shape=[65537], axis=-1, count=1), "impossible lengths"),
    "a raw bomb": (second(shape=[1 << 20]), "impossible lengths"),
    "raw with a table": (second(table="F32"), "impossible lengths"),
    "raw with a scale": (second(scale=True), "impossible lengths"),
    "longer than the file": (first(bytes=1 << 40), "do not fit"),
    "a negative length": (first(bytes=-1), "impossible lengths"),
    "no table": (first(entries=0), "impossible lengths"),
    "a huge table": (first(entries=1 << 16), "impossible lengths"),
    "no lanes": (first(count=0), "impossible lengths"),
    "too many lanes": (first(count=(1 << 16) + 1), "impossible lengths"),
    "few bits": (first(bits=7), "impossible lengths"),
    "many bits": (first(bits=16), "impossible lengths"),
    "an axis too far": (first(axis=2), "do not fit"),
    "an axis below": (first(axis=-2), "do not fit"),
    "a zero without scale": (lambda i: i["records"][0].pop("scale") and None, "do not fit"),
    "another dtype": (first(dtype="F64"), "do not fit"),
    "an index of 6 bits": (first(coding="huffman", bits=6, count=5), "impossible lengths"),
    "more pairs than values": (first(coding="huffman", bits=5, count=601), "impossible lengths"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_index_is_not_believed(name: str) -> None:
    change, fact = BROKEN[name]
    with pytest.raises(ArchiveError, match=fact):
        Archive(remade(example(), change))


@pytest.mark.parametrize(
    "fields",
    [
        {"count": 2}, {"bits": 15}, {"entries": 8}, {"entries": 2000}, {"shape": [20, 29]}, {"shape": [20, 31]}, {"axis": 1}, {"table": "I64"}, {"crc32": 3},
        {"coding": "huffman", "bits": 5, "count": 180},
    ],
)
def test_a_record_that_does_not_fit_its_blob(fields: dict[str, Any]) -> None:
    with Archive(remade(example(), first(**fields))) as archive:
        with pytest.raises(ArchiveError) as e:
            archive.dense(archive.records[0])
        assert str(e.value).startswith("archive: 'rans': ")
        archive.dense(archive.records[1])


def test_bombs() -> None:
    for text in (b" " * (20 << 20) + b"{}", b"[" * 200_000, b'{"fxq":"","graph":' + b'{"a":' * 100_000):
        with pytest.raises(ArchiveError):
            Archive(pack(zlib.compress(text, 9), b""))
    deep: dict[str, Any] = {}
    file, _, _ = write([Plain(f"t{i:05}", np.zeros(0)) for i in range(5_000)], deep)
    with Archive(file) as archive:
        assert len(archive.records) == 5_000
    repeated, _, overhead = write([], {"a": [0] * 1_000_000})
    assert overhead.index >= overhead.index_text  # too regular to pass for an honest index when packed
    with Archive(repeated) as archive:
        assert archive.graph is not None and len(archive.graph["a"]) == 1_000_000


def test_max_bytes() -> None:
    file, _, _ = write([Plain("x", np.zeros((70 << 20) // 4, np.float32))])
    with pytest.raises(ArchiveError, match="more than 67,.* bytes when decoded. Pass max_bytes="):
        Archive(file)
    with Archive(file, max_bytes=70 << 20) as archive:
        assert archive.dense(archive.records[0]).nbytes == 70 << 20
    with pytest.raises(ArchiveError, match="Pass max_bytes="):
        Archive(file, max_bytes=(70 << 20) - 1)


def test_every_flipped_bit_is_found() -> None:
    """Of the header, the index and the blobs: opening fails, or reading the tensor does."""
    file = example()
    for bit in range(8 * len(file)):
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArchiveError), Archive(bytes(damaged)) as archive:
            for r in archive.records:
                archive.dense(r)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    file = example()
    for n in range(len(file)):
        with pytest.raises(ArchiveError):
            Archive(file[:n])
    with pytest.raises(ArchiveError, match="do not fit"):
        Archive(file + b"\0")
    path = tmp_path / "m.fxq"
    file, _, _ = write([Plain("raw", np.random.default_rng(0).normal(size=100_000))])
    path.write_bytes(file)
    with Archive(path) as archive:
        path.write_bytes(file[:-8])  # while it is open
        with pytest.raises(ArchiveError, match=r"m\.fxq: 'raw': the file is cut off"):
            archive.dense(archive.by_name["raw"])


@pytest.mark.parametrize(
    ("file", "fact"),
    [
        (b"", "cut off"),
        (b"PK\3\4" + bytes(200), "no archive of fxq"),
        (pack(zlib.compress(b"{}"), b"", version="2"), "has version '2', this fxq reads 1. Update fxq"),
        (pack(zlib.compress(b"{}"), b"", version=["9" * 1000]), "has version"),
        (pack(zlib.compress(b"{}"), b"", format="fxq-model"), "no archive of fxq"),
        (pack(zlib.compress(b"{}"), b"", index="3"), "checksum of its index is wrong"),
        (pack(b"no zlib stream", b""), "cannot be read"),
        (pack(zlib.compress(b"{}") + b"more", b""), "cannot be read|no index"),
        (pack(zlib.compress(b'{"fxq":"","graph":null,"records":[]}') + b"more", b""), "no index"),
        (pack(zlib.compress(b'{"fxq":"","graph":null,"records":[]}'), b"more"), "do not fit"),
        (pack(zlib.compress(b"\xff\xfe{}"), b""), "cannot be read"),
        (pack(zlib.compress(b"1" * 5000), b""), "cannot be read"),
    ],
)
def test_files_that_are_no_archives(file: bytes, fact: str) -> None:
    with pytest.raises(ArchiveError, match=fact):
        Archive(file)


def test_safetensors_of_others_and_missing_files(tmp_path: Path) -> None:
    from safetensors.numpy import save

    for meta in (None, {"format": "pt"}):
        with pytest.raises(ArchiveError, match="no archive of fxq"):
            Archive(save({"w": np.zeros(3)}, meta))
    for path, fact in ((tmp_path / "none.fxq", "No such file"), (tmp_path, "Is a directory"), (tmp_path / "a\0b", "null")):
        with pytest.raises(ArchiveError, match=fact):
            Archive(path)


def test_a_raw_tensor_has_no_symbols_and_a_closed_archive_no_tensors() -> None:
    archive = Archive(example())
    for method in (archive.symbols, archive.table):
        with pytest.raises(ArchiveError, match="'raw': is stored raw"):
            method(archive.by_name["raw"])
    archive.close()
    with pytest.raises(ArchiveError, match="closed file"):
        archive.dense(archive.records[0])


def test_a_truth_value_is_zero_or_one() -> None:
    file, _, _ = write([Plain("flags", np.array([True, False, True, True, False]))], coding="raw")
    blob = bytes([1, 0, 2, 1, 0])
    made = remade(file[:-5] + blob, first(crc32=zlib.crc32(blob)))
    with Archive(made) as archive, pytest.raises(ArchiveError, match="neither 0 nor 1"):
        archive.dense(archive.records[0])


def test_the_reader_is_short_and_stands_alone() -> None:
    import ast
    import io
    import tokenize

    source = Path(decoder.__file__).read_text()
    tree = ast.parse(source)
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)]
    prose = {line for n in texts for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in blank} - prose
    assert len(code) < 200
    own = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith("fxq")]
    assert own == ["fxq.errors"]


def test_without_the_quick_loops_it_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    file = example()
    with Archive(file) as archive:
        found = archive.dense(archive.records[0])
        monkeypatch.setattr(decoder, "LOOP", None)
        assert np.array_equal(archive.dense(archive.records[0]), found)
    assert rans.STEPS == decoder.STEPS
