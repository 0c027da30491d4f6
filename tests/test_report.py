"""The data of the HTML report, how it is written, and what it refuses. tests/test_report_browser.py opens it."""

import base64
import gzip
import hashlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import cli
from fxq.compiled import CompiledModel
from fxq.errors import ArtifactError, CalibrationError, FxqError
from fxq.pruning import Prune
from fxq.report import BATCHES, NO_DATA, facts, states, tensors
from fxq.report.layout import arrange
from fxq.snapshot import History


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.fc = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.a(x)))
        return self.fc((x + self.b(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    torch.manual_seed(0)
    return fxq.compile(Net().eval(), "iao_w8a8", calibration=torch.randn(8, 3, 10, 10), progress=False, numbers=True)


def data_of(path: Path) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', path.read_text())
    assert found
    made: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return made


def replayed(passes: list[dict[str, Any]]) -> list[list[int]]:
    """The states from their edits."""
    out: list[list[int]] = []
    for p in passes:
        before, after, at = out[-1] if out else [], list[int](), 0
        for start, gone, come in p["edits"]:
            after += [*before[at:start], *come]
            at = start + gone
        out.append([*after, *before[at:]])
    return out


def test_edits_give_every_state_back(model: CompiledModel) -> None:
    made = states.history_json(model.history)
    assert len(made["passes"]) == len(model.history)
    for ids, state in zip(replayed(made["passes"]), model.history, strict=True):
        assert [made["rows"][i][10] for i in ids] == state.text.splitlines()
    stored = len(made["rows"])
    assert stored < sum(s.nodes for s in model.history) and stored == len({json.dumps(r) for r in made["rows"]})


def test_edits_of_lists() -> None:
    assert states.edits([1, 2, 3], [1, 2, 3]) == []
    assert states.edits([], [4, 5]) == [[0, 0, [4, 5]]]
    assert states.edits([1, 2, 3, 4], [1, 9, 3]) == [[1, 1, [9]], [3, 1, []]]


def test_numbers_of_each_state_are_those_of_the_history(model: CompiledModel) -> None:
    made = states.history_json(model.history)
    for p, state in zip(made["passes"], model.history, strict=True):
        assert {state.rows[int(i)].name for i in p["numbers"]} == state.numbers.keys() & {r.name for r in state.rows}
    convert = made["passes"][-1]["numbers"]
    name = model.history["convert"].rows
    place = next(i for i, r in enumerate(name) if r.name == "a")
    assert convert[str(place)][0] == pytest.approx(model.history["convert"].numbers["a"].sqnr, rel=1e-5)


def test_reordered_channels_are_marked(model: CompiledModel) -> None:
    last = model.history["convert"]
    turned = replace(last, numbers={**last.numbers, "a": replace(last.numbers["a"], reordered=True)})
    (made,) = states.history_json([turned])["passes"]
    assert [turned.rows[int(i)].name for i, v in made["numbers"].items() if len(v) == 5] == ["a"]


def test_two_reports_of_one_model_differ_in_one_field(model: CompiledModel, tmp_path: Path) -> None:
    data = torch.randn(4, 3, 10, 10)
    texts = [re.sub('data-made="[^"]*"', "", model.report(tmp_path / f"{i}.html", data).read_text()) for i in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("value", "shown"), [(None, None), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"), (1.23456789, 1.23457), (0.0, 0.0)])
def test_numbers_that_json_has_not(value: float | None, shown: Any) -> None:
    assert states.number(value) == shown


def test_layouts_put_readers_below_and_lead_long_edges_around() -> None:
    names = ["x", "a", "b", "add", "alone"]
    edges = [("x", "a"), ("a", "b"), ("b", "add"), ("x", "add")]
    made = arrange(names, edges)
    assert list(made.places) == names
    assert all(made.places[a][1] < made.places[b][1] for a, b in edges)
    assert list(made.routes) == [("x", "add")]
    route = made.routes["x", "add"]
    assert [y for _, y in route] == [1, 2] and all(abs(x - made.places[n][0]) >= 0.5 for (x, _), n in zip(route, ("a", "b"), strict=True))
    assert made.places["alone"][0] > max(made.places[n][0] for n in names[:4]) + 0.9
    assert made == arrange(names, edges)


def test_layouts_of_cycles_of_parts_and_of_nothing() -> None:
    assert len(arrange(["a", "b", "c"], [("a", "b"), ("b", "a"), ("b", "c")]).places) == 3
    two = arrange(["a", "b", "c", "d"], [("c", "d"), ("a", "b")]).places
    assert two["c"][0] - two["a"][0] >= 1
    assert arrange(["a"], []).places == {"a": (0.0, 0)} and arrange([], []).places == {}


def test_nodes_that_stay_have_one_place_before_and_after(model: CompiledModel) -> None:
    made = states.history_json(model.history)
    lists = replayed(made["passes"])
    for i, p in enumerate(made["passes"][1:], 1):
        names = set(made["layouts"][p["layout"]]["names"])
        assert names == {made["rows"][r][0] for r in (*lists[i], *lists[i - 1])}
        layout = made["layouts"][p["layout"]]
        layer = dict(zip(layout["names"], layout["xy"][1::2], strict=True))
        assert all(layer[source] < layer[made["rows"][r][0]] for r in (*lists[i], *lists[i - 1]) for source in made["rows"][r][3])
    assert len(made["layouts"]) < len(made["passes"])


def test_activations_are_counted_as_numpy_counts_them(model: CompiledModel) -> None:
    torch.manual_seed(1)
    batches = [(3 * torch.randn(4, 3, 10, 10),), (torch.randn(4, 3, 10, 10),)]
    found = tensors.activations(model, [("", model.graph_module)], batches)["", "x_q"]
    x = torch.cat([b[0] for b in batches]).numpy()
    assert (found["lo"], found["hi"], found["n"]) == (float(x.min()), float(x.max()), x.size)
    wanted = np.histogram(x, tensors.BINS, (x.min(), x.max()))[0]
    assert np.abs(np.array(found["bins"]) - wanted).sum() <= 4 and sum(found["bins"]) == x.size
    qp = model.graph_module.get_submodule("x_q").qparams
    lo, hi = qp.range  # type: ignore[union-attr]
    half = float(qp.scale) / 2  # type: ignore[union-attr]
    assert (found["below"], found["above"]) == (int((x < lo - half).sum()), int((x > hi + half).sum())) and found["below"] > 0
    rounded = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x), float(qp.scale), int(qp.zero_point), 0, 255).numpy()  # type: ignore[union-attr]
    error = 10 * math.log10((x.astype(float) ** 2).sum() / ((rounded - x).astype(float) ** 2).sum())
    assert found["sqnr"] == pytest.approx(error, abs=0.01)


def test_a_relu_that_the_grid_stands_for_is_no_clipping(model: CompiledModel) -> None:
    found = tensors.activations(model, [("", model.graph_module)], [(torch.randn(4, 3, 10, 10),)])["", "a_q"]
    assert found["clamp"] == [0.0, None] and found["lo"] < 0
    assert found["absorbed"] > found["n"] * 0.2 and found["below"] == 0


def test_large_values_are_sampled(monkeypatch: pytest.MonkeyPatch, model: CompiledModel) -> None:
    monkeypatch.setattr(tensors, "SAMPLE", 100)
    found = tensors.activations(model, [("", model.graph_module)], [(torch.randn(4, 3, 10, 10),)])["", "x_q"]
    assert 50 <= found["n"] <= 100 and sum(found["bins"]) == found["n"]


def test_weights_are_counted_in_steps_of_their_channel(model: CompiledModel) -> None:
    found = tensors.weights(model.graph_module)
    assert set(found) == {"a", "b", "fc"}
    layer = model.graph_module.get_submodule("b")
    w, scale = layer.op.weight.detach(), layer.weight_grid.scale  # type: ignore[union-attr]
    steps = w / scale[:, None, None, None]  # type: ignore[index]
    assert found["b"]["lo"] == pytest.approx(float(steps.min())) and found["b"]["hi"] == pytest.approx(float(steps.max()))
    assert found["b"]["values"] == [float(w.min()), float(w.max())]
    assert (found["b"]["grid"]["lo"], found["b"]["grid"]["hi"], found["b"]["steps"]) == (-127, 127, True) and sum(found["b"]["bins"]) == w.numel()
    assert found["b"]["below"] == found["b"]["above"] == 0 and 35 < found["b"]["sqnr"] < 60


def test_constant_values_and_float_nets() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh())
    with torch.no_grad():
        net[0].weight.fill_(0.5)
        net[0].bias.zero_()  # type: ignore[union-attr]
    m = fxq.compile(net.eval(), "float", example=torch.zeros(2, 1, 3, 3), progress=False)
    found = tensors.activations(m, [("", m.graph_module)], [(torch.zeros(2, 1, 3, 3),)])
    assert found["", "_0"]["bins"][0] == found["", "_0"]["n"] == 36 and "grid" not in found["", "_0"]
    assert tensors.weights(m.graph_module)["_0"]["bins"][0] == 2


def test_costs_count_codes_at_their_bits(model: CompiledModel) -> None:
    made = {x["node"]: x for x in facts.layers(model.graph_module, tensors.weights(model.graph_module))}
    assert [made[n]["bits"] for n in ("a", "b", "fc")] == [8, 8, 8] and made["a"]["macs"] == 8 * 27 * 64
    assert made["a"]["bytes"] == 8 * 27 + 4 * 8 + 4 * 8  # codes, bias, scales
    float_sizes = sum(p.numel() for n, p in model.graph_module.named_parameters() if "grid" not in n) * 4
    assert facts.float_bytes(model.graph_module) == float_sizes


def test_the_file_is_the_same_for_the_same_model(model: CompiledModel, tmp_path: Path) -> None:
    a, b = (model.report(tmp_path / n).read_text() for n in ("a.html", "b.html"))
    stamp = re.compile(r'data-made="[^"]*"')
    assert len(stamp.findall(a)) == 1 and stamp.sub("", a) == stamp.sub("", b)


def test_the_file_lets_in_its_own_script_only(model: CompiledModel, tmp_path: Path) -> None:
    text = model.report(tmp_path / "r.html").read_text()
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 1 and text.count("<script") == 2
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert not re.search(r"(?:src|href)=\"(?!#)", text) and "@import" not in text


def test_without_data_the_page_says_so(tmp_path: Path) -> None:
    m = fxq.compile(Net().eval(), "iao_w8a8", calibration=torch.randn(4, 3, 10, 10), progress=False)
    m.history = History(m.history.snapshots)
    (part,) = data_of(m.report(tmp_path / "none.html"))["sections"]
    assert part["note"] == NO_DATA and part["activations"] == {} and part["charts"]["clipping"] == "" and part["weights"]
    fxq.save(m, tmp_path / "m.fxq")
    (loaded,) = data_of(fxq.load(tmp_path / "m.fxq").report(tmp_path / "loaded.html"))["sections"]
    assert [p["name"] for p in loaded["passes"]] == [s.name for s in m.history] and loaded["weights"] == part["weights"] and loaded["rows"] == part["rows"]
    (part,) = data_of(m.report(tmp_path / "data.html", torch.randn(4, 3, 10, 10)))["sections"]
    assert part["note"] == "" and part["activations"]["x_q"]["n"] == 4 * 300


def test_at_most_so_many_batches_are_read(model: CompiledModel, tmp_path: Path) -> None:
    read = []

    def batches() -> Any:
        for i in range(100):
            read.append(i)
            yield torch.randn(1, 3, 10, 10)

    (part,) = data_of(model.report(tmp_path / "r.html", batches()))["sections"]
    assert part["activations"]["x_q"]["n"] == BATCHES * 300 and len(read) <= BATCHES + 1


def test_written_whole_or_not_at_all(model: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("mine")
    with pytest.raises(ArtifactError, match="the file exists"):
        model.report(path)
    assert path.read_text() == "mine" and model.report(path, force=True) == path and path.stat().st_size > 50_000
    with pytest.raises(CalibrationError, match="inputs|shape|float"):
        model.report(tmp_path / "bad.html", [torch.randn(2, 3, 10, 10), torch.randn(2, 3, 9, 10)])
    assert {p.name for p in tmp_path.iterdir()} == {"r.html"}


@pytest.mark.parametrize(("package", "what"), [("matplotlib.figure", "matplotlib"), ("fast_sugiyama", "fast-sugiyama")])
def test_a_missing_package_is_named(model: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, what: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FxqError, match=rf"{what} is not installed.*pip install fxq\[report\]"):
        model.report(tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_models_in_training_keep_their_mode(tmp_path: Path) -> None:
    m = fxq.compile(Net(), "iao_w8a8", calibration=torch.randn(4, 3, 10, 10), mode="qat", progress=False)
    m.train()
    modes = [x.training for x in m.modules()]
    before = {k: v.clone() for k, v in m.state_dict().items() if isinstance(v, Tensor)}
    (part,) = data_of(m.report(tmp_path / "r.html", torch.randn(4, 3, 10, 10)))["sections"]
    assert [x.training for x in m.modules()] == modes and any(modes) and part["activations"]["x_q"]["grid"]["hi"] > 0
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items() if isinstance(v, Tensor))


class Chooser(nn.Module):
    """Can only be captured in parts: data decides."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Net(), Net(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if float(x.sum()) > -1e9 else self.right(x)


def test_models_in_parts_have_a_section_each(tmp_path: Path) -> None:
    m = fxq.compile(Chooser().eval(), "weight_only_w8", example=torch.randn(2, 3, 10, 10), progress=False)
    assert set(m.parts) == {"left"} or set(m.parts) == {"left", "right"}
    made = data_of(m.report(tmp_path / "r.html", torch.randn(4, 3, 10, 10)))
    assert [s["name"] for s in made["sections"]] == list(m.parts) and made["title"] == "Chooser"
    assert made["sections"][0]["activations"] and made["sections"][0]["passes"][0]["name"] == "trace"


def test_pruned_models_show_what_was_cut(tmp_path: Path) -> None:
    p = fxq.prune(Net().eval(), Prune(ratio=0.5, multiple_of=1), example=torch.randn(2, 3, 10, 10), progress=False)
    assert p.prune_report is not None
    assert p.prune_report.to_html() in p.report(tmp_path / "p.html", torch.randn(2, 3, 10, 10)).read_text()
    m = fxq.compile(p, "iao_w8a8", calibration=torch.randn(4, 3, 10, 10), progress=False)
    assert 'class="fxq-pruning"' in m.report(tmp_path / "m.html").read_text()


@pytest.mark.parametrize("scheme", ["iao_w8a8_sym", "weight_only_w4"])
def test_tensorrt_targets(scheme: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 16))
    m = fxq.compile(net.eval(), scheme, calibration=torch.randn(4, 16, 4, 4), target="tensorrt", progress=False)
    (part,) = data_of(m.report(tmp_path / "r.html", torch.randn(4, 16, 4, 4)))["sections"]
    assert {x["bits"] for x in part["layers"]} & {4, 8} and part["weights"]


@pytest.mark.parametrize("scheme", ["dorefa_w4a4", "xnor_w1a1", "twn_wta32", "tbn_w1at", "dynamic_w8", "iao_w4a8", "float"])
def test_other_schemes(scheme: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(4, 3, 10, 10)
    m = fxq.compile(net.eval(), scheme, calibration=x, progress=False)
    (part,) = data_of(m.report(tmp_path / "r.html", x))["sections"]
    assert len(part["layers"]) >= 3 and part["activations"]


def test_the_command_line_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "r.html"
    args = ["fxq.zoo:resnet20", "--input", "2,3,32,32", "--scheme", "weight_only_w8", "--verify", "--report", str(page)]
    assert cli.main(args) == 0
    made = data_of(page)
    assert made["about"]["command"].startswith("fxq-lower fxq.zoo:resnet20 --input 2,3,32,32") and made["title"] == "fxq.zoo:resnet20"
    assert made["proof"]["ok"] is True and any(p["numbers"] for p in made["sections"][0]["passes"])
    capsys.readouterr()
    assert cli.main(args) == 2 and "the file exists" in capsys.readouterr().err
    assert cli.main([*args[:-1], str(tmp_path / "no" / "r.html")]) == 2 and "its folder does not exist" in capsys.readouterr().err
    assert cli.main([*args[:-1], str(tmp_path / "x"), "-o", str(tmp_path / "x")]) == 2 and "would be the same file" in capsys.readouterr().err


def test_the_page_about_it_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs/report.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/report.md", "exec"), {})
    assert data_of(tmp_path / "report.html")["proof"]["ok"] is True
    assert f"up to {BATCHES} batches" in text and f"more than {tensors.SAMPLE:,} numbers" in text
    options = {o for a in cli.parser()._actions for o in a.option_strings}
    (line,) = re.findall(r"^\$ fxq-lower (.*)$", text, re.MULTILINE)
    assert set(re.findall(r"--?[a-z][\w-]*", line)) <= options


def test_sensitivity_is_ranked_with_what_the_metric_loses(model: CompiledModel, tmp_path: Path) -> None:
    found = model.sensitivity(torch.randn(4, 3, 10, 10))
    made = data_of(model.report(tmp_path / "r.html", sensitivity=found))["sensitivity"]
    assert [r[0] for r in made["rows"]] == [r.name for r in sorted(found.rows, key=lambda r: r.alone)] and made["metric"] == ""
    assert {(r[0], r[1]): r[2:4] for r in made["rows"]} == {(n, w): [states.number(a), states.number(o)] for n, w, a, o in found}
    given = replace(found, rows=tuple(replace(r, drop_alone=i / 8, drop_without=i / 4) for i, r in enumerate(found.rows)), metric="accuracy")
    made = data_of(model.report(tmp_path / "m.html", sensitivity=given))["sensitivity"]
    assert sorted(r[4:] for r in made["rows"]) == [[i / 8, i / 4] for i in range(len(found.rows))] and made["metric"] == "accuracy"
