"""What each process of tests/test_distributed.py runs; the tests run the same functions in one process and compare.

``python -m tests.distributed_worker STORE RANK WORLD OUT`` writes the results of one rank to OUT.
"""

import copy
import hashlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxq
from fxq import distributed, schemes
from fxq.errors import FxqError
from fxq.graph import Grid
from fxq.observers import MovingAverage
from fxq.spec import QParams, QuantSpec
from fxq.trackers import TrackedFakeQuantize, tracker
from fxq.trainable import TrainableModel

TRAINED = ("iao_w8a8", "iao_w4a4_lsq", "xnor_w1a1", "tbn_w1at")
OBSERVED = ("minmax", "ema", "percentile", "mse", "entropy")
SHARED = (("deepcomp_w3", "sensitivity"), ("iao_w8a8", "global"))
STEPS = 3
X = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Quantized layers with batch norms, a float one, a batch norm by itself, a residual sum, a linear layer with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None)
        self.c, self.bn_c, self.bn_d = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)
        self.d, self.bn_e, self.fc = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(x)))
        x = F.relu(x + self.bn_b(self.b(x)))
        x = self.bn_d(torch.tanh(self.bn_c(self.c(x))))
        return self.fc(F.relu(self.bn_e(self.d(torch.tanh(x).mean((2, 3))))))  # type: ignore[no-any-return]


def net(seed: int = 0) -> nn.Module:
    """Shifts of batch norms are no round numbers: a channel that is constant must not lie on the kink of a ReLU."""
    torch.manual_seed(seed)
    made = Net().eval()
    for m in made.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
    return made


def scheme(name: str, exact: bool) -> schemes.Scheme:
    """``exact``: the layers at the ends stay float, so that training rounds nothing in float32."""
    made = schemes.get(name)
    return replace(made, name=f"{name}_exact", int8_layers=(), float_layers=("first", "last")) if exact and made.int8_layers else made


def qat(name: str, double: bool = False) -> TrainableModel:
    """In float64 the grids begin where calibration left them, which is the same for all; otherwise the first training batch sets them."""
    data: dict[str, Any] = {"calibration" if double else "example": X[:2]}
    made = fxq.compile(net(), scheme(name, double), mode="qat", progress=False, **data)
    assert isinstance(made, TrainableModel)
    return made.double() if double else made


def batch(step: int, rank: int, world: int, double: bool) -> tuple[Tensor, Tensor]:
    """The share of a rank in a batch of 8."""
    g = torch.Generator().manual_seed(10 + step)
    x, y = torch.randn(8, 3, 10, 10, generator=g), torch.randint(0, 5, (8,), generator=g)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    return x[rows].double() if double else x[rows], y[rows]


def steps(module: nn.Module, q: TrainableModel, first: int, count: int, rank: int, world: int, double: bool, lr: float = 1e-2) -> None:
    optimizer = torch.optim.SGD([p for p in q.parameters() if p.requires_grad], lr=lr)
    for step in range(first, first + count):
        x, y = batch(step, rank, world, double)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()


def state(q: TrainableModel) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in q.state_dict().items() if isinstance(v, Tensor)}


def wrapped(q: TrainableModel, world: int, buffers: bool) -> nn.Module:
    """In DDP, which broadcasts buffers in each forward unless ``buffers`` is false."""
    if world == 1:
        return q
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch renames the option
        return DistributedDataParallel(q) if buffers else DistributedDataParallel(q, broadcast_buffers=False)


def train(name: str, double: bool, rank: int, world: int, buffers: bool = True) -> dict[str, Any]:
    """QAT, a checkpoint, QAFT, the deployed model's bytes."""
    q = qat(name, double).train()
    steps(wrapped(q, world, buffers), q, 0, STEPS, rank, world, double)
    trained = state(q)
    checkpoint = copy.deepcopy(q.state_dict())
    q.float().freeze().train()
    steps(wrapped(q, world, buffers), q, STEPS, 2, rank, world, False, 1e-3)
    m = q.convert()
    return {"trained": trained, "checkpoint": checkpoint, "frozen": state(q), "file": hashlib.sha256(m.lower().data).hexdigest()}


def resumed(checkpoint: dict[str, Any], rank: int, world: int) -> dict[str, Tensor]:
    """One step more from a checkpoint of ``iao_w8a8``."""
    q = qat("iao_w8a8").train()
    q.load_state_dict(checkpoint)
    steps(wrapped(q, world, True), q, STEPS, 1, rank, world, False)
    return state(q)


def calibrated(observer: str, share: list[Tensor]) -> dict[str, Tensor]:
    m = fxq.compile(net(), "iao_w8a8", calibration=share, example=X[:2], observer=observer, progress=False)
    return {k: v for k, v in m.state_dict().items() if k.endswith(("scale", "zero_point"))}


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [scale * torch.randn(4, 3, 10, 10, generator=g) for scale in (1.0, 2.0, 0.5, 1.5)]


def tracked(how: str, rank: int, world: int) -> list[Tensor]:
    """The grid of one tracker, on raw values, after each batch."""
    spec = QuantSpec.parse("t2/pt" if how == "ternary" else "u4/pt")
    qp = QParams(spec, torch.ones(()), torch.zeros((), dtype=torch.int32))
    made = tracker(qp, Grid(spec, clamp=(0.0, None) if how == "lsq" else None, qparams=qp, how=how, step=torch.ones(()) if how == "ternary" else None))
    found = []
    for step in range(4):
        x = batch(step, rank, world, False)[0] * (step + 1)
        made.see(x, False)
        made.see(x * 1.5 + 0.25, True)
        found.append(torch.stack([made.scale, made.zero_point.float(), *([made.step] if made.step is not None else [])]).detach().clone())
    return found


def message(act: Callable[[], object]) -> str:
    try:
        act()
    except FxqError as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def errors(rank: int, world: int) -> dict[str, str]:
    """An error of rank 1 reaches both."""
    q = qat("iao_w8a8").train()
    x = batch(0, rank, world, False)[0]
    bad = x.clone()
    if rank == 1:
        bad[0, 0, 0, 0] = torch.nan
    nan = [X, X * torch.nan] if rank == 1 else [X]
    none: list[Tensor] = [] if rank == 1 else [X]
    found = {
        "input": message(lambda: q(bad)),
        "calibration": message(lambda: fxq.compile(net(), "iao_w8a8", calibration=nan, progress=False)),
        "no data": message(lambda: fxq.compile(net(), "iao_w8a8", calibration=none, progress=False)),
        "two nets": message(lambda: fxq.compile(net() if rank else nn.Conv2d(3, 4, 3), "iao_w8a8", calibration=X, progress=False)),
    }
    q(x)  # nobody is left behind
    if rank == 1:
        nn.init.constant_(q.get_submodule("root.b.op").weight, torch.nan)  # type: ignore[arg-type]
    return {**found, "weight": message(lambda: q(x))}


def alone(rank: int) -> str:
    """Rank 0 compiles by itself, both train by themselves."""
    with distributed.alone():
        if rank == 0:
            fxq.compile(net(), "iao_w8a8", calibration=X, progress=False)
        q = qat("iao_w8a8").train()
        for _ in range(rank + 1):
            q(X * (rank + 1))
    return str(next(m.tracker.qparams for m in q.modules() if isinstance(m, TrackedFakeQuantize)))


def uneven(rank: int, world: int, sizes: tuple[int, ...], together: bool = True) -> dict[str, Tensor]:
    """One training forward of a share of 8 images."""
    q = qat("xnor_w1a1", double=True).train()
    q.sync_batch_norm = together
    assert q.sync_batch_norm is together
    start = sum(sizes[:rank])
    q(X[start : start + sizes[rank]].double() if world > 1 else X.double())
    return state(q)


def compiled(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two steps of DDP after a first one, with ``torch.compile`` and without."""
    states = []
    for wanted in (True, False):
        q = qat("xnor_w1a1").train()
        module = wrapped(q, world, True)
        steps(torch.compile(module, backend="eager") if wanted else module, q, 0, 3, rank, world, False)  # type: ignore[arg-type]
        states.append(state(q))
    return states[0], states[1]


def cut(share: list[Tensor]) -> dict[str, Tensor]:
    """Weights after pruning by the gradients of all processes."""
    how = fxq.Prune(ratio=0.4, by="taylor", multiple_of=1)
    return {k: v for k, v in fxq.prune(net(), how, data=share, progress=False).state_dict().items()}


def sparse(name: str, scope: str, rank: int) -> Any:
    """A net with masks; each process compiles with inputs of its own."""
    own = batches()[rank] * torch.linspace(0.1, 3, 3).reshape(1, 3, 1, 1).flip(1 if rank else 0)
    how = fxq.Prune(sparsity=0.3, sparsity_scope=scope)
    return fxq.compile(net(), name, calibration=[own], prune=how, share=fxq.Share(3), mode="qat", progress=False).train()


def shared(name: str, scope: str, rank: int, world: int) -> dict[str, Tensor]:
    """Masks that grow, codebooks that train, deployed."""
    q = sparse(name, scope, rank)
    for ratio in (0.5, 0.7):
        steps(wrapped(q, world, True), q, 0, 1, rank, world, False)
        q.prune_weights(ratio)
    q.share_weights()
    steps(wrapped(q, world, True), q, 1, 2, rank, world, False)
    return {k: v for k, v in q.eval().convert().state_dict().items() if isinstance(v, Tensor)}


def moving(share: list[Tensor]) -> MovingAverage:
    observer = MovingAverage(QuantSpec.parse("u8/pt"))
    for x in share:
        observer.observe(x)
    return observer


def main(store: str, rank: int, world: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    runs = [("iao_w8a8", False), ("iao_w4a4_lsq", True), ("xnor_w1a1", True), ("tbn_w1at", True)]
    share = batches()[:3] if rank == 0 else batches()[3:]
    results: dict[str, Any] = {f"train {name}": train(name, double, rank, world) for name, double in runs}
    results["no broadcast"] = train("xnor_w1a1", True, rank, world, buffers=False)
    results["resumed"] = resumed(results["train iao_w8a8"]["checkpoint"], rank, world)
    results |= {f"tracker {how}": tracked(how, rank, world) for how in ("range", "lsq", "pact", "ternary")}
    results |= {f"calibrated {name}": calibrated(name, share) for name in OBSERVED}
    results["calibrated by one"] = calibrated("minmax", batches() if rank == 0 else [])
    results["corrected"] = {k: v for k, v in fxq.compile(net(), "iao_w4a8", calibration=share, progress=False).state_dict().items()}
    results["cut"] = cut(share)
    results |= {f"shared {n} {scope}": shared(n, scope, rank, world) for n, scope in SHARED}
    results["errors"] = errors(rank, world)
    results["alone"] = alone(rank)
    results["uneven"], results["empty"] = uneven(rank, world, (5, 3)), uneven(rank, world, (8, 0))
    results["apart"] = uneven(rank, world, (4, 4), together=False)
    results["compiled"] = compiled(rank, world)
    torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
