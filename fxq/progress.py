"""Progress of a compilation: a bar on a terminal or in a notebook, plain lines in a pipe where they are asked for."""

from __future__ import annotations

import sys
from typing import Any


class ProgressBar:
    """Context manager that gives a progress callback, ``(what, done, total)``; everything goes to stderr.

    Args:
        lines: without a terminal, print a line for each new step instead of nothing.
    """

    def __init__(self, lines: bool = False) -> None:
        self.lines, self.last = lines, ""
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty() or "ipykernel" in sys.modules:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("compile", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """One step; ``total`` is ``None`` while it is not known."""
        if self.bar is not None:
            self.bar.update(self.task, description=what, completed=done, total=total)
        elif self.lines and what != self.last:
            print(f"fxq: {what}", file=sys.stderr, flush=True)
        self.last = what
