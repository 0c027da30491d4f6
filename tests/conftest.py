"""Where the research data is: ``$FXQ_DATA``, by default ``../shared/data`` beside the repository.

Tests marked ``data`` measure trained nets on labelled images. Without the data they are not collected, and the run says so in its first and last
lines; a test is never skipped for another reason. A ``$FXQ_DATA`` that is set and leads nowhere stops the run.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("FXQ_DATA") or ROOT.parent / "shared" / "data")
FOUND = (DATA / "models").is_dir() and (DATA / "cifar10").is_dir()
MISSING = f"tests marked 'data' do not run: the research data is not at {DATA}; set FXQ_DATA to its folder"


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("FXQ_DATA") and not FOUND:
        raise pytest.UsageError(f"FXQ_DATA is {DATA}, which holds no folders models and cifar10")


def pytest_report_header() -> str:
    return f"research data: {DATA}" if FOUND else MISSING


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if FOUND:
        return
    lost = [i for i in items if i.get_closest_marker("data")]
    config.hook.pytest_deselected(items=lost)
    items[:] = [i for i in items if i not in lost]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not FOUND:
        terminalreporter.write_line(MISSING, yellow=True)


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the research data; only for tests marked ``data``."""
    assert FOUND, MISSING
    return DATA


@pytest.fixture(scope="session")
def loader(data: Path) -> Callable[[str], ModuleType]:
    """Imports a module of the data folder by its path."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, data / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
