"""The console script ``fxq``: exit codes, one line for a mistake, files whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import external_data_helper

from fxq.command import main
from fxq.errors import ArtifactError
from fxq.lint_trt import check
from tests.lint_zoo import conv
from tests.test_lint_fix import clip_on
from tests.trt_zoo.zoo import ALL


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for file, name in (("clean", "matmul"), ("warn", "scale [1]"), ("bad", "cnn int32 bias"), ("worse", "cnn uint8, 0"), ("float", "conv float")):
        onnx.save(ALL[name].make(), f"{file}.onnx")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("clean.onnx --target sm86", 0), ("warn.onnx --target tensorrt", 0), ("bad.onnx --target sm86", 1), ("clean.onnx --target sm75", 1),
        ("clean.onnx --target sm86 --strict", 0), ("warn.onnx --target sm86 --strict", 1), ("bad.onnx", 0), ("float.onnx", 0), ("float.onnx --strict", 1),
        ("clean.onnx --target portable", 0), ("bad.onnx --target portable", 1), ("bad.onnx --target bitwise", 0), ("float.onnx --target bitwise --strict", 1),
        ("bad.onnx --target sm86 --fix -o fixed.onnx", 0), ("worse.onnx --target sm86 --fix -o fixed.onnx", 1),
    ],
)  # fmt: skip
def test_exit_codes(here: Path, arguments: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", *arguments.split()]) == code
    out = capsys.readouterr()
    assert out.out and not out.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lint", "the following arguments are required: FILE.onnx. See fxq lint --help"),
        ("", "the following arguments are required: COMMAND. See fxq --help"),
        ("lnt clean.onnx", "invalid choice: 'lnt'"),
        ("lint missing.onnx --target sm86", "missing.onnx: cannot be read: No such file or directory. Check the path"),
        ("lint . --target sm86", ".: cannot be read: Is a directory. Check the path"),
        ("lint no.onnx --target sm86", "no.onnx: is not a whole ONNX file"),
        ("lint clean.onnx --target sm8", "no lint rules for target 'sm8'. did you mean 'sm8"),
        ("lint clean.onnx --target tvm", "no lint rules for target 'tvm'. "),
        ("lint clean.onnx --target openvino --fix", "--fix repairs for ONNX Runtime and TensorRT. Use --target onnxruntime"),
        ("lint clean.onnx --portable --fix", "--portable is a lint of its own, for CPUs. Leave --fix and --target out"),
        ("lint clean.onnx --target sm86 -o out.onnx", "-o is the file that --fix writes. Add --fix"),
        ("lint bad.onnx --target sm86 --fix -o warn.onnx", "warn.onnx: the file exists. Add --force or choose another name"),
        ("lint bad.onnx --target sm86 --fix -o nowhere/out.onnx", "nowhere/out.onnx: cannot write"),
        ("lint clean.onnx --nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes(here: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("no.onnx").write_bytes(b"\x08nonsense")
    before = {p.name: p.read_bytes() for p in here.iterdir()}
    assert main(arguments.split()) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("fxq: ") and out.err.count("\n") == 1 and message in out.err
    assert {p.name: p.read_bytes() for p in here.iterdir()} == before


def test_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["lint", "warn.onnx", "--target", "sm86"])
    text = capsys.readouterr().out
    assert text.startswith("sm86: 0 errors, 1 warning, conv 1 float\n  warning [scale-rank] conv: Conv runs in float:")
    main(["lint", "clean.onnx"])
    assert "matmul 1/1 int8" in capsys.readouterr().out


def test_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "bad.onnx", "--target", "sm86", "--json"]) == 1
    body = json.loads(capsys.readouterr().out)
    assert (body["file"], body["ok"], body["findings"][0]["code"]) == ("bad.onnx", False, "int32-bias")
    assert main(["lint", "bad.onnx", "--target", "sm86", "--json", "--fix", "-o", "fixed.onnx"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["ok"] and body["output"] == "fixed.onnx" and body["repairs"] == ["DequantizeLinear18: int32 bias written in float"]
    assert main(["lint", "clean.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ops"][0]["op"] == "MatMul"


def test_fix_writes_the_repaired_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("bad.onnx").read_bytes()
    assert main(["lint", "bad.onnx", "--target", "sm86", "--fix", "-o", "fixed.onnx"]) == 0
    assert capsys.readouterr().out.startswith("DequantizeLinear18: int32 bias written in float\nsm86: 0 errors")
    assert check(onnx.load("fixed.onnx"), "sm86").findings == () and Path("bad.onnx").read_bytes() == before
    assert main(["lint", "bad.onnx", "--target", "sm86", "--fix", "-o", "bad.onnx", "--force"]) == 0
    assert Path("bad.onnx").read_bytes() == Path("fixed.onnx").read_bytes() != before


def test_weights_beside_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load("warn.onnx")
    external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=256)
    Path("sub").mkdir()
    onnx.save(model, "sub/large.onnx")
    assert len(Path("sub/large.onnx").read_bytes()) < 1500 < len(Path("sub/weights.bin").read_bytes())
    assert main(["lint", "sub/large.onnx", "--target", "sm86", "--fix", "-o", "out.onnx"]) == 0
    assert check(onnx.load("out.onnx"), "sm86").findings == () and len(Path("out.onnx").read_bytes()) > 2304
    Path("sub/weights.bin").unlink()
    assert main(["lint", "sub/large.onnx", "--target", "sm86"]) == 0
    capsys.readouterr()
    assert main(["lint", "sub/large.onnx", "--target", "sm86", "--fix", "-o", "more.onnx"]) == 2
    assert "sub/large.onnx: its weights cannot be read" in capsys.readouterr().err and not Path("more.onnx").exists()


def test_interrupt_and_debug(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FXQ_DEBUG", "1")
    with pytest.raises(ArtifactError):
        main(["lint", "missing.onnx"])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxq.lint.lint", stop)
    assert main(["lint", "clean.onnx"]) == 130 and capsys.readouterr().err == "fxq: stopped\n"


def test_help_is_quick() -> None:
    """Neither torch nor onnx is imported before there is a file to read."""
    code = "import sys; from fxq.command import main\ntry: main(['lint', '--help'])\nexcept SystemExit: print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "--fix" in done.stdout and done.stdout.endswith("[]\n")


def test_is_installed_as_a_script() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["fxq"] == "fxq.command:main"


def test_fix_without_a_file_says_what_it_would_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in here.iterdir())
    assert main(["lint", "bad.onnx", "--target", "sm86", "--fix"]) == 0
    assert "int32 bias written in float" in capsys.readouterr().out and sorted(p.name for p in here.iterdir()) == before


def test_fix_repairs_for_onnxruntime(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(clip_on(40)(), "relu.onnx")
    assert main(["lint", "relu.onnx", "--strict"]) == 1
    assert main(["lint", "relu.onnx", "--fix", "--strict", "-o", "fixed.onnx"]) == 0
    assert "LeakyRelu of slope 0" in capsys.readouterr().out and main(["lint", "fixed.onnx", "--strict"]) == 0


def test_portable_reads_the_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(conv(), "conv.onnx")
    assert main(["lint", "conv.onnx", "--portable"]) == 0 and "can leave 16 bits" in capsys.readouterr().out
    assert main(["lint", "conv.onnx", "--portable", "--strict", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["op"] == "Conv"
    assert main(["lint", "float.onnx", "--portable", "--strict"]) == 0
