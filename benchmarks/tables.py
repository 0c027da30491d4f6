"""Writes the tables of README.md and docs/*.md from benchmarks/results/*.json.

Run: python benchmarks/tables.py     (between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``)
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = (
    "resnet18 resnet50 mobilenet_v2 mobilenet_v3_small efficientnet_b0 densenet121 googlenet squeezenet1_1 shufflenet_v2_x1_0 regnet_y_400mf "
    "vgg11_bn inception_v3 deeplabv3_mobilenet_v3_large convnext_tiny vit_b_16 swin_t"
).split()
Rows = dict[str, dict[str, Any]]


def load(name: str) -> tuple[Rows, str]:
    """Rows of a result file, and when and by which command they were made."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return found["rows"], f"[`{name}.md`](benchmarks/results/{name}.md), {found['environment']['date']}"


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, r)) + " |" for r in rows)])


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def coverage() -> str:
    rows, source = load("coverage")
    done = {
        "compiled": sum(r.get("compiled") == "yes" for r in rows.values()),
        "lowered": sum(r.get("lowered") == "yes" for r in rows.values()),
        "run": sum("proof" in r for r in rows.values()),
        "equal": sum(str(r.get("int8 elements differ", "1/")).startswith("0/") for r in rows.values()),
    }
    text = (
        f"Coverage ({source}): of {len(rows)} torchvision builders with random weights {done['compiled']} are captured and compiled, "
        f"{done['lowered']} lowered, {done['run']} run by ONNX Runtime, {done['equal']} of them with 0 integer elements different from the "
        f"reference. What ONNX Runtime's optimizer leaves (int8/float):"
    )
    cells = []
    for name in SHOWN:
        conv, gemm, left = rows[name]["int8/float conv, gemm, Q+DQ"].split(", ")
        cells.append([name, conv, gemm, left, rows[name]["int8 elements differ"].replace("/", " of ")])
    return text + "\n\n" + table(["net", "conv", "gemm and matmul", "Q + DQ left", "integer elements that differ"], cells)


def accuracy() -> str:
    rows, source = load("accuracy")
    cells = [[*k.split(" "), *(r[c] for c in ("float", "simulator", "reference", "ONNX Runtime")), r["quantize_static (w8a8)"] or "-"] for k, r in rows.items()]
    return f"Accuracy, top-1 ({source}):\n\n" + table(["net", "scheme", "float", "simulator", "reference", "ONNX Runtime", "quantize_static"], cells)


def speed() -> str:
    rows, source = load("speed")
    tags = list(dict.fromkeys(c for r in rows.values() for c in r if re.fullmatch(r"t\d+ b\d+", c)))
    ratio = {t: [float(r[t].split(" / ")[2]) for r in rows.values() if t in r] for t in tags}
    cells = [[name, *(r.get(t, "-") for t in tags)] for name, r in rows.items()]
    last = ["**geometric mean of the third**", *(f"{mean(ratio[t]):.3f}, least {min(ratio[t]):.3f}" for t in tags)]
    text = (
        f"Speed in ONNX Runtime ({source}): fp32 over quantize_static / fp32 over fxq / quantize_static over fxq, "
        f"by threads (t) and batch (b), one interleaved run:"
    )
    return text + "\n\n" + table(["net", *tags], [*cells, last])


def compile_time() -> str:
    rows, source = load("compile")
    columns = ["fxq s", "quantize_static s", "float passes s", "fxq / static", "fxq / float", "fxq peak MB", "static peak MB"]
    last = ["**geometric mean**", "", "", "", *(f"{mean([r[c] for r in rows.values()]):.2f}" for c in columns[3:5]), "", ""]
    cells = [[k, *(r[c] for c in columns)] for k, r in rows.items()]
    return f"Compile time, trace to saved file, 64 images ({source}):\n\n" + table(["net", *columns], [*cells, last])


def observers() -> str:
    rows, source = load("observers")
    columns = list(next(iter(rows.values())))
    cells = [[k, *(r[c] for c in columns)] for k, r in rows.items()]
    return f"Top-1 minus float, and calibration time over plain float passes ({source}):\n\n" + table(["net", *columns], cells)


def tensorrt() -> str:
    rows, source = load("tensorrt_int8_sm86")
    built = [r for r in rows.values() if "MB" in r]
    low = [c.split(", ")[0].split(" of ") for r in built for c in (r["conv as planned"], r["gemm as planned"])]
    good, wanted = (sum(int(pair[i]) for pair in low) for i in (0, 1))
    text = (
        f"TensorRT, int8 for compute capability 8.6, built without a GPU ({source}): {len(built)} of {len(rows)} classification and "
        f"segmentation nets of torchvision build; {good} of {wanted} convolutions and products that the rules allow are Int8 in the builder's table; "
        f"{sum(r.get('same bytes again') == 'yes' for r in built)} give the same bytes again; "
        f"{sum(r.get('proof') == 'ok' for r in built)} ONNX files give the simulator's codes but for ties."
    )
    columns = ["conv as planned", "gemm as planned", "build s", "MB", "elements off", "ties"]
    cells = [[n, *(rows[n][c] for c in columns)] for n in SHOWN if "elements off" in rows.get(n, {})]
    return text + "\n\n" + table(["net", *columns], cells)


def tensorrt_accuracy() -> str:
    rows, source = load("tensorrt_accuracy")
    columns = list(dict.fromkeys(c for r in rows.values() for c in r))
    text = f"Top-1 on trained nets ({source}), the ONNX file in ONNX Runtime with optimizations off:"
    return text + "\n\n" + table(["net", *columns], [[k, *(r.get(c, "") for c in columns)] for k, r in rows.items()])


def training() -> str:
    rows, source = load("training")
    columns = ["net", "scheme", "float", "simulator", "ONNX Runtime", "goal", "epochs", "minutes", "seed", "file KB", "proof"]
    cells = [[f"`{k}`", *(r[c] for c in columns)] for k, r in rows.items()]
    text = f"CIFAR-10 test accuracy after training ({source}): of the float start, of the simulator and of the lowered file, by recipe:"
    return text + "\n\n" + table(["recipe", *columns], cells)


def training_steps() -> str:
    rows, source = load("training_steps")
    columns = [c for c in next(iter(rows.values())) if c.endswith(" ms") or c.endswith("/ float")]
    first = next(iter(rows.values()))
    text = f"Time of a training step ({source}), batch {first['batch']}, {first['threads']} threads, in turns in one run:"
    return text + "\n\n" + table(["net", *columns], [[k, *(r[c] for c in columns)] for k, r in rows.items()])


def size() -> str:
    rows, source = load("size")
    columns = ["weights", "MMAC", "stated MB", "file MB", "most bits stored a weight, 128+ channels", "of these without scales"]
    text = (
        f"Weights, multiply-accumulates and bytes ({source}), counted in the ONNX file. Stated: whole bits for each weight and 4 bytes for each bias, "
        f"as the low-bit literature counts; file: on the disk."
    )
    return text + "\n\n" + table(["net", "scheme", *columns], [[*k.split(" "), *(r[c] for c in columns)] for k, r in rows.items()])


def lowbit() -> str:
    rows, source = load("lowbit")
    columns = ["bits/weight", "kB", "load ms", "x fp32", "x int8", "differ"]
    shown = {k: r for k, r in rows.items() if k.startswith(("4 x 256@14", "resnet18")) and not k.endswith("a32")}
    text = (
        f"Low-bit files in ONNX Runtime ({source}), one thread, batch 1: four 3x3 layers of 256 channels, and ResNet-18 (random weights; the first and last "
        f"layer float where the scheme says so). Times of fp32 and of the int8 file over this one's; codes unlike the integer reference's:"
    )
    return text + "\n\n" + table(["net", *columns], [[k, *(r[c] for c in columns)] for k, r in shown.items()])


def sparsity() -> str:
    rows, source = load("sparsity")
    columns = ["float", "cut at once", "trained", "iao_w8a8", "ONNX Runtime", "density", "masked but not 0", "codes not 0", "steps"]
    text = f"Weights cut by magnitude, CIFAR-10 test accuracy ({source}): before, right behind the cut, after training with masks, in int8, as a file:"
    return text + "\n\n" + table(["net", "cut", *columns], [[*k.split(" "), *(r[c] for c in columns)] for k, r in rows.items()])


def pruning() -> str:
    rows, source = load("pruning")
    parts = []
    for tool, name in (("fxq", "fxq"), ("TP", "Torch-Pruning")):
        found = [str(r[f"{tool} is"]) for r in rows.values() if f"{tool} is" in r]
        wrong = sum(f.startswith("WRONG") for f in found)
        parts.append(f"{name} {found.count('ok')} of {len(found)} right, {wrong} wrong, {len(found) - wrong - found.count('ok')} not cut")
    int8 = [r["fxq int8"] for r in rows.values() if "fxq int8" in r]
    nets = len({k.split(" ")[0] for k in rows})
    both = [r for r in rows.values() if "fxq s" in r and "TP s" in r]
    own = sum(float(r[f"fxq {k} s"]) for r in both for k in ("groups", "choice", "cut"))
    peer, whole = (sum(float(r[f"{t} s"]) for r in both) for t in ("TP", "fxq"))
    text = (
        f"{nets} nets of torchvision and fxq.zoo with random weights, ratios 0.3 and 0.5, multiples of 1 and 8 ({source}): {'; '.join(parts)}. "
        f"Of fxq's cut nets {int8.count('ok')} of {len(int8)} run in 8 bits in ONNX Runtime with 0 elements different from the integer reference. "
        f"Seconds on the {len(both)} rows that both tools cut: Torch-Pruning {peer:.0f}; fxq {whole:.0f} with capture, its check against the model "
        f"and the proof on masks, {own:.0f} for groups, choice and cut alone. `right`: the output is that of the uncut net with masks. "
        f"At ratio 0.5, any width:"
    )
    columns = ["fxq is", "fxq s", "fxq MACs left", "TP is", "TP s", "TP MACs left"]
    cells = [[n, *(rows[f"{n} 0.5 x1"].get(c, "") for c in columns)] for n in (*SHOWN, "nin_gc", "resnet20") if f"{n} 0.5 x1" in rows]
    return text + "\n\n" + table(["net", *columns], cells)


def prune_training() -> str:
    rows, source = load("prune_training")
    columns = ["float", "cut", "trained", "int8", "int8 - trained", "MACs left", "parameters left"]
    cells = [[*k.split(",")[0].replace(" l2", "").split(" ", 1), *(r.get(c, "") for c in columns)] for k, r in rows.items()]
    epochs = max(int(r.get("epochs", 0)) for r in rows.values())
    text = (
        f"CIFAR-10 ResNets cut to half of their MACs, trained for {epochs} epochs, then `iao_w8a8` in ONNX Runtime; "
        f"top-1 on the 10,000 test images ({source}):"
    )
    return text + "\n\n" + table(["net", "tool", *columns], cells)


def prune_speed() -> str:
    rows, source = load("prune_speed")
    columns = list(dict.fromkeys(c for r in rows.values() for c in r))
    text = f"Time of nets at half of their MACs by that of the whole net in the same format, in ONNX Runtime, one thread ({source}):"
    return text + "\n\n" + table(["net and multiple", *columns], [[k, *(r[c] for c in columns)] for k, r in rows.items()])


def prune_scale() -> str:
    rows, source = load("prune_scale")
    columns = ["nodes", "channels", "groups", "find s", "plan s", "cut s"]
    shown = ("resnet18", "resnet50", "resnet152", "densenet121", "densenet201", "swin_t", "swin_b", "efficientnet_b7", "vit_b_16")
    text = f"Seconds to find the groups, to choose, to cut ([plot](benchmarks/results/prune_scale.svg); {source}):"
    return text + "\n\n" + table(["net", *columns], [[n, *(rows[n][c] for c in columns)] for n in shown if n in rows])


def report() -> str:
    rows, source = load("report")
    columns = ["nodes", "MB", "make s", "open s", "slowest pass ms"]
    loud = sum(r["console messages and requests"] for r in rows.values())
    silent = f"{loud} console messages and requests" if loud else "no console message, no request"
    text = f"Reports opened from disk in a headless Chromium ({source}), {silent}; `slowest pass`: from the click on a pass until its graph is drawn:"
    return text + "\n\n" + table(["net", *columns], [[k, *(r[c] for c in columns)] for k, r in rows.items()])


def bisect() -> str:
    rows, source = load("bisect")
    planted, clean = ({k: r for k, r in rows.items() if (" clean " in k) == want} for want in (False, True))
    right, false = sum(bool(r["right"]) for r in planted.values()), sum(not r["right"] for r in clean.values())
    median = {c: statistics.median(r[c] for r in planted.values()) for c in ("evaluations", "runs", "seconds")}
    text = (
        f"Planted faults ({source}): **{right} of {len(planted)}** named by pass and node with nothing else named, {false} "
        f"false verdicts on {len(clean)} clean compilations; medians: {median['evaluations']:g} evaluations of the metric, {median['runs']:g} more runs of a "
        f"batch, {median['seconds']:.1f} s on one thread."
    )
    kinds: dict[tuple[str, str], list[Any]] = {}
    for r in planted.values():
        kinds.setdefault((r["pass"], r["fault"]), []).append(r)
    body = [[step, fault, f"{sum(bool(r['right']) for r in found)} of {len(found)}", found[0]["said"].split("; ")[0]] for (step, fault), found in kinds.items()]
    order = "canonicalize fold-bn legalize annotate share-qparams calibrate convert".split()
    return text + "\n\n" + table(["pass", "fault", "named", "what is said, for example"], sorted(body, key=lambda b: order.index(b[0])))


def mixed() -> str:
    rows, source = load("mixed")
    columns = ["accuracy", "share", "layers in 4 bits", "file kB"]
    text = f"Accuracy of the file in ONNX Runtime under budgets of bytes ({source}); `largest first`: the same budget given by size alone:"
    return text + "\n\n" + table(["net and budget", *columns], [[k, *(r[c] for c in columns)] for k, r in rows.items()])


def debugger() -> str:
    rows, source = load("debugger")
    columns = ["nodes", "compile s", "states", "numbers", "held MB", "bisect s", "evaluations", "runs", "sensitivity s", "its rows"]
    text = (
        f"Costs ({source}), one thread: `states`, `numbers`: more compile time with the graphs kept (the default), with numbers=True as well; "
        "`held MB`: what only the history holds; bisection and sensitivity by layer on 8 images:"
    )
    return text + "\n\n" + table(["net", *columns], [[k, *(r[c] for c in columns)] for k, r in rows.items()])


def archive() -> str:
    rows, source = load("archive")
    columns = ["ratio of the file", "file MB", "over the entropy", "rANS", "Huffman", "fixed index", "CSR", "error / variance"]
    text = (
        f"Files of nets with the paper's densities and of a published clustered net ({source}); ratio: float32 over `os.path.getsize`; rANS, Huffman, fixed "
        "index, CSR: the ratio if all tensors had that form. Codebooks: `linear` as in the paper, `price` with that `rate=`, `optimal` k-means, "
        "`one price` the greatest rate whose error in the net as a whole is that of `linear`, by the model of the weights:"
    )
    return text + "\n\n" + table(["weights", *columns], [[k, *(r.get(c, "") for c in columns)] for k, r in rows.items()])


def archive_speed() -> str:
    rows, source = load("archive_speed")
    columns = ["ratio", "over entropy", "encode MB/s", "decode MB/s", "peak encode", "peak decode"]
    text = f"Speed and memory ({source}), dense float32 by processor time of one thread; peaks: beyond input and result, of the dense tensor:"
    return text + "\n\n" + table(["tensor", *columns], [[k, *(r.get(c, "") for c in columns)] for k, r in rows.items() if "zlib" not in k])


def deepcomp() -> str:
    rows, source = load("deepcomp")
    columns = list(dict.fromkeys(c for r in rows.values() for c in r if c not in ("net", "seed")))
    text = f"CIFAR-10 test accuracy and bytes by stage ({source}); the archive's accuracy is that of a fresh process with nothing but the file:"
    return text + "\n\n" + table(["recipe", *columns], [[f"`{k}`", *(r.get(c, "") for c in columns)] for k, r in rows.items()])


def bitwise() -> str:
    rows, source = load("bitwise")
    columns = {
        "float32 us": lambda r: r[r["best float"]], "int8 us": lambda r: r["ORT int8"], "packed us": lambda r: r["binary packed"],
        "in a net us": lambda r: r["binary net"], "packed x float32": lambda r: r["packed x float"], "packed x int8": lambda r: r["packed x int8"],
        "packed x torch int8": lambda r: r["packed x torch int8"], "TBN / binary": lambda r: r["TBN / binary"],
        "of the limit": lambda r: f"{r['of the limit']:.0%}",
        "2 threads": lambda r: r["2 threads net"], "cold x float32": lambda r: r["cold packed x float"], "x numpy": lambda r: r["net x numpy"],
    }  # fmt: skip
    missed = [f"{k}: {g}" for k, r in rows.items() for g in r["goals"].split(", ") if g.endswith("missed")]
    count = sum(len(r["goals"].split(", ")) for r in rows.values())
    text = (
        f"Binary layers, one thread ({source}): `packed` from float32 to float32, packing included; `in a net` from packed values to packed ones; float32: the "
        f"best of torch and ONNX Runtime; int8: ONNX Runtime; the limit: xor, popcount and add in registers, measured in the same run; cold: with the caches "
        f"that the other runs left. Below 1 the binary layer is slower. Goals: {count - len(missed)} of {count} reached"
        + (f"; missed: {'; '.join(missed)}:" if missed else ":")
    )
    return text + "\n\n" + table(["layer", *columns], [[k, *(get(r) for get in columns.values())] for k, r in rows.items()])


def bitwise_nets() -> str:
    rows, source = load("bitwise_nets")
    columns = [
        "torch fp32 ms", "fp32 ms", "int8 ms", "bits ms", "x fp32", "x int8", "2 threads", "fp32 kB", "int8 kB", "bits kB", "smaller", "smaller in the file",
        "fp32 MB", "int8 MB", "bits MB",
        "cold start s", "warm start s", "numpy start s",
    ]  # fmt: skip
    kinds = list(dict.fromkeys(k for r in rows.values() for k in r["us by kind"]))
    text = (
        f"Whole nets, batch 1, one thread, random weights ({source}): torch and ONNX Runtime in float32, ONNX Runtime in int8, bits; `smaller`: weights of the "
        f"binary layers in memory, their codes in the file; 2 threads: wall time of one over two, on bits; MB: a fresh process beyond torch; "
        f"start: load and first call, with an empty compile cache, a warm one, without numba:"
    )
    parts = "Microseconds of the net on bits by kind of layer; `between`: the calls themselves:"
    return "\n\n".join([
        text, table(["net", *columns], [[k, *(r[c]["bits"] if c == "2 threads" else r.get(c, "") for c in columns)] for k, r in rows.items()]),
        parts, table(["net", *kinds], [[k, *(r["us by kind"].get(c, "") for c in kinds)] for k, r in rows.items()]),
    ])  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {"coverage": coverage, "accuracy": accuracy, "speed": speed, "compile": compile_time, "observers": observers}
TABLES |= {"tensorrt": tensorrt, "tensorrt_accuracy": tensorrt_accuracy, "training": training, "training_steps": training_steps, "size": size, "lowbit": lowbit}
TABLES |= {"sparsity": sparsity, "pruning": pruning, "prune_training": prune_training, "prune_scale": prune_scale, "prune_speed": prune_speed}
TABLES |= {"archive": archive, "archive_speed": archive_speed, "deepcomp": deepcomp}
TABLES |= {"bitwise": bitwise, "bitwise_nets": bitwise_nets}
TABLES |= {"report": report, "bisect": bisect, "mixed": mixed, "debugger": debugger}
SOURCES = {"tensorrt": "tensorrt_int8_sm86"}


def main() -> None:
    pages = ("schemes", "tensorrt", "training", "sparsity", "pruning", "report", "debugging", "archive", "compression", "bitwise")
    for page in (ROOT / "README.md", *(ROOT / "docs" / f"{n}.md" for n in pages)):
        text = page.read_text()
        for name in re.findall(r"<!-- bench:(\w+) -->", text):
            if not (RESULTS / f"{SOURCES.get(name, name)}.json").exists():
                continue
            made = TABLES[name]().replace("](benchmarks/", "](../benchmarks/" if page.parent.name == "docs" else "](benchmarks/")
            text = re.sub(rf"<!-- bench:{name} -->.*?<!-- /bench:{name} -->", f"<!-- bench:{name} -->\n{made}\n<!-- /bench:{name} -->", text, flags=re.S)
        page.write_text(text)


if __name__ == "__main__":
    main()
