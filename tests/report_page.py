"""A net, and its report opened in a browser, for the tests of the HTML report."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright
from torch import Tensor, nn

WIDE, PHONE = ViewportSize(width=1440, height=900), ViewportSize(width=390, height=844)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """Two blocks, a float island (sine) and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(self.layer1(self.stem(x)).mean((2, 3))))


@dataclass
class Opened:
    """A page with all that it complained of or asked the network for."""

    page: Page
    trouble: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()


@contextmanager
def chromium() -> Iterator[Browser]:
    """A started Chromium: that of ``$FXQ_CHROMIUM``, or the system's."""
    program = os.environ.get("FXQ_CHROMIUM") or shutil.which("chromium")
    assert program, "there is no Chromium: run make browser, or set FXQ_CHROMIUM"
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Browser, path: Path, size: ViewportSize = WIDE, scheme: str = "light") -> Opened:
    page = browser.new_context(viewport=size, color_scheme=scheme).new_page()  # type: ignore[arg-type]
    found = Opened(page)
    page.on("console", lambda m: found.trouble.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda e: found.trouble.append(f"error: {e}"))
    page.on("request", lambda r: None if r.url.startswith("file:") else found.trouble.append(f"request: {r.url}"))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    return found
