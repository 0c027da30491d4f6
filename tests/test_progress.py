"""The progress bar: on a terminal, in a pipe, switched off."""

import io
import sys

import pytest
import torch
from torch import nn

import fxq
from fxq.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def compiled(**how: object) -> None:
    fxq.compile(nn.Conv2d(3, 4, 3).eval(), calibration=torch.randn(4, 3, 8, 8), **how)  # type: ignore[arg-type]


def test_a_bar_on_a_terminal_and_none_when_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    compiled(progress=False)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
    compiled()
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "done" in text and "100%" in text


def test_nothing_in_a_pipe_unless_lines_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    compiled()
    assert capsys.readouterr() == ("", "")
    with ProgressBar(lines=True) as bar:
        for done in range(3):
            bar("calibrate", done, 3)
        bar("convert", 0, None)
    assert capsys.readouterr() == ("", "fxq: calibrate\nfxq: convert\n")


def test_the_bar_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = ProgressBar()
    with pytest.raises(ZeroDivisionError), bar:
        raise ZeroDivisionError
    assert not bar.bar.live.is_started
