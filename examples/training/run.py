"""The run: stages, epochs and steps, validation, checkpoints. A resumed run computes what an uninterrupted one does, bit for bit."""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxq.errors import FxqError
from fxq.trainable import TrainableModel
from training import checkpoint, data, parts
from training.recipe import Recipe
from training.show import Show

CUT_EVERY = 20
"""Steps between two cuts while the sparsity grows."""


@dataclass
class Place:
    """Where a run is: done are ``stage`` stages, ``epoch`` epochs of the running one and ``step`` steps of the running epoch.

    ``number`` counts epochs over all stages; ``loss``, ``right``, ``seen`` and ``seconds`` are sums over the running epoch (of this process),
    ``spent`` the seconds of training so far.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    number: int = 0
    loss: float = 0.0
    right: int = 0
    seen: int = 0
    seconds: float = 0.0
    spent: float = 0.0


def predictions(run: Callable[[Tensor], Any], x: Tensor, normalise: data.Normalise, batch: int = 500) -> Tensor:
    """Class of each uint8 image ``[N, 32, 32, 3]``."""
    with torch.no_grad():
        return torch.cat([torch.as_tensor(run(normalise(part))).argmax(1) for part in x.split(batch)])


def percent(found: Tensor, y: Tensor) -> float:
    """Share of right classes, in percent."""
    return 100 * float((found == y).double().mean())


class Run:
    """One training.

    Args:
        recipe: what to do; ``out``: folder of checkpoints.
        show: progress; ``rank``, ``world``: this process and how many there are.

    Attributes:
        net: the float net of the start; ``model``: what is trained; ``history``: a row for each epoch.
    """

    def __init__(self, recipe: Recipe, out: Path, show: Show, rank: int = 0, world: int = 1) -> None:
        self.recipe, self.out, self.show, self.rank, self.world = recipe, out, show, rank, world
        torch.set_num_threads(recipe.threads)
        self.normalise = data.Normalise(recipe.normalisation == "raw", recipe.channels_last)
        self.net = parts.float_net(recipe, out)
        x, y = data.load("train")
        train, held = data.split(y, recipe.validation, recipe.train_images)
        self.images, self.labels = x[train], y[train]
        self.held = x[held], y[held]
        self.batches = data.Batches(self.images, self.labels, recipe.batch, recipe.seed, recipe.augment, self.normalise, rank, world)
        first = self.normalise(self.images[: recipe.calibration or 2])
        self.model = parts.trainable(recipe, self.net, first)
        self.teacher = parts.teacher(recipe, self.net, first, out) if recipe.distill.weight else None
        self.at, self.history, self.stopping = Place(), [], ""  # type: tuple[Place, list[dict[str, Any]], str]
        self.optimizer: torch.optim.Optimizer | None = None
        self.ema: parts.Ema | None = None
        self.best: dict[str, Any] | None = None
        self.forward: Callable[[Tensor], Tensor] = self.model
        self.session = 0.0

    def resume(self) -> bool:
        """Go on from the checkpoint of the folder, if there is one."""
        state = checkpoint.load(self.out, self.recipe, self.world)
        if state is None:
            return False
        self.at, self.history, self.best = Place(**state["place"]), state["history"], state["best"]
        self._enter(loading=True)
        self.model.load_state_dict(state["state_dict"])
        self._wrap()
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[union-attr]
        if self.ema is not None:
            self.ema.shadow, self.ema.count = state["ema"]["shadow"], state["ema"]["count"]
        torch.set_rng_state(state["rng"])
        return True

    def save(self) -> None:
        """Write a checkpoint."""
        if self.rank == 0 and self.optimizer is not None:
            ema = None if self.ema is None else {"shadow": self.ema.shadow, "count": self.ema.count}
            checkpoint.save(self.out, self.recipe, self.world, {
                "place": asdict(self.at), "history": self.history, "best": self.best, "ema": ema, "rng": torch.get_rng_state(),
                "state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            })  # fmt: skip

    def train(self) -> bool:
        """Train until the end, a signal or ``max_seconds``; whether it is the end. There is a checkpoint in either case."""
        self.session = time.monotonic()
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.at.stage < len(self.recipe.stages):
                if not self._stage():
                    return False
            return True
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _stop(self, number: int, frame: Any) -> None:
        self.stopping = signal.Signals(number).name

    def _wrap(self) -> None:
        """Optimizer, average and the module to call, of the running stage."""
        stage = self.recipe.stages[self.at.stage]
        self.optimizer = parts.optimizer(self.recipe.optimizer, stage, self.model)
        self.ema = parts.Ema(self.model, self.recipe.ema) if self.recipe.ema else None
        module: Any = self.model
        if self.world > 1:
            module = nn.parallel.DistributedDataParallel(module)
        self.forward = torch.compile(module, dynamic=False) if self.recipe.compile else module

    def _enter(self, loading: bool = False) -> None:
        """Bring the model into the phase of the running stage. ``loading``: a checkpoint is loaded next, which brings what is fixed."""
        phases = [s.phase for s in self.recipe.stages[: self.at.stage + 1]]
        if not isinstance(self.model, TrainableModel):
            return
        if "share" in phases and not self.model.shares_weights:
            self.model.share_weights()
        if phases[-1] == "qaft" and self.model.phase != "qaft" and not loading:
            self.model.freeze()

    def _stage(self) -> bool:
        """One stage, or what is left of it."""
        stage = self.recipe.stages[self.at.stage]
        if self.optimizer is None:
            self._enter()
            self._wrap()
        while self.at.epoch < stage.epochs:
            if not self._epoch():
                return False
        if self.best is not None:
            self.model.load_state_dict(self.best["state_dict"])
        elif self.ema is not None:
            self.ema.into(self.model)
        self.optimizer = self.ema = self.best = None
        self.at = Place(self.at.stage + 1, number=self.at.number, spent=self.at.spent)
        return True

    def _epoch(self) -> bool:
        """One epoch, or what is left of it."""
        stage, at, steps = self.recipe.stages[self.at.stage], self.at, self.batches.steps
        name = f"stage {at.stage + 1}/{len(self.recipe.stages)} {stage.phase}, epoch {at.epoch + 1}/{stage.epochs}"
        self.show.epoch(name, at.step, steps)
        order = self.batches.order(at.number)
        self.model.train()
        if self.world > 1:
            self.forward.train()  # type: ignore[attr-defined]
        while at.step < steps:
            start = time.monotonic()
            with parts.compile_errors(self.recipe.compile, name):
                self._step(name, order[at.step], steps)
            at.step += 1
            took = time.monotonic() - start
            at.seconds, at.spent = at.seconds + took, at.spent + took
            self.show.step(name, at.step, steps, self._state())
            stop = self._must_stop()
            if stop or at.step % self.recipe.checkpoint_steps == 0:
                self.save()
            if stop:
                return False
        self._end_of_epoch(name)
        return True

    def _step(self, name: str, rows: Tensor, steps: int) -> None:
        at, recipe = self.at, self.recipe
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = parts.rate(recipe.stages[at.stage], at.epoch * steps + at.step, steps)
        now = at.epoch * steps + at.step
        if recipe.stages[at.stage].sparsity and now % CUT_EVERY == 0 and isinstance(self.model, TrainableModel):
            self.model.prune_weights(parts.sparsity(recipe, at.stage, now, steps))
        x, y = self.batches.take(rows, at.number, at.step)
        where = f"{name}, step {at.step + 1}"
        way_out = "Lower lr, lengthen warmup or set optimizer.clip_norm; checkpoints are from before"
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.amp):
                soft = None
                if self.teacher is not None:
                    with torch.no_grad():
                        soft = self.teacher(x).float()
                logits = self.forward(x).float()
            loss = parts.loss(recipe, logits, y, soft)
        except FxqError as e:
            raise type(e)(e.fact, where=f"{where}: {e.where}" if e.where else where, way_out=way_out) from e
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FxqError(f"the loss is {value}: {parts.not_finite(self.model, x)}", where=where, way_out=way_out)
        self.optimizer.zero_grad()
        loss.backward()
        if recipe.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        at.loss, at.right, at.seen = at.loss + value * len(y), at.right + int((logits.detach().argmax(1) == y).sum()), at.seen + len(y)

    def _state(self) -> str:
        at = self.at
        speed = at.seen * self.world / max(at.seconds, 1e-9)
        return f"loss {at.loss / at.seen:.4f}, train {100 * at.right / at.seen:.2f} %, {speed:.0f} images/s"

    def _must_stop(self) -> bool:
        """A signal came, or the time is over; all processes agree."""
        if self.recipe.max_seconds and time.monotonic() - self.session > self.recipe.max_seconds and not self.stopping:
            self.stopping = f"{self.recipe.max_seconds:g} seconds are over"
        if self.world == 1:
            return bool(self.stopping)
        flag = torch.tensor(float(bool(self.stopping)))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.stopping = self.stopping or ("another process stops" if flag else "")
        return bool(flag)

    def _end_of_epoch(self, name: str) -> None:
        """Validate, note the epoch, keep its weights where they are the best."""
        at = self.at
        judged = self.model if self.ema is None else self.ema.into(copy.deepcopy(self.model))
        judged.eval()
        score = torch.tensor(0.0, dtype=torch.float64)
        if self.rank == 0 and len(self.held[1]):
            score.fill_(percent(predictions(judged, self.held[0], self.normalise), self.held[1]))
        if self.world > 1:
            dist.broadcast(score, 0)
        row = {
            "stage": at.stage, "phase": self.recipe.stages[at.stage].phase, "epoch": at.epoch, "loss": round(at.loss / at.seen, 5),
            "train": round(100 * at.right / at.seen, 3), "validation": round(float(score), 3) if len(self.held[1]) else None,
            "seconds": round(at.seconds, 1), "images_per_second": round(at.seen * self.world / max(at.seconds, 1e-9), 1),
        }  # fmt: skip
        self.history.append(row)
        if self.recipe.select == "best" and (self.best is None or float(score) > self.best["score"]):
            self.best = {"score": float(score), "state_dict": copy.deepcopy(judged.state_dict())}
        shown = "no validation" if row["validation"] is None else f"validation {row['validation']:.2f} %"
        self.show.line(f"{name}: {self._state()}, {shown}, {at.seconds:.0f} s")
        self.at = Place(at.stage, at.epoch + 1, 0, at.number + 1, spent=at.spent)
        self.save()
