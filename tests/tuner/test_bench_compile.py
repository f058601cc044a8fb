"""Compiling ahead for the benchmark: real worker processes, planted jobs that hang or fail, and Ctrl-C meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from mhc import use_backend
from tests.tuner.packaged import without
from tests.tuner.test_bench import TINY
from tl_kernels import KERNELS, launch
from tl_kernels.launch import get_launcher
from tuner import bench as bench_module
from tuner import bench_compile, bench_display, bench_kernels
from tuner.bench import bench
from tuner.bench_compile import compile_ahead, describe
from tuner.bench_display import BenchDisplay
from tuner.bench_kernels import resources
from tuner.errors import INTERRUPTED

PRE = KERNELS["pre"]


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(launch, "_LAUNCHERS", {})
    monkeypatch.setattr(bench_kernels, "_RESOURCES", {})


def never(*args: object) -> None:
    time.sleep(600)


def fails(*args: object) -> None:
    raise RuntimeError("a long trace\nptxas fatal: planted")


def succeeds(*args: object) -> dict[str, int]:
    return {"registers": 17}


def program(C: int = 16):
    p = PRE.problem(2, C)
    return PRE, p, PRE.default(p)


def ahead(programs, seen: list[str] | None = None):
    names: list[str] = [] if seen is None else seen
    return compile_ahead(programs, "cpu", lambda name: None, names.extend)


@pytest.mark.parametrize(("job", "limit", "said"), [(never, 3.0, "no result within 3 s"), (fails, 120.0, "ptxas fatal: planted")])
def test_what_does_not_compile_is_said_and_never_compiled_here(monkeypatch, job, limit, said):
    monkeypatch.setattr(bench_compile, "compile_job", job)
    monkeypatch.setattr(bench_compile, "COMPILE_S", limit)
    seen: list[str] = []
    (failure,) = ahead([program()], seen)
    assert {k: failure[k] for k in ("kernel", "n", "C", "dtype")} == {"kernel": "pre", "n": 2, "C": 16, "dtype": "bfloat16"}
    assert said in failure["failure"]
    assert describe(program()) in seen  # while it compiled
    monkeypatch.setattr(launch, "compile_kernel", lambda *args: pytest.fail("compiled in this process"))
    refused = get_launcher(*program(), "cpu")
    for use in (lambda: refused(1), lambda: refused.bind(4), lambda: refused.jit):
        with pytest.raises(bench_compile.NotCompiled, match=f"pre: not compiled: .*{said}"):
            use()


def test_what_compiles_brings_its_resources(monkeypatch):
    monkeypatch.setattr(bench_compile, "compile_job", succeeds)
    assert ahead([program(), program(24)]) == []
    assert resources(*program(24), "cpu") == {"registers": 17}
    assert launch._LAUNCHERS == {}


def test_resources_that_nobody_wants_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(bench_kernels, "image_resources", lambda *args: pytest.fail("looked for"))
    monkeypatch.setattr(launch, "compile_kernel", lambda *args: None)
    assert bench_compile.compile_job("pre", *program()[1:], "sm_90a", False) == {}
    monkeypatch.setattr(bench_compile, "compile_job", succeeds)
    assert compile_ahead([program()], "cpu", lambda name: None, lambda names: None, resources=False) == []
    assert bench_kernels._RESOURCES == {}


def test_nothing_to_compile_starts_no_process(monkeypatch):
    monkeypatch.setattr(bench_compile, "WorkerPool", lambda *a, **k: pytest.fail("a pool"))
    assert ahead([]) == []


def test_the_bench_goes_on_without_a_kernel_that_hangs_the_compiler(tmp_path, monkeypatch, capsys):
    """The rival is measured, the kernel is a line that says why, and the first shape is written before the second compiles."""
    written: list[int] = []
    profile = str(without(("pre",), tmp_path / "cpu.yaml"))

    def watched(programs, *rest):
        found = tmp_path / "bench.json"
        written.append(len(json.loads(found.read_text())["shapes"]) if found.exists() else 0)
        assert [kernel.name for kernel, *_ in programs] == ["pre"]
        return compile_ahead(programs, *rest)

    for where in (bench_module, bench_kernels):
        monkeypatch.setattr(where, "KERNELS", {"pre": PRE})
    monkeypatch.setattr(bench_compile, "compile_job", never)
    monkeypatch.setattr(bench_compile, "COMPILE_S", 2.0)
    monkeypatch.setattr(bench_module, "compile_ahead", watched)
    with use_backend("tilelang"):
        code = bench(replace(TINY, shapes="8x2x32,4x2x48", rivals="eager", layers="1", kernels=True, out=tmp_path, profile=profile))
    data = json.loads((tmp_path / "bench.json").read_text())
    assert (code, data["complete"], written) == (0, True, [0, 1])
    assert [(f["kernel"], f["C"]) for f in data["compile_failures"]] == [("pre", 32), ("pre", 48)]
    for entry in data["shapes"]:
        assert entry["rows"][0]["agrees"]
        assert [row["failure"] for row in entry["kernels"]] == ["NotCompiled: pre: not compiled: no result within 2 s"]
    assert "pre n=2 C=32" in capsys.readouterr().err


def test_ours_without_its_program_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_compile, "compile_job", fails)
    with use_backend("tilelang"):
        code = bench(replace(TINY, rivals="ours,eager", layers="1", kernels=False, out=tmp_path))
    rows = {row["rival"]: row for row in json.loads((tmp_path / "bench.json").read_text())["shapes"][0]["rows"]}
    assert code == 1
    assert "not compiled: RuntimeError: ptxas fatal: planted" in rows["ours"]["failures"][0]
    assert rows["eager"]["times"]


def test_off_a_terminal_a_line_now_and_then_says_what_is_waited_for(monkeypatch):
    out = StringIO()
    display = BenchDisplay(Console(file=out, width=200))
    display.stage("8 x 2 x 32: compiling", 9)
    display.tick("pre")
    display.busy(["streams_grad", "post_res", "pre", "liger", "compile"])
    assert "streams_grad" not in out.getvalue()  # only just begun
    monkeypatch.setattr(bench_display, "BUSY_S", 0.0)
    display.busy([])
    display.busy(["streams_grad", "post_res", "pre", "liger", "compile"])
    assert out.getvalue().splitlines()[1:] == ["[0:00] 1/9 8 x 2 x 32: compiling: streams_grad; post_res; pre and 2 more"]


INTERRUPTED_RUN = """
from tests.tuner.test_bench_compile import never
from tuner import bench, bench_compile, bench_display
bench_compile.compile_job, bench_display.BUSY_S = never, 0.5
bench.main(["--gpu", "cpu", "--shapes", "8x2x32", "--rivals", "ours,eager,liger", "--out", {out!r}])
"""


def test_ctrl_c_while_compiling_ends_the_run_within_five_seconds(tmp_path: Path):
    environment = {**os.environ, "MHC_BACKEND": "tilelang", "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    run = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_RUN.format(out=str(tmp_path))],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr is not None
    try:
        lines = []
        for line in run.stderr:
            lines.append(line)
            if "compiling: " in line and " n=2 " in line:
                break
        run.send_signal(signal.SIGINT)
        start = time.monotonic()
        rest = run.stderr.read()
        code = run.wait(60)
        seconds = time.monotonic() - start
    finally:
        run.kill()
    assert code == INTERRUPTED, (lines, rest)
    assert seconds < 5
    assert "interrupted before anything was measured" in rest
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())
