"""Recorded graphs as files: ONNX's checker takes every state, edges and namespaces are the graph's, values and reasons are there; tables without tabulate."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq import interop, zoo
from fxq.errors import ArtifactError, PassError


class Two(nn.Module):
    """An input that is an output, a float island, a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.body(x)) * 0.5
        return {"y": self.fc(y.mean((2, 3))), "x": x}


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def compiled() -> fxq.CompiledModel:
    torch.manual_seed(0)
    return fxq.compile(Two().eval(), "int8", calibration=[X], progress=False)


@pytest.fixture(scope="module")
def measured() -> fxq.CompiledModel:
    torch.manual_seed(0)
    return fxq.compile(zoo.build("tiny_resnet8"), "int8", calibration=[torch.randn(4, 3, 32, 32)], progress=False, numbers=True)


def test_the_checker_takes_every_state(compiled: fxq.CompiledModel, measured: fxq.CompiledModel, tmp_path: Path) -> None:
    for m in (compiled, measured):
        for s in m.history:
            path = m.save_graph(tmp_path / "g.onnx", s.name, force=True)
            made = onnx.load(path)
            onnx.checker.check_model(made, full_check=True)
            assert made.graph.name == s.name and not made.graph.initializer
            shown = {n.output[0]: n for n in made.graph.node if n.op_type != "identity"}
            inner = {r.name: r for r in s.rows if r.kind not in ("input", "output")}
            assert shown.keys() == inner.keys()
            for name, node in shown.items():
                assert (node.op_type, tuple(node.input), node.domain, node.name) == (inner[name].kind, inner[name].inputs, "fxq", inner[name].path or name)


def test_attributes_say_what_is_known(compiled: fxq.CompiledModel, tmp_path: Path) -> None:
    made = onnx.load(compiled.save_graph(tmp_path / "last.onnx"))
    of = {n.name: {a.name: a.s.decode() for a in n.attribute} for n in made.graph.node}
    row = next(r for r in compiled.history.snapshots[-1].rows if r.path == "body.0_q")
    told = {"node": row.name, "path": "body.0_q", "sizes": "[*,8,8,8]", "grid": row.grid, "codes": row.codes, "runs": "int", "detail": row.detail}
    assert of["body.0_q"] == told and "" not in told.values()
    assert [of[n]["why"] for n in of if of[n].get("runs") == "float"] == [o.why for o in compiled.float_ops] and compiled.float_ops
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*made.graph.input, *made.graph.value_info]}
    assert shapes["x"] == ["batch", 3, 8, 8] and shapes[row.name] == ["batch", 8, 8, 8]
    assert [o.name for o in made.graph.output] == ["fc", "x/output"]


def test_states_before_shapes_are_known(compiled: fxq.CompiledModel, tmp_path: Path) -> None:
    """Sizes come from the states behind ``propagate-shapes``; a value that has gone by then has one dimension called unknown."""
    made = onnx.load(compiled.save_graph(tmp_path / "trace.onnx", "trace"))
    (x,) = made.graph.input
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    lone = fxq.snapshot.History([compiled.history["trace"]])  # type: ignore[attr-defined]
    made = onnx.load(interop.save_graph(lone, tmp_path / "lone.onnx"))
    assert [d.dim_param for d in made.graph.input[0].type.tensor_type.shape.dim] == ["unknown"]
    onnx.checker.check_model(made, full_check=True)


def test_numbers_are_attributes(measured: fxq.CompiledModel, tmp_path: Path) -> None:
    s = measured.history.snapshots[-1]
    moved = {n: v for n, v in s.numbers.items() if v.sqnr < 100}
    assert moved
    made = json.loads(measured.save_graph(tmp_path / "g.json").read_text())
    for node in made["graphs"][0]["nodes"]:
        attrs = {a["key"]: a["value"] for a in node["attrs"]}
        if node["id"] in moved:
            v = moved[node["id"]]
            assert attrs["sqnr"] == f"{v.sqnr:.1f} dB" and attrs["cosine"] == f"{v.cosine:.6f}" and ("steps" in attrs) == (v.steps is not None)
        else:
            assert attrs.get("sqnr", "equal") == "equal" or s.numbers[node["id"]].sqnr >= 100


def test_model_explorers_collection(measured: fxq.CompiledModel, tmp_path: Path) -> None:
    made = json.loads(measured.save_graph(tmp_path / "graph", "annotate", "json").read_text())
    (graph,) = made["graphs"]
    rows = measured.history["annotate"].rows
    assert (made["label"], graph["id"]) == ("fxq", "annotate") and [n["id"] for n in graph["nodes"]] == [r.name for r in rows]
    for node, row in zip(graph["nodes"], rows, strict=True):
        assert [e["sourceNodeId"] for e in node["incomingEdges"]] == list(row.inputs) and node["label"] == row.kind
        assert node["namespace"] == row.path.rpartition(".")[0].replace(".", "/") or not row.path
        assert all(isinstance(a["value"], str) and a["value"] for a in node["attrs"])
    assert {n["namespace"] for n in graph["nodes"]} > {""} and any("/" in n["namespace"] for n in graph["nodes"])


def test_functions_lie_in_the_module_they_were_traced_in() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.erf(self.conv(x))

    m = fxq.compile(nn.Sequential(Inner(), nn.Conv2d(4, 4, 1)), "int8", calibration=[X], progress=False)
    s = m.history["trace"]
    spaces = interop.namespaces(s)
    (opaque,) = [r for r in s.rows if r.kind.endswith("erf")]
    assert opaque.path == "" and spaces[opaque.name] == "0" == spaces[next(r.name for r in s.rows if r.path == "0.conv")]
    assert spaces[s.rows[0].name] == spaces[s.rows[-1].name] == ""


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("g.dot", {}, ArtifactError, "g.dot: there is no graph format 'dot'. Use onnx (Netron) or json (Model Explorer)"),
        ("g", {}, ArtifactError, "g: its name has no ending that tells the format. Use onnx (Netron)"),
        ("g.onnx", {"state": "fold"}, PassError, "no pass called 'fold' ran. did you mean 'fold-bn'?"),
        ("there.json", {}, ArtifactError, "the file exists"),
        ("nowhere/g.json", {}, ArtifactError, "cannot write"),
    ],
)
def test_refusals(
    compiled: fxq.CompiledModel, name: str, options: dict[str, str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("mine")
    with pytest.raises(error) as e:
        compiled.save_graph(name, **options)  # type: ignore[arg-type]
    assert message in str(e.value) and Path("there.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def table(gm: Any, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    gm.print_tabular()
    return [[c.strip() for c in line.split("  ") if c.strip()] for line in capsys.readouterr().out.splitlines()]


def test_graphs_print_as_tables_without_tabulate(
    compiled: fxq.CompiledModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tabulate", None)
    gm = compiled.graph_module
    with pytest.raises(ImportError):
        torch.fx.Graph.print_tabular(gm.graph)
    capsys.readouterr()
    made = table(gm, capsys)
    assert made[0] == ["opcode", "name", "target", "args", "kwargs", "kind", "grid", "runs"] and len(made) == len(gm.graph.nodes) + 2
    conv = next(line for line in made if line[1] == "body_0")
    assert conv == ["call_module", "body_0", "body.0", "(x_q,)", "{}", "conv", conv[6], "int"] and conv[6].startswith("u8/pt scale ")
    assert next(line for line in made if line[1] == "fc")[5:] == ["linear", "int"]
    assert table(gm.graph, capsys) == made
    again = copy.deepcopy(compiled)
    for copied in (again.graph_module, again.graph_module.graph, copy.deepcopy(gm), copy.deepcopy(gm).graph):
        assert table(copied, capsys) == made
    assert isinstance(gm, GraphModule) and type(gm).__name__ == "Two" and torch.equal(gm(X)["y"], again(X)["y"])


def test_a_plain_graph_module_keeps_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the classes of compiled graphs are changed."""
    net = zoo.build("tiny_resnet8")
    given = torch.fx.symbolic_trace(net)
    fxq.compile(given, "int8", calibration=[torch.randn(2, 3, 32, 32)], progress=False)
    assert not hasattr(given, "print_tabular") and type(given.graph).print_tabular is torch.fx.Graph.print_tabular


def test_reordered_channels_are_said(measured: fxq.CompiledModel) -> None:
    s = measured.history.snapshots[-1]
    name = next(iter(s.numbers))
    turned = replace(s, numbers={**s.numbers, name: replace(s.numbers[name], reordered=True)})
    row = next(r for r in s.rows if r.name == name)
    assert "put back" in interop.facts(row, turned)["reordered"] and "reordered" not in interop.facts(row, s)
