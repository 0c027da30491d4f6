"""Invariants: what holds for every legal graph after a pass. Each yields ``(node, fault)`` where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import GraphModule, Node

from fxq import folding
from fxq.graph import grids, module_of, walk
from fxq.modules import WEIGHTED, FakeQuantize, Quantized
from fxq.portability_pairs import at_risk, greatest_code

Faults = Iterator[tuple[Node, str]]
Invariant = Callable[[GraphModule], Faults]


def canonical(gm: GraphModule) -> Faults:
    """One module per call, and no dropout or identity is left."""
    seen: dict[str, Node] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        path = str(node.target)
        if path in seen:
            yield node, f"module {path} is called by {seen[path].name} as well"
        seen[path] = node
        name = type(module_of(gm, node)).__name__
        if name in ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "StochasticDepth"):
            yield node, f"{name} is left"


def shapes_known(gm: GraphModule) -> Faults:
    """Every node but the output has a shape."""
    for node in gm.graph.nodes:
        if node.op != "output" and "shape" not in node.meta:
            yield node, "its shape is not known"


def bn_folded(gm: GraphModule) -> Faults:
    """No batch norm is left that a layer before or behind it can take over."""
    for node, _ in walk(gm, "batch_norm"):
        fold = folding.plan(gm, node)
        if isinstance(fold, folding.Fold):
            yield node, f"it can be folded into {fold.layer.name}"


def annotated(gm: GraphModule) -> Faults:
    """Every operation is marked integer or carries the reason why it stays float; grids exist."""
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_function", "call_method") and not node.meta.get("integer") and not node.meta.get("float_why"):
            yield node, "neither integer nor float with a reason"
        name = node.meta.get("grid")
        if name is not None and name not in grids(gm):
            yield node, f"its grid {name!r} does not exist"


def calibrated(gm: GraphModule) -> Faults:
    """Every grid in use has its parameters."""
    for node in gm.graph.nodes:
        name = node.meta.get("grid")
        if name is not None and grids(gm)[name].qparams is None:
            yield node, f"its grid {name!r} has no scale"


def converted(gm: GraphModule) -> Faults:
    """Values with a grid are read through their fake-quantizer; integer weighted layers are quantized modules."""
    for node, k in walk(gm):
        if k in WEIGHTED and node.meta.get("integer") and not isinstance(module_of(gm, node), Quantized):
            yield node, "an integer layer has a float weight"
        if k == "fake_quantize" and not isinstance(module_of(gm, node), FakeQuantize):
            yield node, "not a fake-quantizer"


def portable(gm: GraphModule) -> Faults:
    """No sum of two products of an integer layer can leave int16, whatever its input is."""
    for node, _ in walk(gm, "conv", "linear"):
        layer = module_of(gm, node)
        most = greatest_code(gm, node, layer) if isinstance(layer, Quantized) else None
        if isinstance(layer, Quantized) and most is not None:
            count = int(at_risk(layer, most).sum())
            if count:
                yield node, f"{count} pairs of its weights can saturate"


INVARIANTS: dict[str, Invariant] = {
    "canonical": canonical,
    "shapes-known": shapes_known,
    "bn-folded": bn_folded,
    "annotated": annotated,
    "calibrated": calibrated,
    "converted": converted,
    "portable": portable,
}
