"""Progress of a run: a bar that goes and lines that stay on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

EVERY = 60.0
"""Seconds between the lines of an epoch in a pipe."""


class Show:
    """Context manager; ``quiet`` (of all processes but the first) shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.task: Any = None
        self.last = time.monotonic()

    def __enter__(self) -> Show:
        if not self.quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
            self.bar = Progress(*columns, transient=True)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def epoch(self, name: str, done: int, total: int) -> None:
        """A new epoch of ``total`` steps, of which ``done`` are done."""
        self.last = time.monotonic()
        if self.bar is not None:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(name, completed=done, total=total, state="")

    def step(self, name: str, done: int, total: int, state: str) -> None:
        """A step is done; ``state``: loss, accuracy, speed."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, state=state)
        elif not self.quiet and time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            print(f"{name}: step {done} of {total}, {state}", flush=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif not self.quiet:
            print(text, flush=True)
