"""CIFAR-10 as two tensors, its split, and batches with augmentation that depend on the seed, the epoch and the step alone.

Two layouts are read from ``$FXQ_DATA/cifar10`` (by default ``../shared/data`` beside the repository): a ``load_cifar10.py`` with
``load("train" or "test") -> (uint8 [N, 32, 32, 3], uint8 [N])``, or the files ``data_batch_*.bin`` and ``test_batch.bin`` of the "binary version"
that the authors distribute (a label byte, then 3 x 32 x 32 bytes).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fxq.errors import InputError

PAD = 4
CLASSES = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECORD = 1 + 3 * 32 * 32


def folder() -> Path:
    """The folder of data and models."""
    return Path(os.environ.get("FXQ_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def load(split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[N, 32, 32, 3]`` and labels int64 ``[N]`` of ``train`` or ``test``.

    Raises:
        InputError: when no data is there, or a file is damaged.
    """
    root = folder() / "cifar10"
    script = root / "load_cifar10.py"
    files = sorted(root.glob("data_batch_*.bin" if split == "train" else "test_batch.bin"))
    if script.exists():
        spec = importlib.util.spec_from_file_location("load_cifar10", script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        x, y = module.load(split)
    elif files:
        raw = b"".join(f.read_bytes() for f in files)
        if not raw or len(raw) % RECORD:
            raise InputError(f"{len(raw)} bytes are no whole number of images", where=str(files[0]), way_out="Load the file again")
        records = np.frombuffer(raw, np.uint8).reshape(-1, RECORD)
        x, y = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]
    else:
        way_out = "Set FXQ_DATA to a folder that holds cifar10/load_cifar10.py or cifar10/data_batch_*.bin"
        raise InputError("there is no CIFAR-10 here", where=str(root), way_out=way_out)
    return torch.from_numpy(np.array(x, np.uint8)), torch.from_numpy(np.array(y, np.int64))


def split(y: Tensor, held_out: int, limit: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those held out, which are the same for all seeds, and the same number of each class.

    Args:
        y: labels ``[N]``.
        held_out: how many; a multiple of the number of classes.
        limit: train on so many of the others; 0: on all.

    Raises:
        InputError: when there are not so many images.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    per, rest = divmod(held_out, CLASSES)
    if rest or any(int((y == c).sum()) <= per for c in range(CLASSES)):
        way_out = f"Use a multiple of {CLASSES} that leaves images of each class to train on"
        raise InputError(f"{held_out} of {len(y)} images cannot be held out", where="validation", way_out=way_out)
    held = torch.cat([order[y[order] == c][:per] for c in range(CLASSES)]).sort().values
    train = torch.ones(len(y), dtype=torch.bool)
    train[held] = False
    left = train.nonzero().flatten()
    if limit > len(left):
        raise InputError(f"there are {len(left)} training images, not {limit}", where="train_images", way_out="Use fewer, or 0 for all")
    return left[:limit] if limit else left, held


def generator(*key: int) -> torch.Generator:
    """A generator that depends on all numbers of ``key``."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class Normalise:
    """uint8 ``[N, 32, 32, 3]`` to float32 ``[N, 3, 32, 32]``: ``(x / 255 - MEAN) / STD``, or as it is (``raw``)."""

    raw: bool
    channels_last: bool

    def __call__(self, x: Tensor) -> Tensor:
        y = x.permute(0, 3, 1, 2).float()
        if not self.raw:
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
            y = (y / 255 - mean) / std
        return y.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


class Batches:
    """The training images as batches of any step of any epoch.

    Args:
        x, y: uint8 ``[N, 32, 32, 3]`` and int64 ``[N]``.
        batch: images of a step in all processes together; the last incomplete step of an epoch is dropped.
        rank, world: this process and how many there are; each takes its part of the batch, which does not depend on how many there are.

    Raises:
        InputError: when there are fewer images than one batch, or the batch is not divided by the processes.
    """

    def __init__(self, x: Tensor, y: Tensor, batch: int, seed: int, augment: bool, normalise: Normalise, rank: int = 0, world: int = 1) -> None:
        if len(x) < batch:
            raise InputError(f"{len(x)} images are less than a batch of {batch}", where="batch", way_out="Use a smaller batch")
        if batch % world:
            raise InputError(f"a batch of {batch} is not divided by {world} processes", where="batch", way_out=f"Use a multiple of {world}")
        self.y, self.batch, self.seed, self.normalise, self.part = y, batch, seed, normalise, slice(rank, None, world)
        self.augment, self.steps = augment, len(x) // batch
        pad = PAD if augment else 0
        self.x = torch.zeros(len(x), 32 + 2 * pad, 32 + 2 * pad, 3, dtype=torch.uint8)
        self.x[:, pad : pad + 32, pad : pad + 32] = x

    def order(self, epoch: int) -> Tensor:
        """Indices of an epoch's images, ``[steps, batch]``."""
        return torch.randperm(len(self.x), generator=generator(self.seed, epoch))[: self.steps * self.batch].view(self.steps, self.batch)

    def take(self, rows: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs float32 ``[n, 3, 32, 32]`` and labels int64 ``[n]`` of this process.

        Args:
            rows: a row of :meth:`order`.
        """
        if not self.augment:
            rows = rows[self.part]
            return self.normalise(self.x[rows]), self.y[rows]
        draw = generator(self.seed, epoch, step)
        top, left = torch.randint(0, 2 * PAD + 1, (2, len(rows), 1), generator=draw)
        mirror = torch.rand(len(rows), 1, generator=draw) < 0.5
        i = torch.arange(32)
        across = left + torch.where(mirror, 31 - i, i)
        rows, down, across = rows[self.part], (top + i)[self.part], across[self.part]
        return self.normalise(self.x[rows[:, None, None], down[:, :, None], across[:, None, :]]), self.y[rows]
