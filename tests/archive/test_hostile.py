"""Archives that are cut, damaged, or made to do harm: always ArchiveError, within the stated bounds of memory and time, whichever inner loop reads them."""

from __future__ import annotations

import importlib
import json
import re
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxq import archived
from fxq.archive import decoder, encoder
from fxq.archive.decoder import Archive
from fxq.errors import ArchiveError

forge: Any = None
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module", autouse=True)
def tools() -> Iterator[None]:
    """``benchmarks/fuzz_archive.py`` takes archives apart and puts them together again."""
    global forge
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    forge = importlib.import_module("fuzz_archive")
    yield
    patch.undo()


@pytest.fixture(params=["numpy", "python", "numba"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every inner loop of rANS in turn."""
    monkeypatch.setattr(decoder, "LOOP", forge.loops()[request.param])
    return str(request.param)


def files() -> dict[str, bytes]:
    return dict(zip(("auto", "rans", "huffman", "lanes", "empty"), forge.corpus(), strict=True))


def refused(file: bytes, most: int | None = None) -> ArchiveError:
    """The error that opening the file or decoding one of its tensors gives."""
    with pytest.raises(ArchiveError) as e, Archive(file, max_bytes=most) as archive:
        for r in archive.records:
            archive.dense(r)
    assert e.value.fact and e.value.way_out
    return e.value


def record(index: dict[str, Any], name: str) -> dict[str, Any]:
    return next(r for r in index["records"] if r["name"] == name)  # type: ignore[no-any-return]


def edited(file: bytes, edit: Edit, kept: frozenset[tuple[int, str]] = frozenset()) -> bytes:
    parts = forge.apart(file)
    edit(parts.index)
    return forge.together(parts, kept)  # type: ignore[no-any-return]


def blob(file: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """The file with another blob, its length and its checksum right."""
    parts = forge.apart(file)
    i = [r["name"] for r in parts.index["records"]].index(name)
    parts.blobs[i] = change(parts.blobs[i])
    return forge.together(parts)  # type: ignore[no-any-return]


def peak(work: Callable[[], Any]) -> int:
    """Most bytes that Python and numpy have allocated at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_tools_change_nothing_by_themselves(loop: str) -> None:
    for name, file in files().items():
        again = forge.together(forge.apart(file))
        assert forge.same(forge.read(file, decoder.LOOP), forge.read(again, decoder.LOOP)), name
        assert isinstance(forge.read(again, decoder.LOOP), list)
    assert {r.coding for f in files().values() for r in Archive(f).records} == {"raw", "rans", "huffman"}


@pytest.mark.parametrize("name", ["auto", "rans", "huffman", "lanes", "empty"])
def test_cut_at_every_byte(name: str) -> None:
    """In the length, the header, the index and every part of every blob; and with bytes behind the end."""
    file = files()[name]
    for n in range(len(file)):
        with pytest.raises(ArchiveError):
            Archive(file[:n])
    for extra in (b"\0", b"\xff" * 8, file):
        with pytest.raises(ArchiveError):
            Archive(file + extra)


@pytest.mark.parametrize("name", ["rans", "huffman", "lanes"])
def test_blobs_cut_at_every_byte(name: str, loop: str) -> None:
    """With the right length and checksum in the index, so that the decoder itself must notice."""
    parts = forge.apart(files()[name])
    for i, whole in enumerate(parts.blobs):
        for n in {*range(min(len(whole), 16)), *range(0, len(whole), 17), *range(max(0, len(whole) - 5), len(whole))}:
            parts.blobs[i] = whole[:n]
            refused(forge.together(parts))
        parts.blobs[i] = whole + b"\0\0"
        refused(forge.together(parts))
        parts.blobs[i] = whole


def test_every_bit_of_the_header() -> None:
    file = files()["empty"]
    end = 8 + int.from_bytes(file[:8], "little")
    for at in range(end):
        for bit in range(8):
            with pytest.raises(ArchiveError):
                Archive(file[:at] + bytes([file[at] ^ 1 << bit]) + file[at + 1 :])


@pytest.mark.parametrize("name", ["auto", "lanes"])
def test_bits_of_index_and_blobs(name: str) -> None:
    """Every byte of the packed index and of the blobs, one bit each: their checksums are wrong."""
    file = files()[name]
    for at in range(8 + int.from_bytes(file[:8], "little"), len(file)):
        e = refused(file[:at] + bytes([file[at] ^ 1 << at % 8]) + file[at + 1 :])
        assert "checksum" in e.fact


def test_every_byte_of_the_unpacked_index() -> None:
    """With the right checksum. Names and the graph may become others; nothing but an ArchiveError gets out."""
    parts = forge.apart(files()["auto"])
    size, errors = len(json.dumps(parts.index)), 0
    for at in range(0, size):
        parts.text = lambda text, at=at: text[:at] + bytes([text[at] ^ 1 << at % 7]) + text[at + 1 :]
        errors += isinstance(forge.read(forge.together(parts), decoder.LOOP), ArchiveError)
    assert size / 2 < errors < size


@pytest.mark.parametrize("name", ["rans", "huffman", "lanes"])
def test_bits_of_blobs_with_the_right_checksum(name: str, loop: str) -> None:
    """A bit of rANS or Huffman data cannot change unnoticed, but for unused bits at the end; one of a table is another value."""
    parts = forge.apart(files()[name])
    unnoticed, coded = 0, 0
    for i, (r, whole) in enumerate(zip(parts.index["records"], parts.blobs, strict=True)):
        if r["coding"] == "raw":
            continue
        table = r["entries"] * np.dtype(decoder.DTYPES[r.get("table", r["dtype"])]).itemsize + 40 * bool(r.get("scale")) + 40 * bool(r.get("zero"))
        for at in range(table, len(whole), 1 + len(whole) // 25):
            parts.blobs[i] = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
            unnoticed += not isinstance(forge.read(forge.together(parts), decoder.LOOP, whole=False), ArchiveError)
            coded += 1
        parts.blobs[i] = whole
    limit = 0.6 if name == "huffman" else 0.1  # a code may become another of its length: that is what checksums are for
    assert coded > 20 and unnoticed < limit * coded


WRONG: dict[str, tuple[str, str, Edit]] = {
    **{
        f"{field} gone": ("auto", "KeyError|TypeError|impossible|unknown|do not fit|its ", lambda x, f=field: record(x, "conv.weight").pop(f))
        for field in ("name", "dtype", "shape", "coding", "bits", "count")
    },
    "unknown field": ("auto", "unknown fields", lambda x: record(x, "bias").update(at=7)),
    "name of another type": ("auto", "wrong type", lambda x: record(x, "bias").update(name=7)),
    "empty name": ("auto", "name is empty", lambda x: record(x, "bias").update(name="")),
    "name twice": ("auto", "occurs twice", lambda x: record(x, "bias").update(name="flags")),
    "unknown dtype": ("auto", "unknown coding or dtype", lambda x: record(x, "bias").update(dtype="F8")),
    "dtype of numpy": ("auto", "unknown coding or dtype", lambda x: record(x, "bias").update(dtype="<f4")),
    "object dtype": ("auto", "unknown coding or dtype", lambda x: record(x, "bias").update(dtype="O")),
    "unknown coding": ("auto", "unknown coding", lambda x: record(x, "bias").update(coding="lzma")),
    "wider dtype": ("auto", "impossible lengths", lambda x: record(x, "bias").update(dtype="F64")),
    "raw with a scale": ("auto", "impossible|do not fit", lambda x: record(x, "bias").update(scale=True)),
    "raw as rans": ("auto", "impossible lengths", lambda x: record(x, "bias").update(coding="rans", count=1)),
    "shape of text": ("auto", "impossible shape", lambda x: record(x, "bias").update(shape=["33"])),
    "shape of bools": ("auto", "impossible shape", lambda x: record(x, "bias").update(shape=[33, True])),
    "shape of floats": ("auto", "impossible shape", lambda x: record(x, "bias").update(shape=[33.0])),
    "negative size": ("auto", "impossible shape", lambda x: record(x, "bias").update(shape=[-33])),
    "two negative sizes": ("auto", "impossible shape", lambda x: record(x, "bias").update(shape=[-33, -1])),
    "33 dimensions": ("auto", "impossible shape", lambda x: record(x, "bias").update(shape=[33] + [1] * 32)),
    "sizes beyond 64 bits": ("auto", "impossible shape", lambda x: record(x, "bias").update(shape=[1 << 63, 2])),
    "a product beyond 64 bits": ("auto", "impossible shape", lambda x: record(x, "fc.weight").update(shape=[1 << 33, 1 << 33])),
    "empty, but huge": ("auto", "impossible shape", lambda x: record(x, "none").update(shape=[0, 1 << 50])),
    "another shape": ("rans", "do not|cut off|not fit", lambda x: record(x, "conv.weight").update(shape=[10, 21])),
    "a smaller shape": ("rans", "do not|not fit", lambda x: record(x, "conv.weight").update(shape=[10, 3])),
    "no entries": ("rans", "impossible lengths", lambda x: record(x, "conv.weight").update(entries=0)),
    "too many entries": ("rans", "impossible lengths", lambda x: record(x, "conv.weight").update(entries=(1 << 15) + 1)),
    "one entry more": ("rans", "do not|cut off|fit", lambda x: record(x, "conv.weight").update(entries=10)),
    "one entry less": ("rans", "do not|cut off|fit", lambda x: record(x, "conv.weight").update(entries=8)),
    "negative entries": ("rans", "impossible lengths", lambda x: record(x, "conv.weight").update(entries=-1)),
    "7 bits": ("rans", "impossible lengths", lambda x: record(x, "conv.weight").update(bits=7)),
    "16 bits": ("rans", "impossible lengths", lambda x: record(x, "conv.weight").update(bits=16)),
    "other bits": ("rans", "do not fit", lambda x: record(x, "conv.weight").update(bits=15)),
    "no lanes": ("rans", "impossible lengths", lambda x: record(x, "conv.weight").update(count=0)),
    "65537 lanes": ("rans", "impossible lengths", lambda x: record(x, "conv.weight").update(count=65537)),
    "65536 lanes": ("rans", "do not fit|multiple", lambda x: record(x, "conv.weight").update(count=65536)),
    "a lane more": ("lanes", "do not|cut off", lambda x: record(x, "lanes").update(count=49)),
    "lanes as text": ("rans", "wrong type", lambda x: record(x, "conv.weight").update(count="1")),
    "lanes as bool": ("rans", "wrong type", lambda x: record(x, "conv.weight").update(count=True)),
    "too long for its lanes": ("rans", "impossible lengths", lambda x: record(x, "conv.weight").update(shape=[1 << 17])),
    "index of 6 bits": ("huffman", "impossible lengths", lambda x: record(x, "far").update(bits=6)),
    "more pairs than weights": ("huffman", "impossible lengths", lambda x: record(x, "far").update(count=601)),
    "negative pairs": ("huffman", "impossible lengths", lambda x: record(x, "far").update(count=-1)),
    "a pair more": ("huffman", "does not end|do not", lambda x: record(x, "far").update(count=record(x, "far")["count"] + 1)),
    "no pairs": ("huffman", "do not fill", lambda x: record(x, "far").update(count=0)),
    "pairs beyond the tensor": ("huffman", "IndexError|out of bounds", lambda x: record(x, "far").update(shape=[599])),
    "huffman as rans": ("huffman", "impossible|do not", lambda x: record(x, "far").update(coding="rans")),
    "rans as huffman": ("rans", "impossible|do not|cannot", lambda x: record(x, "conv.weight").update(coding="huffman", bits=4)),
    "axis beyond": ("rans", "do not fit", lambda x: record(x, "fc.weight").update(axis=2)),
    "negative axis": ("rans", "do not fit", lambda x: record(x, "fc.weight").update(axis=-2)),
    "axis of another length": ("rans", "do not|cut off|fit", lambda x: record(x, "fc.weight").update(axis=1)),
    "scale as number": ("rans", "wrong type", lambda x: record(x, "fc.weight").update(scale=1)),
    "zero without scale": ("rans", "do not fit", lambda x: record(x, "fc.weight").pop("scale")),
    "scale of integers": ("rans", "do not fit", lambda x: record(x, "fc.weight").update(dtype="I8")),
    "table of another dtype": ("rans", "do not fit", lambda x: record(x, "conv.weight").update(table="I32")),
    "unknown table": ("rans", "unknown coding or dtype", lambda x: record(x, "conv.weight").update(table="F8")),
    "records as dict": ("auto", "no index", lambda x: x.update(records={})),
    "no records": ("auto", "KeyError|no index", lambda x: x.pop("records")),
    "a record as text": ("auto", "TypeError|wrong", lambda x: x["records"].append("a")),
    "graph as list": ("auto", "no index", lambda x: x.update(graph=[])),
    "one more key": ("auto", "no index", lambda x: x.update(more=1)),
    "a record less": ("auto", "do not fit", lambda x: x["records"].pop()),
}


@pytest.mark.parametrize("name", WRONG)
def test_fields_of_the_index(name: str) -> None:
    """All checksums are right: it is the check of the field itself that refuses."""
    which, text, edit = WRONG[name]
    e = refused(edited(files()[which], edit))
    assert re.search(text, str(e)), e


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "fit|impossible"), (1 << 40, "fit|impossible|cut off"), (-1, "impossible"), (1 << 70, "fit|impossible"), ("9", "wrong type"), (True, "wrong type")],
)
def test_lengths_of_records(value: Any, text: str) -> None:
    """Blobs have no offsets: each begins where the one before ends, so only lengths can be wrong. They can neither overlap nor leave the file."""
    for i in (0, 6, 9):
        file = edited(files()["auto"], lambda x, i=i: x["records"][i].update(bytes=value), frozenset({(i, "bytes")}))
        with pytest.raises(ArchiveError, match=text):
            Archive(file)
    swapped = edited(
        files()["auto"], lambda x: (x["records"][0].update(bytes=10**9), x["records"][1].update(bytes=-(10**9))), frozenset({(0, "bytes"), (1, "bytes")})
    )
    with pytest.raises(ArchiveError, match="impossible lengths"):
        Archive(swapped)


@pytest.mark.parametrize("value", [0, -1, 1 << 40, "7", None, 1.0])
def test_checksums_of_records(value: Any) -> None:
    refused(edited(files()["auto"], lambda x: x["records"][0].update(crc32=value), frozenset({(0, "crc32")})))


def varint(*numbers: int) -> bytes:
    return b"".join(bytes([n & 127 | 128, n >> 7 & 127 | 128, n >> 14]) for n in numbers)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: varint(*[0] * 6), "do not fit"),
        (lambda f: varint(*[1 << 20] * 6), "do not fit"),
        (lambda f: varint((1 << 21) - 1, *[0] * 5), "do not fit"),
        (lambda f: b"\xff" * len(f), "cut off|do not fit"),
        (lambda f: b"\xff\xff\xff\x01" + f[4:], "cut off|do not fit"),
        (lambda f: f[:-1], "cut off|do not|fit"),
    ],
)
def test_frequencies(change: Callable[[bytes], bytes], text: str, loop: str) -> None:
    """Sums that are wrong, zeros, numbers of too many bytes."""
    file = files()["lanes"]
    at = 6 * 4
    bits = forge.apart(file).index["records"][0].get("bits", 12)

    def swapped(b: bytes) -> bytes:
        _, n = decoder.varints(np.frombuffer(b[at:], np.uint8), 6)
        return b[:at] + change(b[at : at + n]) + b[at + n :]

    assert bits in range(8, 16)
    assert re.search(text, str(refused(blob(file, "lanes", swapped))))


def test_frequencies_of_other_symbols_are_noticed(loop: str) -> None:
    """A table whose sum is right, but not the one it was written with: the lanes do not come back to their start."""

    def swapped(b: bytes) -> bytes:
        f, n = decoder.varints(np.frombuffer(b[24:], np.uint8), 6)
        assert f.sum() in {1 << k for k in range(8, 16)}
        return b[:24] + varint(*np.roll(f, 1).tolist()) + b[24 + n :]

    assert re.search("do not end|cut off", str(refused(blob(files()["lanes"], "lanes", swapped))))


def test_states_and_words(loop: str) -> None:
    file = files()["lanes"]
    r = Archive(file).records[0]

    def at(b: bytes) -> int:
        return 24 + decoder.varints(np.frombuffer(b[24:], np.uint8), 6)[1]

    for state in (0, 1, decoder.LOW - 1):  # below the smallest state: a lane that would never come back
        e = refused(blob(file, "lanes", lambda b, s=state: b[: at(b)] + s.to_bytes(4, "little") + b[at(b) + 4 :]))
        assert "do not fit" in e.fact
    for change in (lambda b: b + b"\0" * 2, lambda b: b[:-2], lambda b: b[:-1], lambda b: b + b"\0" * 2 * r.shape[0], lambda b: b[: at(b) + 4 * r.count]):
        refused(blob(file, "lanes", change))


def test_code_lengths(loop: str) -> None:
    """Kraft sums that are too large, too small, empty, and lengths of 15 for all."""
    file = files()["huffman"]
    r = Archive(file).by_name["far"]
    head = (r.entries + (1 << r.bits) + 1) // 2
    start = r.entries * 4
    for value in (0x11, 0x22, 0x33, 0xFF, 0x00, 0x10, 0x01):
        refused(blob(file, "far", lambda b, v=value: b[:start] + bytes([v]) * head + b[start + head :]))
    for lengths in ([0, 0], [255, 255], [1, 0]):  # of the segment
        refused(blob(file, "far", lambda b, n=lengths: b[: start + head] + bytes(n) + b[start + head + 2 :]))


def test_truth_values_are_0_or_1() -> None:
    """A byte of 2 as a bool is undefined in numpy and torch: refused in raw tensors and in tables."""
    refused(blob(files()["auto"], "flags", lambda b: b"\2" * len(b)))
    coded, _, _ = encoder.write([encoder.Plain("flags", np.arange(5000) % 50 == 0)])
    assert Archive(coded).records[0].coding != "raw"
    refused(blob(coded, "flags", lambda b: b[:1] + b"\2" + b[2:]))


@pytest.mark.parametrize("version", ["2", "99", "", "one", 1, None, ["1"], "1.0", "9" * 5000])
def test_other_versions(version: Any) -> None:
    parts = forge.apart(files()["auto"])
    parts.meta["version"] = version
    e = refused(forge.together(parts))
    assert "this fxq reads 1" in e.fact and e.way_out == "Update fxq" and len(str(e)) < 200


HEADERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda h: [],
    "null": lambda h: None,
    "number": lambda h: 7,
    "empty": lambda h: b"",
    "no JSON": lambda h: b"{",
    "no UTF-8": lambda h: b'{"\xff": 1}',
    "zeros": lambda h: b"\0" * 64,
    "deep": lambda h: b"[" * 60_000,
    "no metadata": lambda h: {k: v for k, v in h.items() if k != "__metadata__"},
    "metadata as list": lambda h: {**h, "__metadata__": []},
    "metadata as text": lambda h: {**h, "__metadata__": "fxq-archive"},
    "another format": lambda h: {**h, "__metadata__": {**h["__metadata__"], "format": "fxq-model"}},
    "a tensor more": lambda h: {**h, "x": h["data"]},
    "no data": lambda h: {k: v for k, v in h.items() if k != "data"},
    "index as float": lambda h: {**h, "index": {**h["index"], "dtype": "F32"}},
    "overlap": lambda h: {**h, "data": {**h["data"], "data_offsets": [0, h["data"]["data_offsets"][1]]}},
    "a gap": lambda h: {**h, "data": {**h["data"], "data_offsets": [h["data"]["data_offsets"][0] + 1, h["data"]["data_offsets"][1]]}},
    "index beyond the file": lambda h: {**h, "index": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}},
    "negative index": lambda h: {**h, "index": {"dtype": "U8", "shape": [-1], "data_offsets": [0, -1]}},
    "index of 0": lambda h: {**h, "index": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}},
    "index as bool": lambda h: {**h, "index": {**h["index"], "shape": [True]}},
    "shape of two": lambda h: {**h, "data": {**h["data"], "shape": [1, h["data"]["shape"][0]]}},
    "text for a shape": lambda h: {**h, "index": {**h["index"], "shape": "9"}},
    "no checksum": lambda h: {**h, "__metadata__": {"format": "fxq-archive", "version": "1"}},
    "checksum as number": lambda h: {**h, "__metadata__": {**h["__metadata__"], "index": int(h["__metadata__"]["index"])}},
    "huge number": lambda h: b'{"index": {"shape": [' + b"9" * 10_000 + b"]}}",
    "infinite": lambda h: {**h, "index": {**h["index"], "shape": [float("inf")]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str) -> None:
    parts = forge.apart(files()["auto"])
    parts.header = HEADERS[name]
    refused(forge.together(parts))


@pytest.mark.parametrize("length", [0, 1, 7, (1 << 16) + 1, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_lengths_of_the_header(length: int) -> None:
    file = files()["auto"]
    with pytest.raises(ArchiveError):
        Archive(length.to_bytes(8, "little") + file[8:])
    with pytest.raises(ArchiveError):
        Archive(length.to_bytes(8, "little") + b"{" * 70_000)


GRAPHS: dict[str, bytes] = {
    "deep lists": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep dicts": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep and open": b'{"a":' + b"[" * 500_000,
    "huge number": b'{"a":' + b"9" * 100_000 + b"}",
    "NaN": b'{"a":NaN}',
    "infinity": b'{"a":-Infinity}',
    "a key twice": b'{"a":1,"a":2}',
    "no UTF-8": b'{"a":"\xff"}',
    "cut UTF-8": b'{"a":"\xe2\x82"}',
    "raw zero": b'{"a":"\0"}',
    "open text": b'{"a":"',
    "comment": b'{"a":1/**/}',
    "nothing": b"",
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "number": b"7",
    "text": b'"a"',
}


@pytest.mark.parametrize("name", GRAPHS)
def test_hostile_json(name: str) -> None:
    """In place of the graph, with right checksums."""
    parts = forge.apart(files()["auto"])
    parts.index["graph"] = "HERE"
    parts.text = lambda text: text.replace(b'"HERE"', GRAPHS[name])
    refused(forge.together(parts))


def test_surrogates_do_no_harm() -> None:
    """A lone surrogate is a legal text of JSON; it must not break the messages that show it."""
    file = edited(files()["auto"], lambda x: record(x, "bias").update(name="\ud800", crc32=1), frozenset({(6, "crc32")}))
    str(refused(file)).encode()


def test_a_key_of_a_record_twice() -> None:
    """Readers that take the first and readers that take the last would see two files."""
    parts = forge.apart(files()["auto"])
    parts.text = lambda text: text.replace(b'"dtype": "F32"', b'"dtype": "F64", "dtype": "F32"', 1)
    assert "twice" in refused(forge.together(parts)).fact


def test_zlib_bombs() -> None:
    """The index is unpacked up to a bound: 100 times its packed size and 1 MiB, at most 16 MiB."""
    for text in (b" " * (64 << 20), b"[" * (40 << 20), b'"' + b"a" * (40 << 20)):
        parts = forge.apart(files()["empty"])
        packed = zlib.compress(text, 9)
        parts.pack = lambda _, p=packed: p
        file = forge.together(parts)
        assert peak(lambda f=file: refused(f)) < (40 << 20) + 4 * len(file)


def test_objects_of_a_small_text() -> None:
    """Text of a few bytes an object: Python needs up to 30 times its length, and the length is bounded."""
    n = 400_000
    for item in (b"[]", b"{}", b"1.5", b'""'):
        parts = forge.apart(files()["empty"])
        parts.index["graph"] = "HERE"
        parts.text = lambda text, i=item: text.replace(b'"HERE"', b'{"a":[' + b",".join([i] * n) + b"]}")
        file = forge.together(parts)
        used = peak(lambda f=file: forge.read(f, decoder.LOOP))
        assert used < (8 << 20) + 40 * 3 * n, item


def test_bombs_by_declared_shape() -> None:
    """Nothing is allocated for a tensor that is larger than the bound, in one record or in many; a user can raise the bound, or lower it."""
    small, _, _ = encoder.write([encoder.Factored("a", np.zeros((64, 64), np.uint8), np.zeros(1, np.float32))])

    def large(x: dict[str, Any], shape: list[int], lanes: int, times: int = 1) -> None:
        r = x["records"][0]
        r.update(shape=shape, count=lanes, coding="rans", bits=8)
        x["records"] = [{**r, "name": f"n{i}"} for i in range(times)]

    for shape, lanes, times in (
        ([1 << 13, 1 << 13], 1 << 14, 1),
        ([1 << 20, 1 << 20], 1 << 16, 1),
        ([1 << 16], 1, 300),
        ([1 << 47], 1 << 16, 1),
        ([1] * 31 + [1 << 47], 1 << 16, 1),
    ):
        parts = forge.apart(small)
        large(parts.index, shape, lanes, times)
        parts.blobs = [b"\0\0\0\0\x80\x02" + b"\0\0\1\0" * lanes if lanes == 1 else b"x"] * times
        file = forge.together(parts)
        assert peak(lambda f=file: refused(f)) < 4 << 20
    good = edited(small, lambda x: None)
    with pytest.raises(ArchiveError, match=r"need more than 100 bytes when decoded\. Pass max_bytes= if you trust the file"):
        Archive(good, max_bytes=100)
    assert Archive(good, max_bytes=4 * 64 * 64).dense(Archive(good).records[0]).shape == (64, 64)


def test_memory_of_decoding_is_bounded_by_what_the_file_declares(loop: str) -> None:
    """A file of a few bytes may declare up to 64 MiB: that, and a few blocks, is all."""
    symbols = np.zeros(1 << 20, np.uint8)
    file, _, _ = encoder.write([encoder.Factored("a", symbols, np.arange(2, dtype=np.float32))])
    begin = time.perf_counter()
    assert peak(lambda: Archive(file).dense(Archive(file).records[0])) < 4 * symbols.size + (8 << 20)
    assert time.perf_counter() - begin < 60


def test_many_records() -> None:
    parts = forge.apart(files()["empty"])
    parts.index["records"] = [{"name": str(i), "dtype": "U8", "shape": [0], "coding": "raw"} for i in range((1 << 16) + 1)]
    parts.blobs = [b""] * len(parts.index["records"])
    refused(forge.together(parts))


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", "a\0b"):
        with pytest.raises(ArchiveError):
            Archive(path)
    (tmp_path / "empty").touch()
    with pytest.raises(ArchiveError, match="empty: "):
        Archive(tmp_path / "empty")


SMALL: dict[str, Any] = {
    "itself": [{"product": [0, 0]}],
    "a later one": [{"product": [1, 1]}, ["F32", [], "00000000"]],
    "negative": [{"product": [-1, -1]}],
    "far": [{"product": [10**9, 0]}],
    "bool": [{"product": [True, True]}],
    "unknown": [{"eval": ["1"]}],
    "two kinds": [{"product": [0, 0], "table": []}],
    "no parts": [{"product": []}],
    "text": ["F32"],
    "number": [7],
    "none": [None],
    "bomb": [["F32", [1 << 20, 1 << 20], "00000000"]],
    "negative shape": [["F32", [-1], "00000000"]],
    "shape of text": [["F32", ["1"], "00000000"]],
    "odd text": [["F32", [1], "000"]],
    "no hexadecimal": [["F32", [1], "zzzzzzzz"]],
    "dtype": [["O", [1], "00"]],
    "too short": [["F32", [2], "0000"]],
    "codes beyond the table": [["F32", [1], "ffffff7f"], {"table": [0, 0, None, 0]}],
    "nan codes": [["F32", [1], "0000c07f"], {"table": [0, 0, None, 0]}],
    "blocks": [["F32", [1], "0000c07f"], {"blocks": [0, 0, None, "s4/pb128x9"]}],
    "spec": [["F32", [1], "0000c07f"], {"blocks": [0, 0, None, "9" * 5000]}],
    "doubling": [["F32", [0], ""], *({"product": [i, i]} for i in range(60))],
    "doubling of one": [["F32", [], "00000000"], *({"product": [i, i]} for i in range(60))],
    "deep": [["F32", [0], ""], *({"product": [i, 0]} for i in range(5000))],
}


@pytest.mark.parametrize("name", SMALL)
def test_small_tensors_of_the_index(name: str, tmp_path: Path) -> None:
    """Tensors that the graph holds, and those that are computed from others: nothing refers to itself, nothing grows without bound, and it ends."""
    file, _, _ = encoder.write(
        [], {"kind": "compiled", "small": SMALL[name], "weights": {"w": 0, "v": len(SMALL[name]) - 1}, "graph": {}, "scheme": {}, "target": ""}
    )
    (tmp_path / "m.fxq").write_bytes(file)
    begin = time.perf_counter()
    with pytest.raises(ArchiveError, match=r"m\.fxq"):
        archived.load_state_dict(tmp_path / "m.fxq")
    assert time.perf_counter() - begin < 30


def test_a_short_fuzz() -> None:
    """A part of ``benchmarks/fuzz_archive.py``; the whole has 100,000 inputs and is run by command."""
    found = forge.run(300, 7)
    assert found.crashes == [] and found.inputs == 300 and len(found.messages) > 15 and 0 < found.valid < 100
