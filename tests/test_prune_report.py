"""The report of pruning: text, bars, plain data, HTML."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from fxq.costs import LayerCost
from fxq.prune_report import GroupCut, PruneReport, Sensitivity, SensitivityRow

BEFORE = [
    LayerCost("stem", "conv", 3, 16, 1, 4_320_000, 448, 1792),
    LayerCost("bn", "batch_norm", 16, 16, 1, 0, 32, 128),
    LayerCost("block.<1>", "conv", 16, 32, 1, 46_080_000, 4640, 18560),
    LayerCost("scores", "matmul", 8, 49, 1, 19208, 0, 0),
    LayerCost("head", "linear", 32, 10, 1, 320, 330, 1320),
    LayerCost("gone", "conv", 4, 4, 1, 100, 20, 80),
]
AFTER = [
    replace(BEFORE[0], outputs=9, macs=2_430_000, parameters=252, bytes=1008),
    replace(BEFORE[1], inputs=9, outputs=9, parameters=18, bytes=72),
    replace(BEFORE[2], inputs=9, outputs=8, macs=6_480_000, parameters=656, bytes=2624),
    replace(BEFORE[3]),
    replace(BEFORE[4], inputs=8, macs=80, parameters=90, bytes=360),
    LayerCost("shift", "attr", 8, 8, 1, 0, 8, 32),
]
SENSITIVITY = Sensitivity((SensitivityRow("stem", 16, 4, 21.26), SensitivityRow("block.<1>", 32, 16, 9.5), SensitivityRow("attention", 4, 1, math.inf)))


@pytest.fixture
def report() -> PruneReport:
    kept = np.arange(16) % 2 == 0
    kept[1] = True
    groups = [GroupCut("stem", ("stem", "bn"), kept), GroupCut("block.<1>", ("block.<1>",), np.arange(32) < 8, "block of 2 channels")]
    return PruneReport(BEFORE, AFTER, groups, [("head", "its width is the net's & output")], 3, SENSITIVITY)


def test_text(report: PruneReport) -> None:
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "channels", "MACs", "left", "parameters", "left", "bytes", "left"]
    assert "  ".join(lines[2].split()) == "stem  3x16  ->  3x9  4.32  M  ->  2.43  M  56.2%  448  ->  252  56.2%  1.79  k  ->  1.01  k  56.2%"
    assert lines[3].split()[:10] == ["block.<1>", "16x32", "->", "9x8", "46.1", "M", "->", "6.48", "M", "14.1%"]
    assert lines[4].split() == "scores 8x49 -> 8x49 19.2 k -> 19.2 k 100.0% 0 -> 0 - 0 -> 0 -".split()
    assert lines[6].split()[:8] == "gone 4x4 -> 0x0 100 -> 0 0.0%".split()
    assert lines[7].split() == "norms and others 0 -> 0 - 32 -> 26 81.2% 128 -> 104 81.2%".split()
    assert set(lines[8]) == {"-"}
    assert lines[9].split() == "total 50.4 M -> 8.93 M 17.7% 5.47 k -> 1.02 k 18.7% 21.9 k -> 4.10 k 18.7%".split()
    assert len({len(line) for line in lines[:10]}) == 1
    assert lines[11].split() == ["group", "stay", "members"]
    assert lines[13].split() == "stem 9 of 16 channels stem, bn".split()
    assert lines[14].split() == "block.<1> 8 of 32 blocks of 2 channels block.<1>".split()
    assert lines[16] == "the constants of 3 cut channels went into the next layer's bias"
    assert lines[18:20] == ["left whole:", "  head: its width is the net's & output"]
    assert lines[21] == "each group cut alone, the most sensitive first:"
    assert [" ".join(line.split()) for line in lines[24:]] == ["block.<1> 16 of 32 50% 9.5", "stem 4 of 16 25% 21.3", "attention 1 of 4 25% exact"]


def test_nothing_is_said_of_what_did_not_happen() -> None:
    text = str(PruneReport(BEFORE, BEFORE, []))
    assert not any(word in text for word in ("constants", "left whole", "alone"))
    assert "100.0%" in text
    assert PruneReport([], [], []).plot() == "" and "total" in str(PruneReport([], [], []))


def test_bars_show_the_share_that_stays(report: PruneReport) -> None:
    lines = report.plot().splitlines()
    assert lines[0] == "stem      " + "█" * 18 + "░" * 14 + " 9 of 16"
    assert lines[1] == "block.<1> " + "█" * 8 + "░" * 24 + " 8 of 32"
    assert lines[2] == "head      " + "█" * 32 + " 10 of 10"
    assert lines[3] == "gone      " + "░" * 32 + " 0 of 4"
    assert len(lines) == 4
    third = PruneReport([replace(BEFORE[0], outputs=3)], [replace(BEFORE[0], outputs=1)], []).plot()
    assert third == "stem " + "█" * 10 + "▋" + "░" * 21 + " 1 of 3"


def test_plain_data(report: PruneReport) -> None:
    body = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [LayerCost(**c) for c in body["before"]] == BEFORE and [LayerCost(**c) for c in body["after"]] == AFTER
    assert body["totals"]["after"] == {"macs": 8_929_288, "parameters": 1024, "bytes": 4096}
    assert body["groups"][0] == {"name": "stem", "unit": "channel", "members": ["stem", "bn"], "before": 16, "after": 9, "kept": [0, 1, 2, 4, 6, 8, 10, 12, 14]}
    assert body["left"] == [{"node": "head", "why": "its width is the net's & output"}] and body["absorbed"] == 3
    assert body["sensitivity"][2] == {"group": "attention", "units": 4, "cut": 1, "sqnr": None, "metric": None}
    assert PruneReport(BEFORE, AFTER, []).to_json()["sensitivity"] is None


class Tags(HTMLParser):
    """Open tags, all texts and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.append(tag)
        self.attributes += attrs

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed_and_needs_nothing_else(report: PruneReport) -> None:
    text = report.to_html()
    tags = Tags(text)
    assert tags.open == []
    assert not {"script", "link", "style", "img", "iframe"} & set(tags.tags)
    assert not any(name in ("src", "href") or name.startswith("on") for name, _ in tags.attributes)
    assert "block.<1>" not in text and "block.&lt;1&gt;" in text and "net&#x27;s &amp; output" in text
    root = ElementTree.fromstring(text)
    bars = root.findall("./svg/rect")
    assert [float(b.get("width", 0)) for b in bars[:4]] == [200.0, 112.5, 400.0, 100.0]
    strips = root.findall(".//td/svg/path")
    assert strips[0].get("d") == "M0 0h3v1h-3z" + "".join(f"M{i} 0h1v1h-1z" for i in range(4, 16, 2))
    assert strips[1].get("d") == "M0 0h8v1h-8z"
    assert len(root.findall("./table[1]/tr")) == 1 + 7 + 1
    assert [r[0].text for r in root.findall("./table[3]/tr")] == ["group", "block.<1>", "stem", "attention"]


def test_html_of_hostile_names() -> None:
    bad = '"><script>alert(1)</script>'
    cost = replace(BEFORE[0], path=bad)
    report = PruneReport([cost], [cost], [GroupCut(bad, (bad,), np.ones(4, bool))], [(bad, bad)], 0, Sensitivity((SensitivityRow(bad, 2, 1, 3.0, 0.5),)))
    assert "script" not in Tags(report.to_html()).tags
    ElementTree.fromstring(report.to_html())


def test_sensitivity_by_the_metric_where_there_is_one() -> None:
    s = Sensitivity((SensitivityRow("a", 4, 2, 5.0, 91.25), SensitivityRow("b", 4, 2, 50.0, 12.5)))
    assert [r.group for r in s.ranked()] == ["b", "a"]
    assert [line.split() for line in str(s).splitlines()][2:] == ["b 2 of 4 50% 50.0 12.5".split(), "a 2 of 4 50% 5.0 91.25".split()]
    assert s.to_json()[0] == {"group": "a", "units": 4, "cut": 2, "sqnr": 5.0, "metric": 91.25}
    assert ElementTree.fromstring(s.to_html()).findall("./tr/th")[-1].text == "metric"
    assert "metric" not in str(SENSITIVITY)
