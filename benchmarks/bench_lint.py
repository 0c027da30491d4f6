"""Does ``fxq lint`` predict what runtimes do? Each node of each file against ONNX Runtime's optimized graph, OpenVINO's executed model, TensorRT's builder.

Run: python benchmarks/bench_lint.py [--fresh] [--redo] [--foreign | --tensorrt] [names ...]   (resumes; seeded random weights)

Without an option: the coverage list, as int8 files for ONNX Runtime. ``--foreign``: files of onnxruntime's quantize_static. ``--tensorrt``: engines for compute
capability 8.6. A node counts where it is in the runtime's report; positive is int8. Pointwise operations are int8 when they are a part of an integer kernel.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_coverage
import common
import numpy as np
import onnx
import openvino
import torch
import torchvision

import fxq
from fxq import lint_ov_runtime
from fxq.lint import GONE, LintReport, agrees, lint, runtime_report

FOREIGN = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x1_0", "squeezenet1_1", "googlenet", "densenet121",
    "regnet_y_400mf", "mnasnet0_5", "vgg11_bn",
)  # fmt: skip
TENSORRT = ("resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x1_0", "swin_t")
CLASSES = ("tp", "fp", "fn", "tn")
SHOWN = 3


def confusion(pairs: Iterator[tuple[bool, bool]]) -> list[int]:
    """True and false positives, false and true negatives of (predicted, actual)."""
    tally = dict.fromkeys(CLASSES, 0)
    for predicted, actual in pairs:
        tally[("t" if predicted == actual else "f") + ("p" if predicted else "n")] += 1
    return list(tally.values())


def compared(predicted: LintReport, actual: LintReport) -> Iterator[tuple[bool, bool]]:
    truth = {o.node: o.runs for o in actual.ops}
    return ((o.runs == "int8", truth[o.node] == "int8") for o in predicted.ops if truth.get(o.node, GONE) != GONE)


def columns(name: str, found: list[tuple[LintReport, LintReport]]) -> dict[str, Any]:
    """One runtime's columns: confusion, nodes that it removed, Q + DQ left predicted and actual, differences."""
    tally = [sum(n) for n in zip(*(confusion(compared(p, t)) for p, t in found), strict=True)]
    differ = [line for p, t in found for line in agrees(p, t)]
    count = [sum(sum(o.runs == GONE for o in t.ops) for _, t in found), *(sum(getattr(r, a) for r in side) for side in zip(*found, strict=True) for a in LEFT)]
    return {
        f"{name} tp/fp/fn/tn": "/".join(map(str, tally)), f"{name} removed": count[0], f"{name} Q+DQ predicted": f"{count[1]}+{count[2]}",
        f"{name} Q+DQ": f"{count[3]}+{count[4]}", f"{name} differences": common.short("; ".join([*differ[:SHOWN], *(["..."] if len(differ) > SHOWN else [])])),
    }  # fmt: skip


LEFT = ("q_left", "dq_left")


def both(files: list[bytes]) -> dict[str, Any]:
    """Columns of ONNX Runtime and OpenVINO for the files of one net."""
    models = [onnx.load_model_from_string(data) for data in files]
    out = columns("ort", [(lint(m), runtime_report(m)) for m in models])
    return out | columns("ov", [(lint(m, "openvino"), lint_ov_runtime.report(m)) for m in models])


def own(name: str) -> dict[str, Any]:
    net = bench_coverage.small_images(common.torchvision_net(name))
    m = fxq.compile(net, calibration=[bench_coverage.example(name)])
    return both([part.lower().data for part in (m.parts or {"": m}).values()])


class Reader:
    """Calibration data in the form that quantize_static reads."""

    def __init__(self, images: np.ndarray[Any, Any]) -> None:
        self.left = [{"x": images}]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


def foreign(name: str) -> dict[str, Any]:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    CalibrationDataReader.register(Reader)
    [images] = bench_coverage.example(name)
    with tempfile.TemporaryDirectory() as folder:
        source, target = str(Path(folder) / "float.onnx"), str(Path(folder) / "int8.onnx")
        torch.onnx.export(common.torchvision_net(name), (images,), source, dynamo=False, input_names=["x"])
        quantize_static(
            source, target, Reader(images.numpy()), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
        return both([Path(target).read_bytes()])


def tensorrt(name: str) -> dict[str, Any]:
    inputs = bench_coverage.example(name)
    m = fxq.compile(common.torchvision_net(name), "int8", calibration=[inputs], target="sm86")
    built = {c.onnx: c.built for c in m.lower("tensorrt").checks if c.built != "absent"}
    predicted: Any = lint(m.lower("onnx-qdq").data, "sm86")
    pairs = [(o.node, o.runs, built[o.node]) for o in predicted.ops if o.node in built]
    differ = [f"{node}: predicted {runs}, built {real}" for node, runs, real in pairs if runs != real]
    tally = confusion((runs == "int8", real == "int8") for _, runs, real in pairs)
    return {"trt tp/fp/fn/tn": "/".join(map(str, tally)), "trt removed": len(predicted.ops) - len(pairs), "trt differences": common.short("; ".join(differ))}


def total(rows: dict[str, dict[str, Any]], runtime: str) -> str:
    """Precision and recall over rows."""
    cells = [[int(n) for n in r[f"{runtime} tp/fp/fn/tn"].split("/")] for r in rows.values() if f"{runtime} tp/fp/fn/tn" in r]
    tp, fp, fn, tn = (sum(c) for c in zip(*cells, strict=True))
    exact = sum(not r[f"{runtime} differences"] for r in rows.values() if f"{runtime} differences" in r)
    removed = sum(r[f"{runtime} removed"] for r in rows.values() if f"{runtime} removed" in r)
    return (
        f"{len(cells)} nets, {tp + fp + fn + tn} nodes: precision {100 * tp / max(tp + fp, 1):.3f} %, recall {100 * tp / max(tp + fn, 1):.3f} % "
        f"({fp} wrongly called int8, {fn} wrongly called float; {removed} more nodes are not in the runtime's report); no difference at all in {exact} nets"
    )


def summary(rows: dict[str, dict[str, Any]]) -> list[str]:
    groups = {"own files": {k: r for k, r in rows.items() if " " not in k}, "files of quantize_static": {k: r for k, r in rows.items() if "static" in k}}
    lines = [f"openvino {openvino.__version__.split('-')[0]}"]
    for title, group in groups.items():
        for runtime, column in (("ONNX Runtime", "ort"), ("OpenVINO", "ov")):
            if any(f"{column} removed" in r for r in group.values()):
                lines.append(f"{runtime}, {title}: {total(group, column)}")
    if any("trt removed" in r for r in rows.values()):
        lines.append(f"TensorRT, convolutions and products: {total(rows, 'trt')}")
    return lines


def quick_first() -> list[str]:
    """The coverage list, nets that took little time there first."""
    known = json.loads((common.RESULTS / "coverage.json").read_text())["rows"]
    return sorted(torchvision.models.list_models(), key=lambda name: known.get(name, {}).get("s", 0.0))


def apart(run: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    """A row, made in a process of its own: a runtime can crash."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, run, name))
    process.start()
    there.close()
    try:
        row: dict[str, Any] = here.recv()
    except EOFError:
        process.join()
        row = {"failed": f"the process ended with {process.exitcode}"}
    process.join()
    return row


def _send(pipe: Any, run: Callable[[str], dict[str, Any]], name: str) -> None:
    try:
        row = run(name)
    except Exception as e:
        row = {"failed": common.short(f"{type(e).__name__}: {e}")}
    pipe.send(row)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--redo", action="store_true", help="run the named nets again, keep the other rows")
    kind = p.add_mutually_exclusive_group()
    kind.add_argument("--foreign", action="store_true")
    kind.add_argument("--tensorrt", action="store_true")
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    table = common.Table("lint", "Lint: prediction against what runtimes do", a.fresh)
    run, names, mark = (foreign, FOREIGN, " quantize_static") if a.foreign else (tensorrt, TENSORRT, " tensorrt") if a.tensorrt else (own, quick_first(), "")
    for name in a.names or names:
        if name + mark in table.rows and not a.redo:
            continue
        start = time.perf_counter()
        table.put(name + mark, apart(run, name) | {"s": round(time.perf_counter() - start, 1)})
        table.write(summary(table.rows))
    table.write(summary(table.rows))


if __name__ == "__main__":
    main()
