"""``benchmarks/bench_training.py``: what it times, which recipes it runs and which it does not, and its tables."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    'net = "tiny_resnet8"\nthreads = 1\nbatch = 8\ntrain_images = 16\nvalidation = 10\ncalibration = 8\n'
    'scheme = "{scheme}"\nweights = "{weights}"\ngoal = {goal}\n[[stages]]\nlr = 1e-3\n'
)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with its results and a few random images in a folder of their own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path / "results")
    monkeypatch.setenv("FXQ_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "test_batch"):
        y, x = np.arange(40, dtype=np.uint8) % 10, rng.integers(0, 256, (40, 3072), np.uint8)
        np.concatenate([y[:, None], x], 1).tofile(tmp_path / "data" / "cifar10" / f"{name}.bin")
    return importlib.import_module("bench_training")


def rows(name: str) -> dict[str, dict[str, Any]]:
    return json.loads(Path("results", f"{name}.json").read_text())["rows"]  # type: ignore[no-any-return]


def test_steps_of_all_contestants_in_both_formats(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench.zoo, "INPUTS", {"tiny_resnet8": (3, 32, 32)})
    assert bench.main(["--steps", "--net", "tiny_resnet8", "--batch", "4", "--threads", "1", "--rounds", "3"]) == 0
    torch.set_num_threads(threads)
    found = rows("training_steps")
    assert list(found) == ["tiny_resnet8 contiguous", "tiny_resnet8 channels last"]
    for row in found.values():
        others = [k for k in row if k.endswith("/ float")]
        assert others == ["fxq QAT / float", "fxq QAFT / float", "torch.ao FX QAT / float"]
        assert all(float(row[k]) > 0.3 for k in others) and (row["batch"], row["threads"], row["rounds"]) == (4, 1, 3)
    assert "goal at most 1.6" in Path("results/training_steps.md").read_text()


def test_the_contestants_train_the_same_net(bench: Any) -> None:
    """All quantized forms start near the float net, have its weights and move them in a step."""
    x, y = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    made = bench.contestants("tiny_resnet8", x)
    with torch.no_grad():
        want = made["float"](x)
        for name, model in made.items():
            assert float((model.eval()(x) - want).norm() / want.norm()) < 0.15 or name.startswith("torch"), name
    for name, model in made.items():
        before = {k: v.detach().clone() for k, v in model.named_parameters()}
        assert sum(v.numel() for v in before.values()) == 78_186, name
        bench.stepper(model, x, y)()
        moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
        assert len(moved) > 15 and (made["float"] is model or any(type(m).__name__ != "Conv2d" for m in model.modules()))


def test_recipes_run_once_and_in_order(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a_later.toml").write_text(TINY.format(scheme="iao_w8a8", weights="first", goal=99))
    Path("first.toml").write_text(TINY.format(scheme="float", weights="", goal=0))
    ran: list[tuple[str, list[str], bool]] = []
    script = importlib.import_module("train_cifar10")

    def train(path: Path, out: Path, changes: list[str], force: bool, seconds: float) -> int:
        ran.append((path.stem, changes, force))
        sets = [w for c in changes for w in ("--set", c)]
        return int(script.main([str(path), "--out", str(out), "--force" if force else "--resume", *sets]))

    monkeypatch.setattr(bench, "train", train)
    command = ["--accuracy", "--out", "out", "a_later.toml", "first.toml"]
    assert bench.main(command) == 0
    assert ran == [("first", [], False), ("a_later", [], False)]
    found = rows("training")
    assert list(found) == ["first", "a_later"] and found["first"]["goal"] == "" and found["a_later"]["goal"] == "99, MISSED"
    body = json.loads(Path("out/a_later/result.json").read_text())
    assert found["a_later"]["ONNX Runtime"] == f"{body['accuracy']['onnxruntime']['test']:.2f}" and found["a_later"]["proof"] == "ok"
    assert found["first"]["float"] == "" != found["a_later"]["float"]
    assert "1 of 1 goals missed" in Path("results/training.md").read_text()
    assert bench.main(command) == 0 and len(ran) == 2
    assert bench.main([*command, "--seeds", "0", "7", "--set", "goal=1"]) == 0
    assert ran[2:] == [("first", ["goal=1", "seed=7"], False), ("a_later", ["goal=1", "seed=7"], False)]
    assert rows("training")["a_later-seed7"]["seed"] == 7
    assert bench.main([*command[:-2], "first.toml", "--set", "lr=2e-3"]) == 0 and ran[4:] == [("first", ["lr=2e-3"], True)]
    assert bench.main([*command[:-2], "first.toml", "--set", "lr=1e30"]) == 1 and "first: FAILED" in capsys.readouterr().err


def test_a_run_that_is_stopped_goes_on(bench: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The example script in a process of its own, with the time that is left."""
    Path("one.toml").write_text(TINY.format(scheme="float", weights="", goal=0))
    threads = torch.get_num_threads()
    script = importlib.import_module("train_cifar10")
    assert script.main(["one.toml", "--out", "out/one", "--set", "lr=1e-4", "--set", "max_seconds=1e-9"]) == bench.STOPPED
    torch.set_num_threads(threads)
    assert bench.train(Path("one.toml"), Path("out/one"), ["lr=1e-4"], False, 600) == 0
    assert "goes on after epoch 0, step 1" in capfd.readouterr().out
    assert json.loads(Path("out/one/result.json").read_text())["command"].endswith("recipes/one.toml --set lr=1e-4")


def test_tables_show_what_was_measured(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "RESULTS", Path("results"))
    common = importlib.import_module("common")
    body = {
        "net": "resnet20", "scheme": "float", "goal": 90.0, "accuracy": {k: {"test": v} for k, v in (("simulator", 91.25), ("onnxruntime", 89.9))},
        "proof": {"ok": False}, "seed": 4, "epochs": 2, "minutes": 3.4, "images_per_second": 5.0, "file_bytes": 7600, "test_images": 10,
        "date": "", "command": "",
    }  # fmt: skip
    common.Table("training", "t").put("some", bench.collected(body))
    assert tables.training().splitlines()[-1] == "| `some` | resnet20 | float |  | 91.25 | 89.90 | 90, MISSED | 2 | 3 | 4 | 8 | NOT ok |"
    common.Table("training_steps", "t").put("n", {"float ms": "5", "fxq QAT ms": "7", "fxq QAT / float": "1.40", "batch": 8, "threads": 2, "rounds": 1})
    assert "batch 8, 2 threads" in tables.training_steps() and tables.training_steps().splitlines()[-1] == "| n | 5 | 7 | 1.40 |"
    row = {"weights": 3, "MMAC": "1.00", "stated MB": "2", "file MB": "4"}
    row |= {"most bits stored a weight, 128+ channels": "1.02", "of these without scales": "1.01"}
    common.Table("size", "t").put("nin xnor_w1a1", row)
    assert tables.size().splitlines()[-1] == "| nin | xnor_w1a1 | 3 | 1.00 | 2 | 4 | 1.02 | 1.01 |"
