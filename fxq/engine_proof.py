"""What can be proven of a TensorRT engine here: its layers against the plan, its ONNX file against the simulator, and, with a GPU, its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxq import proof
from fxq.backends.trt_engine import Engine, Latency, require_gpu
from fxq.errors import EngineError
from fxq.graph import input_names
from fxq.proof import Proof
from fxq.tensorrt import EngineArtifact, LayerCheck


@dataclass(frozen=True)
class GpuRun:
    """Outputs of the engine on this machine's GPU beside the simulator's.

    Attributes:
        batches: that were run.
        elements: of all outputs.
        drift: greatest difference, relative to the greatest magnitude of the output; ties at rounded values are amplified by what follows.
        rms: root mean square of the difference, relative to that of the output.
        finite: no NaN or infinity where the simulator has none.
        latency: of the first batch.
    """

    batches: int
    elements: int
    drift: float
    rms: float
    finite: bool
    latency: Latency

    def __str__(self) -> str:
        t = self.latency
        return (
            f"on the GPU: {self.elements} elements in {self.batches} batches, rms difference {self.rms:.2g}, greatest {self.drift:.2g} of the greatest value; "
            f"median {t.median_ms:.3g} ms ({t.p10_ms:.3g} to {t.p90_ms:.3g}, {t.runs} runs)"
        )


@dataclass(frozen=True)
class EngineProof:
    """Result of verifying an engine. ``print(proof)`` says it in words.

    Attributes:
        checks: every convolution and product, planned and built.
        onnx: the ONNX file that it was built from, in ONNX Runtime with optimizations off, against the simulator.
        gpu: the run on this machine's GPU, or ``None``; ``not_run`` says why.
    """

    checks: tuple[LayerCheck, ...]
    onnx: Proof
    gpu: GpuRun | None
    not_run: str = ""

    @property
    def mismatches(self) -> tuple[LayerCheck, ...]:
        """Operations that the builder does not run as planned."""
        return tuple(c for c in self.checks if not c.ok)

    @property
    def ok(self) -> bool:
        """Every layer runs as planned, the ONNX file computes what the simulator does, and what the GPU gave (if there is one) is finite."""
        return not self.mismatches and self.onnx.ok and (self.gpu is None or self.gpu.finite)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        gpu = None if self.gpu is None else asdict(self.gpu)
        return {"ok": self.ok, "checks": [{**asdict(c), "ok": c.ok} for c in self.checks], "onnx": self.onnx.to_json(), "gpu": gpu, "not_run": self.not_run}

    def __str__(self) -> str:
        quantized = [c for c in self.checks if c.planned != "float"]
        lines = [f"{sum(c.ok for c in quantized)} of {len(quantized)} quantized operations run as planned in the engine"]
        lines += [f"not as planned: {c}" for c in self.mismatches]
        lines += [f"its ONNX file: {line}" for line in str(self.onnx).splitlines()]
        return "\n".join([*lines, str(self.gpu) if self.gpu is not None else f"not run: {self.not_run}"])


def verify(gm: GraphModule, artifact: EngineArtifact, data: Iterable[tuple[Any, ...]], simulate: Callable[..., Any]) -> EngineProof:
    """Check an engine's layers and its ONNX file; on a machine with a GPU run it.

    Args:
        gm: the converted graph that it was lowered from.
        artifact: what ``lower("tensorrt")`` gave.
        data: batches, tuples of positional inputs.
        simulate: the compiled model.

    Raises:
        ArtifactError: inputs that do not fit.
        EngineError: when a GPU is there and cannot read or run the engine.
    """
    batches = list(data)
    onnx = proof.verify(gm, artifact.onnx, batches, fused=False)
    try:
        require_gpu()
    except EngineError as e:
        return EngineProof(artifact.checks, onnx, None, str(e))
    return EngineProof(artifact.checks, onnx, run(artifact, input_names(gm), batches, simulate))


def run(artifact: EngineArtifact, names: list[str], batches: list[tuple[Any, ...]], simulate: Callable[..., Any]) -> GpuRun:
    """Run the engine on this machine's GPU and compare it with the simulator.

    Raises:
        EngineError: without a CUDA device, or when the engine cannot be read or run.
    """
    engine = Engine(artifact.data, artifact.info.get("package"))
    feeds = [dict(zip(names, tree_leaves(batch), strict=True)) for batch in batches]
    ours, theirs = [], []
    for batch, feed in zip(batches, feeds, strict=True):
        got = engine.run(feed)
        with torch.inference_mode():
            want = [t for t in tree_leaves(simulate(*batch)) if isinstance(t, Tensor)]
        for a, b in zip(want, got.values(), strict=True):
            if a.shape != b.shape:
                raise EngineError(f"the engine gives a tensor of {list(b.shape)}, the simulator {list(a.shape)}", way_out="This engine is of another model")
            ours.append(a.to(torch.float64).reshape(-1).cpu())
            theirs.append(b.to(torch.float64).reshape(-1).cpu())
    a, b = torch.cat(ours), torch.cat(theirs)
    finite = bool((torch.isfinite(b) | ~torch.isfinite(a)).all())
    top, power = float(a.abs().max().clamp(min=1e-30)), float(a.square().mean().sqrt().clamp(min=1e-30))
    difference = (a - b).abs()
    return GpuRun(
        len(batches), a.numel(), float(difference.max()) / top, float(difference.square().mean().sqrt()) / power, finite, engine.latency(feeds[0])
    )
