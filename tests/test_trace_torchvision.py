"""Capture of real nets: one per rung, and shape-dependent code in the wild."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fxq.trace import Captured, capture, run, same


def randomize(model: nn.Module) -> nn.Module:
    """Seeded statistics and parameters where they start at 0 or 1: equality of zeros would prove nothing."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None and m.running_var is not None:
                m.running_mean.normal_(0, 0.1, generator=g)
                m.running_var.uniform_(0.5, 1.5, generator=g)
        for p in model.parameters():
            if float(p.std()) == 0:
                p.normal_(0.5, 0.1, generator=g)
    return model.eval()


def net(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomize(torchvision.models.get_model(name, weights=None, **options))


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def holds(found: Captured, model: nn.Module, *inputs: Any) -> None:
    assert found.gm is not None
    want = run(model, inputs)
    assert same(want, run(found.gm, inputs)) and float(torch.stack([t.float().std() for t in torch.utils._pytree.tree_leaves(want)]).min()) > 0


@pytest.mark.parametrize(
    ("name", "rung"), [("resnet18", "symbolic"), ("resnet18", "export"), ("mobilenet_v3_small", "symbolic"), ("mobilenet_v3_small", "concrete")]
)
def test_classifiers_on_every_rung(name: str, rung: str) -> None:
    model = net(name)
    found = capture(model, (noise(2, 3, 32, 32),), rungs=(rung,))
    assert found.rung == rung and not any(line.startswith("batch size") for line in found.specialised)
    holds(found, model, noise(5, 3, 32, 32))


def test_a_symbolic_graph_takes_other_sizes() -> None:
    model = net("resnet18")
    found = capture(model, (noise(2, 3, 64, 64),))
    assert found.specialised == ()
    holds(found, model, noise(1, 3, 64, 96))


def test_optical_flow_keeps_its_batch_and_is_specialised_to_its_size() -> None:
    model = net("raft_small")
    pair = noise(2, 3, 128, 128), noise(2, 3, 128, 128).flip(3)
    found = capture(model, pair)
    assert found.rung == "concrete" and len(found.notes) == 1 and "raft.py:" in found.notes[0]
    (line,) = found.specialised
    assert line.startswith("input sizes batchx3x128x128, batchx3x128x128: used first at ") and "raft.py:" in line
    holds(found, model, *(t[:1] for t in pair))


def test_detector_in_parts() -> None:
    model = net("fasterrcnn_mobilenet_v3_large_320_fpn", weights_backbone=None, min_size=64, max_size=96, box_score_thresh=0.0)
    images = [noise(3, 64, 96).abs(), noise(3, 64, 64).abs()]
    found = capture(model, (images,), rungs=("symbolic", "concrete", "submodules"))
    assert found.gm is None and list(found.parts) == ["backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor"]
    more = [*images, noise(3, 80, 64).abs()]
    want = run(model, (more,))
    for path, (gm, _) in found.parts.items():
        found.root.set_submodule(path, gm)
    got = run(found.root, (more,))
    assert same(want, got) and len(want) == 3 and all(len(w["boxes"]) for w in want)


def test_a_loop_over_feature_maps_is_captured_whole_with_a_list_input() -> None:
    head = randomize(torchvision.models.detection.retinanet.RetinaNetHead(16, 3, 5))
    maps = [noise(2, 16, 8, 8), noise(2, 16, 4, 4)]
    found = capture(head, (maps,))
    assert found.rung == "symbolic" and found.gm is not None
    assert [n.op for n in found.gm.graph.nodes].count("placeholder") == 1
    assert same(run(head, ([m[:1, :, :3] for m in maps],)), run(found.gm, ([m[:1, :, :3] for m in maps],)))


def test_timm_leaves_are_not_looked_for_in_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxq.tracers import timm_leaves

    class Fake:
        @staticmethod
        def get_notrace_modules() -> list[type]:
            return [nn.ReLU]

        @staticmethod
        def get_notrace_functions() -> list[Any]:
            return [len, "by name"]

    assert timm_leaves(nn.ReLU()) == ((), ())
    monkeypatch.setitem(sys.modules, "timm.layers", Fake)
    assert timm_leaves(nn.ReLU()) == ((), ())
    mine = type("Mine", (nn.Module,), {"__module__": "timm.models.mine"})()
    assert timm_leaves(nn.Sequential(mine)) == ((nn.ReLU,), (len,))
