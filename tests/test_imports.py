"""The one-way street of imports (docs/architecture.md), held by reading the source: function-level imports count as well."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fxq"

STREET: tuple[tuple[str, ...], ...] = (
    ("errors", "heap", "progress", "doctor_machine", "tables_html"),
    ("spec", "distributed", "selection", "graph_slim", "sharing"),
    ("numerics", "schemes", "convolutions", "histogram"),
    ("shared", "archive", "kmeans"),
    ("modules", "observers", "targets", "lowbit", "archive_report"),
    ("graph", "lowering", "tracers", "calibration", "weight_ranges", "weight_masks", "moves", "lineage", "values", "graph_json_rules"),
    ("states",),
    (
        "trackers", "estimators", "graph_json", "shapes", "snapshot", "folding", "kernels", "layerwise", "routing", "concrete", "exported", "parts",
        "costs", "channels", "selectors", "portability_pairs",
    ),
    ("verify", "canonical", "trace", "prune_report", "channel_reshape", "doctor_health", "interop", "tabular", "recorder", "archive_items"),
    (
        "pipeline", "canonical_math", "canonical_chains", "canonical_index", "canonical_reduce", "canonical_shape", "constants", "inline",
        "channel_rules", "cutting",
    ),
    (
        "canonical_layers", "canonical_attention", "forms", "forms_shuffle", "forms_tidy", "forms_unpack", "placement", "training", "finite",
        "groups", "dead_channels",
    ),
    ("placement_inputs", "training_lowbit", "training_shared", "importance", "budget", "masking", "weight_levels", "layer_shapes"),
    ("pruning", "toggles", "grafts", "metrics"),
    ("audit", "quant_sensitivity"),
    ("audit_bias", "audit_grids", "audit_ranges", "audit_runs", "verdicts", "mixed"),
    ("bisect",),
    ("debugging",),
    ("passes", "backends"),
    ("bitwise",),
    ("lint_graph", "lint_whole", "exposed", "lint_trt_fold", "lint_trt_report", "prunable", "layer_runs"),
    ("lint_clips", "verdict", "lint_trt_graph", "lint_report", "lint_ov_rules", "layer_table"),
    ("lint_steps", "lint_trt_flow", "lint_trt_packed", "lint_ov", "auto_lowbit", "layer_program"),
    ("lint_rules", "lint_trt_ops", "lint_ov_runtime"),
    ("lint_trt_rules", "lint_trt_model", "lint_trt_edit"),
    ("lint_trt", "lint_trt_codes", "lint_trt_scales", "lint_fix_layers"),
    ("lint", "proof", "lint_trt_fix", "lint_fix"),
    ("tensorrt", "archive_graph"),
    ("engine_proof", "archive_proof", "bit_proof"),
    ("portability_lint", "admission", "sources", "report", "compressing"),
    ("compiled", "group_sensitivity"),
    ("trainable", "slimming", "pruned", "portability"),
    ("archived", "layer_timing"),
    ("api", "zoo", "modelfile", "prune_model", "sparsity"),
    ("doctor_plan",),
    ("diagnosis",),
    ("cli_engine", "cli_prune", "cli_doctor", "cli_debug", "cli_inspect"),
    ("cli", "cli_times"),
    ("command",),
)  # fmt: skip
"""A module imports from the rows above its own only."""

ONE_BACKEND = (
    {
        "onnx_qdq", "onnx_ops", "onnx_weighted", "onnx_float", "onnx_island", "onnx_limits", "onnx_writer", "onnx_codes", "onnx_packed", "onnx_wide",
        "onnx_shared", "onnx_half", "trt_cache",
    },
    {"trt_builder", "trt_engine", "trt_layers", "trt_messages", "trt_profiles"},
)
"""The ONNX writer and TensorRT are one backend each in several files, which may import each other; any other import between backends is forbidden."""

FREE = ("zoo", "report", "archive", "bitwise")
"""Packages whose files may import each other."""

ROW = {name: i for i, row in enumerate(STREET) for name in row}


def files() -> dict[str, Path]:
    """Dotted name below ``fxq`` -> file, without the package's own ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        if name:
            found[name] = path
    return found


def imports(path: Path) -> list[tuple[int, str]]:
    """``(line, dotted name below fxq)`` of every import of fxq's own modules in a file."""
    known, out = files(), []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [(node.lineno, a.name.removeprefix("fxq.")) for a in node.names if a.name.startswith("fxq.")]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            base = (node.module or "").split(".")
            if base[0] == "fxq":
                inner = ".".join(base[1:])
                names = [f"{inner}.{a.name}".strip(".") for a in node.names]
                out += [(node.lineno, n if n in known else inner) for n in names if n in known or inner]
    return out


def faults(name: str, path: Path) -> list[str]:
    """Imports of a file that go against the street."""
    top, found = name.split(".")[0], []
    for line, target in imports(path):
        other = target.split(".")[0]
        if other == top:
            own = top in FREE or (top == "backends" and any({name.split(".")[-1], target.split(".")[-1]} <= one for one in ONE_BACKEND))
            fine = own and target != name
        else:
            fine = ROW[other] < ROW[top]
        if not fine:
            found.append(f"fxq/{path.relative_to(PACKAGE)}:{line}: {name} imports {target}")
    return found


def test_every_module_has_its_place() -> None:
    assert {n.split(".")[0] for n in files()} == set(ROW)
    assert len(ROW) == sum(map(len, STREET))


@pytest.mark.parametrize("name", files())
def test_imports_go_one_way(name: str) -> None:
    assert faults(name, files()[name]) == []


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("spec", "from fxq.numerics import quantize", "spec imports numerics"),
        ("graph", "def f():\n    from fxq import snapshot", "graph imports snapshot"),
        ("passes.fold_bn", "from fxq.backends.reference import Reference", "passes.fold_bn imports backends.reference"),
        ("passes.fold_bn", "from fxq.passes.annotate import Annotate", "passes.fold_bn imports passes.annotate"),
        ("passes.fold_bn", "from fxq.passes import annotate", "passes.fold_bn imports passes.annotate"),
        ("backends.reference", "import fxq.passes.convert", "backends.reference imports passes.convert"),
        ("backends.reference", "from fxq.backends.onnx_qdq import OnnxQdq", "backends.reference imports backends.onnx_qdq"),
        ("backends.onnx_qdq", "from fxq.backends import onnxruntime", "backends.onnx_qdq imports backends.onnxruntime"),
        ("api", "from fxq.cli import main", "api imports cli"),
    ],
)
def test_a_wrong_turn_is_found(name: str, line: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = files()
    monkeypatch.setattr(f"{__name__}.files", lambda: known)
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "wrong.py"
    path.write_text(line + "\n")
    assert [f.split(": ")[1] for f in faults(name, path)] == [fault]


def test_what_may_be_imported_is_found() -> None:
    assert "graph" in {n for _, n in imports(files()["snapshot"])}
    assert {"passes.annotate", "schemes", "backends.onnx_qdq"} <= {n for f in ("api", "compiled") for _, n in imports(files()[f])}
