"""The integer reference against ONNX Runtime on converted graphs: 0 elements may differ, whatever the level and threads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from fxq import modules as m
from fxq.backends.reference import Reference, plan
from fxq.proof import verify
from tests.converted import converted, fq, onnx_bytes


def runs(data: bytes, *inputs: Tensor) -> list[list[Any]]:
    """Outputs at two optimization levels with 1 and 2 threads."""
    out = []
    for level in ("ORT_ENABLE_ALL", "ORT_ENABLE_EXTENDED"):
        for threads in (1, 2):
            options = ort.SessionOptions()
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
            options.intra_op_num_threads, options.log_severity_level = threads, 4
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            out.append(session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}))
    return out


class Net(nn.Module):
    """Input on a grid, a convolution, then the ops under test (``body``), each with its fake-quantizer, then a convolution."""

    def __init__(self, spec: str = "u8/pt", width: int = 8) -> None:
        super().__init__()
        self.x_q, self.stem, self.stem_q = fq(spec=spec), nn.Conv2d(3, 8, 3, padding=1), fq(spec=spec)
        self.head, self.head_q = nn.Conv2d(width, 4, 1), fq(spec=spec)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.stem_q(self.stem(self.x_q(x))))
        out: Tensor = self.head_q(self.head(y))
        return out

    def body(self, y: Tensor) -> Tensor:
        return y


class Residual(Net):
    def __init__(self, spec: str = "u8/pt") -> None:
        super().__init__(spec)
        self.conv, self.conv_q = nn.Conv2d(8, 8, 3, padding=1, groups=8), fq(spec=spec)
        self.add, self.add_q = m.Add(), fq(spec=spec)

    def body(self, y: Tensor) -> Tensor:
        z: Tensor = self.add_q(self.add(self.conv_q(self.conv(y)), y))
        return z


class Excite(Net):
    """Squeeze and excite; ``first`` says which operand of the product the gate is."""

    def __init__(self, spec: str = "u8/pt", hard: bool = False, first: bool = False) -> None:
        super().__init__(spec)
        self.pool, self.pool_q, self.fc, self.fc_q = m.GlobalAvgPool(), fq(spec=spec), nn.Conv2d(8, 8, 1), fq(spec=spec)
        self.gate, self.gate_q = nn.Hardsigmoid() if hard else nn.Sigmoid(), fq(spec=spec)
        self.mul, self.mul_q, self.first = m.Mul(), fq(spec=spec), first

    def body(self, y: Tensor) -> Tensor:
        g = self.gate_q(self.gate(self.fc_q(self.fc(self.pool_q(self.pool(y))))))
        z: Tensor = self.mul_q(self.mul(g, y) if self.first else self.mul(y, g))
        return z


class PlaneBias(Net):
    """An add that broadcasts a pooled plane; ``first`` says which operand it is."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.pool, self.pool_q, self.fc, self.fc_q = m.GlobalAvgPool(), fq(), nn.Conv2d(8, 8, 1), fq()
        self.add, self.add_q, self.first = m.Add(), fq(), first

    def body(self, y: Tensor) -> Tensor:
        g = self.fc_q(self.fc(self.pool_q(self.pool(y))))
        z: Tensor = self.add_q(self.add(g, y) if self.first else self.add(y, g))
        return z


class Scalars(Net):
    """Python scalars as operands, on the plane and on a pooled plane."""

    def __init__(self, spec: str = "u8/pt") -> None:
        super().__init__(spec)
        self.add, self.add_q, self.mul, self.mul_q = m.Add(), fq(spec=spec), m.Mul(), fq(spec=spec)
        self.pool, self.pool_q, self.fc, self.fc_q = m.GlobalAvgPool(), fq(spec=spec), nn.Conv2d(8, 8, 1), fq(spec=spec)
        self.add2, self.add2_q = m.Add(), fq(spec=spec)

    def body(self, y: Tensor) -> Tensor:
        y = self.mul_q(self.mul(self.add_q(self.add(y, 0.37)), -0.6))
        z: Tensor = self.add2_q(self.add2(self.fc_q(self.fc(self.pool_q(self.pool(y)))), 0.21))
        return z


class Pieces(Net):
    """Split, concat on own and on common grids, max pool, slice, pad, gather, nearest resize, leaky ReLU and ReLU as tables."""

    def __init__(self, spec: str = "u8/pt") -> None:
        super().__init__(spec)
        s, q = spec, self.stem_q
        self.split, self.a_q, self.b_q = m.Split((3, 5), 1), fq(q, s), fq(q, s)
        self.leaky, self.leaky_q, self.relu, self.relu_q = nn.LeakyReLU(0.1), fq(spec=s), nn.ReLU(), fq(spec=s)
        self.cat, self.cat_q = m.Cat(1), fq(spec=s)
        self.pool, self.pool_q = nn.MaxPool2d(3, 1, 1), fq(self.cat_q, s)
        self.pad, self.pad_q = m.Pad((1, 0, 0, 1)), fq(self.cat_q, s)
        self.pick, self.pick_q = m.IndexSelect(1, [1, 0, 3, 2, 5, 4, 7, 6]), fq(self.cat_q, s)
        self.cut, self.cut_q = m.Slice(((2, 1, None, 1),)), fq(self.cat_q, s)
        self.up, self.up_q = m.Resize(None, (2.0, 2.0), "nearest"), fq(self.cat_q, s)

    def body(self, y: Tensor) -> Tensor:
        parts = self.split(y)
        a, b = self.a_q(parts[0]), self.b_q(parts[1])
        y = self.cat_q(self.cat(self.leaky_q(self.leaky(a)), self.relu_q(self.relu(b))))
        y = self.pick_q(self.pick(self.pad_q(self.pad(self.pool_q(self.pool(y))))))
        z: Tensor = self.up_q(self.up(self.cut_q(self.cut(y))))
        return z


class Head(nn.Module):
    """Flatten and linear layers; the last gives float."""

    def __init__(self, spec: str = "u8/pt") -> None:
        super().__init__()
        self.x_q, self.flat = fq(spec=spec), m.Reshape((None, -1))
        self.flat_q = fq(self.x_q, spec)
        self.a, self.a_q, self.b = nn.Linear(3 * 8 * 7, 33), fq(spec=spec), nn.Linear(33, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a_q(self.a(self.flat_q(self.flat(self.x_q(x))))))
        return out


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual, "sigmoid-excite": Excite, "gate-first": lambda: Excite(first=True), "hard-excite": lambda: Excite(hard=True),
    "plane-bias": PlaneBias, "plane-first": lambda: PlaneBias(first=True), "scalars": Scalars, "pieces": Pieces, "head": Head,
    "residual-s8": lambda: Residual("s8/pt"), "scalars-s8": lambda: Scalars("s8/pt"), "pieces-s8": lambda: Pieces("s8/pt"),
    "excite-s8": lambda: Excite("s8/pt"), "hard-excite-s8": lambda: Excite("s8a/pt", hard=True), "head-s8": lambda: Head("s8/pt"),
}  # fmt: skip


def images(seed: int, n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETS)
def test_equals_the_runtime(name: str) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        gm = converted(NETS[name](), images(seed))
        data, x = onnx_bytes(gm), images(seed + 100, 5)
        want = Reference(gm)(x)
        for (got,) in runs(data, x):
            assert np.array_equal(want.numpy(), got), f"{name}, seed {seed}: {int((want.numpy() != got).sum())} of {got.size} differ"
        proof = verify(gm, data, [x])
        assert proof.ok and proof.nodes == proof.planned and proof.hidden_differ == 0, str(proof)
