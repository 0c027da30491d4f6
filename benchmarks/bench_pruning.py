"""Which nets are pruned rightly, how long does it take, and which MACs are left at the same ratio? fxq beside Torch-Pruning, in one run.

Run: python benchmarks/bench_pruning.py [--fresh] [--redo] [--int8] [--limit 120] [--largest 1000] [--ratios 0.3 0.5] [--multiples 1 8] [names ...]

All classification nets of torchvision, two of its segmentation nets and two of ``fxq.zoo``, with seeded random weights and batch norms; both tools rank
by the L2 norm over all layers. Each cut net is compared with its masked twin: the whole net in which what was cut reads as zero (fxq's own, with the
constants of cut channels; for Torch-Pruning made by following its groups, see ``torch_pruning_peer.py``). Finished rows are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
import torch_pruning_peer as peer
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxq
from fxq import pruning, zoo

ZOO = ("nin_gc", "resnet20")
SEGMENTATION = ("deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large")
SIZES = {"vit": 224, "swin": 224, "maxvit": 224, "inception": 96}
"""Input sizes other than 64 pixels, by the beginning of a name."""
TOLERANCE = 1e-5
DOUBLE = 150e6
"""Nets of at most so many parameters are compared in float64, so that nothing but a wrong cut shows; larger ones in float32."""
TOOLS = ("fxq", "TP")
OUT_OF_TIME = "not within"


def names() -> list[str]:
    return [*torchvision.models.list_models(module=torchvision.models), *SEGMENTATION, *ZOO]


def net_of(name: str) -> nn.Module:
    """The net by name, with random weights and without heads that only run in training."""
    if name in ZOO:
        torch.manual_seed(0)
        return lively(common.randomise(zoo.build(name)), example(name))
    net: Any = common.torchvision_net(name)
    if hasattr(net, "aux_logits"):
        net.aux_logits = False
        for head in ("aux1", "aux2", "AuxLogits"):
            if hasattr(net, head):
                setattr(net, head, None)
    if isinstance(net, torchvision.models.SqueezeNet):  # a ReLU stands last: let it not be all zero
        net.classifier[1].bias.data.fill_(1.0)
    return lively(net, example(name))


def lively(net: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms with the statistics of random images, so that the output depends on the input also behind many random layers."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.train()
        m.momentum = 1.0
    with torch.no_grad():
        net(torch.cat([x, x.flip(3), 0.5 * x + 0.5 * x.flip(0), x.flip(2)]))
    for m in norms:
        m.momentum = 0.1
    return net.eval()


def example(name: str) -> Tensor:
    size = 32 if name in ZOO else next((s for prefix, s in SIZES.items() if name.startswith(prefix)), 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"{OUT_OF_TIME} {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def size_of(net: nn.Module, x: Tensor) -> tuple[int, int]:
    """MACs of one sample, by torch's own counter, and parameters."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2 // len(x), sum(p.numel() for p in net.parameters())


def verdict(cut: nn.Module, masked: nn.Module, x: Tensor, shape: torch.Size) -> str:
    """``ok``, or what is wrong with a cut net."""
    with torch.no_grad():
        found = peer.output(cut(x))
        if found.shape != shape:
            return f"WRONG: output {list(found.shape)}"
        if sum(p.numel() for p in masked.parameters()) <= DOUBLE:
            cut, masked, x = copy.deepcopy(cut).double(), copy.deepcopy(masked).double(), x.double()
            found = peer.output(cut(x))
        want = peer.output(masked(x))
    top = float(want.abs().max())
    if not top or float((want[0] - want[1]).abs().max()) < 1e-6 * top:
        return "the output is flat"
    off = float((found - want).abs().max()) / top
    return "ok" if off <= TOLERANCE else f"WRONG: {off:.1e} from the masked net"


Made = tuple[nn.Module, nn.Module, nn.Module, dict[str, Any]]
"""A cut net that takes the input, one and its masked twin to compare, and what else is known."""


@contextlib.contextmanager
def timed(module: Any, *functions: str) -> Iterator[dict[str, float]]:
    """Seconds in functions of a module, by name."""
    seconds = dict.fromkeys(functions, 0.0)
    old = {name: getattr(module, name) for name in functions}

    def timer(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return old[name](*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return run

    for name in functions:
        setattr(module, name, timer(name))
    try:
        yield seconds
    finally:
        for name in functions:
            setattr(module, name, old[name])


def by_fxq(net: nn.Module, x: Tensor, ratio: float, multiple: int) -> Made:
    start = time.perf_counter()
    with timed(pruning, "find", "plan", "apply") as inside:
        pruned = fxq.prune(net, fxq.Prune(ratio=ratio, multiple_of=multiple, by="l2"), example=x, progress=False)
    parts = {"s": time.perf_counter() - start, "groups s": inside["find"], "choice s": inside["plan"] - inside["find"], "cut s": inside["apply"]}
    known = {k: round(v, 2) for k, v in parts.items()} | {"nodes": pruned.history["trace"].nodes}
    return pruned, pruned.graph_module, pruned.masked(), known


def by_torch_pruning(net: nn.Module, x: Tensor, ratio: float, multiple: int) -> Made:
    made = peer.cut(copy.deepcopy(net), x, ratio, multiple)
    return made.net, made.net, made.masked, {"s": round(made.seconds, 2)}


RUNS: dict[str, Callable[[nn.Module, Tensor, float, int], Made]] = {"fxq": by_fxq, "TP": by_torch_pruning}


def one(tool: str, net: nn.Module, x: Tensor, ratio: float, multiple: int, limit: int, int8: bool = False) -> dict[str, Any]:
    """The cells of one tool. An error is its first line."""
    with torch.no_grad():
        shape = peer.output(net(x)).shape
    before, cells = size_of(net, x), {}
    try:
        with limited(limit):
            cut, graph, masked, known = RUNS[tool](net, x, ratio, multiple)
        cells |= known
        cells["is"] = verdict(graph, masked, x, shape)
        after = size_of(graph, x)
        cells["MACs left"], cells["parameters left"] = (f"{a / b:.1%}" for a, b in zip(after, before, strict=True))
        if int8 and tool == "fxq":
            cells["int8"] = in_int8(cut, x)
    except Exception as e:
        text = str(e).splitlines() or [""]
        cells["is"] = common.short(f"{type(e).__name__}: {text[0]}")
    return {f"{tool} {k}": v for k, v in cells.items()}


def in_int8(pruned: nn.Module, x: Tensor) -> str:
    """The pruned net in 8 bits in ONNX Runtime against the integer reference."""
    try:
        m = fxq.compile(pruned, "iao_w8a8", calibration=[x], progress=False)
        proof = m.verify(m.lower().data, [0.9 * x])
        return "ok" if proof.ok else f"{proof.hidden_differ} of {proof.hidden} elements differ"
    except Exception as e:
        return common.short(f"{type(e).__name__}: {str(e).splitlines()[0]}")


def summary(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        f"Torch-Pruning {peer.version()}; s: all from the net to the cut one (fxq: and its proofs); groups, choice, cut: of that; MACs: torch's counter",
        f"ok: the output is the masked net's within {TOLERANCE:g} of its greatest value (in float64, nets above {DOUBLE / 1e6:g} M parameters in float32)",
    ]
    for tool in TOOLS:
        found = [str(r[f"{tool} is"]) for r in rows.values() if f"{tool} is" in r]
        wrong = sum(f.startswith("WRONG") for f in found)
        lines.append(f"{tool}: {found.count('ok')} of {len(found)} right, {wrong} wrong, {len(found) - wrong - found.count('ok')} not cut")
    if any(k.startswith("vit") and str(r.get("TP is")).startswith("WRONG") for k, r in rows.items()):
        lines.append("ViT: Torch-Pruning cuts single dimensions of the joint heads; the heads' borders and the scale of their scores move with them")
    both = [r for r in rows.values() if all(f"{t} s" in r for t in TOOLS)]
    if both:
        faster = sum(r["fxq s"] < r["TP s"] for r in both)
        sums = ", ".join(f"{k} {sum(r[f'{k} s'] for r in both):.1f}" for k in ("fxq", "fxq groups", "fxq choice", "fxq cut", "TP"))
        lines.append(f"seconds where both cut: {sums}; fxq is faster in {faster} of {len(both)}")
    quantized = [r["fxq int8"] for r in rows.values() if "fxq int8" in r]
    if quantized:
        lines.append(f"in 8 bits in ONNX Runtime, equal to the integer reference: {quantized.count('ok')} of {len(quantized)}")
    return lines


def out_of_time(rows: dict[str, dict[str, Any]], name: str, tool: str) -> str | None:
    """What another row of this net says when the tool was too slow there."""
    found = (str(r.get(f"{tool} is")) for k, r in rows.items() if k.split(" ")[0] == name)
    return next((f for f in found if OUT_OF_TIME in f), None)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fresh", action="store_true", help="forget all finished rows")
    p.add_argument("--redo", action="store_true", help="run the named nets again, keep the other rows")
    p.add_argument("--int8", action="store_true", help="also compile fxq's cut net to 8 bits and prove the file")
    p.add_argument("--limit", type=int, default=120, help="seconds for a tool to cut a net; one that needs more is not asked again for this net")
    p.add_argument("--largest", type=float, default=1000, help="leave nets with more million parameters out")
    p.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    p.add_argument("--multiples", type=int, nargs="+", default=[1, 8])
    p.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("names", nargs="*")
    a = p.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(a.threads)
    table = common.Table("pruning", "Structured pruning: nets, time, MACs left, fxq beside Torch-Pruning", a.fresh)
    warm = zoo.build("tiny_resnet8")
    for tool in a.tools:  # what is imported and compiled at the first use does not count
        one(tool, warm, torch.randn(2, 3, 32, 32), 0.3, 1, a.limit)
    for name in a.names or names():
        keys = {f"{name} {r:g} x{m}": (r, m) for r in a.ratios for m in a.multiples}
        left = {k: v for k, v in keys.items() if a.redo or k not in table.rows}
        if not left:
            continue
        net, x = net_of(name), example(name)
        if sum(q.numel() for q in net.parameters()) > a.largest * 1e6:
            continue
        for key, (ratio, multiple) in left.items():
            row: dict[str, Any] = {}
            for tool in a.tools:
                slow = out_of_time(table.rows, name, tool)
                row |= {f"{tool} is": slow} if slow else one(tool, net, x, ratio, multiple, a.limit, a.int8)
                gc.collect()
            table.put(key, table.rows.get(key, {}) | row)
        del net
        gc.collect()
    table.write(summary(table.rows))


if __name__ == "__main__":
    main()
