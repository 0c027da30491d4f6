"""The HTML report in a real Chromium, opened from disk: no error in the console, no request, and what it shows is what was computed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page
from torch import Tensor, nn

import fxq
from fxq.compiled import CompiledModel
from fxq.report import Section, render
from fxq.snapshot import History
from tests.report_page import PHONE, Net, Opened, chromium, opened

EVIL = "</script><b id=evil>x</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    torch.manual_seed(0)
    return fxq.compile(Net().eval(), "iao_w8a8", calibration=torch.randn(8, 3, 12, 12), progress=False, numbers=True)


@pytest.fixture(scope="module")
def report(model: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = torch.randn(8, 3, 12, 12)
    rows = [("layer1.0.conv1", "weights", 31.5, 40.0), ("stem", "weights", 12.5, float("inf"))]
    path = tmp_path_factory.mktemp("report") / "report.html"
    return model.report(path, proof=model.verify(model.lower(), data), sensitivity=rows, bisect=["pass: convert", "node: stem"], command="fxq-lower x.py:net")


@pytest.fixture
def shown(browser: Browser, report: Path) -> Iterator[Opened]:
    found = opened(browser, report)
    yield found
    found.page.context.close()
    assert found.trouble == []


def choose(page: Page, name: str) -> None:
    """Search a node and take the first hit."""
    page.keyboard.press("/")
    page.keyboard.type(name)
    page.keyboard.press("Enter")


def test_every_pass_shows_its_graph_diff_numbers_and_what_it_left_alone(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    names = [s.name for s in model.history]
    assert page.locator("#strip .name").all_inner_texts() == names
    for i, state in enumerate(model.history):
        page.click(f'#strip [data-value="{i}"]')
        assert shown.text("#stage h2") == state.name
        page.click('#stage [data-value="graph"]')
        if i:
            page.click('#stage [data-value="after"]')
        assert page.locator("#graph .node").count() == state.nodes
        page.click('#stage [data-value="diff"]')
        wanted = [line[1:] for line in model.history.diff(state.name).splitlines() if line.startswith("+") and not line.startswith("+++")]
        assert sorted(page.locator("#diff tr.added td.code").all_inner_texts()) == sorted(wanted)
        page.click('#stage [data-value="numbers"]')
        assert page.locator("#numbers tbody tr").count() == len(state.numbers)
        page.click('#stage [data-value="skips"]')
        assert page.locator("#skips tbody tr").count() == len(state.skips)


def test_reordered_channels_are_said(browser: Browser, model: CompiledModel, tmp_path: Path) -> None:
    states = list(model.history)
    name = next(iter(states[-1].numbers))
    states[-1] = replace(states[-1], numbers={**states[-1].numbers, name: replace(states[-1].numbers[name], reordered=True)})
    path = tmp_path / "turned.html"
    path.write_bytes(render([Section("", model.graph_module, History(states))], [], title="turned", scheme=model.scheme, target=model.target))
    found = opened(browser, path)
    found.page.click(f'#strip [data-value="{len(states) - 1}"]')
    found.page.click('#stage [data-value="numbers"]')
    lines = [t for t in found.page.locator("#numbers tbody tr").all_inner_texts() if "channels reordered" in t]
    assert len(lines) == 1 and name in lines[0]
    choose(found.page, name)
    assert "channels reordered" in found.text("#story")
    found.page.context.close()
    assert found.trouble == []


def test_changed_nodes_are_marked(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    i = [s.name for s in model.history].index("fold-bn")
    page.click(f'#strip [data-value="{i}"]')
    before, after = ({r.name: r for r in model.history.snapshots[j].rows} for j in (i - 1, i))
    marked = {k: set(page.locator(f"#graph .node.{k}").evaluate_all("l => l.map(n => n.dataset.id)")) for k in ("added", "removed", "changed")}
    assert marked["removed"] == before.keys() - after.keys() and len(marked["removed"]) == 4
    assert marked["added"] == after.keys() - before.keys()
    assert marked["changed"] == {n for n in before.keys() & after.keys() if before[n] != after[n]}


def test_what_stays_does_not_move_between_before_and_after(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    page.click(f'#strip [data-value="{len(model.history) - 1}"]')
    places = []
    for state in ("before", "after"):
        page.click(f'#stage [data-value="{state}"]')
        places.append(dict(page.locator("#graph .node").evaluate_all("l => l.map(n => [n.dataset.id, n.getAttribute('transform')])")))
    both = places[0].keys() & places[1].keys()
    assert len(both) > 8 and all(places[0][n] == places[1][n] for n in both)


def test_a_node_is_found_and_shows_the_numbers_that_python_has(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    choose(page, "layer1_0_conv1_q")
    assert shown.text("#panel h2") == "layer1_0_conv1_q"
    assert shown.text("#stage h2") == "convert"
    moved = model.history["convert"].numbers["layer1_0_conv1_q"]
    cells = page.locator("#story tbody tr", has_text="convert").locator("td.n").all_inner_texts()
    assert cells == [f"{moved.sqnr:.1f}", f"{moved.cosine:.6g}", f"{moved.steps:.3g}", f"{moved.total:.1f}"]
    seen: list[Tensor] = []
    quantizer = model.graph_module.get_submodule("layer1.0.conv1_q")
    handle = quantizer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.inference_mode():
        model(*(model.history.example or ()))
    handle.remove()
    x = seen[0]
    assert f"{float(x.min()):.4g} to {float(x.max()):.4g}".replace("-0 ", "0 ") in shown.text("#panel .tensor")
    assert str(quantizer.qparams) in shown.text("#panel .tensor")  # type: ignore[union-attr]
    absorbed = 100 * float((x < 0).to(torch.float64).mean())
    assert f"{absorbed:.1f} %: a ReLU" in shown.text("#panel .tensor")


def test_modules_collapse_and_expand(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    whole = page.locator("#graph .node").count()
    page.select_option("#depth", "1")
    assert page.locator("#graph .node.module").evaluate_all("l => l.map(n => n.dataset.id)") == ["module layer1"]
    inside = int(str(page.locator("#graph .node.module .side").text_content()).split()[0])
    assert page.locator("#graph .node").count() == whole - inside + 1
    page.locator("#graph .node.module").dblclick()
    assert page.locator("#graph .node").count() == whole
    choose(page, "layer1_0_conv1")
    page.locator("#graph").focus()
    page.keyboard.press("c")
    assert page.locator("#graph .node.module").get_attribute("data-id") == "module layer1.0"
    page.keyboard.press("e")
    assert page.locator("#graph .node").count() == whole
    page.click(f'#strip [data-value="{len(model.history) - 2}"]')
    page.select_option("#depth", "unchanged")
    mark = page.locator("#graph .node.module.changed").count()
    assert mark == 0


def test_nodes_are_labelled_with_numbers(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    page.click(f'#strip [data-value="{len(model.history) - 1}"]')
    page.select_option("#label", "sqnr")
    labels = dict(page.locator("#graph .node:has(.value)").evaluate_all("l => l.map(n => [n.dataset.id, n.querySelector('.value').textContent])"))
    moved = model.history["convert"].numbers
    assert labels == {n: "exact" if m.sqnr == float("inf") else f"{m.sqnr:.1f} dB" for n, m in moved.items() if n in labels} and labels.keys() == moved.keys()
    page.select_option("#depth", "1")
    worst = min(m.sqnr for n, m in moved.items() if n.startswith("layer1"))
    assert page.locator("#graph .node.module .value").text_content() == f"{worst:.1f} dB"
    page.select_option("#label", "macs")
    assert page.locator('#graph [data-id="stem"] .value').text_content() == "21.6 k"


def test_the_diff_marks_what_changed_in_a_line(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    i = [s.name for s in model.history].index("fold-bn")
    page.click(f'#strip [data-value="{i}"]')
    page.click('#stage [data-value="diff"]')
    old, new = (page.locator(f"#diff tr.{k}", has_text="%layer1_0_relu =").locator("mark").all_inner_texts() for k in ("removed", "added"))
    rows = [{r.name: r.text for r in model.history.snapshots[j].rows}["layer1_0_relu"] for j in (i - 1, i)]
    assert (old, new) == (["%layer1_0_bn1"], ["%layer1_0_conv1"]) and rows[0].replace(old[0], new[0]) == rows[1]


def test_pan_zoom_and_fit(shown: Opened) -> None:
    page = shown.page
    view = page.locator("#graph > svg > g")
    page.click("text=Fit")
    fitted = view.get_attribute("transform")
    box = page.locator("#graph").bounding_box()
    assert box is not None
    for item in page.locator("#graph .node").all():
        at = item.bounding_box()
        assert at is not None and box["x"] <= at["x"] and at["x"] + at["width"] <= box["x"] + box["width"]
        assert box["y"] <= at["y"] and at["y"] + at["height"] <= box["y"] + box["height"]
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.wheel(0, -400)
    zoomed = view.get_attribute("transform")
    assert zoomed != fitted
    page.mouse.down()
    page.mouse.move(box["x"] + 360, box["y"] + 200, steps=4)
    page.mouse.up()
    x0, x1 = (float(str(t).split("(")[1].split(" ")[0]) for t in (zoomed, view.get_attribute("transform")))
    assert x1 - x0 == pytest.approx(60)


def test_the_keyboard_walks_passes_and_nodes(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    page.locator('#strip [aria-selected="true"]').focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.value") == "2" and shown.text("#stage h2") == model.history.snapshots[2].name
    page.keyboard.press("]")
    assert shown.text("#stage h2") == model.history.snapshots[3].name
    page.keyboard.press("[")
    assert shown.text("#stage h2") == model.history.snapshots[2].name
    page.keyboard.press("]")
    page.locator("#graph").focus()
    page.keyboard.press("ArrowDown")
    first = shown.text("#panel h2")
    page.keyboard.press("ArrowDown")
    second = shown.text("#panel h2")
    assert first in {r.name for r in model.history.snapshots[3].rows} and second != first
    page.keyboard.press("ArrowUp")
    assert shown.text("#panel h2") == first
    page.keyboard.press("Escape")
    assert shown.text("#panel h2") == "Node"


def test_tab_reaches_every_part_and_the_focus_is_seen(shown: Opened) -> None:
    page = shown.page
    reached, outlines = [], []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(document.activeElement.closest('[id]') || {}).id"))
        outlines.append(page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
    assert [r for i, r in enumerate(reached) if r not in reached[:i]][:5] == ["search", "theme", "tabs", "strip", "stage"]
    assert "graph" in reached and set(outlines[: reached.index("graph") + 1]) == {"solid"}


def test_search_marks_hits_and_escape_clears_it(shown: Opened) -> None:
    page = shown.page
    page.keyboard.press("/")
    page.keyboard.type("conv2")
    hits = page.locator("#graph .node.hit").evaluate_all("l => l.map(n => n.dataset.id)")
    assert sorted(hits) == ["layer1_0_conv2", "layer1_1_conv2"] and page.locator("#found li").count() >= 2
    page.keyboard.press("Escape")
    assert page.locator("#graph .node.hit").count() == 0 and page.locator("#search").input_value() == ""


def test_tables_tell_integer_and_float_costs_and_grids(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    page.click('#tabs [data-value="precision"]')
    page.select_option("select[aria-label='Which rows']", "float")
    rows = page.locator("#precision tbody tr").all_inner_texts()
    assert len(rows) == len(model.float_ops) > 0 and all(f.node in r and f.why in r for f, r in zip(model.float_ops, rows, strict=True))
    page.click('#tabs [data-value="layers"]')
    stem = page.locator("#layers tbody tr").first.inner_text()
    assert f"{8 * 3 * 9 * 100 / 1e3:.1f} k" in stem and "integer" in stem
    assert page.locator("main .chart svg").count() == 1
    page.click('#tabs [data-value="grids"]')
    assert page.locator("#grids tbody tr").count() == sum(r.kind == "fake_quantize" for r in model.history["convert"].rows)


def test_sorting_and_filtering(shown: Opened) -> None:
    page = shown.page
    page.click('#tabs [data-value="layers"]')
    page.click("#layers thead >> text=MACs")
    names = page.locator("#layers tbody tr td:first-child").all_inner_texts()
    assert names[0].startswith("layer1.") and names[-1] == "head"
    page.fill("main input[type=search]", "stem")
    assert page.locator("#layers tbody tr").count() == 1


def test_proof_bisection_sensitivity_and_how_it_was_made(shown: Opened, model: CompiledModel) -> None:
    page = shown.page
    assert "equal" in shown.text("#summary .stat.good")
    page.click('#tabs [data-value="proof"]')
    assert "0 of" in shown.text("#proof") and shown.text("#bisect") == "pass: convert\nnode: stem"
    page.click('#tabs [data-value="sensitivity"]')
    ranked = [[c.strip() for c in r.split("\t")[1:5]] for r in page.locator("#sensitivity tbody tr").all_inner_texts()]
    assert ranked == [["stem", "weights", "12.5", "exact"], ["layer1.0.conv1", "weights", "31.5", "40.0"]]
    page.click("#sensitivity >> text=layer1.0.conv1")
    assert shown.text("#panel h2") == "layer1_0_conv1"
    page.click('#tabs [data-value="about"]')
    about = shown.text("main")
    assert "fxq-lower x.py:net" in about and torch.__version__.split("+")[0] in about and model.scheme.name in about


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_switch(browser: Browser, report: Path, scheme: str) -> None:
    found = opened(browser, report, scheme=scheme)
    brightness = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3"
    assert (found.page.evaluate(brightness) > 128) == (scheme == "light")
    found.page.click("#theme")
    assert (found.page.evaluate(brightness) > 128) == (scheme == "dark")
    assert found.trouble == []
    found.page.context.close()


def test_a_phone_needs_no_horizontal_scrolling(browser: Browser, report: Path) -> None:
    found = opened(browser, report, PHONE)
    page = found.page
    for tab in page.locator("#tabs button").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"], tab.inner_text()
    page.click('#tabs [data-value="passes"]')
    page.click("#graph .node >> nth=1")
    panel, main = page.locator("#panel").bounding_box(), page.locator("#main").bounding_box()
    assert panel is not None and main is not None and panel["x"] == main["x"] == 0 and panel["y"] >= main["y"] + main["height"] - 1
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"] and found.trouble == []
    page.context.close()


def test_strings_of_the_model_are_text_and_nothing_else(browser: Browser, tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module(EVIL, nn.Conv2d(3, 4, 1))
    m = fxq.compile(net.eval(), "iao_w8a8", calibration=torch.randn(4, 3, 4, 4), progress=False)
    path = m.report(tmp_path / "evil.html", title=f"</title>{EVIL}<img src=x onerror=alert(1)>", command=EVIL, bisect=EVIL)
    found = opened(browser, path)
    for tab in found.page.locator("#tabs button").all():
        tab.click()
        assert found.page.locator("#evil, img").count() == 0
    assert found.page.locator("h1").inner_text().startswith("</title>" + EVIL) and found.trouble == []
    found.page.context.close()
