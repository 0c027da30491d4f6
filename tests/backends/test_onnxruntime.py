"""Sessions of ONNX Runtime."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fxq.backends.onnxruntime import run, session
from fxq.errors import ArtifactError

_spec: Any = importlib.util.spec_from_file_location("onnx_tools", Path(__file__).parents[1] / "onnx_tools.py")
t: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(t)
lower, same, rand, h = t.lower, t.same, t.rand, t.h


def test_sessions_say_what_is_wrong(tmp_path: Path) -> None:
    data = lower(nn.Sequential(nn.ReLU()), rand(2, 32)).data
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="cut.onnx: ONNX Runtime cannot load it"):
        session(tmp_path / "cut.onnx")
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load it"):
        session(b"not a model")
    with pytest.raises(ArtifactError, match=r"no.onnx: cannot be read: No such file"):
        session(tmp_path / "no.onnx")
    with pytest.raises(ArtifactError, match="unknown optimization level 'ful'"):
        session(data, "ful")
    opened = session(data, "off", threads=1)
    with pytest.raises(ArtifactError, match=r"input 'input' has shape \[2, 5\], the file takes \['batch', 32\]"):
        run(opened, {"input": rand(2, 5)})
    with pytest.raises(ArtifactError, match="the file's inputs are input, given are y"):
        run(opened, {"y": rand(2, 32)})
    with pytest.raises(ArtifactError, match="the runtime refuses the inputs"):
        run(opened, {"input": rand(2, 32).double()})
