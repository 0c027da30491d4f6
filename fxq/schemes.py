"""Schemes: which grid each role gets, and how its range is found. A scheme is data; users register their own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from fxq.errors import SchemeError, nearest
from fxq.sharing import Share
from fxq.spec import QuantSpec

METHODS = ("float", "static", "dynamic", "weight-only")
OBSERVERS = ("minmax", "ema", "percentile", "mse", "entropy")
ROUNDINGS = ("nearest", "feedback")
WEIGHTS = ("range", "lsq", "dorefa", "sign", "ternary")
ACTIVATIONS = ("range", "lsq", "clip", "pact", "sign", "ternary")
ROLES = ("first", "last", "shortcut", "last_input")
STES = ("saturate", "identity", "soft", "approx", "tanh")


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

    Low-bit schemes also say (:mod:`fxq.lowbit` has the formulas and their sources):

        weights: how float weights become codes, one of :data:`WEIGHTS`: by their range, on a learned step, DoReFa's tanh, sign, ternary.
        activations: how the activations that weighted layers read become codes, one of :data:`ACTIVATIONS`: by their range, on a learned step,
            clipped at a constant or at a learned value, sign, ternary.
        stream: codes of all other values (sums, what float layers read), ``None`` for those of ``activation``.
        float_layers, int8_layers: roles (:data:`ROLES`) of layers that stay float or int8: the first, the last, those on shortcuts of residual
            blocks, and, in ``int8_layers``, ``last_input`` for the input of the last layer alone.
        ste: gradient of the sign and of the ternary activation, one of :data:`STES`.
        scaled: binary weights have the scale ``mean |w|`` of their channel; otherwise 1.
        centre: the mean over the input channels is taken off binary weights first. masked: no gradient to binary weights outside (-1, 1).
        box_scale: XNOR-Net's ``K``: outputs are multiplied by the local mean of ``|x|``.
        exact: the ternary threshold of least error instead of ``0.7 mean |w|``.
        compat: DoReFa's older form: weights scaled to [-1, 1], activations ``x / clip`` to [0, 1].
        clip: where ``clip`` and ``pact`` start without calibration data, and where ``compat`` always clips.
        order: ``B-A-C-P``: poolings move in front of batch norm and activation, right behind the layer; ``C-B-A-P``: behind them; empty: as they are.
        batch_norm: ``folded``: weights are rounded with the batch norm folded in; ``plain``: as they are, and the scale takes it over.
        share: weights of each layer share the values of a codebook (:class:`fxq.sharing.Share`), or ``None``.
        auto: layers that run faster in int8 than as the scheme has them become 8-bit ones (:mod:`fxq.auto_lowbit`).
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
    weights: str = "range"
    activations: str = "range"
    stream: QuantSpec | None = None
    float_layers: tuple[str, ...] = ()
    int8_layers: tuple[str, ...] = ()
    ste: str = "saturate"
    scaled: bool = True
    centre: bool = False
    masked: bool = False
    box_scale: bool = False
    exact: bool = False
    compat: bool = False
    clip: float = 10.0
    order: str = ""
    batch_norm: str = "folded"
    share: Share | None = None
    auto: bool = False

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
        self._check_lowbit()

    def _check_lowbit(self) -> None:
        """The words of the low-bit fields, and that they fit each other."""
        words: tuple[tuple[str, str, tuple[str, ...]], ...] = (
            ("weights", self.weights, WEIGHTS), ("activations", self.activations, ACTIVATIONS), ("ste", self.ste, STES),
            ("order", self.order, ("", "B-A-C-P", "C-B-A-P")), ("batch_norm", self.batch_norm, ("folded", "plain")),
            *(("float_layers", r, ROLES[:3]) for r in self.float_layers), *(("int8_layers", r, ROLES) for r in self.int8_layers),
        )  # fmt: skip
        for name, word, known in words:
            if word not in known:
                raise SchemeError(f"scheme {self.name!r} has the unknown {name} {word!r}", way_out=nearest(word, known))
        if self.activations != "range" and self.stream is None:
            raise SchemeError(f"scheme {self.name!r} has {self.activations} activations but no stream", way_out="Set stream=QuantSpec.parse('u8/pt')")
        if self.weights == "dorefa" and self.weight is not None and not 2 <= self.weight.bits <= 8:
            raise SchemeError(f"scheme {self.name!r} has DoReFa weights of {self.weight.bits} bits", way_out="Use 2 to 8; for 1 bit weights='sign'")
        if self.auto and self.activations not in ("sign", "ternary"):
            raise SchemeError(f"scheme {self.name!r} has nothing that runs on bits to choose", way_out="Set activations='sign' or 'ternary', or auto=False")
        if not self.clip > 0:
            raise SchemeError(f"scheme {self.name!r} clips at {self.clip}", way_out="Clip at a positive number")
        if self.share is not None:
            self._check_share(self.share)

    def _check_share(self, share: Share) -> None:
        """Weights that can share a codebook: float ones, or integers with more values than it has."""
        w = self.weight
        if self.method == "float" or (w is not None and w.kind == "affine" and w.block is None and w.bits > share.most and self.method != "dynamic"
                                      and self.weights in ("range", "lsq")):  # fmt: skip
            return
        if w is not None and (w.bits <= share.most or self.weights not in ("range", "lsq")):
            way_out = "Leave share= out: lower('archive') codes weights of few values as they are"
            raise SchemeError(f"weights of scheme {self.name!r} have {w.bits} bits or fewer: sharing {share.most}-bit codebooks adds nothing", way_out=way_out)
        raise SchemeError(f"weights of scheme {self.name!r} cannot share a codebook", way_out="Use deepcomp_w5, iao_w8a8 or weight_only_w8")

    @property
    def trains(self) -> bool:
        """It is made for training: its codes come from more than a range."""
        return self.weights != "range" or self.activations != "range" or self.share is not None

    @property
    def kept_weight(self) -> QuantSpec | None:
        """Codes of the weights as a runtime keeps them: 8-bit integers for low-bit weights."""
        if self.weight is None:
            return None
        return S8N if self.trains or (self.weight is not None and self.stream is not None) else self.weight

    @property
    def kept_activation(self) -> QuantSpec | None:
        """Codes of the activations as a runtime keeps them: 8-bit integers for narrower ones."""
        return self.stream or self.activation

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
    """Scheme by name; a :class:`Scheme` is returned as it is. The families ``iao_w<b>a<b>``, ``dorefa_w<b>a<b>`` and
    ``deepcomp_w<b>[_fc<b>]`` know all widths.

    Raises:
        SchemeError: for an unknown name; the nearest one is offered.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise SchemeError(f"a scheme is a name or a Scheme, not {scheme!r}", way_out=nearest("", _TABLE))
    if scheme in _TABLE:
        return _TABLE[scheme]
    made = _family(scheme)
    if made is None:
        raise SchemeError(f"unknown scheme {scheme!r}", way_out=nearest(scheme, _TABLE))
    return made


def names() -> list[str]:
    """Names of all registered schemes, in order of registration."""
    return list(_TABLE)


_FAMILY = re.compile(r"(iao|dorefa)_w([2-8])a([2-8]|32)((?:_[a-z]+)*)")
_DEEPCOMP = re.compile(r"deepcomp_w([1-8])(?:_fc([1-8]))?")
_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "iao": {"lsq": {"weights": "lsq", "activations": "lsq"}, "pact": {"activations": "pact"}, "plain": {"batch_norm": "plain"}},
    "dorefa": {"lsq": {"activations": "lsq"}, "pact": {"activations": "pact"}, "compat": {"compat": True}},
}
_SAID = {"lsq": ", learned steps", "pact": ", learned clips", "plain": ", batch norms not folded", "compat": ", the older form"}


def _deepcomp(name: str, bits: int, linear_bits: int | None) -> Scheme:
    """Deep Compression: float weights that share codebooks."""
    said = f"{bits}-bit codebooks" if linear_bits is None else f"{bits}-bit codebooks in convolutions, {linear_bits}-bit ones in linear layers"
    return Scheme(name, "float", summary=f"Deep Compression: float weights that share {said}", share=Share(bits, linear_bits))


def _family(name: str) -> Scheme | None:
    """The scheme of a family by its name: the widths of weights and activations, then variants; ``None`` when it is no such name."""
    shared, m = _DEEPCOMP.fullmatch(name), _FAMILY.fullmatch(name)
    if shared is not None:
        return _deepcomp(name, int(shared[1]), None if shared[2] is None else int(shared[2]))
    if m is None:
        return None
    family, w, a, variants = m[1], int(m[2]), int(m[3]), m[4].split("_")[1:]
    known = _VARIANTS[family]
    several = {"lsq", "pact"} <= set(variants) or ("compat" in variants and len(variants) > 1)
    if len(set(variants)) < len(variants) or not set(variants) <= set(known) or several:
        return None
    fields: dict[str, Any] = {"weights": "dorefa", "float_layers": ("first", "last")} if family == "dorefa" else {}
    for v in variants:
        fields.update(known[v])
    weight, said = QuantSpec(w, True, True, True, 0), "".join(_SAID[v] for v in variants)
    what = f"{'DoReFa: ' if family == 'dorefa' else ''}{w}-bit weights"
    if a == 32:
        if family == "iao" or set(variants) - {"compat"}:
            return None
        return Scheme(name, "weight-only", weight, summary=f"{what}, float activations{said}", **fields)
    if family == "dorefa":
        fields.setdefault("activations", "clip")
    elif (w, a) != (8, 8):
        fields["int8_layers"] = ("first", "last")
    return Scheme(
        name, "static", weight, QuantSpec(a, False), activation_observer="ema" if a == 8 else "mse", weight_observer="minmax" if w == 8 else "mse",
        summary=f"{what}, {a}-bit activations{said}", stream=U8, **fields,
    )  # fmt: skip


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
B1, T2 = QuantSpec.parse("b1/pc0"), QuantSpec.parse("t2/pc0")
SIGN, TRIT = QuantSpec.parse("b1/pt"), QuantSpec.parse("t2/pt")
_ENDS = ("first", "last")
_SIGNS: dict[str, Any] = {"weights": "sign", "float_layers": _ENDS}
_TO_SIGN: dict[str, Any] = {"activations": "sign", "stream": U8}
for _scheme in (
    Scheme("bnn_w1a32", "weight-only", B1, summary="binary weights -1 and 1, float activations", scaled=False, **_SIGNS),
    Scheme("xnor_w1a32", "weight-only", B1, summary="binary weights with a scale for each channel, float activations", **_SIGNS),
    Scheme("bnn_w1a1", "static", B1, SIGN, summary="binary weights -1 and 1, binary activations", scaled=False, **_SIGNS, **_TO_SIGN),
    Scheme("xnor_w1a1", "static", B1, SIGN, summary="binary weights with a scale for each channel, binary activations", **_SIGNS, **_TO_SIGN),
    Scheme("auto-lowbit", "static", B1, SIGN, summary="xnor_w1a1 where that is faster than int8 on this machine, else int8", auto=True, **_SIGNS, **_TO_SIGN),
    Scheme("xnor_w1a1_k", "static", B1, SIGN, summary="xnor_w1a1, outputs times the local mean of the input", box_scale=True, **_SIGNS, **_TO_SIGN),
    Scheme("twn_wta32", "weight-only", T2, summary="ternary weights, float activations", weights="ternary", float_layers=_ENDS),
    Scheme("twn_wta8", "static", T2, U8, summary="ternary weights, u8 activations", weights="ternary", stream=U8, int8_layers=_ENDS),
    Scheme("twn_wta1", "static", T2, SIGN, summary="ternary weights, binary activations", weights="ternary", float_layers=_ENDS, **_TO_SIGN),
    Scheme("tbn_w1at", "static", B1, TRIT, summary="binary weights, ternary activations", activations="ternary", stream=U8, **_SIGNS),
    *map(_family, ("iao_w4a4", "iao_w4a4_lsq", "iao_w4a4_pact", "iao_w8a8_lsq", "iao_w8a8_plain")),
    *map(_family, ("dorefa_w2a2", "dorefa_w4a4", "dorefa_w4a4_pact", "dorefa_w4a4_compat", "deepcomp_w5", "deepcomp_w8_fc5")),
):
    assert _scheme is not None
    register(_scheme)
