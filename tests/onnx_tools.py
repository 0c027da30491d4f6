"""Lower a float graph of canonical modules and compare ONNX Runtime with torch."""

import importlib.util
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from fxq import schemes, targets
from fxq.backends.onnx_qdq import OnnxQdq
from fxq.backends.onnxruntime import run, session
from fxq.lowering import Artifact

_spec: Any = importlib.util.spec_from_file_location("helpers", Path(__file__).parent / "helpers.py")
h: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(h)


def lower(model: nn.Module, *inputs: Tensor) -> Artifact:
    """Artifact of a float module that consists of canonical modules; checked by onnx."""
    artifact = OnnxQdq().lower(h.canonical(h.randomize(model), *inputs), schemes.get("float"), targets.get("onnxruntime"))
    onnx.checker.check_model(onnx.load_from_string(artifact.data), full_check=True)
    return artifact


def same(model: nn.Module, *inputs: Tensor, atol: float = 2e-5) -> Artifact:
    """Lower on the example and compare with torch on it and on another batch size."""
    artifact = lower(model, *inputs)
    opened = session(artifact.data)
    names = [i.name for i in opened.get_inputs()]
    for batch in (inputs, tuple(torch.cat([x, x, x[:1]]) for x in inputs)):
        with torch.no_grad():
            want = model(*batch)
        got = run(opened, dict(zip(names, batch, strict=True)))
        for a, b in zip(want if isinstance(want, tuple) else (want,), got, strict=True):
            assert a.dtype == torch.from_numpy(b).dtype
            torch.testing.assert_close(torch.from_numpy(b), a, atol=atol, rtol=1e-4, equal_nan=True)
    return artifact


def rand(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))
