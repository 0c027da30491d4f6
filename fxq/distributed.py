"""Several processes that calibrate or train one model together (``torch.distributed``): what they agree on, and how.

Everything here runs over the default process group (gloo or nccl). All processes call it in the same order, as they do when they run the same model
in training mode; evaluation, :meth:`freeze` and :meth:`convert` of a model never wait for another process. Without ``torch.distributed``, with one
process and inside :func:`alone` nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fxq.errors import FxqError


@dataclass
class _State:
    """Of this process: it works ``alone``; it has ``met`` the others in the running :func:`meeting`."""

    alone: bool = False
    met: bool = False


_STATE = _State()


@dataclass(frozen=True)
class Failure:
    """What a process gives the others instead of a value: its error."""

    text: str


def world() -> int:
    """Number of processes that work together: 1 without ``torch.distributed`` and inside :func:`alone`."""
    if _STATE.alone or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process waits for no other one: for what one rank does by itself, such as compiling on rank 0 only."""
    before, _STATE.alone = _STATE.alone, True
    try:
        yield
    finally:
        _STATE.alone = before


@contextmanager
def meeting(expected: bool = True) -> Iterator[None]:
    """An error that one process has inside, before its first :func:`gather`, becomes an error of all processes. ``expected``: there will be one."""
    _STATE.met = not expected
    try:
        yield
    except Exception as e:
        if not _STATE.met:
            report(e)
        raise


def report(error: Exception) -> None:
    """Give the others, who wait in :func:`gather`, this process's error."""
    _STATE.met = True
    if world() > 1:
        _exchange(Failure(str(error) or type(error).__name__))


def gather(value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks (anything that can be pickled).

    Raises:
        FxqError: when a process gives a :class:`Failure`, on all of them.
    """
    _STATE.met = True
    every = _exchange(value) if world() > 1 else [value]
    for rank, v in enumerate(every):
        if isinstance(v, Failure):
            raise FxqError(f"the process of rank {rank} failed: {v.text}", way_out="Mend that; all processes stopped")
    return every


def _exchange(value: Any) -> list[Any]:
    every: list[Any] = [None] * world()
    _together(lambda: dist.all_gather_object(every, value))
    return every


def _together(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeError as e:
        fact = (str(e) or type(e).__name__).splitlines()[0]
        way_out = "All processes run the same forwards in training mode and compile together; what one does by itself goes into fxq.distributed.alone()"
        raise FxqError(f"the processes did not meet: {fact}", way_out=way_out) from e


def _sent(v: Tensor) -> Tensor:
    """A copy where the process group takes it from."""
    return v.detach().to("cuda", copy=True) if dist.get_backend() == "nccl" else v.detach().clone().contiguous()


def _max(v: Tensor) -> Tensor:
    sent = _sent(v)
    _together(lambda: dist.all_reduce(sent, dist.ReduceOp.MAX))
    return sent.to(v.device)


def _rows(v: Tensor, world: int) -> Tensor:
    sent = _sent(v)
    rows = [torch.empty_like(sent) for _ in range(world)]
    _together(lambda: dist.all_gather(rows, sent))
    return torch.stack(rows).to(v.device)


_MAX = torch.library.custom_op("fxq::all_max", _max, mutates_args=(), schema="(Tensor v) -> Tensor")
_ROWS = torch.library.custom_op("fxq::all_rows", _rows, mutates_args=(), schema="(Tensor v, int world) -> Tensor")
_MAX.register_fake(lambda v: torch.empty_like(v))
_ROWS.register_fake(lambda v, world: v.new_empty(world, v.shape[0]))


def _all_max(v: Tensor) -> Tensor:
    """Greatest value of all processes in each place."""
    return _MAX(v) if torch.compiler.is_compiling() else _max(v)


def _all_rows(v: Tensor, world: int) -> Tensor:
    """The vectors ``[n]`` of all processes as ``[world, n]``, in the order of their ranks: sums over it have the same bits everywhere."""
    return _ROWS(v, world) if torch.compiler.is_compiling() else _rows(v, world)


def extremes(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Least ``lo`` and greatest ``hi`` of all processes, exact.

    Args:
        lo, hi: float, rank 0. ``lo = inf`` and ``hi = -inf`` where there is no value; NaN and other infinities become infinities for all.
    """
    if world() == 1:
        return lo, hi
    ends = torch.stack([-lo, hi])
    least, hi = _all_max(torch.where(torch.isnan(ends), torch.inf, ends)).unbind()  # a maximum with NaN is not defined
    return -least, hi


def any_of(flag: Tensor) -> Tensor:
    """Does one process say so? ``flag``: bool, rank 0."""
    return flag if world() == 1 else _all_max(flag.to(torch.float32)) > 0


def total(v: Tensor) -> Tensor:
    """Sum of the vectors ``[n]`` of all processes, in float64, the same bits in each."""
    v = v.to(torch.float64)
    return v if world() == 1 else _all_rows(v, world()).sum(0)


def mean(v: Tensor) -> Tensor:
    """Mean over the elements that all processes have, dtype of ``v``, rank 0."""
    if world() == 1:
        return v.mean()
    sums = torch.stack([v.sum(dtype=torch.float64), torch.full((), v.numel(), dtype=torch.float64, device=v.device)])
    every, count = total(sums).unbind()
    return (every / count.clamp(min=1)).to(v.dtype)


class _Norm(torch.autograd.Function):
    """A batch norm by the statistics of all processes' batches; gives the result, their mean, biased variance and number of elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, processes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, _dims(x), correction=0) if x.numel() else wide.new_zeros(2, channels).unbind()
        count = torch.full((1,), x.numel() // channels, dtype=torch.float64, device=x.device)
        every = _all_rows(torch.cat([count, mean.double(), var.double()]), processes)
        n, means, variances = every[:, :1], every[:, 1 : 1 + channels], every[:, 1 + channels :]
        number = n.sum()
        mean = (n * means).sum(0) / number
        var = (n * (variances + (means - mean).square())).sum(0) / number
        mean, var = mean.to(wide.dtype), var.to(wide.dtype)
        out = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), number)
        ctx.processes = processes
        ctx.mark_non_differentiable(mean, var, number)
        return out, mean, var, number

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, number = ctx.saved_tensors
        shape, dims = [1, -1, *([1] * (x.ndim - 2))], _dims(x)
        g = grads[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.reshape(shape)) * inverse.reshape(shape)
        to_bias, to_weight = g.sum(dims), (g * normal).sum(dims)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = _all_rows(torch.cat([to_bias, to_weight]).double(), ctx.processes).sum(0) / number
            mean_g, mean_gx = (v.to(mean.dtype).reshape(shape) for v in sums.chunk(2))
            factor = (inverse if weight is None else inverse * weight).reshape(shape)
            dx = ((g - mean_g - normal * mean_gx) * factor).to(x.dtype)
        if weight is None:
            return dx, None, None, None, None
        return dx, to_weight.to(weight.dtype), to_bias.to(weight.dtype), None, None


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def batch_norm(bn: Any, x: Tensor, together: bool = True) -> Tensor:
    """Run a batch norm module; in training over the batches of all processes, as ``torch.nn.SyncBatchNorm`` does on GPUs.

    The mean and the biased variance are those of all elements, the running variance takes the unbiased one; running statistics end up the same in all
    processes. The gradient of ``x`` is that of the sum of all processes' losses.

    Args:
        bn: ``nn.BatchNorm1d`` to ``3d``.
        x: ``[N, C, ...]``; processes may have different N.
        together: over all processes; otherwise each by itself.
    """
    processes = world()
    if processes == 1 or not together or not bn.training:
        return _alone(bn, x) if bn.momentum is None and torch.compiler.is_compiling() else torch.as_tensor(bn(x))
    bn._check_input_dim(x)
    out, mean, var, number = _Norm.apply(x, bn.weight, bn.bias, bn.eps, processes)
    if bn.running_mean is not None:
        _move(bn, mean, var * (number / (number - 1).clamp(min=1)).to(var.dtype))
    return torch.as_tensor(out)


def _alone(bn: Any, x: Tensor) -> Tensor:
    """A batch norm whose statistics are plain means over all batches: torch's own module asks for the number of batches, which breaks a compiled graph."""
    if not bn.training or bn.running_mean is None:
        return torch.as_tensor(bn(x))
    var, mean = torch.var_mean(x.detach().to(bn.running_mean.dtype), _dims(x), correction=1)
    _move(bn, mean, var)
    return F.batch_norm(x, None, None, bn.weight, bn.bias, True, 0.0, bn.eps)


@torch.no_grad()
def _move(bn: Any, mean: Tensor, unbiased: Tensor) -> None:
    """Take the statistics of a batch into the running ones."""
    bn.num_batches_tracked.add_(1)
    share = 1 / bn.num_batches_tracked.double() if bn.momentum is None else bn.momentum
    for running, now in ((bn.running_mean, mean), (bn.running_var, unbiased)):
        running.copy_((1 - share) * running + share * now.to(running.dtype))
