"""legalize: forms that the target can execute in integers for operations that it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from fxq import forms, forms_shuffle, forms_tidy, forms_unpack
from fxq.errors import PassError, nearest
from fxq.graph import walk
from fxq.pipeline import Pass, PassContext
from fxq.weight_masks import PATTERN

FORMS: dict[str, forms.Form] = {
    "tidy": forms_tidy.tidy,
    "constants": forms.constants,
    "batch-norm": forms.batch_norm,
    "hardswish": forms.hardswish,
    "silu": forms.silu,
    "avg-pool": forms.avg_pool,
    "merge-pad": forms.merge_pad,
    "relu-first": forms.relu_first,
    "resize-point": forms.resize_point,
    "prelu": forms.prelu,
    "shuffle": forms_shuffle.shuffle,
    "unpack": forms_unpack.unpack,
}
ALWAYS = ("tidy", "merge-pad")
"""Forms that save operations in float arithmetic as well."""

MIXES = ("shuffle",)
"""Forms that rewrite the weights of layers whose batch norm was folded: not for a graph that will be trained."""

FIXES = ("batch-norm",)
"""Forms that fix what low-bit nets cannot do without in training: their batch norms."""


@dataclass(frozen=True)
class Legalize(Pass):
    """Apply the forms named in ``target.forms``, in their order; the function stays the same up to float rounding.

    Weights in a pattern (2:4) keep the order of their channels, and with it the shuffles between them.
    Without activation grids (schemes that are not ``static``) only the forms of :data:`ALWAYS` are applied.

    Raises:
        PassError: when the target names a form that does not exist.
    """

    name: ClassVar[str] = "legalize"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "shapes-known")
    tolerance: ClassVar[float | None] = 1e-4

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        for name in ctx.target.forms:
            if name not in FORMS:
                fact = f"target {ctx.target.name!r} names the unknown form {name!r}"
                raise PassError(fact, where=self.name, way_out=nearest(name, FORMS))
        left, pattern = (*MIXES, *FIXES) if ctx.scheme.trains else MIXES, gm.meta.get(PATTERN)
        wanted = [f for f in ctx.target.forms if (ctx.scheme.method == "static" or f in ALWAYS) and not (ctx.train and f in left)]
        if pattern is not None and "shuffle" in wanted and list(walk(gm, "index_select")):
            wanted.remove("shuffle")
            ctx.skip("shuffle", f"the pattern {pattern} of the weights needs their channels in this order")
        return sum(FORMS[f](gm, ctx) for f in wanted)
