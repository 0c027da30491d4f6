"""What does ``fxq lint --fix`` repair in files of ONNX Runtime's quantize_static? Operations in float and Q/DQ nodes left, as the runtime executes them.

Run: python benchmarks/bench_lint_fix.py [--fresh] [--size 64] [names ...]
"""

from __future__ import annotations

import argparse
import collections
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
import torch
from bench_speed import export_fp32

from fxq.lint import LintReport, runtime_report
from fxq.lint_fix import fix

NAMES = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "googlenet", "densenet121")
KINDS = ("u8", "s8")


def quantized(fp32: Path, folder: Path, batches: list[np.ndarray], signed: bool) -> bytes:
    """quantize_static with its pre-processing; weights signed per channel, activations unsigned or signed."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.it = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            b = next(self.it, None)
            return None if b is None else {"x": b}

    pre, out = folder / "pre.onnx", folder / "out.onnx"
    quant_pre_process(str(fp32), str(pre), skip_symbolic_shape=True)
    kind = QuantType.QInt8 if signed else QuantType.QUInt8
    quantize_static(str(pre), str(out), Reader(), quant_format=QuantFormat.QDQ, activation_type=kind, weight_type=QuantType.QInt8, per_channel=True)
    return out.read_bytes()


def row_of(report: LintReport) -> str:
    floats = sum(o.runs == "float" for o in report.ops)
    return f"{floats} float, {report.q_left}+{report.dq_left}"


def db(reference: np.ndarray, y: np.ndarray) -> float:
    noise = float(np.square(y.astype(np.float64) - reference).sum())
    return 10 * float(np.log10(float(np.square(reference.astype(np.float64)).sum()) / noise)) if noise else float("inf")


def measure(name: str, signed: bool, size: int) -> dict[str, Any]:
    net = common.torchvision_net(name)
    data = [torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        fp32 = Path(folder) / "fp32.onnx"
        export_fp32(net, data[0], fp32)
        model = onnx.load_from_string(quantized(fp32, Path(folder), [b.numpy() for b in data], signed))
    before = runtime_report(model)
    fixed, lines = fix(model)
    after = runtime_report(fixed)
    x = data[0].numpy()
    plain = [common.session(m.SerializeToString(), level="ORT_DISABLE_ALL").run(None, {"x": x})[0] for m in (model, fixed)]
    fused = [common.session(m.SerializeToString()).run(None, {"x": x})[0] for m in (model, fixed)]
    done = collections.Counter(" ".join(line.split(": ", 1)[1].split("(")[0].split()) for line in lines if not line.startswith("not repaired"))
    return {
        "before": row_of(before), "after": row_of(after),
        "without optimizations": "equal bit for bit" if np.array_equal(*plain) else f"{db(*plain):.1f} dB",
        "with": f"{db(*fused):.1f} dB",
        "repairs": "; ".join(f"{n} x {k}" for k, n in done.items()) or "none",
        "left": "; ".join(sorted({o.op for o in after.ops if o.runs == "float"})),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--size", type=int, default=64)
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    torch.set_num_threads(1)
    table = common.Table("lint_fix", "Files of quantize_static before and after fxq lint --fix, in ONNX Runtime", a.fresh)
    for name in a.names or NAMES:
        for kind in KINDS:
            if f"{name} {kind}" not in table.rows:
                table.put(f"{name} {kind}", measure(name, kind == "s8", a.size))
    graph = "before, after: operations in float, Q + DQ nodes left in the graph that ONNX Runtime executes"
    table.write([graph, "the repaired file's outputs beside the given file's, without and with the runtime's optimizations; random weights"])


if __name__ == "__main__":
    main()
