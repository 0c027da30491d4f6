"""The times of a model's weighted layers on this machine: measured once for each shape, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.bitwise import engine as engines
from fxq.bitwise.layers import BitLayer, bit_layer
from fxq.doctor_machine import machine
from fxq.errors import SchemeError
from fxq.graph import data_inputs, float_module, module_of
from fxq.layer_runs import Time, Times, measured
from fxq.layer_shapes import Form, LayerShape, form_of, layers_of, no_bits, shape_of
from fxq.modules import FakeQuantize, Quantized
from fxq.tabular import aligned

HEAD = ("layer", "shape", "bit form", "float32 us", "int8 us", "bits us", "with packing us", "float32/int8", "float32/bits", "int8/bits", "spread", "fastest")
BITS, INT8, FLOAT32 = "bits", "int8", "float32"
"""The three ways to compute a layer."""


@dataclass(frozen=True)
class LayerTime:
    """Times of one layer.

    Attributes:
        path: module path. shape: of the layer. form: how it computes on bits.
        runs: how the given model computes it: ``bits``, ``int8`` or ``float32``.
        times: the medians; those without a kernel are ``None``.
        why: why it has no time on bits, or empty.
    """

    path: str
    shape: LayerShape
    form: Form
    runs: str
    times: Times
    why: str = ""

    @property
    def fastest(self) -> str:
        """The way of the least time, bits by :attr:`Times.bits`."""
        found = {k: t.us for k, t in ((BITS, self.times.bits), (INT8, self.times.int8), (FLOAT32, self.times.float32)) if t is not None}
        return min(found, key=lambda k: found[k])

    @property
    def spread(self) -> float:
        """The widest spread of the times."""
        return max(t.spread for t in self.times.all())

    def to_json(self) -> dict[str, Any]:
        """Plain data; times are in microseconds."""
        plain = {"path": self.path, "shape": self.shape.to_json(), "form": asdict(self.form), "runs": self.runs, "times": asdict(self.times)}
        return {**plain, "fastest": self.fastest, "why": self.why}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> LayerTime:
        """The layer of :meth:`to_json`.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: for anything else.
        """
        times: dict[str, Any] = {k: v if v is None or k == "float_by" else Time.from_json(v) for k, v in plain["times"].items()}
        path, runs, why = plain["path"], plain["runs"], plain.get("why", "")
        if times["float32"] is None or runs not in (BITS, INT8, FLOAT32) or not all(isinstance(v, str) for v in (path, why, times["float_by"])):
            raise ValueError("no such layer")
        return cls(path, LayerShape.from_json(plain["shape"]), Form.from_json(plain["form"]), runs, Times(**times), why)


@dataclass(frozen=True)
class LayerTimes:
    """Times of a model's weighted layers.

    Attributes:
        layers: in the order of the graph; a layer that is called twice stands there twice.
        threads: of every run.
        machine: the processor and the software that ran, by name.
    """

    layers: tuple[LayerTime, ...]
    threads: int = 1
    machine: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = ", ".join(f"{k} {v}" for k, v in self.machine.items())
        notes = [f"{layer.path}: {layer.why}" for layer in self.layers if layer.why]
        clock = "processor time of one thread" if self.threads == 1 else f"wall time of {self.threads} threads"
        return "\n".join([f"{head}; medians in turns, {clock}", "", aligned(HEAD, [_cells(t) for t in self.layers]), *([""] if notes else []), *notes])

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``json.dump``."""
        return {"machine": self.machine, "threads": self.threads, "layers": [layer.to_json() for layer in self.layers]}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any] | str) -> LayerTimes:
        """Times of another process or machine.

        Args:
            plain: what :meth:`to_json` gave, or its text.

        Raises:
            SchemeError: for anything else.
        """
        try:
            found = json.loads(plain) if isinstance(plain, str) else plain
            layers, threads = found["layers"], found["threads"]
            if not isinstance(layers, list) or type(threads) is not int or threads < 1:
                raise ValueError("layers are a list, threads a number from 1 on")
            return cls(tuple(LayerTime.from_json(v) for v in layers), threads, {str(k): str(v) for k, v in found["machine"].items()})
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise SchemeError(f"these are no layer times: {e}", way_out="Give what fxq.layer_times(...).to_json() wrote") from e

    def find(self, shape: LayerShape, form: Form) -> LayerTime:
        """The times of a layer of this shape; the number of samples does not count, a layer of the same form goes before others.

        Raises:
            SchemeError: there is none.
        """
        same = [t for t in self.layers if t.shape.with_batch(0) == shape.with_batch(0)]
        if not same:
            raise SchemeError(f"the given times have no layer {shape}", way_out="Measure this very model: fxq.layer_times(model, example)")
        return next((t for t in same if t.form == form), same[0])


def _cells(t: LayerTime) -> tuple[str, ...]:
    times = t.times
    us = [times.float32, times.int8, times.bits, times.packed]
    return (
        t.path, str(t.shape), str(t.form) if times.bits else "-", *("-" if v is None else f"{v.us:.1f}" for v in us),
        _ratio(times.float32, times.int8), _ratio(times.float32, times.bits), _ratio(times.int8, times.bits), f"{t.spread:.0%}", t.fastest,
    )  # fmt: skip


def _ratio(a: Time | None, b: Time | None) -> str:
    return "-" if a is None or b is None or not b.us else f"{a.us / b.us:.2f}"


Measure = Callable[[LayerShape, Form, int, bool], Times]
"""``measure(shape, form, threads, has_bits)``."""


def times_of(gm: GraphModule, *, samples: int = 0, threads: int = 1, like: Form | None = None, only: Sequence[Node] | None = None,
             measure: Measure | None = None) -> tuple[LayerTime, ...]:  # fmt: skip
    """Measure the weighted layers of a canonical graph, quantized or not.

    Args:
        gm: the graph, with shapes in ``node.meta``.
        samples: of the batch; 0 as many as the graph's example has. threads: of each run.
        like: what a float graph would be made of; default binary weights and activations.
        only: these layers alone.
        measure: another way to come to times.
    """
    found, ask = [], measure or measured
    for node in layers_of(gm) if only is None else only:
        why, shape, form = no_bits(float_module(gm, node)), shape_of(gm, node, samples), form_of(gm, node, like)
        found.append(LayerTime(str(node.target), shape, form, _runs(gm, node), ask(shape, form, threads, why is None), why or ""))
    return tuple(found)


def _runs(gm: GraphModule, node: Node) -> str:
    """How the graph computes the layer, by its grids."""
    module, source = module_of(gm, node), data_inputs(node)[0]
    if not isinstance(module, Quantized) or not node.meta.get("integer"):
        return FLOAT32
    grid = module_of(gm, source) if source.op == "call_module" else None
    return BITS if isinstance(grid, FakeQuantize) and isinstance(bit_layer(module, grid.qparams), BitLayer) else INT8


def about() -> dict[str, str]:
    """The processor and the software that a time belongs to."""
    import onnxruntime

    found = engines.engine()
    return {"cpu": machine().cpu, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "engine": f"{found.name} ({found.path})"}
