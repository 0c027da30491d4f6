"""What is asked of weight sharing: :class:`Share`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

from fxq.errors import SchemeError, nearest

INITS = ("optimal", "linear", "quantile", "density")
MOST_BITS = 12


@dataclass(frozen=True)
class Share:
    """Weights of a layer share the values of a codebook (Han et al. 2016, arXiv 1510.00149, section 3). A weight of 0 keeps a code of its own.

    Attributes:
        bits: of conv and transposed conv layers: at most ``2 ** bits`` values besides 0, 1 to 12.
        linear_bits: of linear layers; ``None``: as ``bits``.
        init: how the values are found, one of :data:`INITS`: ``optimal`` is exact one-dimensional k-means, the others are starts (``linear`` and ``density``
            those of the paper) with Lloyd's iterations behind them (:func:`fxq.kmeans.codebook`).
        rate: weight of the codes' entropy beside the squared error: larger means a smaller archive and a coarser codebook; 0: none
            (:func:`fxq.kmeans.codebook` has the units). With ``init="optimal"`` only.
        layers: pattern (``fnmatch``) of module paths -> bits of their own; the first that fits counts. Of layers that use one weight the first decides.

    Raises:
        SchemeError: for bits, words or rates that do not exist.
    """

    bits: int = 5
    linear_bits: int | None = None
    init: str = "optimal"
    rate: float = 0.0
    layers: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not all(isinstance(k, str) for k in self.layers):
            raise SchemeError(f"layers={self.layers!r} does not map patterns to bits", way_out="Give a dict such as {'features.*': 5}")
        for name, bits in (("bits", self.bits), ("linear_bits", self.linear_bits), *((f"layers[{k!r}]", v) for k, v in self.layers.items())):
            if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MOST_BITS):
                raise SchemeError(f"{name}={bits!r} is no width of a codebook", way_out=f"Use 1 to {MOST_BITS}")
        if self.init not in INITS:
            raise SchemeError(f"unknown init {self.init!r}", way_out=nearest(str(self.init), INITS))
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not 0 <= self.rate < float("inf"):
            raise SchemeError(f"rate={self.rate!r} is no weight of the entropy", way_out="Use 0 or a small positive number")
        if self.rate and self.init != "optimal":
            raise SchemeError(f"rate={self.rate!r} with init={self.init!r}: only optimal codebooks weigh the entropy", way_out="Use init='optimal', or rate=0")

    @property
    def most(self) -> int:
        """The widest codebook's bits."""
        return max(self.bits, self.linear_bits or 0, *self.layers.values())

    def bits_of(self, path: str, linear: bool) -> int:
        """Bits of the layer at a module path."""
        own = next((b for pattern, b in self.layers.items() if fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, pattern + ".*")), None)
        if own is not None:
            return own
        return self.linear_bits if linear and self.linear_bits is not None else self.bits
