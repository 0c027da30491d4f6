"""How long does the HTML report take to make and to open, and how large is it?

Run: python benchmarks/bench_report.py [--fresh] [--pictures] [nets ...]

Each net is compiled with ``numbers=True``, reported with two images, and opened from disk in a headless Chromium: seconds until the page is drawn, then a click
on every pass: the milliseconds of the slowest one until its graph is drawn. Both are the least of ``--rounds`` fresh browser contexts: what else runs on the
machine can only add. Console messages and requests are counted: there must be none. ``chain_1000`` is a residual chain whose compiled graph has more than
1,000 nodes. Weights are random, with seeded batch-norm statistics. ``--pictures`` writes docs/report_NET.png.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import common
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from torch import Tensor, nn

import fxq
from fxq import zoo
from fxq.compiled import CompiledModel

NETS = ("resnet50", "mobilenet_v3_small", "swin_t", "nin_gc", "chain_1000")
PROVEN = ("mobilenet_v3_small", "nin_gc")
"""Small nets, whose artifact is verified first, so that the page shows the proof."""
DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZE = {"width": 1440, "height": 900}
SHOWN = {
    "resnet50": ("fold-bn", "layer1_0_conv2", "light"), "mobilenet_v3_small": ("legalize", "", "light"),
    "swin_t": ("convert", "features_1_0_attn_linear", "light"), "nin_gc": ("convert", "", "dark"),
}  # fmt: skip
"""Net -> the pass, the node (without a name one of the first that changed) and the colours of its picture."""


class Chain(nn.Module):
    """Residual blocks of two convolutions with batch norm."""

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


def net(name: str) -> tuple[nn.Module, Tensor]:
    """A net in eval mode and two inputs."""
    torch.manual_seed(0)
    if name == "chain_1000":
        return common.randomise(Chain(160)), torch.randn(2, 3, 16, 16)
    if name in zoo.NETS:
        return common.randomise(zoo.build(name)), torch.randn(2, *zoo.INPUTS[name])
    return common.torchvision_net(name), torch.randn(2, 3, 224, 224)


def opened(browser: Browser, path: Path, trouble: list[str]) -> tuple[Page, float]:
    """A fresh page, and the seconds until it was drawn."""
    page = browser.new_context(viewport=SIZE).new_page()  # type: ignore[arg-type]
    page.on("console", lambda m: trouble.append(m.text))
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith("file:") else trouble.append(r.url))
    start = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page, time.perf_counter() - start


def slowest_pass(page: Page) -> float:
    """Milliseconds of the slowest click on a pass, in the page's own clock, until the next frame."""
    script = """async () => {
      let most = 0;
      for (const b of document.querySelectorAll('#strip button')) {
        const start = performance.now();
        b.click();
        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        most = Math.max(most, performance.now() - start);
      }
      return most;
    }"""
    return float(page.evaluate(script))


def picture(browser: Browser, shown: Path, name: str) -> None:
    """docs/report_NET.png: a pass with a chosen node, in 256 colours."""
    wanted, node, scheme = SHOWN[name]
    page = browser.new_context(viewport=SIZE, color_scheme=scheme).new_page()  # type: ignore[arg-type]
    page.goto(shown.as_uri())
    page.wait_for_selector("body[data-ready]")
    page.click(f"#strip >> text={wanted}")
    if node:
        page.keyboard.press("/")
        page.keyboard.type(node)
        page.keyboard.press("Enter")
    else:
        page.locator("#graph .node.changed, #graph .node.added").nth(1).click()
    path = DOCS / f"report_{name}.png"
    page.screenshot(path=path)
    page.context.close()
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def row(m: CompiledModel, x: Tensor, name: str, browser: Browser, folder: Path, rounds: int, pictures: bool) -> dict[str, Any]:
    """Make, open, click."""
    proof = m.verify(m.lower(), x[:1]) if name in PROVEN else None
    start = time.perf_counter()
    path = m.report(folder / f"{name}.html", x, title=name, proof=proof)
    made, trouble, seconds, clicks = time.perf_counter() - start, list[str](), [], []
    for _ in range(rounds):
        page, s = opened(browser, path, trouble)
        seconds.append(s)
        clicks.append(slowest_pass(page))
        page.context.close()
    if pictures and name in SHOWN:
        picture(browser, path, name)
    return {
        "nodes": max(s.nodes for s in m.history), "passes": len(m.history), "MB": f"{path.stat().st_size / 1e6:.2f}", "make s": f"{made:.1f}",
        "open s": f"{min(seconds):.2f}", "slowest pass ms": round(min(clicks)), "console messages and requests": len(trouble),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fresh", action="store_true", help="forget all finished rows")
    p.add_argument("--pictures", action="store_true", help="write docs/report_NET.png")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("names", nargs="*", metavar="nets")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    table = common.Table("report", "The HTML report: how large, how long to make, how long to open", a.fresh)
    program = os.environ.get("FXQ_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name in a.names or NETS:
            model, x = net(name)
            m = fxq.compile(model, "int8", calibration=x, progress=False, numbers=True)
            table.put(name, row(m, x, name, browser, Path(folder), a.rounds, a.pictures))
        version = browser.version
        browser.close()
    table.write([
        "nodes: of the largest state; make: without compiling, with two inputs for the histograms; MB: of the one file",
        f"open: least of {a.rounds} fresh contexts of Chromium {version}, headless, from disk, until the first graph is drawn",
        "slowest pass: from the click until its graph is drawn; least of the contexts",
        "console messages and requests: errors, warnings, logs and everything that is not the file itself",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
