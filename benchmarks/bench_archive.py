"""How small is an archive? VGG-16- and AlexNet-shaped weights with the densities and bits of Deep Compression, and a net that is pruned and clustered.

Run: python benchmarks/bench_archive.py [--only squeezenet vgg16 alexnet] [--fresh]     (finished rows are kept)

Densities and bits: Han et al. 2016 (arXiv 1510.00149), tables 4 (AlexNet) and 5 (VGG-16): 8 bits in conv layers and 5 in fc layers, and 5 bits in both.
Shapes of weights and biases are torchvision's for VGG-16 and those of Caffe's grouped AlexNet (61 million), which the paper compressed. Weights are drawn,
as the paper's were never published: each position is kept with the layer's density, and what is kept follows the tail of the distribution, which is what
magnitude pruning leaves. Laplace is closest to trained layers (excess kurtosis 3); Gaussian (0) and Student's t with 4 degrees of freedom (infinite) are
the two sides. Codebooks: ``linear`` is Lloyd's algorithm from the linear start, the paper's choice; ``optimal`` the least error; ``entropy`` is
entropy-constrained, with the largest price of a bit whose error is at most that of ``linear`` in each layer; ``one price`` with one price for all layers
and at most the error of ``linear`` in the whole net. Ratios are bytes of all weights and biases as float32 by ``os.path.getsize`` of the file, biases
float32.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

import fxq
from fxq import kmeans
from fxq.archive import encoder, huffman, rans
from fxq.archive.decoder import Archive

Array = np.ndarray[Any, Any]
NETS: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
    "VGG-16": {
        "conv1_1": ((64, 3, 3, 3), 58), "conv1_2": ((64, 64, 3, 3), 22), "conv2_1": ((128, 64, 3, 3), 34), "conv2_2": ((128, 128, 3, 3), 36),
        "conv3_1": ((256, 128, 3, 3), 53), "conv3_2": ((256, 256, 3, 3), 24), "conv3_3": ((256, 256, 3, 3), 42), "conv4_1": ((512, 256, 3, 3), 32),
        "conv4_2": ((512, 512, 3, 3), 27), "conv4_3": ((512, 512, 3, 3), 34), "conv5_1": ((512, 512, 3, 3), 35), "conv5_2": ((512, 512, 3, 3), 29),
        "conv5_3": ((512, 512, 3, 3), 36), "fc6": ((4096, 25088), 4), "fc7": ((4096, 4096), 4), "fc8": ((1000, 4096), 23),
    },
    "AlexNet": {
        "conv1": ((96, 3, 11, 11), 84), "conv2": ((256, 48, 5, 5), 38), "conv3": ((384, 256, 3, 3), 35), "conv4": ((384, 192, 3, 3), 37),
        "conv5": ((256, 192, 3, 3), 37), "fc6": ((4096, 9216), 9), "fc7": ((4096, 4096), 9), "fc8": ((1000, 4096), 25),
    },
}  # fmt: skip
"""Shape of each weight, and how many percent of it are kept."""
TAILS = ("laplace", "gauss", "student4")
BOOKS = ("linear", "price 0.001", "price 0.002", "price 0.004", "optimal", "one price", "entropy")
BLOCK, SAMPLE = 1 << 22, 1 << 19


def tail(p: Tensor, kind: str) -> Tensor:
    """Magnitudes that are exceeded with the probabilities ``p`` (float64)."""
    if kind == "laplace":
        return -p.log()
    if kind == "gauss":
        return torch.special.ndtri(1 - p / 2)
    a = 4 * (p / 2) * (1 - p / 2)  # Shaw 2006, "Sampling Student's T distribution", section 4: the quantile for 4 degrees of freedom
    return 2 * (torch.cos(torch.acos(a.sqrt()) / 3) / a.sqrt() - 1).clamp(min=0).sqrt()


def drawn(shape: tuple[int, ...], percent: int, kind: str, seed: int) -> tuple[Array, Tensor]:
    """(bool mask of what is kept, flat; the kept weights)."""
    g = torch.Generator().manual_seed(seed)
    size, density = math.prod(shape), percent / 100
    mask = torch.cat([torch.rand(min(BLOCK, size - at), generator=g) < density for at in range(0, size, BLOCK)])
    kept = int(mask.sum())
    sign = torch.rand(kept, generator=g) < 0.5
    magnitude = tail(density * (1 - torch.rand(kept, generator=g, dtype=torch.float64)), kind)
    return mask.numpy(), torch.where(sign, -1.0, 1.0) * magnitude.float() * math.sqrt(2 / math.prod(shape[1:]))


def error(values: Tensor, codes: Tensor, book: Tensor) -> float:
    """Sum of squared errors."""
    return sum(float(((v - book[c.long() - 1]).double() ** 2).sum()) for v, c in zip(values.split(BLOCK), codes.split(BLOCK), strict=True))


def price(net: str, kind: str, conv: int) -> float:
    """The largest price of a bit, one for all layers, at which error / variance over all kept weights is at most that of ``linear``."""
    layers = []
    for name, (shape, percent) in NETS[net].items():
        p = (torch.arange(SAMPLE // 4, dtype=torch.float64) + 0.5) / (SAMPLE // 4) * percent / 100
        magnitude = tail(p, kind).float()
        both = torch.stack([magnitude, -magnitude], 1).reshape(-1)
        layers.append((both, 1 << (5 if name.startswith("fc") else conv), math.prod(shape) * percent))

    def spent(**how: Any) -> float:
        return sum(n * error(v, *kmeans.cluster(v, k, **how)) / float(v.double().square().sum()) for v, k, n in layers)

    bound, low, high = spent(init="linear"), 1e-7, 1.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(rate=middle) <= bound else (low, middle)
    return 0.99 * low


def clustered(values: Tensor, k: int, how: str, rate: float) -> tuple[Tensor, Tensor]:
    """Codes from 1 on, and the codebook."""
    if rate:
        return kmeans.cluster(values, k, rate=rate)
    if how != "entropy":
        return kmeans.cluster(values, k, init=how)
    codes, book = kmeans.cluster(values, k, init="linear")
    bound = error(values, codes, book)
    part = values[:: max(1, values.numel() // SAMPLE)]
    aim, low, high = bound / values.numel() * part.numel(), 1e-7, 1.0
    for _ in range(9):  # the largest price of a bit with this error, on a sample
        middle = math.sqrt(low * high)
        low, high = (middle, high) if error(part, *kmeans.cluster(part, k, rate=middle)) <= aim else (low, middle)
    for rate in (low, low * 0.97, low * 0.9, low * 0.5):
        found = kmeans.cluster(values, k, rate=rate)
        if error(values, *found) <= bound:
            return found
    return kmeans.cluster(values, k)


@dataclass
class Sum:
    """Over all layers: what is kept, squared error, and bytes of the forms that are not in the file."""

    dense: int = 0
    kept: int = 0
    energy: float = 0.0
    error: float = 0.0
    relative: float = 0.0
    entropy: float = 0.0
    huffman: int = 0
    rans: float = 0.0
    fixed: float = 0.0
    csr: int = 0
    checks: dict[str, tuple[int, int]] = field(default_factory=dict)


def items(net: str, kind: str, how: str, conv: int, total: Sum) -> Iterator[encoder.Factored | encoder.Plain]:
    """The layers one by one; ``total`` is filled on the way."""
    rate = price(net, kind, conv) if how == "one price" else float(how[6:]) if how.startswith("price ") else 0.0
    for i, (name, (shape, percent)) in enumerate(NETS[net].items()):
        bits = 5 if name.startswith("fc") else conv
        mask, values = drawn(shape, percent, kind, i)
        codes, book = clustered(values, 1 << bits, how, rate)
        symbols = np.zeros(mask.size, np.uint8 if len(book) < 256 else np.uint16)
        symbols[mask] = codes.numpy()
        table = np.concatenate([np.zeros(1, np.float32), book.numpy()])
        counts = encoder.histogram(symbols, len(table))
        freq, precision, size = rans.choose(counts)
        plan = huffman.plan(symbols, counts)
        total.dense += 4 * (mask.size + shape[0])
        total.kept += values.numel()
        total.energy += float((values.double() ** 2).sum())
        total.error += error(values, codes, book)
        total.relative += error(values, codes, book) / float(values.double().square().mean())
        total.entropy += rans.entropy(counts) / 8
        total.huffman += plan.size + 4 * len(table)
        total.rans += size + 4 * len(table) + 4 * rans.lanes_for(mask.size, rans.coded_bits(counts, freq, precision) / 8)
        index = 8 if bits == 8 else 5
        total.fixed += fillers(mask, index) * (index + bits) / 8 + 4 * len(table)
        total.csr += 8 * values.numel() + 4 * (shape[0] + 1)
        total.checks[f"{name}.weight"] = zlib.crc32(symbols), zlib.crc32(table)
        yield encoder.Factored(f"{name}.weight", symbols.reshape(shape), table)
        yield encoder.Plain(f"{name}.bias", np.random.default_rng(i).standard_normal(shape[0]).astype(np.float32) * np.float32(0.1))


def fillers(mask: Array, bits: int) -> int:
    """Entries of a relative index of so many bits, filler zeros included."""
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    return int((gaps // (1 << bits)).sum()) + len(gaps)


def shaped(table: common.Table, net: str, kind: str, how: str, conv: int) -> None:
    """One row."""
    total, begin = Sum(), time.perf_counter()
    data, stats, over = encoder.write(items(net, kind, how, conv, total))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.fxq"
        path.write_bytes(data)
        size = os.path.getsize(path)
        assert size == sum(s.total for s in stats) + over.total
        with Archive(path, max_bytes=1 << 32) as archive:
            for name, check in total.checks.items():
                r = archive.by_name[name]
                assert check == (zlib.crc32(archive.symbols(r)), zlib.crc32(archive.table(r))), name
    biases = sum(s.total for s in stats if s.coding == "raw")
    bound = total.entropy + biases
    table.put(f"{net}, {kind}, {how}, {conv}/5 bits", {
        "ratio of the file": f"**{total.dense / size:.2f}**", "file MB": f"{size / 1e6:.3f}", "over the entropy": f"{100 * (size / bound - 1):.2f} %",
        **{k: f"{total.dense / (v + biases):.2f}" for k, v in (
            ("entropy", total.entropy), ("rANS", total.rans + over.total), ("Huffman", total.huffman + over.total),
            ("fixed index", total.fixed), ("CSR", total.csr))},
        "kept": f"{100 * 4 * total.kept / total.dense:.2f} %",
        "error / energy": f"{total.error / total.energy:.3e}",
        "error / variance": f"{total.relative / total.kept:.3e}", "SNR dB": f"{10 * math.log10(total.energy / total.error):.2f}",
        "codings": " ".join(sorted({s.coding for s in stats if s.coding != "raw"})), "header and index B": over.total,
        "s": f"{time.perf_counter() - begin:.0f}",
    })  # fmt: skip


def squeezed(table: common.Table) -> None:
    """``imagenet_squeezenet1_0_dc``: pruned and clustered by its authors; every bit must come back."""
    from safetensors.torch import load_file

    data = Path(os.environ.get("FXQ_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    tensors = load_file(data / "models" / "imagenet_squeezenet1_0_dc.safetensors")
    dense = sum(t.numel() * t.element_size() for t in tensors.values())
    plain = [encoder.Plain(name, t.numpy()) for name, t in tensors.items()]
    found = {item.name: encoder.distinct(item.array) for item in plain}
    codes = b"".join(f[0].astype("<u2").tobytes() if len(f[1]) > 256 else f[0].astype(np.uint8).tobytes() for f in found.values() if f is not None)
    with tempfile.TemporaryDirectory() as folder:
        for coding in ("auto", "rans", "huffman"):
            path = fxq.save_state_dict(tensors, Path(folder) / f"{coding}.fxq", coding=coding)
            again = fxq.load_state_dict(path)
            assert again.keys() == tensors.keys() and all(torch.equal(t.view(torch.int32), again[name].view(torch.int32)) for name, t in tensors.items())
            _, stats, over = encoder.write(plain, coding=coding)
            size, coded = os.path.getsize(path), [s for s in stats if s.coding != "raw"]
            entropy = sum(s.entropy_bits for s in coded) / 8
            bound = entropy + sum(4 * s.entries for s in coded) + sum(s.total for s in stats if s.coding == "raw")
            put = {
                "ratio of the file": f"**{dense / size:.2f}**", "file MB": f"{size / 1e6:.4f}", "over the entropy": f"{100 * (size / bound - 1):.2f} %",
                "codings": " ".join(f"{c}:{sum(s.coding == c for s in stats)}" for c in ("rans", "huffman", "raw")), "header and index B": over.total,
                "tables B": sum(s.tables for s in stats), "states B": sum(s.states for s in stats), "payload B": sum(s.payload for s in coded),
                "entropy B": round(entropy),
                "raw B": sum(s.total for s in stats if s.coding == "raw"),
            }  # fmt: skip
            table.put(f"squeezenet1_0_dc, archive {coding}", put)
    import lzma

    fp32 = b"".join(t.numpy().tobytes() for t in tensors.values())
    forms = {"float32": fp32, "the codes": codes}
    peers = {f"zlib -9 of {k}": len(zlib.compress(v, 9)) for k, v in forms.items()} | {f"lzma of {k}": len(lzma.compress(v)) for k, v in forms.items()}
    try:
        import zstandard

        peers |= {f"zstd -19 of {k}": len(zstandard.compress(v, 19)) for k, v in forms.items()}
    except ImportError:
        pass
    extra = sum(f[1].nbytes for f in found.values() if f is not None) + sum(item.array.nbytes for item in plain if found[item.name] is None)
    for name, length in peers.items():
        size = length + (extra if "codes" in name else 0)
        table.put(f"squeezenet1_0_dc, {name}", {"ratio of the file": f"{dense / size:.2f}", "file MB": f"{size / 1e6:.4f}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["squeezenet", "vgg16", "alexnet"])
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    table = common.Table("archive", "Bytes of archives", fresh=args.fresh)
    if "squeezenet" in args.only and "squeezenet1_0_dc, archive auto" not in table.rows:
        squeezed(table)
    runs = [(net, kind, how, conv) for how in BOOKS for kind in TAILS for net in NETS for conv in (8, 5) if net.lower().replace("-", "") in args.only]
    for net, kind, how, conv in runs:
        if f"{net}, {kind}, {how}, {conv}/5 bits" not in table.rows:
            shaped(table, net, kind, how, conv)
            write(table)
    write(table)


def write(table: common.Table) -> None:
    """The Markdown file."""
    kept = {net: ", ".join(f"{k} {v[1]}" for k, v in layers.items()) for net, layers in NETS.items()}
    table.write([
        f"densities: Han et al. 2016, tables 4 and 5 (percent kept: VGG-16 {kept['VGG-16']}; AlexNet {kept['AlexNet']}); 256 entries of 8-bit layers, 32 of "
        "5-bit layers, beside the zero",
        "ratio of the file: float32 bytes of weights and biases over os.path.getsize, every symbol and table decoded again and the same; over the entropy: "
        "against the iid entropy of all symbols and the float32 biases, container and tables included (squeezenet: its tables are part of the bound)",
        "rANS, Huffman: all tensors in that form; fixed index: the paper's form before Huffman (codes and a relative index of 8 bits in 8-bit layers, 5 in "
        "others, filler zeros counted); CSR: float32 values and int32 columns",
        "error / energy: squared error of what is kept over its energy; error / variance: mean over all kept weights, each over the mean square of its layer",
        "entropy: the codebooks of least entropy whose error is at most that of linear, layer by layer; one price: in the net as a whole (error / variance), "
        "with one price of a bit for all layers, so that bits go where they save most; price: that price (of a bit, in shares of the variance)",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
