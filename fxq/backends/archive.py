"""Lowering to an archive: graph, scheme and entropy-coded weights in one file, which :func:`fxq.load` gives back as a model (``docs/archive.md``)."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from fxq import __version__, archive_report, targets
from fxq.archive import encoder
from fxq.archive.decoder import Archive
from fxq.archive_items import DTYPES, ENTRIES, plan, require_writable
from fxq.errors import ArtifactError, LoweringError, nearest
from fxq.lowering import Artifact, Issue, Lowering
from fxq.schemes import Scheme
from fxq.shared import SharedWeight
from fxq.targets import Target


class ArchiveBackend(Lowering):
    """Any compiled graph as an archive.

    Args:
        coding: ``auto`` takes the smallest for each tensor; ``rans``, ``huffman`` or ``raw`` for all that it can code.

    Raises:
        LoweringError: for an unknown coding.
    """

    name: ClassVar[str] = "archive"
    run: ClassVar[str] = ""
    """What :func:`fxq.load` makes of the file; empty for a compiled model."""

    def __init__(self, coding: str = "auto") -> None:
        if coding not in encoder.CODINGS:
            raise LoweringError(f"unknown coding {coding!r}", way_out=nearest(str(coding), encoder.CODINGS))
        self.coding = coding

    def check(self, gm: GraphModule, scheme: Scheme, target: Target) -> list[Issue]:
        """Types of tensors, sizes of codebooks, targets and modules that an archive does not hold."""
        found = []
        if target.name not in targets.names() or targets.get(target.name) != target:
            found.append(Issue("model", f"the target {target.name!r} is not registered", "Give it a name of its own and call fxq.targets.register"))
        for path, m in gm.named_modules():
            for name, t in [*m._parameters.items(), *m._buffers.items()]:
                if t is not None and (t.dtype not in DTYPES or t.layout != torch.strided or t.device.type == "meta"):
                    where = f"{path}.{name}".lstrip(".")
                    found.append(Issue(where, f"an archive holds no tensor of type {t.dtype}, {t.layout}", "Convert it to float32 or an integer type"))
            if isinstance(m, SharedWeight) and len(m.book) >= ENTRIES:
                fact = f"a codebook of {len(m.book):,} entries is too large, the greatest has {ENTRIES - 1:,}"
                found.append(Issue(path, fact, "Share weights with fewer bits"))
        if not found:
            try:
                require_writable(gm)
            except ArtifactError as e:
                found.append(Issue(e.where or "model", e.fact, e.way_out or ""))
        return found

    def emit(self, gm: GraphModule, scheme: Scheme, target: Target) -> Artifact:
        """The file's bytes, which were decoded once; ``info`` has the report as JSON and as text, and the bytes by part."""
        start = time.perf_counter()
        made = plan(gm, scheme, target, self.coding != "raw")
        made.head.update({"run": self.run} if self.run else {})
        data, stats, overhead = encoder.write(made.items(), made.head, coding=self.coding, version=__version__)
        encoded = time.perf_counter()
        with Archive(data, max_bytes=1 << 62) as archive:
            for r in archive.records:
                archive.dense(r)
        decoded = time.perf_counter()
        found = archive_report.report(stats, overhead)
        found = replace(found, encode_mb_s=found.dense / 1e6 / (encoded - start), decode_mb_s=found.dense / 1e6 / (decoded - encoded))
        info: dict[str, Any] = {"archive": found.to_json(), "table": str(found), "bytes": {"total": len(data), "dense": found.dense, "index": overhead.index}}
        return Artifact(self.name, data, info)
