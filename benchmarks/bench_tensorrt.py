"""TensorRT without a GPU: do engines of torchvision's nets build, and does every convolution and product run in the type that was planned?

Run: python benchmarks/bench_tensorrt.py [--fresh] [--redo] [--scheme int8] [--target sm86] [names ...]     (resumes; seeded random weights)
     python benchmarks/bench_tensorrt.py --accuracy [--threads 1] [nets ...]

Each net is built twice: the bytes must be the same. The ONNX file that the engine is built from runs in ONNX Runtime (optimizations off) and is
compared with the simulator, each quantized tensor on the runtime's own inputs, on data that the calibration has not seen. ``--accuracy`` measures
the trained nets of $FXQ_DATA: the float net, the simulator, and the file in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from typing import Any

import bench_accuracy
import common
import torch
import torchvision
from bench_coverage import example
from torch import nn
from torch.utils._pytree import tree_map

import fxq

MODULES = (torchvision.models, torchvision.models.segmentation)


def names() -> list[str]:
    """Classification and segmentation builders of torchvision."""
    return [n for module in MODULES for n in torchvision.models.list_models(module=module)]


def counts(checks: tuple[Any, ...], *kinds: str) -> str:
    """``as planned / planned low / left float`` of the given kinds."""
    some = [c for c in checks if c.kind in kinds]
    low = [c for c in some if c.planned != "float"]
    return f"{sum(c.ok for c in low)} of {len(low)}, {len(some) - len(low)} float"


def row(net: nn.Module, inputs: tuple[Any, ...], scheme: str, target: str) -> dict[str, Any]:
    """One line of the table; a failure names its stage and its first line of text."""
    out: dict[str, Any] = {}
    stage = "compile"
    try:
        start = time.perf_counter()
        m = fxq.compile(net, scheme, calibration=[inputs], target=target)
        out["compile s"], stage = round(time.perf_counter() - start, 1), "build"
        artifact: Any = m.lower("tensorrt")
        out["build s"], out["MB"] = round(artifact.info["seconds"], 1), round(len(artifact.data) / 1e6, 1)
        out["profile"] = "; ".join(" ".join("x".join(map(str, s)) for s in p) for p in artifact.info["profiles"].values())
        out["conv as planned"] = counts(artifact.checks, "conv", "conv_transpose")
        out["gemm as planned"] = counts(artifact.checks, "linear", "matmul")
        out["not as planned"] = common.short("; ".join(map(str, artifact.mismatches))) or "-"
        reasons = sorted({c.why for c in artifact.checks if c.planned == "float"})
        out["why float"] = common.short("; ".join(reasons)) or "-"
        stage = "rebuild"
        out["same bytes again"] = "yes" if m.lower("tensorrt").data == artifact.data else "NO"
        stage = "verify"
        proof: Any = m.verify(artifact, [tree_map(lambda x: 0.9 * x, inputs)])
        out["elements off"] = f"{proof.onnx.hidden_differ}/{proof.onnx.hidden}"
        out["ties"] = proof.onnx.ties
        out["end to end"] = f"{max(o.drift for o in proof.onnx.outputs):.1g}"
        out["proof"] = "ok" if proof.ok else "no"
    except Exception as e:
        out[stage] = common.short(f"{type(e).__name__}: {str(e).splitlines()[0]}")
    return out


def coverage(a: argparse.Namespace) -> None:
    table = common.Table(f"tensorrt_{a.scheme}_{a.target}", f"TensorRT: {a.scheme} for {a.target}, built without a GPU", a.fresh)
    for name in a.names or names():
        if name in table.rows and not a.redo:
            continue
        table.put(name, row(common.torchvision_net(name), example(name), a.scheme, a.target))
        gc.collect()
    rows = table.rows.values()
    built = [r for r in rows if "MB" in r]
    done = [r for r in built if "elements off" in r]
    low = [c.split(" float")[0].split(", ")[0].split(" of ") for r in built for c in (r["conv as planned"], r["gemm as planned"])]
    good, wanted = (sum(int(pair[i]) for pair in low) for i in (0, 1))
    ties, codes = sum(r["ties"] for r in done), sum(int(r["elements off"].split("/")[1]) for r in done)
    table.write(
        [
            f"{len(built)} of {len(rows)} build; {good} of {wanted} convolutions and products that the rules allow run as planned in the builder's table; "
            f"{sum(r['not as planned'] == '-' for r in built)} nets without a difference",
            f"{sum(r.get('same bytes again') == 'yes' for r in rows)} give the same bytes when built again",
            f"{sum(r['elements off'].startswith('0/') for r in done)} ONNX files give the simulator's codes in ONNX Runtime but for ties "
            f"({ties} of {codes} codes are one step off next to a half step); proof ok for {sum(r['proof'] == 'ok' for r in done)}",
            "random weights, images as in coverage.md; build seconds on a shared machine; what an engine gives on a GPU was not run",
        ]
    )


def unoptimized(model: bytes, threads: int) -> Any:
    s = common.session(model, threads, "ORT_DISABLE_ALL")
    return lambda x: s.run(None, {s.get_inputs()[0].name: x.numpy()})[0]


def accuracy(a: argparse.Namespace) -> None:
    title = "int8 for TensorRT on trained nets: the ONNX file in ONNX Runtime (optimizations off) beside the simulator"
    table = common.Table("tensorrt_accuracy", title, a.fresh)
    for name in a.names or bench_accuracy.NETS:
        if name in table.rows and not a.redo:
            continue
        case = bench_accuracy.NETS[name](name)
        m = fxq.compile(case.net, a.scheme, calibration=case.calibration.split(bench_accuracy.BATCH), target=a.target)
        artifact: Any = m.lower("tensorrt")
        small = case.x.shape[-1] < 100  # ONNX Runtime's CPU float16 convolutions are too slow for larger images
        half = m.lower("onnx-qdq", float_dtype="fp16").data if a.scheme == "int8" and small else None
        runs = {"float": case.net, "simulator": m, "ONNX Runtime": unoptimized(artifact.onnx, a.threads)}
        if half is not None:
            runs["ONNX Runtime, fp16"] = unoptimized(half, a.threads)
        scores = {k: bench_accuracy.outputs(run, case.x) for k, run in runs.items()}
        line: dict[str, Any] = {k: f"{bench_accuracy.top1(v, case.y):.3f}" for k, v in scores.items()}
        line["simulator - ONNX Runtime"] = f"{float(line['simulator']) - float(line['ONNX Runtime']):.3f}"
        line["images that disagree"] = int((scores["simulator"].argmax(1) != scores["ONNX Runtime"].argmax(1)).sum())
        top = scores["simulator"].abs().max()
        line["greatest difference"] = f"{float((scores['simulator'] - scores['ONNX Runtime']).abs().max() / top):.1g}"
        seen = 256 if small else 16
        proof = m.verify(artifact, [case.x[:seen]])
        line["images verified"], line["elements off"], line["ties"] = seen, f"{proof.onnx.hidden_differ}/{proof.onnx.hidden}", proof.onnx.ties  # type: ignore[union-attr]
        low = [c for c in artifact.checks if c.planned != "float"]
        line["int8 layers"], line["images"] = f"{sum(c.ok for c in low)} of {len(low)}, {len(artifact.checks) - len(low)} float", len(case.y)
        table.put(name, line)
        gc.collect()
    off = max(abs(float(r["simulator - ONNX Runtime"])) for r in table.rows.values())
    table.write(
        [
            f"simulator and ONNX Runtime differ by at most {off:.3f} points (goal: 0.1)",
            "the drop against float is what these grids cost; an engine's speed and own roundings need a GPU",
        ]
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fresh", action="store_true", help="forget all finished rows")
    p.add_argument("--redo", action="store_true", help="run the named nets again, keep the other rows")
    p.add_argument("--accuracy", action="store_true", help="trained nets instead of coverage")
    p.add_argument("--scheme", default="int8")
    p.add_argument("--target", default="sm86")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(a.threads)
    if a.accuracy:
        accuracy(a)
    else:
        coverage(a)


if __name__ == "__main__":
    main()
