"""All models of the zoo by name."""

from __future__ import annotations

from tests.trt_zoo import graphs, layers, moves, scales, types
from tests.trt_zoo.net import Case

GROUPS: dict[str, dict[str, Case]] = {"layers": layers.CASES, "moves": moves.CASES, "scales": scales.CASES, "types": types.CASES, "graphs": graphs.CASES}
ALL: dict[str, Case] = {name: one for group in GROUPS.values() for name, one in group.items()}
assert len(ALL) == sum(map(len, GROUPS.values()))
