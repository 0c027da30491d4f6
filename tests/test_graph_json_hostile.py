"""Files that were made to do harm: whatever stands in the JSON of a graph, ``fxq.load`` runs none of it, stays within its bounds and says ArtifactError."""

import copy
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fxq
from fxq import graph_json
from fxq import graph_json_rules as rules
from fxq.errors import ArtifactError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BOMB = "__import__('pathlib').Path({!r}).touch()"
Head = dict[str, Any]


class Net(nn.Module):
    """A node of every sort: module, function, method, tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.Sequential(nn.ReLU())
        self.register_buffer("shift", torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(self.act(self.conv(x)), 1, dims=1) + self.shift
        return torch.logcumsumexp(y, dim=1).cumsum(dim=1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    m = fxq.compile(Net().eval(), "iao_w8a8", calibration=X, progress=False)
    return fxq.save(m, tmp_path_factory.mktemp("hostile") / "m.fxq")


@pytest.fixture(scope="module")
def parts(file: Path) -> tuple[dict[str, Tensor], Head]:
    with safe_open(file, "pt") as f:  # type: ignore[no-untyped-call]
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["model"])  # noqa: SIM118


def written(parts: tuple[dict[str, Tensor], Head], edit: Callable[[Head], Any], out: Path) -> Path:
    head = copy.deepcopy(parts[1])
    edit(head)
    save_file(parts[0], out, {"format": "fxq-model", "model": json.dumps(head)})
    return out


def op(h: Head, kind: str) -> Head:
    """The first node that does it."""
    return next(n for n in h["graph"]["nodes"] if n["op"] == kind)  # type: ignore[no-any-return]


def conv(h: Head) -> Head:
    return h["graph"]["modules"]["conv"]["children"]["op"]  # type: ignore[no-any-return]


def rounding(h: Head) -> Head:
    """The first module that rounds values to a grid."""
    return next(m for m in h["graph"]["modules"].values() if m.get("class") == "fxq.modules.FakeQuantize")  # type: ignore[no-any-return]


def renamed(h: Head, name: str) -> None:
    """Call a node ``name``, wherever it stands."""
    old = op(h, "call_module")["name"]
    text = json.dumps(h["graph"]).replace(json.dumps({"node": old}), json.dumps({"node": name})).replace(f'"name": "{old}"', f'"name": {json.dumps(name)}')
    h["graph"] = json.loads(text)


def test_the_file_itself_loads_and_edits_hit(file: Path, parts: Any, tmp_path: Path) -> None:
    """Without this, every test below could pass because of a slip in the file."""
    m, again = fxq.load(file), fxq.load(written(parts, lambda h: renamed(h, "other"), tmp_path / "m.fxq"))
    assert torch.equal(m(X), again(X)) and "other" in {n.name for n in again.graph_module.graph.nodes}
    assert {n["op"] for n in parts[1]["graph"]["nodes"]} == {"placeholder", "call_module", "call_function", "call_method", "get_attr", "output"}


SOURCE: dict[str, Callable[[Head, str], Any]] = {
    "placeholder": lambda h, x: op(h, "placeholder").update(target=f"x={x}"),
    "placeholder annotated": lambda h, x: op(h, "placeholder").update(target=f"x: {x}"),
    "placeholder default": lambda h, x: op(h, "placeholder").update(args={"tuple": [{"module": x}]}),
    "keyword": lambda h, x: op(h, "call_module").update(kwargs={"dict": {f"x={x}, y": 1}}),
    "keyword of a function": lambda h, x: op(h, "call_function").update(kwargs={"dict": {f"a={x})\n    return (": 1}}),
    "node": lambda h, x: renamed(h, f"a\n    {x}\n    b"),
    "node with an end of line": lambda h, x: renamed(h, "a\n"),
    "module": lambda h, x: (h["graph"]["modules"].update({f'"),{x},("': h["graph"]["modules"]["conv"]}), op(h, "call_module").update(target=f'"),{x},("')),
    "backslash": lambda h, x: (h["graph"]["modules"].update({"a\\": h["graph"]["modules"]["conv"]}), op(h, "call_module").update(target="a\\")),
    "tensor": lambda h, x: op(h, "get_attr").update(target=f'"),{x},("'),
    "method": lambda h, x: op(h, "call_method").update(target=f"cumsum);{x};("),
    "function": lambda h, x: op(h, "call_function").update(target=f"torch.abs);{x};("),
    "graph": lambda h, x: h["graph"].update(name=f"A:\n    {x}\nclass B"),
    "repr of a module": lambda h, x: (
        conv(h)["attributes"].update(padding_mode=f"zeros);{x};("),
        op(h, "call_function")["args"]["tuple"].append({"module": "conv.op"}),
    ),
    "repr of a module's text": lambda h, x: op(h, "output").update(args={"tuple": [{"module": "conv"}]}),
    "device": lambda h, x: op(h, "call_function").update(kwargs={"dict": {"device": {"device": x}}}),
    "spec in an argument": lambda h, x: op(h, "call_function")["args"]["tuple"].append({"spec": x}),
    "data in an argument": lambda h, x: op(h, "call_function")["args"]["tuple"].append({"data": "Scheme", "fields": {"name": x, "method": "float"}}),
    "tensor in an argument": lambda h, x: op(h, "call_function")["args"]["tuple"].append(conv(h)["parameters"]["weight"]),
    "output": lambda h, x: op(h, "output").update(target=f"output\n    {x}"),
    "operation": lambda h, x: op(h, "call_module").update(op=f"call_module\n{x}"),
    "dtype": lambda h, x: op(h, "call_function").update(kwargs={"dict": {"dtype": {"dtype": x}}}),
    "memory format": lambda h, x: op(h, "call_function").update(kwargs={"dict": {"memory_format": {"memory_format": "compile"}}}),
    "float": lambda h, x: op(h, "call_function")["args"]["tuple"].append({"float": x}),
}


@pytest.mark.parametrize("name", SOURCE)
def test_nothing_of_a_file_is_run_as_source(name: str, parts: Any, tmp_path: Path) -> None:
    sign = tmp_path / "run"
    path = written(parts, lambda h: SOURCE[name](h, BOMB.format(str(sign))), tmp_path / "m.fxq")
    with pytest.raises(ArtifactError, match=r"m\.fxq: .*\. "):
        fxq.load(path)
    assert not sign.exists()


FUNCTIONS = (
    "torch.load torch.save torch.compile torch.hub.load torch.utils.cpp_extension.load torch.ops.load_library torch.ops.aten.from_file.default torch.from_file "
    "torch.Tensor.__reduce_ex__ torch.Tensor.apply_ torch.Tensor.map_ torch.Tensor.numpy torch.Tensor.set_ torch.Tensor.resize_ torch.Tensor.untyped_storage "
    "torch.Tensor.register_hook torch.Tensor.data_ptr torch.Tensor.backward torch.ops.aten.add.out torch.ops.aten.set_.source_Storage "
    "torch.ops.prim.Print.default torch.ops.aten.__class__.mro torch.ops.aten.abs.__class__ torch.ops.aten.record_stream.default torch._C._jit_run "
    "torch.nn.functional.torch.load torch.functional.torch.load torch.nn.functional.os operator.attrgetter operator.methodcaller operator.call "
    "torch.ops.aten.resize_.default torch.serialization.load operator.itemgetter "
    "operator.__class__ builtins.eval eval getattr torch torch. .abs torch..abs torch.Tensor.shape.__get__ torch.autograd.grad torch.multiprocessing.spawn "
    "torch.nn.functional.boolean_dispatch torch.nn.init.normal_ torch._sparse_coo_tensor_unsafe torch.ops.aten._embedding_bag.default torch.cuda.set_device"
).split()


@pytest.mark.parametrize("target", FUNCTIONS)
def test_functions_that_do_more_than_compute(target: str, parts: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it names the function .*, which no file may hold"):
        fxq.load(written(parts, lambda h: op(h, "call_function").update(target=target), tmp_path / "m.fxq"))


METHODS = "__class__ __reduce_ex__ apply_ map_ set_ resize_ resize_as_ as_strided_ storage data_ptr numpy share_memory_ backward a.b abs( item_"


@pytest.mark.parametrize("target", [*METHODS.split(), "", 7, None, ["abs"], "abs\n", "x" * 70000])
def test_methods_that_do_more_than_compute(target: Any, parts: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        fxq.load(written(parts, lambda h: op(h, "call_method").update(target=target), tmp_path / "m.fxq"))


def deep(levels: int, key: str | None = None) -> Any:
    v: Any = 1
    for _ in range(levels):
        v = {key: [v]} if key else [v]
    return v


def nested(h: Head, levels: int) -> None:
    entry = copy.deepcopy(conv(h))
    top = entry
    for _ in range(levels):
        top = {
            **copy.deepcopy(entry),
            "class": "torch.nn.modules.container.Sequential",
            "attributes": {},
            "parameters": {},
            "buffers": {},
            "children": {"0": top},
        }
    h["graph"]["modules"]["deep"] = top


def doubled(h: Head, levels: int) -> None:
    """A module that is reached on 2 ** levels paths."""
    box = {
        "class": "torch.nn.modules.container.Sequential",
        "training": False,
        "attributes": {},
        "parameters": {},
        "buffers": {},
        "fleeting": [],
        "children": {},
    }
    for i in range(levels):
        inner = {} if i == 0 else {"a": {"ref": f"m{i - 1}"}, "b": {**box, "children": {"c": {"ref": f"m{i - 1}"}}}}
        h["graph"]["modules"][f"m{i}"] = {**box, "children": inner}


FORMS: dict[str, Callable[[Head], Any]] = {
    "node self": lambda h: renamed(h, "self"),
    "node torch": lambda h: renamed(h, "torch"),
    "node class": lambda h: renamed(h, "class"),
    "node None": lambda h: renamed(h, "None"),
    "node of other letters": lambda h: renamed(h, "\uff45val"),
    "empty node": lambda h: renamed(h, ""),
    "node 7": lambda h: op(h, "call_module").update(name=7),
    "placeholder self": lambda h: op(h, "placeholder").update(target="self"),
    "placeholder torch": lambda h: op(h, "placeholder").update(target="torch"),
    "placeholder ***": lambda h: op(h, "placeholder").update(target="***x"),
    "placeholder 7": lambda h: op(h, "placeholder").update(target=7),
    "out": lambda h: op(h, "call_function").update(kwargs={"dict": {"out": {"node": "x"}}}),
    "keyword class": lambda h: op(h, "call_module").update(kwargs={"dict": {"class": 1}}),
    "dunder target": lambda h: op(h, "get_attr").update(target="__class__"),
    "attribute target": lambda h: op(h, "get_attr").update(target="conv.training"),
    "target of no tensor": lambda h: op(h, "get_attr").update(target="conv.op.stride"),
    "module that is none": lambda h: op(h, "call_module").update(target="shift"),
    "keyword target": lambda h: (h["graph"]["tensors"].update({"if": h["graph"]["tensors"]["shift"]}), op(h, "get_attr").update(target="if")),
    "hidden class": lambda h: (
        h["graph"]["tensors"].update({"__\uff43lass__": h["graph"]["tensors"]["shift"]}),
        op(h, "get_attr").update(target="__\uff43lass__"),
    ),
    "tensor forward": lambda h: h["graph"]["tensors"].update(forward=h["graph"]["tensors"]["shift"]),
    "tensor graph": lambda h: h["graph"]["tensors"].update(graph=h["graph"]["tensors"]["shift"]),
    "module code": lambda h: h["graph"]["modules"].update(code=conv(h)),
    "child with a dot": lambda h: h["graph"]["modules"]["conv"]["children"].update({"op.weight": conv(h)}),
    "child forward": lambda h: conv(h)["children"].update(forward=copy.deepcopy(conv(h))),
    "attribute over a method": lambda h: conv(h)["attributes"].update(_conv_forward=1),
    "attribute over a parameter": lambda h: conv(h)["attributes"].update(weight=1),
    "attribute over a child": lambda h: h["graph"]["modules"]["conv"]["attributes"].update(op=1),
    "compiled call": lambda h: conv(h)["attributes"].update(_compiled_call_impl={"module": "act"}),
    "attribute over a property": lambda h: rounding(h)["attributes"].update(qparams=1),
    "hooks": lambda h: conv(h)["attributes"].update(_forward_hooks={"dict": {}}),
    "no name of an attribute": lambda h: conv(h)["attributes"].update({"a b": 1}),
    "attribute of another type": lambda h: conv(h)["attributes"].update(stride="1"),
    "kernel of texts": lambda h: conv(h)["attributes"].update(kernel_size={"tuple": ["1", "1"]}),
    "padding mode": lambda h: conv(h)["attributes"].update(padding_mode="spiral"),
    "module as an attribute": lambda h: conv(h)["attributes"].update(stride={"module": "act"}),
    "missing attribute": lambda h: conv(h)["attributes"].pop("stride"),
    "parameter and buffer": lambda h: conv(h)["buffers"].update(conv(h)["parameters"]),
    "tensor and child": lambda h: conv(h)["children"].update(weight=copy.deepcopy(conv(h))),
    "its own child": lambda h: h["graph"]["modules"]["conv"]["children"].update(a={"ref": "conv"}),
    "ref to nothing": lambda h: h["graph"]["modules"].update(a={"ref": "nowhere"}),
    "ref of another type": lambda h: h["graph"]["modules"].update(a={"ref": ["conv"]}),
    "module as text": lambda h: h["graph"]["modules"].update(a="conv"),
    "lazy class": lambda h: conv(h).update({"class": "torch.nn.modules.conv.LazyConv2d"}),
    "class of a class": lambda h: conv(h).update({"class": "fxq.modules.Op"}),
    "class of torch.nn": lambda h: conv(h).update({"class": "torch.nn.parallel.data_parallel.DataParallel"}),
    "class 7": lambda h: conv(h).update({"class": 7}),
    "unary load": lambda h: h["graph"]["modules"].update(
        u={**conv(h), "class": "fxq.modules.Unary", "attributes": {"fn": "load"}, "parameters": {}, "children": {}}
    ),
    "unary path": lambda h: h["graph"]["modules"].update(
        u={**conv(h), "class": "fxq.modules.Unary", "attributes": {"fn": "Tensor.abs"}, "parameters": {}, "children": {}}
    ),
    "tensor that is not there": lambda h: conv(h)["parameters"].update(weight={"tensor": "nowhere", "parameter": True, "grad": True}),
    "gradient of integers": lambda h: h["graph"]["tensors"].update(a={"tensor": "conv.bias_grid.zero_point", "parameter": True, "grad": True}),
    "tensor as text": lambda h: conv(h)["parameters"].update(weight="w"),
    "no parameters": lambda h: conv(h).pop("parameters"),
    "nodes as text": lambda h: h["graph"].update(nodes="abc"),
    "node as text": lambda h: h["graph"]["nodes"].append("abc"),
    "no nodes": lambda h: h["graph"].pop("nodes"),
    "node reads itself": lambda h: op(h, "call_function").update(args={"tuple": [{"node": op(h, "call_function")["name"]}]}),
    "args as text": lambda h: op(h, "call_module").update(args="abc"),
    "args of two kinds": lambda h: op(h, "call_module").update(args={"tuple": [], "dict": {}}),
    "args as list": lambda h: op(h, "call_module").update(args=[]),
    "tuple of text": lambda h: op(h, "call_module").update(args={"tuple": "abc"}),
    "empty kind": lambda h: op(h, "output").update(args={}),
    "slice of four": lambda h: op(h, "call_function")["args"]["tuple"].append({"slice": [1, 2, 3, 4]}),
    "float of text": lambda h: op(h, "call_function")["args"]["tuple"].append({"float": "1e5"}),
    "shape of text": lambda h: op(h, "call_module")["meta"].update(shape={"tuple": ["a"]}),
    "shape is a grid": lambda h: op(h, "call_module")["meta"].update(shape=next(iter(h["graph"]["grids"].values()))),
    "grid that is none": lambda h: op(h, "call_module")["meta"].update(grid="nowhere"),
    "grid as number": lambda h: h["graph"]["grids"].update(a=7),
    "grid is a scheme": lambda h: h["graph"]["grids"].update(a=h["scheme"]),
    "spec of a grid": lambda h: next(iter(h["graph"]["grids"].values()))["fields"].update(spec="u8/pt"),
    "clamp of a grid": lambda h: next(iter(h["graph"]["grids"].values()))["fields"].update(clamp={"tuple": ["a", "b"]}),
    "unknown field": lambda h: next(iter(h["graph"]["grids"].values()))["fields"].update(__class__=1),
    "no grid": lambda h: next(iter(h["graph"]["grids"].values()))["fields"].update(spec={"spec": "u99/pt"}),
    "spec of many digits": lambda h: next(iter(h["graph"]["grids"].values()))["fields"].update(spec={"spec": "u" + "9" * 5000 + "/pt"}),
    "data Path": lambda h: h.update(scheme={"data": "Path", "fields": {}}),
    "scheme as number": lambda h: h.update(scheme=7),
    "scheme is a grid": lambda h: h.update(scheme=next(iter(h["graph"]["grids"].values()))),
    "name of a scheme": lambda h: h["scheme"]["fields"].update(name=7),
    "target": lambda h: h.update(target="nowhere"),
    "target 7": lambda h: h.update(target=[7]),
    "kind": lambda h: h.update(kind="other"),
    "kind 7": lambda h: h.update(kind=[7]),
    "history": lambda h: h.update(history=7),
    "row of the history": lambda h: h["history"][0].__setitem__(1, [[7] * 11]),
    "time of the history": lambda h: h["history"][0].__setitem__(3, "soon"),
    "version as text": lambda h: h.update(version="2"),
    "version none": lambda h: h.update(version=None),
    "graph as list": lambda h: h.update(graph=[]),
    "graph of none": lambda h: h.update(graph=None),
    "huge number": lambda h: op(h, "call_function")["args"]["tuple"].append(10**400),
    "number of 65 bits": lambda h: op(h, "call_function")["args"]["tuple"].append(1 << 63),
    "long text": lambda h: op(h, "call_function")["args"]["tuple"].append("a" * 70000),
    "deep argument": lambda h: op(h, "call_function")["args"]["tuple"].append(deep(300)),
    "deep tuples": lambda h: op(h, "call_function")["args"]["tuple"].append(deep(200, "tuple")),
    "deep attribute": lambda h: conv(h)["attributes"].update(a=deep(900)),
    "deep scheme": lambda h: h.update(scheme=deep(400, "tuple")),
    "deep modules": lambda h: nested(h, 60),
    "deep history": lambda h: h.update(history=deep(900)),
    "a million paths": lambda h: doubled(h, 40),
    "too many nodes": lambda h: h["graph"].update(nodes=[None] * (rules.NODES + 1)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_no_model_has(name: str, parts: Any, tmp_path: Path) -> None:
    path = written(parts, FORMS[name], tmp_path / "m.fxq")
    start = time.perf_counter()
    with pytest.raises(ArtifactError, match=r"m\.fxq: .*\. "):
        fxq.load(path)
    assert time.perf_counter() - start < 20


def test_codes_without_an_entry_are_refused() -> None:
    from fxq.shared import shared

    layer = shared(nn.Linear(4, 2), torch.randint(0, 4, (2, 4)), torch.tensor([-1.0, 0.5, 1.0]), None)
    w = graph_json.Writer()
    made = torch.fx.Graph()
    made.output(made.call_module("0", (made.placeholder("x"),)))
    graph = w.graph(torch.fx.GraphModule(nn.Sequential(layer), made))
    assert torch.equal(graph_json.Reader(dict(w.tensors)).graph(graph).get_submodule("0").weight, layer.weight)
    for codes in (torch.full((2, 4), 4, dtype=torch.uint8), torch.full((2, 4), -1, dtype=torch.int16), torch.zeros(2, 4)):
        with pytest.raises(ArtifactError, match="^0: "):
            graph_json.Reader({**w.tensors, "0.codes": codes}).graph(graph)


def test_nothing_is_run_or_allocated_when_a_file_is_read(parts: Any, tmp_path: Path) -> None:
    """What a graph allocates it allocates when it is called: a terabyte of zeros loads at once, and calling it is an error of torch."""
    zeros = {"target": "torch.ops.aten.zeros.default", "args": {"tuple": [[1 << 38]]}, "kwargs": {"dict": {}}}
    path = written(parts, lambda h: op(h, "call_function").update(zeros), tmp_path / "m.fxq")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    m = fxq.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    with pytest.raises(RuntimeError):
        m(X)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["conv", "conv.op", "torch.abs", "self", "u8/pt", "tuple", "output"]),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(st.sampled_from(["tuple", "node", "module", "tensor", "data", "fields", "ref", "class", "args", "a"]), v, max_size=3)
    ),
    max_leaves=6,
)


def places(v: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value where another could stand."""
    out: list[tuple[Any, Any]] = []
    for k, x in v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ():
        out += [(v, k), *places(x)]
    return out


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 1 << 30), JSON, st.booleans())
def test_any_value_in_any_place(parts: Any, at: int, value: Any, gone: bool) -> None:
    """A file that still loads is fine; any other is an ArtifactError and nothing else."""
    tensors, head = parts
    graph = copy.deepcopy(head["graph"])
    where = places(graph)
    box, key = where[at % len(where)]
    if gone and isinstance(box, dict):
        del box[key]
    else:
        box[key] = value
    try:
        graph_json.Reader(dict(tensors)).graph(graph)
    except ArtifactError as e:
        assert e.fact and e.way_out
