"""The end of a run: convert, lower, prove, measure once on the test images, and write result.json."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from safetensors.torch import save_file
from torch import Tensor, nn

import fxq
from fxq.backends import onnxruntime as runtime
from fxq.lowering import Artifact
from fxq.trainable import TrainableModel
from training import data
from training.run import Run, percent, predictions

NAME = "result.json"
PROVED = 256
"""Images of the proof, from the training set."""


def read(out: Path) -> dict[str, Any] | None:
    """The result of a finished run, or ``None``."""
    path = out / NAME
    return json.loads(path.read_text()) if path.exists() else None


def weight_bytes(model: bytes) -> int:
    """Bytes of all stored tensors of an ONNX file, scales included."""
    return sum(onnx.numpy_helper.to_array(t).nbytes if not t.raw_data else len(t.raw_data) for t in onnx.load_model_from_string(model).graph.initializer)


def deployed(run: Run) -> tuple[nn.Module, Artifact]:
    """The deployed model and its ONNX file."""
    if isinstance(run.model, TrainableModel):
        made = run.model.convert()
        return made, made.lower("onnx" if made.scheme.method == "float" else "onnx-qdq")
    net = run.model.eval()
    made = fxq.compile(net, "float", example=run.normalise(run.images[:2]), progress=False)
    return made, made.lower("onnx")


def _archive(run: Run, model: nn.Module, name: str) -> Path | None:
    """``<name>.fxq`` of a model that is made for archives."""
    if not isinstance(model, fxq.CompiledModel) or not (model.scheme.share or any(s.sparsity for s in run.recipe.stages)):
        return None
    return model.lower("archive").save(run.out / f"{name}.fxq", force=True)


def measure(run: Run, name: str) -> dict[str, Any]:
    """Write ``<name>.onnx`` (and the weights of a float net, for other runs to start from), prove it and measure it.

    The only place that reads the test images.
    """
    model, artifact = deployed(run)
    path = artifact.save(run.out / f"{name}.onnx", force=True)
    if not isinstance(run.model, TrainableModel):
        save_file({k: v.contiguous() for k, v in run.model.state_dict().items()}, run.out / f"{name}.safetensors")
    proof = model.verify(path, run.normalise(run.images[:PROVED]).split(64))
    opened = runtime.session(path, threads=run.recipe.threads)
    feed = opened.get_inputs()[0].name

    def onnx_run(x: Tensor) -> Any:
        return runtime.run(opened, {feed: x.contiguous()})[0]

    archive = _archive(run, model, name)
    test = tuple(t[: run.recipe.test_images or None] for t in data.load("test"))
    runs = {"float": run.net, "simulator": model, "onnxruntime": onnx_run} if run.recipe.weights else {"simulator": model, "onnxruntime": onnx_run}
    if archive is not None:
        runs["archive"] = fxq.load(archive)
    accuracy: dict[str, dict[str, float | None]] = {}
    disagree = {}
    for key, call in runs.items():
        found = predictions(call, test[0], run.normalise)
        disagree[key] = found
        held = percent(predictions(call, run.held[0], run.normalise), run.held[1]) if len(run.held[1]) else None
        accuracy[key] = {"validation": held, "test": percent(found, test[1])}
    return {
        "accuracy": accuracy,
        "test_images": len(test[1]),
        "simulator_and_file_disagree": int((disagree["simulator"] != disagree["onnxruntime"]).sum()),
        "proof": {"ok": proof.ok, "images": min(PROVED, len(run.images)), "text": str(proof)},
        "file_bytes": os.path.getsize(path),
        "archive_bytes": None if archive is None else os.path.getsize(archive),
        "float_bytes": sum(4 * p.numel() for p in run.net.parameters()),
        "density": run.model.convert().densities if isinstance(run.model, TrainableModel) else None,
        "weight_bytes": weight_bytes(artifact.data),
    }


def write(run: Run, name: str, command: str) -> dict[str, Any]:
    """Measure, and write ``result.json``; returns what it holds."""
    found = measure(run, name)
    seen = sum(h["seconds"] * h["images_per_second"] for h in run.history)
    body = {
        "name": name, "scheme": run.recipe.scheme, "net": run.recipe.net, "goal": run.recipe.goal or None, **found,
        "seed": run.recipe.seed, "epochs": len(run.history), "minutes": round(run.at.spent / 60, 2),
        "images_per_second": round(seen / max(run.at.spent, 1e-9), 1),
        "processes": run.world, "history": run.history, "recipe": run.recipe.same(), "command": command,
        "versions": {"python": platform.python_version(), **{k: version(k) for k in ("torch", "onnx", "onnxruntime", "fxq")}},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip
    part = run.out / (NAME + ".part")
    part.write_text(json.dumps(body, indent=1) + "\n")
    os.replace(part, run.out / NAME)
    return body
