"""The options of ``fxq-lower`` for pruning and for weights that share codebooks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fxq.errors import InputError

if TYPE_CHECKING:
    from fxq.pruning import Prune
    from fxq.sharing import Share

SHARE = {"share_bits": "bits", "share_linear_bits": "linear_bits", "share_init": "init", "share_rate": "rate"}
"""Option -> field of :class:`fxq.sharing.Share`."""
AMOUNTS = {"prune": "ratio", "prune_macs": "macs", "prune_parameters": "parameters", "prune_bytes": "bytes"}
"""Option -> field of :class:`fxq.pruning.Prune`."""
WITH = ("multiple_of", "prune_by", "prune_scope", "prune_keep", "prune_at_least")


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the group to a parser."""
    g = p.add_argument_group("pruning", "cut channels for real before anything else; one of the first four says how much")
    g.add_argument("--prune", type=float, metavar="R", help="share of the channels to cut, in [0, 1)")
    for name in ("macs", "parameters", "bytes"):
        g.add_argument(f"--prune-{name}", type=float, metavar="S", help=f"share of the {name} that may stay, in (0, 1]")
    g.add_argument("--sparsity", type=float, metavar="R", help="share of the single weights that become 0, by magnitude, in [0, 1); also without the above")
    g.add_argument("--sparsity-scope", metavar="SCOPE", help="global (default): the least of all layers; layer: of each; sensitivity: what moves it least")
    g.add_argument("--multiple-of", type=int, metavar="N", help="widths are multiples of it (default: what the target's kernels like)")
    g.add_argument("--prune-by", metavar="CRITERION", help="bn-gamma, l1, l2 (default), group-l2, taylor or random")
    g.add_argument("--prune-scope", metavar="SCOPE", help="global (default): all channels are ranked together; layer: the same share of each layer")
    g.add_argument("--prune-keep", action="append", default=[], metavar="PATTERN", help="layers that stay whole (fnmatch on the module path)")
    g.add_argument("--prune-at-least", type=float, metavar="S", help="share of each layer that stays in any case")
    s = p.add_argument_group("sharing", "weights of each layer share the values of a codebook; schemes deepcomp_w5, deepcomp_w8_fc5 and so on do without these")
    s.add_argument("--share-bits", type=int, metavar="B", help="at most 2^B values in a conv layer, besides 0")
    s.add_argument("--share-linear-bits", type=int, metavar="B", help="in a linear layer (default: as --share-bits)")
    s.add_argument("--share-init", metavar="NAME", help="optimal (default), linear, quantile or density")
    s.add_argument("--share-rate", type=float, metavar="R", help="weight of the codes' entropy beside the squared error (default 0)")


def request(a: argparse.Namespace) -> Prune | None:
    """What the options ask for, or ``None``.

    Raises:
        InputError: an option without an amount.
        PassError: a request that makes no sense.
    """
    amounts = {field: getattr(a, option) for option, field in AMOUNTS.items() if getattr(a, option) is not None}
    if a.sparsity is None and a.sparsity_scope is not None:
        raise InputError("--sparsity-scope is for single weights", way_out="Add --sparsity 0.9")
    if a.sparsity is not None:
        amounts |= {"sparsity": a.sparsity, "sparsity_scope": a.sparsity_scope or "global"}
    if not amounts:
        lost = next((o for o in WITH if getattr(a, o)), None)
        if lost is not None:
            raise InputError(f"--{lost.replace('_', '-')} is for pruning", way_out="Add --prune 0.5, or --prune-macs 0.5")
        return None
    from fxq.pruning import Prune

    given: dict[str, Any] = {"multiple_of": a.multiple_of, "by": a.prune_by, "scope": a.prune_scope, "keep": tuple(a.prune_keep), "at_least": a.prune_at_least}
    return Prune(**amounts, **{k: v for k, v in given.items() if v is not None})


def share(a: argparse.Namespace) -> Share | None:
    """What the options of sharing ask for, or ``None``.

    Raises:
        InputError: an option without ``--share-bits``.
        SchemeError: a request that makes no sense.
    """
    given = {field: getattr(a, option) for option, field in SHARE.items() if getattr(a, option) is not None}
    if given and "bits" not in given:
        lost = next(o for o in SHARE if getattr(a, o) is not None)
        raise InputError(f"--{lost.replace('_', '-')} is for shared weights", way_out="Add --share-bits 5")
    from fxq.sharing import Share

    return Share(**given) if given else None
