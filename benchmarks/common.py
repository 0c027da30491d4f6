"""What the benchmarks share: seeded nets, runtime graphs, interleaved timing, result files."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights of a plausible scale; nothing is left at zero or one, so that equality of outputs means something."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and m.running_var is not None:
                m.running_mean.normal_(0, 0.1, generator=g)
                m.running_var.uniform_(0.5, 1.5, generator=g)
                if m.affine:
                    m.weight.uniform_(0.5, 1.5, generator=g)
                    m.bias.normal_(0, 0.1, generator=g)
        for p in net.parameters():
            if p.numel() and float(p.detach().abs().max()) < 1e-4:
                p.normal_(0, 0.02, generator=g)
    return net.eval()


def torchvision_net(name: str, seed: int = 0) -> nn.Module:
    """A torchvision builder without pretrained weights."""
    import inspect

    import torchvision

    torch.manual_seed(seed)
    builder = torchvision.models.get_model_builder(name)
    extra: dict[str, Any] = {}
    if "weights_backbone" in inspect.signature(builder).parameters:
        extra["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        extra["init_weights"] = True
    return randomise(builder(weights=None, **extra), seed)


def session(model: bytes, threads: int = 1, level: str = "ORT_ENABLE_ALL", save: str | None = None) -> ort.InferenceSession:
    o = ort.SessionOptions()
    o.intra_op_num_threads, o.inter_op_num_threads, o.log_severity_level = threads, 1, 4
    # Between runs the threads of one session must not spin on the cores that the next one measures.
    o.add_session_config_entry("session.force_spinning_stop", "1")
    o.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    if save is not None:
        o.optimized_model_filepath = save
    return ort.InferenceSession(model, o, providers=["CPUExecutionProvider"])


def runtime_ops(model: bytes) -> Counter[str]:
    """Operations of the graph that ONNX Runtime really executes."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "optimized.onnx")
        session(model, save=path)
        return Counter(n.op_type for n in onnx.load(path).graph.node)


INT_WEIGHTED = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits")
FLOAT_WEIGHTED = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose", "NhwcFusedConv")


def coverage(ops: Counter[str]) -> str:
    """``conv int8/float, gemm int8/float, Q+DQ`` as in the reference tables."""
    convs = ops["QLinearConv"], sum(ops[o] for o in FLOAT_WEIGHTED if "Conv" in o)
    gemms = sum(ops[o] for o in INT_WEIGHTED if o != "QLinearConv"), sum(ops[o] for o in FLOAT_WEIGHTED if "Conv" not in o)
    return f"{convs[0]}/{convs[1]}, {gemms[0]}/{gemms[1]}, {ops['QuantizeLinear']}+{ops['DequantizeLinear']}"


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each callable, taken in turns so that the machine's noise hits all alike."""
    times: dict[str, list[float]] = {k: [] for k in runs}
    for i in range(rounds + warmup):
        for k, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                times[k].append(time.perf_counter() - start)
    return {k: statistics.median(v) for k, v in times.items()}


def environment() -> dict[str, str]:
    """Versions and machine, for the head of a result file."""
    import torchvision

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    isa = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if f in flags]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__, "torchvision": torchvision.__version__, "onnx": onnx.__version__, "onnxruntime": ort.__version__,
        "python": platform.python_version(), "cpu": f"{platform.machine()} {' '.join(isa)}",
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }  # fmt: skip


def short(text: str) -> str:
    """For a cell: without the folders of this machine, on one line."""
    words = [w if "/" not in w else w.rsplit("site-packages/", 1)[-1] for w in text.split(" ")]
    return " ".join(words)[:200].replace("|", "\\|").replace("\n", " ")


class Table:
    """Rows by key in ``results/<name>.json``; finished rows survive a stop. :meth:`write` makes the Markdown file."""

    def __init__(self, name: str, title: str, fresh: bool = False) -> None:
        self.name, self.title, self.path = name, title, RESULTS / f"{name}.json"
        RESULTS.mkdir(exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.exists() and not fresh:
            self.rows = json.loads(self.path.read_text())["rows"]

    def put(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        self.path.write_text(json.dumps({"environment": environment(), "rows": self.rows}, indent=1) + "\n")
        print(key, row, flush=True)

    def write(self, summary: list[str]) -> None:
        env = environment()
        columns = list(dict.fromkeys(c for r in self.rows.values() for c in r))
        lines = [f"# {self.title}", "", ", ".join(f"{k} {v}" for k, v in env.items() if k != "command"), "", f"`{env['command']}`", ""]
        lines += [*(f"- {s}" for s in summary), "", "| net | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
        lines += [f"| {k} | " + " | ".join(str(r.get(c, "")) for c in columns) + " |" for k, r in self.rows.items()]
        (RESULTS / f"{self.name}.md").write_text("\n".join(lines) + "\n")
