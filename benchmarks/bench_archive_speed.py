"""How small are archives against the entropy, and how fast are they written and read, beside zlib and zstd?

Run: OMP_NUM_THREADS=1 python benchmarks/bench_archive_speed.py [--rounds 3] [--big] [names ...]

Seeded symbols, one tensor a file. Rates are dense megabytes of float32 by CPU seconds of one thread (user and system, the best of the rounds), so that
other work on the machine does not count. Encoding: histogram, choice of precision, words, checksums, container. Decoding: opening the file, the checks,
checksums, symbols, table, the dense float32 tensor with its memory. Peak memory: beyond the input and the result, as a share of the dense tensor, by
tracemalloc, in a run of its own. zlib and zstd get the symbols, one byte each; their tables are not counted, and decoding does not look the values up.
``--big``: the first fully connected layer of VGG-16 too, 411 MB.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

from fxq.archive.decoder import Archive
from fxq.archive.encoder import Factored, write

Array = np.ndarray[Any, Any]
CASES: dict[str, tuple[tuple[int, ...], float, int]] = {
    "64x64x3x3, 10 %, 5 bit": ((64, 64, 3, 3), 0.10, 5),
    "512x512x3x3, 10 %, 5 bit": ((512, 512, 3, 3), 0.10, 5),
    "512x512x3x3, 35 %, 8 bit": ((512, 512, 3, 3), 0.35, 8),
    "512x512x3x3, 100 %, 8 bit": ((512, 512, 3, 3), 1.0, 8),
    "4096x4096, 4 %, 5 bit": ((4096, 4096), 0.04, 5),
    "4096x4096, 10 %, 5 bit": ((4096, 4096), 0.10, 5),
    "4096x25088, 4 %, 5 bit": ((4096, 25088), 0.04, 5),
}
BIG = "4096x25088, 4 %, 5 bit"


def tensor(shape: tuple[int, ...], density: float, bits: int) -> Factored:
    """Symbols of a pruned and clustered layer: zeros by chance, the rest by a bell curve over 2^bits codes (255 at 8 bits)."""
    rng, k = np.random.default_rng(0), min(1 << bits, 255)
    p = np.exp(-(np.linspace(-2, 2, k) ** 2) / 2)
    ends = np.cumsum([1 - density, *(density * p / p.sum())])
    n = int(np.prod(shape))
    symbols = np.empty(n, np.uint8)
    for at in range(0, n, 1 << 22):
        part = symbols[at : at + (1 << 22)]
        part[:] = np.minimum(np.searchsorted(ends, rng.random(len(part), np.float32), side="right"), k)
    return Factored("w", symbols.reshape(shape), np.concatenate([[0], np.linspace(-0.1, 0.1, k)]).astype(np.float32))


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """CPU seconds of the best round; one before that warms up."""
    best = float("inf")
    for i in range(rounds + 1):
        start = time.process_time()
        run()
        if i:
            best = min(best, time.process_time() - start)
    return best


def peak(run: Callable[[], Any], kept: int) -> int:
    """Most bytes that were allocated at once, without ``kept`` of the result."""
    tracemalloc.start()
    run()
    found = tracemalloc.get_traced_memory()[1] - kept
    tracemalloc.stop()
    return found


def archive(item: Factored, coding: str, numba: bool, rounds: int, path: Path) -> dict[str, Any]:
    """A row of one coder of the project's."""
    os.environ["FXQ_NUMBA"] = "1" if numba else "0"
    dense = 4 * item.symbols.size

    def read() -> Array:
        with Archive(path, max_bytes=1 << 40) as a:
            return a.dense(a.records[0])

    file, (stat,), _ = write([item], coding=coding)
    path.write_bytes(file)
    exact = all(np.array_equal(a, item.table[s]) for a, s in zip(read(), item.symbols, strict=True))
    if not exact:
        raise AssertionError("the tensor did not come back")
    encode, decode = seconds(lambda: write([item], coding=coding), rounds), seconds(read, rounds)
    memory = peak(lambda: write([item], coding=coding), len(file)), peak(read, dense)
    with Archive(path, max_bytes=1 << 40) as a:
        r = a.records[0]
    return {
        "bytes": len(file), "ratio": f"{dense / len(file):.1f}", "over entropy": f"{100 * (8 * len(file) / stat.entropy_bits - 1):.2f} %",
        "encode MB/s": round(dense / 1e6 / encode), "decode MB/s": round(dense / 1e6 / decode),
        "peak encode": f"{memory[0] / dense:.1%}", "peak decode": f"{memory[1] / dense:.1%}",
        "form": f"{r.bits} bit, {r.count:,} {'lanes' if r.coding == 'rans' else 'pairs'}",
    }  # fmt: skip


def general(item: Factored, pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes], rounds: int) -> dict[str, Any]:
    """A row of a general compressor on the symbols."""
    raw, dense = item.symbols.tobytes(), 4 * item.symbols.size
    packed = pack(raw)
    counts = np.bincount(item.symbols.reshape(-1))
    p = counts[counts > 0] / item.symbols.size
    entropy = float(-(p * np.log2(p)).sum()) * item.symbols.size / 8
    encode, decode = seconds(lambda: pack(raw), rounds), seconds(lambda: unpack(packed), rounds)
    return {
        "bytes": len(packed), "ratio": f"{dense / len(packed):.1f}", "over entropy": f"{100 * (len(packed) / entropy - 1):.2f} %",
        "encode MB/s": round(dense / 1e6 / encode), "decode MB/s": round(dense / 1e6 / decode),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--big", action="store_true")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(map(repr, CASES))}")
    args = parser.parse_args(argv)
    table = common.Table("archive_speed", "Archives: size against the entropy, speed, memory")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or [n for n in CASES if n != BIG or args.big]:
            item, path = tensor(*CASES[name]), Path(folder) / "w.fxq"
            for label, coding, numba in (("rANS, numpy", "rans", False), ("rANS, numba", "rans", True), ("Huffman, numpy", "huffman", False)):
                table.put(f"{name}: {label}", archive(item, coding, numba, args.rounds, path))
            if name != BIG:
                table.put(f"{name}: zlib -6", general(item, lambda b: zlib.compress(b, 6), zlib.decompress, 1))
                try:
                    zstd = importlib.import_module("zstandard")
                except ImportError:
                    continue
                table.put(f"{name}: zstd -3", general(item, zstd.ZstdCompressor(3).compress, zstd.ZstdDecompressor().decompress, 1))
    summary = ["rates: dense float32 by CPU time of one thread; peaks: beyond input and result, of the dense tensor", f"best of {args.rounds} rounds"]
    table.write([*summary, *(["rows of other names: an earlier run, with --big"] if args.names else [])])


if __name__ == "__main__":
    main()
