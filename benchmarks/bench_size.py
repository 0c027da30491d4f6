"""How many weights, multiply-accumulates and bytes does a net have? Everything is counted in the ONNX file that it is lowered to.

Run: python benchmarks/bench_size.py [--fresh] [--schemes float iao_w8a8 ...] [nets ...]

Weights are those of convolutions and linear layers, without biases; batch norms are folded. *Stated* is the size by the rule of the low-bit
literature: whole bits for each weight (32 of a float layer, 8, 4, 2, of three levels 2, of two levels 1), 4 bytes for each bias, nothing else.
*File* is what is on the disk. Nets have random weights; low-bit schemes are converted without training, which changes no size.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import common
import onnx_counts
import torch

import fxq
from fxq import schemes, zoo

NETS = ("nin_gc", "nin", "resnet20")
SCHEMES = ("float", "iao_w8a8", "iao_w4a8", "iao_w4a4_lsq", "dorefa_w4a4", "dorefa_w2a2", "xnor_w1a32", "xnor_w1a1", "twn_wta32", "twn_wta1", "tbn_w1at")
WIDE = 128
"""Layers with so many input and output channels show what a code costs without the graph's overhead."""


def lowered(net: str, scheme: str) -> bytes:
    """The ONNX file of a net with random weights."""
    torch.manual_seed(0)
    model, x = common.randomise(zoo.build(net)), torch.randn(4, *zoo.INPUTS[net])
    made = schemes.get(scheme)
    if made.method == "float":
        return fxq.compile(model, scheme, example=x, progress=False).lower("onnx").data
    if getattr(made, "trains", False):
        return fxq.compile(model, scheme, calibration=x, mode="qat", progress=False).convert().lower().data  # type: ignore[attr-defined]
    return fxq.compile(model, scheme, calibration=x, progress=False).lower().data


def row(data: bytes) -> dict[str, Any]:
    """Counts of a file."""
    found = onnx_counts.layers(data)
    low = [layer for layer in found if layer.levels]
    wide = [layer for layer in low if min(layer.channels) >= WIDE and layer.bits == min(x.bits for x in low)]
    return {
        "weights": sum(layer.weights for layer in found),
        "biases": sum(layer.biases for layer in found),
        "MMAC": f"{sum(layer.macs for layer in found) / 1e6:.2f}",
        "bits": " ".join(str(layer.bits) for layer in found),
        "stated MB": f"{onnx_counts.stated_bytes(found) / 1e6:.4f}",
        "file MB": f"{len(data) / 1e6:.4f}",
        f"most bits stored a weight, {WIDE}+ channels": f"{max(x.stored_bits for x in wide):.3f}" if wide else "",
        "of these without scales": f"{max(x.code_bits for x in wide):.3f}" if wide else "",
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fresh", action="store_true", help="forget all finished rows")
    p.add_argument("--schemes", nargs="+", default=[s for s in SCHEMES if s in schemes.names()])
    p.add_argument("names", nargs="*", choices=[*zoo.NETS, []], metavar="nets")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    table = common.Table("size", "Weights, multiply-accumulates and bytes, counted in the ONNX file", a.fresh)
    for net in a.names or NETS:
        for scheme in a.schemes:
            table.put(f"{net} {scheme}", row(lowered(net, scheme)))
    table.write([
        "weights of convolutions and linear layers, without biases; MMAC: million multiply-accumulates for one input",
        "bits: of each layer's codes; stated: whole bits for each weight and 4 bytes for each bias; file: on the disk, graph and scales included",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
