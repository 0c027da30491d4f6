"""Netron shows recorded graphs and lowered files: served here, opened in a headless Chromium that may reach nothing but this machine."""

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import netron
import onnx
import pytest
import torch
from playwright.sync_api import Browser, Page

import fxq
from fxq import zoo
from tests.report_page import chromium

KEEP_EVAL = "const own = window.eval; Object.defineProperty(window, 'eval', {get: () => own, set: () => {}})"
"""Netron takes ``window.eval`` away, with which Playwright reads a page."""


@pytest.fixture(scope="module")
def compiled() -> fxq.CompiledModel:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    return fxq.compile(zoo.build("tiny_resnet8"), "int8", calibration=[x], progress=False, numbers=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@contextmanager
def opened(browser: Browser, file: Path) -> Iterator[Page]:
    """Netron's page with the file in it."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    here = f"http://localhost:{port}"
    netron.start(str(file), address=("localhost", port), browse=False)
    context = browser.new_context()
    try:
        context.add_cookies([{"name": "consent", "value": "1", "url": here}])
        context.route(lambda url: not url.startswith(here), lambda route: route.abort())
        context.add_init_script(KEEP_EVAL)
        page = context.new_page()
        page.goto(here)
        page.wait_for_selector("g.node", state="attached", timeout=60_000)
        yield page
    finally:
        context.close()
        netron.stop(("localhost", port))


def shown(page: Page) -> Counter[str]:
    """Labels of the nodes on the page."""
    return Counter(page.eval_on_selector_all("g.graph-node g.node-item-type text", "all => all.map(e => e.textContent)"))


def test_a_recorded_graph_opens(compiled: fxq.CompiledModel, browser: Browser, tmp_path: Path) -> None:
    rows = compiled.history.snapshots[-1].rows
    with opened(browser, compiled.save_graph(tmp_path / "graph.onnx")) as page:
        assert shown(page) == Counter(r.kind for r in rows if r.kind not in ("input", "output"))
        page.locator("g.node-item-type", has_text="conv").first.click()
        page.wait_for_selector("#sidebar .sidebar-item")
        text = page.inner_text("#sidebar")
    conv = next(r for r in rows if r.kind == "conv")
    assert all(v in text for v in (conv.path, conv.codes, conv.sizes, "int", "dB", f"name: {conv.inputs[0]}"))


def test_a_lowered_file_opens(compiled: fxq.CompiledModel, browser: Browser, tmp_path: Path) -> None:
    file = compiled.lower().save(tmp_path / "model.onnx")
    with opened(browser, file) as page:
        seen = shown(page)
    there = Counter(n.op_type for n in onnx.load(file).graph.node)
    assert {k: seen[k] for k in ("Conv", "Add", "Gemm", "QuantizeLinear")} == {k: there[k] for k in ("Conv", "Add", "Gemm", "QuantizeLinear")}
    assert there["Conv"] > 5 and seen["Conv"] > 5
