"""Bits for each layer under a budget: the weights that matter most keep theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fxq.costs import layer_costs
from fxq.errors import SchemeError
from fxq.modules import Quantized
from fxq.quant_sensitivity import noise_at
from fxq.states import State
from fxq.toggles import Toggles

FLOAT = 32
"""Bits of a layer that stays float."""
WIDE = 8
"""Weights of fewer bits are rounded with error feedback."""
STEPS = 50_000
"""A budget is shared out in so many steps."""
SAMPLES = 16
"""So many calibration samples at least, in whole batches, measure the layers."""


@dataclass(frozen=True)
class Budget:
    """What the weights of a compiled model may cost; one of the two.

    Attributes:
        bytes: of the weights. A whole number is bytes; a number up to 4.0 is the share of what the scheme itself takes (0.75 of an int8 model).
        bops: bit operations of one sample, multiply-accumulates times bits of the weight times bits of the activation (van Baalen et al. 2020,
            arXiv 2005.07093, appendix B). A whole number is operations, a number up to 16.0 the share of what the scheme itself takes. It says
            nothing of time: a runtime with 8-bit kernels runs 4-bit weights as 8-bit ones.
        bits: what a layer may have: 2 to 8, or 32 for float.

    Raises:
        SchemeError: none or both budgets, or bits that no layer can have.
    """

    bytes: float | None = None
    bops: float | None = None
    bits: tuple[int, ...] = (4, 8)

    def __post_init__(self) -> None:
        given = [v for v in (self.bytes, self.bops) if v is not None]
        if len(given) != 1:
            raise SchemeError("a budget limits bytes or bops", way_out="Give one of the two: Budget(bytes=0.75)")
        if not given[0] > 0:
            raise SchemeError(f"a budget of {given[0]} is nothing", way_out="Give a share of the scheme's own cost, like 0.75, or a whole number")
        bad = [b for b in self.bits if not (isinstance(b, int) and (2 <= b <= 8 or b == FLOAT))]
        if bad or not self.bits:
            raise SchemeError(f"a layer cannot have {bad[0] if bad else 'no'} bits", way_out="Use 2 to 8, or 32 for float")

    def limit(self, own: float) -> float:
        """The absolute budget, given what the scheme itself takes."""
        value = self.bytes if self.bytes is not None else self.bops
        assert value is not None
        return float(value) if isinstance(value, int) else value * own


@dataclass(frozen=True)
class LayerBits:
    """The choice for one layer.

    Attributes:
        path: module path. bits: of its weight; 32 is float.
        cost: bytes or bit operations. noise: energy of the output's error relative to the output, its weights alone in these bits.
    """

    path: str
    bits: int
    cost: float
    noise: float


@dataclass(frozen=True)
class BitPlan:
    """Bits of every layer.

    Attributes:
        layers: in the order of the graph. unit: ``bytes`` or ``bops``.
        limit, own: the budget, and what the scheme itself takes, in that unit.
    """

    layers: tuple[LayerBits, ...]
    unit: str
    limit: float
    own: float

    @property
    def floats(self) -> tuple[str, ...]:
        """Module paths of the layers that stay float."""
        return tuple(x.path for x in self.layers if x.bits == FLOAT)

    @property
    def bits(self) -> dict[str, int]:
        """Module path -> bits, of the layers that are quantized."""
        return {x.path: x.bits for x in self.layers if x.bits != FLOAT}

    @property
    def narrowed(self) -> bool:
        """Does a layer have less than 8 bits?"""
        return any(b < WIDE for b in self.bits.values())

    @property
    def cost(self) -> float:
        """What the choice takes."""
        return sum(layer.cost for layer in self.layers)

    def __str__(self) -> str:
        head = f"{self.unit}: {self.cost:,.0f} of {self.limit:,.0f} ({self.cost / self.own:.1%} of the scheme's own)"
        bits = ["float" if x.bits == FLOAT else f"{x.bits} bits" for x in self.layers]
        return "\n".join([head, *(f"  {x.path:<40} {b:>7}  {x.cost:>14,.0f}  {_db(x.noise):>9}" for x, b in zip(self.layers, bits, strict=True))])


def _db(noise: float) -> str:
    return "equal" if noise <= 0 else f"{-10 * math.log10(noise):.1f} dB"


def plan(t: Toggles, batches: Sequence[tuple[Any, ...]], budget: Budget, activation_bits: int) -> BitPlan:
    """Choose the bits of every quantized layer.

    The errors that layers make at the output, each measured alone, are taken as additive; the choice has the least sum under the budget.

    Args:
        t: the switched graph of the model in its own bits. batches: positional inputs. activation_bits: of the scheme.

    Raises:
        SchemeError: no layer is quantized; or the smallest choice is over the budget, whose cost is then named.
    """
    quantized = [b for b in budget.bits if b != FLOAT]
    noise = noise_at(t, batches, quantized)
    nodes = {n.name: n for n in t.gm.graph.nodes if n.name in t.layers}
    unit = "bytes" if budget.bytes is not None else "bops"
    macs = {c.path: c.macs for c in layer_costs(_costed(t))}
    choices: dict[str, list[LayerBits]] = {}
    own = 0.0
    for name, node in nodes.items():
        path, made = t.paths[name], t.layers[name].made

        def cost(bits: int, path: str = path, made: Quantized = made) -> float:
            if unit == "bytes":
                return math.ceil(made.op.weight.numel() * bits / 8)  # type: ignore[operator]
            return macs.get(path, 0) * bits * (FLOAT if bits == FLOAT else activation_bits)

        own += cost(made.weight_grid.spec.bits)
        choices[node.name] = [LayerBits(path, b, cost(b), 0.0 if b == FLOAT else noise[name][b]) for b in sorted(set(budget.bits))]
    if not own:
        raise SchemeError("no layer is quantized, so there are no bits to choose", way_out="Leave budget= out, or keep fewer layers float")
    limit = budget.limit(own)
    least = sum(options[0].cost for options in choices.values())
    if least > limit:
        way_out = f"Give at least {least / own:.3g} of the scheme's own {own:,.0f}, or fewer bits"
        raise SchemeError(f"the budget is {limit:,.0f} {unit}, the smallest choice takes {least:,.0f}", way_out=way_out)
    return BitPlan(tuple(cheapest([choices[n] for n in nodes], limit)), unit, limit, own)


def _costed(t: Toggles) -> Any:
    """The graph with its layers as costs are counted on: float modules."""
    state = State.of(t.gm)
    parts = {path: getattr(part, "floating", part) for path, part in state.parts.items()}
    return replace(state, parts=parts).build()


def cheapest(choices: Sequence[Sequence[LayerBits]], limit: float) -> list[LayerBits]:
    """One option of each layer, with the least sum of noise whose costs keep the limit: a knapsack by dynamic programming.

    What is left after the cheapest options is cut into at most :data:`STEPS` whole steps; each option's cost is rounded up to them, so the limit always
    holds and the choice is the best one up to a step a layer.

    Args:
        choices: for each layer its options, the cheapest first; their sum keeps the limit.
    """
    base = [min(options, key=lambda o: o.cost) for options in choices]
    favourite = [min(options, key=lambda o: (o.noise, o.cost)) for options in choices]
    if sum(o.cost for o in favourite) <= limit:
        return favourite
    room = math.floor(limit - sum(o.cost for o in base))
    step = max(1, math.ceil(room / STEPS))
    last = room // step
    best = np.full(last + 1, np.inf)
    best[0] = 0.0
    picks = np.zeros((len(choices), last + 1), dtype=np.int8)
    for i, options in enumerate(choices):
        new = np.full(last + 1, np.inf)
        for j, option in enumerate(options):
            more = math.ceil((option.cost - base[i].cost) / step)
            if more > last:
                continue
            shifted = np.full(last + 1, np.inf)
            shifted[more:] = best[: last + 1 - more] + option.noise
            better = shifted < new
            new[better], picks[i][better] = shifted[better], j
        best = new
    at = int(best.argmin())
    taken: list[LayerBits] = []
    for i in reversed(range(len(choices))):
        option = choices[i][int(picks[i][at])]
        taken.append(option)
        at -= math.ceil((option.cost - base[i].cost) / step)
    return taken[::-1]
