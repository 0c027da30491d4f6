"""Files that run on bits, with one or two wrong numbers in their graph; ``python -m tests.bit_fuzz SEED COUNT`` loads and runs each.

Loading raises :class:`~fxq.errors.ArchiveError` or gives a program; running a program that a file describes wrongly gives numbers or an exception of
Python. A kernel that read or wrote outside of its arrays would end the process.
"""

import json
import random
import resource
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fxq
from fxq import archived
from fxq.archive import encoder
from fxq.errors import ArchiveError
from tests.bit_nets import SCHEMES, batches, compiled

SOME = (0, 1, 2, 3, 5, -1, -2, 7, 13, 26, 64, 65, 1000, 1 << 20, 1 << 31, 1 << 40, True, None, 1.5)
MEMORY = 12 << 30
"""Bytes of address space: what asks for more gets a MemoryError."""


def numbers(v: Any, at: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Places of all numbers in a piece of JSON."""
    if isinstance(v, dict):
        for k, x in v.items():
            yield from numbers(x, (*at, k))
    elif isinstance(v, list):
        for i, x in enumerate(v):
            yield from numbers(x, (*at, i))
    elif isinstance(v, (int, float)):
        yield at


def mutated(text: str, r: random.Random) -> Any:
    """The head of an archive with one or two other numbers in its modules, nodes, grids or small tensors."""
    head = json.loads(text)
    graph = head["graph"]
    parts = {("graph", k): graph[k] for k in ("templates", "modules", "nodes", "grids")} | {("small",): head["small"]}
    places = [at for path, v in parts.items() for at in numbers(v, path)]
    for at in r.sample(places, r.choice([1, 1, 2])):
        inner = head
        for k in at[:-1]:
            inner = inner[k]
        inner[at[-1]] = r.choice(SOME)
    return head


def fuzz(seed: int, count: int) -> dict[str, int]:
    """How many files were refused, ran, or raised an exception when they ran; ``odd``: raised something else than ArchiveError on loading."""
    r, x, found = random.Random(seed), next(batches(1)), Counter[str]()
    plans = {name: archived.to_items(compiled(name)) for name in SCHEMES}
    plans["8-bit layers"] = archived.to_items(compiled("xnor_w1a1", int8=[0, "b", "c", "fc2"]))
    made = {name: (list(p.items()), json.dumps({**p.head, "run": "bitwise"})) for name, p in plans.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.fxq"
        for _ in range(count):
            items, text = made[r.choice(list(made))]
            path.write_bytes(encoder.write(iter(items), mutated(text, r), version=fxq.__version__)[0])
            try:
                program = fxq.load(path)
            except ArchiveError:
                found["refused"] += 1
                continue
            except Exception as e:
                found[f"odd: {type(e).__name__}: {e}"] += 1
                continue
            try:
                program(x)
                found["ran"] += 1
            except Exception:
                found["raised"] += 1
    return dict(found)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    print(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]))))
