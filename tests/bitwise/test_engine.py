"""Which kernels run where: numba and its instruction sets, its cache, threads, and the fallback without it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba.core.caching
import numpy as np
import pytest
from llvmlite import ir

from fxq.bitwise import engine as engines
from fxq.bitwise import layout, numba_compile, threads, tiles, vectors
from fxq.bitwise.engine import NUMPY, engine
from tests.bitwise.kernel_cases import epilogues, fixed_case, pack_codes

RUN = """
import json, sys, warnings
import numpy as np
from fxq.bitwise import layout
from fxq.bitwise.engine import NUMPY, engine
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    e = engine()
    engine()
rng = np.random.default_rng(0)
x = rng.standard_normal((2, 70, 36)).astype(np.float32)
w = rng.choice([-1, 1], (72, 70, 3, 3)).astype(np.int8)
layer = layout.pack_layer(w, padding=1)
same = []
for made in (layout.sign_epilogue(layer, 3), layout.float_epilogue(layer, 1, 2, 0.5)):
    got, want = (k.conv(k.pack(x, -0.5, 0.5, 1, False).reshape(1, 2, 6, 6, 2), layer, made) for k in (e, NUMPY))
    same.append(bool((got == want).all()))
print(json.dumps({"name": e.name, "path": e.path, "same": same, "warnings": [str(v.message) for v in seen if v.category is RuntimeWarning]}))
"""


def run(before: str = "", **env: str) -> dict[str, Any]:
    """What a fresh interpreter says."""
    done = subprocess.run([sys.executable, "-c", before + RUN], env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["same"] == [True, True]
    return said  # type: ignore[no-any-return]


def test_one_cache_serves_several_instruction_sets(tmp_path: Path) -> None:
    """Numba's processor names are restricted to what this machine can execute; on another architecture only its own."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    native = run(**cache)
    assert native["path"] == vectors.PATH and native["warnings"] == []
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nb*")}
    assert files
    run(**cache)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nb*")} == files  # nothing was compiled again
    features = llvm.get_host_cpu_features() if platform.machine() in ("x86_64", "AMD64") else {}
    others = {"haswell": ("AVX2", "avx2"), "x86-64": ("generic", "sse2"), "skylake-avx512": ("AVX-512", "avx512bw")}
    for name, (path, needs) in others.items():
        if features.get(needs):
            assert run(NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="", **cache)["path"] == path
    assert run(**cache)["path"] == vectors.PATH


def test_the_environment_switches_numba_off() -> None:
    said = run(FXQ_NUMBA="0")
    assert (said["name"], said["path"], said["warnings"]) == ("numpy", "generic", [])


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_without_numba_numpy_runs_and_warns_once(missing: str) -> None:
    said = run(before=f"import sys; sys.modules[{missing!r}] = None\n")
    assert said["name"] == "numpy"
    assert len(said["warnings"]) == 1 and "pip install 'fxq[bitwise]'" in said["warnings"][0]


def test_a_broken_numba_warns_and_numpy_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ValueError("LLVM and numba do not fit")

    monkeypatch.setattr(engines.importlib, "import_module", broken)
    engines._compiled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="ValueError: LLVM and numba do not fit"):
            assert engine() is NUMPY
        assert engine() is NUMPY
    finally:
        engines._compiled.cache_clear()


def test_importing_the_package_loads_no_numba() -> None:
    code = "import sys, fxq, fxq.bitwise.engine; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout.strip() == "False"


def test_no_folder_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    monkeypatch.setattr(numba_compile, "KERNELS", {})
    x, values = np.arange(200, dtype=np.uint8), np.arange(256, dtype=np.uint8)[::-1].copy()
    kernels = engine().kernels
    monkeypatch.setattr(kernels, "KERNELS", numba_compile.KERNELS)
    assert (engine().table(x, values) == values[x]).all()
    assert list(numba_compile.KERNELS) == ["table"]


def test_a_change_of_any_source_file_is_part_of_the_cache_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in numba_compile.SOURCES:
        (tmp_path / f"{name}.py").write_text(name)
    monkeypatch.setattr(numba_compile, "__file__", str(tmp_path / "numba_compile.py"))
    seen = set()
    for name in (None, *numba_compile.SOURCES):
        if name:
            (tmp_path / f"{name}.py").write_text("changed")
        seen.add(numba_compile.source_digest())
    assert len(seen) == 1 + len(numba_compile.SOURCES) and 0 not in seen


def test_all_files_that_make_code_are_in_the_key() -> None:
    """Functions of ``numba_jit`` stand alone in their files, whose stamps numba keeps itself."""
    here = Path(engines.__file__).parent
    makers = {p.stem for p in here.glob("*.py") if re.search(r"^(from|import) (numba|llvmlite)", p.read_text(), re.MULTILINE)}
    assert makers - {"numba_jit"} <= set(numba_compile.SOURCES) and "vectors" in makers


@pytest.mark.parametrize(("planes", "masked"), [(1, False), (2, False), (1, True), (2, True)])
def test_the_tile_uses_cnt_on_arm(planes: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assembly only: no ARM processor runs it here."""
    monkeypatch.setattr(tiles, "LANES", 2)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu"
    assert vectors.probe(triple, "generic", "") == ("NEON", 2)
    module = ir.Module()
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [vectors.I64] * 10), "dots")
    b = ir.IRBuilder(function.append_basic_block())

    class Context:
        get_dummy_value = staticmethod(lambda: None)

    signature, codegen = tiles.tile(4, 8, planes, masked)._defn(None)
    codegen(Context, b, signature, function.args)
    b.ret_void()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu="generic")
    text = machine.emit_assembly(llvm.parse_assembly(str(module)))
    assert text.count("\tcnt\tv") == 16 * (2 if masked and planes == 2 else 1)  # 4 pixels, 8 channels, 2 to a vector


# ---------------------------------------------------------------- threads


def test_many_callers_with_threads_of_their_own() -> None:
    cases = [fixed_case(s, 64, 64, 3, 28, padding=1, ternary_a=bool(s % 2)) for s in range(4)]
    wanted = [epilogues(c) for c in cases]
    faults: list[str] = []

    def call(case: Any, made: Any) -> None:
        for _ in range(10):
            for kind in ("sign", "float"):
                epilogue, want = made[kind]
                got = engine().conv(case.packed, case.layer, epilogue, 2)
                if not (got == (pack_codes(want, 1) if kind == "sign" else want)).all():
                    faults.append(kind)

    team = [threading.Thread(target=call, args=pair) for pair in zip(cases * 2, wanted * 2, strict=True)]  # each layer is called by two
    for t in team:
        t.start()
    for t in team:
        t.join()
    assert faults == []


def test_threads_of_python_where_there_is_no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "openmp", lambda: None)
    case = fixed_case(3, 96, 64, 3, 28, padding=1)
    epilogue, want = epilogues(case)["u8"]
    for count in (1, 2, 4):
        assert (engine().conv(case.packed, case.layer, epilogue, count) == want).all()
    assert (engine().conv(case.packed, case.layer, epilogue, 3) == NUMPY.conv(case.packed, case.layer, epilogue)).all()


def test_a_forked_child_computes_alone() -> None:
    code = """
import os
import numpy as np
from fxq.bitwise import layout
from fxq.bitwise.engine import NUMPY, engine
layer = layout.pack_layer(np.ones((64, 64, 3, 3), np.int8), padding=1)
x = np.random.default_rng(0).integers(0, 2**63, (1, 2, 28, 28, 1)).astype(np.uint64)
e = layout.int32_epilogue(layer)
want = NUMPY.conv(x, layer, e)
assert (engine().conv(x, layer, e, 2) == want).all()
child = os.fork()
if child == 0:
    os._exit(0 if (engine().conv(x, layer, e, 2) == want).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    if hasattr(os, "fork"):
        assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_small_work_is_not_dealt_out() -> None:
    from fxq.bitwise import numba_plan

    small, large = (layout.pack_layer(np.ones((n, 64, 3, 3), np.int8), padding=1) for n in (8, 256))
    shape = (1, 1, 28, 28, 1)
    assert numba_plan.Plan(shape, small, 2).threads == 1
    assert numba_plan.Plan(shape, large, 2).threads == 2
