"""A lowered graph against the integer reference, value by value."""

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxq.backends.reference import Reference
from fxq.bitwise import lowered
from fxq.bitwise.program import BitProgram


class AnyProgram(BitProgram):
    """A program of a graph that need not have a layer on bits."""

    def __init__(self, gm: GraphModule) -> None:
        torch.nn.Module.__init__(self)
        self._adopt(lowered.lower(gm))


def differing(gm: GraphModule, *inputs: Tensor, program: BitProgram | None = None) -> list[str]:
    """Names of the values that are not equal to the reference's, bit for bit and of one type; of the output ``output``."""
    made = AnyProgram(gm) if program is None else program
    reference = Reference(gm)
    wanted, seen = reference.run(*inputs), made.values(*inputs)
    assert set(seen) <= set(wanted) and 2 * len(seen) >= len(wanted)
    bad = [k for k, v in seen.items() if v.dtype != wanted[k].dtype or not torch.equal(v, wanted[k])]
    pairs = zip(tree_leaves(made(*inputs)), tree_leaves(reference(*inputs)), strict=True)
    return bad + ([] if all(torch.equal(a, b) and not a.requires_grad for a, b in pairs) else ["output"])
