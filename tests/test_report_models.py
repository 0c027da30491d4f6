"""Reports of other models than a plain one open in Chromium, every part of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, ViewportSize, expect
from torch import Tensor, nn

import fxq
from fxq.pruning import Prune
from fxq.report import NO_DATA, states
from fxq.snapshot import History
from tests.report_page import PHONE, WIDE, Net, Opened, chromium, opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def walked(found: Opened) -> None:
    """Every tab, pass and view opens without trouble."""
    page = found.page
    for tab in page.locator("#tabs button").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]  # type: ignore[index]
    page.click('#tabs [data-value="passes"]')
    for i in range(page.locator("#strip button").count()):
        page.click(f'#strip [data-value="{i}"]')
        for view in ("graph", "diff", "numbers", "skips"):
            page.click(f'#stage [data-value="{view}"]')
    assert found.trouble == []


class Chooser(nn.Module):
    """Data decides, so that it is captured in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x)
        return self.right(x) if float(x.sum()) > -1 else x


def test_a_model_in_parts_has_a_choice_of_parts(browser: Browser, tmp_path: Path) -> None:
    m = fxq.compile(Chooser().eval(), "weight_only_w8", example=torch.randn(2, 3, 4, 4), progress=False)
    found = opened(browser, m.report(tmp_path / "parts.html", torch.randn(2, 3, 4, 4)))
    assert found.page.locator("#section option").all_inner_texts() == ["left", "right"]
    for i, names in enumerate(({"left.0", "0"}, {"right.0", "0"})):
        found.page.select_option("#section", str(i))
        found.page.click('#tabs [data-value="layers"]')
        assert found.page.locator("#layers tbody tr td:first-child").first.inner_text() in names
        walked(found)
    found.page.context.close()


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_pruned_float_net_without_activations(browser: Browser, tmp_path: Path, size: ViewportSize) -> None:
    p = fxq.prune(Net().eval(), Prune(ratio=0.5, multiple_of=1), example=torch.randn(2, 3, 12, 12), progress=False)
    p.history = History(p.history.snapshots)
    found = opened(browser, p.report(tmp_path / "pruned.html"), size)
    walked(found)
    found.page.click('#tabs [data-value="pruning"]')
    assert "layer1.0.conv1" in found.text("main .fxq-pruning")
    found.page.click('#tabs [data-value="grids"]')
    assert found.text("main .note") == NO_DATA
    found.page.context.close()


def test_a_graph_too_large_to_draw(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "MOST", 3)
    model = fxq.compile(Net().eval(), "iao_w8a8", calibration=torch.randn(4, 3, 12, 12), progress=False)
    found = opened(browser, model.report(tmp_path / "large.html"))
    assert "too large" in found.text("#graph")
    found.page.keyboard.press("/")
    found.page.keyboard.type("stem")
    found.page.keyboard.press("Enter")
    assert found.text("#panel h2") == "stem"
    walked(found)
    found.page.context.close()


def test_of_a_long_net_only_what_is_near_the_view_is_drawn(browser: Browser, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), *(nn.Tanh() for _ in range(400)))
    m = fxq.compile(net.eval(), "float", example=torch.randn(2, 4), progress=False)
    found = opened(browser, m.report(tmp_path / "long.html"))
    page = found.page
    drawn = page.locator("#graph .node")
    assert 5 < drawn.count() < 60 and page.locator('#graph [data-id="_390"]').count() == 0
    page.keyboard.press("/")
    page.keyboard.type("_390")
    page.keyboard.press("Enter")
    page.wait_for_selector('#graph [data-id="_390"].chosen')
    assert drawn.count() < 60 and page.locator('#graph [data-id="_1"]').count() == 0
    page.keyboard.press("ArrowDown")
    assert found.text("#panel h2") == "_391"
    page.click("text=Fit")
    expect(page.locator("#graph .node")).to_have_count(403)
    assert page.locator("#graph .edge").count() == 402 and found.trouble == []
    page.context.close()
