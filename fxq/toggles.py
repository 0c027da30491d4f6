"""A converted graph whose every rounding can be switched: as compiled, off (float), or onto the best grid for given data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.graph import grid_of, kind
from fxq.modules import FakeQuantize, Quantized, call_with
from fxq.shared import SharedWeight
from fxq.spec import QParams, QuantSpec
from fxq.states import State
from fxq.weight_ranges import weight_range

ON, OFF, IDEAL, MEASURE, NARROWED = "on", "off", "ideal", "measure", "narrowed"
CHANNELS = {"conv": 0, "linear": 0, "conv_transpose": 1}
"""Axis of the output channels in a weight."""


class LayerSwitch(nn.Module):
    """Stands in for a :class:`~fxq.modules.Quantized` layer, or for a float one whose weights share a codebook.

    Attributes:
        made: the layer as compiled; float: the layer it was made from.
        mode: ``on``, ``off``, ``ideal`` (weights on a fresh grid of the same codes along the output channels, float bias) or ``measure`` (float, and
            the energies of signal and of noise are added to ``energy``).
    """

    made: Any

    def __init__(self, made: Quantized | SharedWeight, floating: nn.Module, kind_name: str) -> None:
        super().__init__()
        self.made, self.floating, self.kind_name, self.mode = made, floating, kind_name, ON
        self._ideal: Tensor | None = None
        self.narrowed: Tensor | None = None
        self.energy = [0.0, 0.0]

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == ON or self.mode == IDEAL and isinstance(self.made, SharedWeight):  # a codebook is fitted to its weight already
            out: Tensor = self.made(x)
            return out
        if self.mode == OFF:
            return self.floating(x)  # type: ignore[no-any-return]
        if self.mode == MEASURE:
            true = self.floating(x)
            self.energy[0] += float(true.double().square().sum())
            self.energy[1] += float((self.made(x) - true).double().square().sum())
            return true  # type: ignore[no-any-return]
        if self.mode == NARROWED:
            return call_with(self.floating, x, self.narrowed, self.floating.bias)  # type: ignore[arg-type]
        if self._ideal is None:
            self._ideal = numerics.fake_quantize(self.floating.weight.detach(), self.fresh())  # type: ignore[operator]
        return call_with(self.floating, x, self._ideal, self.floating.bias)  # type: ignore[arg-type]

    def at(self, bits: int) -> None:
        """Weights of so many bits, each channel clipped where the squared error is least; bias and all else float."""
        spec = replace(self.made.weight_grid.spec, bits=bits)
        weight = self.floating.weight.detach()  # type: ignore[operator]
        self.narrowed = numerics.fake_quantize(weight, numerics.choose_qparams(*weight_range(weight, spec, "mse"), spec))
        self.mode = NARROWED

    def fresh(self) -> QParams:
        """Grid of the float weight by its extremes, the layer's codes, along the output channels where the layer's grid has an axis."""
        return weight_grid(self.floating.weight.detach(), self.made.weight_grid.spec, self.kind_name)  # type: ignore[operator]


class ValueSwitch(nn.Module):
    """Stands in for a :class:`~fxq.modules.FakeQuantize`.

    Attributes:
        made: as compiled. clamp: what the grid absorbed.
        best: the grid for mode ``ideal``; as compiled where it is None.
        mode: ``on``, ``off`` (an absorbed clamp still clamps), ``ideal``.
    """

    def __init__(self, made: FakeQuantize, clamp: tuple[float, float | None] | None) -> None:
        super().__init__()
        self.made, self.clamp, self.mode = made, clamp, ON
        self.best: QParams | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == OFF:
            return x if self.clamp is None else x.clamp(*self.clamp)
        if self.mode == IDEAL and self.best is not None:
            return numerics.fake_quantize(x, self.best)
        out: Tensor = self.made(x)
        return out


def weight_grid(weight: Tensor, spec: QuantSpec, kind_name: str) -> QParams:
    """Grid of a weight by its extremes; where ``spec`` has an axis, along the output channels of that kind of layer."""
    if spec.block is not None:
        return numerics.choose_qparams(*weight_range(weight, spec), spec)
    axis = None if spec.axis is None else CHANNELS[kind_name]
    rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
    lo, hi = rows.to(torch.float32).aminmax(dim=1)
    lo, hi = (lo[0], hi[0]) if axis is None else (lo, hi)
    return numerics.choose_qparams(lo, hi, replace(spec, axis=axis))


class Toggles:
    """The switched graph.

    Args:
        gm: a converted graph; it is not changed.
        floats: module path -> float layer, to be used in place of the one inside a quantized layer (whose bias may have been corrected).

    Attributes:
        gm: the switched graph; all switches are on.
        layers: name of a node -> switch of its weights.
        values: name of a fake-quantizer's node -> switch.
        paths: name of a switched node -> module path of the layer, or of the value that is rounded.
    """

    def __init__(self, gm: GraphModule, floats: dict[str, nn.Module] | None = None) -> None:
        state = State.of(gm)
        parts = dict(state.parts)
        self.layers: dict[str, LayerSwitch] = {}
        self.values: dict[str, ValueSwitch] = {}
        self.paths: dict[str, str] = {}
        self.grids: dict[str, list[str]] = {}
        for node in gm.graph.nodes:
            module = parts.get(str(node.target)) if node.op == "call_module" else None
            given = (floats or {}).get(str(node.target))
            if isinstance(module, SharedWeight) and given is not None:
                parts[str(node.target)] = self.layers[node.name] = LayerSwitch(module, given, kind(gm, node))
                self.paths[node.name] = str(node.target)
            elif isinstance(module, Quantized):
                parts[str(node.target)] = self.layers[node.name] = LayerSwitch(module, module.op if given is None else given, kind(gm, node))
                self.paths[node.name] = str(node.target)
            elif isinstance(module, FakeQuantize):
                grid = grid_of(gm, node)
                parts[str(node.target)] = self.values[node.name] = ValueSwitch(module, None if grid is None else grid.clamp)
                self.grids.setdefault(str(node.meta.get("grid", node.name)), []).append(node.name)
                self.paths[node.name] = value_path(node)
        self.gm = replace(state, parts=parts).build()

    def set(self, mode: str, names: Iterable[str] | None = None) -> None:
        """Switch the given nodes (default: all)."""
        every: dict[str, Any] = {**self.layers, **self.values}
        for name in every if names is None else names:
            every[name].mode = mode

    def only(self, names: Iterable[str]) -> None:
        """These on, all others off."""
        self.set(OFF)
        self.set(ON, names)

    def without(self, names: Iterable[str]) -> None:
        """These off, all others on."""
        self.set(ON)
        self.set(OFF, names)

    def measure(self, batches: Iterable[tuple[Any, ...]]) -> dict[str, float]:
        """SQNR in dB of each layer by itself: its rounded weights on float inputs. All switches are off afterwards."""
        self.set(OFF)
        for switch in self.layers.values():
            switch.mode, switch.energy = MEASURE, [0.0, 0.0]
        with torch.inference_mode():
            for batch in batches:
                self.gm(*batch)
        self.set(OFF)
        energies = {n: s.energy for n, s in self.layers.items()}
        return {n: math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf for n, (signal, noise) in energies.items()}

    @property
    def layer_units(self) -> dict[tuple[str, str], list[str]]:
        """``(module path, "layer")`` -> the layer and what rounds its output; ``(path, "activations")`` -> other values that are rounded."""
        found: dict[tuple[str, str], list[str]] = {(self.paths[n], "layer"): [n] for n in self.layers}
        for name in self.values:
            key = (self.paths[name], "layer")
            found.setdefault(key if key in found else (self.paths[name], "activations"), []).append(name)
        return found

    @property
    def units(self) -> dict[tuple[str, str], list[str]]:
        """``(name, "weights")`` and ``(name of a grid, "activations")`` -> the nodes that are switched together."""
        found = {(self.paths[n], "weights"): [n] for n in self.layers}
        return {**found, **{(grid, "activations"): nodes for grid, nodes in self.grids.items()}}


def value_path(node: Node) -> str:
    """Module path, or name, of the value that a fake-quantizer's node rounds."""
    source = node.all_input_nodes[0]
    return str(source.target) if source.op in ("call_module", "get_attr") else source.name
