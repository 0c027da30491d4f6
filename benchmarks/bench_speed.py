"""How fast is fxq's file against ONNX Runtime's fp32 and quantize_static (and OpenVINO on the same file)? Ratios from one interleaved run.

Run: python benchmarks/bench_speed.py [--fresh] [--openvino] [--threads 1 2] [--batches 1 8] [--rounds 15] [names ...]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import nn

import fxq

NETS = [
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "googlenet",
    "squeezenet1_1",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "vgg11_bn",
    "inception_v3",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
]


def size_of(name: str) -> int:
    return 299 if name == "inception_v3" else 224


def export_fp32(net: nn.Module, x: torch.Tensor, path: Path) -> None:
    """The float file that ONNX Runtime users make: torch's exporter, dynamic batch, opset 17."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), str(path), dynamo=False, opset_version=17, input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "n"}})


def quantize_static(fp32: Path, out: Path, batches: list[np.ndarray]) -> None:
    """ONNX Runtime's own quantizer with its pre-processing: u8 activations, s8 per-channel weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as run
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.it = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            b = next(self.it, None)
            return None if b is None else {"x": b}

    pre = out.with_suffix(".pre.onnx")
    try:
        with contextlib.chdir(out.parent):  # where it gives up it leaves files in the working folder
            quant_pre_process(str(fp32), str(pre))
    except Exception:  # AssertionError and bare Exception: its symbolic shape inference gives up on attention with a dynamic batch
        quant_pre_process(str(fp32), str(pre), skip_symbolic_shape=True)
    run(str(pre), str(out), Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True)


def openvino_run(model: Any, x: np.ndarray, threads: int, precision: str) -> tuple[Callable[[], Any], Any]:
    """A call of the model in OpenVINO, and the graph that it executes."""
    import openvino as ov

    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    compiled = ov.Core().compile_model(model, "CPU", config)
    request = compiled.create_infer_request()
    return (lambda: request.infer([x])), compiled.get_runtime_model()


def openvino_int8(graph: Any) -> str:
    """``integer/all`` of the convolutions and matrix products of an executed graph."""
    found = [op.get_rt_info() for op in graph.get_ops()]
    weighted = [i for i in found if i["layerType"].astype(str) in ("Convolution", "Deconvolution", "FullyConnected", "MatMul")]
    return f"{sum(i['primitiveType'].astype(str).endswith('I8') for i in weighted)}/{len(weighted)}"


def openvino_models(fp32: Path, ours: bytes, batches: list[np.ndarray]) -> dict[str, tuple[Any, str]]:
    """Model and precision: fxq's file, OpenVINO's own int8 (NNCF, default preset) and bf16 of the float file."""
    import nncf
    import openvino as ov

    core = ov.Core()
    own = nncf.quantize(core.read_model(str(fp32)), nncf.Dataset(batches), subset_size=len(batches))
    return {"ov fxq": (core.read_model(ours), "f32"), "ov int8": (own, "f32"), "ov bf16": (core.read_model(str(fp32)), "bf16")}


def measure(name: str, a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    net, size = common.torchvision_net(name), size_of(name)
    data = [torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    fp32, static = folder / "fp32.onnx", folder / "static.onnx"
    export_fp32(net, data[0], fp32)
    quantize_static(fp32, static, [b.numpy() for b in data])
    ours = fxq.compile(net, calibration=data).lower().data
    files = {"fp32": fp32.read_bytes(), "static": static.read_bytes(), "fxq": ours}
    row: dict[str, Any] = {"static graph": common.coverage(common.runtime_ops(files["static"])), "fxq graph": common.coverage(common.runtime_ops(ours))}
    others = openvino_models(fp32, ours, [b.numpy() for b in data]) if a.openvino else {}
    for threads in a.threads:
        for batch in a.batches:
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(9)).numpy()
            sessions = {k: common.session(v, threads) for k, v in files.items()}
            runs: dict[str, Callable[[], Any]] = {k: (lambda s=s, x=x: s.run(None, {s.get_inputs()[0].name: x})) for k, s in sessions.items()}
            for key, (model, precision) in others.items():
                runs[key], graph = openvino_run(model, x, threads, precision)
                if key != "ov bf16":
                    row[f"{key} int8"] = openvino_int8(graph)
            t = common.interleaved(runs, a.rounds)
            tag = f"t{threads} b{batch}"
            row[tag] = " / ".join([f"{t['fp32'] / t['static']:.2f}", f"{t['fp32'] / t['fxq']:.2f}", f"{t['static'] / t['fxq']:.3f}"])
            if a.openvino:
                row[f"{tag} OpenVINO"] = " / ".join(f"{t['fp32'] / t[k]:.2f}" for k in others)
    return row


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--openvino", action="store_true")
    p.add_argument("--redo", action="store_true")
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    import logging

    logging.disable(logging.WARNING)
    table = common.Table("speed", "Speed in ONNX Runtime: fp32/static, fp32/fxq, static/fxq (above 1: fxq is faster)", a.fresh)
    for name in a.names or NETS:
        if name in table.rows and not a.redo:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            table.put(name, measure(name, a, Path(folder)) | {"s": round(time.perf_counter() - start)})
        gc.collect()
    summary = [
        "columns t<threads> b<batch>: fp32/static, fp32/fxq, static/fxq, all in ONNX Runtime",
        "OpenVINO columns: ONNX Runtime's fp32 time over that of OpenVINO on fxq's file / on its own int8 (NNCF, default preset) / on the float file in bf16",
        "ov ... int8: convolutions and matrix products that OpenVINO executes in integers, of all",
    ]
    for tag in dict.fromkeys(c for r in table.rows.values() for c in r if c.startswith("t") and c.count(" ") == 1):
        ratios = [float(r[tag].split(" / ")[2]) for r in table.rows.values() if tag in r]
        summary.append(
            f"{tag}: geometric mean static/fxq {math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f}, least {min(ratios):.3f} over {len(ratios)} nets"
        )
    table.write(summary)


if __name__ == "__main__":
    main()
