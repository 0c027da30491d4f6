"""Schemes: which grid each role gets, and how its range is found. A scheme is data; users register their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxq.errors import SchemeError, nearest
from fxq.spec import QuantSpec

METHODS = ("float", "static", "dynamic", "weight-only")
OBSERVERS = ("minmax", "ema", "percentile", "mse", "entropy")
ROUNDINGS = ("nearest", "feedback")


@dataclass(frozen=True)
class Scheme:
    """A named choice of grids.

    Attributes:
        name: ``<method>_w<bits>a<bits>[_variant]``.
        method: ``float``, ``static`` (ranges from calibration), ``dynamic`` (activation ranges at run time, linear
            layers only) or ``weight-only``.
        weight: codes of the weights, with ``axis=0`` for one scale per output channel (transposed convs use axis 1); blocks of
            weight-only linear layers run along the input features, ``axis=1``.
        activation: codes of the activations; ``None`` for float activations.
        activation_observer, weight_observer: one of :data:`OBSERVERS`.
        bias_correction: shift biases by the mean output error that weight rounding causes on the calibration data
            (Nagel et al. 2019, arXiv 1906.04721, section 4.2).
        weight_rounding: ``nearest``, or ``feedback``: so that the layer's output on the calibration data moves least
            (Frantar et al. 2022, arXiv 2210.17323); it corrects the biases as well.
        summary: one line for ``--list schemes``.
    """

    name: str
    method: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    activation_observer: str = "ema"
    weight_observer: str = "minmax"
    bias_correction: bool = False
    weight_rounding: str = "nearest"
    summary: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SchemeError(f"scheme {self.name!r} has the unknown method {self.method!r}", way_out="Use one of " + ", ".join(METHODS))
        for role in (self.activation_observer, self.weight_observer):
            if role not in OBSERVERS:
                raise SchemeError(f"scheme {self.name!r} names the unknown observer {role!r}", way_out=nearest(role, OBSERVERS))
        if self.weight_rounding not in ROUNDINGS:
            way_out = "Use " + " or ".join(ROUNDINGS)
            raise SchemeError(f"scheme {self.name!r} names the unknown rounding {self.weight_rounding!r}", way_out=way_out)
        if self.method != "float" and self.weight is None:
            raise SchemeError(f"scheme {self.name!r} quantizes nothing: it has no weight grid")
        if self.weight is not None and self.weight.block is not None and self.method != "weight-only":
            raise SchemeError(f"scheme {self.name!r} is {self.method}, blocks of weights are for weight-only schemes", way_out="Use axis=0 without a block")
        if self.method in ("static", "dynamic") and self.activation is None:
            raise SchemeError(f"scheme {self.name!r} is {self.method} but has no activation grid")

    @property
    def reconstructs(self) -> bool:
        """A pass behind ``convert`` measures on calibration batches."""
        return self.bias_correction or self.weight_rounding != "nearest"

    def weight_spec(self, kind: str) -> QuantSpec:
        """Codes of the weight of a ``conv``, ``conv_transpose`` or ``linear``."""
        assert self.weight is not None
        if self.weight.axis is None or self.weight.block is not None or kind != "conv_transpose":
            return self.weight
        return replace(self.weight, axis=1)


_TABLE: dict[str, Scheme] = {}


def register(scheme: Scheme) -> Scheme:
    """Make ``scheme`` known by its name.

    Raises:
        SchemeError: when another scheme has that name.
    """
    if _TABLE.get(scheme.name, scheme) != scheme:
        raise SchemeError(f"a scheme called {scheme.name!r} exists already", way_out="Choose another name")
    _TABLE[scheme.name] = scheme
    return scheme


def get(scheme: str | Scheme) -> Scheme:
    """Scheme by name; a :class:`Scheme` is returned as it is.

    Raises:
        SchemeError: for an unknown name; the nearest one is offered.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise SchemeError(f"a scheme is a name or a Scheme, not {scheme!r}", way_out=nearest("", _TABLE))
    if scheme not in _TABLE:
        raise SchemeError(f"unknown scheme {scheme!r}", way_out=nearest(scheme, _TABLE))
    return _TABLE[scheme]


def names() -> list[str]:
    """Names of all registered schemes, in order of registration."""
    return list(_TABLE)


U8, S8, S8N = QuantSpec.parse("u8/pt"), QuantSpec.parse("s8/pt"), QuantSpec.parse("s8n/pc0")
S8A, S4N = QuantSpec.parse("s8a/pc0"), QuantSpec.parse("s4n/pc0")

register(Scheme("float", "float", summary="no quantization: capture, fold, lower"))
register(Scheme("iao_w8a8", "static", S8N, U8, summary="u8 asymmetric activations, s8 per-channel weights: fastest in ONNX Runtime"))
register(Scheme("iao_w8a8_pt", "static", S8N.per_tensor(), U8, summary="iao_w8a8 with one weight scale per tensor"))
register(Scheme("iao_w8a8_asymw", "static", S8A, U8, summary="iao_w8a8 with asymmetric weights"))
register(Scheme("iao_w8a8_sym", "static", S8N, S8, summary="signed symmetric everywhere: what TensorRT needs"))
register(Scheme("iao_w8a8_sym_pt", "static", S8N.per_tensor(), S8, summary="iao_w8a8_sym with one weight scale per tensor"))
register(
    Scheme(
        "iao_w4a8",
        "static",
        S4N,
        U8,
        weight_observer="mse",
        bias_correction=True,
        weight_rounding="feedback",
        summary="4-bit weights in [-7, 7], rounded with error feedback; u8 activations",
    )
)
register(Scheme("dynamic_w8", "dynamic", S8N.per_tensor(), U8, summary="linear layers: s8 weights, activation ranges at run time"))
register(Scheme("weight_only_w8", "weight-only", S8N, summary="s8 weights, float arithmetic"))
F8 = QuantSpec.parse("f8/pc0")
register(Scheme("fp8_w8a8", "static", F8, F8.per_tensor(), summary="8-bit floats (E4M3): TensorRT from compute capability 8.9 on"))
for _name, _block in (("weight_only_w4", 128), ("weight_only_w4_b64", 64), ("weight_only_w4_b32", 32)):
    _spec = QuantSpec.parse(f"s4/pb{_block}x1")
    register(Scheme(_name, "weight-only", _spec, summary=f"linear layers: s4 weights, a scale for each {_block} input features; float arithmetic"))
