"""The ONNX file of a net for bits is its fallback: standard operations only, in ONNX Runtime the codes of the reference and of the program."""

import random
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import zoo
from fxq.backends.reference import Reference
from fxq.bitwise.program import BitProgram
from fxq.exposed import Exposed
from fxq.graph import input_names, module_of
from tests.bit_nets import SCHEMES, BitNet, batches, compiled, randomized


def only_standard(data: bytes) -> set[str]:
    """Operations of a file that uses ONNX's own domain and nothing else."""
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert [o.domain for o in model.opset_import] == [""] and not model.functions
    assert {n.domain for n in model.graph.node} <= {"", "ai.onnx"}
    known = {s.name for s in onnx.defs.get_all_schemas()}
    ops = {n.op_type for n in model.graph.node}
    assert ops <= known
    return ops


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("target", ["onnxruntime", "bitwise"])
def test_the_onnx_file_is_equal_to_the_reference(scheme: str, target: str) -> None:
    m = compiled(scheme, target=target)
    artifact = m.lower()
    assert artifact.backend == "onnx-qdq" and {"Conv", "MaxPool", "Add", "QuantizeLinear"} <= only_standard(artifact.data)
    for size in (1, 3):
        proof = m.verify(artifact, list(batches(2, size, seed=size)))
        assert proof.ok and proof.hidden_differ == 0 and proof.missing == () and proof.nodes >= 12, str(proof)


def test_both_targets_write_one_file() -> None:
    a, b = compiled("xnor_w1a1"), compiled("xnor_w1a1", target="bitwise")
    mine, theirs = (onnx.load_from_string(m.lower().data) for m in (a, b))
    assert [(p.key, p.value) for p in theirs.metadata_props] != [(p.key, p.value) for p in mine.metadata_props] and mine.graph == theirs.graph
    assert b.lower(target="onnxruntime").data == a.lower().data and a.lower(target="bitwise").data == b.lower().data
    assert str(b.lint()) == str(a.lint()) == str(a.lint("bitwise"))


class Odd(nn.Module):
    """A float stem, then one convolution of random form and its batch norm, another, and a float head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r = random.Random(seed)
        groups = r.choice([1, 1, 2, 3])
        c, n, k = groups * r.choice([1, 5, 21, 33]), groups * r.choice([1, 7, 20]), r.choice([(1, 1), (3, 3), (5, 3), (2, 2)])
        padding, dilation, stride = r.choice([0, 1, (2, 1)]), r.choice([1, 1, 2]), r.choice([1, 2, (1, 3)])
        self.stem, self.bn = nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.a, self.bn_a = nn.Conv2d(c, n, k, stride, padding, dilation, groups, bias=r.random() < 0.5), nn.BatchNorm2d(n)
        self.pool = r.choice([nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2)])
        self.b, self.bn_b = nn.Conv2d(n, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = self.pool(torch.relu(self.bn_a(self.a(x))))
        out: Tensor = self.head(torch.relu(self.bn_b(self.b(x))))
        return out


def agreeing(m: fxq.CompiledModel, data: list[Tensor]) -> int:
    """Compare the program's codes with those of ONNX Runtime and the reference, on each side's own inputs; how many tensors."""
    raw, reference, program = m.lower().data, Reference(m.graph_module), BitProgram(m.graph_module)
    exposed, count = Exposed(raw, reference.steps, {}, "extended"), 0
    (name,) = input_names(m.graph_module)
    for x in data:
        exposed.start({name: x.numpy()})
        ours, values = reference.run(x), program.values(x)
        for step in exposed.tensors:
            want = ours[step.name]
            got = torch.from_numpy(exposed.get(step)).reshape(want.shape)
            if step.gives_float:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            else:  # the runtime rewrites s8 as u8
                grid: Any = module_of(m.graph_module, step.result)
                moved = grid.spec.qmin if got.dtype == torch.uint8 and want.dtype == torch.int8 else 0
                assert torch.equal(got.to(torch.int32) + moved, want.to(torch.int32)), step.name
            if step.name in values:
                same = torch.allclose if step.gives_float else torch.equal
                assert same(values[step.name], ours[step.name]), step.name
                count += 1
    return count


@pytest.mark.parametrize("scheme", SCHEMES)
def test_program_reference_and_onnx_runtime_agree(scheme: str) -> None:
    m = compiled(scheme)
    assert agreeing(m, list(batches(1, 3, seed=2))) >= 8


@pytest.mark.parametrize("seed", range(10))
def test_random_forms_agree(seed: int) -> None:
    torch.manual_seed(seed)
    scheme = list(SCHEMES)[seed % len(SCHEMES)]
    m = compiled(scheme, Odd(seed), seed=seed)
    assert agreeing(m, list(batches(1, 2, seed=seed))) >= 3
    proof = m.verify(m.lower("bitwise"), list(batches(1, 2, 10, seed=seed + 1)))
    assert proof.ok and proof.hidden_differ == 0, str(proof)


@pytest.mark.parametrize(("name", "scheme"), [("nin_gc", "tbn_w1at"), ("resnet20", "xnor_w1a1"), ("ds_cnn", "twn_wta1")])
def test_nets_of_the_zoo_agree(name: str, scheme: str) -> None:
    """Groups with shuffles, shortcuts by slices and padding of channels, depthwise layers."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 49, 10) if name == "ds_cnn" else torch.randn(2, 3, 32, 32)
    m = fxq.compile(randomized(zoo.build(name)), SCHEMES[scheme], calibration=[x], target="bitwise", progress=False)
    for artifact in (m.lower("bitwise"), m.lower()):
        proof = m.verify(artifact, [x])
        assert proof.ok and proof.hidden_differ == 0 and proof.missing == () and proof.nodes == proof.planned >= 10, str(proof)


def test_the_comparison_sees_a_wrong_code() -> None:
    m = compiled("xnor_w1a1", randomized(BitNet(7)))
    program = BitProgram(m.graph_module)
    x = next(batches(1))
    values = program.values(x)
    name = next(n for n in values if n.startswith("a"))
    values[name] = -values[name]
    assert not torch.equal(values[name], Reference(m.graph_module).run(x)[name])
