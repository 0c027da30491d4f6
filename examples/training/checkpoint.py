"""Checkpoints of a run: written whole or not at all, read with ``weights_only=True``, refused when they belong to another run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fxq.errors import InputError
from training.recipe import Recipe, difference

NAME = "checkpoint.pt"
FORMAT = 1


def save(folder: Path, recipe: Recipe, world: int, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, texts, lists and dicts of them) with what it belongs to."""
    path, part = folder / NAME, folder / (NAME + ".part")
    with part.open("wb") as file:
        torch.save({"format": FORMAT, "recipe": recipe.same(), "world": world, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load(folder: Path, recipe: Recipe, world: int) -> dict[str, Any] | None:
    """The state in a folder, or ``None`` when there is none.

    Raises:
        InputError: for a damaged file, or one of another recipe or number of processes; the difference is named.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        made, was, count = state["format"], state["recipe"], state["world"]
    except Exception as e:
        raise InputError(f"cannot be read: {str(e).splitlines()[0] if str(e) else type(e).__name__}", where=str(path), way_out="Begin anew with --force") from e
    if made != FORMAT:
        raise InputError(f"it has format {made}, this script writes {FORMAT}", where=str(path), way_out="Begin anew with --force")
    other = difference(was, recipe.same())
    if other:
        raise InputError(f"it is of another recipe: {other}", where=str(path), way_out="Use that recipe, or begin anew with --force")
    if count != world:
        raise InputError(f"it is of a run of {count} processes, this one has {world}", where=str(path), way_out=f"Start {count} processes")
    return state
