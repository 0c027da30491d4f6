"""What every backend is: ``check`` says what it cannot take, ``lower`` returns the whole artifact or raises."""

from __future__ import annotations

import contextlib
import os
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch.fx import GraphModule

from fxq.errors import ArtifactError, LoweringError
from fxq.schemes import Scheme
from fxq.targets import Target


@dataclass(frozen=True)
class Issue:
    """One reason why a graph cannot be lowered: the node, the fact and the way out."""

    node: str
    fact: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.node}: {self.fact}. {self.way_out}"


@dataclass(frozen=True)
class Artifact:
    """A finished file in memory.

    Attributes:
        backend: name of the backend that made it.
        data: the file's bytes.
        info: facts for the user (bytes by part, notes), JSON-able.
    """

    backend: str
    data: bytes
    info: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the whole file or nothing (temporary file beside it, then an atomic rename).

        Raises:
            ArtifactError: when the file exists and ``force`` is false, it is a folder, or it cannot be written.
        """
        target = Path(path)
        tmp: str | None = None
        try:
            if target.is_dir():
                raise ArtifactError("it is a folder", where=str(target), way_out="Give the name of a file")
            if os.path.lexists(target) and not force:
                raise ArtifactError("the file exists", where=str(target), way_out="Pass force=True (--force) or choose another name")
            fd, tmp = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".part", dir=target.parent)
            with os.fdopen(fd, "wb") as f:
                f.write(self.data)
                f.flush()
                os.fsync(f.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(tmp, 0o666 & ~mask)
            os.replace(tmp, target)
        except BaseException as e:  # a KeyboardInterrupt must not leave the temporary file behind either
            if tmp is not None:
                with contextlib.suppress(OSError):
                    os.unlink(tmp)
            if not isinstance(e, (OSError, ValueError)):  # ValueError: a name with a null byte
                raise
            way_out = "Check that the folder exists and is writable"
            raise ArtifactError(f"cannot write: {getattr(e, 'strerror', None) or e}", where=str(target), way_out=way_out) from e
        return target


def contents(source: str | os.PathLike[str] | bytes | Artifact) -> tuple[bytes, str]:
    """An artifact's bytes, and its name for errors.

    Args:
        source: path, bytes, or the artifact itself.

    Raises:
        ArtifactError: when the file cannot be read, or it is something else.
    """
    if isinstance(source, Artifact):
        source = source.data
    if isinstance(source, bytes):
        return source, "artifact"
    if not isinstance(source, (str, os.PathLike)):
        raise ArtifactError(f"{type(source).__name__} is no artifact", way_out="Give a path, bytes, or what lower(...) returned")
    try:
        return Path(source).read_bytes(), os.fspath(source)
    except OSError as e:
        raise ArtifactError(f"cannot be read: {e.strerror or e}", where=os.fspath(source), way_out="Check the path") from e


class Lowering(ABC):
    """A backend. Subclasses set ``name`` and never change the graph."""

    name: ClassVar[str]

    @abstractmethod
    def check(self, gm: GraphModule, scheme: Scheme, target: Target) -> list[Issue]:
        """Everything that keeps ``gm`` from being lowered; empty when nothing does."""

    @abstractmethod
    def emit(self, gm: GraphModule, scheme: Scheme, target: Target) -> Artifact:
        """The artifact of a graph that passed ``check``."""

    def lower(self, gm: GraphModule, scheme: Scheme, target: Target) -> Artifact:
        """``check``, then ``emit``.

        Raises:
            LoweringError: with all findings, when ``check`` found any.
        """
        issues = self.check(gm, scheme, target)
        if issues:
            more = f" (and {len(issues) - 1} more)" if len(issues) > 1 else ""
            raise LoweringError(issues[0].fact + more, where=issues[0].node, way_out=issues[0].way_out, issues=issues)
        return self.emit(gm, scheme, target)
