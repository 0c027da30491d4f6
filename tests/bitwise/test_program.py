"""The program that runs on bits as a torch module: what it refuses, its report and values, copies, threads, compilation."""

import copy
import json
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import kernels
from fxq.backends.reference import Reference
from fxq.bitwise.code_modules import CodeAdd, CodesOp
from fxq.bitwise.modules import BitConv
from fxq.bitwise.program import BitProgram
from fxq.bitwise.runner import Runner
from fxq.compiled import CompiledModel
from fxq.errors import FxqError, LoweringError
from fxq.kernels import Codes
from fxq.modules import Add
from fxq.spec import QParams, QuantSpec
from tests.bit_checks import differing
from tests.bit_nets import BitNet, Wide, compiled


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return compiled()


@pytest.fixture(scope="module")
def program(model: CompiledModel) -> BitProgram:
    return BitProgram(model.graph_module)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def test_modes_and_gradients(program: BitProgram) -> None:
    x = images().requires_grad_()
    wanted = program(x)
    assert not wanted.requires_grad and not program.training
    assert not program.train().training and not any(m.training for m in program.modules())
    assert torch.equal(program.train()(x), wanted) and torch.equal(program.eval()(x), wanted)
    with torch.inference_mode():
        assert torch.equal(program(x), wanted)
    weight = torch.ones(5, requires_grad=True)
    (wanted * weight).sum().backward()
    assert torch.equal(weight.grad, wanted.sum(0)), "outputs are plain tensors"  # type: ignore[arg-type]


def test_other_devices_and_types_are_refused(program: BitProgram) -> None:
    for change in (lambda p: p.to("meta"), lambda p: p.half(), lambda p: p.double(), lambda p: p.to(torch.bfloat16)):
        with pytest.raises(FxqError, match="a bit program runs on the CPU in its own types"):
            change(program)
    assert program.to("cpu") is program and program.float() is program
    with pytest.raises(FxqError, match="an input is on meta; bits run on the CPU only"):
        program(images().to("meta"))


@pytest.mark.parametrize("inputs", [(), (torch.zeros(1), torch.zeros(1)), (3,), (None,)])
def test_wrong_inputs(program: BitProgram, inputs: tuple[Any, ...]) -> None:
    with pytest.raises(FxqError, match="the model takes 1 inputs, given are"):
        program(*inputs)


def test_too_small_inputs_are_named(program: BitProgram) -> None:
    with pytest.raises(FxqError, match="does not fit into an input of"):
        BitProgram(compiled(net=Tight()).graph_module)(torch.zeros(1, 3, 3, 3))


class Tight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 5), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))  # type: ignore[no-any-return]


def test_a_model_without_bits_is_refused() -> None:
    torch.manual_seed(0)
    m = fxq.compile(Tight().eval(), "iao_w8a8", calibration=torch.randn(2, 3, 12, 12), progress=False)
    with pytest.raises(LoweringError, match="no layer runs on bits .*u8/pt.*Compile with a binary or ternary scheme") as e:
        BitProgram(m.graph_module)
    assert e.value.where == "bitwise" and e.value.way_out


def test_copies_and_pickles(model: CompiledModel, program: BitProgram) -> None:
    other = copy.deepcopy(program)
    assert differing(model.graph_module, images(), program=other) == []
    assert {id(b) for b in other.buffers()}.isdisjoint(id(b) for b in program.buffers())
    with torch.no_grad():
        other.graph_module.get_buffer("fc1.table_2").mul_(2.0)
    assert not torch.equal(other(images()), program(images()))
    with pytest.raises(FxqError, match="cannot be pickled"):
        pickle.dumps(program)


def test_it_holds_no_weight_of_a_layer_on_bits(program: BitProgram) -> None:
    layers = {k for k, m in program.graph_module.named_modules() if isinstance(m, BitConv)}
    assert len(layers) == 5
    for name, t in program.state_dict().items():
        path = name.removeprefix("graph_module.").rpartition(".")[0]
        assert path not in layers or t.dtype in (torch.int64, torch.int32) or t.numel() <= 64, name
    assert {k.rpartition(".")[0].rpartition(".")[2] for k, _ in program.named_parameters()} == {"stem", "fc2"}


def test_the_report() -> None:
    wide = BitProgram(compiled(net=Wide()).graph_module)
    r = wide.report()
    assert [(x.name, x.kind, x.gives, x.shape) for x in r.layers] == [
        ("a", "binary x binary", "sign", (128, 128, 3, 3)), ("b", "binary x binary", "codes", (128, 128, 3, 3)),
    ]  # fmt: skip
    assert r.packed_bytes == 2 * 128 * 128 * 9 // 8 and r.float_bytes == 32 * r.packed_bytes
    assert r.float_bytes > 28 * (r.packed_bytes + r.layers[0].table_bytes)
    assert {x.name: x.bytes for x in r.floats} == {"stem": 4 * (128 * 27 + 128), "fc": 4 * (128 * 5 + 5)} and all("scheme" in x.why for x in r.floats)
    held = sum(t.nbytes for t in (*wide.parameters(), *wide.buffers()))
    assert r.resident_bytes == held and r.packed_bytes + r.table_bytes + sum(x.bytes for x in r.floats) <= held
    assert json.loads(json.dumps(r.to_json()))["layers"][0]["packed_bytes"] == r.layers[0].packed_bytes
    text = str(r)
    assert r.engine in text and r.path in text and "not on bits: the scheme leaves the first layer float" in text and "18,432" in text


def test_values_that_are_given(model: CompiledModel, program: BitProgram) -> None:
    x = images()
    plain = program.values(x)
    flipped = -plain["stem_q"]
    seen = program.values(x, given={"stem_q": flipped})
    assert torch.equal(seen["stem_q"], flipped) and not torch.equal(seen["a_q"], plain["a_q"])

    def flip(step: Any, value: Any) -> Any:
        if step.name == "stem_q":
            value = type(value)(flipped, value.qp)
        wanted[step.name] = value
        return value

    wanted: dict[str, Any] = {}
    Reference(model.graph_module).walk((x,), flip)
    assert all(torch.equal(v, getattr(wanted[k], "codes", wanted[k])) for k, v in seen.items())
    codes = {"add_q": torch.zeros_like(plain["add_q"])}
    assert torch.equal(program.values(x, given=codes)["add_q"], codes["add_q"])
    with pytest.raises(FxqError, match="no value is called 'nothing'"):
        program.values(x, given={"nothing": x})


def test_threads_and_batches_give_the_same(program: BitProgram) -> None:
    x, threads = images(4), torch.get_num_threads()
    one = torch.cat([program(x[i : i + 1]) for i in range(4)])
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            values = program.values(x)
            assert torch.equal(values["c_q"], torch.cat([program.values(x[i : i + 1])["c_q"] for i in range(4)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(program(x), one, atol=1e-6)


def test_it_exports_with_a_dynamic_batch(program: BitProgram) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    made = torch.export.export(program, (images(2),), dynamic_shapes=(({0: batch},),))
    graphs = [m.graph for m in made.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert sum("bit_conv" in str(n.target) for graph in graphs for n in graph.nodes) == 5
    assert torch.equal(made.module()(images(5)), program(images(5)))


def test_it_compiles(program: BitProgram) -> None:
    made = torch.compile(program, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(made(images(2)), program(images(2)))
        assert torch.equal(made(images(3)), program(images(3)))


def test_the_graph_prints_and_runs_again(program: BitProgram) -> None:
    assert "a_q" in program.graph_module.code and "binary x binary" in str(program) and "5 layers on bits" in str(program)
    assert "b_q" in str(program.graph_module.graph)
    names = [n.meta.get("step") for n in program.graph_module.graph.nodes if n.meta.get("form") == "bits"]
    assert names[:3] == ["stem_q", "a_q", "pool_signed_q"]


def test_nets_of_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = BitNet(8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.net(x + y)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    m = fxq.compile(Two().eval(), "xnor_w1a1", calibration=[(images(), images())], progress=False)
    assert differing(m.graph_module, images(), images(2) * 2) == []


def test_values_are_dropped_after_their_last_reader() -> None:
    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alive: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.alive = [ref() is not None for ref in seen]
            out = x + 1
            seen.append(weakref.ref(out))
            return out

    seen: list[Any] = []
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Identity()))
    graph, gm.a, gm.b, gm.c = torch.fx.Graph(), Watch(), Watch(), Watch()
    x = graph.placeholder("x")
    for name in "abc":
        x = graph.call_module(name, (x,))
    graph.output({"y": [x]})
    gm.graph = graph
    assert Runner(gm)(torch.zeros(2))["y"][0].tolist() == [3.0, 3.0]
    assert gm.c.alive == [False, True]


def test_nodes_with_other_arguments_run_as_the_graph_says() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.pool = nn.AvgPool1d(2)

        def forward(self, x: Tensor, ys: list[Tensor]) -> Any:
            return {"a": (x.reshape(1, -1) + self.w.sum() * 2, [ys[1]]), "b": torch.cat([x, ys[0]], dim=0), "c": self.pool(input=x[None])}

    gm = torch.fx.symbolic_trace(Mixed(), concrete_args=None)
    x, ys = torch.randn(4), [torch.randn(2), torch.randn(1)]
    found, wanted = Runner(gm)(x, ys), gm(x, ys)
    assert torch.equal(found["b"], wanted["b"]) and torch.equal(found["c"], wanted["c"])
    assert torch.equal(found["a"][0], wanted["a"][0]) and found["a"][1][0] is ys[1] and type(found) is dict


def test_sums_of_one_element_keep_the_order_of_the_runtime() -> None:
    spec = QuantSpec.parse("u8/pt")

    def grid(scale: float, zero: int) -> QParams:
        return QParams(spec, torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))

    every = torch.arange(256, dtype=torch.uint8)
    a, b = every.repeat_interleave(256), every.repeat(256)
    compared = 0
    for i in range(400):
        qa, qb, out = grid(0.01 + i * 0.0137, i % 251), grid(0.02 + i * 0.0071, (3 * i) % 256), grid(0.05 + i * 0.02, (7 * i) % 256)
        plain, turned = (kernels.add(Add(), xs, out) for xs in ([Codes(a, qa), Codes(b, qb)], [Codes(b, qb), Codes(a, qa)]))
        for at in (plain != turned).nonzero().flatten().tolist()[:3]:
            step = CodeAdd(CodesOp("add", Add(), [qa, qb], out, 4), qa, qb, out)
            one = [v[at].reshape(1, 1, 1, 1) for v in (a, b)]
            assert torch.equal(step(*one), kernels.add(Add(), [Codes(one[0], qa), Codes(one[1], qb)], out)) and int(step(*one)) == int(turned[at])
            compared += 1
        if compared >= 3:
            return
    raise AssertionError("no sum depends on the order")
