"""The options of ``fxq-lower`` for pruning."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fxq.errors import InputError

if TYPE_CHECKING:
    from fxq.pruning import Prune

AMOUNTS = {"prune": "ratio", "prune_macs": "macs", "prune_parameters": "parameters", "prune_bytes": "bytes"}
"""Option -> field of :class:`fxq.pruning.Prune`."""
WITH = ("multiple_of", "prune_by", "prune_scope", "prune_keep", "prune_at_least")


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the group to a parser."""
    g = p.add_argument_group("pruning", "cut channels for real before anything else; one of the first four says how much")
    g.add_argument("--prune", type=float, metavar="R", help="share of the channels to cut, in [0, 1)")
    for name in ("macs", "parameters", "bytes"):
        g.add_argument(f"--prune-{name}", type=float, metavar="S", help=f"share of the {name} that may stay, in (0, 1]")
    g.add_argument("--multiple-of", type=int, metavar="N", help="widths are multiples of it (default: what the target's kernels like)")
    g.add_argument("--prune-by", metavar="CRITERION", help="bn-gamma, l1, l2 (default), group-l2, taylor or random")
    g.add_argument("--prune-scope", metavar="SCOPE", help="global (default): all channels are ranked together; layer: the same share of each layer")
    g.add_argument("--prune-keep", action="append", default=[], metavar="PATTERN", help="layers that stay whole (fnmatch on the module path)")
    g.add_argument("--prune-at-least", type=float, metavar="S", help="share of each layer that stays in any case")


def request(a: argparse.Namespace) -> Prune | None:
    """What the options ask for, or ``None``.

    Raises:
        InputError: an option without an amount.
        PassError: a request that makes no sense.
    """
    amounts = {field: getattr(a, option) for option, field in AMOUNTS.items() if getattr(a, option) is not None}
    if not amounts:
        lost = next((o for o in WITH if getattr(a, o)), None)
        if lost is not None:
            raise InputError(f"--{lost.replace('_', '-')} is for pruning", way_out="Add --prune 0.5, or --prune-macs 0.5")
        return None
    from fxq.pruning import Prune

    given: dict[str, Any] = {"multiple_of": a.multiple_of, "by": a.prune_by, "scope": a.prune_scope, "keep": tuple(a.prune_keep), "at_least": a.prune_at_least}
    return Prune(**amounts, **{k: v for k, v in given.items() if v is not None})
