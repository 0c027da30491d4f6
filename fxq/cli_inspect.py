"""The subcommand ``fxq inspect``: what is inside of an archive."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Add ``inspect`` to the subcommands of ``fxq``."""
    p = commands.add_parser("inspect", help="what is inside of an archive: tensors, codings, bytes; nothing is decoded", description=run.__doc__)
    p.add_argument("file", metavar="FILE.fxq")
    p.add_argument("--json", action="store_true", help="print it as JSON")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> int:
    """Show what is inside of an archive, from its index alone. Exit code 0; 2: no archive, or a damaged index."""
    from fxq.archived import inspect

    found = inspect(a.file)
    print(json.dumps(found.to_json(), indent=1) if a.json else found)
    return 0
