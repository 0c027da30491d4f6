"""What fxq says when something is wrong: every error names the place, the fact and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxqError(Exception):
    """Base of all errors that a user of fxq can cause or meet.

    Args:
        fact: what is wrong, one sentence.
        where: the pass, node or file concerned, if there is one.
        way_out: what the user can do about it.
    """

    def __init__(self, fact: str, *, where: str | None = None, way_out: str | None = None) -> None:
        self.fact, self.where, self.way_out = fact, where, way_out
        head = f"{where}: {fact}" if where else fact
        super().__init__(f"{head}. {way_out}" if way_out else head)


class TraceError(FxqError):
    """The model cannot be captured; ``where`` is ``file:line`` of the expression."""


class SchemeError(FxqError):
    """Unknown or impossible scheme, or a scheme that the target does not execute."""


class TargetError(FxqError):
    """Unknown target or backend, or a graph that the target cannot take."""


class CalibrationError(FxqError):
    """Calibration data is missing, empty, ragged or not finite."""


class PassError(FxqError):
    """A pass broke an invariant or cannot run on this graph; ``where`` is ``pass / node``."""


class LoweringError(FxqError):
    """A backend refused the graph. ``issues`` holds every finding, not only the first."""

    def __init__(
        self,
        fact: str,
        *,
        where: str | None = None,
        way_out: str | None = None,
        issues: Iterable[object] = (),
    ) -> None:
        super().__init__(fact, where=where, way_out=way_out)
        self.issues = tuple(issues)


class ArtifactError(FxqError):
    """An artifact cannot be read, written or executed."""


class ArchiveError(ArtifactError):
    """An archive is damaged, hostile, too new, or larger than what may be decoded; ``where`` is the file and the tensor concerned."""


class EngineError(FxqError):
    """A TensorRT engine cannot be built, read or run; ``where`` is the ONNX node, the input or the file concerned."""


class InputError(FxqError):
    """A model source, weight file, image folder or other input on the command line is not usable."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for a mistyped name, or the list of all names when nothing is near."""
    names = sorted(known)
    hit = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {hit[0]!r}?" if hit else "known: " + ", ".join(names)
