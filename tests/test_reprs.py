"""What notebooks show: tables whose cells are escaped and complete."""

import html
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import tables_html
from fxq.lint import LintReport, OpReport
from fxq.snapshot import History, Skip, Snapshot
from fxq.verdict import Difference, OutputProof, Proof

EVIL = '<script>alert("x & y")</script>'


class Cells(HTMLParser):
    """Rows of cells of all tables; fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.b(torch.relu(self.bn(self.a(x))))).mean((2, 3)))  # type: ignore[no-any-return]


LEFT = [["node", "reason"], ["q", "an output"]]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def compiled() -> fxq.CompiledModel:
    torch.manual_seed(0)
    return fxq.compile(Net().eval(), "int8", calibration=[X], progress=False)


def test_a_compiled_model(compiled: fxq.CompiledModel) -> None:
    text = compiled._repr_html_()
    rows = Cells(text).rows
    assert "CompiledModel: iao_w8a8 for onnxruntime; " in text and f"in float: {len(compiled.float_ops)}" in text
    assert [r[0] for r in rows[1 : len(compiled.history) + 1]] == [s.name for s in compiled.history]
    assert rows[-len(compiled.float_ops) :] == [[o.node, o.kind, o.why] for o in compiled.float_ops] and compiled.float_ops
    done, whole = re.findall(r"(\d+) of (\d+) nodes in integers", text)[0]
    nodes = [n for n in compiled.graph_module.graph.nodes if "integer" in n.meta and n.op.startswith("call_")]
    assert (int(done), int(whole)) == (sum(n.meta["integer"] for n in nodes), len(nodes)) and 0 < int(done) < int(whole)


def test_a_model_in_parts() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh()), nn.Sequential(nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return self.two(x if float(x.sum()) < 1e9 else -x)  # type: ignore[no-any-return]

    m = fxq.compile(Routed().eval(), "int8", calibration=[X], progress=False)
    rows = Cells(m._repr_html_()).rows
    assert rows[1:] == [[p, str(part.history.snapshots[-1].nodes), str(len(part.float_ops))] for p, part in m.parts.items()]
    assert [r[0] for r in rows[1:]] == ["one", "two"]


def test_a_history() -> None:
    skips = (Skip(EVIL, "why & where"),)
    history = History([Snapshot("trace", (), 0, 1.25), Snapshot("fold-bn", (), 3, 2.0, 1.5e-7, skips), Snapshot(EVIL, (), 0, 0.0, 0.0)])
    text = history._repr_html_()
    found = Cells(text)
    assert found.rows[1:4] == [["trace", "0", "0", "1.2", "-"], ["fold-bn", "3", "0", "2.0", "1.50e-07"], [EVIL, "0", "0", "0.0", "0"]]
    assert found.rows[5:] == [["fold-bn", EVIL, "why & where"]] and "left alone: 1" in text
    assert "script" not in found.tags and EVIL not in text and html.escape(EVIL) in text
    assert "left alone" not in History([Snapshot("trace", (), 0, 1.25)])._repr_html_()


def test_a_lint_report(compiled: fxq.CompiledModel) -> None:
    report = LintReport((OpReport("a", "Conv", "int8", "QLinearConv"), OpReport(EVIL, "Conv", "float", "Conv", "no <Q>")), 1, 2, (("q", "an output"),))
    found = Cells(report._repr_html_())
    assert found.rows == [["operator", "int8", "float"], ["Conv", "1", "1"], ["node in float", "operator", "reason"], [EVIL, "Conv", "no <Q>"], *LEFT]
    assert "1 QuantizeLinear and 2 DequantizeLinear left" in report._repr_html_()
    real = compiled.lint()
    assert isinstance(real, LintReport)
    assert [r[0] for r in Cells(real._repr_html_()).rows[1 : len(real.counts()) + 1]] == list(real.counts())


def test_a_proof(compiled: fxq.CompiledModel) -> None:
    wrong = Proof(
        10, 1, 0.5, 2, 3, 40, 4, 5, 1, outputs=(OutputProof(EVIL, True, 10, 1, 0.5),), differences=(Difference("n", "t", 20, 4, 2.0, "<cause>"),)
    )  # fmt: skip
    found = Cells(wrong._repr_html_())
    assert found.rows[1] == [EVIL, "exact", "1 of 10", "0.5", "0"] and found.rows[-1] == ["n", "t", "4 of 20", "2", "<cause>"]
    assert ["ties", "5"] in found.rows and "not proven" in wrong._repr_html_()
    proof = compiled.verify(compiled.lower(), X)
    text = proof._repr_html_()
    assert "proven: " in text and Cells(text).rows[1][0] == "output"  # type: ignore[union-attr]


def test_a_prune_report() -> None:
    pruned: Any = fxq.prune(Net().eval(), fxq.Prune(ratio=0.5, multiple_of=4), example=X)
    text = pruned.prune_report._repr_html_()
    assert text == pruned.prune_report.to_html() and "<h2>Pruning</h2>" in text and Cells(text.replace("</rect>", "</rect>")).rows
    assert "PrunedModel: float for " in pruned._repr_html_()


def test_a_trt_report(compiled: fxq.CompiledModel) -> None:
    report: Any = compiled.lint("sm86")
    found = Cells(report._repr_html_()).rows
    assert found[1 : len(report.findings) + 1] == [[f.level, f.code, f.node, f.fact, f.way_out] for f in report.findings] and report.findings
    assert found[-1][:3] == [report.ops[-1].node, report.ops[-1].op, report.ops[-1].runs]


def test_a_diagnosis() -> None:
    found = fxq.doctor(Net().eval(), X, name=EVIL)
    text = found._repr_html_()
    assert "script" not in Cells(text).tags and html.escape(EVIL) in text
    assert html.unescape(re.sub(r"<[^>]+>", "\n", text)).split() == str(found).split()


def test_a_table_must_be_whole() -> None:
    assert tables_html.table(("a",), [[1], ["<"]], "c & d").count("&") == 2
    with pytest.raises(ValueError, match="zip"):
        tables_html.table(("a", "b"), [[1]])
