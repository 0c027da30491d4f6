"""Does a damaged or hostile archive ever do anything but raise ArchiveError?

Run: python benchmarks/fuzz_archive.py [--inputs 100000] [--seed 0]

Structure-aware: an input is a valid archive with one to four mutations, of the file's bytes, of the container's header, of the text or the values of the
unpacked index, or of a blob. All but the first sort are packed again with right lengths and checksums, so that the checks behind the checksums are
reached. Inputs that reach a message not seen before join the corpus; with ``--guided`` (needs atheris) libFuzzer keeps those that reach new branches of
the decoder instead. Each input is read whole with three inner loops of rANS, numpy, plain Python and numba's, which must agree: the same arrays, or an
error all three times. Memory is the peak that Python and numpy allocate while one input is read (tracemalloc, every 50th input).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import re
import resource
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from fxq.archive import decoder, encoder, fast, rans
from fxq.errors import ArchiveError

Json = Any
Array = np.ndarray[Any, Any]
MOST = 1 << 15
"""``max_bytes`` of every read."""
SOME = (
    0, 1, -1, 2, 7, 8, 15, 16, 255, 256, 1 << 15, (1 << 15) + 1, 1 << 16, 1 << 31, 1 << 32, 1 << 47, 1 << 63, 1 << 64, 10**30, True, None, 1.5, float("nan"),
    float("inf"), "", "raw", "rans", "huffman", "F32", "BF16", "BOOL", "U16", "\ud800", [], {}, [0], [-1], [1 << 40], [1] * 40, [1 << 24, 1 << 24],
)  # fmt: skip


@dataclass
class Parts:
    """An archive taken apart: ``index`` as JSON, a blob a record, and what stands in the header."""

    index: Json
    blobs: list[bytes]
    meta: dict[str, Any] = field(default_factory=lambda: {"format": "fxq-archive", "version": "1"})
    header: Callable[[Json], Json] | None = None
    text: Callable[[bytes], bytes] | None = None
    pack: Callable[[bytes], bytes] | None = None
    tail: bytes = b""


def apart(file: bytes) -> Parts:
    """Inverse of :func:`together` for a valid archive."""
    length = int.from_bytes(file[:8], "little")
    n = json.loads(file[8 : 8 + length])["index"]["shape"][0]
    index, at, blobs = json.loads(zlib.decompress(file[8 + length : 8 + length + n])), 8 + length + n, []
    for r in index["records"]:
        blobs.append(file[at : at + r["bytes"]])
        at += r["bytes"]
    return Parts(index, blobs)


def together(p: Parts, kept: frozenset[tuple[int, str]] = frozenset()) -> bytes:
    """The file, with right lengths and checksums but for the fields (record, "bytes" or "crc32") in ``kept``."""
    index = copy.deepcopy(p.index)
    if isinstance(index, dict) and isinstance(index.get("records"), list):
        for i, (r, blob) in enumerate(zip(index["records"], p.blobs, strict=False)):
            if isinstance(r, dict):
                r |= {k: v for k, v in (("bytes", len(blob)), ("crc32", zlib.crc32(blob))) if (i, k) not in kept}
    text = json.dumps(index).encode()
    text = p.text(text) if p.text else text
    packed = p.pack(text) if p.pack else zlib.compress(text, 1)
    n, m = len(packed), sum(map(len, p.blobs)) + len(p.tail)
    head: Json = {"__metadata__": {**p.meta, "index": str(zlib.crc32(packed))}, "index": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]},
                  "data": {"dtype": "U8", "shape": [m], "data_offsets": [n, n + m]}}  # fmt: skip
    head = p.header(head) if p.header else head
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    raw += b" " * (-len(raw) % 8)
    return b"".join([len(raw).to_bytes(8, "little"), raw, packed, *p.blobs, p.tail])


def corpus() -> list[bytes]:
    """Small valid archives with every coding, dtype and kind of part."""
    rng = np.random.default_rng(0)
    sparse = (rng.random((10, 20)) < 0.1) * rng.integers(1, 9, (10, 20))
    far = np.zeros(600, np.uint8)
    far[[0, 400, 401, 599]] = 3, 1, 2, 1
    book = np.linspace(-1, 1, 9).astype(np.float32)
    book[0] = 0
    scale, zero = rng.random(10).astype(np.float32), rng.integers(-3, 3, 10).astype(np.int32)
    items: list[encoder.Factored | encoder.Plain] = [
        encoder.Factored("conv.weight", sparse.astype(np.uint8), book),
        encoder.Factored("fc.weight", sparse.astype(np.uint8), np.arange(9, dtype=np.int8), "F32", scale, zero, 0),
        encoder.Factored("wide", rng.integers(0, 300, (10, 30)).astype(np.uint16), rng.standard_normal(300).astype(np.float16), "F16"),
        encoder.Factored("far", far, np.arange(4, dtype=np.float32)),
        encoder.Factored("one", np.zeros((3, 4), np.uint8), np.ones(1, np.float32)), encoder.Factored("none", np.zeros((0, 4), np.uint8), book),
        encoder.Plain("bias", rng.standard_normal(33).astype(np.float32)), encoder.Plain("flags", rng.random(70) < 0.5), encoder.Plain("steps", np.array(7)),
        encoder.Plain("half", rng.integers(0, 1 << 16, 9).astype(np.uint16), "BF16"),
    ]  # fmt: skip
    graph = {"kind": "compiled", "nodes": [{"name": "x", "op": "placeholder"}], "deep": {"a": [1, [2, [3]]]}}
    many = encoder.Factored("lanes", (rng.random(3000) < 0.5).astype(np.uint8) * rng.integers(1, 6, 3000).astype(np.uint8), book[:6])
    with mock.patch.object(rans, "lanes_for", lambda *_: 48):
        lanes = encoder.write([many], coding="rans")[0]
    return [encoder.write(items, graph, coding=c)[0] for c in ("auto", "rans", "huffman")] + [lanes, encoder.write([])[0]]


def places(v: Json) -> list[tuple[Json, Json]]:
    """Every place of a JSON value where another could stand."""
    found: list[tuple[Json, Json]] = []
    for k, x in list(v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ()):
        found += [(v, k), *places(x)]
    return found


def scrambled(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, doubled or put in; now and then only the very first or last."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = min(max(0, len(out) - 1), rng.choice((0, len(out) - 1, rng.randrange(max(1, min(64, len(out)))), rng.randrange(max(1, len(out))))))
        how = rng.randrange(7)
        if how <= 2 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 3 and out:
            out[at] = rng.choice((0, 127, 128, 255))
        elif how == 4:
            del out[at : at + rng.choice((1, 2, 4, 1 << 20))]
        elif how == 5:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 100)))
        else:
            out[at:at] = out[at : at + rng.choice((1, 4, 16))]
    return bytes(out)


def changed(v: Json, rng: random.Random) -> set[tuple[int, str]]:
    """Change one place of the index; what of a record's length and checksum must stay as it is now."""
    box, key = rng.choice(places(v) or [({}, None)])
    how = rng.randrange(6)
    if isinstance(box, dict) and key is not None and how == 0:
        del box[key]
    elif how == 1 and isinstance(box.get(key) if isinstance(box, dict) else None, int):
        box[key] += rng.choice((-1, 1, 2, -box[key] - 1, 1 << 16))
    elif how == 2 and isinstance(box, list) and box:
        box.append(copy.deepcopy(rng.choice(box)))
    elif how == 3 and isinstance(box, dict):
        box[rng.choice(("table", "scale", "zero", "axis", "bits", "count", "entries", "coding", "at", "x"))] = rng.choice(SOME)
    elif key is not None:
        box[key] = copy.deepcopy(rng.choice(SOME))
    records = v.get("records") if isinstance(v, dict) else None
    return {(i, key) for i, r in enumerate(records if isinstance(records, list) else ()) if r is box and key in ("bytes", "crc32")}


def mutated(file: bytes, rng: random.Random) -> bytes:
    """One input."""
    if rng.random() < 0.08:
        return scrambled(file, rng)
    try:
        p = apart(file)
    except (ValueError, KeyError, TypeError, IndexError, zlib.error):
        return scrambled(file, rng)
    kept: set[tuple[int, str]] = set()
    for _ in range(rng.choice((1, 1, 2, 4))):
        how = rng.randrange(40)
        if how < 20 and p.blobs:
            i = rng.randrange(len(p.blobs))
            p.blobs[i] = scrambled(p.blobs[i], rng)
        elif how < 37:
            kept |= changed(p.index, rng)
        elif how == 37:
            p.text = lambda text: scrambled(text, rng)
        else:
            p.header = rng.choice((lambda h: changed(h, rng) and h or h, lambda h: scrambled(json.dumps(h).encode(), rng)))
            p.pack = rng.choice((None, lambda text: scrambled(zlib.compress(text), rng), lambda text: zlib.compress(text) + b"x"))
    try:
        return together(p, frozenset(kept))
    except (ValueError, TypeError, RecursionError):
        return scrambled(file, rng)


def loops() -> dict[str, Any]:
    """The inner loops of rANS; numba's only where it is installed."""
    found: dict[str, Any] = {"python": fast.one_by_one, "numpy": None}
    try:
        from fxq.archive import rans_numba

        found["numba"] = rans_numba.decode
    except ImportError:
        pass
    return found


def read(file: bytes, loop: Any, most: int = MOST, whole: bool = True) -> list[Array] | ArchiveError:
    """All dense tensors of an archive, and with ``whole`` their parts, or the error. Any other exception gets out."""
    before, decoder.LOOP = decoder.LOOP, loop
    try:
        with decoder.Archive(file, max_bytes=most) as archive:
            out = []
            for r in archive.records:
                dense = archive.dense(r)
                if (r.shape, r.dense_bytes) != (dense.shape, dense.nbytes):
                    raise AssertionError(f"{r} is {dense.shape}")
                out.append(dense)
                if r.coding != "raw" and whole:
                    symbols, table = archive.symbols(r), archive.table(r)
                    if symbols.size and int(symbols.max()) >= len(table):
                        raise AssertionError(f"{r} has the symbol {symbols.max()}")
                    out += [a for a in (symbols, table, archive.scale(r), archive.zero(r)) if a is not None]
            return out
    except ArchiveError as e:
        return e
    finally:
        decoder.LOOP = before


def opens(file: bytes) -> bool:
    """Do the header and the index pass?"""
    try:
        decoder.Archive(file, max_bytes=MOST).close()
    except ArchiveError:
        return False
    return True


def same(a: list[Array] | ArchiveError, b: list[Array] | ArchiveError) -> bool:
    """Both are errors, or the same bits."""
    if isinstance(a, ArchiveError) or isinstance(b, ArchiveError):
        return isinstance(a, ArchiveError) and isinstance(b, ArchiveError)
    return len(a) == len(b) and all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def sort_of(e: ArchiveError) -> str:
    """The message without names and numbers."""
    fact = re.sub(r"(cannot be read: \w+): .*", r"\1", e.fact, flags=re.DOTALL)
    return re.sub(r"\d[\d,]*", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "...", fact))[:100]


def inputs(count: int, seed: int) -> Iterator[tuple[bytes, Callable[[str], None]]]:
    """Mutated files, each with what to call when it reached a message."""
    rng, pool, seen = random.Random(seed), corpus(), set[str]()
    for _ in range(count):
        file = mutated(rng.choice(pool), rng)

        def reached(message: str, file: bytes = file) -> None:
            if message not in seen and len(file) < 1 << 16:
                seen.add(message)
                with contextlib.suppress(ValueError, LookupError, TypeError, zlib.error):
                    apart(file)
                    pool.append(file)

        yield file, reached


class Findings:
    """What happened to the inputs so far."""

    def __init__(self) -> None:
        self.ways, self.begin = loops(), time.perf_counter()
        self.messages, self.crashes = Counter[str](), list[tuple[str, str]]()
        self.inputs = self.valid = self.peak = 0
        self.slowest = 0.0

    def feed(self, file: bytes) -> str:
        """Read one input in every way; the sort of message, or nothing when it is an archive."""
        watched, start, message = self.inputs % 50 == 0, time.perf_counter(), ""
        if watched:
            tracemalloc.start()
        try:
            first, *others = self.ways.values()
            results = [read(file, first)]
            if opens(file):
                results = [read(file, loop, whole=False) for loop in (first, *others)]
            if not all(same(results[0], other) for other in results[1:]):
                self.crashes.append((f"{', '.join(self.ways)} disagree", file.hex()))
            if isinstance(results[0], ArchiveError):
                message = sort_of(results[0])
                self.messages[message] += 1
            else:
                self.valid += 1
        except Exception as e:  # what is looked for
            self.crashes.append((f"{type(e).__name__}: {e}", file.hex()))
        self.slowest = max(self.slowest, time.perf_counter() - start)
        if watched:
            self.peak = max(self.peak, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        self.inputs += 1
        if self.inputs % 1000 == 0:
            rate = self.inputs / (time.perf_counter() - self.begin)
            print(f"{self.inputs} inputs, {len(self.crashes)} crashes, {len(self.messages)} messages, {self.valid} valid, {rate:.0f}/s", flush=True)
        return message


def run(count: int, seed: int) -> Findings:
    """Fuzz with feedback by message."""
    found = Findings()
    for file, reached in inputs(count, seed):
        reached(found.feed(file))
    return found


def guided(count: int, seed: int) -> None:
    """Fuzz with feedback by branch; libFuzzer ends the process itself, so the results are written with the last input."""
    import atheris

    for name in ("record", "varints", "rans", "prefix", "huffman", "lockstep"):
        setattr(decoder, name, atheris.instrument_func(getattr(decoder, name)))
    for name in ("_open", "_get", "_read"):
        setattr(decoder.Archive, name, atheris.instrument_func(getattr(decoder.Archive, name)))
    found, pool = Findings(), corpus()

    def one(data: bytes) -> None:
        found.feed(data if len(data) > 8 else pool[len(data) % len(pool)])
        if found.inputs == count:
            report(found, seed, "atheris (libFuzzer), feedback by branch, own structure-aware mutations")

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        file = mutated(data if len(data) > 8 else rng.choice(pool), rng)
        return file if len(file) <= most else data

    atheris.Setup(["fuzz_archive", f"-runs={count + 10}", f"-seed={seed + 1}", "-max_len=65536", "-len_control=0", "-verbosity=0"], one, custom_mutator=mutate)
    atheris.Fuzz()


def report(found: Findings, seed: int, how: str) -> None:
    """Write the result files."""
    import common

    for what, file in found.crashes[:20]:
        print(what, file[:4000])
    table = common.Table("fuzz_archive", "Damaged and hostile archives: what the reader says", fresh=True)
    for message, times in found.messages.most_common():
        table.rows[message.replace("|", "/")] = {"inputs": times}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table.put("(inputs that are archives)", {"inputs": found.valid})
    table.write([
        f"{found.inputs:,} inputs (seed {seed}), read with the loops {', '.join(found.ways)}: **{len(found.crashes)} crashes**, {len(found.messages)} sorts "
        f"of ArchiveError (below), {found.valid:,} that still are archives",
        f"peak of what one input allocated: {found.peak / 1e6:.1f} MB (every 50th input, max_bytes = {MOST / 1e6:.1f} MB); of the process {rss / 1e3:.0f} MB; "
        f"slowest input {1000 * found.slowest:.0f} ms for all loops; {time.perf_counter() - found.begin:.0f} s",
        f"numpy {np.__version__}; {how}",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true")
    args = parser.parse_args()
    if args.guided:
        guided(args.inputs, args.seed)
    found = run(args.inputs, args.seed)
    report(found, args.seed, "own structure-aware mutations, feedback by message")
    if found.crashes:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
