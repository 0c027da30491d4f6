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
from fxq.convolutions import padded
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


class Again(Net):
    """A value that is rounded onto a second grid for one of its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.add, self.add_q = fq(), m.Add(), fq()

    def body(self, y: Tensor) -> Tensor:
        z: Tensor = self.add_q(self.add(self.again(y), y))
        return z


class Shifted(Net):
    """Sigmoid, pool and squaring in a chain: every value has one reader."""

    def __init__(self, spec: str = "u8/pt") -> None:
        super().__init__(spec)
        self.gate, self.gate_q, self.pool, self.pool_q = nn.Sigmoid(), fq(spec=spec), m.GlobalAvgPool(), fq(spec=spec)

    def body(self, y: Tensor) -> Tensor:
        z: Tensor = self.pool_q(self.pool(self.gate_q(self.gate(y))))
        return z


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual, "sigmoid-excite": Excite, "gate-first": lambda: Excite(first=True), "hard-excite": lambda: Excite(hard=True),
    "plane-bias": PlaneBias, "plane-first": lambda: PlaneBias(first=True), "scalars": Scalars, "pieces": Pieces, "head": Head,
    "chain-s8": lambda: Net("s8/pt"), "head-s8": lambda: Head("s8/pt"), "head-s8a": lambda: Head("s8a/pt"),
    "requantize": Again, "scalar-s8": lambda: Shifted("s8/pt"),
}  # fmt: skip


def images(seed: int, n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETS)
def test_equals_the_runtime(name: str) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        gm = converted(NETS[name](), images(seed))
        if name == "requantize":
            again: Any = gm.get_submodule("again")
            again.scale = again.scale * 1.3
        data, x = onnx_bytes(gm), images(seed + 100, 5)
        want = Reference(gm)(x)
        for (got,) in runs(data, x):
            assert np.array_equal(want.numpy(), got), f"{name}, seed {seed}: {int((want.numpy() != got).sum())} of {got.size} differ"
        proof = verify(gm, data, [x])
        assert proof.ok and proof.nodes == proof.planned and proof.hidden_differ == 0, str(proof)


class Attention(nn.Module):
    def __init__(self, quantized: bool) -> None:
        super().__init__()
        self.a_q, self.b_q, self.turn = fq(), fq(), m.Permute((0, 2, 1))
        self.turn_q, self.mm, self.mm_q, self.quantized = fq(self.b_q), m.MatMul(), fq(), quantized

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y = self.mm(self.a_q(a), self.turn_q(self.turn(self.b_q(b))))
        out: Tensor = self.mm_q(y) if self.quantized else y
        return out


@pytest.mark.parametrize("quantized", [True, False])
def test_products_of_activations(quantized: bool) -> None:
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 5, 70, generator=g), torch.randn(2, 7, 70, generator=g)
        gm = converted(Attention(quantized), a, b)
        want = Reference(gm)(a * 0.9, b)
        for (got,) in runs(onnx_bytes(gm), a * 0.9, b):
            assert np.array_equal(want.numpy(), got)


class Convs(nn.Module):
    """Convolutions of one and three dimensions, and one with its own padding on each side."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.x_q, self.a, self.a_q, self.b, self.b_q = fq(), conv(2, 6, 3, padding=1), fq(), padded(conv(6, 4, 3), (1, 0) * dims), fq()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b_q(self.b(self.a_q(self.a(self.x_q(x)))))
        return out


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_all_ranks(dims: int) -> None:
    torch.manual_seed(dims)
    x = torch.randn(2, 2, *(7,) * dims)
    gm = converted(Convs(dims), x)
    for (got,) in runs(onnx_bytes(gm), x * 0.9):
        assert np.array_equal(Reference(gm)(x * 0.9).numpy(), got)


class Island(Net):
    """A tanh between convolutions: a float operation."""

    def __init__(self) -> None:
        super().__init__()
        self.tanh, self.tanh_q = nn.Tanh(), fq()

    def body(self, y: Tensor) -> Tensor:
        z: Tensor = self.tanh_q(self.tanh(y))
        return z


def test_plan_names_kernels_tensors_and_operands() -> None:
    torch.manual_seed(0)
    steps = plan(converted(Excite(first=True), images(0)))
    assert [(s.name, s.kind, s.path) for s in steps] == [
        ("x_q", "quantize", "x"), ("stem_q", "conv", "stem"), ("pool_q", "global_avg_pool", "pool"), ("fc_q", "conv", "fc"),
        ("gate_q", "sigmoid", "gate"), ("mul_q", "mul", "mul"), ("head_q", "conv", "head"),
    ]  # fmt: skip
    assert [str(a) for a in steps[5].operands] == ["stem_q", "gate_q"]  # the larger operand first
    assert [(s.name, s.gives_float) for s in plan(converted(Head(), images(0)))] == [
        ("x_q", False), ("flat_q", False), ("a_q", False), ("b", True),
    ]  # fmt: skip


def test_what_has_no_kernel_is_a_float_island() -> None:
    torch.manual_seed(0)
    gm = converted(Island(), images(0))
    assert Reference(gm).float_nodes == ["tanh"]
    assert [s.kind for s in plan(gm)] == ["quantize", "conv", "quantize", "conv"]
    gm = converted(Residual(), images(0), floats=("add",))
    assert Reference(gm).float_nodes == ["add"]
    for node in gm.graph.nodes:
        node.meta["integer"] = node.name != "conv"
    assert Reference(gm).float_nodes == ["conv"]


def test_a_float_bias_is_not_fused() -> None:
    torch.manual_seed(0)
    gm = converted(Net(), images(0))
    gm.get_submodule("head").bias_grid = None
    assert Reference(gm).float_nodes == ["head"]


def test_simulator_is_within_a_step() -> None:
    torch.manual_seed(0)
    gm = converted(Excite(), images(0))
    x, head = images(5), gm.get_submodule("head_q")
    with torch.no_grad():
        steps = (gm(x) - Reference(gm)(x)).abs() / head.scale
    assert float(steps.max()) < 1.5 and float((steps > 0.5).float().mean()) < 0.3


def test_run_gives_codes_by_tensor_name() -> None:
    torch.manual_seed(0)
    reference, x = Reference(converted(Head(), images(0))), images(1)
    codes = reference.run(x)
    assert list(codes) == ["x_q", "flat_q", "a_q", "b"] and codes["a_q"].dtype == torch.uint8
    assert torch.equal(codes["b"], reference(x))
    assert list(reference.run(x, watch={"a_q"})) == ["a_q"]


def test_walk_goes_on_with_what_the_observer_gives() -> None:
    torch.manual_seed(0)
    reference, x = Reference(converted(Head(), images(0))), images(1)
    other = reference.run(images(2))["a_q"]

    def observe(step: Any, value: Any) -> Any:
        return type(value)(other, value.qp) if step.name == "a_q" else None

    assert torch.equal(reference.walk((x,), observe), reference(images(2)))
