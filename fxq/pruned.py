"""What :func:`fxq.prune` returns: a pruned float model, to be fine-tuned, compiled, saved."""

from __future__ import annotations

from torch.fx import GraphModule

from fxq.compiled import CompiledModel
from fxq.errors import FxqError


class PrunedModel(CompiledModel):
    """A float graph with fewer channels; its batch norms are its own layers, so it trains like the model it was made from.

    Fine-tune it in your loop, then pass it to :func:`fxq.compile`; or lower it as it is (``m.lower("onnx")``), with its batch norms as they stand.

    Attributes:
        prune_report: what was cut; None of a model read from a file.
    """

    uncut: tuple[GraphModule, ...] = ()  # in a tuple, so that its parameters are none of this model's

    def masked(self) -> GraphModule:
        """The uncut graph with masks, in eval mode: it gives what this model gave before any fine-tuning.

        Raises:
            FxqError: of a model read from a file, which has no uncut graph any more.
        """
        if not self.uncut:
            raise FxqError("the uncut graph is not kept in a file", way_out="Prune the model again to compare")
        return self.uncut[0]
