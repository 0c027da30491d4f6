"""Every name of TensorRT that the backend uses exists in TensorRT 10.16, 11.4 and RTX 1.7, whose names stand in ``trt_api/``.

The lists hold the classes that fxq uses, with all their members: ``{"Builder": ["build_serialized_network", ...], ...}``.
"""

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxq.backends import trt_engine, trt_worker

HERE = Path(__file__).parent
LISTS: dict[str, dict[str, list[str]]] = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "trt_api").glob("*.json"))}
CLASSES = {
    "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser", "error": "ParserError",
    "profile": "IOptimizationProfile", "cache": "ITimingCache", "layer": "ILayer", "runtime": "Runtime", "engine": "ICudaEngine",
    "context": "IExecutionContext", "inspector": "EngineInspector",
}  # fmt: skip
"""Names of variables and attributes that hold objects of TensorRT."""
PYTHON = {"__members__", "__init__", "__version__"}
OVERRIDDEN = {"Log": ("ILogger", ["log"]), "Monitor": ("IProgressMonitor", ["phase_start", "step_complete", "phase_finish"])}

Use = tuple[str, bool, int]
"""``Class.member`` or ``Class``, whether it stands behind a ``hasattr(trt, ...)``, line."""


def asks(test: ast.expr) -> bool:
    """Whether a condition contains ``hasattr(trt, ...)``."""
    calls = (n for n in ast.walk(test) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "hasattr")
    return any(isinstance(c.args[0], ast.Name) and c.args[0].id == "trt" for c in calls)


def held(node: ast.expr) -> str | None:
    """The class that ``builder`` or ``self.engine`` stand for."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    return CLASSES.get(name or "")


def of_module(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "trt" or isinstance(node.value, ast.Attribute) and node.value.attr == "trt"


def uses(node: ast.AST, asked: bool = False) -> Iterator[Use]:
    """Every use of a name of TensorRT below a node."""
    if isinstance(node, ast.Attribute):
        inner = node.value
        if of_module(node):
            yield node.attr, asked, node.lineno
        elif isinstance(inner, ast.Attribute) and of_module(inner):
            yield f"{inner.attr}.{node.attr}", asked, node.lineno
        elif held(inner):
            yield f"{held(inner)}.{node.attr}", asked, node.lineno
    for child in ast.iter_child_nodes(node):
        inside = isinstance(node, ast.If) and asks(node.test) and child is not node.test
        yield from uses(child, asked or inside)


def stands(name: str, names: dict[str, list[str]]) -> bool:
    first, _, member = name.partition(".")
    return name in PYTHON or first in names and (not member or member in PYTHON or member in names[first])


def missing(tree: ast.AST) -> list[str]:
    """Uses that a version does not have; behind a ``hasattr`` one version is enough."""
    found = []
    for name, asked, line in uses(tree):
        lacking = [version for version, names in LISTS.items() if not stands(name, names)]
        if lacking and not (asked and len(lacking) < len(LISTS)):
            found.append(f"line {line}: {name} is not in {', '.join(lacking)}")
    return found


def tree(module: Any) -> ast.AST:
    return ast.parse(inspect.getsource(module))


def test_the_lists_are_there() -> None:
    assert set(LISTS) == {"trt_10.16", "trt_11.4", "rtx_1.7"}
    assert all(set(CLASSES.values()) <= set(names) for names in LISTS.values())


@pytest.mark.parametrize("module", [trt_worker, trt_engine])
def test_every_name_exists_in_every_version(module: Any) -> None:
    assert missing(tree(module)) == []


def test_the_walk_finds_what_is_used() -> None:
    found = {name for module in (trt_worker, trt_engine) for name, _, _ in uses(tree(module))}
    assert {
        "Builder", "Builder.create_network", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "OnnxParser.parse_from_file", "ParserError.desc",
        "IBuilderConfig.progress_monitor", "ProfilingVerbosity.DETAILED", "ITimingCache.combine", "Runtime.deserialize_cuda_engine", "ILayer.name",
        "IExecutionContext.execute_async_v3", "ICudaEngine.get_tensor_profile_shape", "TensorIOMode.INPUT", "EngineInspector.get_engine_information",
    } <= found  # fmt: skip
    behind = {name for name, asked, _ in uses(tree(trt_worker)) if asked}
    assert {"ComputeCapability.__members__", "IBuilderConfig.set_compute_capability"} <= behind
    assert "IBuilderConfig.set_flag" not in behind


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("config.set_flag(trt.BuilderFlag.INT8)", "BuilderFlag.INT8 is not in rtx_1.7, trt_11.4"),
        ("builder.platform_has_fast_int8", "Builder.platform_has_fast_int8 is not in rtx_1.7, trt_11.4"),
        ("self.engine.weights_loaded", "ICudaEngine.weights_loaded is not in trt_10.16, trt_11.4"),
        ("config.num_compute_capabilities = 1", "IBuilderConfig.num_compute_capabilities is not in trt_10.16, trt_11.4"),
        ("trt.IInt8Calibrator", "IInt8Calibrator is not in rtx_1.7, trt_10.16, trt_11.4"),
        ("if hasattr(trt, 'ComputeCapability'):\n    trt.ComputeCapabilities", "ComputeCapabilities is not in rtx_1.7, trt_10.16, trt_11.4"),
        ("if hasattr(trt, 'ComputeCapability'):\n    config.num_compute_capabilities = 1", None),
        ("trt.Builder(log).create_network", None),
    ],
)
def test_a_wrong_name_is_found(code: str, fault: str | None) -> None:
    assert [f.split(": ")[1] for f in missing(ast.parse(code))] == ([] if fault is None else [fault])


def test_the_installed_package_has_each_name() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    lacking = []
    for module in (trt_worker, trt_engine):
        for name, _, _ in uses(tree(module)):
            owner = trt
            for part in name.split("."):
                if not hasattr(owner, part):
                    lacking.append(name)
                    break
                owner = getattr(owner, part)
    assert lacking == []


def test_overridden_methods_exist_in_every_version() -> None:
    found = {node.name: node for module in (trt_worker, trt_engine) for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef)}
    for name, (base, methods) in OVERRIDDEN.items():
        assert [n.name for n in found[name].body if isinstance(n, ast.FunctionDef) and n.name != "__init__"] == methods
        assert all(set(methods) <= set(names[base]) for names in LISTS.values())


def test_the_stand_in_has_names_of_tensorrt_only() -> None:
    found = ast.parse((HERE / "trt_fake.py").read_text())
    classes = [node for node in found.body if isinstance(node, ast.ClassDef)]
    assert {"Builder", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "OnnxParser"} <= {c.name for c in classes}
    for node in classes:
        methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef) and n.name != "__init__"]
        for version in ("trt_10.16", "trt_11.4"):
            assert set(methods) <= set(LISTS[version][node.name]), (node.name, version)
