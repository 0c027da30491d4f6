"""make demo: ResNet-18 (seeded random weights) to int8 ONNX, run by ONNX Runtime, compared with the integer reference."""

from pathlib import Path

import torch
import torchvision

import fxq


def main() -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    data = torch.randn(16, 3, 96, 96)
    m = fxq.compile(net, calibration=data)
    print(m.history)
    out = Path("out")
    out.mkdir(exist_ok=True)
    path = m.lower().save(out / "resnet18.onnx", force=True)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    print(m.verify(path, data[:4]))


if __name__ == "__main__":
    main()
