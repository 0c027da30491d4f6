"""Which of torchvision's builders are captured, compiled, lowered, loaded by ONNX Runtime and equal to the integer reference?

Run: python benchmarks/bench_coverage.py [--fresh] [--timm] [names ...]   (resumes; seeded random weights, fresh verification data)
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from typing import Any

import common
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_map

import fxq

FIXED = {"vit": 224, "swin": 224, "maxvit": 224, "inception": 128, "alexnet": 224, "vgg": 224}
TIMM = [
    "resnet18",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "regnety_002",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "resmlp_12_224",
    "ghostnet_050",
    "hrnet_w18_small",
    "dla34",
    "ese_vovnet19b_dw",
    "repvgg_a0",
    "nf_resnet26",
    "levit_128s",
    "efficientformer_l1",
    "mobilevit_xxs",
    "poolformer_s12",
    "edgenext_xx_small",
    "mobileone_s0",
    "hgnetv2_b0",
    "rexnet_100",
    "tinynet_e",
    "lcnet_050",
    "mnasnet_small",
    "fbnetc_100",
    "densenet121",
]


def example(name: str, batch: int = 2) -> tuple[Any, ...]:
    """Inputs that a torchvision builder takes, as small as it allows."""
    g = torch.Generator().manual_seed(7)
    if name.startswith("raft"):
        return torch.rand(batch, 3, 128, 128, generator=g) * 2 - 1, torch.rand(batch, 3, 128, 128, generator=g) * 2 - 1
    if name in torchvision.models.list_models(module=torchvision.models.detection):
        return ([torch.rand(3, 128, 128, generator=g) for _ in range(batch)],)
    if name in torchvision.models.list_models(module=torchvision.models.video):
        size = 224 if name.startswith(("mvit", "swin", "s3d")) else 64
        return (torch.randn(batch, 3, 16, size, size, generator=g),)
    size = next((s for prefix, s in FIXED.items() if name.startswith(prefix)), 96)
    return (torch.randn(batch, 3, size, size, generator=g),)


def small_images(net: Any) -> nn.Module:
    """A detector enlarges its images to 800 pixels, and with random weights keeps a thousand boxes of noise: 256 and 20 run every head too."""
    if hasattr(net, "transform") and not net.transform.fixed_size:
        net.transform.min_size = (256,)
    if hasattr(net, "roi_heads"):
        net.roi_heads.score_thresh = 0.0
        net.rpn._post_nms_top_n = dict.fromkeys(("training", "testing"), 20)
    return net  # type: ignore[no-any-return]


def timm_net(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False)
    size = net.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    fixed = net.pretrained_cfg.get("fixed_input_size") or name.startswith(("levit", "efficientformer", "mobilevit", "swin", "vit", "deit", "mixer", "resmlp"))
    side = size if fixed else 96
    return common.randomise(net), (torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7)),)


def row(net: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """One line of the table; a failure names its stage and its first line of text."""
    out: dict[str, Any] = {}
    start = time.perf_counter()
    stage = "compile"
    try:
        m = fxq.compile(net, calibration=[inputs])
        out["captured"] = m.captured.rung
        out["specialised"] = common.short("; ".join(m.captured.specialised)) or "-"
        out["compiled"] = "yes"
        out["parts"] = len(m.parts) or "-"
        whole = list(m.parts.values()) or [m]
        found = []
        for path, part in zip(m.parts or [""], whole, strict=True):
            stage = "lower"
            data = part.lower().data
            out["lowered"], stage = "yes", "load"
            ops, stage = common.runtime_ops(data), "verify"
            given = m.captured.parts[path][1] if path else inputs
            found.append((ops, part.verify(data, [tree_map(lambda x: 0.9 * x, given)])))
        out["int8/float conv, gemm, Q+DQ"] = "; ".join(common.coverage(ops) for ops, _ in found)
        proofs = [p for _, p in found]
        out["outputs differ"] = f"{sum(p.differ for p in proofs)}/{sum(p.elements for p in proofs)}"
        out["int8 elements differ"] = f"{sum(p.hidden_differ for p in proofs)}/{sum(p.hidden for p in proofs)}"
        out["tensors"] = f"{sum(p.nodes for p in proofs)}/{sum(p.planned for p in proofs)}"
        out["proof"] = "ok" if all(p.ok for p in proofs) else "no"
    except Exception as e:
        out[stage if stage != "compile" else "compiled"] = common.short(f"{type(e).__name__}: {str(e).splitlines()[0]}")
    out["s"] = round(time.perf_counter() - start, 1)
    return out


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--timm", action="store_true", help="30 timm families instead of torchvision")
    p.add_argument("--redo", action="store_true", help="run the named nets again, keep the other rows")
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    table = common.Table("coverage_timm" if a.timm else "coverage", "Coverage: captured, compiled, lowered, loaded, verified", a.fresh)
    for name in a.names or (TIMM if a.timm else torchvision.models.list_models()):
        if name in table.rows and not a.redo:
            continue
        net, inputs = timm_net(name) if a.timm else (small_images(common.torchvision_net(name)), example(name))
        table.put(name, row(net, inputs))
        del net
        gc.collect()
    rows = table.rows.values()
    table.write(
        [
            f"{sum('captured' in r for r in rows)} of {len(rows)} captured, {sum(r.get('compiled') == 'yes' for r in rows)} compiled, "
            f"{sum(r.get('lowered') == 'yes' for r in rows)} lowered, {sum('outputs differ' in r for r in rows)} run by ONNX Runtime",
            f"{sum(str(r.get('int8 elements differ', '1/')).startswith('0/') for r in rows)} with 0 elements of all quantized tensors "
            f"different from the integer reference; the proof is ok for {sum(r.get('proof') == 'ok' for r in rows)}",
        ]
    )


if __name__ == "__main__":
    main()
