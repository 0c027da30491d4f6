"""Calibration cache: fxq's scales in the text form that TensorRT 8 to 10.11 read back for implicit quantization."""

from __future__ import annotations

import re
import struct
from typing import ClassVar

from torch.fx import GraphModule

from fxq.backends.onnx_qdq import named_results
from fxq.backends.onnx_writer import Writer
from fxq.errors import TargetError
from fxq.graph import input_names, kind, module_of
from fxq.lowering import Artifact, Issue, Lowering
from fxq.schemes import Scheme
from fxq.targets import Target


class CalibrationCache(Lowering):
    """One line a quantized value: ``name: hex``, the big-endian float32 of its scale, amax / 127.

    The names are those of the tensors in the float file (``scheme="float"`` with the same target, ``to="onnx"``), which is the network to build
    with the cache.

    Args:
        version: of the TensorRT that will read it, like ``8.6.1`` or ``10.3.0``.

    Raises:
        TargetError: for a version that is none, or has no calibrators (10.12 is the first without).
    """

    name: ClassVar[str] = "trt-calibration-cache"

    def __init__(self, version: str = "8.6.1") -> None:
        found = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(?:\.\d+)?", version)
        if found is None:
            raise TargetError(f"{version!r} is no version of TensorRT", way_out="Write it like 8.6.1")
        major, minor, patch = map(int, found.groups())
        if not (8, 0) <= (major, minor) <= (10, 11):
            raise TargetError(f"TensorRT {version} reads no calibration cache, versions 8.0 to 10.11 do", way_out="Lower to onnx-qdq or tensorrt instead")
        self.number = major * 1000 + minor * 100 + patch if major < NEW_NUMBERS else major * 10000 + minor * 100 + patch

    def check(self, gm: GraphModule, scheme: Scheme, target: Target) -> list[Issue]:
        """A cache holds symmetric int8 scales."""
        if scheme.activation is None:
            return [Issue("scheme", f"{scheme.name!r} has no calibrated activations", "Use scheme='int8' with target='tensorrt'")]
        grids = [(n, module_of(gm, n)) for n in gm.graph.nodes if kind(gm, n) == "fake_quantize"]
        bad = [n.name for n, fq in grids if not (fq.spec.symmetric and fq.spec.signed and fq.spec.kind == "affine" and fq.spec.bits == 8)]  # type: ignore[union-attr]
        return [Issue(name, "its grid is not symmetric int8", "Compile it with scheme='int8', target='tensorrt'") for name in bad[:1]]

    def emit(self, gm: GraphModule, scheme: Scheme, target: Target) -> Artifact:
        """The cache as text."""
        results = [name for n in gm.graph.nodes if n.op == "output" for name, _ in named_results(n.args[0])]
        w, lines = Writer(gm, target, [*input_names(gm), *results]), {}
        for node in gm.graph.nodes:
            if kind(gm, node) == "fake_quantize":
                source = node.all_input_nodes[0]
                name = str(source.target) if source.op == "placeholder" else w.out(source)
                scale: object = module_of(gm, node).scale
                lines[name] = struct.pack(">f", float(scale)).hex()  # type: ignore[arg-type]
        text = [f"TRT-{self.number}-EntropyCalibration2", *(f"{name}: {scale}" for name, scale in lines.items())]
        return Artifact(self.name, ("\n".join(text) + "\n").encode(), {"scales": len(lines), "float_ops": []})


NEW_NUMBERS = 10
"""Major version from which NV_TENSORRT_VERSION is major * 10000 + minor * 100 + patch; before, major * 1000 + ..."""
