"""``import fxq`` with its public names costs next to nothing on top of ``import torch``: heavy packages are imported where they are used."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("onnx", "onnxruntime", "onnxscript", "torchvision", "rich", "scipy", "safetensors", "PIL", "matplotlib", "fast_sugiyama")
SECONDS = "import time, torch; t = time.process_time(); import fxq; fxq.compile; print(time.process_time() - t)"
LOADED = "import json, sys, torch; before = set(sys.modules); {code}; print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_import_adds_less_than_300_ms_to_torch() -> None:
    """Processor seconds of the process, the lesser of two: on a busy machine the clock on the wall says how busy it is."""
    assert min(float(fresh(SECONDS)) for _ in range(2)) < 0.3


def test_import_loads_no_heavy_package() -> None:
    loaded = set(json.loads(fresh(LOADED.replace("{code}", "import fxq, fxq.cli; fxq.compile, fxq.Scheme, fxq.QuantSpec"))))
    assert "fxq" in loaded and loaded.isdisjoint(HEAVY), loaded & set(HEAVY)


def test_the_zoo_needs_no_torchvision() -> None:
    loaded = set(json.loads(fresh(LOADED.replace("{code}", "from fxq import zoo; zoo.build('nin_gc')"))))
    assert "fxq" in loaded and loaded.isdisjoint(HEAVY), loaded & set(HEAVY)


def test_a_heavy_package_would_be_seen() -> None:
    assert "onnx" in json.loads(fresh(LOADED.replace("{code}", "import onnx")))
