"""Do recorded graphs open in Netron and in Model Explorer, with as many nodes as the graph has?

Run: python benchmarks/bench_viewers.py [--model-explorer COMMAND] [names ...]

Each net is compiled with small inputs; the graph after the last pass is saved and opened in a headless Chromium that may reach nothing but this machine.
Model Explorer is a heavy package with pins of its own: install it (`pip install ai-edge-model-explorer`) in an environment of its own and name its command.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import common
import torch
from playwright.sync_api import Browser, Page, sync_playwright

import fxq

NETS = ("resnet18", "mobilenet_v3_small", "densenet121", "swin_t")
KEEP_EVAL = "const own = window.eval; Object.defineProperty(window, 'eval', {get: () => own, set: () => {}})"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


@contextmanager
def page_of(browser: Browser, url: str, here: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.add_cookies([{"name": "consent", "value": "1", "url": here}])
    context.route(lambda u: not u.startswith(here), lambda route: route.abort())
    context.add_init_script(KEEP_EVAL)
    page = context.new_page()
    page.goto(url)
    try:
        yield page
    finally:
        context.close()


def in_netron(browser: Browser, file: Path) -> tuple[int, float]:
    """Nodes on the page, seconds until they are there."""
    import netron

    port = free_port()
    start = time.perf_counter()
    netron.start(str(file), address=("localhost", port), browse=False)
    try:
        with page_of(browser, f"http://localhost:{port}", f"http://localhost:{port}") as page:
            page.wait_for_selector("g.graph-node", state="attached", timeout=60_000)
            seconds = time.perf_counter() - start
            return len(page.query_selector_all("g.graph-node")), seconds
    finally:
        netron.stop(("localhost", port))


def in_model_explorer(browser: Browser, command: str, file: Path) -> tuple[int, int, float]:
    """Nodes and layers that the page counts, seconds from the request to them."""
    port = free_port()
    server = subprocess.Popen(
        [command, str(file), "--no_open_in_browser", "--host", "localhost", "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert server.stdout is not None
        url = next(line.strip() for line in server.stdout if line.startswith("http"))
        start = time.perf_counter()
        with page_of(browser, url, f"http://localhost:{port}") as page:
            page.wait_for_function("/layer count\\s+\\d+/.test(document.body.innerText)", timeout=60_000)
            seconds, text = time.perf_counter() - start, page.inner_text("body")
        found = re.search(r"op node count\s+(\d+)\s+layer count\s+(\d+)", text)
        assert found is not None, text
        return int(found[1]), int(found[2]), seconds
    finally:
        server.terminate()
        server.wait(30)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--model-explorer", default="model-explorer", metavar="COMMAND")
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    chromium = os.environ.get("FXQ_CHROMIUM") or shutil.which("chromium")
    table = common.Table("viewers", "Recorded graphs in Netron and Model Explorer", True)
    with sync_playwright() as play, tempfile.TemporaryDirectory() as tmp:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"])
        for name in a.names or NETS:
            side = 224 if name == "swin_t" else 64
            m = fxq.compile(common.torchvision_net(name), "int8", calibration=[torch.randn(2, 3, side, side)], progress=False)
            nodes = m.history.snapshots[-1].nodes
            seen, s = in_netron(browser, m.save_graph(Path(tmp) / f"{name}.onnx"))
            ours, layers, t = in_model_explorer(browser, a.model_explorer, m.save_graph(Path(tmp) / f"{name}.json"))
            ends = sum(r.kind in ("input", "output") for r in m.history.snapshots[-1].rows)
            good = seen == nodes - ends and ours == nodes
            table.put(name, {
                "nodes": nodes, "Netron: nodes besides inputs and outputs": f"{seen} of {nodes - ends}", "Netron: s": round(s, 1),
                "Model Explorer: nodes": f"{ours} of {nodes}", "Model Explorer: layers": layers, "Model Explorer: s": round(t, 1), "all shown": good,
            })  # fmt: skip
        version = browser.version
        browser.close()
    fine = sum(bool(r["all shown"]) for r in table.rows.values())
    table.write([f"{fine} of {len(table.rows)} graphs show all their nodes in both viewers (Chromium {version}, headless, software rendering)"])


if __name__ == "__main__":
    main()
