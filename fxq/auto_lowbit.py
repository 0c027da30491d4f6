"""The scheme ``auto-lowbit``: a layer becomes binary where it runs faster on bits than in int8 on this machine, and int8 elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from fxq import distributed
from fxq.errors import SchemeError
from fxq.layer_runs import Times
from fxq.layer_shapes import Form, LayerShape
from fxq.layer_table import BITS, FLOAT32, INT8, LayerTime, LayerTimes, about, times_of
from fxq.schemes import Scheme

Answer = dict[str, tuple[str, str]]
TIMES = "layer_times"
"""Where the times are left for who compiles: ``gm.meta[TIMES]``."""


def asker(scheme: Scheme, times: LayerTimes | None = None, threads: int = 1) -> Callable[[GraphModule, Mapping[Node, str]], Answer]:
    """Who answers ``choose-layers``: by times of this machine, measured now on one sample, or by given ones.

    Of several processes that compile together all take the times of the first.

    Args:
        scheme: the low-bit scheme: whether weights and activations are binary or ternary.
        times: measured before. threads: of each run.

    Raises:
        SchemeError: ``times`` is no :class:`~fxq.layer_table.LayerTimes` (here), or has no layer of a shape of the model (when asked).
    """
    if times is not None and not isinstance(times, LayerTimes):
        raise SchemeError(f"times= is {type(times).__name__}, not LayerTimes", way_out="Give fxq.layer_times(model, example), or LayerTimes.from_json")
    like = Form(*("ternary" if kind == "ternary" else "binary" for kind in (scheme.activations, scheme.weights)))

    def known(shape: LayerShape, form: Form, threads: int, has_bits: bool) -> Times:
        assert times is not None
        return times.find(shape, form).times

    def ask(gm: GraphModule, options: Mapping[Node, str]) -> Answer:
        more: dict[str, Any] = {} if times is None else {"measure": known}
        found = times_of(gm, samples=1, threads=threads, like=like, only=list(options), **more)
        if distributed.world() > 1:
            found = tuple(LayerTime.from_json(t) for t in distributed.gather([t.to_json() for t in found])[0])
        gm.meta[TIMES] = LayerTimes(found, threads if times is None else times.threads, about() if times is None else times.machine)
        return chosen(found, {str(n.target): what for n, what in options.items()})

    return ask


def chosen(times: tuple[LayerTime, ...], options: Mapping[str, str]) -> Answer:
    """The choice for each layer: the scheme's own way (``bits`` or ``float32``) where that is faster, ``int8`` elsewhere.

    Args:
        times: of the layers. options: module path -> the scheme's own way.

    Returns:
        Module path -> the way, and the times in words.
    """
    return {t.path: _choice(t, options[t.path]) for t in times}


def _choice(layer: LayerTime, own: str) -> tuple[str, str]:
    times = layer.times
    mine, int8 = times.bits if own == BITS else times.float32, times.int8
    if int8 is None and mine is None:
        return own, f"as the scheme has it: there is no kernel in int8 or on bits ({layer.shape})"
    if int8 is None:
        return own, f"{_name(own)}: there is no int8 kernel ({layer.shape})"
    if mine is None:
        return INT8, f"int8: {layer.why}; int8 {int8.us:.0f} us"
    way = own if mine.us < int8.us else INT8
    return way, f"{_name(way)}: {own} {mine.us:.0f} us, int8 {int8.us:.0f} us"


def _name(way: str) -> str:
    return {BITS: "binary", FLOAT32: "float", INT8: INT8}[way]
