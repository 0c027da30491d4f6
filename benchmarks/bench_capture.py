"""Which rung captures which net, and what is the graph specialised to? torchvision's builders and 30 timm families.

Run: python benchmarks/bench_capture.py [--fresh] [names ...]   (resumes; a timm net is named timm:NAME)

Every net has seeded random weights; parameters that start at zero are randomised, otherwise equality proves nothing. "equal"
means bit for bit at two batch sizes (NaN equals NaN in the same place), compared with the model in eval mode.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import common
import torch
import torchvision
from torch import nn

from fxq.errors import TraceError
from fxq.trace import RUNGS, capture

NATIVE = {"vit_": 224, "s3d": 224, "quantized_inception": 96, "swin": 64, "maxvit": 224, "inception": 96, "mvit": 224, "swin3d": 64}
TIMM = {
    "levit_128s": 224, "efficientformer_l1": 224, "mobilevit_xxs": 64, "tf_efficientnet_b0": 64, "maxvit_nano_rw_256": 256, "regnety_002": 64,
    "convnext_atto": 64, "swin_tiny_patch4_window7_224": 224, "deit_tiny_patch16_224": 224, "mixer_s32_224": 224, "resmlp_12_224": 224,
    "ghostnet_050": 64, "hrnet_w18_small": 64, "dla34": 64, "ese_vovnet19b_dw": 64, "repvgg_a0": 64, "dm_nfnet_f0": 64,
    "xcit_nano_12_p16_224": 64, "cait_xxs24_224": 224, "coat_tiny": 224, "poolformer_s12": 64, "edgenext_xx_small": 64, "mobileone_s0": 64,
    "fastvit_t8": 64, "hgnetv2_b0": 64, "rexnet_100": 64, "tinynet_e": 64, "lcnet_050": 64, "mnasnet_small": 64, "fbnetc_100": 64,
}  # fmt: skip


def inputs(name: str) -> tuple[Any, ...]:
    """Two samples of what the builder takes, as small as it allows."""
    g = torch.Generator().manual_seed(7)
    if name.startswith("timm:"):
        side = TIMM.get(name.removeprefix("timm:"), 224)
        return (torch.randn(2, 3, side, side, generator=g),)
    if name in torchvision.models.list_models(module=torchvision.models.detection):
        return ([torch.rand(3, 96, 96, generator=g), torch.rand(3, 64, 96, generator=g)],)
    side = next((s for prefix, s in reversed(NATIVE.items()) if name.startswith(prefix)), 64)
    if name in torchvision.models.list_models(module=torchvision.models.video):
        return (torch.randn(2, 3, 16, side, side, generator=g),)
    if name.startswith("raft"):
        return torch.rand(2, 3, 128, 128, generator=g) * 2 - 1, torch.rand(2, 3, 128, 128, generator=g) * 2 - 1
    return (torch.randn(2, 3, side, side, generator=g),)


def net_of(name: str) -> nn.Module:
    """The net with seeded weights, in eval mode."""
    if not name.startswith("timm:"):
        net: Any = common.torchvision_net(name)
        if hasattr(net, "transform") and not name.startswith("ssd"):
            net.transform.min_size, net.transform.max_size = (96,), 128
        return net
    import timm

    torch.manual_seed(0)
    return common.randomise(timm.create_model(name.removeprefix("timm:"), pretrained=False))


def row(net: nn.Module, example: tuple[Any, ...]) -> dict[str, Any]:
    """The ladder, and the second rung on its own."""
    out: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        found = capture(net, example)
        nodes = [found.gm] if found.gm is not None else [gm for gm, _ in found.parts.values()]
        out["ladder"] = found.rung
        out["s"] = round(time.perf_counter() - start, 1)
        out["nodes"] = sum(len(gm.graph.nodes) for gm in nodes)
        out["parts"] = ", ".join(found.parts) or "-"
        out["specialised"] = common.short("; ".join(found.specialised)) or "-"
        del found, nodes
    except TraceError as e:
        out["ladder"] = "no: " + common.short(str(e))
    try:
        alone = capture(net, example, rungs=("concrete",))
        out["concrete alone"] = "this batch only" if any(line.startswith("batch") for line in alone.specialised) else "equal, every batch"
    except TraceError as e:
        out["concrete alone"] = "no: " + common.short(f"{e.where}: {e.fact}" if e.where else e.fact)
    return out


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--fresh", action="store_true")
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    table = common.Table("capture", "Capture: which rung takes which net", a.fresh)
    for name in a.names or [*torchvision.models.list_models(), *(f"timm:{n}" for n in TIMM)]:
        if name in table.rows and not a.names:
            continue
        net = net_of(name)
        table.put(name, row(net, inputs(name)))
        del net
        gc.collect()
    table.write([summary(table.rows, timm) for timm in (False, True)])


def summary(rows: dict[str, dict[str, Any]], timm: bool) -> str:
    """Counts over torchvision's or timm's rows."""
    mine = [r for n, r in rows.items() if n.startswith("timm:") == timm]
    ladder = {rung: sum(r["ladder"] == rung for r in mine) for rung in RUNGS}
    alone = [r["concrete alone"] for r in mine]
    return (
        f"{'timm' if timm else 'torchvision'}: {sum(ladder.values())} of {len(mine)} captured ("
        + ", ".join(f"{n} {rung}" for rung, n in ladder.items() if n)
        + f"); concrete values alone take {sum(not a.startswith('no') for a in alone)}, "
        + f"of which {alone.count('this batch only')} are specialised to the batch"
    )


if __name__ == "__main__":
    main()
