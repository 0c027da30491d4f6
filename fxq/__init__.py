"""fxq: a graph-rewriting quantization compiler on torch.fx."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "compile": "fxq.api",
    "Budget": "fxq.mixed",
    "prune": "fxq.prune_model",
    "Prune": "fxq.pruning",
    "Share": "fxq.sharing",
    "sensitivity": "fxq.group_sensitivity",
    "save": "fxq.modelfile",
    "load": "fxq.modelfile",
    "load_state_dict": "fxq.archived",
    "iter_state_dict": "fxq.archived",
    "save_state_dict": "fxq.archived",
    "CompiledModel": "fxq.compiled",
    "capture": "fxq.trace",
    "doctor": "fxq.diagnosis",
    "layer_times": "fxq.layer_timing",
    "LayerTimes": "fxq.layer_table",
    "Scheme": "fxq.schemes",
    "QuantSpec": "fxq.spec",
    "QParams": "fxq.spec",
    "FxqError": "fxq.errors",
}
_MODULES = ("portability", "sparsity")
"""Modules that a user names behind ``import fxq`` alone."""
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fxq.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fxq' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
